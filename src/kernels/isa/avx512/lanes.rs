//! Sixteen numbers in a register.

use std::arch::x86_64::*;

use super::loads::{first_lanes, prefetch, some_floats, some_words};
use crate::format::Number;
use crate::kernels::linear::lanes::Lanes;
use crate::kernels::linear::tiles::features;
use crate::kernels::number::Stored;

/// AVX-512 with VNNI, VBMI and VBMI2.
pub(in crate::kernels) struct Avx512;

features!(
    Avx512,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,f16c,bmi1,bmi2,popcnt,lzcnt"
);

/// Inputs that do not stay in the first-level cache beside what streams past them.
pub(super) const LONG: usize = 6144;

impl Lanes for Avx512 {
    type Vector = __m512;
    type Group = __m512;

    const COLUMNS: usize = 16;
    const ONE: usize = 1;
    const MORE: usize = 4;
    const LONG: usize = LONG;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: the caller's promise, here and below.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load<T: Stored>(at: *const u8) -> __m512 {
        unsafe {
            match T::NUMBER {
                Number::F32 => _mm512_loadu_ps(at.cast()),
                Number::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())),
                Number::Bf16 => from_bf16(_mm256_loadu_si256(at.cast())),
            }
        }
    }

    #[inline(always)]
    unsafe fn load_some<T: Stored>(at: *const u8, count: usize) -> __m512 {
        unsafe {
            match T::NUMBER {
                Number::F32 => some_floats(at.cast(), count),
                Number::F16 => _mm512_cvtph_ps(some_words(at, count)),
                Number::Bf16 => from_bf16(some_words(at, count)),
            }
        }
    }

    #[inline(always)]
    unsafe fn store(at: *mut f32, group: __m512) {
        unsafe { _mm512_storeu_ps(at, group) };
    }

    #[inline(always)]
    unsafe fn store_some(at: *mut f32, count: usize, group: __m512) {
        unsafe { _mm512_mask_storeu_ps(at, first_lanes(count), group) };
    }

    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, sum: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, sum) }
    }

    #[inline(always)]
    fn chains(_pairs: usize) -> usize {
        2
    }

    #[inline(always)]
    unsafe fn add_products(
        sums: &mut [__m512; 4],
        chains: usize,
        index: usize,
        a: __m512,
        b: __m512,
    ) {
        let sum = &mut sums[index % chains];
        unsafe { *sum = _mm512_fmadd_ps(a, b, *sum) };
    }

    #[inline(always)]
    unsafe fn totals<const W: usize>(sums: [[__m512; 4]; W], _chains: usize) -> [f32; W] {
        let mut totals = [0.0; W];
        for (total, [a, b, ..]) in totals.iter_mut().zip(sums) {
            unsafe { *total = _mm512_reduce_add_ps(_mm512_add_ps(a, b)) };
        }
        totals
    }

    #[inline(always)]
    fn prefetch(at: *const u8) {
        prefetch(at);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn from_bf16(words: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words)))
}
