//! Sizes of each block as transformers (5.14 and later) writes them: the config field
//! `per_layer_config`, an object that holds by the number of a block what differs from the fields of
//! the whole config. `skip` lists the parts that a block does not have.

use serde_json::{Map, Value, json};

use super::config::{MAX_HEADS, MAX_WIDTH};
use crate::arch::{BlockDims, Family};
use crate::error::{Error, Result};
use crate::io::fields::{Fields, bad_field};

const FIELD: &str = "per_layer_config";
const SKIP: &str = "skip";
const ATTENTION: &str = "attention";
const MLP: &str = "mlp";
const WIDTH: &str = "intermediate_size";
const HEADS: &str = "num_attention_heads";
const KV_HEADS: &str = "num_key_value_heads";

/// Returns whether a config has such sizes.
pub(super) fn has(raw: &Map<String, Value>) -> bool {
    raw.get(FIELD)
        .is_some_and(|value| !value.is_null() && *value != json!({}))
}

/// Removes the field.
pub(super) fn remove(raw: &mut Map<String, Value>) {
    raw.remove(FIELD);
}

/// Parses the sizes. `all` holds those of the whole config; its MLP has no width if the field is
/// absent.
pub(super) fn parse(
    raw: &Map<String, Value>,
    n_blocks: usize,
    all: BlockDims,
) -> Result<Vec<BlockDims>> {
    let Some(Value::Object(items)) = raw.get(FIELD) else {
        return Err(bad_field(FIELD, "expected an object"));
    };
    let mut found: Vec<Option<BlockDims>> = vec![None; n_blocks];
    for (key, item) in items {
        let place = key
            .parse()
            .ok()
            .and_then(|index: usize| found.get_mut(index));
        let Some(place) = place else {
            let reason = format!("`{key}` is no block; num_hidden_layers = {n_blocks}");
            return Err(bad_field(FIELD, reason));
        };
        if place.is_some() {
            return Err(bad_field(
                FIELD,
                format!("block `{key}` stands there twice"),
            ));
        }
        *place = Some(block(raw, key, item, all)?);
    }
    let blocks: Vec<BlockDims> = found.into_iter().map(|one| one.unwrap_or(all)).collect();
    let without = |block: &BlockDims| !block.has_attention() && !block.has_mlp();
    for (index, block) in blocks.iter().enumerate() {
        if without(block) {
            let reason = "neither attention nor MLP: leave the block out";
            return Err(bad_field(format!("{FIELD}.{index}"), reason));
        }
    }
    Ok(blocks)
}

fn block(raw: &Map<String, Value>, key: &str, item: &Value, all: BlockDims) -> Result<BlockDims> {
    let at = format!("{FIELD}.{key}");
    let Value::Object(map) = item else {
        return Err(bad_field(at, "expected an object"));
    };
    let prefix = format!("{at}.");
    let fields = Fields {
        map,
        prefix: &prefix,
    };
    for (name, value) in map {
        // A field that repeats the whole config's changes nothing.
        let known = [SKIP, WIDTH, HEADS, KV_HEADS].contains(&name.as_str());
        if !known && raw.get(name) != Some(value) {
            let what = format!("config field `{prefix}{name}` = {value}");
            return Err(Error::Unsupported { what });
        }
    }
    let mut dims = BlockDims {
        n_heads: fields.size(HEADS, MAX_HEADS)?.unwrap_or(all.n_heads),
        n_kv_heads: fields.size(KV_HEADS, MAX_HEADS)?.unwrap_or(all.n_kv_heads),
        d_mlp: fields.size(WIDTH, MAX_WIDTH)?.unwrap_or(all.d_mlp),
    };
    if !dims.n_heads.is_multiple_of(dims.n_kv_heads.max(1)) {
        let reason = format!("{} does not divide {} heads", dims.n_kv_heads, dims.n_heads);
        return Err(bad_field(format!("{prefix}{KV_HEADS}"), reason));
    }
    let skipped = match map.get(SKIP) {
        None | Some(Value::Null) => &[],
        Some(Value::Array(names)) => names.as_slice(),
        Some(other) => {
            let reason = format!("{other}, expected a list of names");
            return Err(bad_field(format!("{prefix}{SKIP}"), reason));
        }
    };
    for name in skipped {
        match name.as_str() {
            Some(ATTENTION) => (dims.n_heads, dims.n_kv_heads) = (0, 0),
            Some(MLP) => dims.d_mlp = 0,
            _ => {
                let what = format!("config field `{prefix}{SKIP}`: {name}");
                return Err(Error::Unsupported { what });
            }
        }
    }
    let wanted = !skipped.iter().any(|name| name == MLP);
    if dims.d_mlp == 0 && wanted {
        return Err(bad_field(format!("{prefix}{WIDTH}"), "missing"));
    }
    Ok(dims)
}

/// Returns the sizes for `blocks` read elsewhere: those, if this field agrees with them or is
/// absent, or, without others, those of this field.
pub(super) fn reconcile(
    raw: &Map<String, Value>,
    all: BlockDims,
    head_dim: usize,
    blocks: Vec<BlockDims>,
    others: Option<&str>,
) -> Result<Vec<BlockDims>> {
    if !has(raw) {
        return Ok(blocks);
    }
    let own = parse(raw, blocks.len(), all)?;
    let too_wide = |block: &BlockDims| block.n_heads.saturating_mul(head_dim) > MAX_WIDTH;
    if let Some(index) = own.iter().position(too_wide) {
        let reason = format!(
            "{} heads of {head_dim} exceed a width of {MAX_WIDTH}",
            own[index].n_heads
        );
        return Err(bad_field(format!("{FIELD}.{index}.{HEADS}"), reason));
    }
    match others {
        Some(field) => match own
            .iter()
            .zip(&blocks)
            .position(|(own, other)| own != other)
        {
            None => Ok(blocks),
            Some(index) => {
                let reason = format!(
                    "block {index} has {:?}, but {field} gives it {:?}",
                    own[index], blocks[index]
                );
                Err(bad_field(FIELD, reason))
            }
        },
        // Readers know it for this family alone.
        None if raw.get("model_type") == Some(&Family::Llama.model_type().into()) => Ok(own),
        None => {
            let family = raw.get("model_type").cloned().unwrap_or_default();
            let what = format!("config field `{FIELD}` with `model_type` = {family}");
            Err(Error::Unsupported { what })
        }
    }
}

/// Writes the sizes, if this field can describe them: all blocks with attention have the number of
/// query heads of the whole config, `heads`.
pub(super) fn write(raw: &mut Map<String, Value>, blocks: &[BlockDims], heads: usize) {
    if blocks
        .iter()
        .any(|block| ![0, heads].contains(&block.n_heads))
    {
        return;
    }
    let digits = blocks.len().saturating_sub(1).to_string().len();
    let global = |name: &str| raw.get(name).cloned().unwrap_or_default();
    let (width, kv_heads) = (global(WIDTH), global(KV_HEADS));
    let mut items = Map::new();
    for (index, block) in blocks.iter().enumerate() {
        let mut item = Map::new();
        let mut skipped = Vec::new();
        if !block.has_attention() {
            skipped.push(ATTENTION);
        } else if kv_heads != json!(block.n_kv_heads) {
            item.insert(KV_HEADS.into(), block.n_kv_heads.into());
        }
        if !block.has_mlp() {
            skipped.push(MLP);
        } else if width != json!(block.d_mlp) {
            item.insert(WIDTH.into(), block.d_mlp.into());
        }
        if !skipped.is_empty() {
            item.insert(SKIP.into(), json!(skipped));
        }
        if !item.is_empty() {
            items.insert(format!("{index:0digits$}"), item.into());
        }
    }
    raw.insert(FIELD.into(), items.into());
}
