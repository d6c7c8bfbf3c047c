//! Opening a model from a file or folder.

use std::path::Path;

use super::model::{Model, ModelOptions, Verify, Weights, check_threads};
use crate::error::{Error, Result};
use crate::io::cache;
use crate::io::gguf::is_gguf;

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
        check_threads(options.n_threads)?;
        let path = &*cache::resolve(path.as_ref())?;
        let is_folder = std::fs::metadata(path)
            .map_err(|e| Error::io(path, e))?
            .is_dir();
        let parts = if is_folder || is_gguf(path) {
            super::build::from_folder(path, options)?
        } else {
            super::bundle::read(path, options)?
        };
        let model = Self::from_weights(Weights::new(parts)?, options.n_threads);
        if options.verify == Verify::OnOpen {
            model.verify()?;
        }
        Ok(model)
    }
}
