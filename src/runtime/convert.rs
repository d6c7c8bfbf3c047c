//! Derives models from models: in other weight formats, cut to a subnet, or merged.

use crate::arch::{Architecture, BlockDims, LinearKind};
use crate::error::{Error, Result};
use crate::format::{QuantizedMatrix, StoredMatrix, WeightFormat};
use crate::linalg::Matrix;
use crate::space::LoraConfig;

use super::build::{named, reformat};
use super::model::{Model, ModelParts, SubnetParts, Weights};
use super::plan::{FormatPlan, encode};
use super::weights::{AdapterWeights, LayerWeights, Weight};

impl Model {
    /// Returns the same model with its weights stored in other formats.
    ///
    /// Quantized weights keep their codes and groups when they change between dense and sparse
    /// storage, whatever group size the plan names, and are dequantized for a float format. Float weights are quantized by rounding to nearest, or
    /// rounded if the new format has fewer bits.
    ///
    /// # Errors
    /// Returns [`Error::Unsupported`] if codes would have to change their number of bits, or if a format
    /// cannot hold the values: too many nonzeros in a group of an N:M pattern, or a value out of
    /// range.
    pub fn with_format(&self, plan: impl Into<FormatPlan>) -> Result<Self> {
        Ok(self.with_weights(reformat(&self.weights, &plan.into())?))
    }

    /// Returns a subnet as a model of its own, without the parts that the subnet leaves out.
    ///
    /// Weights keep their formats and codes. Adapters are cut to their active ranks and stay
    /// separate; [`merged`](Self::merged) adds them to the weights.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if there is no such subnet, [`Error::InvalidConfig`] if
    /// nothing is left of the model, and [`Error::Unsupported`] if the subnet uses only part of the
    /// inputs of a weight whose quantization groups are not in column order.
    pub fn extract(&self, subnet: usize) -> Result<Self> {
        let (weights, shape) = (&*self.weights, self.shape(subnet)?);
        let left = |dims: &BlockDims| dims.has_attention() || dims.has_mlp();
        let blocks: Vec<BlockDims> = shape.blocks.iter().copied().filter(left).collect();
        let config = if blocks == weights.config.blocks() {
            weights.config.clone()
        } else {
            let kept = shape.blocks.iter().enumerate();
            let kept = kept.filter(|(_, dims)| left(dims));
            let origins: Vec<usize> = kept.map(|(index, _)| index).collect();
            weights.config.with_blocks_from(&blocks, &origins)?
        };
        let mut layers = Vec::new();
        for (index, layer) in weights.layers.iter().enumerate() {
            let [inputs, outputs] = shape.dims(weights, index);
            let head = layer.name == Architecture::HEAD_LAYER;
            if inputs == 0 || outputs == 0 || head && config.tie_word_embeddings() {
                continue;
            }
            let name = match LinearKind::parse(&layer.name) {
                Some((block, kind)) => kind.name(
                    shape.blocks[..block]
                        .iter()
                        .filter(|dims| left(dims))
                        .count(),
                ),
                None => layer.name.clone(),
            };
            let part = |weight: &Weight, suffix: &str, rows: usize, cols: usize| {
                let tensor = format!("{name}.{suffix}");
                Ok::<_, Error>(Weight::made(
                    &*tensor,
                    prefix(&tensor, weight.get()?, rows, cols)?,
                ))
            };
            let adapter = match (&layer.adapter, shape.ranks[index]) {
                (Some(adapter), rank) if rank > 0 => {
                    // This alpha gives the extracted LoRA the scale that the adapter has at this
                    // rank, under any scale rule.
                    let alpha = adapter.lora.scale(rank) * rank as f64;
                    let lora = LoraConfig::new(rank).with_alpha(alpha);
                    Some(AdapterWeights {
                        a: part(&adapter.a, super::build::A, rank, inputs)?,
                        bt: part(&adapter.bt, super::build::BT, rank, outputs)?,
                        lora,
                    })
                }
                _ => None,
            };
            let own = layer.weight_at(shape.weights[index]);
            let weight = part(own, "weight", outputs, inputs)?;
            let bias = layer.bias.as_deref().map(|bias| bias[..outputs].into());
            layers.push(LayerWeights {
                name,
                weight,
                bias,
                adapter,
                others: Vec::new(),
            });
        }
        let mut norms = Vec::new();
        for (dims, all) in shape.blocks.iter().zip(&weights.norms) {
            if left(dims) {
                let mut kept = all.clone();
                kept.retain(|kind, _| dims.has(kind.sub_block()));
                norms.push(kept);
            }
        }
        let parts = ModelParts {
            config,
            embedding: weights.embedding.clone(),
            norms,
            final_norm: weights.final_norm.clone(),
            layers,
            space: None,
            subnets: Vec::new(),
            tokenizer: weights.tokenizer.clone(),
            stop_ids: weights.stop_ids.clone(),
        };
        Ok(self.with_weights(Weights::new(parts)?))
    }

    /// Returns the model with its adapters, at their largest ranks, added to the weights. The
    /// weights must be dense; each sum is rounded to the weight's format.
    ///
    /// For a supernet, [`extract`](Self::extract) a subnet first. For sparse and quantized weights
    /// use [`Merger`](crate::Merger), which merges with the masks and grids used in training.
    ///
    /// # Errors
    /// Returns [`Error::HasAdapter`] if a weight with an adapter is sparse or quantized, and
    /// [`Error::Unsupported`] if a sum is out of the format's range.
    pub fn merged(&self) -> Result<Self> {
        let mut weights = (*self.weights).clone();
        for layer in &mut weights.layers {
            let Some(adapter) = layer.adapter.take() else {
                continue;
            };
            let (a, bt) = (adapter.a.get()?.to_matrix(), adapter.bt.get()?.to_matrix());
            let scale = super::shape::scale(&adapter.lora, adapter.lora.rank);
            for weight in std::iter::once(&mut layer.weight).chain(&mut layer.others) {
                let stored = weight.get()?;
                let format = stored.format();
                if !matches!(
                    format,
                    WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16
                ) {
                    let reason =
                        "its weight is not dense: merge where the model was trained, by `Merger`";
                    return Err(Error::HasAdapter {
                        layer: layer.name.clone(),
                        reason,
                    });
                }
                let mut sum = stored.to_matrix();
                for row in 0..sum.rows() {
                    let out = sum.row_mut(row);
                    for rank in 0..a.rows() {
                        let factor = scale * bt.row(rank)[row];
                        out.iter_mut()
                            .zip(a.row(rank))
                            .for_each(|(out, a)| *out += factor * a);
                    }
                }
                *weight = Weight::made(weight.name(), encode(weight.name(), &sum, format)?);
            }
        }
        if weights.space.take().is_some() {
            weights.subnets.clear();
        }
        Ok(self.with_weights(weights.renewed()?))
    }
}

impl Weights {
    /// Checks the weights again after a change of layers, space or subnets, and updates what
    /// depends on them.
    pub(super) fn renewed(self) -> Result<Self> {
        let subnets = named(&self);
        self.renewed_with(subnets)
    }

    /// Same as [`renewed`](Self::renewed), with other subnets after the first.
    pub(super) fn renewed_with(mut self, subnets: Vec<SubnetParts>) -> Result<Self> {
        if self.config.tie_word_embeddings() {
            self.layers.pop();
        }
        Self::new(ModelParts {
            config: self.config,
            embedding: self.embedding,
            norms: self.norms,
            final_norm: self.final_norm,
            layers: self.layers,
            space: self.space,
            subnets,
            tokenizer: self.tokenizer,
            stop_ids: self.stop_ids,
        })
    }
}

/// Returns the first rows and columns of a weight, in the same format.
fn prefix(name: &str, stored: &StoredMatrix, rows: usize, cols: usize) -> Result<StoredMatrix> {
    if (rows, cols) == (stored.rows(), stored.cols()) {
        return Ok(stored.clone());
    }
    let Some(codes) = stored.to_quantized() else {
        let whole = stored.to_matrix();
        return encode(
            name,
            &Matrix::from_fn(rows, cols, |row, col| whole.row(row)[col]),
            stored.format(),
        );
    };
    let sparse = matches!(stored.format(), WeightFormat::SparseInt4 { .. });
    let (all, groups) = (codes.cols(), codes.groups());
    let mut parts = codes.into_parts();
    if parts.group_of.is_some() && cols < all {
        return Err(Error::Unsupported {
            what: format!("a part of the inputs of `{name}`, whose groups are not in order,"),
        });
    }
    let kept = cols.div_ceil(parts.group_size);
    let cut = |values: Vec<u8>, width: usize, kept: usize| -> Vec<u8> {
        values
            .chunks(width.max(1))
            .take(rows)
            .flat_map(|row| row[..kept].to_vec())
            .collect()
    };
    parts.codes = cut(parts.codes, all, cols);
    parts.zeros = cut(parts.zeros, groups, kept);
    parts.scales = parts
        .scales
        .chunks(groups.max(1))
        .take(rows)
        .flat_map(|row| row[..kept].to_vec())
        .collect();
    (parts.rows, parts.cols) = (rows, cols);
    StoredMatrix::from_quantized(&QuantizedMatrix::new(parts)?, sparse)
}
