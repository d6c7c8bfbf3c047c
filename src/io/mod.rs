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
mod fields;
pub(crate) mod gguf;
pub mod hf;
pub mod peft;
pub mod quantized;
pub(crate) mod source;
pub mod tensors;
pub(crate) mod tokenizer;

pub use atomic::FolderWriter;
pub use gguf::{Gguf, GgufOptions, GgufReport, GgufType, write_gguf};
pub use hf::HfConfig;
pub use peft::{LoraAdapter, LoraWeights};
pub use quantized::{QuantFormat, QuantizationConfig};
pub use tensors::{Checkpoint, DType, HostTensor, TensorInfo};

use std::fs::File;
use std::io::Read;
use std::path::{Component, Path};

use crate::error::{Error, Result};

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

/// Largest JSON file that is read. It is far larger than any real one, and small enough to be
/// harmless.
pub(crate) const MAX_JSON_BYTES: u64 = 100_000_000;

/// What some editors put before a text.
pub(crate) const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// Opens a regular file and returns its length. Folders, pipes and devices are refused, because
/// opening a pipe could block forever.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64)> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if !meta.is_file() {
        return Err(Error::invalid_file(path, "not a regular file"));
    }
    Ok((
        File::open(path).map_err(|e| Error::io(path, e))?,
        meta.len(),
    ))
}

/// Maps an open file, or reads it into memory. `path` names it in errors. Folders, pipes and devices
/// are refused.
pub(crate) fn read_file_handle(
    path: &Path,
    file: File,
    mmap: bool,
) -> Result<std::sync::Arc<dyn AsRef<[u8]> + Send + Sync>> {
    let meta = file.metadata().map_err(|e| Error::io(path, e))?;
    if !meta.is_file() {
        return Err(Error::invalid_file(path, "not a regular file"));
    }
    tensors::read_open(path, file, meta.len(), mmap)
}

/// Reads a whole file of at most `max_bytes`.
pub(crate) fn read_capped(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let (file, len) = open_regular(path)?;
    if len > max_bytes {
        return Err(Error::invalid_file(
            path,
            format!("{len} bytes, more than the {max_bytes} that are read"),
        ));
    }
    let mut bytes = Vec::with_capacity(len as usize);
    // The file may have grown since its length was read.
    file.take(max_bytes)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::io(path, e))?;
    refuse_pointer(path, &bytes)?;
    Ok(bytes)
}

/// Refuses the small text that Git LFS leaves in place of a file that was not downloaded.
pub(crate) fn refuse_pointer(path: &Path, bytes: &[u8]) -> Result<()> {
    if bytes.starts_with(b"version https://git-lfs.github.com/spec/") {
        let reason = "a Git LFS pointer, not the file itself (`git lfs pull` downloads it)";
        return Err(Error::invalid_file(path, reason));
    }
    Ok(())
}

/// Reads a JSON object.
pub(crate) fn read_json_object(path: &Path) -> Result<serde_json::Map<String, serde_json::Value>> {
    let bytes = read_capped(path, MAX_JSON_BYTES)?;
    if bytes.starts_with(gguf::MAGIC) {
        return Err(Error::invalid_file(path, "a GGUF file, expected JSON"));
    }
    // Some editors begin a file with a byte order mark.
    let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes);
    serde_json::from_slice(bytes).map_err(|e| Error::json(path, e))
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
