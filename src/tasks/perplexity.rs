//! Perplexity of a text as others compute it.

use serde::Serialize;

use super::encode::Scored;
use super::runtime_model::RuntimeModel;
use crate::error::{Error, Result};
use crate::progress::Progress;

/// How a text is cut into windows, and which tokens of a window are scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WindowRule {
    /// As in the papers of GPTQ, SparseGPT and Wanda: whole windows, each from its own beginning;
    /// what is left at the end is dropped. The mean loss of a window stands for all of its tokens.
    Papers,
    /// As llama.cpp's `perplexity`: whole windows, of which the second half is scored, with the
    /// token that begins a text in the place of the first one if the tokenizer puts one there.
    LlamaCpp,
}

/// Perplexity of a text by a [`WindowRule`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct WindowedPerplexity {
    /// The rule.
    pub rule: WindowRule,
    /// Number of tokens in a window.
    pub context: usize,
    /// Number of windows.
    pub n_windows: usize,
    /// Number of tokens that were predicted.
    pub predicted_tokens: usize,
    /// Mean negative log-likelihood of a token, in nats.
    pub nll: f64,
    /// `exp(nll)`.
    pub perplexity: f64,
    /// Standard error of `nll` over tokens in windows, from the windows' means; `None` for one
    /// window.
    pub nll_stderr: Option<f64>,
}

/// Computes the perplexity of a text by a rule. The text is tokenized as a whole, with the tokens
/// that the tokenizer puts before a text.
///
/// # Errors
/// Returns [`Error::InvalidArgument`] if the window is shorter than 2 tokens (4 for llama.cpp's
/// rule), or longer than the model's context or than the text, and the errors of the model.
pub fn windowed_perplexity(
    model: &RuntimeModel,
    text: &str,
    context: usize,
    rule: WindowRule,
    progress: &dyn Progress,
) -> Result<WindowedPerplexity> {
    let least = match rule {
        WindowRule::Papers => 2,
        WindowRule::LlamaCpp => 4,
    };
    let max = model.max_len();
    if context < least || context > max {
        let expected = format!("in {least}..={max}, the model's context");
        return Err(Error::argument("context", context, expected));
    }
    let tokenizer = model.tokenizer();
    let ids = tokenizer.encode_prompt(text)?;
    if ids.len() < context {
        let found = format!("{} tokens", ids.len());
        return Err(Error::argument(
            "text",
            found,
            format!("at least one window, {context}"),
        ));
    }
    let start = match rule {
        WindowRule::LlamaCpp => tokenizer.prefix().first().copied(),
        WindowRule::Papers => None,
    };
    let n_scored = match rule {
        WindowRule::Papers => context - 1,
        WindowRule::LlamaCpp => context - 1 - context / 2,
    };
    let window = |tokens: &[u32]| {
        let mut tokens = tokens.to_vec();
        if let (Some(start), Some(first)) = (start, tokens.first_mut()) {
            *first = start;
        }
        Scored { tokens, n_scored }
    };
    let windows: Vec<Scored> = ids.chunks_exact(context).map(window).collect();
    let scores = model.score(&windows, progress)?;
    let means: Vec<f64> = scores
        .iter()
        .map(|score| -score.sum / n_scored as f64)
        .collect();
    let n = means.len() as f64;
    let nll = means.iter().sum::<f64>() / n;
    let squares: f64 = means.iter().map(|mean| (mean - nll).powi(2)).sum();
    Ok(WindowedPerplexity {
        rule,
        context,
        n_windows: windows.len(),
        predicted_tokens: n_scored * windows.len(),
        nll,
        perplexity: nll.exp(),
        nll_stderr: (windows.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt()),
    })
}
