//! Merges adapters into the base weights, and removes the channels and blocks that the active
//! subnet does not use.
//!
//! Merging a plain adapter fills the zeros of a sparse weight. An adapter trained under
//! SparsePEFT's mask (SQFT, arXiv 2410.03750) keeps each zero, and the merged model computes what
//! training saw. An adapter that was also trained through a quantization grid (QA-SparsePEFT)
//! merges into a quantized weight whose values equal those of the training forward pass, bit for
//! bit. A subnet of smaller widths or depth (LoNAS, LREC-COLING 2024) becomes a smaller plain
//! model; the authors' code does not provide this.

use serde::{Deserialize, Serialize};

use crate::adapter::ElasticLoraLinear;
use crate::arch::BlockDims;
use crate::error::{Error, Result};
use crate::format::PackedMatrix;
use crate::io::hf::DECI_MULTIPLE;
use crate::model::{Block, Decoder, Mlp};
use crate::nn::{host_values, matrix_from_tensor};
use crate::progress::{Progress, Task};
use crate::runtime::{FormatPlan, Model};
use crate::space::SubnetConfig;
use crate::sparsity::Mask;
use crate::supernet::SuperNet;

/// How a merge treats the zeros of the base.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MergeMode {
    /// Fails if a zero would be lost: an adapter on a weight with zeros must have been trained
    /// under its mask (SparsePEFT).
    #[default]
    KeepZeros,
    /// Merges `W + s A B` even if zeros are filled.
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
/// #     vocab_size: 11, hidden_size: 8, intermediate_size: 12, num_hidden_layers: 1,
/// #     num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 16,
/// #     rope_theta: 1e4, rms_norm_eps: 1e-5, tie_word_embeddings: true, bos_token_id: None,
/// #     eos_token_id: None, pad_token_id: None, dtype: DType::F32,
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

/// Report of merging one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[doc(hidden)]
pub struct MergedLayer {
    /// Hugging Face's module path of the layer.
    pub name: String,
    /// Rank of the merged update.
    pub rank: usize,
    /// Fraction of zeros in the base weight, in 0..=1.
    pub sparsity_before: f64,
    /// Fraction of zeros in the merged weight, in 0..=1.
    pub sparsity_after: f64,
    /// Number of zeros in the base weight that are no longer zero. After training through a grid
    /// and under a mask, only zeros that the mask protects count.
    pub zeros_lost: usize,
    /// Bits per code, if the merged weight is quantized.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<u8>,
}

/// Report of a merge.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergeReport {
    /// The layers that had an adapter, in the order of computation.
    pub layers: Vec<MergedLayer>,
    /// Number of zeros lost in all layers.
    pub zeros_lost: usize,
    /// Sizes of the blocks of the merged model.
    #[serde(default)]
    pub blocks: Vec<BlockDims>,
    /// Sub-blocks of the supernet that the merged model leaves out, such as `model.layers.3.mlp`.
    #[serde(default)]
    pub left_out: Vec<String>,
    /// Largest absolute difference between the logits of the unmerged and the merged model on the
    /// sample input; `None` without a sample.
    pub max_logit_difference: Option<f32>,
}

/// A merged model without adapters, and the report of the merge.
#[derive(Clone, Debug)]
pub struct Merged {
    /// The merged model.
    pub model: Decoder,
    /// Report of the merge.
    pub report: MergeReport,
}

impl Merger {
    /// Creates a merger that keeps every zero or fails.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets how zeros are treated.
    pub fn with_mode(mut self, mode: MergeMode) -> Self {
        self.mode = mode;
        self
    }

    /// Sets whether [`extract`](Self::extract) gives blocks without an MLP a zero MLP, 256 channels
    /// wide, which does not change the output. It costs `3 * 256 * d_model` parameters per block.
    /// Use it for readers of the DeciLM format that drop a block without an MLP altogether, as
    /// llama.cpp does. Without it, such a model is written in this crate's own format.
    pub fn with_zero_mlps(mut self, zero_mlps: bool) -> Self {
        self.zero_mlps = zero_mlps;
        self
    }

    /// Merges the active subnet into a new model; `net` is unchanged. The logits of both are
    /// compared on `sample`, a list of token sequences. For a subnet that leaves out channels or
    /// sub-blocks, use [`extract`](Self::extract).
    ///
    /// # Errors
    /// Returns [`Error::ZerosLost`] if [`MergeMode::KeepZeros`] is set and a zero would be filled,
    /// [`Error::NotFinite`] if a merged weight is NaN or infinite, [`Error::OffGrid`] as
    /// [`ElasticLoraLinear::merged_quantized`] does, [`Error::Unsupported`] for a subnet of smaller
    /// widths or depth, and the errors of [`Decoder::tokens`] for `sample`.
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

    /// Merges several subnets and puts them into one model for the runtime, which lists them by
    /// name; the first is also the whole model. Weights that are equal are held once. `net` is
    /// unchanged.
    ///
    /// A SparsePEFT or QA-SparsePEFT supernet runs in this way; the subnets of others can be
    /// switched without merging ([`Model::from_supernet`]).
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] without a subnet or if a name occurs twice, the errors of
    /// [`SuperNet::activate`] and [`merge`](Self::merge), and those of [`Model::from_decoder`].
    pub fn merge_subnets(
        &self,
        net: &SuperNet,
        subnets: &[(String, SubnetConfig)],
        plan: impl Into<FormatPlan>,
        progress: &dyn Progress,
    ) -> Result<Model> {
        let plan = plan.into();
        let mut net = net.clone();
        let mut all: Option<Model> = None;
        for (name, config) in subnets {
            net.activate(config)?;
            let merged = self.merge(&net, &[], progress)?.model;
            let merged = Model::from_decoder(&merged, plan)?;
            let whole = all.unwrap_or_else(|| merged.clone());
            all = Some(whole.with_subnet(name, &merged)?);
        }
        all.ok_or_else(|| Error::argument("subnets", 0, "at least one"))
    }

    /// Extracts the active subnet as a plain model: adapters are merged, and only active channels,
    /// heads and sub-blocks remain. `net` is unchanged. The logits of both are compared on
    /// `sample`, a list of token sequences.
    ///
    /// Empty blocks are removed, and later blocks move up. An attention-only block followed by an
    /// MLP-only block becomes one block. The model's [`HfConfig`](crate::io::HfConfig) is a
    /// standard one if all blocks have the same sizes; see
    /// [`HfConfig::with_blocks`](crate::io::HfConfig::with_blocks).
    ///
    /// # Errors
    /// Returns the errors of [`merge`](Self::merge) except that smaller widths and depths are
    /// supported, and [`Error::InvalidConfig`] if no block remains.
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
        let (blocks, origins, running) = self.reshaped(&model, blocks)?;
        if blocks != model.config().blocks() {
            let config = model.config().with_blocks_from(&blocks, &origins)?;
            model = model.with_layers(running, config);
        }
        let mut max_logit_difference = None;
        let begin = || Task::begin(progress, "compare", sample.len(), "sequences");
        let mut task = (!sample.is_empty()).then(begin).transpose()?;
        for tokens in sample {
            let before = host_values(unmerged.forward(unmerged.tokens(tokens, 1)?));
            let after = host_values(model.forward(model.tokens(tokens, 1)?));
            let difference = before
                .iter()
                .zip(&after)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            max_logit_difference = Some(difference.max(max_logit_difference.unwrap_or(0.0)));
            if let Some(task) = &mut task {
                task.step("")?;
            }
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

    /// Collects the blocks that still run, whose active sizes are in `dims`, joins attention-only
    /// with MLP-only blocks, and fills in missing MLPs if asked to. Also returns the index in
    /// `model` of each block's attention.
    fn reshaped(
        &self,
        model: &Decoder,
        dims: Vec<BlockDims>,
    ) -> Result<(Vec<BlockDims>, Vec<usize>, Vec<Block>)> {
        let (mut joined, mut blocks): (Vec<BlockDims>, Vec<Block>) = (Vec::new(), Vec::new());
        let mut origins = Vec::new();
        let running = dims.into_iter().zip(model.layers.clone()).enumerate();
        let running = running.filter(|(_, (dims, _))| dims.has_attention() || dims.has_mlp());
        for (index, (next, block)) in running {
            let Some(block) = block.running() else {
                continue;
            };
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
            origins.push(index);
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
                block.set_mlp(mlp);
            }
        }
        Ok((joined, origins, blocks))
    }

    /// Merges one layer in place, keeping only active inputs and outputs. Returns `None` if the
    /// layer has no adapter.
    ///
    /// # Errors
    /// Returns the errors of [`merge`](Self::merge). The layer is then unchanged.
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
        // A weight that quantization rounded to 0 and that training may move does not count as a
        // pruned zero.
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
        // Stored as f32: a 16-bit base would round the sum, which is left to the writer.
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
