//! What a subnet costs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::io::HfConfig;
use crate::io::hf::BlockDims;
use crate::model::{Decoder, LinearKind, ParamCount, Unit};
use crate::nn::{BaseLinear, host_values};

/// Sizes and costs of one subnet, adapters counted apart from the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubnetCost {
    /// Weights of base and active adapters; tied embeddings count once.
    pub params: usize,
    /// Those of them that are not zero; every weight of an adapter counts.
    pub nonzero_params: usize,
    /// Multiply-accumulates a token of every linear layer, the head among them, as the papers count: zeros included, the
    /// products of attention scores and the embedding left out.
    pub macs_per_token: usize,
    /// Those of them that are in adapters.
    pub adapter_params: usize,
    /// Weight bytes at 16 bits a weight, zeros included: what a search compares. A file's bytes follow from its own types.
    pub weight_bytes: usize,
    /// Channels of all query heads of all blocks, from which follow the [`attention_macs`](Self::attention_macs).
    pub attention_width: usize,
}

impl SubnetCost {
    /// A plain model of a configuration, no weight of which is zero: what can be said without any weights.
    pub fn of_config(config: &HfConfig) -> Self {
        let (params, macs_per_token) = base(config, config.blocks());
        Self::new(config, config.blocks(), params, macs_per_token, params, 0)
    }

    /// The subnet of a model: blocks of these sizes, adapters of these ranks.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`] where a rank names a layer that there is not.
    pub(super) fn count(
        config: &HfConfig,
        blocks: &[BlockDims],
        nonzeros: &Nonzeros,
        ranks: &BTreeMap<String, usize>,
    ) -> Result<Self> {
        let (params, macs) = base(config, blocks);
        let mut adapters = 0;
        for (name, rank) in ranks {
            let layer = LinearKind::parse(name).and_then(|(block, kind)| Some((blocks.get(block)?, kind)));
            let (block, kind) =
                layer.ok_or_else(|| Error::UnknownLayer { context: "cost of a subnet".into(), layer: name.clone() })?;
            let [d_input, d_output] = layer_dims(config, block, kind);
            if d_input > 0 && d_output > 0 {
                adapters += rank * (d_input + d_output);
            }
        }
        Ok(Self::new(config, blocks, params, macs, nonzeros.of(config, blocks), adapters))
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
            attention_width: blocks.iter().map(|block| block.n_heads * config.head_dim()).sum(),
        }
    }

    /// Multiply-accumulates of the linear layers over a sequence: at 256 tokens, what the paper calls TFLOPs.
    pub fn macs(&self, n_tokens: usize) -> usize {
        self.macs_per_token * n_tokens
    }

    /// Multiply-accumulates of attention's two products (scores, and the sums of values) over a causal sequence, which
    /// [`macs`](Self::macs) leaves out as the papers do: token `i` meets `i` keys.
    pub fn attention_macs(&self, n_tokens: usize) -> usize {
        self.attention_width * n_tokens * (n_tokens + 1)
    }
}

/// `[d_input, d_output]` of a linear layer in a block of these sizes; 0 where it is not there.
pub(super) fn layer_dims(config: &HfConfig, block: &BlockDims, kind: LinearKind) -> [usize; 2] {
    let d_model = config.hidden_size();
    let (queries, keys) = (block.n_heads * config.head_dim(), block.n_kv_heads * config.head_dim());
    match kind {
        LinearKind::Q => [d_model, queries],
        LinearKind::K | LinearKind::V => [d_model, keys],
        LinearKind::O => [queries, d_model],
        LinearKind::Gate | LinearKind::Up => [d_model, block.d_mlp],
        LinearKind::Down => [block.d_mlp, d_model],
    }
}

fn has(block: &BlockDims, unit: Unit) -> bool {
    match unit {
        Unit::Attention => block.has_attention(),
        Unit::Mlp => block.has_mlp(),
    }
}

/// Parameters of a model with blocks of these sizes, and multiply-accumulates of its linear layers for a token.
fn base(config: &HfConfig, blocks: &[BlockDims]) -> (usize, usize) {
    let (d_model, embedding) = (config.hidden_size(), config.vocab_size() * config.hidden_size());
    let (mut linear, mut rest) = (0, embedding + d_model);
    if !config.tie_word_embeddings() {
        rest += embedding;
    }
    for block in blocks {
        rest += d_model * Unit::ALL.into_iter().filter(|unit| has(block, *unit)).count();
        for kind in LinearKind::ALL.into_iter().filter(|kind| has(block, kind.unit())) {
            let [d_input, d_output] = layer_dims(config, block, kind);
            linear += d_input * d_output;
            let biased = if kind.unit() == Unit::Attention { config.attention_bias() } else { config.mlp_bias() };
            rest += if biased { d_output } else { 0 };
        }
    }
    (rest + linear, linear + embedding)
}

/// The weights of a base that are not zero, counted so that any prefix of channels is known.
#[derive(Clone, Debug)]
pub(super) struct Nonzeros {
    /// Embedding, head and last norm.
    outside: usize,
    blocks: Vec<BlockNonzeros>,
    all: ParamCount,
}

#[derive(Clone, Debug, Default)]
struct BlockNonzeros {
    norms: BTreeMap<Unit, usize>,
    /// By number of channels, from 0 to all: output channels with their biases, or inputs for the layers that put out the residual
    /// stream.
    layers: BTreeMap<LinearKind, Vec<usize>>,
    /// Biases of those last layers.
    biases: BTreeMap<LinearKind, usize>,
}

fn count(values: &[f32]) -> usize {
    values.iter().filter(|value| **value != 0.0).count()
}

impl Nonzeros {
    /// Counts. Reads every weight once.
    pub fn new(model: &Decoder) -> Self {
        let mut total = 0;
        let mut tally = |values: Vec<f32>| {
            total += values.len();
            count(&values)
        };
        let mut outside = tally(host_values(model.embed_tokens.val())) + tally(host_values(model.norm.weight.val()));
        if let Some(head) = &model.lm_head {
            outside += tally(host_values(head.weight()));
        }
        let mut blocks = Vec::with_capacity(model.layers.len());
        for block in &model.layers {
            let mut counts = BlockNonzeros::default();
            for unit in Unit::ALL {
                if let Some(norm) = block.norm(unit) {
                    counts.norms.insert(unit, tally(host_values(norm.weight.val())));
                }
            }
            for kind in LinearKind::ALL {
                let Some(layer) = block.linear(kind) else { continue };
                let bias = layer.base.bias.as_ref().map(|bias| host_values(bias.val()));
                let mut channels = by_channel(&layer.base, by_input(kind));
                match bias {
                    Some(bias) if by_input(kind) => drop(counts.biases.insert(kind, tally(bias))),
                    Some(bias) => {
                        channels.iter_mut().zip(&bias).for_each(|(channel, b)| *channel += usize::from(*b != 0.0));
                        tally(bias);
                    }
                    None => {}
                }
                let mut sum = 0;
                let sums = channels.into_iter().map(|channel| {
                    sum += channel;
                    sum
                });
                counts.layers.insert(kind, std::iter::once(0).chain(sums).collect());
            }
            blocks.push(counts);
        }
        total += model.linears().map(|(_, layer)| layer.base.dims().iter().product::<usize>()).sum::<usize>();
        let whole = |block: &BlockNonzeros| block.count(|_| true, |_, sums| sums.len() - 1);
        let nonzero = outside + blocks.iter().map(whole).sum::<usize>();
        Self { outside, blocks, all: ParamCount { total, nonzero } }
    }

    /// All weights of the base, and those that are not zero.
    pub fn all(&self) -> ParamCount {
        self.all
    }

    /// Those that blocks of these sizes have.
    fn of(&self, config: &HfConfig, blocks: &[BlockDims]) -> usize {
        let of_block = |(counts, dims): (&BlockNonzeros, &BlockDims)| {
            counts.count(
                |unit| has(dims, unit),
                |kind, sums| {
                    let [d_input, d_output] = layer_dims(config, dims, kind);
                    let channels = if by_input(kind) { d_input } else { d_output };
                    channels.min(sums.len() - 1)
                },
            )
        };
        self.outside + self.blocks.iter().zip(blocks).map(of_block).sum::<usize>()
    }
}

impl BlockNonzeros {
    fn count(&self, has: impl Fn(Unit) -> bool, channels: impl Fn(LinearKind, &[usize]) -> usize) -> usize {
        let norms: usize = self.norms.iter().filter(|(unit, _)| has(**unit)).map(|(_, n)| n).sum();
        let biases: usize = self.biases.iter().filter(|(kind, _)| has(kind.unit())).map(|(_, n)| n).sum();
        let layers = self.layers.iter().filter(|(kind, _)| has(kind.unit()));
        norms + biases + layers.map(|(kind, sums)| sums[channels(*kind, sums)]).sum::<usize>()
    }
}

/// Whether a layer's elastic channels are its inputs: it puts out the residual stream.
fn by_input(kind: LinearKind) -> bool {
    matches!(kind, LinearKind::O | LinearKind::Down)
}

/// The non-zero weights of each input or output channel.
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
        channels.iter_mut().zip(row).for_each(|(channel, value)| *channel += usize::from(*value != 0.0));
    }
    channels
}
