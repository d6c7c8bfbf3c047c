//! Models written in another format, one weight in memory at a time.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::gguf::{GgufOptions, GgufReport, write_from};
use super::hf::{HfFolder, MAX_SHARD_BYTES};
use super::peft::{LoraAdapter, MergedSource};
use super::quantized::QuantFormat;
use super::source::{FolderSource, Held, ModelSource};
use super::tensors::{Content, DType, HostTensor, Receiver};
use crate::arch::Architecture;
use crate::error::{Error, Result};
use crate::format::QuantizedMatrix;
use crate::progress::{Progress, Task};

/// A model that is written in another format: a Hugging Face folder, dense or quantized, or a GGUF
/// file, with an adapter added to it or not.
///
/// One weight is in memory at a time, whatever the size of the model; embedding and head are kept
/// besides if the adapter changes them, and codes are kept for a quantized folder.
///
/// ```no_run
/// use elastic_lora::io::{Conversion, FolderOptions, LoraAdapter};
/// use elastic_lora::progress::TerminalProgress;
///
/// let adapter = LoraAdapter::open("adapter")?;
/// let conversion = Conversion::open("llama-7b")?.with_adapter(&adapter)?;
/// conversion.write_folder("merged", &FolderOptions::default(), &TerminalProgress::new())?;
/// # Ok::<(), elastic_lora::Error>(())
/// ```
pub struct Conversion<'a> {
    base: FolderSource,
    adapter: Option<&'a LoraAdapter>,
}

/// Settings of [`Conversion::write_folder`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FolderOptions {
    /// Type of the numbers. By default that of the embedding.
    pub dtype: Option<DType>,
    /// Layout of the weights that are codes. By default they are dequantized.
    pub codes: Option<QuantFormat>,
    /// Whether an existing folder is replaced.
    pub overwrite: bool,
    /// Size in bytes above which weights are split into several files.
    pub max_shard_bytes: u64,
}

impl Default for FolderOptions {
    fn default() -> Self {
        Self {
            dtype: None,
            codes: None,
            overwrite: false,
            max_shard_bytes: MAX_SHARD_BYTES,
        }
    }
}

impl FolderOptions {
    setters! {
        with_dtype(dtype: DType) = Some(dtype);
        with_codes(codes: QuantFormat) = Some(codes);
        with_overwrite(overwrite: bool);
        with_max_shard_bytes(max_shard_bytes: u64);
    }
}

impl std::fmt::Debug for Conversion<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Conversion({})", self.base.path().display())
    }
}

impl<'a> Conversion<'a> {
    /// Opens a Hugging Face folder, dense or quantized, or a GGUF file.
    ///
    /// # Errors
    /// Returns the errors of [`HfConfig::open`](super::HfConfig::open) and
    /// [`Checkpoint::open`](super::Checkpoint::open), and [`Error::MissingTensor`].
    pub fn open(model: impl AsRef<Path>) -> Result<Self> {
        Ok(Self {
            base: FolderSource::open(model.as_ref())?,
            adapter: None,
        })
    }

    /// Adds an adapter to the weights that are written. Weights on a grid become plain numbers. With
    /// an adapter trained by SparsePEFT, zeros stay zeros.
    ///
    /// # Errors
    /// Returns [`Error::UnknownLayer`] or [`Error::TensorShape`] if the adapter is for another model,
    /// [`Error::InvalidArgument`] for an adapter without pairs, and [`Error::Unsupported`] for one
    /// that was trained through the grid of its base (QA-SparsePEFT), which
    /// [`Merger`](crate::Merger) merges.
    pub fn with_adapter(mut self, adapter: &'a LoraAdapter) -> Result<Self> {
        adapter.check_merge(self.base.config())?;
        self.adapter = Some(adapter);
        Ok(self)
    }

    /// Calls `write` with the model, with the adapter if there is one. Returns its result and the
    /// notices about the adapter.
    fn with_source<T>(
        &self,
        write: impl FnOnce(&dyn ModelSource) -> Result<T>,
    ) -> Result<(T, Vec<String>)> {
        let Some(adapter) = self.adapter else {
            return Ok((write(&self.base)?, Vec::new()));
        };
        let merged = MergedSource::new(&self.base, adapter)?;
        let notices = merged.notices()?;
        Ok((write(&merged)?, notices))
    }

    /// Writes a GGUF file for llama.cpp; see [`write_gguf`](super::write_gguf).
    ///
    /// # Errors
    /// Returns the errors of [`write_gguf`](super::write_gguf), and
    /// [`Error::Interrupted`].
    pub fn write_gguf(
        &self,
        destination: impl AsRef<Path>,
        options: &GgufOptions,
        progress: &dyn Progress,
    ) -> Result<GgufReport> {
        let destination = destination.as_ref();
        let written = self.with_source(|source| write_from(source, destination, options, progress));
        let (mut report, notices) = written?;
        report.notices.extend(notices);
        Ok(report)
    }

    /// Writes a Hugging Face folder, with the tokenizer and the other files of the model's folder.
    /// The folder is written completely or not at all. Returns notices in sentences.
    ///
    /// # Errors
    /// Returns [`Error::Unsupported`] if a quantized folder is asked for and no weight is on a grid;
    /// [`Error::InvalidFile`] if there is a folder that may not be replaced; [`Error::NotFinite`] or
    /// [`Error::TensorOverflow`] for a number that is no finite number of the type;
    /// [`Error::Interrupted`]; and the errors of reading and writing the files.
    pub fn write_folder(
        &self,
        destination: impl AsRef<Path>,
        options: &FolderOptions,
        progress: &dyn Progress,
    ) -> Result<Vec<String>> {
        let destination = destination.as_ref();
        let ((), notices) =
            self.with_source(|source| write_folder(source, destination, options, progress))?;
        Ok([self.base.config().notices(), &notices].concat())
    }
}

fn write_folder(
    source: &dyn ModelSource,
    destination: &Path,
    options: &FolderOptions,
    progress: &dyn Progress,
) -> Result<()> {
    let config = source.config();
    let dtype = match (options.dtype, source.held(Architecture::EMBEDDING)?) {
        (Some(dtype), _) | (None, Held::Numbers(dtype)) => dtype,
        (None, Held::Codes | Held::Blocks(_)) => DType::F32,
    };
    let layers = match options.codes {
        Some(_) => codes(source)?,
        None => BTreeMap::new(),
    };
    let tensors = config.arch().tensors();
    let task = Task::begin(progress, "write", tensors.len(), "tensors")?;
    let task = Mutex::new(task);
    let task = &task;
    let tensors = tensors.into_iter().map(|(name, shape)| {
        let (from, written) = (shape.clone(), name.clone());
        let tensor = HostTensor::lazy(name.clone(), dtype, shape, move |put: Receiver<'_>| {
            let mut task = task.lock().unwrap_or_else(PoisonError::into_inner);
            task.step(&name)?;
            put(match source.bytes(&name, dtype, &from)? {
                Some(bytes) => Content::Bytes(bytes.into()),
                None => Content::Values(source.numbers(&name, &from)?.into()),
            })
        });
        tensor.then(move || source.release(&written))
    });
    let tensors = tensors.collect();
    let folder = HfFolder::create(destination, options.overwrite)?;
    let folder = folder.with_max_shard_bytes(options.max_shard_bytes);
    match options.codes {
        None => folder.write_model(config, dtype, tensors)?,
        Some(format) => folder.write_quantized(config, dtype, tensors, &layers, format)?,
    }
    folder.carry_over(source.path())?;
    folder.commit()
}

/// The codes of all weights of the blocks that are held as codes, or as blocks that codes can have
/// the values of.
fn codes(source: &dyn ModelSource) -> Result<BTreeMap<String, QuantizedMatrix>> {
    let mut layers = BTreeMap::new();
    for layer in source.config().arch().linears() {
        let shape = [layer.d_output, layer.d_input];
        if let Some(codes) = source.codes(&format!("{}.weight", layer.name), shape)? {
            layers.insert(layer.name, codes);
        }
    }
    if layers.is_empty() {
        return Err(Error::Unsupported {
            what: format!(
                "{}: a model without weights on a grid, as a quantized folder (the example \
                 `compress` quantizes)",
                source.path().display()
            ),
        });
    }
    Ok(layers)
}
