//! From texts to tokens, as lm-evaluation-harness' class `HFLM` does it.

use super::language_model::{LogLikelihood, Prompt};
use crate::data::TextTokenizer;
use crate::error::{Error, Result};

/// A sequence of tokens whose last ones are scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Scored {
    /// The tokens. The last one is only predicted.
    pub tokens: Vec<u32>,
    /// Number of tokens at the end whose log-likelihoods are asked for; fewer than all.
    pub n_scored: usize,
}

impl Scored {
    /// Takes the last `max_len + 1` tokens of a context and its continuation.
    fn new(context: &[u32], continuation: &[u32], max_len: usize) -> Result<Self> {
        let n_scored = continuation.len();
        if n_scored > max_len {
            return Err(Error::SequenceTooLong {
                what: "continuation".into(),
                found: n_scored,
                max: max_len,
            });
        }
        let mut tokens = [context, continuation].concat();
        let surplus = tokens.len().saturating_sub(max_len.saturating_add(1));
        tokens.drain(..surplus);
        Ok(Self { tokens, n_scored })
    }

    /// The tokens that the model sees.
    pub fn input(&self) -> &[u32] {
        &self.tokens[..self.tokens.len().saturating_sub(1)]
    }

    /// Index of the first token of the input after which logits are needed.
    pub fn first_row(&self) -> usize {
        self.input().len().saturating_sub(self.n_scored)
    }
}

/// Makes requests of texts.
pub(crate) struct Encoder<'a> {
    tokenizer: &'a TextTokenizer,
    max_len: usize,
    /// Token that stands before a text without context.
    start: Option<u32>,
    start_text: Option<String>,
}

impl<'a> Encoder<'a> {
    /// `max_len` is the largest number of tokens that the model sees, at least 1.
    pub fn new(tokenizer: &'a TextTokenizer, max_len: usize) -> Self {
        let start = tokenizer.bos_id().or(tokenizer.eos_id());
        Self {
            tokenizer,
            max_len,
            start,
            start_text: start.and_then(|id| tokenizer.id_to_token(id)),
        }
    }

    /// Tokenizes with the special tokens that the tokenizer puts before a text, unless the text
    /// begins with such a token itself.
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let begun = self
            .start_text
            .as_ref()
            .is_some_and(|start| text.starts_with(start));
        if begun {
            self.tokenizer.encode(text, false)
        } else {
            self.tokenizer.encode_prompt(text)
        }
    }

    fn start(&self) -> Result<u32> {
        self.start.ok_or_else(|| Error::Unsupported {
            what: format!(
                "a text without context, and {} without a token that begins or ends a text,",
                self.tokenizer.path().display()
            ),
        })
    }

    /// Tokenizes a context with its continuation. The tokens are those of both texts together, of
    /// which as many as the context alone has belong to it.
    pub fn pair(&self, context: &str, text: &str) -> Result<Scored> {
        let (context, continuation) = if context.is_empty() {
            let (start, ids) = (self.start()?, self.tokenizer.encode(text, false)?);
            match ids.split_first() {
                Some((first, rest)) if *first == start => (vec![start], rest.to_vec()),
                _ => (vec![start], ids),
            }
        } else {
            let kept = context.trim_end_matches(is_space);
            let moved = [&context[kept.len()..], text].concat();
            let whole = self.encode(&[kept, &moved].concat())?;
            let before = self.encode(kept)?;
            let rest = whole.get(before.len()..).unwrap_or(&[]).to_vec();
            (before, rest)
        };
        if continuation.is_empty() || context.is_empty() {
            let found = format!(
                "{} of the context, {} of {:?}",
                context.len(),
                continuation.len(),
                text.chars().take(60).collect::<String>()
            );
            return Err(Error::argument(
                "tokens of a continuation",
                found,
                "at least one of each",
            ));
        }
        Scored::new(&context, &continuation, self.max_len)
    }

    /// Cuts a text into windows in which each token is predicted once. A token other than the first
    /// of a window sees those before it in the window.
    pub fn rolling(&self, text: &str) -> Result<Vec<Scored>> {
        let ids = self.encode(text)?;
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let start = self.start()?;
        let first = ids.len().min(self.max_len);
        let mut windows = vec![Scored::new(&[start], &ids[..first], self.max_len)?];
        let mut done = first;
        while done < ids.len() {
            let n = (ids.len() - done).min(self.max_len);
            let end = done + n;
            windows.push(Scored {
                tokens: ids[end - self.max_len - 1..end].to_vec(),
                n_scored: n,
            });
            done = end;
        }
        Ok(windows)
    }

    /// Cuts several texts into windows, scores them by `score`, and adds up those of each text.
    pub fn rolling_scores(
        &self,
        texts: &[String],
        score: impl FnOnce(&[Scored]) -> Result<Vec<LogLikelihood>>,
    ) -> Result<Vec<LogLikelihood>> {
        let mut counts = Vec::with_capacity(texts.len());
        let mut all = Vec::new();
        for text in texts {
            let windows = self.rolling(text)?;
            counts.push(windows.len());
            all.extend(windows);
        }
        Ok(totals(&counts, score(&all)?))
    }

    /// Returns the strings that end the continuation of a prompt: its own, and the text of the token
    /// that ends a text.
    pub fn stops(&self, request: &Prompt) -> Result<Vec<String>> {
        let end = self.tokenizer.eos_id();
        let end = end.and_then(|id| self.tokenizer.id_to_token(id));
        let stops: Vec<String> = request.stops.iter().cloned().chain(end).collect();
        match stops.iter().position(String::is_empty) {
            None => Ok(stops),
            Some(at) => {
                let found = format!("an empty one at {at}");
                Err(Error::argument("stop strings", found, "at least one byte"))
            }
        }
    }

    /// Tokenizes a prompt, and takes its last tokens so that `n_new` more have room. Fails if no
    /// token of it would be left, as the harness does.
    pub fn prompt(&self, text: &str, n_new: usize) -> Result<Vec<u32>> {
        if n_new >= self.max_len {
            let expected = format!("less than {}, the model's context", self.max_len);
            return Err(Error::argument("max_gen_toks", n_new, expected));
        }
        let mut ids = self.encode(text)?;
        if ids.is_empty() {
            ids.push(self.start()?);
        }
        let room = self.max_len - n_new;
        ids.drain(..ids.len().saturating_sub(room));
        Ok(ids)
    }
}

/// Adds up the scores of the windows of each text, of which there are `counts`.
fn totals(counts: &[usize], scores: Vec<LogLikelihood>) -> Vec<LogLikelihood> {
    let mut scores = scores.into_iter();
    let total = |n: &usize| {
        let mut total = LogLikelihood {
            is_greedy: true,
            ..Default::default()
        };
        for score in scores.by_ref().take(*n) {
            total.sum += score.sum;
            total.n_tokens += score.n_tokens;
            total.is_greedy &= score.is_greedy;
        }
        total
    };
    counts.iter().map(total).collect()
}

/// Returns whether Python counts a character as white space.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}
