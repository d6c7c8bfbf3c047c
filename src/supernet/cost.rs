//! The cost of a subnet.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::arch::{BlockDims, LinearKind, NormKind};
use crate::error::{Error, Result};
use crate::format::WeightFormat;
use crate::io::HfConfig;
use crate::model::{Decoder, ParamCount};
use crate::nn::{BaseLinear, host_values};

/// Sizes and costs of one subnet, with adapters counted separately from the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubnetCost {
    /// Number of weights in the base and the active adapters. Tied embeddings count once.
    pub params: usize,
    /// Number of weights that are not zero. Every adapter weight counts as non-zero.
    pub nonzero_params: usize,
    /// Multiply-accumulates per token of all linear layers including the head, counted as in the
    /// papers: zeros are included; attention scores and the embedding are not.
    pub macs_per_token: usize,
    /// Number of weights in the active adapters.
    pub adapter_params: usize,
    /// Weight bytes at 16 bits per weight, zeros included: the size that a search compares. The
    /// size of a file depends on its storage formats.
    pub weight_bytes: usize,
    /// Total width of the query heads of all blocks, from which
    /// [`attention_macs`](Self::attention_macs) is computed.
    pub attention_width: usize,
}

impl SubnetCost {
    /// The cost of a plain model with this configuration and no zero weights. Needs no weights.
    pub fn of_config(config: &HfConfig) -> Self {
        let (params, macs_per_token) = base(config, config.blocks());
        Self::new(config, config.blocks(), params, macs_per_token, params, 0)
    }

    /// Counts the cost of a subnet with blocks of these sizes and adapters of these ranks.
    ///
    /// # Errors
    /// Returns [`Error::UnknownLayer`] if `ranks` names a layer that does not exist.
    pub(super) fn count(
        config: &HfConfig,
        blocks: &[BlockDims],
        nonzeros: &Nonzeros,
        ranks: &BTreeMap<String, usize>,
    ) -> Result<Self> {
        let (params, macs) = base(config, blocks);
        let mut adapters = 0;
        for (name, rank) in ranks {
            let layer =
                LinearKind::parse(name).and_then(|(block, kind)| Some((blocks.get(block)?, kind)));
            let (block, kind) = layer.ok_or_else(|| Error::UnknownLayer {
                context: "cost of a subnet".into(),
                layer: name.clone(),
            })?;
            let [d_input, d_output] = config.arch().linear_dims(block, kind);
            if d_input > 0 && d_output > 0 {
                adapters += rank * (d_input + d_output);
            }
        }
        Ok(Self::new(
            config,
            blocks,
            params,
            macs,
            nonzeros.of(config, blocks),
            adapters,
        ))
    }

    fn new(
        config: &HfConfig,
        blocks: &[BlockDims],
        params: usize,
        macs: usize,
        nonzero: usize,
        adapters: usize,
    ) -> Self {
        Self {
            params: params + adapters,
            nonzero_params: nonzero + adapters,
            adapter_params: adapters,
            macs_per_token: macs + adapters,
            weight_bytes: 2 * (params + adapters),
            attention_width: blocks
                .iter()
                .map(|block| block.n_heads * config.head_dim())
                .sum(),
        }
    }

    /// The cost after merging, when adapters are free. Merging a masked adapter fills no zeros;
    /// zeros that an unmasked adapter fills are not counted.
    pub fn merged(mut self) -> Self {
        self.params -= self.adapter_params;
        self.nonzero_params -= self.adapter_params;
        self.macs_per_token -= self.adapter_params;
        self.weight_bytes -= 2 * self.adapter_params;
        self.adapter_params = 0;
        self
    }

    /// Multiply-accumulates of the linear layers over a sequence. At 256 tokens, this is what the
    /// paper reports as TFLOPs.
    pub fn macs(&self, n_tokens: usize) -> usize {
        self.macs_per_token * n_tokens
    }

    /// Multiply-accumulates of attention's two products (scores, and the sums of values) over a
    /// causal sequence, in which token `i` attends to `i` keys. [`macs`](Self::macs) excludes them,
    /// as the papers do.
    pub fn attention_macs(&self, n_tokens: usize) -> usize {
        self.attention_width * n_tokens * (n_tokens + 1)
    }
}

/// Returns the number of parameters of a model with blocks of these sizes, and the
/// multiply-accumulates of its linear layers per token.
fn base(config: &HfConfig, blocks: &[BlockDims]) -> (usize, usize) {
    let (d_model, embedding) = (
        config.hidden_size(),
        config.vocab_size() * config.hidden_size(),
    );
    let (mut linear, mut rest) = (0, embedding + d_model);
    if !config.tie_word_embeddings() {
        rest += embedding;
    }
    let arch = config.arch();
    for block in blocks {
        rest += arch.norms_of(block).map(|(_, len)| len).sum::<usize>();
        for (kind, [d_input, d_output]) in arch.linears_of(block) {
            linear += d_input * d_output;
            rest += if arch.has_bias(kind) { d_output } else { 0 };
        }
    }
    (rest + linear, linear + embedding)
}

/// Counts of the base's non-zero weights, from which the count for any prefix of channels follows.
#[derive(Clone, Debug)]
pub(super) struct Nonzeros {
    /// Count in the embedding, the head and the final norm.
    outside: usize,
    blocks: Vec<BlockNonzeros>,
    all: ParamCount,
}

#[derive(Clone, Debug, Default)]
struct BlockNonzeros {
    norms: BTreeMap<NormKind, usize>,
    /// Counts in the weights for each number of active channels, from 0 to all: input channels for
    /// the layers that write to the residual stream, output channels for the others.
    layers: BTreeMap<LinearKind, Vec<usize>>,
    /// Counts in the biases for each number of output channels.
    biases: BTreeMap<LinearKind, Vec<usize>>,
}

/// Prefix sums, starting with 0.
fn sums(counts: impl IntoIterator<Item = usize>) -> Vec<usize> {
    let mut sum = 0;
    let sums = counts.into_iter().map(|count| {
        sum += count;
        sum
    });
    std::iter::once(0).chain(sums).collect()
}

fn count(values: &[f32]) -> usize {
    values.iter().filter(|value| **value != 0.0).count()
}

impl Nonzeros {
    /// Counts the non-zero weights. Reads every weight once.
    pub fn new(model: &Decoder) -> Self {
        let mut total = 0;
        let mut tally = |values: Vec<f32>| {
            total += values.len();
            count(&values)
        };
        let mut outside = tally(host_values(model.embed_tokens.val()))
            + tally(host_values(model.norm.weight.val()));
        if let Some(head) = &model.lm_head {
            outside += tally(host_values(head.weight()));
        }
        let mut blocks = Vec::with_capacity(model.layers.len());
        for block in &model.layers {
            let mut counts = BlockNonzeros::default();
            for (kind, norm) in block.norms() {
                let nonzero = tally(host_values(norm.weight.val()));
                counts.norms.insert(kind, nonzero);
            }
            for kind in LinearKind::ALL {
                let Some(layer) = block.linear(kind) else {
                    continue;
                };
                counts
                    .layers
                    .insert(kind, sums(by_channel(&layer.base, kind.writes_residual())));
                if let Some(bias) = &layer.base.bias {
                    let bias = host_values(bias.val());
                    counts
                        .biases
                        .insert(kind, sums(bias.iter().map(|b| usize::from(*b != 0.0))));
                    tally(bias);
                }
            }
            blocks.push(counts);
        }
        total += model
            .linears()
            .map(|(_, layer)| layer.base.dims().iter().product::<usize>())
            .sum::<usize>();
        let nonzero = outside
            + blocks
                .iter()
                .map(|block| block.count(|_| Some([usize::MAX; 2])))
                .sum::<usize>();
        Self {
            outside,
            blocks,
            all: ParamCount { total, nonzero },
        }
    }

    /// Counts of all weights of the base and of the non-zero ones.
    pub fn all(&self) -> ParamCount {
        self.all
    }

    /// The non-zero weights of blocks with these sizes.
    fn of(&self, config: &HfConfig, blocks: &[BlockDims]) -> usize {
        let of_block = |(counts, dims): (&BlockNonzeros, &BlockDims)| {
            counts.count(|kind| {
                dims.has(kind.sub_block())
                    .then(|| config.arch().linear_dims(dims, kind))
            })
        };
        self.outside + self.blocks.iter().zip(blocks).map(of_block).sum::<usize>()
    }

    /// The non-zero weights of one linear layer with these sizes, without its bias.
    fn of_layer(&self, block: usize, kind: LinearKind, dims: [usize; 2]) -> usize {
        self.blocks[block].layers.get(&kind).map_or(0, |sums| {
            at(sums, dims[usize::from(!kind.writes_residual())])
        })
    }
}

/// The prefix sum of the first `n` counts, or of all if there are fewer.
fn at(sums: &[usize], n: usize) -> usize {
    sums[n.min(sums.len() - 1)]
}

impl BlockNonzeros {
    /// Counts the layers for which `dims` returns sizes; the others are left out.
    fn count(&self, dims: impl Fn(LinearKind) -> Option<[usize; 2]>) -> usize {
        let of_layer = |(kind, sums): (&LinearKind, &Vec<usize>)| {
            dims(*kind).map_or(0, |dims| {
                at(sums, dims[usize::from(!kind.writes_residual())])
            })
        };
        let of_bias = |(kind, sums): (&LinearKind, &Vec<usize>)| {
            dims(*kind).map_or(0, |dims| at(sums, dims[1]))
        };
        let of_norm = |(kind, norm): (&NormKind, &usize)| {
            let present = dims(kind.sub_block().linears()[0]);
            present.map_or(0, |_| *norm)
        };
        self.layers.iter().map(of_layer).sum::<usize>()
            + self.biases.iter().map(of_bias).sum::<usize>()
            + self.norms.iter().map(of_norm).sum::<usize>()
    }
}

/// Bytes of a subnet's stored base with adapters merged: the linear layers inside the blocks in
/// `format`, everything else dense at 16 bits per weight, or 32 for [`WeightFormat::F32`].
pub(super) fn stored_bytes(
    config: &HfConfig,
    blocks: &[BlockDims],
    nonzeros: &Nonzeros,
    format: WeightFormat,
) -> usize {
    let (params, _) = base(config, blocks);
    let (mut linear, mut bytes) = (0, 0);
    for (index, block) in blocks.iter().enumerate() {
        for (kind, dims) in config.arch().linears_of(block) {
            linear += dims[0] * dims[1];
            bytes += format.bytes(dims[1], dims[0], nonzeros.of_layer(index, kind, dims));
        }
    }
    let rest = if format == WeightFormat::F32 { 4 } else { 2 };
    bytes + rest * (params - linear)
}

/// Counts the non-zero weights of each input or output channel.
fn by_channel(layer: &BaseLinear, by_input: bool) -> Vec<usize> {
    let [d_input, d_output] = layer.dims();
    let values = host_values(layer.weight());
    let rows = values.chunks_exact(d_output);
    if by_input {
        return rows.map(count).collect();
    }
    let mut channels = vec![0; d_output];
    debug_assert_eq!(rows.len(), d_input);
    for row in rows {
        channels
            .iter_mut()
            .zip(row)
            .for_each(|(channel, value)| *channel += usize::from(*value != 0.0));
    }
    channels
}
