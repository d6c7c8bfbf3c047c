//! The single description of a decoder: model families, sub-blocks with their sizes and names, and
//! rotary positions.
//!
//! Everything else takes its facts from [`Architecture`]. Config readers fill it in; the Burn
//! decoder ([`model`](crate::model)) and the executor on slices ([`runtime`](crate::runtime)) are
//! driven by it; costs, elastic widths and exports take sizes and names from it. A new family is
//! one new row in `family.rs`. If it needs an operation that no other family has, the two executors
//! must implement that operation as well.

mod block;
mod decoder;
pub(crate) mod family;
mod linear;
mod rope;

pub use block::{BlockDims, NormKind, SubBlock};
pub(crate) use decoder::Fused;
pub use decoder::{Activation, Architecture, LinearSpec, NormSpec, Positions, Scores};
pub use family::Family;
pub use linear::LinearKind;
pub use rope::{Rope, RopeConfig, RopeScaling};
