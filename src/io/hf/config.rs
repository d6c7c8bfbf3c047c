//! `config.json`: what makes a decoder, checked.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::blocks::{self, BlockDims};
use super::rope::{self, RopeScaling};
use crate::error::{Error, Result};
use crate::io::fields::{Fields, bad_field};
use crate::io::quantized::QuantizationConfig;
use crate::io::tensors::{Checkpoint, DType};
use crate::io::{atomic, read_json_object};

/// The model families that are read. A family is a row of settings; the decoder is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Family {
    /// Llama 1 to 3.2 and everything that calls itself `llama`.
    Llama,
    /// Mistral 7B, Nemo and kin: Llama with a sliding window and without biases.
    Mistral,
    /// Llama whose blocks differ in key/value heads and MLP width or lack an attention: DeciLM, "Nemotron-NAS" (`block_configs`).
    Deci,
    /// Llama whose blocks differ in more than `block_configs` can say elsewhere, such as their number of query heads: this
    /// crate's own, `block_configs` with the sizes in full.
    ElasticLlama,
}

/// How a family differs from the others; absent fields take these values, which are transformers'.
struct Traits {
    family: Family,
    model_type: &'static str,
    architecture: &'static str,
    /// Key/value heads where the field is absent; `None` for as many as heads.
    key_value_heads: Option<usize>,
    /// Whether `sliding_window` is read, and its value where the field is absent.
    sliding_window: Option<Option<usize>>,
    /// Whether `attention_bias` and `mlp_bias` are read.
    biases: bool,
    max_positions: usize,
}

const FAMILIES: [Traits; 4] = [
    Traits {
        family: Family::Llama,
        model_type: "llama",
        architecture: "LlamaForCausalLM",
        key_value_heads: None,
        sliding_window: None,
        biases: true,
        max_positions: 2048,
    },
    Traits {
        family: Family::Mistral,
        model_type: "mistral",
        architecture: "MistralForCausalLM",
        key_value_heads: Some(8),
        sliding_window: Some(Some(4096)),
        biases: false,
        max_positions: 131_072,
    },
    Traits {
        family: Family::Deci,
        model_type: "nemotron-nas",
        architecture: "DeciLMForCausalLM",
        key_value_heads: None,
        sliding_window: None,
        biases: true,
        max_positions: 2048,
    },
    Traits {
        family: Family::ElasticLlama,
        model_type: "elastic-llama",
        architecture: "ElasticLlamaForCausalLM",
        key_value_heads: None,
        sliding_window: Some(None),
        biases: true,
        max_positions: 2048,
    },
];

const SUPPORTED: &str = "llama (LlamaForCausalLM), mistral (MistralForCausalLM), nemotron-nas (DeciLMForCausalLM), \
                         elastic-llama (ElasticLlamaForCausalLM)";

// Caps, well above any model there is, so that no product of two of them overflows and no list of layers fills memory.
pub(super) const MAX_WIDTH: usize = 1 << 22;
const MAX_LAYERS: usize = 1 << 12;
pub(super) const MAX_HEADS: usize = 1 << 14;
const MAX_HEAD_DIM: usize = 1 << 14;
const MAX_VOCABULARY: usize = 1 << 26;
const MAX_POSITIONS: usize = 1 << 31;

impl Family {
    fn traits(self) -> &'static Traits {
        match self {
            Family::Llama => &FAMILIES[0],
            Family::Mistral => &FAMILIES[1],
            Family::Deci => &FAMILIES[2],
            Family::ElasticLlama => &FAMILIES[3],
        }
    }

    /// `model_type` as it stands in `config.json`.
    pub fn model_type(self) -> &'static str {
        self.traits().model_type
    }

    /// The class that transformers loads it with.
    pub fn architecture(self) -> &'static str {
        self.traits().architecture
    }
}

/// A linear layer inside a block, as a config implies it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearLayer {
    /// Module path, such as `model.layers.0.self_attn.q_proj`; the weight is `<name>.weight`, `[d_output, d_input]`.
    pub name: String,
    /// The block it is in, from 0.
    pub block: usize,
    /// Output features.
    pub d_output: usize,
    /// Input features.
    pub d_input: usize,
    /// Whether there is a `<name>.bias`, `[d_output]`.
    pub bias: bool,
}

/// The sizes of a Llama made from code; see [`HfConfig::new_llama`].
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaDims {
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Context length in tokens.
    pub max_position_embeddings: usize,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// Epsilon of the norms.
    pub rms_norm_eps: f64,
    /// Whether embedding and head are one matrix.
    pub tie_word_embeddings: bool,
    /// First token of a sequence.
    pub bos_token_id: Option<u32>,
    /// Last token of a sequence.
    pub eos_token_id: Option<u32>,
    /// Filler.
    pub pad_token_id: Option<u32>,
    /// Element type that the weights will be stored in.
    pub dtype: DType,
}

/// A checked `config.json`.
///
/// The fields carry transformers' names. Fields that are not read here stay in the file when it is written again.
#[derive(Clone, Debug, PartialEq)]
pub struct HfConfig {
    raw: Map<String, Value>,
    family: Family,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    blocks: Vec<BlockDims>,
    head_dim: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    rope_theta: f64,
    rope_scaling: RopeScaling,
    sliding_window: Option<usize>,
    tie_word_embeddings: bool,
    attention_bias: bool,
    mlp_bias: bool,
    bos_token_id: Option<u32>,
    eos_token_ids: Vec<u32>,
    pad_token_id: Option<u32>,
    dtype: Option<DType>,
    quantization: Option<QuantizationConfig>,
}

impl HfConfig {
    /// Reads `config.json` of a model folder, the end-of-sequence tokens that `generation_config.json` adds to it, and the
    /// `quantize_config.json` that old GPTQ folders have in place of `quantization_config`.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Json`] for the files, and those of [`from_json`](Self::from_json).
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let mut config = Self::from_json(read_json_object(&folder.join("config.json"))?)?;
        let quantize = folder.join("quantize_config.json");
        if config.quantization.is_none() && quantize.exists() {
            let quantization = QuantizationConfig::from_json(read_json_object(&quantize)?)?;
            config = config.with_quantization(Some(quantization));
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
    /// [`Error::UnsupportedArchitecture`]; [`Error::Unsupported`] for a feature such as another activation or another kind
    /// of rotary embedding; [`Error::InvalidConfig`] for a field that is missing, of another type, or makes no model.
    pub fn from_json(raw: Map<String, Value>) -> Result<Self> {
        let fields = Fields {
            map: &raw,
            prefix: "",
        };
        let traits = find_family(&fields)?;
        refuse_unsupported(&fields)?;

        let hidden_size = fields.required_size("hidden_size", MAX_WIDTH)?;
        let per_block = blocks::has(&raw);
        let intermediate_size = match fields.size("intermediate_size", MAX_WIDTH)? {
            // DeciLM's files say it per block alone.
            None if per_block => 0,
            _ => fields.required_size("intermediate_size", MAX_WIDTH)?,
        };
        let num_hidden_layers = fields.required_size("num_hidden_layers", MAX_LAYERS)?;
        let num_attention_heads = fields.required_size("num_attention_heads", MAX_HEADS)?;
        let num_key_value_heads = match (
            fields.size("num_key_value_heads", MAX_HEADS)?,
            traits.key_value_heads,
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
        let head_dim = match fields.size("head_dim", MAX_HEAD_DIM)? {
            Some(d) => d,
            None if hidden_size % num_attention_heads == 0 => hidden_size / num_attention_heads,
            None => {
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
                format!("{head_dim} is odd; the rotary embedding turns pairs"),
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
        let max_position_embeddings = fields
            .size("max_position_embeddings", MAX_POSITIONS)?
            .unwrap_or(traits.max_positions);
        let rms_norm_eps = fields.f64("rms_norm_eps")?.unwrap_or(1e-6);
        // f32 arithmetic sees a smaller one as zero, and a norm of zeros would then be NaN.
        if !(rms_norm_eps >= f64::from(f32::MIN_POSITIVE) && rms_norm_eps < 1.0) {
            return Err(bad_field(
                "rms_norm_eps",
                format!("{rms_norm_eps}, expected a small positive number"),
            ));
        }
        let (rope_theta, rope_scaling) = rope::parse(&raw)?;
        let sliding_window = match traits.sliding_window {
            None => None,
            Some(default) if !raw.contains_key("sliding_window") => default,
            Some(_) => fields.size("sliding_window", MAX_POSITIONS)?,
        };
        let flag = |name: &str| Ok::<_, Error>(fields.bool(name)?.unwrap_or(false));
        let (attention_bias, mlp_bias) = if traits.biases {
            (flag("attention_bias")?, flag("mlp_bias")?)
        } else {
            (false, false)
        };
        let tie_word_embeddings = flag("tie_word_embeddings")?;
        let one = |name: &str| Ok::<_, Error>(fields.token_ids(name)?.first().copied());
        let (bos_token_id, pad_token_id) = (one("bos_token_id")?, one("pad_token_id")?);
        let eos_token_ids = fields.token_ids("eos_token_id")?;
        let dtype = parse_dtype(&fields)?;
        let quantization = parse_quantization(&raw)?;
        Ok(Self {
            family: traits.family,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            blocks,
            head_dim,
            vocab_size,
            max_position_embeddings,
            rms_norm_eps,
            rope_theta,
            rope_scaling,
            sliding_window,
            tie_word_embeddings,
            attention_bias,
            mlp_bias,
            bos_token_id,
            eos_token_ids,
            pad_token_id,
            dtype,
            quantization,
            raw,
        })
    }

    /// The config of a new Llama, complete enough for transformers to load.
    ///
    /// # Errors
    /// Those of [`from_json`](Self::from_json): the sizes are checked by the same rules as a file's.
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

    /// The config to write beside weights of element type `dtype`, with the head tied or not: all fields as they were read,
    /// these two set, in every spelling that the input had (`torch_dtype` where it had none: all readers know it).
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

    /// Writes `config.json` into `folder`, atomically; see [`to_json_with`](Self::to_json_with).
    ///
    /// # Errors
    /// [`Error::Io`].
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

    /// The linear layers of all blocks in model order: q, k, v, o, gate, up, down of block 0, then of block 1, and so on; those
    /// that a block lacks are left out.
    pub fn linear_layers(&self) -> Vec<LinearLayer> {
        let hidden = self.hidden_size;
        let of_block = |(block, dims): (usize, &BlockDims)| {
            let (attention, key_value) = (
                dims.n_heads * self.head_dim,
                dims.n_kv_heads * self.head_dim,
            );
            let shapes = [
                ("self_attn.q_proj", attention, hidden, self.attention_bias),
                ("self_attn.k_proj", key_value, hidden, self.attention_bias),
                ("self_attn.v_proj", key_value, hidden, self.attention_bias),
                ("self_attn.o_proj", hidden, attention, self.attention_bias),
                ("mlp.gate_proj", dims.d_mlp, hidden, self.mlp_bias),
                ("mlp.up_proj", dims.d_mlp, hidden, self.mlp_bias),
                ("mlp.down_proj", hidden, dims.d_mlp, self.mlp_bias),
            ];
            shapes
                .into_iter()
                .filter(|shape| shape.1 > 0 && shape.2 > 0)
                .map(move |(name, d_output, d_input, bias)| LinearLayer {
                    name: format!("model.layers.{block}.{name}"),
                    block,
                    d_output,
                    d_input,
                    bias,
                })
        };
        self.blocks.iter().enumerate().flat_map(of_block).collect()
    }

    /// The sizes of each block.
    pub fn blocks(&self) -> &[BlockDims] {
        &self.blocks
    }

    /// The same model with blocks of these sizes. Where all are alike, the family stays; else it becomes [`Family::Deci`],
    /// if DeciLM's form can say these sizes and its readers agree on what they mean, or [`Family::ElasticLlama`].
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for sizes that make no model.
    pub fn with_blocks(&self, blocks: &[BlockDims]) -> Result<Self> {
        Self::from_json(blocks::write(self, blocks)?)
    }

    /// Name of the embedding, `[vocab_size, hidden_size]`.
    pub const EMBEDDING: &'static str = "model.embed_tokens.weight";
    /// Name of the head, `[vocab_size, hidden_size]`; absent where it is tied.
    pub const HEAD: &'static str = "lm_head.weight";
    /// Name of the last norm, `[hidden_size]`.
    pub const FINAL_NORM: &'static str = "model.norm.weight";

    /// Name of the norm before the attention of `block`, `[hidden_size]`.
    pub fn input_norm(block: usize) -> String {
        format!("model.layers.{block}.input_layernorm.weight")
    }

    /// Name of the norm before the MLP of `block`, `[hidden_size]`.
    pub fn post_attention_norm(block: usize) -> String {
        format!("model.layers.{block}.post_attention_layernorm.weight")
    }

    /// Where `checkpoint` keeps the embedding: under its own name or, when tied, possibly under the head's.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] where it is under neither.
    pub fn embedding_name(&self, checkpoint: &Checkpoint) -> Result<&'static str> {
        if checkpoint.contains(Self::EMBEDDING) {
            Ok(Self::EMBEDDING)
        } else if self.tie_word_embeddings && checkpoint.contains(Self::HEAD) {
            Ok(Self::HEAD)
        } else {
            Err(Error::MissingTensor {
                path: checkpoint.path().to_path_buf(),
                tensor: Self::EMBEDDING.into(),
            })
        }
    }

    /// The names and shapes of all tensors that a checkpoint of this config holds, in model order; a tied head is not among
    /// them.
    pub fn tensor_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.hidden_size;
        let mut all = vec![(Self::EMBEDDING.to_string(), vec![self.vocab_size, hidden])];
        let mut block = None;
        for layer in self.linear_layers() {
            if block != Some(layer.block) {
                block = Some(layer.block);
                let dims = self.blocks[layer.block];
                if dims.has_attention() {
                    all.push((Self::input_norm(layer.block), vec![hidden]));
                }
                if dims.has_mlp() {
                    all.push((Self::post_attention_norm(layer.block), vec![hidden]));
                }
            }
            all.push((
                format!("{}.weight", layer.name),
                vec![layer.d_output, layer.d_input],
            ));
            if layer.bias {
                all.push((format!("{}.bias", layer.name), vec![layer.d_output]));
            }
        }
        all.push((Self::FINAL_NORM.into(), vec![hidden]));
        if !self.tie_word_embeddings {
            all.push((Self::HEAD.into(), vec![self.vocab_size, hidden]));
        }
        all
    }

    /// Checks that `checkpoint` holds every tensor in its shape, before anything is loaded.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] and [`Error::TensorShape`]; [`Error::InvalidFile`] for the parts of a quantized weight.
    pub fn check(&self, checkpoint: &Checkpoint) -> Result<()> {
        let embedding = self.embedding_name(checkpoint)?;
        for (name, shape) in self.tensor_shapes() {
            if self.check_quantized(checkpoint, &name, &shape)? {
                continue;
            }
            checkpoint.check_shape(
                if name == Self::EMBEDDING {
                    embedding
                } else {
                    &name
                },
                &shape,
            )?;
        }
        Ok(())
    }

    /// How the checkpoint's linear layers are quantized, where they are.
    pub fn quantization(&self) -> Option<&QuantizationConfig> {
        self.quantization.as_ref()
    }

    /// The same model with its layers quantized like this, or dense.
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
        config
    }

    /// All fields as they were read.
    pub fn raw(&self) -> &Map<String, Value> {
        &self.raw
    }

    /// The tokens that end a sequence; empty where none is named.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }
}

macro_rules! getters {
    ($($(#[$doc:meta])* $name:ident: $type:ty,)*) => {
        impl HfConfig {
            $($(#[$doc])* pub fn $name(&self) -> $type { self.$name })*
        }
    };
}

getters! {
    /// The family.
    family: Family,
    /// Width of the residual stream.
    hidden_size: usize,
    /// Width inside the MLP; the widest block's where they differ.
    intermediate_size: usize,
    /// Number of blocks.
    num_hidden_layers: usize,
    /// Query heads, where [`blocks`](HfConfig::blocks) do not differ.
    num_attention_heads: usize,
    /// Key/value heads, where [`blocks`](HfConfig::blocks) do not differ; divides the query heads.
    num_key_value_heads: usize,
    /// Features per head; even.
    head_dim: usize,
    /// Tokens in the vocabulary.
    vocab_size: usize,
    /// Context length in tokens.
    max_position_embeddings: usize,
    /// Epsilon of the norms.
    rms_norm_eps: f64,
    /// Base of the rotary embedding.
    rope_theta: f64,
    /// Scaling of the rotary embedding.
    rope_scaling: RopeScaling,
    /// Number of last positions, its own among them, that a token attends to; `None` for all.
    sliding_window: Option<usize>,
    /// Whether embedding and head are one matrix.
    tie_word_embeddings: bool,
    /// Whether q, k, v and o have biases.
    attention_bias: bool,
    /// Whether gate, up and down have biases.
    mlp_bias: bool,
    /// First token of a sequence.
    bos_token_id: Option<u32>,
    /// Filler.
    pad_token_id: Option<u32>,
    /// Element type of the weights, as the config says; the checkpoint's own types are what counts.
    dtype: Option<DType>,
}

fn find_family(fields: &Fields<'_>) -> Result<&'static Traits> {
    let unsupported = |found: &str| Error::UnsupportedArchitecture {
        found: found.into(),
        supported: SUPPORTED,
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
    let traits = FAMILIES
        .iter()
        .find(|t| {
            if model_type.is_some() {
                t.model_type == found
            } else {
                t.architecture == found
            }
        })
        .ok_or_else(|| unsupported(found))?;
    match architecture {
        Some(name) if name != traits.architecture => Err(unsupported(name)),
        _ => Ok(traits),
    }
}

/// Fields that would change what the model computes and that nothing here implements.
fn refuse_unsupported(fields: &Fields<'_>) -> Result<()> {
    let refuse = |what: String| Err(Error::Unsupported { what });
    if let Some(act) = fields.str("hidden_act")?
        && !matches!(act, "silu" | "swish")
    {
        return refuse(format!("activation `{act}` (config field `hidden_act`)"));
    }
    if let Some(share) = fields.f64("partial_rotary_factor")?
        && share != 1.0
    {
        return refuse(format!("config field `partial_rotary_factor` = {share}"));
    }
    Ok(())
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
