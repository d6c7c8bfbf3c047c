//! Importance order: MLP channels and key/value groups are scored and moved so that prefixes keep what matters.
//!
//! LoNAS (in arXiv 2501.16372) cuts unsorted prefixes; sorting first is what Once-for-All (arXiv 1908.09791) and MultiPruner
//! do. The move is lossless, so it costs nothing but the calibration.

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

/// Where a block's channels were: place `i` holds what was at element `i`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[doc(hidden)]
pub struct BlockOrder {
    /// Of the MLP's channels.
    pub mlp: Vec<usize>,
    /// Of the key/value heads with their query heads.
    pub kv_groups: Vec<usize>,
}

/// The record of a reordering, a permutation a block: with it a channel of the new model is traced to the old one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelOrder {
    /// What it was made by.
    pub score: ChannelScore,
    /// First block to last.
    pub blocks: Vec<BlockOrder>,
}

impl ChannelOrder {
    /// The order that undoes this one.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a record that holds no permutations (one that was read from a file, say).
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
    /// [`Error::ShapeMismatch`] where the model has another number of blocks; those of [`Decoder::permute_mlp`] and
    /// [`Decoder::permute_heads`]. The model is then unchanged.
    pub fn apply(&self, model: &mut Decoder) -> Result<()> {
        if self.blocks.len() != model.layers.len() {
            return Err(Error::ShapeMismatch {
                what: "blocks of a channel order".into(),
                expected: vec![model.layers.len()],
                found: vec![self.blocks.len()],
            });
        }
        // On a clone, which shares the weights, so that an order that is wrong further on changes nothing.
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

/// Puts the MLP channels and the key/value groups of every block in the order of their importance, most important first,
/// and returns where each was. Logits stay equal but for the rounding of sums; equally important channels keep their order.
///
/// All scores are those of the model as it stands.
///
/// # Errors
/// Those of [`channel_scores`]. The model is then unchanged.
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

/// The scores of every block's MLP channels and key/value groups: for each channel over its rows of gate and up and its column
/// of down, for each group over its rows of q, k and v and its columns of o; biases are left out. [`ChannelScore::Activation`]
/// goes by down and o alone, [`ChannelScore::Taylor`] as [`taylor_scores`] says. A part that a block lacks has no scores; of one
/// that is left out for the time being, those that need data are all 0.
///
/// Token sequences in `samples` are the calibration data, where the score needs any.
///
/// # Errors
/// [`Error::HasAdapter`]; [`Error::Unsupported`] while a layer has less than all of its channels active;
/// [`Error::InvalidArgument`] for a score that needs samples without any; those of
/// [`Decoder::tokens`] for a sample outside vocabulary or context; [`Error::NotFinite`] where the model gives NaN or an
/// infinity.
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

/// Scores that need no data.
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

/// Runs one block, which takes `states` to the next, and gives the norms of the inputs of o and of down, where it has them.
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
