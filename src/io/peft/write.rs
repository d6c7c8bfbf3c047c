//! Writing a PEFT folder.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::pattern::{self, Pattern};
use super::{LoraAdapter, LoraWeights, PREFIX};
use crate::error::{Error, Result};
use crate::io::tensors::{DType, HostTensor, write_safetensors};
use crate::io::{FolderWriter, atomic};

/// How an adapter is written.
#[derive(Clone, Debug)]
pub struct PeftOptions {
    /// Element type: F32 or F16 (BF16 is possible too).
    pub dtype: DType,
    /// Whether every pair is padded with zeros to the largest rank: the same product, for readers that know no
    /// `rank_pattern`.
    pub pad_to_max_rank: bool,
    /// Whether a folder that holds something may be replaced.
    pub overwrite: bool,
    /// All linear layers of the model. Where all with one last name (`q_proj`) are adapted, `target_modules` names them by
    /// that; without this list, and otherwise, by their full paths.
    pub model_layers: Vec<String>,
    /// Dropout that was used in training; a note for readers, without effect on the product.
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
    /// F32, ranks as they are, into a new or empty folder.
    pub fn new() -> Self {
        Self::default()
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
    /// `r` is the largest rank and `lora_alpha` the alpha of the first layer that has it. Every layer of another rank stands
    /// in `rank_pattern`, every one of another alpha in `alpha_pattern` with `alpha = scale * rank`, so that the reader's
    /// `alpha / rank` is exactly the layer's scale. Where all scales are one, a reader that ignores both patterns and divides
    /// the global numbers gets it right as well.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an adapter without layers; those of [`FolderWriter`] and [`write_safetensors`]. Nothing
    /// is left behind then.
    pub fn write(&self, destination: impl AsRef<Path>, options: &PeftOptions) -> Result<()> {
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
            let (a_shape, b_shape) = (vec![r, weights.d_input()], vec![weights.d_output(), r]);
            let a_name = format!("{PREFIX}{layer}.lora_A.weight");
            let b_name = format!("{PREFIX}{layer}.lora_B.weight");
            if r == weights.rank() {
                tensors.push(HostTensor::from_f32(
                    a_name,
                    options.dtype,
                    a_shape,
                    weights.a().as_slice(),
                ));
                tensors.push(HostTensor::from_f32(
                    b_name,
                    options.dtype,
                    b_shape,
                    weights.b().as_slice(),
                ));
            } else {
                let padded = weights.padded(r)?;
                let (a, b) = (padded.a, padded.b);
                tensors.push(HostTensor::from_f32(
                    a_name,
                    options.dtype,
                    a_shape,
                    a.into_vec(),
                ));
                tensors.push(HostTensor::from_f32(
                    b_name,
                    options.dtype,
                    b_shape,
                    b.into_vec(),
                ));
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
        // Exact: 24 bits of scale times 17 of rank fit an f64, and the reader's division gives the scale back.
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
        // A key also matches every path that ends in it. Where one layer's path ends in another's, name every layer.
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
            // The longest first: the first key that matches wins, and a path's own key is the longest that does.
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

    /// Last names where all layers of those names are adapted, else full paths: PEFT would give a layer that is named but has
    /// no tensors an adapter of its own.
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

/// A path as a key: itself, or escaped where it holds a character that an expression would read.
fn key_of(layer: &str) -> String {
    if pattern::needs_regex(layer) {
        regex::escape(layer)
    } else {
        layer.into()
    }
}

/// 16 rather than 16.0, as PEFT writes it.
fn number(v: f64) -> Value {
    if v.fract() == 0.0 && v.abs() < 1e15 {
        Value::from(v as i64)
    } else {
        Value::from(v)
    }
}
