//! Parts shared by searchers: genomes that were not proposed before, and a batch that waits for its
//! objectives.

use std::collections::{HashMap, HashSet};

use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

use super::Evaluation;
use super::state::{Objectives, pairs};
use crate::error::{Error, Result};
use crate::space::{SearchSpace, SubnetConfig};

/// Index of the choice of each group.
pub(super) type Genome = Vec<usize>;

/// Maximum number of failed random draws before the search for an unseen genome becomes systematic.
const MAX_DRAWS: usize = 32;

/// The genomes of a space, with a record of those that were proposed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Unseen {
    n_choices: Vec<usize>,
    seen: HashSet<Genome>,
}

impl Unseen {
    pub(super) fn new(space: &SearchSpace) -> Self {
        Self {
            n_choices: space
                .groups()
                .iter()
                .map(|group| group.choices().len())
                .collect(),
            seen: HashSet::new(),
        }
    }

    pub(super) fn n_choices(&self) -> &[usize] {
        &self.n_choices
    }

    /// Draws the first `n` genomes: the given ones, by default the heuristic, the maximal and the
    /// minimal subnet, and then unseen ones. Returns fewer if the space has fewer.
    ///
    /// # Errors
    /// Returns the errors of [`SearchSpace::encode`] for a subnet that is not of the space.
    pub(super) fn first(
        &mut self,
        space: &SearchSpace,
        initial: Option<&[SubnetConfig]>,
        n: usize,
        rng: &mut impl Rng,
    ) -> Result<Vec<Genome>> {
        let default = || vec![space.heuristic(), space.maximal(), space.minimal()];
        let mut genomes = Vec::new();
        for config in initial.map_or_else(default, <[_]>::to_vec) {
            let genome = space.encode(&config)?;
            if genomes.len() < n && self.insert(&genome) {
                genomes.push(genome);
            }
        }
        while genomes.len() < n
            && let Some(genome) = self.draw(rng)
        {
            genomes.push(genome);
        }
        Ok(genomes)
    }

    /// Marks a genome as proposed. Returns whether it was new.
    pub(super) fn insert(&mut self, genome: &Genome) -> bool {
        self.seen.insert(genome.clone())
    }

    pub(super) fn contains(&self, genome: &Genome) -> bool {
        self.seen.contains(genome)
    }

    pub(super) fn is_exhausted(&self) -> bool {
        let n_subnets = self
            .n_choices
            .iter()
            .try_fold(1usize, |product, &n| product.checked_mul(n));
        n_subnets == Some(self.seen.len())
    }

    pub(super) fn random(&self, rng: &mut impl Rng) -> Genome {
        self.n_choices
            .iter()
            .map(|&n| rng.random_range(0..n))
            .collect()
    }

    /// Draws an unseen genome and marks it. The draw is uniform unless too many draws fail; then it
    /// is the next unseen genome counting up from a draw. Returns `None` if the space is exhausted.
    pub(super) fn draw(&mut self, rng: &mut impl Rng) -> Option<Genome> {
        if self.is_exhausted() {
            return None;
        }
        for _ in 0..MAX_DRAWS {
            let genome = self.random(rng);
            if self.insert(&genome) {
                return Some(genome);
            }
        }
        // Counting up in mixed radix reaches an unseen genome after at most as many steps as there
        // are seen ones.
        let mut genome = self.random(rng);
        while !self.insert(&genome) {
            for (gene, &n) in genome.iter_mut().zip(&self.n_choices) {
                *gene += 1;
                if *gene < n {
                    break;
                }
                *gene = 0;
            }
        }
        Some(genome)
    }
}

/// A batch of different genomes. They are proposed in order, any number at a time, and their
/// objectives arrive in any order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Batch {
    space: SearchSpace,
    arity: Arity,
    genomes: Vec<Genome>,
    objectives: Vec<Option<Objectives>>,
    #[serde(with = "pairs")]
    position: HashMap<Genome, usize>,
    n_asked: usize,
    n_told: usize,
}

impl Batch {
    pub(super) fn new(space: &SearchSpace, genomes: Vec<Genome>) -> Self {
        let mut batch = Self {
            space: space.clone(),
            arity: Arity::default(),
            genomes: Vec::new(),
            objectives: Vec::new(),
            position: HashMap::new(),
            n_asked: 0,
            n_told: 0,
        };
        batch.replace(genomes);
        batch
    }

    /// Begins the next batch with `genomes`, which must be different.
    pub(super) fn replace(&mut self, genomes: Vec<Genome>) {
        let position = genomes
            .iter()
            .cloned()
            .enumerate()
            .map(|(at, genome)| (genome, at));
        self.position = position.collect();
        self.objectives = vec![None; genomes.len()];
        self.genomes = genomes;
        (self.n_asked, self.n_told) = (0, 0);
    }

    /// Returns all subnets of the batch.
    pub(super) fn configs(&self) -> Vec<SubnetConfig> {
        self.decode(&self.genomes)
    }

    /// Returns the subnets of genomes, which must be of the space.
    pub(super) fn decode(&self, genomes: &[Genome]) -> Vec<SubnetConfig> {
        decode_all(&self.space, genomes)
    }

    /// Returns at most `n` of the next subnets, as [`Searcher::ask`](super::Searcher::ask) does.
    pub(super) fn ask(&mut self, n: usize) -> Vec<SubnetConfig> {
        let start = self.n_asked;
        self.n_asked = start.saturating_add(n).min(self.genomes.len());
        decode_all(&self.space, &self.genomes[start..self.n_asked])
    }

    /// Takes the objectives of a subnet that was asked for, and returns whether the batch is
    /// complete.
    pub(super) fn tell(&mut self, evaluation: &Evaluation) -> Result<bool> {
        self.arity.check(evaluation)?;
        match self.position.get(&self.space.encode(&evaluation.config)?) {
            Some(&at) if at < self.n_asked && self.objectives[at].is_none() => {
                self.objectives[at] = Some(Objectives(evaluation.objectives.clone()));
                self.n_told += 1;
                Ok(self.is_complete())
            }
            _ => Err(not_asked(&evaluation.config)),
        }
    }

    pub(super) fn is_complete(&self) -> bool {
        self.n_told == self.genomes.len()
    }

    /// Empties the batch and returns its genomes and objectives in the order of proposals, without
    /// genomes that have no objectives.
    pub(super) fn take(&mut self) -> Vec<(Genome, Vec<f64>)> {
        let genomes = std::mem::take(&mut self.genomes);
        let objectives = std::mem::take(&mut self.objectives);
        self.replace(Vec::new());
        genomes
            .into_iter()
            .zip(objectives)
            .filter_map(|(genome, objectives)| Some((genome, objectives?.0)))
            .collect()
    }
}

pub(super) fn not_asked(config: &SubnetConfig) -> Error {
    Error::argument(
        "evaluated",
        config,
        "a subnet that was asked for and has not been told yet",
    )
}

/// Checks that all evaluations have as many objectives as the first one.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Arity(Option<usize>);

impl Arity {
    pub(super) fn check(&mut self, evaluation: &Evaluation) -> Result<()> {
        let found = evaluation.objectives.len();
        let expected = *self.0.get_or_insert(found.max(1));
        if found == expected {
            return Ok(());
        }
        let what = format!("objectives of subnet {}", evaluation.config);
        Err(Error::ShapeMismatch {
            what,
            expected: vec![expected],
            found: vec![found],
        })
    }
}

/// Converts genomes, which are valid in this space, to subnets.
pub(super) fn decode_all(space: &SearchSpace, genomes: &[Genome]) -> Vec<SubnetConfig> {
    genomes
        .iter()
        .filter_map(|genome| space.decode(genome).ok())
        .collect()
}
