//! What a run shows and records.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

/// One optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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

/// A progress bar with loss, tokens a second and the time that remains; hidden where standard error is no terminal.
pub(crate) struct TrainBar {
    bar: ProgressBar,
    loss: Option<f64>,
    tokens: usize,
}

impl TrainBar {
    pub fn new(enabled: bool, label: &str, start: usize, steps: usize) -> Self {
        let bar = if enabled {
            ProgressBar::new(steps as u64)
        } else {
            ProgressBar::hidden()
        };
        let template = "{prefix:>14} [{bar:28}] {pos}/{len}  {msg}  {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(label.to_string());
        bar.set_position(start as u64);
        bar.reset_eta();
        Self {
            bar,
            loss: None,
            tokens: 0,
        }
    }

    pub fn step(&mut self, log: &StepLog, elapsed: Duration) {
        self.tokens += log.n_tokens;
        // Smoothed over about 20 steps: single batches jump.
        let smooth = self
            .loss
            .map_or(log.loss, |before| before + (log.loss - before) / 20.0);
        self.loss = Some(smooth);
        let rate = self.tokens as f64 / elapsed.as_secs_f64().max(1e-9);
        self.bar
            .set_message(format!("loss {smooth:.4}  {rate:.0} tok/s"));
        self.bar.set_position(log.step as u64);
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
