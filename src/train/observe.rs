//! Losses of individual subnets, taken from a run's log at no extra cost.

use super::{Sampling, StepLog, TrainConfig};
use crate::space::{SearchSpace, SubnetConfig};

/// Number of steps before and after a step over which its reference loss is averaged.
const AROUND: usize = 8;

impl TrainConfig {
    /// Returns the subnets drawn in the last fraction `share` (0..=1) of a run, each with the
    /// difference between its loss and a reference loss, in nats per target. Use them to fit an
    /// [`AdditiveModel`](crate::search::AdditiveModel).
    ///
    /// Under the sandwich rule, the reference is the largest subnet on the same batches with the
    /// same dropout, and the smallest subnet is included. With one subnet per step, the reference
    /// is the mean over the neighbouring steps, whose batches differ, so about a hundred times as
    /// many steps are needed. All values are training losses of weights that still change, with
    /// dropout if it is enabled. Other samplings give no observations.
    pub fn observations(
        &self,
        space: &SearchSpace,
        logs: &[StepLog],
        share: f64,
    ) -> Vec<(SubnetConfig, f64)> {
        let first = ((1.0 - share.clamp(0.0, 1.0)) * logs.len() as f64).round() as usize;
        let mut observed = Vec::new();
        for (step, log) in logs.iter().enumerate().skip(first) {
            let subnets = self
                .subnets(space, step)
                .into_iter()
                .next()
                .unwrap_or_default();
            match self.sampling {
                Sampling::Sandwich { .. } => {
                    let losses = log.random_losses.iter().copied().chain(log.smallest_loss);
                    observed.extend(
                        subnets
                            .into_iter()
                            .skip(1)
                            .zip(losses.map(|loss| loss - log.loss)),
                    );
                }
                Sampling::PerStep => {
                    let around =
                        &logs[step.saturating_sub(AROUND)..(step + AROUND + 1).min(logs.len())];
                    let mean = around.iter().map(|log| log.loss).sum::<f64>() / around.len() as f64;
                    observed.extend(subnets.into_iter().map(|subnet| (subnet, log.loss - mean)));
                }
                Sampling::PerMicroBatch | Sampling::Fixed => {}
            }
        }
        observed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::space::LayerShape;

    #[test]
    fn each_drawn_subnet_is_beside_its_own_loss() {
        let layers: Vec<_> = (0..5)
            .map(|i| LayerShape::new(format!("model.layers.{i}.q_proj"), 8, 8))
            .collect();
        let space = SearchSpace::per_layer(&layers, &[5, 3, 2]).unwrap();
        let excess = |subnet: &SubnetConfig| 0.1 * (5.0 - subnet.mean());
        for sampling in [
            Sampling::Sandwich { random: 2 },
            Sampling::PerStep,
            Sampling::PerMicroBatch,
            Sampling::Fixed,
        ] {
            let config = TrainConfig {
                sampling,
                accumulation: 2,
                seed: 3,
                ..TrainConfig::new(40)
            };
            let logs: Vec<StepLog> = (0..40)
                .map(|step| {
                    let subnets = config.subnets(&space, step).remove(0);
                    // The difficulty of a batch, which does not depend on the subnet.
                    let batch = 2.0 + step as f64 * 0.01;
                    let losses: Vec<f64> = subnets
                        .iter()
                        .map(|subnet| batch + excess(subnet))
                        .collect();
                    let n = losses.len();
                    StepLog {
                        step: step + 1,
                        loss: losses.first().copied().unwrap_or(batch),
                        smallest_loss: (n > 1).then(|| losses[n - 1]),
                        random_losses: if n > 2 {
                            losses[1..n - 1].to_vec()
                        } else {
                            Vec::new()
                        },
                        valid_loss: None,
                        lr: 0.1,
                        grad_norm: 1.0,
                        n_tokens: 3,
                    }
                })
                .collect();
            let observed = config.observations(&space, &logs, 0.25);
            match sampling {
                Sampling::Sandwich { .. } => {
                    assert_eq!(observed.len(), 10 * 3);
                    assert!(
                        observed
                            .iter()
                            .all(|(subnet, loss)| (loss - excess(subnet)).abs() < 1e-12)
                    );
                    assert_eq!(observed[2].0, space.minimal());
                }
                Sampling::PerStep => {
                    assert_eq!(observed.len(), 10);
                    for (index, (subnet, _)) in observed.iter().enumerate() {
                        assert_eq!(*subnet, config.subnets(&space, 30 + index)[0][0]);
                    }
                    let (low, high): (Vec<&(SubnetConfig, f64)>, Vec<_>) =
                        observed.iter().partition(|(subnet, _)| subnet.mean() > 3.3);
                    let mean = |part: &[&(SubnetConfig, f64)]| {
                        part.iter().map(|(_, x)| x).sum::<f64>() / part.len() as f64
                    };
                    assert!(low.is_empty() || high.is_empty() || mean(&low) < mean(&high));
                }
                Sampling::PerMicroBatch | Sampling::Fixed => assert!(observed.is_empty()),
            }
            assert!(config.observations(&space, &[], 1.0).is_empty());
        }
    }
}
