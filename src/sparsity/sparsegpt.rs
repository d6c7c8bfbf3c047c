//! SparseGPT: weights are removed column by column, and the remaining ones are adjusted to
//! compensate.
//!
//! "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (arXiv 2301.00774).
//! Departures: it uses the factor of the Hessian itself, not of its inverse ([`Factor`]), and a
//! ratio removes exactly the requested number of weights.

use serde::{Deserialize, Serialize};

use super::compensate::{Exact, Keep, Pass, block_length};
use super::{Mask, Pattern};
use crate::error::{Error, Result};
use crate::linalg::{Factor, Matrix};

/// Default number of columns whose weights are compared with one another.
const BLOCK: usize = 128;

/// Settings of SparseGPT.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SparseGptConfig {
    /// Number of columns that are decided together.
    pub block_size: usize,
}

impl Default for SparseGptConfig {
    fn default() -> Self {
        Self { block_size: BLOCK }
    }
}

impl SparseGptConfig {
    /// Creates settings with blocks of 128 columns.
    pub fn new() -> Self {
        Self::default()
    }

    setters! {
        with_block_size(block_size: usize);
    }

    /// Checks the fields.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if the block size is 0.
    pub fn validate(&self) -> Result<()> {
        if self.block_size == 0 {
            return Err(Error::argument("block_size", 0, "at least 1"));
        }
        Ok(())
    }
}

/// Removes weights from `weight` by `pattern`, adjusts the remaining ones to keep the change of the
/// layer's output small, and returns the mask of those that stay.
///
/// The cost of removing a weight `w` is `(w U_kk)^2` ([`Factor::pivots`]). For a ratio, by row or
/// by layer, the weights of all rows in a block of columns are compared with one another, so the
/// sparsity of rows may differ. N:M groups are decided one by one, each after all columns before
/// it. The time is O(out * in^2), and the result is the same with any number of threads.
///
/// # Shapes
/// `weight` and the mask: `[out, in]`; `factor`: of `[in, in]`.
///
/// # Errors
/// Returns [`Error::ShapeMismatch`] if the factor has another width, [`Error::NotFinite`] if a
/// weight is NaN or infinite, and [`Error::InvalidArgument`] if the pattern or block size is
/// invalid, or for N:M with a factor in activation order. `weight` is then unchanged.
#[doc(hidden)]
pub fn sparsegpt(
    weight: &mut Matrix,
    factor: &Factor,
    pattern: &Pattern,
    config: &SparseGptConfig,
) -> Result<Mask> {
    config.validate()?;
    pattern.validate()?;
    let block = block_length(config.block_size, [1, pattern.group()]);
    let pass = Pass {
        factor,
        keep: Keep::Best(*pattern),
        block,
        grids_at_block: false,
    };
    let mut rows: Vec<Exact> = (0..weight.rows()).map(|_| Exact).collect();
    let done = pass.run(weight, &mut rows)?;
    *weight = done.weight;
    Ok(done.keep)
}
