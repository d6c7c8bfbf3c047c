//! Evaluation of quality and speed: perplexity, exact match, latency, and objectives for a search.

mod latency;
mod objective;

pub use crate::train::loss::mean_loss;
pub use latency::{LatencyTable, Phase, measure_ms};
pub use objective::{Cost, Metric, SubnetObjective};

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::data::{Record, Template, TextTokenizer, answers};
use crate::error::{Error, Result};
use crate::model::{Decoder, generate_batch};
use crate::nn::{KvCache, host_values};
use crate::progress::{Progress, Task};
use crate::runtime::{GenerateConfig, Session};

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

/// Result of exact match on problems with a final answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExactMatch {
    /// Number of problems whose generated final answer equals the reference's.
    pub correct: usize,
    /// Number of problems.
    pub total: usize,
}

impl ExactMatch {
    /// Fraction of correct answers, in 0..=1.
    pub fn accuracy(&self) -> f64 {
        if self.total == 0 {
            0.0
        } else {
            self.correct as f64 / self.total as f64
        }
    }
}

/// A set of problems, formatted as prompts and tokenized.
#[derive(Clone, Debug)]
pub struct ProblemSet {
    prompts: Vec<Vec<u32>>,
    references: Vec<String>,
}

impl ProblemSet {
    /// Formats records with a final answer as prompts.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] with the number of a record without a final answer, and
    /// [`Error::Tokenizer`].
    pub fn new(
        records: &[Record],
        template: impl Into<Template>,
        tokenizer: &TextTokenizer,
    ) -> Result<Self> {
        let template = template.into();
        let mut prompts = Vec::with_capacity(records.len());
        let mut references = Vec::with_capacity(records.len());
        for (index, record) in records.iter().enumerate() {
            let reference = record.final_answer().ok_or_else(|| {
                Error::argument(
                    "records",
                    format!("record {}", index + 1),
                    "a final answer is needed (`#### 12`)",
                )
            })?;
            prompts.push(template.prompt_ids(record, tokenizer)?);
            references.push(reference);
        }
        Ok(Self {
            prompts,
            references,
        })
    }

    /// Number of problems.
    pub fn len(&self) -> usize {
        self.prompts.len()
    }

    /// Whether there are no problems.
    pub fn is_empty(&self) -> bool {
        self.prompts.is_empty()
    }

    /// Number of tokens in the longest prompt.
    pub fn longest_prompt(&self) -> usize {
        self.prompts.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// Generates an answer to each problem and counts the correct ones.
    ///
    /// # Errors
    /// Returns the errors of [`generate_batch`], and [`Error::Tokenizer`].
    pub fn exact_match(
        &self,
        model: &Decoder,
        tokenizer: &TextTokenizer,
        config: &GenerateConfig,
        progress: &dyn Progress,
    ) -> Result<ExactMatch> {
        let outputs = generate_batch(model, &self.prompts, config, progress)?;
        let mut correct = 0;
        for (output, reference) in outputs.iter().zip(&self.references) {
            // Many models have ids in their vocabulary for which the tokenizer has no token.
            let known: Vec<u32> = output
                .iter()
                .copied()
                .filter(|id| tokenizer.id_to_token(*id).is_some())
                .collect();
            correct += usize::from(answers::exact_match(&tokenizer.decode(&known)?, reference));
        }
        Ok(ExactMatch {
            correct,
            total: self.len(),
        })
    }
}
