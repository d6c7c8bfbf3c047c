//! AVX2 with FMA, F16C and BMI: one file for each family of formats.
//!
//! There is no instruction that expands what is packed: sparse weights go by tables, eight columns for each byte of their bits. All
//! functions here need the features that `Level::detect` asks for before it gives the level.

mod dense;
mod int4;
mod sparse16;
mod sparse_int4;
mod units;
mod words;

use std::arch::x86_64::*;
use std::ops::Range;

use super::disjoint::DisjointRows;
use super::input::{BLOCK, Input, Order};
use crate::format::Body;

/// Rows of inputs at a time.
const ROWS: usize = 4;

/// Rows of inputs from which on a row of a weight is unpacked once for all of them.
const MANY: usize = 3;

/// The order in which packed codes want so many rows of inputs.
pub(super) fn packed_order(bits: u8, rows: usize) -> Order {
    // Those of 4 bits multiply as bytes, unpacked again for each row.
    if bits == 4 && rows < MANY {
        Order::EvenOdd
    } else {
        Order::Words
    }
}

/// Numbers of scratch memory for a thread.
pub(super) fn scratch_floats(rows: usize, inputs: usize, units: usize) -> usize {
    // A row of the weight, as numbers, or as words of half their size beside what is known of units.
    let row = if rows >= MANY {
        inputs.next_multiple_of(BLOCK)
    } else {
        0
    };
    row.max(row / 2 + units::floats(units))
}

/// Products of the inputs with some rows of a weight. False where there is no kernel for it.
///
/// # Safety
/// The processor has the features, the outputs are this task's and in the output's memory.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,popcnt,lzcnt")]
pub(super) unsafe fn multiply(
    weight: &Body,
    unit: Option<usize>,
    rows: Range<usize>,
    input: &Input<'_>,
    output: DisjointRows<'_>,
    scratch: &mut [f32],
) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        match (weight, unit) {
            (Body::Dense(weight), _) => dense::multiply(weight, rows, input, output),
            (Body::Sparse16(weight), _) => sparse16::multiply(weight, rows, input, output, scratch),
            (Body::Int(weight), Some(unit)) => match packed_order(weight.bits(), input.rows) {
                Order::EvenOdd => int4::multiply(weight, unit, rows, input, output, scratch),
                _ => words::multiply(weight, unit, rows, input, output, scratch),
            },
            (Body::SparseInt4(weight), Some(unit)) => {
                sparse_int4::multiply(weight, unit, rows, input, output, scratch);
            }
            _ => return false,
        }
    }
    true
}

#[inline]
#[target_feature(enable = "avx")]
fn sum_of(lanes: __m256) -> f32 {
    let four = _mm_add_ps(
        _mm256_castps256_ps128(lanes),
        _mm256_extractf128_ps::<1>(lanes),
    );
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// A byte of the bits. Volatile, so that it is read by itself: compilers see that bytes are a word's, and shift them out of it, which
/// takes three instructions for each.
///
/// # Safety
/// It is there.
#[inline(always)]
unsafe fn byte_at(at: *const u8) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { u64::from(at.read_volatile()) }
}
