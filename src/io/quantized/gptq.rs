//! Tensors of a linear layer in GPTQ's format. The layer is `[out, in]`, with groups along the
//! input:
//!
//! | tensor | shape | content |
//! |---|---|---|
//! | `qweight` | I32 `[in * bits / 32, out]` | codes, packed along the input |
//! | `qzeros` | I32 `[groups, out * bits / 32]` | zero points, packed along the output; v1 stores each less 1 |
//! | `scales` | float `[groups, out]` | scales |
//! | `g_idx` | I32 `[in]` | group of each input; optional if groups follow the columns |
//!
//! 3-bit codes may straddle two words, as in AutoGPTQ. GPTQModel's planar layout is not supported.
//!
//! v1 would store a zero point of 0 as -1. AutoGPTQ corrupts the neighbouring zero points when it
//! writes one, and readers disagree on a stored `2^bits - 1`: some wrap it to 0, others take it as
//! `2^bits`. This crate neither writes nor reads it.

use super::config::{QuantFormat, QuantizationConfig};
use super::layout::{self, tensor_name, wrong};
use crate::error::{Error, Result};
use crate::format::{QuantizedMatrix, QuantizedParts};
use crate::io::{Checkpoint, DType, HostTensor};

pub(super) const CODES: &str = "qweight";
const ZEROS: &str = "qzeros";
const SCALES: &str = "scales";
const GROUP_OF: &str = "g_idx";
/// All of them.
pub(super) const TENSORS: [&str; 4] = [CODES, ZEROS, SCALES, GROUP_OF];

pub(super) fn check(
    config: &QuantizationConfig,
    checkpoint: &Checkpoint,
    layer: &str,
    [rows, cols]: [usize; 2],
) -> Result<()> {
    let bits = config.bits();
    let groups = cols.div_ceil(config.group_size().unwrap_or(cols));
    let packed = |suffix: &str, shape: [usize; 2]| {
        layout::check(
            checkpoint,
            &tensor_name(layer, suffix),
            &[DType::I32],
            &shape,
        )
    };
    packed(CODES, [layout::word_count(cols, bits), rows])?;
    packed(ZEROS, [groups, layout::word_count(rows, bits)])?;
    layout::check_floats(checkpoint, &tensor_name(layer, SCALES), &[groups, rows])?;
    let group_of = tensor_name(layer, GROUP_OF);
    if checkpoint.contains(&group_of) {
        layout::check(checkpoint, &group_of, &[DType::I32], &[cols])?;
    }
    Ok(())
}

/// Reads the tensors of a layer that was checked.
pub(super) fn read(
    config: &QuantizationConfig,
    checkpoint: &Checkpoint,
    layer: &str,
    [rows, cols]: [usize; 2],
) -> Result<QuantizedParts> {
    let bits = config.bits();
    let group_size = config.group_size().unwrap_or(cols);
    let groups = cols.div_ceil(group_size);

    let words = layout::words(checkpoint, &tensor_name(layer, CODES))?;
    let words = layout::transposed(words, layout::word_count(cols, bits), rows);
    let codes = layout::unpack_rows(&words, cols, bits);

    let name = tensor_name(layer, ZEROS);
    let mut zeros = layout::unpack_rows(layout::words(checkpoint, &name)?, rows, bits);
    if config.format() == QuantFormat::Gptq {
        let top = u8::MAX >> (8 - bits);
        if let Some(at) = zeros.iter().position(|stored| *stored == top) {
            let reason = format!(
                "output {} of group {} stores {top}, which readers take for a zero point of {} or of 0",
                at % rows,
                at / rows,
                u16::from(top) + 1
            );
            return Err(wrong(checkpoint, &name, reason));
        }
        zeros.iter_mut().for_each(|stored| *stored += 1);
    }
    let middle = 1 << (bits - 1);
    let symmetric = zeros.iter().all(|zero| *zero == middle);
    if config.symmetric() && !symmetric {
        // The usual cause is a v2 checkpoint that is labelled v1, or the reverse.
        let at = zeros.iter().position(|zero| *zero != middle).unwrap_or(0);
        let reason = format!(
            "output {} of group {} has zero point {}, but the config says that the grid is symmetric, with {middle}",
            at % rows,
            at / rows,
            zeros[at]
        );
        return Err(wrong(checkpoint, &name, reason));
    }

    let scales = checkpoint.load_f32(&tensor_name(layer, SCALES))?;
    let name = tensor_name(layer, GROUP_OF);
    let group_of = if checkpoint.contains(&name) {
        layout::column_groups(checkpoint, &name, group_size, groups)?
    } else if config.act_order() {
        return Err(Error::MissingTensor {
            path: checkpoint.path().to_path_buf(),
            tensor: name,
        });
    } else {
        None
    };
    Ok(QuantizedParts {
        rows,
        cols,
        bits,
        group_size,
        symmetric,
        codes,
        scales: layout::transposed(&scales, groups, rows),
        zeros: layout::transposed(&zeros, groups, rows),
        group_of,
    })
}

pub(super) fn tensors<'a>(
    config: &QuantizationConfig,
    layer: &str,
    matrix: &'a QuantizedMatrix,
) -> Result<Vec<HostTensor<'a>>> {
    let parts = matrix.parts();
    let (rows, cols, bits, groups) = (parts.rows, parts.cols, parts.bits, matrix.groups());
    let unsupported = |suffix: &str, what: String| {
        Err(Error::Unsupported {
            what: format!("tensor `{}`: {what}", tensor_name(layer, suffix)),
        })
    };
    for (suffix, what, n) in [(CODES, "inputs", cols), (ZEROS, "outputs", rows)] {
        if n == 0 || !(n as u128 * u128::from(bits)).is_multiple_of(32) {
            return unsupported(
                suffix,
                format!("{n} {what} of {bits} bits, which are no whole words of 32 bits, in GPTQ"),
            );
        }
    }
    if parts.group_of.is_some() && !config.act_order() {
        return unsupported(
            GROUP_OF,
            "groups out of order beside a config without `desc_act`, in GPTQ".into(),
        );
    }
    // v1 stores zero points less 1.
    let less = u8::from(config.format() == QuantFormat::Gptq);
    if let Some(at) = parts.zeros.iter().position(|zero| *zero < less) {
        let what = format!(
            "a zero point of 0 (output {}, group {}) in GPTQ v1 (v2 can)",
            at / groups,
            at % groups
        );
        return unsupported(ZEROS, what);
    }
    let codes = move || {
        let words = layout::pack_rows(&parts.codes, cols, bits);
        layout::transposed(&words, rows, layout::word_count(cols, bits))
    };
    let zeros = move || {
        let mut stored = layout::transposed(&parts.zeros, rows, groups);
        stored.iter_mut().for_each(|zero| *zero -= less);
        layout::pack_rows(&stored, rows, bits)
    };
    let group_of = move || {
        let group = |column| matrix.group_of(column) as u32;
        Ok((0..cols)
            .flat_map(|column| group(column).to_le_bytes())
            .collect())
    };
    Ok(vec![
        layout::words_tensor(
            tensor_name(layer, CODES),
            [layout::word_count(cols, bits), rows],
            codes,
        ),
        layout::words_tensor(
            tensor_name(layer, ZEROS),
            [groups, layout::word_count(rows, bits)],
            zeros,
        ),
        HostTensor::lazy_f32(
            tensor_name(layer, SCALES),
            layout::scale_dtype(&parts.scales),
            [groups, rows],
            move || Ok(layout::transposed(&parts.scales, rows, groups)),
        ),
        HostTensor::lazy_bytes(tensor_name(layer, GROUP_OF), DType::I32, [cols], group_of),
    ])
}
