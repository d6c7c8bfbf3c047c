//! A weight with a masked update on Flex: the sum, and gradients of its factors, which need no
//! gradient of the sum in memory.

use std::mem::MaybeUninit;

use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Shape, TensorData};
use half::bf16;
use rayon::prelude::*;

use super::linear::Factors;
use super::util::{
    contiguous, dims, floats, for_chunks, is_f32, matrix, n_rows, tensor, weight, whole,
};
use crate::kernels::Level;
use crate::kernels::disjoint::Disjoint;
use crate::kernels::gemm::{Engine, Kind, Left, Matrix, Output, SERIAL, product};
use crate::kernels::rows::masked;
use crate::nn::ops::terms::LoraTerm;

/// Most shares of A's gradient that exist at a time; as many tasks there are at most.
const SHARES: usize = 64;

/// Rows of a weight that one task handles.
fn weight_rows(d_output: usize) -> usize {
    (64 * 1024 / d_output.max(1)).max(1)
}

/// The mask's bytes, row-major; none where it is held otherwise.
fn mask_bytes(mask: &FlexTensor, shape: [usize; 2]) -> Option<&[u8]> {
    (matches!(mask.dtype(), DType::Bool(_)) && dims(mask) == shape && mask.is_contiguous())
        .then(|| &mask.bytes()[mask.layout().start_offset()..])
        .filter(|bytes| bytes.len() >= shape[0] * shape[1])
}

/// `W + (s A_r B_r) * M`, row block by row block.
pub(super) fn summed_weight(
    weight: &FlexTensor,
    mask: &FlexTensor,
    a: FlexTensor,
    b: FlexTensor,
    term: LoraTerm,
) -> Option<FlexTensor> {
    let level = Level::detect();
    summed_rows(weight, mask, a, b, term, |_, out, base, mask| {
        masked::add_masked(level, out, base, mask)
    })
}

/// A matrix of the weight's shape, row block by row block: `finish` is given a row's number, its
/// part of `s A_r B_r`, to be replaced, and the weight's and the mask's rows. It is rounded to bf16
/// where the weight is of bf16.
pub(super) fn summed_rows(
    weight: &FlexTensor,
    mask: &FlexTensor,
    a: FlexTensor,
    b: FlexTensor,
    term: LoraTerm,
    finish: impl Fn(usize, &mut [f32], &[f32], &[u8]) + Sync,
) -> Option<FlexTensor> {
    let factors = Factors::new(a, b, term.rank)?;
    let (d_input, d_output) = (factors.d_input, factors.d_output);
    let (base, mask) = (
        self::weight(weight)?,
        mask_bytes(mask, [d_input, d_output])?,
    );
    if base.dims() != [d_input, d_output] {
        return None;
    }
    let (rows, n) = (weight_rows(d_output), d_input * d_output);
    // Rows from block `index` on, as far as `out` goes, which is written completely.
    let fill = |index: usize, out: &mut [MaybeUninit<f32>], scratch: &mut Vec<f32>| {
        let range = index * rows..index * rows + out.len() / d_output;
        let a = Matrix::rows(
            &floats(&factors.a)[range.start * factors.max_rank..],
            factors.max_rank,
        );
        let size = [range.len(), d_output, term.rank];
        // SAFETY: the operands are alive, and the rows are this task's; the product writes all of
        // them.
        unsafe {
            let first = Disjoint::uninit(out);
            product(
                size,
                a,
                factors.b(),
                Output::new(first, d_output).times(term.scale as f32),
                false,
            );
        }
        // SAFETY: as above.
        let out = unsafe { out.assume_init_mut() };
        let mask = &mask[range.start * d_output..];
        base.copy_rows(range.clone(), scratch);
        let lines = out
            .chunks_exact_mut(d_output)
            .zip(scratch.chunks_exact(d_output))
            .zip(mask.chunks_exact(d_output));
        for (row, ((out, base), mask)) in range.zip(lines) {
            finish(row, out, base, mask);
        }
    };
    let shape = Shape::from([d_input, d_output]);
    if weight.dtype() == DType::BF16 {
        let (mut sum, level) = (Vec::<bf16>::with_capacity(n), Level::detect());
        let blocks = sum.spare_capacity_mut()[..n]
            .par_chunks_mut(rows * d_output)
            .enumerate();
        blocks.for_each_init(
            Default::default,
            |(wide, scratch): &mut (Vec<f32>, Vec<f32>), (index, out)| {
                wide.clear();
                wide.reserve(out.len());
                let wide = &mut wide.spare_capacity_mut()[..out.len()];
                fill(index, wide, scratch);
                // SAFETY: filled.
                masked::round_to_bf16(level, unsafe { wide.assume_init_ref() }, out);
            },
        );
        // SAFETY: every element of every block was written.
        unsafe { sum.set_len(n) };
        return Some(FlexTensor::from_data(TensorData::new(sum, shape)));
    }
    let mut sum = Vec::<f32>::with_capacity(n);
    let blocks = sum.spare_capacity_mut()[..n]
        .par_chunks_mut(rows * d_output)
        .enumerate();
    blocks.for_each_init(Vec::new, |scratch, (index, out)| fill(index, out, scratch));
    // SAFETY: as above.
    unsafe { sum.set_len(n) };
    Some(tensor(sum, shape))
}

/// Gradients of the factors straight from the layer's input and the gradient of its output: as
/// [`summed_weight_backward`] has them from `x^T grad`, of which only a strip at a time exists. In
/// f32, or `rounded`: operands of every product rounded to bf16, sums in f32. None where that is
/// not worth it, or the processor lacks the instructions.
#[allow(clippy::too_many_arguments)] // the layer's
pub(super) fn backward_factors(
    x: &FlexTensor,
    mask: &FlexTensor,
    a: FlexTensor,
    b: FlexTensor,
    grad: &FlexTensor,
    term: LoraTerm,
    rounded: bool,
) -> Option<(FlexTensor, FlexTensor)> {
    let factors = Factors::new(a, b, term.rank)?;
    let (d_input, d_output, rank, max_rank) = (
        factors.d_input,
        factors.d_output,
        term.rank,
        factors.max_rank,
    );
    let (rows, mask) = (n_rows(x), mask_bytes(mask, [d_input, d_output])?);
    let fits = dims(x).last() == Some(&d_input)
        && dims(grad).last() == Some(&d_output)
        && n_rows(grad) == rows;
    if !fits || !is_f32(&[x, grad]) || rows * d_input * d_output < SERIAL {
        return None;
    }
    let engine = Engine::new(Kind::Bf16, true)
        .filter(|_| rounded)
        .or_else(|| Engine::new(Kind::F32, true))?;
    let (thin, level, scale) = (
        Engine {
            parallel: false,
            ..engine
        },
        Level::detect(),
        term.scale as f32,
    );
    let (x, grad) = (contiguous(x.clone()), contiguous(grad.clone()));
    let mut left = Left::new(engine, d_input, &[rows]);
    // SAFETY: the operand is alive and of this size.
    unsafe { left.pack(0, Matrix::rows(floats(&x), d_input).transposed().left(rows)) };
    let right = Matrix::rows(floats(&grad), d_output).right(rows);
    let width = left.strip_columns(d_output);
    let (blocks, mut db) = (d_output.div_ceil(width), vec![0.0; max_rank * d_output]);
    let (tasks, of_b) = (blocks.min(SHARES), Disjoint::new(&mut db));
    // A task's share of A's gradient is from its columns; they are added in the order of columns,
    // whatever the threads.
    let task = |index: usize| {
        let mut da = vec![0.0_f32; d_input * rank];
        for block in index * blocks / tasks..(index + 1) * blocks / tasks {
            let columns = block * width..((block + 1) * width).min(d_output);
            let (start, count) = (columns.start, columns.len());
            let each = |first: usize, strip: &mut [f32]| {
                let n = strip.len() / count;
                for (row, strip) in strip.chunks_exact_mut(count).enumerate() {
                    masked::keep_masked(
                        level,
                        strip,
                        &mask[(first + row) * d_output + start..][..count],
                    );
                }
                let strip = Matrix::rows(strip, count);
                let (a, b) = (
                    factors.a().from(first, 0).transposed(),
                    factors.b().from(0, start).transposed(),
                );
                let (of_a, of_b) = (Disjoint::new(&mut da[first * rank..]), of_b.from(start));
                let output = |out, width| Output::new(out, width).times(scale).added();
                // SAFETY: the operands are alive, and the outputs this task's: its share, and its
                // columns.
                unsafe {
                    thin.product(
                        [n, rank],
                        strip.left(count),
                        b.right(count),
                        output(of_a, rank),
                    );
                    thin.product(
                        [rank, count],
                        a.left(n),
                        strip.right(n),
                        output(of_b, d_output),
                    );
                }
            };
            // SAFETY: the left operand is packed, and the right one is alive and of these sizes.
            unsafe { left.strips(right, columns, each) };
        }
        da
    };
    let shares: Vec<Vec<f32>> = (0..tasks)
        .into_par_iter()
        .with_max_len(1)
        .map(task)
        .collect();
    drop(left);
    let mut da = vec![0.0; d_input * max_rank];
    let some = weight_rows(max_rank);
    for_chunks(&mut da, some * max_rank, |index, da| {
        for (row, da) in da.chunks_exact_mut(max_rank).enumerate() {
            let first = (index * some + row) * rank;
            for share in &shares {
                da.iter_mut()
                    .zip(&share[first..first + rank])
                    .for_each(|(da, share)| *da += share);
            }
        }
    });
    Some((
        tensor(da, Shape::from([d_input, max_rank])),
        tensor(db, Shape::from([max_rank, d_output])),
    ))
}

/// Gradients of the factors from that of the summed weight: `s (grad * M) B_r^T` and
/// `s A_r^T (grad * M)`, one pass over the gradient.
pub(super) fn summed_weight_backward(
    mask: &FlexTensor,
    a: FlexTensor,
    b: FlexTensor,
    grad: FlexTensor,
    term: LoraTerm,
) -> Option<(FlexTensor, FlexTensor)> {
    let factors = Factors::new(a, b, term.rank)?;
    let (d_input, d_output, rank, max_rank) = (
        factors.d_input,
        factors.d_output,
        term.rank,
        factors.max_rank,
    );
    let mask = mask_bytes(mask, [d_input, d_output])?;
    if !is_f32(&[&grad]) || dims(&grad) != [d_input, d_output] {
        return None;
    }
    let (mut grad, scale, level) = (whole(grad), term.scale as f32, Level::detect());
    let rows = weight_rows(d_output);
    let grad: &mut [f32] = grad.storage_mut();
    let mut da = vec![0.0; d_input * max_rank];
    // A task's share of B's gradient; they are added in the order of rows, whatever the threads.
    // Few, so that they are small.
    let tasks = grad
        .par_chunks_mut(rows * d_output)
        .zip(da.par_chunks_mut(rows * max_rank))
        .enumerate();
    let shares: Vec<Vec<f32>> = tasks
        .map(|(index, (grad, da))| {
            let (first, count) = (index * rows, grad.len() / d_output);
            masked::keep_masked(level, grad, &mask[first * d_output..]);
            let grad = Matrix::rows(grad, d_output);
            let a = Matrix::rows(&floats(&factors.a)[first * max_rank..], max_rank).transposed();
            // SAFETY: as above.
            unsafe {
                let b = factors.b().transposed();
                product(
                    [count, rank, d_output],
                    grad,
                    b,
                    Output::over(da, max_rank).times(scale),
                    false,
                );
                matrix(rank * d_output, |db| {
                    product(
                        [rank, d_output, count],
                        a,
                        grad,
                        Output::new(db, d_output).times(scale),
                        false,
                    );
                })
            }
        })
        .collect();
    let mut db = vec![0.0; max_rank * d_output];
    for_chunks(&mut db[..rank * d_output], d_output, |row, db| {
        for share in &shares {
            db.iter_mut()
                .zip(&share[row * d_output..])
                .for_each(|(db, share)| *db += share);
        }
    });
    Some((
        tensor(da, Shape::from([d_input, max_rank])),
        tensor(db, Shape::from([max_rank, d_output])),
    ))
}
