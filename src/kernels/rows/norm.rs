//! Root-mean-square normalization (RMSNorm, arXiv 1910.07467).

use std::mem::MaybeUninit;

use super::math::sum_of;
use crate::kernels::level::{dispatch, mul_add};

/// Returns `1 / sqrt(mean(x^2) + eps)`.
#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum_of(x, x, |a, b| a * b) / x.len() as f32 + eps).sqrt()
}

dispatch! {
    /// Computes `x / sqrt(mean(x^2) + eps) * weight` for each row.
    pub(crate) fn rms_norm<const FMA: bool>(x: &[f32], weight: &[f32], eps: f32, out: &mut [MaybeUninit<f32>]) {
        for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
            let inverse = inverse_rms(x, eps);
            for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                out.write(x * inverse * weight);
            }
        }
    }
}

dispatch! {
    /// Normalizes each row in place; see [`rms_norm`].
    pub(crate) fn rms_norm_in_place<const FMA: bool>(x: &mut [f32], weight: &[f32], eps: f32) {
        for x in x.chunks_exact_mut(weight.len()) {
            let inverse = inverse_rms(x, eps);
            for (x, weight) in x.iter_mut().zip(weight) {
                *x = *x * inverse * weight;
            }
        }
    }
}

dispatch! {
    /// Replaces rows of the gradient of the result by the gradient of `x`.
    pub(crate) fn rms_norm_backward<const FMA: bool>(x: &[f32], weight: &[f32], eps: f32, grad: &mut [f32]) {
        let width = weight.len();
        for (x, grad) in x.chunks_exact(width).zip(grad.chunks_exact_mut(width)) {
            let inverse = inverse_rms(x, eps);
            for (grad, weight) in grad.iter_mut().zip(weight) {
                *grad *= weight;
            }
            let along = sum_of(x, grad, |x, grad| x * grad) / width as f32 * inverse * inverse;
            for (grad, x) in grad.iter_mut().zip(x) {
                *grad = inverse * (*grad - x * along);
            }
        }
    }
}

dispatch! {
    /// Adds the contribution of these rows to the gradient of the weight.
    pub(crate) fn rms_norm_backward_weight<const FMA: bool>(x: &[f32], grad: &[f32], eps: f32, sum: &mut [f32]) {
        let width = sum.len();
        for (x, grad) in x.chunks_exact(width).zip(grad.chunks_exact(width)) {
            let inverse = inverse_rms(x, eps);
            for ((sum, x), grad) in sum.iter_mut().zip(x).zip(grad) {
                *sum = mul_add::<FMA>(x * inverse, *grad, *sum);
            }
        }
    }
}
