//! Batches by length, in an order that a seed fixes.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::Sequence;
use crate::error::{Error, Result};

/// Sequences of one optimizer (micro-)step, padded at the right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, row-major `[rows, len]`.
    pub ids: Vec<u32>,
    /// Whether token `(r, t)` is to be predicted, from the tokens before it, `[rows, len]`; `false` at `t = 0` and on padding.
    /// The logits at `t - 1` are compared with the token at `t`.
    pub loss_mask: Vec<bool>,
    /// Number of sequences.
    pub rows: usize,
    /// Length of the longest.
    pub len: usize,
    /// Length of each sequence without padding, `[rows]`.
    pub lengths: Vec<usize>,
}

impl Batch {
    /// Number of tokens, padding left out.
    pub fn n_tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Number of tokens to be predicted.
    pub fn n_targets(&self) -> usize {
        self.loss_mask.iter().filter(|m| **m).count()
    }
}

/// Pads `sequences` at the right, with `pad_id`, to the length of the longest.
#[doc(hidden)]
pub fn collate(sequences: &[&Sequence], pad_id: u32) -> Batch {
    let len = sequences.iter().map(|s| s.len()).max().unwrap_or(0);
    let mut ids = Vec::with_capacity(sequences.len() * len);
    let mut loss_mask = Vec::with_capacity(sequences.len() * len);
    for (row, sequence) in sequences.iter().enumerate() {
        ids.extend_from_slice(&sequence.ids);
        ids.resize((row + 1) * len, pad_id);
        loss_mask.extend_from_slice(&sequence.loss_mask);
        loss_mask.resize((row + 1) * len, false);
    }
    Batch {
        ids,
        loss_mask,
        rows: sequences.len(),
        len,
        lengths: sequences.iter().map(|s| s.len()).collect(),
    }
}

/// All sequences once, sorted by length (ties in their own order), for validation.
///
/// # Errors
/// [`Error::InvalidArgument`] where `batch_size` is 0.
pub fn fixed_batches(sequences: &[Sequence], batch_size: usize, pad_id: u32) -> Result<Vec<Batch>> {
    if batch_size == 0 {
        return Err(Error::argument("batch_size", 0, "at least 1"));
    }
    let mut order: Vec<&Sequence> = sequences.iter().collect();
    order.sort_by_key(|s| s.len());
    Ok(order
        .chunks(batch_size)
        .map(|chunk| collate(chunk, pad_id))
        .collect())
}

/// Where a run stands in the data; all that a checkpoint has to keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[doc(hidden)]
pub struct Position {
    /// Passes over the data that are done.
    pub epoch: u64,
    /// Batches of the current pass that are done.
    pub index: usize,
}

/// Which sequences make which batch, for every epoch, as a function of lengths, batch size and seed.
///
/// An epoch shuffles all sequences, sorts each run of [`BUCKET`](Self::BUCKET) batches by length, cuts it into batches, and
/// shuffles those. Every sequence comes once per epoch; the last batch of the last run may be smaller.
#[derive(Clone, Debug)]
#[doc(hidden)]
pub struct BatchPlan {
    lengths: Vec<usize>,
    batch_size: usize,
    seed: u64,
}

impl BatchPlan {
    /// Number of batches that are sorted by length together: large enough for little padding, small enough for chance.
    pub const BUCKET: usize = 32;

    /// A plan for sequences of these `lengths`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where there is no sequence or `batch_size` is 0.
    pub fn new(lengths: Vec<usize>, batch_size: usize, seed: u64) -> Result<Self> {
        if lengths.is_empty() {
            return Err(Error::argument("sequences", 0, "at least 1"));
        }
        if batch_size == 0 {
            return Err(Error::argument("batch_size", 0, "at least 1"));
        }
        Ok(Self {
            lengths,
            batch_size,
            seed,
        })
    }

    /// Number of batches in an epoch.
    pub fn batches_per_epoch(&self) -> usize {
        self.lengths.len().div_ceil(self.batch_size)
    }

    /// The batches of an epoch, as indices of sequences. O(n log n).
    pub fn epoch(&self, epoch: u64) -> Vec<Vec<usize>> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(epoch);
        let mut order: Vec<usize> = (0..self.lengths.len()).collect();
        order.shuffle(&mut rng);
        let mut batches = Vec::with_capacity(self.batches_per_epoch());
        for bucket in order.chunks_mut(self.batch_size.saturating_mul(Self::BUCKET)) {
            bucket.sort_by_key(|i| self.lengths[*i]);
            batches.extend(bucket.chunks(self.batch_size).map(<[usize]>::to_vec));
        }
        batches.shuffle(&mut rng);
        batches
    }
}

/// Endless batches for training. After [`seek`](Self::seek), they go on as they would have for a batcher that got there by
/// itself.
#[derive(Clone, Debug)]
pub struct Batcher {
    sequences: Vec<Sequence>,
    plan: BatchPlan,
    pad_id: u32,
    position: Position,
    // The batches of `position.epoch`.
    current: Vec<Vec<usize>>,
}

impl Batcher {
    /// Starts at the first batch of the first epoch.
    ///
    /// # Errors
    /// As [`BatchPlan::new`].
    pub fn new(
        sequences: Vec<Sequence>,
        batch_size: usize,
        pad_id: u32,
        seed: u64,
    ) -> Result<Self> {
        let plan = BatchPlan::new(
            sequences.iter().map(Sequence::len).collect(),
            batch_size,
            seed,
        )?;
        let current = plan.epoch(0);
        Ok(Self {
            sequences,
            plan,
            pad_id,
            position: Position::default(),
            current,
        })
    }

    /// The next batch; after the last of an epoch comes the first of the next.
    pub fn next_batch(&mut self) -> Batch {
        // Half a microsecond for 4 x 256 tokens, where a step takes seconds: no thread of its own.
        let rows: Vec<&Sequence> = self.current[self.position.index]
            .iter()
            .map(|i| &self.sequences[*i])
            .collect();
        let batch = collate(&rows, self.pad_id);
        self.position.index += 1;
        if self.position.index == self.current.len() {
            self.position = Position {
                epoch: self.position.epoch.wrapping_add(1),
                index: 0,
            };
            self.current = self.plan.epoch(self.position.epoch);
        }
        batch
    }

    /// What was handed out so far.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Goes to a position, as [`position`](Self::position) told it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where an epoch has no such batch; the batcher then stays where it is.
    pub fn seek(&mut self, position: Position) -> Result<()> {
        let per_epoch = self.plan.batches_per_epoch();
        if position.index >= per_epoch {
            return Err(Error::argument(
                "position.index",
                position.index,
                format!("an epoch has {per_epoch} batches"),
            ));
        }
        if position.epoch != self.position.epoch {
            self.current = self.plan.epoch(position.epoch);
        }
        self.position = position;
        Ok(())
    }

    /// The plan behind it.
    pub fn plan(&self) -> &BatchPlan {
        &self.plan
    }

    /// All sequences, in their own order.
    pub fn sequences(&self) -> &[Sequence] {
        &self.sequences
    }
}
