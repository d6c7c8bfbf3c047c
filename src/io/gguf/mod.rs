//! GGUF, the file format of llama.cpp: configuration, tokenizer and weights of a model in one file,
//! or in several numbered ones.
//!
//! The rest of the crate sees the equivalent Hugging Face folder:
//! [`HfConfig::open`](crate::io::HfConfig::open) and
//! [`Checkpoint::open`](crate::io::Checkpoint::open) accept the path of a file, and tensors have
//! the names and the row order of Hugging Face. A key or tensor that would change the model and is
//! not implemented is refused by name. [`write`] goes the other way.

mod adapter;
mod blocks;
mod config;
mod container;
mod families;
mod layout;
mod tokenizer;
mod write;

use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::io::tensors::{Bytes, TensorInfo, read_file};
use crate::io::{cache, open_regular};
use crate::threads;
pub(crate) use blocks::BlockType;
use container::File;
pub(in crate::io) use container::MAGIC;
pub(crate) use layout::BlockRows;
pub(in crate::io) use layout::Layout;
pub(crate) use write::write_from;
pub use write::{GgufOptions, GgufReport, GgufType, write_gguf};

/// Largest number of files of a model. Each is a mapping that the system must keep.
const MAX_PARTS: u64 = 4096;

/// Returns whether `path` is a file with GGUF's first bytes or the extension `gguf`.
pub fn is_gguf(path: &Path) -> bool {
    let Ok((file, _)) = open_regular(path) else {
        return false;
    };
    let mut start = Vec::new();
    let read = file.take(MAGIC.len() as u64).read_to_end(&mut start);
    let named = path
        .extension()
        .is_some_and(|ext| ext.eq_ignore_ascii_case("gguf"));
    named || read.is_ok() && start == MAGIC
}

/// A GGUF model in one or several files, opened for reading.
#[derive(Debug)]
#[doc(hidden)]
pub struct Gguf {
    files: Vec<File>,
}

/// A tensor as it is in a GGUF file.
#[derive(Clone, Copy, Debug)]
#[doc(hidden)]
#[non_exhaustive]
pub struct GgufTensor<'a> {
    /// Name in llama.cpp.
    pub name: &'a str,
    /// Name of the dtype or block type.
    pub kind: &'static str,
    /// Sizes, outermost first.
    pub shape: &'a [usize],
    /// Number of bytes.
    pub n_bytes: usize,
}

/// A tensor of a model: its name in a Hugging Face folder and its place in the files.
pub(in crate::io) struct Entry {
    pub name: String,
    pub file: usize,
    pub range: std::ops::Range<usize>,
    pub info: TensorInfo,
    pub layout: Layout,
}

impl Gguf {
    /// Opens a model. For a model in several files, `path` is the first one.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if a file cannot be read, [`Error::InvalidFile`] if it breaks a rule
    /// of the format, and [`Error::Unsupported`] if a version or a tensor type is not implemented.
    /// The error names the file, and the key or tensor.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(&cache::resolve(path.as_ref())?, true)
    }

    pub(in crate::io) fn open_with(path: &Path, mmap: bool) -> Result<Self> {
        threads::ready()?;
        let part = |path: &Path| File::parse(path, read_file(path, mmap)?);
        let first = part(path)?;
        let count = first.size("split.count")?.unwrap_or(1);
        if count <= 1 {
            return Ok(Self { files: vec![first] });
        }
        let expected = first.size("split.tensors.count")?;
        let names = part_names(&first, count)?;
        let mut files = vec![first];
        for (number, name) in names.iter().enumerate().skip(1) {
            let file = part(&path.with_file_name(name))?;
            check_part(&file, number as u64, count)?;
            for tensor in &file.tensors {
                let same =
                    |file: &&File| file.tensors.iter().any(|other| other.name == tensor.name);
                if let Some(other) = files.iter().find(same) {
                    let reason = format!(
                        "tensor `{}` is also in {}",
                        tensor.name,
                        other.path.display()
                    );
                    return Err(Error::invalid_file(&file.path, reason));
                }
            }
            files.push(file);
        }
        let found: usize = files.iter().map(|file| file.tensors.len()).sum();
        if expected.is_some_and(|expected| expected != found as u64) {
            let reason = format!("its parts hold {found} tensors");
            return Err(files[0].bad_key("split.tensors.count", reason));
        }
        Ok(Self { files })
    }

    /// The file that contains the metadata.
    fn first(&self) -> &File {
        &self.files[0]
    }

    pub(in crate::io) fn files(&self) -> impl Iterator<Item = (PathBuf, Bytes)> {
        self.files
            .iter()
            .map(|file| (file.path.clone(), file.bytes.clone()))
    }

    /// Finds a tensor by its name, with the index of its file.
    fn tensor(&self, name: &str) -> Option<(usize, &container::Tensor)> {
        let mut all = self.files.iter().enumerate();
        all.find_map(|(index, file)| Some((index, file.tensors.iter().find(|t| t.name == name)?)))
    }

    /// Returns the architecture's name in llama.cpp.
    ///
    /// # Errors
    /// Returns [`Error::InvalidFile`] if it is not a text.
    pub fn architecture(&self) -> Result<Option<&str>> {
        self.first().text("general.architecture")
    }

    /// Returns all tensors as they are in the files, of any architecture.
    pub fn tensors(&self) -> impl Iterator<Item = GgufTensor<'_>> {
        let all = self.files.iter().flat_map(|file| &file.tensors);
        all.map(|tensor| GgufTensor {
            name: &tensor.name,
            kind: tensor.encoding.name(),
            shape: &tensor.shape,
            n_bytes: tensor.range.len(),
        })
    }

    /// Chat template of the model, in Jinja.
    ///
    /// # Errors
    /// Returns [`Error::InvalidFile`] if it is not a text.
    pub fn chat_template(&self) -> Result<Option<&str>> {
        self.first().text("tokenizer.chat_template")
    }
}

/// Names of all files of a model, derived from the first one.
fn part_names(first: &File, count: u64) -> Result<Vec<String>> {
    let bad = |reason: String| Error::invalid_file(&first.path, reason);
    if count > MAX_PARTS {
        return Err(bad(format!(
            "{count} parts, more than the {MAX_PARTS} that are read"
        )));
    }
    let name = first
        .path
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    let number = first.size("split.no")?.unwrap_or(0);
    let of = |number: u64| format!("-{number:05}-of-{count:05}.gguf");
    let Some(stem) = name.strip_suffix(&of(number + 1)) else {
        return Err(bad(format!(
            "part {} of {count}, whose name should end in `{}`",
            number + 1,
            of(number + 1)
        )));
    };
    if number != 0 {
        return Err(bad(format!(
            "part {} of {count}; open the first, `{stem}{}`",
            number + 1,
            of(1)
        )));
    }
    Ok((1..=count)
        .map(|number| format!("{stem}{}", of(number)))
        .collect())
}

fn check_part(file: &File, number: u64, count: u64) -> Result<()> {
    for (key, expected) in [("split.no", number), ("split.count", count)] {
        let found = file.size(key)?;
        if found != Some(expected) {
            let found = found.map_or("missing".into(), |found| found.to_string());
            return Err(file.bad_key(key, format!("{found}, expected {expected}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
