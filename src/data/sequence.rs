//! Token ids with a loss mask.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::template::Turns;
use super::{Example, Record, Template, TextTokenizer};
use crate::error::{Error, Result};

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
}

impl TokenizeOptions {
    /// Creates settings that mask the prompt, add EOS, and refuse sequences that are too long.
    pub fn new(max_len: usize) -> Self {
        Self {
            max_len,
            mask_prompt: true,
            add_eos: true,
            truncate: false,
        }
    }

    setters! {
        with_mask_prompt(mask_prompt: bool);
        with_add_eos(add_eos: bool);
        with_truncate(truncate: bool);
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
    Ok(tokenize_uncut(example, tokenizer, options, what)?.0)
}

/// Returns the sequence and whether it was truncated.
fn tokenize_uncut(
    example: &Example,
    tokenizer: &TextTokenizer,
    options: &TokenizeOptions,
    what: &str,
) -> Result<(Sequence, bool)> {
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
    let too_long = cut(&mut ids, options, what)?;
    let masked = if options.mask_prompt {
        prompt.len()
    } else {
        tokenizer.prefix().len()
    };
    // The first token has no tokens before it to be predicted from.
    let loss_mask = (0..ids.len()).map(|t| t >= masked.max(1)).collect();
    Ok((Sequence { ids, loss_mask }, too_long))
}

/// Tokenizes a conversation. A token is a target if a byte of it is in a part that is learned. The
/// token that ends a turn is always a target: a special token right behind a part that does not end
/// with one itself is a target as well, and a last turn that no special token ends gets EOS.
fn tokenize_turns(
    turns: &Turns<'_, '_>,
    tokenizer: &TextTokenizer,
    options: &TokenizeOptions,
    what: &str,
) -> Result<(Sequence, bool)> {
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
    let too_long = cut(&mut ids, options, what)?;
    mask.truncate(ids.len());
    let loss_mask = mask;
    Ok((Sequence { ids, loss_mask }, too_long))
}

/// Cuts a sequence that is too long, or refuses it. Returns whether it was cut.
fn cut(ids: &mut Vec<u32>, options: &TokenizeOptions, what: &str) -> Result<bool> {
    let too_long = ids.len() > options.max_len;
    if too_long && !options.truncate {
        return Err(Error::SequenceTooLong {
            what: what.to_string(),
            found: ids.len(),
            max: options.max_len,
        });
    }
    ids.truncate(options.max_len);
    Ok(too_long)
}

/// Result of [`tokenize_records`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenizedSet {
    /// Sequences in the order of the records.
    pub sequences: Vec<Sequence>,
    /// Number of truncated sequences.
    pub truncated: usize,
    /// Number of records that were dropped because they had no target tokens.
    pub dropped: usize,
}

impl TokenizedSet {
    /// Returns the number of tokens in all sequences.
    pub fn n_tokens(&self) -> usize {
        self.sequences.iter().map(Sequence::len).sum()
    }
}

/// Renders and tokenizes records in parallel, and keeps their order. Of a conversation, the turns of
/// the assistant are targets, each with the token that ends it.
///
/// # Errors
/// Returns the errors of [`tokenize`] for the first record that fails, named by its number starting
/// from 1, those of [`Template::render`], and [`Error::InvalidArgument`] if no record has a target
/// token.
pub fn tokenize_records(
    records: &[Record],
    template: impl Into<Template>,
    tokenizer: &TextTokenizer,
    options: &TokenizeOptions,
) -> Result<TokenizedSet> {
    let template = template.into();
    let all: Vec<Result<(Sequence, bool)>> = records
        .par_iter()
        .enumerate()
        .map(|(i, record)| {
            let what = format!("record {}", i + 1);
            match template.conversation(record)? {
                Some(turns) => tokenize_turns(&turns, tokenizer, options, &what).map_err(|e| {
                    let Error::Template { path, reason } = e else {
                        return e;
                    };
                    let reason = format!("{what}: {reason}");
                    Error::Template { path, reason }
                }),
                None => {
                    let example = template.prompt().render(record);
                    tokenize_uncut(&example, tokenizer, options, &what)
                }
            }
        })
        .collect();
    let mut set = TokenizedSet {
        sequences: Vec::with_capacity(records.len()),
        truncated: 0,
        dropped: 0,
    };
    for one in all {
        let (sequence, cut) = one?;
        set.truncated += usize::from(cut);
        if sequence.n_targets() == 0 {
            set.dropped += 1;
        } else {
            set.sequences.push(sequence);
        }
    }
    if set.sequences.is_empty() {
        let found = format!("{} of them", records.len());
        return Err(Error::argument(
            "records",
            found,
            "none has a token to be predicted within the length allowed",
        ));
    }
    Ok(set)
}
