//! What a decoder is, described once: families, the parts of a block, their sizes and names, rotary
//! positions.
//!
//! [`Architecture`] is the description that everything else asks: the readers of configs fill it in, the
//! Burn decoder ([`model`](crate::model)) and the slice executor ([`runtime`](crate::runtime)) are
//! driven by it, and costs, elastic widths and exports take sizes and names from it. A new family is one
//! row in `family.rs` (and, where it brings an operation that no family had, that operation in the two
//! executors).

mod block;
mod decoder;
pub(crate) mod family;
mod linear;
mod rope;

pub use block::{BlockDims, NormKind, SubBlock};
pub use decoder::{Architecture, LinearSpec, NormSpec};
pub use family::Family;
pub use linear::LinearKind;
pub use rope::{Rope, RopeScaling};
