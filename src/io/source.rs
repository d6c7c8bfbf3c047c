//! Models that are converted to another format.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::arch::Architecture;
use crate::error::{Error, Result};
use crate::format::QuantizedMatrix;
use crate::io::gguf::{BlockRows, BlockType, Gguf, is_gguf};
use crate::io::tokenizer::TokenizerFiles;
use crate::io::{
    Checkpoint, DType, HfConfig, MAX_JSON_BYTES, cache, read_capped, read_json_object,
};

/// How a source holds a matrix.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Held {
    /// As numbers of this type.
    Numbers(DType),
    /// As codes on a grid.
    Codes,
    /// As blocks of a GGUF file.
    Blocks(&'static BlockType),
}

/// The texts that describe a tokenizer.
#[derive(Debug)]
pub(crate) struct TokenizerTexts {
    /// Contents of `tokenizer.json`.
    pub json: String,
    /// The file that it is from, for errors.
    pub path: PathBuf,
    /// Fields of `tokenizer_config.json`, completed by those of `special_tokens_map.json`.
    pub config: Map<String, Value>,
    /// Chat template from a file of its own, which has priority over the one in the config.
    pub template: Option<String>,
}

/// A model whose weights are read one after another. Tensors have Hugging Face's names and row
/// order.
pub(crate) trait ModelSource: Sync {
    /// The file or folder that the model is from.
    fn path(&self) -> &Path;

    /// The configuration.
    fn config(&self) -> &HfConfig;

    /// How a matrix is held.
    fn held(&self, tensor: &str) -> Result<Held>;

    /// Loads the codes of a matrix. Returns `None` if it is not held as codes or as blocks that
    /// codes can have exactly the values of.
    fn codes(&self, tensor: &str, shape: [usize; 2]) -> Result<Option<QuantizedMatrix>>;

    /// Loads a matrix or vector as finite numbers, and dequantizes it if necessary.
    fn numbers(&self, tensor: &str, shape: &[usize]) -> Result<Vec<f32>>;

    /// The bytes of a matrix or vector, if they are numbers of type `dtype` as they are held. All are
    /// finite.
    fn bytes(&self, _tensor: &str, _dtype: DType, _shape: &[usize]) -> Result<Option<&[u8]>> {
        Ok(None)
    }

    /// The blocks of a matrix, if it is held as such.
    fn blocks(&self, _tensor: &str) -> Result<Option<BlockRows<'_>>> {
        Ok(None)
    }

    /// Gives the memory of a tensor that was read back to the system, if it is mapped from a file.
    fn release(&self, _tensor: &str) {}

    /// The tokenizer, if there is one.
    fn tokenizer(&self) -> Result<Option<TokenizerTexts>>;

    /// The GGUF file, if the model is one.
    fn gguf(&self) -> Option<&Gguf> {
        None
    }
}

/// A model folder or a GGUF file.
#[derive(Debug)]
pub(crate) struct FolderSource {
    path: PathBuf,
    config: HfConfig,
    checkpoint: Checkpoint,
    gguf: Option<Gguf>,
}

impl FolderSource {
    /// Opens a model and checks that all tensors are there.
    ///
    /// # Errors
    /// Returns the errors of [`HfConfig::open`], [`Checkpoint::open`] and [`HfConfig::fitted`].
    pub fn open(path: &Path) -> Result<Self> {
        let path = &*cache::resolve(path)?;
        let checkpoint = Checkpoint::open(path)?;
        let config = HfConfig::open(path)?.fitted(&checkpoint)?;
        let gguf = is_gguf(path).then(|| Gguf::open(path)).transpose()?;
        Ok(Self {
            path: path.into(),
            config,
            checkpoint,
            gguf,
        })
    }

    /// The weights.
    #[cfg(feature = "burn")]
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The name under which the checkpoint holds a tensor; a tied embedding may have the head's.
    pub fn stored_name<'a>(&self, tensor: &'a str) -> Result<&'a str> {
        if tensor == Architecture::EMBEDDING {
            return self.config.embedding_name(&self.checkpoint);
        }
        Ok(tensor)
    }

    /// Returns whether a tensor is the weight of a layer whose codes the checkpoint holds.
    fn has_codes(&self, tensor: &str) -> bool {
        let quantization = self.config.quantization();
        quantization
            .zip(tensor.strip_suffix(".weight"))
            .is_some_and(|(config, layer)| config.has_layer(&self.checkpoint, layer))
    }
}

impl ModelSource for FolderSource {
    fn path(&self) -> &Path {
        &self.path
    }

    fn config(&self) -> &HfConfig {
        &self.config
    }

    fn held(&self, tensor: &str) -> Result<Held> {
        if self.has_codes(tensor) {
            return Ok(Held::Codes);
        }
        let tensor = self.stored_name(tensor)?;
        Ok(match self.checkpoint.blocks(tensor)? {
            Some(blocks) => Held::Blocks(blocks.kind),
            None => Held::Numbers(self.checkpoint.info(tensor)?.dtype),
        })
    }

    fn codes(&self, tensor: &str, shape: [usize; 2]) -> Result<Option<QuantizedMatrix>> {
        let tensor = self.stored_name(tensor)?;
        let layer = tensor.strip_suffix(".weight").unwrap_or(tensor);
        self.config.load_quantized(&self.checkpoint, layer, shape)
    }

    fn numbers(&self, tensor: &str, shape: &[usize]) -> Result<Vec<f32>> {
        if let (true, [rows, cols], Some(layer)) = (
            self.has_codes(tensor),
            shape,
            tensor.strip_suffix(".weight"),
        ) {
            let matrix = self
                .config
                .load_linear(&self.checkpoint, layer, [*rows, *cols])?;
            return Ok(matrix.into_vec());
        }
        let tensor = self.stored_name(tensor)?;
        self.checkpoint.check_shape(tensor, shape)?;
        self.checkpoint.load_f32(tensor)
    }

    fn bytes(&self, tensor: &str, dtype: DType, shape: &[usize]) -> Result<Option<&[u8]>> {
        if self.has_codes(tensor) {
            return Ok(None);
        }
        let tensor = self.stored_name(tensor)?;
        self.checkpoint.check_shape(tensor, shape)?;
        self.checkpoint.finite_bytes(tensor, dtype)
    }

    fn blocks(&self, tensor: &str) -> Result<Option<BlockRows<'_>>> {
        self.checkpoint.blocks(self.stored_name(tensor)?)
    }

    fn release(&self, tensor: &str) {
        if let Ok(tensor) = self.stored_name(tensor) {
            // There is nothing to give back for a tensor that is not there.
            let _ = self.checkpoint.release(tensor);
        }
    }

    fn tokenizer(&self) -> Result<Option<TokenizerTexts>> {
        if let Some(gguf) = &self.gguf {
            let files = gguf.tokenizer()?;
            return Ok(files.map(|files| TokenizerTexts {
                json: files.json,
                path: self.path.clone(),
                config: files.config,
                template: None,
            }));
        }
        tokenizer_texts(&self.path)
    }

    fn gguf(&self) -> Option<&Gguf> {
        self.gguf.as_ref()
    }
}

/// Reads the tokenizer files of a model folder. Returns `None` if it has no tokenizer.
///
/// # Errors
/// Returns [`Error::Io`], [`Error::Json`], or [`Error::InvalidFile`] if a file is too large or not
/// UTF-8.
pub(crate) fn tokenizer_texts(folder: &Path) -> Result<Option<TokenizerTexts>> {
    let files = TokenizerFiles::open(folder)?;
    files.map(|files| with_template(folder, files)).transpose()
}

/// Adds the chat template and more special tokens to the tokenizer of a model folder.
///
/// # Errors
/// Returns the errors of [`tokenizer_texts`].
pub(crate) fn with_template(folder: &Path, files: TokenizerFiles) -> Result<TokenizerTexts> {
    let TokenizerFiles {
        path,
        json,
        mut config,
        notices: _,
    } = files;
    // The first file that has a field counts.
    let special = folder.join("special_tokens_map.json");
    if special.exists() {
        for (key, value) in read_json_object(&special)? {
            config.entry(key).or_insert(value);
        }
    }
    let text = |path: &Path| {
        let bytes = read_capped(path, MAX_JSON_BYTES)?;
        String::from_utf8(bytes).map_err(|_| Error::invalid_file(path, "not UTF-8"))
    };
    let own = folder.join("chat_template.jinja");
    let old = folder.join("chat_template.json");
    let template = if own.exists() {
        Some(text(&own)?)
    } else if old.exists() {
        let object = read_json_object(&old)?;
        let template = object.get("chat_template").and_then(Value::as_str);
        template.map(String::from)
    } else {
        None
    };
    Ok(TokenizerTexts {
        json,
        path,
        config,
        template,
    })
}
