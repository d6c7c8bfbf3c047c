//! The head of a model and its loss on Flex.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Shape;
use rayon::prelude::*;

use super::linear::operands;
use super::util::{contiguous, dims, floats, is_f32, task_rows, tensor};
use crate::kernels::Level;
use crate::kernels::gemm::{Matrix, Output, product};
use crate::kernels::rows;
use crate::nn::ops::terms::{Head, Teacher};

/// Maximum number of rows whose logits exist at a time. Each such chunk reads and packs the weight
/// of the head again, so larger chunks reduce this cost.
const HEAD_ROWS: usize = 512;
/// Maximum number of logits at a time, 64 MiB. Chunks have fewer rows if they would exceed it.
const HEAD_LOGITS: usize = 16 << 20;

/// Target classes in the integer types of Flex.
enum Targets<'a> {
    I64(&'a [i64]),
    I32(&'a [i32]),
}

impl<'a> Targets<'a> {
    fn new(tensor: &'a FlexTensor) -> Option<Self> {
        tensor
            .as_slice()
            .map(Self::I64)
            .or_else(|| tensor.as_slice().map(Self::I32))
    }

    fn len(&self) -> usize {
        match self {
            Self::I64(values) => values.len(),
            Self::I32(values) => values.len(),
        }
    }

    /// The class of a row. A negative class becomes `usize::MAX`, which is out of range.
    fn get(&self, row: usize) -> usize {
        let class = match self {
            Self::I64(values) => values[row],
            Self::I32(values) => i64::from(values[row]),
        };
        usize::try_from(class).unwrap_or(usize::MAX)
    }
}

/// Returns the cross-entropy of `hidden W` summed over rows, or with a teacher the mixed loss; the
/// cross-entropy against the targets alone; and the needed gradients. The logits of [`HEAD_ROWS`]
/// rows exist at a time, along with the teacher's, and are overwritten by their gradient.
pub(super) fn head(
    hidden: &FlexTensor,
    weight: &FlexTensor,
    targets: &FlexTensor,
    teacher: &Teacher<Flex>,
    softcap: Option<f64>,
    [want_hidden, want_weight]: [bool; 2],
) -> Option<Head<FlexTensor>> {
    let (of, targets) = (operands(hidden, weight)?, contiguous(targets.clone()));
    let (classes, [d_model, n_classes]) = (Targets::new(&targets)?, of.dims());
    let n = classes.len();
    if dims(hidden) != [n, d_model] {
        return None;
    }
    let teacher = match teacher {
        Teacher::None => None,
        Teacher::States(hidden, _) if !is_f32(&[hidden]) || dims(hidden) != [n, d_model] => {
            return None;
        }
        Teacher::States(hidden, mix) => Some((contiguous(hidden.clone()), *mix)),
    };
    let (hidden, level) = (contiguous(hidden.clone()), Level::detect());
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
        // SAFETY: `operands` and the check of `hidden` above matched the shapes; `chunk` has `rows`
        // rows, and `logits` was sliced to `rows * n_classes`.
        unsafe { of.multiply(rows, chunk, Output::over(logits, n_classes)) };
        let want_gradient = want_hidden || want_weight;
        // Limits a row of logits, and keeps the result if the gradient needs it.
        let limit = |logits: &mut [f32], keep: bool| {
            let cap = softcap? as f32;
            rows::softcap_in_place(level, logits, cap);
            keep.then(|| (logits.to_vec(), cap))
        };
        let unlimit = |limited: Option<(Vec<f32>, f32)>, slopes: &mut [f32]| {
            if let Some((limited, cap)) = limited {
                rows::softcap_backward(level, &limited, slopes, cap);
            }
        };
        let lines = logits
            .par_chunks_exact_mut(n_classes)
            .with_min_len(task_rows(n_classes))
            .enumerate();
        // For each row: the loss, and the loss against the target.
        let losses: Vec<[f32; 2]> = if let Some((hidden, mix)) = &teacher {
            let taught = &mut taught[..rows * n_classes];
            let chunk = Matrix::rows(&floats(hidden)[first * d_model..], d_model);
            // SAFETY: the teacher has the shape of `hidden`, checked above; `taught` was sliced to
            // `rows * n_classes`.
            unsafe { of.multiply(rows, chunk, Output::over(taught, n_classes)) };
            let (soft, hard) = (*mix as f32, (1.0 - mix) as f32);
            let row = |((row, logits), taught): ((usize, &mut [f32]), &mut [f32])| {
                let class = classes.get(first + row);
                let limited = limit(logits, true);
                let target = logits[class];
                limit(taught, false);
                rows::softmax(level, taught);
                let (log_sum_exp, cross_entropy) = rows::softmax_less(level, logits, taught, soft);
                logits[class] -= hard;
                unlimit(limited, logits);
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
                let limited = limit(logits, want_gradient);
                let target = logits[class];
                if !want_gradient {
                    return [rows::log_sum_exp(level, logits) - target; 2];
                }
                let log_sum_exp = rows::softmax(level, logits);
                logits[class] -= 1.0;
                unlimit(limited, logits);
                [log_sum_exp - target; 2]
            };
            lines.map(row).collect()
        };
        loss += losses.iter().map(|row| f64::from(row[0])).sum::<f64>();
        nll += losses.iter().map(|row| f64::from(row[1])).sum::<f64>();
        let slopes = Matrix::rows(logits, n_classes);
        if want_hidden {
            let out = &mut grad_hidden[first * d_model..];
            // SAFETY: `slopes` covers `logits`, and `out` starts at row `first` of `n * d_model`
            // elements, so it has room for `rows` rows.
            unsafe {
                of.transposed()
                    .multiply(rows, slopes, Output::over(out, d_model))
            };
        }
        if want_weight {
            let (size, out) = ([d_model, n_classes, rows], &mut grad_weight);
            // SAFETY: `chunk` and `slopes` have `rows` rows each, and `grad_weight` has
            // `d_model * n_classes` elements.
            unsafe {
                product(
                    size,
                    chunk.transposed(),
                    slopes,
                    Output::over(out, n_classes).added(),
                    true,
                )
            };
        }
    }
    let scalar = |value: f64| tensor(vec![value as f32], Shape::from([1]));
    Some((
        scalar(loss),
        scalar(nll),
        want_hidden.then(|| tensor(grad_hidden, Shape::from([n, d_model]))),
        want_weight.then(|| tensor(grad_weight, Shape::from([d_model, n_classes]))),
    ))
}
