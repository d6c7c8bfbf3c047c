//! The header of a safetensors file.
//!
//! The safetensors crate's own reader is not used, because it takes some ninety times the memory of a
//! header that holds long lists, and its sum overflows for a file whose last offset is close to
//! 2^64.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;

use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use crate::error::{Error, Result};

/// Size in bytes of the length field before a header.
const LENGTH_BYTES: usize = 8;

/// Largest header that is read, in bytes, of a file of any size. Headers of models with hundreds of
/// billions of weights have less.
const FREE_BYTES: u64 = 10_000_000;

/// A larger header is read if the file is this many times as large.
const SHARE: u64 = 10;

/// Largest number of sizes of a tensor.
const MAX_DIMS: usize = 64;

/// Checks the header and returns the offset of the data. Every tensor in the header is inside
/// `file`.
pub(super) fn parse(path: &Path, file: &[u8]) -> Result<(usize, Metadata)> {
    let bad = |reason: String| Error::invalid_file(path, reason);
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(bad(format!(
            "{} bytes, too short for a safetensors file",
            file.len()
        )));
    };
    let length = u64::from_le_bytes(*length);
    let most = (file.len() as u64 / SHARE).clamp(FREE_BYTES, super::MAX_HEADER_BYTES);
    if length > most {
        if let Some(kind) = kind_of(file) {
            return Err(bad(format!("{kind}, not a safetensors file")));
        }
        return Err(bad(format!(
            "a header of {length} bytes, more than the {most} that are read"
        )));
    }
    let length = length as usize;
    let Some((header, data)) = rest.split_at_checked(length) else {
        return Err(bad(format!(
            "cut off: a header of {length} bytes in a file of {}",
            file.len()
        )));
    };
    let header: Header = serde_json::from_slice(header).map_err(|e| bad(format!("header: {e}")))?;
    // Checks that tensors are contiguous and that offsets, shapes and dtypes agree.
    let header =
        Metadata::new(header.metadata, header.tensors).map_err(|e| bad(format!("header: {e}")))?;
    if header.data_len() != data.len() {
        let what = if header.data_len() > data.len() {
            "cut off"
        } else {
            "too long"
        };
        return Err(bad(format!(
            "{what}: {} bytes of data, the header names {}",
            data.len(),
            header.data_len()
        )));
    }
    Ok((LENGTH_BYTES + length, header))
}

/// Says what a file is that is no safetensors file, if its first bytes tell.
fn kind_of(file: &[u8]) -> Option<&'static str> {
    let start = &file[..file.len().min(64)];
    let is_text = |byte: &u8| matches!(byte, b'\t' | b'\n' | b'\r' | b' '..=b'~' | 0x80..);
    if start.starts_with(crate::io::gguf::MAGIC) {
        Some("a GGUF file")
    } else if start.starts_with(b"PK\x03\x04") || start.starts_with(b"\x80\x02") {
        Some("a ZIP archive or a pickle, such as PyTorch writes")
    } else if start.starts_with(b"\x7fELF") {
        Some("a program")
    } else if start.iter().all(is_text)
        && std::str::from_utf8(start).map_or_else(|e| e.error_len().is_none(), |_| true)
    {
        Some("a text file")
    } else {
        None
    }
}

/// Tensors in the order of their data, and the metadata.
struct Header {
    tensors: Vec<(String, TensorInfo)>,
    metadata: Option<HashMap<String, String>>,
}

/// A tensor as the header has it.
#[derive(Deserialize)]
struct Entry {
    dtype: Dtype,
    #[serde(deserialize_with = "shape")]
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Tensors;
        impl<'de> Visitor<'de> for Tensors {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let (mut tensors, mut metadata) = (BTreeMap::new(), None);
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        metadata = map.next_value()?;
                        continue;
                    }
                    let Entry {
                        dtype,
                        shape,
                        data_offsets,
                    } = map.next_value_seed(Named(&name))?;
                    let info = TensorInfo {
                        dtype,
                        shape,
                        data_offsets,
                    };
                    if tensors.contains_key(&name) {
                        let what = format!("tensor `{name}` is there twice");
                        return Err(A::Error::custom(what));
                    }
                    tensors.insert(name, info);
                }
                let mut tensors: Vec<_> = tensors.into_iter().collect();
                tensors.sort_by_key(|(_, info)| info.data_offsets);
                Ok(Header { tensors, metadata })
            }
        }
        from.deserialize_map(Tensors)
    }
}

/// Reads a tensor, and names it in errors.
struct Named<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Named<'_> {
    type Value = Entry;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Entry, D::Error> {
        Entry::deserialize(from).map_err(|e| D::Error::custom(format!("tensor `{}`: {e}", self.0)))
    }
}

/// Reads the sizes of a tensor.
fn shape<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<usize>, D::Error> {
    struct Sizes;
    impl<'de> Visitor<'de> for Sizes {
        type Value = Vec<usize>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of sizes")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<usize>, A::Error> {
            let mut sizes = Vec::new();
            while let Some(size) = seq.next_element()? {
                if sizes.len() == MAX_DIMS {
                    return Err(A::Error::custom(format!("more than {MAX_DIMS} sizes")));
                }
                sizes.push(size);
            }
            Ok(sizes)
        }
    }
    from.deserialize_seq(Sizes)
}
