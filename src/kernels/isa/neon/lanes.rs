//! Eight numbers in two registers.

use std::arch::aarch64::*;

use crate::format::Number;
use crate::kernels::linear::lanes;
use crate::kernels::linear::tiles::features;
use crate::kernels::number::Stored;

/// NEON.
pub(super) struct Lanes;

features!(Lanes, "neon");

impl lanes::Lanes for Lanes {
    type Vector = float32x4_t;
    type Group = [float32x4_t; 2];

    const COLUMNS: usize = 8;
    const ONE: usize = 2;
    const MORE: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> float32x4_t {
        // SAFETY: the caller's promise, here and below.
        unsafe { vdupq_n_f32(0.0) }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> [float32x4_t; 2] {
        unsafe { [vdupq_n_f32(x); 2] }
    }

    #[inline(always)]
    unsafe fn load<T: Stored>(at: *const u8) -> [float32x4_t; 2] {
        unsafe {
            match T::NUMBER {
                Number::F32 => [vld1q_f32(at.cast()), vld1q_f32(at.add(16).cast())],
                Number::F16 => widen::<true>(vld1q_u16(at.cast())),
                Number::Bf16 => widen::<false>(vld1q_u16(at.cast())),
            }
        }
    }

    #[inline(always)]
    unsafe fn store(at: *mut f32, group: [float32x4_t; 2]) {
        unsafe {
            vst1q_f32(at, group[0]);
            vst1q_f32(at.add(4), group[1]);
        }
    }

    #[inline(always)]
    unsafe fn fma(
        a: [float32x4_t; 2],
        b: [float32x4_t; 2],
        sum: [float32x4_t; 2],
    ) -> [float32x4_t; 2] {
        unsafe { [vfmaq_f32(sum[0], a[0], b[0]), vfmaq_f32(sum[1], a[1], b[1])] }
    }

    #[inline(always)]
    fn chains(pairs: usize) -> usize {
        chains(pairs)
    }

    #[inline(always)]
    unsafe fn add_products(
        sums: &mut [float32x4_t; 4],
        chains: usize,
        index: usize,
        a: [float32x4_t; 2],
        b: [float32x4_t; 2],
    ) {
        for part in 0..2 {
            let sum = &mut sums[(2 * index + part) % chains];
            unsafe { *sum = vfmaq_f32(*sum, a[part], b[part]) };
        }
    }

    #[inline(always)]
    unsafe fn totals<const W: usize>(sums: [[float32x4_t; 4]; W], chains: usize) -> [f32; W] {
        totals(sums, chains)
    }
}

/// Eight sums in all, so that additions wait less for each other, but at most four for each pair of rows.
#[inline(always)]
pub(super) fn chains(pairs: usize) -> usize {
    (8 / pairs).clamp(1, 4)
}

/// For each of `W` rows the sum of the lanes of its first sums, each `(0 + 1) + (2 + 3)` whatever `W` is.
#[inline(always)]
pub(super) fn totals<const W: usize>(sums: [[float32x4_t; 4]; W], chains: usize) -> [f32; W] {
    let mut totals = [0.0; W];
    // SAFETY: every caller has NEON; four numbers are written where there are four.
    unsafe {
        let mut lanes = [vdupq_n_f32(0.0); W];
        for w in 0..W {
            lanes[w] = sums[w][0];
            for sum in &sums[w][1..chains] {
                lanes[w] = vaddq_f32(lanes[w], *sum);
            }
        }
        if W == 4 {
            let all = vpaddq_f32(
                vpaddq_f32(lanes[0], lanes[1]),
                vpaddq_f32(lanes[2], lanes[3]),
            );
            vst1q_f32(totals.as_mut_ptr(), all);
        } else {
            for w in 0..W {
                totals[w] = vaddvq_f32(lanes[w]);
            }
        }
    }
    totals
}

/// Eight numbers of half precision, or in bfloat16.
#[inline(always)]
pub(super) fn widen<const HALF: bool>(words: uint16x8_t) -> [float32x4_t; 2] {
    // SAFETY: every caller has NEON.
    unsafe {
        if HALF {
            let words = vreinterpretq_f16_u16(words);
            return [vcvt_f32_f16(vget_low_f16(words)), vcvt_high_f32_f16(words)];
        }
        let (low, high) = (
            vshll_n_u16::<16>(vget_low_u16(words)),
            vshll_high_n_u16::<16>(words),
        );
        [vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high)]
    }
}
