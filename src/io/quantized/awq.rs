//! Tensors of a linear layer in AWQ's format (Lin et al., arXiv 2306.00978), in the version `gemm`
//! of AutoAWQ. The layer is `[out, in]`, with groups along the input:
//!
//! | tensor | shape | content |
//! |---|---|---|
//! | `qweight` | I32 `[in, out / 8]` | codes of 4 bits, packed along the output |
//! | `qzeros` | I32 `[groups, out / 8]` | zero points, packed in the same way |
//! | `scales` | float `[groups, out]` | scales |
//!
//! The 4 bits number `i` of a word, from the lowest, belong to output `ORDER[i]` of its 8. This
//! crate reads the format and does not write it.

use super::config::QuantizationConfig;
use super::layout::{self, Word, tensor_name, wrong};
use crate::error::Result;
use crate::format::QuantizedParts;
use crate::io::{Checkpoint, DType};

pub(super) const CODES: &str = "qweight";
const ZEROS: &str = "qzeros";
const SCALES: &str = "scales";
/// All of them.
pub(super) const TENSORS: [&str; 3] = [CODES, ZEROS, SCALES];

/// Outputs of the codes of a word.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

pub(super) fn check(
    config: &QuantizationConfig,
    checkpoint: &Checkpoint,
    layer: &str,
    [rows, cols]: [usize; 2],
) -> Result<()> {
    let name = tensor_name(layer, CODES);
    if !rows.is_multiple_of(ORDER.len()) {
        let reason = format!("{rows} outputs, which do not fill words of {}", ORDER.len());
        return Err(wrong(checkpoint, &name, reason));
    }
    let group_size = config.group_size().unwrap_or(cols);
    if !cols.is_multiple_of(group_size) {
        let reason = format!("{cols} inputs, which are not whole groups of {group_size}");
        return Err(wrong(checkpoint, &name, reason));
    }
    let groups = cols / group_size;
    let words = rows / ORDER.len();
    for (suffix, lines) in [(CODES, cols), (ZEROS, groups)] {
        let name = tensor_name(layer, suffix);
        layout::check(checkpoint, &name, &[DType::I32], &[lines, words])?;
    }
    layout::check_floats(checkpoint, &tensor_name(layer, SCALES), &[groups, rows])
}

/// Reads the tensors of a layer that was checked.
pub(super) fn read(
    config: &QuantizationConfig,
    checkpoint: &Checkpoint,
    layer: &str,
    [rows, cols]: [usize; 2],
) -> Result<QuantizedParts> {
    let group_size = config.group_size().unwrap_or(cols);
    let groups = cols / group_size;
    let unpacked = |suffix: &str, lines: usize| {
        let words = layout::words(checkpoint, &tensor_name(layer, suffix))?;
        Ok::<_, crate::error::Error>(layout::transposed(&unpack(words), lines, rows))
    };
    let codes = unpacked(CODES, cols)?;
    let zeros = unpacked(ZEROS, groups)?;
    let scales = checkpoint.load_f32(&tensor_name(layer, SCALES))?;
    Ok(QuantizedParts {
        rows,
        cols,
        bits: config.bits(),
        group_size,
        symmetric: zeros.iter().all(|zero| *zero == 8),
        codes,
        scales: layout::transposed(&scales, groups, rows),
        zeros,
        group_of: None,
    })
}

fn unpack(words: &[Word]) -> Vec<u8> {
    let mut codes = vec![0; words.len() * ORDER.len()];
    for (word, codes) in words.iter().zip(codes.chunks_exact_mut(ORDER.len())) {
        let word = u32::from_le_bytes(*word);
        for (number, output) in ORDER.into_iter().enumerate() {
            codes[output] = (word >> (4 * number) & 0xF) as u8;
        }
    }
    codes
}
