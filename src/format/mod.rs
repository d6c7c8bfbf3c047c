//! Storage formats of single weight matrices, independent of any model or tensor library.

pub(crate) mod bits;
mod buffer;
mod dense;
mod grid;
mod groups;
mod packed;
mod sparse;
mod sparse_int;
mod storage;
mod stored;

pub use buffer::{Buffer, Owner};
pub(crate) use dense::{Dense, Number};
pub(crate) use grid::Grid;
pub use groups::{QuantizedMatrix, QuantizedParts};
pub use packed::PackedMatrix;
pub(crate) use packed::all_f16;
pub(crate) use sparse::{Sparse16, Starts};
pub(crate) use sparse_int::{EVEN, SparseInt4, even_row_bytes, is_high};
pub use storage::WeightFormat;
pub(crate) use stored::Body;
pub use stored::{Element, MatrixHeader, Part, StoredMatrix};

use crate::error::{Error, Result};

/// Returns an error unless a part has the number of bytes that `shape` implies; the last entry of
/// `shape` is the size of an element in bytes.
fn expect_bytes(name: &str, bytes: &[u8], shape: &[usize]) -> Result<()> {
    let expected = shape
        .iter()
        .try_fold(1_usize, |all, size| all.checked_mul(*size));
    if expected == Some(bytes.len()) {
        return Ok(());
    }
    Err(Error::ShapeMismatch {
        what: format!("bytes of a weight's `{name}`"),
        expected: shape.to_vec(),
        found: vec![bytes.len()],
    })
}

#[cfg(test)]
pub(crate) mod testing {
    use half::f16;
    use rand::RngExt;

    use super::{QuantizedMatrix, QuantizedParts};

    /// A random matrix whose scales are `f16` and whose zero points are at least 1, in the order of
    /// its columns.
    pub fn random_quantized(
        rows: usize,
        cols: usize,
        bits: u8,
        group_size: usize,
        symmetric: bool,
        rng: &mut impl RngExt,
    ) -> QuantizedMatrix {
        let groups = cols.div_ceil(group_size);
        let mut scale = || f16::from_f32(rng.random_range(0.001..0.02)).to_f32();
        let scales = (0..rows * groups).map(|_| scale()).collect();
        let top = u8::MAX >> (8 - bits);
        let mut zero = || {
            if symmetric {
                1 << (bits - 1)
            } else {
                rng.random_range(1..=top)
            }
        };
        let zeros = (0..rows * groups).map(|_| zero()).collect();
        let codes = (0..rows * cols)
            .map(|_| rng.random_range(0..=top))
            .collect();
        let parts = QuantizedParts {
            rows,
            cols,
            bits,
            group_size,
            symmetric,
            codes,
            scales,
            zeros,
            group_of: None,
        };
        QuantizedMatrix::new(parts).unwrap()
    }
}
