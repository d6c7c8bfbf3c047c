//! Configuration and tensor names of the equivalent Hugging Face folder.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::blocks::Encoding;
use super::container;
use super::families::{LONG_FACTORS, SHORT_FACTORS};
use super::layout::Layout;
use super::{Entry, Gguf};
use crate::arch::family::Windows;
use crate::arch::{
    Architecture, BlockDims, Family, LinearKind, NormKind, Rope, RopeConfig, RopeScaling,
};
use crate::error::{Error, Result};
use crate::io::tensors::TensorInfo;
use crate::io::{DType, HfConfig};

/// A model family of llama.cpp.
pub(super) struct Row {
    /// `general.architecture`.
    pub name: &'static str,
    /// The family that a file is read as.
    pub family: Family,
    /// The families that are written as this one.
    pub written: &'static [Family],
    /// Whether the rows of queries and keys are permuted.
    pub permuted: bool,
    /// Whether blocks may differ in their sizes.
    pub per_block: bool,
    /// Modules whose bias llama.cpp reads. It refuses a file with another.
    pub biases: &'static [&'static str],
    /// Keys that only this architecture has.
    pub keys: &'static [&'static str],
}

const LLAMA: Row = Row {
    name: "llama",
    family: Family::Llama,
    written: &[
        Family::Llama,
        Family::Mistral,
        Family::Deci,
        Family::ElasticLlama,
    ],
    permuted: true,
    per_block: false,
    biases: &[
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "ffn_gate",
        "ffn_up",
        "ffn_down",
    ],
    keys: &[],
};

const GEMMA: Row = Row {
    name: "gemma",
    family: Family::Gemma,
    written: &[Family::Gemma],
    permuted: false,
    biases: &[],
    ..LLAMA
};

const FAMILIES: [Row; 9] = [
    LLAMA,
    Row {
        name: "deci",
        per_block: true,
        ..LLAMA
    },
    Row {
        name: "qwen2",
        family: Family::Qwen2,
        written: &[Family::Qwen2],
        permuted: false,
        biases: &["attn_q", "attn_k", "attn_v"],
        ..LLAMA
    },
    Row {
        name: "qwen3",
        family: Family::Qwen3,
        written: &[Family::Qwen3],
        permuted: false,
        biases: &[],
        ..LLAMA
    },
    Row {
        name: "smollm3",
        family: Family::SmolLm3,
        written: &[Family::SmolLm3],
        biases: &[],
        ..LLAMA
    },
    GEMMA,
    Row {
        name: "gemma2",
        family: Family::Gemma2,
        written: &[Family::Gemma2],
        keys: &["attn_logit_softcapping", "final_logit_softcapping"],
        ..GEMMA
    },
    Row {
        name: "gemma3",
        family: Family::Gemma3,
        written: &[Family::Gemma3],
        keys: &["final_logit_softcapping", "rope.freq_base_swa"],
        ..GEMMA
    },
    Row {
        name: "phi3",
        family: Family::Phi3,
        written: &[Family::Phi3],
        permuted: false,
        biases: &[],
        keys: &["rope.scaling.attn_factor"],
        ..LLAMA
    },
];

/// Name of a norm of a block.
fn norm_part(kind: NormKind) -> &'static str {
    match kind {
        NormKind::Attention => "attn_norm",
        NormKind::Q => "attn_q_norm",
        NormKind::K => "attn_k_norm",
        NormKind::AttentionOut => "post_attention_norm",
        NormKind::Mlp => "ffn_norm",
        NormKind::MlpOut => "post_ffw_norm",
    }
}

/// Name of a linear layer of a block, or of the matrix that holds it together with others.
fn linear_part(kind: LinearKind, fused: bool) -> &'static str {
    match kind {
        LinearKind::Q | LinearKind::K | LinearKind::V if fused => "attn_qkv",
        LinearKind::Gate if fused => "ffn_up",
        LinearKind::Q => "attn_q",
        LinearKind::K => "attn_k",
        LinearKind::V => "attn_v",
        LinearKind::O => "attn_output",
        LinearKind::Gate => "ffn_gate",
        LinearKind::Up => "ffn_up",
        LinearKind::Down => "ffn_down",
    }
}

pub(super) const EMBEDDING: &str = "token_embd.weight";
pub(super) const HEAD: &str = "output.weight";
const FINAL_NORM: &str = "output_norm.weight";
/// End of the names of norms.
pub(super) const NORM: &str = "norm.weight";
pub(super) const DIVISORS: &str = "rope_freqs.weight";

/// Names of the tensors outside the blocks, in GGUF and Hugging Face.
const OUTSIDE: [(&str, &str); 3] = [
    (EMBEDDING, Architecture::EMBEDDING),
    (HEAD, Architecture::HEAD),
    (FINAL_NORM, Architecture::FINAL_NORM),
];

/// Keys of an architecture that are read, or that do not change the model.
const KNOWN: [&str; 19] = [
    "attention.causal",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "vocab_size",
];

/// Largest number of blocks with sizes of their own.
const MAX_BLOCKS: usize = 1 << 12;

/// Keys of tokens that end a text.
const ENDS: [&str; 3] = ["eos_token_id", "eot_token_id", "eom_token_id"];

impl Row {
    /// Modules of a block, with their names in GGUF and Hugging Face. Modules that share a name in
    /// GGUF are stacked there.
    fn parts(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let family = self.family.row();
        let norms = family.norms.iter();
        let norms = norms.map(|(kind, module)| (norm_part(*kind), *module));
        let linears = LinearKind::ALL.into_iter().map(|kind| {
            let fused = family.fused.iter().any(|(_, kinds)| kinds.contains(&kind));
            (linear_part(kind, fused), kind.path())
        });
        norms.chain(linears)
    }

    /// Number that is added to the weights of norms in the file.
    pub fn norm_offset(&self) -> f32 {
        self.family.row().norm_offset
    }

    /// The architecture as which a model is written.
    ///
    /// # Errors
    /// Returns [`Error::UnsupportedArchitecture`] if there is none.
    pub fn of(config: &HfConfig) -> Result<&'static Self> {
        let blocks = config.blocks();
        let whole = |block: &BlockDims| block.has_attention() && block.has_mlp();
        let uniform = blocks
            .iter()
            .all(|block| whole(block) && *block == blocks[0]);
        let mut rows: Vec<&Self> = FAMILIES
            .iter()
            .filter(|row| row.written.contains(&config.family()))
            .collect();
        rows.sort_by_key(|row| row.per_block == uniform);
        rows.first().copied().ok_or_else(|| {
            let known = FAMILIES.iter().flat_map(|row| row.written);
            let known: BTreeSet<&str> = known.map(|family| family.model_type()).collect();
            Error::UnsupportedArchitecture {
                found: format!("{} (to be written as GGUF)", config.family().model_type()),
                supported: known.into_iter().collect::<Vec<_>>().join(", "),
            }
        })
    }

    /// Names of the tensors of a Hugging Face folder whose rows a tensor holds, one after the
    /// other; empty for an unknown tensor.
    pub fn hf_names(&self, name: &str) -> Vec<String> {
        if let Some((_, name)) = OUTSIDE.iter().find(|(ours, _)| *ours == name) {
            return vec![(*name).into()];
        }
        let parts = || {
            let (block, part) = name.strip_prefix("blk.")?.split_once('.')?;
            let (part, suffix) = part.split_once('.')?;
            let number: usize = block.parse().ok()?;
            let whole = number.to_string() == block && matches!(suffix, "weight" | "bias");
            whole.then_some((number, part, suffix))
        };
        let Some((number, part, suffix)) = parts() else {
            return Vec::new();
        };
        let found = self.parts().filter(|(ours, _)| *ours == part);
        let name = |(_, module)| format!("model.layers.{number}.{module}.{suffix}");
        found.map(name).collect()
    }

    /// Name in GGUF of a tensor of a Hugging Face folder, if llama.cpp reads it.
    pub fn gguf_name(&self, name: &str) -> Option<String> {
        if let Some((name, _)) = OUTSIDE.iter().find(|(_, theirs)| *theirs == name) {
            return Some((*name).into());
        }
        let (block, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let (module, suffix) = rest.rsplit_once('.')?;
        let (part, _) = self.parts().find(|(_, theirs)| *theirs == module)?;
        let is_read = suffix != "bias" || self.biases.contains(&part);
        is_read.then(|| format!("blk.{block}.{part}.{suffix}"))
    }

    /// Number of heads by which the rows of a tensor of a Hugging Face folder are permuted, if they
    /// are.
    pub fn permuted_heads(&self, name: &str, blocks: &[BlockDims]) -> Option<usize> {
        let (layer, _) = name.rsplit_once('.').filter(|_| self.permuted)?;
        match LinearKind::parse(layer)? {
            (block, LinearKind::Q) => Some(blocks.get(block)?.n_heads),
            (block, LinearKind::K) => Some(blocks.get(block)?.n_kv_heads),
            _ => None,
        }
    }
}

impl Gguf {
    pub(super) fn unsupported(&self, what: impl std::fmt::Display) -> Error {
        Error::Unsupported {
            what: format!("{}: {what}", self.first().path.display()),
        }
    }

    pub(super) fn family(&self) -> Result<&'static Row> {
        let first = self.first();
        if let Some(kind) = first.text("general.type")?.filter(|kind| *kind != "model") {
            return Err(
                self.unsupported(format!("key `general.type` = `{kind}` (expected a model)"))
            );
        }
        let key = "general.architecture";
        let Some(name) = first.text(key)? else {
            return Err(first.bad_key(key, "missing"));
        };
        FAMILIES.iter().find(|row| row.name == name).ok_or_else(|| {
            let known: Vec<&str> = FAMILIES.iter().map(|row| row.name).collect();
            Error::UnsupportedArchitecture {
                found: format!("{name} (GGUF)"),
                supported: known.join(", "),
            }
        })
    }

    /// Makes a `config.json` from the metadata.
    ///
    /// # Errors
    /// Returns [`Error::UnsupportedArchitecture`]; [`Error::InvalidFile`] if a key is missing or
    /// has another type; and [`Error::Unsupported`] if a key changes the model and is not implemented.
    pub(in crate::io) fn config(&self) -> Result<Map<String, Value>> {
        let row = self.family()?;
        let first = self.first();
        let key = |name: &str| format!("{}.{name}", row.name);
        self.refuse_unknown(row)?;
        let size = |name: &str| first.size(&key(name));
        let required = |name: &str| size(name)?.ok_or_else(|| first.bad_key(&key(name), "missing"));
        let blocks = if row.per_block {
            self.blocks(row)?
        } else {
            Vec::new()
        };
        let largest = |name: &str, of: fn(&BlockDims) -> usize| match blocks.iter().map(of).max() {
            Some(size) => Ok(Some(size as u64)),
            None => size(name),
        };
        let some = |name: &str, of: fn(&BlockDims) -> usize| {
            largest(name, of)?.ok_or_else(|| first.bad_key(&key(name), "missing"))
        };
        let (hidden, heads) = (
            required("embedding_length")?,
            some("attention.head_count", |block| block.n_heads)?,
        );
        let name = key("attention.layer_norm_rms_epsilon");
        let epsilon = first
            .float(&name)?
            .ok_or_else(|| first.bad_key(&name, "missing"))?;
        let Some((_, embedding)) = self.tensor(EMBEDDING) else {
            return Err(Error::MissingTensor {
                path: first.path.clone(),
                tensor: EMBEDDING.into(),
            });
        };
        let vocab_size = embedding.shape[0] as u64;
        let length = key("attention.key_length");
        let explicit = first.size(&length)?;
        let head_dim = explicit.unwrap_or_else(|| hidden / heads.max(1));
        let agree = [
            ("attention.value_length", head_dim),
            ("rope.dimension_count", head_dim),
            ("vocab_size", vocab_size),
        ];
        // Phi-3 may rotate only a part of each head.
        let partial = |name: &str| row.family == Family::Phi3 && name == "rope.dimension_count";
        for (name, expected) in agree.into_iter().filter(|(name, _)| !partial(name)) {
            if let Some(found) = size(name)?.filter(|found| *found != expected) {
                let what = format!("key `{}` = {found} beside {expected}", key(name));
                return Err(self.unsupported(what));
            }
        }
        let context = required("context_length")?;
        let has_windows = !matches!(row.family.row().windows, Windows::Full)
            && !matches!(row.family, Family::Qwen2 | Family::Qwen3 | Family::SmolLm3);
        if let Some(window) = size("attention.sliding_window")?
            && !has_windows
            && window != 0
            && window < context
        {
            let what = format!("key `{}` = {window}", key("attention.sliding_window"));
            return Err(self.unsupported(what));
        }
        let theta = first.float(&key("rope.freq_base"))?.unwrap_or(10_000.0);
        let rotated = match size("rope.dimension_count")? {
            Some(dims) if row.family == Family::Phi3 && dims <= head_dim => dims,
            _ => head_dim,
        };
        let scaling = match self.longrope(row, (rotated / 2) as usize)? {
            Some(scaling) if row.family == Family::Phi3 => scaling,
            Some(_) => return Err(self.unsupported(format!("tensor `{SHORT_FACTORS}`"))),
            None => self.rope_scaling(row, head_dim, theta)?,
        };
        let id = |name: &str| self.token_id(name);
        let mut ends = Vec::new();
        for name in ENDS {
            ends.extend(id(name)?.filter(|id| !ends.contains(id)));
        }
        let has = |name: &str| self.tensor(name).is_some();
        // In a model whose blocks differ, the first one may not have the layer.
        let biased = |name: &str| {
            let count = blocks.len().max(1);
            (0..count).any(|block| has(&format!("blk.{block}.{name}")))
        };
        let value = json!({
            "architectures": [row.family.architecture()],
            "model_type": row.family.model_type(),
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": some("feed_forward_length", |block| block.d_mlp)?,
            "num_hidden_layers": required("block_count")?,
            "num_attention_heads": heads,
            "num_key_value_heads":
                largest("attention.head_count_kv", |block| block.n_kv_heads)?.unwrap_or(heads),
            "max_position_embeddings": context,
            "rms_norm_eps": epsilon,
            "rope_theta": theta,
            "rope_scaling": scaling,
            "tie_word_embeddings": !has(HEAD),
            "vocab_size": vocab_size,
            "bos_token_id": id("bos_token_id")?,
            "eos_token_id": match ends.as_slice() {
                [] => Value::Null,
                [one] => json!(one),
                all => json!(all),
            },
            "pad_token_id": id("padding_token_id")?,
            "torch_dtype": embedding.encoding.dtype().torch_name(),
        });
        let Value::Object(mut map) = value else {
            return Err(self.unsupported("the configuration"));
        };
        if explicit.is_some() {
            map.insert("head_dim".into(), head_dim.into());
        }
        self.family_fields(row, head_dim, &mut map)?;
        if row.family == Family::Llama {
            map.insert("attention_bias".into(), biased("attn_q.bias").into());
            map.insert("mlp_bias".into(), biased("ffn_gate.bias").into());
        }
        if blocks.is_empty() {
            return Ok(map);
        }
        map.insert("head_dim".into(), head_dim.into());
        let config = HfConfig::from_json(map)?.with_blocks(&blocks)?;
        Ok(config.raw().clone())
    }

    /// Sizes of the blocks of an architecture whose blocks may differ.
    fn blocks(&self, row: &Row) -> Result<Vec<BlockDims>> {
        let first = self.first();
        let key = |name: &str| format!("{}.{name}", row.name);
        let count = first.size(&key("block_count"))?.unwrap_or(0);
        let count = usize::try_from(count)
            .ok()
            .filter(|count| *count <= MAX_BLOCKS);
        let Some(count) = count.filter(|count| *count > 0) else {
            let reason = format!("expected a number of 1 to {MAX_BLOCKS}");
            return Err(first.bad_key(&key("block_count"), reason));
        };
        let sizes = |name: &str| {
            let sizes = first.sizes(&key(name), count)?;
            sizes.ok_or_else(|| first.bad_key(&key(name), "missing"))
        };
        let heads = sizes("attention.head_count")?;
        let (kv_heads, widths) = (
            sizes("attention.head_count_kv")?,
            sizes("feed_forward_length")?,
        );
        let all = heads.iter().zip(&kv_heads).zip(&widths).enumerate();
        let block = |(index, ((heads, kv_heads), width)): (usize, ((&usize, &usize), &usize))| {
            let dims = BlockDims {
                n_heads: *heads,
                n_kv_heads: *kv_heads,
                d_mlp: *width,
            };
            // llama.cpp takes this for a linear layer in the place of attention.
            if *kv_heads == 0 && *heads > 0 {
                let what = format!(
                    "block {index} of architecture {}: no key/value heads",
                    row.name
                );
                return Err(self.unsupported(what));
            }
            Ok(dims)
        };
        all.map(block).collect()
    }

    /// Refuses unknown keys of the architecture, unless their value is 0 or false.
    fn refuse_unknown(&self, row: &Row) -> Result<()> {
        for (key, value) in &self.first().values {
            let name = key
                .strip_prefix(row.name)
                .and_then(|key| key.strip_prefix('.'));
            let Some(name) = name.filter(|name| !KNOWN.contains(name) && !row.keys.contains(name))
            else {
                continue;
            };
            use container::Value::{Bool, F32, F64, Int, Text};
            let harmless = match value {
                Int(value) => *value == 0,
                F32(value) => *value == 0.0,
                F64(value) => *value == 0.0,
                Bool(value) => !value,
                // Old files describe the order of their rows; only one order was ever written.
                Text(_) => name == "tensor_data_layout",
                _ => false,
            };
            if !harmless {
                return Err(self.unsupported(format!("key `{key}`")));
            }
        }
        Ok(())
    }

    /// Id of a special token. -1 and the largest `u32` mean that there is none.
    pub(super) fn token_id(&self, name: &str) -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{name}");
        match self.first().values.get(&key) {
            None | Some(container::Value::Int(-1)) => Ok(None),
            Some(container::Value::Int(id)) if u32::try_from(*id) == Ok(u32::MAX) => Ok(None),
            Some(container::Value::Int(id)) if u32::try_from(*id).is_ok() => {
                Ok(u32::try_from(*id).ok())
            }
            Some(_) => Err(self.first().bad_key(&key, "not a token's number")),
        }
    }

    /// Makes `rope_scaling` from keys, or from the divisors in a tensor.
    fn rope_scaling(&self, row: &Row, head_dim: u64, theta: f64) -> Result<Value> {
        let first = self.first();
        let key = |name: &str| format!("{}.rope.{name}", row.name);
        let (kind_key, factor_key) = (key("scaling.type"), key("scaling.factor"));
        let old = first.float(&key("scale_linear"))?;
        let factor = first.float(&factor_key)?.or(old);
        let kind = match first.text(&kind_key)? {
            Some(kind) => kind,
            // Like llama.cpp: a factor without a type is linear scaling.
            None if factor.is_some_and(|factor| factor != 0.0 && factor != 1.0) => "linear",
            None => "none",
        };
        let divisors = self.tensor(DIVISORS);
        match (kind, divisors) {
            ("none", None) => Ok(Value::Null),
            ("linear", None) => match factor {
                Some(factor) => Ok(json!({ "rope_type": "linear", "factor": factor })),
                None => Err(first.bad_key(&factor_key, "missing")),
            },
            ("yarn", None) => {
                let name = key("scaling.original_context_length");
                match (factor, first.size(&name)?) {
                    (Some(factor), Some(original)) => Ok(json!({
                        "rope_type": "yarn", "factor": factor,
                        "original_max_position_embeddings": original,
                    })),
                    (None, _) => Err(first.bad_key(&factor_key, "missing")),
                    (_, None) => Err(first.bad_key(&name, "missing")),
                }
            }
            ("none", Some(_)) => self.llama3(head_dim, theta),
            (_, Some(_)) => {
                let what = format!("key `{kind_key}` = `{kind}` beside tensor `{DIVISORS}`");
                Err(self.unsupported(what))
            }
            _ => Err(self.unsupported(format!("key `{kind_key}` = `{kind}`"))),
        }
    }

    /// Recovers Llama 3's rule from the divisors of the frequencies. All Llama 3 models have the
    /// same wavelength bounds.
    fn llama3(&self, head_dim: u64, theta: f64) -> Result<Value> {
        let len = (head_dim / 2) as usize;
        let divisors = self.vector(DIVISORS, len)?;
        if divisors.iter().all(|divisor| *divisor == 1.0) {
            return Ok(Value::Null);
        }
        let factor = divisors.iter().copied().fold(1.0, f64::max);
        let plain = RopeConfig::new(theta, 2 * len);
        let unscaled = Rope::new(&plain);
        let explains = |original: &usize| {
            let scaled = Rope::new(&RopeConfig {
                scaling: RopeScaling::Llama3 {
                    factor,
                    low_freq_factor: 1.0,
                    high_freq_factor: 4.0,
                    original_max_position_embeddings: *original,
                },
                ..plain.clone()
            });
            let pairs = unscaled.inv_freq().iter().zip(scaled.inv_freq());
            let mut all = pairs.zip(&divisors);
            all.all(|((plain, scaled), divisor)| (plain / scaled / divisor - 1.0).abs() < 1e-4)
        };
        // That of all Llama 3 models first, then other powers of 2.
        let originals = std::iter::once(8192).chain((4..=20).map(|exponent| 1 << exponent));
        let Some(original) = originals.into_iter().find(explains) else {
            return Err(self.unsupported(format!(
                "tensor `{DIVISORS}`, whose divisors are not those of Llama 3's rule,"
            )));
        };
        Ok(json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": original,
        }))
    }

    /// Lists the tensors of the model under their names in a Hugging Face folder.
    ///
    /// # Errors
    /// Returns the errors of the configuration, [`Error::Unsupported`] if a tensor is not part of
    /// the model, and [`Error::InvalidFile`] if its shape is not that of the configuration.
    pub(in crate::io) fn entries(&self) -> Result<Vec<Entry>> {
        let row = self.family()?;
        let config = HfConfig::from_json(self.config()?)?;
        let arch = config.arch();
        let expected: std::collections::BTreeMap<_, _> = arch.tensors().into_iter().collect();
        let mut entries = Vec::new();
        for (number, file) in self.files.iter().enumerate() {
            let settings = [DIVISORS, SHORT_FACTORS, LONG_FACTORS];
            let weights = file.tensors.iter();
            for tensor in weights.filter(|tensor| !settings.contains(&&*tensor.name)) {
                let known = row.hf_names(&tensor.name).into_iter();
                let known = known.filter_map(|name| expected.get_key_value(&name));
                let parts: Vec<(&String, &Vec<usize>)> = known.collect();
                let Some((_, shape)) = parts.first() else {
                    let what = format!("{}: tensor `{}`", file.path.display(), tensor.name);
                    return Err(Error::Unsupported {
                        what: format!("{what} in a model of architecture {}", row.name),
                    });
                };
                let mut shape = (*shape).clone();
                shape[0] = parts.iter().map(|(_, shape)| shape[0]).sum();
                if shape != tensor.shape {
                    let reason = format!(
                        "tensor `{}`: shape {:?}, expected {shape:?}",
                        tensor.name, tensor.shape
                    );
                    return Err(Error::invalid_file(&file.path, reason));
                }
                let blocks = match tensor.encoding {
                    Encoding::Plain(_) => None,
                    Encoding::Blocks(blocks) => Some(blocks),
                };
                let row_bytes = tensor.range.len() / shape[0].max(1);
                let mut start = tensor.range.start;
                for (name, shape) in parts {
                    let heads = row.permuted_heads(name, config.blocks());
                    let offset = match name.ends_with(NORM) {
                        true => row.norm_offset(),
                        false => 0.0,
                    };
                    let vector = shape.len() == 1 && (heads.is_some() || offset != 0.0);
                    let plain = matches!(tensor.encoding, Encoding::Plain(DType::F32));
                    if vector && (blocks.is_some() || offset != 0.0 && !plain) {
                        let what = format!(
                            "{}: tensor `{}` of type {:?}",
                            file.path.display(),
                            tensor.name,
                            tensor.encoding
                        );
                        return Err(Error::Unsupported { what });
                    }
                    let range = start..start + row_bytes * shape[0];
                    start = range.end;
                    entries.push(Entry {
                        name: name.clone(),
                        file: number,
                        range,
                        info: TensorInfo {
                            dtype: tensor.encoding.dtype(),
                            shape: shape.clone(),
                        },
                        layout: Layout {
                            blocks,
                            heads,
                            offset,
                        },
                    });
                }
            }
        }
        Ok(entries)
    }
}
