//! Code shared by both formats: packing codes into 32-bit words, and checks of tensors.

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::format::{all_f16, bits};
use crate::io::{Checkpoint, DType, HostTensor};

/// A little-endian 32-bit word as stored in a file.
pub(super) type Word = [u8; 4];

const FLOATS: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F64];

/// Returns `layer.suffix`, or the suffix alone if `layer` is empty (a file of a single unnamed
/// layer).
pub(super) fn tensor_name(layer: &str, suffix: &str) -> String {
    if layer.is_empty() {
        suffix.into()
    } else {
        format!("{layer}.{suffix}")
    }
}

/// Makes the error for an invalid tensor.
pub(super) fn wrong(
    checkpoint: &Checkpoint,
    tensor: &str,
    reason: impl std::fmt::Display,
) -> Error {
    Error::invalid_file(checkpoint.path(), format!("tensor `{tensor}`: {reason}"))
}

/// Checks the dtype and shape of a tensor.
pub(super) fn check(
    checkpoint: &Checkpoint,
    tensor: &str,
    dtypes: &[DType],
    shape: &[usize],
) -> Result<()> {
    let info = checkpoint.info(tensor)?;
    if !dtypes.contains(&info.dtype) {
        let names: Vec<&str> = dtypes.iter().map(|dtype| dtype.name()).collect();
        return Err(wrong(
            checkpoint,
            tensor,
            format!("dtype {}, expected {}", info.dtype, names.join(" or ")),
        ));
    }
    if info.shape != shape {
        return Err(wrong(
            checkpoint,
            tensor,
            format!("shape {:?}, expected {shape:?}", info.shape),
        ));
    }
    Ok(())
}

/// Checks that a tensor holds floats and has this shape.
pub(super) fn check_floats(checkpoint: &Checkpoint, tensor: &str, shape: &[usize]) -> Result<()> {
    check(checkpoint, tensor, &FLOATS, shape)
}

/// Returns the number of words that `n` codes take.
pub(super) fn word_count(n: usize, bits: u8) -> usize {
    bits::packed_len(n, bits).div_ceil(4)
}

/// Returns the words of a tensor that was checked.
pub(super) fn words<'a>(checkpoint: &'a Checkpoint, tensor: &str) -> Result<&'a [Word]> {
    Ok(checkpoint.bytes(tensor)?.as_chunks::<4>().0)
}

/// Returns the group of each column, or `None` if every group is `column / group_size`.
pub(super) fn column_groups(
    checkpoint: &Checkpoint,
    tensor: &str,
    group_size: usize,
    groups: usize,
) -> Result<Option<Vec<u32>>> {
    let words = words(checkpoint, tensor)?;
    let mut group_of = Vec::with_capacity(words.len());
    for (column, word) in words.iter().enumerate() {
        let group = i32::from_le_bytes(*word);
        match u32::try_from(group) {
            Ok(group) if (group as usize) < groups => group_of.push(group),
            _ => {
                let reason = format!("element {column} is {group}, but there are {groups} groups");
                return Err(wrong(checkpoint, tensor, reason));
            }
        }
    }
    let in_order = group_of
        .iter()
        .enumerate()
        .all(|(column, group)| column / group_size == *group as usize);
    Ok(if in_order { None } else { Some(group_of) })
}

/// Returns the transpose of a row-major matrix.
pub(super) fn transposed<T: Copy + Default>(values: &[T], rows: usize, cols: usize) -> Vec<T> {
    const TILE: usize = 32;
    let mut out = vec![T::default(); values.len()];
    for i0 in (0..rows).step_by(TILE) {
        for j0 in (0..cols).step_by(TILE) {
            for i in i0..(i0 + TILE).min(rows) {
                for j in j0..(j0 + TILE).min(cols) {
                    out[j * rows + i] = values[i * cols + j];
                }
            }
        }
    }
    out
}

/// Packs rows of `len` codes. Each row begins at a new word.
pub(super) fn pack_rows(codes: &[u8], len: usize, bits: u8) -> Vec<Word> {
    let per_row = word_count(len, bits);
    let mut words = vec![Word::default(); codes.len() / len * per_row];
    words
        .par_chunks_mut(per_row)
        .zip(codes.par_chunks(len))
        .for_each(|(words, row)| bits::pack(row, bits, words.as_flattened_mut()));
    words
}

/// Unpacks rows of `len` codes; the inverse of [`pack_rows`].
pub(super) fn unpack_rows(words: &[Word], len: usize, bits: u8) -> Vec<u8> {
    let per_row = word_count(len, bits);
    let mut codes = vec![0; words.len() / per_row * len];
    codes
        .par_chunks_mut(len)
        .zip(words.par_chunks(per_row))
        .for_each(|(row, words)| bits::unpack(words.as_flattened(), bits, row));
    codes
}

/// Makes an I32 tensor whose words are produced when it is written.
pub(super) fn words_tensor<'a>(
    name: String,
    shape: [usize; 2],
    words: impl FnOnce() -> Vec<Word> + Send + 'a,
) -> HostTensor<'a> {
    HostTensor::lazy_bytes(
        name,
        DType::I32,
        shape,
        move || Ok(words().into_flattened()),
    )
}

/// Returns the dtype to write scales in: `f16` if it represents all of them exactly, else `f32`.
pub(super) fn scale_dtype(scales: &[f32]) -> DType {
    if all_f16(scales) {
        DType::F16
    } else {
        DType::F32
    }
}
