//! Weights on the grids that they are trained for.

use crate::kernels::level::dispatch;

/// The step of a grid nearest to `x`, both counted from the zero point; ties to even. What is NaN stays so.
#[inline(always)]
fn nearest_step(x: f32, zero: f32, top: f32) -> f32 {
    // Adding and taking it away again rounds what is under 2^22, without a call.
    const ROUND: f32 = 12_582_912.0;
    let (low, high) = (-zero, top - zero);
    let x = if x < low { low } else { x };
    let x = if x > high { high } else { x };
    x + ROUND - ROUND
}

dispatch! {
    /// Replaces a row of an update by the weight's row with the update where the mask is set, on its grids.
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
    /// Adds to each scale's gradient what a row of weights, not yet rounded, and the gradients of the rounded ones give.
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
