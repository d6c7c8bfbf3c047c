//! The formats by name, and the bytes that each takes.

use serde::{Deserialize, Serialize};

use super::bits::packed_len;

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
    /// Exact but for two: scales that are no `f16` are stored in twice the bytes, and sparse codes begin at a whole byte every 64
    /// columns, for which a quarter of a byte is counted, the mean for random masks.
    /// [`StoredMatrix::bytes`](super::StoredMatrix::bytes) is exact.
    pub fn bytes(self, rows: usize, cols: usize, nonzero: usize) -> usize {
        let words = 8 * cols.div_ceil(64);
        match self {
            Self::F32 => 4 * rows * cols,
            Self::F16 | Self::Bf16 => 2 * rows * cols,
            Self::Int { bits, group_size, symmetric } => {
                rows * (packed_len(cols, bits) + grid_bytes(cols, bits, group_size, symmetric))
            }
            Self::SparseF16 | Self::SparseBf16 => rows * (words + 4) + 2 * nonzero,
            Self::SparseInt4 { group_size, symmetric } => {
                let codes = (2 * nonzero + rows * cols.div_ceil(64)).div_ceil(4);
                rows * (words + 4 + grid_bytes(cols, 4, group_size, symmetric)) + codes
            }
            Self::NmF16 { n, m } | Self::NmBf16 { n, m } => {
                let (n, m) = (usize::from(n), usize::from(m.max(1)));
                rows * (words + 2 * (cols / m * n + n.min(cols % m)))
            }
        }
    }
}

/// Bytes of a row's scales and zero points.
fn grid_bytes(cols: usize, bits: u8, group_size: Option<usize>, symmetric: bool) -> usize {
    let groups = cols.div_ceil(group_size.unwrap_or(cols).max(1));
    2 * groups + if symmetric { 0 } else { packed_len(groups, bits) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_those_of_the_layout() {
        let int = |bits, group_size, symmetric| WeightFormat::Int { bits, group_size, symmetric }.bytes(3, 70, 100);
        assert_eq!(WeightFormat::F32.bytes(3, 70, 100), 840);
        assert_eq!(WeightFormat::Bf16.bytes(3, 70, 100), 420);
        // 35 bytes of codes and three scales a row; with zero points 12 bits more.
        assert_eq!(int(4, Some(32), true), 3 * (35 + 6));
        assert_eq!(int(4, Some(32), false), 3 * (35 + 6 + 2));
        assert_eq!(int(3, None, true), 3 * (27 + 2));
        assert_eq!(WeightFormat::SparseF16.bytes(3, 70, 100), 3 * (16 + 4) + 200);
        let sparse = WeightFormat::SparseInt4 { group_size: Some(32), symmetric: false };
        assert_eq!(sparse.bytes(3, 70, 100), 3 * (16 + 4 + 6 + 2) + 50 + 2);
        assert_eq!(WeightFormat::NmBf16 { n: 2, m: 4 }.bytes(3, 70, 100), 3 * (16 + 2 * 36));
    }
}
