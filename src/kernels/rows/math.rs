//! Building blocks of the row kernels: functions without branches, and sums in [`LANES`] parts,
//! which compilers can vectorize.

use crate::kernels::level::mul_add;

/// Number of partial results of a reduction. They are explicit because the compiler must not change
/// the order of a floating-point sum.
pub(super) const LANES: usize = 16;

/// Returns `e^x` with a relative error below 2e-7 for `x` in -87..88. The result is 0 below,
/// e^88.37 above, and NaN for NaN. (The polynomial is that of `expf` in Cephes by S. Moshier.)
#[inline(always)]
pub(super) fn exp<const FMA: bool>(x: f32) -> f32 {
    const LOWEST: f32 = -87.3;
    const HIGHEST: f32 = 88.37;
    // Adding this constant leaves the nearest integer of a number in the lowest bits of the
    // mantissa.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < LOWEST { LOWEST } else { x };
    let clamped = if clamped > HIGHEST { HIGHEST } else { clamped };
    let rounded = mul_add::<FMA>(clamped, std::f32::consts::LOG2_E, ROUND);
    let power = rounded - ROUND;
    // `ln 2` is split into two parts. The first has few bits, so that the difference is exact.
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
pub(super) fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FMA>(-x))
}

/// Returns the hyperbolic tangent, with an absolute error below 2e-7.
#[inline(always)]
pub(super) fn tanh<const FMA: bool>(x: f32) -> f32 {
    2.0 * sigmoid::<FMA>(2.0 * x) - 1.0
}

/// Returns the sum of `f` over the elements of two rows.
#[inline(always)]
pub(super) fn sum_of(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
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
pub(super) fn max_of(row: &[f32]) -> f32 {
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
