//! Writes PEFT folders.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::pattern::{self, Pattern};
use super::tables::EMBEDDING_MODULE;
use super::{LoraAdapter, LoraWeights, PREFIX};
use crate::error::{Error, Result};
use crate::io::hf::HfConfig;
use crate::io::tensors::{DType, HostTensor, write_safetensors};
use crate::io::{FolderWriter, atomic};
use crate::linalg::Matrix;

/// Settings for writing an adapter.
#[derive(Clone, Debug)]
pub struct PeftOptions {
    /// Dtype of the weights: F32, F16 or BF16.
    pub dtype: DType,
    /// Whether every pair is padded with zeros to the largest rank. The product is unchanged, and
    /// readers that ignore `rank_pattern` can load it.
    pub pad_to_max_rank: bool,
    /// Whether a folder that is not empty may be replaced.
    pub overwrite: bool,
    /// Names of all modules that PEFT could adapt in the model; [`for_model`](Self::for_model) sets
    /// them. If all layers with the same last name (such as
    /// `q_proj`) are adapted, `target_modules` lists last names; otherwise, or if this list is
    /// empty, it lists full paths.
    pub model_layers: Vec<String>,
    /// Dropout used in training. It is stored in the config and does not affect the product.
    pub dropout: f64,
}

impl Default for PeftOptions {
    fn default() -> Self {
        Self {
            dtype: DType::F32,
            pad_to_max_rank: false,
            overwrite: false,
            model_layers: Vec::new(),
            dropout: 0.0,
        }
    }
}

impl PeftOptions {
    /// Creates settings for F32, unchanged ranks, and a new or empty folder.
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates settings like [`new`](Self::new), with the modules of a model.
    pub fn for_model(config: &HfConfig) -> Self {
        Self {
            model_layers: super::fused::modules(config),
            ..Self::default()
        }
    }

    setters! {
        with_dtype(dtype: DType);
        with_pad_to_max_rank(pad_to_max_rank: bool);
        with_overwrite(overwrite: bool);
        with_model_layers(model_layers: Vec<String>);
        with_dropout(dropout: f64);
    }
}

impl LoraAdapter {
    /// Writes the adapter as a PEFT folder, atomically.
    ///
    /// `r` is the largest rank, and `lora_alpha` is the alpha of the first layer with that rank.
    /// Layers with another rank are listed in `rank_pattern`, and layers with another alpha in
    /// `alpha_pattern`. Alpha is `scale * rank`, so that the reader's `alpha / rank` is exactly the
    /// scale of the layer. If all scales are equal, a reader that ignores both patterns and divides
    /// the global numbers also gets the right scale.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if the adapter has no layers, [`Error::Unsupported`] if
    /// it changes its base, and the errors of [`FolderWriter`] and [`write_safetensors`]. No files are
    /// left behind.
    pub fn write(&self, destination: impl AsRef<Path>, options: &PeftOptions) -> Result<()> {
        self.refuse_changes("a PEFT folder")?;
        let rank = self.max_rank();
        if rank == 0 {
            return Err(Error::argument(
                "adapter",
                "without layers",
                "at least one layer",
            ));
        }
        let config = self.config(rank, options)?;
        let folder = FolderWriter::create(destination, options.overwrite)?;
        let mut tensors = Vec::with_capacity(2 * self.layers.len());
        for (layer, weights) in &self.layers {
            let r = if options.pad_to_max_rank {
                rank
            } else {
                weights.rank()
            };
            let padded = match r == weights.rank() {
                true => Cow::Borrowed(weights),
                false => Cow::Owned(weights.padded(r)?),
            };
            for (name, matrix) in stored(layer, &padded) {
                let shape = [matrix.rows(), matrix.cols()];
                let name = format!("{PREFIX}{layer}.{name}");
                let values = match matrix {
                    Cow::Borrowed(matrix) => Cow::Owned(matrix.as_slice().to_vec()),
                    Cow::Owned(matrix) => Cow::Owned(matrix.into_vec()),
                };
                tensors.push(HostTensor::from_f32(name, options.dtype, shape, values));
            }
        }
        write_safetensors(
            folder.path().join("adapter_model.safetensors"),
            tensors,
            &BTreeMap::new(),
        )?;
        atomic::write_json(folder.path().join("adapter_config.json"), &config)?;
        folder.commit()
    }

    fn config(&self, rank: usize, options: &PeftOptions) -> Result<Value> {
        let stored_rank = |w: &LoraWeights| {
            if options.pad_to_max_rank {
                rank
            } else {
                w.rank()
            }
        };
        // This is exact: 24 bits of the scale times 17 bits of the rank fit an f64, and the
        // reader's division gives back the scale.
        let alpha_of = |w: &LoraWeights| f64::from(w.scale()) * stored_rank(w) as f64;
        let alpha = self
            .layers
            .values()
            .find(|w| w.rank() == rank)
            .map_or(0.0, alpha_of);
        let wanted: Vec<(&String, usize, f64)> = self
            .layers
            .iter()
            .map(|(name, w)| (name, stored_rank(w), alpha_of(w)))
            .collect();
        let mut ranks: Vec<_> = wanted
            .iter()
            .filter(|(_, r, _)| *r != rank)
            .map(|(n, r, _)| (*n, *r as f64))
            .collect();
        let mut alphas: Vec<_> = wanted
            .iter()
            .filter(|(_, _, a)| *a != alpha)
            .map(|(n, _, a)| (*n, *a))
            .collect();
        // A key also matches every path that ends in it. If the path of one layer is the end of
        // another's, list every layer.
        let holds = |pairs: &[(&String, f64)],
                     value: &dyn Fn(&(&String, usize, f64)) -> f64,
                     default: f64|
         -> Result<bool> {
            let mut pattern = Pattern::default();
            for (name, v) in pairs {
                pattern.push("pattern", &key_of(name), *v)?;
            }
            Ok(wanted
                .iter()
                .all(|w| pattern.find(w.0).unwrap_or(default) == value(w)))
        };
        if !holds(&ranks, &|w| w.1 as f64, rank as f64)? || !holds(&alphas, &|w| w.2, alpha)? {
            ranks = wanted.iter().map(|(n, r, _)| (*n, *r as f64)).collect();
            alphas = wanted.iter().map(|(n, _, a)| (*n, *a)).collect();
            // Sort the longest first. The first matching key wins, and of the keys that match a
            // path, the longest is the path's own.
            ranks.sort_by_key(|(n, _)| std::cmp::Reverse(n.len()));
            alphas.sort_by_key(|(n, _)| std::cmp::Reverse(n.len()));
        }
        let object = |pairs: &[(&String, f64)]| -> Value {
            pairs
                .iter()
                .map(|(n, v)| (key_of(n), number(*v)))
                .collect::<Map<String, Value>>()
                .into()
        };
        let mut config = json!({
            "alpha_pattern": object(&alphas),
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_pattern": null,
            "layers_to_transform": null,
            "loftq_config": {},
            "lora_alpha": number(alpha),
            "lora_dropout": options.dropout,
            "megatron_config": null,
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": rank,
            "rank_pattern": object(&ranks),
            "revision": null,
            "target_modules": self.target_modules(&options.model_layers),
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": false,
        });
        if let Value::Object(map) = &mut config {
            for (field, set) in [
                ("sparse_adapter", self.sparse),
                ("quantization_aware", self.quantization_aware),
            ] {
                if set {
                    map.insert(field.into(), true.into());
                }
            }
        }
        Ok(config)
    }

    /// Returns last names if all layers with those names are adapted, else full paths. PEFT would
    /// create a new adapter for a layer that is named but has no tensors.
    fn target_modules(&self, model_layers: &[String]) -> Vec<String> {
        let last = |path: &str| path.rsplit('.').next().unwrap_or(path).to_string();
        let suffixes: BTreeSet<String> = self.layers.keys().map(|l| last(l)).collect();
        let complete = !model_layers.is_empty()
            && model_layers
                .iter()
                .all(|l| self.layers.contains_key(l) || !suffixes.contains(&last(l)));
        if complete {
            suffixes.into_iter().collect()
        } else {
            self.layers.keys().cloned().collect()
        }
    }
}

/// Returns the matrices of a pair as PEFT stores them, with the ends of their names. Those of an
/// embedding are transposed.
fn stored<'a>(layer: &str, weights: &'a LoraWeights) -> [(&'static str, Cow<'a, Matrix>); 2] {
    if layer == EMBEDDING_MODULE {
        return [
            ("lora_embedding_A", Cow::Owned(weights.b.transposed())),
            ("lora_embedding_B", Cow::Owned(weights.a.transposed())),
        ];
    }
    [
        ("lora_A.weight", Cow::Borrowed(&weights.a)),
        ("lora_B.weight", Cow::Borrowed(&weights.b)),
    ]
}

/// Returns a path as a key, escaped if it contains regex syntax.
fn key_of(layer: &str) -> String {
    if pattern::needs_regex(layer) {
        regex::escape(layer)
    } else {
        layer.into()
    }
}

/// Writes whole numbers as integers (16 instead of 16.0), as PEFT does.
fn number(v: f64) -> Value {
    if v.fract() == 0.0 && v.abs() < 1e15 {
        Value::from(v as i64)
    } else {
        Value::from(v)
    }
}
