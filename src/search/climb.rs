//! Hill climbing from the heuristic subnet, with restarts.
//!
//! Shears (arXiv 2404.10934) mentions hill climbing from the heuristic as a cheap search, but its
//! code does not contain one. This implementation is original: it climbs towards any [`Goal`], by
//! default the lowest score at no more than the start's cost.

use std::cmp::Ordering;
use std::collections::HashMap;

use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::pareto::nan_is_worst;
use super::proposals::{Batch, Genome, Unseen};
use super::state::{Objectives, pairs};
use super::{COST, Evaluation, Goal, Searcher};
use crate::error::{Error, Result};
use crate::space::{SearchSpace, SubnetConfig};

/// Settings of [`HillClimbing`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HillClimbingConfig {
    /// Seed of all random draws.
    pub seed: u64,
    /// Subnet to start from; the heuristic subnet if `None`.
    pub start: Option<SubnetConfig>,
    /// Number of restarts from a random subnet after reaching a local optimum.
    pub restarts: usize,
    /// What is searched for; the lowest score at no more than the cost of the first start if
    /// `None`.
    pub goal: Option<Goal>,
    /// Number of neighbours that are evaluated before each move, at least 1. A value of 1 takes the
    /// first improvement, and a large value takes the steepest one. Values in between allow
    /// parallel evaluation.
    pub neighbours_per_step: usize,
    /// Whether neighbours include exchanges, in which one group becomes a step larger and another a
    /// step smaller. Exchanges matter under a tight budget: without them, a subnet at the limit can
    /// only shrink.
    pub exchanges: bool,
}

impl Default for HillClimbingConfig {
    fn default() -> Self {
        Self::new()
    }
}

impl HillClimbingConfig {
    /// Creates settings with seed 0, the heuristic subnet as start and its cost as limit, unlimited
    /// restarts, 8 neighbours per step, and exchanges.
    pub fn new() -> Self {
        Self {
            seed: 0,
            start: None,
            restarts: usize::MAX,
            goal: None,
            neighbours_per_step: 8,
            exchanges: true,
        }
    }

    setters! {
        with_seed(seed: u64);
        with_start(start: SubnetConfig) = Some(start);
        with_restarts(restarts: usize);
        with_goal(goal: Goal) = Some(goal);
        with_neighbours_per_step(neighbours_per_step: usize);
        with_exchanges(exchanges: bool);
    }

    /// Creates the searcher over `space`.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if `neighbours_per_step` is 0 or the goal is invalid, and
    /// the errors of [`SearchSpace::validate`] for the start.
    pub fn init(&self, space: &SearchSpace) -> Result<HillClimbing> {
        if self.neighbours_per_step == 0 {
            return Err(Error::argument(
                "neighbours_per_step",
                0,
                "must be at least 1",
            ));
        }
        if let Some(goal) = &self.goal {
            goal.check()?;
        }
        let start = space.encode(self.start.as_ref().unwrap_or(&space.heuristic()))?;
        let mut unseen = Unseen::new(space);
        unseen.insert(&start);
        Ok(HillClimbing {
            settings: self.clone(),
            rng: ChaCha8Rng::seed_from_u64(self.seed),
            unseen,
            goal: self.goal.clone(),
            known: HashMap::new(),
            current: None,
            untried: Vec::new(),
            candidates: Vec::new(),
            batch: Batch::new(space, vec![start]),
            restarts_left: self.restarts,
            finished: false,
        })
    }
}

/// Climbs towards a goal.
///
/// The neighbours of a subnet are all subnets with one group one step larger or smaller, and as
/// many random exchanges as there are groups (one group a step larger, another a step smaller).
/// They are evaluated in random order, several at a time, and the best of each lot becomes the
/// current subnet if it is better by the goal. If no neighbour is better, the search restarts from a random subnet.
/// Known subnets are not proposed again.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[doc(hidden)]
pub struct HillClimbing {
    settings: HillClimbingConfig,
    rng: ChaCha8Rng,
    unseen: Unseen,
    /// `None` until the start has been evaluated.
    goal: Option<Goal>,
    #[serde(with = "pairs")]
    known: HashMap<Genome, Objectives>,
    /// `None` while a start is being evaluated.
    current: Option<Genome>,
    untried: Vec<Genome>,
    candidates: Vec<Genome>,
    batch: Batch,
    restarts_left: usize,
    finished: bool,
}

impl Searcher for HillClimbing {
    fn name(&self) -> &str {
        "hill-climbing"
    }

    fn ask(&mut self, n: usize) -> Vec<SubnetConfig> {
        self.batch.ask(n)
    }

    fn tell(&mut self, evaluated: &[Evaluation]) -> Result<()> {
        for evaluation in evaluated {
            if self.batch.tell(evaluation)? {
                let told = self.batch.take();
                self.known.extend(
                    told.into_iter()
                        .map(|(genome, values)| (genome, Objectives(values))),
                );
                self.advance();
            }
        }
        Ok(())
    }

    fn is_finished(&self) -> bool {
        self.finished
    }
}

impl HillClimbing {
    /// Moves until there are subnets to evaluate or the search is finished.
    fn advance(&mut self) {
        loop {
            let candidates = std::mem::take(&mut self.candidates);
            let best = candidates.into_iter().min_by(|a, b| self.compare(a, b));
            match (&self.current, best) {
                (None, Some(start)) => self.move_to(start),
                (Some(current), Some(best)) if self.compare(&best, current).is_lt() => {
                    self.move_to(best)
                }
                (None, None) => {
                    // The first start was never a candidate.
                    let Some(start) = self.known.keys().next().cloned() else {
                        return;
                    };
                    self.move_to(start);
                }
                _ => {}
            }
            let n = self.settings.neighbours_per_step.min(self.untried.len());
            self.candidates = self.untried.split_off(self.untried.len() - n);
            if self.candidates.is_empty() {
                if self.restarts_left == 0 {
                    self.finished = true;
                    return;
                }
                let Some(start) = self.unseen.draw(&mut self.rng) else {
                    self.finished = true;
                    return;
                };
                self.restarts_left -= 1;
                self.current = None;
                self.candidates = vec![start];
            }
            let unknown: Vec<Genome> = self
                .candidates
                .iter()
                .filter(|genome| !self.known.contains_key(*genome))
                .cloned()
                .collect();
            if !unknown.is_empty() {
                for genome in &unknown {
                    self.unseen.insert(genome);
                }
                self.batch.replace(unknown);
                return;
            }
        }
    }

    fn move_to(&mut self, genome: Genome) {
        if self.goal.is_none() {
            // A missing cost counts as 0.
            let objectives = self.objectives(&genome);
            let cost = objectives.get(COST).map_or(0.0, |&cost| nan_is_worst(cost));
            self.goal = Some(Goal::ScoreUnder(cost));
        }
        self.untried = self.neighbours(&genome);
        self.current = Some(genome);
    }

    fn neighbours(&mut self, genome: &Genome) -> Vec<Genome> {
        let n_choices = self.unseen.n_choices();
        let step = |genome: &Genome, at: usize, up: bool| -> Option<Genome> {
            let gene = if up {
                genome[at].checked_add(1)?
            } else {
                genome[at].checked_sub(1)?
            };
            (gene < n_choices[at]).then(|| {
                let mut next = genome.clone();
                next[at] = gene;
                next
            })
        };
        let n = genome.len();
        let mut neighbours: Vec<Genome> = (0..n)
            .flat_map(|at| [true, false].map(|up| step(genome, at, up)))
            .flatten()
            .collect();
        if self.settings.exchanges && n > 1 {
            for _ in 0..n {
                let (first, offset) = (self.rng.random_range(0..n), self.rng.random_range(1..n));
                let both = step(genome, first, true)
                    .and_then(|next| step(&next, (first + offset) % n, false));
                if let Some(next) = both.filter(|next| !neighbours.contains(next)) {
                    neighbours.push(next);
                }
            }
        }
        neighbours.shuffle(&mut self.rng);
        neighbours
    }

    fn objectives(&self, genome: &Genome) -> &[f64] {
        self.known.get(genome).map_or(&[], |known| &known.0)
    }

    fn compare(&self, a: &Genome, b: &Genome) -> Ordering {
        let goal = self.goal.as_ref().unwrap_or(&Goal::ANY);
        goal.compare(self.objectives(a), self.objectives(b))
    }
}
