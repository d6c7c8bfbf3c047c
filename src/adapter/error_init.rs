//! Initializes adapters with the error that compression made in a weight (LoftQ, arXiv 2310.08659;
//! EoRA, arXiv 2410.21271).
//!
//! Departures: a single singular value decomposition replaces LoftQ's alternation between
//! quantizing and fitting; inputs are weighted by their norms, not by their full covariance.

use super::lora::ElasticLora;
use crate::error::{Error, Result};
use crate::linalg::{Matrix, low_rank};
use crate::nn::matrix_from_tensor;

impl ElasticLora {
    /// Sets the update `s B A` at the largest rank to the best low-rank approximation of `error`,
    /// `[d_output, d_input]`: the original weight minus the compressed one.
    ///
    /// Ranks are ordered by how much of the error they remove. If all ranks share one scale, each
    /// smaller rank therefore starts as the best approximation of its size; under another scale
    /// rule, its update starts too strong. Ranks beyond the rank of `error` keep their fresh
    /// factors, whose update is zero.
    ///
    /// With `norms`, one per input, the approximation minimizes the error of the layer's output for
    /// independent inputs, `sum((error - s B A)^2 * norm^2)`.
    ///
    /// Under a mask, the part of `error` inside the mask is approximated as if there were no mask.
    /// The part of the update that the mask then removes is not accounted for, so this start is
    /// good but not optimal.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if `error` or `norms` has the wrong size,
    /// [`Error::NotFinite`] if the error holds NaN or an infinity, [`Error::InvalidArgument`] if a
    /// norm is negative or not finite, and [`Error::Unsupported`] if the adapter has a grid:
    /// rounding to the grid makes the error anew.
    pub fn init_from_error(
        &mut self,
        error: &Matrix,
        norms: Option<&[f32]>,
        seed: u64,
    ) -> Result<()> {
        let (d_input, d_output, rank) = (self.d_input(), self.d_output(), self.max_rank());
        if (error.rows(), error.cols()) != (d_output, d_input) {
            return Err(Error::ShapeMismatch {
                what: "error of a compressed weight".into(),
                expected: vec![d_output, d_input],
                found: vec![error.rows(), error.cols()],
            });
        }
        if self.grid.is_some() {
            return Err(Error::Unsupported {
                what: "a quantization-aware adapter that begins as an error".into(),
            });
        }
        if let Some(norms) = norms {
            if norms.len() != d_input {
                return Err(Error::ShapeMismatch {
                    what: "norms of a layer's inputs".into(),
                    expected: vec![d_input],
                    found: vec![norms.len()],
                });
            }
            if let Some(norm) = norms
                .iter()
                .find(|norm| !(norm.is_finite() && **norm >= 0.0))
            {
                return Err(Error::argument("norm", norm, "finite and at least 0"));
            }
        }
        let norm = |input: usize| norms.map_or(1.0, |norms| norms[input]);
        let mask = self
            .mask()
            .map(|mask| matrix_from_tensor(mask.clone().float()));
        let weighted = Matrix::from_fn(d_output, d_input, |output, input| {
            let kept = mask
                .as_ref()
                .is_none_or(|mask| mask.row(output)[input] != 0.0);
            if kept {
                error.row(output)[input] * norm(input)
            } else {
                0.0
            }
        });
        let found = low_rank(&weighted, rank, seed)?;
        let fresh = matrix_from_tensor(self.lora_a.val().without_autodiff());
        let share = (1.0 / self.config().scale(rank).sqrt()) as f32;
        let a = Matrix::from_fn(rank, d_input, |term, input| {
            match (found.singular[term] > 0.0, norm(input) > 0.0) {
                (true, true) => share * found.right.row(term)[input] / norm(input),
                (true, false) => 0.0,
                // B's row is 0. A's row must not be, or neither would ever be trained.
                (false, _) => fresh.row(term)[input],
            }
        });
        let b = Matrix::from_fn(d_output, rank, |output, term| {
            share * found.left.row(output)[term]
        });
        self.set_factors(&a, &b);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::nn::tensor_from_matrix;
    use crate::space::LoraConfig;

    fn random(rows: usize, cols: usize, seed: u64) -> Matrix {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        Matrix::from_fn(rows, cols, |_, _| rng.random_range(-1.0..1.0))
    }

    /// Remaining squared error, with inputs weighted.
    fn left(error: &Matrix, adapter: &ElasticLora, norms: &[f32]) -> f64 {
        let delta = matrix_from_tensor(adapter.delta());
        let part =
            |i: usize, j: usize| f64::from((error.row(i)[j] - delta.row(i)[j]) * norms[j]).powi(2);
        (0..error.rows())
            .map(|i| (0..error.cols()).map(|j| part(i, j)).sum::<f64>())
            .sum()
    }

    #[test]
    fn the_update_is_the_error_as_far_as_ranks_go_and_more_with_each() {
        let config = LoraConfig::new(6).with_alpha(15.0);
        let error = random(19, 23, 1);
        let norms: Vec<f32> = (0..23)
            .map(|input| {
                if input == 4 {
                    0.0
                } else {
                    0.1 + (input % 7) as f32
                }
            })
            .collect();
        let plain = vec![1.0; 23];
        let mut adapter = ElasticLora::new(&config, 23, 19, 3, &Device::flex()).unwrap();
        adapter.init_from_error(&error, None, 5).unwrap();
        let mut weighted = adapter.clone();
        weighted.init_from_error(&error, Some(&norms), 5).unwrap();
        let (mut before, mut before_weighted) = (f64::INFINITY, f64::INFINITY);
        for rank in 1..=6 {
            adapter.set_active_rank(rank).unwrap();
            weighted.set_active_rank(rank).unwrap();
            let (rest, rest_weighted) = (
                left(&error, &adapter, &plain),
                left(&error, &weighted, &norms),
            );
            assert!(
                rest < before && rest_weighted < before_weighted,
                "rank {rank}"
            );
            // Each adapter is the better one by its own measure.
            assert!(
                rest < left(&error, &weighted, &plain)
                    && rest_weighted < left(&error, &adapter, &norms)
            );
            (before, before_weighted) = (rest, rest_weighted);
        }
        assert!(
            before
                < 0.7
                    * left(
                        &error,
                        &ElasticLora::new(&config, 23, 19, 3, &Device::flex()).unwrap(),
                        &plain
                    )
        );
    }

    #[test]
    fn ranks_that_the_error_lacks_stay_fresh_and_a_mask_is_minded() {
        let config = LoraConfig::new(4).with_alpha(10.0);
        let (u, v) = (random(11, 1, 1), random(1, 9, 2));
        let error = Matrix::from_fn(11, 9, |i, j| u.row(i)[0] * v.row(0)[j]);
        let mut adapter = ElasticLora::new(&config, 9, 11, 3, &Device::flex()).unwrap();
        let fresh = matrix_from_tensor(adapter.lora_a.val());
        adapter.init_from_error(&error, None, 5).unwrap();
        assert!(left(&error, &adapter, &[1.0; 9]) < 1e-8);
        let (a, b) = (
            matrix_from_tensor(adapter.lora_a.val()),
            matrix_from_tensor(adapter.lora_b.val()),
        );
        assert_eq!(a.row(2), fresh.row(2));
        assert!((0..11).all(|output| b.row(output)[2] == 0.0));
        let keep = random(11, 9, 8);
        let mask = tensor_from_matrix(&keep, &Device::flex()).greater_elem(0.0);
        adapter.set_mask(Some(mask)).unwrap();
        adapter.init_from_error(&random(11, 9, 4), None, 5).unwrap();
        let masked = Matrix::from_fn(11, 9, |i, j| {
            if keep.row(i)[j] > 0.0 {
                random(11, 9, 4).row(i)[j]
            } else {
                0.0
            }
        });
        assert!(
            left(&masked, &adapter, &[1.0; 9])
                < 0.6
                    * masked
                        .as_slice()
                        .iter()
                        .map(|v| f64::from(v * v))
                        .sum::<f64>()
        );
        assert!(adapter.init_from_error(&random(9, 11, 4), None, 5).is_err());
        assert!(
            adapter
                .init_from_error(&random(11, 9, 4), Some(&[1.0; 8]), 5)
                .is_err()
        );
        assert!(
            adapter
                .init_from_error(&random(11, 9, 4), Some(&[-1.0; 9]), 5)
                .is_err()
        );
    }
}
