//! Initializes adapters with the principal part of the weight (PiSSA, arXiv 2404.02948).
//!
//! Departures: the ranks are elastic, so that only the smallest rank of a layer, which is always
//! active, takes its part from the weight; under a mask, the part is taken where the update acts.

use super::lora::ElasticLora;
use crate::error::{Error, Result};
use crate::io::LoraWeights;
use crate::linalg::{Matrix, low_rank};
use crate::nn::{matrix_from_tensor, tensor_from_matrix};

impl ElasticLora {
    /// Sets the first `rank` ranks to the part of `weight`, `[d_output, d_input]`, in its `rank`
    /// largest singular values. Returns the weight without the update, as the base must be, and the
    /// pair that was set. Further ranks keep their fresh factors, whose update is zero: at `rank`
    /// and at each larger rank, base and update sum up to `weight`.
    ///
    /// Under a mask, the update is masked, and a zero of the weight stays zero.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if `weight` has the wrong size, [`Error::InvalidRank`] if
    /// `rank` is 0 or above the maximum, [`Error::NotFinite`] if the weight holds NaN or an
    /// infinity, and [`Error::Unsupported`] if the adapter has a grid, or if the scale differs
    /// between `rank` and larger ranks.
    pub fn init_from_principal(
        &mut self,
        weight: &Matrix,
        rank: usize,
        seed: u64,
    ) -> Result<(Matrix, LoraWeights)> {
        let (d_input, d_output, max) = (self.d_input(), self.d_output(), self.max_rank());
        if (weight.rows(), weight.cols()) != (d_output, d_input) {
            return Err(Error::ShapeMismatch {
                what: "weight whose principal part an adapter takes".into(),
                expected: vec![d_output, d_input],
                found: vec![weight.rows(), weight.cols()],
            });
        }
        if rank == 0 || rank > max {
            return Err(Error::InvalidRank {
                layer: "an adapter that begins as a principal part".into(),
                found: rank,
                max,
            });
        }
        let scale = self.config().scale(rank);
        let unsupported = |what: &str| {
            Err(Error::Unsupported {
                what: format!("an adapter {what} that begins as a principal part"),
            })
        };
        if self.grid.is_some() {
            return unsupported("through a grid");
        }
        if (rank..=max).any(|rank| self.config().scale(rank) != scale) {
            return unsupported("whose scale depends on its rank");
        }
        let found = low_rank(weight, rank, seed)?;
        let share = (1.0 / scale.sqrt()) as f32;
        let mut a = matrix_from_tensor(self.lora_a.val().without_autodiff());
        let mut b = Matrix::zeros(d_output, max);
        for term in (0..rank).filter(|term| found.singular[*term] > 0.0) {
            let row = a.row_mut(term).iter_mut().zip(found.right.row(term));
            row.for_each(|(a, right)| *a = share * right);
            for output in 0..d_output {
                b.row_mut(output)[term] = share * found.left.row(output)[term];
            }
        }
        let first = LoraWeights::new(
            Matrix::from_fn(rank, d_input, |k, j| a.row(k)[j]),
            Matrix::from_fn(d_output, rank, |i, k| b.row(i)[k]),
            scale as f32,
        )?;
        self.set_factors(&a, &b);
        let mask = self.mask().cloned();
        let mask = mask.map(|mask| matrix_from_tensor(mask.float()));
        let delta = first.delta();
        let left = Matrix::from_fn(d_output, d_input, |i, j| {
            let (w, d) = (weight.row(i)[j], delta.row(i)[j]);
            let kept = mask.as_ref().is_none_or(|mask| mask.row(i)[j] != 0.0);
            match (kept, w - d) {
                (false, _) => w,
                // A zero would count as pruned.
                (true, 0.0) if w != 0.0 => f32::MIN_POSITIVE,
                (true, left) => left,
            }
        });
        Ok((left, first))
    }

    /// Replaces the factors. `a` and `b` are in PEFT's orientation and have the shapes of the old
    /// ones.
    pub(super) fn set_factors(&mut self, a: &Matrix, b: &Matrix) {
        for (param, value) in [(&mut self.lora_a, a), (&mut self.lora_b, b)] {
            *param = param.clone().map(|before| {
                let trained = before.is_require_grad();
                tensor_from_matrix(value, &before.device()).set_require_grad(trained)
            });
        }
    }
}
