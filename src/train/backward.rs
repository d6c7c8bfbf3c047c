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

/// The mean negative log-likelihood over `n_targets`, of which `positions` are those of this micro-batch, and its gradients.
///
/// # Shapes
/// - `tokens`: `[batch, seq]`; `positions`: as [`Decoder::nll_sum`] takes them
///
/// # Errors
/// As [`Decoder::nll_sum`].
pub(crate) fn backward(
    model: &Decoder,
    tokens: Tensor<2, Int>,
    positions: &[(usize, u32)],
    n_targets: usize,
    checkpointing: Checkpointing,
) -> Result<(f64, Grads)> {
    match checkpointing {
        Checkpointing::None => whole(model, tokens, positions, n_targets),
        Checkpointing::Blocks => by_block(model, tokens, positions, n_targets),
    }
}

fn whole(
    model: &Decoder,
    tokens: Tensor<2, Int>,
    positions: &[(usize, u32)],
    n_targets: usize,
) -> Result<(f64, Grads)> {
    let mean = model.nll_sum(tokens, positions)? / n_targets as f64;
    let loss = value(&mean);
    let mut grads = Grads::new();
    collect(model, &mut mean.backward(), &mut grads);
    Ok((loss, grads))
}

fn by_block(
    model: &Decoder,
    tokens: Tensor<2, Int>,
    positions: &[(usize, u32)],
    n_targets: usize,
) -> Result<(f64, Grads)> {
    let n_blocks = model.layers.len();
    // Below the first trained block no gradient is wanted.
    let first = match model.embed_tokens.base().is_require_grad() {
        true => 0,
        false => (0..n_blocks).find(|block| !trainable(&model.layers[*block]).is_empty()).unwrap_or(n_blocks),
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

    let mut grads = Grads::new();
    let x = leaf(last);
    let mean = model.nll_at(model.norm.forward(x.clone()), positions)? / n_targets as f64;
    let loss = value(&mean);
    let mut tape = mean.backward();
    let mut given = x.grad_remove(&mut tape);
    collect(model, &mut tape, &mut grads);
    drop((x, mean, tape));
    while let (Some(x), Some(grad)) = (inputs.pop(), given.take()) {
        let index = first + inputs.len();
        let x = match index {
            0 => model.embed(tokens.clone()),
            _ if index == first => Tensor::from_inner(x),
            _ => leaf(x),
        };
        let y = model.layers[index].forward(x.clone(), index, &mut pass);
        // A scalar whose gradient with respect to `y` is the one given, exactly.
        let mut tape = (y * grad).sum().backward();
        given = x.grad_remove(&mut tape);
        collect(model, &mut tape, &mut grads);
    }
    Ok((loss, grads))
}

fn value(mean: &Tensor<1>) -> f64 {
    f64::from(host_values(mean.clone().inner())[0])
}
