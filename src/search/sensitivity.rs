//! Sensitivity search: scores each choice alone, solves for all budgets at once, and corrects the
//! solution by a few evaluations.
//!
//! Puzzle (arXiv 2411.19146) and HAWQ score the choices of each layer once and solve an integer
//! program over the sums; nothing is evaluated. Here the sums are the start. A model of what they
//! leave ([`Response`]) is fitted to the evaluations, and the subnet that would add most to the
//! front is evaluated next, until the model expects nothing more.

mod candidates;

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};

use super::pareto::{dominates, hypervolume, nan_is_worst, non_dominated};
use super::proposals::{Batch, Genome};
use super::response::{Response, Row};
use super::state::Objectives;
use super::{COST, Evaluation, Goal, SCORE, Searcher, StopReason};
use crate::error::{Error, Result};
use crate::space::{SearchSpace, SubnetConfig};
use candidates::singles;

/// Number of corrections in a row that may fail to improve the best subnet for a goal.
const PATIENCE: usize = 6;

/// Settings of [`Sensitivity`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SensitivityConfig {
    /// Maximum number of full evaluations after the scoring pass.
    pub corrections: usize,
    /// Number of subnets that are proposed at once after the scoring pass, at least 1. With more
    /// than one, evaluations can run in parallel, but each knows less.
    pub batch: usize,
    /// The search ends when the model expects no subnet to enlarge the hypervolume of the front by
    /// more than this fraction.
    pub tolerance: f64,
    /// Fidelity of the scoring pass, above 0 and at most 1: the fraction of a full evaluation's
    /// data. Below 1, three corrections are spent on the largest, the smallest and the heuristic
    /// subnet.
    pub fidelity: f64,
    /// A single subnet to search for. With `None`, the search is for the whole front.
    pub goal: Option<Goal>,
}

impl Default for SensitivityConfig {
    fn default() -> Self {
        Self::new()
    }
}

impl SensitivityConfig {
    /// Creates settings with 10 corrections, one at a time, a tolerance of 0.0005, and a scoring
    /// pass in full, for the whole front.
    pub fn new() -> Self {
        Self {
            corrections: 10,
            batch: 1,
            tolerance: 5e-4,
            fidelity: 1.0,
            goal: None,
        }
    }

    setters! {
        with_corrections(corrections: usize);
        with_batch(batch: usize);
        with_tolerance(tolerance: f64);
        with_fidelity(fidelity: f64);
        with_goal(goal: Goal) = Some(goal);
    }

    /// Returns the number of subnets in the scoring pass of a space.
    ///
    /// # Errors
    /// Returns the errors of [`SearchSpace::validate`], which no space causes.
    pub fn n_scored(&self, space: &SearchSpace) -> Result<usize> {
        let heuristic = space.encode(&space.heuristic())?;
        Ok(scoring_pass(&n_choices(space), &heuristic).len())
    }

    /// Creates the searcher over `space`.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if a setting is out of range.
    pub fn init(&self, space: &SearchSpace) -> Result<Sensitivity> {
        if self.batch == 0 {
            return Err(Error::argument("batch", 0, "must be at least 1"));
        }
        if !(self.fidelity > 0.0 && self.fidelity <= 1.0) {
            return Err(Error::argument(
                "fidelity",
                self.fidelity,
                "above 0 and at most 1",
            ));
        }
        if let Some(goal) = &self.goal {
            goal.check()?;
        }
        if !(self.tolerance >= 0.0 && self.tolerance.is_finite()) {
            return Err(Error::argument(
                "tolerance",
                self.tolerance,
                "finite and at least 0",
            ));
        }
        let n_choices = n_choices(space);
        let heuristic = space.encode(&space.heuristic())?;
        let scored = scoring_pass(&n_choices, &heuristic);
        Ok(Sensitivity {
            settings: self.clone(),
            n_choices,
            heuristic,
            batch: Batch::new(space, scored),
            scored: Vec::new(),
            full: Vec::new(),
            n_corrections: 0,
            predicted: Vec::new(),
            reason: None,
        })
    }
}

fn n_choices(space: &SearchSpace) -> Vec<usize> {
    let groups = space.groups().iter();
    groups.map(|group| group.choices().len()).collect()
}

/// Returns the largest, the heuristic and the smallest genome, and all that differ from the largest
/// or from the heuristic one in one group.
fn scoring_pass(n_choices: &[usize], heuristic: &Genome) -> Vec<Genome> {
    let largest = vec![0; n_choices.len()];
    let smallest = n_choices.iter().map(|n| n - 1).collect();
    let mut genomes = vec![largest.clone(), heuristic.clone(), smallest];
    for base in [&largest, heuristic] {
        genomes.extend(singles(n_choices, base));
    }
    let mut seen = HashSet::new();
    genomes.retain(|genome| seen.insert(genome.clone()));
    genomes
}

/// Minimises the first two objectives, score and cost; others are not used.
///
/// The scoring pass evaluates each choice of each group alone, from the largest subnet and from the
/// heuristic one. It has about twice as many evaluations as there are choices. Then the subnet that
/// is expected to add most to the front is evaluated, and the model learns from it.
///
/// ```
/// use elastic_lora::progress::Silent;
/// use elastic_lora::search::{SensitivityConfig, StudyConfig};
/// use elastic_lora::space::{LayerShape, SearchSpace};
///
/// let layers: Vec<_> = (0..8)
///     .map(|i| LayerShape::new(format!("model.layers.{i}.q_proj"), 8, 8))
///     .collect();
/// let space = SearchSpace::per_layer(&layers, &[32, 24, 16])?;
/// let objective = |config: &_| {
///     let ranks = space.values(config)?;
///     let loss = ranks.iter().enumerate().map(|(i, &rank)| 1.0 / (rank * (i + 1)) as f64).sum();
///     Ok(vec![loss, ranks.iter().sum::<usize>() as f64])
/// };
/// let mut searcher = SensitivityConfig::new().with_corrections(6).init(&space)?;
/// let outcome = StudyConfig::new(100).init(&space)?.run(&mut searcher, objective, &Silent)?;
/// assert_eq!(outcome.evaluations().len(), searcher.n_scored() + searcher.n_corrections());
/// # Ok::<(), elastic_lora::Error>(())
/// ```
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sensitivity {
    settings: SensitivityConfig,
    n_choices: Vec<usize>,
    heuristic: Genome,
    batch: Batch,
    /// The scoring pass.
    scored: Vec<(Genome, Objectives)>,
    /// Full evaluations after a scoring pass of lower fidelity, or all evaluations.
    full: Vec<(Genome, Objectives)>,
    n_corrections: usize,
    /// What was predicted for the corrections, in the order of proposals.
    predicted: Vec<(SubnetConfig, Objectives)>,
    reason: Option<StopReason>,
}

impl Searcher for Sensitivity {
    fn name(&self) -> &str {
        "sensitivity"
    }

    fn ask(&mut self, n: usize) -> Vec<SubnetConfig> {
        self.batch.ask(n)
    }

    fn tell(&mut self, evaluated: &[Evaluation]) -> Result<()> {
        for evaluation in evaluated {
            if evaluation.objectives.len() < 2 {
                return Err(Error::argument(
                    "evaluated",
                    format!("{} objective", evaluation.objectives.len()),
                    "a score and a cost",
                ));
            }
            if self.batch.tell(evaluation)? {
                self.advance();
            }
        }
        Ok(())
    }

    fn is_finished(&self) -> bool {
        self.reason.is_some()
    }

    fn reason(&self) -> StopReason {
        self.reason.unwrap_or(StopReason::Exhausted)
    }

    fn fidelity(&self) -> f64 {
        match self.scored.is_empty() {
            true => self.settings.fidelity,
            false => 1.0,
        }
    }

    fn predicted(&self) -> Vec<(SubnetConfig, Vec<f64>)> {
        let predicted = self.predicted.iter();
        predicted
            .map(|(config, objectives)| (config.clone(), objectives.0.clone()))
            .collect()
    }
}

impl Sensitivity {
    /// Number of evaluations of the scoring pass, once it is done.
    pub fn n_scored(&self) -> usize {
        self.scored.len()
    }

    /// Number of full evaluations that were proposed after the scoring pass.
    pub fn n_corrections(&self) -> usize {
        self.n_corrections
    }

    /// Returns the front by all that is known, cheapest first: subnets with score and cost, measured
    /// where they were evaluated in full and predicted elsewhere. Empty before the scoring pass is
    /// done.
    pub fn front(&self) -> Vec<(SubnetConfig, [f64; 2])> {
        let (Some(score), Some(cost)) = (self.response(SCORE), self.response(COST)) else {
            return Vec::new();
        };
        let known: HashMap<&Genome, [f64; 2]> = self
            .full
            .iter()
            .map(|(genome, found)| (genome, point(found)))
            .collect();
        let mut members: Vec<(Genome, [f64; 2])> = self.candidates(&score, &cost);
        members.retain(|(genome, _)| !known.contains_key(genome));
        members.extend(
            known
                .iter()
                .map(|(genome, point)| ((*genome).clone(), *point)),
        );
        members.sort_by(|a, b| {
            (a.1[COST], a.1[SCORE])
                .partial_cmp(&(b.1[COST], b.1[SCORE]))
                .unwrap_or(std::cmp::Ordering::Equal)
                .then_with(|| a.0.cmp(&b.0))
        });
        let mut least = f64::INFINITY;
        members.retain(|(_, point)| {
            let is_better = point[SCORE] < least;
            least = least.min(point[SCORE]);
            is_better
        });
        let genomes: Vec<Genome> = members.iter().map(|(genome, _)| genome.clone()).collect();
        let points = members.into_iter().map(|(_, point)| point);
        self.batch
            .decode(&genomes)
            .into_iter()
            .zip(points)
            .collect()
    }

    fn is_partial(&self) -> bool {
        self.settings.fidelity < 1.0
    }

    fn advance(&mut self) {
        let told = self.batch.take().into_iter();
        let told = told.map(|(genome, objectives)| (genome, Objectives(objectives)));
        let is_first = self.scored.is_empty();
        match is_first {
            true => self.scored.extend(told),
            false => self.full.extend(told),
        }
        if is_first && !self.is_partial() {
            self.full.clone_from(&self.scored);
        }
        let left = self.settings.corrections - self.n_corrections;
        let chosen = if is_first && self.is_partial() {
            let smallest = self.n_choices.iter().map(|n| n - 1).collect();
            let mut anchors = vec![vec![0; self.n_choices.len()], smallest];
            anchors.push(self.heuristic.clone());
            let mut seen = HashSet::new();
            anchors.retain(|genome| seen.insert(genome.clone()));
            anchors.truncate(left);
            anchors.into_iter().map(|genome| (genome, None)).collect()
        } else {
            self.choose(left.min(self.settings.batch))
        };
        if chosen.is_empty() {
            self.reason = Some(match self.response(SCORE) {
                _ if left == 0 => StopReason::Budget,
                Some(_) => StopReason::Converged,
                // The largest subnet failed, so there is nothing to start from.
                None => StopReason::Exhausted,
            });
        }
        self.n_corrections += chosen.len();
        let genomes: Vec<Genome> = chosen.iter().map(|(genome, _)| genome.clone()).collect();
        self.batch.replace(genomes);
        let configs = self.batch.configs();
        let predictions = chosen.into_iter().map(|(_, predicted)| predicted);
        for (config, predicted) in configs.into_iter().zip(predictions) {
            if let Some(predicted) = predicted {
                self.predicted
                    .push((config, Objectives(predicted.to_vec())));
            }
        }
    }

    /// Returns at most `n` subnets that enlarge the front most by the models' predictions.
    fn choose(&self, n: usize) -> Vec<(Genome, Option<[f64; 2]>)> {
        let (Some(score), Some(cost)) = (self.response(SCORE), self.response(COST)) else {
            return Vec::new();
        };
        let known: HashSet<&Genome> = self.full.iter().map(|(genome, _)| genome).collect();
        let mut front: Vec<[f64; 2]> = self.full.iter().map(|(_, found)| point(found)).collect();
        let reference = reference(&front);
        let candidates: Vec<(Genome, [f64; 2])> = self
            .candidates(&score, &cost)
            .into_iter()
            .filter(|(genome, _)| !known.contains(genome))
            .collect();
        if let Some(goal) = &self.settings.goal {
            // What is expected to be better than the best that is known. The model learns near the
            // goal from some that are expected to be nearly as good.
            let best = (0..front.len()).min_by(|a, b| goal.compare(&front[*a], &front[*b]));
            let in_vain = best.map_or(0, |best| front.len() - 1 - best);
            let goes_on = in_vain.min(self.n_corrections) < PATIENCE;
            let best = best.map(|best| front[best]);
            let is_better = |point: &[f64; 2]| best.is_none_or(|b| goal.compare(point, &b).is_lt());
            let mut next: Vec<(Genome, [f64; 2])> = candidates
                .into_iter()
                .filter(|(_, point)| is_better(point) || goes_on && goal.is_met(point))
                .collect();
            next.sort_by(|a, b| goal.compare(&a.1, &b.1));
            next.truncate(n);
            let chosen = next.into_iter();
            return chosen
                .map(|(genome, point)| (genome, Some(point)))
                .collect();
        }
        let kept = non_dominated(&front);
        front = kept.into_iter().map(|at| front[at]).collect();
        let mut chosen: Vec<(Genome, Option<[f64; 2]>)> = Vec::new();
        let mut volume = hypervolume(&front, &reference);
        while chosen.len() < n {
            let with = |point: [f64; 2]| {
                if front.iter().any(|other| dominates(other, &point)) {
                    return volume;
                }
                let mut all = front.clone();
                all.push(point);
                hypervolume(&all, &reference)
            };
            let best = candidates
                .iter()
                .map(|(genome, point)| (genome, *point, with(*point)))
                .max_by(|a, b| a.2.total_cmp(&b.2));
            let Some((genome, point, larger)) = best else {
                break;
            };
            if larger <= volume * (1.0 + self.settings.tolerance) {
                break;
            }
            front.push(point);
            volume = larger;
            chosen.push((genome.clone(), Some(point)));
        }
        chosen
    }

    /// Returns the model of an objective, or `None` if the largest subnet has no finite value.
    fn response(&self, objective: usize) -> Option<Response> {
        let value = |found: &Objectives| found.0.get(objective).copied();
        let scored: HashMap<&Genome, f64> = self
            .scored
            .iter()
            .filter_map(|(genome, found)| Some((genome, value(found)?)))
            .filter(|(_, value)| value.is_finite())
            .collect();
        let largest = vec![0; self.n_choices.len()];
        let base = *scored.get(&largest)?;
        let alone = |from: &Genome, at: usize, gene: usize| {
            let mut genome = from.clone();
            genome[at] = gene;
            scored.get(&genome).copied()
        };
        // What failed from the largest subnet is taken from the heuristic one, and else it is as bad
        // as the worst choice of all.
        let mut effects: Vec<Vec<Option<f64>>> = Vec::new();
        for (at, n) in self.n_choices.iter().enumerate() {
            let effect = |gene: usize| match alone(&largest, at, gene) {
                Some(value) => Some(value - base),
                None => {
                    let same = alone(&self.heuristic, at, 0)?;
                    Some(alone(&self.heuristic, at, gene)? - same)
                }
            };
            effects.push((0..*n).map(effect).collect());
        }
        let worst = effects.iter().flatten().flatten();
        let worst = worst.fold(0.0f64, |worst, x| worst.max(*x));
        let filled = |effects: Vec<Option<f64>>| {
            let effects = effects.into_iter();
            effects.map(|effect| effect.unwrap_or(worst)).collect()
        };
        let mut response = Response::new(base, effects.into_iter().map(filled).collect());
        let n_smaller = |genome: &Genome| genome.iter().filter(|gene| **gene > 0).count();
        let rows = self.scored.iter().map(|row| (row, false));
        let rows = rows.chain(
            self.full
                .iter()
                .skip(if self.is_partial() {
                    0
                } else {
                    self.scored.len()
                })
                .map(|row| (row, self.is_partial())),
        );
        let rows: Vec<Row<'_>> = rows
            .filter_map(|((genome, found), apart)| {
                Some(Row {
                    genome,
                    value: value(found)?,
                    apart,
                })
            })
            // The sum is exact for the others.
            .filter(|row| row.apart || n_smaller(&row.genome.to_vec()) > 1)
            .collect();
        response.fit(&rows);
        Some(response)
    }
}

/// Score and cost.
fn point(objectives: &Objectives) -> [f64; 2] {
    [SCORE, COST].map(|index| {
        let value = objectives.0.get(index).copied();
        nan_is_worst(value.unwrap_or(f64::INFINITY))
    })
}

/// Returns the point up to which volumes are measured: the largest finite value of each objective.
fn reference(points: &[[f64; 2]]) -> [f64; 2] {
    std::array::from_fn(|axis| {
        let values = points.iter().map(|point| point[axis]);
        values
            .filter(|value| value.is_finite())
            .fold(f64::NEG_INFINITY, f64::max)
    })
}

#[cfg(test)]
mod tests;
