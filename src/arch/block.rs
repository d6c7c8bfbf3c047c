//! The sub-blocks of a decoder block and their sizes.

use serde::{Deserialize, Serialize};

use super::linear::LinearKind;

/// A sub-block, which a subnet may leave out: attention or MLP, with its norm and its residual
/// connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SubBlock {
    /// Attention, with its norm.
    Attention,
    /// The MLP, with its norm.
    Mlp,
}

impl SubBlock {
    /// Both sub-blocks, in the order of computation.
    pub const ALL: [Self; 2] = [Self::Attention, Self::Mlp];

    /// The linear layers of the sub-block, in the order of computation.
    pub fn linears(self) -> &'static [LinearKind] {
        match self {
            Self::Attention => &LinearKind::ALL[..4],
            Self::Mlp => &LinearKind::ALL[4..],
        }
    }

    /// The linear layers whose outputs share one elastic width: queries, keys and values, or gate
    /// and up projection.
    pub fn tied_outputs(self) -> &'static [LinearKind] {
        match self {
            Self::Attention => &LinearKind::ALL[..3],
            Self::Mlp => &LinearKind::ALL[4..6],
        }
    }

    /// The norm in front of the sub-block.
    pub fn norm(self) -> NormKind {
        match self {
            Self::Attention => NormKind::Attention,
            Self::Mlp => NormKind::Mlp,
        }
    }

    /// Module path inside the block, as in Hugging Face checkpoints.
    pub fn path(self) -> &'static str {
        match self {
            Self::Attention => "self_attn",
            Self::Mlp => "mlp",
        }
    }

    /// Hugging Face module path of this sub-block of block `block`.
    pub fn name(self, block: usize) -> String {
        format!("model.layers.{block}.{}", self.path())
    }

    /// Parses a module path into a block and its sub-blocks: `model.layers.3` gives both sub-blocks
    /// of block 3, `model.layers.3.mlp` its MLP.
    pub fn parse(name: &str) -> Option<(usize, &'static [Self])> {
        let rest = name.strip_prefix("model.layers.")?;
        let (block, parts): (&str, &'static [Self]) = match rest.split_once('.') {
            None => (rest, &Self::ALL),
            Some((block, "self_attn")) => (block, &[Self::Attention]),
            Some((block, "mlp")) => (block, &[Self::Mlp]),
            Some(_) => return None,
        };
        Some((block.parse().ok()?, parts))
    }
}

/// The norms of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[doc(hidden)]
pub enum NormKind {
    /// Before attention, on its input.
    Attention,
    /// On each head of the queries, before rotation.
    Q,
    /// On each head of the keys, before rotation.
    K,
    /// After attention, on its output.
    AttentionOut,
    /// Before the MLP, on its input.
    Mlp,
    /// After the MLP, on its output.
    MlpOut,
}

impl NormKind {
    /// All norms, in the order of computation.
    pub const ALL: [Self; 6] = [
        Self::Attention,
        Self::Q,
        Self::K,
        Self::AttentionOut,
        Self::Mlp,
        Self::MlpOut,
    ];

    /// The sub-block that the norm belongs to.
    pub fn sub_block(self) -> SubBlock {
        match self {
            Self::Attention | Self::Q | Self::K | Self::AttentionOut => SubBlock::Attention,
            Self::Mlp | Self::MlpOut => SubBlock::Mlp,
        }
    }

    /// Whether the norm is applied to each head rather than to the residual stream's width.
    pub fn per_head(self) -> bool {
        matches!(self, Self::Q | Self::K)
    }
}

/// The sizes of one block. Attention is absent if it has no heads, and the MLP if its width is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlockDims {
    /// Number of query heads.
    pub n_heads: usize,
    /// Number of key/value heads, a divisor of the number of query heads.
    pub n_kv_heads: usize,
    /// Width inside the MLP.
    pub d_mlp: usize,
}

impl BlockDims {
    /// Whether the block has the sub-block `part`.
    pub fn has(&self, part: SubBlock) -> bool {
        match part {
            SubBlock::Attention => self.has_attention(),
            SubBlock::Mlp => self.has_mlp(),
        }
    }

    /// Whether the block has attention.
    pub fn has_attention(&self) -> bool {
        self.n_heads > 0
    }

    /// Whether the block has an MLP.
    pub fn has_mlp(&self) -> bool {
        self.d_mlp > 0
    }

    /// Removes the sub-block `part`.
    pub fn remove(&mut self, part: SubBlock) {
        match part {
            SubBlock::Attention => (self.n_heads, self.n_kv_heads) = (0, 0),
            SubBlock::Mlp => self.d_mlp = 0,
        }
    }

    /// Sizes `[d_input, d_output]` of a linear layer in a decoder of width `d_model` with heads of
    /// `head_dim` features. One of them is 0 if the layer is absent.
    pub fn linear(&self, kind: LinearKind, d_model: usize, head_dim: usize) -> [usize; 2] {
        match kind {
            LinearKind::Q => [d_model, self.n_heads * head_dim],
            LinearKind::K | LinearKind::V => [d_model, self.n_kv_heads * head_dim],
            LinearKind::O => [self.n_heads * head_dim, d_model],
            LinearKind::Gate | LinearKind::Up => [d_model, self.d_mlp],
            LinearKind::Down => [self.d_mlp, d_model],
        }
    }
}
