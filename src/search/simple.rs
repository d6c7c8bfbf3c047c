//! Searchers that do not learn: the papers' heuristic, a given list, all subnets, and random draws.

use std::collections::{HashSet, VecDeque};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::proposals::{Arity, Genome, Unseen, decode_all, not_asked};
use super::{Evaluation, Searcher};
use crate::error::Result;
use crate::space::{SearchSpace, SubnetConfig};

/// Proposes only the papers' heuristic subnet, which has the middle choice of every group.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Heuristic {
    list: FixedList,
}

impl Heuristic {
    /// Creates the searcher for the heuristic subnet of `space`.
    pub fn new(space: &SearchSpace) -> Self {
        Self {
            list: FixedList::unchecked([space.heuristic()]),
        }
    }
}

impl Searcher for Heuristic {
    fn name(&self) -> &str {
        "heuristic"
    }

    fn ask(&mut self, n: usize) -> Vec<SubnetConfig> {
        self.list.ask(n)
    }

    fn tell(&mut self, evaluated: &[Evaluation]) -> Result<()> {
        self.list.tell(evaluated)
    }

    fn is_finished(&self) -> bool {
        self.list.is_finished()
    }
}

/// Proposes each subnet of a list once, in order.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[doc(hidden)]
pub struct FixedList {
    left: VecDeque<SubnetConfig>,
    outstanding: HashSet<SubnetConfig>,
    arity: Arity,
}

impl FixedList {
    /// Creates a searcher for these subnets. Repeated subnets are dropped.
    ///
    /// # Errors
    /// Returns the errors of [`SearchSpace::validate`].
    pub fn new(
        space: &SearchSpace,
        configs: impl IntoIterator<Item = SubnetConfig>,
    ) -> Result<Self> {
        let list = Self::unchecked(configs);
        list.left
            .iter()
            .try_for_each(|config| space.validate(config))?;
        Ok(list)
    }

    fn unchecked(configs: impl IntoIterator<Item = SubnetConfig>) -> Self {
        let mut seen = HashSet::new();
        let left = configs
            .into_iter()
            .filter(|config| seen.insert(config.clone()))
            .collect();
        Self {
            left,
            outstanding: HashSet::new(),
            arity: Arity::default(),
        }
    }
}

impl Searcher for FixedList {
    fn name(&self) -> &str {
        "list"
    }

    fn ask(&mut self, n: usize) -> Vec<SubnetConfig> {
        let configs: Vec<SubnetConfig> = self.left.drain(..n.min(self.left.len())).collect();
        self.outstanding.extend(configs.iter().cloned());
        configs
    }

    fn tell(&mut self, evaluated: &[Evaluation]) -> Result<()> {
        settle(&mut self.outstanding, &mut self.arity, evaluated)
    }

    fn is_finished(&self) -> bool {
        self.left.is_empty()
    }
}

/// Proposes every subnet of a space once, from the largest to the smallest choice of each group;
/// the last group changes first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Exhaustive {
    space: SearchSpace,
    next: Option<Genome>,
    outstanding: HashSet<SubnetConfig>,
    arity: Arity,
}

impl Exhaustive {
    /// Creates the searcher for all subnets of `space`.
    pub fn new(space: &SearchSpace) -> Self {
        Self {
            space: space.clone(),
            next: Some(vec![0; space.len()]),
            outstanding: HashSet::new(),
            arity: Arity::default(),
        }
    }
}

impl Searcher for Exhaustive {
    fn name(&self) -> &str {
        "exhaustive"
    }

    fn ask(&mut self, n: usize) -> Vec<SubnetConfig> {
        let mut genomes = Vec::new();
        while genomes.len() < n
            && let Some(genome) = self.next.take()
        {
            let mut next = genome.clone();
            let groups = self.space.groups().iter().zip(&mut next).rev();
            let carried = groups.into_iter().all(|(group, gene)| {
                *gene = (*gene + 1) % group.choices().len();
                *gene == 0
            });
            self.next = (!carried).then_some(next);
            genomes.push(genome);
        }
        let configs = decode_all(&self.space, &genomes);
        self.outstanding.extend(configs.iter().cloned());
        configs
    }

    fn tell(&mut self, evaluated: &[Evaluation]) -> Result<()> {
        settle(&mut self.outstanding, &mut self.arity, evaluated)
    }

    fn is_finished(&self) -> bool {
        self.next.is_none()
    }
}

/// Settings of [`RandomSearch`].
#[derive(Clone, Debug, Default)]
pub struct RandomSearchConfig {
    /// Seed of the draws.
    pub seed: u64,
    /// Subnets to propose before the random ones.
    pub initial: Vec<SubnetConfig>,
}

impl RandomSearchConfig {
    /// Creates settings with seed 0 and no initial subnets.
    pub fn new() -> Self {
        Self::default()
    }

    setters! {
        with_seed(seed: u64);
        with_initial(initial: Vec<SubnetConfig>);
    }

    /// Creates the searcher over `space`.
    ///
    /// # Errors
    /// Returns the errors of [`SearchSpace::validate`] for the initial subnets.
    pub fn init(&self, space: &SearchSpace) -> Result<RandomSearch> {
        let mut unseen = Unseen::new(space);
        let mut initial = VecDeque::new();
        for config in &self.initial {
            if unseen.insert(&space.encode(config)?) {
                initial.push_back(config.clone());
            }
        }
        Ok(RandomSearch {
            space: space.clone(),
            rng: ChaCha8Rng::seed_from_u64(self.seed),
            unseen,
            initial,
            outstanding: HashSet::new(),
            arity: Arity::default(),
        })
    }
}

/// Proposes uniformly drawn subnets, each at most once, until the space is exhausted.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[doc(hidden)]
pub struct RandomSearch {
    space: SearchSpace,
    rng: ChaCha8Rng,
    unseen: Unseen,
    initial: VecDeque<SubnetConfig>,
    outstanding: HashSet<SubnetConfig>,
    arity: Arity,
}

impl Searcher for RandomSearch {
    fn name(&self) -> &str {
        "random"
    }

    fn ask(&mut self, n: usize) -> Vec<SubnetConfig> {
        let mut configs: Vec<SubnetConfig> =
            self.initial.drain(..n.min(self.initial.len())).collect();
        let mut drawn = Vec::new();
        while configs.len() + drawn.len() < n {
            let Some(genome) = self.unseen.draw(&mut self.rng) else {
                break;
            };
            drawn.push(genome);
        }
        configs.extend(decode_all(&self.space, &drawn));
        self.outstanding.extend(configs.iter().cloned());
        configs
    }

    fn tell(&mut self, evaluated: &[Evaluation]) -> Result<()> {
        settle(&mut self.outstanding, &mut self.arity, evaluated)
    }

    fn is_finished(&self) -> bool {
        self.initial.is_empty() && self.unseen.is_exhausted()
    }
}

fn settle(
    outstanding: &mut HashSet<SubnetConfig>,
    arity: &mut Arity,
    evaluated: &[Evaluation],
) -> Result<()> {
    for evaluation in evaluated {
        arity.check(evaluation)?;
        if !outstanding.remove(&evaluation.config) {
            return Err(not_asked(&evaluation.config));
        }
    }
    Ok(())
}
