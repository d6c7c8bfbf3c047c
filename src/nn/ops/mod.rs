//! The operations of a decoder, as functions of Burn tensors.
//!
//! Each is differentiable on an autodiff device and runs on every backend that the build enables; a
//! call on another backend panics. Tensors of the plain device and of its autodiff device may be
//! mixed in one call: the plain ones are constants.
//!
//! Burn would record every elementary step on the tape and run each as a pass over memory. Here an
//! operation is one node of the tape, saves only its inputs (and a number per row), and recomputes
//! the rest in its backward pass. `DecoderOps` has a portable definition in terms of a backend's
//! own operations, which every backend gets; Flex, Burn's CPU backend, has kernels for contiguous
//! and strided `f32`. Weights that stay as they are stored have kernels on the CPU and on GPUs.

// `NdArray` is deprecated upstream, and supported here for as long as it exists.
#![cfg_attr(feature = "ndarray", allow(deprecated))]
// Without a backend the generated dispatch has no arm that uses its arguments.
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
use extension::DecoderOps;
use terms::Teacher;
pub use terms::{GridTerm, LoraTerm, Weight};

/// Root-mean-square normalization (Zhang & Sennrich, arXiv 1910.07467):
/// `y = x / sqrt(mean(x^2) + eps) * weight` over the last dimension.
///
/// # Shapes
/// - `x`: `[.., d_model]`, `weight`: `[d_model]`; the result is `x`'s shape.
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::rms_norm(
        x.into_dispatch(),
        weight.into_dispatch(),
        eps,
    ))
}

/// The gated activation of a SwiGLU block (Shazeer, arXiv 2002.05202): `silu(gate) * up`, element
/// by element.
///
/// # Shapes
/// - `gate`, `up` and the result: the same shape.
pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::swiglu(gate.into_dispatch(), up.into_dispatch()))
}

/// Splits heads and rotates each by its position (rotary embedding, Su et al., arXiv 2104.09864),
/// in the half-split ("NEOX") pairing that Hugging Face checkpoints use. The tables are constants:
/// no gradient reaches them.
///
/// # Shapes
/// - `x`: `[batch, seq, n_heads * head_dim]`, `cos` and `sin`: `[seq, head_dim / 2]`
/// - result: `[batch, n_heads, seq, head_dim]`
pub fn rotary(x: Tensor<3>, n_heads: usize, cos: Tensor<2>, sin: Tensor<2>) -> Tensor<4> {
    let (cos, sin) = (cos.into_dispatch(), sin.into_dispatch());
    Tensor::from_dispatch(Dispatch::rotary(x.into_dispatch(), cos, sin, n_heads))
}

/// `[batch, seq, n_heads * head_dim]` to `[batch, n_heads, seq, head_dim]`.
pub fn split_heads(x: Tensor<3>, n_heads: usize) -> Tensor<4> {
    let [batch, seq, width] = x.dims();
    x.reshape([batch, seq, n_heads, width / n_heads])
        .swap_dims(1, 2)
}

/// Causal attention with grouped key/value heads: `softmax(q k^T * scale) v`.
///
/// The last query stands at the last key, so queries that follow cached keys need no offset. A
/// query whose every key is masked (padding) gives an unspecified, finite result.
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
    scale: f64,
    mask: &AttentionMask,
) -> Tensor<3> {
    let (q, k, v) = (q.into_dispatch(), k.into_dispatch(), v.into_dispatch());
    let (context, _) = Dispatch::causal_attention(q, k, v, scale, mask.clone());
    Tensor::from_dispatch(context)
}

/// A linear layer without a bias: `x W`.
///
/// The weight may be bf16 or f16 beside `f32` inputs, which gives `f32`. On a CPU it is widened
/// panel by panel and the product is one of `f32`; elsewhere bf16 is multiplied as bf16, inputs
/// rounded, and f16 is widened.
///
/// Or it stays as it is stored. A product of up to 8 rows reads it so, on a CPU in host memory, on
/// a GPU in the device's, where the first product puts a copy of it; for others, and in the
/// backward pass, it is unpacked, on a GPU by the device itself, and between the two the tape holds
/// the stored one.
///
/// # Shapes
/// - `x`: `[.., d_input]`, `weight`: `[d_input, d_output]`; result: `[.., d_output]`
pub fn linear<const D: usize>(x: Tensor<D>, weight: impl Into<Weight<Dispatch>>) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::mixed_linear(x.into_dispatch(), weight.into()))
}

/// A frozen linear layer with a low-rank adapter of which the first ranks are active:
/// `x W + s (dropout(x) A_r) B_r`.
///
/// One node of the tape. No gradient of the weight is formed, nothing outside the active rank is
/// computed, and the factors' gradients are zero there. The weight is as for [`linear`].
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

/// SparsePEFT's weight (arXiv 2410.03750): `W + (s A_r B_r) * M`, formed in one pass, and in bf16
/// where `W` is of bf16. The term's dropout is not used.
///
/// One node of the tape: from the gradient of the sum follow those of the factors, and of nothing
/// else.
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

/// A weight with its update on a grid (QA-SparsePEFT, arXiv 2410.03750): for `V` as
/// [`summed_weight`] gives it, `Q = clamp(round(V / scale) + zero, 0, 2^bits - 1)` and the result
/// `scale * (Q - zero)`, formed in one pass. Ties are rounded to even. A weight that is exactly 0
/// stays so, and so does all of a group whose scale is not over 0. In bf16 where `W` is of bf16:
/// rounded once more.
///
/// One node of the tape. The factors' gradients are straight through, as the authors have them:
/// those of [`summed_weight`], through the clamp too. Scales that are tracked get LSQ's gradient
/// (arXiv 1902.08153) without its factor: `Q - zero - V / scale` by weight, `Q - zero` where the
/// clamp acts. Weight and zero points are constants.
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

/// The product with [`summed_weight`], as one node of the tape: the factors' gradients follow from
/// `x` and the gradient of the result, and on a CPU with AVX-512 that of the sum lies in memory
/// only strip by strip.
///
/// If `rounded`, and where it is faster, the products that the factors' gradients are made of take
/// bf16 numbers, with sums in `f32`; the result and the gradient of `x` are the same either way.
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

/// The product with [`quantized_sum`], likewise. With a weight of bf16 the product takes the sum
/// rounded to bf16; the grid is the same.
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

/// A model's head with its loss: the cross-entropy of `hidden W` against the target classes, summed
/// over rows, in nats.
///
/// One node of the tape. Only some hundred rows of logits exist at a time, and gradients are formed
/// with them, so that there is no second product in the backward pass.
///
/// # Shapes
/// - `hidden`: `[n, d_model]`, `weight`: `[d_model, n_classes]`, `targets`: `[n]`, each below
///   `n_classes`; result: `[1]`
pub fn head_loss(hidden: Tensor<2>, weight: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let (hidden, weight) = (hidden.into_dispatch(), weight.into_dispatch());
    let targets = targets.into_dispatch();
    let (loss, ..) = Dispatch::head(hidden, weight, targets, Teacher::None, [false; 2]);
    Tensor::from_dispatch(loss)
}

/// The head's loss of a student: `mix` times the cross-entropy of `hidden W` against the
/// predictions of a teacher, `softmax(teacher W)`, and `1 - mix` times that against the target
/// classes. Beside it the latter alone, off the tape. Both are summed over rows, in nats.
///
/// One node of the tape, in chunks of rows as [`head_loss`]; the gradient of the logits,
/// `softmax(hidden W) - mix softmax(teacher W) - (1 - mix) onehot(targets)`, is formed with them.
/// The weight and the teacher are constants: no gradient reaches them.
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
) -> (Tensor<1>, Tensor<1>) {
    let (hidden, weight) = (hidden.into_dispatch(), weight.into_dispatch());
    let teacher = Teacher::States(teacher.into_dispatch(), mix);
    let targets = targets.into_dispatch();
    let (loss, nll, ..) = Dispatch::head(hidden, weight, targets, teacher, [false; 2]);
    (Tensor::from_dispatch(loss), Tensor::from_dispatch(nll))
}
