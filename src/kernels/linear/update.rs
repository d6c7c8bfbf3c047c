//! What an adapter adds to a few rows, `y += scale * h bt`: some columns of some rows stay in registers while the ranks go by.

use std::marker::PhantomData;
use std::ops::Range;

use super::lanes::Lanes;
use super::task::{Task, Update};
use super::tiles::Work;
use crate::kernels::disjoint::DisjointRows;
use crate::kernels::number::{Stored, with_type_of};

/// Adds an update to the outputs of a task.
///
/// # Safety
/// The processor has the features of `L`; the outputs are this task's, in the output's memory and written.
///
/// # Panics
/// Where the update has not the rows or columns.
pub(in crate::kernels) unsafe fn add<L: Lanes>(update: &Update<'_>, task: Task<'_>) {
    let Task {
        rows: columns,
        input,
        output,
    } = task;
    let stride = update.stride(input.rows, &columns);
    with_type_of!(update.bt.number, T => {
        let first = update.bt.values.as_ptr();
        let add = Add::<T> { update, first, stride, columns, output, of: PhantomData };
        let mut row = 0;
        while row < input.rows {
            // SAFETY: ranks and columns are there, as `stride` checked; the rest is the caller's promise.
            unsafe {
                row += match input.rows - row {
                    1 => L::run(Some::<T, 1, 8> { add: &add, row }),
                    2..=3 => L::run(Some::<T, 2, 4> { add: &add, row }),
                    _ => L::run(Some::<T, 4, 2> { add: &add, row }),
                };
            }
        }
    });
}

struct Add<'a, T> {
    update: &'a Update<'a>,
    /// The first column of the first rank.
    first: *const u8,
    stride: usize,
    columns: Range<usize>,
    output: DisjointRows<'a>,
    of: PhantomData<T>,
}

impl<T: Stored> Add<'_, T> {
    /// The factor of a rank in a row.
    #[inline(always)]
    fn factor(&self, row: usize, rank: usize) -> f32 {
        self.update.scale * self.update.h[row * self.update.rank + rank]
    }

    /// # Safety
    /// The caller has the features of `L`, into which this is inlined; `C` groups of columns are there.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // loops over constants, which become straight code on registers
    unsafe fn tile<L: Lanes, const R: usize, const C: usize>(&self, row: usize, column: usize) {
        let out: [*mut f32; R] = std::array::from_fn(|i| self.output.at(row + i, column));
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[L::splat(0.0); C]; R];
            for i in 0..R {
                for c in 0..C {
                    sums[i][c] = L::load::<f32>(out[i].add(c * L::COLUMNS).cast());
                }
            }
            let mut at = self.first.add(column * size_of::<T>());
            for rank in 0..self.update.rank {
                let mut factors = [L::splat(0.0); R];
                for i in 0..R {
                    factors[i] = L::splat(self.factor(row + i, rank));
                }
                for c in 0..C {
                    let numbers = L::load::<T>(at.add(c * L::COLUMNS * size_of::<T>()));
                    for i in 0..R {
                        sums[i][c] = L::fma(numbers, factors[i], sums[i][c]);
                    }
                }
                at = at.wrapping_add(self.stride);
            }
            for i in 0..R {
                for c in 0..C {
                    L::store(out[i].add(c * L::COLUMNS), sums[i][c]);
                }
            }
        }
    }

    /// The last `count` columns, fewer than a group.
    ///
    /// # Safety
    /// As for [`tile`](Self::tile).
    #[inline(always)]
    unsafe fn last<L: Lanes>(&self, row: usize, column: usize, count: usize) {
        let out = self.output.at(row, column);
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = L::load_some::<f32>(out.cast(), count);
            let mut at = self.first.add(column * size_of::<T>());
            for rank in 0..self.update.rank {
                let factor = L::splat(self.factor(row, rank));
                sums = L::fma(L::load_some::<T>(at, count), factor, sums);
                at = at.wrapping_add(self.stride);
            }
            L::store_some(out, count, sums);
        }
    }
}

/// `R` rows from `row` on, `C` groups of columns at a time.
struct Some<'a, T, const R: usize, const C: usize> {
    add: &'a Add<'a, T>,
    row: usize,
}

impl<L: Lanes, T: Stored, const R: usize, const C: usize> Work<L> for Some<'_, T, R, C> {
    /// `R`.
    type Output = usize;

    #[inline(always)]
    unsafe fn run(self) -> usize {
        let Self { add, row } = self;
        let Range { start, end } = add.columns;
        let mut column = start;
        // SAFETY: the caller's promise.
        unsafe {
            while end - column >= C * L::COLUMNS {
                add.tile::<L, R, C>(row, column);
                column += C * L::COLUMNS;
            }
            while end - column >= L::COLUMNS {
                add.tile::<L, R, 1>(row, column);
                column += L::COLUMNS;
            }
            if column < end {
                for row in row..row + R {
                    add.last::<L>(row, column, end - column);
                }
            }
        }
        R
    }
}
