//! A guess at all subnets from the losses of a few, for a search to begin with: a loss that is additive over groups.
//!
//! The losses may come for free, from the log of the training itself
//! (`TrainConfig::observations`). NNCF's "min-loss" heuristic takes the subnet whose
//! training loss was least, which the batch decides as much as the subnet; here all steps count, and each group's choices are
//! told apart. Choosing by slope is what Puzzle (arXiv 2411.19146) and HAWQ have integer programs for; without a constraint but
//! the cost, and up to the last step, it gives the same.

use super::surrogate::Surrogate;
use crate::error::{Error, Result};
use crate::space::{Group, SearchSpace, SubnetConfig};

/// Fewest losses to fit.
const FEWEST: usize = 8;

/// The loss of a subnet as a sum over its groups, by ridge regression.
///
/// ```
/// use elastic_lora::search::{AdditiveModel, NsgaConfig};
/// use elastic_lora::space::{LayerShape, SearchSpace};
/// # use rand::SeedableRng;
///
/// let layers: Vec<_> = (0..6).map(|i| LayerShape::new(format!("model.layers.{i}.q_proj"), 8, 8)).collect();
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

/// One group goes down to a smaller choice.
struct Descent {
    /// Increase of the loss by decrease of the cost.
    slope: f64,
    group: usize,
    choice: usize,
}

impl AdditiveModel {
    /// Fits subnets and their losses, of any origin; those that are no finite numbers are left out.
    ///
    /// # Errors
    /// As [`SearchSpace::validate`]; [`Error::InvalidArgument`] for fewer than 8 losses, or a space of more than 1500 choices,
    /// a group counting as one more.
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

    /// The loss to expect.
    ///
    /// # Errors
    /// As [`SearchSpace::validate`].
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

    /// At most `n` subnets from the largest down, evenly among those that are met when always the choice goes down that is to
    /// cost the least loss for what it saves. What a choice saves is measured alone, from the largest subnet.
    ///
    /// Calls `cost` once for each choice. A choice that saves nothing is not taken.
    ///
    /// # Errors
    /// Those of `cost`.
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
        // Stable, and slopes do not fall within a group: its choices go down in their order.
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

/// The lower convex hull of a group's choices, as `(saved, loss)`, from the largest on.
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

    /// Losses by group and choice, some of which a smaller choice lowers.
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
            // Before the least loss each subnet is beaten by the next.
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
        // What saves nothing stays.
        assert_eq!(model.path(3, |_| Ok(1.0)).unwrap(), [space.maximal()]);
    }
}
