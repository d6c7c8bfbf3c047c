//! LoRA adapters as GGUF files.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use super::super::blocks::Encoding;
use super::super::config::Row;
use super::container::{Keys, Tensor, write};
use super::{GgufType, permuted, target};
use crate::arch::Architecture;
use crate::error::{Error, Result};
use crate::io::tensors::encode;
use crate::io::{DType, HfConfig, LoraAdapter, LoraWeights};

impl LoraAdapter {
    /// Writes the adapter as a GGUF file, to be used by llama.cpp together with the base model,
    /// whose configuration is `config`.
    ///
    /// llama.cpp scales the product of a layer by one alpha, divided by the layer's rank. Where the
    /// layers need different alphas, the difference is multiplied into B.
    ///
    /// # Errors
    /// Returns the errors of [`check`](Self::check); [`Error::Unsupported`] for an adapter that is
    /// no plain LoRA (SparsePEFT, QA-SparsePEFT, changes of the base), for a pair of the embedding or
    /// of a tied head, and for a base model whose blocks are filled up
    /// in GGUF; [`Error::InvalidArgument`] if `kind` is not F32, F16 or BF16;
    /// [`Error::TensorOverflow`] if a number is beyond its range; and [`Error::InvalidFile`] if the
    /// file exists and `overwrite` is false.
    pub fn write_gguf(
        &self,
        destination: impl AsRef<Path>,
        config: &HfConfig,
        kind: GgufType,
        overwrite: bool,
    ) -> Result<()> {
        self.check(config)?;
        if self.sparse || self.quantization_aware {
            return Err(Error::Unsupported {
                what: "an adapter under a mask or through a grid, as LoRA in GGUF (merge it \
                       instead)"
                    .into(),
            });
        }
        self.refuse_changes("LoRA in GGUF")?;
        // llama.cpp looks for the tensors that it adapts, and stores a tied head once.
        let (embedding, head) = (Architecture::EMBEDDING, Architecture::HEAD_LAYER);
        let embedding = embedding.trim_end_matches(".weight");
        for layer in self.layers.keys() {
            if layer == embedding || (layer == head && config.tie_word_embeddings()) {
                return Err(Error::Unsupported {
                    what: format!("a LoRA of `{layer}` in GGUF (merge it instead)"),
                });
            }
        }
        let Encoding::Plain(dtype) = kind.encoding() else {
            return Err(Error::argument("type", kind, "f32, f16 or bf16"));
        };
        let row = Row::of(config)?;
        if target(config, row)?.blocks != config.blocks() {
            return Err(Error::Unsupported {
                what: format!(
                    "a LoRA for a model whose blocks are filled up, in GGUF of architecture {}",
                    row.name
                ),
            });
        }
        // As the file holds the matrices.
        let rows: BTreeMap<String, usize> = config
            .arch()
            .linears()
            .into_iter()
            .map(|layer| (layer.name, layer.d_output))
            .collect();
        let rows = |layer: &str| rows.get(layer).copied().unwrap_or(0);
        let adapter = self.clone().stacked(config, rows)?;
        let alpha = adapter.common_alpha();
        let mut keys = Keys::default();
        keys.text("general.architecture", row.name);
        keys.text("general.type", "adapter");
        if let Some(base) = &self.base_model {
            keys.text("general.name", base);
        }
        keys.text("adapter.type", "lora");
        keys.f32("adapter.lora.alpha", alpha);
        let mut tensors = Vec::new();
        let fused = config.arch().fused();
        for (layer, weights) in &adapter.layers {
            let name = format!("{layer}.weight");
            // A matrix of several layers has the name of any of them.
            let part = fused.iter().find(|fused| fused.name == *layer);
            let part = part.and_then(|fused| fused.parts.first());
            let part = part.map(|(part, _)| format!("{part}.weight"));
            let Some(in_file) = row.gguf_name(part.as_ref().unwrap_or(&name)) else {
                return Err(Error::Unsupported {
                    what: format!(
                        "layer `{layer}` of a LoRA in GGUF of architecture {}",
                        row.name
                    ),
                });
            };
            let heads = row.permuted_heads(&name, config.blocks());
            let (rank, d_input, d_output) = (weights.rank(), weights.d_input(), weights.d_output());
            tensors.push(Tensor {
                name: format!("{in_file}.lora_a"),
                shape: vec![rank, d_input],
                encoding: Encoding::Plain(dtype),
                bytes: Box::new(move || {
                    encoded(layer, dtype, weights.a().as_slice()).map(Cow::Owned)
                }),
                written: Box::new(|| {}),
            });
            tensors.push(Tensor {
                name: format!("{in_file}.lora_b"),
                shape: vec![d_output, rank],
                encoding: Encoding::Plain(dtype),
                bytes: Box::new(move || {
                    let factor = alpha_of(weights) / alpha;
                    let b: Vec<f32> = weights.b().as_slice().iter().map(|b| b * factor).collect();
                    let bytes = encoded(layer, dtype, &b)?;
                    Ok(match heads.filter(|heads| *heads > 0) {
                        Some(heads) => permuted(&bytes, d_output, d_output / heads).into(),
                        None => bytes.into(),
                    })
                }),
                written: Box::new(|| {}),
            });
        }
        write(destination.as_ref(), &keys, tensors, overwrite)
    }

    /// The alpha that most layers need; it is not 0, which llama.cpp takes for no scale.
    fn common_alpha(&self) -> f32 {
        let alphas: Vec<f32> = self.layers.values().map(alpha_of).collect();
        let count = |alpha: &f32| alphas.iter().filter(|other| *other == alpha).count();
        let usable = alphas.iter().filter(|alpha| **alpha != 0.0);
        usable
            .max_by_key(|alpha| count(alpha))
            .copied()
            .unwrap_or(1.0)
    }
}

/// The alpha that gives a layer its scale.
fn alpha_of(weights: &LoraWeights) -> f32 {
    weights.scale() * weights.rank() as f32
}

fn encoded(layer: &str, dtype: DType, values: &[f32]) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(values.len() * dtype.size());
    encode(layer, dtype, 0, values, &mut bytes)?;
    Ok(bytes)
}
