//! The gradients of one optimizer step: each micro-batch through each of its subnets.

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

/// What a step found.
#[derive(Default)]
pub(crate) struct StepGradients {
    pub grads: Grads,
    /// What any of the step's subnets used.
    pub used: Prefixes,
    /// Mean negative log-likelihood a target of the first subnet: the only one, or the largest.
    pub loss: f64,
    /// That of the last, where there are several: the smallest.
    pub smallest_loss: Option<f64>,
    /// Those of the others.
    pub random_losses: Vec<f64>,
}

/// The gradients of a step (from 0) on its micro-batches. Leaves the last subnet active.
///
/// # Errors
/// Those of the model for tokens outside the vocabulary or context; [`Error::Interrupted`](crate::Error::Interrupted).
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
        // The same for all subnets: they differ in nothing but their shape.
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
