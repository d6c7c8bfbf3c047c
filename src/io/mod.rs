//! Reads and writes named tensors: safetensors, Hugging Face model folders, quantized layers, PEFT
//! adapters, bundles, GGUF.
//!
//! This module does not depend on Burn. It treats all input as untrusted: sizes are checked before
//! memory is allocated, and every error names the file, tensor or field. Files and folders are
//! written atomically ([`atomic`]). Matrices are `[out, in]`.
//!
//! Where the path of a model or an adapter is read, and there is no such path, it may also be the id
//! of a repository in the local cache of Hugging Face's tools: `org/name`, `org/name@revision`, or
//! `org/name/file.gguf`. Nothing is downloaded.

#[doc(hidden)]
pub mod atomic;
#[doc(hidden)]
pub mod bundle;
pub(crate) mod cache;
mod conversion;
mod fields;
pub(crate) mod gguf;
pub mod hf;
mod lock;
pub mod peft;
pub mod quantized;
pub(crate) mod source;
pub mod tensors;
pub(crate) mod tokenizer;

pub use atomic::FolderWriter;
pub use conversion::{Conversion, FolderOptions};
pub use gguf::{Gguf, GgufOptions, GgufReport, GgufType, is_gguf, write_gguf};
pub use hf::HfConfig;
pub use peft::{LoraAdapter, LoraWeights};
pub use quantized::{QuantFormat, QuantizationConfig};
pub use tensors::{Checkpoint, DType, HostTensor, TensorInfo};

use std::fs::File;
use std::path::{Component, Path};

use crate::error::{Error, Result};
use crate::format::Owner;
pub(crate) use crate::input::{
    BYTE_ORDER_MARK, MAX_JSON_BYTES, open_regular, read_capped, read_json_object,
    read_large_json_object, refuse_pointer,
};

/// Returns the path of a model or an adapter: `path` itself, if it exists or cannot be the id of a
/// repository, or else that of the repository in the local cache of Hugging Face's tools. The
/// functions that open models and adapters do this themselves.
///
/// # Errors
/// Returns [`Error::Io`] if there is neither such a path nor such a repository in the cache. The
/// text says where it was looked for, and which command downloads it.
pub fn model_path(path: impl AsRef<Path>) -> Result<std::path::PathBuf> {
    Ok(cache::resolve(path.as_ref())?.into_owned())
}

/// Maps an open file, or reads it into memory. `path` names it in errors. Folders, pipes and devices
/// are refused.
pub(crate) fn read_file_handle(path: &Path, file: File, mmap: bool) -> Result<Owner> {
    let meta = file.metadata().map_err(|e| Error::io(path, e))?;
    if !meta.is_file() {
        return Err(Error::invalid_file(path, "not a regular file"));
    }
    tensors::read_open(path, file, meta.len(), mmap)
}

/// Returns whether `name` names a file directly inside a folder on any system: no separators, no
/// `..`, no drive.
pub(crate) fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!(
        (components.next(), components.next()),
        (Some(Component::Normal(_)), None)
    ) && !name.contains(['/', '\\', ':', '\0'])
}

#[cfg(test)]
pub(crate) mod testing {
    use std::path::PathBuf;

    use rand::RngExt;

    /// Picks one of `bytes`, for tests that mutate files.
    pub fn pick(rng: &mut impl RngExt, bytes: &[u8]) -> u8 {
        bytes[rng.random_range(0..bytes.len())]
    }

    pub(crate) use crate::input::rounds;

    /// Returns the path of a file of reference models and outputs, or `None` if it does not exist.
    pub fn shared(relative: &str) -> Option<PathBuf> {
        let root = std::env::var_os("ELASTIC_LORA_SHARED").map_or_else(
            || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared")),
            PathBuf::from,
        );
        let path = root.join(relative);
        if path.exists() {
            return Some(path);
        }
        eprintln!("skipped: {} is missing", path.display());
        None
    }
}
