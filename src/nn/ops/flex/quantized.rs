//! A weight whose update is rounded to a grid, on Flex.

use burn::backend::flex::FlexTensor;
use burn::tensor::Shape;

use super::summed::summed_rows;
use super::util::{dims, floats, for_chunks, is_f32, tensor};
use crate::kernels::Level;
use crate::kernels::rows::quantize;
use crate::nn::ops::terms::GridTerm;

/// Scales and zero points, row-major, `[groups, d_output]`.
struct Grid<'a> {
    scales: &'a [f32],
    zeros: &'a [f32],
    d_output: usize,
    n_groups: usize,
}

impl<'a> Grid<'a> {
    /// Returns `None` if the tensors have other shapes, or if a row of the weight is in a
    /// nonexistent group.
    fn new(
        scales: &'a FlexTensor,
        zeros: &'a FlexTensor,
        [d_input, d_output]: [usize; 2],
        term: &GridTerm,
    ) -> Option<Self> {
        let &[n_groups, width] = dims(scales) else {
            return None;
        };
        let fits = width == d_output && dims(zeros) == dims(scales) && is_f32(&[scales, zeros]);
        let known = (0..d_input).all(|row| term.groups.of(row) < n_groups);
        (fits && known).then(|| Self {
            scales: floats(scales),
            zeros: floats(zeros),
            d_output,
            n_groups,
        })
    }

    fn group(&self, group: usize) -> (&'a [f32], &'a [f32]) {
        let range = group * self.d_output..(group + 1) * self.d_output;
        (&self.scales[range.clone()], &self.zeros[range])
    }
}

/// `scale * (Q - zero)`, computed in blocks of rows. Mask and grid must be contiguous.
pub(super) fn sum(
    weight: &FlexTensor,
    mask: &FlexTensor,
    [a, b]: [FlexTensor; 2],
    [scales, zeros]: &[FlexTensor; 2],
    term: &GridTerm,
) -> Option<FlexTensor> {
    let &[d_input, d_output] = dims(weight) else {
        return None;
    };
    let (grid, level, top) = (
        Grid::new(scales, zeros, [d_input, d_output], term)?,
        Level::detect(),
        term.top(),
    );
    summed_rows(weight, mask, a, b, term.lora, |row, out, base, mask| {
        let (scales, zeros) = grid.group(term.groups.of(row));
        quantize::quantize_sum(level, out, base, mask, scales, zeros, top);
    })
}

/// Gradient of the scales. Each group sums its rows in order, so the result does not depend on the
/// number of threads. All tensors must be contiguous.
pub(super) fn backward_scales(
    sum: &FlexTensor,
    scales: &FlexTensor,
    zeros: &FlexTensor,
    grad: &FlexTensor,
    term: &GridTerm,
) -> Option<FlexTensor> {
    let &[d_input, d_output] = dims(sum) else {
        return None;
    };
    let grid = Grid::new(scales, zeros, [d_input, d_output], term)?;
    if !is_f32(&[sum, grad]) || dims(grad) != dims(sum) || d_output == 0 {
        return None;
    }
    let mut members = vec![Vec::new(); grid.n_groups];
    (0..d_input).for_each(|row| members[term.groups.of(row)].push(row));
    let (weights, grads, level, top) = (floats(sum), floats(grad), Level::detect(), term.top());
    let mut sums = vec![0.0_f32; grid.n_groups * d_output];
    for_chunks(&mut sums, d_output, |group, sums| {
        let (scales, zeros) = grid.group(group);
        for row in &members[group] {
            let range = row * d_output..(row + 1) * d_output;
            quantize::scale_gradient(
                level,
                sums,
                &weights[range.clone()],
                &grads[range],
                scales,
                zeros,
                top,
            );
        }
    });
    Some(tensor(sums, Shape::from([grid.n_groups, d_output])))
}
