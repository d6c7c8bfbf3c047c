//! What a caller that runs the model itself needs beside the linear layers.

use std::ffi::c_char;

use super::guard;
use super::memory::{self, Out};
use super::model::{elora_model, elora_token};
use super::options::{self, Growing};
use super::status::{ELORA_STATUS_NOT_FOUND, Failure, elora_status};
use super::tokenizer::ids_of;
use crate::error::Error;

/// Sizes and numbers of a whole model.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct elora_model_info {
    /// In: sizeof(elora_model_info).
    pub struct_size: usize,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Tokens that the model can take in at most.
    pub context_size: usize,
    /// Numbers in a row between the blocks.
    pub hidden_size: usize,
    /// Blocks.
    pub n_blocks: usize,
    /// Numbers of an attention head.
    pub head_dim: usize,
    /// Tokens that a query sees at most, its own included; 0 for all.
    pub sliding_window: usize,
    /// What is added to the mean square in the norms.
    pub norm_epsilon: f64,
}

// SAFETY: integers and a number, the first of which is the size; no padding.
unsafe impl Growing for elora_model_info {
    const NAME: &'static str = "elora_model_info";
}

/// Describes the model. Set `info->struct_size` before. Heads and widths of a block are those of its layers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_describe(
    model: *const elora_model,
    info: *mut elora_model_info,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
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

/// Writes the embeddings of tokens: `n_tokens` rows of hidden_size numbers, for which `out_len` must have room.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_embed(
    model: *const elora_model,
    tokens: *const elora_token,
    n_tokens: usize,
    out: *mut f32,
    out_len: usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
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

/// Copies the gain of a norm, hidden_size numbers, to `out`. `name` is that of its tensor in Hugging Face's files,
/// such as "model.layers.0.input_layernorm.weight" or "model.norm.weight". ELORA_STATUS_NOT_FOUND where there is none
/// of that name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_norm(
    model: *const elora_model,
    name: *const c_char,
    out: *mut f32,
    out_len: usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
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

/// Writes the cosines and sines of rotary attention at a position: head_dim / 2 numbers each, for which `len` must
/// have room. Number i turns elements i and i + head_dim / 2 of a head.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_rotary(
    model: *const elora_model,
    position: usize,
    cos: *mut f32,
    sin: *mut f32,
    len: usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?.inner();
        let half = model.config().head_dim() / 2;
        if len < half {
            return Err(memory::short("cos", len, half));
        }
        // Two buffers of the same size must both be there, whatever the size.
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
        model.rotary(position, cos, sin);
        Ok(())
    })
}
