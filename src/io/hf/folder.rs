//! Writes model folders.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::config::HfConfig;
use crate::arch::Architecture;
use crate::error::{Error, Result};
use crate::io::gguf::{Gguf, is_gguf};
use crate::io::tensors::{DType, HostTensor, write_sharded};
use crate::io::{FolderWriter, atomic, cache, open_regular};

/// Files that are copied unchanged from the source model's folder.
pub const CARRIED_FILES: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
];

/// Default limit of transformers.
pub(crate) const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// Writes a model folder. All files are written into a temporary folder, which
/// [`commit`](Self::commit) renames to the destination.
///
/// ```no_run
/// # use elastic_lora::io::{Checkpoint, DType, HfConfig, HostTensor, hf::HfFolder};
/// # fn main() -> elastic_lora::Result<()> {
/// let config = HfConfig::open("llama")?;
/// let source = Checkpoint::open("llama")?;
/// let out = HfFolder::create("llama-f16", false)?;
/// let tensors = source.names().map(|name| {
///     let source = &source;
///     let shape = source.info(name)?.shape.clone();
///     Ok(HostTensor::lazy_f32(name, DType::F16, shape, move || source.load_f32(name)))
/// });
/// out.write_model(&config, DType::F16, tensors.collect::<elastic_lora::Result<_>>()?)?;
/// out.carry_over("llama")?;
/// out.commit()
/// # }
/// ```
#[derive(Debug)]
#[doc(hidden)]
pub struct HfFolder {
    writer: FolderWriter,
    max_shard_bytes: u64,
}

impl HfFolder {
    /// Begins a folder; see [`FolderWriter::create`].
    ///
    /// # Errors
    /// Returns the errors of [`FolderWriter::create`].
    pub fn create(destination: impl AsRef<Path>, overwrite: bool) -> Result<Self> {
        Ok(Self {
            writer: FolderWriter::create(destination, overwrite)?,
            max_shard_bytes: MAX_SHARD_BYTES,
        })
    }

    /// Begins a folder, or goes on with one; see [`FolderWriter::go_on`].
    ///
    /// # Errors
    /// Returns the errors of [`FolderWriter::create`].
    pub(super) fn go_on(destination: &Path, overwrite: bool) -> Result<Self> {
        Ok(Self {
            writer: FolderWriter::go_on(destination, overwrite)?,
            max_shard_bytes: MAX_SHARD_BYTES,
        })
    }

    /// Returns the folder for notes about work that is gone on with.
    pub(super) fn notes(&self) -> &Path {
        self.writer.notes().unwrap_or(self.writer.path())
    }

    /// Sets the size in bytes above which weights are split into shards. The default is 5 GB.
    pub fn with_max_shard_bytes(mut self, bytes: u64) -> Self {
        self.max_shard_bytes = bytes;
        self
    }

    /// Writes `config.json` and the weights. The config names `dtype` as the dtype of the weights.
    ///
    /// If the config ties head and embedding, a single matrix is written as
    /// `model.embed_tokens.weight`, under either of the two names it was given, because
    /// transformers expects that name.
    ///
    /// # Errors
    /// Returns the errors of writing the tensors, [`Error::InvalidFile`] if both matrices of a tied
    /// model are given, and [`Error::MissingTensor`] or [`Error::TensorShape`] if the tensors do
    /// not match the config.
    pub fn write_model(
        &self,
        config: &HfConfig,
        dtype: DType,
        tensors: Vec<HostTensor<'_>>,
    ) -> Result<()> {
        // The config may come from a quantized folder, but the weights written here are dense.
        self.write_parts(&config.with_quantization(None), dtype, tensors, |_| false)
    }

    /// Writes the config and the tensors. `tensors` must contain every tensor that the config
    /// implies, except those for which `replaced` is true.
    pub(super) fn write_parts(
        &self,
        config: &HfConfig,
        dtype: DType,
        mut tensors: Vec<HostTensor<'_>>,
        replaced: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let destination = self.writer.destination();
        if config.tie_word_embeddings() {
            let named = |name: &str| tensors.iter().position(|t| t.name() == name);
            match (named(Architecture::EMBEDDING), named(Architecture::HEAD)) {
                (Some(_), Some(_)) => {
                    return Err(Error::invalid_file(
                        destination,
                        "embedding and head are tied, but both were given",
                    ));
                }
                (None, Some(head)) => tensors[head].rename(Architecture::EMBEDDING),
                _ => {}
            }
        }
        for (name, shape) in config
            .arch()
            .tensors()
            .into_iter()
            .filter(|(name, _)| !replaced(name))
        {
            match tensors.iter().find(|t| t.name() == name) {
                None => {
                    return Err(Error::MissingTensor {
                        path: destination.into(),
                        tensor: name,
                    });
                }
                Some(t) if t.shape() != shape => {
                    return Err(Error::TensorShape {
                        tensor: name,
                        expected: shape,
                        found: t.shape().to_vec(),
                    });
                }
                Some(_) => {}
            }
        }
        let tensors = fused(config, tensors, replaced)?;
        config.write(self.writer.path(), dtype, config.tie_word_embeddings())?;
        write_sharded(self.writer.path(), tensors, self.max_shard_bytes)
    }

    /// Copies those of [`CARRIED_FILES`] that exist in `source`, and returns their names. If
    /// `source` is a GGUF file, writes its tokenizer and chat template as such files.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if a file cannot be copied, and the errors of reading a GGUF file.
    pub fn carry_over(&self, source: impl AsRef<Path>) -> Result<Vec<&'static str>> {
        let source = &*cache::resolve(source.as_ref())?;
        if is_gguf(source) {
            let Some(files) = Gguf::open(source)?.tokenizer()? else {
                return Ok(Vec::new());
            };
            let [json, config, ..] = CARRIED_FILES;
            self.write_text(json, &files.json)?;
            self.write_json(config, &Value::Object(files.config))?;
            return Ok(vec![json, config]);
        }
        let mut copied = Vec::new();
        for name in CARRIED_FILES {
            let from = source.join(name);
            if !from.exists() {
                continue;
            }
            let (mut file, _) = open_regular(&from)?;
            atomic::write_file(self.file(name)?, |sink| {
                let mut buffer = vec![0u8; 1 << 16];
                loop {
                    match file.read(&mut buffer).map_err(|e| Error::io(&from, e))? {
                        0 => return Ok(()),
                        n => sink.put(&buffer[..n])?,
                    }
                }
            })?;
            copied.push(name);
        }
        Ok(copied)
    }

    /// Writes a text file called `name` into the folder.
    ///
    /// # Errors
    /// Returns [`Error::Io`], or [`Error::InvalidFile`] if `name` is not a plain file name.
    pub fn write_text(&self, name: &str, text: &str) -> Result<()> {
        atomic::write_file(self.file(name)?, |sink| sink.put(text.as_bytes()))
    }

    /// Writes a JSON file called `name` into the folder.
    ///
    /// # Errors
    /// Returns [`Error::Io`], or [`Error::InvalidFile`] if `name` is not a plain file name.
    pub fn write_json(&self, name: &str, value: &Value) -> Result<()> {
        atomic::write_json(self.file(name)?, value)
    }

    /// Returns the path of the temporary folder, for files written by other means.
    pub fn path(&self) -> &Path {
        self.writer.path()
    }

    /// Moves the folder to its destination; see [`FolderWriter::commit`].
    ///
    /// # Errors
    /// Returns the errors of [`FolderWriter::commit`].
    pub fn commit(self) -> Result<()> {
        self.writer.commit()
    }

    fn file(&self, name: &str) -> Result<PathBuf> {
        if !crate::io::is_plain_file_name(name) {
            return Err(Error::invalid_file(
                name,
                "not the name of a file in the folder",
            ));
        }
        Ok(self.writer.path().join(name))
    }
}

/// Stacks the tensors of layers that the family stores as one matrix, except those for which
/// `replaced` is true.
pub(super) fn fused<'a>(
    config: &HfConfig,
    mut tensors: Vec<HostTensor<'a>>,
    replaced: impl Fn(&str) -> bool,
) -> Result<Vec<HostTensor<'a>>> {
    for fused in config.arch().fused() {
        let names = fused
            .parts
            .iter()
            .map(|(layer, _)| format!("{layer}.weight"));
        let mut parts = Vec::new();
        for name in names.filter(|name| !replaced(name)) {
            if let Some(index) = tensors.iter().position(|tensor| tensor.name() == name) {
                parts.push(tensors.swap_remove(index));
            }
        }
        if !parts.is_empty() {
            tensors.push(HostTensor::stacked(
                format!("{}.weight", fused.name),
                parts,
            )?);
        }
    }
    Ok(tensors)
}
