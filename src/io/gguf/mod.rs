//! GGUF, llama.cpp's files: a model's configuration, tokenizer and weights in one, or in numbered parts.
//!
//! The rest of the crate sees the Hugging Face folder that the file stands for: [`HfConfig::open`](crate::io::HfConfig::open)
//! and [`Checkpoint::open`](crate::io::Checkpoint::open) take the path of a file, and tensors come out under Hugging Face's
//! names, with the rows of queries and keys in Hugging Face's order. What is in a file and would change the model, but is
//! not known here, is refused by name.

mod blocks;
mod config;
mod container;
mod layout;
mod tokenizer;

use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::io::open_regular;
use crate::io::tensors::{Bytes, TensorInfo, read_file};
use container::File;
pub(in crate::io) use container::MAGIC;
pub(in crate::io) use layout::Layout;
pub(crate) use tokenizer::TokenizerFiles;

/// The most parts that a model may have; each is a mapping that the system must keep.
const MAX_PARTS: u64 = 4096;

/// Whether `path` is a file that begins as GGUF does, or that is called so.
pub(crate) fn is_gguf(path: &Path) -> bool {
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

/// A GGUF model, opened for reading; of one file or of several parts.
#[derive(Debug)]
#[doc(hidden)]
pub struct Gguf {
    files: Vec<File>,
}

/// A tensor of a model: what it is called in a Hugging Face folder, and where it lies.
pub(in crate::io) struct Entry {
    pub name: String,
    pub file: usize,
    pub range: std::ops::Range<usize>,
    pub info: TensorInfo,
    pub layout: Layout,
}

impl Gguf {
    /// Opens a model; of a model in parts, the first one's path is given.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::InvalidFile`] for a file that breaks a rule of the format; [`Error::Unsupported`] for a
    /// version or a type of numbers that is not read. All name file and key or tensor.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path.as_ref(), true)
    }

    pub(in crate::io) fn open_with(path: &Path, mmap: bool) -> Result<Self> {
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

    /// The file with the metadata.
    fn first(&self) -> &File {
        &self.files[0]
    }

    pub(in crate::io) fn files(&self) -> impl Iterator<Item = (PathBuf, Bytes)> {
        self.files
            .iter()
            .map(|file| (file.path.clone(), file.bytes.clone()))
    }

    /// The tensor of that name, and which file it is in.
    fn tensor(&self, name: &str) -> Option<(usize, &container::Tensor)> {
        let mut all = self.files.iter().enumerate();
        all.find_map(|(index, file)| Some((index, file.tensors.iter().find(|t| t.name == name)?)))
    }

    /// The chat template that the file holds: Jinja, as transformers has it.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] for one that is no text.
    pub fn chat_template(&self) -> Result<Option<&str>> {
        self.first().text("tokenizer.chat_template")
    }
}

/// The names of all parts, by the first one's.
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
