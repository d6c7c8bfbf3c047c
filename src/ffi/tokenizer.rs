//! Text to tokens and back, where the model has a tokenizer.

use std::ffi::c_char;

use super::guard;
use super::memory;
use super::model::{elora_model, elora_token};
use super::status::{ELORA_STATUS_NOT_FOUND, Failure, Outcome, elora_status};
use crate::data::TextTokenizer;

/// What the tokenizer puts around a text.
pub type elora_special = i32;

/// Nothing: the text alone.
pub const ELORA_SPECIAL_NONE: elora_special = 0;
/// What stands before a text, for one that goes on.
pub const ELORA_SPECIAL_PROMPT: elora_special = 1;
/// What stands before and after a text, for one that is complete.
pub const ELORA_SPECIAL_FULL: elora_special = 2;

fn tokenizer(model: &elora_model) -> Outcome<&TextTokenizer> {
    let found = model.inner().tokenizer();
    found.ok_or_else(|| Failure::new(ELORA_STATUS_NOT_FOUND, "the model has no tokenizer"))
}

/// Whether the model has a tokenizer. false for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_has_tokenizer(model: *const elora_model) -> bool {
    // SAFETY: as the header asks of the caller.
    guard::value(false, || unsafe {
        Ok(memory::required(model, "model")?
            .inner()
            .tokenizer()
            .is_some())
    })
}

/// Writes the tokens of a text to `tokens`, and their number to `*n`. `special` is an ELORA_SPECIAL_ constant. Where
/// there are more than `cap`, ELORA_STATUS_INSUFFICIENT_SIZE with only `*n` written; `tokens` may be NULL where `cap`
/// is 0, and `n` may be NULL. ELORA_STATUS_NOT_FOUND where the model has no tokenizer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_tokenize(
    model: *const elora_model,
    text: *const c_char,
    special: elora_special,
    tokens: *mut elora_token,
    cap: usize,
    n: *mut usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        let tokenizer = tokenizer(memory::required(model, "model")?)?;
        let text = memory::text(text, "text")?;
        let ids = match special {
            ELORA_SPECIAL_NONE => tokenizer.encode(text, false)?,
            ELORA_SPECIAL_PROMPT => tokenizer.encode_prompt(text)?,
            ELORA_SPECIAL_FULL => tokenizer.encode(text, true)?,
            other => {
                return Err(Failure::argument(format!(
                    "special = {other}: no ELORA_SPECIAL_ constant"
                )));
            }
        };
        memory::copy_elements(&ids, tokens.cast::<u32>(), cap, n)
    })
}

/// Copies the text of tokens to `buf`, special tokens left out. `buf`, `cap` and `len` as in elora_last_error().
/// ELORA_STATUS_NOT_FOUND where the model has no tokenizer.
///
/// A character may take several tokens: text that is shown as it comes should be made of all tokens so far, not of
/// each alone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_detokenize(
    model: *const elora_model,
    tokens: *const elora_token,
    n_tokens: usize,
    buf: *mut c_char,
    cap: usize,
    len: *mut usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        let tokenizer = tokenizer(memory::required(model, "model")?)?;
        let ids = memory::slice(tokens, n_tokens, "tokens")?;
        let text = tokenizer.decode(ids_of(ids, "tokens")?)?;
        memory::copy_text(&text, buf, cap, len)
    })
}

/// The same ids as the library counts them.
pub(super) fn ids_of<'a>(tokens: &'a [elora_token], name: &str) -> Outcome<&'a [u32]> {
    match tokens.iter().position(|id| *id < 0) {
        Some(index) => Err(Failure::argument(format!(
            "`{name}`[{index}] is {}: ids are not negative",
            tokens[index]
        ))),
        None => Ok(bytemuck::cast_slice(tokens)),
    }
}
