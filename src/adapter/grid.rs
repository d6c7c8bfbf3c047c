//! The quantization grid to which the sum of base weight and update is rounded.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Bool, Device, FloatDType, Tensor};

use crate::error::{Error, Result};
use crate::format::{QuantizedMatrix, QuantizedParts, all_f16};
use crate::linalg::Matrix;
use crate::nn::{InputGroups, host_values, prefix, tensor_from_matrix};

/// Scales and zero points of a weight `[d_input, d_output]`, one per group of inputs and output.
///
/// Trained scales that were exact in `f16` at the start are rounded to `f16` at every use (with a
/// straight-through gradient), so that files store exactly the scales that were used. A scale that
/// training brings to 0 or below counts as 0, and so do the weights of its group.
#[derive(Module, Debug)]
#[doc(hidden)]
pub struct WeightGrid {
    /// `[groups, d_output]`, before rounding to `f16`.
    pub scales: Param<Tensor<2>>,
    /// `[groups, d_output]`.
    zeros: Tensor<2>,
    /// `[d_input, d_output]`, all true: stands in for the mask of an unmasked update.
    everywhere: Option<Tensor<2, Bool>>,
    #[module(skip)]
    layout: Layout,
}

#[derive(Clone, Debug)]
struct Layout {
    bits: u8,
    symmetric: bool,
    groups: InputGroups,
    /// Whether scales are rounded to `f16`.
    half: bool,
}

fn everywhere(dims: [usize; 2], device: &Device) -> Tensor<2, Bool> {
    Tensor::<2>::zeros(dims, device).equal_elem(0.0)
}

impl WeightGrid {
    /// Creates the grid of a quantized weight, `[d_output, d_input]`. `masked` says whether the
    /// update has a mask.
    pub(super) fn new(
        matrix: &QuantizedMatrix,
        trained: bool,
        masked: bool,
        device: &Device,
    ) -> Self {
        let (parts, groups) = (matrix.parts(), matrix.groups());
        let by_group = |of: &dyn Fn(usize) -> f32| {
            tensor_from_matrix(
                &Matrix::from_fn(parts.rows, groups, |row, group| of(row * groups + group)),
                device,
            )
        };
        let order = parts
            .group_of
            .as_ref()
            .map(|order| Arc::from(order.as_slice()));
        Self {
            scales: Param::from_tensor(by_group(&|at| parts.scales[at])).set_require_grad(trained),
            zeros: by_group(&|at| f32::from(parts.zeros[at])),
            everywhere: (!masked).then(|| everywhere([parts.cols, parts.rows], device)),
            layout: Layout {
                bits: parts.bits,
                symmetric: parts.symmetric,
                groups: InputGroups {
                    size: parts.group_size,
                    order,
                },
                half: trained && all_f16(&parts.scales) && device.supports_dtype(FloatDType::F16),
            },
        }
    }

    /// Bits per code.
    pub fn bits(&self) -> u8 {
        self.layout.bits
    }

    /// Groups of inputs that share a scale and a zero point.
    pub fn groups(&self) -> &InputGroups {
        &self.layout.groups
    }

    /// An all-true mask, for an update without a mask.
    pub(super) fn everywhere(&self, dims: [usize; 2]) -> Tensor<2, Bool> {
        let device = || self.zeros.device().without_autodiff();
        self.everywhere
            .clone()
            .unwrap_or_else(|| everywhere(dims, &device()))
    }

    /// Scales and zero points of the first `d_input` inputs and `d_output` outputs, as the forward
    /// pass uses them.
    pub(super) fn active(&self, [d_input, d_output]: [usize; 2]) -> (Tensor<2>, Tensor<2>) {
        let scales = self.scales.val();
        let count = self.layout.groups.count(d_input, scales.dims()[0]);
        let part = |grid: Tensor<2>| prefix(prefix(grid, 0, count), 1, d_output);
        let scales = part(scales);
        let scales = if self.layout.half {
            let exact = scales.clone().without_autodiff();
            // Exact: the difference between a number and its rounded value is representable.
            let rounding = exact.clone().cast(FloatDType::F16).cast(FloatDType::F32) - exact;
            scales + rounding
        } else {
            scales
        };
        (scales, part(self.zeros.clone()))
    }

    /// Recovers the codes of a weight that was rounded to the grid of the first inputs and outputs,
    /// `[d_output, d_input]`.
    ///
    /// # Errors
    /// Returns [`Error::OffGrid`] if a value is not on the grid.
    pub(super) fn codes_of(&self, weight: &Matrix) -> Result<QuantizedMatrix> {
        let (rows, cols) = (weight.rows(), weight.cols());
        let (scales, zeros) = self.active([cols, rows]);
        let groups = scales.dims()[0];
        let transposed = |grid: Tensor<2>| host_values(grid.without_autodiff().transpose());
        // Rounding treated every scale that is not positive as 0.
        let scales: Vec<f32> = transposed(scales)
            .into_iter()
            .map(|scale| if scale > 0.0 { scale } else { 0.0 })
            .collect();
        let zeros: Vec<u8> = transposed(zeros)
            .into_iter()
            .map(|zero| zero as u8)
            .collect();
        let top = u8::MAX >> (8 - self.layout.bits);
        let mut codes = Vec::with_capacity(rows * cols);
        for row in 0..rows {
            for (column, value) in weight.row(row).iter().enumerate() {
                let at = row * groups + self.layout.groups.of(column);
                let (scale, zero) = (scales[at], zeros[at]);
                // The value is `steps * scale` rounded once, with at most 255 steps, so the
                // quotient rounds to the exact number of steps.
                let steps = if scale > 0.0 {
                    (value / scale).round()
                } else {
                    0.0
                };
                let code = (steps + f32::from(zero)).clamp(0.0, f32::from(top)) as u8;
                // Compares as numbers: the sign of 0 does not matter.
                if QuantizedMatrix::value(scale, zero, code) != *value {
                    return Err(Error::OffGrid {
                        row,
                        column,
                        value: *value,
                        scale,
                        zero,
                    });
                }
                codes.push(code);
            }
        }
        QuantizedMatrix::new(QuantizedParts {
            rows,
            cols,
            bits: self.layout.bits,
            group_size: self.layout.groups.size,
            symmetric: self.layout.symmetric,
            codes,
            scales,
            zeros,
            group_of: self
                .layout
                .groups
                .order
                .as_ref()
                .map(|order| order.to_vec()),
        })
    }
}
