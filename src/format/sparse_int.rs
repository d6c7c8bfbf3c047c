//! Sparse weights of 4 bits: a bit for each, and the codes of those that are not their zero point.

use super::buffer::{Aligned, Buffer};
use super::grid::Grid;
use super::groups::{QuantizedMatrix, QuantizedParts};
use super::sparse::{Bits, Offsets};
use crate::error::{Error, Result};

/// Bits of a code.
const BITS: u8 = 4;

/// A sparse INT4 weight: a code that is not stored is its zero point, so that the weight is 0.
///
/// The codes of a row are two streams, in the low and in the high halves of the same bytes. Blocks of 128 columns take turns (see
/// [`is_high`]), so that the streams are about as long as each other, and a row takes as many bytes as the longer one. That way the 64
/// codes of a word come out of their bytes by one `and`: whoever reads a stream never has to part the two halves of a byte.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SparseInt4 {
    pub bits: Bits,
    pub codes: Buffer,
    /// In bytes.
    pub offsets: Offsets,
    pub grid: Grid,
}

/// Whether the codes of a word, 64 columns, of a row of so many words are in the high halves of bytes: those of each second block of 128
/// columns, and of the second half of a last block that has no partner.
pub(crate) fn is_high(word: usize, words: usize) -> bool {
    word % 4 >= 2 || (words % 4 == 2 && word + 1 == words)
}

/// Bytes of the codes of a row.
fn row_bytes(row: impl ExactSizeIterator<Item = u64>) -> usize {
    let words = row.len();
    let mut streams = [0; 2];
    for (index, word) in row.enumerate() {
        streams[usize::from(is_high(index, words))] += word.count_ones() as usize;
    }
    streams[0].max(streams[1])
}

impl SparseInt4 {
    pub fn new(matrix: &QuantizedMatrix) -> Result<Self> {
        let parts = matrix.parts();
        if parts.bits != BITS {
            return Err(Error::argument(
                "bits",
                parts.bits,
                "4, where a quantized weight is stored sparse",
            ));
        }
        let (rows, cols) = (parts.rows, parts.cols);
        let grid = Grid::new(parts);
        let mut kept = vec![false; rows * cols];
        for row in 0..rows {
            grid.for_runs(row, 0, cols, |run, _, zero| {
                let range = row * cols + run.start..row * cols + run.end;
                let codes = parts.codes[range.clone()].iter();
                kept[range]
                    .iter_mut()
                    .zip(codes)
                    .for_each(|(kept, code)| *kept = *code != zero);
            });
        }
        let mask = Bits::from_fn(rows, cols, |row, col| kept[row * cols + col]);
        let lengths = (0..rows).map(|row| row_bytes(mask.row(row)));
        let (offsets, len) = Offsets::from_lengths(rows, lengths)?;
        let mut packed = Aligned::zeroed(len);
        let out = packed.bytes_mut();
        for row in 0..rows {
            let mut at = [offsets.get(row); 2];
            let words = mask.row(row);
            let count = words.len();
            for (index, word) in words.enumerate() {
                let high = is_high(index, count);
                let at = &mut at[usize::from(high)];
                let mut rest = word;
                while rest != 0 {
                    let col = 64 * index + rest.trailing_zeros() as usize;
                    out[*at] |= parts.codes[row * cols + col] << if high { 4 } else { 0 };
                    *at += 1;
                    rest &= rest - 1;
                }
            }
        }
        Ok(Self {
            bits: mask,
            codes: packed.into(),
            offsets,
            grid,
        })
    }

    #[allow(clippy::too_many_arguments)] // what a header says
    pub fn from_parts(
        size: [usize; 2],
        group_size: Option<usize>,
        symmetric: bool,
        wide: bool,
        ordered: bool,
        part: &mut dyn FnMut(&str) -> Result<Buffer>,
    ) -> Result<Self> {
        let grid = Grid::from_parts(size, BITS, group_size, symmetric, wide, ordered, part)?;
        let mask = Bits::from_parts(size, part)?;
        let offsets = part("offsets")?;
        super::expect_bytes("offsets", &offsets, &[size[0], 4])?;
        let codes = part("codes")?;
        Ok(Self {
            bits: mask,
            codes,
            offsets: Offsets::Stored(offsets),
            grid,
        })
    }

    pub fn check(&self) -> Result<()> {
        self.bits.check()?;
        let lengths = (0..self.bits.rows).map(|row| row_bytes(self.bits.row(row)));
        self.offsets
            .check(lengths, self.bits.rows, self.codes.len())?;
        self.grid.check()
    }

    pub fn bytes(&self) -> usize {
        self.bits.bytes.len() + self.codes.len() + self.offsets.bytes() + self.grid.bytes()
    }

    /// All codes of a row. Those that the parts do not have are 0.
    pub fn row_codes(&self, row: usize, out: &mut [u8]) {
        let mut at = [self.offsets.get(row); 2];
        self.grid
            .for_runs(row, 0, self.bits.cols, |run, _, zero| out[run].fill(zero));
        let words = self.bits.row(row);
        let count = words.len();
        for (index, (word, out)) in words.zip(out.chunks_mut(64)).enumerate() {
            let high = is_high(index, count);
            let at = &mut at[usize::from(high)];
            let mut rest = word;
            while rest != 0 {
                let pair = self.codes.get(*at).copied().unwrap_or(0);
                if let Some(out) = out.get_mut(rest.trailing_zeros() as usize) {
                    *out = pair >> if high { 4 } else { 0 } & 0x0F;
                }
                *at += 1;
                rest &= rest - 1;
            }
        }
    }

    pub fn dequantize_row(&self, row: usize, codes: &mut [u8], out: &mut [f32]) {
        self.row_codes(row, codes);
        self.grid
            .for_runs(row, 0, self.bits.cols, |run, scale, zero| {
                let codes = &codes[run.clone()];
                out[run]
                    .iter_mut()
                    .zip(codes)
                    .for_each(|(out, code)| *out = QuantizedMatrix::value(scale, zero, *code));
            });
    }

    pub fn unpack(&self) -> QuantizedMatrix {
        let (rows, cols) = (self.bits.rows, self.bits.cols);
        let mut codes = vec![0; rows * cols];
        if cols > 0 {
            codes
                .chunks_mut(cols)
                .enumerate()
                .for_each(|(row, out)| self.row_codes(row, out));
        }
        let (scales, zeros) = self.grid.values();
        QuantizedMatrix::from_valid(QuantizedParts {
            rows,
            cols,
            bits: BITS,
            group_size: self.grid.group_size,
            symmetric: self.grid.symmetric,
            codes,
            scales,
            zeros,
            group_of: self.grid.group_of.as_deref().map(<[u32]>::to_vec),
        })
    }
}
