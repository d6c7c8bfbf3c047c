//! The operations under autodiff, each recorded as a single node.

use burn::backend::Autodiff;
use burn::backend::TensorMetadata;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{BoolTensor, FloatTensor, IntTensor};
use burn::tensor::{DType, FloatDType, Shape};

use super::extension::DecoderOps;
use super::terms::{GridTerm, Head, LoraTerm, Teacher, Weight};
use crate::arch::{Activation, Scores};
use crate::nn::{AttentionMask, StoredWeight};

type Float<B> = FloatTensor<B>;

/// Declares a backward step: its name, the number of its inputs, its state, and an expression that
/// turns the gradient of the result into gradients of the inputs. `$wanted` holds, for each input,
/// whether its gradient is needed.
macro_rules! backward {
    ($name:ident, $n:literal, $state:ty, |$saved:pat_param, $grad:ident, $wanted:pat_param| $body:expr) => {
        #[derive(Debug)]
        struct $name;

        impl<B: DecoderOps> Backward<B, $n> for $name {
            type State = $state;

            fn backward(
                self,
                ops: Ops<Self::State, $n>,
                grads: &mut Gradients,
                _: &mut Checkpointer,
            ) {
                let $grad = grads.consume::<B>(&ops.node);
                let $saved = ops.state;
                let $wanted = ops.parents.each_ref().map(Option::is_some);
                let parts: [Option<Float<B>>; $n] = $body;
                for (parent, part) in ops.parents.into_iter().zip(parts) {
                    if let (Some(parent), Some(part)) = (parent, part) {
                        grads.register::<B>(parent.id, part);
                    }
                }
            }
        }
    };
}

backward!(RmsNorm, 2, (Float<B>, Float<B>, f64), |(x, weight, eps),
                                                  grad,
                                                  [
    want_x,
    want_weight,
]| {
    let grad_weight =
        want_weight.then(|| B::rms_norm_backward_weight(x.clone(), grad.clone(), eps));
    [
        want_x.then(|| B::rms_norm_backward(x, weight, grad, eps)),
        grad_weight,
    ]
});

backward!(
    Gated,
    2,
    (Float<B>, Float<B>, Activation),
    |(gate, up, activation), grad, _| {
        let (gate, up) = B::gated_backward(gate, up, grad, activation);
        [Some(gate), Some(up)]
    }
);

backward!(
    Linear,
    2,
    (Option<Float<B>>, Option<Float<B>>),
    |(x, weight), grad, _| {
        let grad_weight = x.map(|x| B::mixed_linear_backward_weight(x, grad.clone(), false));
        [
            weight.map(|weight| B::mixed_linear_backward_input(weight, grad)),
            grad_weight,
        ]
    }
);

// The graph holds the weight in its stored format, and the backward pass unpacks it.
backward!(StoredLinear, 1, StoredWeight, |weight, grad, _| {
    let weight = B::stored_dense(grad.clone(), weight);
    [Some(B::mixed_linear_backward_input(weight, grad))]
});

type LoraState<B> = (Weight<B>, [Float<B>; 4], LoraTerm);

backward!(
    LoraLinear,
    3,
    LoraState<B>,
    |(weight, [x, a, b, h], term), grad, [want_x, want_a, want_b]| {
        let max_rank = a.shape()[1];
        let (grad_x, g) = if want_x {
            let (grad_x, g) = B::lora_backward_input(weight.dense(&grad), a, b, grad.clone(), term);
            (Some(grad_x), g)
        } else {
            (None, B::lora_backward_inner(b, grad.clone(), term))
        };
        let factors =
            (want_a || want_b).then(|| B::lora_backward_factors(x, h, g, grad, max_rank, term));
        let (grad_a, grad_b) = factors.unzip();
        [grad_x, grad_a, grad_b]
    }
);

backward!(
    SummedWeight,
    2,
    (BoolTensor<B>, [Float<B>; 2], LoraTerm),
    |(mask, [a, b], term), grad, _| {
        let (a, b) = B::summed_weight_backward(mask, a, b, grad, term);
        [Some(a), Some(b)]
    }
);

/// The mask; the layer's input, the sum and the factors; the term; and whether products may be
/// rounded.
type SummedState<B> = (BoolTensor<B>, [Float<B>; 4], LoraTerm, bool);

backward!(SummedLinear, 3, SummedState<B>, |(
    mask,
    [x, sum, a, b],
    term,
    rounded,
),
                                            grad,
                                            [
    want_x,
    want_a,
    want_b,
]| {
    let grad_x = want_x.then(|| B::mixed_linear_backward_input(sum, grad.clone()));
    let factors = (want_a || want_b)
        .then(|| B::summed_linear_backward_factors(x, mask, a, b, grad, term, rounded));
    let (grad_a, grad_b) = factors.unzip();
    [grad_x, grad_a, grad_b]
});

/// The mask, the factors, and the term. If the scales are trained, also the weight, the scales and
/// the zero points.
type GridState<B> = (
    BoolTensor<B>,
    [Float<B>; 2],
    Option<[Float<B>; 3]>,
    GridTerm,
);

/// Gradient of trained scales, computed from the gradient of the rounded sum.
fn of_scales<B: DecoderOps>(
    [weight, scales, zeros]: [Float<B>; 3],
    mask: BoolTensor<B>,
    [a, b]: [Float<B>; 2],
    grad: Float<B>,
    term: GridTerm,
) -> Float<B> {
    // The weight before the sum was rounded.
    let weight = if weight.dtype() == DType::BF16 {
        B::float_cast(weight, FloatDType::F32)
    } else {
        weight
    };
    let sum = B::summed_weight(weight, mask, a, b, term.lora);
    B::quantized_sum_backward_scales(sum, scales, zeros, grad, term)
}

// Straight-through gradient: the factors receive the gradient of the rounded sum unchanged, even
// where the sum was clamped.
backward!(
    QuantizedSum,
    3,
    GridState<B>,
    |(mask, [a, b], grid, term), grad, [want_a, want_b, _]| {
        let beside = [a.clone(), b.clone()];
        let grad_scales =
            grid.map(|grid| of_scales::<B>(grid, mask.clone(), beside, grad.clone(), term.clone()));
        let factors =
            (want_a || want_b).then(|| B::summed_weight_backward(mask, a, b, grad, term.lora));
        let (grad_a, grad_b) = factors.unzip();
        [grad_a, grad_b, grad_scales]
    }
);

/// The parts of [`SummedState`] and of [`GridState`].
type QuantizedState<B> = (
    BoolTensor<B>,
    [Float<B>; 4],
    Option<[Float<B>; 3]>,
    GridTerm,
    bool,
);

backward!(
    QuantizedLinear,
    4,
    QuantizedState<B>,
    |(mask, [x, sum, a, b], grid, term, rounded), grad, wanted| {
        let [want_x, want_a, want_b, _] = wanted;
        let grad_x = want_x.then(|| B::mixed_linear_backward_input(sum, grad.clone()));
        let (want_factors, lora) = (want_a || want_b, term.lora);
        let (factors, grad_scales) = match grid {
            None => {
                let of = || B::summed_linear_backward_factors(x, mask, a, b, grad, lora, rounded);
                (want_factors.then(of), None)
            }
            // The gradient of the scales needs the gradient of the whole sum, which that of the
            // factors alone does not.
            Some(grid) => {
                let slope = B::mixed_linear_backward_weight(x, grad, rounded);
                let beside = [a.clone(), b.clone()];
                let scales = of_scales::<B>(grid, mask.clone(), beside, slope.clone(), term);
                (
                    want_factors.then(|| B::summed_weight_backward(mask, a, b, slope, lora)),
                    Some(scales),
                )
            }
        };
        let (grad_a, grad_b) = factors.unzip();
        [grad_x, grad_a, grad_b, grad_scales]
    }
);

backward!(
    HeadLoss,
    2,
    (Option<Float<B>>, Option<Float<B>>),
    |(hidden, weight), grad, _| {
        let grad = B::float_reshape(grad, Shape::from([1, 1]));
        [hidden, weight].map(|slope| slope.map(|slope| B::float_mul(slope, grad.clone())))
    }
);

backward!(
    CausalAttention,
    3,
    ([Float<B>; 4], Scores, AttentionMask),
    |([q, k, v, log_sum_exp], scores, mask), grad, _| {
        let (q, k, v) = B::causal_attention_backward(q, k, v, log_sum_exp, grad, scores, mask);
        [Some(q), Some(k), Some(v)]
    }
);

backward!(Rotary, 1, (Float<B>, Float<B>), |(cos, sin), grad, _| [
    Some(B::rotary_backward(cos, sin, grad))
]);

impl<B: DecoderOps, C: CheckpointStrategy> DecoderOps for Autodiff<B, C> {
    fn rms_norm(x: Float<Self>, weight: Float<Self>, eps: f64) -> Float<Self> {
        let ((x, x_node), (weight, weight_node)) = (x.into_parts(), weight.into_parts());
        match RmsNorm
            .prepare::<C>([x_node, weight_node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let y = B::rms_norm(x.clone(), weight.clone(), eps);
                prep.finish((x, weight, eps), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::rms_norm(x, weight, eps)),
        }
    }

    fn gated(gate: Float<Self>, up: Float<Self>, activation: Activation) -> Float<Self> {
        let ((gate, gate_node), (up, up_node)) = (gate.into_parts(), up.into_parts());
        match Gated
            .prepare::<C>([gate_node, up_node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let y = B::gated(gate.clone(), up.clone(), activation);
                prep.finish((gate, up, activation), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::gated(gate, up, activation)),
        }
    }

    fn mixed_linear(x: Float<Self>, weight: Weight<Self>) -> Float<Self> {
        let want_x = x.is_tracked();
        let (x, x_node) = x.into_parts();
        let weight = match weight {
            Weight::Dense(weight) => weight,
            Weight::Stored(weight) => {
                let y = B::mixed_linear(x, Weight::Stored(weight.clone()));
                return match StoredLinear
                    .prepare::<C>([x_node])
                    .compute_bound()
                    .stateful()
                {
                    OpsKind::Tracked(prep) => prep.finish(weight, y),
                    OpsKind::UnTracked(prep) => prep.finish(y),
                };
            }
        };
        // Each gradient needs the other operand. An operand whose counterpart needs no gradient is
        // not kept.
        let want_weight = weight.is_tracked();
        let (weight, weight_node) = weight.into_parts();
        let y = B::mixed_linear(x.clone(), Weight::Dense(weight.clone()));
        match Linear
            .prepare::<C>([x_node, weight_node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                prep.finish((want_weight.then_some(x), want_x.then_some(weight)), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn lora_linear(
        x: Float<Self>,
        weight: Weight<Self>,
        a: Float<Self>,
        b: Float<Self>,
        term: LoraTerm,
    ) -> (Float<Self>, Float<Self>) {
        let ((x, x_node), (a, a_node), (b, b_node)) =
            (x.into_parts(), a.into_parts(), b.into_parts());
        let weight = match weight {
            Weight::Dense(weight) => Weight::Dense(weight.into_primitive()),
            Weight::Stored(weight) => Weight::Stored(weight),
        };
        let (y, h) = B::lora_linear(x.clone(), weight.clone(), a.clone(), b.clone(), term);
        let y = match LoraLinear
            .prepare::<C>([x_node, a_node, b_node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => prep.finish((weight, [x, a, b, h.clone()], term), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        };
        (y, constant::<B, C>(h))
    }

    fn stored_dense(beside: Float<Self>, weight: StoredWeight) -> Float<Self> {
        constant::<B, C>(B::stored_dense(beside.into_primitive(), weight))
    }

    fn quantized_sum(
        weight: Float<Self>,
        mask: BoolTensor<Self>,
        a: Float<Self>,
        b: Float<Self>,
        scales: Float<Self>,
        zeros: Float<Self>,
        term: GridTerm,
    ) -> Float<Self> {
        let want_scales = scales.is_tracked();
        let ((a, a_node), (b, b_node), (scales, node)) =
            (a.into_parts(), b.into_parts(), scales.into_parts());
        let (weight, zeros) = (weight.into_primitive(), zeros.into_primitive());
        let grid = want_scales.then(|| [weight.clone(), scales.clone(), zeros.clone()]);
        let sum = B::quantized_sum(
            weight,
            mask.clone(),
            a.clone(),
            b.clone(),
            scales,
            zeros,
            term.clone(),
        );
        match QuantizedSum
            .prepare::<C>([a_node, b_node, node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => prep.finish((mask, [a, b], grid, term), sum),
            OpsKind::UnTracked(prep) => prep.finish(sum),
        }
    }

    fn summed_weight(
        weight: Float<Self>,
        mask: BoolTensor<Self>,
        a: Float<Self>,
        b: Float<Self>,
        term: LoraTerm,
    ) -> Float<Self> {
        let ((a, a_node), (b, b_node)) = (a.into_parts(), b.into_parts());
        let sum = B::summed_weight(
            weight.into_primitive(),
            mask.clone(),
            a.clone(),
            b.clone(),
            term,
        );
        match SummedWeight
            .prepare::<C>([a_node, b_node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => prep.finish((mask, [a, b], term), sum),
            OpsKind::UnTracked(prep) => prep.finish(sum),
        }
    }

    fn summed_linear(
        x: Float<Self>,
        weight: Float<Self>,
        mask: BoolTensor<Self>,
        a: Float<Self>,
        b: Float<Self>,
        term: LoraTerm,
        rounded: bool,
    ) -> Float<Self> {
        let ((x, x_node), (a, a_node), (b, b_node)) =
            (x.into_parts(), a.into_parts(), b.into_parts());
        let sum = B::summed_weight(
            weight.into_primitive(),
            mask.clone(),
            a.clone(),
            b.clone(),
            term,
        );
        let y = B::mixed_linear(x.clone(), Weight::Dense(sum.clone()));
        match SummedLinear
            .prepare::<C>([x_node, a_node, b_node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => prep.finish((mask, [x, sum, a, b], term, rounded), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn quantized_linear(
        x: Float<Self>,
        weight: Float<Self>,
        mask: BoolTensor<Self>,
        a: Float<Self>,
        b: Float<Self>,
        scales: Float<Self>,
        zeros: Float<Self>,
        term: GridTerm,
        rounded: bool,
    ) -> Float<Self> {
        let want_scales = scales.is_tracked();
        let ((x, x_node), (a, a_node), (b, b_node)) =
            (x.into_parts(), a.into_parts(), b.into_parts());
        let (scales, scales_node) = scales.into_parts();
        let (weight, zeros) = (weight.into_primitive(), zeros.into_primitive());
        let grid = want_scales.then(|| [weight.clone(), scales.clone(), zeros.clone()]);
        let sum = B::quantized_sum(
            weight,
            mask.clone(),
            a.clone(),
            b.clone(),
            scales,
            zeros,
            term.clone(),
        );
        let y = B::mixed_linear(x.clone(), Weight::Dense(sum.clone()));
        match QuantizedLinear
            .prepare::<C>([x_node, a_node, b_node, scales_node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => prep.finish((mask, [x, sum, a, b], grid, term, rounded), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn head(
        hidden: Float<Self>,
        weight: Float<Self>,
        targets: IntTensor<Self>,
        teacher: Teacher<Self>,
        softcap: Option<f64>,
        _: [bool; 2],
    ) -> Head<Float<Self>> {
        // With a teacher, the weight is a constant.
        let (weight, teacher) = match teacher {
            Teacher::None => (weight, Teacher::None),
            Teacher::States(hidden, mix) => (
                constant::<B, C>(weight.into_primitive()),
                Teacher::States(hidden.into_primitive(), mix),
            ),
        };
        let want_weight = weight.is_tracked();
        let ((hidden, hidden_node), (weight, weight_node)) =
            (hidden.into_parts(), weight.into_parts());
        let (loss, nll) = match HeadLoss
            .prepare::<C>([hidden_node, weight_node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let want = [true, want_weight];
                let (loss, nll, hidden, weight) =
                    B::head(hidden, weight, targets, teacher, softcap, want);
                (prep.finish((hidden, weight), loss), nll)
            }
            OpsKind::UnTracked(prep) => {
                let (loss, nll, ..) =
                    B::head(hidden, weight, targets, teacher, softcap, [false; 2]);
                (prep.finish(loss), nll)
            }
        };
        (loss, constant::<B, C>(nll), None, None)
    }

    fn causal_attention(
        q: Float<Self>,
        k: Float<Self>,
        v: Float<Self>,
        scores: Scores,
        mask: AttentionMask,
    ) -> (Float<Self>, Float<Self>) {
        let ((q, q_node), (k, k_node), (v, v_node)) =
            (q.into_parts(), k.into_parts(), v.into_parts());
        let (y, log_sum_exp) =
            B::causal_attention(q.clone(), k.clone(), v.clone(), scores, mask.clone());
        let y = match CausalAttention
            .prepare::<C>([q_node, k_node, v_node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                prep.finish(([q, k, v, log_sum_exp.clone()], scores, mask), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(y),
        };
        (y, constant::<B, C>(log_sum_exp))
    }

    fn rotary(x: Float<Self>, cos: Float<Self>, sin: Float<Self>, n_heads: usize) -> Float<Self> {
        let (x, node) = x.into_parts();
        let (cos, sin) = (cos.into_primitive(), sin.into_primitive());
        let y = B::rotary(x, cos.clone(), sin.clone(), n_heads);
        match Rotary.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((cos, sin), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
    // The backward methods keep their portable definitions, which consist of differentiable steps.
    // Nothing calls them on this backend.
}

/// A tensor without gradients.
fn constant<B: DecoderOps, C: CheckpointStrategy>(tensor: Float<B>) -> Float<Autodiff<B, C>> {
    Float::<Autodiff<B, C>>::new(tensor)
}
