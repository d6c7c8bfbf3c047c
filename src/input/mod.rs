//! Reads files that may be anything: their kind and their size are checked before memory is taken,
//! and JSON takes memory in proportion to its text.

pub(crate) mod json;

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result};

/// Largest JSON file that is read. The largest of real models, indexes of thousands of shards and
/// lists of added tokens, have some megabytes.
pub(crate) const MAX_JSON_BYTES: u64 = 1 << 25;

/// Largest `config.json` and file of settings.
pub(crate) const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// What some editors put before a text.
pub(crate) const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// Opens a regular file and returns its length. Folders, pipes and devices are refused, because
/// opening a pipe could block forever.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64)> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if !meta.is_file() {
        let what = format!("{}, not a regular file", kind(meta.file_type()));
        return Err(Error::invalid_file(path, what));
    }
    Ok((
        File::open(path).map_err(|e| Error::io(path, e))?,
        meta.len(),
    ))
}

/// Names what is not a regular file.
#[cfg(unix)]
fn kind(kind: std::fs::FileType) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    if kind.is_dir() {
        "a folder"
    } else if kind.is_fifo() {
        "a pipe"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a device"
    }
}

/// Names what is not a regular file.
#[cfg(not(unix))]
fn kind(kind: std::fs::FileType) -> &'static str {
    if kind.is_dir() {
        "a folder"
    } else {
        "a device"
    }
}

/// Reads a whole file of at most `max_bytes`.
pub(crate) fn read_capped(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let (file, len) = open_regular(path)?;
    let too_long = |len: u64| {
        let what = format!("{len} bytes, more than the {max_bytes} that are read");
        Error::invalid_file(path, what)
    };
    if len > max_bytes {
        return Err(too_long(len));
    }
    // The file may have grown since its length was read.
    let bytes = read_whole(path, file, len, max_bytes.saturating_add(1))?;
    if bytes.len() as u64 > max_bytes {
        return Err(too_long(bytes.len() as u64));
    }
    refuse_pointer(path, &bytes)?;
    Ok(bytes)
}

/// Reads at most `max_bytes` of a file of about `len` bytes, for which memory is taken at once.
pub(crate) fn read_whole(path: &Path, file: File, len: u64, max_bytes: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let size = usize::try_from(len).unwrap_or(usize::MAX);
    bytes
        .try_reserve_exact(size)
        .map_err(|_| Error::OutOfMemory {
            what: "a file",
            bytes: size,
        })?;
    file.take(max_bytes)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::io(path, e))?;
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

/// Reads a JSON object from a file of at most [`MAX_CONFIG_BYTES`].
pub(crate) fn read_json_object(path: &Path) -> Result<serde_json::Map<String, serde_json::Value>> {
    read_large_json_object(path, MAX_CONFIG_BYTES)
}

/// Reads a JSON object from a file of at most `max_bytes`. The memory is in proportion to the file;
/// see [`json`].
pub(crate) fn read_large_json_object(
    path: &Path,
    max_bytes: u64,
) -> Result<serde_json::Map<String, serde_json::Value>> {
    let bytes = read_capped(path, max_bytes)?;
    if bytes.starts_with(b"GGUF") {
        return Err(Error::invalid_file(path, "a GGUF file, expected JSON"));
    }
    // Some editors begin a file with a byte order mark.
    let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes);
    json::object(bytes).map_err(|e| Error::json(path, e))
}

/// Returns the number of rounds of a loop that mutates files. `ELASTIC_LORA_MUTATIONS` sets another.
#[cfg(test)]
pub(crate) fn rounds(usual: usize) -> usize {
    std::env::var("ELASTIC_LORA_MUTATIONS").map_or(usual, |n| n.parse().unwrap())
}
