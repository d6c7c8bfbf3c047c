//! Reads safetensors files through a memory map, and writes them as a stream.
//!
//! The format is Hugging Face's (<https://github.com/huggingface/safetensors>): a length, a JSON
//! header, then row-major little-endian data.

mod dtype;
mod header;
mod read;
mod write;

pub use dtype::DType;
pub(in crate::io) use dtype::{decode, encode};
pub(crate) use read::plain_name;
pub(in crate::io) use read::{Bytes, read_file, read_open};
pub use read::{Checkpoint, TensorInfo};
pub(crate) use write::write_in_order;
pub(crate) use write::write_sharded;
pub(crate) use write::{Content, Receiver};
pub use write::{HostTensor, write_safetensors};

/// Largest header that is read, in bytes; the limit of the reference implementation.
pub(crate) const MAX_HEADER_BYTES: u64 = 100_000_000;

#[cfg(test)]
mod tests;
