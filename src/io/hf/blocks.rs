//! Sizes of each block in models whose blocks differ: the config field `block_configs`, in the form
//! of DeciLM ("Nemotron-NAS").
//!
//! DeciLM stores the number of key/value heads as `attention.n_heads_in_group`, the number of query
//! heads per key/value head. It stores the MLP's width as a multiple of the hidden size,
//! `ffn.ffn_mult`. Readers round the multiple to 6 decimals, and the width is
//! `int(2 * ffn_mult * hidden_size / 3)`, rounded up to a multiple of 256. All blocks have the same
//! number of query heads. Some readers compute the head size as the hidden size divided by that
//! number, and ignore `head_dim`.
//!
//! Sizes that DeciLM cannot express, or that one of its readers gets wrong, are stored in two
//! fields of this crate, `attention.num_attention_heads` and `ffn.intermediate_size`. Such a file
//! has another model type, so that no reader mistakes it for DeciLM.
//!
//! In that form the same sizes are also written as transformers' `per_layer_config`, if that can
//! describe them.
//!
//! These limits come from the sources of llama.cpp (2026), vLLM and mlx-lm, and were tried with
//! llama.cpp:
//!
//! - llama.cpp skips a block that has attention but no MLP.
//! - Neither llama.cpp nor vLLM can run a model whose first block has no attention.
//! - llama.cpp's converter drops linear scaling of positions, and always uses 8192 as the original
//!   context length of Llama 3.1's scaling.

use serde_json::{Map, Value, json};

use super::config::{HfConfig, MAX_HEADS, MAX_WIDTH};
use super::{per_layer, rope};
use crate::arch::family::Windows;
use crate::arch::{Activation, BlockDims, Family, Positions, RopeConfig, RopeScaling};
use crate::error::Result;
use crate::io::fields::{Fields, bad_field};

const FIELD: &str = "block_configs";
/// Family of a model in the form of [`Family::ElasticLlama`], if it is not a plain Llama.
pub(super) const BASE_FAMILY: &str = "base_model_type";
/// DeciLM's MLP widths are multiples of this.
pub const DECI_MULTIPLE: usize = 256;
/// Options of a block that this crate does not support, unless they are null or false.
const ATTENTION_OPTIONS: [&str; 6] = [
    "window_length",
    "num_sink_tokens",
    "use_prefill_window_in_sink_attention",
    "unshifted_sink",
    "mamba",
    "llama4",
];
const MLP_OPTIONS: [&str; 1] = ["moe"];

/// Returns whether a config has sizes per block.
pub(super) fn has(raw: &Map<String, Value>) -> bool {
    raw.get(FIELD).is_some_and(|value| !value.is_null())
}

/// Parses the blocks of a config. `all` holds the sizes for the whole model.
pub(super) fn parse(
    raw: &Map<String, Value>,
    per_block: bool,
    n_blocks: usize,
    hidden_size: usize,
    head_dim: usize,
    all: BlockDims,
) -> Result<Vec<BlockDims>> {
    if !per_block {
        let blocks = vec![all; n_blocks];
        return per_layer::reconcile(raw, all, head_dim, blocks, None);
    }
    let Some(Value::Array(items)) = raw.get(FIELD) else {
        return Err(bad_field(FIELD, "expected a list of objects"));
    };
    if items.len() != n_blocks {
        return Err(bad_field(
            FIELD,
            format!("{} blocks, but num_hidden_layers = {n_blocks}", items.len()),
        ));
    }
    let mut blocks = Vec::with_capacity(n_blocks);
    for (index, item) in items.iter().enumerate() {
        let part = |name: &str| match item.get(name) {
            Some(Value::Object(map)) => Ok(map),
            _ => Err(bad_field(
                format!("{FIELD}[{index}].{name}"),
                "expected an object",
            )),
        };
        let (attention, mlp) = (part("attention")?, part("ffn")?);
        let (at_attention, at_mlp) = (
            format!("{FIELD}[{index}].attention."),
            format!("{FIELD}[{index}].ffn."),
        );
        let (attention, mlp) = (
            Fields {
                map: attention,
                prefix: &at_attention,
            },
            Fields {
                map: mlp,
                prefix: &at_mlp,
            },
        );
        let options = [
            (&attention, &at_attention, &ATTENTION_OPTIONS[..]),
            (&mlp, &at_mlp, &MLP_OPTIONS[..]),
        ];
        for (fields, at, options) in options {
            if fields.bool("replace_with_linear")?.unwrap_or(false) {
                return Err(bad_field(
                    format!("{at}replace_with_linear"),
                    "a linear layer in the place of a block",
                ));
            }
            if fields.bool("no_op")?.unwrap_or(false) {
                continue;
            }
            let on = |value: &Value| !matches!(value, Value::Null | Value::Bool(false));
            if let Some(option) = options
                .iter()
                .find(|option| fields.map.get(**option).is_some_and(on))
            {
                return Err(bad_field(format!("{at}{option}"), "not supported"));
            }
        }
        let act = mlp
            .map
            .get("hidden_act")
            .filter(|act| !act.is_null() && *act != "silu");
        let other = act.is_some() || mlp.bool("gated")? == Some(false);
        if other && !mlp.bool("no_op")?.unwrap_or(false) {
            return Err(bad_field(
                format!("{at_mlp}hidden_act"),
                "an MLP that is not gated by silu",
            ));
        }
        let (n_heads, n_kv_heads) = if attention.bool("no_op")?.unwrap_or(false) {
            (0, 0)
        } else {
            let n_heads = attention
                .size("num_attention_heads", MAX_HEADS)?
                .unwrap_or(all.n_heads);
            let group = attention.required_size("n_heads_in_group", MAX_HEADS)?;
            if n_heads % group != 0 {
                let reason = format!("{group} does not divide {n_heads} heads");
                return Err(bad_field(format!("{at_attention}n_heads_in_group"), reason));
            }
            (n_heads, n_heads / group)
        };
        if n_heads * head_dim > MAX_WIDTH {
            let reason = format!("{n_heads} heads of {head_dim} exceed a width of {MAX_WIDTH}");
            return Err(bad_field(
                format!("{at_attention}num_attention_heads"),
                reason,
            ));
        }
        let d_mlp = if mlp.bool("no_op")?.unwrap_or(false) {
            0
        } else {
            match (
                mlp.size("intermediate_size", MAX_WIDTH)?,
                mlp.f64("ffn_mult")?,
            ) {
                (Some(width), _) => width,
                (None, Some(factor)) => {
                    let width = deci_width(hidden_size, factor);
                    width.ok_or_else(|| {
                        bad_field(
                            format!("{at_mlp}ffn_mult"),
                            format!("{factor} gives no width"),
                        )
                    })?
                }
                (None, None) => return Err(bad_field(format!("{at_mlp}ffn_mult"), "missing")),
            }
        };
        blocks.push(BlockDims {
            n_heads,
            n_kv_heads,
            d_mlp,
        });
    }
    if let Some(index) = blocks
        .iter()
        .position(|block| !block.has_attention() && !block.has_mlp())
    {
        return Err(bad_field(
            format!("{FIELD}[{index}]"),
            "neither attention nor MLP: leave the block out",
        ));
    }
    per_layer::reconcile(raw, all, head_dim, blocks, Some(FIELD))
}

/// Returns the fields of `config` with other blocks. `origins` holds the index in `config` of the
/// block whose attention each block has; all are in range.
pub(super) fn write(
    config: &HfConfig,
    blocks: &[BlockDims],
    origins: &[usize],
) -> Result<Map<String, Value>> {
    let mut raw = config.raw().clone();
    let Some(first) = blocks.first() else {
        return Err(bad_field("num_hidden_layers", "a model without a block"));
    };
    raw.remove(FIELD);
    per_layer::remove(&mut raw);
    raw.remove(BASE_FAMILY);
    raw.insert("num_hidden_layers".into(), blocks.len().into());
    raw.insert("head_dim".into(), config.head_dim().into());
    write_positions(&mut raw, config, origins);
    let family = |raw: &mut Map<String, Value>, family: Family| {
        raw.insert("model_type".into(), family.model_type().into());
        raw.insert("architectures".into(), json!([family.architecture()]));
    };
    let widest = blocks.iter().map(|block| block.d_mlp).max().unwrap_or(0);
    let most = |count: fn(&BlockDims) -> usize| blocks.iter().map(count).max().unwrap_or(0);
    let equal = blocks.iter().all(|block| block == first);
    let standard = equal && first.has_attention() && first.has_mlp();
    if standard && fits_stock(config, first.n_heads) {
        raw.insert("num_attention_heads".into(), first.n_heads.into());
        raw.insert("num_key_value_heads".into(), first.n_kv_heads.into());
        raw.insert("intermediate_size".into(), first.d_mlp.into());
        let stock = match config.family() {
            Family::Deci | Family::ElasticLlama if config.sliding_window().is_some() => {
                Family::Mistral
            }
            Family::Deci | Family::ElasticLlama => Family::Llama,
            stock => stock,
        };
        family(&mut raw, stock);
        // transformers refuses a Llama whose number of heads does not divide its width, even with
        // `head_dim`. A Mistral without biases and with full attention computes the same, and
        // transformers accepts it.
        let uneven = !config.hidden_size().is_multiple_of(first.n_heads);
        let biased = !config.arch().biased.is_empty();
        if stock == Family::Llama && uneven && !biased {
            family(&mut raw, Family::Mistral);
            raw.insert("sliding_window".into(), Value::Null);
        }
        return Ok(raw);
    }
    let heads = most(|block| block.n_heads);
    let base = config.family().row();
    let deci = !base.elastic_base
        && config.sliding_window().is_none()
        && config.arch().activation == Activation::Silu
        && first.has_attention()
        && heads * config.head_dim() == config.hidden_size()
        && positions_as_deci(&config.arch().ropes[0], config.head_dim())
        && blocks.iter().all(|block| {
            let width = deci_width(
                config.hidden_size(),
                factor(config.hidden_size(), block.d_mlp),
            );
            [0, heads].contains(&block.n_heads) && width == Some(block.d_mlp)
        });
    family(
        &mut raw,
        if deci {
            Family::Deci
        } else {
            Family::ElasticLlama
        },
    );
    if base.elastic_base {
        raw.insert(BASE_FAMILY.into(), base.model_type.into());
    }
    // In a model without attention the number of heads has no meaning, but the field must be
    // present.
    raw.insert(
        "num_attention_heads".into(),
        heads.max(config.num_attention_heads().min(1)).into(),
    );
    if deci {
        raw.insert("num_key_value_heads".into(), Value::Null);
        raw.insert("intermediate_size".into(), Value::Null);
        // Most readers of DeciLM only know this older spelling of the rotary embedding's settings.
        raw.insert("rope_theta".into(), config.rope_theta().into());
        raw.insert("rope_scaling".into(), rope::value(&config.arch().ropes[0]));
    } else {
        raw.insert(
            "num_key_value_heads".into(),
            most(|block| block.n_kv_heads).max(1).into(),
        );
        raw.insert("intermediate_size".into(), widest.max(1).into());
    }
    let item = |block: &BlockDims| {
        let no_attention = !block.has_attention();
        let group = if no_attention {
            Value::Null
        } else {
            (block.n_heads / block.n_kv_heads.max(1)).into()
        };
        let factor = if block.has_mlp() {
            factor(config.hidden_size(), block.d_mlp).into()
        } else {
            Value::Null
        };
        let mut attention = json!({ "n_heads_in_group": group, "no_op": no_attention, "replace_with_linear": false });
        let mut mlp =
            json!({ "ffn_mult": factor, "no_op": !block.has_mlp(), "replace_with_linear": false });
        if !deci {
            attention["num_attention_heads"] = if no_attention {
                Value::Null
            } else {
                block.n_heads.into()
            };
            mlp["intermediate_size"] = if block.has_mlp() {
                block.d_mlp.into()
            } else {
                Value::Null
            };
        }
        json!({ "attention": attention, "ffn": mlp })
    };
    raw.insert(FIELD.into(), blocks.iter().map(item).collect());
    // transformers refuses the null fields of DeciLM's form, and DeciLM's own code, which extends
    // transformers', would not expect the field.
    if !deci {
        per_layer::write(&mut raw, blocks, heads);
    }
    Ok(raw)
}

/// Whether transformers loads the family's model with this number of heads in each block.
fn fits_stock(config: &HfConfig, n_heads: usize) -> bool {
    let (family, width) = (config.family(), config.hidden_size());
    match family {
        // These become a Mistral where a Llama would be refused.
        Family::Llama | Family::Mistral | Family::Deci | Family::ElasticLlama => true,
        // transformers derives the length of the lists of factors from the number of heads.
        Family::Phi3 if matches!(config.rope_scaling(), RopeScaling::LongRope { .. }) => {
            n_heads * config.head_dim() == width
        }
        _ => !family.row().even_heads || width.is_multiple_of(n_heads),
    }
}

/// Writes the fields by which layers differ in windows and rotary positions.
fn write_positions(raw: &mut Map<String, Value>, config: &HfConfig, origins: &[usize]) {
    let row = config.family().row();
    let positions = || {
        origins
            .iter()
            .map(|origin| config.arch().positions(*origin))
    };
    if matches!(row.windows, Windows::ByLayer { .. }) {
        // Layers of this kind may have their own rotary embedding even without a window.
        let sliding = |at: &Positions| at.window.is_some() || at.rope == Some(1);
        let kind = |positions: Positions| match sliding(&positions) {
            true => "sliding_attention",
            false => "full_attention",
        };
        raw.insert("layer_types".into(), positions().map(kind).collect());
    }
    if row.without_rope {
        let rotated = |positions: Positions| u8::from(positions.rope.is_some());
        raw.insert("no_rope_layers".into(), positions().map(rotated).collect());
    }
}

/// Returns whether DeciLM's readers compute the same positions as this model.
fn positions_as_deci(rope: &RopeConfig, head_dim: usize) -> bool {
    let scaled_alike = match rope.scaling {
        RopeScaling::Default => true,
        RopeScaling::Llama3 {
            original_max_position_embeddings,
            ..
        } => original_max_position_embeddings == 8192,
        RopeScaling::Linear { .. }
        | RopeScaling::Dynamic { .. }
        | RopeScaling::Yarn { .. }
        | RopeScaling::LongRope { .. } => false,
    };
    scaled_alike && rope.dims == head_dim
}

/// Returns DeciLM's `ffn_mult` for a width.
fn factor(hidden_size: usize, width: usize) -> f64 {
    rounded(3.0 * width as f64 / (2.0 * hidden_size as f64))
}

fn rounded(factor: f64) -> f64 {
    (factor * 1e6).round() / 1e6
}

/// Returns the width that DeciLM computes from `ffn_mult`.
fn deci_width(hidden_size: usize, factor: f64) -> Option<usize> {
    let width = (2.0 * rounded(factor) * hidden_size as f64 / 3.0).trunc();
    (width >= 1.0 && width <= MAX_WIDTH as f64)
        .then(|| (width as usize).next_multiple_of(DECI_MULTIPLE))
}
