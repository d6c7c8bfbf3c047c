//! Row kernels on slices, compiled once per instruction set and chosen at run time; Burn's operations and the lean executor share
//! them.
//!
//! The loops are plain Rust that the compiler turns into vector code: a transcendental function is a polynomial without
//! branches, and a sum runs in [`LANES`] partial sums, since the order of a floating-point sum is not the compiler's to change.

use std::mem::MaybeUninit;

use crate::kernels::level::{dispatch, mul_add};

/// Partial results of a reduction.
const LANES: usize = 16;

pub(crate) mod attention;
pub(crate) mod lines;
pub(crate) mod masked;

/// `e^x` with a relative error below 2e-7 for x in -87..88, 0 below, e^88.37 above, NaN for NaN (the polynomial is that of
/// Cephes' `expf`, S. Moshier).
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    const LOWEST: f32 = -87.3;
    const HIGHEST: f32 = 88.37;
    // Adding it leaves a number's nearest integer in the lowest bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < LOWEST { LOWEST } else { x };
    let clamped = if clamped > HIGHEST { HIGHEST } else { clamped };
    let rounded = mul_add::<FMA>(clamped, std::f32::consts::LOG2_E, ROUND);
    let power = rounded - ROUND;
    // ln 2 in two parts, the first of few bits, so that the difference is exact.
    let rest = mul_add::<FMA>(power, -0.693_359_4, clamped);
    let rest = mul_add::<FMA>(power, 2.121_944_4e-4, rest);
    let p = mul_add::<FMA>(1.987_569_1e-4, rest, 1.398_2e-3);
    let p = mul_add::<FMA>(p, rest, 8.333_452e-3);
    let p = mul_add::<FMA>(p, rest, 4.166_579_6e-2);
    let p = mul_add::<FMA>(p, rest, 1.666_666_5e-1);
    let p = mul_add::<FMA>(p, rest, 0.5);
    let p = mul_add::<FMA>(p, rest * rest, rest) + 1.0;
    let two_to_power = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    if x < LOWEST { 0.0 } else { p * two_to_power }
}

#[inline(always)]
fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FMA>(-x))
}

/// Memory to be written, all of it, as kernels take it.
pub(crate) fn as_uninit(out: &mut [f32]) -> &mut [MaybeUninit<f32>] {
    // SAFETY: same layout. No kernel writes anything but numbers, so that what comes back is initialized.
    unsafe { &mut *(std::ptr::from_mut(out) as *mut [MaybeUninit<f32>]) }
}

/// Sum of `f` over the elements of two rows.
#[inline(always)]
fn sum_of(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] += f(a[lane], b[lane]);
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| f(*a, *b)).sum();
    sums.iter().sum::<f32>() + rest
}

#[inline(always)]
fn max_of(row: &[f32]) -> f32 {
    let mut best = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            best[lane] = if chunk[lane] > best[lane] {
                chunk[lane]
            } else {
                best[lane]
            };
        }
    }
    best.iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a })
}

/// `1 / sqrt(mean(x^2) + eps)`.
#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum_of(x, x, |a, b| a * b) / x.len() as f32 + eps).sqrt()
}

dispatch! {
    /// `out = silu(gate) * up`.
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

dispatch! {
    /// Rows of `x / sqrt(mean(x^2) + eps) * weight`.
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
    /// Replaces rows of the gradient of the result by that of `x`.
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
    /// Adds the rows' share to the gradient of the weight.
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

dispatch! {
    /// `ln(sum(exp(row)))`, by way of the largest element.
    pub(crate) fn log_sum_exp<const FMA: bool>(row: &[f32]) -> f32 {
        let max = max_of(row);
        sum_of(row, row, |x, _| exp::<FMA>(x - max)).ln() + max
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
    /// Replaces `row` by its softmax less `mix` times the probabilities of `taught`. Returns `ln(sum(exp(row)))` and the
    /// cross-entropy of `row` against `taught`.
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
    /// The gradient of scores under a softmax: replaces `grad`, that of `weights`, by `weights * (grad - grad . weights)`.
    pub(crate) fn softmax_backward<const FMA: bool>(weights: &[f32], grad: &mut [f32]) {
        let along = sum_of(weights, grad, |a, b| a * b);
        for (grad, weight) in grad.iter_mut().zip(weights) {
            *grad = weight * (*grad - along);
        }
    }
}

dispatch! {
    /// Turns one head: `(low cos - high sin, high cos + low sin)`.
    pub(crate) fn turn<const FMA: bool>(head: &[f32], cos: &[f32], sin: &[f32], out: &mut [MaybeUninit<f32>]) {
        let half = cos.len();
        let ((low, high), (out_low, out_high)) = (head.split_at(half), out.split_at_mut(half));
        let turned = out_low.iter_mut().zip(out_high).zip(low.iter().zip(high)).zip(cos.iter().zip(sin));
        for (((out_low, out_high), (low, high)), (cos, sin)) in turned {
            out_low.write(low * cos - high * sin);
            out_high.write(high * cos + low * sin);
        }
    }
}

dispatch! {
    /// Replaces a head by itself, turned; see [`turn`].
    pub(crate) fn turn_in_place<const FMA: bool>(head: &mut [f32], cos: &[f32], sin: &[f32]) {
        let (low, high) = head.split_at_mut(cos.len());
        for ((low, high), (cos, sin)) in low.iter_mut().zip(high).zip(cos.iter().zip(sin)) {
            (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
        }
    }
}

dispatch! {
    /// Turns one head back: `(low cos + high sin, high cos - low sin)`.
    pub(crate) fn turn_back<const FMA: bool>(head: &[f32], cos: &[f32], sin: &[f32], out: &mut [MaybeUninit<f32>]) {
        let half = cos.len();
        let ((low, high), (out_low, out_high)) = (head.split_at(half), out.split_at_mut(half));
        let turned = out_low.iter_mut().zip(out_high).zip(low.iter().zip(high)).zip(cos.iter().zip(sin));
        for (((out_low, out_high), (low, high)), (cos, sin)) in turned {
            out_low.write(low * cos + high * sin);
            out_high.write(high * cos - low * sin);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Level;

    #[test]
    fn exp_is_accurate_at_every_level() {
        for level in Level::available() {
            for step in 0..200_000 {
                let x = -87.0 + step as f32 * (175.0 / 200_000.0);
                let mut row = [x];
                exp_shifted(level, &mut row, 0.0, 1.0);
                let exact = f64::from(x).exp();
                let error = ((f64::from(row[0]) - exact) / exact).abs();
                assert!(
                    error < 2e-7,
                    "{level:?}: exp({x}) = {}, off by {error}",
                    row[0]
                );
            }
            let mut row = [
                f32::NEG_INFINITY,
                -1e30,
                -88.0,
                0.0,
                f32::NAN,
                f32::INFINITY,
            ];
            exp_shifted(level, &mut row, 0.0, 1.0);
            assert_eq!(&row[..4], &[0.0, 0.0, 0.0, 1.0]);
            assert!(row[4].is_nan() && row[5] > 1e38);
        }
    }
    #[test]
    fn levels_agree() {
        let wave = |n: usize, step: f32| {
            (0..n)
                .map(|i| (i as f32 * step).sin() * 6.0)
                .collect::<Vec<f32>>()
        };
        let written = |out: Vec<MaybeUninit<f32>>| {
            // SAFETY: the kernels write every element.
            out.into_iter()
                .map(|x| unsafe { x.assume_init() })
                .collect::<Vec<f32>>()
        };
        for width in [2, 16, 34, 250] {
            let (a, b) = (wave(3 * width, 0.7), wave(3 * width, 1.3));
            let run = |level| {
                let mut all = vec![log_sum_exp(level, &a)];
                let mut out = vec![MaybeUninit::uninit(); 3 * width];
                swiglu(level, &a, &b, &mut out);
                all.extend(written(out.clone()));
                rms_norm(level, &a, &b[..width], 1e-3, &mut out);
                all.extend(written(out));
                let mut out = vec![MaybeUninit::uninit(); width];
                turn(
                    level,
                    &a[..width],
                    &b[..width / 2],
                    &b[width / 2..width],
                    &mut out,
                );
                all.extend(written(out.clone()));
                turn_back(
                    level,
                    &a[..width],
                    &b[..width / 2],
                    &b[width / 2..width],
                    &mut out,
                );
                all.extend(written(out));
                let (mut gate, mut up) = (a.clone(), b.clone());
                swiglu_backward(level, &mut gate, &mut up, &b);
                let (mut grad, mut sum) = (b.clone(), vec![0.0; width]);
                rms_norm_backward(level, &a, &b[..width], 1e-3, &mut grad);
                rms_norm_backward_weight(level, &a, &b, 1e-3, &mut sum);
                let (mut weights, mut slopes) = (a.clone(), b.clone());
                all.push(softmax(level, &mut weights));
                let mut rest = b.clone();
                let (log_sum_exp, cross_entropy) = softmax_less(level, &mut rest, &weights, 0.7);
                all.extend(rest.into_iter().chain([log_sum_exp, cross_entropy]));
                softmax_backward(level, &weights, &mut slopes);
                all.into_iter()
                    .chain(gate)
                    .chain(up)
                    .chain(grad)
                    .chain(sum)
                    .chain(weights)
                    .chain(slopes)
                    .collect()
            };
            let want: Vec<f32> = run(Level::PORTABLE);
            for level in Level::available() {
                for (got, want) in run(level).iter().zip(&want) {
                    assert!(
                        (got - want).abs() <= 2e-5 * (1.0 + want.abs()),
                        "{level:?}, {width}: {got} and {want}"
                    );
                }
            }
        }
    }
}
