//! Many rows of inputs with a floating-point weight: some columns of 32 rows are unpacked to `f32`
//! once, and stay in a near cache while the tiles of products with all inputs are computed.

use std::marker::PhantomData;
use std::ops::Range;

use super::lanes::Lanes;
use super::{codes, sparse16};
use crate::format::{Dense, Number, Sparse16};
use crate::kernels::linear::dense::Products;
use crate::kernels::linear::lanes::Lanes as _;
use crate::kernels::linear::task::Task;
use crate::kernels::linear::tiles::{Features, Tiles, firsts, for_tiles};
use crate::kernels::number::{Stored, with_type_of};

/// Number of rows of a weight in a panel.
pub(super) const WIDTH: usize = 32;
/// Number of columns of a panel, a multiple of the words of masks: 32 KiB.
const COLUMNS: usize = 256;

/// Returns the count of numbers of scratch memory for a thread.
pub(super) fn floats(inputs: usize, units: usize) -> usize {
    codes::panel_floats(inputs, units).max(COLUMNS * WIDTH)
}

/// # Safety
/// As for [`multiply`](crate::kernels::linear::task::Kernels::multiply).
pub(super) unsafe fn dense(weight: &Dense, task: Task<'_>, scratch: &mut [f32]) {
    let (size, values): (usize, &[u8]) = (weight.number.bytes(), &weight.values);
    let stride = weight.cols * size;
    assert!(task.rows.end * stride <= values.len() && task.input.inputs <= weight.cols);
    let panel = &mut scratch[..COLUMNS * WIDTH];
    // SAFETY: rows and columns are within the values, as asserted above, and the panel has room for
    // them; the caller guarantees the rest.
    unsafe {
        for_panels(task, |rows, columns| {
            let first = values
                .as_ptr()
                .add(rows.start * stride + columns.start * size);
            if weight.number == Number::F32 {
                // `f32` weights are used in place.
                return (first, stride);
            }
            let out = panel.as_mut_ptr();
            with_type_of!(weight.number, T => copy::<T>(first, stride, rows.len(), columns.len(), out));
            (out.cast_const().cast(), 4 * COLUMNS)
        });
    }
}

/// # Safety
/// As for [`multiply`](crate::kernels::linear::task::Kernels::multiply).
pub(super) unsafe fn sparse(weight: &Sparse16, task: Task<'_>, scratch: &mut [f32]) {
    assert!(task.input.inputs <= weight.bits.cols);
    let panel = &mut scratch[..COLUMNS * WIDTH];
    let mut at = [0; WIDTH];
    // SAFETY: the panel has room for rows of whole words; the caller guarantees the rest.
    unsafe {
        for_panels(task, |rows, columns| {
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

/// For each 32 rows, calls `unpack` for one range of columns after another and multiplies the
/// numbers that it returns: a pointer to 32-bit numbers, and the distance between rows in bytes.
///
/// # Safety
/// As for [`multiply`](crate::kernels::linear::task::Kernels::multiply), and the numbers must
/// exist.
unsafe fn for_panels(
    task: Task<'_>,
    mut unpack: impl FnMut(Range<usize>, Range<usize>) -> (*const u8, usize),
) {
    let input = task.input;
    for first in task.rows.clone().step_by(WIDTH) {
        let rows = first..task.rows.end.min(first + WIDTH);
        let mut from = 0;
        // Run at least once, so that outputs are written even if no input is active.
        loop {
            let columns = from..input.inputs.min(from + COLUMNS);
            let (first, stride) = unpack(rows.clone(), columns.clone());
            let panel = Panel {
                first,
                stride,
                base: rows.start,
                columns,
                task: &task,
            };
            // SAFETY: the caller upholds this function's contract.
            unsafe { for_tiles(&panel, rows.clone(), input) };
            from += COLUMNS;
            if from >= input.inputs {
                break;
            }
        }
    }
}

/// Some columns of the rows from `base` on. The products of the first columns are stored, and those
/// of later columns are added.
struct Panel<'a> {
    first: *const u8,
    /// Distance between rows, in bytes.
    stride: usize,
    base: usize,
    columns: Range<usize>,
    task: &'a Task<'a>,
}

impl Tiles for Panel<'_> {
    const ONE: usize = 4;
    const MORE: usize = 4;

    #[inline(always)]
    unsafe fn tile<const W: usize, const R: usize>(
        &self,
        rows: Range<usize>,
        apart: usize,
        from: usize,
    ) {
        let Task { input, output, .. } = self.task;
        let start = self.columns.start;
        for row in firsts::<W>(rows, apart) {
            // SAFETY: the caller upholds this function's contract.
            unsafe {
                let products = Lanes::run(Products::<f32, W, R> {
                    weight: self.first.add((row - self.base) * self.stride),
                    stride: self.stride,
                    x: input
                        .values
                        .as_ptr()
                        .wrapping_add(from * input.stride + start),
                    x_stride: input.stride,
                    count: self.columns.len(),
                    of: PhantomData,
                });
                for (i, products) in products.iter().enumerate() {
                    let out = output.row(from + i, row..row + W);
                    for (out, product) in out.iter_mut().zip(products) {
                        *out = if start == 0 { *product } else { *out + product };
                    }
                }
            }
        }
    }
}

/// Copies some columns of some rows as 32-bit numbers.
///
/// # Safety
/// The columns must exist, and the panel must have room for them.
#[target_feature(enable = "neon")]
unsafe fn copy<T: Stored>(
    first: *const u8,
    stride: usize,
    rows: usize,
    columns: usize,
    panel: *mut f32,
) {
    for row in 0..rows {
        // SAFETY: the caller upholds this function's contract; the length of a panel's rows is a
        // multiple of eight numbers.
        unsafe {
            let (from, out) = (first.add(row * stride), panel.add(row * COLUMNS));
            for column in (0..columns).step_by(Lanes::COLUMNS) {
                let at = from.add(column * size_of::<T>());
                let left = columns - column;
                let numbers = if left >= Lanes::COLUMNS {
                    Lanes::load::<T>(at)
                } else {
                    Lanes::load_some::<T>(at, left)
                };
                Lanes::store(out.add(column), numbers);
            }
        }
    }
}
