//! Many rows of inputs with a weight of numbers: some columns of 32 rows are unpacked to `f32` once, and stay in a near cache while tiles of
//! products with all inputs run along them.

use std::ops::Range;

use super::dense::tile;
use super::{BF16, F16, F32, WIDTH, codes, eight, size_of_number, some, sparse16};
use crate::format::{Dense, Number, Sparse16};
use crate::kernels::disjoint::DisjointRows;
use crate::kernels::input::Input;
use std::arch::aarch64::*;

/// Columns of a panel, whole words of masks: 32 KiB.
const COLUMNS: usize = 256;

/// Numbers of scratch memory for a thread.
pub(super) fn floats(inputs: usize, units: usize) -> usize {
    codes::panel_floats(inputs, units).max(COLUMNS * WIDTH)
}

/// # Safety
/// As for [`super::multiply`].
pub(super) unsafe fn dense(
    weight: &Dense,
    rows: Range<usize>,
    input: &Input<'_>,
    output: DisjointRows<'_>,
    scratch: &mut [f32],
) {
    let (size, values): (usize, &[u8]) = (weight.number.bytes(), &weight.values);
    let stride = weight.cols * size;
    assert!(rows.end * stride <= values.len() && input.inputs <= weight.cols);
    let panel = &mut scratch[..COLUMNS * WIDTH];
    // SAFETY: rows and columns are in the values, as was asserted; the panel has room for as many; the rest is the caller's promise.
    unsafe {
        for_panels(rows, input, output, |rows, columns| {
            let first = values
                .as_ptr()
                .add(rows.start * stride + columns.start * size);
            match weight.number {
                // As it is.
                Number::F32 => return (first, stride),
                Number::F16 => {
                    copy::<F16>(first, stride, rows.len(), columns.len(), panel.as_mut_ptr())
                }
                Number::Bf16 => {
                    copy::<BF16>(first, stride, rows.len(), columns.len(), panel.as_mut_ptr())
                }
            }
            (panel.as_ptr().cast(), 4 * COLUMNS)
        });
    }
}

/// # Safety
/// As for [`super::multiply`].
pub(super) unsafe fn sparse(
    weight: &Sparse16,
    rows: Range<usize>,
    input: &Input<'_>,
    output: DisjointRows<'_>,
    scratch: &mut [f32],
) {
    assert!(input.inputs <= weight.bits.cols);
    let panel = &mut scratch[..COLUMNS * WIDTH];
    let mut at = [0; WIDTH];
    // SAFETY: the panel has room for rows of whole words; the rest is the caller's promise.
    unsafe {
        for_panels(rows, input, output, |rows, columns| {
            let words = columns.len().div_ceil(64);
            for ((row, at), out) in rows.zip(&mut at).zip(panel.chunks_exact_mut(COLUMNS)) {
                if columns.start == 0 {
                    *at = 2 * weight.offsets.get(row);
                }
                sparse16::spread(
                    weight,
                    row,
                    columns.start,
                    at,
                    &mut out.as_chunks_mut().0[..words],
                );
            }
            (panel.as_ptr().cast(), 4 * COLUMNS)
        });
    }
}

/// Calls `unpack` for some columns after some of each 32 rows, and multiplies what it gives: where numbers of 32 bits are, and how many
/// bytes from one row to the next.
///
/// # Safety
/// As for [`super::multiply`]; the numbers are there.
unsafe fn for_panels(
    rows: Range<usize>,
    input: &Input<'_>,
    output: DisjointRows<'_>,
    mut unpack: impl FnMut(Range<usize>, Range<usize>) -> (*const u8, usize),
) {
    for first in rows.clone().step_by(WIDTH) {
        let rows = first..rows.end.min(first + WIDTH);
        let mut from = 0;
        // At least once, so that outputs are written where no input is active.
        loop {
            let columns = from..input.inputs.min(from + COLUMNS);
            let (panel, stride) = unpack(rows.clone(), columns.clone());
            // SAFETY: the caller's promise.
            unsafe { tiles(panel, stride, rows.clone(), columns, input, output) };
            from += COLUMNS;
            if from >= input.inputs {
                break;
            }
        }
    }
}

/// Products of some columns of all inputs with a panel, set for the first columns and added for others.
///
/// # Safety
/// The panel has the rows and columns, and the outputs are this task's.
unsafe fn tiles(
    panel: *const u8,
    stride: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    input: &Input<'_>,
    output: DisjointRows<'_>,
) {
    macro_rules! tile {
        ($w:literal, $r:literal, $row:expr, $from:expr) => {{
            let x = input
                .values
                .as_ptr()
                .wrapping_add($from * input.stride + columns.start);
            let weight = panel.add(($row - rows.start) * stride);
            let sums = tile::<F32, $w, $r>(weight, stride, x, input.stride, columns.len());
            for (i, sums) in sums.iter().enumerate() {
                let out = output.row($from + i, $row..$row + $w);
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out = if columns.start == 0 { *sum } else { *out + sum };
                }
            }
        }};
    }
    let mut from = 0;
    while from < input.rows {
        let left = input.rows - from;
        let mut row = rows.start;
        while row < rows.end {
            let whole = rows.end - row >= 4;
            // SAFETY: the caller's promise.
            unsafe {
                match (whole, left) {
                    (true, 1) => tile!(4, 1, row, from),
                    (true, 2..=3) => tile!(4, 2, row, from),
                    (true, _) => tile!(4, 4, row, from),
                    (false, 1) => tile!(1, 1, row, from),
                    (false, 2..=3) => tile!(1, 2, row, from),
                    (false, _) => tile!(1, 4, row, from),
                }
            }
            row += if whole { 4 } else { 1 };
        }
        from += match left {
            1 => 1,
            2..=3 => 2,
            _ => 4,
        };
    }
}

/// Some columns of some rows as numbers of 32 bits.
///
/// # Safety
/// They are there, and the panel has room.
#[target_feature(enable = "neon")]
unsafe fn copy<const N: u8>(
    first: *const u8,
    stride: usize,
    rows: usize,
    columns: usize,
    panel: *mut f32,
) {
    for row in 0..rows {
        // SAFETY: the caller's promise; a panel's rows are multiples of eight numbers long.
        unsafe {
            let (from, out) = (first.add(row * stride), panel.add(row * COLUMNS));
            for column in (0..columns).step_by(8) {
                let at = from.add(column * size_of_number(N));
                let left = columns - column;
                let numbers = if left >= 8 {
                    eight::<N>(at)
                } else {
                    some::<N>(at, left)
                };
                vst1q_f32(out.add(column), numbers[0]);
                vst1q_f32(out.add(column + 4), numbers[1]);
            }
        }
    }
}
