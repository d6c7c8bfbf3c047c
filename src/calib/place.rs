//! Where a walk finds the model and the hidden states: in memory, or in files.

use burn::tensor::Tensor;

use super::kept::Kept;
use super::{embed_samples, kinds};
use crate::error::{Error, Result};
use crate::model::Decoder;
use crate::progress::Task;

/// State of a block that a walk comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// It is to be changed.
    Open,
    /// It has been changed, and the hidden states are still those before it.
    Changed,
    /// It has been changed, and the hidden states are those of a later block.
    Passed,
}

/// A model that a walk changes block by block, with the hidden states of the samples in batches.
pub(super) trait Place {
    /// The model. Blocks other than the one that was entered last may be empty.
    fn model(&self) -> &Decoder;

    fn model_mut(&mut self) -> &mut Decoder;

    /// Number of linear layers in all blocks.
    fn n_layers(&self) -> usize {
        self.model().config().arch().linears().len()
    }

    /// Makes the hidden states at which the walk begins or goes on.
    fn begin(&mut self, samples: &[Vec<u32>], task: &Task<'_>) -> Result<()>;

    /// Makes a block ready. Blocks are entered in order.
    fn enter(&mut self, block: usize) -> Result<Found>;

    /// Number of batches of hidden states.
    fn n_batches(&self) -> usize;

    /// The input of the block for a batch, `[sequences, seq, d_model]`.
    fn states(&mut self, batch: usize) -> Result<Tensor<3>>;

    /// Sets the output of the block for a batch. All are set, in order.
    fn set_states(&mut self, batch: usize, states: Tensor<3>) -> Result<()>;

    /// The layers of a block have been changed.
    fn changed(&mut self, block: usize) -> Result<()>;

    /// A block has been changed, and the hidden states behind it are set.
    fn leave(&mut self, block: usize) -> Result<()>;

    /// All blocks have been changed.
    fn finish(&mut self) -> Result<()>;
}

/// A model and its hidden states in memory. Finished blocks may be kept on disk besides.
pub(super) struct InMemory<'a> {
    model: &'a mut Decoder,
    states: Vec<Tensor<3>>,
    kept: Option<Kept<'a>>,
    /// Number of blocks that the hidden states have passed at the beginning.
    first: usize,
}

impl<'a> InMemory<'a> {
    pub fn new(model: &'a mut Decoder, kept: Option<Kept<'a>>) -> Self {
        Self {
            model,
            states: Vec::new(),
            kept,
            first: 0,
        }
    }
}

impl Place for InMemory<'_> {
    fn model(&self) -> &Decoder {
        self.model
    }

    fn model_mut(&mut self) -> &mut Decoder {
        self.model
    }

    fn begin(&mut self, samples: &[Vec<u32>], _task: &Task<'_>) -> Result<()> {
        self.states = embed_samples(self.model, samples)?;
        if let Some(kept) = &self.kept {
            self.first = kept.get_states(&mut self.states)?;
        }
        Ok(())
    }

    fn enter(&mut self, block: usize) -> Result<Found> {
        let found = match &self.kept {
            Some(kept) => kept.get(self.model, block, kinds())?,
            None => false,
        };
        match (found, block < self.first) {
            (true, true) => Ok(Found::Passed),
            (true, false) => Ok(Found::Changed),
            (false, false) => Ok(Found::Open),
            (false, true) => Err(Error::InvalidState {
                what: "going on with kept blocks",
                reason: format!("block {block} is missing; remove the folder to begin again"),
            }),
        }
    }

    fn n_batches(&self) -> usize {
        self.states.len()
    }

    fn states(&mut self, batch: usize) -> Result<Tensor<3>> {
        Ok(self.states[batch].clone())
    }

    fn set_states(&mut self, batch: usize, states: Tensor<3>) -> Result<()> {
        self.states[batch] = states;
        Ok(())
    }

    fn changed(&mut self, block: usize) -> Result<()> {
        let kept = self.kept.as_ref();
        kept.map_or(Ok(()), |kept| kept.put(self.model, block))
    }

    fn leave(&mut self, block: usize) -> Result<()> {
        match self.kept.as_ref().filter(|_| !self.states.is_empty()) {
            Some(kept) => kept.put_states(block, &self.states),
            None => Ok(()),
        }
    }

    fn finish(&mut self) -> Result<()> {
        self.kept.as_ref().map_or(Ok(()), Kept::finish)
    }
}
