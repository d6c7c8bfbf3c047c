//! What a product of few rows is made of: sums over lines of a weight, in whatever format it is stored.

use half::{bf16, f16};

use super::{Kind, LANES, Level, mul_add};

/// A number as a weight holds it.
pub(in crate::nn::custom) trait Stored: Copy + Send + Sync {
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
        let infinite = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
        f32::from_bits(size.to_bits() | infinite | (bits & 0x8000) << 16)
    }
}

/// Lines that are read side by side where each is added to all results, and where each gives a result.
pub(in crate::nn::custom) const ADDED: usize = 8;
pub(in crate::nn::custom) const DOTTED: usize = 4;

/// `out += sum of x[i] lines[i]`.
#[inline(always)]
fn add<const FMA: bool, const N: usize, T: Stored>(x: &[f32; N], lines: [&[T]; N], out: &mut [f32]) {
    let (chunks, rest) = out.as_chunks_mut::<LANES>();
    let (n, done) = (chunks.len(), chunks.len() * LANES);
    let parts = lines.map(|line| &line.as_chunks::<LANES>().0[..n]);
    for (index, out) in chunks.iter_mut().enumerate() {
        let mut sums = *out;
        for i in 0..N {
            let part = &parts[i][index];
            for lane in 0..LANES {
                sums[lane] = mul_add::<FMA>(x[i], part[lane].widen(), sums[lane]);
            }
        }
        *out = sums;
    }
    for (column, out) in rest.iter_mut().enumerate() {
        for i in 0..N {
            *out = mul_add::<FMA>(x[i], lines[i][done + column].widen(), *out);
        }
    }
}

/// The products of `x` with lines of its length.
#[inline(always)]
fn dot<const FMA: bool, const N: usize, T: Stored>(x: &[f32], lines: [&[T]; N]) -> [f32; N] {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let (n, done) = (chunks.len(), chunks.len() * LANES);
    let parts = lines.map(|line| &line.as_chunks::<LANES>().0[..n]);
    let mut sums = [[0.0_f32; LANES]; N];
    for (index, x) in chunks.iter().enumerate() {
        for i in 0..N {
            let part = &parts[i][index];
            for lane in 0..LANES {
                sums[i][lane] = mul_add::<FMA>(x[lane], part[lane].widen(), sums[i][lane]);
            }
        }
    }
    let mut products = [0.0; N];
    for i in 0..N {
        products[i] = sums[i].iter().sum();
        for (x, weight) in rest.iter().zip(&lines[i][done..]) {
            products[i] = mul_add::<FMA>(*x, weight.widen(), products[i]);
        }
    }
    products
}

kernel! {
    /// `out += x L`: as many lines as `x` has numbers, `stride` numbers from one to the next, each as long as `out`.
    fn add_lines<const FMA: bool, T: Stored>(x: &[f32], lines: &[T], stride: usize, out: &mut [f32]) {
        let width = out.len();
        let (groups, rest) = x.as_chunks::<ADDED>();
        let mut first = 0;
        for x in groups {
            let mut group: [&[T]; ADDED] = [&[]; ADDED];
            for (i, line) in group.iter_mut().enumerate() {
                *line = &lines[(first + i) * stride..][..width];
            }
            add::<FMA, ADDED, T>(x, group, out);
            first += ADDED;
        }
        for x in rest {
            add::<FMA, 1, T>(&[*x], [&lines[first * stride..][..width]], out);
            first += 1;
        }
    }
}

kernel! {
    /// `out += x L^T`: as many lines as `out` has numbers, `stride` numbers from one to the next, each as long as `x`.
    fn add_dots<const FMA: bool, T: Stored>(x: &[f32], lines: &[T], stride: usize, out: &mut [f32]) {
        let (groups, rest) = out.as_chunks_mut::<DOTTED>();
        let mut first = 0;
        for out in groups {
            let mut group: [&[T]; DOTTED] = [&[]; DOTTED];
            for (i, line) in group.iter_mut().enumerate() {
                *line = &lines[(first + i) * stride..][..x.len()];
            }
            let products = dot::<FMA, DOTTED, T>(x, group);
            for i in 0..DOTTED {
                out[i] += products[i];
            }
            first += DOTTED;
        }
        for out in rest {
            let [product] = dot::<FMA, 1, T>(x, [&lines[first * stride..][..x.len()]]);
            *out += product;
            first += 1;
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
                assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{bits:04x}: {got} {want}");
            }
        }
    }
}
