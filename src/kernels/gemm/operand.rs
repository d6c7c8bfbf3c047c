//! Operands and outputs of a product.

use std::ops::Range;

use half::{bf16, f16};

use crate::kernels::disjoint::{Disjoint, DisjointRows};

/// A matrix of `f32` in memory with any strides.
#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    pub first: *const f32,
    pub row: isize,
    pub column: isize,
}
// SAFETY: the pointer is only read through, by functions whose callers guarantee that the memory is
// alive.
unsafe impl Send for Matrix {}
// SAFETY: as above.
unsafe impl Sync for Matrix {}

impl Matrix {
    /// A row-major matrix whose rows start `width` elements apart.
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

    /// Returns the left operand of a product whose inner dimension is `inner`. Its lines are the
    /// rows of this matrix.
    pub fn left(self, inner: usize) -> Operand {
        Operand {
            first: Numbers::F32(self.first),
            line: self.row,
            step: self.column,
            inner,
        }
    }

    /// Returns the right operand of a product. Its lines are the columns of this matrix.
    pub fn right(self, inner: usize) -> Operand {
        self.transposed().left(inner)
    }

    /// Returns the submatrix that begins at row `row` and column `column`.
    pub fn from(self, row: usize, column: usize) -> Self {
        let offset = row as isize * self.row + column as isize * self.column;
        Self {
            first: self.first.wrapping_offset(offset),
            ..self
        }
    }
}

/// Pointer to the first number of an operand, by number format.
#[derive(Clone, Copy)]
pub(super) enum Numbers {
    F32(*const f32),
    Bf16(*const bf16),
    F16(*const f16),
}

/// A matrix of any strides as an operand. The lines of a left operand are its rows, those of a
/// right operand its columns.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    pub(super) first: Numbers,
    /// Distance between lines, in numbers.
    pub(super) line: isize,
    /// Distance between steps along the inner dimension, in numbers.
    pub(super) step: isize,
    /// Size of the inner dimension.
    pub(super) inner: usize,
}
// SAFETY: the pointer is only read through, by functions whose callers guarantee that the memory is
// alive.
unsafe impl Send for Operand {}
// SAFETY: as above.
unsafe impl Sync for Operand {}

impl Operand {
    /// Returns the operand restricted to the steps in `range`.
    pub(super) fn steps(self, range: Range<usize>) -> Self {
        Self {
            inner: range.len(),
            ..self.from(0, range.start)
        }
    }

    /// Returns the operand that begins at a line and a step.
    pub(super) fn from(self, line: usize, step: usize) -> Self {
        let offset = line as isize * self.line + step as isize * self.step;
        let first = match self.first {
            Numbers::F32(first) => Numbers::F32(first.wrapping_offset(offset)),
            Numbers::Bf16(first) => Numbers::Bf16(first.wrapping_offset(offset)),
            Numbers::F16(first) => Numbers::F16(first.wrapping_offset(offset)),
        };
        Self { first, ..self }
    }

    /// Reads an element.
    ///
    /// # Safety
    /// The element must exist, in live memory.
    pub(super) unsafe fn value(self, line: usize, step: usize) -> f32 {
        // SAFETY: the caller guarantees that the element exists.
        unsafe {
            match self.from(line, step).first {
                Numbers::F32(at) => *at,
                Numbers::Bf16(at) => (*at).to_f32(),
                Numbers::F16(at) => (*at).to_f32(),
            }
        }
    }
}

/// Destination of a product: `out = factor * product`, or `out += factor * product`.
#[derive(Clone, Copy)]
pub(crate) struct Output<'a> {
    pub to: DisjointRows<'a>,
    pub factor: f32,
    pub add: bool,
}

impl<'a> Output<'a> {
    /// Writes the product itself, in rows of `width` numbers.
    pub fn new(all: Disjoint<'a, f32>, width: usize) -> Self {
        Self {
            to: DisjointRows { all, stride: width },
            factor: 1.0,
            add: false,
        }
    }

    /// Writes the product itself over `values`, in rows of `width` numbers.
    pub fn over(values: &'a mut [f32], width: usize) -> Self {
        Self::new(Disjoint::new(values), width)
    }

    /// Multiplies the product by `factor`.
    pub fn times(self, factor: f32) -> Self {
        Self { factor, ..self }
    }

    /// Adds the product to the output instead of replacing it.
    pub fn added(self) -> Self {
        self.added_if(true)
    }

    pub(super) fn added_if(self, add: bool) -> Self {
        Self {
            add: self.add || add,
            ..self
        }
    }

    /// Returns the columns from `column` on.
    pub(super) fn after_column(self, column: usize) -> Self {
        let all = self.to.all.from(column);
        Self {
            to: DisjointRows { all, ..self.to },
            ..self
        }
    }
}
