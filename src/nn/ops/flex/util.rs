//! What the operations on Flex share: tensors as slices, tensors from slices, and work in chunks.

use std::mem::MaybeUninit;

use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Shape, TensorData};
use rayon::prelude::*;

use crate::kernels::disjoint::Disjoint;
use crate::kernels::gemm::{Values, Weight};

/// Elements that one task works on: enough to be worth handing to another thread, and to stay in
/// its cache.
pub(super) const TASK: usize = 16 * 1024;

/// How many rows of `width` elements make one task.
pub(super) fn task_rows(width: usize) -> usize {
    (TASK / width.max(1)).max(1)
}

/// The tensor with its elements in row-major order.
pub(super) fn contiguous(tensor: FlexTensor) -> FlexTensor {
    if tensor.is_contiguous() {
        tensor
    } else {
        tensor.to_contiguous()
    }
}

/// Row-major elements; none where the tensor is not `f32`, which callers have checked.
pub(super) fn floats(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice().unwrap_or_default()
}

/// A tensor that holds its elements and nothing else, so that its storage may be written in place.
/// The storage is copied on the first write if another tensor shares it.
pub(super) fn whole(tensor: FlexTensor) -> FlexTensor {
    let whole = tensor.to_contiguous();
    drop(tensor);
    whole
}

/// A tensor of these elements.
pub(super) fn tensor(values: Vec<f32>, shape: Shape) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape))
}

/// Whether all are of `f32`.
pub(super) fn is_f32(tensors: &[&FlexTensor]) -> bool {
    tensors.iter().all(|tensor| tensor.dtype() == DType::F32)
}

/// Sizes of the dimensions.
pub(super) fn dims(tensor: &FlexTensor) -> &[usize] {
    tensor.layout().shape().as_slice()
}

/// A new tensor that `fill` writes completely, in chunks of `chunk` elements given with their
/// index.
pub(super) fn build(
    shape: Shape,
    chunk: usize,
    fill: impl Fn(usize, &mut [MaybeUninit<f32>]) + Sync,
) -> FlexTensor {
    let n = shape.num_elements();
    let mut values = Vec::with_capacity(n);
    let out = &mut values.spare_capacity_mut()[..n];
    if n <= chunk.max(TASK) {
        out.chunks_mut(chunk.max(1))
            .enumerate()
            .for_each(|(index, out)| fill(index, out));
    } else {
        let at_least = (TASK / chunk).max(1);
        out.par_chunks_mut(chunk)
            .enumerate()
            .with_min_len(at_least)
            .for_each(|(index, out)| fill(index, out));
    }
    // SAFETY: `fill` has written every element of every chunk.
    unsafe { values.set_len(n) };
    tensor(values, shape)
}

/// The part of `values` that belongs to the chunk `index` of `len` elements, of which the last may
/// be short.
pub(super) fn part(values: &[f32], index: usize, len: usize) -> &[f32] {
    let start = (index * len).min(values.len());
    &values[start..(start + len).min(values.len())]
}

/// Works on `values` in place, in chunks given with their index.
pub(super) fn for_chunks(
    values: &mut [f32],
    chunk: usize,
    work: impl Fn(usize, &mut [f32]) + Sync,
) {
    if values.len() <= chunk.max(TASK) {
        values
            .chunks_mut(chunk)
            .enumerate()
            .for_each(|(index, part)| work(index, part));
    } else {
        values
            .par_chunks_mut(chunk)
            .enumerate()
            .for_each(|(index, part)| work(index, part));
    }
}

/// A new matrix that `fill` writes completely.
pub(super) fn matrix(n: usize, fill: impl FnOnce(Disjoint<'_, f32>)) -> Vec<f32> {
    let mut values: Vec<f32> = Vec::with_capacity(n);
    fill(Disjoint::uninit(&mut values.spare_capacity_mut()[..n]));
    // SAFETY: `fill` has written every element.
    unsafe { values.set_len(n) };
    values
}

/// Rows of the last dimension.
pub(super) fn n_rows(x: &FlexTensor) -> usize {
    dims(x).iter().rev().skip(1).product()
}

/// `x`'s shape with another last dimension.
pub(super) fn with_width(x: &FlexTensor, width: usize) -> Shape {
    let mut shape = dims(x).to_vec();
    if let Some(last) = shape.last_mut() {
        *last = width;
    }
    Shape::from(shape)
}

/// The tensor as a weight; none where it is of another rank or dtype, is empty, or is read
/// backwards.
pub(super) fn weight(tensor: &FlexTensor) -> Option<Weight<'_>> {
    let layout = tensor.layout();
    let dims = <[usize; 2]>::try_from(layout.shape().as_slice()).ok()?;
    let strides = <[isize; 2]>::try_from(layout.strides()).ok()?;
    let values = match tensor.dtype() {
        DType::F32 => Values::F32(tensor.storage()),
        DType::BF16 => Values::Bf16(tensor.storage()),
        DType::F16 => Values::F16(tensor.storage()),
        _ => return None,
    };
    Weight::new(values, layout.start_offset(), dims, strides)
}
