//! Masked loads and prefetches.

use std::arch::asm;
use std::arch::x86_64::{
    __m256i, __m512, _MM_HINT_T0, _MM_HINT_T1, _mm_prefetch, _mm256_maskz_loadu_epi16,
    _mm512_maskz_loadu_ps,
};

/// Loads the first `count` of 16 numbers, at most 16. The others are zero.
///
/// # Safety
/// The numbers must be readable.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn some_floats(at: *const f32, count: usize) -> __m512 {
    // SAFETY: the mask covers only the first `count` numbers.
    unsafe { _mm512_maskz_loadu_ps(first_lanes(count), at) }
}

/// Loads the first `count` of 16 words.
///
/// # Safety
/// The words must be readable.
#[inline]
#[target_feature(enable = "avx512bw,avx512vl")]
pub(super) unsafe fn some_words(at: *const u8, count: usize) -> __m256i {
    // SAFETY: the mask covers only the first `count` words.
    unsafe { _mm256_maskz_loadu_epi16(first_lanes(count), at.cast()) }
}

/// Returns a mask of the first `count` of 16 lanes.
#[inline]
pub(super) fn first_lanes(count: usize) -> u16 {
    if count >= 16 {
        u16::MAX
    } else {
        (1 << count) - 1
    }
}

/// Prefetch distance in bytes: 128 lines, the amount that memory delivers within a few latencies.
const AHEAD: usize = 8192;

/// Prefetches the bytes that are [`AHEAD`] of a position of a stream into the second-level cache.
/// The first-level cache cannot track enough outstanding lines to use a core's share of the memory
/// bandwidth; the second-level cache can, and the hardware prefetcher does not look that far ahead.
#[inline(always)]
pub(super) fn prefetch(at: *const u8) {
    // SAFETY: a prefetch does not access memory, so any address is allowed.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(AHEAD).cast()) };
}

/// Prefetches an address into the first-level cache.
#[inline(always)]
pub(super) fn near(at: *const u8) {
    // SAFETY: a prefetch does not access memory, so any address is allowed.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
}

/// Loads a mask directly from memory, which takes half the time of a load through a general
/// register.
///
/// # Safety
/// The mask must be readable.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn mask16(at: *const u16) -> u16 {
    let mask: u16;
    // SAFETY: the instruction reads two bytes, which are readable as the caller guarantees.
    unsafe {
        asm!("kmovw {}, word ptr [{}]", out(kreg) mask, in(reg) at, options(pure, readonly, nostack, preserves_flags))
    };
    mask
}
