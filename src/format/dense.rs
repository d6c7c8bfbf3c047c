//! Dense weights, stored row by row without padding, as in a Hugging Face file.

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use super::buffer::{Aligned, Buffer};
use super::expect_bytes;
use crate::error::{Error, Result};
use crate::linalg::Matrix;

/// The dtype of stored numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) enum Number {
    F32,
    F16,
    Bf16,
}

impl Number {
    pub fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// Writes a number, rounded to nearest.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if a finite number becomes infinite.
    pub fn write(self, value: f32, out: &mut [u8]) -> Result<()> {
        let finite = match self {
            Self::F32 => {
                out.copy_from_slice(&value.to_le_bytes());
                true
            }
            Self::F16 => {
                let rounded = f16::from_f32(value);
                out.copy_from_slice(&rounded.to_le_bytes());
                rounded.is_finite()
            }
            Self::Bf16 => {
                let rounded = bf16::from_f32(value);
                out.copy_from_slice(&rounded.to_le_bytes());
                rounded.is_finite()
            }
        };
        if finite || !value.is_finite() {
            return Ok(());
        }
        Err(Error::argument(
            "weight",
            value,
            format!("a number in the range of {self:?}"),
        ))
    }

    /// Rounds `value` to this dtype.
    pub fn rounded(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::F16 => f16::from_f32(value).to_f32(),
            Self::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }

    /// Returns an error for the first number that is NaN or infinite. It has the name `values`.
    pub fn check_finite(self, bytes: &[u8]) -> Result<()> {
        const PIECE: usize = 1 << 12;
        // A number is not finite if all bits of its exponent are set.
        let odd = |piece: &[u8]| match self {
            Self::F32 => {
                let numbers = piece.as_chunks().0.iter().map(|n| u32::from_le_bytes(*n));
                let all = |odd, n| odd | (n & 0x7F80_0000 == 0x7F80_0000);
                numbers.fold(false, all)
            }
            Self::F16 | Self::Bf16 => {
                let mask: u16 = if self == Self::F16 { 0x7C00 } else { 0x7F80 };
                let numbers = piece.as_chunks().0.iter().map(|n| u16::from_le_bytes(*n));
                numbers.fold(false, |odd, n| odd | (n & mask == mask))
            }
        };
        let Some(piece) = bytes.chunks(PIECE).position(odd) else {
            return Ok(());
        };
        let mut values = vec![0.0; bytes[piece * PIECE..].len().min(PIECE) / self.bytes()];
        self.read(&bytes[piece * PIECE..], &mut values);
        let at = values.iter().position(|value| !value.is_finite());
        let at = at.unwrap_or(0);
        Err(Error::NotFinite {
            tensor: "values".into(),
            index: piece * (PIECE / self.bytes()) + at,
            value: values.get(at).copied().unwrap_or(f32::NAN),
        })
    }

    /// Reads `out.len()` numbers.
    pub fn read(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => {
                out.iter_mut()
                    .zip(bytes.as_chunks::<4>().0)
                    .for_each(|(out, bytes)| *out = f32::from_le_bytes(*bytes));
            }
            Self::F16 => {
                let values = bytes.as_chunks::<2>().0;
                out.iter_mut()
                    .zip(values)
                    .for_each(|(out, bytes)| *out = f16::from_le_bytes(*bytes).to_f32());
            }
            Self::Bf16 => {
                let values = bytes.as_chunks::<2>().0;
                out.iter_mut()
                    .zip(values)
                    .for_each(|(out, bytes)| *out = bf16::from_le_bytes(*bytes).to_f32());
            }
        }
    }
}

/// A dense weight.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Dense {
    pub rows: usize,
    pub cols: usize,
    pub number: Number,
    pub values: Buffer,
}

impl Dense {
    pub fn new(weight: &Matrix, number: Number) -> Result<Self> {
        let mut values = Aligned::zeroed(weight.as_slice().len() * number.bytes());
        for (value, out) in weight
            .as_slice()
            .iter()
            .zip(values.bytes_mut().chunks_exact_mut(number.bytes()))
        {
            number.write(*value, out)?;
        }
        Ok(Self {
            rows: weight.rows(),
            cols: weight.cols(),
            number,
            values: values.into(),
        })
    }

    pub fn from_parts(
        [rows, cols]: [usize; 2],
        number: Number,
        part: &mut dyn FnMut(&str) -> Result<Buffer>,
    ) -> Result<Self> {
        let values = part("values")?;
        expect_bytes("values", &values, &[rows, cols, number.bytes()])?;
        Ok(Self {
            rows,
            cols,
            number,
            values,
        })
    }

    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        let stride = self.cols * self.number.bytes();
        self.number
            .read(&self.values[row * stride..(row + 1) * stride], out);
    }
}
