//! Runs a model over calibration data block by block, and gives each linear layer statistics of its
//! input.
//!
//! Layers with the same input share a statistic: queries, keys and values have one Hessian. As in
//! Wanda (arXiv 2306.11695), a block's statistics are taken with its original weights, on the
//! outputs of the preceding blocks, which are already changed. Memory holds the statistics of one
//! block at a time and the hidden states of all samples; of a model that is changed from files to
//! files ([`Streaming`]), it holds one block, and the hidden states are in a file.

mod channels;
mod influence;
mod input;
mod kept;
mod order;
mod place;
mod prune;
mod quantize;
mod states;
mod stream;
mod taylor;

pub use channels::{BlockScores, ChannelScore};
pub use influence::{BlockInfluence, InfluenceMeasure, block_influence};
pub use order::{BlockOrder, ChannelOrder, channel_scores, sort_channels};
pub use prune::{PruneConfig, PrunedLayer, prune_model, prune_model_keeping};
pub use quantize::{QuantizeConfig, QuantizeMethod, quantize_model, quantize_model_keeping};
pub use stream::{StreamNeeds, Streaming};
pub use taylor::{TaylorConfig, taylor_scores};

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::Tensor;

use crate::arch::LinearKind;
use crate::error::Result;
use crate::model::Decoder;
use crate::nn::{BaseLinear, host_values};
use crate::progress::{Progress, Task};

use place::{Found, InMemory, Place};

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
    let mut place = InMemory::new(model, None);
    walk(&mut place, samples, label, new, observe, change, progress)
}

/// Same as [`walk_blocks`], for a model and hidden states in any [`Place`].
fn walk<S>(
    place: &mut dyn Place,
    samples: &[Vec<u32>],
    label: &str,
    new: impl Fn(usize) -> S,
    mut observe: impl FnMut(&mut S, &Tensor<3>) -> Result<()>,
    mut change: impl FnMut(&str, &mut BaseLinear, &mut S) -> Result<()>,
    progress: &dyn Progress,
) -> Result<()> {
    let mut task = Task::begin(progress, label, place.n_layers(), "layers")?;
    place.begin(samples, &task)?;
    for block in 0..place.model().layers.len() {
        task.check()?;
        let found = place.enter(block)?;
        if found != Found::Open {
            let arch = place.model().config().arch();
            let layers = arch.block_linears(block).count();
            task.advance(layers, "");
        }
        match found {
            Found::Passed => continue,
            Found::Changed => {
                run_block(place, block, &task)?;
                continue;
            }
            Found::Open => {}
        }
        let mut statistics: BTreeMap<LinearKind, S> = LinearKind::ALL
            .into_iter()
            .filter(|kind| kind.input() == *kind)
            .filter_map(|kind| {
                let layer = place.model().layers[block].linear(kind)?;
                Some((kind, new(layer.base.dims()[0])))
            })
            .collect();
        let mut failure = None;
        for batch in 0..place.n_batches() {
            task.check()?;
            let mut tap = |kind: LinearKind, x: &Tensor<3>| {
                if let (None, Some(statistic)) = (&failure, statistics.get_mut(&kind)) {
                    failure = observe(statistic, x)
                        .map_err(|error| input::in_layer(&kind.name(block), error))
                        .err();
                }
            };
            let states = place.states(batch)?;
            place.model().block(block, states, Some(&mut tap));
        }
        if let Some(error) = failure {
            return Err(error);
        }
        for kind in kinds() {
            let statistic = statistics.get_mut(&kind.input());
            if let (Some(layer), Some(statistic)) =
                (place.model_mut().layers[block].linear_mut(kind), statistic)
            {
                change(&kind.name(block), &mut layer.base, statistic)?;
                task.step("")?;
            }
        }
        drop(statistics);
        place.changed(block)?;
        run_block(place, block, &task)?;
        place.leave(block)?;
    }
    place.finish()
}

/// The linear layers of a block in the order in which they are changed: by the input that they
/// share.
fn kinds() -> impl Iterator<Item = LinearKind> {
    let inputs = LinearKind::ALL.into_iter();
    let inputs: BTreeSet<LinearKind> = inputs.filter(|kind| kind.input() == *kind).collect();
    inputs.into_iter().flat_map(|input| {
        let kinds = LinearKind::ALL.into_iter();
        kinds.filter(move |kind| kind.input() == input)
    })
}

/// Replaces the inputs of a block by its outputs, unless it is the last one.
fn run_block(place: &mut dyn Place, block: usize, task: &Task<'_>) -> Result<()> {
    if block + 1 == place.model().layers.len() {
        return Ok(());
    }
    for batch in 0..place.n_batches() {
        task.check()?;
        let states = place.states(batch)?;
        let states = place.model().block(block, states, None);
        place.set_states(batch, states)?;
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
