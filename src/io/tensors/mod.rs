//! Named tensors in safetensors files: reading them memory-mapped, writing them as a stream.
//!
//! The format is Hugging Face's (<https://github.com/huggingface/safetensors>): a length, a JSON header, then row-major
//! little-endian data.

mod dtype;
mod read;
mod write;

pub use dtype::DType;
pub(in crate::io) use read::{Bytes, read_file};
pub use read::{Checkpoint, TensorInfo};
pub(crate) use write::write_in_order;
pub(crate) use write::write_sharded;
pub use write::{HostTensor, write_safetensors};

/// Headers above this are refused, as the reference implementation does.
pub(crate) const MAX_HEADER_BYTES: u64 = 100_000_000;

#[cfg(test)]
mod tests;
