//! Reports the progress of a search as a CSV table and JSON.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::fmt::Write as _;

use super::Evaluation;
use super::SearchOutcome;
use crate::error::{Error, Result};
use crate::space::{SearchSpace, SubnetConfig};

/// Display names of the objectives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[doc(hidden)]
pub struct ObjectiveNames {
    /// Name of the score, such as `validation loss`.
    pub score: String,
    /// Unit of the score, such as `nats per token`; may be empty.
    pub score_unit: String,
    /// Whether a larger score is better. Objectives are always minimised, so the first objective is
    /// then the negated score, and reports show it with its sign reversed.
    pub score_larger_is_better: bool,
    /// Name of the cost, such as `MACs per token`.
    pub cost: String,
    /// Unit of the cost, such as `ms`; may be empty. The plot scales large costs (by k, M, G, T).
    pub cost_unit: String,
}

impl ObjectiveNames {
    /// Creates names without units, for a score that is minimised, such as a loss, and a cost.
    pub fn new(score: impl Into<String>, cost: impl Into<String>) -> Self {
        Self {
            score: score.into(),
            score_unit: String::new(),
            score_larger_is_better: false,
            cost: cost.into(),
            cost_unit: String::new(),
        }
    }

    /// Sets the units.
    pub fn with_units(mut self, score: impl Into<String>, cost: impl Into<String>) -> Self {
        (self.score_unit, self.cost_unit) = (score.into(), cost.into());
        self
    }

    /// Sets whether a larger score is better, as with accuracy.
    pub fn with_larger_is_better(mut self, larger: bool) -> Self {
        self.score_larger_is_better = larger;
        self
    }

    pub(super) fn shown(&self, score: f64) -> f64 {
        match self.score_larger_is_better {
            true => 0.0 - score, // Unlike -score, this never gives "-0".
            false => score,
        }
    }
}

impl Default for ObjectiveNames {
    fn default() -> Self {
        Self::new("validation loss", "MACs per token").with_units("nats per token", "")
    }
}

/// Writes reports of the outcome of a search.
#[derive(Clone, Debug)]
pub struct SearchReport<'a> {
    pub(super) space: &'a SearchSpace,
    pub(super) outcome: &'a SearchOutcome,
    pub(super) names: &'a ObjectiveNames,
    pub(super) title: String,
    pub(super) chosen: Vec<(String, SubnetConfig)>,
}

pub(super) const ROLES: [&str; 3] = ["heuristic", "maximal", "minimal"];

impl<'a> SearchReport<'a> {
    /// Creates a report of `outcome`. It marks the heuristic, maximal and minimal subnets of
    /// `space` if they were evaluated.
    pub fn new(
        space: &'a SearchSpace,
        outcome: &'a SearchOutcome,
        names: &'a ObjectiveNames,
    ) -> Self {
        Self {
            space,
            outcome,
            names,
            title: String::new(),
            chosen: Vec::new(),
        }
    }

    /// Sets what was searched, such as the names of the model and the method. It stands above the
    /// plot.
    pub fn with_title(mut self, title: impl Into<String>) -> Self {
        self.title = title.into();
        self
    }

    /// Marks a subnet that was chosen, under a name such as `best`. A subnet that was not evaluated
    /// is left out.
    pub fn with_chosen(mut self, name: impl Into<String>, config: SubnetConfig) -> Self {
        self.chosen.push((name.into(), config));
        self
    }

    pub(super) fn outcome(&self) -> &SearchOutcome {
        self.outcome
    }

    pub(super) fn names(&self) -> &ObjectiveNames {
        self.names
    }

    /// Returns pairs of predicted and measured objectives, in the order of the evaluations.
    pub(super) fn comparisons(&self) -> Vec<(&Evaluation, &[f64])> {
        let mut found: Vec<(&Evaluation, &[f64])> = Vec::new();
        for (config, values) in self.outcome.predicted().iter().rev() {
            if let Some(measured) = self.outcome.get(config)
                && found.iter().all(|(known, _)| known.index != measured.index)
            {
                found.push((measured, values));
            }
        }
        found.sort_by_key(|(measured, _)| measured.index);
        found
    }

    /// Returns the point up to which hypervolumes are measured: the largest finite score and cost of
    /// the full evaluations. `None` if there is none, or if there are more than two objectives.
    pub(super) fn reference_point(&self) -> Option<[f64; 2]> {
        let full = self.outcome.evaluations().iter().filter(|e| e.is_full());
        let mut worst = [f64::NEG_INFINITY; 2];
        for evaluation in full {
            let [score, cost] = evaluation.objectives[..] else {
                return None;
            };
            if score.is_finite() && cost.is_finite() {
                worst = [worst[0].max(score), worst[1].max(cost)];
            }
        }
        worst.iter().all(|x| x.is_finite()).then_some(worst)
    }

    /// Returns the hypervolume after each evaluation, up to the largest score and cost of all; empty
    /// if there are not two objectives.
    pub(super) fn hypervolumes(&self) -> Vec<f64> {
        let reference = self.reference_point();
        reference.map_or_else(Vec::new, |reference| self.outcome.hypervolumes(&reference))
    }

    /// Returns the front as a table in Markdown, cheapest first: number of the evaluation, cost,
    /// score, its standard error if it is known, roles, and the values of the groups.
    pub fn to_table(&self) -> String {
        let mut text = format!(
            "| evaluation | {} | {} | standard error | role | values |\n|---|---|---|---|---|---|\n",
            self.names.cost, self.names.score
        );
        for member in self.outcome.front() {
            let error = member.score_error;
            let _ = writeln!(
                text,
                "| {} | {} | {:.5} | {} | {} | {} |",
                member.index + 1,
                member.cost(),
                self.names.shown(member.score()),
                error.map_or(String::new(), |error| format!("{error:.5}")),
                self.roles(&member.config).join(", "),
                member.config,
            );
        }
        text
    }

    /// Roles of a subnet, and the names under which it was chosen.
    fn roles(&self, config: &SubnetConfig) -> Vec<&str> {
        let references = self.references();
        let chosen = self.chosen.iter();
        let chosen = chosen.map(|(name, config)| (name.as_str(), config));
        ROLES
            .into_iter()
            .zip(&references)
            .chain(chosen)
            .filter(|(_, of)| config == *of)
            .map(|(name, _)| name)
            .collect()
    }

    pub(super) fn references(&self) -> [SubnetConfig; 3] {
        [
            self.space.heuristic(),
            self.space.maximal(),
            self.space.minimal(),
        ]
    }

    /// Returns a CSV table with one row per evaluation, in the order of proposals: number (from 1),
    /// cost, score (with its original sign if a larger score is better), whether it is on the
    /// front, roles (`heuristic`, `maximal`, `minimal`, and the names of chosen subnets), whether it
    /// was cached, seconds, fidelity, the hypervolume so far (up to the largest score and cost of all;
    /// empty if there are not two objectives), and the values in the space's order of groups.
    pub fn to_csv(&self) -> String {
        let volumes = self.hypervolumes();
        let mut text = String::from(
            "evaluation,cost,score,front,role,cached,seconds,fidelity,hypervolume,values\n",
        );
        for evaluation in self.outcome.evaluations() {
            let roles = self.roles(&evaluation.config);
            let volume = volumes.get(evaluation.index).map(f64::to_string);
            let values = self.space.values(&evaluation.config).unwrap_or_default();
            let values: Vec<String> = values.iter().map(usize::to_string).collect();
            let _ = writeln!(
                text,
                "{},{},{},{},{},{},{},{},{},{}",
                evaluation.index + 1,
                evaluation.cost(),
                self.names.shown(evaluation.score()),
                u8::from(self.outcome.is_on_front(evaluation.index)),
                roles.join(" "),
                u8::from(evaluation.cached),
                evaluation.seconds,
                evaluation.fidelity,
                volume.unwrap_or_default(),
                values.join(" "),
            );
        }
        text
    }

    /// Returns JSON with the names, the unchanged evaluations (objectives minimised, score first),
    /// the front as positions among the evaluations, cheapest first, and the positions of the
    /// heuristic, maximal, minimal and chosen subnets (null if not evaluated); the cost in full
    /// evaluations, the hypervolume after each evaluation with its reference point, and what was
    /// predicted.
    ///
    /// # Errors
    /// Returns [`Error::Json`] if serialization fails, which no outcome is known to cause.
    pub fn to_json(&self) -> Result<String> {
        let at =
            |config: &SubnetConfig| self.outcome.get(config).map(|evaluation| evaluation.index);
        let [heuristic, maximal, minimal] = self.references();
        let chosen: serde_json::Map<String, Value> = self
            .chosen
            .iter()
            .map(|(name, config)| (name.clone(), json!(at(config))))
            .collect();
        let value = json!({
            "title": self.title,
            "searcher": self.outcome.searcher(),
            "stopped": self.outcome.stopped(),
            "objectives": self.names,
            "n_subnets_log10": self.space.log10_n_subnets(),
            "front": self.outcome.front().map(|evaluation| evaluation.index).collect::<Vec<_>>(),
            "heuristic": at(&heuristic),
            "maximal": at(&maximal),
            "minimal": at(&minimal),
            "chosen": chosen,
            "n_full_evaluations": self.outcome.n_full_evaluations(),
            "hypervolume": {
                "reference": self.reference_point(),
                "after": self.hypervolumes(),
            },
            "predicted": self.comparisons().into_iter().map(|(measured, predicted)| {
                json!({"evaluation": measured.index, "objectives": predicted})
            }).collect::<Vec<_>>(),
            "evaluations": Value::Null,
        });
        let written = || {
            let mut value = value;
            value["evaluations"] = serde_json::to_value(self.outcome.evaluations())?;
            serde_json::to_string_pretty(&value)
        };
        written().map_err(|source| Error::json("search report", source))
    }
}
