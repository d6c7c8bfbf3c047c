//! Parses `adapter_config.json`.

use serde_json::{Map, Value};

use super::changes::BaseInit;
use super::pattern::Pattern;
use super::targets::{Targets, ends_in};
use crate::error::{Error, Result};
use crate::io::fields::{Fields, bad_field};

/// Largest accepted rank, above any rank in use. The tensors in the file limit it further.
const MAX_RANK: usize = 1 << 16;
/// Largest number of trained tokens, above any vocabulary.
const MAX_TOKENS: usize = 1 << 26;

/// Fields that change what an adapter computes, in ways that are not supported.
const REFUSED: [&str; 9] = [
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
];

/// Fields that are read, or that do not change what a saved adapter computes.
const KNOWN: [&str; 44] = [
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "enable_lora",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    // Turns around the weights of GPT-2's `Conv1D`; PEFT ignores it for linear layers.
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "merge_weights",
    "modules_to_save",
    "modules_to_tie",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "quantization_aware",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "sparse_adapter",
    "target_modules",
    "task_type",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
    // What unsloth and other trainers add.
    "unsloth_fixed",
    "unsloth_version",
    "modelscope_version",
    "swift_version",
    "transformers_version",
    "torch_dtype",
];

/// The rules of `adapter_config.json`.
pub(super) struct Rules {
    pub rank: usize,
    alpha: f64,
    rank_stabilized: bool,
    ranks: Pattern,
    alphas: Pattern,
    pub targets: Targets,
    pub init: BaseInit,
    pub dora: bool,
    pub base_model: Option<String>,
    pub sparse: bool,
    pub quantization_aware: bool,
    /// `ensure_weight_tying`.
    pub tied: bool,
    tokens: Tokens,
    pub notices: Vec<String>,
}

/// The tokens whose rows are trained.
enum Tokens {
    None,
    /// Of the embedding.
    Embedding(Vec<u32>),
    ByModule(Vec<(String, Vec<u32>)>),
}

impl Rules {
    /// Parses a config.
    ///
    /// # Errors
    /// Returns [`Error::InvalidConfig`] for a field of a wrong type or value, and
    /// [`Error::Unsupported`] for what would change the result and is not supported.
    pub fn parse(raw: &Map<String, Value>) -> Result<Self> {
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
        match fields.str("bias")? {
            // Without a stored bias there is nothing to apply.
            None | Some("none" | "all" | "lora_only") => {}
            Some(other) => {
                let reason = format!("`{other}`, expected none, all or lora_only");
                return Err(bad_field("bias", reason));
            }
        }
        let mut unknown = Vec::new();
        for (field, _) in raw.iter().filter(|(_, value)| is_set(value)) {
            let name = field.as_str();
            if KNOWN.contains(&name) {
                continue;
            }
            // PEFT's variants of LoRA are switched on by such fields.
            let switch = name.starts_with("use_") || name.ends_with("_config");
            if REFUSED.contains(&name) || switch {
                return refuse(format!("an adapter with `{name}`"));
            }
            unknown.push(format!("`{name}`"));
        }
        let mut notices = Vec::new();
        if !unknown.is_empty() {
            let names = unknown.join(", ");
            notices.push(format!("fields of adapter_config.json not used: {names}"));
        }
        let alpha = fields.required_f64("lora_alpha")?;
        // The scale must be finite in f32 for every rank.
        if !(alpha as f32).is_finite() {
            return Err(bad_field(
                "lora_alpha",
                format!("{alpha}, expected a finite number"),
            ));
        }
        let flag = |name: &str| Ok::<_, Error>(fields.bool(name)?.unwrap_or(false));
        Ok(Self {
            rank: fields.required_size("r", MAX_RANK)?,
            alpha,
            rank_stabilized: flag("use_rslora")?,
            ranks: Pattern::parse("rank_pattern", raw.get("rank_pattern"))?,
            alphas: Pattern::parse("alpha_pattern", raw.get("alpha_pattern"))?,
            targets: Targets::parse(raw, &mut notices)?,
            init: BaseInit::parse(raw.get("init_lora_weights"))?,
            dora: flag("use_dora")?,
            base_model: fields.str("base_model_name_or_path")?.map(String::from),
            sparse: flag("sparse_adapter")?,
            quantization_aware: flag("quantization_aware")?,
            tied: flag("ensure_weight_tying")?,
            tokens: Tokens::parse(raw.get("trainable_token_indices"))?,
            notices,
        })
    }

    /// Returns the rank that the config gives to a layer, and whether `rank_pattern` matched it.
    pub fn rank_of(&self, layer: &str) -> Result<(usize, bool)> {
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

    /// Returns the scale of a layer whose rank in the config is `rank`.
    pub fn scale_of(&self, layer: &str, rank: usize) -> f32 {
        let alpha = self.alphas.find(layer).unwrap_or(self.alpha);
        let divisor = if self.rank_stabilized {
            (rank as f64).sqrt()
        } else {
            rank as f64
        };
        (alpha / divisor) as f32
    }

    /// Returns the tokens whose rows of a module are trained.
    pub fn tokens_of(&self, module: &str) -> Option<&[u32]> {
        match &self.tokens {
            Tokens::None => None,
            Tokens::Embedding(tokens) => ends_in(module, "embed_tokens").then_some(tokens),
            Tokens::ByModule(modules) => modules
                .iter()
                .find(|(name, _)| ends_in(module, name))
                .map(|(_, tokens)| tokens.as_slice()),
        }
    }
}

impl Tokens {
    fn parse(value: Option<&Value>) -> Result<Self> {
        const FIELD: &str = "trainable_token_indices";
        let list = |value: &Value| -> Result<Vec<u32>> {
            let wrong = || {
                let shown: String = value.to_string().chars().take(60).collect();
                bad_field(FIELD, format!("{shown}, expected a list of token ids"))
            };
            let items = value.as_array().filter(|items| items.len() <= MAX_TOKENS);
            let items = items.ok_or_else(wrong)?;
            let id = |item: &Value| item.as_u64().and_then(|id| u32::try_from(id).ok());
            let ids = items.iter().map(id).collect::<Option<_>>();
            ids.ok_or_else(wrong)
        };
        match value {
            None | Some(Value::Null) => Ok(Self::None),
            Some(Value::Object(map)) => map
                .iter()
                .map(|(module, value)| Ok((module.clone(), list(value)?)))
                .collect::<Result<_>>()
                .map(Self::ByModule),
            Some(value) => list(value).map(Self::Embedding),
        }
    }
}

/// Returns whether a value is present and not null, false or empty.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        _ => true,
    }
}
