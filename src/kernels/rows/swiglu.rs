//! SwiGLU (arXiv 2002.05202): `silu(gate) * up`.

use std::mem::MaybeUninit;

use super::math::sigmoid;
use crate::kernels::level::{dispatch, mul_add};

dispatch! {
    /// Computes `out = silu(gate) * up`.
    pub(crate) fn swiglu<const FMA: bool>(gate: &[f32], up: &[f32], out: &mut [MaybeUninit<f32>]) {
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            out.write(gate * sigmoid::<FMA>(*gate) * up);
        }
    }
}

dispatch! {
    /// Replaces `gate` by `silu(gate) * up`.
    pub(crate) fn swiglu_in_place<const FMA: bool>(gate: &mut [f32], up: &[f32]) {
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = *gate * sigmoid::<FMA>(*gate) * up;
        }
    }
}

dispatch! {
    /// Replaces `gate` and `up` by their gradients.
    pub(crate) fn swiglu_backward<const FMA: bool>(gate: &mut [f32], up: &mut [f32], grad: &[f32]) {
        for ((gate, up), grad) in gate.iter_mut().zip(up).zip(grad) {
            let sigmoid = sigmoid::<FMA>(*gate);
            let silu = *gate * sigmoid;
            let slope = mul_add::<FMA>(silu, 1.0 - sigmoid, sigmoid);
            *gate = grad * *up * slope;
            *up = grad * silu;
        }
    }
}
