//! Sparse weights: one bit per weight, and the values of those that are not zero.

use super::buffer::{Aligned, Buffer};
use super::dense::Number;
use super::expect_bytes;
use crate::error::{Error, Result};
use crate::linalg::Matrix;

/// One bit per weight. Each row starts at a 64-bit word, and bits after the last column are 0.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Bits {
    pub rows: usize,
    pub cols: usize,
    pub bytes: Buffer,
}

impl Bits {
    pub fn from_fn(rows: usize, cols: usize, mut is_set: impl FnMut(usize, usize) -> bool) -> Self {
        let words = cols.div_ceil(64);
        let mut bytes = Aligned::zeroed(rows * words * 8);
        for (index, out) in bytes
            .bytes_mut()
            .as_chunks_mut::<8>()
            .0
            .iter_mut()
            .enumerate()
        {
            let (row, first) = (index / words, index % words * 64);
            let word = (first..cols.min(first + 64)).fold(0, |word, col| {
                word | u64::from(is_set(row, col)) << (col - first)
            });
            *out = word.to_le_bytes();
        }
        Self {
            rows,
            cols,
            bytes: bytes.into(),
        }
    }

    pub fn from_parts(
        [rows, cols]: [usize; 2],
        part: &mut dyn FnMut(&str) -> Result<Buffer>,
    ) -> Result<Self> {
        let bytes = part("mask")?;
        expect_bytes("mask", &bytes, &[rows, cols.div_ceil(64), 8])?;
        Ok(Self { rows, cols, bytes })
    }

    /// The words of a row.
    pub fn row(&self, row: usize) -> impl ExactSizeIterator<Item = u64> + '_ {
        let words = self.cols.div_ceil(64);
        self.bytes.as_chunks::<8>().0[row * words..(row + 1) * words]
            .iter()
            .map(|bytes| u64::from_le_bytes(*bytes))
    }

    /// Returns an error if a bit after the last column is set.
    pub fn check(&self) -> Result<()> {
        if self.cols.is_multiple_of(64) {
            return Ok(());
        }
        for row in 0..self.rows {
            if self
                .row(row)
                .last()
                .is_some_and(|word| word >> (self.cols % 64) != 0)
            {
                return Err(Error::argument(
                    "mask",
                    format!("a bit past column {} in row {row}", self.cols),
                    "0",
                ));
            }
        }
        Ok(())
    }
}

/// At most `n` of each `m` consecutive weights of a row are not zero. Exactly `n` are stored, so
/// all rows have the same length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pattern {
    pub n: usize,
    pub m: usize,
}

impl Pattern {
    pub fn new(n: u8, m: u8) -> Result<Self> {
        if n == 0 || n > m {
            return Err(Error::argument(
                "pattern",
                format!("{n}:{m}"),
                "N:M with 1 <= N <= M",
            ));
        }
        Ok(Self {
            n: usize::from(n),
            m: usize::from(m),
        })
    }

    /// Number of weights stored for a row of `cols` columns.
    pub fn stored(self, cols: usize) -> usize {
        cols / self.m * self.n + self.n.min(cols % self.m)
    }
}

/// The position where the values of each row start.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Offsets {
    /// Little-endian `u32`, one per row.
    Stored(Buffer),
    /// All rows have this length.
    Every(usize),
}

impl Offsets {
    pub fn get(&self, row: usize) -> usize {
        match self {
            Self::Stored(bytes) => u32::from_le_bytes(bytes.as_chunks::<4>().0[row]) as usize,
            Self::Every(len) => row * len,
        }
    }

    /// The same offsets, borrowed from the buffers.
    pub fn starts(&self) -> Starts<'_> {
        match self {
            Self::Stored(bytes) => Starts {
                stored: bytes.as_chunks::<4>().0,
                every: None,
            },
            Self::Every(len) => Starts {
                stored: &[],
                every: Some(*len),
            },
        }
    }

    pub fn bytes(&self) -> usize {
        if let Self::Stored(bytes) = self {
            bytes.len()
        } else {
            0
        }
    }

    /// Returns an error unless rows of these lengths follow each other at the offsets and end at
    /// `end`.
    pub fn check(
        &self,
        mut lengths: impl Iterator<Item = usize>,
        rows: usize,
        end: usize,
    ) -> Result<()> {
        let mut at = 0_usize;
        for row in 0..rows {
            let found = self.get(row);
            if found != at {
                return Err(Error::argument(
                    "offset",
                    found,
                    format!("{at}, where row {row} begins by the mask"),
                ));
            }
            at += lengths.next().unwrap_or(0);
        }
        if at != end {
            return Err(Error::argument(
                "mask",
                at,
                format!("{end}, what the values hold"),
            ));
        }
        Ok(())
    }

    /// Computes the offsets of rows of these lengths. Returns them and the total length.
    pub fn from_lengths(
        rows: usize,
        lengths: impl Iterator<Item = usize>,
    ) -> Result<(Self, usize)> {
        let mut bytes = Aligned::zeroed(4 * rows);
        let mut at = 0_usize;
        for (out, len) in bytes
            .bytes_mut()
            .as_chunks_mut::<4>()
            .0
            .iter_mut()
            .zip(lengths)
        {
            let offset = u32::try_from(at);
            *out = offset
                .map_err(|_| Error::argument("offset", at, "under 2^32"))?
                .to_le_bytes();
            at += len;
        }
        Ok((Self::Stored(bytes.into()), at))
    }
}

/// The start of each row, for kernels.
#[derive(Clone, Copy)]
pub(crate) struct Starts<'a> {
    stored: &'a [[u8; 4]],
    every: Option<usize>,
}

impl Starts<'_> {
    #[inline]
    pub fn get(&self, row: usize) -> usize {
        self.every.map_or_else(
            || u32::from_le_bytes(self.stored[row]) as usize,
            |every| row * every,
        )
    }
}

/// A sparse weight with 16-bit values, stored row by row. With a [`Pattern`], groups with fewer
/// non-zeros than the pattern allows are filled up with stored zeros.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sparse16 {
    pub bits: Bits,
    pub number: Number,
    pub values: Buffer,
    pub offsets: Offsets,
    pub pattern: Option<Pattern>,
}

impl Sparse16 {
    pub fn new(weight: &Matrix, number: Number, pattern: Option<Pattern>) -> Result<Self> {
        let (rows, cols) = (weight.rows(), weight.cols());
        let mut set = weight
            .as_slice()
            .iter()
            .map(|value| number.rounded(*value) != 0.0)
            .collect::<Vec<bool>>();
        if let Some(pattern) = pattern
            && cols > 0
        {
            for (row, set) in set.chunks_mut(cols).enumerate() {
                for (group, set) in set.chunks_mut(pattern.m).enumerate() {
                    let found = set.iter().filter(|set| **set).count();
                    if found > pattern.n {
                        return Err(Error::argument(
                            "weight",
                            format!(
                                "{found} weights other than 0 in row {row} from column {} on",
                                group * pattern.m
                            ),
                            format!("at most {} of {}", pattern.n, pattern.m),
                        ));
                    }
                    let wanted = pattern.n.min(set.len()) - found;
                    set.iter_mut()
                        .filter(|set| !**set)
                        .take(wanted)
                        .for_each(|set| *set = true);
                }
            }
        }
        let bits = Bits::from_fn(rows, cols, |row, col| set[row * cols + col]);
        let lengths =
            (0..rows).map(|row| bits.row(row).map(|word| word.count_ones() as usize).sum());
        let (offsets, stored) = match pattern {
            Some(pattern) => (
                Offsets::Every(pattern.stored(cols)),
                rows * pattern.stored(cols),
            ),
            None => Offsets::from_lengths(rows, lengths)?,
        };
        let mut values = Aligned::zeroed(2 * stored);
        let kept = weight
            .as_slice()
            .iter()
            .zip(&set)
            .filter_map(|(value, set)| set.then_some(*value));
        for (out, value) in values.bytes_mut().chunks_exact_mut(2).zip(kept) {
            number.write(value, out)?;
        }
        Ok(Self {
            bits,
            number,
            values: values.into(),
            offsets,
            pattern,
        })
    }

    pub fn from_parts(
        size: [usize; 2],
        number: Number,
        pattern: Option<Pattern>,
        part: &mut dyn FnMut(&str) -> Result<Buffer>,
    ) -> Result<Self> {
        let bits = Bits::from_parts(size, part)?;
        let values = part("values")?;
        let offsets = match pattern {
            Some(pattern) => {
                expect_bytes("values", &values, &[size[0], pattern.stored(size[1]), 2])?;
                Offsets::Every(pattern.stored(size[1]))
            }
            None => {
                let offsets = part("offsets")?;
                expect_bytes("offsets", &offsets, &[size[0], 4])?;
                Offsets::Stored(offsets)
            }
        };
        if values.len() % 2 != 0 || values.len() / 2 > size[0].saturating_mul(size[1]) {
            return Err(Error::argument(
                "values",
                values.len(),
                format!("bytes of at most {size:?} numbers of 16 bits"),
            ));
        }
        Ok(Self {
            bits,
            number,
            values,
            offsets,
            pattern,
        })
    }

    pub fn check(&self) -> Result<()> {
        self.bits.check()?;
        let lengths = (0..self.bits.rows).map(|row| {
            self.bits
                .row(row)
                .map(|word| word.count_ones() as usize)
                .sum()
        });
        self.offsets
            .check(lengths, self.bits.rows, self.values.len() / 2)?;
        self.number.check_finite(&self.values)
    }

    pub fn bytes(&self) -> usize {
        self.bits.bytes.len() + self.values.len() + self.offsets.bytes()
    }

    /// Writes the weights of a row. Values missing from the buffer are read as 0.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        let values = self.values.get(2 * self.offsets.get(row)..).unwrap_or(&[]);
        let mut values = values.as_chunks::<2>().0.iter();
        out.fill(0.0);
        for (word, out) in self.bits.row(row).zip(out.chunks_mut(64)) {
            let mut word = word;
            while word != 0 {
                let value = values.next();
                if let (Some(out), Some(value)) =
                    (out.get_mut(word.trailing_zeros() as usize), value)
                {
                    self.number.read(value, std::slice::from_mut(out));
                }
                word &= word - 1;
            }
        }
    }
}
