//! Runs a model over calibration data block by block, and gives each linear layer statistics of its
//! input.
//!
//! Layers with the same input share a statistic: queries, keys and values have one Hessian. As in
//! Wanda (arXiv 2306.11695), a block's statistics are taken with its original weights, on the
//! outputs of the preceding blocks, which are already changed. Memory holds the statistics of one
//! block at a time and the hidden states of all samples.

mod channels;
mod influence;
mod input;
mod kept;
mod order;
mod prune;
mod quantize;
mod taylor;

pub use channels::{BlockScores, ChannelScore};
pub use influence::{BlockInfluence, InfluenceMeasure, block_influence};
pub use order::{BlockOrder, ChannelOrder, channel_scores, sort_channels};
pub use prune::{PruneConfig, PrunedLayer, prune_model, prune_model_keeping};
pub use quantize::{QuantizeConfig, QuantizeMethod, quantize_model, quantize_model_keeping};
pub use taylor::{TaylorConfig, taylor_scores};

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::Tensor;

use crate::arch::LinearKind;
use crate::error::{Error, Result};
use crate::model::Decoder;
use crate::nn::{BaseLinear, host_values};
use crate::progress::{Progress, Task};

use kept::Kept;

/// Number of tokens whose hidden states go through a block at once.
const TOKENS_AT_ONCE: usize = 2048;

/// Walks the blocks of `model` over `samples`. For each block, `observe` is called with every input
/// of its linear layers (`[sequences, seq, d_input]`, several times per layer). Then `change` is
/// called for each layer with the statistic of its input. It may change the layer, and the
/// statistic for the next layer with the same input. The output of the changed block is the input
/// of the next one.
///
/// Without samples, `observe` is not called, and `change` receives the empty statistic from `new`.
/// Progress counts layers under the name `label`.
///
/// # Errors
/// Returns the errors of [`Decoder::tokens`] for a sample outside the vocabulary or context, the
/// first error of a closure, and [`Error::Interrupted`](crate::Error::Interrupted). On an error the
/// model may be partly changed.
#[doc(hidden)]
pub fn walk_blocks<S>(
    model: &mut Decoder,
    samples: &[Vec<u32>],
    label: &str,
    new: impl Fn(usize) -> S,
    observe: impl FnMut(&mut S, &Tensor<3>) -> Result<()>,
    change: impl FnMut(&str, &mut BaseLinear, &mut S) -> Result<()>,
    progress: &dyn Progress,
) -> Result<()> {
    walk(
        model,
        samples,
        (label, None),
        new,
        observe,
        change,
        progress,
    )
}

/// Same as [`walk_blocks`]. Blocks that are kept are taken from there, and those that are finished
/// are kept.
fn walk<S>(
    model: &mut Decoder,
    samples: &[Vec<u32>],
    (label, kept): (&str, Option<&Kept<'_>>),
    new: impl Fn(usize) -> S,
    mut observe: impl FnMut(&mut S, &Tensor<3>) -> Result<()>,
    mut change: impl FnMut(&str, &mut BaseLinear, &mut S) -> Result<()>,
    progress: &dyn Progress,
) -> Result<()> {
    // The order in which the layers of a block are changed: by the input that they share.
    let inputs = LinearKind::ALL.into_iter();
    let inputs: BTreeSet<LinearKind> = inputs.filter(|kind| kind.input() == *kind).collect();
    let kinds = || {
        inputs.iter().flat_map(|input| {
            let kinds = LinearKind::ALL.into_iter();
            kinds.filter(move |kind| kind.input() == *input)
        })
    };
    let mut task = Task::begin(progress, label, model.linears().count(), "layers")?;
    let mut states = embed_samples(model, samples)?;
    let first = match kept {
        Some(kept) => kept.get_states(&mut states)?,
        None => 0,
    };
    for block in 0..model.layers.len() {
        task.check()?;
        let found = match kept {
            Some(kept) => kept.get(model, block, kinds())?,
            None => false,
        };
        if found {
            let layers = kinds().filter(|kind| model.layers[block].linear(*kind).is_some());
            task.advance(layers.count(), "");
            if block >= first {
                run_block(model, block, &mut states, &task)?;
            }
            continue;
        }
        if block < first {
            return Err(Error::InvalidState {
                what: "going on with kept blocks",
                reason: format!("block {block} is missing; remove the folder to begin again"),
            });
        }
        let mut statistics: BTreeMap<LinearKind, S> = LinearKind::ALL
            .into_iter()
            .filter(|kind| kind.input() == *kind)
            .filter_map(|kind| Some((kind, new(model.layers[block].linear(kind)?.base.dims()[0]))))
            .collect();
        let mut failure = None;
        for state in &states {
            task.check()?;
            let mut tap = |kind: LinearKind, x: &Tensor<3>| {
                if let (None, Some(statistic)) = (&failure, statistics.get_mut(&kind)) {
                    failure = observe(statistic, x)
                        .map_err(|error| input::in_layer(&kind.name(block), error))
                        .err();
                }
            };
            model.block(block, state.clone(), Some(&mut tap));
        }
        if let Some(error) = failure {
            return Err(error);
        }
        for kind in kinds() {
            let statistic = statistics.get_mut(&kind.input());
            if let (Some(layer), Some(statistic)) =
                (model.layers[block].linear_mut(kind), statistic)
            {
                change(&kind.name(block), &mut layer.base, statistic)?;
                task.step("")?;
            }
        }
        if let Some(kept) = kept {
            kept.put(model, block)?;
        }
        run_block(model, block, &mut states, &task)?;
        if let Some(kept) = kept.filter(|_| !states.is_empty()) {
            kept.put_states(block, &states)?;
        }
    }
    kept.map_or(Ok(()), Kept::finish)
}

/// Replaces the inputs of a block by its outputs.
fn run_block(
    model: &Decoder,
    block: usize,
    states: &mut [Tensor<3>],
    task: &Task<'_>,
) -> Result<()> {
    for state in states {
        task.check()?;
        *state = model.block(block, state.clone(), None);
    }
    Ok(())
}

/// The embeddings of the samples. Samples of the same length share tensors of a few thousand
/// tokens.
fn embed_samples(model: &Decoder, samples: &[Vec<u32>]) -> Result<Vec<Tensor<3>>> {
    batches(samples, TOKENS_AT_ONCE)
        .into_iter()
        .map(|(rows, ids)| Ok(model.embed(model.tokens(&ids, rows)?)))
        .collect()
}

/// Batches the non-empty samples of the same length, with about `tokens` tokens in a batch. Returns
/// the number of rows and the token ids of each batch.
fn batches(samples: &[Vec<u32>], tokens: usize) -> Vec<(usize, Vec<u32>)> {
    let mut by_length: BTreeMap<usize, Vec<&Vec<u32>>> = BTreeMap::new();
    for sample in samples.iter().filter(|sample| !sample.is_empty()) {
        by_length.entry(sample.len()).or_default().push(sample);
    }
    let mut batches = Vec::new();
    for (length, group) in by_length {
        for chunk in group.chunks((tokens / length).max(1)) {
            batches.push((
                chunk.len(),
                chunk
                    .iter()
                    .flat_map(|sample| sample.iter().copied())
                    .collect(),
            ));
        }
    }
    batches
}

/// The targets of a batch of whole samples: each token is predicted from those before it. In the
/// form that [`Decoder::nll_sum`] takes.
fn targets(rows: usize, ids: &[u32]) -> Vec<(usize, u32)> {
    let length = ids.len() / rows;
    (0..ids.len())
        .filter(|i| i % length > 0)
        .map(|i| (i - 1, ids[i]))
        .collect()
}

/// Sums of the squares of each input column over all tokens of `x`, `[sequences, seq, d_input]`.
fn column_squares(x: &Tensor<3>) -> Vec<f32> {
    let d_input = x.dims()[2];
    let sums: Tensor<2> = x.clone().square().reshape([-1, d_input as i32]).sum_dim(0);
    host_values(sums)
}
