//! Flex kernels: `f32` on the CPU, in parallel over rows. What they do not cover falls back to the portable definition.

use std::mem::MaybeUninit;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Shape, TensorData};
use rayon::prelude::*;

use super::flex_linear::{self, Head, Teacher};
use super::{
    AttentionMask, DecoderOps, GridTerm, LoraTerm, StoredWeight, flex_attention, flex_quantized,
    flex_summed, host_stored, portable,
};
use crate::kernels::Level;
use crate::kernels::rows;

/// Elements that one task works on: enough to be worth handing to another thread, and to stay in its cache.
const TASK: usize = 16 * 1024;

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

/// A tensor that holds its elements and nothing else, so that its storage may be written in place. The storage is copied
/// on the first write if another tensor shares it.
pub(super) fn whole(tensor: FlexTensor) -> FlexTensor {
    let whole = tensor.to_contiguous();
    drop(tensor);
    whole
}

pub(super) fn tensor(values: Vec<f32>, shape: Shape) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape))
}

pub(super) fn is_f32(tensors: &[&FlexTensor]) -> bool {
    tensors.iter().all(|tensor| tensor.dtype() == DType::F32)
}

pub(super) fn dims(tensor: &FlexTensor) -> &[usize] {
    tensor.layout().shape().as_slice()
}

/// A new tensor that `fill` writes completely, in chunks of `chunk` elements given with their index.
fn build(
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

/// The part of `values` that belongs to the chunk `index` of `len` elements, of which the last may be short.
fn part(values: &[f32], index: usize, len: usize) -> &[f32] {
    let start = (index * len).min(values.len());
    &values[start..(start + len).min(values.len())]
}

/// Class numbers as Flex holds them.
pub(super) enum Targets<'a> {
    I64(&'a [i64]),
    I32(&'a [i32]),
}

impl<'a> Targets<'a> {
    pub(super) fn new(tensor: &'a FlexTensor) -> Option<Self> {
        tensor
            .as_slice()
            .map(Self::I64)
            .or_else(|| tensor.as_slice().map(Self::I32))
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::I64(values) => values.len(),
            Self::I32(values) => values.len(),
        }
    }

    /// Out of range for every row if negative.
    pub(super) fn get(&self, row: usize) -> usize {
        let class = match self {
            Self::I64(values) => values[row],
            Self::I32(values) => i64::from(values[row]),
        };
        usize::try_from(class).unwrap_or(usize::MAX)
    }
}

/// Whether `x` is rows of `[.., width]` and the weight one of them.
fn norm_fits(x: &FlexTensor, weight: &FlexTensor) -> bool {
    is_f32(&[x, weight])
        && dims(weight).len() == 1
        && dims(x).last() == dims(weight).last()
        && !dims(x).contains(&0)
}

impl DecoderOps for Flex {
    fn stored_linear(x: FlexTensor, weight: StoredWeight) -> FlexTensor {
        host_stored::linear::<Self>(x, &weight)
    }

    fn rms_norm(x: FlexTensor, weight: FlexTensor, eps: f64) -> FlexTensor {
        if !norm_fits(&x, &weight) {
            return portable::rms_norm::<Self>(x, weight, eps);
        }
        let (x, weight) = (contiguous(x), contiguous(weight));
        let (values, weight, level) = (floats(&x), floats(&weight), Level::detect());
        let chunk = task_rows(weight.len()) * weight.len();
        build(x.layout().shape().clone(), chunk, |index, out| {
            rows::rms_norm(level, part(values, index, chunk), weight, eps as f32, out);
        })
    }

    fn rms_norm_backward(
        x: FlexTensor,
        weight: FlexTensor,
        grad: FlexTensor,
        eps: f64,
    ) -> FlexTensor {
        if !norm_fits(&x, &weight) || !is_f32(&[&grad]) || dims(&x) != dims(&grad) {
            return portable::rms_norm_backward::<Self>(x, weight, grad, eps);
        }
        let (x, weight, mut grad) = (contiguous(x), contiguous(weight), whole(grad));
        let (x, weight, level) = (floats(&x), floats(&weight), Level::detect());
        let chunk = task_rows(weight.len()) * weight.len();
        for_chunks(grad.storage_mut(), chunk, |index, grad| {
            rows::rms_norm_backward(level, part(x, index, chunk), weight, eps as f32, grad);
        });
        grad
    }

    fn rms_norm_backward_weight(x: FlexTensor, grad: FlexTensor, eps: f64) -> FlexTensor {
        let width = dims(&x).last().copied().unwrap_or(0);
        if !is_f32(&[&x, &grad]) || dims(&x) != dims(&grad) || dims(&x).contains(&0) {
            return portable::rms_norm_backward_weight::<Self>(x, grad, eps);
        }
        let (x, grad) = (contiguous(x), contiguous(grad));
        let (x, grad, level) = (floats(&x), floats(&grad), Level::detect());
        let chunk = task_rows(width) * width;
        // Chunks are summed in their order, whatever the threads, so that a result can be reproduced.
        let parts: Vec<Vec<f32>> = (0..x.len().div_ceil(chunk))
            .into_par_iter()
            .map(|index| {
                let mut sum = vec![0.0; width];
                let (x, grad) = (part(x, index, chunk), part(grad, index, chunk));
                rows::rms_norm_backward_weight(level, x, grad, eps as f32, &mut sum);
                sum
            })
            .collect();
        let mut total = vec![0.0; width];
        for sum in &parts {
            total
                .iter_mut()
                .zip(sum)
                .for_each(|(total, sum)| *total += sum);
        }
        tensor(total, Shape::from([width]))
    }

    fn swiglu(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
        if !is_f32(&[&gate, &up]) || dims(&gate) != dims(&up) {
            return portable::swiglu::<Self>(gate, up);
        }
        let (gate, up) = (contiguous(gate), contiguous(up));
        let (gate_values, up, level) = (floats(&gate), floats(&up), Level::detect());
        build(gate.layout().shape().clone(), TASK, |index, out| {
            rows::swiglu(
                level,
                part(gate_values, index, TASK),
                part(up, index, TASK),
                out,
            );
        })
    }

    fn swiglu_backward(
        gate: FlexTensor,
        up: FlexTensor,
        grad: FlexTensor,
    ) -> (FlexTensor, FlexTensor) {
        if !is_f32(&[&gate, &up, &grad]) || dims(&gate) != dims(&up) || dims(&gate) != dims(&grad) {
            return portable::swiglu_backward::<Self>(gate, up, grad);
        }
        // The tape was the last to hold the inputs, as a rule, so the gradients take their place.
        let (mut gate, mut up, grad) = (whole(gate), whole(up), contiguous(grad));
        let (grad, level) = (floats(&grad), Level::detect());
        let (gates, ups): (&mut [f32], &mut [f32]) = (gate.storage_mut(), up.storage_mut());
        if gates.len() <= TASK {
            rows::swiglu_backward(level, gates, ups, grad);
        } else {
            let parts = gates
                .par_chunks_mut(TASK)
                .zip(ups.par_chunks_mut(TASK))
                .zip(grad.par_chunks(TASK));
            parts.for_each(|((gate, up), grad)| rows::swiglu_backward(level, gate, up, grad));
        }
        (gate, up)
    }

    fn mixed_linear(x: FlexTensor, weight: FlexTensor) -> FlexTensor {
        flex_linear::linear(&x, &weight).unwrap_or_else(|| portable::linear::<Self>(x, weight))
    }

    fn mixed_linear_backward_input(weight: FlexTensor, grad: FlexTensor) -> FlexTensor {
        flex_linear::linear_backward_input(&weight, &grad)
            .unwrap_or_else(|| portable::linear_backward_input::<Self>(weight, grad))
    }

    fn mixed_linear_backward_weight(x: FlexTensor, grad: FlexTensor, rounded: bool) -> FlexTensor {
        flex_linear::linear_backward_weight(&x, &grad, rounded)
            .unwrap_or_else(|| portable::linear_backward_weight::<Self>(x, grad))
    }

    fn lora_linear(
        x: FlexTensor,
        weight: FlexTensor,
        a: FlexTensor,
        b: FlexTensor,
        term: LoraTerm,
    ) -> (FlexTensor, FlexTensor) {
        flex_linear::lora_linear(&x, &weight, a.clone(), b.clone(), term)
            .unwrap_or_else(|| portable::lora_linear::<Self>(x, weight, a, b, term))
    }

    fn lora_backward_inner(b: FlexTensor, grad: FlexTensor, term: LoraTerm) -> FlexTensor {
        flex_linear::lora_backward_inner(&b, &grad, term)
            .unwrap_or_else(|| portable::lora_backward_inner::<Self>(b, grad, term))
    }

    fn lora_backward_input(
        weight: FlexTensor,
        a: FlexTensor,
        b: FlexTensor,
        grad: FlexTensor,
        term: LoraTerm,
    ) -> (FlexTensor, FlexTensor) {
        flex_linear::lora_backward_input(&weight, a.clone(), b.clone(), &grad, term)
            .unwrap_or_else(|| portable::lora_backward_input::<Self>(weight, a, b, grad, term))
    }

    fn lora_backward_factors(
        x: FlexTensor,
        h: FlexTensor,
        g: FlexTensor,
        grad: FlexTensor,
        max_rank: usize,
        term: LoraTerm,
    ) -> (FlexTensor, FlexTensor) {
        flex_linear::lora_backward_factors(&x, &h, &g, &grad, max_rank, term).unwrap_or_else(|| {
            portable::lora_backward_factors::<Self>(x, h, g, grad, max_rank, term)
        })
    }

    fn summed_weight(
        weight: FlexTensor,
        mask: FlexTensor,
        a: FlexTensor,
        b: FlexTensor,
        term: LoraTerm,
    ) -> FlexTensor {
        let mask = contiguous(mask);
        flex_summed::summed_weight(&weight, &mask, a.clone(), b.clone(), term)
            .unwrap_or_else(|| portable::summed_weight::<Self>(weight, mask, a, b, term))
    }

    fn summed_weight_backward(
        mask: FlexTensor,
        a: FlexTensor,
        b: FlexTensor,
        grad: FlexTensor,
        term: LoraTerm,
    ) -> (FlexTensor, FlexTensor) {
        let mask = contiguous(mask);
        if !is_f32(&[&a, &b, &grad]) {
            return portable::summed_weight_backward::<Self>(mask, a, b, grad, term);
        }
        flex_summed::summed_weight_backward(&mask, a.clone(), b.clone(), grad.clone(), term)
            .unwrap_or_else(|| portable::summed_weight_backward::<Self>(mask, a, b, grad, term))
    }

    fn summed_linear_backward_factors(
        x: FlexTensor,
        mask: FlexTensor,
        a: FlexTensor,
        b: FlexTensor,
        grad: FlexTensor,
        term: LoraTerm,
        rounded: bool,
    ) -> (FlexTensor, FlexTensor) {
        let mask = contiguous(mask);
        flex_summed::backward_factors(&x, &mask, a.clone(), b.clone(), &grad, term, rounded)
            .unwrap_or_else(|| {
                let slope = Self::mixed_linear_backward_weight(x, grad, rounded);
                Self::summed_weight_backward(mask, a, b, slope, term)
            })
    }

    fn quantized_sum(
        weight: FlexTensor,
        mask: FlexTensor,
        a: FlexTensor,
        b: FlexTensor,
        scales: FlexTensor,
        zeros: FlexTensor,
        term: GridTerm,
    ) -> FlexTensor {
        let (mask, grid) = (contiguous(mask), [contiguous(scales), contiguous(zeros)]);
        flex_quantized::sum(&weight, &mask, [a.clone(), b.clone()], &grid, &term).unwrap_or_else(
            || {
                let [scales, zeros] = grid;
                portable::quantized_sum::<Self>(weight, mask, a, b, scales, zeros, term)
            },
        )
    }

    fn quantized_sum_backward_scales(
        sum: FlexTensor,
        scales: FlexTensor,
        zeros: FlexTensor,
        grad: FlexTensor,
        term: GridTerm,
    ) -> FlexTensor {
        let [sum, scales, zeros, grad] = [sum, scales, zeros, grad].map(contiguous);
        flex_quantized::backward_scales(&sum, &scales, &zeros, &grad, &term).unwrap_or_else(|| {
            portable::quantized_sum_backward_scales::<Self>(sum, scales, zeros, grad, term)
        })
    }

    fn head_loss(hidden: FlexTensor, weight: FlexTensor, targets: FlexTensor) -> FlexTensor {
        match flex_linear::head(&hidden, &weight, &targets, None, false, false) {
            Some(head) => head.loss,
            None => portable::head_loss::<Self>(hidden, weight, targets),
        }
    }

    fn head_loss_and_gradient(
        hidden: FlexTensor,
        weight: FlexTensor,
        targets: FlexTensor,
    ) -> (FlexTensor, FlexTensor) {
        match flex_linear::head(&hidden, &weight, &targets, None, true, false) {
            Some(Head {
                loss,
                hidden: Some(hidden),
                ..
            }) => (loss, hidden),
            _ => portable::head_loss_and_gradient::<Self>(hidden, weight, targets),
        }
    }

    fn head_loss_and_gradients(
        hidden: FlexTensor,
        weight: FlexTensor,
        targets: FlexTensor,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        match flex_linear::head(&hidden, &weight, &targets, None, true, true) {
            Some(Head {
                loss,
                hidden: Some(hidden),
                weight: Some(weight),
                ..
            }) => (loss, hidden, weight),
            _ => portable::head_loss_and_gradients::<Self>(hidden, weight, targets),
        }
    }

    fn distilled_loss(
        hidden: FlexTensor,
        weight: FlexTensor,
        teacher: FlexTensor,
        targets: FlexTensor,
        mix: f64,
    ) -> (FlexTensor, FlexTensor) {
        let states = Teacher {
            hidden: teacher.clone(),
            mix,
        };
        match flex_linear::head(&hidden, &weight, &targets, Some(states), false, false) {
            Some(head) => (head.loss, head.nll),
            None => portable::distilled_loss::<Self>(hidden, weight, teacher, targets, mix),
        }
    }

    fn distilled_loss_and_gradient(
        hidden: FlexTensor,
        weight: FlexTensor,
        teacher: FlexTensor,
        targets: FlexTensor,
        mix: f64,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        let states = Teacher {
            hidden: teacher.clone(),
            mix,
        };
        match flex_linear::head(&hidden, &weight, &targets, Some(states), true, false) {
            Some(Head {
                loss,
                nll,
                hidden: Some(hidden),
                ..
            }) => (loss, nll, hidden),
            _ => {
                portable::distilled_loss_and_gradient::<Self>(hidden, weight, teacher, targets, mix)
            }
        }
    }

    fn causal_attention(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        scale: f64,
        mask: AttentionMask,
    ) -> (FlexTensor, FlexTensor) {
        match flex_attention::Sizes::of(&q, &k, &v) {
            Some(sizes) if is_f32(&[&q, &k, &v]) => {
                flex_attention::forward(sizes, &q, &k, &v, scale as f32, &mask)
            }
            _ => portable::causal_attention::<Self>(q, k, v, scale, mask),
        }
    }

    fn causal_attention_backward(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        log_sum_exp: FlexTensor,
        grad: FlexTensor,
        scale: f64,
        mask: AttentionMask,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        match flex_attention::Sizes::of(&q, &k, &v) {
            Some(sizes)
                if is_f32(&[&q, &k, &v, &log_sum_exp, &grad]) && sizes.fit(&log_sum_exp, &grad) =>
            {
                let (log_sum_exp, grad) = (contiguous(log_sum_exp), contiguous(grad));
                flex_attention::backward(
                    sizes,
                    [&q, &k, &v],
                    &log_sum_exp,
                    &grad,
                    scale as f32,
                    &mask,
                )
            }
            _ => {
                portable::causal_attention_backward::<Self>(q, k, v, log_sum_exp, grad, scale, mask)
            }
        }
    }

    fn rotary(x: FlexTensor, cos: FlexTensor, sin: FlexTensor, n_heads: usize) -> FlexTensor {
        let &[batch, seq, width] = dims(&x) else {
            return portable::rotary::<Self>(x, cos, sin, n_heads);
        };
        let half = width / n_heads.max(1) / 2;
        let fits = half > 0 && seq > 0 && 2 * half * n_heads == width;
        if !fits
            || !is_f32(&[&x, &cos, &sin])
            || dims(&cos) != [seq, half]
            || dims(&sin) != [seq, half]
        {
            return portable::rotary::<Self>(x, cos, sin, n_heads);
        }
        let (x, cos, sin) = (contiguous(x), contiguous(cos), contiguous(sin));
        let (x, cos, sin, level) = (floats(&x), floats(&cos), floats(&sin), Level::detect());
        // One chunk per sequence and head.
        build(
            Shape::from([batch, n_heads, seq, 2 * half]),
            seq * 2 * half,
            |index, out| {
                let (row, head) = (index / n_heads, index % n_heads);
                for (position, out) in out.chunks_exact_mut(2 * half).enumerate() {
                    let from = (row * seq + position) * width + head * 2 * half;
                    let (cos, sin) = (part(cos, position, half), part(sin, position, half));
                    rows::rotate(level, &x[from..from + 2 * half], cos, sin, out);
                }
            },
        )
    }

    fn rotary_backward(cos: FlexTensor, sin: FlexTensor, grad: FlexTensor) -> FlexTensor {
        let &[batch, n_heads, seq, head_dim] = dims(&grad) else {
            return portable::rotary_backward::<Self>(cos, sin, grad);
        };
        let half = head_dim / 2;
        let fits = half > 0 && n_heads > 0 && seq > 0 && 2 * half == head_dim;
        if !fits
            || !is_f32(&[&grad, &cos, &sin])
            || dims(&cos) != [seq, half]
            || dims(&sin) != [seq, half]
        {
            return portable::rotary_backward::<Self>(cos, sin, grad);
        }
        let (grad, cos, sin) = (contiguous(grad), contiguous(cos), contiguous(sin));
        let (grad, cos, sin, level) = (floats(&grad), floats(&cos), floats(&sin), Level::detect());
        // One chunk per token.
        build(
            Shape::from([batch, seq, n_heads * head_dim]),
            n_heads * head_dim,
            |index, out| {
                let (row, position) = (index / seq, index % seq);
                let (cos, sin) = (part(cos, position, half), part(sin, position, half));
                for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
                    let from = ((row * n_heads + head) * seq + position) * head_dim;
                    rows::rotate_back(level, &grad[from..from + head_dim], cos, sin, out);
                }
            },
        )
    }
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
