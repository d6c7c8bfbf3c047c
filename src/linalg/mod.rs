//! Plain matrices on the host, the Cholesky factor that GPTQ and SparseGPT use, and low-rank
//! approximation.

mod cholesky;
mod eigen;
mod factor;
mod hessian;
mod low_rank;
mod principal;
pub(crate) mod product;

pub use factor::{Factor, FactorConfig};
pub use hessian::Hessian;
pub(crate) use low_rank::low_rank;
pub(crate) use principal::{without_columns, without_principal};

use crate::error::{Error, Result};

/// A row-major `f32` matrix on the host. Weights are `[out, in]`, as in Hugging Face checkpoints.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    data: Vec<f32>,
}

impl Matrix {
    /// Creates a matrix from row-major `data` of `rows * cols` elements.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if `data` has another length.
    pub fn new(rows: usize, cols: usize, data: Vec<f32>) -> Result<Self> {
        if rows.checked_mul(cols) != Some(data.len()) {
            return Err(Error::ShapeMismatch {
                what: "matrix elements".into(),
                expected: vec![rows, cols],
                found: vec![data.len()],
            });
        }
        Ok(Self { rows, cols, data })
    }

    /// Creates a matrix of zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self {
            rows,
            cols,
            data: vec![0.0; rows * cols],
        }
    }

    /// Creates a matrix whose element `(i, j)` is `f(i, j)`.
    pub fn from_fn(rows: usize, cols: usize, mut f: impl FnMut(usize, usize) -> f32) -> Self {
        let mut data = Vec::with_capacity(rows * cols);
        for i in 0..rows {
            for j in 0..cols {
                data.push(f(i, j));
            }
        }
        Self { rows, cols, data }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All elements, row-major.
    pub fn as_slice(&self) -> &[f32] {
        &self.data
    }

    /// All elements, row-major and mutable.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// Converts the matrix into its row-major elements.
    pub fn into_vec(self) -> Vec<f32> {
        self.data
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.cols..(i + 1) * self.cols]
    }

    /// Row `i`, mutable.
    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        &mut self.data[i * self.cols..(i + 1) * self.cols]
    }

    /// Returns the transposed matrix.
    pub fn transposed(&self) -> Self {
        const TILE: usize = 32;
        let mut data = vec![0.0; self.data.len()];
        for i0 in (0..self.rows).step_by(TILE) {
            for j0 in (0..self.cols).step_by(TILE) {
                for i in i0..(i0 + TILE).min(self.rows) {
                    for j in j0..(j0 + TILE).min(self.cols) {
                        data[j * self.rows + i] = self.data[i * self.cols + j];
                    }
                }
            }
        }
        Self {
            rows: self.cols,
            cols: self.rows,
            data,
        }
    }

    /// Number of elements equal to zero.
    pub fn count_zeros(&self) -> usize {
        self.data.iter().filter(|v| **v == 0.0).count()
    }

    /// Share of elements equal to zero, in 0..=1; 0 for a matrix without elements.
    pub fn sparsity(&self) -> f64 {
        if self.data.is_empty() {
            0.0
        } else {
            self.count_zeros() as f64 / self.data.len() as f64
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transpose_twice_is_identity_and_moves_elements() {
        let m = Matrix::from_fn(37, 65, |i, j| (i * 100 + j) as f32);
        let t = m.transposed();
        assert_eq!((t.rows(), t.cols()), (65, 37));
        assert_eq!(t.row(64)[36], 3664.0);
        assert_eq!(t.transposed(), m);
    }

    #[test]
    fn wrong_length_is_refused() {
        assert!(matches!(
            Matrix::new(2, 3, vec![0.0; 5]),
            Err(Error::ShapeMismatch { .. })
        ));
    }
}
