//! Linear layers on Flex, with and without an adapter, and the head with its loss: matrix products around one output buffer.

use burn::backend::flex::FlexTensor;
use burn::tensor::Shape;
use rayon::prelude::*;

use super::flex::{Targets, contiguous, dims, floats, for_chunks, is_f32, task_rows, tensor};
use super::flex_gemm::{Engine, Kind, Left, Output};
use super::flex_matmul::{Matrix, SERIAL, Shared, Weight, product};
use crate::kernels::Level;
use crate::kernels::rows;
use crate::nn::custom::LoraTerm;
use crate::nn::dropout::Dropout;

/// Most rows whose logits exist at a time. The more there are, the less it weighs that the head's weight is read and packed
/// anew for each such chunk.
const HEAD_ROWS: usize = 512;
/// Most logits at a time, 64 MiB of them, over which chunks get fewer rows.
const HEAD_LOGITS: usize = 16 << 20;

/// A new matrix that `fill` writes completely.
pub(super) fn matrix(n: usize, fill: impl FnOnce(Shared)) -> Vec<f32> {
    let mut values: Vec<f32> = Vec::with_capacity(n);
    fill(Shared(values.as_mut_ptr()));
    // SAFETY: `fill` has written every element.
    unsafe { values.set_len(n) };
    values
}

/// Rows of the last dimension.
pub(super) fn n_rows(x: &FlexTensor) -> usize {
    dims(x).iter().rev().skip(1).product()
}

/// `x`'s shape with another last dimension.
fn with_width(x: &FlexTensor, width: usize) -> Shape {
    let mut shape = dims(x).to_vec();
    if let Some(last) = shape.last_mut() {
        *last = width;
    }
    Shape::from(shape)
}

/// `x` and the weight where they form a product that the kernels cover: `f32` rows that are not empty.
fn operands<'a>(x: &FlexTensor, weight: &'a FlexTensor) -> Option<Weight<'a>> {
    let weight = Weight::new(weight)?;
    let fits = is_f32(&[x]) && dims(x).last() == Some(&weight.dims()[0]) && n_rows(x) > 0;
    fits.then_some(weight)
}

/// `x W`.
pub(super) fn linear(x: &FlexTensor, weight: &FlexTensor) -> Option<FlexTensor> {
    let of = operands(x, weight)?;
    let ([d_input, d_output], rows, x) = (of.dims(), n_rows(x), contiguous(x.clone()));
    // SAFETY: the operands are alive, and the output is this one's.
    let y = matrix(rows * d_output, |y| unsafe {
        of.multiply(rows, Matrix::rows(floats(&x), d_input), y, d_output, false);
    });
    Some(tensor(y, with_width(&x, d_output)))
}

/// `grad W^T`.
pub(super) fn linear_backward_input(weight: &FlexTensor, grad: &FlexTensor) -> Option<FlexTensor> {
    let of = Weight::new(weight)?.transposed();
    let ([d_output, d_input], rows) = (of.dims(), n_rows(grad));
    if !is_f32(&[grad]) || dims(grad).last() != Some(&d_output) || rows == 0 {
        return None;
    }
    let grad = contiguous(grad.clone());
    // SAFETY: as above.
    let dx = matrix(rows * d_input, |dx| unsafe {
        of.multiply(
            rows,
            Matrix::rows(floats(&grad), d_output),
            dx,
            d_input,
            false,
        );
    });
    Some(tensor(dx, with_width(&grad, d_input)))
}

/// `x^T grad`; of numbers rounded to bf16 where that is said and the processor multiplies them as such.
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
        // SAFETY: as above.
        unsafe {
            match Engine::new(Kind::Bf16, true)
                .filter(|_| rounded && size.iter().product::<usize>() >= SERIAL)
            {
                Some(engine) => {
                    let output = Output {
                        out: dw,
                        width: d_output,
                        factor: 1.0,
                        add: false,
                    };
                    engine.product([d_input, d_output], x.left(rows), grad.right(rows), output);
                }
                None => product(size, x, grad, 1.0, dw.at(0), d_output, false, true),
            }
        }
    });
    Some(tensor(dw, Shape::from([d_input, d_output])))
}

/// The factors of an adapter with `rank` of their ranks active: `a` `[d_input, r_max]`, `b` `[r_max, d_output]`.
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

/// `x` with dropout, in a buffer of its own; none where nothing is dropped.
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
    let of_h = |h: Shared| {
        let x = dropped
            .as_ref()
            .map_or(base_rows, |dropped| Matrix::rows(dropped, d_input));
        // SAFETY: the operands are alive, and the output is this one's; so below.
        unsafe {
            product(
                [rows, rank, d_input],
                x,
                factors.a(),
                term.scale as f32,
                h.at(0),
                rank,
                false,
                true,
            )
        };
    };
    let y_shape = with_width(&x, d_output);
    let (y, h) = if let Some(engine) = of.engine(rows) {
        // `[x h] [W; B]`, with `x` packed once for both of its products.
        let left = Left::new(engine, rows, &[d_input, rank]);
        // SAFETY: as above; what a product reads has been packed.
        unsafe {
            left.pack(0, base_rows.left(d_input));
            let h = matrix(rows * rank, |h| {
                if dropped.is_some() {
                    of_h(h);
                } else {
                    let output = Output {
                        out: h,
                        width: rank,
                        factor: term.scale as f32,
                        add: false,
                    };
                    left.times(rank, &[factors.a().right(d_input)], output);
                }
            });
            left.pack(1, Matrix::rows(&h, rank).left(rank));
            let y = matrix(rows * d_output, |y| {
                let output = Output {
                    out: y,
                    width: d_output,
                    factor: 1.0,
                    add: false,
                };
                left.times(d_output, &[of.right(), factors.b().right(rank)], output);
            });
            (y, h)
        }
    } else {
        let h = matrix(rows * rank, of_h);
        // SAFETY: as above.
        let y = matrix(rows * d_output, |y| unsafe {
            of.multiply(rows, base_rows, y, d_output, false);
            let size = [rows, d_output, rank];
            product(
                size,
                Matrix::rows(&h, rank),
                factors.b(),
                1.0,
                y.at(0),
                d_output,
                true,
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
        // SAFETY: as above.
        unsafe {
            product(
                size,
                grad,
                b,
                term.scale as f32,
                g.at(0),
                term.rank,
                false,
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
        Weight::new(weight)?.transposed(),
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
            // `[grad g] [W^T; A^T]`, as in the forward pass.
            let left = Left::new(engine, rows, &[d_output, rank]);
            // SAFETY: the operands are alive, each output is this one's, and what a product reads has been packed.
            unsafe {
                left.pack(0, grads.left(d_output));
                let g = matrix(rows * rank, |g| {
                    let output = Output {
                        out: g,
                        width: rank,
                        factor: term.scale as f32,
                        add: false,
                    };
                    left.times(rank, &[b.right(d_output)], output);
                });
                left.pack(1, Matrix::rows(&g, rank).left(rank));
                let right = [of.right(), a.right(rank)];
                // A dropped update is added below.
                let parts = if term.dropout.is_active() {
                    &right[..1]
                } else {
                    &right
                };
                let dx = matrix(rows * d_input, |dx| {
                    left.times(
                        d_input,
                        parts,
                        Output {
                            out: dx,
                            width: d_input,
                            factor: 1.0,
                            add: false,
                        },
                    );
                });
                (dx, g)
            }
        }
        None => {
            // SAFETY: as above.
            let g = matrix(rows * rank, |g| unsafe {
                product(
                    [rows, rank, d_output],
                    grads,
                    b,
                    term.scale as f32,
                    g.at(0),
                    rank,
                    false,
                    true,
                );
            });
            // SAFETY: as above.
            let dx = matrix(rows * d_input, |dx| unsafe {
                of.multiply(rows, grads, dx, d_input, false);
                if !term.dropout.is_active() {
                    let size = [rows, d_input, rank];
                    product(
                        size,
                        Matrix::rows(&g, rank),
                        a,
                        1.0,
                        dx.at(0),
                        d_input,
                        true,
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
    // An even number of rows, since the mask is drawn in pairs.
    let block = task_rows(d_input).next_multiple_of(2);
    for_chunks(dx, block * d_input, |index, out| {
        let part = &g[index * block * rank..][..out.len() / d_input * rank];
        let size = [part.len() / rank, d_input, rank];
        let mut update = matrix(out.len(), |update| {
            // SAFETY: the operands are alive, and the output is this one's.
            unsafe {
                product(
                    size,
                    Matrix::rows(part, rank),
                    a,
                    1.0,
                    update.at(0),
                    d_input,
                    false,
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

/// Gradients of the factors: `dropout(x)^T g` in the first columns and `h^T grad` in the first rows; the rest is zero.
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
    // SAFETY: as above.
    unsafe {
        product(
            [d_input, rank, rows],
            x.transposed(),
            g,
            1.0,
            da.as_mut_ptr(),
            max_rank,
            false,
            true,
        );
        if Engine::new(Kind::F32, true).is_some() {
            product(
                [rank, d_output, rows],
                h.transposed(),
                grad,
                1.0,
                db.as_mut_ptr(),
                d_output,
                false,
                true,
            );
        } else {
            // The thin matrix on the right and the result turned afterwards: twice as fast by the `gemm` crate.
            let turned = matrix(d_output * rank, |turned| {
                product(
                    [d_output, rank, rows],
                    grad.transposed(),
                    h,
                    1.0,
                    turned.at(0),
                    rank,
                    false,
                    true,
                );
            });
            for (output, turned) in turned.chunks_exact(rank).enumerate() {
                turned
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

/// What [`head`] finds: the summed loss, that against the targets alone, and the gradients that were asked for.
pub(super) struct Head {
    pub loss: FlexTensor,
    pub nll: FlexTensor,
    pub hidden: Option<FlexTensor>,
    pub weight: Option<FlexTensor>,
}

/// A teacher's hidden states, and its share of the loss.
pub(super) struct Teacher {
    pub hidden: FlexTensor,
    pub mix: f64,
}

/// The cross-entropy of `hidden W` summed over rows, and on request its gradients. The logits of [`HEAD_ROWS`] rows exist at
/// a time, a teacher's beside them, and their gradient takes their place.
pub(super) fn head(
    hidden: &FlexTensor,
    weight: &FlexTensor,
    targets: &FlexTensor,
    teacher: Option<Teacher>,
    want_hidden: bool,
    want_weight: bool,
) -> Option<Head> {
    let (of, targets) = (operands(hidden, weight)?, contiguous(targets.clone()));
    let (classes, [d_model, n_classes]) = (Targets::new(&targets)?, of.dims());
    let n = classes.len();
    if dims(hidden) != [n, d_model] {
        return None;
    }
    if teacher
        .as_ref()
        .is_some_and(|teacher| !is_f32(&[&teacher.hidden]) || dims(&teacher.hidden) != [n, d_model])
    {
        return None;
    }
    let (hidden, level) = (contiguous(hidden.clone()), Level::detect());
    let teacher = teacher.map(|teacher| Teacher {
        hidden: contiguous(teacher.hidden),
        ..teacher
    });
    let values = floats(&hidden);
    let mut grad_hidden = vec![0.0_f32; if want_hidden { n * d_model } else { 0 }];
    let mut grad_weight = vec![0.0_f32; if want_weight { d_model * n_classes } else { 0 }];
    let chunk_rows = (HEAD_LOGITS / n_classes).clamp(64, HEAD_ROWS).min(n);
    let mut logits = vec![0.0_f32; chunk_rows * n_classes];
    let mut taught = vec![0.0_f32; if teacher.is_some() { logits.len() } else { 0 }];
    let (mut loss, mut nll) = (0.0_f64, 0.0_f64);
    for first in (0..n).step_by(chunk_rows) {
        let rows = chunk_rows.min(n - first);
        let logits = &mut logits[..rows * n_classes];
        let chunk = Matrix::rows(&values[first * d_model..], d_model);
        // SAFETY: the operands are alive, and the outputs are this one's; so below.
        unsafe { of.multiply(rows, chunk, Shared(logits.as_mut_ptr()), n_classes, false) };
        let want_gradient = want_hidden || want_weight;
        let lines = logits
            .par_chunks_exact_mut(n_classes)
            .with_min_len(task_rows(n_classes))
            .enumerate();
        // By row: the loss, and that against the target.
        let losses: Vec<[f32; 2]> = if let Some(Teacher { hidden, mix }) = &teacher {
            let taught = &mut taught[..rows * n_classes];
            let chunk = Matrix::rows(&floats(hidden)[first * d_model..], d_model);
            // SAFETY: as above.
            unsafe { of.multiply(rows, chunk, Shared(taught.as_mut_ptr()), n_classes, false) };
            let (soft, hard) = (*mix as f32, (1.0 - mix) as f32);
            let row = |((row, logits), taught): ((usize, &mut [f32]), &mut [f32])| {
                let class = classes.get(first + row);
                let target = logits[class];
                rows::softmax(level, taught);
                let (log_sum_exp, cross_entropy) = rows::softmax_less(level, logits, taught, soft);
                logits[class] -= hard;
                let nll = log_sum_exp - target;
                [soft * cross_entropy + hard * nll, nll]
            };
            lines
                .zip(taught.par_chunks_exact_mut(n_classes))
                .map(row)
                .collect()
        } else {
            let row = |(row, logits): (usize, &mut [f32])| {
                let class = classes.get(first + row);
                let target = logits[class];
                if !want_gradient {
                    return [rows::log_sum_exp(level, logits) - target; 2];
                }
                let log_sum_exp = rows::softmax(level, logits);
                logits[class] -= 1.0;
                [log_sum_exp - target; 2]
            };
            lines.map(row).collect()
        };
        loss += losses.iter().map(|row| f64::from(row[0])).sum::<f64>();
        nll += losses.iter().map(|row| f64::from(row[1])).sum::<f64>();
        let slopes = Matrix::rows(logits, n_classes);
        if want_hidden {
            let out = Shared(grad_hidden[first * d_model..].as_mut_ptr());
            // SAFETY: as above.
            unsafe { of.transposed().multiply(rows, slopes, out, d_model, false) };
        }
        if want_weight {
            let (size, out) = ([d_model, n_classes, rows], grad_weight.as_mut_ptr());
            // SAFETY: as above.
            unsafe {
                product(
                    size,
                    chunk.transposed(),
                    slopes,
                    1.0,
                    out,
                    n_classes,
                    true,
                    true,
                )
            };
        }
    }
    let scalar = |value: f64| tensor(vec![value as f32], Shape::from([1]));
    Some(Head {
        loss: scalar(loss),
        nll: scalar(nll),
        hidden: want_hidden.then(|| tensor(grad_hidden, Shape::from([n, d_model]))),
        weight: want_weight.then(|| tensor(grad_weight, Shape::from([d_model, n_classes]))),
    })
}
