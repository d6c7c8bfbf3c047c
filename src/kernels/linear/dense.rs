//! Products with dense floating-point weights.

use std::marker::PhantomData;
use std::ops::Range;

use super::lanes::Lanes;
use super::task::Task;
use super::tiles::{Tiles, Work, firsts, for_tiles};
use crate::format::Dense;
use crate::kernels::number::{Stored, with_type_of};

/// Number of groups of columns that are processed at a time.
const GROUPS: usize = 2;

/// Computes the products of some rows of a dense weight.
///
/// # Safety
/// The processor must have the features of `L`. The outputs must belong to this task and lie within
/// the output's memory.
///
/// # Panics
/// Panics if the weight has too few rows or columns.
pub(in crate::kernels) unsafe fn multiply<L: Lanes>(weight: &Dense, task: Task<'_>) {
    let stride = weight.cols * weight.number.bytes();
    let values: &[u8] = &weight.values;
    assert!(task.rows.end * stride <= values.len() && task.input.inputs <= weight.cols);
    let first = values.as_ptr();
    with_type_of!(weight.number, T => {
        let rows = Rows::<L, T> { first, stride, task: &task, of: PhantomData };
        // SAFETY: the rows and columns are within the values, as asserted above; the caller
        // guarantees the rest.
        unsafe { for_tiles(&rows, task.rows.clone(), task.input) }
    });
}

struct Rows<'a, L, T> {
    first: *const u8,
    stride: usize,
    task: &'a Task<'a>,
    of: PhantomData<(L, T)>,
}

impl<L: Lanes, T: Stored> Tiles for Rows<'_, L, T> {
    const ONE: usize = L::ONE;
    const MORE: usize = L::MORE;
    const LONG: usize = L::LONG;

    #[inline(always)]
    unsafe fn tile<const W: usize, const R: usize>(
        &self,
        rows: Range<usize>,
        apart: usize,
        from: usize,
    ) {
        let Task { input, output, .. } = self.task;
        for row in firsts::<W>(rows, apart) {
            // SAFETY: the caller upholds this function's contract.
            unsafe {
                let products = L::run(Products::<T, W, R> {
                    weight: self.first.add(row * self.stride),
                    stride: apart * self.stride,
                    x: input.values.as_ptr().wrapping_add(from * input.stride),
                    x_stride: input.stride,
                    count: input.inputs,
                    of: PhantomData,
                });
                for (i, products) in products.into_iter().enumerate() {
                    for (w, product) in products.into_iter().enumerate() {
                        output.set(from + i, row + w * apart, product);
                    }
                }
            }
        }
    }
}

/// The products of `W` rows of numbers with `R` rows of inputs, as an array over the rows of
/// inputs. Each row has `count` numbers.
pub(in crate::kernels) struct Products<T, const W: usize, const R: usize> {
    pub weight: *const u8,
    /// Distance between rows of the weight, in bytes.
    pub stride: usize,
    pub x: *const f32,
    /// Distance between rows of inputs, in numbers.
    pub x_stride: usize,
    pub count: usize,
    pub of: PhantomData<T>,
}

impl<L: Lanes, T: Stored, const W: usize, const R: usize> Work<L> for Products<T, W, R> {
    type Output = [[f32; W]; R];

    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // constant loops, which are unrolled
    unsafe fn run(self) -> [[f32; W]; R] {
        let Self {
            weight,
            stride,
            x,
            x_stride,
            count,
            ..
        } = self;
        let (size, step) = (size_of::<T>(), GROUPS * L::COLUMNS);
        let chains = L::chains(W * R);
        let whole = count / step * step;
        let mut column = 0;
        // SAFETY: all loads are within the `count` numbers of each row, which exist as the caller
        // guarantees.
        unsafe {
            let mut sums = [[[L::zero(); 4]; R]; W];
            while column < whole {
                for w in 0..W {
                    let at = weight.add(w * stride + column * size);
                    L::prefetch(at);
                    if step * size > 64 {
                        L::prefetch(at.add(64));
                    }
                }
                for group in 0..GROUPS {
                    let column = column + group * L::COLUMNS;
                    let mut xs = [L::load::<f32>(x.add(column).cast()); R];
                    for i in 1..R {
                        xs[i] = L::load::<f32>(x.add(i * x_stride + column).cast());
                    }
                    for w in 0..W {
                        let ws = L::load::<T>(weight.add(w * stride + column * size));
                        for i in 0..R {
                            L::add_products(&mut sums[w][i], chains, group, ws, xs[i]);
                        }
                    }
                }
                column += step;
            }
            while column < count {
                let left = (count - column).min(L::COLUMNS);
                for w in 0..W {
                    let ws = L::load_some::<T>(weight.add(w * stride + column * size), left);
                    for i in 0..R {
                        let xs = L::load_some::<f32>(x.add(i * x_stride + column).cast(), left);
                        L::add_products(&mut sums[w][i], chains, 0, ws, xs);
                    }
                }
                column += L::COLUMNS;
            }
            let mut all = [[0.0; W]; R];
            for i in 0..R {
                let mut of_row = [[L::zero(); 4]; W];
                for w in 0..W {
                    of_row[w] = sums[w][i];
                }
                all[i] = L::totals(of_row, chains);
            }
            all
        }
    }
}
