//! Quantization of weight matrices: grids, rounding to nearest, GPTQ, and GPTQ combined with
//! pruning in one pass.
//!
//! Everything here is a pure function of a weight `[out, in]` and of statistics of the layer's
//! input, and returns a [`QuantizedMatrix`](crate::format::QuantizedMatrix). The code of a pruned
//! weight is its zero point, so the weight is exactly 0.

mod gptq;
mod grid;
mod rtn;

pub use gptq::{GptqConfig, GroupGrids, gptq, sparse_gptq};
pub use grid::{GridConfig, GroupGrid, ScaleDtype};
pub use rtn::round_to_nearest;

#[cfg(test)]
mod tests;
