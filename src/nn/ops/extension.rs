//! The operations as methods of a backend: portable definitions, which a backend may replace by its
//! own kernels.

use burn::backend::tensor::{BoolTensor, FloatTensor, IntTensor};
use burn::backend::{Backend, backend_extension};

use super::portable;
use super::terms::{GridTerm, LoraTerm, Teacher, Weight};
use crate::arch::{Activation, Scores};
use crate::nn::{AttentionMask, StoredWeight};

impl<B: DecoderOps> Weight<B> {
    /// The weight as a tensor. A stored weight is unpacked on the device of `beside`.
    pub(super) fn dense(self, beside: &FloatTensor<B>) -> FloatTensor<B> {
        match self {
            Self::Dense(weight) => weight,
            Self::Stored(weight) => B::stored_dense(beside.clone(), weight),
        }
    }
}

/// The decoder's operations on a backend's own tensors. Shapes are those of the functions in
/// [`super`].
///
/// A method `x_backward` takes the arguments of `x`, the values that `x` saved, and the gradient of
/// the result.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal", feature = "cuda", feature = "rocm")),
    Autodiff
)]
pub(crate) trait DecoderOps: Backend {
    /// `x / sqrt(mean(x^2) + eps) * weight` over the last dimension.
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        portable::rms_norm::<Self>(x, weight, eps)
    }

    /// Gradient of `x`.
    fn rms_norm_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self> {
        portable::rms_norm_backward::<Self>(x, weight, grad, eps)
    }

    /// Gradient of the weight, separate from that of `x` because a frozen weight needs none.
    fn rms_norm_backward_weight(
        x: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self> {
        portable::rms_norm_backward_weight::<Self>(x, grad, eps)
    }

    /// `activation(gate) * up`.
    fn gated(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        activation: Activation,
    ) -> FloatTensor<Self> {
        portable::gated::<Self>(gate, up, activation)
    }

    /// Gradients of `gate` and `up`.
    fn gated_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        activation: Activation,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        portable::gated_backward::<Self>(gate, up, grad, activation)
    }

    /// `x W`, where a dense weight may have another float dtype than `x`. If a backend has no
    /// kernel for a stored weight, the weight is unpacked for this product only.
    fn mixed_linear(
        x: FloatTensor<Self>,
        #[extension_type] weight: Weight<Self>,
    ) -> FloatTensor<Self> {
        let weight = weight.dense(&x);
        portable::linear::<Self>(x, weight)
    }

    /// Gradient of `x`.
    fn mixed_linear_backward_input(
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        portable::linear_backward_input::<Self>(weight, grad)
    }

    /// Gradient of the weight, separate from that of `x` because a frozen weight needs none.
    /// `rounded` is as in [`Self::summed_linear_backward_factors`].
    fn mixed_linear_backward_weight(
        x: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        rounded: bool,
    ) -> FloatTensor<Self> {
        let _ = rounded;
        portable::linear_backward_weight::<Self>(x, grad)
    }

    /// `x W + h B_r`, and `h = s dropout(x) A_r`, `[n, rank]`, for `n` rows of `x`. `W` is a
    /// constant.
    fn lora_linear(
        x: FloatTensor<Self>,
        #[extension_type] weight: Weight<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        term: LoraTerm,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        portable::lora_linear::<Self>(x, weight, a, b, term)
    }

    /// `g = s grad B_r^T`, `[n, rank]`, from which the other gradients are computed.
    fn lora_backward_inner(
        b: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        term: LoraTerm,
    ) -> FloatTensor<Self> {
        portable::lora_backward_inner::<Self>(b, grad, term)
    }

    /// Gradient of `x`, `grad W^T + dropout(g A_r^T)`, and the `g` of
    /// [`Self::lora_backward_inner`].
    fn lora_backward_input(
        weight: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        term: LoraTerm,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        portable::lora_backward_input::<Self>(weight, a, b, grad, term)
    }

    /// Gradients of `A`, `dropout(x)^T g`, and of `B`, `h^T grad`, with zeros outside the active
    /// rank.
    fn lora_backward_factors(
        x: FloatTensor<Self>,
        h: FloatTensor<Self>,
        g: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        max_rank: usize,
        term: LoraTerm,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        portable::lora_backward_factors::<Self>(x, h, g, grad, max_rank, term)
    }

    /// `W + (s A_r B_r) * M`, in bf16 if `W` is in bf16, and otherwise in the adapter's dtype. `W`
    /// is a constant.
    fn summed_weight(
        weight: FloatTensor<Self>,
        mask: BoolTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        term: LoraTerm,
    ) -> FloatTensor<Self> {
        portable::summed_weight::<Self>(weight, mask, a, b, term)
    }

    /// Gradients of `A` and `B` from the gradient of the summed weight, with zeros outside the
    /// active rank.
    fn summed_weight_backward(
        mask: BoolTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        term: LoraTerm,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        portable::summed_weight_backward::<Self>(mask, a, b, grad, term)
    }

    /// `scale * (Q - zero)` with `Q = clamp(round(V / scale) + zero, 0, 2^bits - 1)`, where `V` is
    /// the summed weight. Scales and zero points are given by group of rows and by column,
    /// `[groups, d_output]`. A scale of 0 gives 0. The result is rounded once more to bf16 if `W`
    /// is in bf16.
    fn quantized_sum(
        weight: FloatTensor<Self>,
        mask: BoolTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scales: FloatTensor<Self>,
        zeros: FloatTensor<Self>,
        term: GridTerm,
    ) -> FloatTensor<Self> {
        portable::quantized_sum::<Self>(weight, mask, a, b, scales, zeros, term)
    }

    /// Gradient of the scales, from the unrounded summed weight and the gradient of the result. The
    /// derivative for each weight is `Q - zero - V / scale`, or `Q - zero` where the clamp acts; it
    /// is multiplied by the gradient and summed over each group.
    fn quantized_sum_backward_scales(
        sum: FloatTensor<Self>,
        scales: FloatTensor<Self>,
        zeros: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        term: GridTerm,
    ) -> FloatTensor<Self> {
        portable::quantized_sum_backward_scales::<Self>(sum, scales, zeros, grad, term)
    }

    /// `x V`, where `V` is the summed weight.
    fn summed_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        mask: BoolTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        term: LoraTerm,
        rounded: bool,
    ) -> FloatTensor<Self> {
        let _ = rounded;
        let sum = Self::summed_weight(weight, mask, a, b, term);
        Self::mixed_linear(x, Weight::Dense(sum))
    }

    /// `x V`, where `V` is the quantized sum.
    #[allow(clippy::too_many_arguments)] // the inputs of the layer
    fn quantized_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        mask: BoolTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scales: FloatTensor<Self>,
        zeros: FloatTensor<Self>,
        term: GridTerm,
        rounded: bool,
    ) -> FloatTensor<Self> {
        let _ = rounded;
        let sum = Self::quantized_sum(weight, mask, a, b, scales, zeros, term);
        Self::mixed_linear(x, Weight::Dense(sum))
    }

    /// Gradients of `A` and `B`, the same as those of [`Self::summed_weight_backward`], from `x`
    /// and the gradient of `x V`. If `rounded`, the products may use bf16 operands with sums in
    /// `f32` where that is faster.
    fn summed_linear_backward_factors(
        x: FloatTensor<Self>,
        mask: BoolTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        term: LoraTerm,
        rounded: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let slope = Self::mixed_linear_backward_weight(x, grad, rounded);
        Self::summed_weight_backward(mask, a, b, slope, term)
    }

    /// A stored weight as a dense `f32` tensor, `[d_input, d_output]`, on the device of `beside`.
    fn stored_dense(beside: FloatTensor<Self>, weight: StoredWeight) -> FloatTensor<Self> {
        portable::unpacked::<Self>(&weight, &beside)
    }

    /// Returns the loss, the cross-entropy against the targets alone, and the needed gradients of
    /// the loss for `hidden` and the weight, which are computed while the logits are in memory. The
    /// loss is the cross-entropy of `hidden W` against the target classes; with a teacher, it is
    /// `mix` times the cross-entropy against the teacher's predictions plus `1 - mix` times that
    /// against the targets. `softcap` limits both models' logits. Losses are summed over rows, `[1]`.
    #[allow(clippy::type_complexity)] // the macro must see the tensor types
    fn head(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        #[extension_type] teacher: Teacher<Self>,
        softcap: Option<f64>,
        want: [bool; 2],
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        Option<FloatTensor<Self>>,
        Option<FloatTensor<Self>>,
    ) {
        portable::head::<Self>(hidden, weight, targets, teacher, softcap, want)
    }

    /// Returns the context, `[batch, seq_q, n_heads * head_dim]`, and `ln(sum(exp(scores)))` for
    /// each query, `[batch, n_heads, seq_q]`.
    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        scores: Scores,
        mask: AttentionMask,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        portable::causal_attention::<Self>(q, k, v, scores, mask)
    }

    /// Gradients of `q`, `k` and `v`.
    fn causal_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        log_sum_exp: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        scores: Scores,
        mask: AttentionMask,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        portable::causal_attention_backward::<Self>(q, k, v, log_sum_exp, grad, scores, mask)
    }

    /// Splits heads and rotates the first features of each by position. The tables are constants: they receive no
    /// gradient.
    fn rotary(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        n_heads: usize,
    ) -> FloatTensor<Self> {
        portable::rotary::<Self>(x, cos, sin, n_heads)
    }

    /// Gradient of `x`: rotates back and merges heads.
    fn rotary_backward(
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        portable::rotary_backward::<Self>(cos, sin, grad)
    }
}
