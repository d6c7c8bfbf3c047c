//! What an adapter adds, `y += scale * h bt`: some columns of some rows stay in registers while the ranks go by.

use std::arch::aarch64::*;
use std::ops::Range;

use super::{BF16, F16, F32, eight, size_of_number, some};
use crate::format::{Dense, Number};
use crate::kernels::disjoint::DisjointRows;

/// Adds an update to some columns of all rows.
///
/// # Safety
/// The outputs are this task's, in the output's memory and written; `h` has `rank` numbers for each row.
#[allow(clippy::too_many_arguments)] // an update's, and a task's
pub(in crate::kernels) unsafe fn add_update(
    bt: &Dense,
    scale: f32,
    h: &[f32],
    rank: usize,
    columns: Range<usize>,
    rows: usize,
    output: DisjointRows<'_>,
) {
    let (size, values): (usize, &[u8]) = (bt.number.bytes(), &bt.values);
    assert!(
        h.len() >= rows * rank && columns.end <= bt.cols && rank * bt.cols * size <= values.len()
    );
    let update = Update {
        values: values.as_ptr(),
        stride: bt.cols * size,
        scale,
        h,
        rank,
        output,
    };
    // SAFETY: the ranks and columns are in the values, as was asserted; the rest is the caller's promise.
    unsafe {
        match bt.number {
            Number::F32 => update.add::<F32>(columns, rows),
            Number::F16 => update.add::<F16>(columns, rows),
            Number::Bf16 => update.add::<BF16>(columns, rows),
        }
    }
}

struct Update<'a> {
    values: *const u8,
    stride: usize,
    scale: f32,
    h: &'a [f32],
    rank: usize,
    output: DisjointRows<'a>,
}

impl Update<'_> {
    /// # Safety
    /// As for [`add_update`].
    unsafe fn add<const N: u8>(&self, columns: Range<usize>, rows: usize) {
        let mut row = 0;
        while row < rows {
            // SAFETY: the caller's promise.
            unsafe {
                row += match rows - row {
                    1 => self.rows::<N, 1, 8>(row, columns.clone()),
                    2..=3 => self.rows::<N, 2, 4>(row, columns.clone()),
                    _ => self.rows::<N, 4, 2>(row, columns.clone()),
                };
            }
        }
    }

    /// `R` rows, `8 C` columns at a time; returns `R`.
    ///
    /// # Safety
    /// As for [`add_update`].
    #[target_feature(enable = "neon")]
    unsafe fn rows<const N: u8, const R: usize, const C: usize>(
        &self,
        row: usize,
        columns: Range<usize>,
    ) -> usize {
        let mut column = columns.start;
        // SAFETY: the caller's promise.
        unsafe {
            while columns.end - column >= 8 * C {
                self.tile::<N, R, C>(row, column);
                column += 8 * C;
            }
            while columns.end - column >= 8 {
                self.tile::<N, R, 1>(row, column);
                column += 8;
            }
            if column < columns.end {
                self.last::<N, R>(row, column, columns.end - column);
            }
        }
        R
    }

    /// # Safety
    /// As for [`add_update`]; `8 C` columns are there.
    #[inline]
    #[target_feature(enable = "neon")]
    #[allow(clippy::needless_range_loop)] // loops over constants, which become straight code on registers
    unsafe fn tile<const N: u8, const R: usize, const C: usize>(&self, row: usize, column: usize) {
        let out: [*mut f32; R] = std::array::from_fn(|i| self.output.at(row + i, column));
        let mut sums = [[[vdupq_n_f32(0.0); 2]; C]; R];
        // SAFETY: the caller's promise.
        unsafe {
            for i in 0..R {
                for c in 0..C {
                    sums[i][c] = eight::<F32>(out[i].add(8 * c).cast());
                }
            }
            for rank in 0..self.rank {
                let h: [f32; R] =
                    std::array::from_fn(|i| self.scale * self.h[(row + i) * self.rank + rank]);
                for c in 0..C {
                    let at = self
                        .values
                        .add(rank * self.stride + (column + 8 * c) * size_of_number(N));
                    let numbers = eight::<N>(at);
                    for i in 0..R {
                        for half in 0..2 {
                            sums[i][c][half] = vfmaq_n_f32(sums[i][c][half], numbers[half], h[i]);
                        }
                    }
                }
            }
            for i in 0..R {
                for c in 0..C {
                    for half in 0..2 {
                        vst1q_f32(out[i].add(8 * c + 4 * half), sums[i][c][half]);
                    }
                }
            }
        }
    }

    /// The last `count` columns, fewer than eight.
    ///
    /// # Safety
    /// As for [`add_update`]; as many columns are there.
    #[target_feature(enable = "neon")]
    unsafe fn last<const N: u8, const R: usize>(&self, row: usize, column: usize, count: usize) {
        for i in 0..R {
            // SAFETY: the caller's promise.
            unsafe {
                let out = self.output.row(row + i, column..column + count);
                let mut sums = some::<F32>(out.as_ptr().cast(), count);
                for rank in 0..self.rank {
                    let at = self
                        .values
                        .add(rank * self.stride + column * size_of_number(N));
                    let (numbers, h) = (
                        some::<N>(at, count),
                        self.scale * self.h[(row + i) * self.rank + rank],
                    );
                    sums = [
                        vfmaq_n_f32(sums[0], numbers[0], h),
                        vfmaq_n_f32(sums[1], numbers[1], h),
                    ];
                }
                let mut all = [0.0; 8];
                vst1q_f32(all.as_mut_ptr(), sums[0]);
                vst1q_f32(all.as_mut_ptr().add(4), sums[1]);
                out.copy_from_slice(&all[..count]);
            }
        }
    }
}
