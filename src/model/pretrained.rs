//! Models opened from Hugging Face folders.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::Device;

use super::Decoder;
use crate::data::TextTokenizer;
use crate::error::Result;
use crate::format::QuantizedMatrix;
use crate::io::cache;
use crate::io::hf::HfFolder;
use crate::io::{Checkpoint, DType, HfConfig, QuantFormat};
use crate::runtime::GenerateConfig;

/// A model with its tokenizer and the folder of both.
#[derive(Clone, Debug)]
pub struct Pretrained {
    /// The folder or GGUF file that was opened.
    pub folder: PathBuf,
    /// The model on the requested device, with `f32` weights.
    pub model: Decoder,
    /// The tokenizer, with the special tokens of `config.json`.
    pub tokenizer: TextTokenizer,
    /// The dtype of the checkpoint's embedding, in which variants of the model are written.
    pub dtype: DType,
}

impl Pretrained {
    /// Reads `config.json`, the weights and `tokenizer.json` of a folder, or all of a GGUF file.
    ///
    /// # Errors
    /// Returns the errors of [`HfConfig::open`], [`Checkpoint::open`], [`Decoder::load`] and
    /// [`TextTokenizer::from_dir`].
    pub fn open(folder: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let folder = &*cache::resolve(folder.as_ref())?;
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
        let embedding = model.config().embedding_name(&checkpoint)?;
        let dtype = checkpoint.info(embedding)?.dtype;
        Ok(Self {
            folder: folder.to_path_buf(),
            model,
            tokenizer: tokenizer.with_special_ids(bos, eos),
            dtype,
        })
    }

    /// Sentences about what is stored in the folder and not used, or used in another way than its
    /// files say.
    pub fn notices(&self) -> Vec<String> {
        let all = [self.model.config().notices(), self.tokenizer.notices()];
        all.concat()
    }

    /// The tokens that end a generation.
    pub fn stop_ids(&self) -> Vec<u32> {
        self.model.config().stop_ids(self.tokenizer.eos_id())
    }

    /// Settings of greedy decoding that end at the model's stop tokens, and draw no ids that stand
    /// for no token.
    pub fn generate_config(&self, max_new_tokens: usize) -> GenerateConfig {
        GenerateConfig::new(max_new_tokens, self.stop_ids())
            .with_n_ids(Some(self.tokenizer.n_ids()))
    }

    /// The filler token of padded batches: the padding token of the config, or else the first
    /// end-of-sequence token. It is never attended to or predicted.
    pub fn pad_id(&self) -> u32 {
        let config = self.model.config();
        // Some checkpoints name a padding token that is outside their vocabulary.
        let fits = |id: &u32| (*id as usize) < config.vocab_size();
        config
            .pad_token_id()
            .filter(fits)
            .or(config.eos_token_ids().iter().copied().find(fits))
            .unwrap_or(0)
    }

    /// Writes a variant of this model (such as a pruned or merged one) as a Hugging Face folder, in
    /// this model's dtype and with its tokenizer files. The folder is written completely or not at
    /// all.
    ///
    /// # Errors
    /// Returns [`Error::HasAdapter`](crate::Error::HasAdapter) for a model with adapters, and the
    /// errors of [`HfFolder`].
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

    /// Like [`write_variant`](Self::write_variant), but stores the given layers as codes in a
    /// checkpoint format. The weights that `model` holds for those layers are ignored.
    ///
    /// # Errors
    /// Returns the errors of [`write_variant`](Self::write_variant) and
    /// [`HfFolder::write_quantized`].
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
