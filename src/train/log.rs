//! What a run records.

use serde::{Deserialize, Serialize};

/// One optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[doc(hidden)]
pub struct StepLog {
    /// From 1.
    pub step: usize,
    /// Mean negative log-likelihood a target, in nats, of the step's own subnet and batch; under the sandwich rule that of the
    /// largest subnet.
    pub loss: f64,
    /// Under the sandwich rule the same of the smallest subnet, whatever it learned from.
    #[serde(default)]
    pub smallest_loss: Option<f64>,
    /// And of those that were drawn, in the order of [`TrainConfig::subnets`](super::TrainConfig::subnets).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub random_losses: Vec<f64>,
    /// On the validation set with the evaluated subnet, where it was measured after this step, in nats a target.
    pub valid_loss: Option<f64>,
    /// Learning rate.
    pub lr: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens of the step's batches, padding left out.
    pub n_tokens: usize,
}
