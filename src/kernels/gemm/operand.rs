//! What a product reads, and where it goes.

use std::ops::Range;

use half::{bf16, f16};

use crate::kernels::disjoint::{Disjoint, DisjointRows};

/// A matrix of `f32` in memory, of any strides.
#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    pub first: *const f32,
    pub row: isize,
    pub column: isize,
}
// SAFETY: it is only read through, by functions whose callers promise that the memory is alive.
unsafe impl Send for Matrix {}
// SAFETY: as above.
unsafe impl Sync for Matrix {}

impl Matrix {
    /// Row-major, with `width` elements from row to row.
    pub fn rows(values: &[f32], width: usize) -> Self {
        Self {
            first: values.as_ptr(),
            row: width as isize,
            column: 1,
        }
    }

    pub fn transposed(self) -> Self {
        Self {
            row: self.column,
            column: self.row,
            ..self
        }
    }

    /// Its rows as the lines of a product's left operand with an inner dimension of `inner`.
    pub fn left(self, inner: usize) -> Operand {
        Operand {
            first: Numbers::F32(self.first),
            line: self.row,
            step: self.column,
            inner,
        }
    }

    /// Its columns as the lines of a right operand.
    pub fn right(self, inner: usize) -> Operand {
        self.transposed().left(inner)
    }

    /// The same matrix from row `row` and column `column` on.
    pub fn from(self, row: usize, column: usize) -> Self {
        let offset = row as isize * self.row + column as isize * self.column;
        Self {
            first: self.first.wrapping_offset(offset),
            ..self
        }
    }
}

/// The first number of an operand, in its format.
#[derive(Clone, Copy)]
pub(super) enum Numbers {
    F32(*const f32),
    Bf16(*const bf16),
    F16(*const f16),
}

/// A matrix of any strides as an operand: its lines are rows of the left one and columns of the
/// right one.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    pub(super) first: Numbers,
    /// Numbers from line to line.
    pub(super) line: isize,
    /// Numbers from step to step along the inner dimension.
    pub(super) step: isize,
    /// Size of the inner dimension.
    pub(super) inner: usize,
}
// SAFETY: it is only read through, by functions whose callers promise that the memory is alive.
unsafe impl Send for Operand {}
// SAFETY: as above.
unsafe impl Sync for Operand {}

impl Operand {
    /// The steps in `range` alone.
    pub(super) fn steps(self, range: Range<usize>) -> Self {
        Self {
            inner: range.len(),
            ..self.from(0, range.start)
        }
    }

    /// The same from a line and a step on.
    pub(super) fn from(self, line: usize, step: usize) -> Self {
        let offset = line as isize * self.line + step as isize * self.step;
        let first = match self.first {
            Numbers::F32(first) => Numbers::F32(first.wrapping_offset(offset)),
            Numbers::Bf16(first) => Numbers::Bf16(first.wrapping_offset(offset)),
            Numbers::F16(first) => Numbers::F16(first.wrapping_offset(offset)),
        };
        Self { first, ..self }
    }

    /// # Safety
    /// There is such an element in living memory.
    pub(super) unsafe fn value(self, line: usize, step: usize) -> f32 {
        // SAFETY: the caller's promise.
        unsafe {
            match self.from(line, step).first {
                Numbers::F32(at) => *at,
                Numbers::Bf16(at) => (*at).to_f32(),
                Numbers::F16(at) => (*at).to_f32(),
            }
        }
    }
}

/// Where a product goes: `out = factor * product`, or `out += factor * product`.
#[derive(Clone, Copy)]
pub(crate) struct Output<'a> {
    pub to: DisjointRows<'a>,
    pub factor: f32,
    pub add: bool,
}

impl<'a> Output<'a> {
    /// The product itself, in rows of `width` numbers.
    pub fn new(all: Disjoint<'a, f32>, width: usize) -> Self {
        Self {
            to: DisjointRows { all, stride: width },
            factor: 1.0,
            add: false,
        }
    }

    /// The product itself, in rows of `width` numbers, over what `values` holds.
    pub fn over(values: &'a mut [f32], width: usize) -> Self {
        Self::new(Disjoint::new(values), width)
    }

    /// The product times `factor`.
    pub fn times(self, factor: f32) -> Self {
        Self { factor, ..self }
    }

    /// The product added to what is there.
    pub fn added(self) -> Self {
        self.added_if(true)
    }

    pub(super) fn added_if(self, add: bool) -> Self {
        Self {
            add: self.add || add,
            ..self
        }
    }

    /// The columns from `column` on.
    pub(super) fn after_column(self, column: usize) -> Self {
        let all = self.to.all.from(column);
        Self {
            to: DisjointRows { all, ..self.to },
            ..self
        }
    }
}
