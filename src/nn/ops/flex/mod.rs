//! Flex kernels: `f32` on the CPU, parallel over rows. Unsupported cases fall back to the portable
//! definition.

mod attention;
mod head;
mod linear;
mod quantized;
mod summed;
mod util;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Shape;
use rayon::prelude::*;

use self::util::{
    TASK, build, contiguous, dims, floats, for_chunks, is_f32, part, task_rows, tensor, whole,
};
use super::extension::DecoderOps;
use super::terms::{GridTerm, Head, LoraTerm, Teacher, Weight};
use super::{host, portable};
use crate::arch::{Activation, Scores};
use crate::kernels::Level;
use crate::kernels::rows;
use crate::nn::AttentionMask;

/// Whether `x` consists of `f32` rows as wide as the weight.
fn norm_fits(x: &FlexTensor, weight: &FlexTensor) -> bool {
    is_f32(&[x, weight])
        && dims(weight).len() == 1
        && dims(x).last() == dims(weight).last()
        && !dims(x).contains(&0)
}

/// Whether a rotary table has the positions of one row, or of every row of the batch.
fn is_table(table: &[usize], batch: usize, seq: usize) -> bool {
    matches!(table, [positions, _] if *positions == seq || *positions == batch * seq)
}

impl DecoderOps for Flex {
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
        // Chunks are summed in a fixed order, so that the result does not depend on the number of
        // threads.
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

    fn gated(gate: FlexTensor, up: FlexTensor, activation: Activation) -> FlexTensor {
        if !is_f32(&[&gate, &up]) || dims(&gate) != dims(&up) {
            return portable::gated::<Self>(gate, up, activation);
        }
        let (gate, up) = (contiguous(gate), contiguous(up));
        let (gate_values, up, level) = (floats(&gate), floats(&up), Level::detect());
        build(gate.layout().shape().clone(), TASK, |index, out| {
            rows::gated(
                level,
                activation,
                part(gate_values, index, TASK),
                part(up, index, TASK),
                out,
            );
        })
    }

    fn gated_backward(
        gate: FlexTensor,
        up: FlexTensor,
        grad: FlexTensor,
        activation: Activation,
    ) -> (FlexTensor, FlexTensor) {
        if !is_f32(&[&gate, &up, &grad]) || dims(&gate) != dims(&up) || dims(&gate) != dims(&grad) {
            return portable::gated_backward::<Self>(gate, up, grad, activation);
        }
        // The autodiff graph usually held the last handles to the inputs, so the gradients can
        // overwrite them.
        let (mut gate, mut up, grad) = (whole(gate), whole(up), contiguous(grad));
        let (grad, level) = (floats(&grad), Level::detect());
        let (gates, ups): (&mut [f32], &mut [f32]) = (gate.storage_mut(), up.storage_mut());
        if gates.len() <= TASK {
            rows::gated_backward(level, activation, gates, ups, grad);
        } else {
            let parts = gates
                .par_chunks_mut(TASK)
                .zip(ups.par_chunks_mut(TASK))
                .zip(grad.par_chunks(TASK));
            parts.for_each(|((gate, up), grad)| {
                rows::gated_backward(level, activation, gate, up, grad)
            });
        }
        (gate, up)
    }

    fn mixed_linear(x: FlexTensor, weight: Weight<Self>) -> FlexTensor {
        if let Some(y) = host::few::<Self>(&x, &weight) {
            return y;
        }
        let weight = weight.dense(&x);
        linear::linear(&x, &weight).unwrap_or_else(|| portable::linear::<Self>(x, weight))
    }

    fn mixed_linear_backward_input(weight: FlexTensor, grad: FlexTensor) -> FlexTensor {
        linear::linear_backward_input(&weight, &grad)
            .unwrap_or_else(|| portable::linear_backward_input::<Self>(weight, grad))
    }

    fn mixed_linear_backward_weight(x: FlexTensor, grad: FlexTensor, rounded: bool) -> FlexTensor {
        linear::linear_backward_weight(&x, &grad, rounded)
            .unwrap_or_else(|| portable::linear_backward_weight::<Self>(x, grad))
    }

    fn lora_linear(
        x: FlexTensor,
        weight: Weight<Self>,
        a: FlexTensor,
        b: FlexTensor,
        term: LoraTerm,
    ) -> (FlexTensor, FlexTensor) {
        if weight.is_read_as_stored(&x) {
            return portable::lora_linear::<Self>(x, weight, a, b, term);
        }
        let weight = weight.dense(&x);
        linear::lora_linear(&x, &weight, a.clone(), b.clone(), term)
            .unwrap_or_else(|| portable::lora_linear::<Self>(x, Weight::Dense(weight), a, b, term))
    }

    fn lora_backward_inner(b: FlexTensor, grad: FlexTensor, term: LoraTerm) -> FlexTensor {
        linear::lora_backward_inner(&b, &grad, term)
            .unwrap_or_else(|| portable::lora_backward_inner::<Self>(b, grad, term))
    }

    fn lora_backward_input(
        weight: FlexTensor,
        a: FlexTensor,
        b: FlexTensor,
        grad: FlexTensor,
        term: LoraTerm,
    ) -> (FlexTensor, FlexTensor) {
        linear::lora_backward_input(&weight, a.clone(), b.clone(), &grad, term)
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
        linear::lora_backward_factors(&x, &h, &g, &grad, max_rank, term).unwrap_or_else(|| {
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
        summed::summed_weight(&weight, &mask, a.clone(), b.clone(), term)
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
        summed::summed_weight_backward(&mask, a.clone(), b.clone(), grad.clone(), term)
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
        summed::backward_factors(&x, &mask, a.clone(), b.clone(), &grad, term, rounded)
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
        quantized::sum(&weight, &mask, [a.clone(), b.clone()], &grid, &term).unwrap_or_else(|| {
            let [scales, zeros] = grid;
            portable::quantized_sum::<Self>(weight, mask, a, b, scales, zeros, term)
        })
    }

    fn quantized_sum_backward_scales(
        sum: FlexTensor,
        scales: FlexTensor,
        zeros: FlexTensor,
        grad: FlexTensor,
        term: GridTerm,
    ) -> FlexTensor {
        let [sum, scales, zeros, grad] = [sum, scales, zeros, grad].map(contiguous);
        quantized::backward_scales(&sum, &scales, &zeros, &grad, &term).unwrap_or_else(|| {
            portable::quantized_sum_backward_scales::<Self>(sum, scales, zeros, grad, term)
        })
    }

    fn head(
        hidden: FlexTensor,
        weight: FlexTensor,
        targets: FlexTensor,
        teacher: Teacher<Self>,
        softcap: Option<f64>,
        want: [bool; 2],
    ) -> Head<FlexTensor> {
        head::head(&hidden, &weight, &targets, &teacher, softcap, want).unwrap_or_else(|| {
            portable::head::<Self>(hidden, weight, targets, teacher, softcap, want)
        })
    }

    fn causal_attention(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        scores: Scores,
        mask: AttentionMask,
    ) -> (FlexTensor, FlexTensor) {
        match attention::Sizes::of(&q, &k, &v) {
            Some(sizes) if is_f32(&[&q, &k, &v]) => {
                attention::forward(sizes, &q, &k, &v, scores, &mask)
            }
            _ => portable::causal_attention::<Self>(q, k, v, scores, mask),
        }
    }

    fn causal_attention_backward(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        log_sum_exp: FlexTensor,
        grad: FlexTensor,
        scores: Scores,
        mask: AttentionMask,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        match attention::Sizes::of(&q, &k, &v) {
            Some(sizes)
                if is_f32(&[&q, &k, &v, &log_sum_exp, &grad]) && sizes.fit(&log_sum_exp, &grad) =>
            {
                let (log_sum_exp, grad) = (contiguous(log_sum_exp), contiguous(grad));
                attention::backward(sizes, [&q, &k, &v], &log_sum_exp, &grad, scores, &mask)
            }
            _ => portable::causal_attention_backward::<Self>(
                q,
                k,
                v,
                log_sum_exp,
                grad,
                scores,
                mask,
            ),
        }
    }

    fn rotary(x: FlexTensor, cos: FlexTensor, sin: FlexTensor, n_heads: usize) -> FlexTensor {
        let &[batch, seq, width] = dims(&x) else {
            return portable::rotary::<Self>(x, cos, sin, n_heads);
        };
        let (head_dim, half) = (
            width / n_heads.max(1),
            dims(&cos).last().copied().unwrap_or(0),
        );
        let fits = half > 0 && seq > 0 && head_dim * n_heads == width && 2 * half <= head_dim;
        if !fits
            || !is_f32(&[&x, &cos, &sin])
            || !is_table(dims(&cos), batch, seq)
            || dims(&sin) != dims(&cos)
        {
            return portable::rotary::<Self>(x, cos, sin, n_heads);
        }
        let positions = dims(&cos)[0];
        let (x, cos, sin) = (contiguous(x), contiguous(cos), contiguous(sin));
        let (x, cos, sin, level) = (floats(&x), floats(&cos), floats(&sin), Level::detect());
        // Each chunk is one sequence of one head.
        build(
            Shape::from([batch, n_heads, seq, head_dim]),
            seq * head_dim,
            |index, out| {
                let (row, head) = (index / n_heads, index % n_heads);
                for (position, out) in out.chunks_exact_mut(head_dim).enumerate() {
                    let token = row * seq + position;
                    let from = token * width + head * head_dim;
                    let place = token % positions;
                    let (cos, sin) = (part(cos, place, half), part(sin, place, half));
                    rows::rotate(level, &x[from..from + head_dim], cos, sin, out);
                }
            },
        )
    }

    fn rotary_backward(cos: FlexTensor, sin: FlexTensor, grad: FlexTensor) -> FlexTensor {
        let &[batch, n_heads, seq, head_dim] = dims(&grad) else {
            return portable::rotary_backward::<Self>(cos, sin, grad);
        };
        let half = dims(&cos).last().copied().unwrap_or(0);
        let fits = half > 0 && n_heads > 0 && seq > 0 && 2 * half <= head_dim;
        if !fits
            || !is_f32(&[&grad, &cos, &sin])
            || !is_table(dims(&cos), batch, seq)
            || dims(&sin) != dims(&cos)
        {
            return portable::rotary_backward::<Self>(cos, sin, grad);
        }
        let positions = dims(&cos)[0];
        let (grad, cos, sin) = (contiguous(grad), contiguous(cos), contiguous(sin));
        let (grad, cos, sin, level) = (floats(&grad), floats(&cos), floats(&sin), Level::detect());
        // Each chunk is one token.
        build(
            Shape::from([batch, seq, n_heads * head_dim]),
            n_heads * head_dim,
            |index, out| {
                let (row, position) = (index / seq, index % seq);
                let place = index % positions;
                let (cos, sin) = (part(cos, place, half), part(sin, place, half));
                for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
                    let from = ((row * n_heads + head) * seq + position) * head_dim;
                    rows::rotate_back(level, &grad[from..from + head_dim], cos, sin, out);
                }
            },
        )
    }
}
