//! A compressed model in a single file that is used directly from a memory map.
//!
//! A bundle is a safetensors file, so other tools can inspect it. Its `__metadata__` holds `format`
//! ([`FORMAT`]), `version` ([`VERSION`]), `index` and `checksum`:
//!
//! - `index` is JSON: `matrices` holds the [`MatrixHeader`] of each weight by name, `checksums`
//!   holds a CRC-32 of each tensor's bytes, and `document` holds the model's own description, which
//!   this module does not interpret;
//! - `checksum` is the CRC-32 of `index`.
//!
//! A weight `name` of `rows` by `cols` is stored as the [parts](crate::format::StoredMatrix::parts)
//! of its format; each part is a tensor `name.part`. Norms and biases are 32-bit float tensors, and
//! texts are byte tensors. Every tensor begins at a multiple of 64 bytes. The gaps between tensors
//! are tensors too, named `~0`, `~1` and so on. So is the padding at the end of the file, which a
//! kernel may read past the end of the last weight.
//!
//! Opening a bundle checks everything except the contents of weights, so that no tensor reaches
//! outside the file or overlaps another, regardless of the header. Contents are compared with their
//! checksums on first use ([`Bundle::verify_matrix`]) or all at once ([`Bundle::verify`]). CRC-32
//! detects every change confined to 32 consecutive bits. It runs at memory speed on processors with
//! carry-less multiplication, which is detected at run time. It is not a signature: anyone who can
//! write a bundle can write matching checksums.

mod read;
mod write;

pub use read::Bundle;
pub use write::BundleWriter;

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

use crate::format::{Element, MatrixHeader};
use crate::io::DType;

/// Value of `format` in a bundle's metadata.
pub const FORMAT: &str = "elastic-lora-bundle";
/// Version that is written, and the only one that is read.
pub const VERSION: u32 = 1;
/// Alignment of tensors in bytes.
const ALIGN: usize = 64;
/// First character of the names of gaps.
const GAP: char = '~';

/// Content of the metadata's `index`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Index {
    matrices: BTreeMap<String, MatrixHeader>,
    checksums: BTreeMap<String, u32>,
    #[serde(deserialize_with = "crate::input::json::field")]
    document: Value,
}

fn dtype(element: Element) -> DType {
    match element {
        Element::U8 => DType::U8,
        Element::U32 => DType::U32,
        Element::U64 => DType::U64,
        Element::F16 => DType::F16,
        Element::Bf16 => DType::BF16,
        Element::F32 => DType::F32,
    }
}
