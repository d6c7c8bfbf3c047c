//! SparseGPT: weights are removed column by column, and those that stay make up for it.
//!
//! "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (arXiv 2301.00774). Departures: the factor of the
//! Hessian itself takes the place of its inverse's ([`Factor`]), and the share that a ratio removes is met to the weight.

use serde::{Deserialize, Serialize};

use super::compensate::{Exact, Keep, Pass, block_length};
use super::{Mask, Pattern};
use crate::error::{Error, Result};
use crate::linalg::{Factor, Matrix};

/// Columns that compete with one another for being kept, unless said otherwise.
const BLOCK: usize = 128;

/// Settings of SparseGPT.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SparseGptConfig {
    /// Columns that are decided together.
    pub block_size: usize,
}

impl Default for SparseGptConfig {
    fn default() -> Self {
        Self { block_size: BLOCK }
    }
}

impl SparseGptConfig {
    /// Blocks of 128 columns.
    pub fn new() -> Self {
        Self::default()
    }

    setters! {
        with_block_size(block_size: usize);
    }

    /// Checks the fields.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a block size of 0.
    pub fn validate(&self) -> Result<()> {
        if self.block_size == 0 {
            return Err(Error::argument("block_size", 0, "at least 1"));
        }
        Ok(())
    }
}

/// Removes from `weight` what `pattern` says and changes the weights that stay so that the layer's output changes little;
/// returns the mask of what stays.
///
/// A weight `w` costs `(w U_kk)^2` to remove, with `U` the [`Factor`]. With a ratio, the weights of a block of columns, of all
/// rows, compete with one another, whether the pattern is by row or by layer; rows may differ in sparsity. N:M groups are
/// decided one by one, after all columns before them. O(out * in^2), the same result at any number of threads.
///
/// # Shapes
/// `weight` and the mask: `[out, in]`; `factor`: of `[in, in]`.
///
/// # Errors
/// [`Error::ShapeMismatch`] for a factor of another width, [`Error::NotFinite`] for a weight that is NaN or infinite,
/// [`Error::InvalidArgument`] for a bad pattern or block size, and for N:M with a factor in activation order. `weight` is
/// then unchanged.
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
