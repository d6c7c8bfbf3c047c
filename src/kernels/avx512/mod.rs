//! AVX-512 with VNNI and VBMI2: one file for each family of formats.
//!
//! A few rows of the weight go at a time with a few of the inputs. All functions here need the features that `Level::detect` asks for
//! before it gives the level.

mod dense;
mod int4;
mod sparse16;
mod sparse_int4;
mod units;

use std::arch::x86_64::{__m256i, __m512, _mm256_maskz_loadu_epi16, _mm512_maskz_loadu_ps};
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

/// Calls a function that computes `W` rows of the weight with `R` rows of inputs, for all rows of both.
macro_rules! for_tiles {
    ($rows:expr, $inputs:expr, |$row:ident, $first:ident| $tile:ident($($arg:expr),* $(,)?)) => {{
        let (rows, inputs): (std::ops::Range<usize>, usize) = ($rows, $inputs);
        let mut $row = rows.start;
        while $row < rows.end {
            let left = rows.end - $row;
            let mut $first = 0;
            while $first < inputs {
                match (left, inputs - $first) {
                    (4.., 1) => { $tile::<4, 1>($($arg),*); $first += 1; }
                    (4.., 2..=3) => { $tile::<4, 2>($($arg),*); $first += 2; }
                    (4.., _) => { $tile::<4, 4>($($arg),*); $first += 4; }
                    (_, 1) => { $tile::<1, 1>($($arg),*); $first += 1; }
                    (_, 2..=3) => { $tile::<1, 2>($($arg),*); $first += 2; }
                    (_, _) => { $tile::<1, 4>($($arg),*); $first += 4; }
                }
            }
            $row += if left >= 4 { 4 } else { 1 };
        }
    }};
}
use for_tiles;
