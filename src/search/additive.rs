//! The loss of a subnet as a sum over its groups, and the subnets that are best by it.
//!
//! The terms can be fitted to losses from any source, such as the training log at no extra cost
//! (`TrainConfig::observations`). NNCF's "min-loss" heuristic takes the subnet with the lowest
//! training loss, which depends on the batch as much as on the subnet; a fit uses all steps and
//! separates the effects of each group's choices. Or the terms are given, as scored one by one
//! (Puzzle, arXiv 2411.19146). Either way an exact knapsack finds the best subnet for every budget.

use super::knapsack::{self, Item};
use super::surrogate::Surrogate;
use crate::error::{Error, Result};
use crate::space::{SearchSpace, SubnetConfig};

/// Minimum number of losses for a fit.
const FEWEST: usize = 8;

/// Models the loss of a subnet, or its cost, as a sum over its groups.
///
/// ```
/// use elastic_lora::search::{AdditiveModel, NsgaConfig};
/// use elastic_lora::space::{LayerShape, SearchSpace};
/// # use rand::SeedableRng;
///
/// let layers: Vec<_> = (0..6)
///     .map(|i| LayerShape::new(format!("model.layers.{i}.q_proj"), 8, 8))
///     .collect();
/// let space = SearchSpace::per_layer(&layers, &[32, 24, 16])?;
/// let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
/// let observed: Vec<_> = (0..50).map(|_| space.sample(&mut rng)).map(|subnet| {
///     let loss = 1.0 / subnet.mean();
///     (subnet, loss)
/// }).collect();
/// let model = AdditiveModel::fit(&space, &observed)?;
/// let path = model.path(5, |subnet| Ok(subnet.mean()))?;
/// assert_eq!((path.len(), &path[0], &path[4]), (5, &space.maximal(), &space.minimal()));
/// let searcher = NsgaConfig::new().with_initial(path).init(&space)?;
/// # Ok::<(), elastic_lora::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct AdditiveModel {
    space: SearchSpace,
    /// Value of the largest subnet.
    base: f64,
    /// Change that each choice brings, by group.
    effects: Vec<Vec<f64>>,
}

impl AdditiveModel {
    /// Creates the model of values that are measured from the largest subnet: calls `value` for it,
    /// and for each subnet that differs from it in one group.
    ///
    /// # Errors
    /// Returns the errors of `value`.
    pub fn measure(
        space: &SearchSpace,
        mut value: impl FnMut(&SubnetConfig) -> Result<f64>,
    ) -> Result<Self> {
        let base = value(&space.maximal())?;
        let mut effects = Vec::with_capacity(space.len());
        for (index, group) in space.groups().iter().enumerate() {
            let mut of_group = vec![0.0];
            for choice in 1..group.choices().len() {
                let mut genome = vec![0; space.len()];
                genome[index] = choice;
                of_group.push(value(&space.decode(&genome)?)? - base);
            }
            effects.push(of_group);
        }
        Ok(Self {
            space: space.clone(),
            base,
            effects,
        })
    }

    /// Fits the model to subnets and their losses from any source. Losses that are not finite are
    /// ignored.
    ///
    /// # Errors
    /// Returns the errors of [`SearchSpace::validate`], and [`Error::InvalidArgument`] if there are
    /// fewer than 8 finite losses, or if the number of choices plus the number of groups exceeds
    /// 1500.
    pub fn fit(space: &SearchSpace, observed: &[(SubnetConfig, f64)]) -> Result<Self> {
        let mut told = Vec::with_capacity(observed.len());
        for (subnet, loss) in observed.iter().filter(|(_, loss)| loss.is_finite()) {
            told.push((space.encode(subnet)?, vec![*loss]));
        }
        if told.len() < FEWEST {
            return Err(Error::argument(
                "observed",
                told.len(),
                format!("at least {FEWEST} finite losses"),
            ));
        }
        let n_choices: Vec<usize> = space
            .groups()
            .iter()
            .map(|group| group.choices().len())
            .collect();
        let Some(model) = Surrogate::fit(&n_choices, &told) else {
            return Err(Error::argument(
                "space",
                format!("{} groups", space.len()),
                "fewer choices, to be fitted",
            ));
        };
        Self::measure(space, |subnet| {
            let predicted = model.predict(&space.encode(subnet)?);
            Ok(predicted.first().copied().unwrap_or(f64::NAN))
        })
    }

    /// Returns the predicted loss.
    ///
    /// # Errors
    /// Returns the errors of [`SearchSpace::validate`].
    pub fn predict(&self, subnet: &SubnetConfig) -> Result<f64> {
        let genome = self.space.encode(subnet)?;
        let effects = self.effects.iter().zip(genome);
        Ok(self.base + effects.map(|(effects, gene)| effects[gene]).sum::<f64>())
    }

    /// Returns the subnets that no other dominates in this model's loss and in the cost that `costs`
    /// predicts: the lowest loss for every budget, largest cost first. Of more than 8192, some are
    /// left out. Two subnets of the same loss and cost count as one.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if `costs` is of another space.
    pub fn front(&self, costs: &Self) -> Result<Vec<SubnetConfig>> {
        let shape = |model: &Self| model.effects.iter().map(Vec::len).collect::<Vec<_>>();
        if shape(self) != shape(costs) {
            return Err(Error::ShapeMismatch {
                what: "choices of the groups of an additive model".into(),
                expected: shape(self),
                found: shape(costs),
            });
        }
        let item = |(loss, cost): (&f64, &f64)| Item {
            cost: *cost,
            loss: *loss,
        };
        let groups = self.effects.iter().zip(&costs.effects);
        let groups: Vec<Vec<Item>> = groups
            .map(|(losses, costs)| losses.iter().zip(costs).map(item).collect())
            .collect();
        let genomes = knapsack::solve(&groups, knapsack::MAX_STATES);
        let subnets = genomes.iter().rev();
        subnets.map(|genome| self.space.decode(genome)).collect()
    }

    /// Returns at most `n` subnets, evenly spaced along the front of this model's loss and the given
    /// cost, largest cost first. The saving of a choice is measured from the largest subnet.
    ///
    /// Calls `cost` once for each choice.
    ///
    /// # Errors
    /// Returns the errors of `cost`.
    pub fn path(
        &self,
        n: usize,
        cost: impl FnMut(&SubnetConfig) -> Result<f64>,
    ) -> Result<Vec<SubnetConfig>> {
        let front = self.front(&Self::measure(&self.space, cost)?)?;
        let last = front.len().saturating_sub(1);
        let mut picked: Vec<usize> = match n {
            0 | 1 => (0..n.min(front.len())).collect(),
            _ => (0..n)
                .map(|i| (i * last + (n - 1) / 2) / (n - 1))
                .filter(|at| *at < front.len())
                .collect(),
        };
        picked.dedup();
        let subnet = |at: usize| front[at].clone();
        Ok(picked.into_iter().map(subnet).collect())
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::space::LayerShape;

    fn space(n: usize) -> SearchSpace {
        let layers: Vec<_> = (0..n)
            .map(|i| LayerShape::new(format!("model.layers.{i}.q_proj"), 8, 8))
            .collect();
        SearchSpace::per_layer(&layers, &[32, 24, 16]).unwrap()
    }

    /// Losses by group and choice. Some smaller choices lower the loss.
    fn losses(n: usize, rng: &mut ChaCha8Rng) -> Vec<[f64; 3]> {
        (0..n)
            .map(|i| {
                [
                    0.0,
                    rng.random_range(-0.05..0.1 * (1 + i) as f64),
                    rng.random_range(0.1..0.3),
                ]
            })
            .collect()
    }

    fn sum(genome: &[usize], losses: &[[f64; 3]]) -> f64 {
        2.0 + genome
            .iter()
            .zip(losses)
            .map(|(gene, losses)| losses[*gene])
            .sum::<f64>()
    }

    #[test]
    fn no_subnet_is_better_than_the_paths_for_less() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        for noise in [0.0, 0.05] {
            let space = space(5);
            let truth = losses(5, &mut rng);
            let observed: Vec<_> = (0..600)
                .map(|_| {
                    let subnet = space.sample(&mut rng);
                    let loss = sum(&space.encode(&subnet).unwrap(), &truth)
                        + rng.random_range(-1.0..1.0) * noise;
                    (subnet, loss)
                })
                .collect();
            let model = AdditiveModel::fit(&space, &observed).unwrap();
            let cost =
                |subnet: &SubnetConfig| subnet.iter().map(|(_, value)| value as f64).sum::<f64>();
            let all: Vec<(f64, f64)> = (0..243_usize)
                .map(|code| {
                    let genome: Vec<usize> = (0..5).map(|i| code / 3_usize.pow(i) % 3).collect();
                    let subnet = space.decode(&genome).unwrap();
                    let loss = sum(&genome, &truth);
                    assert!(
                        (model.predict(&subnet).unwrap() - loss).abs() < 0.02 + noise,
                        "{genome:?}"
                    );
                    (cost(&subnet), loss)
                })
                .collect();
            let path = model.path(100, |subnet| Ok(cost(subnet))).unwrap();
            assert!(path.len() > 5 && path[path.len() - 1] == space.minimal());
            assert!(path.windows(2).all(|pair| cost(&pair[1]) < cost(&pair[0])));
            for subnet in &path {
                let (of, loss) = (cost(subnet), sum(&space.encode(subnet).unwrap(), &truth));
                let best = all
                    .iter()
                    .filter(|(cost, _)| *cost <= of)
                    .map(|(_, loss)| *loss)
                    .fold(f64::MAX, f64::min);
                assert!(
                    loss <= best + 0.01 + noise / 2.0,
                    "{subnet}: {loss} beside {best}"
                );
            }
            for n in [0, 1, 2, 4] {
                let part = model.path(n, |subnet| Ok(cost(subnet))).unwrap();
                assert!(part.len() == n && part.iter().all(|subnet| path.contains(subnet)));
                assert!(n < 2 || (part[0] == path[0] && part[n - 1] == path[path.len() - 1]));
            }
        }
    }

    #[test]
    fn what_cannot_be_fitted_is_refused() {
        let space = space(3);
        let observed = vec![(space.maximal(), 1.0); 8];
        assert!(AdditiveModel::fit(&space, &observed).is_ok());
        let few = AdditiveModel::fit(&space, &observed[1..]);
        assert!(matches!(
            few,
            Err(Error::InvalidArgument {
                name: "observed",
                ..
            })
        ));
        let nan = vec![(space.maximal(), f64::NAN); 20];
        assert!(matches!(
            AdditiveModel::fit(&space, &nan),
            Err(Error::InvalidArgument {
                name: "observed",
                ..
            })
        ));
        let other = vec![(SubnetConfig::new(), 1.0); 9];
        assert!(matches!(
            AdditiveModel::fit(&space, &other),
            Err(Error::UnknownGroup { .. })
        ));
        let model = AdditiveModel::fit(&space, &observed).unwrap();
        assert!(model.predict(&SubnetConfig::new()).is_err());
        assert!(
            model
                .path(3, |_| Err(Error::argument("x", 1, "2")))
                .is_err()
        );
        // Where nothing is saved, there is one best subnet.
        assert_eq!(model.path(3, |_| Ok(1.0)).unwrap().len(), 1);
        let other = AdditiveModel::measure(&super::tests::space(2), |_| Ok(1.0)).unwrap();
        assert!(matches!(
            model.front(&other),
            Err(Error::ShapeMismatch { .. })
        ));
    }
}
