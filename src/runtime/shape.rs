//! The active part of a model under a subnet: sizes of the blocks and ranks of the adapters.

use crate::arch::{BlockDims, LinearKind};
use crate::error::{Error, Result};
use crate::space::{LoraConfig, SearchSpace, SubnetConfig, widths};

use super::model::Weights;

/// A subnet in the form that the executor uses. Every active part is a prefix, so no weights are
/// copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Active sizes of each block; 0 for parts that are left out.
    pub blocks: Vec<BlockDims>,
    /// Active rank of each linear layer, in the model's order; 0 without an adapter.
    pub ranks: Vec<usize>,
    /// Index of each layer's weight
    /// ([`LayerWeights::weight_at`](super::weights::LayerWeights::weight_at)).
    pub weights: Vec<usize>,
}

impl Shape {
    /// The whole model.
    pub fn full(weights: &Weights) -> Self {
        Self {
            blocks: weights.config.blocks().to_vec(),
            ranks: weights
                .layers
                .iter()
                .map(|layer| layer.max_rank())
                .collect(),
            weights: vec![0; weights.layers.len()],
        }
    }

    /// Returns this subnet with other weights, one index for each linear layer, or none for the
    /// layers' own. A tied head need not be named.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if there is no such layer or weight.
    pub fn with_weights(mut self, model: &Weights, indices: Vec<usize>) -> Result<Self> {
        for (layer, index) in indices.into_iter().enumerate() {
            let most = model
                .layers
                .get(layer)
                .map_or(0, |layer| layer.others.len());
            match self.weights.get_mut(layer) {
                Some(to) if index <= most => *to = index,
                _ => {
                    let expected = format!("at most {most}, at layer {layer}");
                    return Err(Error::argument("weights", index, expected));
                }
            }
        }
        Ok(self)
    }

    /// Whether rows of both subnets can be multiplied by the same weights: all but the ranks is
    /// equal.
    pub fn shares_weights(&self, other: &Self) -> bool {
        self.blocks == other.blocks && self.weights == other.weights
    }

    /// A subnet of a search space that was checked against the model.
    ///
    /// # Errors
    /// Returns the same errors as [`SearchSpace::validate`].
    pub fn of_subnet(
        weights: &Weights,
        space: &SearchSpace,
        subnet: &SubnetConfig,
    ) -> Result<Self> {
        let mut shape = Self::full(weights);
        let ranks = space.ranks(subnet)?;
        for (layer, rank) in weights.layers.iter().zip(&mut shape.ranks) {
            if let Some(active) = ranks.get(&layer.name) {
                *rank = *active;
            }
        }
        let config = &weights.config;
        shape.blocks = widths::block_dims(config.blocks(), config.head_dim(), space, subnet)?;
        Ok(shape)
    }

    /// Returns this subnet with other ranks, one for each linear layer.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if the number of ranks differs from the number of layers,
    /// and [`Error::InvalidRank`] if a rank is larger than the layer's largest.
    pub fn with_ranks(&self, weights: &Weights, ranks: &[u32]) -> Result<Self> {
        if ranks.len() != self.ranks.len() {
            return Err(Error::ShapeMismatch {
                what: "ranks, one for each linear layer".into(),
                expected: vec![self.ranks.len()],
                found: vec![ranks.len()],
            });
        }
        let ranks: Vec<usize> = ranks.iter().map(|rank| *rank as usize).collect();
        for (layer, rank) in weights.layers.iter().zip(&ranks) {
            let max = layer.max_rank();
            if *rank > max {
                return Err(Error::InvalidRank {
                    layer: layer.name.clone(),
                    found: *rank,
                    max,
                });
            }
        }
        Ok(Self {
            ranks,
            ..self.clone()
        })
    }

    /// Active inputs and outputs of a linear layer. The head is always whole.
    pub fn dims(&self, weights: &Weights, layer: usize) -> [usize; 2] {
        let full = weights.layers.get(layer).map_or([0, 0], |layer| {
            let matrix = layer.weight.unchecked();
            [matrix.cols(), matrix.rows()]
        });
        let Some((block, kind)) = weights
            .layers
            .get(layer)
            .and_then(|layer| LinearKind::parse(&layer.name))
        else {
            return full;
        };
        let Some(dims) = self.blocks.get(block) else {
            return full;
        };
        weights.config.arch().linear_dims(dims, kind)
    }
}

/// Scale of an adapter's update at a rank.
pub(super) fn scale(lora: &LoraConfig, rank: usize) -> f32 {
    lora.scale(rank.max(1)) as f32
}
