//! The statistics of a layer's input that GPTQ and SparseGPT need.

use rayon::prelude::*;

use super::Matrix;
use super::product::{View, add_product};
use crate::error::{Error, Result};

/// The sum of `x^T x` over the rows of a layer's input, `[d_input, d_input]`.
///
/// The Hessian of the layer's squared output error is twice this sum. GPTQ and SparseGPT depend on
/// it only up to a factor, so no factor is applied. The sum is in `f32`, and only its upper
/// triangle is computed.
#[derive(Clone, Debug, PartialEq)]
#[doc(hidden)]
pub struct Hessian {
    // Only the upper triangle is up to date.
    sum: Matrix,
    rows: usize,
}

impl Hessian {
    /// Creates an empty sum for a layer with `d_input` input columns.
    pub fn new(d_input: usize) -> Self {
        Self {
            sum: Matrix::zeros(d_input, d_input),
            rows: 0,
        }
    }

    /// Creates a Hessian from a symmetric matrix that was computed elsewhere. Only its upper
    /// triangle is used.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if the matrix is not square, and [`Error::NotFinite`] if it
    /// has a NaN or infinite element.
    pub fn from_matrix(matrix: Matrix) -> Result<Self> {
        if matrix.rows() != matrix.cols() {
            return Err(Error::ShapeMismatch {
                what: "Hessian".into(),
                expected: vec![matrix.cols(), matrix.cols()],
                found: vec![matrix.rows(), matrix.cols()],
            });
        }
        let hessian = Self {
            sum: matrix,
            rows: 0,
        };
        hessian.check_finite()?;
        Ok(hessian)
    }

    /// Number of input columns.
    pub fn d_input(&self) -> usize {
        self.sum.cols()
    }

    /// Number of rows added so far.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Element `(i, j)`.
    ///
    /// # Panics
    /// Panics if it is outside the matrix.
    pub fn get(&self, i: usize, j: usize) -> f32 {
        self.sum.row(i.min(j))[i.max(j)]
    }

    /// The diagonal, which holds each column's sum of squares.
    pub(crate) fn diagonal(&self) -> Vec<f32> {
        (0..self.d_input()).map(|i| self.sum.row(i)[i]).collect()
    }

    /// The whole symmetric matrix, with both triangles.
    pub fn to_matrix(&self) -> Matrix {
        Matrix::from_fn(self.d_input(), self.d_input(), |i, j| self.get(i, j))
    }

    /// Adds the input of some tokens. The result is the same with any number of threads.
    ///
    /// # Shapes
    /// `x`: `[tokens, d_input]`, row-major.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if `x` does not consist of whole rows, and
    /// [`Error::NotFinite`] if it has a NaN or infinite element. The sum is then unchanged.
    pub fn update(&mut self, x: &[f32]) -> Result<()> {
        let d = self.d_input();
        if (d == 0 && !x.is_empty()) || (d > 0 && !x.len().is_multiple_of(d)) {
            return Err(Error::ShapeMismatch {
                what: "calibration input, elements of whole rows".into(),
                expected: vec![x.len().checked_div(d).unwrap_or(0), d],
                found: vec![x.len()],
            });
        }
        if let Some(index) = x.par_iter().position_first(|v| !v.is_finite()) {
            return Err(Error::NotFinite {
                tensor: "calibration input".into(),
                index,
                value: x[index],
            });
        }
        if x.is_empty() {
            return Ok(());
        }
        let tokens = x.len() / d;
        // Wide stripes make the products efficient, and a large number of them keeps all threads
        // busy.
        let stripe = (d / 16).clamp(32, 512);
        self.sum
            .as_mut_slice()
            .par_chunks_mut(stripe * d)
            .enumerate()
            .for_each(|(index, out)| {
                let first = index * stripe;
                let columns = View::rows(&x[first..], [tokens, out.len() / d], d).transposed();
                let rest = View::rows(&x[first..], [tokens, d - first], d);
                add_product(&mut out[first..], d, 1.0, columns, rest);
            });
        self.rows += tokens;
        Ok(())
    }

    /// Returns an error if an element is NaN or infinite.
    pub(super) fn check_finite(&self) -> Result<()> {
        match self
            .sum
            .as_slice()
            .par_iter()
            .position_first(|v| !v.is_finite())
        {
            Some(index) => Err(Error::NotFinite {
                tensor: "Hessian".into(),
                index,
                value: self.sum.as_slice()[index],
            }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn the_sum_of_products_however_batched() {
        for d in [1, 7, 65, 130] {
            let mut rng = ChaCha8Rng::seed_from_u64(d as u64);
            let x: Vec<f32> = (0..23 * d).map(|_| rng.random_range(-2.0..2.0)).collect();
            let mut whole = Hessian::new(d);
            whole.update(&x).unwrap();
            let mut parts = Hessian::new(d);
            parts.update(&x[..5 * d]).unwrap();
            parts.update(&[]).unwrap();
            parts.update(&x[5 * d..]).unwrap();
            assert_eq!((whole.rows(), parts.rows()), (23, 23));
            for i in 0..d {
                for j in 0..d {
                    let exact: f64 = x
                        .chunks_exact(d)
                        .map(|x| f64::from(x[i]) * f64::from(x[j]))
                        .sum();
                    assert!((f64::from(whole.get(i, j)) - exact).abs() < 1e-4);
                    assert!((f64::from(parts.to_matrix().row(i)[j]) - exact).abs() < 1e-4);
                }
            }
        }
    }

    #[test]
    fn bad_input_is_refused_and_changes_nothing() {
        let mut hessian = Hessian::new(3);
        hessian.update(&[1.0, -2.0, 0.5]).unwrap();
        let before = hessian.clone();
        assert!(matches!(
            hessian.update(&[1.0; 4]),
            Err(Error::ShapeMismatch { .. })
        ));
        assert!(matches!(
            hessian.update(&[1.0, f32::NAN, 0.0]),
            Err(Error::NotFinite { index: 1, .. })
        ));
        assert_eq!(hessian, before);
        assert!(Hessian::from_matrix(Matrix::zeros(2, 3)).is_err());
        let nan = Matrix::from_fn(2, 2, |i, j| if (i, j) == (0, 1) { f32::NAN } else { 1.0 });
        assert!(matches!(
            Hessian::from_matrix(nan),
            Err(Error::NotFinite { index: 1, .. })
        ));
        assert!(Hessian::new(0).update(&[1.0]).is_err());
    }
}
