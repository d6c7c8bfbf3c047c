//! The gradients of one optimizer step, from each micro-batch with each of its subnets.

use super::TrainConfig;
use super::backward::{Share, Teacher, backward};
use super::optimizer::{Grads, Prefixes, accumulate, active_prefixes, widen};
use super::targets;
use crate::adapter::ElasticLora;
use crate::data::Batch;
use crate::error::Result;
use crate::model::Decoder;
use crate::progress::Task;
use crate::supernet::SuperNet;

/// Result of a step's forward and backward passes.
#[derive(Default)]
pub(crate) struct StepGradients {
    pub grads: Grads,
    /// The parts of the parameters that any of the step's subnets used.
    pub used: Prefixes,
    /// Mean negative log-likelihood per target of the first subnet, which is the only one or the
    /// largest.
    pub loss: f64,
    /// The same for the last of several subnets, the smallest.
    pub smallest_loss: Option<f64>,
    /// The same for the subnets between them.
    pub random_losses: Vec<f64>,
}

/// Computes the gradients of a step (from 0) on its micro-batches. The last subnet stays active.
///
/// # Errors
/// Returns the model's errors for tokens outside the vocabulary or context, and
/// [`Error::Interrupted`](crate::Error::Interrupted).
pub(crate) fn gradients(
    net: &mut SuperNet,
    config: &TrainConfig,
    batches: &[Batch],
    step: usize,
    task: &Task<'_>,
) -> Result<StepGradients> {
    let targets: Vec<_> = batches.iter().map(targets).collect();
    let n_targets = targets.iter().map(Vec::len).sum();
    let lists = config.subnets(net.space(), step);
    let mut sum = StepGradients::default();
    for (index, ((batch, positions), subnets)) in
        batches.iter().zip(&targets).zip(&lists).enumerate()
    {
        // All subnets get the same dropout, so that they differ only in shape.
        seed_dropout(
            net.model_mut(),
            config.seed,
            (step * config.accumulation + index) as u64,
        )?;
        let tokens = net.model().tokens(&batch.ids, batch.rows)?;
        if positions.is_empty() {
            continue;
        }
        let n_subnets = subnets.len().max(1);
        let mut teacher = None;
        for which in 0..n_subnets {
            task.check()?;
            if let Some(subnet) = subnets.get(which) {
                net.activate(subnet)?;
            }
            let share = Share {
                positions,
                n_targets,
                n_subnets,
                teacher: teacher.as_ref(),
            };
            let found = backward(net.model(), tokens.clone(), &share, config.checkpointing)?;
            if which == 0 {
                sum.loss += found.loss;
                teacher = config.distillation.map(|with| Teacher {
                    hidden: found.hidden,
                    mix: with.weight,
                });
            } else if which + 1 == n_subnets {
                *sum.smallest_loss.get_or_insert(0.0) += found.loss;
            } else {
                sum.random_losses.resize(n_subnets - 2, 0.0);
                sum.random_losses[which - 1] += found.loss;
            }
            accumulate(&mut sum.grads, found.grads);
            widen(&mut sum.used, active_prefixes(net.model()));
        }
    }
    Ok(sum)
}

fn seed_dropout(model: &mut Decoder, seed: u64, draw: u64) -> Result<()> {
    let mut layer = 0;
    model.try_for_each_linear(|_, linear| {
        if let Some(adapter) = &mut linear.adapter {
            adapter.set_dropout_seed(ElasticLora::step_seed(seed, draw, layer));
            layer += 1;
        }
        Ok(())
    })
}
