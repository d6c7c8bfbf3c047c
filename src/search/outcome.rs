//! Result of a search, and rules to choose a subnet from it.

use std::cmp::Ordering;
use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::pareto::{hypervolume, non_dominated};
use super::{Evaluation, Goal};
use crate::space::SubnetConfig;

/// Reason why a search ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum StopReason {
    /// The budget of evaluations was spent.
    Budget,
    /// The searcher had no more proposals.
    Exhausted,
    /// The searcher expects no better front from further evaluations.
    Converged,
}

/// All evaluations of a search and their Pareto front. Evaluations of a lower fidelity are listed,
/// but neither on the front nor chosen by a rule.
///
/// If several subnets are equally good by one of the rules below, the one proposed first is
/// returned.
#[derive(Clone, Debug)]
pub struct SearchOutcome {
    searcher: String,
    stopped: StopReason,
    evaluations: Vec<Evaluation>,
    front: Vec<usize>,
    predicted: Vec<(SubnetConfig, Vec<f64>)>,
}

impl SearchOutcome {
    /// Creates an outcome from evaluations in the order of proposals. [`super::Study`] uses this,
    /// and so can callers that run a searcher themselves.
    pub fn new(
        searcher: impl Into<String>,
        stopped: StopReason,
        evaluations: Vec<Evaluation>,
    ) -> Self {
        let mut seen = HashSet::new();
        let distinct: Vec<usize> = (0..evaluations.len())
            .filter(|&index| evaluations[index].is_full())
            .filter(|&index| seen.insert(&evaluations[index].config))
            .collect();
        let points: Vec<&[f64]> = distinct
            .iter()
            .map(|&index| evaluations[index].objectives.as_slice())
            .collect();
        let mut front: Vec<usize> = non_dominated(&points)
            .into_iter()
            .map(|at| distinct[at])
            .collect();
        front.sort_by(|&a, &b| by_cost(&evaluations[a], &evaluations[b]));
        Self {
            searcher: searcher.into(),
            stopped,
            evaluations,
            front,
            predicted: Vec::new(),
        }
    }

    /// Adds the objectives that a searcher predicted; see
    /// [`Searcher::predicted`](super::Searcher::predicted).
    pub fn with_predicted(mut self, predicted: Vec<(SubnetConfig, Vec<f64>)>) -> Self {
        self.predicted = predicted;
        self
    }

    /// Returns the objectives that were predicted for some subnets before they were evaluated, in
    /// the order of proposals.
    pub fn predicted(&self) -> &[(SubnetConfig, Vec<f64>)] {
        &self.predicted
    }

    /// Returns the name of the searcher.
    pub fn searcher(&self) -> &str {
        &self.searcher
    }

    /// Returns the reason why the search ended.
    pub fn stopped(&self) -> StopReason {
        self.stopped
    }

    /// Returns all evaluations in the order of proposals, including cached ones.
    pub fn evaluations(&self) -> &[Evaluation] {
        &self.evaluations
    }

    /// Returns the subnets that no other subnet dominates, cheapest first.
    pub fn front(&self) -> impl ExactSizeIterator<Item = &Evaluation> {
        self.front.iter().map(|&index| &self.evaluations[index])
    }

    /// Returns whether the evaluation at this position in [`evaluations`](Self::evaluations) is on
    /// the front.
    pub fn is_on_front(&self, index: usize) -> bool {
        self.front.contains(&index)
    }

    /// Returns the evaluation of a subnet, or `None` if it was not proposed.
    pub fn get(&self, config: &SubnetConfig) -> Option<&Evaluation> {
        self.full().find(|evaluation| evaluation.config == *config)
    }

    fn full(&self) -> impl Iterator<Item = &Evaluation> {
        self.evaluations
            .iter()
            .filter(|evaluation| evaluation.is_full())
    }

    /// Returns the cost of the search in full evaluations: the sum of all fidelities.
    pub fn n_full_evaluations(&self) -> f64 {
        self.evaluations
            .iter()
            .map(|evaluation| evaluation.fidelity)
            .sum()
    }

    /// Returns the volume of objectives that the subnets dominate up to `reference`, after each
    /// evaluation; see [`hypervolume`](super::pareto::hypervolume). The cost grows with the square
    /// of the number of evaluations.
    pub fn hypervolumes(&self, reference: &[f64]) -> Vec<f64> {
        let mut front: Vec<&[f64]> = Vec::new();
        let mut volume = 0.0;
        let mut volumes = Vec::with_capacity(self.evaluations.len());
        for evaluation in &self.evaluations {
            if evaluation.is_full() {
                front.push(&evaluation.objectives);
                let kept = non_dominated(&front);
                let is_new = kept.last() == Some(&(front.len() - 1));
                front = kept.into_iter().map(|at| front[at]).collect();
                if is_new {
                    volume = hypervolume(&front, reference);
                }
            }
            volumes.push(volume);
        }
        volumes
    }

    /// Returns the subnet that is best by a goal, or `None` if none is within its limit.
    pub fn best(&self, goal: &Goal) -> Option<&Evaluation> {
        self.full()
            .filter(|evaluation| goal.is_met(&evaluation.objectives))
            .min_by(|a, b| goal.compare(&a.objectives, &b.objectives))
    }

    /// Returns the subnet with the best score; the cheapest one if several have it.
    pub fn best_score(&self) -> Option<&Evaluation> {
        self.best(&Goal::ANY)
    }

    /// Returns the subnet with the best score among those that cost at most `cost`.
    pub fn best_under(&self, cost: f64) -> Option<&Evaluation> {
        self.best(&Goal::ScoreUnder(cost))
    }

    /// Returns the cheapest subnet with a score of at most `score` (scores are minimised); the one
    /// with the best score if several are equally cheap. LoNAS chooses in this way: the fewest MACs
    /// at an accuracy no more than a tolerance below the reference's.
    pub fn no_worse_than(&self, score: f64) -> Option<&Evaluation> {
        self.best(&Goal::CostWithin(score))
    }

    /// Returns the knee of the front: the point farthest below the line between its cheapest and
    /// its best-scoring point, with both objectives scaled to 0..1. Returns the subnet with the
    /// best score if the front has fewer than three points or no point below the line.
    pub fn knee(&self) -> Option<&Evaluation> {
        let finite = |evaluation: &&Evaluation| {
            evaluation.score().is_finite() && evaluation.cost().is_finite()
        };
        let front: Vec<&Evaluation> = self.front().filter(finite).collect();
        let best = self.best_score();
        let (Some(cheapest), Some(last)) = (
            front.iter().min_by(|a, b| by_cost(a, b)),
            front
                .iter()
                .min_by(|a, b| Goal::ANY.compare(&a.objectives, &b.objectives)),
        ) else {
            return best;
        };
        let (width, height) = (
            last.cost() - cheapest.cost(),
            cheapest.score() - last.score(),
        );
        if !(width > 0.0 && height > 0.0) {
            return best;
        }
        let gain = |evaluation: &Evaluation| {
            1.0 - (evaluation.cost() - cheapest.cost()) / width
                - (evaluation.score() - last.score()) / height
        };
        let mut knee = (0.0, best);
        for evaluation in front {
            if gain(evaluation) > knee.0 + 1e-12 {
                knee = (gain(evaluation), Some(evaluation));
            }
        }
        knee.1
    }
}

fn by_cost(a: &Evaluation, b: &Evaluation) -> Ordering {
    a.cost()
        .total_cmp(&b.cost())
        .then_with(|| a.score().total_cmp(&b.score()))
}
