//! The container: metadata and tensor headers, checked against the size of the file.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::blocks::Encoding;
use crate::error::{Error, Result};
use crate::io::tensors::Bytes;

pub(in crate::io) const MAGIC: &[u8; 4] = b"GGUF";
/// Default of `general.alignment`.
pub(super) const ALIGNMENT: u64 = 32;
/// Largest numbers of keys and tensors, far above those of any real file.
const MAX_KEYS: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 18;
/// Smallest sizes in bytes of a key with its value, and of a tensor header.
const MIN_KEY_BYTES: u64 = 13;
const MIN_TENSOR_BYTES: u64 = 33;
/// Limits of ggml.
pub(super) const MAX_NAME_BYTES: u64 = 63;
pub(super) const MAX_DIMS: u32 = 4;
const MAX_KEY_BYTES: u64 = 65_535;

/// A metadata value. Texts and lists are not copied.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Int(i128),
    F32(f32),
    F64(f64),
    Bool(bool),
    Text(Range<usize>),
    List(List),
}

/// A list of values of one type.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct List {
    kind: u32,
    pub len: usize,
    range: Range<usize>,
}

/// A checked tensor header.
#[derive(Clone, Debug)]
pub(super) struct Tensor {
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    pub encoding: Encoding,
    pub range: Range<usize>,
}

/// A file whose metadata and tensor headers were read.
pub(super) struct File {
    pub path: PathBuf,
    pub bytes: Bytes,
    pub values: BTreeMap<String, Value>,
    pub tensors: Vec<Tensor>,
}

impl std::fmt::Debug for File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "File({}, {} tensors)",
            self.path.display(),
            self.tensors.len()
        )
    }
}

/// A reading position in a file.
struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn bad(&self, reason: impl Into<String>) -> Error {
        Error::invalid_file(self.path, reason)
    }

    fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8]> {
        let end = usize::try_from(len)
            .ok()
            .and_then(|len| self.at.checked_add(len));
        let taken = end.and_then(|end| Some((end, self.bytes.get(self.at..end)?)));
        let Some((end, taken)) = taken else {
            return Err(self.bad(format!(
                "cut off: {what} takes {len} bytes at {}, the file has {}",
                self.at,
                self.bytes.len()
            )));
        };
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// Reads a text of at most `max` bytes, and returns it with its range.
    fn text(&mut self, max: u64, what: &str) -> Result<(Range<usize>, &'a str)> {
        let len = self.u64(what)?;
        if len > max {
            return Err(self.bad(format!("{what}: {len} bytes, more than {max}")));
        }
        let start = self.at;
        let text = std::str::from_utf8(self.take(len, what)?)
            .map_err(|_| self.bad(format!("{what}: not UTF-8")))?;
        Ok((start..self.at, text))
    }

    fn value(&mut self, kind: u32, what: &str) -> Result<Value> {
        let int = |value: i128| Value::Int(value);
        Ok(match kind {
            0 => int(self.array::<1>(what)?[0].into()),
            1 => int(self.array::<1>(what)?[0].cast_signed().into()),
            2 => int(u16::from_le_bytes(self.array(what)?).into()),
            3 => int(i16::from_le_bytes(self.array(what)?).into()),
            4 => int(u32::from_le_bytes(self.array(what)?).into()),
            5 => int(i32::from_le_bytes(self.array(what)?).into()),
            6 => Value::F32(f32::from_le_bytes(self.array(what)?)),
            7 => match self.array::<1>(what)?[0] {
                byte @ (0 | 1) => Value::Bool(byte == 1),
                byte => return Err(self.bad(format!("{what}: a bool of value {byte}"))),
            },
            8 => Value::Text(self.text(u64::MAX, what)?.0),
            9 => Value::List(self.list(what)?),
            10 => int(u64::from_le_bytes(self.array(what)?).into()),
            11 => int(i64::from_le_bytes(self.array(what)?).into()),
            12 => Value::F64(f64::from_le_bytes(self.array(what)?)),
            _ => {
                return Err(self.bad(format!(
                    "{what}: a value of type {kind}, which there is not"
                )));
            }
        })
    }

    fn list(&mut self, what: &str) -> Result<List> {
        let (kind, len) = (self.u32(what)?, self.u64(what)?);
        if kind == 9 {
            return Err(self.bad(format!("{what}: a list of lists")));
        }
        let start = self.at;
        // Read every element once, to find the end of the list and to check it.
        for _ in 0..len {
            self.value(kind, what)?;
        }
        Ok(List {
            kind,
            len: len as usize,
            range: start..self.at,
        })
    }
}

/// Guesses the format of a file that is not GGUF.
fn found(bytes: &[u8]) -> &'static str {
    match bytes {
        [b'{' | b'[', ..] => "it seems to be JSON",
        [_, _, _, _, _, _, _, _, b'{', ..] => "it seems to be a safetensors file",
        [b'P', b'K', ..] => "it seems to be a zip archive, such as a pickled checkpoint",
        [b'g', b'g', ..] | [b't', b'j', b'g', b'g'] | [b'l', b'm', b'g', b'g', ..] => {
            "it is of a format before GGUF"
        }
        [b'v', b'e', b'r', b's', b'i', b'o', b'n', b' ', ..] => "it seems to be a Git LFS pointer",
        _ => "its first bytes are others",
    }
}

impl File {
    /// Reads metadata and tensor headers.
    ///
    /// # Errors
    /// Returns [`Error::InvalidFile`] if the file breaks a rule of the format, and
    /// [`Error::Unsupported`] if its version or the type of a tensor is not implemented.
    pub fn parse(path: &Path, bytes: Bytes) -> Result<Self> {
        let (values, tensors) = Self::read(bytes.as_ref(), path)?;
        Ok(Self {
            path: path.into(),
            bytes,
            values,
            tensors,
        })
    }

    fn read(bytes: &[u8], path: &Path) -> Result<(BTreeMap<String, Value>, Vec<Tensor>)> {
        let mut cursor = Cursor { path, bytes, at: 0 };
        if !bytes.starts_with(MAGIC) {
            return Err(cursor.bad(format!("not a GGUF file: {}", found(bytes))));
        }
        cursor.at = MAGIC.len();
        match cursor.u32("the version")? {
            2 | 3 => {}
            version => {
                let what = if version.swap_bytes() <= 3 {
                    "big-endian GGUF"
                } else {
                    "GGUF"
                };
                let version = version.min(version.swap_bytes());
                let what = format!("{}: {what} of version {version}", path.display());
                return Err(Error::Unsupported { what });
            }
        }
        let n_tensors = cursor.u64("the number of tensors")?;
        let n_keys = cursor.u64("the number of keys")?;
        let counts = [
            ("keys", n_keys, MAX_KEYS, MIN_KEY_BYTES),
            ("tensors", n_tensors, MAX_TENSORS, MIN_TENSOR_BYTES),
        ];
        for (what, count, max, bytes) in counts {
            if count > max.min(cursor.left() / bytes) {
                let len = cursor.bytes.len();
                return Err(cursor.bad(format!("{count} {what} in a file of {len} bytes")));
            }
        }
        let mut values = BTreeMap::new();
        for _ in 0..n_keys {
            let (_, key) = cursor.text(MAX_KEY_BYTES, "a key")?;
            let what = format!("key `{key}`");
            let kind = cursor.u32(&what)?;
            let value = cursor.value(kind, &what)?;
            if values.insert(key.to_string(), value).is_some() {
                return Err(cursor.bad(format!("{what} is there twice")));
            }
        }
        let alignment = match values.get("general.alignment") {
            None => ALIGNMENT,
            Some(Value::Int(value)) if *value > 0 && value % 8 == 0 && *value <= 1 << 24 => {
                *value as u64
            }
            Some(other) => {
                return Err(cursor.bad(format!(
                    "key `general.alignment`: {other:?}, expected a multiple of 8"
                )));
            }
        };
        let mut infos = Vec::new();
        let mut names = BTreeSet::new();
        for _ in 0..n_tensors {
            let info = TensorHeader::read(&mut cursor)?;
            if !names.insert(info.name) {
                return Err(cursor.bad(format!("tensor `{}` is there twice", info.name)));
            }
            infos.push(info);
        }
        // Like ggml, expect every tensor at the first multiple of the alignment after the last one.
        let len = bytes.len() as u64;
        let start = (cursor.at as u64).next_multiple_of(alignment);
        let mut end = 0_u64;
        let mut tensors = Vec::with_capacity(infos.len());
        for info in infos {
            let name = info.name;
            let expected = end.next_multiple_of(alignment);
            if info.offset != expected {
                return Err(cursor.bad(format!(
                    "tensor `{name}`: offset {}, expected {expected}, where the one before ends",
                    info.offset
                )));
            }
            end = expected
                .checked_add(info.bytes)
                .filter(|end| start.checked_add(*end).is_some_and(|end| end <= len))
                .ok_or_else(|| {
                    cursor.bad(format!(
                        "cut off: tensor `{name}` takes {} bytes at {start} + {expected}, \
                         the file has {len}",
                        info.bytes
                    ))
                })?;
            tensors.push(Tensor {
                name: name.into(),
                shape: info.shape,
                encoding: info.encoding,
                range: (start + expected) as usize..(start + end) as usize,
            });
        }
        let last = start + end;
        if len > last.next_multiple_of(alignment).max(start) {
            return Err(cursor.bad(format!(
                "too long: {len} bytes, the last tensor ends at {last}"
            )));
        }
        Ok((values, tensors))
    }

    pub fn bad_key(&self, key: &str, reason: impl std::fmt::Display) -> Error {
        Error::invalid_file(&self.path, format!("key `{key}`: {reason}"))
    }

    /// Type and value of a key as they stand in a file, to be written again. Whole numbers keep
    /// their value, in 32 bits where they fit.
    pub fn encoded(&self, value: &Value) -> Vec<u8> {
        let with = |kind: u32, bytes: &[u8]| [&kind.to_le_bytes(), bytes].concat();
        let range =
            |range: &Range<usize>| self.bytes.as_ref().get(range.clone()).unwrap_or_default();
        match value {
            Value::Int(value) => match (u32::try_from(*value), i32::try_from(*value)) {
                (Ok(value), _) => with(4, &value.to_le_bytes()),
                (_, Ok(value)) => with(5, &value.to_le_bytes()),
                // Every integer of a file is of at most 64 bits.
                _ if *value < 0 => with(11, &(*value as i64).to_le_bytes()),
                _ => with(10, &(*value as u64).to_le_bytes()),
            },
            Value::F32(value) => with(6, &value.to_le_bytes()),
            Value::F64(value) => with(12, &value.to_le_bytes()),
            Value::Bool(value) => with(7, &[u8::from(*value)]),
            Value::Text(at) => {
                let text = range(at);
                [&with(8, &(text.len() as u64).to_le_bytes()), text].concat()
            }
            Value::List(list) => {
                let len = (list.len as u64).to_le_bytes();
                [
                    &with(9, &list.kind.to_le_bytes()),
                    &len[..],
                    range(&list.range),
                ]
                .concat()
            }
        }
    }

    /// Text in a range of the file.
    fn text_at(&self, range: &Range<usize>) -> &str {
        let bytes = self.bytes.as_ref().get(range.clone()).unwrap_or_default();
        // The text was checked when the file was opened.
        std::str::from_utf8(bytes).unwrap_or_default()
    }

    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Text(range)) => Ok(Some(self.text_at(range))),
            Some(_) => Err(self.bad_key(key, "not a text")),
        }
    }

    /// A non-negative integer, or a list in which all elements are the same one.
    pub fn size(&self, key: &str) -> Result<Option<u64>> {
        let value = match self.values.get(key) {
            None => return Ok(None),
            Some(Value::List(_)) => {
                let mut all = self.items(key)?.into_iter().flatten();
                let first = all.next();
                if all.any(|other| Some(other) != first) {
                    let what = format!(
                        "{}: key `{key}` that differs between blocks",
                        self.path.display()
                    );
                    return Err(Error::Unsupported { what });
                }
                first
            }
            Some(value) => Some(value.clone()),
        };
        match value {
            Some(Value::Int(value)) => u64::try_from(value).map(Some),
            _ => Ok(None),
        }
        .ok()
        .flatten()
        .map_or_else(
            || Err(self.bad_key(key, "not a whole number of at least 0")),
            |v| Ok(Some(v)),
        )
    }

    /// Non-negative integers: a list of `count`, or one that is meant `count` times.
    pub fn sizes(&self, key: &str, count: usize) -> Result<Option<Vec<usize>>> {
        let Some(Value::List(list)) = self.values.get(key) else {
            let size = self.size(key)?;
            return Ok(size.map(|size| vec![size as usize; count]));
        };
        if list.len != count {
            return Err(self.bad_key(key, format!("{} numbers, expected {count}", list.len)));
        }
        let size = |item| match item {
            Value::Int(value) => usize::try_from(value).ok(),
            _ => None,
        };
        let items = self.items(key)?.into_iter().flatten();
        let sizes: Option<Vec<usize>> = items.map(size).collect();
        sizes
            .map(Some)
            .ok_or_else(|| self.bad_key(key, "not a list of whole numbers of at least 0"))
    }

    /// A number. An `f32` is converted by its shortest decimal text, so that `1e-6` stays `1e-6`.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        let value = match self.values.get(key) {
            None => return Ok(None),
            Some(Value::F32(value)) => value.to_string().parse().ok(),
            Some(Value::F64(value)) => Some(*value),
            Some(_) => None,
        };
        value
            .map(Some)
            .ok_or_else(|| self.bad_key(key, "not a number"))
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(_) => Err(self.bad_key(key, "neither true nor false")),
        }
    }

    /// Elements of a list.
    pub fn items(&self, key: &str) -> Result<Option<impl ExactSizeIterator<Item = Value>>> {
        let list = match self.values.get(key) {
            None => return Ok(None),
            Some(Value::List(list)) => list,
            Some(_) => return Err(self.bad_key(key, "not a list")),
        };
        let bytes = self.bytes.as_ref();
        let mut cursor = Cursor {
            path: &self.path,
            bytes: bytes.get(..list.range.end).unwrap_or_default(),
            at: list.range.start.min(bytes.len()),
        };
        // All elements were read when the file was opened.
        let read = move |_| cursor.value(list.kind, "").unwrap_or(Value::Bool(false));
        Ok(Some((0..list.len).map(read)))
    }

    /// Elements of a list of texts.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>> {
        let Some(items) = self.items(key)? else {
            return Ok(None);
        };
        let text = |item| match item {
            Value::Text(range) => Ok(self.text_at(&range)),
            _ => Err(self.bad_key(key, "not a list of texts")),
        };
        items.map(text).collect::<Result<_>>().map(Some)
    }
}

/// A tensor header in the file.
struct TensorHeader<'a> {
    name: &'a str,
    shape: Vec<usize>,
    encoding: Encoding,
    offset: u64,
    bytes: u64,
}

impl<'a> TensorHeader<'a> {
    fn read(cursor: &mut Cursor<'a>) -> Result<Self> {
        let (_, name) = cursor.text(MAX_NAME_BYTES, "a tensor's name")?;
        let what = format!("tensor `{name}`");
        let n_dims = cursor.u32(&what)?;
        if !(1..=MAX_DIMS).contains(&n_dims) {
            return Err(cursor.bad(format!(
                "{what}: {n_dims} dimensions, expected 1 to {MAX_DIMS}"
            )));
        }
        let mut shape = Vec::new();
        let mut count = Some(1_u64);
        for _ in 0..n_dims {
            let size = cursor.u64(&what)?;
            count = count.and_then(|count| count.checked_mul(size));
            shape.push(size as usize);
        }
        shape.reverse();
        let kind = cursor.u32(&what)?;
        let encoding = Encoding::from_id(kind).map_err(|name| Error::Unsupported {
            what: format!("{}: {what}: ggml type {name}", cursor.path.display()),
        })?;
        let (len, bytes) = encoding.block();
        let row = shape.last().copied().unwrap_or_default();
        let Some(count) = count.filter(|count| *count > 0 && *count <= isize::MAX as u64) else {
            return Err(cursor.bad(format!(
                "{what}: shape {shape:?}, expected sizes of at least 1 whose product fits the memory"
            )));
        };
        if row % len != 0 {
            return Err(cursor.bad(format!(
                "{what}: rows of {row}, expected a multiple of {len}, the block of {encoding:?}"
            )));
        }
        let Some(bytes) = (count / len as u64).checked_mul(bytes as u64) else {
            return Err(cursor.bad(format!("{what}: shape {shape:?} is too large")));
        };
        Ok(Self {
            name,
            shape,
            encoding,
            offset: cursor.u64(&what)?,
            bytes,
        })
    }
}
