//! Special tokens, pieces, chat templates, and text that is made while tokens come.

use std::ffi::c_char;
use std::sync::Arc;

use super::exclusive::Exclusive;
use super::guard;
use super::memory::{self, Out};
use super::model::{elora_model, elora_token, reserved};
use super::options::{self, Growing};
use super::status::{ELORA_STATUS_NOT_FOUND, Failure, Outcome, elora_status};
use super::tokenizer::{id_of, tokenizer};
use crate::data::Message;
use crate::error::Error;
use crate::runtime::TextStream;

/// A token with a role; one of the ELORA_TOKEN_ constants.
pub type elora_token_role = i32;

/// The token that begins a text.
pub const ELORA_TOKEN_BEGIN: elora_token_role = 0;
/// The token that ends a text.
pub const ELORA_TOKEN_END: elora_token_role = 1;
/// The token that ends a turn of the model in a conversation, as the chat template writes it.
pub const ELORA_TOKEN_END_OF_TURN: elora_token_role = 2;

/// Writes the token with a role to `*token`. `role` is an ELORA_TOKEN_ constant.
/// ELORA_STATUS_NOT_FOUND if the model has no such token.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_special_token(
    model: *const elora_model,
    role: elora_token_role,
    token: *mut elora_token,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        let tokens = tokenizer(model)?;
        let out = Out::required(token, "token")?;
        let (found, what) = match role {
            ELORA_TOKEN_BEGIN => (tokens.bos_id(), "begins a text"),
            ELORA_TOKEN_END => (tokens.eos_id(), "ends a text"),
            ELORA_TOKEN_END_OF_TURN => {
                let chat = model.inner().chat_template();
                let found = chat.and_then(|chat| chat.end_of_turn(tokens));
                (found, "ends a turn")
            }
            other => {
                return Err(Failure::argument(format!(
                    "role = {other}: no ELORA_TOKEN_ constant"
                )));
            }
        };
        let none = || {
            let text = format!("the model has no token that {what}");
            Failure::new(ELORA_STATUS_NOT_FOUND, text)
        };
        // The cast keeps the bits: ids of tokens are far below 2^31.
        out.write(found.ok_or_else(none)? as elora_token);
        Ok(())
    })
}

/// Copies all special tokens to `tokens`, a buffer of `cap` elements, in ascending order, and writes
/// their number to `*n`. `tokens` may be NULL if `cap` is 0, and `n` may be NULL.
/// ELORA_STATUS_INSUFFICIENT_SIZE if there are more than `cap`; then only `*n` is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_special_tokens(
    model: *const elora_model,
    tokens: *mut elora_token,
    cap: usize,
    n: *mut usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let found = tokenizer(memory::required(model, "model")?)?.special_tokens();
        let ids: Vec<u32> = found.into_iter().map(|(id, _)| id).collect();
        memory::copy_elements(&ids, tokens.cast::<u32>(), cap, n)
    })
}

/// Number of tokens that may be drawn: logits from there on stand for no token, because many
/// vocabularies are padded. At most elora_model_vocab_size(), and the number of logits to pass to
/// elora_sampler_sample(). Returns 0 if `model` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_token_count(model: *const elora_model) -> usize {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::value(0, || unsafe {
        Ok(memory::required(model, "model")?.inner().n_ids())
    })
}

/// Copies the bytes that a token adds to a text, after other tokens, to `buf`, a buffer of `cap`
/// bytes, and writes their number to `*n`. There is no NUL at the end. They may be a part of a
/// character. Special tokens have their names, and ids that stand for no token have no bytes. `buf`
/// may be NULL if `cap` is 0, and `n` may be NULL. ELORA_STATUS_INSUFFICIENT_SIZE if there are more
/// than `cap` bytes; then only `*n` is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_token_piece(
    model: *const elora_model,
    token: elora_token,
    buf: *mut u8,
    cap: usize,
    n: *mut usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        let piece = tokenizer(model)?.piece(id_of(model, token)?)?;
        memory::copy_elements(&piece, buf, cap, n)
    })
}

/// Number of notices: sentences about what is stored in the model's files and not used, or used in
/// another way than the files say. Returns 0 if `model` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_notice_count(model: *const elora_model) -> usize {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::value(0, || unsafe {
        Ok(memory::required(model, "model")?.inner().notices().len())
    })
}

/// Copies notice `index`, below elora_model_notice_count(), to `buf`. `buf`, `cap` and `len` are as
/// in elora_last_error().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_notice(
    model: *const elora_model,
    index: usize,
    buf: *mut c_char,
    cap: usize,
    len: *mut usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let all = memory::required(model, "model")?.inner().notices();
        let notice = all.get(index).ok_or_else(|| {
            Failure::argument(format!(
                "index = {index}: the model has {} notices",
                all.len()
            ))
        })?;
        memory::copy_text(notice, buf, cap, len)
    })
}

/// Whether the model has a chat template. Returns false if `model` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_has_chat_template(model: *const elora_model) -> bool {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::value(false, || unsafe {
        Ok(memory::required(model, "model")?
            .inner()
            .chat_template()
            .is_some())
    })
}

/// Renders a conversation by the model's chat template.
///
/// # Safety
/// The requirements are those of [`memory::copy_text`].
unsafe fn render(
    model: &elora_model,
    messages: &[Message],
    tools: &[serde_json::Value],
    add_generation_prompt: bool,
    (buf, cap, len): (*mut c_char, usize, *mut usize),
) -> Outcome {
    let none = || Failure::new(ELORA_STATUS_NOT_FOUND, "the model has no chat template");
    let chat = model.inner().chat_template().ok_or_else(none)?;
    let text = chat.render(messages, tools, add_generation_prompt)?;
    // SAFETY: the caller meets the requirements.
    unsafe { memory::copy_text(&text, buf, cap, len) }
}

/// Writes a conversation as one text, as the model was trained to read it, and copies it to `buf`.
/// `roles` and `contents` have `n_messages` elements each; usual roles are "system", "user" and
/// "assistant". If `add_generation_prompt` is true, the text ends where the model's answer begins.
/// `buf`, `cap` and `len` are as in elora_last_error().
///
/// The text holds the special tokens: pass it to elora_model_tokenize() with ELORA_SPECIAL_NONE.
///
/// ELORA_STATUS_NOT_FOUND if the model has no chat template. ELORA_STATUS_INVALID_FORMAT if the
/// template refuses the conversation; many want the roles to alternate.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_apply_chat_template(
    model: *const elora_model,
    roles: *const *const c_char,
    contents: *const *const c_char,
    n_messages: usize,
    add_generation_prompt: bool,
    buf: *mut c_char,
    cap: usize,
    len: *mut usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        let roles = memory::texts(roles, n_messages, "roles")?;
        let contents = memory::texts(contents, n_messages, "contents")?;
        let pairs = roles.into_iter().zip(contents);
        let messages: Vec<Message> = pairs
            .map(|(role, content)| Message::new(role, content))
            .collect();
        render(
            model,
            &messages,
            &[],
            add_generation_prompt,
            (buf, cap, len),
        )
    })
}

/// Same as elora_model_apply_chat_template(), for conversations with more than text: `messages` is a
/// JSON array of objects as in OpenAI's API (role, content, tool_calls, ...), and `tools` a JSON
/// array of the tools' schemas, or NULL for none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_apply_chat_template_json(
    model: *const elora_model,
    messages: *const c_char,
    tools: *const c_char,
    add_generation_prompt: bool,
    buf: *mut c_char,
    cap: usize,
    len: *mut usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        let json = |name: &str, error| Error::json(name, error);
        let messages: Vec<Message> = serde_json::from_str(memory::text(messages, "messages")?)
            .map_err(|error| json("messages", error))?;
        let tools: Vec<serde_json::Value> = if tools.is_null() {
            Vec::new()
        } else {
            serde_json::from_str(memory::text(tools, "tools")?)
                .map_err(|error| json("tools", error))?
        };
        let out = (buf, cap, len);
        render(model, &messages, &tools, add_generation_prompt, out)
    })
}

/// A text that is made of tokens while they come, and ends at stop strings. Mutable: it may be used
/// by one thread at a time.
pub struct elora_text {
    inner: Exclusive<TextStream>,
}

/// Options of a text. Initialize them with elora_text_options_init(), then set fields.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct elora_text_options {
    /// sizeof(elora_text_options); elora_text_options_init() sets it.
    pub struct_size: usize,
    /// Strings that end the text; they are not part of it. None may be empty. May be NULL if
    /// n_stop_strings is 0. The strings are copied. Default: NULL.
    pub stop_strings: *const *const c_char,
    /// Number of elements of stop_strings. Default: 0.
    pub n_stop_strings: usize,
    /// If not 0, special tokens are written by their names; otherwise they are left out. Default: 0.
    pub show_special: u32,
    /// Must be 0.
    pub reserved: u32,
}

// SAFETY: `repr(C)` integers and a pointer, the first of which is the size; no padding.
unsafe impl Growing for elora_text_options {
    const NAME: &'static str = "elora_text_options";
}

impl elora_text_options {
    const DEFAULT: Self = Self {
        struct_size: size_of::<Self>(),
        stop_strings: std::ptr::null(),
        n_stop_strings: 0,
        show_special: 0,
        reserved: 0,
    };
}

/// Sets every field of `*options` to its default. `struct_size` is sizeof(elora_text_options).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_text_options_init(
    options: *mut elora_text_options,
    struct_size: usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe { options::write(options, struct_size, elora_text_options::DEFAULT) })
}

/// Creates an empty text for tokens of a model. `options` may be NULL for the defaults. On success
/// `*out` is a new handle; release it with elora_text_free(). ELORA_STATUS_NOT_FOUND if the model
/// has no tokenizer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_text_new(
    model: *const elora_model,
    options: *const elora_text_options,
    out: *mut *mut elora_text,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        let options = options::read(options, elora_text_options::DEFAULT)?;
        reserved(options.reserved)?;
        let (stops, n_stops) = (options.stop_strings, options.n_stop_strings);
        let stops = memory::texts(stops, n_stops, "stop_strings")?;
        let out = Out::required(out, "out")?;
        tokenizer(model)?;
        let stream = TextStream::new(model.inner(), stops)?.with_special(options.show_special != 0);
        let inner = Exclusive::new("text", stream);
        out.write(Arc::into_raw(Arc::new(elora_text { inner })).cast_mut());
        Ok(())
    })
}

/// Frees a text. NULL is ignored. No other thread may be using it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_text_free(text: *mut elora_text) {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::quiet(|| unsafe { memory::free(text.cast_const()) });
}

/// Writes the result of a call that makes text.
fn parts(text: &str) -> (*const c_char, usize) {
    (text.as_ptr().cast(), text.len())
}

/// Adds a token. Writes the text that can be shown now to `*part` and its length in bytes to `*len`.
/// It is whole characters, without a NUL at the end; it may be empty, and it is valid until the next
/// call with this text. Characters of several tokens come with their last token, and text that may
/// be the beginning of a stop string comes once that is known.
///
/// If `stopped` is not NULL, `*stopped` becomes true if a stop string was found, now or before. The
/// text ended before it, and no more text comes. The cost of a call does not depend on the number of
/// tokens before it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_text_push(
    text: *mut elora_text,
    token: elora_token,
    part: *mut *const c_char,
    len: *mut usize,
    stopped: *mut bool,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let text = memory::required(text.cast_const(), "text")?;
        let (part, len) = (Out::required(part, "part")?, Out::required(len, "len")?);
        let stopped = Out::optional(stopped, "stopped")?;
        text.inner.with(|stream| {
            let id = id_of_stream(stream, token)?;
            let (start, length) = parts(stream.push(id)?);
            part.write(start);
            len.write(length);
            stopped.write(stream.stopped());
            Ok(())
        })
    })
}

fn id_of_stream(stream: &TextStream, token: elora_token) -> Outcome<u32> {
    super::tokenizer::id_in(stream.model(), token)
}

/// Ends the text: writes what was held back, as elora_text_push() does. A part of a character
/// becomes U+FFFD. The next token begins another text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_text_finish(
    text: *mut elora_text,
    part: *mut *const c_char,
    len: *mut usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let text = memory::required(text.cast_const(), "text")?;
        let (part, len) = (Out::required(part, "part")?, Out::required(len, "len")?);
        text.inner.with(|stream| {
            let (start, length) = parts(stream.finish());
            part.write(start);
            len.write(length);
            Ok(())
        })
    })
}
