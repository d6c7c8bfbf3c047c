//! The targets of a batch, and the loss of a model on them.

use crate::data::Batch;
use crate::error::{Error, Result};
use crate::model::Decoder;
use crate::nn::host_values;
use crate::progress::{Progress, Task};

/// Positions whose next token counts in the loss, as row-major indices, each with that token.
#[doc(hidden)]
pub fn targets(batch: &Batch) -> Vec<(usize, u32)> {
    let counted = batch
        .loss_mask
        .iter()
        .enumerate()
        .filter(|(index, counts)| **counts && index % batch.len > 0);
    counted
        .map(|(index, _)| (index - 1, batch.ids[index]))
        .collect()
}

/// Mean negative log-likelihood per target, in nats, on fixed batches. Summed in `f64` in the order
/// of the batches.
///
/// # Errors
/// Returns [`Error::InvalidArgument`] if there are no targets, and the errors of
/// [`Decoder::tokens`].
#[doc(hidden)]
pub fn mean_loss(model: &Decoder, batches: &[Batch], progress: &dyn Progress) -> Result<f64> {
    let losses = batch_losses(model, batches, progress)?;
    let (sum, n) = losses.iter().fold((0.0, 0), |(sum, n), (loss, targets)| {
        (sum + loss, n + targets)
    });
    Ok(sum / n as f64)
}

/// Sum of the negative log-likelihoods of each batch, in nats, and its number of targets. Batches
/// without targets are left out.
///
/// # Errors
/// Returns the errors of [`mean_loss`].
pub(crate) fn batch_losses(
    model: &Decoder,
    batches: &[Batch],
    progress: &dyn Progress,
) -> Result<Vec<(f64, usize)>> {
    let mut task = Task::begin(progress, "evaluate", batches.len(), "batches")?;
    let mut losses = Vec::with_capacity(batches.len());
    for batch in batches {
        let targets = targets(batch);
        if !targets.is_empty() {
            let tokens = model.batch_tokens(batch)?;
            let hidden = model.rows_hidden_states(tokens, batch.segments.as_ref(), &task)?;
            let sum = f64::from(host_values(model.nll_at(hidden, &targets)?)[0]);
            losses.push((sum, targets.len()));
        }
        task.step("")?;
    }
    if losses.is_empty() {
        return Err(Error::argument(
            "batches",
            "no target",
            "at least one token to be predicted",
        ));
    }
    Ok(losses)
}
