//! GPTQ: columns are rounded one after the other, and later ones compensate for the errors.
//!
//! "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv
//! 2210.17323). Departures: it uses the factor of the Hessian itself, not of its inverse
//! ([`Factor`]). It preserves a mask, which plain GPTQ does not. By default it determines a group's
//! grid from the weights at the start of the group, not of its block.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::rtn::{check_finite, empty_parts, find_grids};
use super::{GridConfig, GroupGrid};
use crate::error::{Error, Result};
use crate::format::{QuantizedMatrix, QuantizedParts};
use crate::linalg::{Factor, Matrix};
use crate::sparsity::compensate::{Keep, Pass, RowRounding, block_length};
use crate::sparsity::{Mask, Pattern};

/// Default number of columns that are rounded before the errors are applied to all later columns.
const BLOCK: usize = 128;

/// The weights from which the grids of groups are determined. A grid of a whole row is always
/// determined from the original weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[doc(hidden)]
pub enum GroupGrids {
    /// The weights when the group begins.
    #[default]
    Current,
    /// The weights when the group's block begins, as in the authors' code.
    Block,
    /// The original weights (GPTQ's static groups). Groups then consist of consecutive columns even
    /// with activation order.
    Static,
}

/// Settings of GPTQ.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct GptqConfig {
    /// Settings of the grids.
    pub grid: GridConfig,
    /// The weights from which the grids are determined.
    pub groups: GroupGrids,
    /// Number of columns that are rounded before the errors are applied to all later columns;
    /// adjusted to a multiple of the group size.
    ///
    /// It changes results only by floating-point rounding, except with [`GroupGrids::Block`] and
    /// when pruning by ratio, where the weights of a block are compared with one another.
    pub block_size: usize,
}

impl GptqConfig {
    /// Creates settings for GPTQ on these grids.
    pub fn new(grid: GridConfig) -> Self {
        Self {
            grid,
            groups: GroupGrids::default(),
            block_size: BLOCK,
        }
    }

    setters! {
        with_groups(groups: GroupGrids);
        with_block_size(block_size: usize);
    }

    /// Checks the fields.
    ///
    /// # Errors
    /// Returns the errors of [`GridConfig::validate`], and [`Error::InvalidArgument`] if the block
    /// size is 0.
    pub fn validate(&self) -> Result<()> {
        self.grid.validate()?;
        if self.block_size == 0 {
            return Err(Error::argument("block_size", 0, "at least 1"));
        }
        Ok(())
    }
}

/// Rounds a weight matrix to a grid and keeps the change of the layer's output small. Weights that
/// `mask` removes become 0, and later weights compensate for that as they do for rounding errors.
///
/// The time is O(out * in^2), and the result is the same with any number of threads. Weights of
/// columns that are 0 in all of the input become 0.
///
/// # Shapes
/// `weight` and `mask`: `[out, in]`; `factor`: of `[in, in]`.
///
/// # Errors
/// Returns [`Error::InvalidArgument`] if the settings are invalid, [`Error::ShapeMismatch`] if the
/// factor or the mask has another size, [`Error::NotFinite`] if a weight is NaN or infinite, and
/// [`Error::TensorOverflow`] if a scale is too large for its dtype.
pub fn gptq(
    weight: &Matrix,
    factor: &Factor,
    config: &GptqConfig,
    mask: Option<&Mask>,
) -> Result<QuantizedMatrix> {
    let keep = mask.map_or(Keep::All, Keep::These);
    quantize(weight, factor, config, keep, 1).map(|(quantized, _)| quantized)
}

/// Prunes with SparseGPT and rounds with GPTQ in one pass, so that each compensates for the other's
/// errors. Returns the quantized weight and the mask of the weights that stay. A weight that stays
/// may still be rounded to 0.
///
/// # Shapes
/// As for [`gptq`].
///
/// # Errors
/// Returns the errors of [`gptq`] and of [`sparsegpt`](crate::sparsity::sparsegpt).
#[doc(hidden)]
pub fn sparse_gptq(
    weight: &Matrix,
    factor: &Factor,
    config: &GptqConfig,
    pattern: &Pattern,
) -> Result<(QuantizedMatrix, Mask)> {
    pattern.validate()?;
    quantize(
        weight,
        factor,
        config,
        Keep::Best(*pattern),
        pattern.group(),
    )
}

fn quantize(
    weight: &Matrix,
    factor: &Factor,
    config: &GptqConfig,
    keep: Keep<'_>,
    pattern_group: usize,
) -> Result<(QuantizedMatrix, Mask)> {
    config.validate()?;
    check_finite(weight)?;
    let mut parts = empty_parts(weight, &config.grid);
    let (rows, cols, group_size) = (parts.rows, parts.cols, parts.group_size);
    let groups = cols.div_ceil(group_size);
    // The grid of a whole row must be known before its first column is rounded.
    let fixed = config.groups == GroupGrids::Static || groups < 2;
    if fixed && rows * cols > 0 && cols == factor.d_input() {
        find_grids(&as_seen(weight, factor, keep)?, &config.grid, &mut parts)?;
    }
    let length = if fixed { 1 } else { group_size };
    let block = block_length(config.block_size, [length, pattern_group]);
    let pass = Pass {
        factor,
        keep,
        block,
        grids_at_block: !fixed && config.groups == GroupGrids::Block,
    };
    let top = u8::MAX >> (8 - config.grid.bits);
    let QuantizedParts {
        codes,
        scales,
        zeros,
        ..
    } = &mut parts;
    let chunks = codes
        .chunks_mut(cols.max(1))
        .zip(scales.chunks_mut(groups.max(1)))
        .zip(zeros.chunks_mut(groups.max(1)));
    let mut grids: Vec<GridRow<'_>> = chunks
        .map(|((codes, scales), zeros)| GridRow {
            config: &config.grid,
            order: factor.order(),
            group_size,
            fixed,
            top,
            codes,
            scales,
            zeros,
        })
        .collect();
    let done = pass.run(weight, &mut grids)?;
    drop(grids);
    if let (Some(order), false) = (factor.order(), fixed) {
        let mut group_of = vec![0; cols];
        order.iter().enumerate().for_each(|(position, column)| {
            group_of[*column as usize] = (position / group_size) as u32;
        });
        parts.group_of = Some(group_of);
    }
    Ok((QuantizedMatrix::new(parts)?, done.keep))
}

/// Returns the weight with dead columns and weights removed by a given mask set to 0.
fn as_seen(weight: &Matrix, factor: &Factor, keep: Keep<'_>) -> Result<Matrix> {
    let mut seen = weight.clone();
    if let Keep::These(mask) = keep {
        mask.apply(&mut seen)?;
    }
    for row in 0..seen.rows() {
        let row = seen.row_mut(row);
        factor
            .dead()
            .iter()
            .for_each(|column| row[*column as usize] = 0.0);
    }
    Ok(seen)
}

/// The codes and grids of one row.
struct GridRow<'a> {
    config: &'a GridConfig,
    order: Option<&'a [u32]>,
    group_size: usize,
    /// Whether the grids are already known. Groups are then of consecutive columns, otherwise of
    /// consecutive positions in rounding order.
    fixed: bool,
    top: u8,
    codes: &'a mut [u8],
    scales: &'a mut [f32],
    zeros: &'a mut [u8],
}

impl GridRow<'_> {
    fn column(&self, position: usize) -> usize {
        self.order
            .map_or(position, |order| order[position] as usize)
    }

    fn grid(&self, position: usize) -> GroupGrid {
        let group = if self.fixed {
            self.column(position)
        } else {
            position
        } / self.group_size;
        GroupGrid {
            scale: self.scales[group],
            zero: self.zeros[group],
            top: self.top,
        }
    }
}

impl RowRounding for GridRow<'_> {
    fn group_end(&self, position: usize) -> Option<usize> {
        let begins = !self.fixed && position.is_multiple_of(self.group_size);
        begins.then(|| (position + self.group_size).min(self.codes.len()))
    }

    fn begin_group(&mut self, group: Range<usize>, weights: &[f32]) -> Result<()> {
        let grid = self.config.grid(weights)?;
        let group = group.start / self.group_size;
        (self.scales[group], self.zeros[group]) = (grid.scale, grid.zero);
        Ok(())
    }

    fn round(&mut self, position: usize, weight: f32) -> f32 {
        let grid = self.grid(position);
        let code = grid.code(weight);
        self.codes[self.column(position)] = code;
        grid.value(code)
    }

    fn remove(&mut self, position: usize) {
        self.codes[self.column(position)] = self.grid(position).zero;
    }
}
