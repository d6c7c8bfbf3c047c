//! Successive halving: many subnets on few data, the best of them on more (Jamieson and Talwalkar,
//! 2016), with the error bars that the data give.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::pareto::dominates;
use super::proposals::{Batch, Genome, Unseen};
use super::selection::Selector;
use super::state::Objectives;
use super::{Evaluation, SCORE, Searcher, Selection};
use crate::error::{Error, Result};
use crate::space::{SearchSpace, SubnetConfig};

/// Settings of [`Halving`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HalvingConfig {
    /// Number of subnets of the first round, at least 1.
    pub candidates: usize,
    /// Subnets of the first round, before random ones. With `None`, it contains the heuristic, the
    /// maximal and the minimal subnet.
    pub initial: Option<Vec<SubnetConfig>>,
    /// Fidelities of the rounds, ascending, above 0; the last is 1.
    pub fidelities: Vec<f64>,
    /// Fraction of the subnets that goes on to the next round, above 0 and at most 1.
    pub keep: f64,
    /// Number of standard errors by which a score may be wrong. Subnets that may be better than
    /// those that go on go on as well, at most as many again. Needs an objective that gives errors;
    /// since all subnets see the same data, their differences are more certain than this assumes.
    pub errors: f64,
    /// What is preferred: a front, or a single subnet.
    pub selection: Selection,
    /// Seed of the random subnets.
    pub seed: u64,
}

impl Default for HalvingConfig {
    fn default() -> Self {
        Self::new()
    }
}

impl HalvingConfig {
    /// Creates settings with 64 candidates, rounds on a ninth, a third and all of the data, a third
    /// kept, one standard error, for the whole front, and seed 0.
    pub fn new() -> Self {
        Self {
            candidates: 64,
            initial: None,
            fidelities: vec![1.0 / 9.0, 1.0 / 3.0, 1.0],
            keep: 1.0 / 3.0,
            errors: 1.0,
            selection: Selection::Crowding,
            seed: 0,
        }
    }

    setters! {
        with_candidates(candidates: usize);
        with_initial(initial: Vec<SubnetConfig>) = Some(initial);
        with_fidelities(fidelities: Vec<f64>);
        with_keep(keep: f64);
        with_errors(errors: f64);
        with_selection(selection: Selection);
        with_seed(seed: u64);
    }

    /// Creates the searcher over `space`.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if a setting is out of range, and the errors of
    /// [`SearchSpace::validate`] for the initial subnets.
    pub fn init(&self, space: &SearchSpace) -> Result<Halving> {
        if self.candidates == 0 {
            return Err(Error::argument("candidates", 0, "at least 1"));
        }
        let ascending = self.fidelities.windows(2).all(|pair| pair[0] < pair[1]);
        let positive = self.fidelities.first().is_some_and(|first| *first > 0.0);
        if !(ascending && positive && self.fidelities.last() == Some(&1.0)) {
            return Err(Error::argument(
                "fidelities",
                format!("{:?}", self.fidelities),
                "ascending, above 0, the last one 1",
            ));
        }
        if !(self.keep > 0.0 && self.keep <= 1.0) {
            return Err(Error::argument("keep", self.keep, "above 0 and at most 1"));
        }
        if !(self.errors >= 0.0 && self.errors.is_finite()) {
            return Err(Error::argument(
                "errors",
                self.errors,
                "finite and at least 0",
            ));
        }
        self.selection.check()?;
        let mut unseen = Unseen::new(space);
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let genomes = unseen.first(space, self.initial.as_deref(), self.candidates, &mut rng)?;
        Ok(Halving {
            settings: self.clone(),
            rng,
            round: 0,
            batch: Batch::new(space, genomes),
            errors: Vec::new(),
            finished: false,
        })
    }
}

/// Evaluates many subnets on few data and ever fewer on more; the last round is in full. Run it with
/// [`Study::run_at`](super::Study::run_at).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Halving {
    settings: HalvingConfig,
    rng: ChaCha8Rng,
    round: usize,
    batch: Batch,
    /// Standard errors of the scores of the current round, by subnet.
    errors: Vec<(SubnetConfig, f64)>,
    finished: bool,
}

impl Searcher for Halving {
    fn name(&self) -> &str {
        "halving"
    }

    fn ask(&mut self, n: usize) -> Vec<SubnetConfig> {
        self.batch.ask(n)
    }

    fn tell(&mut self, evaluated: &[Evaluation]) -> Result<()> {
        for evaluation in evaluated {
            let complete = self.batch.tell(evaluation)?;
            let error = evaluation.score_error.filter(|error| error.is_finite());
            let error = error.unwrap_or(0.0);
            self.errors.push((evaluation.config.clone(), error));
            if complete {
                self.advance();
            }
        }
        Ok(())
    }

    fn is_finished(&self) -> bool {
        self.finished
    }

    fn fidelity(&self) -> f64 {
        let fidelity = self.settings.fidelities.get(self.round);
        fidelity.copied().unwrap_or(1.0)
    }
}

impl Halving {
    fn advance(&mut self) {
        let configs = self.batch.configs();
        let told = self.batch.take();
        let errors = std::mem::take(&mut self.errors);
        if self.round + 1 >= self.settings.fidelities.len() {
            self.finished = true;
            return;
        }
        let errors: std::collections::HashMap<_, _> = errors.into_iter().collect();
        let error = |at: usize| {
            let config: Option<&SubnetConfig> = configs.get(at);
            self.settings.errors * config.and_then(|c| errors.get(c)).copied().unwrap_or(0.0)
        };
        let pool: Vec<Objectives> = told
            .iter()
            .map(|(_, found)| Objectives(found.clone()))
            .collect();
        let n_kept = ((pool.len() as f64 * self.settings.keep).ceil() as usize).max(1);
        let mut selector = Selector::new(self.settings.selection.clone());
        let chosen = selector.choose(&pool, n_kept, &mut self.rng);
        let mut kept: Vec<usize> = chosen.into_iter().map(|chosen| chosen.index).collect();
        // A score within its error, in the better or in the worse direction.
        let shifted = |at: usize, sign: f64| {
            let mut objectives = pool[at].0.clone();
            objectives[SCORE] += sign * error(at);
            objectives
        };
        let surely: Vec<Vec<f64>> = kept.iter().map(|&at| shifted(at, 1.0)).collect();
        let is_better = |better: &[f64], other: &[f64]| match &self.settings.selection {
            Selection::Goal(goal) => goal.compare(better, other).is_lt(),
            _ => dominates(better, other),
        };
        let maybe = (0..pool.len()).filter(|at| {
            let best = shifted(*at, -1.0);
            let beaten = |other: &Vec<f64>| is_better(other, &best);
            let n_beaten = surely.iter().filter(|other| beaten(other)).count();
            let limit = match self.settings.selection {
                Selection::Goal(_) => surely.len(),
                _ => 1,
            };
            error(*at) > 0.0 && n_beaten < limit && !kept.contains(at)
        });
        let maybe: Vec<usize> = maybe.take(n_kept).collect();
        kept.extend(maybe);
        // In the order of proposals.
        kept.sort_unstable();
        let genomes: Vec<Genome> = kept.into_iter().map(|at| told[at].0.clone()).collect();
        self.round += 1;
        self.batch.replace(genomes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;
    use crate::search::{Goal, Measurement, RandomSearchConfig, StudyConfig};
    use crate::space::LayerShape;

    fn space() -> SearchSpace {
        let layers: Vec<LayerShape> = (0..8)
            .map(|block| LayerShape::new(format!("model.layers.{block}.mlp.up_proj"), 5, 7))
            .collect();
        SearchSpace::per_layer(&layers, &[32, 24, 16, 8]).unwrap()
    }

    fn value(space: &SearchSpace, config: &SubnetConfig) -> Vec<f64> {
        let values = space.values(config).unwrap();
        let weighted = values.iter().enumerate();
        let loss = weighted
            .map(|(at, x)| (1 + at * 3 % 5) as f64 / *x as f64)
            .sum();
        vec![loss, values.iter().sum::<usize>() as f64]
    }

    /// A score on a part of the data, wrong by an amount that depends on the subnet.
    fn noisy(space: &SearchSpace, config: &SubnetConfig, fidelity: f64) -> Measurement {
        let mut objectives = value(space, config);
        let error = 0.05 * (1.0 / fidelity - 1.0).sqrt();
        let digits: usize = space
            .encode(config)
            .unwrap()
            .iter()
            .fold(7, |sum, x| sum * 31 + x);
        objectives[0] += error * ((digits % 1000) as f64 / 500.0 - 1.0);
        Measurement {
            objectives,
            score_error: Some(error),
        }
    }

    #[test]
    fn more_subnets_for_the_same_cost() {
        let space = space();
        for selection in [
            Selection::Crowding,
            Selection::Goal(Goal::ScoreUnder(150.0)),
        ] {
            let config = HalvingConfig::new().with_candidates(90);
            let config = config.with_selection(selection.clone());
            let mut searcher = config.init(&space).unwrap();
            let mut study = StudyConfig::new(1000).init(&space).unwrap();
            let evaluate = |config: &SubnetConfig, at| Ok(noisy(&space, config, at));
            let outcome = study.run_at(&mut searcher, evaluate, &Silent).unwrap();
            assert!(searcher.is_finished());
            let cost = outcome.n_full_evaluations();
            assert!(cost < 70.0, "{cost}");
            let n_full = outcome.evaluations().iter().filter(|e| e.is_full()).count();
            assert!((10..=40).contains(&n_full), "{n_full}");
            // Random search on the same cost is worse.
            let mut random = RandomSearchConfig::new().init(&space).unwrap();
            let mut study = StudyConfig::new(cost as usize).init(&space).unwrap();
            let random = study
                .run(&mut random, |c| Ok(value(&space, c)), &Silent)
                .unwrap();
            let goal = Goal::ScoreUnder(150.0);
            let best = |outcome: &crate::search::SearchOutcome| {
                outcome.best(&goal).map_or(f64::INFINITY, Evaluation::score)
            };
            assert!(best(&outcome) <= best(&random) + 0.05);
        }
    }

    #[test]
    fn settings_are_checked() {
        let space = space();
        let config = HalvingConfig::new;
        assert!(config().with_candidates(0).init(&space).is_err());
        assert!(config().with_keep(0.0).init(&space).is_err());
        assert!(config().with_errors(-1.0).init(&space).is_err());
        for fidelities in [vec![], vec![0.5], vec![0.0, 1.0], vec![0.5, 0.2, 1.0]] {
            assert!(config().with_fidelities(fidelities).init(&space).is_err());
        }
        // More candidates than subnets.
        let small = SearchSpace::fixed(&[LayerShape::new("l", 2, 2)], 8).unwrap();
        let mut searcher = config().init(&small).unwrap();
        let mut study = StudyConfig::new(9).init(&small).unwrap();
        let evaluate = |_: &SubnetConfig, _| Ok(Measurement::from(vec![f64::NAN, 1.0]));
        let outcome = study.run_at(&mut searcher, evaluate, &Silent).unwrap();
        assert_eq!(outcome.evaluations().len(), 3);
    }
}
