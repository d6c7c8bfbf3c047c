//! Token ids with a loss mask.

use std::fmt;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::template::Turns;
use super::{Example, Message, Record, Template, TextTokenizer};
use crate::error::{Error, Result};
use crate::threads;

/// A tokenized example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Token ids, `[len]`.
    pub ids: Vec<u32>,
    /// Whether token `t` is a target, predicted from the tokens before it, `[len]`; always `false`
    /// for the first token.
    pub loss_mask: Vec<bool>,
}

impl Sequence {
    /// Creates a sequence in which every token but the first is a target.
    pub fn unmasked(ids: Vec<u32>) -> Self {
        let mut loss_mask = vec![true; ids.len()];
        loss_mask.iter_mut().take(1).for_each(|m| *m = false);
        Self { ids, loss_mask }
    }

    /// Returns the number of tokens.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Returns whether the sequence has no tokens.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Returns the number of target tokens.
    pub fn n_targets(&self) -> usize {
        self.loss_mask.iter().filter(|m| **m).count()
    }

    /// Cuts off what is beyond `len` tokens.
    fn truncate(&mut self, len: usize) {
        self.ids.truncate(len);
        self.loss_mask.truncate(len);
    }
}

/// Settings for tokenizing examples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizeOptions {
    /// Maximum length of a sequence in tokens; at most the model's context length.
    pub max_len: usize,
    /// Whether the tokens of the prompt are excluded from the loss (`train_on_inputs = false`).
    pub mask_prompt: bool,
    /// Whether an EOS token follows the completion, if the tokenizer has one.
    pub add_eos: bool,
    /// Whether a sequence that is too long is truncated at its end instead of refused.
    pub truncate: bool,
    /// Whether a record that does not fit, or that the chat template refuses, is left out instead of
    /// refused (see [`tokenize_records`]).
    #[serde(default)]
    pub leave_out: bool,
}

impl TokenizeOptions {
    /// Creates settings that mask the prompt, add EOS, and refuse sequences that are too long.
    pub fn new(max_len: usize) -> Self {
        Self {
            max_len,
            mask_prompt: true,
            add_eos: true,
            truncate: false,
            leave_out: false,
        }
    }

    setters! {
        with_mask_prompt(mask_prompt: bool);
        with_add_eos(add_eos: bool);
        with_truncate(truncate: bool);
        with_leave_out(leave_out: bool);
    }
}

/// Tokenizes an example. `what` names it in errors.
///
/// The sequence always begins with the ids that the prompt alone would have in generation. Prompt
/// and completion are tokenized as one text if that leaves the tokens of the prompt unchanged. If a
/// token would span both, they are tokenized separately and joined.
///
/// # Errors
/// Returns [`Error::SequenceTooLong`] if the sequence is longer than `max_len` and `truncate` is
/// false, and [`Error::Tokenizer`] if the tokenizer fails.
#[doc(hidden)]
pub fn tokenize(
    example: &Example,
    tokenizer: &TextTokenizer,
    options: &TokenizeOptions,
    what: &str,
) -> Result<Sequence> {
    let mut sequence = tokenize_example(example, tokenizer, options)?;
    if sequence.len() > options.max_len && !options.truncate {
        return Err(Error::SequenceTooLong {
            what: what.to_string(),
            found: sequence.len(),
            max: options.max_len,
        });
    }
    sequence.truncate(options.max_len);
    Ok(sequence)
}

/// Tokenizes an example, however long it is.
fn tokenize_example(
    example: &Example,
    tokenizer: &TextTokenizer,
    options: &TokenizeOptions,
) -> Result<Sequence> {
    let prompt = tokenizer.encode_prompt(&example.prompt)?;
    let mut ids = if example.prompt.is_empty() {
        tokenizer.encode_prompt(&example.completion)?
    } else {
        let whole =
            tokenizer.encode_prompt(&format!("{}{}", example.prompt, example.completion))?;
        if whole.starts_with(&prompt) {
            whole
        } else {
            [
                prompt.as_slice(),
                &tokenizer.encode(&example.completion, false)?,
            ]
            .concat()
        }
    };
    if let (true, Some(eos)) = (options.add_eos, tokenizer.eos_id()) {
        ids.push(eos);
    }
    let masked = if options.mask_prompt {
        prompt.len()
    } else {
        tokenizer.prefix().len()
    };
    // The first token has no tokens before it to be predicted from.
    let loss_mask = (0..ids.len()).map(|t| t >= masked.max(1)).collect();
    Ok(Sequence { ids, loss_mask })
}

/// Tokenizes a conversation. A token is a target if a byte of it is in a part that is learned. The
/// token that ends a turn is always a target: a special token right behind a part that does not end
/// with one itself is a target as well, and a last turn that no special token ends gets EOS.
fn tokenize_turns(
    turns: &Turns<'_, '_>,
    tokenizer: &TextTokenizer,
    options: &TokenizeOptions,
) -> Result<Sequence> {
    let rendered = turns.trained()?;
    let (mut ids, bytes) = tokenizer.encode_with_bytes(&rendered.text)?;
    // White space may follow the token that ends a turn.
    let says = |token: usize| {
        let text = rendered.text.get(bytes[token].clone());
        text.is_none_or(|text| !text.trim().is_empty())
    };
    let mut mask = vec![!options.mask_prompt; ids.len()];
    let mut parts = rendered.trained.iter().peekable();
    for (token, bytes) in bytes.iter().enumerate() {
        while parts.next_if(|part| part.end <= bytes.start).is_some() {}
        let inside = parts.peek().is_some_and(|part| part.start < bytes.end);
        let ends = token > 0
            && mask[token - 1]
            && tokenizer.is_special(ids[token])
            && tokenizer.bos_id() != Some(ids[token])
            && (0..token)
                .rev()
                .find(|before| says(*before))
                .is_some_and(|last| !tokenizer.is_special(ids[last]));
        mask[token] |= inside || ends;
    }
    if turns.ends_trained()
        && let Some(last) = (0..mask.len()).rfind(|token| mask[*token] && says(*token))
        && !ids[last..].iter().any(|id| tokenizer.is_special(*id))
        && let (true, Some(eos)) = (options.add_eos, tokenizer.eos_id())
    {
        // The white space behind the answer comes before EOS in generation too.
        mask[last..].fill(true);
        ids.push(eos);
        mask.push(true);
    }
    if let Some(first) = mask.first_mut() {
        *first = false;
    }
    Ok(Sequence {
        ids,
        loss_mask: mask,
    })
}

/// A record that does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misfit {
    /// Number of the record, from 1.
    pub record: usize,
    /// Why it does not fit.
    pub reason: String,
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "record {}: {}", self.record, self.reason)
    }
}

/// Result of [`tokenize_records`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenizedSet {
    /// Sequences in the order of the records.
    pub sequences: Vec<Sequence>,
    /// Records whose sequences were truncated at the end.
    pub truncated: Vec<Misfit>,
    /// Records that have no sequence.
    pub left_out: Vec<Misfit>,
}

impl TokenizedSet {
    /// Returns the number of tokens in all sequences.
    pub fn n_tokens(&self) -> usize {
        self.sequences.iter().map(Sequence::len).sum()
    }
}

/// What becomes of a record.
enum Fate {
    Fits(Sequence),
    Truncated(Sequence, String),
    LeftOut(String),
}

/// Renders and tokenizes records in parallel, and keeps their order. Of a conversation, the turns of
/// the assistant are targets, each with the token that ends it.
///
/// A record is left out if it has no question or no answer, or if none of its tokens is a target.
/// With [`leave_out`](TokenizeOptions::leave_out), a record is also left out if it is too long and
/// not truncated, or if the chat template refuses it.
///
/// # Errors
/// Returns the errors of [`tokenize`] for the first record that fails, named by its number starting
/// at 1; [`Error::Template`] for a conversation that the chat template refuses;
/// [`Error::InvalidArgument`] for a conversation without a chat template, and if every record is
/// left out.
pub fn tokenize_records(
    records: &[Record],
    template: impl Into<Template>,
    tokenizer: &TextTokenizer,
    options: &TokenizeOptions,
) -> Result<TokenizedSet> {
    threads::ready()?;
    let template = template.into();
    let fates: Vec<Result<Fate>> = records
        .par_iter()
        .enumerate()
        .map(|(i, record)| {
            let what = format!("record {}", i + 1);
            fate(record, &template, tokenizer, options, &what)
        })
        .collect();
    let mut set = TokenizedSet {
        sequences: Vec::with_capacity(records.len()),
        truncated: Vec::new(),
        left_out: Vec::new(),
    };
    for (i, fate) in fates.into_iter().enumerate() {
        let misfit = |reason| Misfit {
            record: i + 1,
            reason,
        };
        match fate? {
            Fate::Fits(sequence) => set.sequences.push(sequence),
            Fate::Truncated(sequence, reason) => {
                set.sequences.push(sequence);
                set.truncated.push(misfit(reason));
            }
            Fate::LeftOut(reason) => set.left_out.push(misfit(reason)),
        }
    }
    if set.sequences.is_empty() {
        let first = set.left_out.first();
        let first = first.map_or(String::new(), |misfit| format!("; {misfit}"));
        return Err(Error::argument(
            "records",
            format!("{} of them", records.len()),
            format!("at least one that the model can learn from{first}"),
        ));
    }
    Ok(set)
}

fn fate(
    record: &Record,
    template: &Template,
    tokenizer: &TextTokenizer,
    options: &TokenizeOptions,
    what: &str,
) -> Result<Fate> {
    if let Some(part) = missing(record) {
        return Ok(Fate::LeftOut(format!("it has no {part}")));
    }
    let tokenized = match template.conversation(record)? {
        Some(turns) => tokenize_turns(&turns, tokenizer, options),
        None => tokenize_example(&template.prompt().render(record), tokenizer, options),
    };
    let mut sequence = match tokenized {
        Err(Error::Template { reason, .. }) if options.leave_out => {
            return Ok(Fate::LeftOut(reason));
        }
        Err(Error::Template { path, reason }) => {
            let reason = format!("{what}: {reason}");
            return Err(Error::Template { path, reason });
        }
        tokenized => tokenized?,
    };
    let (found, max) = (sequence.len(), options.max_len);
    let too_long = (found > max).then(|| format!("{found} tokens, and at most {max} fit"));
    if too_long.is_some() && !options.truncate && !options.leave_out {
        let what = what.to_string();
        return Err(Error::SequenceTooLong { what, found, max });
    }
    if sequence.n_targets() == 0 {
        return Ok(Fate::LeftOut("no part of it is learned".into()));
    }
    Ok(match too_long {
        None => Fate::Fits(sequence),
        Some(reason) if !options.truncate => Fate::LeftOut(reason),
        Some(reason) => {
            sequence.truncate(max);
            if sequence.n_targets() == 0 {
                Fate::LeftOut(format!("{reason}; they end before its answer"))
            } else {
                Fate::Truncated(sequence, reason)
            }
        }
    })
}

/// Returns the part that a record needs and that is blank. The prompt of a completion may be empty.
fn missing(record: &Record) -> Option<&'static str> {
    let (question, answer) = match record {
        Record::Instruction {
            instruction,
            input,
            output,
            ..
        } if instruction.trim().is_empty() => (input.as_str(), output),
        Record::Instruction {
            instruction,
            output,
            ..
        } => (instruction.as_str(), output),
        Record::Question { question, answer } => (question.as_str(), answer),
        Record::Completion { completion, .. } => ("-", completion),
        Record::Conversation { messages, .. } => {
            // A turn without text may call a tool.
            let says = |m: &Message| !m.content.trim().is_empty() || !m.more.is_empty();
            let silent = !messages.iter().any(|m| m.is_assistant() && says(m));
            return silent.then_some("answer");
        }
        Record::Text { .. } => return None,
    };
    match (question.trim().is_empty(), answer.trim().is_empty()) {
        (true, _) => Some("question"),
        (_, true) => Some("answer"),
        _ => None,
    }
}
