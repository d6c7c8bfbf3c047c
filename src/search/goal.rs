//! What a search for a single subnet wants: an order of subnets by their objectives.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};

use super::pareto::nan_is_worst;
use super::{COST, SCORE};
use crate::error::{Error, Result};

/// What a search for a single subnet wants.
///
/// A goal orders subnets by how far they are beyond its limit, if it has one, and then by what it
/// minimises. Of two subnets that are equal so far, the one that is better in the other objective
/// is better.
///
/// ```
/// use elastic_lora::search::Goal;
///
/// let goal = Goal::ScoreUnder(100.0);
/// assert!(goal.compare(&[2.0, 90.0], &[3.0, 50.0]).is_lt());
/// assert!(goal.compare(&[2.0, 101.0], &[3.0, 50.0]).is_gt());
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Goal {
    /// The lowest score at a cost of at most this, in units of the cost objective.
    ScoreUnder(f64),
    /// The lowest cost at a score of at most this. LoNAS chooses in this way: the fewest MACs at an
    /// accuracy no more than a tolerance below the reference's.
    CostWithin(f64),
    /// The lowest sum of the objectives, each times its weight. Objectives without a weight do not
    /// count. A sum finds points of the convex hull of a front alone.
    WeightedSum(Vec<f64>),
}

impl Goal {
    /// The lowest score, whatever it costs.
    pub(super) const ANY: Goal = Goal::ScoreUnder(f64::INFINITY);

    /// Checks the numbers of the goal.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if a limit is NaN, or if the weights are negative, not
    /// finite, or all 0.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::ScoreUnder(limit) | Self::CostWithin(limit) if limit.is_nan() => {
                Err(Error::argument("goal", limit, "a number as limit"))
            }
            Self::WeightedSum(weights)
                if weights.iter().any(|w| !(*w >= 0.0 && w.is_finite()))
                    || weights.iter().all(|w| *w == 0.0) =>
            {
                let expected = "finite weights of at least 0, one of them above 0";
                Err(Error::argument("goal", format!("{weights:?}"), expected))
            }
            _ => Ok(()),
        }
    }

    /// Compares the objectives of two subnets; the better one is less. NaN is the worst value, and
    /// a missing cost is 0.
    pub fn compare(&self, a: &[f64], b: &[f64]) -> Ordering {
        let order = self.key(a).into_iter().zip(self.key(b));
        order
            .map(|(a, b)| a.total_cmp(&b))
            .find(|order| order.is_ne())
            .unwrap_or(Ordering::Equal)
    }

    /// Returns whether these objectives are within the limit of the goal.
    pub fn is_met(&self, objectives: &[f64]) -> bool {
        self.key(objectives)[0] == 0.0
    }

    /// How far a subnet is beyond the limit, what the goal minimises, and what decides ties.
    fn key(&self, objectives: &[f64]) -> [f64; 3] {
        let at = |index: usize| objectives.get(index).map_or(0.0, |&x| nan_is_worst(x));
        let over = |value: f64, limit: f64| if value <= limit { 0.0 } else { value - limit };
        match self {
            Self::ScoreUnder(limit) => [over(at(COST), *limit), at(SCORE), at(COST)],
            Self::CostWithin(limit) => [over(at(SCORE), *limit), at(COST), at(SCORE)],
            Self::WeightedSum(weights) => {
                let terms = weights.iter().enumerate().filter(|(_, w)| **w > 0.0);
                let sum = terms.map(|(index, weight)| weight * at(index)).sum();
                [0.0, nan_is_worst(sum), at(SCORE)]
            }
        }
    }
}
