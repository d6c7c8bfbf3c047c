//! Tokens of several sessions in one call, and copies of sessions.

use std::ffi::{c_char, c_void};
use std::sync::Arc;

use super::exclusive::Entered;
use super::guard;
use super::memory::{self, Out};
use super::model::elora_token;
use super::options::{self, Growing};
use super::session::elora_session;
use super::status::{ELORA_STATUS_INSUFFICIENT_SIZE, Failure, Outcome, elora_status};
use super::tokenizer::ids_of;
use crate::progress::Progress;
use crate::runtime::{Session, Step, decode_steps};

/// What one session does in a batch.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct elora_step {
    /// sizeof(elora_step); the same for all elements of an array.
    pub struct_size: usize,
    /// The session. No session may occur twice in a batch.
    pub session: *mut elora_session,
    /// The session's new tokens: a token that was drawn, or a prompt or a part of it.
    pub tokens: *const elora_token,
    /// Number of elements of tokens, at least 1.
    pub n_tokens: usize,
    /// Receives the logits after each of the last n_logits tokens: n_logits rows of
    /// elora_model_vocab_size() elements. May be NULL if n_logits is 0.
    pub logits: *mut f32,
    /// Length of logits in elements.
    pub logits_len: usize,
    /// Number of rows to write: 0 for none, 1 for the logits after the last token; at most
    /// n_tokens.
    pub n_logits: usize,
}

// SAFETY: `repr(C)` integers and pointers, the first of which is the size; no padding.
unsafe impl Growing for elora_step {
    const NAME: &'static str = "elora_step";
}

impl elora_step {
    const EMPTY: Self = Self {
        struct_size: size_of::<Self>(),
        session: std::ptr::null_mut(),
        tokens: std::ptr::null(),
        n_tokens: 0,
        logits: std::ptr::null_mut(),
        logits_len: 0,
        n_logits: 0,
    };
}

/// Reads the elements of an array whose elements state their size.
///
/// # Safety
/// `pointer` must be `NULL` or point to `n` structs, each as long as its first field states.
unsafe fn steps_of(pointer: *const elora_step, n: usize) -> Outcome<Vec<elora_step>> {
    if n == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the caller guarantees at least the first field of the first element.
    let size = *unsafe { memory::required(pointer.cast::<usize>(), "steps")? };
    if n.checked_mul(size)
        .is_none_or(|bytes| bytes > isize::MAX as usize)
    {
        let text = format!("{n} elements of `steps` are more than memory has");
        return Err(Failure::argument(text));
    }
    let mut steps = Vec::with_capacity(n.min(1024));
    for at in 0..n {
        // SAFETY: the caller guarantees `n` elements of `size` bytes each, whose product was
        // checked to fit into memory.
        let step = unsafe {
            let element = pointer.byte_add(at * size);
            options::read(element, elora_step::EMPTY)?
        };
        if step.struct_size != size {
            return Err(Failure::argument(format!(
                "steps[{at}].struct_size = {}, and that of the first is {size}",
                step.struct_size
            )));
        }
        steps.push(step);
    }
    Ok(steps)
}

/// Appends tokens to several sessions, any number to each: prompts, parts of prompts and single
/// tokens together. Sessions may come and go between calls.
///
/// `steps` has `n_steps` elements. Sessions on the same model with the same widths and activation
/// precision go through the model together, so that its weights are read once for all of them;
/// their ranks and adapters may differ. Other widths, and subnets with weights of their own, take a
/// pass each. If the call fails, all sessions hold the same tokens as before.
///
/// ELORA_STATUS_INVALID_STATE if a session occurs twice or is in use. Otherwise as in
/// elora_session_decode().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_decode_steps(
    steps: *const elora_step,
    n_steps: usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let steps = steps_of(steps, n_steps)?;
        let mut entered: Vec<Entered<'_, Session>> = Vec::with_capacity(steps.len());
        let outcome = decode(&steps, &mut entered);
        // Sessions that were entered hold what they held, or what they were given.
        entered.iter_mut().for_each(Entered::leave);
        outcome
    })
}

/// # Safety
/// The pointers in `steps` must meet the requirements stated in the header.
unsafe fn decode<'a>(steps: &[elora_step], entered: &mut Vec<Entered<'a, Session>>) -> Outcome {
    let mut buffers = Vec::with_capacity(steps.len());
    for (at, step) in steps.iter().enumerate() {
        // SAFETY: the caller guarantees the pointers.
        unsafe {
            let session: &'a elora_session =
                memory::required(step.session.cast_const(), "steps[i].session")?;
            let tokens = memory::slice(step.tokens, step.n_tokens, "steps[i].tokens")?;
            let tokens = ids_of(tokens, "steps[i].tokens")?;
            let mut own = session.enter()?;
            let vocab = own.get().model().config().vocab_size();
            entered.push(own);
            if step.n_logits > step.n_tokens {
                return Err(Failure::argument(format!(
                    "steps[{at}].n_logits = {}, and there are {} tokens",
                    step.n_logits, step.n_tokens
                )));
            }
            let needed = step.n_logits.saturating_mul(vocab);
            if step.logits_len < needed {
                return Err(memory::short("steps[i].logits", step.logits_len, needed));
            }
            buffers.push((
                tokens,
                memory::region(step.logits, needed),
                step.logits,
                needed,
            ));
        }
    }
    let used = buffers.iter().filter(|(_, region, ..)| !region.is_empty());
    let regions = used.map(|(_, region, ..)| ("steps[i].logits", region.clone()));
    let regions: Vec<_> = regions.collect();
    disjoint_sorted(regions)?;
    let mut all = Vec::with_capacity(steps.len());
    for (entered, (tokens, _, logits, needed)) in entered.iter_mut().zip(buffers) {
        // SAFETY: the caller guarantees the elements, and no two buffers overlap.
        let logits = unsafe { memory::slice_mut(logits, needed, "steps[i].logits")? };
        all.push(Step {
            session: entered.get(),
            tokens,
            logits,
        });
    }
    Ok(decode_steps(&mut all)?)
}

/// Refuses overlapping buffers, none of which is empty: neighbours by address are compared.
fn disjoint_sorted(mut regions: Vec<(&str, std::ops::Range<usize>)>) -> Outcome {
    regions.sort_by_key(|(_, region)| region.start);
    regions.windows(2).try_for_each(memory::disjoint)
}

/// Copies a session: its tokens with their keys and values, its subnet and adapters. Both go on by
/// themselves. The memory of keys and values is shared until one of the two writes to it, so that
/// sequences with a common beginning can share it: decode the beginning once, then copy. On success
/// `*out` is a new handle; release it with elora_session_free(). A callback of
/// elora_session_set_abort() is not copied. A draft is.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_copy(
    session: *mut elora_session,
    out: *mut *mut elora_session,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let session = memory::required(session.cast_const(), "session")?;
        let out = Out::required(out, "out")?;
        let copy = session.with(|session| Ok(session.copy()))?;
        out.write(elora_session::into_handle(copy));
        Ok(())
    })
}

/// Lets a draft propose up to `n_tokens` tokens at a time, 1 to 7, in elora_session_generate(),
/// which checks them in one pass. The output is the same as without a draft, up to the rounding of
/// sums, which decides between logits that are all but equal. It comes sooner if the draft is much
/// faster and often right, such as a session on a small subnet of the same supernet. The session
/// takes a copy of `draft`, which can be freed, and which follows the session's tokens by itself. A
/// `draft` of NULL removes the draft.
///
/// ELORA_STATUS_INVALID_ARGUMENT if `n_tokens` is out of range, if `draft` is the session itself,
/// if its model has another number of tokens in its vocabulary, or if it has a draft.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_set_draft(
    session: *mut elora_session,
    draft: *mut elora_session,
    n_tokens: usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let of = memory::required(session.cast_const(), "session")?;
        if !draft.is_null() && draft == session {
            return Err(Failure::argument("draft is the session itself"));
        }
        let copy = match draft.is_null() {
            true => None,
            false => {
                let draft = memory::required(draft.cast_const(), "draft")?;
                Some(draft.with(|draft| Ok(draft.copy()))?)
            }
        };
        of.with(|session| Ok(session.set_draft(copy, n_tokens)?))
    })
}

/// Copies the tokens that the session holds to `tokens`, a buffer of `cap` elements, and writes
/// their number to `*n`. `tokens` may be NULL if `cap` is 0, and `n` may be NULL.
/// ELORA_STATUS_INSUFFICIENT_SIZE if there are more than `cap` tokens; then only `*n` is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_tokens(
    session: *mut elora_session,
    tokens: *mut elora_token,
    cap: usize,
    n: *mut usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        memory::required(session.cast_const(), "session")?
            .with(|session| memory::copy_elements(session.tokens(), tokens.cast::<u32>(), cap, n))
    })
}

/// Copies the session's state, its tokens with their keys and values, to `buf`, a buffer of `cap`
/// bytes, and writes its size to `*size`. `buf` may be NULL if `cap` is 0.
/// ELORA_STATUS_INSUFFICIENT_SIZE if the state has more than `cap` bytes; then only `*size` is
/// written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_get_state(
    session: *mut elora_session,
    buf: *mut c_void,
    cap: usize,
    size: *mut usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        memory::required(session.cast_const(), "session")?.with(|session| {
            let size = Out::required(size, "size")?;
            let buf = memory::slice_mut(buf.cast::<u8>(), cap, "buf")?;
            let needed = session.state_bytes();
            size.write(needed);
            let Some(buf) = buf.get_mut(..needed) else {
                return Err(Failure::new(
                    ELORA_STATUS_INSUFFICIENT_SIZE,
                    format!("`buf` has {cap} bytes, and {needed} are needed"),
                ));
            };
            buf.copy_from_slice(&session.state()?);
            Ok(())
        })
    })
}

/// Replaces the session's tokens by those of a state that elora_session_get_state() gave, with
/// their keys and values. The session must be on the same model, with the same subnet, adapters,
/// precision of activations and format of the cache. If layers have sliding windows, n_ctx and
/// prefill_rows must be the same, too.
///
/// ELORA_STATUS_INVALID_FORMAT if the state is damaged. ELORA_STATUS_INVALID_STATE if it is of
/// another model or setting; the error text says which. ELORA_STATUS_CONTEXT_FULL if the session
/// has no room for its tokens. The session then holds the same tokens as before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_set_state(
    session: *mut elora_session,
    state: *const c_void,
    size: usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let session = memory::required(session.cast_const(), "session")?;
        let state = memory::slice(state.cast::<u8>(), size, "state")?;
        session.with(|session| Ok(session.restore(state)?))
    })
}

/// Writes the session's state to the file `path`, under a temporary name first. If the file exists,
/// it is replaced if `overwrite` is true; otherwise the call fails with
/// ELORA_STATUS_INVALID_FORMAT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_save(
    session: *mut elora_session,
    path: *const c_char,
    overwrite: bool,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let session = memory::required(session.cast_const(), "session")?;
        let path = memory::text(path, "path")?;
        session.with(|session| Ok(session.save(path, overwrite)?))
    })
}

/// Replaces the session's tokens by those of a file that elora_session_save() wrote, as
/// elora_session_set_state() does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_load(
    session: *mut elora_session,
    path: *const c_char,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let session = memory::required(session.cast_const(), "session")?;
        let path = memory::text(path, "path")?;
        session.with(|session| Ok(session.load(path)?))
    })
}

/// Callback that is asked whether to stop. `userdata` is the pointer passed to
/// elora_session_set_abort(). Return true to stop. It runs on the thread that called the function
/// that it may stop. It must neither use nor free the session.
pub type elora_abort_fn = Option<unsafe extern "C" fn(userdata: *mut c_void) -> bool>;

/// The caller's callback. It stops work by returning true.
struct Abort {
    call: unsafe extern "C" fn(userdata: *mut c_void) -> bool,
    userdata: *mut c_void,
}

// SAFETY: the header requires that the callback can be called by every thread that uses the
// session.
unsafe impl Send for Abort {}
// SAFETY: as above. It is called by one thread at a time, the one that uses the session.
unsafe impl Sync for Abort {}

impl Progress for Abort {
    fn is_interrupted(&self) -> bool {
        // SAFETY: the caller of `elora_session_set_abort` guarantees the callback and its data.
        unsafe { (self.call)(self.userdata) }
    }
}

/// Sets a callback that is asked, between the blocks of the model, whether to stop a call that adds
/// tokens to the session; NULL for none. A call that is stopped returns ELORA_STATUS_CANCELLED, and
/// the session holds the same tokens as before. In a batch, the callback of any session stops the
/// call. `userdata` must be valid as long as the callback is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_set_abort(
    session: *mut elora_session,
    abort: elora_abort_fn,
    userdata: *mut c_void,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        memory::required(session.cast_const(), "session")?.with(|session| {
            let watch =
                |call| Arc::new(Abort { call, userdata }) as Arc<dyn Progress + Send + Sync>;
            session.set_progress(abort.map(watch));
            Ok(())
        })
    })
}
