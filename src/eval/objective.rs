//! A supernet's subnets as points of a search.

use super::{LatencyTable, ProblemSet, mean_loss};
use crate::data::{Batch, TextTokenizer};
use crate::error::{Error, Result};
use crate::format::WeightFormat;
use crate::progress::Progress;
use crate::runtime::GenerateConfig;
use crate::search::{Measurement, ObjectiveNames};
use crate::space::SubnetConfig;
use crate::supernet::SuperNet;
use crate::train::loss::batch_losses;

/// The quality measure of a subnet.
pub enum Metric<'a> {
    /// Mean negative log-likelihood per target on these batches.
    Loss(&'a [Batch]),
    /// Fraction of problems answered correctly.
    Accuracy {
        /// The problems.
        problems: &'a ProblemSet,
        /// The model's tokenizer.
        tokenizer: &'a TextTokenizer,
        /// Generation settings for the answers.
        generate: GenerateConfig,
    },
}

/// The cost measure of a subnet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cost {
    /// Multiply-accumulates per token.
    #[default]
    Macs,
    /// Number of weights, zeros included.
    Params,
    /// Bytes of weights at 16 bits each.
    Bytes,
    /// Bytes of weights with the linear layers in this format and everything else, adapters that
    /// are not merged included, at 16 bits each (32 for [`WeightFormat::F32`]).
    Stored(WeightFormat),
    /// Latency in milliseconds, predicted from times measured on this machine; see
    /// [`SubnetObjective::with_latency`].
    Latency,
}

/// Scores subnets of one supernet with `[loss or -accuracy, cost]`, both to be minimized.
pub struct SubnetObjective<'a> {
    net: SuperNet,
    metric: Metric<'a>,
    cost: Cost,
    merged: bool,
    latency: Option<LatencyTable>,
}

impl<'a> SubnetObjective<'a> {
    /// Creates an objective that shares the supernet's weights. The caller's active subnet is
    /// unchanged.
    pub fn new(net: &SuperNet, metric: Metric<'a>, cost: Cost) -> Self {
        Self {
            net: net.clone(),
            metric,
            cost,
            merged: false,
            latency: None,
        }
    }

    /// Sets whether costs are counted with the subnet's adapters merged, rather than separate from
    /// the base.
    pub fn with_merged(mut self, merged: bool) -> Self {
        self.merged = merged;
        self
    }

    /// Uses latency as the cost, predicted from this table, which must be of the same supernet.
    pub fn with_latency(mut self, table: LatencyTable) -> Self {
        (self.cost, self.latency) = (Cost::Latency, Some(table));
        self
    }

    /// Names of the objectives, for reports.
    pub fn names(&self) -> ObjectiveNames {
        let cost = match self.cost {
            Cost::Macs => "MACs per token",
            Cost::Params => "parameters",
            Cost::Bytes => "bytes of weights",
            Cost::Stored(_) => "stored bytes",
            Cost::Latency => "latency, ms",
        };
        match self.metric {
            Metric::Loss(_) => ObjectiveNames::new("validation loss", cost).with_units("nats", ""),
            Metric::Accuracy { .. } => {
                ObjectiveNames::new("accuracy", cost).with_larger_is_better(true)
            }
        }
    }

    /// Scores a subnet on a part of the data, with the standard error of a loss over its batches.
    ///
    /// A loss takes this fraction of the batches, from the first and at least one. An accuracy
    /// always takes all problems.
    ///
    /// # Errors
    /// Returns the errors of [`evaluate`](Self::evaluate), and [`Error::InvalidArgument`] for a
    /// fraction below 1 with an accuracy.
    pub fn evaluate_at(
        &self,
        subnet: &SubnetConfig,
        fidelity: f64,
        progress: &dyn Progress,
    ) -> Result<Measurement> {
        let Metric::Loss(batches) = &self.metric else {
            if fidelity < 1.0 {
                let expected = "1 with an accuracy, which takes all problems";
                return Err(Error::argument("fidelity", fidelity, expected));
            }
            return self.evaluate(subnet, progress).map(Into::into);
        };
        let n = (fidelity * batches.len() as f64).ceil() as usize;
        let batches = &batches[..n.clamp(1.min(batches.len()), batches.len())];
        let mut net = self.net.clone();
        net.activate(subnet)?;
        let model = net.eval_model();
        let cost = self.cost(&net, subnet)?;
        let losses = batch_losses(&model, batches, progress)?;
        let (sum, targets) = losses.iter().fold((0.0, 0), |(sum, n), (loss, targets)| {
            (sum + loss, n + targets)
        });
        let (mean, n) = (sum / targets as f64, losses.len() as f64);
        let squares = losses
            .iter()
            .map(|(loss, targets)| (loss - mean * *targets as f64).powi(2))
            .sum::<f64>();
        // Of one batch alone, there is no error.
        let error = (squares * n / (n - 1.0)).sqrt() / targets as f64;
        Ok(Measurement {
            objectives: vec![mean, cost],
            score_error: error.is_finite().then_some(error),
        })
    }

    /// Scores a subnet.
    ///
    /// # Errors
    /// Returns an error if the subnet is not in the space, and the errors of the evaluation.
    pub fn evaluate(&self, subnet: &SubnetConfig, progress: &dyn Progress) -> Result<Vec<f64>> {
        // The clone shares all weights, so several subnets can be scored at once.
        let mut net = self.net.clone();
        net.activate(subnet)?;
        let model = net.eval_model();
        let cost = self.cost(&net, subnet)?;
        let score = match &self.metric {
            Metric::Loss(batches) => mean_loss(&model, batches, progress)?,
            Metric::Accuracy {
                problems,
                tokenizer,
                generate,
            } => -problems
                .exact_match(&model, tokenizer, generate, progress)?
                .accuracy(),
        };
        Ok(vec![score, cost])
    }

    /// The cost of a subnet.
    ///
    /// # Errors
    /// Returns an error if the subnet is not in the space, and [`Error::InvalidArgument`] for
    /// [`Cost::Latency`] without a table or with one of other sizes.
    pub fn cost(&self, net: &SuperNet, subnet: &SubnetConfig) -> Result<f64> {
        let costs = net.cost(subnet)?;
        let costs = if self.merged { costs.merged() } else { costs };
        Ok(match (self.cost, &self.latency) {
            (Cost::Macs, _) => costs.macs_per_token as f64,
            (Cost::Params, _) => costs.params as f64,
            (Cost::Bytes, _) => costs.weight_bytes as f64,
            (Cost::Stored(format), _) => {
                let size = if format == WeightFormat::F32 { 4 } else { 2 };
                (net.stored_bytes(subnet, format)? + size * costs.adapter_params) as f64
            }
            (Cost::Latency, Some(table)) => table.predict_ms(&net.block_dims(subnet)?)?,
            (Cost::Latency, None) => {
                return Err(Error::argument(
                    "cost",
                    "latency",
                    "a table of measured times",
                ));
            }
        })
    }
}
