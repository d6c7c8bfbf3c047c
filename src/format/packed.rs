//! Quantized weights with densely packed codes.

use super::bits;
use super::buffer::Buffer;
use super::expect_bytes;
use super::grid::{Grid, pack_rows};
use super::groups::{QuantizedMatrix, QuantizedParts};
use crate::error::{Error, Result};

/// Number of columns unpacked at a time; a multiple of 8, so that each block starts at a whole
/// byte.
const BLOCK: usize = 256;

/// A [`QuantizedMatrix`] with packed codes. Packing is lossless: [`unpack`](Self::unpack) returns
/// the original matrix. Clones share the bytes.
///
/// Each of the `rows` rows is stored independently:
///
/// | part | bytes per row |
/// |---|---|
/// | codes | `ceil(cols * bits / 8)`: code `i` starts at bit `i * bits`, little-endian, no gaps |
/// | scales | `2 * groups` as `f16`, or `4 * groups` as `f32` if any scale is not an exact `f16` |
/// | zero points | `ceil(groups * bits / 8)`, packed like codes; none if the grid is symmetric |
///
/// If the matrix has its own order of columns, another `4 * cols` bytes hold the group of each
/// column, once for all rows.
#[derive(Clone, Debug, PartialEq)]
#[doc(hidden)]
pub struct PackedMatrix {
    codes: Buffer,
    grid: Grid,
}

impl PackedMatrix {
    /// Packs a matrix.
    pub fn new(matrix: &QuantizedMatrix) -> Self {
        let parts = matrix.parts();
        Self {
            codes: pack_rows(&parts.codes, parts.rows, parts.cols, parts.bits),
            grid: Grid::new(parts),
        }
    }

    pub(super) fn from_parts(
        [rows, cols]: [usize; 2],
        bits: u8,
        grid: Grid,
        part: &mut dyn FnMut(&str) -> Result<Buffer>,
    ) -> Result<Self> {
        let codes = part("codes")?;
        expect_bytes("codes", &codes, &[rows, bits::packed_len(cols, bits)])?;
        Ok(Self { codes, grid })
    }

    /// Unpacks the matrix.
    pub fn unpack(&self) -> QuantizedMatrix {
        let Grid {
            rows,
            cols,
            bits,
            group_size,
            symmetric,
            ..
        } = self.grid;
        let mut codes = vec![0; rows * cols];
        if cols > 0 {
            for (row, out) in codes.chunks_mut(cols).enumerate() {
                bits::unpack(self.row_codes(row), bits, out);
            }
        }
        let (scales, zeros) = self.grid.values();
        QuantizedMatrix::from_valid(QuantizedParts {
            rows,
            cols,
            bits,
            group_size,
            symmetric,
            codes,
            scales,
            zeros,
            group_of: self.group_of().map(<[u32]>::to_vec),
        })
    }

    /// Number of output features.
    pub fn rows(&self) -> usize {
        self.grid.rows
    }

    /// Number of input features.
    pub fn cols(&self) -> usize {
        self.grid.cols
    }

    /// Number of bits per code.
    pub fn bits(&self) -> u8 {
        self.grid.bits
    }

    /// Number of columns per group; the last group of a row may be shorter.
    pub fn group_size(&self) -> usize {
        self.grid.group_size
    }

    /// Number of groups per row.
    pub fn groups(&self) -> usize {
        self.grid.groups()
    }

    /// The group of each column, if it is not `column / group_size`.
    pub fn group_of(&self) -> Option<&[u32]> {
        self.grid.group_of.as_deref()
    }

    /// The packed codes of a row.
    ///
    /// # Panics
    /// Panics if the row does not exist.
    pub fn row_codes(&self, row: usize) -> &[u8] {
        let len = bits::packed_len(self.cols(), self.bits());
        &self.codes[row * len..(row + 1) * len]
    }

    /// The scale and zero point of a group of a row.
    ///
    /// # Panics
    /// Panics if the row or the group does not exist.
    pub fn grid(&self, row: usize, group: usize) -> (f32, u8) {
        self.grid.at(row, group)
    }

    /// The scales and zero points of all rows.
    pub(crate) fn whole_grid(&self) -> &Grid {
        &self.grid
    }

    /// The packed codes of all rows.
    pub(crate) fn codes(&self) -> &Buffer {
        &self.codes
    }

    /// Number of bytes of codes, scales, zero points and groups.
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.grid.bytes()
    }

    /// Writes the weights of consecutive rows to `out`, starting at row `first`. The values are
    /// bit-identical to those of [`QuantizedMatrix::dequantize`].
    ///
    /// # Shapes
    /// - `out`: row-major `[n, cols]`, for `n` rows
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if `out` does not consist of whole rows or the matrix has
    /// too few rows.
    pub fn dequantize_rows(&self, first: usize, out: &mut [f32]) -> Result<()> {
        let n = out.len().checked_div(self.cols()).unwrap_or(0);
        if n * self.cols() != out.len() || first.checked_add(n).is_none_or(|end| end > self.rows())
        {
            return Err(Error::ShapeMismatch {
                what: format!("rows of a packed weight from row {first} on"),
                expected: vec![self.rows().saturating_sub(first), self.cols()],
                found: vec![out.len()],
            });
        }
        if n > 0 {
            for (row, out) in (first..).zip(out.chunks_exact_mut(self.cols())) {
                self.dequantize_row(row, out);
            }
        }
        Ok(())
    }

    fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        let codes = self.row_codes(row);
        let mut buffer = [0; BLOCK];
        for (index, out) in out.chunks_mut(BLOCK).enumerate() {
            let start = index * BLOCK;
            let block = &mut buffer[..out.len()];
            bits::unpack(
                &codes[bits::packed_len(start, self.bits())..],
                self.bits(),
                block,
            );
            self.grid
                .for_runs(row, start, start + out.len(), |run, scale, zero| {
                    let run = run.start - start..run.end - start;
                    for (out, code) in out[run.clone()].iter_mut().zip(&block[run]) {
                        *out = QuantizedMatrix::value(scale, zero, *code);
                    }
                });
        }
    }
}

/// Whether all values are exactly representable as `f16`.
pub(crate) fn all_f16(values: &[f32]) -> bool {
    values
        .iter()
        .all(|value| half::f16::from_f32(*value).to_f32() == *value)
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::format::WeightFormat;
    use crate::format::testing::random_quantized;

    #[test]
    fn packing_loses_nothing_and_takes_what_the_layout_says() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for case in 0..120 {
            let bits = [2, 3, 4, 8][case % 4];
            let (rows, cols) = (rng.random_range(1..7), rng.random_range(1..700));
            let group_size = [1, 3, 17, 32, 128, 5000][rng.random_range(0..6)];
            let (symmetric, ordered, exact) =
                (rng.random(), rng.random_bool(0.3), rng.random_bool(0.5));
            let mut parts =
                random_quantized(rows, cols, bits, group_size, symmetric, &mut rng).into_parts();
            let groups = cols.div_ceil(group_size);
            if ordered {
                parts.group_of = Some(
                    (0..cols)
                        .map(|_| rng.random_range(0..groups as u32))
                        .collect(),
                );
            }
            if !exact {
                parts.scales[0] = 0.1;
            }
            let matrix = QuantizedMatrix::new(parts).unwrap();
            let packed = PackedMatrix::new(&matrix);
            assert_eq!(packed.unpack(), matrix);
            if exact && !ordered {
                let format = WeightFormat::Int {
                    bits,
                    group_size: Some(group_size),
                    symmetric,
                };
                assert_eq!(packed.bytes(), format.bytes(rows, cols, 0));
            }
            let bits = usize::from(bits);
            let row = (cols * bits).div_ceil(8)
                + groups * if exact { 2 } else { 4 }
                + if symmetric {
                    0
                } else {
                    (groups * bits).div_ceil(8)
                };
            assert_eq!(
                packed.bytes(),
                rows * row + if ordered { 4 * cols } else { 0 }
            );

            let whole = matrix.dequantize();
            let first = rng.random_range(0..rows);
            let n = rng.random_range(0..=rows - first);
            let mut out = vec![f32::NAN; n * cols];
            packed.dequantize_rows(first, &mut out).unwrap();
            assert_eq!(out, whole.as_slice()[first * cols..(first + n) * cols]);
            assert!(packed.dequantize_rows(rows, &mut [0.0; 1]).is_err() || cols > 1);
            assert!(
                packed
                    .dequantize_rows(first, &mut vec![0.0; (rows - first + 1) * cols])
                    .is_err()
            );
            assert!(
                packed
                    .dequantize_rows(usize::MAX, &mut vec![0.0; cols])
                    .is_err()
            );
        }
    }

    #[test]
    fn four_bits_are_half_a_byte() {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let packed = PackedMatrix::new(&random_quantized(64, 256, 4, 128, true, &mut rng));
        assert_eq!(packed.bytes(), 64 * 256 / 2 + 64 * 2 * 2);
        let packed = PackedMatrix::new(&random_quantized(64, 256, 3, 128, false, &mut rng));
        assert_eq!(packed.bytes(), 64 * (96 + 4 + 1));
    }
}
