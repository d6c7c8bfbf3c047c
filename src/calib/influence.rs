//! The influence of each block, and of each block's attention and MLP, on the residual stream and
//! on the loss. The parts with the least influence are left out first if depth is elastic.
//!
//! The first measure is ShortGPT's block influence (arXiv 2403.03853), `1 - mean cosine` of a
//! part's input and output, which takes one pass. Departure: it is also measured for attention and
//! MLP separately.

use burn::module::Module;
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::{TOKENS_AT_ONCE, batches, targets};
use crate::arch::{LinearKind, SubBlock};
use crate::error::{Error, Result};
use crate::model::Decoder;
use crate::nn::host_values;
use crate::progress::{Progress, Task};

/// The candidates for leaving out in block `block`: names and the sub-blocks that they cover. The
/// whole block comes first.
fn candidates(block: usize) -> [(String, &'static [SubBlock]); 3] {
    [
        (format!("model.layers.{block}"), &SubBlock::ALL),
        (SubBlock::Attention.name(block), &[SubBlock::Attention]),
        (SubBlock::Mlp.name(block), &[SubBlock::Mlp]),
    ]
}

/// The measure by which parts are ranked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InfluenceMeasure {
    /// Change of the residual stream. Takes one pass over the samples.
    #[default]
    Cosine,
    /// Increase of the loss without the part. Takes a pass over the following blocks for each part,
    /// so the time is quadratic in the number of blocks.
    Loss,
}

/// Influence of a block, or of its attention or MLP.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockInfluence {
    /// Hugging Face's module path, such as `model.layers.3` or `model.layers.3.self_attn`.
    /// [`SubBlock::parse`] reads it, and groups of elastic depth contain such names.
    pub name: String,
    /// 1 minus the cosine of the residual stream before and after the part, averaged over tokens,
    /// in 0..=2.
    pub cosine_change: f64,
    /// Increase of the loss without the part, in nats per token, if it was measured.
    pub loss_increase: Option<f64>,
}

/// Measures the influence of each block and of its attention and MLP on token sequences. Returns
/// them with the most influential first; equal ones are in the order of computation, with the whole
/// block before its sub-blocks. Parts that are missing or already disabled are not listed.
///
/// An active adapter counts as part of its layer.
///
/// # Errors
/// Returns [`Error::InvalidArgument`] if there are no samples, or for [`InfluenceMeasure::Loss`] if
/// no sample has two tokens; the errors of [`Decoder::tokens`] for a sample outside the vocabulary
/// or context; and [`Error::NotFinite`] if the model computes NaN or an infinity.
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
            // A part that is missing or already disabled does nothing.
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

/// Runs one block, which replaces `states` by its output, and returns the mean change over all
/// tokens by each of the [`candidates`].
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
        // The residual stream between attention and MLP, which a block does not expose.
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

/// Cosine of each token's two vectors. Two zero vectors count as unchanged, with cosine 1.
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

/// The model with some sub-blocks of a block disabled. The weights are shared.
fn without(model: &Decoder, block: usize, parts: &[SubBlock]) -> Decoder {
    let mut model = model.clone();
    parts
        .iter()
        .for_each(|unit| model.layers[block].set_runs(*unit, false));
    model
}

/// Mean loss per target, in nats, if `states` are the inputs of block `first`.
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
