//! How a weight is stored, apart from any model: exact values, no tensor library.

mod groups;
mod storage;

pub use groups::{QuantizedMatrix, QuantizedParts};
pub use storage::WeightFormat;
