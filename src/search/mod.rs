//! Finds good subnets of a trained supernet with searchers, studies and reports.
//!
//! A [`Searcher`] proposes subnets and is told their objectives (ask/tell). It owns no model and
//! evaluates nothing. A [`Study`] runs a searcher against an objective with a budget, a cache and a
//! log, and returns a [`SearchOutcome`]. [`SearchReport`] plots the outcome like Figure 4 of
//! "Low-Rank Adapters Meet Neural Architecture Search for LLM Compression" (arXiv 2501.16372).
//!
//! Objectives are minimised. By convention the first ([`SCORE`]) is the score, such as the
//! validation loss or the negated accuracy, and the second ([`COST`]) is the cost, such as MACs per
//! token. NaN counts as positive infinity, the worst value.
//!
//! Searches are deterministic. The proposals of a searcher depend on its seed and on the
//! objectives, but not on the order in which evaluations finish or on the sizes of batches. A
//! search therefore gives the same front at any number of threads.
//!
//! ```
//! use elastic_lora::progress::Silent;
//! use elastic_lora::search::{NsgaConfig, StudyConfig};
//! use elastic_lora::space::{LayerShape, SearchSpace};
//!
//! let layers: Vec<_> = (0..6)
//!     .map(|i| LayerShape::new(format!("model.layers.{i}.q_proj"), 8, 8))
//!     .collect();
//! let space = SearchSpace::per_layer(&layers, &[32, 24, 16])?;
//! let mut searcher = NsgaConfig::new().with_population(8).with_seed(1).init(&space)?;
//! let objective = |config: &_| {
//!     let ranks = space.values(config)?;
//!     let loss = ranks.iter().enumerate().map(|(i, &rank)| 1.0 / (rank * (i + 1)) as f64).sum();
//!     Ok(vec![loss, ranks.iter().sum::<usize>() as f64])
//! };
//! let outcome = StudyConfig::new(60).init(&space)?.run(&mut searcher, objective, &Silent)?;
//! assert!(outcome.front().count() > 3);
//! # Ok::<(), elastic_lora::Error>(())
//! ```

mod additive;
mod climb;
#[cfg(feature = "report")]
mod curves;
mod directions;
mod goal;
mod halving;
mod knapsack;
mod nsga;
mod outcome;
pub mod pareto;
#[cfg(feature = "report")]
mod plot;
mod proposals;
mod report;
mod response;
mod selection;
mod sensitivity;
mod simple;
mod state;
mod study;
mod surrogate;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::space::SubnetConfig;

pub use additive::AdditiveModel;
pub use climb::{HillClimbing, HillClimbingConfig};
pub use goal::Goal;
pub use halving::{Halving, HalvingConfig};
pub use nsga::{Nsga, NsgaConfig};
pub use outcome::{SearchOutcome, StopReason};
pub use report::{ObjectiveNames, SearchReport};
pub use selection::Selection;
pub use sensitivity::{Sensitivity, SensitivityConfig};
pub use simple::{Exhaustive, FixedList, Heuristic, RandomSearch, RandomSearchConfig};
pub use study::{Measurement, Study, StudyConfig};

/// Index of the score among the objectives: a loss or a negated accuracy.
pub const SCORE: usize = 0;

/// Index of the cost among the objectives: MACs, parameters, bytes or milliseconds.
pub const COST: usize = 1;

/// Proposes subnets and learns from their objectives.
///
/// The caller alternates [`ask`](Self::ask) and [`tell`](Self::tell) until
/// [`is_finished`](Self::is_finished) returns true or its budget is spent. Batches may have any
/// size, and subnets that were asked for may be told in any order.
pub trait Searcher: Send {
    /// Returns a short name for logs and plots, such as `nsga2`.
    fn name(&self) -> &str;

    /// Returns at most `n` subnets to evaluate. Returns fewer or none if the next ones depend on
    /// objectives that have not been told yet, or if there are no more.
    fn ask(&mut self, n: usize) -> Vec<SubnetConfig>;

    /// Takes the objectives of subnets that [`ask`](Self::ask) returned.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a subnet that was not
    /// asked for or was told before, and [`Error::ShapeMismatch`](crate::Error::ShapeMismatch) if
    /// the number of objectives changes. The evaluations before the invalid one have been taken.
    fn tell(&mut self, evaluated: &[Evaluation]) -> Result<()>;

    /// Returns whether the searcher will make no more proposals, regardless of further objectives.
    fn is_finished(&self) -> bool;

    /// Returns the reason why there are no more proposals, for a searcher that is finished.
    fn reason(&self) -> StopReason {
        StopReason::Exhausted
    }

    /// Returns the fidelity at which the subnets that [`ask`](Self::ask) returns next should be
    /// evaluated: the fraction of a full evaluation's data, above 0 and at most 1.
    fn fidelity(&self) -> f64 {
        1.0
    }

    /// Returns the objectives that the searcher predicted for proposals, in their order, for
    /// reports.
    fn predicted(&self) -> Vec<(SubnetConfig, Vec<f64>)> {
        Vec::new()
    }
}

impl<S: Searcher + ?Sized> Searcher for Box<S> {
    fn name(&self) -> &str {
        (**self).name()
    }

    fn ask(&mut self, n: usize) -> Vec<SubnetConfig> {
        (**self).ask(n)
    }

    fn tell(&mut self, evaluated: &[Evaluation]) -> Result<()> {
        (**self).tell(evaluated)
    }

    fn is_finished(&self) -> bool {
        (**self).is_finished()
    }

    fn reason(&self) -> StopReason {
        (**self).reason()
    }

    fn fidelity(&self) -> f64 {
        (**self).fidelity()
    }

    fn predicted(&self) -> Vec<(SubnetConfig, Vec<f64>)> {
        (**self).predicted()
    }
}

/// A subnet and its objectives.
///
/// In JSON, an objective that is not finite is written by name: `"NaN"`, `"inf"` or `"-inf"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Position in the order of proposals, from 0.
    pub index: usize,
    /// The subnet.
    pub config: SubnetConfig,
    /// Objectives of the subnet, to be minimised; see [`SCORE`] and [`COST`].
    #[serde(with = "state::numbers")]
    pub objectives: Vec<f64>,
    /// Standard error of the score, if the objective function estimates one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score_error: Option<f64>,
    /// Fraction of a full evaluation's data on which the subnet was evaluated, above 0 and at
    /// most 1.
    #[serde(default = "full", skip_serializing_if = "is_full")]
    pub fidelity: f64,
    /// Message of the error with which the evaluation failed; the objectives are then NaN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Whether the objectives came from the cache or a log instead of the objective function.
    #[serde(default)]
    pub cached: bool,
    /// Wall time of the evaluation in seconds; 0 if cached.
    #[serde(default)]
    pub seconds: f64,
}

impl Evaluation {
    /// Creates an evaluation with index 0 and no time, for callers that run a searcher themselves.
    pub fn new(config: SubnetConfig, objectives: Vec<f64>) -> Self {
        Self {
            index: 0,
            config,
            objectives,
            score_error: None,
            fidelity: 1.0,
            error: None,
            cached: false,
            seconds: 0.0,
        }
    }

    /// Returns whether the subnet was evaluated on all data.
    pub fn is_full(&self) -> bool {
        is_full(&self.fidelity)
    }

    /// Returns the first objective, or infinity if it is NaN or missing.
    pub fn score(&self) -> f64 {
        self.objectives
            .get(SCORE)
            .map_or(f64::INFINITY, |&score| pareto::nan_is_worst(score))
    }

    /// Returns the second objective, infinity if it is NaN, or 0 if there is none.
    pub fn cost(&self) -> f64 {
        self.objectives
            .get(COST)
            .map_or(0.0, |&cost| pareto::nan_is_worst(cost))
    }
}

fn full() -> f64 {
    1.0
}

fn is_full(fidelity: &f64) -> bool {
    *fidelity >= 1.0
}
