//! Predicts the loss of all subnets from the losses of a few, as a sum over groups, to start a
//! search.
//!
//! The losses can come from the training log at no extra cost (`TrainConfig::observations`). NNCF's
//! "min-loss" heuristic takes the subnet with the lowest training loss, which depends on the batch
//! as much as on the subnet. This model uses all steps, and separates the effects of each group's
//! choices. It orders choices by slope. Puzzle (arXiv 2411.19146) and HAWQ use integer programs
//! instead; if the cost is the only constraint, the result is the same, except possibly for the
//! last step.

use super::surrogate::Surrogate;
use crate::error::{Error, Result};
use crate::space::{Group, SearchSpace, SubnetConfig};

/// Minimum number of losses for a fit.
const FEWEST: usize = 8;

/// Models the loss of a subnet as a sum over its groups, fitted by ridge regression.
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
pub struct AdditiveModel {
    space: SearchSpace,
    model: Surrogate,
}

/// A step that lowers one group to a smaller choice.
struct Descent {
    /// Increase of the loss divided by decrease of the cost.
    slope: f64,
    group: usize,
    choice: usize,
}

impl AdditiveModel {
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
        match Surrogate::fit(&n_choices, &told) {
            Some(model) => Ok(Self {
                space: space.clone(),
                model,
            }),
            None => Err(Error::argument(
                "space",
                format!("{} groups", space.len()),
                "fewer choices, to be fitted",
            )),
        }
    }

    /// Returns the predicted loss.
    ///
    /// # Errors
    /// Returns the errors of [`SearchSpace::validate`].
    pub fn predict(&self, subnet: &SubnetConfig) -> Result<f64> {
        Ok(self.of_genome(&self.space.encode(subnet)?))
    }

    fn of_genome(&self, genome: &Vec<usize>) -> f64 {
        self.model
            .predict(genome)
            .first()
            .copied()
            .unwrap_or(f64::NAN)
    }

    /// Returns at most `n` subnets, evenly spaced along a path from the largest subnet downwards.
    /// Each step of the path lowers the choice of one group: the choice with the smallest predicted
    /// increase of the loss per cost saved. The saving of a choice is measured separately for each
    /// choice, relative to the largest subnet.
    ///
    /// Calls `cost` once for each choice. Choices that save nothing are not used.
    ///
    /// # Errors
    /// Returns the errors of `cost`.
    pub fn path(
        &self,
        n: usize,
        mut cost: impl FnMut(&SubnetConfig) -> Result<f64>,
    ) -> Result<Vec<SubnetConfig>> {
        let largest = vec![0; self.space.len()];
        let full = (cost(&self.space.maximal())?, self.of_genome(&largest));
        let mut descents = Vec::new();
        for (index, group) in self.space.groups().iter().enumerate() {
            let mut points = vec![(0.0, 0.0)];
            for choice in 1..group.choices().len() {
                let mut genome = largest.clone();
                genome[index] = choice;
                let saved = full.0 - cost(&self.space.decode(&genome)?)?;
                points.push((saved, self.of_genome(&genome) - full.1));
            }
            descend(index, group, &points, &mut descents);
        }
        // The sort is stable and slopes do not decrease within a group, so its choices keep their
        // order.
        descents.sort_by(|a, b| a.slope.total_cmp(&b.slope));
        let mut genome = largest;
        let mut genomes = vec![genome.clone()];
        for Descent { group, choice, .. } in descents {
            genome[group] = choice;
            genomes.push(genome.clone());
        }
        let last = genomes.len() - 1;
        let mut picked: Vec<usize> = match n {
            0 | 1 => (0..n).collect(),
            _ => (0..n).map(|i| (i * last + (n - 1) / 2) / (n - 1)).collect(),
        };
        picked.dedup();
        picked
            .into_iter()
            .map(|index| self.space.decode(&genomes[index]))
            .collect()
    }
}

/// Adds the lower convex hull of a group's choices, given as `(saved, loss)`, starting from the
/// largest choice.
fn descend(index: usize, group: &Group, points: &[(f64, f64)], into: &mut Vec<Descent>) {
    let mut at = 0;
    while at + 1 < group.choices().len() {
        let slope =
            |choice: usize| (points[choice].1 - points[at].1) / (points[choice].0 - points[at].0);
        let smaller = (at + 1..points.len()).filter(|choice| points[*choice].0 > points[at].0);
        let Some(next) = smaller.min_by(|a, b| slope(*a).total_cmp(&slope(*b))) else {
            return;
        };
        into.push(Descent {
            slope: slope(next),
            group: index,
            choice: next,
        });
        at = next;
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
            assert!(
                path.len() > 5
                    && path[0] == space.maximal()
                    && path[path.len() - 1] == space.minimal()
            );
            assert!(path.windows(2).all(|pair| cost(&pair[1]) < cost(&pair[0])));
            // Each subnet before the lowest loss is worse and more expensive than the next, so skip
            // these.
            let predicted: Vec<f64> = path
                .iter()
                .map(|subnet| model.predict(subnet).unwrap())
                .collect();
            let least = (0..path.len())
                .min_by(|a, b| predicted[*a].total_cmp(&predicted[*b]))
                .unwrap();
            for subnet in &path[least..] {
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
        // Choices that save nothing are not used.
        assert_eq!(model.path(3, |_| Ok(1.0)).unwrap(), [space.maximal()]);
    }
}
