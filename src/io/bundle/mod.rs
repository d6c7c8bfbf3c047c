//! A compressed model in one file, to be used by memory map as it lies there.
//!
//! A bundle is a safetensors file, which other tools can look into. Its `__metadata__` holds `format` ([`FORMAT`]), `version`
//! ([`VERSION`]), `index` and `checksum`:
//!
//! - `index` is JSON: `matrices`, the [`MatrixHeader`] of each weight by name; `checksums`, a CRC-32 of
//!   each tensor's bytes; `document`, whatever the model's own description is, which is not looked at here;
//! - `checksum` is the CRC-32 of `index`.
//!
//! A weight `name` of `rows` by `cols` is stored as the [parts](crate::format::StoredMatrix::parts) of its format, each a tensor
//! `name.part`. Norms and biases are tensors of 32 bits, texts tensors of bytes. Every tensor begins at a multiple of 64 bytes; the gaps
//! between them are tensors too, named `~0`, `~1` and so on, and so is the end of the file, over which a kernel may read.
//!
//! On opening, everything is checked but the contents of weights: whatever the header says, nothing lies outside of the file or overlaps.
//! Contents are compared with their checksums when they are used first ([`Bundle::verify_matrix`]), or all at once
//! ([`Bundle::verify`]). CRC-32 finds every change of up to 32 bits in a row, and is as fast as memory where the processor multiplies
//! without carries, which is looked for at run time. It is no signature: who writes a bundle can write any.

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

/// `format` in a bundle's metadata.
pub const FORMAT: &str = "elastic-lora-bundle";
/// The version that is written, and the only one that is read.
pub const VERSION: u32 = 1;
/// Where tensors begin: at multiples of this.
const ALIGN: usize = 64;
/// Begins the names of gaps.
const GAP: char = '~';

/// What the metadata's `index` says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Index {
    matrices: BTreeMap<String, MatrixHeader>,
    checksums: BTreeMap<String, u32>,
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
