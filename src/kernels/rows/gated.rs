//! Gated activations (arXiv 2002.05202): `activation(gate) * up`.

use std::mem::MaybeUninit;

use super::math::{sigmoid, tanh};
use crate::arch::Activation;
use crate::kernels::level::{Level, dispatch, mul_add};

/// An activation and its derivative.
trait Function {
    fn value<const FMA: bool>(x: f32) -> f32;
    /// The value and the derivative.
    fn both<const FMA: bool>(x: f32) -> (f32, f32);
}

struct Silu;

impl Function for Silu {
    #[inline(always)]
    fn value<const FMA: bool>(x: f32) -> f32 {
        x * sigmoid::<FMA>(x)
    }

    #[inline(always)]
    fn both<const FMA: bool>(x: f32) -> (f32, f32) {
        let sigmoid = sigmoid::<FMA>(x);
        let silu = x * sigmoid;
        (silu, mul_add::<FMA>(silu, 1.0 - sigmoid, sigmoid))
    }
}

struct GeluTanh;

/// `sqrt(2 / pi)`.
const ROOT: f32 = 0.797_884_6;
const CUBE: f32 = 0.044_715;

impl Function for GeluTanh {
    #[inline(always)]
    fn value<const FMA: bool>(x: f32) -> f32 {
        let inner = ROOT * x * mul_add::<FMA>(CUBE * x, x, 1.0);
        0.5 * x * (1.0 + tanh::<FMA>(inner))
    }

    #[inline(always)]
    fn both<const FMA: bool>(x: f32) -> (f32, f32) {
        let square = x * x;
        let tanh = tanh::<FMA>(ROOT * x * mul_add::<FMA>(CUBE, square, 1.0));
        let inner = ROOT * mul_add::<FMA>(3.0 * CUBE, square, 1.0);
        let slope = 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner;
        (0.5 * x * (1.0 + tanh), slope)
    }
}

dispatch! {
    fn forward<const FMA: bool, F: Function>(gate: &[f32], up: &[f32], out: &mut [MaybeUninit<f32>]) {
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            out.write(F::value::<FMA>(*gate) * up);
        }
    }
}

dispatch! {
    fn in_place<const FMA: bool, F: Function>(gate: &mut [f32], up: &[f32]) {
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = F::value::<FMA>(*gate) * up;
        }
    }
}

dispatch! {
    fn backward<const FMA: bool, F: Function>(gate: &mut [f32], up: &mut [f32], grad: &[f32]) {
        for ((gate, up), grad) in gate.iter_mut().zip(up).zip(grad) {
            let (value, slope) = F::both::<FMA>(*gate);
            *gate = grad * *up * slope;
            *up = grad * value;
        }
    }
}

/// Computes `out = activation(gate) * up`.
pub(crate) fn gated(
    level: Level,
    activation: Activation,
    gate: &[f32],
    up: &[f32],
    out: &mut [MaybeUninit<f32>],
) {
    match activation {
        Activation::Silu => forward::<Silu>(level, gate, up, out),
        Activation::GeluTanh => forward::<GeluTanh>(level, gate, up, out),
    }
}

/// Replaces `gate` by `activation(gate) * up`.
pub(crate) fn gated_in_place(level: Level, activation: Activation, gate: &mut [f32], up: &[f32]) {
    match activation {
        Activation::Silu => in_place::<Silu>(level, gate, up),
        Activation::GeluTanh => in_place::<GeluTanh>(level, gate, up),
    }
}

/// Replaces `gate` and `up` by their gradients.
pub(crate) fn gated_backward(
    level: Level,
    activation: Activation,
    gate: &mut [f32],
    up: &mut [f32],
    grad: &[f32],
) {
    match activation {
        Activation::Silu => backward::<Silu>(level, gate, up, grad),
        Activation::GeluTanh => backward::<GeluTanh>(level, gate, up, grad),
    }
}
