//! NEON, as every 64-bit Arm processor with floating-point numbers has it; and, where there are some, the dot products of bytes (`sdot`).
//!
//! A few rows of the weight go at a time with a few of the inputs. What is sparse is put at its columns by `tbl`, which a table of 256
//! tells for each byte of the mask which stored number belongs to which of eight columns.
//!
//! Functions without a target feature of their own are inlined into ones that have it, or need none but NEON.

mod codes;
mod dense;
mod expand;
mod packed;
mod panel;
mod sparse16;
mod sparse_int4;
mod units;
mod update;

use std::arch::aarch64::*;
use std::ops::Range;

pub(super) use update::add_update;

use super::disjoint::DisjointRows;
use super::input::Input;
use crate::format::Body;

/// Rows of inputs from which on a weight is unpacked for all of them.
pub(super) const MANY: usize = 9;
/// Outputs of a task where there are many rows.
pub(super) const WIDTH: usize = 32;

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// Numbers of scratch memory for a thread.
pub(super) fn scratch_floats(rows: usize, inputs: usize, units: usize) -> usize {
    if rows >= MANY {
        panel::floats(inputs, units)
    } else {
        units::floats(units)
    }
}

/// Products of the inputs with some rows of a weight; `dots` says whether the processor has `sdot`. False where there is no kernel for it.
///
/// # Safety
/// The processor has the features, the outputs are this task's and in the output's memory.
pub(super) unsafe fn multiply(
    dots: bool,
    weight: &Body,
    unit: Option<usize>,
    rows: Range<usize>,
    input: &Input<'_>,
    output: DisjointRows<'_>,
    scratch: &mut [f32],
) -> bool {
    let many = input.rows >= MANY;
    // SAFETY: the caller's promise.
    unsafe {
        match (weight, unit) {
            (Body::Dense(weight), _) if many => panel::dense(weight, rows, input, output, scratch),
            (Body::Dense(weight), _) => dense::multiply(weight, rows, input, output),
            (Body::Sparse16(weight), _) if many => {
                panel::sparse(weight, rows, input, output, scratch)
            }
            (Body::Sparse16(weight), _) => sparse16::multiply(weight, rows, input, output),
            (Body::Int(weight), Some(unit)) => {
                macro_rules! of {
                    ($bits:literal) => {{
                        let source = packed::Packed::<$bits>::new(weight, rows.end, input);
                        codes::multiply(
                            dots,
                            source,
                            weight.whole_grid(),
                            unit,
                            rows,
                            input,
                            output,
                            scratch,
                        );
                    }};
                }
                match weight.bits() {
                    2 => of!(2),
                    3 => of!(3),
                    4 => of!(4),
                    8 => of!(8),
                    _ => return false,
                }
            }
            (Body::SparseInt4(weight), Some(unit)) => {
                let source = sparse_int4::Sparse::new(weight, unit, rows.end, input);
                codes::multiply(
                    dots,
                    source,
                    &weight.grid,
                    unit,
                    rows,
                    input,
                    output,
                    scratch,
                );
            }
            _ => return false,
        }
    }
    true
}

/// Eight numbers.
///
/// # Safety
/// They are there.
#[inline(always)]
unsafe fn eight<const N: u8>(at: *const u8) -> [float32x4_t; 2] {
    // SAFETY: the caller's promise; these loads need no alignment.
    unsafe {
        match N {
            F32 => [vld1q_f32(at.cast()), vld1q_f32(at.add(16).cast())],
            F16 => widen::<true>(vld1q_u16(at.cast())),
            _ => widen::<false>(vld1q_u16(at.cast())),
        }
    }
}

/// The first `count` of eight numbers, at most eight, and zeros for the others.
///
/// # Safety
/// They are there.
#[inline(always)]
unsafe fn some<const N: u8>(at: *const u8, count: usize) -> [float32x4_t; 2] {
    let mut bytes = [0_u8; 32];
    // SAFETY: the caller's promise, and eight numbers have at most 32 bytes.
    unsafe {
        std::ptr::copy_nonoverlapping(at, bytes.as_mut_ptr(), count.min(8) * size_of_number(N));
        eight::<N>(bytes.as_ptr())
    }
}

#[inline(always)]
const fn size_of_number(number: u8) -> usize {
    if number == F32 { 4 } else { 2 }
}

/// Eight numbers of half precision, or in bfloat16.
#[inline(always)]
fn widen<const HALF: bool>(words: uint16x8_t) -> [float32x4_t; 2] {
    // SAFETY: NEON is there, or nobody would call.
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

/// The sums of the lanes of `W` vectors, each `(0 + 1) + (2 + 3)` whatever `W` is.
#[inline(always)]
fn sums_of<const W: usize>(lanes: [float32x4_t; W]) -> [f32; W] {
    let mut sums = [0.0; W];
    // SAFETY: NEON is there, or nobody would call; four numbers are written where there are four.
    unsafe {
        if W == 4 {
            let all = vpaddq_f32(
                vpaddq_f32(lanes[0], lanes[1]),
                vpaddq_f32(lanes[2], lanes[3]),
            );
            vst1q_f32(sums.as_mut_ptr(), all);
        } else {
            for w in 0..W {
                sums[w] = vaddvq_f32(lanes[w]);
            }
        }
    }
    sums
}

/// Calls the method `tile` of what computes some rows of the weight with 1, 2 or 4 of inputs, for all rows of both: `$one` rows of the
/// weight where there is one of inputs, `$some` where there are more, and one by one what is left. Tasks begin at multiples of 16 rows, so
/// that a row is in the same tile whoever computes it.
macro_rules! for_tiles {
    ($rows:expr, $inputs:expr, $one:literal x 1, $some:literal x 4, |$row:ident, $first:ident| $tile:ident($($arg:tt),* $(,)?)) => {{
        let (rows, inputs): (std::ops::Range<usize>, usize) = ($rows, $inputs);
        let most = if inputs == 1 { $one } else { $some };
        let mut $row = rows.start;
        while $row < rows.end {
            let whole = rows.end - $row >= most;
            let mut $first = 0;
            while $first < inputs {
                let left = inputs - $first;
                match (whole, left) {
                    (true, 1) if inputs == 1 => $tile!($one, 1, $($arg),*),
                    (true, 1) => $tile!($some, 1, $($arg),*),
                    (true, 2..=3) => $tile!($some, 2, $($arg),*),
                    (true, _) => $tile!($some, 4, $($arg),*),
                    (false, 1) => $tile!(1, 1, $($arg),*),
                    (false, 2..=3) => $tile!(1, 2, $($arg),*),
                    (false, _) => $tile!(1, 4, $($arg),*),
                }
                $first += match left { 1 => 1, 2..=3 => 2, _ => 4 };
            }
            $row += if whole { most } else { 1 };
        }
    }};
}
use for_tiles;
