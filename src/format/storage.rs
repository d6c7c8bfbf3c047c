//! The names of the storage formats, and their sizes in bytes.

use serde::{Deserialize, Serialize};

use super::bits::packed_len;
use super::sparse_int::is_high;

/// Storage format of an `[out, in]` weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum WeightFormat {
    /// Dense, 32-bit floating point.
    F32,
    /// Dense, IEEE 754 half precision.
    F16,
    /// Dense, bfloat16.
    Bf16,
    /// Dense integer codes of a few bits. Each group of columns of a row has a 16-bit scale and,
    /// unless symmetric, a zero point with as many bits as a code.
    Int {
        /// Number of bits per code.
        bits: u8,
        /// Number of columns per group; `None` for the whole row.
        group_size: Option<usize>,
        /// Whether the zero point is the middle of the grid and not stored.
        symmetric: bool,
    },
    /// Sparse, half precision. One bit per weight marks the non-zeros, whose values are stored row
    /// by row, with a 32-bit offset for each row.
    SparseF16,
    /// Like [`SparseF16`](Self::SparseF16), with values in bfloat16.
    SparseBf16,
    /// Sparse, 4-bit codes. One bit per weight marks the non-zeros, whose codes are stored; scales
    /// and zero points are as in [`Int`](Self::Int).
    SparseInt4 {
        /// Number of columns per group; `None` for the whole row.
        group_size: Option<usize>,
        /// Whether the zero point is the middle of the grid and not stored.
        symmetric: bool,
    },
    /// N:M sparse, half precision. At most `n` of each `m` consecutive weights of a row are not
    /// zero; one bit per weight marks them, and `n` values are stored for each `m` weights.
    NmF16 {
        /// Number of weights stored per group.
        n: u8,
        /// Number of weights per group; the last group of a row may be shorter.
        m: u8,
    },
    /// Like [`NmF16`](Self::NmF16), with values in bfloat16.
    NmBf16 {
        /// Number of weights stored per group.
        n: u8,
        /// Number of weights per group; the last group of a row may be shorter.
        m: u8,
    },
}

impl WeightFormat {
    /// Number of bytes of a weight with `nonzero` elements that are not 0. Each row of codes or
    /// zero points is padded to a whole byte, and each row of bits to a whole 64-bit word.
    ///
    /// The number is exact, with two exceptions. Scales that are not exact `f16` values take twice
    /// the bytes assumed here. A row of sparse codes takes as many bytes as the longer of its two
    /// streams, for which this function assumes the mean over random masks; with a pattern that
    /// keeps 32 of each 64 columns, rows have the same length and need no offset of 4 bytes.
    /// [`StoredMatrix::bytes`](super::StoredMatrix::bytes) is always exact.
    pub fn bytes(self, rows: usize, cols: usize, nonzero: usize) -> usize {
        let words = 8 * cols.div_ceil(64);
        match self {
            Self::F32 => 4 * rows * cols,
            Self::F16 | Self::Bf16 => 2 * rows * cols,
            Self::Int {
                bits,
                group_size,
                symmetric,
            } => rows * (packed_len(cols, bits) + grid_bytes(cols, bits, group_size, symmetric)),
            Self::SparseF16 | Self::SparseBf16 => rows * (words + 4) + 2 * nonzero,
            Self::SparseInt4 {
                group_size,
                symmetric,
            } => {
                let codes = sparse_code_bytes(rows, cols, nonzero);
                rows * (words + 4 + grid_bytes(cols, 4, group_size, symmetric)) + codes
            }
            Self::NmF16 { n, m } | Self::NmBf16 { n, m } => {
                let (n, m) = (usize::from(n), usize::from(m.max(1)));
                rows * (words + 2 * (cols / m * n + n.min(cols % m)))
            }
        }
    }
}

/// Number of bytes of sparse codes, on average over random masks.
fn sparse_code_bytes(rows: usize, cols: usize, nonzero: usize) -> usize {
    if rows == 0 || cols == 0 {
        return 0;
    }
    let words = cols.div_ceil(64);
    let high: usize = (0..words)
        .filter(|word| is_high(*word, words))
        .map(|word| (cols - 64 * word).min(64))
        .sum();
    let of_row = nonzero as f64 / rows as f64;
    let share = of_row / cols as f64;
    // The expected difference of the streams' lengths, approximately the mean absolute value of a
    // normal variable with this mean and variance.
    let mean = share * (cols as f64 - 2.0 * high as f64);
    let variance = cols as f64 * share * (1.0 - share).max(0.0);
    let longer = (mean * mean + variance * std::f64::consts::FRAC_2_PI).sqrt();
    (rows as f64 * (of_row + longer) / 2.0).ceil() as usize
}

/// Number of bytes of a row's scales and zero points.
fn grid_bytes(cols: usize, bits: u8, group_size: Option<usize>, symmetric: bool) -> usize {
    let groups = cols.div_ceil(group_size.unwrap_or(cols).max(1));
    2 * groups
        + if symmetric {
            0
        } else {
            packed_len(groups, bits)
        }
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::format::{QuantizedMatrix, QuantizedParts, StoredMatrix};

    #[test]
    fn bytes_are_those_of_the_layout() {
        let int = |bits, group_size, symmetric| {
            WeightFormat::Int {
                bits,
                group_size,
                symmetric,
            }
            .bytes(3, 70, 100)
        };
        assert_eq!(WeightFormat::F32.bytes(3, 70, 100), 840);
        assert_eq!(WeightFormat::Bf16.bytes(3, 70, 100), 420);
        // Each row has 35 bytes of codes and three scales; with zero points, 12 bits more.
        assert_eq!(int(4, Some(32), true), 3 * (35 + 6));
        assert_eq!(int(4, Some(32), false), 3 * (35 + 6 + 2));
        assert_eq!(int(3, None, true), 3 * (27 + 2));
        assert_eq!(
            WeightFormat::SparseF16.bytes(3, 70, 100),
            3 * (16 + 4) + 200
        );
        let sparse = WeightFormat::SparseInt4 {
            group_size: Some(32),
            symmetric: false,
        };
        // 64 of the 70 columns are in one stream, and so are nearly all codes.
        assert_eq!(sparse.bytes(3, 70, 100), 3 * (16 + 4 + 6 + 2) + 92);
        assert_eq!(
            WeightFormat::NmBf16 { n: 2, m: 4 }.bytes(3, 70, 100),
            3 * (16 + 2 * 36)
        );
    }

    #[test]
    fn bytes_of_sparse_codes_are_near_those_of_random_masks() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for (cols, keep) in [
            (40, 0.5),
            (128, 0.5),
            (192, 0.3),
            (448, 0.7),
            (896, 0.5),
            (4096, 0.5),
        ] {
            let (rows, group_size) = (200, 32);
            let codes: Vec<u8> = (0..rows * cols)
                .map(|_| if rng.random_bool(keep) { 9 } else { 8 })
                .collect();
            let nonzero = codes.iter().filter(|code| **code == 9).count();
            let matrix = QuantizedMatrix::new(QuantizedParts {
                rows,
                cols,
                bits: 4,
                group_size,
                symmetric: true,
                codes,
                scales: vec![0.5; rows * cols.div_ceil(group_size)],
                zeros: vec![8; rows * cols.div_ceil(group_size)],
                group_of: None,
            })
            .unwrap();
            let stored = StoredMatrix::from_quantized(&matrix, true).unwrap();
            let counted = stored.format().bytes(rows, cols, nonzero);
            assert_relative_eq!(counted as f64, stored.bytes() as f64, max_relative = 0.03);
        }
    }
}
