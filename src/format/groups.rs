//! Quantized weights: small integer codes, with one scale and zero point for each group of columns
//! of a row.

use crate::error::{Error, Result};
use crate::linalg::Matrix;

/// Supported numbers of bits per code.
const BITS: [u8; 4] = [2, 3, 4, 8];

/// The contents of a [`QuantizedMatrix`], not yet checked.
#[derive(Clone, Debug, PartialEq)]
#[doc(hidden)]
pub struct QuantizedParts {
    /// Number of output features.
    pub rows: usize,
    /// Number of input features.
    pub cols: usize,
    /// Number of bits per code: 2, 3, 4 or 8.
    pub bits: u8,
    /// Number of columns per group; the last group of a row may be shorter.
    pub group_size: usize,
    /// Whether every zero point is the middle of the grid, `2^(bits - 1)`.
    pub symmetric: bool,
    /// Codes, row-major `[rows, cols]`, each below `2^bits`.
    pub codes: Vec<u8>,
    /// Scales, row-major `[rows, groups]`; finite, not negative, and 0 only for a group whose
    /// weights are all 0.
    pub scales: Vec<f32>,
    /// Zero points, row-major `[rows, groups]`, each below `2^bits`.
    pub zeros: Vec<u8>,
    /// The group of each column, if it is not `column / group_size` (GPTQ's activation order
    /// without static groups).
    pub group_of: Option<Vec<u32>>,
}

/// An `[out, in]` weight as integer codes: `w = scale * (code - zero)`, with a scale and a zero
/// point for each row and group of columns.
///
/// A code equal to its zero point is exactly 0, so a pruned weight stays pruned.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedMatrix {
    parts: QuantizedParts,
}

impl QuantizedMatrix {
    /// The rows of a range, which must be inside the matrix.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if it is not.
    pub(crate) fn row_range(&self, rows: std::ops::Range<usize>) -> Result<Self> {
        let (parts, groups) = (&self.parts, self.groups());
        let outside = || Error::ShapeMismatch {
            what: "rows of a quantized weight".into(),
            expected: vec![parts.rows],
            found: vec![rows.start, rows.end],
        };
        if rows.start > rows.end || rows.end > parts.rows {
            return Err(outside());
        }
        Self::new(QuantizedParts {
            rows: rows.len(),
            codes: parts.codes[rows.start * parts.cols..rows.end * parts.cols].to_vec(),
            scales: parts.scales[rows.start * groups..rows.end * groups].to_vec(),
            zeros: parts.zeros[rows.start * groups..rows.end * groups].to_vec(),
            group_of: parts.group_of.clone(),
            ..*parts
        })
    }

    /// Stacks the rows of several matrices. Returns `None` if they differ in columns, bits or
    /// groups, or if there is none.
    pub(crate) fn stacked(all: &[&Self]) -> Option<Self> {
        let (first, rest) = all.split_first()?;
        let mut parts = first.parts.clone();
        for matrix in rest {
            let next = &matrix.parts;
            if (next.cols, next.bits, next.group_size) != (parts.cols, parts.bits, parts.group_size)
                || next.group_of != parts.group_of
            {
                return None;
            }
            parts.rows += next.rows;
            parts.symmetric &= next.symmetric;
            parts.codes.extend_from_slice(&next.codes);
            parts.scales.extend_from_slice(&next.scales);
            parts.zeros.extend_from_slice(&next.zeros);
        }
        Self::new(parts).ok()
    }

    /// Creates a matrix from its parts, and checks them.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if the number of bits is not 2, 3, 4 or 8, the group size
    /// is 0, a code, zero point or group is out of range, or a scale is negative or not finite.
    /// Returns [`Error::ShapeMismatch`] if a vector has the wrong length.
    pub fn new(parts: QuantizedParts) -> Result<Self> {
        let QuantizedParts {
            rows,
            cols,
            bits,
            group_size,
            symmetric,
            codes,
            scales,
            zeros,
            group_of,
        } = &parts;
        if !BITS.contains(bits) {
            return Err(Error::argument("bits", bits, "2, 3, 4 or 8"));
        }
        if *group_size == 0 {
            return Err(Error::argument("group_size", 0, "at least 1"));
        }
        let groups = cols.div_ceil(*group_size);
        let length = |what: &str, found: usize, expected: usize| {
            if found == expected {
                return Ok(());
            }
            Err(Error::ShapeMismatch {
                what: what.into(),
                expected: vec![expected],
                found: vec![found],
            })
        };
        length(
            "codes of a quantized weight",
            codes.len(),
            rows.saturating_mul(*cols),
        )?;
        length(
            "scales of a quantized weight",
            scales.len(),
            rows.saturating_mul(groups),
        )?;
        length(
            "zero points of a quantized weight",
            zeros.len(),
            rows.saturating_mul(groups),
        )?;
        let top = u8::MAX >> (8 - bits);
        if let Some(code) = codes.iter().find(|code| **code > top) {
            return Err(Error::argument(
                "code",
                code,
                format!("at most {top} at {bits} bits"),
            ));
        }
        if let Some(zero) = zeros.iter().find(|zero| **zero > top) {
            return Err(Error::argument(
                "zero point",
                zero,
                format!("at most {top} at {bits} bits"),
            ));
        }
        let middle = 1_u8 << (bits - 1);
        if let (true, Some(zero)) = (*symmetric, zeros.iter().find(|zero| **zero != middle)) {
            return Err(Error::argument(
                "zero point",
                zero,
                format!("{middle}, the middle of a symmetric grid"),
            ));
        }
        if let Some(scale) = scales
            .iter()
            .find(|scale| !(scale.is_finite() && **scale >= 0.0))
        {
            return Err(Error::argument("scale", scale, "finite and not negative"));
        }
        if let Some(group_of) = group_of {
            length("groups of columns", group_of.len(), *cols)?;
            if let Some(group) = group_of.iter().find(|group| **group as usize >= groups) {
                return Err(Error::argument("group", group, format!("under {groups}")));
            }
        }
        Ok(Self { parts })
    }

    /// Creates a matrix from parts that are known to be valid.
    pub(super) fn from_valid(parts: QuantizedParts) -> Self {
        Self { parts }
    }

    /// The parts of the matrix.
    pub fn parts(&self) -> &QuantizedParts {
        &self.parts
    }

    /// Converts the matrix into its parts.
    pub fn into_parts(self) -> QuantizedParts {
        self.parts
    }

    /// Number of output features.
    pub fn rows(&self) -> usize {
        self.parts.rows
    }

    /// Number of input features.
    pub fn cols(&self) -> usize {
        self.parts.cols
    }

    /// Number of groups per row.
    pub fn groups(&self) -> usize {
        self.parts.cols.div_ceil(self.parts.group_size)
    }

    /// The group of `column`.
    pub fn group_of(&self, column: usize) -> usize {
        match &self.parts.group_of {
            Some(group_of) => group_of[column] as usize,
            None => column / self.parts.group_size,
        }
    }

    /// The scale and zero point of a group of a row.
    pub fn grid(&self, row: usize, group: usize) -> (f32, u8) {
        let at = row * self.groups() + group;
        (self.parts.scales[at], self.parts.zeros[at])
    }

    /// Computes the weight of a code. Only the product is rounded.
    pub fn value(scale: f32, zero: u8, code: u8) -> f32 {
        scale * (f32::from(code) - f32::from(zero))
    }

    /// Converts the codes to weights, `[out, in]`.
    pub fn dequantize(&self) -> Matrix {
        Matrix::from_fn(self.rows(), self.cols(), |row, column| {
            let (scale, zero) = self.grid(row, self.group_of(column));
            Self::value(scale, zero, self.parts.codes[row * self.cols() + column])
        })
    }

    /// Number of weights that are exactly 0.
    pub fn count_zeros(&self) -> usize {
        let group_of: Vec<usize> = (0..self.cols())
            .map(|column| self.group_of(column))
            .collect();
        let rows = self.parts.codes.chunks(self.cols().max(1)).enumerate();
        let of_row = |(row, codes): (usize, &[u8])| {
            let zero = |(code, group): &(&u8, &usize)| {
                let (scale, zero) = self.grid(row, **group);
                **code == zero || scale == 0.0
            };
            codes.iter().zip(&group_of).filter(zero).count()
        };
        rows.map(of_row).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts() -> QuantizedParts {
        QuantizedParts {
            rows: 2,
            cols: 5,
            bits: 3,
            group_size: 3,
            symmetric: false,
            codes: vec![0, 7, 2, 3, 4, 1, 1, 5, 6, 0],
            scales: vec![0.5, 0.25, 2.0, 1.0],
            zeros: vec![2, 4, 1, 0],
            group_of: None,
        }
    }

    #[test]
    fn a_code_is_its_distance_from_the_zero_point() {
        let matrix = QuantizedMatrix::new(parts()).unwrap();
        assert_eq!(
            matrix.dequantize().as_slice(),
            [-1.0, 2.5, 0.0, -0.25, 0.0, 0.0, 0.0, 8.0, 6.0, 0.0]
        );
        assert_eq!((matrix.groups(), matrix.count_zeros()), (2, 5));
        let turned = QuantizedParts {
            group_of: Some(vec![1, 0, 1, 0, 0]),
            ..parts()
        };
        let turned = QuantizedMatrix::new(turned).unwrap();
        assert_eq!(turned.dequantize().row(0), [-1.0, 2.5, -0.5, 0.5, 1.0]);
    }

    #[test]
    fn parts_that_make_no_matrix_are_refused() {
        type Spoil = fn(&mut QuantizedParts);
        let bad: [(&str, Spoil); 9] = [
            ("bits", |p| p.bits = 5),
            ("group_size", |p| p.group_size = 0),
            ("code", |p| p.codes[3] = 8),
            ("zero point", |p| p.zeros[1] = 9),
            ("zero point", |p| p.symmetric = true),
            ("scale", |p| p.scales[2] = f32::NAN),
            ("scales", |p| p.scales.truncate(3)),
            ("group", |p| p.group_of = Some(vec![2; 5])),
            ("groups", |p| p.group_of = Some(vec![0; 4])),
        ];
        for (name, spoil) in bad {
            let mut parts = parts();
            spoil(&mut parts);
            let error = QuantizedMatrix::new(parts).unwrap_err().to_string();
            assert!(error.contains(name), "{name}: {error}");
        }
    }
}
