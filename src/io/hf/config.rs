//! Parses and checks `config.json`, which describes a decoder.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::blocks;
use super::rope;
use crate::arch::family::{Biases, FAMILIES, FamilyRow, SoftCap, WindowRule, Windows};
use crate::arch::{
    Activation, Architecture, BlockDims, Family, LinearKind, Positions, RopeScaling, Scores,
    SubBlock,
};
use crate::error::{Error, Result};
use crate::io::fields::{Fields, bad_field};
use crate::io::gguf::{Gguf, is_gguf};
use crate::io::quantized::QuantizationConfig;
use crate::io::tensors::{Checkpoint, DType};
use crate::io::{atomic, cache, read_json_object};

// Limits far above any existing model. They ensure that no product of two of them overflows and
// that the list of blocks stays small.
pub(super) const MAX_WIDTH: usize = 1 << 22;
const MAX_LAYERS: usize = 1 << 12;
pub(super) const MAX_HEADS: usize = 1 << 14;
const MAX_HEAD_DIM: usize = 1 << 14;
const MAX_VOCABULARY: usize = 1 << 26;
pub(super) const MAX_POSITIONS: usize = 1 << 31;

/// Sizes of a new Llama; see [`HfConfig::new_llama`].
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaDims {
    /// Number of tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key/value heads; divides the number of query heads.
    pub num_key_value_heads: usize,
    /// Context length in tokens.
    pub max_position_embeddings: usize,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// Epsilon of the norms.
    pub rms_norm_eps: f64,
    /// Whether embedding and head share one matrix.
    pub tie_word_embeddings: bool,
    /// First token of a sequence.
    pub bos_token_id: Option<u32>,
    /// Last token of a sequence.
    pub eos_token_id: Option<u32>,
    /// Padding token.
    pub pad_token_id: Option<u32>,
    /// Dtype in which the weights will be stored.
    pub dtype: DType,
}

/// A checked `config.json`.
///
/// The accessors have the names of transformers' fields. Fields that this crate does not read are
/// kept when the config is written.
#[derive(Clone, Debug, PartialEq)]
pub struct HfConfig {
    raw: Map<String, Value>,
    arch: Architecture,
    intermediate_size: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    bos_token_id: Option<u32>,
    eos_token_ids: Vec<u32>,
    pad_token_id: Option<u32>,
    dtype: Option<DType>,
    quantization: Option<QuantizationConfig>,
    /// What of `quantization_config` is not supported. The weights may be plain all the same.
    refused: Option<String>,
    notices: Vec<String>,
}

impl HfConfig {
    /// Reads the `config.json` of a model folder. Adds the end-of-sequence tokens of
    /// `generation_config.json`, and reads the `quantize_config.json` of old GPTQ folders if there
    /// is no `quantization_config`. The configuration of a GGUF file is made from its metadata.
    ///
    /// An unsupported `quantization_config` is only refused by [`check`](Self::check), because
    /// some folders with plain weights have one left over; see [`fitted`](Self::fitted).
    ///
    /// # Errors
    /// Returns [`Error::Io`] or [`Error::Json`] if a file cannot be read or parsed, and the errors
    /// of [`from_json`](Self::from_json).
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = &*cache::resolve(folder.as_ref())?;
        if is_gguf(folder) {
            return Self::from_json(Gguf::open(folder)?.config()?);
        }
        let mut config = Self::parse(read_json_object(&folder.join("config.json"))?)?;
        let quantize = folder.join("quantize_config.json");
        if config.quantization.is_none() && config.refused.is_none() && quantize.exists() {
            match QuantizationConfig::from_json(read_json_object(&quantize)?) {
                Err(Error::Unsupported { what }) => config.refused = Some(what),
                quantization => config = config.with_quantization(Some(quantization?)),
            }
        }
        let generation = folder.join("generation_config.json");
        if generation.exists() {
            let generation = read_json_object(&generation)?;
            let prefix = "generation_config.";
            for id in (Fields {
                map: &generation,
                prefix,
            })
            .token_ids("eos_token_id")?
            {
                if !config.eos_token_ids.contains(&id) {
                    config.eos_token_ids.push(id);
                }
            }
        }
        Ok(config)
    }

    /// Checks a parsed `config.json`.
    ///
    /// # Errors
    /// Returns [`Error::UnsupportedArchitecture`] for an unknown model type, [`Error::Unsupported`]
    /// for an unsupported feature such as another activation or another kind of rotary embedding,
    /// and [`Error::InvalidConfig`] if a field is missing, of another type or out of range.
    pub fn from_json(raw: Map<String, Value>) -> Result<Self> {
        let config = Self::parse(raw)?;
        config.refuse_quantization()?;
        Ok(config)
    }

    fn refuse_quantization(&self) -> Result<()> {
        match &self.refused {
            Some(what) => Err(Error::Unsupported { what: what.clone() }),
            None => Ok(()),
        }
    }

    /// Parses a config whose quantization may be unsupported.
    fn parse(raw: Map<String, Value>) -> Result<Self> {
        let raw = text_config(raw)?;
        let fields = Fields {
            map: &raw,
            prefix: "",
        };
        let row = find_family(&fields)?;
        refuse_unsupported(&fields, row)?;

        let hidden_size = fields.required_size("hidden_size", MAX_WIDTH)?;
        let per_block = blocks::has(&raw);
        let intermediate_size = match fields.size("intermediate_size", MAX_WIDTH)? {
            // DeciLM's files give this size only per block.
            None if per_block => 0,
            _ => fields.required_size("intermediate_size", MAX_WIDTH)?,
        };
        let num_hidden_layers = fields.required_size("num_hidden_layers", MAX_LAYERS)?;
        let num_attention_heads = fields.required_size("num_attention_heads", MAX_HEADS)?;
        let num_key_value_heads = match (
            fields.size("num_key_value_heads", MAX_HEADS)?,
            row.key_value_heads,
        ) {
            (Some(n), _) => n,
            (None, Some(default)) if !raw.contains_key("num_key_value_heads") => default,
            (None, _) => num_attention_heads,
        };
        if num_attention_heads % num_key_value_heads != 0 {
            return Err(bad_field(
                "num_key_value_heads",
                format!(
                    "{num_key_value_heads} does not divide num_attention_heads = {num_attention_heads}"
                ),
            ));
        }
        let head_dim = match (fields.size("head_dim", MAX_HEAD_DIM)?, row.head_dim) {
            (Some(d), _) | (None, Some(d)) => d,
            (None, None) if hidden_size % num_attention_heads == 0 => {
                hidden_size / num_attention_heads
            }
            (None, None) => {
                return Err(bad_field(
                    "num_attention_heads",
                    format!(
                        "{num_attention_heads} does not divide hidden_size = {hidden_size}, and there is no head_dim"
                    ),
                ));
            }
        };
        if head_dim % 2 != 0 {
            return Err(bad_field(
                "head_dim",
                format!("{head_dim} is odd; the rotary embedding rotates pairs"),
            ));
        }
        if head_dim > MAX_HEAD_DIM || num_attention_heads * head_dim > MAX_WIDTH {
            return Err(bad_field(
                "head_dim",
                format!("{num_attention_heads} heads of {head_dim} exceed a width of {MAX_WIDTH}"),
            ));
        }
        let all = BlockDims {
            n_heads: num_attention_heads,
            n_kv_heads: num_key_value_heads,
            d_mlp: intermediate_size,
        };
        let blocks = blocks::parse(
            &raw,
            per_block,
            num_hidden_layers,
            hidden_size,
            head_dim,
            all,
        )?;
        let intermediate_size =
            intermediate_size.max(blocks.iter().map(|block| block.d_mlp).max().unwrap_or(0));
        let vocab_size = fields.required_size("vocab_size", MAX_VOCABULARY)?;
        let max_positions = fields
            .size("max_position_embeddings", MAX_POSITIONS)?
            .unwrap_or(row.max_positions);
        let rms_norm_eps = fields.f64("rms_norm_eps")?.unwrap_or(row.norm_eps);
        // A smaller epsilon is zero in f32, and the norm of a zero vector would be NaN.
        if !(rms_norm_eps >= f64::from(f32::MIN_POSITIVE) && rms_norm_eps < 1.0) {
            return Err(bad_field(
                "rms_norm_eps",
                format!("{rms_norm_eps}, expected a small positive number"),
            ));
        }
        let defaults = rope::Defaults {
            theta: row.rope_theta,
            sliding_theta: row.local_rope_theta,
            partial: (row.family == Family::Phi3).then_some(1.0),
            original_max_positions: (row.family == Family::Phi3).then_some(4096),
            yarn_is_longrope: row.family == Family::Phi3,
        };
        let rope::Parsed { full, sliding } = rope::parse(&raw, head_dim, max_positions, &defaults)?;
        let max_positions = max_positions
            .max(full.extended().unwrap_or(0))
            .min(MAX_POSITIONS);
        let positions = positions(&fields, row, num_hidden_layers, sliding.is_some())?;
        let ropes = std::iter::once(full).chain(sliding).collect();
        let flag = |name: &str| Ok::<_, Error>(fields.bool(name)?.unwrap_or(false));
        let biased = match row.biases {
            Biases::Always(kinds) => kinds.to_vec(),
            Biases::ByFields | Biases::AttentionByField => {
                let attention = flag("attention_bias")?;
                let mlp = row.biases == Biases::ByFields && flag("mlp_bias")?;
                let has = |kind: &LinearKind| match kind.sub_block() {
                    SubBlock::Attention => attention,
                    SubBlock::Mlp => mlp,
                };
                LinearKind::ALL.into_iter().filter(has).collect()
            }
        };
        let tied = fields.bool("tie_word_embeddings")?.unwrap_or(row.tied);
        let scalar = match row.query_scalar {
            None => head_dim as f64,
            Some(default) => positive(&fields, "query_pre_attn_scalar")?.unwrap_or(default),
        };
        let scores = Scores {
            scale: scalar.powf(-0.5),
            softcap: softcap(&fields, "attn_logit_softcapping", row.attention_softcap)?,
        };
        let logit_softcap = softcap(&fields, "final_logit_softcapping", row.logit_softcap)?;
        let activation = activation(&fields, row)?;
        let one = |name: &str| Ok::<_, Error>(fields.token_ids(name)?.first().copied());
        let (bos_token_id, pad_token_id) = (one("bos_token_id")?, one("pad_token_id")?);
        let eos_token_ids = fields.token_ids("eos_token_id")?;
        let dtype = parse_dtype(&fields)?;
        let (quantization, refused) = match parse_quantization(&raw) {
            Err(Error::Unsupported { what }) => (None, Some(what)),
            quantization => (quantization?, None),
        };
        let arch = Architecture {
            family: row.family,
            d_model: hidden_size,
            head_dim,
            vocab_size,
            max_positions,
            blocks,
            biased,
            norm_eps: rms_norm_eps,
            ropes,
            positions,
            scores,
            activation,
            logit_softcap,
            tied,
        };
        Ok(Self {
            arch,
            intermediate_size,
            num_attention_heads,
            num_key_value_heads,
            bos_token_id,
            eos_token_ids,
            pad_token_id,
            dtype,
            quantization,
            refused,
            notices: Vec::new(),
            raw,
        })
    }

    /// Creates the config of a new Llama, complete enough for transformers to load.
    ///
    /// # Errors
    /// Returns the errors of [`from_json`](Self::from_json), whose rules apply to the sizes.
    pub fn new_llama(dims: &LlamaDims) -> Result<Self> {
        let value = json!({
            "architectures": [Family::Llama.architecture()],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": dims.bos_token_id,
            "eos_token_id": dims.eos_token_id,
            "hidden_act": "silu",
            "hidden_size": dims.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": dims.intermediate_size,
            "max_position_embeddings": dims.max_position_embeddings,
            "mlp_bias": false,
            "model_type": Family::Llama.model_type(),
            "num_attention_heads": dims.num_attention_heads,
            "num_hidden_layers": dims.num_hidden_layers,
            "num_key_value_heads": dims.num_key_value_heads,
            "pad_token_id": dims.pad_token_id,
            "rms_norm_eps": dims.rms_norm_eps,
            "rope_scaling": null,
            "rope_theta": dims.rope_theta,
            "tie_word_embeddings": dims.tie_word_embeddings,
            "torch_dtype": dims.dtype.torch_name(),
            "use_cache": true,
            "vocab_size": dims.vocab_size,
        });
        match value {
            Value::Object(raw) => Self::from_json(raw),
            other => Err(bad_field("config", other.to_string())),
        }
    }

    /// Returns the config to write next to weights of this dtype, with the head tied or not. All
    /// other fields are kept as they were read. The dtype is set in every spelling that the input
    /// had, or in `torch_dtype`, which all readers know, if it had none.
    pub fn to_json_with(&self, dtype: DType, tie_word_embeddings: bool) -> Value {
        let mut raw = self.raw.clone();
        let name = Value::from(dtype.torch_name());
        let spellings: Vec<&str> = ["dtype", "torch_dtype"]
            .into_iter()
            .filter(|k| raw.contains_key(*k))
            .collect();
        for key in if spellings.is_empty() {
            vec!["torch_dtype"]
        } else {
            spellings
        } {
            raw.insert(key.into(), name.clone());
        }
        raw.insert("tie_word_embeddings".into(), tie_word_embeddings.into());
        Value::Object(raw)
    }

    /// Writes `config.json` into `folder` atomically; see [`to_json_with`](Self::to_json_with).
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file cannot be written.
    pub fn write(
        &self,
        folder: impl AsRef<Path>,
        dtype: DType,
        tie_word_embeddings: bool,
    ) -> Result<()> {
        atomic::write_json(
            folder.as_ref().join("config.json"),
            &self.to_json_with(dtype, tie_word_embeddings),
        )
    }

    /// Returns the architecture of the decoder.
    pub fn arch(&self) -> &Architecture {
        &self.arch
    }

    /// Returns the sizes of each block.
    pub fn blocks(&self) -> &[BlockDims] {
        &self.arch.blocks
    }

    /// Returns the config of the same model with blocks of these sizes. If all blocks are equal,
    /// the family stays a standard one. Otherwise it becomes [`Family::Deci`], if DeciLM's format
    /// can express the sizes and all its readers agree on them, or else [`Family::ElasticLlama`].
    ///
    /// # Errors
    /// Returns [`Error::InvalidConfig`] if the sizes do not make a valid model.
    pub fn with_blocks(&self, blocks: &[BlockDims]) -> Result<Self> {
        let positions = &self.arch.positions;
        // If all blocks see positions alike, there may be more of them than before.
        let alike = positions.iter().all(|at| *at == positions[0]);
        let origin = |index: usize| match alike {
            true => 0,
            false => index,
        };
        let origins: Vec<usize> = (0..blocks.len()).map(origin).collect();
        self.with_blocks_from(blocks, &origins)
    }

    /// Like [`with_blocks`](Self::with_blocks), for a model from which blocks were removed.
    /// `origins` holds, for each block, the index of the block in this model whose attention it
    /// has: it keeps that block's window and rotary positions.
    ///
    /// # Errors
    /// Returns [`Error::InvalidConfig`] if the sizes do not make a valid model, and
    /// [`Error::InvalidArgument`] if `origins` does not name one block of this model for each block.
    pub fn with_blocks_from(&self, blocks: &[BlockDims], origins: &[usize]) -> Result<Self> {
        let known = |origin: &usize| *origin < self.arch.positions.len();
        if origins.len() != blocks.len() || !origins.iter().all(known) {
            return Err(Error::argument(
                "origins",
                format!("{origins:?}"),
                format!(
                    "for each of {} blocks one of the model's {}",
                    blocks.len(),
                    self.arch.positions.len()
                ),
            ));
        }
        Self::from_json(blocks::write(self, blocks, origins)?)
    }

    /// Returns the name of the embedding in `checkpoint`: its own name or, if it is tied to the
    /// head, possibly the head's name.
    ///
    /// # Errors
    /// Returns [`Error::MissingTensor`] if there is no tensor of either name.
    pub fn embedding_name(&self, checkpoint: &Checkpoint) -> Result<&'static str> {
        if checkpoint.contains(Architecture::EMBEDDING) {
            Ok(Architecture::EMBEDDING)
        } else if self.arch.tied && checkpoint.contains(Architecture::HEAD) {
            Ok(Architecture::HEAD)
        } else {
            Err(Error::MissingTensor {
                path: checkpoint.path().to_path_buf(),
                tensor: Architecture::EMBEDDING.into(),
            })
        }
    }

    /// Checks that `checkpoint` has all tensors in the right shapes, before any of them is loaded.
    ///
    /// # Errors
    /// Returns [`Error::MissingTensor`] or [`Error::TensorShape`], [`Error::InvalidFile`] if a
    /// tensor of a quantized weight has a wrong dtype or shape, and [`Error::Unsupported`] if the
    /// config names an unsupported quantization.
    pub fn check(&self, checkpoint: &Checkpoint) -> Result<()> {
        self.refuse_quantization()?;
        let embedding = self.embedding_name(checkpoint)?;
        for (name, shape) in self.arch.tensors() {
            if self.check_quantized(checkpoint, &name, &shape)? {
                continue;
            }
            checkpoint.check_shape(
                if name == Architecture::EMBEDDING {
                    embedding
                } else {
                    &name
                },
                &shape,
            )?;
        }
        Ok(())
    }

    /// Returns how the linear layers are quantized, or `None` for a dense model.
    pub fn quantization(&self) -> Option<&QuantizationConfig> {
        self.quantization.as_ref()
    }

    /// Returns the config of the same model with this quantization, or dense for `None`.
    pub fn with_quantization(&self, quantization: Option<QuantizationConfig>) -> Self {
        let mut config = self.clone();
        config.raw.shift_remove("quantization_config");
        if let Some(quantization) = &quantization {
            config.raw.insert(
                "quantization_config".into(),
                Value::Object(quantization.raw().clone()),
            );
        }
        config.quantization = quantization;
        config.refused = None;
        config
    }

    /// Returns the config of the same model with a vocabulary of this size, and with the head tied
    /// to the embedding or not.
    pub(crate) fn with_vocabulary(&self, vocab_size: usize, tied: bool) -> Self {
        let mut config = self.clone();
        config.arch.vocab_size = vocab_size;
        config.arch.tied = tied;
        config.raw.insert("vocab_size".into(), vocab_size.into());
        config.raw.insert("tie_word_embeddings".into(), tied.into());
        config
    }

    /// What of `quantization_config` is not supported.
    pub(super) fn refused(&self) -> Option<&str> {
        self.refused.as_deref()
    }

    /// Gives the model a head of its own.
    pub(super) fn untie(&mut self) {
        self.arch.tied = false;
        self.raw.insert("tie_word_embeddings".into(), false.into());
    }

    /// Adds a notice.
    pub(super) fn notice(&mut self, sentence: String) {
        self.notices.push(sentence);
    }

    /// Returns sentences about what is stored in the model's files and not used, or used in
    /// another way than the files say. [`fitted`](Self::fitted) collects them.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Returns all fields as they were read.
    pub fn raw(&self) -> &Map<String, Value> {
        &self.raw
    }

    /// Returns the tokens that end a sequence. The list is empty if the config names none.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }

    /// Returns the tokens that end a generation: those of the config, or `fallback` if it names none.
    pub(crate) fn stop_ids(&self, fallback: Option<u32>) -> Vec<u32> {
        if self.eos_token_ids.is_empty() {
            fallback.into_iter().collect()
        } else {
            self.eos_token_ids.clone()
        }
    }
}

macro_rules! getters {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $($field:ident).+,)*) => {
        impl HfConfig {
            $($(#[$doc])* pub fn $name(&self) -> $type { self.$($field).+ })*
        }
    };
}

getters! {
    /// The family.
    family: Family = arch.family,
    /// Width of the residual stream.
    hidden_size: usize = arch.d_model,
    /// Width inside the MLP; the largest one if blocks differ.
    intermediate_size: usize = intermediate_size,
    /// Number of query heads, if [`blocks`](HfConfig::blocks) do not differ.
    num_attention_heads: usize = num_attention_heads,
    /// Number of key/value heads, if [`blocks`](HfConfig::blocks) do not differ; divides the number
    /// of query heads.
    num_key_value_heads: usize = num_key_value_heads,
    /// Number of features per head; even.
    head_dim: usize = arch.head_dim,
    /// Number of tokens in the vocabulary.
    vocab_size: usize = arch.vocab_size,
    /// Context length in tokens. With dynamic scaling or YaRN it may be larger than the field.
    max_position_embeddings: usize = arch.max_positions,
    /// Epsilon of the norms.
    rms_norm_eps: f64 = arch.norm_eps,
    /// Whether embedding and head share one matrix.
    tie_word_embeddings: bool = arch.tied,
    /// First token of a sequence.
    bos_token_id: Option<u32> = bos_token_id,
    /// Padding token.
    pad_token_id: Option<u32> = pad_token_id,
    /// Dtype of the weights according to the config. The dtypes in the checkpoint take precedence.
    dtype: Option<DType> = dtype,
}

impl HfConfig {
    /// Base of the rotary embedding; in layers with a window it may be another
    /// ([`Architecture::ropes`]).
    pub fn rope_theta(&self) -> f64 {
        self.arch.ropes[0].theta
    }

    /// Scaling of the rotary embedding; layers with a window may have another
    /// ([`Architecture::ropes`]).
    pub fn rope_scaling(&self) -> &RopeScaling {
        &self.arch.ropes[0].scaling
    }

    /// Number of positions that a token attends to, including its own, in the layers that have a
    /// window ([`Architecture::positions`]); `None` if no layer has one.
    pub fn sliding_window(&self) -> Option<usize> {
        self.arch
            .positions
            .iter()
            .find_map(|positions| positions.window)
    }

    /// Returns the number of blocks.
    pub fn num_hidden_layers(&self) -> usize {
        self.arch.blocks.len()
    }
}

fn find_family(fields: &Fields<'_>) -> Result<&'static FamilyRow> {
    let unsupported = |found: &str| Error::UnsupportedArchitecture {
        found: found.into(),
        supported: Family::supported(),
    };
    let architecture = match fields.map.get("architectures") {
        None | Some(Value::Null) => None,
        Some(Value::Array(list)) => match list.first() {
            None => None,
            Some(Value::String(name)) => Some(name.as_str()),
            Some(other) => {
                return Err(bad_field(
                    "architectures",
                    format!("{other}, expected a name"),
                ));
            }
        },
        Some(other) => {
            return Err(bad_field(
                "architectures",
                format!("{other}, expected a list of names"),
            ));
        }
    };
    let model_type = fields.str("model_type")?;
    let Some(found) = model_type.or(architecture) else {
        return Err(bad_field("model_type", "missing"));
    };
    let row = FAMILIES
        .iter()
        .find(|row| {
            if model_type.is_some() {
                row.model_type == found
            } else {
                row.architecture == found
            }
        })
        .ok_or_else(|| unsupported(found))?;
    if let Some(name) = architecture.filter(|name| *name != row.architecture) {
        return Err(unsupported(name));
    }
    // This format only describes blocks that differ; `base_model_type` names the family of the
    // model.
    match fields.str(blocks::BASE_FAMILY)? {
        Some(base) if row.family == Family::ElasticLlama => FAMILIES
            .iter()
            .find(|row| row.elastic_base && row.model_type == base)
            .ok_or_else(|| unsupported(base)),
        _ => Ok(row),
    }
}

/// Refuses fields that would change the result of the model and that this crate does not support.
fn refuse_unsupported(fields: &Fields<'_>, row: &FamilyRow) -> Result<()> {
    let bidirectional = "use_bidirectional_attention";
    if fields.bool(bidirectional)?.unwrap_or(false) {
        return Err(Error::Unsupported {
            what: format!(
                "{}: config field `{bidirectional}` = true",
                row.architecture
            ),
        });
    }
    Ok(())
}

/// Model types that hold a text model beside others, and the type of the text model.
const MULTIMODAL: [(&str, Family); 1] = [("gemma3", Family::Gemma3)];

/// Replaces the config of a model for several kinds of input by that of its text model. Fields of
/// the text model that are absent have the values of transformers' class.
fn text_config(mut raw: Map<String, Value>) -> Result<Map<String, Value>> {
    let model_type = raw.get("model_type").and_then(Value::as_str);
    let Some((_, family)) = MULTIMODAL
        .iter()
        .find(|(name, _)| Some(*name) == model_type)
    else {
        return Ok(raw);
    };
    let mut text = match raw.remove("text_config") {
        Some(Value::Object(text)) => text,
        other => {
            let found = other.map_or("missing".into(), |value| value.to_string());
            return Err(bad_field(
                "text_config",
                format!("{found}, expected an object"),
            ));
        }
    };
    text.insert("model_type".into(), family.model_type().into());
    text.insert("architectures".into(), json!([family.architecture()]));
    let defaults = [
        ("vocab_size", 262_208),
        ("hidden_size", 2304),
        ("intermediate_size", 9216),
        ("num_hidden_layers", 26),
        ("num_attention_heads", 8),
    ];
    for (field, value) in defaults {
        text.entry(field).or_insert(value.into());
    }
    // Fields of the whole model that hold for the text, too.
    let shared = [
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
        "dtype",
        "torch_dtype",
        "quantization_config",
        "transformers_version",
    ];
    for field in shared {
        if let Some(value) = raw.remove(field) {
            text.insert(field.into(), value);
        }
    }
    Ok(text)
}

/// A field with a positive number.
fn positive(fields: &Fields<'_>, name: &str) -> Result<Option<f64>> {
    let value = fields.f64(name)?;
    match value.filter(|value| !(value.is_finite() && *value > 0.0)) {
        Some(bad) => Err(bad_field(
            name,
            format!("{bad}, expected a positive number"),
        )),
        None => Ok(value),
    }
}

fn softcap(fields: &Fields<'_>, name: &str, rule: SoftCap) -> Result<Option<f64>> {
    match rule {
        SoftCap::Field(default) if !fields.map.contains_key(name) => Ok(default),
        SoftCap::Field(_) => positive(fields, name),
        SoftCap::None => match fields.f64(name)? {
            Some(value) => Err(Error::Unsupported {
                what: format!("config field `{name}` = {value}"),
            }),
            None => Ok(None),
        },
    }
}

fn activation(fields: &Fields<'_>, row: &FamilyRow) -> Result<Activation> {
    let (field, default) = row.activation;
    match fields.str(field)? {
        None => Ok(default),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
        Some("gelu") if row.gelu_is_tanh => Ok(Activation::GeluTanh),
        Some(other) => Err(Error::Unsupported {
            what: format!("activation `{other}` (config field `{field}`)"),
        }),
    }
}

/// A list with one item for each layer; longer lists are cut, as in transformers.
fn by_layer<'a>(fields: &Fields<'a>, name: &str, n: usize) -> Result<Option<&'a [Value]>> {
    match fields.map.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(items)) if items.len() >= n => Ok(Some(&items[..n])),
        Some(other) => {
            let found = match other {
                Value::Array(items) => format!("{} items", items.len()),
                other => other.to_string(),
            };
            Err(bad_field(name, format!("{found}, expected a list of {n}")))
        }
    }
}

/// Parses how each layer sees positions. If `local`, layers with a window have the second rotary
/// embedding.
fn positions(
    fields: &Fields<'_>,
    row: &FamilyRow,
    n: usize,
    local: bool,
) -> Result<Vec<Positions>> {
    let rotated = rotated_layers(fields, row, n)?;
    let window = |default| match fields.map.contains_key("sliding_window") {
        false => Ok(default),
        true => fields.size("sliding_window", MAX_POSITIONS),
    };
    let flag = |name: &str| Ok::<_, Error>(fields.bool(name)?.unwrap_or(false));
    let (window, windowed) = match row.windows {
        Windows::Full => (None, vec![false; n]),
        Windows::AllLayers { default } => (window(default)?, vec![true; n]),
        Windows::ByLayer { rule, default } => {
            let on = match rule {
                WindowRule::FromLayer { .. } | WindowRule::WithoutRope => {
                    flag("use_sliding_window")?
                }
                WindowRule::AllButEvery(_) => true,
            };
            let window = if on { window(default)? } else { None };
            (window, windowed_layers(fields, rule, &rotated)?)
        }
    };
    let one = |(windowed, rotated): (bool, bool)| {
        let window = window.filter(|_| windowed);
        let rope = rotated.then_some(usize::from(local && windowed));
        Positions { window, rope }
    };
    Ok(windowed.into_iter().zip(rotated).map(one).collect())
}

/// The layers that have rotary positions.
fn rotated_layers(fields: &Fields<'_>, row: &FamilyRow, n: usize) -> Result<Vec<bool>> {
    if !row.without_rope {
        return Ok(vec![true; n]);
    }
    let name = "no_rope_layers";
    let Some(items) = by_layer(fields, name, n)? else {
        let interval = fields.size("no_rope_layer_interval", n.max(1) + MAX_LAYERS)?;
        let interval = interval.unwrap_or(4);
        return Ok((1..=n).map(|layer| layer % interval != 0).collect());
    };
    // In spite of the field's name, 1 stands for a layer with rotary positions.
    let rotated = |item: &Value| match item.as_u64() {
        Some(0) => Ok(false),
        Some(1) => Ok(true),
        _ => Err(bad_field(name, format!("{item}, expected 0 or 1"))),
    };
    items.iter().map(rotated).collect()
}

/// The layers with a window, if there is one.
fn windowed_layers(fields: &Fields<'_>, rule: WindowRule, rotated: &[bool]) -> Result<Vec<bool>> {
    let (name, n) = ("layer_types", rotated.len());
    if let Some(items) = by_layer(fields, name, n)? {
        let windowed = |item: &Value| match item.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => Err(bad_field(
                name,
                format!("{item}, expected `full_attention` or `sliding_attention`"),
            )),
        };
        return items.iter().map(windowed).collect();
    }
    let layers = 0..n;
    Ok(match rule {
        WindowRule::FromLayer { default } => {
            let name = "max_window_layers";
            let first = match fields.map.get(name).and_then(Value::as_u64) {
                Some(first) => usize::try_from(first).unwrap_or(usize::MAX),
                None => fields.size(name, MAX_LAYERS)?.unwrap_or(default),
            };
            layers.map(|layer| layer >= first).collect()
        }
        WindowRule::WithoutRope => rotated.iter().map(|rotated| !rotated).collect(),
        WindowRule::AllButEvery(default) => {
            let every = fields
                .size("sliding_window_pattern", MAX_LAYERS)?
                .unwrap_or(default);
            layers.map(|layer| (layer + 1) % every != 0).collect()
        }
    })
}

fn parse_quantization(raw: &Map<String, Value>) -> Result<Option<QuantizationConfig>> {
    match raw.get("quantization_config") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(fields)) => QuantizationConfig::from_json(fields.clone()).map(Some),
        Some(other) => Err(bad_field(
            "quantization_config",
            format!("{other}, expected an object"),
        )),
    }
}

fn parse_dtype(fields: &Fields<'_>) -> Result<Option<DType>> {
    for key in ["dtype", "torch_dtype"] {
        match fields.str(key)? {
            None | Some("auto") => {}
            Some(name) => {
                return match DType::from_torch_name(name) {
                    Some(dtype) => Ok(Some(dtype)),
                    None => Err(Error::Unsupported {
                        what: format!("config field `{key}` = `{name}`"),
                    }),
                };
            }
        }
    }
    Ok(None)
}
