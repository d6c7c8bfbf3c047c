//! Conversion of text to tokens and back, for models with a tokenizer.

use std::ffi::c_char;

use super::guard;
use super::memory;
use super::model::{elora_model, elora_token};
use super::status::{ELORA_STATUS_NOT_FOUND, Failure, Outcome, elora_status};
use crate::data::TextTokenizer;
use crate::error::Error;
use crate::runtime::Model;

/// Special tokens that the tokenizer adds to a text; one of the ELORA_SPECIAL_ constants.
pub type elora_special = i32;

/// No special tokens.
pub const ELORA_SPECIAL_NONE: elora_special = 0;
/// The special tokens that begin a text, for a text that will be continued.
pub const ELORA_SPECIAL_PROMPT: elora_special = 1;
/// The special tokens that begin and end a text, for a complete text.
pub const ELORA_SPECIAL_FULL: elora_special = 2;

pub(super) fn tokenizer(model: &elora_model) -> Outcome<&TextTokenizer> {
    let found = model.inner().tokenizer();
    found.ok_or_else(|| Failure::new(ELORA_STATUS_NOT_FOUND, "the model has no tokenizer"))
}

/// Whether the model has a tokenizer. Returns false if `model` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_has_tokenizer(model: *const elora_model) -> bool {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::value(false, || unsafe {
        Ok(memory::required(model, "model")?
            .inner()
            .tokenizer()
            .is_some())
    })
}

/// Converts a text to tokens. Writes them to `tokens`, a buffer of `cap` elements, and their number
/// to `*n`. `special` is an ELORA_SPECIAL_ constant. `tokens` may be NULL if `cap` is 0, and `n`
/// may be NULL.
///
/// ELORA_STATUS_INSUFFICIENT_SIZE if there are more than `cap` tokens; then only `*n` is written.
/// ELORA_STATUS_NOT_FOUND if the model has no tokenizer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_tokenize(
    model: *const elora_model,
    text: *const c_char,
    special: elora_special,
    tokens: *mut elora_token,
    cap: usize,
    n: *mut usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
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

/// Converts `n_tokens` tokens to text, without special tokens, and copies it to `buf`. `buf`, `cap`
/// and `len` are as in elora_last_error(). ELORA_STATUS_NOT_FOUND if the model has no tokenizer.
///
/// A character may consist of several tokens. To show text while it is generated, use
/// elora_text_push().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_detokenize(
    model: *const elora_model,
    tokens: *const elora_token,
    n_tokens: usize,
    buf: *mut c_char,
    cap: usize,
    len: *mut usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        let tokenizer = tokenizer(model)?;
        let ids = ids_of(memory::slice(tokens, n_tokens, "tokens")?, "tokens")?;
        ids.iter().try_for_each(|id| known(model.inner(), *id))?;
        let text = tokenizer.decode(ids)?;
        memory::copy_text(&text, buf, cap, len)
    })
}

/// Returns the ids as unsigned numbers, after checking that none is negative.
pub(super) fn ids_of<'a>(tokens: &'a [elora_token], name: &str) -> Outcome<&'a [u32]> {
    match tokens.iter().position(|id| *id < 0) {
        Some(index) => Err(Failure::argument(format!(
            "`{name}`[{index}] is {}: ids are not negative",
            tokens[index]
        ))),
        None => Ok(bytemuck::cast_slice(tokens)),
    }
}

/// Refuses ids that the model cannot produce. Other ids of no token have no text.
fn known(model: &Model, id: u32) -> Outcome {
    let n_ids = model.tokenizer().map_or(0, TextTokenizer::n_ids);
    let vocab_size = model.config().vocab_size().max(n_ids);
    match id as usize >= vocab_size {
        true => Err(Error::TokenOutOfRange {
            found: id,
            vocab_size,
        }
        .into()),
        false => Ok(()),
    }
}

/// Returns the id of one token after checking it.
pub(super) fn id_in(model: &Model, token: elora_token) -> Outcome<u32> {
    ids_of(&[token], "token")?;
    let id = token as u32;
    known(model, id)?;
    Ok(id)
}

/// Returns the id of one token after checking it.
pub(super) fn id_of(model: &elora_model, token: elora_token) -> Outcome<u32> {
    id_in(model.inner(), token)
}
