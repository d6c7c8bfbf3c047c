//! The description of a whole decoder.

use super::block::{BlockDims, NormKind, SubBlock};
use super::family::Family;
use super::linear::LinearKind;
use super::rope::RopeConfig;

/// The function between the two halves of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)` (arXiv 1702.03118).
    Silu,
    /// GELU (arXiv 1606.08415) by its approximation with tanh,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`.
    GeluTanh,
}

/// How dot products of queries and keys become scores: multiplied by `scale`, and then limited by
/// `softcap`, `c * tanh(score / c)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores {
    /// The factor.
    pub scale: f64,
    /// The limit, over 0; `None` for no limit.
    pub softcap: Option<f64>,
}

impl From<f64> for Scores {
    /// Scores without a limit.
    fn from(scale: f64) -> Self {
        Self {
            scale,
            softcap: None,
        }
    }
}

/// How the attention of a block sees positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Positions {
    /// Number of positions that a token attends to: its own and those before it. `None` for all.
    pub window: Option<usize>,
    /// Index of the rotary embedding in [`Architecture::ropes`]; `None` for no rotation.
    pub rope: Option<usize>,
}

/// Describes a decoder-only transformer, without its weights.
///
/// The decoder computes `x + attention(norm(x))` and then `x + mlp(norm(x))` for each block, and
/// finally `head(norm(x))`. Attention has grouped key/value heads, and
/// `mlp(x) = down(activation(gate(x)) * up(x))`. Some families also normalize the output of each
/// sub-block, or the heads of queries and keys.
#[derive(Clone, Debug, PartialEq)]
pub struct Architecture {
    /// The model family.
    pub family: Family,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Number of features per head; even.
    pub head_dim: usize,
    /// Number of tokens in the vocabulary.
    pub vocab_size: usize,
    /// Context length in tokens.
    pub max_positions: usize,
    /// The sizes of each block, from first to last.
    pub blocks: Vec<BlockDims>,
    /// The kinds of linear layer that have a bias.
    pub biased: Vec<LinearKind>,
    /// Epsilon of the norms.
    pub norm_eps: f64,
    /// The rotary embeddings that the blocks use.
    pub ropes: Vec<RopeConfig>,
    /// How the attention of each block sees positions; as many as [`blocks`](Self::blocks).
    pub positions: Vec<Positions>,
    /// The scores of attention.
    pub scores: Scores,
    /// The activation of the MLPs.
    pub activation: Activation,
    /// Limit of the logits: `c * tanh(logit / c)`. `None` for no limit.
    pub logit_softcap: Option<f64>,
    /// Whether the embedding and the head share one matrix.
    pub tied: bool,
}

/// A linear layer inside a block.
#[derive(Clone, Debug, PartialEq, Eq)]
#[doc(hidden)]
pub struct LinearSpec {
    /// Module path, such as `model.layers.0.self_attn.q_proj`. The weight is `<name>.weight`,
    /// `[d_output, d_input]`.
    pub name: String,
    /// Index of the block.
    pub block: usize,
    /// The layer's kind.
    pub kind: LinearKind,
    /// Number of output features.
    pub d_output: usize,
    /// Number of input features.
    pub d_input: usize,
    /// Whether there is a `<name>.bias`, `[d_output]`.
    pub bias: bool,
}

/// A norm inside a block.
#[derive(Clone, Debug, PartialEq, Eq)]
#[doc(hidden)]
pub struct NormSpec {
    /// Name of the tensor, such as `model.layers.0.input_layernorm.weight`.
    pub tensor: String,
    /// The norm's kind.
    pub kind: NormKind,
    /// Number of gains.
    pub len: usize,
}

/// A matrix that holds several linear layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fused {
    /// Module path of the matrix.
    pub name: String,
    /// Number of input features.
    pub d_input: usize,
    /// Module paths of the layers, and their numbers of output features.
    pub parts: Vec<(String, usize)>,
}

impl Fused {
    /// Number of output features of all layers together.
    pub fn d_output(&self) -> usize {
        self.parts.iter().map(|(_, rows)| rows).sum()
    }

    /// The rows of a layer in the matrix.
    pub fn rows_of(&self, layer: &str) -> Option<std::ops::Range<usize>> {
        let mut start = 0;
        for (name, rows) in &self.parts {
            if name == layer {
                return Some(start..start + rows);
            }
            start += rows;
        }
        None
    }
}

impl Architecture {
    /// Name of the embedding, `[vocab_size, d_model]`.
    pub const EMBEDDING: &'static str = "model.embed_tokens.weight";
    /// Module path of the head.
    pub const HEAD_LAYER: &'static str = "lm_head";
    /// Name of the head's weight, `[vocab_size, d_model]`; absent if tied to the embedding.
    pub const HEAD: &'static str = "lm_head.weight";
    /// Name of the final norm, `[d_model]`.
    pub const FINAL_NORM: &'static str = "model.norm.weight";

    /// Sizes `[d_input, d_output]` of a linear layer in a block of sizes `dims`. One of them is 0
    /// if the layer is absent.
    pub fn linear_dims(&self, dims: &BlockDims, kind: LinearKind) -> [usize; 2] {
        dims.linear(kind, self.d_model, self.head_dim)
    }

    /// Whether a linear layer has a bias.
    pub fn has_bias(&self, kind: LinearKind) -> bool {
        self.biased.contains(&kind)
    }

    /// The linear layers of a block of sizes `dims` and their sizes `[d_input, d_output]`, in the
    /// order of computation.
    pub fn linears_of(
        &self,
        dims: &BlockDims,
    ) -> impl Iterator<Item = (LinearKind, [usize; 2])> + use<> {
        let (dims, d_model, head_dim) = (*dims, self.d_model, self.head_dim);
        LinearKind::ALL.into_iter().filter_map(move |kind| {
            let sizes = dims.linear(kind, d_model, head_dim);
            (!sizes.contains(&0)).then_some((kind, sizes))
        })
    }

    /// The linear layers of one block, in the order of computation.
    pub fn block_linears(&self, block: usize) -> impl Iterator<Item = LinearSpec> {
        let dims = self.blocks.get(block).into_iter();
        dims.flat_map(|dims| self.linears_of(dims))
            .map(move |(kind, [d_input, d_output])| LinearSpec {
                name: kind.name(block),
                block,
                kind,
                d_output,
                d_input,
                bias: self.has_bias(kind),
            })
    }

    /// The linear layers of all blocks, in the order of computation, without the head.
    pub fn linears(&self) -> Vec<LinearSpec> {
        (0..self.blocks.len())
            .flat_map(|block| self.block_linears(block))
            .collect()
    }

    /// The norms of a block of sizes `dims` and their numbers of gains, in the order of
    /// computation.
    pub fn norms_of(&self, dims: &BlockDims) -> impl Iterator<Item = (NormKind, usize)> + use<> {
        let (dims, d_model, head_dim) = (*dims, self.d_model, self.head_dim);
        let norms = self.family.row().norms.iter();
        norms.filter_map(move |(kind, _)| {
            let len = if kind.per_head() { head_dim } else { d_model };
            dims.has(kind.sub_block()).then_some((*kind, len))
        })
    }

    /// The norms of one block, in the order of computation.
    pub fn block_norms(&self, block: usize) -> impl Iterator<Item = NormSpec> {
        let dims = self.blocks.get(block).into_iter();
        dims.flat_map(|dims| self.norms_of(dims))
            .map(move |(kind, len)| NormSpec {
                tensor: self.norm_tensor(block, kind),
                kind,
                len,
            })
    }

    /// Name of a block's norm in a checkpoint of this family.
    pub fn norm_tensor(&self, block: usize, kind: NormKind) -> String {
        let name = self
            .family
            .row()
            .norms
            .iter()
            .find(|(norm, _)| *norm == kind);
        let name = name.map_or("norm", |(_, name)| name);
        format!("model.layers.{block}.{name}.weight")
    }

    /// Names and shapes of all tensors of a dense checkpoint, in the order of computation. A tied
    /// head is not listed.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let table = vec![self.vocab_size, self.d_model];
        let mut all = vec![(Self::EMBEDDING.to_string(), table.clone())];
        for block in 0..self.blocks.len() {
            all.extend(
                self.block_norms(block)
                    .map(|norm| (norm.tensor, vec![norm.len])),
            );
            for layer in self.block_linears(block) {
                all.push((
                    format!("{}.weight", layer.name),
                    vec![layer.d_output, layer.d_input],
                ));
                if layer.bias {
                    all.push((format!("{}.bias", layer.name), vec![layer.d_output]));
                }
            }
        }
        all.push((Self::FINAL_NORM.into(), vec![self.d_model]));
        if !self.tied {
            all.push((Self::HEAD.into(), table));
        }
        all
    }

    /// Number that is added to the weights of all norms: 1 for Gemma, otherwise 0.
    pub fn norm_offset(&self) -> f32 {
        self.family.row().norm_offset
    }

    /// Factor on the rows of the embedding where they enter the first block.
    pub fn embedding_scale(&self) -> f32 {
        if self.family.row().scaled_embedding {
            (self.d_model as f64).sqrt() as f32
        } else {
            1.0
        }
    }

    /// The matrices that checkpoints of this family store for several linear layers, in the order
    /// of computation. Their rows are those of the layers, one after the other.
    pub(crate) fn fused(&self) -> Vec<Fused> {
        let rows = self.family.row().fused.iter();
        let of_block = |(block, dims): (usize, &BlockDims)| {
            let fused = rows.clone().filter_map(|(module, kinds)| {
                let parts = kinds.iter().map(|kind| {
                    let [d_input, d_output] = self.linear_dims(dims, *kind);
                    (d_output > 0).then(|| (kind.name(block), d_output, d_input))
                });
                let parts = parts.collect::<Option<Vec<_>>>()?;
                Some(Fused {
                    name: format!("model.layers.{block}.{module}"),
                    d_input: parts.first()?.2,
                    parts: parts
                        .into_iter()
                        .map(|(name, rows, _)| (name, rows))
                        .collect(),
                })
            });
            fused.collect::<Vec<_>>()
        };
        self.blocks.iter().enumerate().flat_map(of_block).collect()
    }

    /// Whether the blocks compute exactly what those of Llama and Mistral do: norms before the
    /// sub-blocks, SiLU, the same window and rotation of whole heads in each block and at each
    /// length, and scores without caps.
    pub fn is_plain(&self) -> bool {
        let row = self.family.row();
        let first = self.positions(0);
        row.norms
            .iter()
            .all(|(kind, _)| matches!(kind, NormKind::Attention | NormKind::Mlp))
            && self.norm_offset() == 0.0
            && self.embedding_scale() == 1.0
            && self.activation == Activation::Silu
            && self.scores == Scores::from((self.head_dim as f64).powf(-0.5))
            && self.logit_softcap.is_none()
            && self
                .positions
                .iter()
                .all(|at| *at == first && at.rope == Some(0))
            && self
                .ropes
                .iter()
                .all(|rope| rope.dims == self.head_dim && !rope.depends_on_length())
    }

    /// How the attention of a block sees positions.
    pub fn positions(&self, block: usize) -> Positions {
        let all = Positions {
            window: None,
            rope: None,
        };
        self.positions.get(block).copied().unwrap_or(all)
    }

    /// Whether block `block` has the sub-block `part`.
    pub fn has(&self, block: usize, part: SubBlock) -> bool {
        self.blocks.get(block).is_some_and(|dims| dims.has(part))
    }
}
