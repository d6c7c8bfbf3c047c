//! How much each block, and each block's attention and MLP, does to the residual stream and to the loss: what to leave out
//! first where depth is elastic.
//!
//! The first measure is ShortGPT's block influence (arXiv 2403.03853), `1 - mean cosine` of a part's input and output, which
//! takes one pass. Departure: it is taken for attention and MLP apart, too.

use burn::module::Module;
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::{TOKENS_AT_ONCE, batches, targets};
use crate::arch::{LinearKind, SubBlock};
use crate::error::{Error, Result};
use crate::model::Decoder;
use crate::nn::host_values;
use crate::progress::{Progress, Task};

/// What of block `block` may be left out: its name, and the parts that it is. The whole comes before its parts.
fn candidates(block: usize) -> [(String, &'static [SubBlock]); 3] {
    [
        (format!("model.layers.{block}"), &SubBlock::ALL),
        (SubBlock::Attention.name(block), &[SubBlock::Attention]),
        (SubBlock::Mlp.name(block), &[SubBlock::Mlp]),
    ]
}

/// By what parts are ranked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InfluenceMeasure {
    /// The change of the residual stream: one pass over the samples.
    #[default]
    Cosine,
    /// The increase of the loss where the part is left out: a pass over the blocks behind each part, so that time goes with the
    /// square of the number of blocks.
    Loss,
}

/// How much a block, or its attention or MLP, matters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockInfluence {
    /// Hugging Face's module path, such as `model.layers.3` or `model.layers.3.self_attn`; [`SubBlock::parse`] reads it, and a group of
    /// elastic depth lists such names.
    pub name: String,
    /// 1 minus the cosine of the residual stream before and after the part, mean over tokens, in 0..=2.
    pub cosine_change: f64,
    /// How much more the loss is without the part, in nats a token; where it was asked for.
    pub loss_increase: Option<f64>,
}

/// Measures each block, and each block's attention and MLP, on token sequences; returns them by importance, most important
/// first. Equal ones come in the order of computation, the whole block before its parts. What is missing or left out already is
/// not listed.
///
/// An active adapter counts as part of its layer.
///
/// # Errors
/// [`Error::InvalidArgument`] without a sample, or for [`InfluenceMeasure::Loss`] without one of two tokens; those of
/// [`Decoder::tokens`] for a sample outside vocabulary or context; [`Error::NotFinite`] where the model gives NaN or an
/// infinity.
pub fn block_influence(
    model: &Decoder,
    samples: &[Vec<u32>],
    measure: InfluenceMeasure,
    progress: &dyn Progress,
) -> Result<Vec<BlockInfluence>> {
    let model = model.valid();
    let n_blocks = model.layers.len();
    let mut task = Task::begin(progress, "measure influence", n_blocks, "blocks")?;
    let batches = batches(samples, TOKENS_AT_ONCE);
    if batches.is_empty() {
        return Err(Error::argument(
            "samples",
            0,
            "at least one, to measure influence",
        ));
    }
    let states = batches
        .iter()
        .map(|(rows, ids)| Ok(model.embed(model.tokens(ids, *rows)?)));
    let mut states = states.collect::<Result<Vec<Tensor<3>>>>()?;
    let expected: Vec<Vec<(usize, u32)>> = batches
        .iter()
        .map(|(rows, ids)| targets(*rows, ids))
        .collect();
    let by_loss = measure == InfluenceMeasure::Loss;
    let whole = if by_loss {
        Some(loss_from(&model, 0, &states, &expected, &task)?)
    } else {
        None
    };
    let mut found = Vec::with_capacity(3 * n_blocks);
    for block in 0..n_blocks {
        let here = found.len();
        for (name, parts) in candidates(block) {
            // What is missing or left out already does nothing.
            if !parts.iter().any(|unit| model.layers[block].runs(*unit)) {
                continue;
            }
            let loss_increase = match whole {
                Some(whole) => {
                    let without = without(&model, block, parts);
                    Some(loss_from(&without, block, &states, &expected, &task)? - whole)
                }
                None => None,
            };
            found.push(BlockInfluence {
                name,
                cosine_change: 0.0,
                loss_increase,
            });
        }
        let changes = cosine_changes(&model, block, &mut states, &task)?;
        for ((name, _), change) in candidates(block).iter().zip(changes) {
            found[here..]
                .iter_mut()
                .filter(|part| part.name == *name)
                .for_each(|part| part.cosine_change = change);
        }
        task.step("")?;
    }
    let key = |part: &BlockInfluence| part.loss_increase.unwrap_or(part.cosine_change);
    if let Some(index) = found.iter().position(|part| !key(part).is_finite()) {
        let tensor = format!("influence of {}", found[index].name);
        return Err(Error::NotFinite {
            tensor,
            index: 0,
            value: key(&found[index]) as f32,
        });
    }
    found.sort_by(|a, b| {
        key(b)
            .partial_cmp(&key(a))
            .unwrap_or(std::cmp::Ordering::Equal)
    });
    Ok(found)
}

/// Runs one block, which takes `states` to the next, and gives the mean change over all tokens by each of the
/// [`candidates`].
fn cosine_changes(
    model: &Decoder,
    block: usize,
    states: &mut [Tensor<3>],
    task: &Task<'_>,
) -> Result<[f64; 3]> {
    let mut sums = [0.0; 3];
    let mut n = 0;
    for state in states {
        task.check()?;
        let mut context = None;
        let mut tap = |kind: LinearKind, x: &Tensor<3>| {
            if kind == LinearKind::O {
                context = Some(x.clone());
            }
        };
        let after = model.block(block, state.clone(), Some(&mut tap));
        // The stream between attention and MLP, which a block does not show.
        let between = match (context, model.layers[block].linear(LinearKind::O)) {
            (Some(context), Some(o)) => state.clone() + o.forward(context),
            _ => state.clone(),
        };
        let pairs = [
            (state.clone(), after.clone()),
            (state.clone(), between.clone()),
            (between, after.clone()),
        ];
        for (sum, (a, b)) in sums.iter_mut().zip(pairs) {
            *sum += cosines(a, b)
                .iter()
                .map(|cosine| 1.0 - f64::from(*cosine))
                .sum::<f64>();
        }
        let [sequences, length, _] = after.dims();
        n += sequences * length;
        *state = after;
    }
    Ok(sums.map(|sum| sum / n as f64))
}

/// Cosine of each token's two vectors; 1 for two that are both zero, which did not change.
fn cosines(a: Tensor<3>, b: Tensor<3>) -> Vec<f32> {
    let dot = host_values((a.clone() * b.clone()).sum_dim(2));
    let (a, b) = (
        host_values(a.square().sum_dim(2)),
        host_values(b.square().sum_dim(2)),
    );
    let both = dot.iter().zip(a.iter().zip(&b));
    both.map(|(dot, (a, b))| {
        if a + b == 0.0 {
            1.0
        } else {
            dot / (a.sqrt() * b.sqrt()).max(f32::MIN_POSITIVE)
        }
    })
    .collect()
}

/// The model that leaves parts of a block out. Weights are shared.
fn without(model: &Decoder, block: usize, parts: &[SubBlock]) -> Decoder {
    let mut model = model.clone();
    parts
        .iter()
        .for_each(|unit| model.layers[block].set_runs(*unit, false));
    model
}

/// Mean loss a target, in nats, where `states` are the inputs of block `first`.
fn loss_from(
    model: &Decoder,
    first: usize,
    states: &[Tensor<3>],
    targets: &[Vec<(usize, u32)>],
    task: &Task<'_>,
) -> Result<f64> {
    let n: usize = targets.iter().map(Vec::len).sum();
    if n == 0 {
        return Err(Error::argument(
            "samples",
            states.len(),
            "at least one of two tokens, to measure a loss",
        ));
    }
    let mut sum = 0.0;
    for (state, targets) in states
        .iter()
        .zip(targets)
        .filter(|(_, targets)| !targets.is_empty())
    {
        task.check()?;
        let last =
            (first..model.layers.len()).fold(state.clone(), |x, block| model.block(block, x, None));
        let (hidden, targets) = model.at_positions(model.norm.forward(last), targets)?;
        sum += f64::from(host_values(model.nll_of_hidden(hidden, &targets))[0]);
    }
    Ok(sum / n as f64)
}
