//! The operations as plain compositions of Burn tensors, with which the custom operations are
//! compared.

use burn::tensor::{Int, Tensor, TensorData, activation};

use crate::arch::{Activation, Scores};
use crate::nn::ops::{self, AttentionMask};

pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    let rms = (x.clone().square().mean_dim(D - 1) + eps).sqrt();
    (x / rms) * weight.unsqueeze()
}

pub fn gated<const D: usize>(gate: Tensor<D>, up: Tensor<D>, function: Activation) -> Tensor<D> {
    match function {
        Activation::Silu => activation::silu(gate) * up,
        Activation::GeluTanh => {
            let inner = (gate.clone() + gate.clone().powi_scalar(3) * 0.044715) * 0.797_884_6;
            gate * 0.5 * (inner.tanh() + 1.0) * up
        }
    }
}

pub fn softcapped<const D: usize>(x: Tensor<D>, softcap: Option<f64>) -> Tensor<D> {
    match softcap {
        Some(cap) => (x / cap).tanh() * cap,
        None => x,
    }
}

pub fn rotary(x: Tensor<3>, n_heads: usize, cos: Tensor<2>, sin: Tensor<2>) -> Tensor<4> {
    let x = ops::split_heads(x, n_heads);
    let ([_, _, seq, head_dim], [positions, half]) = (x.dims(), cos.dims());
    let table = |x: Tensor<2>| x.reshape([positions / seq, 1, seq, half]);
    let (cos, sin) = (table(cos), table(sin));
    let low = x.clone().narrow(3, 0, half);
    let high = x.clone().narrow(3, half, half);
    let rotated_low = low.clone() * cos.clone() - high.clone() * sin.clone();
    let rotated_high = high * cos + low * sin;
    let mut parts = vec![rotated_low, rotated_high];
    if 2 * half < head_dim {
        parts.push(x.narrow(3, 2 * half, head_dim - 2 * half));
    }
    Tensor::cat(parts, 3)
}

pub fn causal_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    scores: impl Into<Scores>,
    mask: &AttentionMask,
) -> Tensor<3> {
    let [batch, n_heads, seq_q, head_dim] = q.dims();
    let [_, n_kv_heads, seq_k, _] = k.dims();
    let group = n_heads / n_kv_heads;
    let Scores { scale, softcap } = scores.into();
    let q = (q * scale).reshape([batch, n_kv_heads, group * seq_q, head_dim]);
    let scores = softcapped(q.matmul(k.swap_dims(2, 3)), softcap);
    let window = mask.window.unwrap_or(usize::MAX);
    let mut hidden = Vec::with_capacity(batch * seq_q * seq_k);
    for row in 0..batch {
        let first = mask.left_pad.as_deref().map_or(0, |pads| pads[row]);
        for query in 0..seq_q {
            let position = seq_k - seq_q + query;
            hidden.extend(
                (0..seq_k).map(|key| key > position || position - key >= window || key < first),
            );
        }
    }
    let hidden = Tensor::<4, burn::tensor::Bool>::from_data(
        TensorData::new(hidden, [batch, 1, seq_q, seq_k]),
        &scores.device(),
    );
    let scores = scores.reshape([batch, n_heads, seq_q, seq_k]);
    let scores = scores.mask_fill(hidden.expand([batch, n_heads, seq_q, seq_k]), -1e30);
    let scores = scores.reshape([batch, n_kv_heads, group * seq_q, seq_k]);
    let context = activation::softmax(scores, 3).matmul(v);
    context
        .reshape([batch, n_heads, seq_q, head_dim])
        .swap_dims(1, 2)
        .reshape([batch, seq_q, n_heads * head_dim])
}

pub fn cross_entropy_sum(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    activation::log_softmax(logits, 1)
        .gather(1, targets.unsqueeze_dim(1))
        .sum()
        .neg()
}
