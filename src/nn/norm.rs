//! RMS normalization.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use super::ops;

/// RMSNorm with a learned gain (arXiv 1910.07467).
#[derive(Module, Debug)]
#[doc(hidden)]
pub struct RmsNorm {
    /// Weight, `[width]`.
    pub weight: Param<Tensor<1>>,
    /// Term added to the mean square.
    pub eps: f64,
    /// Number added to the weight: 1 for Gemma, otherwise 0.
    pub offset: f64,
}

impl RmsNorm {
    /// Creates a frozen normalization with a weight `[width]`.
    pub fn from_tensor(weight: Tensor<1>, eps: f64) -> Self {
        Self {
            weight: Param::from_tensor(weight).set_require_grad(false),
            eps,
            offset: 0.0,
        }
    }

    /// Sets the number that is added to the weight.
    pub fn with_offset(mut self, offset: f64) -> Self {
        self.offset = offset;
        self
    }

    /// Normalizes the last dimension: `x / sqrt(mean(x^2) + eps) * (weight + offset)`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let weight = self.weight.val();
        let gain = if self.offset == 0.0 {
            weight
        } else {
            weight + self.offset
        };
        ops::rms_norm(x, gain, self.eps)
    }
}
