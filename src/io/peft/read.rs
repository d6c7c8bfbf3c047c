//! Reads PEFT folders.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use super::pattern::Pattern;
use super::{LoraAdapter, LoraWeights, PREFIX};
use crate::error::{Error, Result};
use crate::io::fields::{Fields, bad_field};
use crate::io::tensors::{Checkpoint, plain_name};
use crate::io::{cache, read_json_object};

/// Largest accepted rank, above any rank in use. The tensors in the file limit it further.
const MAX_RANK: usize = 1 << 16;

/// Rules of `adapter_config.json` for ranks and scales.
struct Rules {
    rank: usize,
    alpha: f64,
    rank_stabilized: bool,
    ranks: Pattern,
    alphas: Pattern,
}

impl LoraAdapter {
    /// Reads `adapter_config.json` and `adapter_model.safetensors` from a folder.
    ///
    /// The rank of each tensor must be the rank that the config gives to its layer (`r` or
    /// `rank_pattern`), with one exception: if no pattern matches the layer, a lower rank than `r`
    /// is accepted. The authors' code extracts subnets in this form: the first rows and columns of
    /// an adapter of rank `r`, whose scale is still `lora_alpha / r`.
    ///
    /// # Errors
    /// Returns [`Error::Io`], [`Error::Json`] or [`Error::InvalidFile`] if a file cannot be read.
    /// Returns [`Error::InvalidConfig`] for an invalid field, and [`Error::Unsupported`] for DoRA,
    /// biases, transposed layers, embeddings, whole modules and other kinds of adapters. Returns
    /// [`Error::MissingTensor`] for an A without its B, and [`Error::TensorShape`],
    /// [`Error::InvalidRank`], [`Error::TensorDtype`] or [`Error::NotFinite`] for an invalid
    /// tensor.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = &*cache::resolve(folder.as_ref())?;
        let raw = read_json_object(&folder.join("adapter_config.json"))?;
        let rules = parse_rules(&raw)?;
        let fields = Fields {
            map: &raw,
            prefix: "",
        };
        let mut adapter = Self {
            layers: BTreeMap::new(),
            base_model: fields.str("base_model_name_or_path")?.map(String::from),
            sparse: fields.bool("sparse_adapter")?.unwrap_or(false),
            quantization_aware: fields.bool("quantization_aware")?.unwrap_or(false),
        };
        let path = folder.join("adapter_model.safetensors");
        if !path.exists() && folder.join("adapter_model.bin").exists() {
            return Err(Error::Unsupported {
                what: format!(
                    "{}: a pickled adapter_model.bin (save it as safetensors)",
                    folder.display()
                ),
            });
        }
        let tensors = Checkpoint::open(&path)?;
        for name in tensors.names() {
            let Some(layer) = layer_of(name)? else {
                continue;
            };
            let weights = load_layer(&tensors, name, layer, &rules)?;
            let plain = plain_name(layer).into_owned();
            if let Some((plain, _)) = adapter.layers.remove_entry(&plain) {
                let reason = format!("two adapters for `{plain}`, one of them as `{layer}`");
                return Err(Error::invalid_file(&path, reason));
            }
            adapter.layers.insert(plain, weights);
        }
        if adapter.layers.is_empty() {
            return Err(Error::invalid_file(&path, "no LoRA tensor"));
        }
        Ok(adapter)
    }
}

/// Returns the layer of an A tensor, or `None` for a B tensor, which is loaded together with its A.
fn layer_of(name: &str) -> Result<Option<&str>> {
    let unsupported = |kind: &str| {
        Err(Error::Unsupported {
            what: format!("adapter tensor `{name}` ({kind})"),
        })
    };
    let Some(module) = name.strip_prefix(PREFIX) else {
        return unsupported("its name does not begin with `base_model.model.`");
    };
    if let Some(layer) = module.strip_suffix(".lora_A.weight") {
        Ok(Some(layer))
    } else if module.ends_with(".lora_B.weight") {
        Ok(None)
    } else if module.contains("lora_magnitude_vector") {
        unsupported("DoRA")
    } else if module.contains("lora_embedding_") {
        unsupported("LoRA of an embedding")
    } else if module.contains(".lora_") {
        unsupported("a kind of LoRA tensor unknown here")
    } else {
        unsupported("a whole module, `modules_to_save`")
    }
}

fn load_layer(
    tensors: &Checkpoint,
    a_name: &str,
    layer: &str,
    rules: &Rules,
) -> Result<LoraWeights> {
    let b_name = format!("{PREFIX}{layer}.lora_B.weight");
    let &[rank, d_input] = tensors.info(a_name)?.shape.as_slice() else {
        let found = tensors.info(a_name)?.shape.clone();
        return Err(Error::TensorShape {
            tensor: a_name.into(),
            expected: vec![rules.rank, 0],
            found,
        });
    };
    let found = &tensors.info(&b_name)?.shape;
    let d_output = match found.as_slice() {
        &[d_output, columns] if columns == rank => d_output,
        _ => {
            let expected = vec![found.first().copied().unwrap_or(0), rank];
            return Err(Error::TensorShape {
                tensor: b_name,
                expected,
                found: found.clone(),
            });
        }
    };
    let (expected, named) = rules.rank_of(layer)?;
    // The authors' code cuts the tensors but keeps the config's rank, which determines the scale.
    let cut = !named && (1..expected).contains(&rank);
    if rank != expected && !cut {
        return Err(Error::InvalidRank {
            layer: layer.into(),
            found: rank,
            max: expected,
        });
    }
    let weights = LoraWeights::new(
        tensors.load_matrix(a_name, [rank, d_input])?,
        tensors.load_matrix(&b_name, [d_output, rank])?,
        rules.scale_of(layer, expected),
    )?;
    Ok(weights)
}

impl Rules {
    /// Returns the rank that the config gives to a layer, and whether `rank_pattern` matched it.
    fn rank_of(&self, layer: &str) -> Result<(usize, bool)> {
        match self.ranks.find(layer) {
            None => Ok((self.rank, false)),
            Some(r) if r.fract() == 0.0 && (1.0..=MAX_RANK as f64).contains(&r) => {
                Ok((r as usize, true))
            }
            Some(r) => Err(bad_field(
                format!("rank_pattern, for {layer}"),
                format!("{r}, expected a whole number in 1..={MAX_RANK}"),
            )),
        }
    }

    fn scale_of(&self, layer: &str, rank: usize) -> f32 {
        let alpha = self.alphas.find(layer).unwrap_or(self.alpha);
        let divisor = if self.rank_stabilized {
            (rank as f64).sqrt()
        } else {
            rank as f64
        };
        (alpha / divisor) as f32
    }
}

fn parse_rules(raw: &Map<String, Value>) -> Result<Rules> {
    let fields = Fields {
        map: raw,
        prefix: "",
    };
    let refuse = |what: String| Err(Error::Unsupported { what });
    match fields.str("peft_type")? {
        Some("LORA") => {}
        Some(other) => return refuse(format!("a PEFT adapter of type `{other}`")),
        None => return Err(bad_field("peft_type", "missing")),
    }
    if let Some(bias) = fields.str("bias")?
        && bias != "none"
    {
        return refuse(format!(
            "an adapter with trained biases (`bias` = `{bias}`)"
        ));
    }
    for flag in [
        "use_dora",
        "fan_in_fan_out",
        "lora_bias",
        "use_qalora",
        "use_bdlora",
    ] {
        if is_set(raw.get(flag)) {
            return refuse(format!("an adapter with `{flag}`"));
        }
    }
    for list in [
        "modules_to_save",
        "layer_replication",
        "target_parameters",
        "trainable_token_indices",
    ] {
        if is_set(raw.get(list)) {
            return refuse(format!("an adapter with `{list}`"));
        }
    }
    for kind in [
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "velora_config",
        "monteclora_config",
    ] {
        if is_set(raw.get(kind)) {
            return refuse(format!("an adapter with `{kind}`"));
        }
    }
    let alpha = fields.required_f64("lora_alpha")?;
    // The scale must be finite in f32 for every rank.
    if !(alpha as f32).is_finite() {
        return Err(bad_field(
            "lora_alpha",
            format!("{alpha}, expected a finite number"),
        ));
    }
    Ok(Rules {
        rank: fields.required_size("r", MAX_RANK)?,
        alpha,
        rank_stabilized: fields.bool("use_rslora")?.unwrap_or(false),
        ranks: Pattern::parse("rank_pattern", raw.get("rank_pattern"))?,
        alphas: Pattern::parse("alpha_pattern", raw.get("alpha_pattern"))?,
    })
}

/// Returns whether a value is present and not null, false or empty.
fn is_set(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Array(list)) => !list.is_empty(),
        Some(Value::Object(map)) => !map.is_empty(),
        Some(_) => true,
    }
}
