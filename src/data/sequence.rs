//! Token ids with the labels that count.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{Example, PromptTemplate, Record, TextTokenizer};
use crate::error::{Error, Result};

/// A tokenized example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Token ids, `[len]`.
    pub ids: Vec<u32>,
    /// Whether token `t` is to be predicted (from those before it), `[len]`; never the first one.
    pub loss_mask: Vec<bool>,
}

impl Sequence {
    /// A sequence of which every token but the first is to be predicted.
    pub fn unmasked(ids: Vec<u32>) -> Self {
        let mut loss_mask = vec![true; ids.len()];
        loss_mask.iter_mut().take(1).for_each(|m| *m = false);
        Self { ids, loss_mask }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Number of tokens to be predicted.
    pub fn n_targets(&self) -> usize {
        self.loss_mask.iter().filter(|m| **m).count()
    }
}

/// How examples become sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizeOptions {
    /// Longest sequence, in tokens; at most the model's context.
    pub max_len: usize,
    /// Whether the prompt's tokens do not count in the loss (`train_on_inputs = false`).
    pub mask_prompt: bool,
    /// Whether an EOS token follows the completion. Without one known to the tokenizer, none does.
    pub add_eos: bool,
    /// Whether a longer sequence is cut at its end instead of refused.
    pub truncate: bool,
}

impl TokenizeOptions {
    /// Prompt masked, EOS added, longer sequences refused.
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

/// Tokenizes an example; `what` names it in errors.
///
/// The ids of the prompt, as a generation would be given them, are always a prefix of the sequence. Prompt and completion are
/// tokenized as one text where the prompt's own tokens come out unchanged; where a token would straddle the two, they are
/// tokenized apart and joined.
///
/// # Errors
/// [`Error::SequenceTooLong`] where the sequence is longer than `max_len` and may not be cut; [`Error::Tokenizer`].
#[doc(hidden)]
pub fn tokenize(
    example: &Example,
    tokenizer: &TextTokenizer,
    options: &TokenizeOptions,
    what: &str,
) -> Result<Sequence> {
    Ok(tokenize_uncut(example, tokenizer, options, what)?.0)
}

/// The sequence, and whether it was cut.
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
    let too_long = ids.len() > options.max_len;
    if too_long {
        if !options.truncate {
            return Err(Error::SequenceTooLong {
                what: what.to_string(),
                found: ids.len(),
                max: options.max_len,
            });
        }
        ids.truncate(options.max_len);
    }
    let masked = if options.mask_prompt {
        prompt.len()
    } else {
        tokenizer.prefix().len()
    };
    // The first token has nothing before it to be predicted from.
    let loss_mask = (0..ids.len()).map(|t| t >= masked.max(1)).collect();
    Ok((Sequence { ids, loss_mask }, too_long))
}

/// What [`tokenize_records`] made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenizedSet {
    /// The sequences, in the order of the records.
    pub sequences: Vec<Sequence>,
    /// How many were cut.
    pub truncated: usize,
    /// How many records were left out, since nothing of them remained to be predicted.
    pub dropped: usize,
}

impl TokenizedSet {
    /// Number of tokens in all sequences.
    pub fn n_tokens(&self) -> usize {
        self.sequences.iter().map(Sequence::len).sum()
    }
}

/// Words and tokenizes records, in parallel, in their order.
///
/// # Errors
/// As [`tokenize`], for the first record that fails, named by its number from 1; [`Error::InvalidArgument`] where none is
/// left with a token to be predicted.
pub fn tokenize_records(
    records: &[Record],
    template: PromptTemplate,
    tokenizer: &TextTokenizer,
    options: &TokenizeOptions,
) -> Result<TokenizedSet> {
    let all: Vec<Result<(Sequence, bool)>> = records
        .par_iter()
        .enumerate()
        .map(|(i, r)| {
            tokenize_uncut(
                &template.render(r),
                tokenizer,
                options,
                &format!("record {}", i + 1),
            )
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
