//! Helpers of the Flex kernels: conversion between tensors and slices, and work in chunks.

use std::mem::MaybeUninit;

use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Shape, TensorData};
use rayon::prelude::*;

use crate::kernels::disjoint::Disjoint;
use crate::kernels::gemm::{Values, Weight};

/// Number of elements per task: large enough to be worth another thread, small enough to stay in
/// its cache.
pub(super) const TASK: usize = 16 * 1024;

/// Number of rows of `width` elements in a task.
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

/// The elements in row-major order. Empty if the tensor is not `f32`, which callers check.
pub(super) fn floats(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice().unwrap_or_default()
}

/// A tensor that covers its whole storage, so that the storage can be written in place. The storage
/// is copied on the first write if another tensor shares it.
pub(super) fn whole(tensor: FlexTensor) -> FlexTensor {
    let whole = tensor.to_contiguous();
    drop(tensor);
    whole
}

/// A tensor with the given elements.
pub(super) fn tensor(values: Vec<f32>, shape: Shape) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape))
}

/// Whether all tensors are `f32`.
pub(super) fn is_f32(tensors: &[&FlexTensor]) -> bool {
    tensors.iter().all(|tensor| tensor.dtype() == DType::F32)
}

/// Sizes of the dimensions.
pub(super) fn dims(tensor: &FlexTensor) -> &[usize] {
    tensor.layout().shape().as_slice()
}

/// Creates a tensor that `fill` writes completely, in chunks of `chunk` elements with their index.
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
    // SAFETY: the chunks cover all elements, and `fill` writes every element of its chunk.
    unsafe { values.set_len(n) };
    tensor(values, shape)
}

/// The chunk `index` of `values` for chunks of `len` elements; the last one may be shorter.
pub(super) fn part(values: &[f32], index: usize, len: usize) -> &[f32] {
    let start = (index * len).min(values.len());
    &values[start..(start + len).min(values.len())]
}

/// Changes `values` in place, in chunks that `work` receives with their index.
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

/// Creates a matrix of `n` elements, all of which `fill` writes.
pub(super) fn matrix(n: usize, fill: impl FnOnce(Disjoint<'_, f32>)) -> Vec<f32> {
    let mut values: Vec<f32> = Vec::with_capacity(n);
    fill(Disjoint::uninit(&mut values.spare_capacity_mut()[..n]));
    // SAFETY: `fill` has written all `n` elements.
    unsafe { values.set_len(n) };
    values
}

/// Number of rows, each along the last dimension.
pub(super) fn n_rows(x: &FlexTensor) -> usize {
    dims(x).iter().rev().skip(1).product()
}

/// The shape of `x` with another last dimension.
pub(super) fn with_width(x: &FlexTensor, width: usize) -> Shape {
    let mut shape = dims(x).to_vec();
    if let Some(last) = shape.last_mut() {
        *last = width;
    }
    Shape::from(shape)
}

/// The tensor as a weight. Returns `None` if it has another rank or dtype, is empty, or has a
/// negative stride.
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
