//! The log of a training run.

use serde::{Deserialize, Serialize};

/// Log entry of one optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[doc(hidden)]
pub struct StepLog {
    /// Number of the step, starting at 1.
    pub step: usize,
    /// Mean negative log-likelihood per target, in nats, of the step's subnet on the step's batch.
    /// Under the sandwich rule, this is the largest subnet.
    pub loss: f64,
    /// The same for the smallest subnet under the sandwich rule, measured against the data even if
    /// the subnet is distilled.
    #[serde(default)]
    pub smallest_loss: Option<f64>,
    /// The same for the randomly drawn subnets, in the order of
    /// [`TrainConfig::subnets`](super::TrainConfig::subnets).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub random_losses: Vec<f64>,
    /// Validation loss of the evaluated subnet after this step, in nats per target, if it was
    /// measured.
    pub valid_loss: Option<f64>,
    /// Learning rate.
    pub lr: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Number of tokens in the step's batches, without padding.
    pub n_tokens: usize,
}
