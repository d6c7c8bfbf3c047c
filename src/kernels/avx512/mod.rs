//! AVX-512 with VNNI, VBMI and VBMI2: one file for each family of formats.
//!
//! A few rows of the weight go at a time with a few of the inputs. All functions here need the features that `Level::detect` asks for
//! before it gives the level.

mod dense;
mod int;
mod int4;
pub(super) mod panel;
mod sparse16;
mod sparse_int4;
mod units;

use std::arch::asm;
use std::arch::x86_64::{
    __m256i, __m512, _MM_HINT_T0, _MM_HINT_T1, _mm_prefetch, _mm256_maskz_loadu_epi16,
    _mm512_maskz_loadu_ps,
};
use std::ops::Range;

use super::disjoint::DisjointRows;
use super::input::{Input, Order};
use crate::format::Body;

/// Rows of a weight and of inputs at a time, at most.
pub(super) const ROWS: usize = 4;

/// Inputs that do not stay in the first-level cache beside what streams past them. A row of as many is read once for [`ROWS`] rows of the
/// weight, a quarter of a task apart, so that what memory reads ahead is needed.
pub(super) const LONG: usize = 6144;

/// Rows of inputs from which on a weight is unpacked for all of them.
pub(super) const MANY: usize = 9;

/// The order in which packed codes want so many rows of inputs.
pub(super) fn packed_order(bits: u8, rows: usize) -> Order {
    if bits == 4 && rows < MANY {
        Order::EvenOdd
    } else {
        Order::InOrder
    }
}

/// Numbers of scratch memory for a thread.
pub(super) fn scratch_floats(rows: usize, inputs: usize, units: usize) -> usize {
    if rows >= MANY {
        panel::floats(inputs, units)
    } else {
        units::floats(units)
    }
}

/// Products of the inputs with some rows of a weight. False where there is no kernel for it.
///
/// # Safety
/// The processor has the features, the outputs are this task's and in the output's memory.
#[target_feature(
    enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,f16c,bmi1,bmi2,popcnt,lzcnt"
)]
pub(super) unsafe fn multiply(
    weight: &Body,
    unit: Option<usize>,
    rows: Range<usize>,
    input: &Input<'_>,
    output: DisjointRows<'_>,
    scratch: &mut [f32],
) -> bool {
    if input.rows >= MANY {
        // SAFETY: the caller's promise.
        return unsafe { panel::multiply(weight, unit, rows, input, output, scratch) };
    }
    // SAFETY: the caller's promise.
    unsafe {
        match (weight, unit) {
            (Body::Dense(weight), _) => dense::multiply(weight, rows, input, output),
            (Body::Sparse16(weight), _) => sparse16::multiply(weight, rows, input, output),
            (Body::Int(weight), Some(unit)) if weight.bits() != 4 => {
                int::multiply(weight, unit, rows, input, output, scratch);
            }
            (Body::Int(weight), Some(unit)) => {
                int4::multiply(weight, unit, rows, input, output, scratch)
            }
            (Body::SparseInt4(weight), Some(unit)) => {
                sparse_int4::multiply(weight, unit, rows, input, output, scratch)
            }
            _ => return false,
        }
    }
    true
}

/// The first `count` of 16 numbers, at most 16; zeros for the others.
///
/// # Safety
/// They are there.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn some_floats(at: *const f32, count: usize) -> __m512 {
    // SAFETY: the mask covers no others.
    unsafe { _mm512_maskz_loadu_ps(first_lanes(count), at) }
}

/// The first `count` of 16 words.
///
/// # Safety
/// They are there.
#[inline]
#[target_feature(enable = "avx512bw,avx512vl")]
unsafe fn some_words(at: *const u8, count: usize) -> __m256i {
    // SAFETY: the mask covers no others.
    unsafe { _mm256_maskz_loadu_epi16(first_lanes(count), at.cast()) }
}

/// A mask of the first `count` of 16 lanes.
#[inline]
fn first_lanes(count: usize) -> u16 {
    if count >= 16 {
        u16::MAX
    } else {
        (1 << count) - 1
    }
}

/// Bytes that are asked for ahead of those that are needed: 128 lines, what memory delivers in some of its latencies.
const AHEAD: usize = 8192;

/// Asks for what lies [`AHEAD`] of a place of a stream to come into the second-level cache. The first level has too few places for lines
/// under way to keep a core's share of memory busy; the second has enough, and the processor by itself does not look as far ahead.
#[inline(always)]
fn prefetch(at: *const u8) {
    // SAFETY: nothing is read, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(AHEAD).cast()) };
}

/// Asks for a place to come into the first-level cache.
#[inline(always)]
fn near(at: *const u8) {
    // SAFETY: nothing is read, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
}

/// A mask from memory, which takes half the time of one by way of a general register.
///
/// # Safety
/// It is there.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn mask16(at: *const u16) -> u16 {
    let mask: u16;
    // SAFETY: reads two bytes, which are there by the caller's promise.
    unsafe {
        asm!("kmovw {}, word ptr [{}]", out(kreg) mask, in(reg) at, options(pure, readonly, nostack, preserves_flags))
    };
    mask
}

/// Calls a function that computes some rows of the weight with 1, 2 or 4 of inputs, for all rows of both: `$one` rows of the weight
/// where there is one of inputs, `$some` where there are more, and one by one what is left.
macro_rules! for_tiles {
    ($rows:expr, $inputs:expr, $one:literal x 1, $some:literal x 4, |$row:ident, $first:ident| $tile:ident($($arg:expr),* $(,)?)) => {{
        let (rows, inputs): (std::ops::Range<usize>, usize) = ($rows, $inputs);
        let most = if inputs == 1 { $one } else { $some };
        let mut $row = rows.start;
        while $row < rows.end {
            let whole = rows.end - $row >= most;
            let mut $first = 0;
            while $first < inputs {
                let left = inputs - $first;
                match (whole, left) {
                    (true, 1) if inputs == 1 => $tile::<$one, 1>($($arg),*),
                    (true, 1) => $tile::<$some, 1>($($arg),*),
                    (true, 2..=3) => $tile::<$some, 2>($($arg),*),
                    (true, _) => $tile::<$some, 4>($($arg),*),
                    (false, 1) => $tile::<1, 1>($($arg),*),
                    (false, 2..=3) => $tile::<1, 2>($($arg),*),
                    (false, _) => $tile::<1, 4>($($arg),*),
                }
                $first += match left { 1 => 1, 2..=3 => 2, _ => 4 };
            }
            $row += if whole { most } else { 1 };
        }
    }};
}
use for_tiles;
