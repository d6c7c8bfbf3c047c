//! Quantization by rounding to nearest.

use rayon::prelude::*;

use super::GridConfig;
use crate::error::{Error, Result};
use crate::format::{QuantizedMatrix, QuantizedParts};
use crate::linalg::Matrix;
use crate::sparsity::Mask;

/// Rounds every weight to the nearest value on its group's grid. Weights that `mask` removes become
/// 0 and do not affect any grid.
///
/// The time is O(out * in), and the result is the same with any number of threads.
///
/// # Shapes
/// `weight` and `mask`: `[out, in]`.
///
/// # Errors
/// Returns [`Error::InvalidArgument`] if the grid settings are invalid, [`Error::ShapeMismatch`] if
/// the mask has another shape, [`Error::NotFinite`] if a weight is NaN or infinite, and
/// [`Error::TensorOverflow`] if a scale is too large for its dtype.
pub fn round_to_nearest(
    weight: &Matrix,
    config: &GridConfig,
    mask: Option<&Mask>,
) -> Result<QuantizedMatrix> {
    config.validate()?;
    let masked;
    let weight = match mask {
        Some(mask) => {
            let mut copy = weight.clone();
            mask.apply(&mut copy)?;
            masked = copy;
            &masked
        }
        None => weight,
    };
    check_finite(weight)?;
    let mut parts = empty_parts(weight, config);
    if weight.as_slice().is_empty() {
        return QuantizedMatrix::new(parts);
    }
    find_grids(weight, config, &mut parts)?;
    let (cols, group_size, groups) = (
        parts.cols,
        parts.group_size,
        parts.cols.div_ceil(parts.group_size),
    );
    let top = u8::MAX >> (8 - config.bits);
    let grids = parts
        .scales
        .par_chunks(groups)
        .zip(parts.zeros.par_chunks(groups));
    parts
        .codes
        .par_chunks_mut(cols)
        .zip(weight.as_slice().par_chunks(cols))
        .zip(grids)
        .for_each(|((codes, row), (scales, zeros))| {
            let groups = codes
                .chunks_mut(group_size)
                .zip(row.chunks(group_size))
                .zip(scales.iter().zip(zeros));
            for ((codes, weights), (scale, zero)) in groups {
                let grid = super::GroupGrid {
                    scale: *scale,
                    zero: *zero,
                    top,
                };
                codes
                    .iter_mut()
                    .zip(weights)
                    .for_each(|(code, weight)| *code = grid.code(*weight));
            }
        });
    QuantizedMatrix::new(parts)
}

/// Returns an error that names the first element that is NaN or infinite, if there is one.
pub(super) fn check_finite(weight: &Matrix) -> Result<()> {
    match weight
        .as_slice()
        .par_iter()
        .position_first(|value| !value.is_finite())
    {
        Some(index) => Err(Error::NotFinite {
            tensor: "weight".into(),
            index,
            value: weight.as_slice()[index],
        }),
        None => Ok(()),
    }
}

/// Creates parts of the right sizes, with every code and zero point in the middle of the grid and
/// every scale 0.
pub(super) fn empty_parts(weight: &Matrix, config: &GridConfig) -> QuantizedParts {
    let (rows, cols) = (weight.rows(), weight.cols());
    let group_size = config.group_len(cols);
    let groups = cols.div_ceil(group_size);
    let middle = 1 << (config.bits - 1);
    QuantizedParts {
        rows,
        cols,
        bits: config.bits,
        group_size,
        symmetric: config.symmetric,
        codes: vec![middle; rows * cols],
        scales: vec![0.0; rows * groups],
        zeros: vec![middle; rows * groups],
        group_of: None,
    }
}

/// Determines the grid of each group of consecutive columns. The matrix must not be empty.
pub(super) fn find_grids(
    weight: &Matrix,
    config: &GridConfig,
    parts: &mut QuantizedParts,
) -> Result<()> {
    let (cols, group_size) = (parts.cols, parts.group_size);
    let groups = cols.div_ceil(group_size);
    let rows = parts
        .scales
        .par_chunks_mut(groups)
        .zip(parts.zeros.par_chunks_mut(groups));
    rows.zip(weight.as_slice().par_chunks(cols))
        .try_for_each(|((scales, zeros), row)| {
            for ((scale, zero), weights) in scales.iter_mut().zip(zeros).zip(row.chunks(group_size))
            {
                let grid = config.grid(weights)?;
                (*scale, *zero) = (grid.scale, grid.zero);
            }
            Ok(())
        })
}
