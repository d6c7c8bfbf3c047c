//! Fake quantization for training: weights on their quantization grids, and gradients of the
//! scales.

use crate::kernels::level::dispatch;

/// Returns the step of a grid nearest to `x`, with ties to even. Both are counted from the zero
/// point. NaN stays NaN.
#[inline(always)]
fn nearest_step(x: f32, zero: f32, top: f32) -> f32 {
    // Adding and subtracting this constant rounds numbers below 2^22 without a function call.
    const ROUND: f32 = 12_582_912.0;
    let (low, high) = (-zero, top - zero);
    let x = if x < low { low } else { x };
    let x = if x > high { high } else { x };
    x + ROUND - ROUND
}

dispatch! {
    /// Replaces a row of an update by the quantized sum of the weight's row and the update. Where
    /// the mask is 0, the update is not added.
    pub(crate) fn quantize_sum<const FMA: bool>(
        row: &mut [f32],
        weight: &[f32],
        mask: &[u8],
        scales: &[f32],
        zeros: &[f32],
        top: f32,
    ) {
        let grid = scales.iter().zip(zeros);
        for (((row, weight), mask), (scale, zero)) in row.iter_mut().zip(weight).zip(mask).zip(grid) {
            let sum = if *mask != 0 { *weight + *row } else { *weight };
            let value = scale * nearest_step(sum / scale, *zero, top);
            *row = if *scale > 0.0 { value } else { 0.0 };
        }
    }
}

dispatch! {
    /// Adds the contribution of a row to the gradient of each scale. `weight` is the row before
    /// rounding, and `grad` the gradient of the rounded weights.
    pub(crate) fn scale_gradient<const FMA: bool>(
        sum: &mut [f32],
        weight: &[f32],
        grad: &[f32],
        scales: &[f32],
        zeros: &[f32],
        top: f32,
    ) {
        let grid = scales.iter().zip(zeros);
        for (((sum, weight), grad), (scale, zero)) in sum.iter_mut().zip(weight).zip(grad).zip(grid) {
            let x = weight / scale;
            let step = nearest_step(x, *zero, top);
            let inside = x >= -zero && x <= top - zero;
            let slope = if inside { step - x } else { step };
            *sum += if *scale > 0.0 { grad * slope } else { 0.0 };
        }
    }
}
