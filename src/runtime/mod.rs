//! Running a model: prefill, decode, generation for one sequence or many.
//!
//! [`Model`] is a model as it is run: its weights stored compressed ([`StoredMatrix`](crate::format::StoredMatrix)) and multiplied
//! compressed ([`kernels`](crate::kernels)), a whole super-network with its named subnets if wanted, opened from a bundle or a Hugging
//! Face folder by memory map. A [`Session`] is one sequence on it. Both are driven by the same [`HfConfig`](crate::io::HfConfig) as
//! [`Decoder`](crate::model::Decoder) and compute the same, on slices, without Burn: the cost of an operation there is a good part of a
//! token's time. [`DeviceSession`] and [`generate_batch`] run a decoder on any Burn device.

mod attention;
mod batch;
mod build;
mod bundle;
mod cache;
mod convert;
mod device;
mod forward;
mod linear;
mod model;
mod plan;
mod sample;
mod session;
mod shape;
mod weights;
mod workspace;

pub use batch::{GenerateConfig, generate_batch};
pub use cache::CacheFormat;
pub use device::DeviceSession;
pub use linear::{LinearLayer, Number};
pub use model::{LayerInfo, Model, ModelOptions, NamedSubnet, Verify};
pub use plan::FormatPlan;
pub use sample::{SampleConfig, Sampler};
pub use session::{Session, SessionConfig, decode_batch};
