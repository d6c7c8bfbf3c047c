//! The choice of the subnets that a step trains.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::config::{Sampling, TrainConfig};
use crate::nn::mix_seed;
use crate::space::{SearchSpace, SubnetConfig};

impl TrainConfig {
    /// The subnets that a step (from 0) trains, as one list per micro-batch. Under the sandwich
    /// rule the largest comes first and the smallest last. Under [`Sampling::Fixed`] the lists are
    /// empty, and the active subnet is trained.
    ///
    /// The result depends only on the seed and the step, so a log of losses need not name the
    /// subnets.
    pub fn subnets(&self, space: &SearchSpace, step: usize) -> Vec<Vec<SubnetConfig>> {
        let mut rng = ChaCha8Rng::seed_from_u64(mix_seed(self.seed, step as u64));
        let within = |subnet: SubnetConfig| self.within_stage(space, subnet, step);
        let mut draw = || within(space.sample(&mut rng));
        match self.sampling {
            Sampling::Fixed => vec![Vec::new(); self.accumulation],
            Sampling::PerStep => vec![vec![draw()]; self.accumulation],
            Sampling::PerMicroBatch => (0..self.accumulation).map(|_| vec![draw()]).collect(),
            Sampling::Sandwich { random } => {
                let (largest, smallest) = (space.maximal(), within(space.minimal()));
                let mut subnets = vec![largest];
                if subnets[0] != smallest {
                    subnets.extend((0..random).map(|_| draw()));
                    subnets.push(smallest);
                }
                vec![subnets; self.accumulation]
            }
        }
    }

    /// The subnet with every group that does not vary at this step set to its largest choice.
    fn within_stage(
        &self,
        space: &SearchSpace,
        mut subnet: SubnetConfig,
        step: usize,
    ) -> SubnetConfig {
        let mut end = 0;
        let stage = self.stages.iter().find(|stage| {
            end += stage.steps;
            step < end
        });
        if let Some(stage) = stage {
            for group in space
                .groups()
                .iter()
                .filter(|group| !stage.kinds.contains(&group.kind()))
            {
                subnet.set(group.id(), group.choices()[0]);
            }
        }
        subnet
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::space::{Elastic, Group, LayerShape};
    use crate::train::Stage;

    fn space() -> SearchSpace {
        let layers: Vec<_> = (0..7)
            .map(|i| LayerShape::new(format!("model.layers.{i}.q_proj"), 8, 8))
            .collect();
        SearchSpace::per_layer(&layers, &[5, 3, 2]).unwrap()
    }

    fn config(sampling: Sampling) -> TrainConfig {
        TrainConfig {
            accumulation: 3,
            sampling,
            seed: 4,
            ..TrainConfig::new(10)
        }
    }

    #[test]
    fn each_rule_draws_what_it_says() {
        let space = space();
        for step in 0..10 {
            let lists = config(Sampling::PerStep).subnets(&space, step);
            assert!(
                lists.len() == 3
                    && lists
                        .iter()
                        .all(|list| list.len() == 1 && *list == lists[0])
            );
            let by_batch = config(Sampling::PerMicroBatch).subnets(&space, step);
            assert!(by_batch.len() == 3 && by_batch[0] == lists[0] && by_batch[1] != by_batch[0]);
            assert_eq!(
                config(Sampling::Fixed).subnets(&space, step),
                vec![Vec::new(); 3]
            );
            for random in [0, 1, 4] {
                let sandwich = config(Sampling::Sandwich { random }).subnets(&space, step);
                assert!(sandwich.len() == 3 && sandwich.iter().all(|list| *list == sandwich[0]));
                assert_eq!(sandwich[0].len(), random + 2);
                assert_eq!(sandwich[0][0], space.maximal());
                assert_eq!(sandwich[0][random + 1], space.minimal());
                assert!(random == 0 || sandwich[0][1] == lists[0][0]);
                sandwich[0]
                    .iter()
                    .for_each(|subnet| space.validate(subnet).unwrap());
            }
        }
        let first = |seed: u64, step: usize| {
            TrainConfig {
                seed,
                ..config(Sampling::Sandwich { random: 2 })
            }
            .subnets(&space, step)
            .remove(0)
        };
        assert_eq!(first(4, 2), first(4, 2));
        assert_ne!(first(4, 2), first(4, 3));
        assert_ne!(first(4, 2), first(5, 2));
    }

    #[test]
    fn what_does_not_vary_is_at_its_largest() {
        let space = space();
        let stages = vec![Stage::new(4, []), Stage::new(6, [Elastic::Rank])];
        for sampling in [
            Sampling::PerStep,
            Sampling::PerMicroBatch,
            Sampling::Sandwich { random: 2 },
        ] {
            let staged = TrainConfig {
                stages: stages.clone(),
                ..config(sampling)
            };
            staged.validate().unwrap();
            for step in 0..10 {
                let lists = staged.subnets(&space, step);
                if step < 4 {
                    assert_eq!(lists, vec![vec![space.maximal()]; 3]);
                } else {
                    assert_eq!(lists, config(sampling).subnets(&space, step));
                }
            }
        }
        // The kinds are added one after the other.
        let group = |kind: Elastic, id: &str, choices: &[usize]| {
            let name = |i: usize| format!("model.layers.{i}.mlp.up_proj");
            let block = |i: usize| format!("model.layers.{i}");
            let layers = (0..3)
                .map(|i| {
                    if kind == Elastic::Depth {
                        block(i)
                    } else {
                        name(i)
                    }
                })
                .collect();
            Group::of_kind(kind, id, layers, choices.to_vec()).unwrap()
        };
        let kinds = [Elastic::Rank, Elastic::Width, Elastic::Depth];
        let groups = [
            group(kinds[0], "rank", &[5, 3, 2]),
            group(kinds[1], "width", &[64, 48]),
            group(kinds[2], "depth", &[3, 1, 0]),
        ];
        let mixed = SearchSpace::new(groups.to_vec()).unwrap();
        let stages = vec![
            Stage::new(3, &kinds[..1]),
            Stage::new(3, &kinds[..2]),
            Stage::new(4, kinds),
        ];
        let staged = TrainConfig {
            stages,
            ..config(Sampling::Sandwich { random: 6 })
        };
        let whole = config(Sampling::Sandwich { random: 6 });
        for step in 0..10 {
            let vary = 1 + step / 3;
            let (lists, free) = (
                staged.subnets(&mixed, step).remove(0),
                whole.subnets(&mixed, step).remove(0),
            );
            for (subnet, free) in lists.iter().zip(&free) {
                for (index, group) in groups.iter().enumerate() {
                    let expected = if index < vary {
                        free.get(group.id())
                    } else {
                        Some(group.choices()[0])
                    };
                    assert_eq!(
                        subnet.get(group.id()),
                        expected,
                        "step {step}, {}",
                        group.id()
                    );
                }
            }
        }
        // A single subnet is trained once per step.
        assert_eq!(
            config(Sampling::Sandwich { random: 2 }).subnets(&SearchSpace::single(), 1)[0].len(),
            1
        );
    }
}
