//! How a weight is stored, apart from any model: exact values, no tensor library.

mod groups;

pub use groups::{QuantizedMatrix, QuantizedParts};
