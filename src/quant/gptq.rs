//! GPTQ: columns are rounded one after the other, and the later ones make up for it.
//!
//! "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv 2210.17323). Departures: the
//! factor of the Hessian itself takes the place of its inverse's ([`Factor`]); a mask is kept, which GPTQ by itself undoes; a
//! group's grid is by default found from its weights as they stand when its turn comes, not when its block's did.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::rtn::{check_finite, empty_parts, find_grids};
use super::{GridConfig, GroupGrid};
use crate::error::{Error, Result};
use crate::format::{QuantizedMatrix, QuantizedParts};
use crate::linalg::{Factor, Matrix};
use crate::sparsity::compensate::{Keep, Pass, RowRounding, block_length};
use crate::sparsity::{Mask, Pattern};

/// Columns that are rounded before the rest is told, unless said otherwise.
const BLOCK: usize = 128;

/// From which weights the grids of groups are found. A grid for the whole row is always found from the weights as they were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[doc(hidden)]
pub enum GroupGrids {
    /// As they stand when the group begins.
    #[default]
    Current,
    /// As they stand when the group's block begins, as the authors' code does.
    Block,
    /// As they were (GPTQ's static groups). With activation order, groups are then of consecutive columns all the same.
    Static,
}

/// Settings of GPTQ.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct GptqConfig {
    /// The grids.
    pub grid: GridConfig,
    /// From which weights they are found.
    pub groups: GroupGrids,
    /// Columns that are rounded before the rest is told; made a multiple of the group size. Results depend on it only by
    /// rounding, but for [`GroupGrids::Block`] and for pruning by ratio, where a block's weights compete.
    pub block_size: usize,
}

impl GptqConfig {
    /// GPTQ on these grids.
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
    /// Those of [`GridConfig::validate`], and [`Error::InvalidArgument`] for a block size of 0.
    pub fn validate(&self) -> Result<()> {
        self.grid.validate()?;
        if self.block_size == 0 {
            return Err(Error::argument("block_size", 0, "at least 1"));
        }
        Ok(())
    }
}

/// Rounds a weight to a grid so that the layer's output changes little. What `mask` does not keep is 0 whatever the errors
/// before it, and the later weights make up for its removal as for a rounding.
///
/// O(out * in^2), the same result at any number of threads. Columns that are 0 in all of the input come out as 0.
///
/// # Shapes
/// `weight` and `mask`: `[out, in]`; `factor`: of `[in, in]`.
///
/// # Errors
/// [`Error::InvalidArgument`] for bad settings, [`Error::ShapeMismatch`] for a factor or a mask of another size,
/// [`Error::NotFinite`] for a weight that is NaN or infinite, [`Error::TensorOverflow`] for a scale too large for its format.
pub fn gptq(
    weight: &Matrix,
    factor: &Factor,
    config: &GptqConfig,
    mask: Option<&Mask>,
) -> Result<QuantizedMatrix> {
    let keep = mask.map_or(Keep::All, Keep::These);
    quantize(weight, factor, config, keep, 1).map(|(quantized, _)| quantized)
}

/// Prunes by SparseGPT and rounds by GPTQ in one pass, so that each makes up for the other's errors; returns the mask of what
/// stays, too. A weight that stays may be rounded to 0.
///
/// # Shapes
/// As [`gptq`].
///
/// # Errors
/// Those of [`gptq`] and of [`sparsegpt`](crate::sparsity::sparsegpt).
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
    // A whole row's grid cannot wait for the row's columns.
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

/// The weight without what is known to go.
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

/// One row's codes and grids.
struct GridRow<'a> {
    config: &'a GridConfig,
    order: Option<&'a [u32]>,
    group_size: usize,
    /// Whether the grids are there already, for groups of consecutive columns; else groups are of consecutive positions.
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
