//! What a product of few rows is made of: sums over lines of a weight, in whatever format it is stored.

use super::math::LANES;
use crate::kernels::level::{dispatch, mul_add};
use crate::kernels::number::Stored;

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
