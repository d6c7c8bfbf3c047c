//! Evolutionary search on integer genomes: NSGA-II (Deb et al., 2002) and its relatives, which
//! differ in their [`Selection`].
//!
//! The operators are those of LoNAS and NNCF: simulated binary crossover (probability 0.9, eta 10),
//! polynomial mutation (eta 3), rounding, elimination of duplicates, and a cache of evaluations.
//! Departures:
//!
//! - Genes vary over `[-0.5, n - 0.5]` before rounding, so that the outermost choices are as likely
//!   as the others.
//! - A gene mutates with probability 1 / n_groups instead of 0.02.
//! - No genome is ever proposed twice. NNCF only keeps the current population free of duplicates.
//! - The first population contains the heuristic, the maximal and the minimal subnet.

use std::collections::HashSet;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::proposals::{Batch, Genome, Unseen};
use super::selection::{Chosen, Selector};
use super::state::{Objectives, number};
use super::surrogate::Surrogate;
use super::{Evaluation, Searcher, Selection};
use crate::error::{Error, Result};
use crate::space::{SearchSpace, SubnetConfig};

/// Maximum number of matings per missing child, before random subnets fill the generation.
const MAX_MATINGS: usize = 20;

/// Settings of [`Nsga`].
///
/// ```
/// use elastic_lora::search::{Goal, NsgaConfig, Selection};
/// # use elastic_lora::space::{LayerShape, SearchSpace};
/// # let layers = [LayerShape::new("model.layers.0.q_proj", 8, 8)];
/// # let space = SearchSpace::per_layer(&layers, &[8, 4])?;
///
/// let two = NsgaConfig::new().init(&space)?;
/// let three = NsgaConfig::new().with_selection(Selection::Directions { partitions: 12 });
/// let under = Selection::Goal(Goal::ScoreUnder(3e8));
/// let single = NsgaConfig::new().with_selection(under).init(&space)?;
/// # Ok::<(), elastic_lora::Error>(())
/// ```
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NsgaConfig {
    /// Number of subnets in a generation, at least 2. LoNAS uses 8 for language models.
    pub population: usize,
    /// Seed of all random draws.
    pub seed: u64,
    /// Subnets in the first population, in addition to random ones. Subnets beyond the size of the
    /// population are ignored. With `None`, it contains the heuristic, the maximal and the minimal
    /// subnet.
    pub initial: Option<Vec<SubnetConfig>>,
    /// Probability that a pair of parents is crossed, in 0..=1.
    pub crossover_probability: f64,
    /// Distribution index of the crossover, at least 0. Larger values keep children closer to their
    /// parents.
    pub crossover_eta: f64,
    /// Probability that a gene mutates, in 0..=1; 1 / n_groups if `None`.
    pub mutation_probability: Option<f64>,
    /// Distribution index of the mutation, at least 0.
    pub mutation_eta: f64,
    /// Number of children bred per proposed child, in 1..=1000. A value of 1 gives plain NSGA-II.
    /// With a larger value, an additive ridge regression on all objectives so far predicts those of
    /// the children, and the best predictions are proposed. A quarter of each generation is not
    /// screened. If evaluations are expensive and the budget is small (a few hundred), values of 10
    /// to 30 find better fronts; the gain is larger the closer the objectives are to sums over
    /// groups.
    pub screening: usize,
    /// What the search prefers: a front, parts of it, or a single subnet.
    pub selection: Selection,
}

impl Default for NsgaConfig {
    fn default() -> Self {
        Self::new()
    }
}

impl NsgaConfig {
    /// Creates settings with population 40, seed 0, crossover probability 0.9 and index 10,
    /// mutation probability 1 / n_groups and index 3, no screening, and the heuristic, maximal and
    /// minimal subnets in the first population.
    pub fn new() -> Self {
        Self {
            population: 40,
            seed: 0,
            initial: None,
            crossover_probability: 0.9,
            crossover_eta: 10.0,
            mutation_probability: None,
            mutation_eta: 3.0,
            screening: 1,
            selection: Selection::Crowding,
        }
    }

    setters! {
        with_population(population: usize);
        with_seed(seed: u64);
        with_initial(initial: Vec<SubnetConfig>) = Some(initial);
        with_screening(screening: usize);
        with_selection(selection: Selection);
    }

    /// Sets the probability and the distribution index of the crossover.
    pub fn with_crossover(mut self, probability: f64, eta: f64) -> Self {
        (self.crossover_probability, self.crossover_eta) = (probability, eta);
        self
    }

    /// Sets the probability and the distribution index of the mutation.
    pub fn with_mutation(mut self, probability: f64, eta: f64) -> Self {
        (self.mutation_probability, self.mutation_eta) = (Some(probability), eta);
        self
    }

    /// Creates the searcher over `space`.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if a setting is out of range, and the errors of
    /// [`SearchSpace::validate`] for the initial subnets.
    pub fn init(&self, space: &SearchSpace) -> Result<Nsga> {
        if !(2..=1 << 20).contains(&self.population) {
            return Err(Error::argument(
                "population",
                self.population,
                "must be in 2..=1048576",
            ));
        }
        if !(1..=1000).contains(&self.screening) {
            return Err(Error::argument(
                "screening",
                self.screening,
                "must be in 1..=1000",
            ));
        }
        let mutation_probability = self
            .mutation_probability
            .unwrap_or(1.0 / space.len().max(1) as f64);
        let probabilities = [
            ("crossover_probability", self.crossover_probability),
            ("mutation_probability", mutation_probability),
        ];
        for (name, value) in probabilities {
            if !(0.0..=1.0).contains(&value) {
                return Err(Error::argument(name, value, "must be in 0..=1"));
            }
        }
        for (name, value) in [
            ("crossover_eta", self.crossover_eta),
            ("mutation_eta", self.mutation_eta),
        ] {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(Error::argument(
                    name,
                    value,
                    "must be finite and at least 0",
                ));
            }
        }
        self.selection.check()?;
        let mut unseen = Unseen::new(space);
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let genomes = unseen.first(space, self.initial.as_deref(), self.population, &mut rng)?;
        Ok(Nsga {
            settings: self.clone(),
            selector: Selector::new(self.selection.clone()),
            mutation_probability,
            rng,
            unseen,
            parents: Vec::new(),
            told: Vec::new(),
            batch: Batch::new(space, genomes),
        })
    }
}

/// Evolutionary search for any number of objectives.
///
/// It proposes one generation at a time. It proposes nothing of the next generation until all
/// objectives of the current one are told. It is finished only when the space is exhausted.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[doc(hidden)]
pub struct Nsga {
    settings: NsgaConfig,
    selector: Selector,
    mutation_probability: f64,
    rng: ChaCha8Rng,
    unseen: Unseen,
    parents: Vec<Individual>,
    /// All evaluations so far, for the surrogate; empty without screening.
    told: Vec<(Genome, Objectives)>,
    batch: Batch,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Individual {
    genome: Genome,
    objectives: Objectives,
    rank: usize,
    #[serde(with = "number")]
    preference: f64,
}

impl AsRef<[f64]> for Individual {
    fn as_ref(&self) -> &[f64] {
        &self.objectives.0
    }
}

impl Searcher for Nsga {
    fn name(&self) -> &str {
        self.selector.name()
    }

    fn ask(&mut self, n: usize) -> Vec<SubnetConfig> {
        self.batch.ask(n)
    }

    fn tell(&mut self, evaluated: &[Evaluation]) -> Result<()> {
        for evaluation in evaluated {
            if self.batch.tell(evaluation)? {
                self.survive();
                let children = self.breed();
                self.batch.replace(children);
            }
        }
        Ok(())
    }

    fn is_finished(&self) -> bool {
        // After the space is exhausted, the last batch is empty or waits for objectives.
        self.unseen.is_exhausted() && self.batch.is_complete()
    }
}

impl Nsga {
    /// Objectives of the current parents: at most a population of the best subnets so far.
    pub fn population(&self) -> impl Iterator<Item = &[f64]> {
        self.parents.iter().map(AsRef::as_ref)
    }

    /// Selects the next parents from parents and children.
    fn survive(&mut self) {
        let children = self.batch.take();
        let individual = |(genome, objectives)| Individual {
            genome,
            objectives: Objectives(objectives),
            rank: usize::MAX,
            preference: f64::INFINITY,
        };
        let mut pool: Vec<Individual> = std::mem::take(&mut self.parents);
        let n_parents = pool.len();
        pool.extend(children.into_iter().map(individual));
        if self.settings.screening > 1 {
            let told = pool[n_parents..].iter();
            self.told
                .extend(told.map(|child| (child.genome.clone(), child.objectives.clone())));
        }
        let population = self.settings.population;
        let chosen = self.selector.choose(&pool, population, &mut self.rng);
        let survivor = |chosen: Chosen| Individual {
            rank: chosen.rank,
            preference: chosen.preference,
            ..pool[chosen.index].clone()
        };
        self.parents = chosen.into_iter().map(survivor).collect();
    }

    /// Returns the next generation: children of the parents, screened if requested, and random
    /// genomes if there are too few children.
    fn breed(&mut self) -> Vec<Genome> {
        let population = self.settings.population;
        let surrogate = match self.settings.screening {
            1 => None,
            _ => Surrogate::fit(self.unseen.n_choices(), &self.told),
        };
        let wanted = population
            * if surrogate.is_some() {
                self.settings.screening
            } else {
                1
            };
        let mut bred = HashSet::new();
        let mut children = Vec::with_capacity(wanted);
        let mut matings = MAX_MATINGS.saturating_mul(wanted);
        while children.len() < wanted && matings > 0 && !self.unseen.is_exhausted() {
            matings -= 1;
            let (a, b) = (self.tournament(), self.tournament());
            let (mut a, mut b) = (
                self.parents[a].genome.clone(),
                self.parents[b].genome.clone(),
            );
            self.cross(&mut a, &mut b);
            for mut child in [a, b] {
                self.mutate(&mut child);
                if children.len() < wanted
                    && !self.unseen.contains(&child)
                    && bred.insert(child.clone())
                {
                    children.push(child);
                }
            }
        }
        if let Some(surrogate) = surrogate.filter(|_| children.len() > population) {
            children = self.screen(&surrogate, children);
        }
        for child in &children {
            self.unseen.insert(child);
        }
        while children.len() < population {
            let Some(genome) = self.unseen.draw(&mut self.rng) else {
                break;
            };
            children.push(genome);
        }
        children
    }

    /// Selects a population of children: three quarters are those that the surrogate ranks best in
    /// comparison with the parents, and the rest are taken in breeding order.
    fn screen(&mut self, surrogate: &Surrogate, children: Vec<Genome>) -> Vec<Genome> {
        let population = self.settings.population;
        let n_screened = population - population / 4;
        let mut guesses: Vec<Vec<f64>> = children
            .iter()
            .map(|child| surrogate.predict(child))
            .collect();
        guesses.extend(
            self.parents
                .iter()
                .map(|parent| parent.objectives.0.clone()),
        );
        // What is learned from guesses is forgotten.
        let mut selector = self.selector.clone();
        let ranked = selector.choose(&guesses, guesses.len(), &mut self.rng);
        let mut taken = vec![false; children.len()];
        let best = ranked.iter().map(|chosen| chosen.index);
        let mut chosen: Vec<usize> = best
            .filter(|&index| index < children.len())
            .take(n_screened)
            .collect();
        chosen.iter().for_each(|&index| taken[index] = true);
        chosen.extend(
            (0..children.len())
                .filter(|&index| !taken[index])
                .take(population - chosen.len()),
        );
        chosen
            .into_iter()
            .map(|index| children[index].clone())
            .collect()
    }

    /// Returns the better of two random parents, by rank and then by preference.
    fn tournament(&mut self) -> usize {
        let n = self.parents.len();
        let (a, b) = (self.rng.random_range(0..n), self.rng.random_range(0..n));
        let (x, y) = (&self.parents[a], &self.parents[b]);
        match x
            .rank
            .cmp(&y.rank)
            .then(y.preference.total_cmp(&x.preference))
        {
            std::cmp::Ordering::Greater => b,
            _ => a,
        }
    }

    /// Applies bounded simulated binary crossover in place.
    fn cross(&mut self, a: &mut Genome, b: &mut Genome) {
        if !self.rng.random_bool(self.settings.crossover_probability) {
            return;
        }
        let power = 1.0 / (self.settings.crossover_eta + 1.0);
        for at in 0..a.len() {
            if !self.rng.random_bool(0.5) || a[at] == b[at] {
                continue;
            }
            let n = self.unseen.n_choices()[at];
            let (low, high) = bounds(n);
            let (x, y) = (a[at].min(b[at]) as f64, a[at].max(b[at]) as f64);
            let draw: f64 = self.rng.random();
            let spread = |room: f64| {
                let alpha =
                    2.0 - (1.0 + 2.0 * room / (y - x)).powf(-(self.settings.crossover_eta + 1.0));
                match draw <= 1.0 / alpha {
                    true => (draw * alpha).powf(power),
                    false => (1.0 / (2.0 - draw * alpha)).powf(power),
                }
            };
            let near_low = 0.5 * (x + y - spread(x - low) * (y - x));
            let near_high = 0.5 * (x + y + spread(high - y) * (y - x));
            let (first, second) = (round(near_low, n), round(near_high, n));
            (a[at], b[at]) = if self.rng.random_bool(0.5) {
                (second, first)
            } else {
                (first, second)
            };
        }
    }

    /// Applies bounded polynomial mutation in place.
    fn mutate(&mut self, genome: &mut Genome) {
        let (eta, probability) = (self.settings.mutation_eta, self.mutation_probability);
        for (gene, &n) in genome.iter_mut().zip(self.unseen.n_choices()) {
            if n < 2 || !self.rng.random_bool(probability) {
                continue;
            }
            let (low, high) = bounds(n);
            let (x, range) = (*gene as f64, high - low);
            let draw: f64 = self.rng.random();
            let step = if draw < 0.5 {
                let edge = 1.0 - (x - low) / range;
                (2.0 * draw + (1.0 - 2.0 * draw) * edge.powf(eta + 1.0)).powf(1.0 / (eta + 1.0))
                    - 1.0
            } else {
                let edge = 1.0 - (high - x) / range;
                1.0 - (2.0 * (1.0 - draw) + 2.0 * (draw - 0.5) * edge.powf(eta + 1.0))
                    .powf(1.0 / (eta + 1.0))
            };
            *gene = round(x + step * range, n);
        }
    }
}

fn bounds(n_choices: usize) -> (f64, f64) {
    (-0.5, n_choices as f64 - 0.5)
}

fn round(gene: f64, n_choices: usize) -> usize {
    (gene.round().max(0.0) as usize).min(n_choices - 1)
}
