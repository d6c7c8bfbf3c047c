//! Eight numbers in a register.

use std::arch::x86_64::*;

use crate::format::Number;
use crate::kernels::linear::lanes::Lanes;
use crate::kernels::linear::tiles::features;
use crate::kernels::number::Stored;

/// AVX2 with FMA, F16C and BMI.
pub(in crate::kernels) struct Avx2;

features!(Avx2, "avx2,fma,f16c,bmi1,bmi2,popcnt,lzcnt");

impl Lanes for Avx2 {
    type Vector = __m256;
    type Group = __m256;

    const COLUMNS: usize = 8;
    const ONE: usize = 1;
    const MORE: usize = 1;

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: the caller's promise, here and below.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        unsafe { _mm256_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load<T: Stored>(at: *const u8) -> __m256 {
        unsafe {
            match T::NUMBER {
                Number::F32 => _mm256_loadu_ps(at.cast()),
                Number::F16 => widen::<true>(_mm_loadu_si128(at.cast())),
                Number::Bf16 => widen::<false>(_mm_loadu_si128(at.cast())),
            }
        }
    }

    #[inline(always)]
    unsafe fn store(at: *mut f32, group: __m256) {
        unsafe { _mm256_storeu_ps(at, group) };
    }

    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, sum: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, sum) }
    }

    #[inline(always)]
    fn chains(_pairs: usize) -> usize {
        2
    }

    #[inline(always)]
    unsafe fn add_products(
        sums: &mut [__m256; 4],
        chains: usize,
        index: usize,
        a: __m256,
        b: __m256,
    ) {
        let sum = &mut sums[index % chains];
        unsafe { *sum = _mm256_fmadd_ps(a, b, *sum) };
    }

    #[inline(always)]
    unsafe fn totals<const W: usize>(sums: [[__m256; 4]; W], _chains: usize) -> [f32; W] {
        let mut totals = [0.0; W];
        for (total, [a, b, ..]) in totals.iter_mut().zip(sums) {
            unsafe { *total = sum_of(_mm256_add_ps(a, b)) };
        }
        totals
    }
}

/// Eight numbers of half precision, or in bfloat16.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn widen<const HALF: bool>(words: __m128i) -> __m256 {
    if HALF {
        _mm256_cvtph_ps(words)
    } else {
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words)))
    }
}

#[inline]
#[target_feature(enable = "avx")]
pub(super) fn sum_of(lanes: __m256) -> f32 {
    let four = _mm_add_ps(
        _mm256_castps256_ps128(lanes),
        _mm256_extractf128_ps::<1>(lanes),
    );
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}
