//! Linear layers on Flex, with and without an adapter: matrix products that share one output
//! buffer.

use burn::backend::flex::FlexTensor;
use burn::tensor::Shape;
use rayon::prelude::*;

use super::util::{
    contiguous, dims, floats, for_chunks, is_f32, matrix, n_rows, task_rows, tensor, weight,
    with_width,
};
use crate::kernels::disjoint::Disjoint;
use crate::kernels::gemm::{Engine, Kind, Left, Matrix, Output, SERIAL, Weight, product};
use crate::nn::Dropout;
use crate::nn::ops::terms::LoraTerm;

/// Returns the weight if the kernels support its product with `x`: `x` must consist of `f32` rows
/// and must not be empty.
pub(super) fn operands<'a>(x: &FlexTensor, of: &'a FlexTensor) -> Option<Weight<'a>> {
    let weight = weight(of)?;
    let fits = is_f32(&[x]) && dims(x).last() == Some(&weight.dims()[0]) && n_rows(x) > 0;
    fits.then_some(weight)
}

/// `x W`.
pub(super) fn linear(x: &FlexTensor, weight: &FlexTensor) -> Option<FlexTensor> {
    let of = operands(x, weight)?;
    let ([d_input, d_output], rows, x) = (of.dims(), n_rows(x), contiguous(x.clone()));
    // SAFETY: `operands` checked that the rows of `x` fit the weight, and `matrix` allocates
    // `rows * d_output` elements for `y`.
    let y = matrix(rows * d_output, |y| unsafe {
        of.multiply(
            rows,
            Matrix::rows(floats(&x), d_input),
            Output::new(y, d_output),
        );
    });
    Some(tensor(y, with_width(&x, d_output)))
}

/// `grad W^T`.
pub(super) fn linear_backward_input(weight: &FlexTensor, grad: &FlexTensor) -> Option<FlexTensor> {
    let of = self::weight(weight)?.transposed();
    let ([d_output, d_input], rows) = (of.dims(), n_rows(grad));
    if !is_f32(&[grad]) || dims(grad).last() != Some(&d_output) || rows == 0 {
        return None;
    }
    let grad = contiguous(grad.clone());
    // SAFETY: the width of `grad` was checked against the weight above, and `matrix` allocates
    // `rows * d_input` elements for `dx`.
    let dx = matrix(rows * d_input, |dx| unsafe {
        of.multiply(
            rows,
            Matrix::rows(floats(&grad), d_output),
            Output::new(dx, d_input),
        );
    });
    Some(tensor(dx, with_width(&grad, d_input)))
}

/// `x^T grad`. The operands are rounded to bf16 if `rounded` and if the processor multiplies bf16.
pub(super) fn linear_backward_weight(
    x: &FlexTensor,
    grad: &FlexTensor,
    rounded: bool,
) -> Option<FlexTensor> {
    let (rows, d_input, d_output) = (n_rows(x), *dims(x).last()?, *dims(grad).last()?);
    if !is_f32(&[x, grad]) || n_rows(grad) != rows || [rows, d_input, d_output].contains(&0) {
        return None;
    }
    let (x, grad) = (contiguous(x.clone()), contiguous(grad.clone()));
    let dw = matrix(d_input * d_output, |dw| {
        let (x, grad) = (
            Matrix::rows(floats(&x), d_input).transposed(),
            Matrix::rows(floats(&grad), d_output),
        );
        let size = [d_input, d_output, rows];
        // SAFETY: `x` and `grad` are contiguous and were checked to have `rows` rows, and `matrix`
        // allocates `d_input * d_output` elements for `dw`.
        unsafe {
            match Engine::new(Kind::Bf16, true)
                .filter(|_| rounded && size.iter().product::<usize>() >= SERIAL)
            {
                Some(engine) => {
                    let output = Output::new(dw, d_output);
                    engine.product([d_input, d_output], x.left(rows), grad.right(rows), output);
                }
                None => product(size, x, grad, Output::new(dw, d_output), true),
            }
        }
    });
    Some(tensor(dw, Shape::from([d_input, d_output])))
}

/// The factors of an adapter: `a` is `[d_input, r_max]` and `b` is `[r_max, d_output]`. The active
/// rank was checked to be at most `r_max`.
pub(super) struct Factors {
    pub a: FlexTensor,
    pub b: FlexTensor,
    pub max_rank: usize,
    pub d_input: usize,
    pub d_output: usize,
}

impl Factors {
    pub fn new(a: FlexTensor, b: FlexTensor, rank: usize) -> Option<Self> {
        let (&[d_input, max_rank], &[rows, d_output]) = (dims(&a), dims(&b)) else {
            return None;
        };
        let fits =
            rows == max_rank && (1..=max_rank).contains(&rank) && d_input > 0 && d_output > 0;
        (fits && is_f32(&[&a, &b])).then(|| {
            let (a, b) = (contiguous(a), contiguous(b));
            Self {
                a,
                b,
                max_rank,
                d_input,
                d_output,
            }
        })
    }

    pub fn a(&self) -> Matrix {
        Matrix::rows(floats(&self.a), self.max_rank)
    }

    pub fn b(&self) -> Matrix {
        Matrix::rows(floats(&self.b), self.d_output)
    }
}

/// `x` with dropout in a new buffer; `None` if nothing is dropped.
fn dropped(x: &[f32], dropout: Dropout) -> Option<Vec<f32>> {
    const CHUNK: usize = 16 * 1024;
    dropout.is_active().then(|| {
        let mut dropped = x.to_vec();
        dropped
            .par_chunks_mut(CHUNK)
            .enumerate()
            .for_each(|(index, values)| {
                dropout.for_each(index * CHUNK, values, |value, factor| *value *= factor);
            });
        dropped
    })
}

/// `x W + h B_r` and `h = s dropout(x) A_r`.
pub(super) fn lora_linear(
    x: &FlexTensor,
    weight: &FlexTensor,
    a: FlexTensor,
    b: FlexTensor,
    term: LoraTerm,
) -> Option<(FlexTensor, FlexTensor)> {
    let (of, factors) = (operands(x, weight)?, Factors::new(a, b, term.rank)?);
    let ([d_input, d_output], rows, rank) = (of.dims(), n_rows(x), term.rank);
    if [d_input, d_output] != [factors.d_input, factors.d_output] {
        return None;
    }
    let x = contiguous(x.clone());
    let base_rows = Matrix::rows(floats(&x), d_input);
    let dropped = dropped(floats(&x), term.dropout);
    let of_h = |h: Disjoint<'_, f32>| {
        let x = dropped
            .as_ref()
            .map_or(base_rows, |dropped| Matrix::rows(dropped, d_input));
        // SAFETY: `operands` and the comparison with `factors` above checked the shapes, and `h`
        // has room for `rows * rank` elements.
        unsafe {
            product(
                [rows, rank, d_input],
                x,
                factors.a(),
                Output::new(h, rank).times(term.scale as f32),
                true,
            )
        };
    };
    let y_shape = with_width(&x, d_output);
    let (y, h) = if let Some(engine) = of.engine(rows) {
        // Computes `[x h] [W; B]`, with `x` packed once for both of its products.
        let mut left = Left::new(engine, rows, &[d_input, rank]);
        // SAFETY: the shapes were checked above. Part 0 is packed before the first product and part
        // 1 before the second, and `matrix` allocates the outputs with the sizes of the products.
        unsafe {
            left.pack(0, base_rows.left(d_input));
            let h = matrix(rows * rank, |h| {
                if dropped.is_some() {
                    of_h(h);
                } else {
                    let output = Output::new(h, rank).times(term.scale as f32);
                    left.times(rank, &[factors.a().right(d_input)], output);
                }
            });
            left.pack(1, Matrix::rows(&h, rank).left(rank));
            let y = matrix(rows * d_output, |y| {
                let output = Output::new(y, d_output);
                left.times(d_output, &[of.right(), factors.b().right(rank)], output);
            });
            (y, h)
        }
    } else {
        let h = matrix(rows * rank, of_h);
        // SAFETY: the shapes were checked above, and `matrix` allocates `rows * d_output` elements
        // for `y`.
        let y = matrix(rows * d_output, |y| unsafe {
            of.multiply(rows, base_rows, Output::new(y, d_output));
            let size = [rows, d_output, rank];
            product(
                size,
                Matrix::rows(&h, rank),
                factors.b(),
                Output::new(y, d_output).added(),
                true,
            );
        });
        (y, h)
    };
    Some((tensor(y, y_shape), tensor(h, Shape::from([rows, rank]))))
}

/// `g = s grad B_r^T`, `[n, rank]`.
pub(super) fn lora_backward_inner(
    b: &FlexTensor,
    grad: &FlexTensor,
    term: LoraTerm,
) -> Option<FlexTensor> {
    let (&[max_rank, d_output], rows) = (dims(b), n_rows(grad)) else {
        return None;
    };
    if !is_f32(&[b, grad])
        || dims(grad).last() != Some(&d_output)
        || rows == 0
        || term.rank > max_rank
    {
        return None;
    }
    let (b, grad) = (contiguous(b.clone()), contiguous(grad.clone()));
    let g = matrix(rows * term.rank, |g| {
        let (size, grad) = (
            [rows, term.rank, d_output],
            Matrix::rows(floats(&grad), d_output),
        );
        let b = Matrix::rows(floats(&b), d_output).transposed();
        // SAFETY: `grad` and `b` were checked above to have the same width, `term.rank` is at most
        // the rows of `b`, and `matrix` allocates `rows * term.rank` elements for `g`.
        unsafe {
            product(
                size,
                grad,
                b,
                Output::new(g, term.rank).times(term.scale as f32),
                true,
            )
        };
    });
    Some(tensor(g, Shape::from([rows, term.rank])))
}

/// `grad W^T + dropout(g A_r^T)` and `g = s grad B_r^T`.
pub(super) fn lora_backward_input(
    weight: &FlexTensor,
    a: FlexTensor,
    b: FlexTensor,
    grad: &FlexTensor,
    term: LoraTerm,
) -> Option<(FlexTensor, FlexTensor)> {
    let (of, factors) = (
        self::weight(weight)?.transposed(),
        Factors::new(a, b, term.rank)?,
    );
    let ([d_output, d_input], rows, rank) = (of.dims(), n_rows(grad), term.rank);
    let fits = [d_input, d_output] == [factors.d_input, factors.d_output]
        && dims(grad).last() == Some(&d_output);
    if !fits || !is_f32(&[grad]) || rows == 0 {
        return None;
    }
    let grad = contiguous(grad.clone());
    let (shape, grads) = (
        with_width(&grad, d_input),
        Matrix::rows(floats(&grad), d_output),
    );
    let (a, b) = (factors.a().transposed(), factors.b().transposed());
    let (dx, g) = match of.engine(rows) {
        Some(engine) => {
            // Computes `[grad g] [W^T; A^T]`, as in the forward pass.
            let mut left = Left::new(engine, rows, &[d_output, rank]);
            // SAFETY: `fits` checked the shapes above. Part 0 is packed before the first product
            // and part 1 before the second, and `matrix` allocates the outputs with the sizes of
            // the products.
            unsafe {
                left.pack(0, grads.left(d_output));
                let g = matrix(rows * rank, |g| {
                    let output = Output::new(g, rank).times(term.scale as f32);
                    left.times(rank, &[b.right(d_output)], output);
                });
                left.pack(1, Matrix::rows(&g, rank).left(rank));
                let right = [of.right(), a.right(rank)];
                // With dropout, the update is added below.
                let parts = if term.dropout.is_active() {
                    &right[..1]
                } else {
                    &right
                };
                let dx = matrix(rows * d_input, |dx| {
                    left.times(d_input, parts, Output::new(dx, d_input));
                });
                (dx, g)
            }
        }
        None => {
            // SAFETY: `fits` checked the shapes above, and `matrix` allocates `rows * rank`
            // elements for `g`.
            let g = matrix(rows * rank, |g| unsafe {
                product(
                    [rows, rank, d_output],
                    grads,
                    b,
                    Output::new(g, rank).times(term.scale as f32),
                    true,
                );
            });
            // SAFETY: `fits` checked the shapes above, and `matrix` allocates `rows * d_input`
            // elements for `dx`.
            let dx = matrix(rows * d_input, |dx| unsafe {
                of.multiply(rows, grads, Output::new(dx, d_input));
                if !term.dropout.is_active() {
                    let size = [rows, d_input, rank];
                    product(
                        size,
                        Matrix::rows(&g, rank),
                        a,
                        Output::new(dx, d_input).added(),
                        true,
                    );
                }
            });
            (dx, g)
        }
    };
    let mut dx = dx;
    if term.dropout.is_active() {
        add_dropped(&mut dx, &g, a, d_input, term);
    }
    Some((tensor(dx, shape), tensor(g, Shape::from([rows, rank]))))
}

/// Adds `dropout(g a)` to the rows of `dx`.
fn add_dropped(dx: &mut [f32], g: &[f32], a: Matrix, d_input: usize, term: LoraTerm) {
    let rank = term.rank;
    // The number of rows is even, since the mask is drawn in pairs of elements.
    let block = task_rows(d_input).next_multiple_of(2);
    for_chunks(dx, block * d_input, |index, out| {
        let part = &g[index * block * rank..][..out.len() / d_input * rank];
        let size = [part.len() / rank, d_input, rank];
        let mut update = matrix(out.len(), |update| {
            // SAFETY: `part` was sliced to as many rows of `g` as `out` has, `a` has `rank` rows of
            // `d_input`, and `matrix` allocates `out.len()` elements for `update`.
            unsafe {
                product(
                    size,
                    Matrix::rows(part, rank),
                    a,
                    Output::new(update, d_input),
                    false,
                )
            };
        });
        term.dropout
            .for_each(index * block * d_input, &mut update, |value, factor| {
                *value *= factor
            });
        out.iter_mut()
            .zip(update)
            .for_each(|(out, update)| *out += update);
    });
}

/// Gradients of the factors: `dropout(x)^T g` in the first columns and `h^T grad` in the first
/// rows. The rest is zero.
pub(super) fn lora_backward_factors(
    x: &FlexTensor,
    h: &FlexTensor,
    g: &FlexTensor,
    grad: &FlexTensor,
    max_rank: usize,
    term: LoraTerm,
) -> Option<(FlexTensor, FlexTensor)> {
    let (rows, rank, d_input, d_output) =
        (n_rows(x), term.rank, *dims(x).last()?, *dims(grad).last()?);
    let fits = dims(h) == [rows, rank]
        && dims(g) == [rows, rank]
        && n_rows(grad) == rows
        && rank <= max_rank;
    if !fits || !is_f32(&[x, h, g, grad]) {
        return None;
    }
    let [x, h, g, grad] = [x, h, g, grad].map(|tensor| contiguous(tensor.clone()));
    let dropped = dropped(floats(&x), term.dropout);
    let x = Matrix::rows(dropped.as_deref().unwrap_or(floats(&x)), d_input);
    let mut da = vec![0.0_f32; d_input * max_rank];
    let mut db = vec![0.0_f32; max_rank * d_output];
    let (h, g, grad) = (
        Matrix::rows(floats(&h), rank),
        Matrix::rows(floats(&g), rank),
        Matrix::rows(floats(&grad), d_output),
    );
    // SAFETY: `fits` checked the shapes above; `da` and `db` were allocated for `max_rank`, which
    // is at least `rank`.
    unsafe {
        product(
            [d_input, rank, rows],
            x.transposed(),
            g,
            Output::over(&mut da, max_rank),
            true,
        );
        if Engine::new(Kind::F32, true).is_some() {
            product(
                [rank, d_output, rows],
                h.transposed(),
                grad,
                Output::over(&mut db, d_output),
                true,
            );
        } else {
            // With the `gemm` crate, it is twice as fast to put the thin matrix on the right and to
            // transpose the result afterwards.
            let transposed = matrix(d_output * rank, |transposed| {
                product(
                    [d_output, rank, rows],
                    grad.transposed(),
                    h,
                    Output::new(transposed, rank),
                    true,
                );
            });
            for (output, transposed) in transposed.chunks_exact(rank).enumerate() {
                transposed
                    .iter()
                    .enumerate()
                    .for_each(|(row, value)| db[row * d_output + output] = *value);
            }
        }
    }
    Some((
        tensor(da, Shape::from([d_input, max_rank])),
        tensor(db, Shape::from([max_rank, d_output])),
    ))
}
