//! The operations of a decoder, as functions of Burn tensors.
//!
//! Each operation is differentiable on an autodiff device and runs on every enabled backend;
//! calling it on another backend panics. One call may mix tensors of the plain device and of its
//! autodiff device; the plain ones are constants.
//!
//! Burn would record every elementary step for autodiff and run each as a separate pass over
//! memory. Here an operation is a single autodiff node. It saves only its inputs (and one number
//! per row) and recomputes the rest in its backward pass. Every backend gets the portable
//! definitions of `DecoderOps`, which use the backend's own operations. Flex, Burn's CPU backend,
//! has kernels for contiguous and strided `f32`. Weights in a stored format have kernels on the CPU
//! and on GPUs.

// `NdArray` is deprecated upstream; it is supported here while it exists.
#![cfg_attr(feature = "ndarray", allow(deprecated))]
// Without any backend, no arm of the generated dispatch uses its arguments.
#![cfg_attr(
    not(any(
        feature = "flex",
        feature = "ndarray",
        feature = "wgpu",
        feature = "vulkan",
        feature = "metal",
        feature = "cuda",
        feature = "rocm"
    )),
    allow(unused_variables)
)]

mod autodiff;
#[cfg(any(
    feature = "wgpu",
    feature = "vulkan",
    feature = "metal",
    feature = "cuda",
    feature = "rocm"
))]
mod cube;
mod extension;
#[cfg(feature = "flex")]
mod flex;
#[cfg(any(feature = "flex", feature = "ndarray"))]
mod host;
mod portable;
mod terms;
#[cfg(all(test, feature = "flex"))]
mod tests;

use burn::backend::Dispatch;
use burn::tensor::{Bool, Int, Tensor};

pub use super::dropout::Dropout;
pub use super::mask::AttentionMask;
use crate::arch::{Activation, Scores};
use extension::DecoderOps;
use terms::Teacher;
pub use terms::{GridTerm, LoraTerm, Weight};

/// Root-mean-square normalization (Zhang & Sennrich, arXiv 1910.07467):
/// `y = x / sqrt(mean(x^2) + eps) * weight` over the last dimension.
///
/// # Shapes
/// - `x`: `[.., d_model]`, `weight`: `[d_model]`; result: the shape of `x`
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::rms_norm(
        x.into_dispatch(),
        weight.into_dispatch(),
        eps,
    ))
}

/// The gated activation of an MLP (Shazeer, arXiv 2002.05202): `activation(gate) * up`, element by
/// element.
///
/// # Shapes
/// - `gate`, `up` and the result: the same shape
pub fn gated<const D: usize>(gate: Tensor<D>, up: Tensor<D>, activation: Activation) -> Tensor<D> {
    let (gate, up) = (gate.into_dispatch(), up.into_dispatch());
    Tensor::from_dispatch(Dispatch::gated(gate, up, activation))
}

/// Splits heads and rotates each by its position (rotary embedding, Su et al., arXiv 2104.09864),
/// in the half-split ("NEOX") pairing of Hugging Face checkpoints. The tables are constants: they
/// receive no gradient.
///
/// # Shapes
/// - `x`: `[batch, seq, n_heads * head_dim]`, `cos` and `sin`: `[seq, pairs]`, or
///   `[batch * seq, pairs]` if rows have positions of their own; `pairs` at most `head_dim / 2`:
///   only the first `2 * pairs` features are rotated
/// - result: `[batch, n_heads, seq, head_dim]`
pub fn rotary(x: Tensor<3>, n_heads: usize, cos: Tensor<2>, sin: Tensor<2>) -> Tensor<4> {
    let (cos, sin) = (cos.into_dispatch(), sin.into_dispatch());
    Tensor::from_dispatch(Dispatch::rotary(x.into_dispatch(), cos, sin, n_heads))
}

/// Splits `[batch, seq, n_heads * head_dim]` into `[batch, n_heads, seq, head_dim]`.
pub fn split_heads(x: Tensor<3>, n_heads: usize) -> Tensor<4> {
    let [batch, seq, width] = x.dims();
    x.reshape([batch, seq, n_heads, width / n_heads])
        .swap_dims(1, 2)
}

/// Causal attention with grouped key/value heads: `softmax(scores(q k^T)) v`.
///
/// The last query is at the position of the last key, so queries that follow cached keys need no
/// offset. A query whose keys are all masked (padding) gives an unspecified, finite result.
///
/// # Shapes
/// - `q`: `[batch, n_heads, seq_q, head_dim]`
/// - `k`, `v`: `[batch, n_kv_heads, seq_k, head_dim]`, `n_heads` a multiple of `n_kv_heads`,
///   `seq_k >= seq_q`
/// - result: `[batch, seq_q, n_heads * head_dim]`
pub fn causal_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    scores: impl Into<Scores>,
    mask: &AttentionMask,
) -> Tensor<3> {
    let (q, k, v) = (q.into_dispatch(), k.into_dispatch(), v.into_dispatch());
    let (context, _) = Dispatch::causal_attention(q, k, v, scores.into(), mask.clone());
    Tensor::from_dispatch(context)
}

/// A linear layer without a bias: `x W`.
///
/// A dense weight may be bf16 or f16 with `f32` inputs; the result is `f32`. On a CPU, such a
/// weight is widened panel by panel, and the product is computed in `f32`. Elsewhere, bf16 weights
/// are multiplied with inputs rounded to bf16, and f16 weights are widened.
///
/// A stored weight keeps its format. A product with up to 8 rows reads it directly: on a CPU from
/// host memory, on a GPU from a copy in device memory, which the first product creates. For more
/// rows, and in the backward pass, the weight is unpacked, on a GPU by the device itself. Between
/// forward and backward pass, only the stored format is kept.
///
/// # Shapes
/// - `x`: `[.., d_input]`, `weight`: `[d_input, d_output]`; result: `[.., d_output]`
pub fn linear<const D: usize>(x: Tensor<D>, weight: impl Into<Weight<Dispatch>>) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::mixed_linear(x.into_dispatch(), weight.into()))
}

/// A frozen linear layer with a low-rank adapter whose first ranks are active:
/// `x W + s (dropout(x) A_r) B_r`.
///
/// A single autodiff node. The weight receives no gradient. Nothing outside the active rank is
/// computed, and the factors' gradients are zero there. The weight may be in any format that
/// [`linear`] accepts.
///
/// # Shapes
/// - `x`: `[.., d_input]`, `weight`: `[d_input, d_output]`, `a`: `[d_input, r_max]`, `b`:
///   `[r_max, d_output]`
/// - result: `[.., d_output]`
pub fn lora_linear<const D: usize>(
    x: Tensor<D>,
    weight: impl Into<Weight<Dispatch>>,
    a: Tensor<2>,
    b: Tensor<2>,
    term: LoraTerm,
) -> Tensor<D> {
    let (a, b) = (a.into_dispatch(), b.into_dispatch());
    let (y, _) = Dispatch::lora_linear(x.into_dispatch(), weight.into(), a, b, term);
    Tensor::from_dispatch(y)
}

/// SparsePEFT's weight (arXiv 2410.03750): `W + (s A_r B_r) * M`, computed in one pass, and in bf16
/// if `W` is in bf16. The dropout of `term` is ignored.
///
/// A single autodiff node. Only the factors receive gradients.
///
/// # Shapes
/// - `weight`, `mask` and the result: `[d_input, d_output]`; `a`: `[d_input, r_max]`, `b`:
///   `[r_max, d_output]`
pub fn summed_weight(
    weight: Tensor<2>,
    mask: Tensor<2, Bool>,
    a: Tensor<2>,
    b: Tensor<2>,
    term: LoraTerm,
) -> Tensor<2> {
    let (weight, mask) = (weight.into_dispatch(), mask.into_dispatch());
    Tensor::from_dispatch(Dispatch::summed_weight(
        weight,
        mask,
        a.into_dispatch(),
        b.into_dispatch(),
        term,
    ))
}

/// A weight with its update, rounded to a grid (QA-SparsePEFT, arXiv 2410.03750). With `V` from
/// [`summed_weight`] and `Q = clamp(round(V / scale) + zero, 0, 2^bits - 1)`, the result is
/// `scale * (Q - zero)`, computed in one pass. Ties are rounded to even. A weight that is exactly 0
/// stays 0, and all weights of a group are 0 if its scale is not positive. The result is rounded
/// once more to bf16 if `W` is in bf16.
///
/// A single autodiff node. The factors receive straight-through gradients as in the authors' code:
/// those of [`summed_weight`], even where the clamp acts. Tracked scales receive LSQ's gradient
/// (arXiv 1902.08153) without its scaling factor: for each weight `Q - zero - V / scale`, or
/// `Q - zero` where the clamp acts. The weight and the zero points are constants.
///
/// # Shapes
/// - `weight`, `mask` and the result: `[d_input, d_output]`; `a`: `[d_input, r_max]`, `b`:
///   `[r_max, d_output]`
/// - `scales` and `zeros`: `[groups, d_output]`
pub fn quantized_sum(
    weight: Tensor<2>,
    mask: Tensor<2, Bool>,
    a: Tensor<2>,
    b: Tensor<2>,
    scales: Tensor<2>,
    zeros: Tensor<2>,
    term: GridTerm,
) -> Tensor<2> {
    let (weight, mask) = (weight.into_dispatch(), mask.into_dispatch());
    let (a, b, scales, zeros) = (
        a.into_dispatch(),
        b.into_dispatch(),
        scales.into_dispatch(),
        zeros.into_dispatch(),
    );
    Tensor::from_dispatch(Dispatch::quantized_sum(
        weight, mask, a, b, scales, zeros, term,
    ))
}

/// The product of `x` with [`summed_weight`], as a single autodiff node. The factors' gradients are
/// computed from `x` and the gradient of the result. On a CPU with AVX-512, only strips of the
/// sum's gradient are in memory at a time.
///
/// If `rounded`, the products for the factors' gradients use bf16 operands with sums in `f32` where
/// that is faster. The result and the gradient of `x` do not depend on `rounded`.
///
/// # Shapes
/// - `x`: `[.., d_input]`, the others as for [`summed_weight`]; result: `[.., d_output]`
pub fn summed_linear<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    mask: Tensor<2, Bool>,
    [a, b]: [Tensor<2>; 2],
    term: LoraTerm,
    rounded: bool,
) -> Tensor<D> {
    let (x, weight, mask) = (
        x.into_dispatch(),
        weight.into_dispatch(),
        mask.into_dispatch(),
    );
    let (a, b) = (a.into_dispatch(), b.into_dispatch());
    Tensor::from_dispatch(Dispatch::summed_linear(
        x, weight, mask, a, b, term, rounded,
    ))
}

/// The product of `x` with [`quantized_sum`], as a single autodiff node. With a bf16 weight, the
/// product uses the sum rounded to bf16; the grid is the same.
///
/// # Shapes
/// - `x`: `[.., d_input]`, the others as for [`quantized_sum`]; result: `[.., d_output]`
pub fn quantized_linear<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    mask: Tensor<2, Bool>,
    [a, b]: [Tensor<2>; 2],
    [scales, zeros]: [Tensor<2>; 2],
    term: GridTerm,
    rounded: bool,
) -> Tensor<D> {
    let (x, weight, mask) = (
        x.into_dispatch(),
        weight.into_dispatch(),
        mask.into_dispatch(),
    );
    let (a, b, scales, zeros) = (
        a.into_dispatch(),
        b.into_dispatch(),
        scales.into_dispatch(),
        zeros.into_dispatch(),
    );
    Tensor::from_dispatch(Dispatch::quantized_linear(
        x, weight, mask, a, b, scales, zeros, term, rounded,
    ))
}

/// The head of a model with its loss: the cross-entropy of `hidden W` against the target classes,
/// summed over rows, in nats. With `softcap`, the logits are limited to `c * tanh(logit / c)`.
///
/// A single autodiff node. Only the logits of several hundred rows exist at a time, and the
/// gradients are computed along with them, so the backward pass needs no second product.
///
/// # Shapes
/// - `hidden`: `[n, d_model]`, `weight`: `[d_model, n_classes]`, `targets`: `[n]`, each below
///   `n_classes`; result: `[1]`
pub fn head_loss(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    targets: Tensor<1, Int>,
    softcap: Option<f64>,
) -> Tensor<1> {
    let (hidden, weight) = (hidden.into_dispatch(), weight.into_dispatch());
    let targets = targets.into_dispatch();
    let (loss, ..) = Dispatch::head(hidden, weight, targets, Teacher::None, softcap, [false; 2]);
    Tensor::from_dispatch(loss)
}

/// The head of a student model with its distillation loss: `mix` times the cross-entropy of
/// `hidden W` against the predictions of a teacher, `softmax(teacher W)`, plus `1 - mix` times the
/// cross-entropy against the target classes. Also returns the latter alone, without gradients. Both
/// are summed over rows, in nats.
///
/// A single autodiff node, computed in chunks of rows like [`head_loss`]. The gradient of the
/// logits, `softmax(hidden W) - mix softmax(teacher W) - (1 - mix) onehot(targets)`, is computed
/// along with them. The weight and the teacher are constants: they receive no gradient.
///
/// # Shapes
/// - `hidden` and `teacher`: `[n, d_model]`, `weight`: `[d_model, n_classes]`, `targets`: `[n]`,
///   each below `n_classes`; `mix` in 0..=1; results: `[1]`
pub fn distilled_loss(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    teacher: Tensor<2>,
    targets: Tensor<1, Int>,
    mix: f64,
    softcap: Option<f64>,
) -> (Tensor<1>, Tensor<1>) {
    let (hidden, weight) = (hidden.into_dispatch(), weight.into_dispatch());
    let teacher = Teacher::States(teacher.into_dispatch(), mix);
    let targets = targets.into_dispatch();
    let (loss, nll, ..) = Dispatch::head(hidden, weight, targets, teacher, softcap, [false; 2]);
    (Tensor::from_dispatch(loss), Tensor::from_dispatch(nll))
}
