//! Products of matrices in memory, by the fastest method for their sizes.

use std::ops::Range;

use gemm_common::Parallelism;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::few::{self, MOST_ROWS};
use super::operand::{Matrix, Numbers, Operand, Output};
use super::packed::Engine;
use super::tile::Kind;
use crate::linalg::product::{Strided, raw_product};

/// Number of multiplications below which waking other threads is not worthwhile.
pub(crate) const SERIAL: usize = 128 * 128 * 128;
/// Number of multiplications below which packing is not worthwhile, and number of rows below which
/// packing the other operand is not.
const PACKED: usize = 32 * 32 * 32;
const PACKED_ROWS: usize = 8;
/// Number of rows of a right operand that are widened at a time.
const PANEL_ROWS: usize = 512;
/// Maximum number of columns widened at a time, so that a panel stays in the cache.
const PANEL_COLUMNS: usize = 2048;

/// Computes `a b` for `a` `[m, k]` and `b` `[k, n]`, on all threads if `parallel` and the product
/// is large enough.
///
/// # Safety
/// The matrices must be in live memory. The output must have room for the product, and nothing else
/// may use it.
pub(crate) unsafe fn product(
    [m, n, k]: [usize; 3],
    a: Matrix,
    b: Matrix,
    output: Output<'_>,
    parallel: bool,
) {
    if m >= PACKED_ROWS
        && m * n * k >= PACKED
        && let Some(engine) = Engine::new(Kind::F32, parallel)
    {
        // SAFETY: the caller upholds this function's contract.
        unsafe { engine.product([m, n], a.left(k), b.right(k), output) };
        return;
    }
    let threads = if parallel && m * n * k >= SERIAL {
        Parallelism::Rayon(0)
    } else {
        Parallelism::None
    };
    let strided = |matrix: Matrix| Strided {
        first: matrix.first,
        row: matrix.row,
        column: matrix.column,
    };
    let to = Strided {
        first: output.to.at(0, 0),
        row: output.to.stride as isize,
        column: 1,
    };
    // SAFETY: the caller upholds this function's contract.
    unsafe {
        raw_product(
            [m, n, k],
            strided(a),
            strided(b),
            (to, output.add),
            output.factor,
            threads,
        );
    }
}

/// The numbers of a weight, by format.
#[derive(Clone, Copy)]
pub(crate) enum Values<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

impl Values<'_> {
    fn len(self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
            Self::F16(values) => values.len(),
        }
    }
}

/// The right operand of a product, `[k, n]`, with any strides and any float format.
#[derive(Clone, Copy)]
pub(crate) struct Weight<'a> {
    values: Values<'a>,
    start: usize,
    dims: [usize; 2],
    strides: [usize; 2],
}

impl<'a> Weight<'a> {
    /// Returns `None` for a weight that is empty, has a stride that is zero or negative, or is not
    /// within `values`.
    pub fn new(
        values: Values<'a>,
        start: usize,
        dims: [usize; 2],
        strides: [isize; 2],
    ) -> Option<Self> {
        let strides = [
            usize::try_from(strides[0]).ok()?,
            usize::try_from(strides[1]).ok()?,
        ];
        if dims.contains(&0) || strides.contains(&0) {
            return None;
        }
        let along = |axis: usize| strides[axis].checked_mul(dims[axis] - 1);
        let last = along(0)?.checked_add(along(1)?)?.checked_add(start)?;
        (last < values.len()).then_some(Self {
            values,
            start,
            dims,
            strides,
        })
    }

    pub fn dims(&self) -> [usize; 2] {
        self.dims
    }

    pub fn transposed(self) -> Self {
        Self {
            dims: [self.dims[1], self.dims[0]],
            strides: [self.strides[1], self.strides[0]],
            ..self
        }
    }

    /// Writes the elements in `rows` and `columns` to `scratch` as `f32`, in memory order.
    fn widen(&self, rows: Range<usize>, columns: Range<usize>, scratch: &mut Vec<f32>) -> Matrix {
        let transposed = self.strides[0] < self.strides[1];
        let (lines, line, stride, step) = if transposed {
            (columns, rows, self.strides[1], self.strides[0])
        } else {
            (rows, columns, self.strides[0], self.strides[1])
        };
        let width = line.len();
        if scratch.len() < lines.len() * width {
            scratch.resize(lines.len() * width, 0.0);
        }
        for (index, out) in lines.zip(scratch.chunks_exact_mut(width)) {
            let first = self.start + index * stride + line.start * step;
            if step == 1 {
                match self.values {
                    Values::F32(values) => out.copy_from_slice(&values[first..first + width]),
                    Values::Bf16(values) => values[first..first + width].convert_to_f32_slice(out),
                    Values::F16(values) => values[first..first + width].convert_to_f32_slice(out),
                }
            } else {
                for (position, out) in out.iter_mut().enumerate() {
                    let at = first + position * step;
                    *out = match self.values {
                        Values::F32(values) => values[at],
                        Values::Bf16(values) => values[at].to_f32(),
                        Values::F16(values) => values[at].to_f32(),
                    };
                }
            }
        }
        let matrix = Matrix::rows(scratch, width);
        if transposed {
            matrix.transposed()
        } else {
            matrix
        }
    }

    /// Writes some rows to `scratch` as `f32`, row-major.
    pub fn copy_rows(&self, rows: Range<usize>, scratch: &mut Vec<f32>) {
        let [_, n] = self.dims;
        scratch.clear();
        if self.strides[1] != 1 {
            let mut lines = Vec::new();
            let matrix = self.widen(rows.clone(), 0..n, &mut lines);
            for row in 0..rows.len() as isize {
                let line = matrix.first.wrapping_offset(row * matrix.row);
                // SAFETY: `lines` holds these elements, in the order given by the strides.
                scratch.extend(
                    (0..n as isize).map(|column| unsafe { *line.offset(column * matrix.column) }),
                );
            }
            return;
        }
        self.widen(rows, 0..n, scratch);
    }

    /// Returns the right operand of a product, whose lines are the columns of this weight.
    pub fn right(&self) -> Operand {
        let first = match self.values {
            Values::F32(values) => Numbers::F32(values[self.start..].as_ptr()),
            Values::Bf16(values) => Numbers::Bf16(values[self.start..].as_ptr()),
            Values::F16(values) => Numbers::F16(values[self.start..].as_ptr()),
        };
        Operand {
            first,
            line: self.strides[1] as isize,
            step: self.strides[0] as isize,
            inner: self.dims[0],
        }
    }

    /// Returns the engine that multiplies `m` rows by this weight, if the product is large enough
    /// and the processor has the instructions. Weights in bf16 are multiplied as bf16 if the
    /// processor can; other formats as `f32`.
    pub fn engine(&self, m: usize) -> Option<Engine> {
        let multiplications = m * self.dims[0] * self.dims[1];
        match self.values {
            _ if m <= MOST_ROWS && self.strides.contains(&1) => None,
            Values::F32(_) if m < PACKED_ROWS || multiplications < PACKED => None,
            Values::F32(_) => Engine::new(Kind::F32, true),
            _ if multiplications < SERIAL => None,
            Values::F16(_) => Engine::new(Kind::F32, true),
            Values::Bf16(_) => {
                Engine::new(Kind::Bf16, true).or_else(|| Engine::new(Kind::F32, true))
            }
        }
    }

    /// Computes `a self` for `a` `[m, k]`. A weight of 16 bits is widened panel by panel, never as
    /// a whole.
    ///
    /// # Safety
    /// `a` must be in live memory. The output must have room for the product, and nothing else may
    /// use it.
    pub unsafe fn multiply(&self, m: usize, a: Matrix, output: Output<'_>) {
        let [k, n] = self.dims;
        // SAFETY: the caller upholds this function's contract.
        if m <= MOST_ROWS && unsafe { self.multiply_few(m, a, output) } {
            return;
        }
        if let Some(engine) = self.engine(m) {
            // SAFETY: the caller upholds this function's contract, and `new` checked that the
            // weight is within its values; the same holds below.
            unsafe { engine.product([m, n], a.left(k), self.right(), output) };
            return;
        }
        if let Values::F32(values) = self.values {
            let matrix = Matrix {
                first: values[self.start..].as_ptr(),
                row: self.strides[0] as isize,
                column: self.strides[1] as isize,
            };
            // SAFETY: as above.
            unsafe { product([m, n, k], a, matrix, output, true) };
            return;
        }
        let threads = if m * n * k >= SERIAL {
            rayon::current_num_threads()
        } else {
            1
        };
        let columns = n.div_ceil(threads).next_multiple_of(16).min(PANEL_COLUMNS);
        let panel = |scratch: &mut Vec<f32>, index: usize| {
            let range = index * columns..((index + 1) * columns).min(n);
            for first in (0..k).step_by(PANEL_ROWS) {
                let rows = first..(first + PANEL_ROWS).min(k);
                let panel = self.widen(rows.clone(), range.clone(), scratch);
                let (a, size) = (a.from(0, first), [m, range.len(), rows.len()]);
                let output = output.after_column(range.start).added_if(first > 0);
                // SAFETY: as above; these columns of the output belong to this task.
                unsafe { product(size, a, panel, output, false) };
            }
        };
        let panels = n.div_ceil(columns);
        if threads == 1 {
            let mut scratch = Vec::new();
            (0..panels).for_each(|index| panel(&mut scratch, index));
        } else {
            (0..panels).into_par_iter().for_each_init(Vec::new, panel);
        }
    }

    /// Multiplies by the code for few rows. Returns false and does nothing if neither axis of the
    /// weight is contiguous.
    ///
    /// # Safety
    /// As for [`Self::multiply`].
    unsafe fn multiply_few(&self, m: usize, a: Matrix, output: Output<'_>) -> bool {
        let (start, dims, strides) = (self.start, self.dims, self.strides);
        // SAFETY: the caller upholds this function's contract.
        unsafe {
            match self.values {
                Values::F32(values) => few::multiply(m, a, &values[start..], dims, strides, output),
                Values::Bf16(values) => {
                    few::multiply(m, a, &values[start..], dims, strides, output)
                }
                Values::F16(values) => few::multiply(m, a, &values[start..], dims, strides, output),
            }
        }
    }
}
