//! Opening a model from a file or folder.

use std::fs::File;
use std::io::Seek;
use std::path::Path;
use std::sync::Arc;

use super::model::{Model, ModelOptions, ModelParts, Verify, Weights, check_threads};
use crate::error::{Error, Result};
use crate::format::{Buffer, Owner};
use crate::input::refuse_pointer;
use crate::io::bundle::Bundle;
use crate::io::gguf::is_gguf;
use crate::io::{cache, read_file_handle};
use crate::progress::{Progress, Silent};

impl Model {
    /// Opens a bundle, a Hugging Face folder with dense, GPTQ or compressed-tensors weights, or a
    /// GGUF file. Dense weights are used in place, quantized weights as codes.
    ///
    /// # Errors
    /// Returns the errors of [`Bundle::open`](crate::io::bundle::Bundle::open), or of
    /// [`HfConfig::open`](crate::io::HfConfig::open) and [`Checkpoint::open`](crate::io::Checkpoint::open). If the parts do
    /// not form a model, the error names the part. Returns [`Error::InvalidArgument`] for more than
    /// 4096 threads.
    pub fn open(path: impl AsRef<Path>, options: &ModelOptions) -> Result<Self> {
        Self::open_with(path, options, &Silent)
    }

    /// Opens a model like [`open`](Self::open), and reports each layer.
    ///
    /// # Errors
    /// Returns the errors of [`open`](Self::open), and [`Error::Interrupted`].
    pub fn open_with(
        path: impl AsRef<Path>,
        options: &ModelOptions,
        progress: &dyn Progress,
    ) -> Result<Self> {
        check_threads(options.n_threads)?;
        let path = &*cache::resolve(path.as_ref())?;
        let is_folder = std::fs::metadata(path)
            .map_err(|e| Error::io(path, e))?
            .is_dir();
        let parts = if is_folder || is_gguf(path) {
            super::build::from_folder(path, options, progress)?
        } else {
            let bundle = Bundle::open(path, options.mmap)?;
            super::bundle::read(bundle, options, progress)?
        };
        Self::opened(parts, options)
    }

    /// Opens a bundle whose bytes are in memory, without copying them if they begin at a multiple of
    /// 64. `name` names them in errors.
    ///
    /// # Errors
    /// Returns the errors of [`open`](Self::open) for the contents of a bundle.
    pub fn from_bytes(
        name: impl AsRef<Path>,
        bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
        options: &ModelOptions,
        progress: &dyn Progress,
    ) -> Result<Self> {
        Self::from_owner(name.as_ref(), bytes.into(), options, progress)
    }

    fn from_owner(
        name: &Path,
        bytes: Owner,
        options: &ModelOptions,
        progress: &dyn Progress,
    ) -> Result<Self> {
        check_threads(options.n_threads)?;
        let content = bytes.as_ref();
        refuse_pointer(name, content)?;
        let bytes = if content.as_ptr().align_offset(64) == 0 {
            bytes
        } else {
            Arc::new(Buffer::from_vec(content.to_vec())).into()
        };
        let bundle = Bundle::from_bytes(name, bytes)?;
        Self::opened(super::bundle::read(bundle, options, progress)?, options)
    }

    /// Opens a bundle from an open file, which is mapped or read from its beginning as the options
    /// say. `name` names it in errors.
    ///
    /// # Errors
    /// Returns the errors of [`open`](Self::open) for a bundle, and [`Error::InvalidFile`] if the
    /// file is a pipe or a device.
    pub fn from_file(
        name: impl AsRef<Path>,
        mut file: File,
        options: &ModelOptions,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let name = name.as_ref();
        if !options.mmap {
            file.rewind().map_err(|e| Error::io(name, e))?;
        }
        let bytes = read_file_handle(name, file, options.mmap)?;
        Self::from_owner(name, bytes, options, progress)
    }

    fn opened(parts: ModelParts, options: &ModelOptions) -> Result<Self> {
        let model = Self::from_weights(Weights::new(parts)?, options.n_threads);
        if options.verify == Verify::OnOpen {
            model.verify()?;
        }
        Ok(model)
    }
}
