//! Weights in any storage format, and the parts of which a file stores them.

use serde::{Deserialize, Serialize};

use super::buffer::Buffer;
use super::dense::{Dense, Number};
use super::grid::Grid;
use super::groups::QuantizedMatrix;
use super::packed::PackedMatrix;
use super::sparse::{Offsets, Pattern, Sparse16};
use super::sparse_int::SparseInt4;
use super::storage::WeightFormat;
use crate::error::{Error, Result};
use crate::linalg::Matrix;

/// Type of the elements of a [`Part`], all little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[doc(hidden)]
pub enum Element {
    /// 8-bit unsigned integers.
    U8,
    /// 32-bit unsigned integers.
    U32,
    /// 64-bit unsigned integers.
    U64,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// 32-bit floating point.
    F32,
}

/// One of the arrays of a stored weight.
#[derive(Clone, Debug)]
#[doc(hidden)]
pub struct Part<'a> {
    /// Name: `values`, `codes`, `mask`, `offsets`, `scales`, `zeros` or `groups`.
    pub name: &'static str,
    /// Type of the elements.
    pub element: Element,
    /// Shape of the array, row-major.
    pub shape: Vec<usize>,
    /// Bytes of the elements.
    pub bytes: &'a [u8],
}

/// The information about a weight that is needed to read its parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[doc(hidden)]
pub struct MatrixHeader {
    /// Storage format.
    pub format: WeightFormat,
    /// Number of output features.
    pub rows: usize,
    /// Number of input features.
    pub cols: usize,
    /// Whether the scales of groups have 32 bits instead of 16.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub wide_scales: bool,
    /// Whether each column has an explicit group, instead of `column / group_size`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ordered: bool,
    /// Whether sparse codes are even: every 64 columns have 32 stored codes, so rows need no offset.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub even: bool,
}

impl MatrixHeader {
    /// Creates the header of a weight with 16-bit scales and groups of consecutive columns, if the
    /// format has groups.
    pub fn new(format: WeightFormat, rows: usize, cols: usize) -> Self {
        Self {
            format,
            rows,
            cols,
            wide_scales: false,
            ordered: false,
            even: false,
        }
    }
}

/// An `[out, in]` weight in one storage format. Clones share its bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredMatrix {
    body: Body,
}

/// The data, by kind of format.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Body {
    Dense(Dense),
    Int(PackedMatrix),
    Sparse16(Sparse16),
    SparseInt4(SparseInt4),
}

impl From<PackedMatrix> for StoredMatrix {
    fn from(matrix: PackedMatrix) -> Self {
        Self {
            body: Body::Int(matrix),
        }
    }
}

impl StoredMatrix {
    /// Stores a weight, with numbers rounded to nearest. Sparse formats do not store zeros of
    /// either sign, nor numbers that round to zero.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if a number is beyond the format's range, a group has
    /// more non-zeros than an N:M pattern allows, or the format has codes; use
    /// [`from_quantized`](Self::from_quantized) for those.
    pub fn from_matrix(weight: &Matrix, format: WeightFormat) -> Result<Self> {
        let body = match format {
            WeightFormat::F32 => Body::Dense(Dense::new(weight, Number::F32)?),
            WeightFormat::F16 => Body::Dense(Dense::new(weight, Number::F16)?),
            WeightFormat::Bf16 => Body::Dense(Dense::new(weight, Number::Bf16)?),
            WeightFormat::SparseF16 => Body::Sparse16(Sparse16::new(weight, Number::F16, None)?),
            WeightFormat::SparseBf16 => Body::Sparse16(Sparse16::new(weight, Number::Bf16, None)?),
            WeightFormat::NmF16 { n, m } => Body::Sparse16(Sparse16::new(
                weight,
                Number::F16,
                Some(Pattern::new(n, m)?),
            )?),
            WeightFormat::NmBf16 { n, m } => Body::Sparse16(Sparse16::new(
                weight,
                Number::Bf16,
                Some(Pattern::new(n, m)?),
            )?),
            WeightFormat::Int { .. } | WeightFormat::SparseInt4 { .. } => {
                return Err(Error::argument(
                    "format",
                    format!("{format:?}"),
                    "one of numbers: codes come from a quantizer",
                ));
            }
        };
        Ok(Self { body })
    }

    /// Stores a quantized weight exactly. If `sparse`, codes that equal their zero point are not
    /// stored.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if `sparse` and the weight does not have 4 bits.
    pub fn from_quantized(weight: &QuantizedMatrix, sparse: bool) -> Result<Self> {
        let body = if sparse {
            Body::SparseInt4(SparseInt4::new(weight)?)
        } else {
            Body::Int(PackedMatrix::new(weight))
        };
        Ok(Self { body })
    }

    /// Stores codes in the form that suits them: as [`WeightFormat::SparseInt4`] if they have 4 bits
    /// and this saves at least a tenth of the bytes of the codes (about a third of them are zeros),
    /// or else dense.
    pub fn from_codes(weight: &QuantizedMatrix) -> Result<Self> {
        // 10 * (mask + codes of non-zeros) <= 9 * (all codes), in bits.
        let worth = |zeros: usize, all: usize| 10 * (all + 4 * (all - zeros)) <= 9 * 4 * all;
        let all = weight.rows() * weight.cols();
        let sparse = weight.parts().bits == 4 && all > 0 && worth(weight.count_zeros(), all);
        Self::from_quantized(weight, sparse)
    }

    /// Creates a weight from its [`parts`](Self::parts). Only the groups of columns are copied.
    ///
    /// Only sizes and the groups of columns are checked here, so that a mapped file is not read;
    /// [`check`](Self::check) checks the contents. Even if the contents are invalid, reading the
    /// weight never accesses memory outside the parts.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if a part is missing or the header is invalid, and
    /// [`Error::ShapeMismatch`] if a part has the wrong size.
    pub fn from_parts(
        header: &MatrixHeader,
        mut parts: impl FnMut(&str) -> Option<Buffer>,
    ) -> Result<Self> {
        let size = [header.rows, header.cols];
        let mut part = |name: &str| {
            parts(name).ok_or_else(|| {
                Error::argument("part", "none", format!("a part `{name}` of the weight"))
            })
        };
        let part: &mut dyn FnMut(&str) -> Result<Buffer> = &mut part;
        // Reject sizes beyond any memory, so that no product below overflows.
        if header
            .rows
            .checked_mul(header.cols)
            .is_none_or(|count| count > isize::MAX as usize / 8)
        {
            return Err(Error::argument(
                "size",
                format!("{size:?}"),
                "a matrix that fits into memory",
            ));
        }
        let body = match header.format {
            WeightFormat::F32 => Body::Dense(Dense::from_parts(size, Number::F32, part)?),
            WeightFormat::F16 => Body::Dense(Dense::from_parts(size, Number::F16, part)?),
            WeightFormat::Bf16 => Body::Dense(Dense::from_parts(size, Number::Bf16, part)?),
            WeightFormat::SparseF16 => {
                Body::Sparse16(Sparse16::from_parts(size, Number::F16, None, part)?)
            }
            WeightFormat::SparseBf16 => {
                Body::Sparse16(Sparse16::from_parts(size, Number::Bf16, None, part)?)
            }
            WeightFormat::NmF16 { n, m } => Body::Sparse16(Sparse16::from_parts(
                size,
                Number::F16,
                Some(Pattern::new(n, m)?),
                part,
            )?),
            WeightFormat::NmBf16 { n, m } => Body::Sparse16(Sparse16::from_parts(
                size,
                Number::Bf16,
                Some(Pattern::new(n, m)?),
                part,
            )?),
            WeightFormat::Int {
                bits,
                group_size,
                symmetric,
            } => {
                if ![2, 3, 4, 8].contains(&bits) {
                    return Err(Error::argument("bits", bits, "2, 3, 4 or 8"));
                }
                let (wide, ordered) = (header.wide_scales, header.ordered);
                let grid =
                    Grid::from_parts(size, bits, group_size, symmetric, wide, ordered, part)?;
                Body::Int(PackedMatrix::from_parts(size, bits, grid, part)?)
            }
            WeightFormat::SparseInt4 {
                group_size,
                symmetric,
            } => {
                let (wide, ordered) = (header.wide_scales, header.ordered);
                Body::SparseInt4(SparseInt4::from_parts(
                    size,
                    group_size,
                    symmetric,
                    wide,
                    ordered,
                    header.even,
                    part,
                )?)
            }
        };
        Ok(Self { body })
    }

    /// Gives the memory of the values or codes back to the system, if they are mapped from a file.
    /// They are read from the file again when they are used again.
    pub(crate) fn release(&self) {
        match &self.body {
            Body::Dense(dense) => dense.values.release(),
            Body::Int(packed) => packed.codes().release(),
            Body::Sparse16(sparse) => sparse.values.release(),
            Body::SparseInt4(sparse) => sparse.codes.release(),
        }
    }

    /// The arrays of the weight, in a fixed order.
    pub fn parts(&self) -> Vec<Part<'_>> {
        let [rows, cols] = [self.rows(), self.cols()];
        let number = |number: Number| match number {
            Number::F32 => Element::F32,
            Number::F16 => Element::F16,
            Number::Bf16 => Element::Bf16,
        };
        let part = |name, element, shape: &[usize], bytes| Part {
            name,
            element,
            shape: shape.to_vec(),
            bytes,
        };
        let mut parts = Vec::new();
        match &self.body {
            Body::Dense(dense) => {
                parts.push(part(
                    "values",
                    number(dense.number),
                    &[rows, cols],
                    &*dense.values,
                ));
            }
            Body::Int(packed) => {
                let codes = packed.codes();
                parts.push(part(
                    "codes",
                    Element::U8,
                    &[rows, codes.len().checked_div(rows).unwrap_or(0)],
                    &**codes,
                ));
                grid_parts(packed.whole_grid(), &mut parts);
            }
            Body::Sparse16(sparse) => {
                parts.push(part(
                    "mask",
                    Element::U64,
                    &[rows, cols.div_ceil(64)],
                    &*sparse.bits.bytes,
                ));
                parts.push(part(
                    "values",
                    number(sparse.number),
                    &[sparse.values.len() / 2],
                    &*sparse.values,
                ));
                if let Offsets::Stored(offsets) = &sparse.offsets {
                    parts.push(part("offsets", Element::U32, &[rows], &**offsets));
                }
            }
            Body::SparseInt4(sparse) => {
                parts.push(part(
                    "mask",
                    Element::U64,
                    &[rows, cols.div_ceil(64)],
                    &*sparse.bits.bytes,
                ));
                parts.push(part(
                    "codes",
                    Element::U8,
                    &[sparse.codes.len()],
                    &*sparse.codes,
                ));
                if let Offsets::Stored(offsets) = &sparse.offsets {
                    parts.push(part("offsets", Element::U32, &[rows], &**offsets));
                }
                grid_parts(&sparse.grid, &mut parts);
            }
        }
        parts
    }

    /// Reads all parts and checks their contents.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if offsets or counts do not match the mask, a bit after
    /// the last column is set, or a scale is negative or not finite, and [`Error::NotFinite`] if a
    /// stored number is NaN or infinite.
    pub fn check(&self) -> Result<()> {
        match &self.body {
            Body::Dense(dense) => dense.number.check_finite(&dense.values),
            Body::Int(packed) => packed.whole_grid().check(),
            Body::Sparse16(sparse) => sparse.check(),
            Body::SparseInt4(sparse) => sparse.check(),
        }
    }

    /// Number of output features.
    pub fn rows(&self) -> usize {
        match &self.body {
            Body::Dense(dense) => dense.rows,
            Body::Int(packed) => packed.rows(),
            Body::Sparse16(sparse) => sparse.bits.rows,
            Body::SparseInt4(sparse) => sparse.bits.rows,
        }
    }

    /// Number of input features.
    pub fn cols(&self) -> usize {
        match &self.body {
            Body::Dense(dense) => dense.cols,
            Body::Int(packed) => packed.cols(),
            Body::Sparse16(sparse) => sparse.bits.cols,
            Body::SparseInt4(sparse) => sparse.bits.cols,
        }
    }

    /// Storage format.
    pub fn format(&self) -> WeightFormat {
        match &self.body {
            Body::Dense(dense) => match dense.number {
                Number::F32 => WeightFormat::F32,
                Number::F16 => WeightFormat::F16,
                Number::Bf16 => WeightFormat::Bf16,
            },
            Body::Int(packed) => {
                let Grid {
                    bits,
                    group_size,
                    symmetric,
                    ..
                } = *packed.whole_grid();
                WeightFormat::Int {
                    bits,
                    group_size: Some(group_size),
                    symmetric,
                }
            }
            Body::Sparse16(Sparse16 {
                number,
                pattern: Some(Pattern { n, m }),
                ..
            }) => {
                // A pattern is created from two `u8` numbers.
                let (n, m) = (*n as u8, *m as u8);
                if *number == Number::F16 {
                    WeightFormat::NmF16 { n, m }
                } else {
                    WeightFormat::NmBf16 { n, m }
                }
            }
            Body::Sparse16(sparse) if sparse.number == Number::F16 => WeightFormat::SparseF16,
            Body::Sparse16(_) => WeightFormat::SparseBf16,
            Body::SparseInt4(sparse) => {
                let Grid {
                    group_size,
                    symmetric,
                    ..
                } = sparse.grid;
                WeightFormat::SparseInt4 {
                    group_size: Some(group_size),
                    symmetric,
                }
            }
        }
    }

    /// The information needed to read the parts.
    pub fn header(&self) -> MatrixHeader {
        let grid = match &self.body {
            Body::Int(packed) => Some(packed.whole_grid()),
            Body::SparseInt4(sparse) => Some(&sparse.grid),
            _ => None,
        };
        MatrixHeader {
            format: self.format(),
            rows: self.rows(),
            cols: self.cols(),
            wide_scales: grid.is_some_and(|grid| grid.wide),
            ordered: grid.is_some_and(|grid| grid.group_of.is_some()),
            even: matches!(&self.body, Body::SparseInt4(sparse) if sparse.is_even()),
        }
    }

    /// Total number of bytes of all parts.
    pub fn bytes(&self) -> usize {
        match &self.body {
            Body::Dense(dense) => dense.values.len(),
            Body::Int(packed) => packed.bytes(),
            Body::Sparse16(sparse) => sparse.bytes(),
            Body::SparseInt4(sparse) => sparse.bytes(),
        }
    }

    /// Writes the weights of consecutive rows to `out`, starting at row `first`. The values are
    /// exact.
    ///
    /// # Shapes
    /// - `out`: row-major `[n, cols]`, for `n` rows
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if `out` does not consist of whole rows or the weight has
    /// too few rows.
    pub fn dequantize_rows(&self, first: usize, out: &mut [f32]) -> Result<()> {
        let (rows, cols) = (self.rows(), self.cols());
        let n = out.len().checked_div(cols).unwrap_or(0);
        if n * cols != out.len() || first.checked_add(n).is_none_or(|end| end > rows) {
            return Err(Error::ShapeMismatch {
                what: format!("rows of a stored weight from row {first} on"),
                expected: vec![rows.saturating_sub(first), cols],
                found: vec![out.len()],
            });
        }
        if let Body::Int(packed) = &self.body {
            return packed.dequantize_rows(first, out);
        }
        let mut codes = Vec::new();
        for (row, out) in (first..first + n).zip(out.chunks_exact_mut(cols.max(1))) {
            match &self.body {
                Body::Dense(dense) => dense.dequantize_row(row, out),
                Body::Sparse16(sparse) => sparse.dequantize_row(row, out),
                Body::SparseInt4(sparse) => {
                    codes.resize(cols, 0);
                    sparse.dequantize_row(row, &mut codes, out);
                }
                Body::Int(_) => {}
            }
        }
        Ok(())
    }

    /// The weight as a matrix.
    pub fn to_matrix(&self) -> Matrix {
        let mut matrix = Matrix::zeros(self.rows(), self.cols());
        // The range covers exactly all rows, so this cannot fail.
        let _ = self.dequantize_rows(0, matrix.as_mut_slice());
        matrix
    }

    /// The quantized weight, or `None` if the format does not have codes.
    pub fn to_quantized(&self) -> Option<QuantizedMatrix> {
        match &self.body {
            Body::Int(packed) => Some(packed.unpack()),
            Body::SparseInt4(sparse) => Some(sparse.unpack()),
            _ => None,
        }
    }

    /// The packed codes, or `None` if the format is sparse or does not have codes.
    pub fn packed(&self) -> Option<&PackedMatrix> {
        if let Body::Int(packed) = &self.body {
            Some(packed)
        } else {
            None
        }
    }

    pub(crate) fn body(&self) -> &Body {
        &self.body
    }
}

fn grid_parts<'a>(grid: &'a Grid, parts: &mut Vec<Part<'a>>) {
    let [rows, groups] = [grid.rows, grid.groups()];
    parts.push(Part {
        name: "scales",
        element: if grid.wide {
            Element::F32
        } else {
            Element::F16
        },
        shape: vec![rows, groups],
        bytes: &grid.scales,
    });
    if !grid.symmetric {
        parts.push(Part {
            name: "zeros",
            element: Element::U8,
            shape: vec![rows, grid.zeros.len().checked_div(rows).unwrap_or(0)],
            bytes: &grid.zeros,
        });
    }
    if let Some(group_of) = &grid.group_of {
        parts.push(Part {
            name: "groups",
            element: Element::U32,
            shape: vec![grid.cols],
            bytes: bytemuck::cast_slice(group_of),
        });
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::format::testing::random_quantized;

    fn sparse_matrix(rows: usize, cols: usize, density: f64, rng: &mut ChaCha8Rng) -> Matrix {
        Matrix::from_fn(rows, cols, |_, _| {
            if rng.random_bool(density) {
                rng.random_range(-2.0..2.0)
            } else {
                0.0
            }
        })
    }

    #[test]
    fn codes_are_stored_sparse_where_a_third_of_them_are_zeros() {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let mut with_zeros = |share: f64, bits: u8| {
            let mut parts = random_quantized(6, 96, bits, 32, false, &mut rng).into_parts();
            for (index, code) in parts.codes.iter_mut().enumerate() {
                let zero = parts.zeros[index / 32];
                *code = match rng.random_bool(share) {
                    true => zero,
                    false => zero ^ 1,
                };
            }
            QuantizedMatrix::new(parts).unwrap()
        };
        for (share, bits, sparse) in [(0.5, 4, true), (0.1, 4, false), (0.5, 8, false)] {
            let codes = with_zeros(share, bits);
            assert_eq!(codes.count_zeros(), codes.dequantize().count_zeros());
            let stored = StoredMatrix::from_codes(&codes).unwrap();
            let found = matches!(
                stored.format(),
                WeightFormat::SparseInt4 {
                    group_size: Some(32),
                    ..
                }
            );
            assert_eq!(found, sparse, "{share} {bits}");
            assert_eq!(stored.to_matrix(), codes.dequantize());
        }
    }

    fn n_of_m(matrix: &mut Matrix, n: usize, m: usize) {
        let cols = matrix.cols();
        for row in matrix.as_mut_slice().chunks_mut(cols) {
            for group in row.chunks_mut(m) {
                let mut seen = 0;
                for value in group {
                    seen += usize::from(*value != 0.0);
                    if seen > n {
                        *value = 0.0;
                    }
                }
            }
        }
    }

    fn back(stored: &StoredMatrix) -> StoredMatrix {
        let json = serde_json::to_string(&stored.header()).unwrap();
        let header: MatrixHeader = serde_json::from_str(&json).unwrap();
        let parts = stored.parts();
        for part in &parts {
            let size = match part.element {
                Element::U8 => 1,
                Element::F16 | Element::Bf16 => 2,
                Element::U32 | Element::F32 => 4,
                Element::U64 => 8,
            };
            assert_eq!(
                part.shape.iter().product::<usize>() * size,
                part.bytes.len(),
                "{}",
                part.name
            );
        }
        assert_eq!(
            parts.iter().map(|part| part.bytes.len()).sum::<usize>(),
            stored.bytes()
        );
        let find = |name: &str| {
            parts
                .iter()
                .find(|part| part.name == name)
                .map(|part| Buffer::from_vec(part.bytes.to_vec()))
        };
        StoredMatrix::from_parts(&header, find).unwrap()
    }

    #[test]
    fn numbers_come_back_rounded_and_parts_put_together_again() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for case in 0..60 {
            let (rows, cols) = (rng.random_range(0..7), rng.random_range(1..300));
            let mut weight = sparse_matrix(rows, cols, [0.0, 0.1, 0.5, 1.0][case % 4], &mut rng);
            n_of_m(&mut weight, 2, 5);
            if rows > 0 {
                weight.as_mut_slice()[0] = if case % 2 == 0 { -0.0 } else { 1e-7 };
            }
            use WeightFormat as F;
            let formats = [
                F::F32,
                F::F16,
                F::Bf16,
                F::SparseF16,
                F::SparseBf16,
                F::NmF16 { n: 2, m: 5 },
                F::NmBf16 { n: 2, m: 5 },
            ];
            for format in formats {
                let number = match format {
                    F::F32 => Number::F32,
                    F::F16 | F::SparseF16 | F::NmF16 { .. } => Number::F16,
                    _ => Number::Bf16,
                };
                let stored = StoredMatrix::from_matrix(&weight, format).unwrap();
                stored.check().unwrap();
                let rounded =
                    Matrix::from_fn(rows, cols, |row, col| number.rounded(weight.row(row)[col]));
                assert_eq!(stored.to_matrix(), rounded, "{format:?}");
                assert_eq!(
                    (stored.format(), stored.rows(), stored.cols()),
                    (format, rows, cols)
                );
                let nonzero = rows * cols - rounded.count_zeros();
                assert_eq!(
                    stored.bytes(),
                    format.bytes(rows, cols, nonzero),
                    "{format:?}"
                );
                assert_eq!(back(&stored), stored);
            }
        }
    }

    #[test]
    fn codes_come_back_exactly() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for case in 0..60 {
            let (rows, cols) = (rng.random_range(1..7), rng.random_range(1..300));
            let group_size = [8, 17, 32, 128, 5000][case % 5];
            let symmetric = rng.random();
            let mut parts =
                random_quantized(rows, cols, 4, group_size, symmetric, &mut rng).into_parts();
            let groups = cols.div_ceil(group_size);
            for row in 0..rows {
                for col in 0..cols {
                    if rng.random_bool(0.5) {
                        parts.codes[row * cols + col] =
                            parts.zeros[row * groups + col / group_size];
                    }
                }
            }
            if case % 3 == 0 {
                parts.group_of = Some(
                    (0..cols)
                        .map(|_| rng.random_range(0..groups as u32))
                        .collect(),
                );
            }
            if case % 4 == 0 {
                parts.scales[0] = 0.1;
            }
            let matrix = QuantizedMatrix::new(parts).unwrap();
            for sparse in [false, true] {
                let stored = StoredMatrix::from_quantized(&matrix, sparse).unwrap();
                stored.check().unwrap();
                assert_eq!(stored.to_quantized().unwrap(), matrix);
                assert_eq!(stored.to_matrix(), matrix.dequantize());
                assert_eq!(back(&stored), stored);
            }
        }
        let three = random_quantized(2, 9, 3, 4, true, &mut rng);
        assert!(StoredMatrix::from_quantized(&three, true).is_err());
    }

    /// Codes of which `n` of each `m` columns, or of the last ones, are not 0.
    fn patterned(rows: usize, cols: usize, n: usize, m: usize, rng: &mut ChaCha8Rng) -> Body {
        let mut parts = random_quantized(rows, cols, 4, 32, false, rng).into_parts();
        for (row, codes) in parts.codes.chunks_mut(cols).enumerate() {
            for (col, code) in codes.iter_mut().enumerate() {
                let zero = parts.zeros[row * cols.div_ceil(32) + col / 32];
                // Not always the same columns.
                let kept = (col % m + row) % m < n;
                *code = if kept { zero ^ 1 } else { zero };
            }
        }
        let matrix = QuantizedMatrix::new(parts).unwrap();
        let stored = StoredMatrix::from_quantized(&matrix, true).unwrap();
        stored.check().unwrap();
        assert_eq!(stored.to_quantized().unwrap(), matrix);
        assert_eq!(back(&stored), stored);
        stored.body
    }

    #[test]
    fn patterns_that_keep_half_make_even_weights() {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        for (n, m, cols, expected) in [
            (2, 4, 256, true),
            (16, 32, 640, true),
            (32, 64, 150, true),
            (32, 64, 64, true),
            (31, 64, 128, true),  // nearly full words are filled up
            (20, 64, 128, false), // but not those that waste memory
            (33, 64, 128, false),
            (2, 4, 60, false), // no whole word
        ] {
            let Body::SparseInt4(sparse) = patterned(3, cols, n, m, &mut rng) else {
                panic!()
            };
            assert_eq!(sparse.is_even(), expected, "{n}:{m} of {cols}");
            if expected && cols.is_multiple_of(256) {
                assert_eq!(sparse.codes.len(), 3 * cols / 4);
                assert_eq!(sparse.offsets.bytes(), 0);
            }
        }
    }

    #[test]
    fn what_no_format_holds_is_refused() {
        let weight = Matrix::new(1, 4, vec![1.0, 1e9, 0.0, 3.0]).unwrap();
        use WeightFormat as F;
        for format in [
            F::F16,
            F::SparseF16,
            F::NmBf16 { n: 2, m: 4 },
            F::NmF16 { n: 3, m: 2 },
        ] {
            assert!(
                StoredMatrix::from_matrix(&weight, format).is_err(),
                "{format:?}"
            );
        }
        let format = F::Int {
            bits: 4,
            group_size: None,
            symmetric: true,
        };
        assert!(StoredMatrix::from_matrix(&weight, format).is_err());
    }

    #[test]
    fn parts_that_lie_are_refused_and_read_nothing_outside() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let weight = sparse_matrix(5, 150, 0.5, &mut rng);
        let mut parts = random_quantized(5, 150, 4, 16, false, &mut rng).into_parts();
        parts
            .codes
            .iter_mut()
            .for_each(|code| *code = if rng.random() { *code } else { 3 });
        let matrix = QuantizedMatrix::new(parts).unwrap();
        let stored = [
            StoredMatrix::from_matrix(&weight, WeightFormat::SparseF16).unwrap(),
            StoredMatrix::from_matrix(&weight, WeightFormat::NmBf16 { n: 4, m: 4 }).unwrap(),
            StoredMatrix::from_quantized(&matrix, true).unwrap(),
            StoredMatrix::from_quantized(&matrix, false).unwrap(),
            StoredMatrix {
                body: patterned(5, 150, 2, 4, &mut rng),
            },
        ];
        for stored in stored {
            for target in stored.parts().iter().map(|part| part.name) {
                for trial in 0..20 {
                    let find = |name: &str| {
                        let part = stored.parts().into_iter().find(|part| part.name == name)?;
                        let mut bytes = part.bytes.to_vec();
                        if name == target {
                            match trial {
                                0 => drop(bytes.pop()),
                                1 => bytes.push(0),
                                2 => bytes.fill(0xFF),
                                _ => {
                                    let at = rng.random_range(0..bytes.len());
                                    bytes[at] ^= 1 << rng.random_range(0..8);
                                }
                            }
                        }
                        Some(Buffer::from_vec(bytes))
                    };
                    let Ok(made) = StoredMatrix::from_parts(&stored.header(), find) else {
                        continue;
                    };
                    let refused = made.check().is_err();
                    made.to_matrix();
                    if ["mask", "offsets"].contains(&target)
                        || (trial < 3 && !["zeros", "values"].contains(&target))
                    {
                        // The length of a row is that of the longer of its two streams, so a
                        // flipped bit of the mask in the shorter one may go unnoticed, and so may one
                        // in the last word of an even weight.
                        let hidden = target == "mask"
                            && trial > 2
                            && matches!(made.body, Body::SparseInt4(_));
                        let whole = hidden || target == "codes" && trial == 2 || made == stored;
                        assert!(
                            refused || whole,
                            "{target} {trial} of {:?}",
                            stored.format()
                        );
                    }
                }
            }
            let none = StoredMatrix::from_parts(&stored.header(), |_| None)
                .unwrap_err()
                .to_string();
            assert!(none.contains("part"), "{none}");
        }
    }
}
