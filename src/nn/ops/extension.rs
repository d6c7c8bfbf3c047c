//! The operations as a backend has them: a portable definition, which a backend may replace by a
//! kernel of its own.

use burn::backend::tensor::{BoolTensor, FloatTensor, IntTensor};
use burn::backend::{Backend, backend_extension};

use super::portable;
use super::terms::{GridTerm, LoraTerm, Teacher, Weight};
use crate::nn::{AttentionMask, StoredWeight};

impl<B: DecoderOps> Weight<B> {
    /// The weight as a tensor. A stored one is unpacked, to where `beside` is.
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
/// A method `x_backward` takes what `x` took, what it saved, and the gradient of its result.
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

    /// Gradient of the weight, apart from that of `x` because a frozen weight needs none.
    fn rms_norm_backward_weight(
        x: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        eps: f64,
    ) -> FloatTensor<Self> {
        portable::rms_norm_backward_weight::<Self>(x, grad, eps)
    }

    /// `silu(gate) * up`.
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        portable::swiglu::<Self>(gate, up)
    }

    /// Gradients of `gate` and `up`.
    fn swiglu_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        portable::swiglu_backward::<Self>(gate, up, grad)
    }

    /// `x W`; a dense weight may be of another float format than `x`. Where a backend has no kernel
    /// for a stored one, it is unpacked for this product and forgotten.
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

    /// Gradient of the weight, apart from that of `x` because a frozen weight needs none. `rounded`
    /// as in [`Self::summed_linear_backward_factors`].
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

    /// `g = s grad B_r^T`, `[n, rank]`, from which the other gradients follow.
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

    /// Gradients of `A`, `dropout(x)^T g`, and `B`, `h^T grad`, with zeros outside the active rank.
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

    /// `W + (s A_r B_r) * M`, in bf16 where `W` is, else in the adapter's float format. `W` is a
    /// constant.
    fn summed_weight(
        weight: FloatTensor<Self>,
        mask: BoolTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        term: LoraTerm,
    ) -> FloatTensor<Self> {
        portable::summed_weight::<Self>(weight, mask, a, b, term)
    }

    /// Gradients of `A` and `B` from that of the summed weight, with zeros outside the active rank.
    fn summed_weight_backward(
        mask: BoolTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        term: LoraTerm,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        portable::summed_weight_backward::<Self>(mask, a, b, grad, term)
    }

    /// `scale * (Q - zero)` for `Q = clamp(round(V / scale) + zero, 0, 2^bits - 1)` and `V` the
    /// summed weight; scale and zero point by group of rows and column, `[groups, d_output]`. A
    /// scale of 0 gives 0. In bf16 where `W` is, rounded once more.
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

    /// Gradient of the scales, from the summed weight before it was rounded and the gradient of the
    /// result: `Q - zero - V / scale` by weight, or `Q - zero` where the clamp acts, times the
    /// gradient, summed by group.
    fn quantized_sum_backward_scales(
        sum: FloatTensor<Self>,
        scales: FloatTensor<Self>,
        zeros: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        term: GridTerm,
    ) -> FloatTensor<Self> {
        portable::quantized_sum_backward_scales::<Self>(sum, scales, zeros, grad, term)
    }

    /// `x V` for the summed weight `V`.
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

    /// `x V` for the quantized sum `V`.
    #[allow(clippy::too_many_arguments)] // the layer's
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

    /// Gradients of `A` and `B` from `x` and the gradient of `x V`: those of
    /// [`Self::summed_weight_backward`]. If `rounded`, their products may take bf16 numbers, with
    /// sums in `f32`, where that is faster.
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

    /// A stored weight as a dense one, `[d_input, d_output]`, in `f32`, where `beside` is.
    fn stored_dense(beside: FloatTensor<Self>, weight: StoredWeight) -> FloatTensor<Self> {
        portable::unpacked::<Self>(&weight, &beside)
    }

    /// The cross-entropy of `hidden W` against the target classes; with a teacher, `mix` times that
    /// against its predictions and `1 - mix` times that against the targets. Then that against the
    /// targets alone. Each is summed over rows, `[1]`. And, while logits are at hand, the gradients
    /// of `hidden` and of the weight by the former, where they are wanted.
    #[allow(clippy::type_complexity)] // the macro has to see the tensors
    fn head(
        hidden: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
        #[extension_type] teacher: Teacher<Self>,
        want: [bool; 2],
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        Option<FloatTensor<Self>>,
        Option<FloatTensor<Self>>,
    ) {
        portable::head::<Self>(hidden, weight, targets, teacher, want)
    }

    /// The context, `[batch, seq_q, n_heads * head_dim]`, and each query's `ln(sum(exp(scores)))`,
    /// `[batch, n_heads, seq_q]`.
    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        scale: f64,
        mask: AttentionMask,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        portable::causal_attention::<Self>(q, k, v, scale, mask)
    }

    /// Gradients of `q`, `k` and `v`.
    fn causal_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        log_sum_exp: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        scale: f64,
        mask: AttentionMask,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        portable::causal_attention_backward::<Self>(q, k, v, log_sum_exp, grad, scale, mask)
    }

    /// Splits heads and rotates them by position. The tables are constants: no gradient reaches
    /// them.
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
