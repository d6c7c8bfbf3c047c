//! Running a model on slices, without Burn: prefill, decode, generation for one sequence or many.
//!
//! [`Model`] holds compressed weights ([`StoredMatrix`](crate::format::StoredMatrix)), multiplies them as
//! they are stored ([`kernels`](crate::kernels)), and may be a whole supernet with named subnets. It is
//! opened from a bundle or a Hugging Face folder by memory map. A [`Session`] is one sequence on it. The
//! executor is driven by the same [`Architecture`](crate::arch::Architecture) as the Burn decoder and
//! computes the same.

mod attention;
mod build;
mod bundle;
mod cache;
mod convert;
mod forward;
mod generate;
mod linear;
mod model;
mod plan;
mod sample;
mod session;
mod shape;
mod weights;
mod workspace;

pub use crate::kernels::Activations;
pub use cache::CacheFormat;
pub use generate::GenerateConfig;
pub use linear::{LinearLayer, Number};
pub use model::{LayerInfo, Model, ModelOptions, NamedSubnet, Verify};
pub use plan::FormatPlan;
pub use sample::{SampleConfig, Sampler};
pub use session::{Session, SessionConfig, decode_batch};

/// What a model is put together from, for the rooms that make one.
#[cfg(feature = "burn")]
pub(crate) mod parts {
    pub(crate) use super::build::{A, BT};
    pub(crate) use super::model::{ModelParts, Weights};
    pub(crate) use super::plan::encode;
    pub(crate) use super::weights::{AdapterWeights, LayerWeights, Norms, Weight};
}
