//! RMS normalization.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use super::ops;

/// RMSNorm with a learned gain (arXiv 1910.07467).
#[derive(Module, Debug)]
#[doc(hidden)]
pub struct RmsNorm {
    /// Gain, `[d_model]`.
    pub weight: Param<Tensor<1>>,
    /// Term added to the mean square.
    pub eps: f64,
}

impl RmsNorm {
    /// Creates a frozen normalization with a gain `[d_model]`.
    pub fn from_tensor(weight: Tensor<1>, eps: f64) -> Self {
        Self {
            weight: Param::from_tensor(weight).set_require_grad(false),
            eps,
        }
    }

    /// Normalizes the last dimension: `x / sqrt(mean(x^2) + eps) * weight`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        ops::rms_norm(x, self.weight.val(), self.eps)
    }
}
