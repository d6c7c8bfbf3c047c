//! The runtime's models as models that can be evaluated.

use crate::data::TextTokenizer;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::runtime::{Model, Session};

use super::decode::{self, Request};
use super::encode::{Encoder, Scored};
use super::language_model::{Continuation, LanguageModel, LogLikelihood, Prompt};
use super::prefix;

/// Number of prompts that are continued at a time, unless another is set.
const SESSIONS: usize = 32;

/// A [`LanguageModel`] on a model of the runtime.
///
/// What requests have in common at their beginning is computed once. Requests go through the model
/// together, so that its weights are read once for many tokens.
#[derive(Debug)]
pub struct RuntimeModel {
    empty: Session,
    tokenizer: TextTokenizer,
    n_sessions: usize,
    max_len: usize,
}

impl RuntimeModel {
    /// Takes a session without tokens. Its subnet, adapters, context size, cache format and
    /// activations apply.
    ///
    /// # Errors
    /// Returns [`Error::Unsupported`] if the model has no tokenizer, and [`Error::InvalidState`] if
    /// the session holds tokens.
    pub fn new(session: Session) -> Result<Self> {
        let Some(tokenizer) = session.model().tokenizer().cloned() else {
            let what = "evaluation of a model without a tokenizer".to_string();
            return Err(Error::Unsupported { what });
        };
        if session.position() > 0 {
            let reason = format!("the session holds {} tokens; reset it", session.position());
            return Err(Error::InvalidState {
                what: "evaluating",
                reason,
            });
        }
        Ok(Self {
            max_len: session.n_ctx(),
            empty: session,
            tokenizer,
            n_sessions: SESSIONS,
        })
    }

    /// Sets the number of prompts that are continued at a time; 0 counts as 1.
    pub fn with_sessions(mut self, n_sessions: usize) -> Self {
        self.n_sessions = n_sessions.max(1);
        self
    }

    /// Sets the tokenizer, where it is not the model's own.
    pub fn with_tokenizer(mut self, tokenizer: TextTokenizer) -> Self {
        self.tokenizer = tokenizer;
        self
    }

    /// The model.
    pub fn model(&self) -> &Model {
        self.empty.model()
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &TextTokenizer {
        &self.tokenizer
    }

    /// Returns the log-likelihood of the last `n` tokens of each sequence, given those before.
    pub(super) fn score(
        &self,
        sequences: &[Scored],
        progress: &dyn Progress,
    ) -> Result<Vec<LogLikelihood>> {
        prefix::score(&self.empty, sequences, progress)
    }

    /// Maximum number of tokens that the model sees.
    pub fn max_len(&self) -> usize {
        self.max_len
    }

    fn encoder(&self) -> Encoder<'_> {
        Encoder::new(&self.tokenizer, self.max_len)
    }
}

impl LanguageModel for RuntimeModel {
    fn log_likelihoods(
        &mut self,
        requests: &[Continuation],
        progress: &dyn Progress,
    ) -> Result<Vec<LogLikelihood>> {
        let encoder = self.encoder();
        let pair = |request: &Continuation| encoder.pair(&request.context, &request.text);
        let sequences: Vec<Scored> = requests.iter().map(pair).collect::<Result<_>>()?;
        self.score(&sequences, progress)
    }

    fn generate(&mut self, requests: &[Prompt], progress: &dyn Progress) -> Result<Vec<String>> {
        let encoder = self.encoder();
        let stops = requests.iter().map(|request| encoder.stops(request));
        let stops: Vec<Vec<String>> = stops.collect::<Result<_>>()?;
        let prompts: Vec<Request<'_>> = requests
            .iter()
            .zip(&stops)
            .map(|(request, stops)| {
                Ok(Request {
                    tokens: encoder.prompt(&request.text, request.max_new_tokens)?,
                    stops,
                    max_new_tokens: request.max_new_tokens,
                })
            })
            .collect::<Result<_>>()?;
        decode::generate(
            &self.empty,
            &self.tokenizer,
            &prompts,
            self.n_sessions,
            progress,
        )
    }

    fn rolling_log_likelihoods(
        &mut self,
        texts: &[String],
        progress: &dyn Progress,
    ) -> Result<Vec<LogLikelihood>> {
        let score = |windows: &[Scored]| self.score(windows, progress);
        self.encoder().rolling_scores(texts, score)
    }
}
