//! Importance order: scores MLP channels and key/value groups, and sorts them so that prefixes keep
//! the most important ones.
//!
//! LoNAS (in arXiv 2501.16372) cuts unsorted prefixes. Sorting first follows Once-for-All (arXiv
//! 1908.09791) and MultiPruner. Sorting is lossless, so it costs only the calibration.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::channels::{
    BlockScores, ChannelPart, ChannelScore, activation_scores, importance_order, l1_scores,
    l2_scores,
};
use super::taylor::{TaylorConfig, taylor_scores};
use super::{column_squares, embed_samples};
use crate::arch::LinearKind;
use crate::error::{Error, Result};
use crate::linalg::Matrix;
use crate::model::{Block, Decoder};
use crate::progress::{Progress, Task};
use crate::sparsity::InputNorms;

/// The old positions of a block's channels: position `i` holds the channel that was at element `i`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[doc(hidden)]
pub struct BlockOrder {
    /// Old positions of the MLP channels.
    pub mlp: Vec<usize>,
    /// Old positions of the key/value heads with their query heads.
    pub kv_groups: Vec<usize>,
}

/// Record of a reordering, with permutations for each block, which traces a channel of the new
/// model to the old one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelOrder {
    /// The score that the order was made by.
    pub score: ChannelScore,
    /// The orders of the blocks, from first to last.
    pub blocks: Vec<BlockOrder>,
}

impl ChannelOrder {
    /// The order that undoes this one.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if the record does not hold permutations, for example
    /// after reading it from a file.
    pub fn inverse(&self) -> Result<Self> {
        let blocks = self.blocks.iter().map(|block| {
            Ok(BlockOrder {
                mlp: invert(&block.mlp)?,
                kv_groups: invert(&block.kv_groups)?,
            })
        });
        Ok(Self {
            score: self.score,
            blocks: blocks.collect::<Result<_>>()?,
        })
    }

    /// Puts the channels of a model in this order.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if the model has another number of blocks, and the errors
    /// of [`Decoder::permute_mlp`] and [`Decoder::permute_heads`]. The model is then unchanged.
    pub fn apply(&self, model: &mut Decoder) -> Result<()> {
        if self.blocks.len() != model.layers.len() {
            return Err(Error::ShapeMismatch {
                what: "blocks of a channel order".into(),
                expected: vec![model.layers.len()],
                found: vec![self.blocks.len()],
            });
        }
        // Works on a clone, which shares the weights, so that a wrong order in a later block
        // changes nothing.
        let mut moved = model.clone();
        for (index, block) in self.blocks.iter().enumerate() {
            moved.permute_mlp(index, &block.mlp)?;
            moved.permute_heads(index, &block.kv_groups)?;
        }
        *model = moved;
        Ok(())
    }
}

fn invert(order: &[usize]) -> Result<Vec<usize>> {
    let mut inverse = vec![None; order.len()];
    for (place, channel) in order.iter().enumerate() {
        match inverse.get_mut(*channel) {
            Some(slot @ None) => *slot = Some(place),
            _ => {
                return Err(Error::argument(
                    "channel order",
                    channel,
                    format!("each of 0..{} once", order.len()),
                ));
            }
        }
    }
    Ok(inverse.into_iter().flatten().collect())
}

/// Sorts the MLP channels and key/value groups of every block by importance, most important first,
/// and returns their old positions. Logits are unchanged except for the rounding of sums. Equally
/// important channels keep their order.
///
/// All scores are computed before any channel is moved.
///
/// # Errors
/// Returns the errors of [`channel_scores`]. The model is then unchanged.
pub fn sort_channels(
    model: &mut Decoder,
    samples: &[Vec<u32>],
    score: ChannelScore,
    progress: &dyn Progress,
) -> Result<ChannelOrder> {
    let scores = channel_scores(model, samples, score, progress)?;
    let blocks = scores.iter().map(|block| {
        Ok(BlockOrder {
            mlp: importance_order(&block.mlp)?,
            kv_groups: importance_order(&block.kv_groups)?,
        })
    });
    let order = ChannelOrder {
        score,
        blocks: blocks.collect::<Result<_>>()?,
    };
    order.apply(model)?;
    Ok(order)
}

/// Scores every block's MLP channels and key/value groups. A channel's weights are its rows of gate
/// and up and its column of down; a group's weights are its rows of q, k and v and its columns of
/// o. Biases are left out. [`ChannelScore::Activation`] uses only down and o, and
/// [`ChannelScore::Taylor`] is described at [`taylor_scores`]. A missing sub-block has no scores;
/// in a disabled one, scores that need data are all 0.
///
/// The token sequences in `samples` are the calibration data, if the score needs any.
///
/// # Errors
/// Returns [`Error::HasAdapter`] for a model with adapters, [`Error::Unsupported`] if a layer has
/// only part of its channels active, [`Error::InvalidArgument`] if the score needs samples and
/// there are none, the errors of [`Decoder::tokens`] for a sample outside the vocabulary or
/// context, and [`Error::NotFinite`] if the model computes NaN or an infinity.
#[doc(hidden)]
pub fn channel_scores(
    model: &Decoder,
    samples: &[Vec<u32>],
    score: ChannelScore,
    progress: &dyn Progress,
) -> Result<Vec<BlockScores>> {
    model.check_reorderable()?;
    if score == ChannelScore::Taylor {
        return taylor_scores(model, samples, &TaylorConfig::default(), progress);
    }
    let model = model.valid();
    if score.needs_calibration() && samples.iter().all(|sample| sample.is_empty()) {
        return Err(Error::argument(
            "samples",
            0,
            format!("the {score} score needs calibration samples"),
        ));
    }
    let n_blocks = model.layers.len();
    let mut task = Task::begin(progress, "score channels", n_blocks, "blocks")?;
    let mut states = if score.needs_calibration() {
        embed_samples(&model, samples)?
    } else {
        Vec::new()
    };
    let mut scores = Vec::with_capacity(n_blocks);
    for (index, block) in model.layers.iter().enumerate() {
        scores.push(match score {
            ChannelScore::Activation => {
                let norms = output_norms(&model, index, &mut states, &task)?;
                let scores = |kind: LinearKind, n_channels: usize| match (
                    block.linear(kind),
                    norms.get(&kind),
                ) {
                    (Some(layer), Some(norms)) => {
                        let weight = layer.base.to_matrix();
                        activation_scores(&weight, weight.cols() / n_channels, norms)
                    }
                    _ => Ok(Vec::new()),
                };
                BlockScores {
                    mlp: scores(LinearKind::Down, block.n_mlp_channels())?,
                    kv_groups: scores(LinearKind::O, block.n_kv_groups())?,
                }
            }
            ChannelScore::L2 => weight_scores(block, l2_scores)?,
            _ => weight_scores(block, l1_scores)?,
        });
        task.step("")?;
    }
    Ok(scores)
}

/// Computes the scores that need no data.
fn weight_scores(
    block: &Block,
    score: impl Fn(&[ChannelPart<'_>]) -> Result<Vec<f64>>,
) -> Result<BlockScores> {
    let of = |writers: &[LinearKind], reader: LinearKind, n_channels: usize| -> Result<Vec<f64>> {
        let weight = |kind: &LinearKind| Some(block.linear(*kind)?.base.to_matrix());
        let Some(read) = weight(&reader) else {
            return Ok(Vec::new());
        };
        let written: Vec<Matrix> = writers.iter().filter_map(weight).collect();
        let mut parts = vec![ChannelPart::columns(&read, read.cols() / n_channels)?];
        for weight in &written {
            parts.push(ChannelPart::rows(weight, weight.rows() / n_channels)?);
        }
        score(&parts)
    };
    Ok(BlockScores {
        mlp: of(
            &[LinearKind::Gate, LinearKind::Up],
            LinearKind::Down,
            block.n_mlp_channels(),
        )?,
        kv_groups: of(
            &[LinearKind::Q, LinearKind::K, LinearKind::V],
            LinearKind::O,
            block.n_kv_groups(),
        )?,
    })
}

/// Runs one block, which replaces `states` by its output, and returns the norms of the inputs of o
/// and of down, if present.
fn output_norms(
    model: &Decoder,
    block: usize,
    states: &mut [Tensor<3>],
    task: &Task<'_>,
) -> Result<BTreeMap<LinearKind, InputNorms>> {
    let mut norms: BTreeMap<LinearKind, InputNorms> = [LinearKind::O, LinearKind::Down]
        .into_iter()
        .filter_map(|kind| {
            Some((
                kind,
                InputNorms::new(model.layers[block].linear(kind)?.base.dims()[0]),
            ))
        })
        .collect();
    let mut failure = None;
    for state in states {
        task.check()?;
        let mut tap = |kind: LinearKind, x: &Tensor<3>| {
            if let (None, Some(norms)) = (&failure, norms.get_mut(&kind)) {
                failure = norms.update_sums(&column_squares(x), x.dims()[0]).err();
            }
        };
        *state = model.block(block, state.clone(), Some(&mut tap));
    }
    match failure {
        Some(error) => Err(error),
        None => Ok(norms),
    }
}
