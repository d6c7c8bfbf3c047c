//! What families beyond Llama and Qwen2 store in keys and tensors of their own, read into the
//! fields of `config.json` and written from them.

use serde_json::{Map, Value, json};

use super::Gguf;
use super::blocks::Encoding;
use super::config::Row;
use super::write::container::Keys;
use crate::arch::{Architecture, Family, RopeConfig, RopeScaling};
use crate::error::{Error, Result};
use crate::io::DType;

/// Divisors of the rotary frequencies for short and for long sequences.
pub(super) const SHORT_FACTORS: &str = "rope_factors_short.weight";
pub(super) const LONG_FACTORS: &str = "rope_factors_long.weight";

/// Every n-th layer of these families has full attention, or no rotary positions. llama.cpp has
/// the numbers in its code.
const GEMMA2_PATTERN: usize = 2;
const GEMMA3_PATTERN: usize = 6;
const SMOLLM3_PATTERN: usize = 4;

/// Numbers of blocks of the two models whose scores llama.cpp divides by the square root of the
/// width of a head without `head_dim`: Gemma 2 and Gemma 3 with 27 billion weights.
const WIDE_GEMMA: [(Family, u64); 2] = [(Family::Gemma2, 46), (Family::Gemma3, 62)];

/// The scalar by which llama.cpp scales the scores of Gemma 2 and 3.
fn query_scalar(family: Family, blocks: u64, head_dim: u64, hidden: u64, heads: u64) -> u64 {
    if WIDE_GEMMA.contains(&(family, blocks)) {
        hidden / heads.max(1)
    } else {
        head_dim
    }
}

impl Gguf {
    /// Adds the fields of the family to the config, which has those that all families share.
    pub(super) fn family_fields(
        &self,
        row: &Row,
        head_dim: u64,
        map: &mut Map<String, Value>,
    ) -> Result<()> {
        let first = self.first();
        let key = |name: &str| format!("{}.{name}", row.name);
        let number = |name: &str| first.float(&key(name));
        let window = first.size(&key("attention.sliding_window"))?;
        let window = window.filter(|window| *window > 0);
        let of = |name: &str| map.get(name).and_then(Value::as_u64).unwrap_or(0);
        let (blocks, hidden) = (of("num_hidden_layers"), of("hidden_size"));
        let scalar = query_scalar(
            row.family,
            blocks,
            head_dim,
            hidden,
            of("num_attention_heads"),
        );
        let mut fields = match row.family {
            Family::Qwen3 => {
                json!({ "attention_bias": self.tensor("blk.0.attn_q.bias").is_some() })
            }
            Family::SmolLm3 => json!({
                "attention_bias": self.tensor("blk.0.attn_q.bias").is_some(),
                "mlp_bias": self.tensor("blk.0.ffn_gate.bias").is_some(),
                "no_rope_layer_interval": SMOLLM3_PATTERN,
            }),
            Family::Gemma => json!({ "hidden_act": "gelu_pytorch_tanh" }),
            Family::Gemma2 => json!({
                "hidden_activation": "gelu_pytorch_tanh",
                "query_pre_attn_scalar": scalar,
                "sliding_window": window,
                // llama.cpp uses these values, too, if the keys are absent.
                "attn_logit_softcapping": number("attn_logit_softcapping")?.unwrap_or(50.0),
                "final_logit_softcapping": number("final_logit_softcapping")?.unwrap_or(30.0),
            }),
            Family::Gemma3 => json!({
                "hidden_activation": "gelu_pytorch_tanh",
                "query_pre_attn_scalar": scalar,
                "sliding_window": window,
                "sliding_window_pattern": GEMMA3_PATTERN,
                "rope_local_base_freq": number("rope.freq_base_swa")?.unwrap_or(10_000.0),
                "final_logit_softcapping": number("final_logit_softcapping")?,
            }),
            Family::Phi3 => {
                let dims = first
                    .size(&key("rope.dimension_count"))?
                    .unwrap_or(head_dim);
                json!({
                    "partial_rotary_factor": dims as f64 / head_dim.max(1) as f64,
                    "sliding_window": window.filter(|window| *window < of("max_position_embeddings")),
                    "original_max_position_embeddings":
                        first.size(&key("rope.scaling.original_context_length"))?
                            .unwrap_or(of("max_position_embeddings")),
                })
            }
            _ => return Ok(()),
        };
        if let Some(fields) = fields.as_object_mut() {
            map.append(fields);
        }
        if matches!(row.family, Family::Gemma2 | Family::Gemma3) {
            map.remove("hidden_act");
        }
        Ok(())
    }

    /// The divisors of LongRoPE as `rope_scaling`; `None` if the file has none.
    pub(super) fn longrope(&self, row: &Row, half: usize) -> Result<Option<Value>> {
        let factors = |name: &str| {
            let found = self.tensor(name);
            found.map(|_| self.vector(name, half)).transpose()
        };
        match (factors(SHORT_FACTORS)?, factors(LONG_FACTORS)?) {
            (None, None) => Ok(None),
            (Some(short), Some(long)) => {
                let key = format!("{}.rope.scaling.attn_factor", row.name);
                let factor = self.first().float(&key)?.unwrap_or(1.0);
                Ok(Some(json!({
                    "rope_type": "longrope", "short_factor": short, "long_factor": long,
                    "attention_factor": factor,
                })))
            }
            (short, _) => Err(Error::MissingTensor {
                path: self.first().path.clone(),
                tensor: if short.is_some() {
                    LONG_FACTORS
                } else {
                    SHORT_FACTORS
                }
                .into(),
            }),
        }
    }

    /// Loads a tensor of `len` numbers of 32 bits.
    pub(super) fn vector(&self, name: &str, len: usize) -> Result<Vec<f64>> {
        let Some((file, tensor)) = self.tensor(name) else {
            return Err(Error::MissingTensor {
                path: self.first().path.clone(),
                tensor: name.into(),
            });
        };
        let file = &self.files[file];
        if !matches!(tensor.encoding, Encoding::Plain(DType::F32)) || tensor.shape != [len] {
            let reason = format!(
                "tensor `{name}`: {:?} of shape {:?}, expected F32 of [{len}]",
                tensor.encoding, tensor.shape
            );
            return Err(Error::invalid_file(&file.path, reason));
        }
        let bytes = file.bytes.as_ref().get(tensor.range.clone());
        let (numbers, _) = bytes.unwrap_or_default().as_chunks::<4>();
        let number = |bytes: &[u8; 4]| f64::from(f32::from_le_bytes(*bytes));
        Ok(numbers.iter().map(number).collect())
    }
}

/// Writes the keys of the family, and checks that llama.cpp computes what the model does.
pub(super) fn keys(arch: &Architecture, row: &Row, keys: &mut Keys) -> Result<()> {
    let key = |name: &str| format!("{}.{name}", row.name);
    let other = |what: String| {
        Err(Error::Unsupported {
            what: format!("{what} in GGUF of architecture {}", row.name),
        })
    };
    let window = arch.positions.iter().find_map(|positions| positions.window);
    // Whether the layers for which `at` holds are all but every n-th.
    let all_but_every = |n: usize, at: &dyn Fn(usize) -> bool| {
        (0..arch.blocks.len()).all(|layer| at(layer) == ((layer + 1) % n != 0))
    };
    let windowed = |layer: usize| arch.positions(layer).window.is_some();
    let rotated = |layer: usize| arch.positions(layer).rope.is_some();
    match row.family {
        Family::SmolLm3 if !all_but_every(SMOLLM3_PATTERN, &rotated) => {
            return other(format!(
                "rotary positions in other layers than all but every {SMOLLM3_PATTERN}th"
            ));
        }
        Family::Gemma2 | Family::Gemma3 => {
            let n = match row.family {
                Family::Gemma2 => GEMMA2_PATTERN,
                _ => GEMMA3_PATTERN,
            };
            let local = |layer: usize| arch.positions(layer).rope == Some(1);
            if !all_but_every(n, &windowed)
                || row.family == Family::Gemma3 && arch.ropes.len() > 1 && !all_but_every(n, &local)
            {
                return other(format!("a window in other layers than all but every {n}th"));
            }
            if let Some(window) = window {
                keys.size(&key("attention.sliding_window"), window)?;
            }
            let first = arch.blocks.first();
            let heads = first.map_or(1, |block| block.n_heads) as u64;
            let (head_dim, hidden) = (arch.head_dim as u64, arch.d_model as u64);
            let blocks = arch.blocks.len() as u64;
            let scalar = query_scalar(row.family, blocks, head_dim, hidden, heads);
            if (arch.scores.scale * (scalar as f64).sqrt() - 1.0).abs() > 1e-9 {
                let found = arch.scores.scale.powi(-2);
                return other(format!(
                    "query_pre_attn_scalar = {found} instead of {scalar}"
                ));
            }
            if let Some(cap) = arch.scores.softcap {
                keys.f32(key("attn_logit_softcapping"), cap as f32);
            } else if row.family == Family::Gemma2 {
                return other("scores without a soft cap".into());
            }
            match arch.logit_softcap {
                Some(cap) => keys.f32(key("final_logit_softcapping"), cap as f32),
                None if row.family == Family::Gemma2 => {
                    return other("logits without a soft cap".into());
                }
                None => {}
            }
            if row.family == Family::Gemma3 {
                let local = arch.ropes.last().map_or(0.0, |rope| rope.theta);
                keys.f32(key("rope.freq_base_swa"), local as f32);
            }
        }
        Family::Phi3 => keys.size(&key("attention.sliding_window"), window.unwrap_or(0))?,
        _ => {}
    }
    Ok(())
}

/// Writes the scaling of the rotary embedding, except what is in tensors.
pub(super) fn rope_keys(rope: &RopeConfig, row: &Row, keys: &mut Keys) -> Result<()> {
    let key = |name: &str| format!("{}.rope.scaling.{name}", row.name);
    match &rope.scaling {
        RopeScaling::Default | RopeScaling::Llama3 { .. } => {}
        RopeScaling::Linear { factor } => {
            keys.text(key("type"), "linear");
            keys.f32(key("factor"), *factor as f32);
        }
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            attention_factor,
            beta_fast,
            beta_slow,
            truncate: true,
        } if [*beta_fast, *beta_slow] == YARN_BETAS => {
            let usual = yarn_attention(*factor);
            if (attention_factor / usual - 1.0).abs() > 1e-6 {
                return Err(Error::Unsupported {
                    what: format!(
                        "YaRN's attention_factor = {attention_factor} instead of {usual} in GGUF"
                    ),
                });
            }
            keys.text(key("type"), "yarn");
            keys.f32(key("factor"), *factor as f32);
            keys.size(
                &key("original_context_length"),
                *original_max_position_embeddings,
            )?;
        }
        RopeScaling::LongRope {
            original_max_position_embeddings,
            attention_factor,
            ..
        } if row.family == Family::Phi3 => {
            keys.size(
                &key("original_context_length"),
                *original_max_position_embeddings,
            )?;
            keys.f32(key("attn_factor"), *attention_factor as f32);
        }
        other => {
            return Err(Error::Unsupported {
                what: format!(
                    "rotary scaling {other:?} in GGUF of architecture {}",
                    row.name
                ),
            });
        }
    }
    Ok(())
}

/// llama.cpp's `beta_fast` and `beta_slow`.
pub(super) const YARN_BETAS: [f64; 2] = [32.0, 1.0];

/// The factor on cosines and sines that llama.cpp computes for YaRN.
fn yarn_attention(factor: f64) -> f64 {
    0.1 * factor.ln() + 1.0
}
