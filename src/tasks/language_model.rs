//! What a model has to be able to do to be evaluated.

use crate::error::Result;
use crate::progress::Progress;

/// A text and what may follow it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Continuation {
    /// The text before.
    pub context: String,
    /// The text whose log-likelihood is asked for, with its leading space.
    pub text: String,
}

/// How likely a continuation is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LogLikelihood {
    /// Sum of the natural logarithms of its tokens' probabilities.
    pub sum: f64,
    /// Whether each of its tokens is the most likely one.
    pub is_greedy: bool,
    /// Number of its tokens.
    pub n_tokens: usize,
}

/// A text to be continued by the most likely tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// The text.
    pub text: String,
    /// Strings that end the continuation. They are not part of it.
    pub stops: Vec<String>,
    /// Maximum number of new tokens.
    pub max_new_tokens: usize,
}

/// A model that can be evaluated. [`RuntimeModel`](super::RuntimeModel) is one; implement this for
/// others.
///
/// Each function gets all requests of a task, and returns as many results in the same order, so
/// that a model may batch them as it likes.
pub trait LanguageModel {
    /// Returns the log-likelihood of each continuation after its context.
    ///
    /// # Errors
    /// Returns an error of the model, or [`Error::Interrupted`](crate::Error::Interrupted).
    fn log_likelihoods(
        &mut self,
        requests: &[Continuation],
        progress: &dyn Progress,
    ) -> Result<Vec<LogLikelihood>>;

    /// Returns the continuation of each prompt, which ends before the first of its stop strings.
    ///
    /// # Errors
    /// Returns an error of the model, or [`Error::Interrupted`](crate::Error::Interrupted).
    fn generate(&mut self, requests: &[Prompt], progress: &dyn Progress) -> Result<Vec<String>>;

    /// Returns the log-likelihood of each whole text. A text that is longer than the model's
    /// context is cut into windows; its first token is predicted from a beginning-of-text token.
    ///
    /// # Errors
    /// Returns an error of the model, or [`Error::Interrupted`](crate::Error::Interrupted).
    fn rolling_log_likelihoods(
        &mut self,
        texts: &[String],
        progress: &dyn Progress,
    ) -> Result<Vec<LogLikelihood>>;
}
