//! The parts of a model, other than linear layers, that a custom inference loop needs.

use std::ffi::c_char;

use super::guard;
use super::memory::{self, Out};
use super::model::{elora_model, elora_token};
use super::options::{self, Growing};
use super::status::{ELORA_STATUS_NOT_FOUND, Failure, elora_status};
use super::tokenizer::ids_of;
use crate::error::Error;

/// Sizes and constants of a model.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct elora_model_info {
    /// Set it to sizeof(elora_model_info) before the call.
    pub struct_size: usize,
    /// Number of tokens in the vocabulary.
    pub vocab_size: usize,
    /// Largest number of tokens in a session.
    pub context_size: usize,
    /// Width of the residual stream: the number of elements in a row between the blocks.
    pub hidden_size: usize,
    /// Number of blocks.
    pub n_blocks: usize,
    /// Number of elements of an attention head.
    pub head_dim: usize,
    /// Number of tokens that a query attends to at most, including its own; 0 for no limit.
    pub sliding_window: usize,
    /// Epsilon that the RMS norms add to the mean square.
    pub norm_epsilon: f64,
}

// SAFETY: `repr(C)` integers and a float, the first of which is the size; no padding.
unsafe impl Growing for elora_model_info {
    const NAME: &'static str = "elora_model_info";
}

/// Describes the whole model. Set `info->struct_size` before the call. The number of heads and the
/// MLP width of a block follow from the sizes of its layers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_describe(
    model: *const elora_model,
    info: *mut elora_model_info,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        let config = model.inner().config();
        options::fill(info, || {
            Ok(elora_model_info {
                struct_size: 0,
                vocab_size: config.vocab_size(),
                context_size: config.max_position_embeddings(),
                hidden_size: config.hidden_size(),
                n_blocks: config.num_hidden_layers(),
                head_dim: config.head_dim(),
                sliding_window: config.sliding_window().unwrap_or(0),
                norm_epsilon: config.rms_norm_eps(),
            })
        })
    })
}

/// Writes the embeddings of `n_tokens` tokens to `out`: `n_tokens` rows of hidden_size elements.
/// `out_len` is the length of `out` in elements. ELORA_STATUS_INSUFFICIENT_SIZE if it is too short.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_embed(
    model: *const elora_model,
    tokens: *const elora_token,
    n_tokens: usize,
    out: *mut f32,
    out_len: usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?.inner();
        let ids = ids_of(memory::slice(tokens, n_tokens, "tokens")?, "tokens")?;
        let (vocab_size, width) = (model.config().vocab_size(), model.config().hidden_size());
        if let Some(found) = ids.iter().find(|id| **id as usize >= vocab_size) {
            return Err(Error::TokenOutOfRange {
                found: *found,
                vocab_size,
            }
            .into());
        }
        let needed = n_tokens.saturating_mul(width);
        if out_len < needed {
            return Err(memory::short("out", out_len, needed));
        }
        let embedding = model.embedding()?;
        let rows = memory::slice_mut(out, needed, "out")?.chunks_exact_mut(width);
        for (id, row) in ids.iter().zip(rows) {
            embedding.dequantize_rows(*id as usize, row)?;
        }
        Ok(())
    })
}

/// Copies the gains of a norm, hidden_size elements, to `out`, a buffer of `out_len` elements.
/// `name` is the tensor's name in Hugging Face's files, such as
/// "model.layers.0.input_layernorm.weight" or "model.norm.weight". ELORA_STATUS_NOT_FOUND if there
/// is no norm of that name; ELORA_STATUS_INSUFFICIENT_SIZE if `out` is too short.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_norm(
    model: *const elora_model,
    name: *const c_char,
    out: *mut f32,
    out_len: usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?.inner();
        let name = memory::text(name, "name")?;
        let Some(gain) = model.norm(name) else {
            return Err(Failure::new(
                ELORA_STATUS_NOT_FOUND,
                format!("there is no norm `{name}`"),
            ));
        };
        memory::copy_elements(gain, out, out_len, std::ptr::null_mut())
    })
}

/// Writes the cosines and sines of the rotary embedding at `position`, head_dim / 2 elements each.
/// `cos` and `sin` are buffers of `len` elements each and must not overlap. Element i rotates
/// elements i and i + head_dim / 2 of a head. ELORA_STATUS_INSUFFICIENT_SIZE if `len` is too small;
/// ELORA_STATUS_UNSUPPORTED if the blocks of the model compute more or other than those of Llama,
/// as those of Qwen3, SmolLM3, Gemma and some of Phi do: use a session for them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_rotary(
    model: *const elora_model,
    position: usize,
    cos: *mut f32,
    sin: *mut f32,
    len: usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?.inner();
        let half = model.config().head_dim() / 2;
        if len < half {
            return Err(memory::short("cos", len, half));
        }
        // Neither pointer may be NULL, even if the buffers are empty.
        Out::required(cos, "cos")?;
        Out::required(sin, "sin")?;
        memory::disjoint(&[
            ("cos", memory::region(cos, half)),
            ("sin", memory::region(sin, half)),
        ])?;
        let (cos, sin) = (
            memory::slice_mut(cos, half, "cos")?,
            memory::slice_mut(sin, half, "sin")?,
        );
        if !model.config().arch().is_plain() {
            let family = model.config().family().architecture();
            return Err(Error::Unsupported {
                what: format!("a loop of your own for blocks of {family}"),
            }
            .into());
        }
        model.rotary(0, position, position.saturating_add(1), cos, sin);
        Ok(())
    })
}
