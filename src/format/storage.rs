//! The formats by name, and the bytes that each takes.

use serde::{Deserialize, Serialize};

use super::bits::packed_len;
use super::sparse_int::is_high;

/// How an `[out, in]` weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum WeightFormat {
    /// Dense, 32 bits.
    F32,
    /// Dense, IEEE 754 half precision.
    F16,
    /// Dense, bfloat16.
    Bf16,
    /// Codes of a few bits, a scale of 16 bits for each group of a row's columns and, unless symmetric, a zero point of as many bits
    /// as a code.
    Int {
        /// Bits of a code.
        bits: u8,
        /// Columns of a group; none for a whole row.
        group_size: Option<usize>,
        /// Whether the zero point is the middle of the grid, and not stored.
        symmetric: bool,
    },
    /// A bit for each weight, set where it is not zero, and those that are not, in half precision, row by row with an offset of 32
    /// bits for each row.
    SparseF16,
    /// The same with numbers in bfloat16.
    SparseBf16,
    /// A bit for each weight, set where it is not zero, and the 4-bit codes of those that are not; scales and zero points as in
    /// [`Int`](Self::Int).
    SparseInt4 {
        /// Columns of a group; none for a whole row.
        group_size: Option<usize>,
        /// Whether the zero point is the middle of the grid, and not stored.
        symmetric: bool,
    },
    /// At most `n` of each `m` weights of a row are not zero: a bit for each weight and `n` numbers in half precision for each `m`.
    NmF16 {
        /// Weights of a group that are stored.
        n: u8,
        /// Weights of a group; the last group of a row may be shorter.
        m: u8,
    },
    /// The same with numbers in bfloat16.
    NmBf16 {
        /// Weights of a group that are stored.
        n: u8,
        /// Weights of a group; the last group of a row may be shorter.
        m: u8,
    },
}

impl WeightFormat {
    /// Bytes of a weight with `nonzero` elements that are not 0. Each row of codes or zero points ends at a whole byte, each row of
    /// bits at a whole word of 64.
    ///
    /// Exact but for two: scales that are no `f16` are stored in twice the bytes, and a row's sparse codes take as many bytes as the longer
    /// of its two streams, for which the mean for random masks is counted.
    /// [`StoredMatrix::bytes`](super::StoredMatrix::bytes) is exact.
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

/// Bytes of sparse codes, on average over random masks.
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
    // How much longer a stream is: near enough the mean size of a normal variable, given its mean and variance.
    let mean = share * (cols as f64 - 2.0 * high as f64);
    let variance = cols as f64 * share * (1.0 - share).max(0.0);
    let longer = (mean * mean + variance * std::f64::consts::FRAC_2_PI).sqrt();
    (rows as f64 * (of_row + longer) / 2.0).ceil() as usize
}

/// Bytes of a row's scales and zero points.
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
        // 35 bytes of codes and three scales a row; with zero points 12 bits more.
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
        // 64 of the 70 columns are in one stream, so that nearly all codes are.
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
