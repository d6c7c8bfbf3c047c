//! Sparse 4-bit weights: one bit per weight, and the codes of those that differ from their zero
//! point.

use super::buffer::{Aligned, Buffer};
use super::grid::Grid;
use super::groups::{QuantizedMatrix, QuantizedParts};
use super::sparse::{Bits, Offsets};
use crate::error::{Error, Result};

/// Number of bits per code.
const BITS: u8 = 4;

/// A sparse INT4 weight. A code that is not stored equals its zero point, so the weight is 0.
///
/// The codes of a row form two streams, one in the low and one in the high halves of the same
/// bytes. Blocks of 128 columns alternate between the streams (see [`is_high`]), so that both have
/// about the same length; a row takes as many bytes as the longer one. This way, one `and` extracts
/// the 64 codes of a word from their bytes, and a reader of a stream never has to separate the two
/// halves of a byte.
///
/// A weight is *even* if all whole words have [`EVEN`] stored codes, as a pattern such as 2:4, 16:32
/// or 32:64 leaves them. Words with fewer are filled up with stored zero points. The codes of a word
/// are then at a place that no reader has to count for, and no row needs an offset.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SparseInt4 {
    pub bits: Bits,
    pub codes: Buffer,
    /// Offsets in bytes. Those of an even weight are not stored.
    pub offsets: Offsets,
    pub grid: Grid,
}

/// Number of stored codes of each whole word of an even weight, and the most that its last word may
/// have.
pub(crate) const EVEN: usize = 32;

/// A weight is stored as an even one if this takes at most so many times the bytes of its codes.
const EVEN_WASTE: f64 = 1.1;

/// Whether the codes of word `word` (64 columns) of a row of `words` words are in the high halves
/// of bytes. They are for every second block of 128 columns, and for the second half of a final
/// block that has no partner.
pub(crate) fn is_high(word: usize, words: usize) -> bool {
    word % 4 >= 2 || (words % 4 == 2 && word + 1 == words)
}

/// Number of bytes of a row's codes, by the number of codes of each word.
fn row_bytes(row: impl ExactSizeIterator<Item = u32>) -> usize {
    let words = row.len();
    let mut streams = [0; 2];
    for (index, codes) in row.enumerate() {
        streams[usize::from(is_high(index, words))] += codes as usize;
    }
    streams[0].max(streams[1])
}

/// Number of bytes of the codes of each row of an even weight.
pub(crate) fn even_row_bytes(cols: usize) -> usize {
    let words = cols.div_ceil(64);
    let high = (0..words).filter(|word| is_high(*word, words)).count();
    EVEN * high.max(words - high)
}

/// Adds zeros to the weights to store, so that each whole word of a row has [`EVEN`]. Returns false,
/// and changes nothing, if a word has more or if too much memory would be wasted.
fn make_even(kept: &mut [bool], cols: usize) -> bool {
    if cols < 64 {
        return false;
    }
    let count = |word: &[bool]| word.iter().filter(|kept| **kept).count();
    let mut bytes = 0;
    for row in kept.chunks(cols) {
        if row.chunks(64).any(|word| count(word) > EVEN) {
            return false;
        }
        bytes += row_bytes(row.chunks(64).map(|word| count(word) as u32));
    }
    let rows = kept.len() / cols;
    if (rows * even_row_bytes(cols)) as f64 > EVEN_WASTE * bytes as f64 {
        return false;
    }
    for word in kept
        .chunks_mut(cols)
        .flat_map(|row| row.chunks_exact_mut(64))
    {
        let missing = EVEN - count(word);
        let zeros = word.iter_mut().filter(|kept| !**kept);
        zeros.take(missing).for_each(|kept| *kept = true);
    }
    true
}

/// Number of bytes of the codes of each row.
fn row_lengths(mask: &Bits) -> impl Iterator<Item = usize> + '_ {
    (0..mask.rows).map(|row| row_bytes(mask.row(row).map(u64::count_ones)))
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
        let even = make_even(&mut kept, cols);
        let mask = Bits::from_fn(rows, cols, |row, col| kept[row * cols + col]);
        let (offsets, len) = if even {
            let every = even_row_bytes(cols);
            (Offsets::Every(every), rows * every)
        } else {
            Offsets::from_lengths(rows, row_lengths(&mask))?
        };
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

    #[allow(clippy::too_many_arguments)] // the fields of a header
    pub fn from_parts(
        size: [usize; 2],
        group_size: Option<usize>,
        symmetric: bool,
        wide: bool,
        ordered: bool,
        even: bool,
        part: &mut dyn FnMut(&str) -> Result<Buffer>,
    ) -> Result<Self> {
        let grid = Grid::from_parts(size, BITS, group_size, symmetric, wide, ordered, part)?;
        let mask = Bits::from_parts(size, part)?;
        let codes = part("codes")?;
        let offsets = if even {
            let every = even_row_bytes(size[1]);
            super::expect_bytes("codes", &codes, &[size[0], every])?;
            Offsets::Every(every)
        } else {
            let offsets = part("offsets")?;
            super::expect_bytes("offsets", &offsets, &[size[0], 4])?;
            Offsets::Stored(offsets)
        };
        Ok(Self {
            bits: mask,
            codes,
            offsets,
            grid,
        })
    }

    /// Whether all whole words have [`EVEN`] codes.
    pub fn is_even(&self) -> bool {
        matches!(self.offsets, Offsets::Every(_))
    }

    pub fn check(&self) -> Result<()> {
        self.bits.check()?;
        if self.is_even() {
            self.check_even()?;
        } else {
            self.offsets
                .check(row_lengths(&self.bits), self.bits.rows, self.codes.len())?;
        }
        self.grid.check()
    }

    fn check_even(&self) -> Result<()> {
        let whole = self.bits.cols / 64;
        for row in 0..self.bits.rows {
            for (index, word) in self.bits.row(row).enumerate() {
                let codes = word.count_ones() as usize;
                if codes > EVEN || (index < whole && codes != EVEN) {
                    return Err(Error::argument(
                        "mask",
                        format!("{codes} codes in word {index} of row {row}"),
                        format!("{EVEN} codes in each word of an even weight"),
                    ));
                }
            }
        }
        Ok(())
    }

    pub fn bytes(&self) -> usize {
        self.bits.bytes.len() + self.codes.len() + self.offsets.bytes() + self.grid.bytes()
    }

    /// Writes all codes of a row. Codes missing from the buffer are read as 0.
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
