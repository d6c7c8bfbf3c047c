//! What a product of few rows is made of: sums over lines of a weight, in whatever format it is stored.

use half::{bf16, f16};

use super::math::LANES;
use crate::kernels::level::{dispatch, mul_add};

/// A number as a weight holds it.
pub(crate) trait Stored: Copy + Send + Sync {
    /// As `f32`, which is exact; in a form that becomes vector code.
    fn widen(self) -> f32;
}

impl Stored for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Stored for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        // The exponent's offset is 15 here and 127 there.
        const REBIASED: f32 = f32::from_bits((127 + 112) << 23);
        let bits = u32::from(self.to_bits());
        let size = f32::from_bits((bits & 0x7fff) << 13) * REBIASED;
        let infinite = if bits & 0x7c00 == 0x7c00 {
            0x7f80_0000
        } else {
            0
        };
        f32::from_bits(size.to_bits() | infinite | (bits & 0x8000) << 16)
    }
}

/// Lines that are read side by side where each is added to all results.
pub(crate) const ADDED: usize = 4;

/// The product of `x` and a line of its length.
#[inline(always)]
fn dot<const FMA: bool, T: Stored>(x: &[f32], line: &[T]) -> f32 {
    let ((chunks, rest), (parts, line_rest)) = (x.as_chunks::<LANES>(), line.as_chunks::<LANES>());
    // One set of sums is as fast as memory.
    let mut sums = [0.0_f32; LANES];
    for (x, part) in chunks.iter().zip(parts) {
        for lane in 0..LANES {
            sums[lane] = mul_add::<FMA>(x[lane], part[lane].widen(), sums[lane]);
        }
    }
    let mut sum = sums.iter().sum();
    for (x, weight) in rest.iter().zip(line_rest) {
        sum = mul_add::<FMA>(*x, weight.widen(), sum);
    }
    sum
}

dispatch! {
    /// `out += x L`: as many lines as `x` has numbers, `stride` numbers from one to the next, each as long as `out`.
    pub(crate) fn add_lines<const FMA: bool, T: Stored>(x: &[f32], lines: &[T], stride: usize, out: &mut [f32]) {
        let width = out.len();
        let (groups, rest) = x.as_chunks::<ADDED>();
        for (group, [x0, x1, x2, x3]) in groups.iter().enumerate() {
            let lines = &lines[ADDED * group * stride..];
            let (a, b) = (&lines[..width], &lines[stride..][..width]);
            let (c, d) = (&lines[2 * stride..][..width], &lines[3 * stride..][..width]);
            // In this form, and not over arrays, it becomes vector code for every format and instruction set.
            for ((((out, a), b), c), d) in out.iter_mut().zip(a).zip(b).zip(c).zip(d) {
                let sum = mul_add::<FMA>(*x1, b.widen(), mul_add::<FMA>(*x0, a.widen(), *out));
                *out = mul_add::<FMA>(*x3, d.widen(), mul_add::<FMA>(*x2, c.widen(), sum));
            }
        }
        for (index, x) in rest.iter().enumerate() {
            let line = &lines[(ADDED * groups.len() + index) * stride..][..width];
            for (out, weight) in out.iter_mut().zip(line) {
                *out = mul_add::<FMA>(*x, weight.widen(), *out);
            }
        }
    }
}

dispatch! {
    /// `out += x L^T`: as many lines as `out` has numbers, `stride` numbers from one to the next, each as long as `x`.
    pub(crate) fn add_dots<const FMA: bool, T: Stored>(x: &[f32], lines: &[T], stride: usize, out: &mut [f32]) {
        for (index, out) in out.iter_mut().enumerate() {
            *out += dot::<FMA, T>(x, &lines[index * stride..][..x.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen_bits_widen_exactly() {
        for bits in 0..=u16::MAX {
            let (a, b) = (f16::from_bits(bits), bf16::from_bits(bits));
            for (got, want) in [(a.widen(), a.to_f32()), (b.widen(), b.to_f32())] {
                assert!(
                    got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(),
                    "{bits:04x}: {got} {want}"
                );
            }
        }
    }
}
