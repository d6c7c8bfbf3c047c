//! Products of dense numbers.

use std::marker::PhantomData;

use super::lanes::Lanes;
use super::task::Task;
use super::tiles::{FAR, Tiles, Work, for_tiles};
use crate::format::Dense;
use crate::kernels::number::{Stored, with_type_of};

/// Groups of columns at a time.
const GROUPS: usize = 2;

/// Products of some rows of a dense weight.
///
/// # Safety
/// The processor has the features of `L`; the outputs are this task's and in the output's memory.
///
/// # Panics
/// Where the weight has not the rows or columns.
pub(in crate::kernels) unsafe fn multiply<L: Lanes>(weight: &Dense, task: Task<'_>) {
    let stride = weight.cols * weight.number.bytes();
    let values: &[u8] = &weight.values;
    assert!(task.rows.end * stride <= values.len() && task.input.inputs <= weight.cols);
    let first = values.as_ptr();
    with_type_of!(weight.number, T => {
        let rows = Rows::<L, T> { first, stride, task: &task, of: PhantomData };
        // SAFETY: the rows and columns are in the values, as was asserted; the rest is the caller's promise.
        unsafe { for_tiles(&rows, task.rows.clone(), task.input) }
    });
}

struct Rows<'a, L, T> {
    first: *const u8,
    stride: usize,
    task: &'a Task<'a>,
    of: PhantomData<(L, T)>,
}

impl<L: Lanes, T: Stored> Rows<'_, L, T> {
    /// # Safety
    /// The rows are there, `apart` from each other, and their outputs this task's.
    #[inline(always)]
    unsafe fn products<const W: usize, const R: usize>(
        &self,
        row: usize,
        apart: usize,
        from: usize,
    ) {
        let Task { input, output, .. } = self.task;
        // SAFETY: the caller's promise.
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

impl<L: Lanes, T: Stored> Tiles for Rows<'_, L, T> {
    const ONE: usize = L::ONE;
    const MORE: usize = L::MORE;
    const LONG: usize = L::LONG;

    #[inline(always)]
    unsafe fn tile<const W: usize, const R: usize>(&self, row: usize, from: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.products::<W, R>(row, 1, from) };
    }

    #[inline(always)]
    unsafe fn far(&self, row: usize, apart: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.products::<FAR, 1>(row, apart, 0) };
    }
}

/// Products of `W` rows of numbers with `R` of inputs, by rows of inputs. Each row has `count` numbers.
pub(in crate::kernels) struct Products<T, const W: usize, const R: usize> {
    pub weight: *const u8,
    /// Bytes from one row of the weight to the next.
    pub stride: usize,
    pub x: *const f32,
    /// Numbers from one row of inputs to the next.
    pub x_stride: usize,
    pub count: usize,
    pub of: PhantomData<T>,
}

impl<L: Lanes, T: Stored, const W: usize, const R: usize> Work<L> for Products<T, W, R> {
    type Output = [[f32; W]; R];

    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // loops over constants, which become straight code on registers
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
        // SAFETY: all loads are of the `count` numbers of rows that are there by the caller's promise.
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
