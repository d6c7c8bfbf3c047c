//! The formats by name, and the bytes that each takes.

use serde::{Deserialize, Serialize};

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
    /// A bit for each weight, set where it is not zero, and those that are not, at 16 bits, row by row with an offset of 32 bits for
    /// each row.
    Sparse16,
}

impl WeightFormat {
    /// Bytes of a weight with `nonzero` elements that are not 0. Each row of codes, bits or zero points ends at a whole byte.
    pub fn bytes(self, rows: usize, cols: usize, nonzero: usize) -> usize {
        match self {
            Self::F32 => 4 * rows * cols,
            Self::F16 | Self::Bf16 => 2 * rows * cols,
            Self::Int { bits, group_size, symmetric } => {
                let (bits, groups) = (usize::from(bits), cols.div_ceil(group_size.unwrap_or(cols).max(1)));
                let zeros = if symmetric { 0 } else { (bits * groups).div_ceil(8) };
                rows * ((bits * cols).div_ceil(8) + 2 * groups + zeros)
            }
            Self::Sparse16 => rows * (cols.div_ceil(8) + 4) + 2 * nonzero,
        }
    }
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
        assert_eq!(WeightFormat::Sparse16.bytes(3, 70, 100), 3 * (9 + 4) + 200);
    }
}
