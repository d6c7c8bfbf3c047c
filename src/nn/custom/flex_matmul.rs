//! Matrix products on Flex: strided operands, a scale, accumulation, and a right-hand side in any float format.

use burn::backend::flex::FlexTensor;
use burn::tensor::DType;
use gemm::Parallelism;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::flex_few::{self, MOST_ROWS};
use super::flex_gemm::{Engine, Kind, Numbers, Operand, Output};

/// Multiplications below which other threads are not worth waking.
pub(super) const SERIAL: usize = 128 * 128 * 128;
/// Multiplications below which packing is not worth it, and rows below which packing the other operand is not.
const PACKED: usize = 32 * 32 * 32;
const PACKED_ROWS: usize = 8;
/// Rows of a right-hand side that are widened at a time.
const PANEL_ROWS: usize = 512;
/// Most columns of them, so that a panel stays in the cache.
const PANEL_COLUMNS: usize = 2048;

/// A matrix somewhere in memory, of any strides.
#[derive(Clone, Copy)]
pub(super) struct Matrix {
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

/// Memory in which tasks write disjoint parts.
#[derive(Clone, Copy)]
pub(super) struct Shared(pub *mut f32);
// SAFETY: every task writes its own elements, and nobody reads before all are done.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub fn at(self, index: usize) -> *mut f32 {
        self.0.wrapping_add(index)
    }
}

/// `out = factor * a b`, or `out += factor * a b`, for `a` `[m, k]`, `b` `[k, n]`, `out` row-major with `width` elements from
/// row to row. On all threads where `parallel` and it is worth it.
///
/// # Safety
/// The matrices lie in memory that is alive, and `out` is written by nobody else.
#[allow(clippy::too_many_arguments)] // the sizes and operands of a matrix product
pub(super) unsafe fn product(
    [m, n, k]: [usize; 3],
    a: Matrix,
    b: Matrix,
    factor: f32,
    out: *mut f32,
    width: usize,
    add: bool,
    parallel: bool,
) {
    if m >= PACKED_ROWS
        && m * n * k >= PACKED
        && let Some(engine) = Engine::new(Kind::F32, parallel)
    {
        let output = Output {
            out: Shared(out),
            width,
            factor,
            add,
        };
        // SAFETY: the caller's promise.
        unsafe { engine.product([m, n], a.left(k), b.right(k), output) };
        return;
    }
    let threads = if parallel && m * n * k >= SERIAL {
        Parallelism::Rayon(0)
    } else {
        Parallelism::None
    };
    let (ac, ar, bc, br) = (a.column, a.row, b.column, b.row);
    // SAFETY: the caller's promise.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            width as isize,
            add,
            a.first,
            ac,
            ar,
            b.first,
            bc,
            br,
            1.0,
            factor,
            false,
            false,
            false,
            threads,
        );
    }
}

#[derive(Clone, Copy)]
enum Values<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

/// A two-dimensional tensor as a weight: any strides, any float format.
#[derive(Clone, Copy)]
pub(super) struct Weight<'a> {
    values: Values<'a>,
    start: usize,
    dims: [usize; 2],
    strides: [isize; 2],
}

impl<'a> Weight<'a> {
    /// None for a tensor of another rank or type, or one that is read backwards.
    pub fn new(tensor: &'a FlexTensor) -> Option<Self> {
        let layout = tensor.layout();
        let dims = <[usize; 2]>::try_from(layout.shape().as_slice()).ok()?;
        let strides = <[isize; 2]>::try_from(layout.strides()).ok()?;
        let values = match tensor.dtype() {
            DType::F32 => Values::F32(tensor.storage()),
            DType::BF16 => Values::Bf16(tensor.storage()),
            DType::F16 => Values::F16(tensor.storage()),
            _ => return None,
        };
        (!dims.contains(&0) && strides.iter().all(|stride| *stride > 0)).then_some(Self {
            values,
            start: layout.start_offset(),
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

    /// The elements in `rows` and `columns` as `f32` in `scratch`, in the order in which they lie in memory.
    fn widen(
        &self,
        rows: std::ops::Range<usize>,
        columns: std::ops::Range<usize>,
        scratch: &mut Vec<f32>,
    ) -> Matrix {
        let turned = self.strides[0] < self.strides[1];
        let (lines, line) = if turned {
            (columns.clone(), rows.clone())
        } else {
            (rows.clone(), columns.clone())
        };
        let (line_stride, step) = if turned {
            (self.strides[1], self.strides[0])
        } else {
            (self.strides[0], self.strides[1])
        };
        let width = line.len();
        if scratch.len() < lines.len() * width {
            scratch.resize(lines.len() * width, 0.0);
        }
        for (index, out) in lines.zip(scratch.chunks_exact_mut(width)) {
            let first = self.start + index * line_stride as usize + line.start * step as usize;
            if step == 1 {
                match self.values {
                    Values::F32(values) => out.copy_from_slice(&values[first..first + width]),
                    Values::Bf16(values) => values[first..first + width].convert_to_f32_slice(out),
                    Values::F16(values) => values[first..first + width].convert_to_f32_slice(out),
                }
            } else {
                for (position, out) in out.iter_mut().enumerate() {
                    let at = first + position * step as usize;
                    *out = match self.values {
                        Values::F32(values) => values[at],
                        Values::Bf16(values) => values[at].to_f32(),
                        Values::F16(values) => values[at].to_f32(),
                    };
                }
            }
        }
        let matrix = Matrix::rows(scratch, width);
        if turned { matrix.transposed() } else { matrix }
    }

    /// Rows as `f32`, row-major, in `scratch`.
    pub fn copy_rows(&self, rows: std::ops::Range<usize>, scratch: &mut Vec<f32>) {
        let [_, n] = self.dims;
        scratch.clear();
        if self.strides[1] != 1 {
            let mut lines = Vec::new();
            let matrix = self.widen(rows.clone(), 0..n, &mut lines);
            for row in 0..rows.len() as isize {
                let line = matrix.first.wrapping_offset(row * matrix.row);
                // SAFETY: `lines` holds these elements, in the order that the strides tell.
                scratch.extend(
                    (0..n as isize).map(|column| unsafe { *line.offset(column * matrix.column) }),
                );
            }
            return;
        }
        self.widen(rows, 0..n, scratch);
    }

    /// Its columns as the lines of a product's right operand.
    pub fn right(&self) -> Operand {
        let first = match self.values {
            Values::F32(values) => Numbers::F32(values.as_ptr().wrapping_add(self.start)),
            Values::Bf16(values) => Numbers::Bf16(values.as_ptr().wrapping_add(self.start)),
            Values::F16(values) => Numbers::F16(values.as_ptr().wrapping_add(self.start)),
        };
        Operand {
            first,
            line: self.strides[1],
            step: self.strides[0],
            inner: self.dims[0],
        }
    }

    /// What multiplies `m` rows by this weight, where there is enough to do and the processor has the instructions: bf16 as
    /// such if it can, other formats as `f32`.
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

    /// `out = a self`, or `out += a self`, for `a` `[m, k]` and this weight `[k, n]`, with `width` elements from row to row
    /// of `out`. A few rows are multiplied as [`flex_few`] does it. A weight of 16 bits is never widened whole, but panel by panel.
    ///
    /// # Safety
    /// `a` lies in memory that is alive, and `out`, with room for the product, is written by nobody else.
    pub unsafe fn multiply(&self, m: usize, a: Matrix, out: Shared, width: usize, add: bool) {
        let [k, n] = self.dims;
        if m <= MOST_ROWS {
            let (start, strides) = (self.start, self.strides.map(isize::unsigned_abs));
            let output = flex_few::Output { out, width, add };
            // SAFETY: the caller's promise.
            let done = unsafe {
                match self.values {
                    Values::F32(values) => {
                        flex_few::multiply(m, a, &values[start..], self.dims, strides, output)
                    }
                    Values::Bf16(values) => {
                        flex_few::multiply(m, a, &values[start..], self.dims, strides, output)
                    }
                    Values::F16(values) => {
                        flex_few::multiply(m, a, &values[start..], self.dims, strides, output)
                    }
                }
            };
            if done {
                return;
            }
        }
        if let Some(engine) = self.engine(m) {
            // SAFETY: the caller's promise.
            unsafe {
                engine.product(
                    [m, n],
                    a.left(k),
                    self.right(),
                    Output {
                        out,
                        width,
                        factor: 1.0,
                        add,
                    },
                )
            };
            return;
        }
        if let Values::F32(values) = self.values {
            let first = values.as_ptr().wrapping_add(self.start);
            let matrix = Matrix {
                first,
                row: self.strides[0],
                column: self.strides[1],
            };
            // SAFETY: the layout stays within the storage, and the caller's promise.
            unsafe { product([m, n, k], a, matrix, 1.0, out.at(0), width, add, true) };
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
                let (size, add) = ([m, range.len(), rows.len()], add || first > 0);
                // SAFETY: as above; the columns of `out` are this task's.
                unsafe {
                    product(
                        size,
                        a.from(0, first),
                        panel,
                        1.0,
                        out.at(range.start),
                        width,
                        add,
                        false,
                    )
                };
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
}
