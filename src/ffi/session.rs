//! Sequences on a model.

use std::cell::UnsafeCell;
use std::ffi::{c_char, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::guard;
use super::linear::{ELORA_ACTIVATIONS_INT16, activations, elora_activations};
use super::memory::{self, Out};
use super::model::{elora_model, elora_token};
use super::options::{self, Growing};
use super::status::{
    ELORA_STATUS_CANCELLED, ELORA_STATUS_INVALID_STATE, Failure, Outcome, elora_status,
};
use super::tokenizer::ids_of;
use crate::runtime::{
    CacheFormat, GenerateConfig, SampleConfig, Session, SessionConfig, decode_batch,
};
use crate::space::SubnetConfig;

/// One sequence on a model, with its key/value cache. Mutable: one thread at a time; a call that comes while another
/// is in it, from another thread or from its own callback, is refused. It keeps what it needs of the model.
pub struct elora_session {
    /// [`IDLE`], [`BUSY`] or [`BROKEN`].
    state: AtomicU8,
    inner: UnsafeCell<Session>,
}

const IDLE: u8 = 0;
const BUSY: u8 = 1;
/// A call panicked, and left who knows what.
const BROKEN: u8 = 2;

// SAFETY: the session is touched only between `enter` and the drop of what it gave, by one thread at a time.
unsafe impl Sync for elora_session {}

const _: () = {
    const fn sent<T: Send>() {}
    sent::<Session>();
};

/// The right to use a session. Unless the call ends in [`leave`](Self::leave), it panicked.
struct Entered<'a> {
    session: &'a elora_session,
    next: u8,
}

impl elora_session {
    fn enter(&self) -> Outcome<Entered<'_>> {
        match self
            .state
            .compare_exchange(IDLE, BUSY, Ordering::Acquire, Ordering::Relaxed)
        {
            Ok(_) => Ok(Entered {
                session: self,
                next: BROKEN,
            }),
            Err(BUSY) => {
                let text = "the session is in another call: one thread at a time, and not from its own callback";
                Err(Failure::new(ELORA_STATUS_INVALID_STATE, text))
            }
            Err(_) => {
                let text = "a call of this session ended in ELORA_STATUS_PANIC: free it";
                Err(Failure::new(ELORA_STATUS_INVALID_STATE, text))
            }
        }
    }

    /// Runs a call on the session.
    pub(super) fn with<T>(&self, body: impl FnOnce(&mut Session) -> Outcome<T>) -> Outcome<T> {
        let mut entered = self.enter()?;
        let outcome = body(entered.session());
        entered.leave();
        outcome
    }
}

impl Entered<'_> {
    fn session(&mut self) -> &mut Session {
        // SAFETY: no one else has entered.
        unsafe { &mut *self.session.inner.get() }
    }

    fn leave(&mut self) {
        self.next = IDLE;
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.session.state.store(self.next, Ordering::Release);
    }
}

/// How keys and values are kept.
pub type elora_cache_format = i32;

/// At 32 bits: results are those without a cache.
pub const ELORA_CACHE_F32: elora_cache_format = 0;
/// At 16 bits: half the memory.
pub const ELORA_CACHE_F16: elora_cache_format = 1;

/// What a session is like. Fill it by elora_session_options_init(), then set fields.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct elora_session_options {
    /// sizeof(elora_session_options), set by elora_session_options_init().
    pub struct_size: usize,
    /// Tokens that it holds at most; 0 for as many as the model can take in.
    pub n_ctx: usize,
    /// Tokens of a prompt that are processed together; 0 for the default. More are faster, and take more memory.
    pub prefill_rows: usize,
    /// An ELORA_CACHE_ constant.
    pub cache_format: elora_cache_format,
    /// An ELORA_ACTIVATIONS_ constant.
    pub activations: elora_activations,
}

// SAFETY: integers, the first of which is the size; no padding.
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

/// Sets every field to its default. `struct_size` is sizeof(elora_session_options).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_options_init(
    options: *mut elora_session_options,
    struct_size: usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        options::write(options, struct_size, elora_session_options::DEFAULT)
    })
}

/// Makes an empty session on a model, with the whole model active. `options` may be NULL for the defaults. On success
/// `*out` is a handle that elora_session_free() gives back.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_new(
    model: *const elora_model,
    options: *const elora_session_options,
    out: *mut *mut elora_session,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        let config = options::read(options, elora_session_options::DEFAULT)?.parse()?;
        let out = Out::required(out, "out")?;
        let inner = UnsafeCell::new(Session::new(model.inner(), &config)?);
        let session = Arc::new(elora_session {
            state: AtomicU8::new(IDLE),
            inner,
        });
        out.write(Arc::into_raw(session).cast_mut());
        Ok(())
    })
}

/// Gives a session back; NULL is ignored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_free(session: *mut elora_session) {
    // SAFETY: as the header asks of the caller. A call that is in the session, as the one whose callback frees it,
    // has a count of its own.
    guard::quiet(|| unsafe { memory::free(session.cast_const()) });
}

/// Makes a subnet the active one, by its index among the model's. ELORA_STATUS_INVALID_STATE while the session holds
/// tokens: their keys belong to the subnet before; call elora_session_reset() first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_set_subnet(
    session: *mut elora_session,
    subnet: usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        memory::required(session, "session")?.with(|session| Ok(session.set_subnet(subnet)?))
    })
}

/// Makes a subnet the active one, by its name; otherwise as elora_session_set_subnet().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_set_subnet_named(
    session: *mut elora_session,
    name: *const c_char,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        let session = memory::required(session, "session")?;
        let name = memory::text(name, "name")?;
        session.with(|session| Ok(session.set_subnet_named(name)?))
    })
}

/// Makes any subnet of the model's search space the active one. `json` is an object with a value for each group of
/// the space, such as {"layers.0.q_proj+k_proj+v_proj": 24, ...}: what a search gives; otherwise as
/// elora_session_set_subnet().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_set_subnet_json(
    session: *mut elora_session,
    json: *const c_char,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        let session = memory::required(session, "session")?;
        let config = SubnetConfig::from_json(memory::text(json, "json")?)?;
        session.with(|session| Ok(session.set_config(&config)?))
    })
}

/// Sets the active rank of every linear layer, in the order of elora_model_layer_info(); 0 turns an adapter off.
/// Channels and blocks stay those of the subnet that is active; otherwise as elora_session_set_subnet().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_set_ranks(
    session: *mut elora_session,
    ranks: *const u32,
    n_ranks: usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        let session = memory::required(session, "session")?;
        let ranks = memory::slice(ranks, n_ranks, "ranks")?;
        session.with(|session| Ok(session.set_ranks(ranks)?))
    })
}

/// Copies the active rank of every linear layer to `ranks`, and their number to `*n`. ELORA_STATUS_INSUFFICIENT_SIZE,
/// with only `*n` written, where there are more than `cap`; `ranks` may be NULL where `cap` is 0, and `n` may be
/// NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_ranks(
    session: *mut elora_session,
    ranks: *mut u32,
    cap: usize,
    n: *mut usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        memory::required(session, "session")?.with(|session| {
            let found: Vec<u32> = session.ranks().iter().map(|rank| *rank as u32).collect();
            memory::copy_elements(&found, ranks, cap, n)
        })
    })
}

/// Forgets all tokens.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_reset(session: *mut elora_session) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        memory::required(session, "session")?.with(|session| {
            session.reset();
            Ok(())
        })
    })
}

/// Forgets all tokens but the first `n_tokens`; nothing where the session holds no more than that.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_truncate(
    session: *mut elora_session,
    n_tokens: usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        memory::required(session, "session")?.with(|session| {
            session.truncate(n_tokens);
            Ok(())
        })
    })
}

/// Tokens that the session holds. 0 for NULL, and while another call is in the session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_position(session: *mut elora_session) -> usize {
    // SAFETY: as the header asks of the caller.
    guard::value(0, || unsafe {
        memory::required(session, "session")?.with(|session| Ok(session.position()))
    })
}

/// Tokens that the session holds at most. 0 for NULL, and while another call is in the session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_capacity(session: *mut elora_session) -> usize {
    // SAFETY: as the header asks of the caller.
    guard::value(0, || unsafe {
        memory::required(session, "session")?.with(|session| Ok(session.n_ctx()))
    })
}

/// The caller's logits: none, or exactly as many as there are.
///
/// # Safety
/// As [`memory::slice_mut`].
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
    // SAFETY: as asked of the caller.
    unsafe { memory::slice_mut(logits, needed, "logits").map(Some) }
}

/// Appends tokens, one or many, and writes the logits after the last to `logits`: elora_model_vocab_size() numbers,
/// for which `logits_len` must have room. `logits` may be NULL. On failure the session holds the tokens that it held
/// before. ELORA_STATUS_CONTEXT_FULL where there is no room for so many.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_decode(
    session: *mut elora_session,
    tokens: *const elora_token,
    n_tokens: usize,
    logits: *mut f32,
    logits_len: usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        let session = memory::required(session, "session")?;
        let tokens = ids_of(memory::slice(tokens, n_tokens, "tokens")?, "tokens")?;
        session.with(|session| {
            let vocab = session.model().config().vocab_size();
            let logits = logits_of(logits, logits_len, 1, vocab)?;
            Ok(session.decode(tokens, logits)?)
        })
    })
}

/// elora_session_decode() with the logits after every token: `n_tokens` rows of elora_model_vocab_size() numbers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_decode_all(
    session: *mut elora_session,
    tokens: *const elora_token,
    n_tokens: usize,
    logits: *mut f32,
    logits_len: usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        let session = memory::required(session, "session")?;
        let tokens = ids_of(memory::slice(tokens, n_tokens, "tokens")?, "tokens")?;
        session.with(|session| {
            let vocab = session.model().config().vocab_size();
            match logits_of(logits, logits_len, n_tokens, vocab)? {
                Some(logits) => Ok(session.decode_all(tokens, logits)?),
                None => Ok(session.decode(tokens, None)?),
            }
        })
    })
}

/// Appends one token to each of several sessions on one model with the same subnet: the weights are read once for all
/// of them. `tokens` has one for each session, and `logits` has room for `n_sessions` rows of
/// elora_model_vocab_size() numbers, or is NULL. No session may be there twice. On failure every session holds the
/// tokens that it held before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_decode_batch(
    sessions: *const *mut elora_session,
    n_sessions: usize,
    tokens: *const elora_token,
    logits: *mut f32,
    logits_len: usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        let handles = memory::slice(sessions, n_sessions, "sessions")?;
        let tokens = ids_of(memory::slice(tokens, n_sessions, "tokens")?, "tokens")?;
        let enter = |session: &*mut elora_session| {
            memory::required(session.cast_const(), "sessions[i]")?.enter()
        };
        // Those that were entered are left in any case: nothing was done to them before the call itself.
        let mut entered: Vec<Entered<'_>> = Vec::with_capacity(handles.len());
        let leave = |entered: &mut Vec<Entered<'_>>| entered.iter_mut().for_each(Entered::leave);
        for handle in handles {
            match enter(handle) {
                Ok(session) => entered.push(session),
                Err(failure) => {
                    leave(&mut entered);
                    return Err(failure);
                }
            }
        }
        let mut sessions: Vec<&mut Session> = entered.iter_mut().map(Entered::session).collect();
        let vocab = sessions
            .first()
            .map_or(0, |session| session.model().config().vocab_size());
        let mut own = Vec::new();
        let outcome = logits_of(logits, logits_len, n_sessions, vocab).and_then(|logits| {
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

/// Called with each new token; false stops the generation. The session must not be used from it, but may be freed.
pub type elora_token_fn =
    Option<unsafe extern "C" fn(userdata: *mut c_void, token: elora_token) -> bool>;

/// How text goes on. Fill it by elora_generate_options_init(), then set fields.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct elora_generate_options {
    /// sizeof(elora_generate_options), set by elora_generate_options_init().
    pub struct_size: usize,
    /// New tokens at most; 0 for as many as the output has room for.
    pub max_new_tokens: usize,
    /// Tokens that end the generation, beside the model's own; they are not part of the output.
    pub stop_tokens: *const elora_token,
    /// Number of them.
    pub n_stop_tokens: usize,
    /// Logits are divided by it; 0 takes the most likely token each time.
    pub temperature: f64,
    /// Only the most likely tokens that together reach this probability, in 0..=1; 1 for all.
    pub top_p: f64,
    /// Only tokens at least this share as likely as the most likely one, in 0..1; 0 for all.
    pub min_p: f64,
    /// Seed of the draws: the same seed gives the same tokens.
    pub seed: u64,
    /// Only the most likely so many; 0 for all.
    pub top_k: u32,
    /// Not 0: the model's own stop tokens do not end the generation.
    pub ignore_stop_tokens: u32,
}

// SAFETY: integers, numbers and a pointer, the first of which is the size; no padding.
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

/// Sets every field to its default, greedy decoding. `struct_size` is sizeof(elora_generate_options).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_generate_options_init(
    options: *mut elora_generate_options,
    struct_size: usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        options::write(options, struct_size, elora_generate_options::DEFAULT)
    })
}

/// Appends a prompt and goes on from it, token by token, until a stop token, `options->max_new_tokens`, or the end of
/// the context. `options` may be NULL for the defaults.
///
/// Each new token is shown to `on_token`, with `userdata`, as soon as it is there, if `on_token` is not NULL. All of
/// them are written to `out`, which has room for `cap`, and their number to `*n_out`, if `out` and `n_out` are not
/// NULL; without `out`, `options->max_new_tokens` must be set. ELORA_STATUS_CANCELLED where `on_token` returned
/// false; the tokens so far are written then, too. Unless a stop token ended it, the last token of the output is not yet
/// in the session: give it with what comes next.
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
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        // A count of its own, since the callback may free the session.
        let session = memory::shared(session.cast_const(), "session")?;
        let prompt = ids_of(memory::slice(prompt, n_prompt, "prompt")?, "prompt")?;
        let options = options::read(options, elora_generate_options::DEFAULT)?;
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
