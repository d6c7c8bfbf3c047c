//! A Hugging Face folder, opened.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::Device;

use super::Decoder;
use crate::data::TextTokenizer;
use crate::error::Result;
use crate::format::QuantizedMatrix;
use crate::io::hf::HfFolder;
use crate::io::{Checkpoint, DType, HfConfig, QuantFormat};

/// A model with its tokenizer and where both came from.
#[derive(Clone, Debug)]
pub struct Pretrained {
    /// The folder or GGUF file.
    pub folder: PathBuf,
    /// The weights, as `f32`, on the device asked for.
    pub model: Decoder,
    /// Its tokenizer, which knows the special tokens of `config.json`.
    pub tokenizer: TextTokenizer,
    /// What most of the checkpoint's weights are stored as.
    pub dtype: DType,
}

impl Pretrained {
    /// Reads `config.json`, the weights and `tokenizer.json` of a folder, or all of a GGUF file.
    ///
    /// # Errors
    /// Those of [`HfConfig::open`], [`Checkpoint::open`], [`Decoder::load`] and [`TextTokenizer::from_dir`].
    pub fn open(folder: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let folder = folder.as_ref();
        let config = HfConfig::open(folder)?;
        let tokenizer = TextTokenizer::from_dir(folder)?;
        let bos = config.bos_token_id().or(tokenizer.bos_id());
        let eos = config
            .eos_token_ids()
            .first()
            .copied()
            .or(tokenizer.eos_id());
        let checkpoint = Checkpoint::open(folder)?;
        let model = Decoder::load(&config, &checkpoint, device)?;
        let dtype = checkpoint.info(config.embedding_name(&checkpoint)?)?.dtype;
        Ok(Self {
            folder: folder.to_path_buf(),
            model,
            tokenizer: tokenizer.with_special_ids(bos, eos),
            dtype,
        })
    }

    /// The tokens that end a generation.
    pub fn stop_ids(&self) -> Vec<u32> {
        let config = self.model.config().eos_token_ids();
        if config.is_empty() {
            self.tokenizer.eos_id().into_iter().collect()
        } else {
            config.to_vec()
        }
    }

    /// The filler of padded batches: the config's padding token, or else the first one that ends a sequence. It is never
    /// attended to nor predicted.
    pub fn pad_id(&self) -> u32 {
        let config = self.model.config();
        // Some checkpoints name a padding token that was never added to their vocabulary.
        let fits = |id: &u32| (*id as usize) < config.vocab_size();
        config
            .pad_token_id()
            .filter(fits)
            .or(config.eos_token_ids().iter().copied().find(fits))
            .unwrap_or(0)
    }

    /// Writes another model of the same configuration (this one pruned, or merged) as a Hugging Face folder
    /// with this one's tokenizer files, in this one's element type; whole or not at all.
    ///
    /// # Errors
    /// [`Error::HasAdapter`](crate::Error::HasAdapter) for a model with adapters; those of [`HfFolder`].
    pub fn write_variant(
        &self,
        model: &Decoder,
        destination: impl AsRef<Path>,
        overwrite: bool,
    ) -> Result<()> {
        model.refuse_adapters("merge it, or write it as a PEFT folder beside the base")?;
        let folder = HfFolder::create(destination, overwrite)?;
        folder.write_model(model.config(), self.dtype, model.tensors(self.dtype)?)?;
        folder.carry_over(&self.folder)?;
        folder.commit()
    }

    /// [`write_variant`](Self::write_variant) with the weights of these layers as codes in a checkpoint format; the model's
    /// own weights of those layers are not looked at.
    ///
    /// # Errors
    /// Those of [`write_variant`](Self::write_variant) and [`HfFolder::write_quantized`].
    pub fn write_quantized(
        &self,
        model: &Decoder,
        layers: &BTreeMap<String, QuantizedMatrix>,
        format: QuantFormat,
        destination: impl AsRef<Path>,
        overwrite: bool,
    ) -> Result<()> {
        model.refuse_adapters("merge it, or write it as a PEFT folder beside the base")?;
        let folder = HfFolder::create(destination, overwrite)?;
        folder.write_quantized(
            model.config(),
            self.dtype,
            model.tensors(self.dtype)?,
            layers,
            format,
        )?;
        folder.carry_over(&self.folder)?;
        folder.commit()
    }
}
