//! Sessions, each one sequence on a model.

use std::ffi::{c_char, c_void};
use std::sync::Arc;

use super::exclusive::{Entered, Exclusive};
use super::guard;
use super::memory::{self, Out};
use super::model::{elora_model, elora_token};
use super::options::{self, Growing};
use super::status::{ELORA_STATUS_CANCELLED, Failure, Outcome, elora_status};
use super::tokenizer::ids_of;
use crate::kernels::Activations;
use crate::runtime::{
    CacheFormat, GenerateConfig, SampleConfig, Session, SessionConfig, decode_batch,
};
use crate::space::SubnetConfig;

/// One sequence on a model, with its key/value cache. Mutable: it may be used by one thread at a
/// time. A call that comes while another call uses the session, from another thread or from the
/// session's own callback, fails with ELORA_STATUS_INVALID_STATE. It keeps alive what it needs of
/// the model.
pub struct elora_session {
    inner: Exclusive<Session>,
}

const _: () = {
    const fn sent<T: Send>() {}
    sent::<Session>();
};

impl elora_session {
    /// Makes a handle with one reference, which the caller owns.
    pub(super) fn into_handle(session: Session) -> *mut Self {
        let inner = Exclusive::new("session", session);
        Arc::into_raw(Arc::new(Self { inner })).cast_mut()
    }

    pub(super) fn enter(&self) -> Outcome<Entered<'_, Session>> {
        self.inner.enter()
    }

    /// Runs a call with exclusive access to the session.
    pub(super) fn with<T>(&self, body: impl FnOnce(&mut Session) -> Outcome<T>) -> Outcome<T> {
        self.inner.with(body)
    }
}

/// Precision to which activations are quantized before multiplication with integer weights (formats
/// ELORA_WEIGHT_FORMAT_INT and ELORA_WEIGHT_FORMAT_SPARSE_INT); one of the ELORA_ACTIVATIONS_
/// constants. It has no effect on layers in other formats.
pub type elora_activations = i32;

/// 16-bit integers with one scale for each 128 activations. The rounding error is at most 1.6e-5 of
/// the largest of the 128.
pub const ELORA_ACTIVATIONS_INT16: elora_activations = 0;
/// 8-bit integers with one scale for each 32 activations with AVX-512, and for each 128 with other
/// instruction sets. The rounding error is at most 0.4 % of the largest of them; the multiplications
/// take about half the work.
pub const ELORA_ACTIVATIONS_INT8: elora_activations = 1;

pub(super) fn activations(value: elora_activations) -> Outcome<Activations> {
    match value {
        ELORA_ACTIVATIONS_INT16 => Ok(Activations::Int16),
        ELORA_ACTIVATIONS_INT8 => Ok(Activations::Int8),
        other => Err(Failure::argument(format!(
            "activations = {other}: no ELORA_ACTIVATIONS_ constant"
        ))),
    }
}

/// Storage format of the key/value cache; one of the ELORA_CACHE_ constants.
pub type elora_cache_format = i32;

/// 32-bit floats. Keys and values are stored exactly as computed.
pub const ELORA_CACHE_F32: elora_cache_format = 0;
/// IEEE 754 half precision: half the memory. Keys and values are rounded to nearest.
pub const ELORA_CACHE_F16: elora_cache_format = 1;

/// Session options. Initialize them with elora_session_options_init(), then set fields.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct elora_session_options {
    /// sizeof(elora_session_options); elora_session_options_init() sets it.
    pub struct_size: usize,
    /// Largest number of tokens that the session can hold, at most elora_model_context_size(). 0
    /// uses elora_model_context_size(). Default: 0.
    pub n_ctx: usize,
    /// Number of prompt tokens that are processed together. More are faster and take more memory. 0
    /// uses 256. Default: 0.
    pub prefill_rows: usize,
    /// Storage format of keys and values: an ELORA_CACHE_ constant. Default: ELORA_CACHE_F32.
    pub cache_format: elora_cache_format,
    /// Precision of the activations: an ELORA_ACTIVATIONS_ constant. Default:
    /// ELORA_ACTIVATIONS_INT16.
    pub activations: elora_activations,
}

// SAFETY: `repr(C)` integers, the first of which is the size; no padding.
unsafe impl Growing for elora_session_options {
    const NAME: &'static str = "elora_session_options";
}

impl elora_session_options {
    const DEFAULT: Self = Self {
        struct_size: size_of::<Self>(),
        n_ctx: 0,
        prefill_rows: 0,
        cache_format: ELORA_CACHE_F32,
        activations: ELORA_ACTIVATIONS_INT16,
    };

    fn parse(self) -> Outcome<SessionConfig> {
        let cache = match self.cache_format {
            ELORA_CACHE_F32 => CacheFormat::F32,
            ELORA_CACHE_F16 => CacheFormat::F16,
            other => {
                return Err(Failure::argument(format!(
                    "cache_format = {other}: no ELORA_CACHE_ constant"
                )));
            }
        };
        let mut config = SessionConfig::default()
            .with_cache(cache)
            .with_activations(activations(self.activations)?);
        if self.n_ctx > 0 {
            config = config.with_n_ctx(self.n_ctx);
        }
        if self.prefill_rows > 0 {
            config = config.with_prefill_rows(self.prefill_rows);
        }
        Ok(config)
    }
}

/// Sets every field of `*options` to its default. `struct_size` is sizeof(elora_session_options).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_options_init(
    options: *mut elora_session_options,
    struct_size: usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        options::write(options, struct_size, elora_session_options::DEFAULT)
    })
}

/// Creates an empty session on a model. The whole model (subnet 0) is active. `options` may be NULL
/// for the defaults. On success `*out` is a new handle; release it with elora_session_free().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_new(
    model: *const elora_model,
    options: *const elora_session_options,
    out: *mut *mut elora_session,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        let config = options::read(options, elora_session_options::DEFAULT)?.parse()?;
        let out = Out::required(out, "out")?;
        let session = Session::new(model.inner(), &config)?;
        out.write(elora_session::into_handle(session));
        Ok(())
    })
}

/// Frees a session. NULL is ignored. No other thread may be using the session. The callback of
/// elora_session_generate() may free the session that calls it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_free(session: *mut elora_session) {
    // SAFETY: the caller meets the requirements stated in the header. `elora_session_generate`
    // holds a reference of its own, so its callback may free the session.
    guard::quiet(|| unsafe { memory::free(session.cast_const()) });
}

/// Activates a subnet. `subnet` is an index below elora_model_subnet_count(); 0 is the whole model.
/// ELORA_STATUS_INVALID_STATE if the subnet would change while the session holds tokens, because
/// their keys and values belong to the previous subnet; call elora_session_reset() first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_set_subnet(
    session: *mut elora_session,
    subnet: usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        memory::required(session, "session")?.with(|session| Ok(session.set_subnet(subnet)?))
    })
}

/// Activates a subnet by name, as elora_session_set_subnet() does by index. ELORA_STATUS_NOT_FOUND
/// if there is no subnet of that name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_set_subnet_named(
    session: *mut elora_session,
    name: *const c_char,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let session = memory::required(session, "session")?;
        let name = memory::text(name, "name")?;
        session.with(|session| Ok(session.set_subnet_named(name)?))
    })
}

/// Activates any subnet of the model's search space. `json` is an object with a value for each
/// group of the space, such as {"layers.0.q_proj+k_proj+v_proj": 24, ...}, as a search produces it;
/// see elora_model_space_json(). ELORA_STATUS_INVALID_STATE if the model has no search space, and
/// as in elora_session_set_subnet().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_set_subnet_json(
    session: *mut elora_session,
    json: *const c_char,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let session = memory::required(session, "session")?;
        let config = SubnetConfig::from_json(memory::text(json, "json")?)?;
        session.with(|session| Ok(session.set_config(&config)?))
    })
}

/// Sets the active rank of every linear layer. `ranks` has `n_ranks` elements, one for each layer
/// in the order of elora_model_layer_info(); 0 disables the layer's adapter. The channels and
/// blocks of the active subnet do not change. ELORA_STATUS_INVALID_ARGUMENT if `n_ranks` differs
/// from elora_model_layer_count() or a rank is larger than the layer's max_rank;
/// ELORA_STATUS_INVALID_STATE as in elora_session_set_subnet().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_set_ranks(
    session: *mut elora_session,
    ranks: *const u32,
    n_ranks: usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let session = memory::required(session, "session")?;
        let ranks = memory::slice(ranks, n_ranks, "ranks")?;
        session.with(|session| Ok(session.set_ranks(ranks)?))
    })
}

/// Copies the active rank of every linear layer to `ranks`, a buffer of `cap` elements, and writes
/// the number of layers to `*n`. `ranks` may be NULL if `cap` is 0, and `n` may be NULL.
/// ELORA_STATUS_INSUFFICIENT_SIZE if there are more than `cap` layers; then only `*n` is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_ranks(
    session: *mut elora_session,
    ranks: *mut u32,
    cap: usize,
    n: *mut usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        memory::required(session, "session")?.with(|session| {
            let found: Vec<u32> = session.ranks().iter().map(|rank| *rank as u32).collect();
            memory::copy_elements(&found, ranks, cap, n)
        })
    })
}

/// Removes all tokens from the session. Its memory is kept for the next tokens.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_reset(session: *mut elora_session) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        memory::required(session, "session")?.with(|session| {
            session.reset();
            Ok(())
        })
    })
}

/// Removes all tokens but the first `n_tokens`. Does nothing if the session holds no more than
/// that. Layers with a sliding window keep little more than their window: after going back farther,
/// the next call that adds tokens computes all of them again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_truncate(
    session: *mut elora_session,
    n_tokens: usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        memory::required(session, "session")?.with(|session| {
            session.truncate(n_tokens);
            Ok(())
        })
    })
}

/// Number of tokens that the session holds. Returns 0 if `session` is NULL or another call is using
/// it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_position(session: *mut elora_session) -> usize {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::value(0, || unsafe {
        memory::required(session, "session")?.with(|session| Ok(session.position()))
    })
}

/// Largest number of tokens that the session can hold. Returns 0 if `session` is NULL or another
/// call is using it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_capacity(session: *mut elora_session) -> usize {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::value(0, || unsafe {
        memory::required(session, "session")?.with(|session| Ok(session.n_ctx()))
    })
}

/// Refuses an input and an output of the caller's that overlap, before a slice is made of the
/// output. Each is a name, a pointer and a number of elements; a pointer may be `NULL`.
fn apart<A, B>(
    (input, from, n_from): (&str, *const A, usize),
    (output, to, n_to): (&str, *mut B, usize),
) -> Outcome {
    if to.is_null() {
        return Ok(());
    }
    memory::disjoint(&[
        (input, memory::region(from, n_from)),
        (output, memory::region(to, n_to)),
    ])
}

/// Returns the caller's logits buffer, cut to the required length, or `None` if it is `NULL`.
///
/// # Safety
/// The requirements are those of [`memory::slice_mut`].
unsafe fn logits_of<'a>(
    logits: *mut f32,
    len: usize,
    rows: usize,
    vocab: usize,
) -> Outcome<Option<&'a mut [f32]>> {
    if logits.is_null() {
        return Ok(None);
    }
    let needed = rows.saturating_mul(vocab);
    if len < needed {
        return Err(memory::short("logits", len, needed));
    }
    // SAFETY: the caller meets the requirements of `slice_mut`, and `needed` is at most `len`.
    unsafe { memory::slice_mut(logits, needed, "logits").map(Some) }
}

/// Appends one or more tokens and writes the logits after the last one to `logits`:
/// elora_model_vocab_size() elements. `logits_len` is the length of `logits` in elements. `logits`
/// may be NULL. If the call fails, the session holds the same tokens as before.
///
/// ELORA_STATUS_CONTEXT_FULL if the session has no room for all tokens.
/// ELORA_STATUS_INVALID_ARGUMENT if `n_tokens` is 0, a token is not in the vocabulary, or `tokens`
/// and `logits` overlap.
/// ELORA_STATUS_INSUFFICIENT_SIZE if `logits` is too short.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_decode(
    session: *mut elora_session,
    tokens: *const elora_token,
    n_tokens: usize,
    logits: *mut f32,
    logits_len: usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let session = memory::required(session, "session")?;
        let tokens = ids_of(memory::slice(tokens, n_tokens, "tokens")?, "tokens")?;
        session.with(|session| {
            let vocab = session.model().config().vocab_size();
            apart(
                ("tokens", tokens.as_ptr(), n_tokens),
                ("logits", logits, vocab),
            )?;
            let logits = logits_of(logits, logits_len, 1, vocab)?;
            Ok(session.decode(tokens, logits)?)
        })
    })
}

/// Same as elora_session_decode(), but writes the logits after every token: `n_tokens` rows of
/// elora_model_vocab_size() elements.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_decode_all(
    session: *mut elora_session,
    tokens: *const elora_token,
    n_tokens: usize,
    logits: *mut f32,
    logits_len: usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let session = memory::required(session, "session")?;
        let tokens = ids_of(memory::slice(tokens, n_tokens, "tokens")?, "tokens")?;
        session.with(|session| {
            let vocab = session.model().config().vocab_size();
            let needed = n_tokens.saturating_mul(vocab);
            apart(
                ("tokens", tokens.as_ptr(), n_tokens),
                ("logits", logits, needed),
            )?;
            match logits_of(logits, logits_len, n_tokens, vocab)? {
                Some(logits) => Ok(session.decode_all(tokens, logits)?),
                None => Ok(session.decode(tokens, None)?),
            }
        })
    })
}

/// Appends one token to each of several sessions on the same model with the same active subnet and
/// activation precision. The weights are read once for all sessions.
///
/// `sessions` and `tokens` have `n_sessions` elements each; no session may occur twice. `logits`
/// receives `n_sessions` rows of elora_model_vocab_size() elements, or is NULL; `logits_len` is its
/// length in elements. If the call fails, all sessions hold the same tokens as before.
///
/// ELORA_STATUS_INVALID_STATE if the sessions differ in model, subnet or activation precision, or
/// if a session occurs twice or is in use.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_decode_batch(
    sessions: *const *mut elora_session,
    n_sessions: usize,
    tokens: *const elora_token,
    logits: *mut f32,
    logits_len: usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let handles = memory::slice(sessions, n_sessions, "sessions")?;
        let tokens = ids_of(memory::slice(tokens, n_sessions, "tokens")?, "tokens")?;
        let enter = |session: &*mut elora_session| {
            memory::required(session.cast_const(), "sessions[i]")?.enter()
        };
        // If a session cannot be entered, the ones entered before are left unchanged: no call used
        // them yet.
        let mut entered: Vec<Entered<'_, Session>> = Vec::with_capacity(handles.len());
        let leave =
            |entered: &mut Vec<Entered<'_, Session>>| entered.iter_mut().for_each(Entered::leave);
        for handle in handles {
            match enter(handle) {
                Ok(session) => entered.push(session),
                Err(failure) => {
                    leave(&mut entered);
                    return Err(failure);
                }
            }
        }
        let mut sessions: Vec<&mut Session> = entered.iter_mut().map(Entered::get).collect();
        let vocab = sessions
            .first()
            .map_or(0, |session| session.model().config().vocab_size());
        let mut own = Vec::new();
        let needed = n_sessions.saturating_mul(vocab);
        let apart = apart(
            ("sessions", handles.as_ptr(), n_sessions),
            ("logits", logits, needed),
        )
        .and_then(|()| {
            apart(
                ("tokens", tokens.as_ptr(), n_sessions),
                ("logits", logits, needed),
            )
        });
        let logits = apart.and_then(|()| logits_of(logits, logits_len, n_sessions, vocab));
        let outcome = logits.and_then(|logits| {
            let logits = logits.unwrap_or_else(|| {
                own.resize(n_sessions * vocab, 0.0);
                &mut own
            });
            Ok(decode_batch(&mut sessions, tokens, logits)?)
        });
        drop(sessions);
        leave(&mut entered);
        outcome
    })
}

/// Callback that receives each new token. `userdata` is the pointer passed to
/// elora_session_generate(). Return false to stop the generation. The callback runs on the thread
/// that called elora_session_generate(). It must not use the session, but it may free it.
pub type elora_token_fn =
    Option<unsafe extern "C" fn(userdata: *mut c_void, token: elora_token) -> bool>;

/// Text-generation options. Initialize them with elora_generate_options_init(), then set fields.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct elora_generate_options {
    /// sizeof(elora_generate_options); elora_generate_options_init() sets it.
    pub struct_size: usize,
    /// Maximum number of new tokens. 0 uses the length of the output buffer. Default: 0.
    pub max_new_tokens: usize,
    /// Additional tokens that end the generation; they are not part of the output. The array must
    /// be valid during the call. May be NULL if n_stop_tokens is 0. Default: NULL.
    pub stop_tokens: *const elora_token,
    /// Number of elements of stop_tokens. Default: 0.
    pub n_stop_tokens: usize,
    /// Temperature by which the logits are divided, at least 0. 0 selects the most likely token
    /// each time (greedy decoding). Default: 0.
    pub temperature: f64,
    /// Sample only from the most likely tokens that together reach this probability, above 0 and at
    /// most 1. 1 for no limit. Default: 1.
    pub top_p: f64,
    /// Sample only from tokens whose probability is at least this fraction of the most likely
    /// token's, at least 0 and below 1. 0 for no limit. Default: 0.
    pub min_p: f64,
    /// Seed of the random draws; the same seed gives the same tokens. Default: 0.
    pub seed: u64,
    /// Sample only from this many most likely tokens. 0 for no limit. Default: 0.
    pub top_k: u32,
    /// If not 0, the model's own stop tokens do not end the generation. Default: 0.
    pub ignore_stop_tokens: u32,
}

// SAFETY: `repr(C)` integers, floats and a pointer, the first of which is the size; no padding.
unsafe impl Growing for elora_generate_options {
    const NAME: &'static str = "elora_generate_options";
}

impl elora_generate_options {
    const DEFAULT: Self = Self {
        struct_size: size_of::<Self>(),
        max_new_tokens: 0,
        stop_tokens: std::ptr::null(),
        n_stop_tokens: 0,
        temperature: 0.0,
        top_p: 1.0,
        min_p: 0.0,
        seed: 0,
        top_k: 0,
        ignore_stop_tokens: 0,
    };
}

/// Sets every field of `*options` to its default, which is greedy decoding. `struct_size` is
/// sizeof(elora_generate_options).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_generate_options_init(
    options: *mut elora_generate_options,
    struct_size: usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        options::write(options, struct_size, elora_generate_options::DEFAULT)
    })
}

/// Appends a prompt of `n_prompt` tokens, at least 1, and generates tokens from there. The
/// generation ends at a stop token, after `options->max_new_tokens` tokens, or when the session is
/// full. `options` may be NULL for the defaults.
///
/// If `on_token` is not NULL, it is called with `userdata` and each new token as soon as the token
/// is known. If `out` is not NULL, the new tokens are written to it; it has room for `cap` tokens.
/// If `n_out` is not NULL, the number of new tokens is written to `*n_out`. If `out` is NULL,
/// `options->max_new_tokens` must not be 0. `out` must not overlap the prompt and the stop tokens,
/// which is ELORA_STATUS_INVALID_ARGUMENT.
///
/// ELORA_STATUS_CANCELLED if `on_token` returned false; the tokens generated until then are written
/// to `out` and `*n_out`. ELORA_STATUS_CONTEXT_FULL if the prompt does not fit into the session.
/// ELORA_STATUS_INSUFFICIENT_SIZE if `options->max_new_tokens` is larger than `cap`. If memory runs
/// out during the generation, `out` and `*n_out` are not written, and the session keeps the prompt
/// and the tokens that it already holds.
///
/// Unless a stop token ended the generation, the session does not yet hold the last new token; pass
/// it at the start of the next call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_generate(
    session: *mut elora_session,
    prompt: *const elora_token,
    n_prompt: usize,
    options: *const elora_generate_options,
    on_token: elora_token_fn,
    userdata: *mut c_void,
    out: *mut elora_token,
    cap: usize,
    n_out: *mut usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        // This call holds a reference of its own, because the callback may free the session.
        let session = memory::shared(session.cast_const(), "session")?;
        apart(("prompt", prompt, n_prompt), ("out", out, cap))?;
        let prompt = ids_of(memory::slice(prompt, n_prompt, "prompt")?, "prompt")?;
        let options = options::read(options, elora_generate_options::DEFAULT)?;
        let (stop, n_stop) = (options.stop_tokens, options.n_stop_tokens);
        apart(("stop_tokens", stop, n_stop), ("out", out, cap))?;
        let stop = ids_of(
            memory::slice(options.stop_tokens, options.n_stop_tokens, "stop_tokens")?,
            "stop_tokens",
        )?;
        let n_out = Out::optional(n_out, "n_out")?;
        let room = if out.is_null() { usize::MAX } else { cap };
        let max_new_tokens = match options.max_new_tokens {
            0 if out.is_null() => {
                return Err(Failure::argument(
                    "max_new_tokens = 0, and there is no `out` whose size would tell",
                ));
            }
            0 => room,
            given if given > room => return Err(memory::short("out", cap, given)),
            given => given,
        };
        let out = memory::slice_mut(out, if out.is_null() { 0 } else { cap }, "out")?;
        let sample = SampleConfig {
            temperature: options.temperature,
            top_k: options.top_k as usize,
            top_p: options.top_p,
            min_p: options.min_p,
            seed: options.seed,
            ..SampleConfig::default()
        };
        let mut cancelled = false;
        let tokens = session.with(|session| {
            let mut stop_ids = stop.to_vec();
            if options.ignore_stop_tokens == 0 {
                stop_ids.extend_from_slice(session.model().stop_ids());
            }
            let mut config = GenerateConfig::new(max_new_tokens, stop_ids);
            config.sample = sample;
            let show = |token: u32| {
                let goes_on =
                    on_token.is_none_or(|on_token| on_token(userdata, token as elora_token));
                cancelled = !goes_on;
                goes_on
            };
            Ok(session.generate(prompt, &config, show)?)
        })?;
        if !out.is_empty() {
            out[..tokens.len()].copy_from_slice(bytemuck::cast_slice(&tokens));
        }
        n_out.write(tokens.len());
        match cancelled {
            true => Err(Failure::new(
                ELORA_STATUS_CANCELLED,
                "the callback stopped the generation",
            )),
            false => Ok(()),
        }
    })
}
