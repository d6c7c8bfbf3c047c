//! Computes the loss and gradients of a micro-batch, recording the whole model or one block at a
//! time.

use burn::module::Module;
use burn::tensor::{Int, Tensor};
use serde::{Deserialize, Serialize};

use super::optimizer::{Grads, collect, trainable};
use crate::data::Segments;
use crate::error::Result;
use crate::model::Decoder;
use crate::nn::host_values;
use crate::progress::Task;

/// Choice of the activations that a training step keeps for its backward pass. The gradients are
/// the same with either choice, except for the rounding of sums taken in another order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Checkpointing {
    /// Keeps everything that the backward pass needs; nothing is computed twice.
    #[default]
    None,
    /// Keeps only each block's input (arXiv 1604.06174). A block is recomputed when its gradients
    /// are computed, so that the activations of only one block exist at a time. Segments of several
    /// blocks would keep fewer inputs, but inputs are small compared with the activations of a
    /// block.
    Blocks,
}

/// The targets of a micro-batch's subnet, and its weight in the step.
pub(crate) struct Share<'a> {
    /// Positions and targets, as for [`Decoder::nll_sum`].
    pub positions: &'a [(usize, u32)],
    /// The examples of the rows, if they are packed.
    pub segments: Option<&'a Segments>,
    /// Number of targets in the whole step.
    pub n_targets: usize,
    /// Number of subnets that the micro-batch trains; all have the same weight.
    pub n_subnets: usize,
    /// The teacher whose predictions the subnet learns; without one it learns the targets.
    pub teacher: Option<&'a Teacher>,
    /// Asked between blocks whether to go on.
    pub task: &'a Task<'a>,
}

/// A subnet that another subnet learns from.
pub(crate) struct Teacher {
    /// Input of its head at the same positions, without autodiff.
    pub hidden: Tensor<2>,
    /// Weight of the loss against its predictions, in 0..=1.
    pub mix: f64,
}

/// Result of [`backward`].
pub(crate) struct Found {
    /// Negative log-likelihood of the micro-batch's targets, divided by the number of targets in
    /// the step.
    pub loss: f64,
    /// This subnet's share of the gradients of the step's loss.
    pub grads: Grads,
    /// Input of the head, without autodiff.
    pub hidden: Tensor<2>,
}

/// Computes the loss and gradients of a micro-batch with the active subnet.
///
/// # Shapes
/// - `tokens`: `[batch, seq]`
///
/// # Errors
/// Returns the errors of [`Decoder::nll_sum`], and [`Error::Interrupted`](crate::Error::Interrupted).
pub(crate) fn backward(
    model: &Decoder,
    tokens: Tensor<2, Int>,
    share: &Share<'_>,
    checkpointing: Checkpointing,
) -> Result<Found> {
    match checkpointing {
        Checkpointing::None => whole(model, tokens, share),
        Checkpointing::Blocks => by_block(model, tokens, share),
    }
}

/// Computes, from the final hidden states, the scalar to differentiate and a result that has no
/// gradients yet.
fn objective(model: &Decoder, hidden: Tensor<3>, share: &Share<'_>) -> Result<(Tensor<1>, Found)> {
    let (hidden, targets) = model.at_positions(hidden, share.positions)?;
    let kept = hidden.clone().inner();
    let (sum, nll) = match share.teacher {
        Some(teacher) => {
            model.distilled_of_hidden(hidden, teacher.hidden.clone(), &targets, teacher.mix)
        }
        None => {
            let sum = model.nll_of_hidden(hidden, &targets);
            (sum.clone(), sum)
        }
    };
    let loss = f64::from(host_values(nll.inner() / share.n_targets as f64)[0]);
    let mean = sum / (share.n_targets * share.n_subnets) as f64;
    Ok((
        mean,
        Found {
            loss,
            grads: Grads::new(),
            hidden: kept,
        },
    ))
}

fn whole(model: &Decoder, tokens: Tensor<2, Int>, share: &Share<'_>) -> Result<Found> {
    let hidden = model.rows_hidden_states(tokens, share.segments, share.task)?;
    let (mean, mut found) = objective(model, hidden, share)?;
    // A subnet may leave out everything that is trained.
    if mean.is_tracked() {
        collect(model, &mut mean.backward(), &mut found.grads);
    }
    Ok(found)
}

fn by_block(model: &Decoder, tokens: Tensor<2, Int>, share: &Share<'_>) -> Result<Found> {
    let n_blocks = model.layers.len();
    // No gradients are needed below the first trained block.
    let first = match model.embed_tokens.base().is_require_grad() {
        true => 0,
        false => (0..n_blocks)
            .find(|block| !trainable(&model.layers[*block]).is_empty())
            .unwrap_or(n_blocks),
    };
    let mut pass = model.pass_of(tokens.dims()[1], share.segments);
    let mut inputs = Vec::with_capacity(n_blocks - first);
    let last = {
        // This copy is still on the autodiff device, so that dropout applies, but requires no
        // gradients.
        let untaped = model.clone().no_grad();
        let mut x = untaped.embed(tokens.clone());
        for (index, block) in untaped.layers.iter().enumerate() {
            share.task.check()?;
            if index >= first {
                inputs.push(x.clone().inner());
            }
            x = block.forward(x, index, &mut pass);
        }
        x.inner()
    };
    let leaf = |x: Tensor<3>| Tensor::from_inner(x).require_grad();

    let x = leaf(last);
    let (mean, mut found) = objective(model, model.norm.forward(x.clone()), share)?;
    let mut tape = mean.backward();
    let mut given = x.grad_remove(&mut tape);
    collect(model, &mut tape, &mut found.grads);
    drop((x, mean, tape));
    while let (Some(x), Some(grad)) = (inputs.pop(), given.take()) {
        share.task.check()?;
        let index = first + inputs.len();
        let x = match index {
            0 => model.embed(tokens.clone()),
            _ if index == first => Tensor::from_inner(x),
            _ => leaf(x),
        };
        let y = model.layers[index].forward(x.clone(), index, &mut pass);
        // The subnet leaves out the lowest trained block.
        if !y.is_tracked() {
            break;
        }
        // The gradient of this scalar with respect to `y` is exactly `grad`.
        let mut tape = (y * grad).sum().backward();
        given = x.grad_remove(&mut tape);
        collect(model, &mut tape, &mut found.grads);
    }
    Ok(found)
}
