//! Adapters become part of the weights they ride on, and channels and blocks that a subnet leaves out go.
//!
//! A plain adapter fills a sparse weight's zeros when it is merged; one that was trained under SparsePEFT's mask (SQFT,
//! arXiv 2410.03750) keeps each of them, and the merged model gives what training saw. One that was trained through a grid of
//! integers as well (QA-SparsePEFT) gives a quantized weight, whose every value is that of the training forward, bit for bit. A subnet of smaller widths or depth (LoNAS,
//! LREC-COLING 2024) becomes a plain model that is smaller, which the authors' code does not provide.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::adapter::ElasticLoraLinear;
use crate::arch::BlockDims;
use crate::error::{Error, Result};
use crate::format::PackedMatrix;
use crate::io::hf::DECI_MULTIPLE;
use crate::model::{Block, Decoder, Mlp};
use crate::nn::{RmsNorm, host_values, matrix_from_tensor};
use crate::progress::{Progress, Task};
use crate::sparsity::Mask;
use crate::supernet::SuperNet;

/// What a merge does about the zeros of the base.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MergeMode {
    /// Refuses to lose one: an adapter on a weight with zeros must have been trained under its mask (SparsePEFT).
    #[default]
    KeepZeros,
    /// `W + s A B` whatever becomes of the zeros.
    Dense,
}

/// Merges the active subnet of a supernet into its base.
///
/// ```
/// # use burn::tensor::Device;
/// # use elastic_lora::{io::{DType, hf::{HfConfig, LlamaDims}}, model::Decoder};
/// # use elastic_lora::{progress::Silent, supernet::SuperNetConfig, Merger, SearchSpace, SuperNet};
/// # fn main() -> elastic_lora::Result<()> {
/// # let config = HfConfig::new_llama(&LlamaDims {
/// #     vocab_size: 11, hidden_size: 8, intermediate_size: 12, num_hidden_layers: 1, num_attention_heads: 2,
/// #     num_key_value_heads: 1, max_position_embeddings: 16, rope_theta: 1e4, rms_norm_eps: 1e-5,
/// #     tie_word_embeddings: true, bos_token_id: None, eos_token_id: None, pad_token_id: None, dtype: DType::F32,
/// # })?;
/// # let model = Decoder::init(&config, 1, &Device::flex())?;
/// let space = SearchSpace::per_layer(&model.layer_shapes(), &[4, 2])?;
/// let settings = SuperNetConfig::for_space(&space).with_sparse_peft(true);
/// let net = SuperNet::new(model, space, settings)?;
/// let merged = Merger::new().merge(&net, &[vec![1, 2, 3]], &Silent)?;
/// assert_eq!(merged.report.zeros_lost, 0);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Merger {
    mode: MergeMode,
    zero_mlps: bool,
}

/// What a merge did to one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[doc(hidden)]
pub struct MergedLayer {
    /// Hugging Face's module path.
    pub name: String,
    /// The rank that was merged.
    pub rank: usize,
    /// Share of zeros of the base weight, in 0..=1.
    pub sparsity_before: f64,
    /// Share of zeros of the merged weight, in 0..=1.
    pub sparsity_after: f64,
    /// Zeros of the base that are none any more. Where training went through a grid and under a mask, those that the mask keeps.
    pub zeros_lost: usize,
    /// Bits of a code, where the merged weight is quantized.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<u8>,
}

/// What a merge did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergeReport {
    /// The layers that had an adapter, in the order of computation.
    pub layers: Vec<MergedLayer>,
    /// Zeros lost over all layers.
    pub zeros_lost: usize,
    /// Sizes of the blocks of the merged model.
    #[serde(default)]
    pub blocks: Vec<BlockDims>,
    /// Parts of the supernet's blocks that are left out, as `model.layers.3.mlp`.
    #[serde(default)]
    pub left_out: Vec<String>,
    /// Largest absolute difference between the logits of the unmerged and the merged model on the sample input; absent
    /// without one.
    pub max_logit_difference: Option<f32>,
}

/// A merged model, with no adapters left, and what was done.
#[derive(Clone, Debug)]
pub struct Merged {
    /// The model.
    pub model: Decoder,
    /// What was done.
    pub report: MergeReport,
}

impl Merger {
    /// Keeps every zero, or refuses.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets what is done about zeros.
    pub fn with_mode(mut self, mode: MergeMode) -> Self {
        self.mode = mode;
        self
    }

    /// Sets whether [`extract`](Self::extract) gives a block that is left without an MLP one of zeros, 256 channels wide, which changes
    /// no output. It costs `3 * 256 * d_model` parameters a block, and is for readers of DeciLM's form that take a block
    /// without an MLP for none at all, as llama.cpp does: without it, the model is written in this crate's own form.
    pub fn with_zero_mlps(mut self, zero_mlps: bool) -> Self {
        self.zero_mlps = zero_mlps;
        self
    }

    /// Merges the active subnet, leaving `net` as it is. The logits of both are compared on `sample`, token sequences. A subnet
    /// that leaves out channels or parts of blocks is for [`extract`](Self::extract).
    ///
    /// # Errors
    /// [`Error::ZerosLost`] in [`MergeMode::KeepZeros`] where a zero would be filled;
    /// [`Error::NotFinite`] where a merged weight is not a number; [`Error::OffGrid`] as
    /// [`ElasticLoraLinear::merged_quantized`] says; [`Error::Unsupported`] for a subnet of smaller widths or
    /// depth; those of [`Decoder::tokens`] for `sample`.
    pub fn merge(
        &self,
        net: &SuperNet,
        sample: &[Vec<u32>],
        progress: &dyn Progress,
    ) -> Result<Merged> {
        let narrowed =
            |(_, layer): &(String, &ElasticLoraLinear)| layer.active_dims() != layer.base.dims();
        if let Some((name, _)) = net.model().linears().find(narrowed) {
            return Err(Error::Unsupported {
                what: format!("merging with channels of `{name}` left out, not extracting,"),
            });
        }
        if let Some(unit) = net.model().left_out().first() {
            return Err(Error::Unsupported {
                what: format!("merging with `{unit}` left out, not extracting,"),
            });
        }
        self.extract(net, sample, progress)
    }

    /// The active subnet as a plain model of its own: adapters merged, and only those channels, heads and parts of blocks left that
    /// are active. `net` stays as it is. The logits of both are compared on `sample`, token sequences.
    ///
    /// Blocks of which nothing is left go, and those behind them move up. An attention without its MLP and an MLP without its attention
    /// that come to follow each other become one block. The model's [`HfConfig`](crate::io::HfConfig) is a stock
    /// one where all blocks are alike; see [`HfConfig::with_blocks`](crate::io::HfConfig::with_blocks).
    ///
    /// # Errors
    /// As [`merge`](Self::merge), whatever is left out; [`Error::InvalidConfig`] where nothing is left.
    pub fn extract(
        &self,
        net: &SuperNet,
        sample: &[Vec<u32>],
        progress: &dyn Progress,
    ) -> Result<Merged> {
        let unmerged = net.eval_model();
        let (mut model, left_out) = (unmerged.clone(), unmerged.left_out());
        let mut layers = Vec::new();
        let running: Vec<String> = model
            .linears()
            .map(|(name, _)| name)
            .filter(|name| unmerged.runs(name))
            .collect();
        let mut task = Task::begin(progress, "merge", running.len(), "layers")?;
        for name in &running {
            let Some(layer) = model.linear_mut(name) else {
                continue;
            };
            if let Some(done) = self.merge_layer(name, layer)? {
                layers.push(done);
            } else if layer.active_dims() != layer.base.dims() {
                let weight = matrix_from_tensor(layer.base.active_weight());
                layer.base = layer.base.replaced(&weight)?;
            }
            task.step("")?;
        }
        drop(task);
        let blocks: Vec<BlockDims> = net.block_dims(net.active())?;
        let blocks: Vec<BlockDims> = blocks
            .into_iter()
            .filter(|b| b.has_attention() || b.has_mlp())
            .collect();
        let (blocks, running) = self.reshaped(&model, blocks)?;
        if blocks != model.config().blocks() {
            let config = model.config().with_blocks(&blocks)?;
            model = model.with_layers(running, config);
        }
        let mut max_logit_difference = None;
        let mut task = Task::begin(progress, "compare", sample.len(), "sequences")?;
        for tokens in sample {
            let before = host_values(unmerged.forward(unmerged.tokens(tokens, 1)?));
            let after = host_values(model.forward(model.tokens(tokens, 1)?));
            let difference = before
                .iter()
                .zip(&after)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            max_logit_difference = Some(difference.max(max_logit_difference.unwrap_or(0.0)));
            task.step("")?;
        }
        let zeros_lost = layers.iter().map(|layer| layer.zeros_lost).sum();
        Ok(Merged {
            model,
            report: MergeReport {
                layers,
                zeros_lost,
                blocks,
                left_out,
                max_logit_difference,
            },
        })
    }

    /// The running blocks of a model, whose sizes are `dims`, with halves joined and missing MLPs filled in.
    fn reshaped(
        &self,
        model: &Decoder,
        dims: Vec<BlockDims>,
    ) -> Result<(Vec<BlockDims>, Vec<Block>)> {
        let (mut joined, mut blocks): (Vec<BlockDims>, Vec<Block>) = (Vec::new(), Vec::new());
        for (next, block) in dims
            .into_iter()
            .zip(model.layers.clone().into_iter().filter_map(Block::running))
        {
            match joined.last_mut().zip(blocks.pop()) {
                Some((last, before)) if !last.has_mlp() && !next.has_attention() => {
                    last.d_mlp = next.d_mlp;
                    blocks.push(before.joined(block));
                    continue;
                }
                Some((_, before)) => blocks.push(before),
                None => {}
            }
            joined.push(next);
            blocks.push(block);
        }
        if self.zero_mlps {
            let (config, device) = (model.config(), model.device());
            for (dims, block) in joined
                .iter_mut()
                .zip(&mut blocks)
                .filter(|(dims, _)| !dims.has_mlp())
            {
                dims.d_mlp = DECI_MULTIPLE;
                let mlp = Mlp::zeros(config.arch(), dims.d_mlp, &device)?;
                let gains = Tensor::ones([config.hidden_size()], &device);
                block.set_mlp(RmsNorm::from_tensor(gains, config.rms_norm_eps()), mlp);
            }
        }
        Ok((joined, blocks))
    }

    /// Merges one layer, in place; nothing where it has no adapter. Of inputs and outputs, those that are active are left.
    ///
    /// # Errors
    /// As [`merge`](Self::merge); the layer is then as before.
    fn merge_layer(
        &self,
        name: &str,
        layer: &mut ElasticLoraLinear,
    ) -> Result<Option<MergedLayer>> {
        let Some(adapter) = &layer.adapter else {
            return Ok(None);
        };
        let before = matrix_from_tensor(layer.base.active_weight());
        let after = matrix_from_tensor(layer.merged_weight());
        if let Some(index) = after.as_slice().iter().position(|v| !v.is_finite()) {
            return Err(Error::NotFinite {
                tensor: name.to_string(),
                index,
                value: after.as_slice()[index],
            });
        }
        let quantized = layer.merged_quantized()?;
        let kept = Mask::from_nonzero(&before);
        // A weight that quantizing rounded to 0, and that training may move, is no zero of a pruned weight.
        let movable = adapter.active_mask().filter(|_| quantized.is_some());
        let movable = movable.map(|mask| Mask::from_nonzero(&matrix_from_tensor(mask.float())));
        let zero_kept = |i: usize, j: usize| {
            !kept.get(i, j) && movable.as_ref().is_none_or(|mask| !mask.get(i, j))
        };
        let report = MergedLayer {
            name: name.to_string(),
            rank: adapter.active_rank(),
            sparsity_before: before.sparsity(),
            sparsity_after: after.sparsity(),
            zeros_lost: (0..after.rows())
                .map(|i| {
                    let row = after.row(i).iter().enumerate();
                    row.filter(|(j, v)| **v != 0.0 && zero_kept(i, *j)).count()
                })
                .sum(),
            bits: quantized.as_ref().map(|quantized| quantized.parts().bits),
        };
        if self.mode == MergeMode::KeepZeros && report.zeros_lost > 0 {
            return Err(Error::ZerosLost {
                layer: report.name,
                lost: report.zeros_lost,
            });
        }
        // A base of 16 bits would round the sum: that is for whoever writes it.
        layer.base = match &quantized {
            Some(quantized) => layer
                .base
                .replaced_quantized(PackedMatrix::new(quantized))?,
            None => layer.base.replaced(&after)?,
        };
        layer.adapter = None;
        Ok(Some(report))
    }
}
