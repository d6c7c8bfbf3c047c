//! A weight with a masked update on Flex: the sum, and the gradients of its factors without a
//! stored gradient of the sum.

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

/// Maximum number of partial sums of A's gradient, and with it of tasks.
const SHARES: usize = 64;

/// Number of weight rows per task.
fn weight_rows(d_output: usize) -> usize {
    (64 * 1024 / d_output.max(1)).max(1)
}

/// The bytes of the mask, row-major; `None` if the mask has another layout.
fn mask_bytes(mask: &FlexTensor, shape: [usize; 2]) -> Option<&[u8]> {
    (matches!(mask.dtype(), DType::Bool(_)) && dims(mask) == shape && mask.is_contiguous())
        .then(|| &mask.bytes()[mask.layout().start_offset()..])
        .filter(|bytes| bytes.len() >= shape[0] * shape[1])
}

/// `W + (s A_r B_r) * M`, computed in blocks of rows.
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

/// Computes a matrix of the weight's shape in blocks of rows. `finish` receives the number of a
/// row, its part of `s A_r B_r`, which it replaces, and the rows of the weight and the mask. The
/// result is rounded to bf16 if the weight is in bf16.
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
    // Fills `out` completely with the rows starting at block `index`.
    let fill = |index: usize, out: &mut [MaybeUninit<f32>], scratch: &mut Vec<f32>| {
        let range = index * rows..index * rows + out.len() / d_output;
        let a = Matrix::rows(
            &floats(&factors.a)[range.start * factors.max_rank..],
            factors.max_rank,
        );
        let size = [range.len(), d_output, term.rank];
        // SAFETY: `a` starts at the first of these rows, which are rows of A, `b` has `d_output`
        // columns, and `out` has `range.len() * d_output` elements that belong to this task.
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
        // SAFETY: the product has written all elements of `out`.
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
                // SAFETY: `fill` has written all elements of `wide`.
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
    // SAFETY: every element of every block was written.
    unsafe { sum.set_len(n) };
    Some(tensor(sum, shape))
}

/// Gradients of the factors, computed from the layer's input and the gradient of its output. The
/// results are those of [`summed_weight_backward`] for `x^T grad`, of which only a strip exists at
/// a time. Computed in `f32`, or if `rounded` with the operands of every product rounded to bf16
/// and sums in `f32`. Returns `None` if the layer is too small to gain from this or if the
/// processor lacks the instructions.
#[allow(clippy::too_many_arguments)] // the inputs of the layer
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
    // SAFETY: `x` is contiguous and has `rows` rows of `d_input` elements.
    unsafe { left.pack(0, Matrix::rows(floats(&x), d_input).transposed().left(rows)) };
    let right = Matrix::rows(floats(&grad), d_output).right(rows);
    let width = left.strip_columns(d_output);
    let (blocks, mut db) = (d_output.div_ceil(width), vec![0.0; max_rank * d_output]);
    let (tasks, of_b) = (blocks.min(SHARES), Disjoint::new(&mut db));
    // Each task sums its own share of A's gradient over its columns. The shares are added in the
    // order of the columns, so the result does not depend on the number of threads.
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
                // SAFETY: `first` and `columns` are inside the weight, so the operands stay inside
                // `factors` and `strip`. `da` belongs to this task, and so do these columns of
                // `db`.
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
            // SAFETY: the left operand is packed above; `right` has `rows` rows, and `columns` are
            // below `d_output`.
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

/// Gradients of the factors from the gradient of the summed weight, `s (grad * M) B_r^T` and
/// `s A_r^T (grad * M)`, in one pass over the gradient.
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
    // Each task computes its own share of B's gradient. The shares are added in the order of the
    // rows, so the result does not depend on the number of threads.
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
            // SAFETY: `grad` has `count` rows of `d_output` elements and `a` as many columns; `da`
            // has room for `count` rows of `max_rank`, and `matrix` allocates `rank * d_output`
            // elements for `db`.
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
