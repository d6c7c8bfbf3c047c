//! Parses and writes `quantization_config`, which describes how the linear layers of a folder are
//! stored.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::arch::LinearSpec;
use crate::error::{Error, Result};
use crate::format::QuantizedMatrix;
use crate::io::fields::{Fields, bad_field};

const PREFIX: &str = "quantization_config.";
const MAX_GROUP_SIZE: usize = 1 << 22;
const BITS: [usize; 4] = [2, 3, 4, 8];

/// A checkpoint format of quantized linear layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum QuantFormat {
    /// GPTQ as stored by AutoGPTQ (`checkpoint_format` `gptq`): each zero point is stored less 1.
    Gptq,
    /// GPTQ with unchanged zero points (`gptq_v2`).
    GptqV2,
    /// compressed-tensors' `pack-quantized`.
    CompressedTensors,
    /// AWQ in AutoAWQ's version `gemm`, which is read only.
    Awq,
}

impl QuantFormat {
    /// Returns the name in configs: `gptq`, `gptq_v2`, `pack-quantized`, or AWQ's `gemm`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gptq => "gptq",
            Self::GptqV2 => "gptq_v2",
            Self::CompressedTensors => "pack-quantized",
            Self::Awq => "gemm",
        }
    }

    /// Returns an error for a format that is only read.
    pub(super) fn check_written(self) -> Result<()> {
        match self {
            Self::Gptq | Self::GptqV2 | Self::CompressedTensors => Ok(()),
            Self::Awq => Err(Error::Unsupported {
                what: "writing AWQ".into(),
            }),
        }
    }
}

/// A checked `quantization_config`. Fields that this crate does not read are kept when it is
/// written.
#[derive(Clone, Debug, PartialEq)]
#[doc(hidden)]
pub struct QuantizationConfig {
    raw: Map<String, Value>,
    format: QuantFormat,
    bits: u8,
    group_size: Option<usize>,
    symmetric: bool,
    act_order: bool,
}

impl QuantizationConfig {
    /// Checks a parsed `quantization_config`, or the `quantize_config.json` of a GPTQ folder, in
    /// which `quant_method` is optional.
    ///
    /// # Errors
    /// Returns [`Error::Unsupported`] for another method, another packing, or a feature that
    /// changes the result of a layer (quantized activations, settings that differ between layers,
    /// ...). Returns [`Error::InvalidConfig`] if a field is missing, of another type or out of
    /// range.
    pub fn from_json(raw: Map<String, Value>) -> Result<Self> {
        let fields = Fields {
            map: &raw,
            prefix: PREFIX,
        };
        match fields.str("quant_method")?.unwrap_or("gptq") {
            "gptq" => Self::from_gptq(raw),
            "compressed-tensors" => Self::from_compressed_tensors(raw),
            "awq" => Self::from_awq(raw),
            other => Err(Error::Unsupported {
                what: format!(
                    "a checkpoint quantized by method `{other}` (config field `quantization_config`)"
                ),
            }),
        }
    }

    fn from_gptq(raw: Map<String, Value>) -> Result<Self> {
        let fields = Fields {
            map: &raw,
            prefix: PREFIX,
        };
        let format = match fields
            .str("checkpoint_format")?
            .or(fields.str("format")?)
            .unwrap_or("gptq")
        {
            "gptq" => QuantFormat::Gptq,
            "gptq_v2" => QuantFormat::GptqV2,
            other => return unsupported("checkpoint_format", other),
        };
        match fields.str("pack_dtype")? {
            None | Some("int32" | "torch.int32") => {}
            Some(other) => return unsupported("pack_dtype", other),
        }
        // `-:pattern` leaves layers dense. All other rules give some layers settings of their own.
        if let Some(Value::Object(dynamic)) = raw.get("dynamic")
            && let Some(rule) = dynamic.keys().find(|rule| !rule.starts_with("-:"))
        {
            return unsupported("dynamic", rule);
        }
        let bits = bits(&fields, "bits", &BITS)?;
        let group_size = group_size(&fields, "group_size")?;
        let flag = |name: &str, absent: bool| Ok::<_, Error>(fields.bool(name)?.unwrap_or(absent));
        // Without `desc_act`, groups may still be out of order. The tensors show whether they are.
        let (symmetric, act_order) = (flag("sym", true)?, flag("desc_act", false)?);
        Ok(Self {
            format,
            bits,
            group_size,
            symmetric,
            act_order,
            raw,
        })
    }

    fn from_awq(raw: Map<String, Value>) -> Result<Self> {
        let fields = Fields {
            map: &raw,
            prefix: PREFIX,
        };
        // AutoAWQ has `version`, and GPTQModel and later transformers have `format`.
        for name in ["version", "format", "checkpoint_format"] {
            if let Some(other) = fields.str(name)?
                && !other.eq_ignore_ascii_case("gemm")
            {
                return unsupported(name, other);
            }
        }
        // A name of some versions for a file that does not say its own.
        if let Some(backend @ "llm-awq") = fields.str("backend")? {
            return unsupported("backend", backend);
        }
        match raw.get("modules_to_not_convert") {
            None | Some(Value::Null) => {}
            // The tensors show which layers these are.
            Some(Value::Array(names)) if names.iter().all(Value::is_string) => {}
            Some(other) => {
                let reason = format!("{other}, expected a list of names");
                return Err(bad_field(format!("{PREFIX}modules_to_not_convert"), reason));
            }
        }
        // Zero points are stored even where this is false.
        fields.bool("zero_point")?;
        // The names of AutoAWQ's own `quant_config.json` are in some configs.
        let name = |name: &'static str, own: &'static str| match raw.contains_key(name) {
            false if raw.contains_key(own) => own,
            _ => name,
        };
        let bits = bits(&fields, name("bits", "w_bit"), &[4])?;
        let group_size = group_size(&fields, name("group_size", "q_group_size"))?;
        Ok(Self {
            format: QuantFormat::Awq,
            bits,
            group_size,
            symmetric: false,
            act_order: false,
            raw,
        })
    }

    fn from_compressed_tensors(raw: Map<String, Value>) -> Result<Self> {
        let fields = Fields {
            map: &raw,
            prefix: PREFIX,
        };
        match fields.str("format")? {
            Some("pack-quantized") => {}
            other => return unsupported("format", other.unwrap_or("dense")),
        }
        let present = |name: &str| match raw.get(name) {
            None | Some(Value::Null) => false,
            Some(Value::Object(map)) => !map.is_empty(),
            Some(_) => true,
        };
        for name in ["kv_cache_scheme", "transform_config"] {
            if present(name) {
                return unsupported(name, "anything");
            }
        }
        if let Some(Value::Object(sparsity)) = raw.get("sparsity_config")
            && let Some(Value::String(format)) = sparsity.get("format")
            && format != "dense"
        {
            return unsupported("sparsity_config.format", format);
        }
        let Some(Value::Object(groups)) = raw.get("config_groups") else {
            return Err(bad_field(
                format!("{PREFIX}config_groups"),
                "missing or not an object",
            ));
        };
        // The tensors show which layers a group holds for.
        let mut parsed = groups.values().map(GroupSettings::parse);
        let Some(first) = parsed.next().transpose()? else {
            return unsupported("config_groups", "not one group of settings");
        };
        for other in parsed {
            if other? != first {
                return unsupported("config_groups", "groups of different settings");
            }
        }
        let GroupSettings {
            bits,
            group_size,
            symmetric,
            act_order,
        } = first;
        Ok(Self {
            format: QuantFormat::CompressedTensors,
            bits,
            group_size,
            symmetric,
            act_order,
            raw,
        })
    }

    /// Creates the config of a folder in which these layers are stored in this format. `all` lists
    /// the linear layers of the model; those not in `layers` stay dense.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if `layers` is empty. Returns [`Error::Unsupported`],
    /// naming the layer, if two layers differ in bits or group size, for 3 bits in
    /// compressed-tensors, and for GPTQ if a layer is quantized in one block and dense in another,
    /// because GPTQ's readers quantize the same layers of every block. AWQ is not written.
    pub fn for_layers(
        format: QuantFormat,
        layers: &BTreeMap<String, QuantizedMatrix>,
        all: &[LinearSpec],
    ) -> Result<Self> {
        let grids = layers.iter();
        let grids = grids.map(|(name, matrix)| (name.clone(), GridKind::of(matrix)));
        Self::for_grids(format, &grids.collect(), all)
    }

    /// Creates the config of [`for_layers`](Self::for_layers) from the kinds of the layers' grids.
    pub(in crate::io) fn for_grids(
        format: QuantFormat,
        layers: &BTreeMap<String, GridKind>,
        all: &[LinearSpec],
    ) -> Result<Self> {
        format.check_written()?;
        let Some((first, grid)) = layers.first_key_value() else {
            return Err(Error::argument(
                "layers",
                "none",
                "at least one quantized layer",
            ));
        };
        let bits = grid.bits;
        let per_row = layers.values().all(|grid| grid.per_row);
        let group_size = (!per_row).then_some(grid.group_size);
        for (layer, parts) in layers {
            if parts.bits != bits || group_size.is_some_and(|size| size != parts.group_size) {
                let what = format!(
                    "layer `{layer}` with {} bits in groups of {}, where `{first}` has {bits} in groups of {}, in one folder",
                    parts.bits, parts.group_size, grid.group_size
                );
                return Err(Error::Unsupported { what });
            }
        }
        let symmetric = layers.values().all(|grid| grid.symmetric);
        let act_order = layers.values().any(|grid| grid.reordered);
        let dense: Vec<&LinearSpec> = all
            .iter()
            .filter(|layer| !layers.contains_key(&layer.name))
            .collect();
        let raw = match format {
            QuantFormat::Gptq | QuantFormat::GptqV2 | QuantFormat::Awq => {
                let mut raw = json!({
                    "bits": bits,
                    "group_size": group_size.map_or(json!(-1), |size| json!(size)),
                    "desc_act": act_order,
                    "static_groups": false,
                    "sym": symmetric,
                    "true_sequential": true,
                    "lm_head": false,
                    "quant_method": "gptq",
                    "checkpoint_format": format.name(),
                    "pack_dtype": "int32",
                    "model_name_or_path": null,
                    "model_file_base_name": "model",
                    "meta": {"quantizer": [format!("elastic-lora:{}", env!("CARGO_PKG_VERSION"))]},
                });
                if !dense.is_empty() {
                    let (kept, left) = kinds_in_every_block(layers, all, &dense)?;
                    // transformers reads the first field, GPTQModel and vLLM read the second.
                    raw["modules_in_block_to_quantize"] = json!([kept]);
                    let rule =
                        |name: &str| (format!("-:.*\\.{}$", name.replace('.', "\\.")), json!({}));
                    raw["dynamic"] = left.into_iter().map(rule).collect::<Map<_, _>>().into();
                }
                raw
            }
            QuantFormat::CompressedTensors => {
                let mut ignore = vec!["lm_head"];
                ignore.extend(dense.iter().map(|layer| layer.name.as_str()));
                json!({
                    "quant_method": "compressed-tensors",
                    "format": format.name(),
                    "quantization_status": "compressed",
                    "ignore": ignore,
                    "kv_cache_scheme": null,
                    "global_compression_ratio": null,
                    "config_groups": {"group_0": {
                        "targets": ["Linear"],
                        "input_activations": null,
                        "output_activations": null,
                        "weights": {
                            "num_bits": bits,
                            "type": "int",
                            "symmetric": symmetric,
                            "strategy": if group_size.is_some() { "group" } else { "channel" },
                            "group_size": group_size,
                            "block_structure": null,
                            "dynamic": false,
                            "actorder": null,
                        },
                    }},
                })
            }
        };
        match raw {
            Value::Object(raw) => Self::from_json(raw),
            other => Err(bad_field("quantization_config", other.to_string())),
        }
    }

    /// Returns the format.
    pub fn format(&self) -> QuantFormat {
        self.format
    }

    /// Returns the number of bits of a code.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// Returns the number of columns of a group, or `None` if each row is a single group.
    pub fn group_size(&self) -> Option<usize> {
        self.group_size
    }

    /// Returns whether every zero point is the middle of the grid. For AWQ, only the layers show it.
    pub fn symmetric(&self) -> bool {
        self.symmetric
    }

    /// Returns whether the groups of columns may be out of order, as with GPTQ's activation order.
    pub fn act_order(&self) -> bool {
        self.act_order
    }

    /// Returns all fields as they were read.
    pub fn raw(&self) -> &Map<String, Value> {
        &self.raw
    }
}

/// What the config of a folder says about the grids of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::io) struct GridKind {
    bits: u8,
    group_size: usize,
    /// Whether each row is one group.
    per_row: bool,
    symmetric: bool,
    /// Whether the groups of columns may be out of order.
    reordered: bool,
}

impl GridKind {
    pub fn of(matrix: &QuantizedMatrix) -> Self {
        let parts = matrix.parts();
        Self {
            bits: parts.bits,
            group_size: parts.group_size,
            per_row: parts.group_size == matrix.cols(),
            symmetric: parts.symmetric,
            reordered: parts.group_of.is_some(),
        }
    }
}

/// The settings of a group of layers in compressed-tensors.
#[derive(PartialEq)]
struct GroupSettings {
    bits: u8,
    group_size: Option<usize>,
    symmetric: bool,
    act_order: bool,
}

impl GroupSettings {
    fn parse(group: &Value) -> Result<Self> {
        let Value::Object(group) = group else {
            let field = format!("{PREFIX}config_groups");
            return Err(bad_field(field, format!("{group}, expected an object")));
        };
        for name in ["input_activations", "output_activations"] {
            if group.get(name).is_some_and(|value| !value.is_null()) {
                return unsupported(name, "anything");
            }
        }
        match group.get("format").and_then(Value::as_str) {
            None | Some("pack-quantized") => {}
            Some(other) => return unsupported("config_groups.format", other),
        }
        let Some(Value::Object(weights)) = group.get("weights") else {
            return Err(bad_field(
                format!("{PREFIX}config_groups.weights"),
                "missing or not an object",
            ));
        };
        let fields = Fields {
            map: weights,
            prefix: "quantization_config.config_groups.weights.",
        };
        if let Some(other) = fields.str("type")?.filter(|name| *name != "int") {
            return unsupported("weights.type", other);
        }
        if let Some(other) = weights
            .get("dynamic")
            .filter(|value| !matches!(value, Value::Null | Value::Bool(false)))
        {
            return unsupported("weights.dynamic", &other.to_string());
        }
        let bits = match fields.size("num_bits", 8)? {
            Some(3) => {
                return unsupported(
                    "weights.num_bits",
                    "3, which versions of compressed-tensors pack in two ways",
                );
            }
            _ => bits(&fields, "num_bits", &[2, 4, 8])?,
        };
        let by_group = weights
            .get("group_size")
            .is_some_and(|size| !size.is_null());
        let group_size =
            match fields
                .str("strategy")?
                .unwrap_or(if by_group { "group" } else { "tensor" })
            {
                "group" => Some(fields.required_size("group_size", MAX_GROUP_SIZE)?),
                "channel" => None,
                other => return unsupported("weights.strategy", other),
            };
        let symmetric = fields.bool("symmetric")?.unwrap_or(true);
        // Of the activation orders, only `group` changes the tensors. `true` is an old spelling of
        // it.
        let act_order = match weights.get("actorder") {
            Some(Value::String(order)) => order == "group",
            Some(value) => value.as_bool().unwrap_or(false),
            None => false,
        };
        Ok(Self {
            bits,
            group_size,
            symmetric,
            act_order,
        })
    }
}

/// Returns the names, relative to a block, of the quantized layers and of the dense layers, in
/// model order.
fn kinds_in_every_block(
    layers: &BTreeMap<String, GridKind>,
    all: &[LinearSpec],
    dense: &[&LinearSpec],
) -> Result<(Vec<&'static str>, Vec<&'static str>)> {
    let kind = |layer: &LinearSpec| layer.kind.path();
    let left: BTreeSet<&str> = dense.iter().map(|layer| kind(layer)).collect();
    if let Some(layer) = all
        .iter()
        .find(|layer| layers.contains_key(&layer.name) && left.contains(kind(layer)))
    {
        let what = format!(
            "layer `{}`, quantized where that of another block is dense, in GPTQ",
            layer.name
        );
        return Err(Error::Unsupported { what });
    }
    let mut seen = BTreeSet::new();
    let kinds: Vec<&str> = all
        .iter()
        .map(kind)
        .filter(|kind| seen.insert(*kind))
        .collect();
    Ok(kinds.into_iter().partition(|kind| !left.contains(kind)))
}

fn unsupported<T>(field: &str, found: &str) -> Result<T> {
    Err(Error::Unsupported {
        what: format!("`{PREFIX}{field}`: {found}"),
    })
}

fn bits(fields: &Fields<'_>, name: &str, known: &[usize]) -> Result<u8> {
    let bits = fields.required_size(name, 64)?;
    match u8::try_from(bits) {
        Ok(small) if known.contains(&bits) => Ok(small),
        _ => unsupported(name, &bits.to_string()),
    }
}

/// Reads the group size of GPTQ or AWQ; -1 means that each row is a single group.
fn group_size(fields: &Fields<'_>, name: &str) -> Result<Option<usize>> {
    if fields.map.get(name).and_then(Value::as_i64) == Some(-1) {
        return Ok(None);
    }
    Ok(Some(fields.required_size(name, MAX_GROUP_SIZE)?))
}
