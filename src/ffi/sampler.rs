//! Samplers, for loops of the caller's own over logits.

use std::sync::Arc;

use super::exclusive::Exclusive;
use super::guard;
use super::memory::{self, Out};
use super::model::{elora_token, reserved};
use super::options::{self, Growing};
use super::status::{Outcome, elora_status};
use super::tokenizer::ids_of;
use crate::runtime::{SampleConfig, Sampler, TokenMask};

/// Draws the next token of a sequence from logits. Mutable: it may be used by one thread at a time.
pub struct elora_sampler {
    inner: Exclusive<Sampler>,
}

/// Sampler options. Initialize them with elora_sampler_options_init(), then set fields.
///
/// Biases are added first, then the penalties apply: repetition, frequency, presence. Then the
/// logits are divided by the temperature, and the limits apply in the order top_k, min_p, top_p,
/// each to the tokens that the previous one left.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct elora_sampler_options {
    /// sizeof(elora_sampler_options); elora_sampler_options_init() sets it.
    pub struct_size: usize,
    /// Temperature by which the logits are divided, at least 0. 0 selects the most likely token
    /// each time (greedy decoding). Default: 0.
    pub temperature: f64,
    /// Sample only from the most likely tokens that together reach this probability, above 0 and at
    /// most 1. 1 for no limit. Default: 1.
    pub top_p: f64,
    /// Sample only from tokens whose probability is at least this fraction of the most likely
    /// token's, at least 0 and below 1. 0 for no limit. Default: 0.
    pub min_p: f64,
    /// Factor by which the logit of a token that occurred, in the prompt or after it, is divided if
    /// it is positive and multiplied if it is negative; above 0. 1 for none. Default: 1.
    pub repetition_penalty: f64,
    /// Number that is subtracted from the logit of a token for each time that it was generated.
    /// Default: 0.
    pub frequency_penalty: f64,
    /// Number that is subtracted from the logit of a token that was generated. Default: 0.
    pub presence_penalty: f64,
    /// Seed of the random draws; the same seed gives the same tokens. Default: 0.
    pub seed: u64,
    /// Number of the sequence: samplers with the same seed and different streams draw independently.
    /// Default: 0.
    pub stream: u64,
    /// Tokens whose logits are changed. May be NULL if n_bias is 0. The array is copied. Default:
    /// NULL.
    pub bias_tokens: *const elora_token,
    /// Number that is added to the logit of each of bias_tokens: a finite number, or minus infinity,
    /// which forbids the token. May be NULL if n_bias is 0. The array is copied. Default: NULL.
    pub bias_values: *const f32,
    /// Number of elements of bias_tokens and of bias_values. Default: 0.
    pub n_bias: usize,
    /// Sample only from this many most likely tokens. 0 for no limit. Default: 0.
    pub top_k: u32,
    /// Must be 0.
    pub reserved: u32,
}

// SAFETY: `repr(C)` integers, floats and pointers, the first of which is the size; no padding.
unsafe impl Growing for elora_sampler_options {
    const NAME: &'static str = "elora_sampler_options";
}

impl elora_sampler_options {
    const DEFAULT: Self = Self {
        struct_size: size_of::<Self>(),
        temperature: 0.0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
        presence_penalty: 0.0,
        seed: 0,
        stream: 0,
        bias_tokens: std::ptr::null(),
        bias_values: std::ptr::null(),
        n_bias: 0,
        top_k: 0,
        reserved: 0,
    };

    /// # Safety
    /// The pointers must meet the requirements of [`memory::slice`].
    unsafe fn parse(self) -> Outcome<SampleConfig> {
        reserved(self.reserved)?;
        // SAFETY: the caller meets the requirements.
        let (tokens, values) = unsafe {
            (
                memory::slice(self.bias_tokens, self.n_bias, "bias_tokens")?,
                memory::slice(self.bias_values, self.n_bias, "bias_values")?,
            )
        };
        let ids = ids_of(tokens, "bias_tokens")?;
        Ok(SampleConfig {
            temperature: self.temperature,
            top_k: self.top_k as usize,
            top_p: self.top_p,
            min_p: self.min_p,
            seed: self.seed,
            repetition_penalty: self.repetition_penalty,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            logit_bias: ids.iter().copied().zip(values.iter().copied()).collect(),
        })
    }
}

/// Sets every field of `*options` to its default, which is greedy decoding. `struct_size` is
/// sizeof(elora_sampler_options).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_sampler_options_init(
    options: *mut elora_sampler_options,
    struct_size: usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        options::write(options, struct_size, elora_sampler_options::DEFAULT)
    })
}

/// Creates a sampler. `options` may be NULL for the defaults. On success `*out` is a new handle;
/// release it with elora_sampler_free(). ELORA_STATUS_INVALID_ARGUMENT if an option is out of range.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_sampler_new(
    options: *const elora_sampler_options,
    out: *mut *mut elora_sampler,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let options = options::read(options, elora_sampler_options::DEFAULT)?;
        let out = Out::required(out, "out")?;
        let sampler = Sampler::new(&options.parse()?, options.stream)?;
        let inner = Exclusive::new("sampler", sampler);
        out.write(Arc::into_raw(Arc::new(elora_sampler { inner })).cast_mut());
        Ok(())
    })
}

/// Frees a sampler. NULL is ignored. No other thread may be using it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_sampler_free(sampler: *mut elora_sampler) {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::quiet(|| unsafe { memory::free(sampler.cast_const()) });
}

/// Draws a token from `n_logits` logits and writes it to `*token`. Pass elora_model_token_count()
/// logits, the first ones. Among equal logits the lowest token wins; NaN is never chosen. The logits
/// are not changed, and the token is not counted: call elora_sampler_accept() once it is taken.
///
/// `allowed` is a mask of the tokens that may be drawn, as grammar engines make it: bit i % 32 of
/// element i / 32 for token i, the lowest bit first. Tokens behind its `n_allowed` elements may not
/// be drawn. NULL allows all tokens.
///
/// ELORA_STATUS_INVALID_ARGUMENT if no token is left.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_sampler_sample(
    sampler: *mut elora_sampler,
    logits: *const f32,
    n_logits: usize,
    allowed: *const u32,
    n_allowed: usize,
    token: *mut elora_token,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let sampler = memory::required(sampler.cast_const(), "sampler")?;
        let logits = memory::slice(logits, n_logits, "logits")?;
        let mask = memory::slice(
            allowed,
            if allowed.is_null() { 0 } else { n_allowed },
            "allowed",
        )?;
        let mask = (!allowed.is_null()).then_some(TokenMask(mask));
        let out = Out::required(token, "token")?;
        let drawn = sampler
            .inner
            .with(|sampler| Ok(sampler.sample(logits, mask)?))?;
        // The cast keeps the bits: a buffer of logits has far fewer than 2^31 elements.
        out.write(drawn as elora_token);
        Ok(())
    })
}

/// Counts `n_tokens` tokens as generated, for the penalties.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_sampler_accept(
    sampler: *mut elora_sampler,
    tokens: *const elora_token,
    n_tokens: usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let sampler = memory::required(sampler.cast_const(), "sampler")?;
        let ids = ids_of(memory::slice(tokens, n_tokens, "tokens")?, "tokens")?;
        sampler.inner.with(|sampler| {
            ids.iter().for_each(|id| sampler.accept(*id));
            Ok(())
        })
    })
}

/// Counts `n_tokens` tokens of the prompt, which the repetition penalty sees and the others do not.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_sampler_observe(
    sampler: *mut elora_sampler,
    tokens: *const elora_token,
    n_tokens: usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let sampler = memory::required(sampler.cast_const(), "sampler")?;
        let ids = ids_of(memory::slice(tokens, n_tokens, "tokens")?, "tokens")?;
        sampler.inner.with(|sampler| {
            sampler.observe(ids);
            Ok(())
        })
    })
}

/// Forgets all tokens and begins the random draws anew.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_sampler_reset(sampler: *mut elora_sampler) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let sampler = memory::required(sampler.cast_const(), "sampler")?;
        sampler.inner.with(|sampler| {
            sampler.reset();
            Ok(())
        })
    })
}
