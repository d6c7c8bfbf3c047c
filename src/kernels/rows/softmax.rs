//! Softmax of a row, and the losses and gradients based on it.

use super::math::{exp, max_of, sum_of, tanh};
use crate::kernels::level::{dispatch, mul_add};

dispatch! {
    /// Returns `ln(sum(exp(row)))`, computed relative to the largest element.
    pub(crate) fn log_sum_exp<const FMA: bool>(row: &[f32]) -> f32 {
        let max = max_of(row);
        sum_of(row, row, |x, _| exp::<FMA>(x - max)).ln() + max
    }
}

dispatch! {
    /// Limits scores to `cap * tanh(score / cap)`.
    pub(crate) fn softcap_in_place<const FMA: bool>(row: &mut [f32], cap: f32) {
        let inverse = 1.0 / cap;
        for x in row {
            *x = cap * tanh::<FMA>(*x * inverse);
        }
    }
}

dispatch! {
    /// Replaces the gradient of limited scores by that of the scores before
    /// [`softcap_in_place`]. `capped` holds the limited scores.
    pub(crate) fn softcap_backward<const FMA: bool>(capped: &[f32], grad: &mut [f32], cap: f32) {
        let inverse = 1.0 / cap;
        for (grad, capped) in grad.iter_mut().zip(capped) {
            let tanh = capped * inverse;
            *grad *= 1.0 - tanh * tanh;
        }
    }
}

dispatch! {
    /// Replaces `row` by `exp(row - shift) * factor`.
    pub(crate) fn exp_shifted<const FMA: bool>(row: &mut [f32], shift: f32, factor: f32) {
        for x in row {
            *x = exp::<FMA>(*x - shift) * factor;
        }
    }
}

dispatch! {
    /// Replaces `row` by its softmax and returns `ln(sum(exp(row)))`.
    pub(crate) fn softmax<const FMA: bool>(row: &mut [f32]) -> f32 {
        let max = max_of(row);
        for x in row.iter_mut() {
            *x = exp::<FMA>(*x - max);
        }
        let sum = sum_of(row, row, |x, _| x);
        let inverse = 1.0 / sum;
        for x in row.iter_mut() {
            *x *= inverse;
        }
        sum.ln() + max
    }
}

dispatch! {
    /// Replaces `row` by its softmax minus `mix` times the probabilities `taught`. Returns
    /// `ln(sum(exp(row)))` and the cross-entropy of `row` against `taught`.
    pub(crate) fn softmax_less<const FMA: bool>(row: &mut [f32], taught: &[f32], mix: f32) -> (f32, f32) {
        let max = max_of(row);
        let below = sum_of(taught, row, |p, x| p * (max - x));
        for x in row.iter_mut() {
            *x = exp::<FMA>(*x - max);
        }
        let sum = sum_of(row, row, |x, _| x);
        let inverse = 1.0 / sum;
        for (x, p) in row.iter_mut().zip(taught) {
            *x = mul_add::<FMA>(-mix, *p, *x * inverse);
        }
        (sum.ln() + max, sum.ln() + below)
    }
}

dispatch! {
    /// Computes the gradient of scores through a softmax: replaces `grad`, the gradient of
    /// `weights`, by `weights * (grad - grad . weights)`.
    pub(crate) fn softmax_backward<const FMA: bool>(weights: &[f32], grad: &mut [f32]) {
        let along = sum_of(weights, grad, |a, b| a * b);
        for (grad, weight) in grad.iter_mut().zip(weights) {
            *grad = weight * (*grad - along);
        }
    }
}
