//! Evaluation of quality and speed: perplexity, exact match, latency, and objectives for a search.

mod language_model;
mod latency;
mod objective;
mod problems;

pub use crate::train::loss::mean_loss;
pub use latency::{LatencyTable, Phase, measure_ms};
pub use objective::{Cost, Metric, SubnetObjective};
pub use problems::{Answer, ExactMatch, Gsm8k, ProblemSet};

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::Decoder;
use crate::nn::{KvCache, host_values};
use crate::progress::{Progress, Task};
use crate::runtime::Session;

/// Number of tokens that go through the model at once.
const TOKENS_AT_ONCE: usize = 4096;

/// Perplexity of a text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// Mean negative log-likelihood per predicted token, in nats.
    pub nll: f64,
    /// `exp(nll)`.
    pub perplexity: f64,
    /// Number of predicted tokens.
    pub predicted_tokens: usize,
}

impl Perplexity {
    /// Creates the result of `n` predicted tokens with this sum of negative log-likelihoods, in a
    /// sequence of `len` tokens.
    fn new(sum: f64, n: usize, len: usize) -> Result<Self> {
        if n == 0 {
            let found = format!("{len} tokens");
            return Err(Error::argument("text", found, "at least 2 tokens"));
        }
        let nll = sum / n as f64;
        Ok(Self {
            nll,
            perplexity: nll.exp(),
            predicted_tokens: n,
        })
    }
}

/// Perplexity of a token sequence. The sequence is cut into windows of `context` tokens without
/// overlap; the last one may be shorter. In each window, every token but the first is predicted
/// from the tokens before it.
///
/// # Errors
/// Returns [`Error::InvalidArgument`] if `context` is below 2 or there are fewer than 2 tokens,
/// [`Error::SequenceTooLong`] if `context` is above the model's, and the errors of
/// [`Decoder::tokens`].
pub fn perplexity(
    model: &Decoder,
    ids: &[u32],
    context: usize,
    progress: &dyn Progress,
) -> Result<Perplexity> {
    if context < 2 {
        return Err(Error::argument("context", context, "at least 2 tokens"));
    }
    let max = model.config().max_position_embeddings();
    if context > max {
        return Err(Error::SequenceTooLong {
            what: "windows of the perplexity".into(),
            found: context,
            max,
        });
    }
    let full = ids.len() / context * context;
    let mut task = Task::begin(progress, "perplexity", ids.len(), "tokens")?;
    let mut sum = 0.0;
    let mut n = 0;
    let mut add = |ids: &[u32], rows: usize| -> Result<()> {
        let len = ids.len() / rows;
        if len > TOKENS_AT_ONCE {
            // Runs the window piece by piece through a cache: the values are the same, and only one
            // piece needs memory at a time.
            let mut cache = KvCache::new(model.config().num_hidden_layers());
            cache.begin(ids.len(), model.ropes());
            for (index, piece) in ids.chunks(TOKENS_AT_ONCE).enumerate() {
                let hidden: Tensor<2> = model
                    .hidden_states(model.tokens(piece, 1)?, Some(&mut cache))
                    .flatten(0, 1);
                let following = &ids[(index * TOKENS_AT_ONCE + 1).min(ids.len())..];
                let targets = &following[..piece.len().min(following.len())];
                if let Some(found) = targets
                    .iter()
                    .find(|id| **id as usize >= model.config().vocab_size())
                {
                    return Err(Error::TokenOutOfRange {
                        found: *found,
                        vocab_size: model.config().vocab_size(),
                    });
                }
                if !targets.is_empty() {
                    let hidden = hidden.narrow(0, 0, targets.len());
                    sum += f64::from(host_values(model.nll_of_hidden(hidden, targets))[0]);
                    n += targets.len();
                }
                task.advance(piece.len(), "");
                task.check()?;
            }
            return Ok(());
        }
        let targets: Vec<(usize, u32)> = (0..ids.len())
            .filter(|i| i % len > 0)
            .map(|i| (i - 1, ids[i]))
            .collect();
        if !targets.is_empty() {
            sum += f64::from(host_values(model.nll_sum(model.tokens(ids, rows)?, &targets)?)[0]);
            n += targets.len();
        }
        task.advance(ids.len(), "");
        task.check()
    };
    let rows = (TOKENS_AT_ONCE / context).max(1);
    for chunk in ids[..full].chunks(rows * context) {
        add(chunk, chunk.len() / context)?;
    }
    if full < ids.len() {
        add(&ids[full..], 1)?;
    }
    Perplexity::new(sum, n, ids.len())
}

/// Like [`perplexity`], on a session of the runtime, which is emptied for each window. The subnet
/// of the session and the formats of its model apply.
///
/// # Errors
/// Returns [`Error::InvalidArgument`] if `context` is below 2 or there are fewer than 2 tokens, and
/// the errors of [`Session::log_likelihoods`].
pub fn session_perplexity(
    session: &mut Session,
    ids: &[u32],
    context: usize,
    progress: &dyn Progress,
) -> Result<Perplexity> {
    if context < 2 {
        return Err(Error::argument("context", context, "at least 2 tokens"));
    }
    let mut task = Task::begin(progress, "perplexity", ids.len(), "tokens")?;
    let (mut sum, mut n) = (0.0, 0);
    for window in ids.chunks(context) {
        session.reset();
        let log_likelihoods = session.log_likelihoods(window)?;
        sum -= log_likelihoods.iter().map(|l| f64::from(*l)).sum::<f64>();
        n += log_likelihoods.len();
        task.advance(window.len(), "");
        task.check()?;
    }
    Perplexity::new(sum, n, ids.len())
}
