//! A micro-batch's loss and gradients, from a tape of the whole model or of one block at a time.

use burn::module::Module;
use burn::tensor::{Int, Tensor};
use serde::{Deserialize, Serialize};

use super::optimizer::{Grads, collect, trainable};
use crate::error::Result;
use crate::model::Decoder;
use crate::nn::host_values;

/// What a step keeps of its forward pass. Either way the gradients are the same, but for the rounding of sums that a tape
/// takes in another order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Checkpointing {
    /// All that the backward pass needs: nothing is computed twice.
    #[default]
    None,
    /// Each block's input alone (arXiv 1604.06174): a block is computed again when its gradients are due, so one block's
    /// activations exist at a time. More blocks a segment would keep fewer inputs, which are small beside a block's
    /// activations.
    Blocks,
}

/// What a micro-batch's subnet learns from, and how much it counts in its step.
pub(crate) struct Share<'a> {
    /// As [`Decoder::nll_sum`] takes them.
    pub positions: &'a [(usize, u32)],
    /// Targets of the whole step.
    pub n_targets: usize,
    /// Subnets that the micro-batch trains: each counts the same.
    pub n_subnets: usize,
    /// Whose predictions the subnet learns; none learns the targets.
    pub teacher: Option<&'a Teacher>,
}

/// A subnet to learn from.
pub(crate) struct Teacher {
    /// What its head was given at the same positions, off the tape.
    pub hidden: Tensor<2>,
    /// Share of the loss against its predictions.
    pub mix: f64,
}

/// What [`backward`] finds.
pub(crate) struct Found {
    /// The negative log-likelihood of the micro-batch's targets, over the number of the step's.
    pub loss: f64,
    /// Gradients of the step's loss: this subnet's share of it.
    pub grads: Grads,
    /// What the head was given, off the tape.
    pub hidden: Tensor<2>,
}

/// A micro-batch's loss and gradients with the active subnet.
///
/// # Shapes
/// - `tokens`: `[batch, seq]`
///
/// # Errors
/// As [`Decoder::nll_sum`].
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

/// The scalar whose gradients are wanted, of final hidden states; and what else there is to find but those.
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
    let (mean, mut found) = objective(model, model.hidden_states(tokens, None), share)?;
    // A subnet may leave out all that is trained.
    if mean.is_tracked() {
        collect(model, &mut mean.backward(), &mut found.grads);
    }
    Ok(found)
}

fn by_block(model: &Decoder, tokens: Tensor<2, Int>, share: &Share<'_>) -> Result<Found> {
    let n_blocks = model.layers.len();
    // Below the first trained block no gradient is wanted.
    let first = match model.embed_tokens.base().is_require_grad() {
        true => 0,
        false => (0..n_blocks)
            .find(|block| !trainable(&model.layers[*block]).is_empty())
            .unwrap_or(n_blocks),
    };
    let mut pass = model.pass(0, tokens.dims()[1], None);
    let mut inputs = Vec::with_capacity(n_blocks - first);
    let last = {
        // Still on the autodiff device, where dropout acts, but with nothing to be differentiated.
        let untaped = model.clone().no_grad();
        let mut x = untaped.embed(tokens.clone());
        for (index, block) in untaped.layers.iter().enumerate() {
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
        let index = first + inputs.len();
        let x = match index {
            0 => model.embed(tokens.clone()),
            _ if index == first => Tensor::from_inner(x),
            _ => leaf(x),
        };
        let y = model.layers[index].forward(x.clone(), index, &mut pass);
        // The lowest trained block, where the subnet leaves it out.
        if !y.is_tracked() {
            break;
        }
        // A scalar whose gradient with respect to `y` is the one given, exactly.
        let mut tape = (y * grad).sum().backward();
        given = x.grad_remove(&mut tape);
        collect(model, &mut tape, &mut found.grads);
    }
    Ok(found)
}
