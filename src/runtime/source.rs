//! A model as the source of a conversion.

use std::path::Path;

use serde_json::{Map, Value};

use super::model::Model;
use super::weights::{LayerWeights, Weight};
use crate::arch::Architecture;
use crate::error::{Error, Result};
use crate::format::{QuantizedMatrix, WeightFormat};
use crate::io::gguf::write_from;
use crate::io::source::{Held, ModelSource, TokenizerTexts};
use crate::io::{DType, GgufOptions, GgufReport, HfConfig};
use crate::progress::Silent;

/// A model with the path that names it.
struct Named<'a> {
    model: &'a Model,
    path: &'a Path,
}

impl Model {
    /// Writes the model as a GGUF file for llama.cpp; see [`write_gguf`](crate::io::write_gguf). A
    /// supernet is written with all of its widths. If subnets have weights of their own, those of
    /// the first are written; [`extract`](Self::extract) gives another one.
    ///
    /// # Errors
    /// Returns [`Error::Unsupported`] for a model with adapters ([`merged`](Self::merged) adds them
    /// to the weights), the errors of [`write_gguf`](crate::io::write_gguf), and
    /// [`Error::InvalidFile`] if the contents of a weight that is mapped from a file are damaged.
    pub fn write_gguf(
        &self,
        destination: impl AsRef<Path>,
        options: &GgufOptions,
    ) -> Result<GgufReport> {
        let adapted = |layer: &&LayerWeights| layer.adapter.is_some();
        if let Some(layer) = self.weights.layers.iter().find(adapted) {
            let what = format!("the adapter of `{}` in GGUF (merge it first)", layer.name);
            return Err(Error::Unsupported { what });
        }
        let path = destination.as_ref();
        write_from(&Named { model: self, path }, path, options, &Silent)
    }
}

impl Named<'_> {
    fn layer(&self, name: &str) -> Option<&LayerWeights> {
        let mut layers = self.model.weights.layers.iter();
        layers.find(|layer| layer.name == name)
    }

    fn missing(&self, tensor: &str) -> Error {
        Error::MissingTensor {
            path: self.path.into(),
            tensor: tensor.into(),
        }
    }

    fn weight(&self, tensor: &str) -> Result<&Weight> {
        if tensor == Architecture::EMBEDDING {
            return Ok(&self.model.weights.embedding);
        }
        let layer = tensor
            .strip_suffix(".weight")
            .and_then(|name| self.layer(name));
        let layer = layer.ok_or_else(|| self.missing(tensor))?;
        Ok(&layer.weight)
    }

    fn vector(&self, tensor: &str) -> Option<&[f32]> {
        if let Some(layer) = tensor.strip_suffix(".bias") {
            return self.layer(layer)?.bias.as_deref();
        }
        self.model.norm_weights(tensor)
    }
}

impl ModelSource for Named<'_> {
    fn path(&self) -> &Path {
        self.path
    }

    fn config(&self) -> &HfConfig {
        self.model.config()
    }

    fn held(&self, tensor: &str) -> Result<Held> {
        Ok(match self.weight(tensor)?.unchecked().format() {
            WeightFormat::Int { .. } | WeightFormat::SparseInt4 { .. } => Held::Codes,
            WeightFormat::F32 => Held::Numbers(DType::F32),
            WeightFormat::F16 | WeightFormat::SparseF16 | WeightFormat::NmF16 { .. } => {
                Held::Numbers(DType::F16)
            }
            WeightFormat::Bf16 | WeightFormat::SparseBf16 | WeightFormat::NmBf16 { .. } => {
                Held::Numbers(DType::BF16)
            }
        })
    }

    fn codes(&self, tensor: &str, _shape: [usize; 2]) -> Result<Option<QuantizedMatrix>> {
        Ok(self.weight(tensor)?.get()?.to_quantized())
    }

    fn numbers(&self, tensor: &str, shape: &[usize]) -> Result<Vec<f32>> {
        if shape.len() == 1 {
            let values = self.vector(tensor).ok_or_else(|| self.missing(tensor))?;
            return Ok(values.to_vec());
        }
        Ok(self.weight(tensor)?.get()?.to_matrix().into_vec())
    }

    fn release(&self, tensor: &str) {
        if let Ok(weight) = self.weight(tensor) {
            weight.unchecked().release();
        }
    }

    fn tokenizer(&self) -> Result<Option<TokenizerTexts>> {
        let Some(tokenizer) = &self.model.weights.tokenizer else {
            return Ok(None);
        };
        let inner = &tokenizer.inner;
        let mut config = Map::new();
        for (name, id) in [("bos_token", inner.bos_id()), ("eos_token", inner.eos_id())] {
            if let Some(token) = id.and_then(|id| inner.id_to_token(id)) {
                config.insert(name.into(), Value::String(token));
            }
        }
        Ok(Some(TokenizerTexts {
            json: tokenizer.json.to_string(),
            path: inner.path().into(),
            config,
            template: self.model.chat_template().map(|chat| chat.source().into()),
        }))
    }
}
