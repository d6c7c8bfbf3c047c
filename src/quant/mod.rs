//! Weights on grids of small integers: grids, rounding to nearest, GPTQ, and GPTQ with pruning in one pass.
//!
//! Everything here is a pure function of a weight `[out, in]` and of statistics of the layer's input, and gives a
//! [`QuantizedMatrix`](crate::format::QuantizedMatrix). A pruned weight is its zero point, exactly 0, and stays so.

mod gptq;
mod grid;
mod rtn;

pub use gptq::{GptqConfig, GroupGrids, gptq, sparse_gptq};
pub use grid::{GridConfig, GroupGrid, ScaleDtype};
pub use rtn::round_to_nearest;

#[cfg(test)]
mod tests;
