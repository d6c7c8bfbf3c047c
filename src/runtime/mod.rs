//! Runs models on plain slices, without Burn: prefill, decoding and generation, for one sequence or
//! several.
//!
//! [`Model`] holds compressed weights ([`StoredMatrix`](crate::format::StoredMatrix)) and
//! multiplies directly with their stored form ([`kernels`](crate::kernels)). It can also hold a
//! whole supernet with named subnets. A model is opened from a bundle or a Hugging Face folder, by
//! default through a memory map. A [`Session`] is one sequence on a model; [`decode_steps`] appends
//! any number of tokens to each of several. For a loop of one's own, a [`Sampler`] draws tokens
//! from logits, a [`TextStream`] makes text of them, and an [`Adapter`] is a LoRA that sessions
//! choose at run time. A small subnet may propose tokens for a larger one ([`Session::set_draft`]).
//! The executor is driven by the same [`Architecture`](crate::arch::Architecture) as the Burn
//! decoder and computes the same function.

mod adapter;
mod attention;
mod batch;
mod build;
mod bundle;
mod cache;
mod convert;
mod draft;
mod forward;
mod generate;
mod linear;
mod mixed;
mod model;
mod open;
mod plan;
mod sample;
mod session;
mod shape;
mod size;
mod source;
mod state;
mod stream;
mod subnets;
#[cfg(test)]
mod tests;
mod weights;
mod workspace;

pub use crate::kernels::Activations;
pub use adapter::Adapter;
pub use batch::{Step, decode_batch, decode_steps};
pub use cache::CacheFormat;
pub use generate::{GenerateConfig, generate_many};
pub use linear::{LinearLayer, Number};
pub use mixed::MixedStorage;
pub use model::{LayerInfo, Model, ModelOptions, NamedSubnet, Verify};
pub use plan::FormatPlan;
pub use sample::{SampleConfig, Sampler, TokenMask};
pub use session::{Session, SessionConfig};
pub use size::ActiveSize;
pub use stream::TextStream;

/// The parts of a model, for the modules that build one.
#[cfg(feature = "burn")]
pub(crate) mod parts {
    pub(crate) use super::build::{A, BT};
    pub(crate) use super::model::{ModelParts, SubnetParts, Weights};
    pub(crate) use super::plan::encode;
    pub(crate) use super::weights::{AdapterWeights, LayerWeights, Norms, Weight};
}
