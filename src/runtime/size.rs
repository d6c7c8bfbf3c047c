//! Size and work of the active part of a model.

use super::session::Session;
use crate::error::Result;

/// Size and work of the part of a model that a session uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ActiveSize {
    /// Number of weights in the embedding, the linear layers and the adapters, zeros included. A
    /// tied head counts once.
    pub params: usize,
    /// Multiply-accumulates per token of the linear layers, the adapters and the head, zeros
    /// included, without those of attention.
    pub macs_per_token: usize,
    /// Size in bytes of these weights in their storage formats. Of a weight of which a part is active,
    /// that share of its bytes counts.
    pub bytes: usize,
}

impl Session {
    /// Size and work of the active subnet, without adapters that were loaded at run time.
    ///
    /// # Errors
    /// Returns an error if a weight cannot be read.
    pub fn active_size(&self) -> Result<ActiveSize> {
        let weights = &self.model().weights;
        let embedding = weights.embedding.get()?;
        let mut size = ActiveSize {
            params: embedding.rows() * embedding.cols(),
            macs_per_token: 0,
            bytes: embedding.bytes(),
        };
        let head = weights.layers.len().saturating_sub(1);
        let tied = weights.config.tie_word_embeddings();
        for (index, layer) in weights.layers.iter().enumerate() {
            let [inputs, outputs] = self.shape().dims(weights, index);
            if inputs == 0 || outputs == 0 {
                continue;
            }
            size.macs_per_token += inputs * outputs;
            if index < head || !tied {
                let stored = layer.weight.get()?;
                let whole = (stored.rows() * stored.cols()).max(1) as u128;
                let share = (inputs * outputs) as u128;
                size.params += inputs * outputs;
                size.bytes += (stored.bytes() as u128 * share / whole) as usize;
            }
            if let Some(adapter) = &layer.adapter {
                let rank = self.ranks().get(index).copied().unwrap_or(0);
                let factors = rank * (inputs + outputs);
                size.params += factors;
                size.macs_per_token += factors;
                for (factor, cols) in [(&adapter.a, inputs), (&adapter.bt, outputs)] {
                    size.bytes += factor.get()?.format().bytes(rank, cols, rank * cols);
                }
            }
        }
        Ok(size)
    }
}
