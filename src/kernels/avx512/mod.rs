//! AVX-512 with VNNI and VBMI2: one file for each family of formats.
//!
//! A few rows of the weight go at a time with a few of the inputs. All functions here need the features that `Level::detect` asks for
//! before it gives the level.

mod dense;
mod int4;
mod sparse16;
mod sparse_int4;
mod units;

use std::arch::asm;
use std::arch::x86_64::{__m256i, __m512, _MM_HINT_T1, _mm_prefetch, _mm256_maskz_loadu_epi16, _mm512_maskz_loadu_ps};
use std::ops::Range;

use super::common::Output;
use super::input::Input;
use crate::format::Body;

/// Rows of a weight and of inputs at a time, at most.
pub(super) const ROWS: usize = 4;

/// Numbers of scratch memory for a thread, for inputs of so many units.
pub(super) fn scratch_floats(units: usize) -> usize {
    units::floats(units)
}

/// Products of the inputs with some rows of a weight. False where there is no kernel for it.
///
/// # Safety
/// The processor has the features, the outputs are this task's and in the output's memory.
#[target_feature(
    enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi2,avx2,fma,f16c,bmi1,bmi2,popcnt,lzcnt"
)]
pub(super) unsafe fn multiply(
    weight: &Body,
    unit: Option<usize>,
    rows: Range<usize>,
    input: &Input<'_>,
    output: Output,
    scratch: &mut [f32],
) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        match (weight, unit) {
            (Body::Dense(weight), _) => dense::multiply(weight, rows, input, output),
            (Body::Sparse16(weight), _) => sparse16::multiply(weight, rows, input, output),
            (Body::Int(weight), Some(unit)) => int4::multiply(weight, unit, rows, input, output, scratch),
            (Body::SparseInt4(weight), Some(unit)) => sparse_int4::multiply(weight, unit, rows, input, output, scratch),
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
    if count >= 16 { u16::MAX } else { (1 << count) - 1 }
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

/// As [`mask16`].
///
/// # Safety
/// It is there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn mask64(at: *const u64) -> u64 {
    let mask: u64;
    // SAFETY: reads eight bytes, which are there by the caller's promise.
    unsafe {
        asm!("kmovq {}, qword ptr [{}]", out(kreg) mask, in(reg) at, options(pure, readonly, nostack, preserves_flags))
    };
    mask
}

/// Calls a function that computes `W` rows of the weight with `R` rows of inputs, for all rows of both.
macro_rules! for_tiles {
    ($rows:expr, $inputs:expr, |$row:ident, $first:ident| $tile:ident($($arg:expr),* $(,)?)) => {{
        let (rows, inputs): (std::ops::Range<usize>, usize) = ($rows, $inputs);
        let most = crate::kernels::avx512::knob("W", 4);
        let mut $row = rows.start;
        while $row < rows.end {
            let some = match rows.end - $row { 4.. if most == 4 => 4, 2.. if most >= 2 => 2, _ => 1 };
            let mut $first = 0;
            while $first < inputs {
                match (some, inputs - $first) {
                    (4.., 1) => { $tile::<4, 1>($($arg),*); $first += 1; }
                    (4.., 2..=3) => { $tile::<4, 2>($($arg),*); $first += 2; }
                    (4.., _) => { $tile::<4, 4>($($arg),*); $first += 4; }
                    (2.., 1) => { $tile::<2, 1>($($arg),*); $first += 1; }
                    (2.., 2..=3) => { $tile::<2, 2>($($arg),*); $first += 2; }
                    (2.., _) => { $tile::<2, 4>($($arg),*); $first += 4; }
                    (_, 1) => { $tile::<1, 1>($($arg),*); $first += 1; }
                    (_, 2..=3) => { $tile::<1, 2>($($arg),*); $first += 2; }
                    (_, _) => { $tile::<1, 4>($($arg),*); $first += 4; }
                }
            }
            $row += some;
        }
    }};
}
use for_tiles;

pub fn knob(name: &str, default: usize) -> usize {
    use std::sync::OnceLock;
    static W: OnceLock<usize> = OnceLock::new();
    static P: OnceLock<usize> = OnceLock::new();
    let c = if name == "W" { &W } else { &P };
    *c.get_or_init(|| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default))
}
