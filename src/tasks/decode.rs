//! Continues many prompts at once, each until one of its stop strings.

use crate::data::{Detokenizer, TextTokenizer};
use crate::error::{Error, Result};
use crate::progress::{Progress, Task};
use crate::runtime::{Session, Step, decode_steps};

/// Shortest common beginning of all prompts that is computed once.
const SHORTEST_SHARED: usize = 8;

/// Largest number of tokens of prompts that are computed between two tokens of the sequences that
/// are running, but for one prompt at least.
const PROMPT_TOKENS_AT_ONCE: usize = 1024;

/// A prompt to be continued.
pub(super) struct Request<'a> {
    pub tokens: Vec<u32>,
    pub stops: &'a [String],
    pub max_new_tokens: usize,
}

/// A sequence that is being generated.
struct Running {
    index: usize,
    session: Session,
    /// Tokens that the session does not hold yet.
    pending: Vec<u32>,
    output: Vec<u32>,
    detokenizer: Detokenizer,
    text: String,
}

impl Running {
    /// Adds a token. Returns whether a stop string is complete.
    fn add(&mut self, tokenizer: &TextTokenizer, token: u32, stops: &[String]) -> Result<bool> {
        self.output.push(token);
        let added = self.detokenizer.push(tokenizer, token)?;
        // A stop string may have begun before.
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        let mut start = self.text.len().saturating_sub(longest);
        while !self.text.is_char_boundary(start) {
            start -= 1;
        }
        self.text.push_str(added);
        let tail = &self.text[start..];
        Ok(stops.iter().any(|stop| tail.contains(stop.as_str())))
    }
}

/// Continues prompts greedily, `n_sessions` at a time. `empty` is a session without tokens, whose
/// copies compute. A sequence ends at a token that ends the model's generations, before a stop
/// string, at its largest number of tokens, or where the context is full.
///
/// # Errors
/// Returns the errors of [`decode_steps`], of the tokenizer, and of an interruption.
pub(super) fn generate(
    empty: &Session,
    tokenizer: &TextTokenizer,
    requests: &[Request<'_>],
    n_sessions: usize,
    progress: &dyn Progress,
) -> Result<Vec<String>> {
    let mut task = Task::begin(progress, "generate", requests.len(), "requests")?;
    let model = empty.model();
    let (vocab_size, n_ids) = (model.config().vocab_size(), model.n_ids());
    let (shared, n_shared) = shared(empty, requests)?;
    // The longest come first, so that the last ones end at about the same time.
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.retain(|index| requests[*index].max_new_tokens > 0);
    order.sort_by_key(|index| std::cmp::Reverse(requests[*index].tokens.len()));
    let mut waiting = order.into_iter().peekable();
    let mut outputs = vec![String::new(); requests.len()];
    let mut running: Vec<Running> = Vec::new();
    let mut logits = vec![0.0; vocab_size * n_sessions.min(requests.len())];
    loop {
        let mut n_new = 0;
        while running.len() < n_sessions
            && let Some(index) = waiting.peek().copied()
        {
            let pending = requests[index].tokens[n_shared..].to_vec();
            if n_new > 0 && n_new + pending.len() > PROMPT_TOKENS_AT_ONCE {
                break;
            }
            n_new += pending.len();
            waiting.next();
            running.push(Running {
                index,
                session: shared.copy(),
                pending,
                output: Vec::new(),
                detokenizer: Detokenizer::new(),
                text: String::new(),
            });
        }
        if running.is_empty() {
            return Ok(outputs);
        }
        let rows = logits.chunks_exact_mut(vocab_size);
        let mut steps: Vec<Step<'_>> = running
            .iter_mut()
            .zip(rows)
            .map(|(sequence, logits)| Step {
                session: &mut sequence.session,
                tokens: &sequence.pending,
                logits,
            })
            .collect();
        decode_steps(&mut steps)?;
        drop(steps);
        let mut left = Vec::with_capacity(running.len());
        for (mut sequence, logits) in running.into_iter().zip(logits.chunks_exact(vocab_size)) {
            let request = &requests[sequence.index];
            let next = best(&logits[..n_ids.min(logits.len())]);
            let ends = model.stop_ids().contains(&next)
                || sequence.add(tokenizer, next, request.stops)?
                || sequence.output.len() >= request.max_new_tokens
                || sequence.session.position() == sequence.session.n_ctx();
            if ends {
                let text = tokenizer.decode(&sequence.output)?;
                outputs[sequence.index] = cut(&text, request.stops).to_string();
                task.step("")?;
            } else {
                sequence.pending = vec![next];
                left.push(sequence);
            }
        }
        running = left;
        task.check()?;
    }
}

/// Computes what all prompts begin with, but for the last token of each. Returns the session and
/// its number of tokens.
fn shared(empty: &Session, requests: &[Request<'_>]) -> Result<(Session, usize)> {
    let mut session = empty.copy();
    if requests.iter().any(|request| request.tokens.is_empty()) {
        return Err(Error::argument(
            "tokens of a prompt",
            "none",
            "at least one",
        ));
    }
    let Some((first, others)) = requests
        .split_first()
        .filter(|(_, others)| !others.is_empty())
    else {
        return Ok((session, 0));
    };
    let common = |other: &Request<'_>| {
        let pairs = first.tokens.iter().zip(&other.tokens);
        let equal = pairs.take_while(|(a, b)| a == b).count();
        equal.min(other.tokens.len() - 1)
    };
    let n = others
        .iter()
        .map(common)
        .min()
        .unwrap_or(0)
        .min(first.tokens.len() - 1);
    if n < SHORTEST_SHARED {
        return Ok((session, 0));
    }
    session.decode(&first.tokens[..n], None)?;
    Ok((session, n))
}

/// Returns the index of the largest number, the first one of several.
fn best(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (index, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = index;
        }
    }
    best as u32
}

/// Returns the text before the first stop string.
pub(crate) fn cut<'a>(text: &'a str, stops: &[String]) -> &'a str {
    let found = stops.iter().filter_map(|stop| text.find(stop.as_str()));
    &text[..found.min().unwrap_or(text.len())]
}
