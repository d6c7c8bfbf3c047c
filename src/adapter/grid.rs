//! The grid that an adapter's sum with its base weight is rounded to.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Bool, Device, FloatDType, Tensor};

use crate::error::{Error, Result};
use crate::format::{QuantizedMatrix, QuantizedParts, all_f16};
use crate::linalg::Matrix;
use crate::nn::{InputGroups, host_values, prefix, tensor_from_matrix};

/// Scales and zero points of a weight `[d_input, d_output]`, by group of inputs and output.
///
/// Scales that are trained and were exact as `f16` are rounded to `f16` wherever they are used, straight through, so that files keep
/// them as they were used. One that training brings to 0 or below counts as 0: its group is then 0.
#[derive(Module, Debug)]
#[doc(hidden)]
pub struct WeightGrid {
    /// `[groups, d_output]`, before any rounding.
    pub scales: Param<Tensor<2>>,
    /// `[groups, d_output]`.
    zeros: Tensor<2>,
    /// True throughout, `[d_input, d_output]`: the mask of an update that has none.
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
    /// The grid of a quantized weight, `[d_output, d_input]`, for an update that is masked or not.
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

    /// Bits of a code.
    pub fn bits(&self) -> u8 {
        self.layout.bits
    }

    /// Which inputs share a scale and a zero point.
    pub fn groups(&self) -> &InputGroups {
        &self.layout.groups
    }

    /// The mask of an update that has none.
    pub(super) fn everywhere(&self, dims: [usize; 2]) -> Tensor<2, Bool> {
        let device = || self.zeros.device().without_autodiff();
        self.everywhere
            .clone()
            .unwrap_or_else(|| everywhere(dims, &device()))
    }

    /// Scales and zero points of the first inputs and outputs, as they are used.
    pub(super) fn active(&self, [d_input, d_output]: [usize; 2]) -> (Tensor<2>, Tensor<2>) {
        let scales = self.scales.val();
        let count = self.layout.groups.count(d_input, scales.dims()[0]);
        let part = |grid: Tensor<2>| prefix(prefix(grid, 0, count), 1, d_output);
        let scales = part(scales);
        let scales = if self.layout.half {
            let exact = scales.clone().without_autodiff();
            // Exact: a number and what it rounds to differ by a number of the same format.
            let rounding = exact.clone().cast(FloatDType::F16).cast(FloatDType::F32) - exact;
            scales + rounding
        } else {
            scales
        };
        (scales, part(self.zeros.clone()))
    }

    /// The integers of a weight that was rounded to the first inputs' and outputs' grids, `[d_output, d_input]`.
    ///
    /// # Errors
    /// [`Error::OffGrid`] for a weight that was not.
    pub(super) fn codes_of(&self, weight: &Matrix) -> Result<QuantizedMatrix> {
        let (rows, cols) = (weight.rows(), weight.cols());
        let (scales, zeros) = self.active([cols, rows]);
        let groups = scales.dims()[0];
        let transposed = |grid: Tensor<2>| host_values(grid.without_autodiff().transpose());
        // What is not over 0 was 0 to the rounding.
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
                // A multiple by at most 255, rounded once, divided by what it is a multiple of.
                let steps = if scale > 0.0 {
                    (value / scale).round()
                } else {
                    0.0
                };
                let code = (steps + f32::from(zero)).clamp(0.0, f32::from(top)) as u8;
                // Equal numbers, of which 0 may have had a sign.
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
