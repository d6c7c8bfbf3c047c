//! Writes the container: metadata, tensor headers, then the data of one tensor after another.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::Path;

use super::super::blocks::Encoding;
use super::super::container::{ALIGNMENT, MAGIC, MAX_DIMS, MAX_NAME_BYTES};
use crate::error::{Error, Result};
use crate::io::atomic;

/// The version that is written.
const VERSION: u32 = 3;

/// Metadata in the making: each key with its type and value, as they stand in the file.
#[derive(Debug, Default)]
pub(in crate::io::gguf) struct Keys(Vec<(String, Vec<u8>)>);

fn put_text(text: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

impl Keys {
    /// Adds a key whose type and value are already encoded. A key that is there is replaced.
    pub fn raw(&mut self, key: impl Into<String>, value: Vec<u8>) {
        let key = key.into();
        self.0.retain(|(other, _)| *other != key);
        self.0.push((key, value));
    }

    fn scalar(&mut self, key: impl Into<String>, kind: u32, value: &[u8]) {
        self.raw(key, [&kind.to_le_bytes(), value].concat());
    }

    /// Adds a list of `len` elements whose bytes `fill` appends.
    fn list(
        &mut self,
        key: impl Into<String>,
        kind: u32,
        len: usize,
        fill: impl FnOnce(&mut Vec<u8>),
    ) {
        let mut bytes = [9_u32.to_le_bytes(), kind.to_le_bytes()].concat();
        bytes.extend_from_slice(&(len as u64).to_le_bytes());
        fill(&mut bytes);
        self.raw(key, bytes);
    }

    /// Adds a non-negative number of 32 bits.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if the number does not fit.
    pub fn size(&mut self, key: &str, value: usize) -> Result<()> {
        let value = u32_of(key, value)?;
        self.scalar(key, 4, &value.to_le_bytes());
        Ok(())
    }

    pub fn u32(&mut self, key: impl Into<String>, value: u32) {
        self.scalar(key, 4, &value.to_le_bytes());
    }

    pub fn f32(&mut self, key: impl Into<String>, value: f32) {
        self.scalar(key, 6, &value.to_le_bytes());
    }

    pub fn flag(&mut self, key: impl Into<String>, value: bool) {
        self.scalar(key, 7, &[u8::from(value)]);
    }

    pub fn text(&mut self, key: impl Into<String>, value: &str) {
        let mut bytes = 8_u32.to_le_bytes().to_vec();
        put_text(value, &mut bytes);
        self.raw(key, bytes);
    }

    pub fn texts<T: AsRef<str>>(&mut self, key: impl Into<String>, values: &[T]) {
        self.list(key, 8, values.len(), |out| {
            values.iter().for_each(|text| put_text(text.as_ref(), out));
        });
    }

    pub fn i32s(&mut self, key: impl Into<String>, values: &[i32]) {
        self.list(key, 5, values.len(), |out| {
            out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        });
    }

    pub fn f32s(&mut self, key: impl Into<String>, values: &[f32]) {
        self.list(key, 6, values.len(), |out| {
            out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        });
    }

    /// Adds a list of non-negative numbers of 32 bits.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if a number does not fit.
    pub fn sizes(&mut self, key: &str, values: impl Iterator<Item = usize>) -> Result<()> {
        let values: Vec<u32> = values
            .map(|value| u32_of(key, value))
            .collect::<Result<_>>()?;
        self.list(key, 4, values.len(), |out| {
            out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        });
        Ok(())
    }
}

fn u32_of(key: &str, value: usize) -> Result<u32> {
    u32::try_from(value).map_err(|_| Error::InvalidArgument {
        name: "GGUF key",
        found: format!("{key} = {value}"),
        expected: "a number of 32 bits".into(),
    })
}

/// Makes the bytes of a tensor.
pub(super) type Producer<'a> = Box<dyn FnOnce() -> Result<Cow<'a, [u8]>> + 'a>;

/// A tensor to be written.
pub(super) struct Tensor<'a> {
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    pub encoding: Encoding,
    /// Makes the bytes. It is called when the tensor is written, and they are dropped right after.
    pub bytes: Producer<'a>,
    /// Called when they are written.
    pub written: Box<dyn FnOnce() + 'a>,
}

impl Tensor<'_> {
    fn n_bytes(&self) -> Result<u64> {
        let (len, bytes) = self.encoding.block();
        let bad = || Error::TensorShape {
            tensor: self.name.clone(),
            expected: vec![len],
            found: self.shape.clone(),
        };
        let row = self.shape.last().copied().unwrap_or(0);
        let count = self
            .shape
            .iter()
            .try_fold(1_u64, |n, size| n.checked_mul(*size as u64));
        count
            .filter(|count| *count > 0 && row % len == 0)
            .and_then(|count| (count / len as u64).checked_mul(bytes as u64))
            .filter(|bytes| isize::try_from(*bytes).is_ok())
            .ok_or_else(bad)
    }
}

/// Writes a file atomically, with one tensor in memory at a time.
///
/// # Errors
/// Returns [`Error::InvalidFile`] if the file exists and `overwrite` is false, or if a name is too
/// long or used twice; [`Error::TensorShape`] if a shape is not one that the format can hold;
/// [`Error::Io`]; and any error of a tensor's closure. No file is left behind.
pub(super) fn write(
    path: &Path,
    keys: &Keys,
    tensors: Vec<Tensor<'_>>,
    overwrite: bool,
) -> Result<()> {
    let mut header = MAGIC.to_vec();
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&(tensors.len() as u64).to_le_bytes());
    header.extend_from_slice(&(keys.0.len() as u64).to_le_bytes());
    for (key, value) in &keys.0 {
        put_text(key, &mut header);
        header.extend_from_slice(value);
    }
    let mut names = BTreeSet::new();
    let mut end = 0_u64;
    for tensor in &tensors {
        let name = tensor.name.as_str();
        if name.len() as u64 > MAX_NAME_BYTES || !names.insert(name) {
            let reason = format!("tensor `{name}`: the name is too long, or there twice");
            return Err(Error::invalid_file(path, reason));
        }
        let bytes = tensor.n_bytes()?;
        if tensor.shape.len() > MAX_DIMS as usize {
            return Err(Error::TensorShape {
                tensor: name.into(),
                expected: vec![0; MAX_DIMS as usize],
                found: tensor.shape.clone(),
            });
        }
        put_text(name, &mut header);
        header.extend_from_slice(&(tensor.shape.len() as u32).to_le_bytes());
        for size in tensor.shape.iter().rev() {
            header.extend_from_slice(&(*size as u64).to_le_bytes());
        }
        header.extend_from_slice(&tensor.encoding.id().to_le_bytes());
        let offset = end.next_multiple_of(ALIGNMENT);
        header.extend_from_slice(&offset.to_le_bytes());
        end = offset
            .checked_add(bytes)
            .ok_or_else(|| Error::invalid_file(path, "too large"))?;
    }
    let zeros = [0; ALIGNMENT as usize];
    let padding = |len: u64| &zeros[..(len.next_multiple_of(ALIGNMENT) - len) as usize];
    atomic::write_file_or_refuse(path, overwrite, |sink| {
        sink.put(&header)?;
        sink.put(padding(header.len() as u64))?;
        for tensor in tensors {
            let expected = tensor.n_bytes()?;
            let bytes = (tensor.bytes)()?;
            if bytes.len() as u64 != expected {
                return Err(Error::ShapeMismatch {
                    what: format!(
                        "bytes of tensor `{}` with shape {:?}",
                        tensor.name, tensor.shape
                    ),
                    expected: vec![expected as usize],
                    found: vec![bytes.len()],
                });
            }
            sink.put(&bytes)?;
            sink.put(padding(expected))?;
            drop(bytes);
            (tensor.written)();
        }
        Ok(())
    })
}
