//! The linear layers of a block.

use super::block::SubBlock;

/// Which linear layer of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinearKind {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Attention's output.
    O,
    /// The MLP's gate.
    Gate,
    /// The MLP's up projection.
    Up,
    /// The MLP's down projection.
    Down,
}

impl LinearKind {
    /// All, in the order of computation.
    pub const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// The sub-block that it belongs to.
    pub fn sub_block(self) -> SubBlock {
        match self {
            Self::Q | Self::K | Self::V | Self::O => SubBlock::Attention,
            Self::Gate | Self::Up | Self::Down => SubBlock::Mlp,
        }
    }

    /// Path inside the block, as Hugging Face names it.
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

    /// The first of the layers that see the same input: queries for keys and values, the gate for the
    /// up projection.
    pub fn input(self) -> Self {
        match self {
            Self::Q | Self::K | Self::V => Self::Q,
            Self::Gate | Self::Up => Self::Gate,
            Self::O | Self::Down => self,
        }
    }

    /// Whether its output is added to the residual stream. Such a layer's elastic channels are its
    /// inputs, for the width of the residual stream is fixed.
    pub fn writes_residual(self) -> bool {
        matches!(self, Self::O | Self::Down)
    }

    /// Hugging Face's module path of this layer in block `block`.
    pub fn name(self, block: usize) -> String {
        format!("model.layers.{block}.{}", self.path())
    }

    /// The inverse of [`name`](Self::name).
    pub fn parse(name: &str) -> Option<(usize, Self)> {
        let (block, path) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let kind = Self::ALL.into_iter().find(|kind| kind.path() == path)?;
        Some((block.parse().ok()?, kind))
    }
}
