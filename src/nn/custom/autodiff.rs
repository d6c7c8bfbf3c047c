//! The operations on the tape: one node each.

use burn::backend::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};

use super::{AttentionMask, DecoderOps};

type Float<B> = FloatTensor<B>;

/// Declares a backward step: its name, the number of tracked inputs, its state and what turns a gradient of the result into
/// gradients of the tracked inputs. `$wanted` says, input by input, whether one is tracked.
macro_rules! backward {
    ($name:ident, $n:literal, $state:ty, |$saved:pat_param, $grad:ident, $wanted:pat_param| $body:expr) => {
        #[derive(Debug)]
        struct $name;

        impl<B: DecoderOps> Backward<B, $n> for $name {
            type State = $state;

            fn backward(self, ops: Ops<Self::State, $n>, grads: &mut Gradients, _: &mut Checkpointer) {
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

backward!(RmsNorm, 2, (Float<B>, Float<B>, f64), |(x, weight, eps), grad, [want_x, want_weight]| {
    let grad_weight = want_weight.then(|| B::rms_norm_backward_weight(x.clone(), grad.clone(), eps));
    [want_x.then(|| B::rms_norm_backward(x, weight, grad, eps)), grad_weight]
});

backward!(Swiglu, 2, (Float<B>, Float<B>), |(gate, up), grad, _| {
    let (gate, up) = B::swiglu_backward(gate, up, grad);
    [Some(gate), Some(up)]
});

backward!(CrossEntropy, 1, (Float<B>, IntTensor<B>, Float<B>), |(logits, targets, log_sum_exp), grad, _| {
    [Some(B::cross_entropy_sum_backward(logits, targets, log_sum_exp, grad))]
});

backward!(CausalAttention, 3, ([Float<B>; 4], f64, AttentionMask), |([q, k, v, log_sum_exp], scale, mask), grad, _| {
    let (q, k, v) = B::causal_attention_backward(q, k, v, log_sum_exp, grad, scale, mask);
    [Some(q), Some(k), Some(v)]
});

backward!(Rotary, 1, (Float<B>, Float<B>), |(cos, sin), grad, _| [Some(B::rotary_backward(cos, sin, grad))]);

impl<B: DecoderOps, C: CheckpointStrategy> DecoderOps for Autodiff<B, C> {
    fn rms_norm(x: Float<Self>, weight: Float<Self>, eps: f64) -> Float<Self> {
        let ((x, x_node), (weight, weight_node)) = (x.into_parts(), weight.into_parts());
        match RmsNorm.prepare::<C>([x_node, weight_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let y = B::rms_norm(x.clone(), weight.clone(), eps);
                prep.finish((x, weight, eps), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::rms_norm(x, weight, eps)),
        }
    }

    fn swiglu(gate: Float<Self>, up: Float<Self>) -> Float<Self> {
        let ((gate, gate_node), (up, up_node)) = (gate.into_parts(), up.into_parts());
        match Swiglu.prepare::<C>([gate_node, up_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let y = B::swiglu(gate.clone(), up.clone());
                prep.finish((gate, up), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::swiglu(gate, up)),
        }
    }

    fn cross_entropy_sum(logits: Float<Self>, targets: IntTensor<Self>) -> (Float<Self>, Float<Self>) {
        let (logits, node) = logits.into_parts();
        let (loss, log_sum_exp) = B::cross_entropy_sum(logits.clone(), targets.clone());
        let loss = match CrossEntropy.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((logits, targets, log_sum_exp.clone()), loss),
            OpsKind::UnTracked(prep) => prep.finish(loss),
        };
        (loss, constant::<B, C>(log_sum_exp))
    }

    fn causal_attention(
        q: Float<Self>,
        k: Float<Self>,
        v: Float<Self>,
        scale: f64,
        mask: AttentionMask,
    ) -> (Float<Self>, Float<Self>) {
        let ((q, q_node), (k, k_node), (v, v_node)) = (q.into_parts(), k.into_parts(), v.into_parts());
        let (y, log_sum_exp) = B::causal_attention(q.clone(), k.clone(), v.clone(), scale, mask.clone());
        let y = match CausalAttention.prepare::<C>([q_node, k_node, v_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(([q, k, v, log_sum_exp.clone()], scale, mask), y),
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
    // The backward methods keep their portable definitions, whose steps are differentiable; nothing calls them here.
}

/// A tensor beside the tape.
fn constant<B: DecoderOps, C: CheckpointStrategy>(tensor: Float<B>) -> Float<Autodiff<B, C>> {
    Float::<Autodiff<B, C>>::new(tensor)
}
