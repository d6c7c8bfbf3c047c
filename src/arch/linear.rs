//! The linear layers of a block.

use super::block::SubBlock;

/// The linear layers of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinearKind {
    /// The query projection.
    Q,
    /// The key projection.
    K,
    /// The value projection.
    V,
    /// The output projection of attention.
    O,
    /// The gate projection of the MLP.
    Gate,
    /// The up projection of the MLP.
    Up,
    /// The down projection of the MLP.
    Down,
}

impl LinearKind {
    /// All kinds, in the order of computation.
    pub const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// The sub-block that the layer belongs to.
    pub fn sub_block(self) -> SubBlock {
        match self {
            Self::Q | Self::K | Self::V | Self::O => SubBlock::Attention,
            Self::Gate | Self::Up | Self::Down => SubBlock::Mlp,
        }
    }

    /// Module path inside the block, as in Hugging Face checkpoints.
    pub fn path(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// The first of the layers that have the same input as this one: queries for keys and values,
    /// the gate for the up projection.
    pub fn input(self) -> Self {
        match self {
            Self::Q | Self::K | Self::V => Self::Q,
            Self::Gate | Self::Up => Self::Gate,
            Self::O | Self::Down => self,
        }
    }

    /// Whether the layer's output is added to the residual stream. The elastic channels of such a
    /// layer are its inputs, because the width of the residual stream is fixed.
    pub fn writes_residual(self) -> bool {
        matches!(self, Self::O | Self::Down)
    }

    /// Hugging Face module path of this layer in block `block`.
    pub fn name(self, block: usize) -> String {
        format!("model.layers.{block}.{}", self.path())
    }

    /// Parses a path written by [`name`](Self::name) into the block and the kind.
    pub fn parse(name: &str) -> Option<(usize, Self)> {
        let (block, path) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let kind = Self::ALL.into_iter().find(|kind| kind.path() == path)?;
        Some((block.parse().ok()?, kind))
    }
}
