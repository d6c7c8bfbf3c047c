//! Loads, and what is asked for ahead of them.

use std::arch::asm;
use std::arch::x86_64::{
    __m256i, __m512, _MM_HINT_T0, _MM_HINT_T1, _mm_prefetch, _mm256_maskz_loadu_epi16,
    _mm512_maskz_loadu_ps,
};

/// The first `count` of 16 numbers, at most 16; zeros for the others.
///
/// # Safety
/// They are there.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn some_floats(at: *const f32, count: usize) -> __m512 {
    // SAFETY: the mask covers no others.
    unsafe { _mm512_maskz_loadu_ps(first_lanes(count), at) }
}

/// The first `count` of 16 words.
///
/// # Safety
/// They are there.
#[inline]
#[target_feature(enable = "avx512bw,avx512vl")]
pub(super) unsafe fn some_words(at: *const u8, count: usize) -> __m256i {
    // SAFETY: the mask covers no others.
    unsafe { _mm256_maskz_loadu_epi16(first_lanes(count), at.cast()) }
}

/// A mask of the first `count` of 16 lanes.
#[inline]
pub(super) fn first_lanes(count: usize) -> u16 {
    if count >= 16 {
        u16::MAX
    } else {
        (1 << count) - 1
    }
}

/// Bytes that are asked for ahead of those that are needed: 128 lines, what memory delivers in some of its latencies.
const AHEAD: usize = 8192;

/// Asks for what lies [`AHEAD`] of a place of a stream to come into the second-level cache. The first level has too few places for
/// lines under way to keep a core's share of memory busy; the second has enough, and the processor by itself does not look as far
/// ahead.
#[inline(always)]
pub(super) fn prefetch(at: *const u8) {
    // SAFETY: nothing is read, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(AHEAD).cast()) };
}

/// Asks for a place to come into the first-level cache.
#[inline(always)]
pub(super) fn near(at: *const u8) {
    // SAFETY: nothing is read, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
}

/// A mask from memory, which takes half the time of one by way of a general register.
///
/// # Safety
/// It is there.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn mask16(at: *const u16) -> u16 {
    let mask: u16;
    // SAFETY: reads two bytes, which are there by the caller's promise.
    unsafe {
        asm!("kmovw {}, word ptr [{}]", out(kreg) mask, in(reg) at, options(pure, readonly, nostack, preserves_flags))
    };
    mask
}
