//! Sparse weights of 4 bits: a bit for each, and the codes of those that are not their zero point.

use super::bits;
use super::buffer::{Aligned, Buffer};
use super::grid::Grid;
use super::groups::{QuantizedMatrix, QuantizedParts};
use super::sparse::{Bits, Offsets};
use crate::error::{Error, Result};

/// Bits of a code.
const BITS: u8 = 4;

/// A sparse INT4 weight: a code that is not stored is its zero point, so that the weight is 0. The codes of each 64 columns begin
/// at a whole byte, the lower half first.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SparseInt4 {
    pub bits: Bits,
    pub codes: Buffer,
    /// In bytes.
    pub offsets: Offsets,
    pub grid: Grid,
}

/// Bytes of the codes of 64 columns.
fn block_bytes(word: u64) -> usize {
    word.count_ones().div_ceil(2) as usize
}

impl SparseInt4 {
    pub fn new(matrix: &QuantizedMatrix) -> Result<Self> {
        let parts = matrix.parts();
        if parts.bits != BITS {
            return Err(Error::argument("bits", parts.bits, "4, where a quantized weight is stored sparse"));
        }
        let (rows, cols) = (parts.rows, parts.cols);
        let grid = Grid::new(parts);
        let mut kept = vec![false; rows * cols];
        for row in 0..rows {
            grid.for_runs(row, 0, cols, |run, _, zero| {
                let range = row * cols + run.start..row * cols + run.end;
                let codes = parts.codes[range.clone()].iter();
                kept[range].iter_mut().zip(codes).for_each(|(kept, code)| *kept = *code != zero);
            });
        }
        let mask = Bits::from_fn(rows, cols, |row, col| kept[row * cols + col]);
        let lengths = (0..rows).map(|row| mask.row(row).map(block_bytes).sum());
        let (offsets, len) = Offsets::from_lengths(rows, lengths)?;
        let mut packed = Aligned::zeroed(len);
        let mut out = packed.bytes_mut();
        let mut block = Vec::with_capacity(64);
        for row in 0..rows {
            let codes = parts.codes[row * cols..(row + 1) * cols].chunks(64);
            for (codes, kept) in codes.zip(kept[row * cols..(row + 1) * cols].chunks(64)) {
                block.clear();
                block.extend(codes.iter().zip(kept).filter_map(|(code, kept)| kept.then_some(*code)));
                let (now, rest) = out.split_at_mut(bits::packed_len(block.len(), BITS));
                bits::pack(&block, BITS, now);
                out = rest;
            }
        }
        Ok(Self { bits: mask, codes: packed.into(), offsets, grid })
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
        Ok(Self { bits: mask, codes, offsets: Offsets::Stored(offsets), grid })
    }

    pub fn check(&self) -> Result<()> {
        self.bits.check()?;
        let lengths = (0..self.bits.rows).map(|row| self.bits.row(row).map(block_bytes).sum());
        self.offsets.check(lengths, self.bits.rows, self.codes.len())?;
        self.grid.check()
    }

    pub fn bytes(&self) -> usize {
        self.bits.bytes.len() + self.codes.len() + self.offsets.bytes() + self.grid.bytes()
    }

    /// All codes of a row. Those that the parts do not have are 0.
    pub fn row_codes(&self, row: usize, out: &mut [u8]) {
        let mut at = self.offsets.get(row);
        self.grid.for_runs(row, 0, self.bits.cols, |run, _, zero| out[run].fill(zero));
        for (word, out) in self.bits.row(row).zip(out.chunks_mut(64)) {
            let codes = self.codes.get(at..).unwrap_or(&[]);
            let mut rest = word;
            for index in 0..word.count_ones() as usize {
                let pair = codes.get(index / 2).copied().unwrap_or(0);
                if let Some(out) = out.get_mut(rest.trailing_zeros() as usize) {
                    *out = pair >> (4 * (index % 2)) & 0x0F;
                }
                rest &= rest - 1;
            }
            at += block_bytes(word);
        }
    }

    pub fn dequantize_row(&self, row: usize, codes: &mut [u8], out: &mut [f32]) {
        self.row_codes(row, codes);
        self.grid.for_runs(row, 0, self.bits.cols, |run, scale, zero| {
            let codes = &codes[run.clone()];
            out[run].iter_mut().zip(codes).for_each(|(out, code)| *out = QuantizedMatrix::value(scale, zero, *code));
        });
    }

    pub fn unpack(&self) -> QuantizedMatrix {
        let (rows, cols) = (self.bits.rows, self.bits.cols);
        let mut codes = vec![0; rows * cols];
        if cols > 0 {
            codes.chunks_mut(cols).enumerate().for_each(|(row, out)| self.row_codes(row, out));
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
