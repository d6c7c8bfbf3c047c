//! Search spaces and subnets from files: this crate's own format, SQFT's, and NNCF's.
//!
//! The authors' formats follow IntelLabs/Hardware-Aware-Automated-Machine-Learning `fc29bc7`. One
//! departure: an NNCF template (`{re}...[{*}]...`) is expanded over the model's blocks, not over a
//! number of blocks given beside the file.

use std::collections::HashSet;
use std::path::Path;

use serde_json::{Map, Value};

use super::{Elastic, Group, LayerShape, SearchSpace, SubnetConfig, default_id};
use crate::error::{Error, Result};
use crate::input::{json, read_capped};

/// Maximum file size. A model of 1000 blocks needs about 1 MiB.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// Reads a text file of at most [`MAX_FILE_BYTES`].
pub(super) fn read_text(path: &Path) -> Result<String> {
    let bytes = read_capped(path, MAX_FILE_BYTES)?;
    String::from_utf8(bytes).map_err(|_| Error::invalid_file(path, "not UTF-8"))
}

fn parse(path: &Path, text: &str) -> Result<Value> {
    json::value(text.as_bytes()).map_err(|source| Error::json(path, source))
}

fn bad_field(path: &Path, field: &str, reason: impl std::fmt::Display) -> Error {
    Error::invalid_file(path, format!("field `{field}`: {reason}"))
}

pub(super) fn space_from_file(path: &Path, layers: &[LayerShape]) -> Result<SearchSpace> {
    let text = read_text(path)?;
    match parse(path, &text)? {
        Value::Array(items) => from_elastic_adapter_config(path, &items, layers),
        Value::Object(map) if map.contains_key("groups") => {
            // Parse the text again, so that serde's errors have line and column.
            let space: SearchSpace =
                serde_json::from_str(&text).map_err(|source| Error::json(path, source))?;
            match space.validate_layers(layers, usize::MAX) {
                Err(Error::UnknownLayer { context, layer }) => Err(Error::UnknownLayer {
                    context: format!("{}: {context}", path.display()),
                    layer,
                }),
                result => result.map(|()| space),
            }
        }
        Value::Object(map) => match find_widths(&map, String::new()) {
            Some((field, width)) => from_nncf(path, &field, width, layers),
            None => Err(Error::invalid_file(
                path,
                "no search space: neither `groups` nor `overwrite_groups` is in it",
            )),
        },
        other => Err(Error::invalid_file(
            path,
            format!("no search space: {} at the top", kind_of(&other)),
        )),
    }
}

pub(super) fn config_from_file(space: &SearchSpace, path: &Path) -> Result<SubnetConfig> {
    let text = read_text(path)?;
    let config = match parse(path, &text)? {
        Value::Object(_) => {
            serde_json::from_str(&text).map_err(|source| Error::json(path, source))?
        }
        Value::Array(items) if items.first().is_some_and(Value::is_object) => {
            from_custom_config(space, path, &items)?
        }
        Value::Array(items) => {
            let value =
                |(index, item): (usize, &Value)| positive(path, &format!("[{index}]"), item);
            let values: Vec<usize> = items.iter().enumerate().map(value).collect::<Result<_>>()?;
            space
                .from_values(&values)
                .map_err(|error| Error::invalid_file(path, error.to_string()))?
        }
        other => {
            return Err(Error::invalid_file(
                path,
                format!("no subnet: {} at the top", kind_of(&other)),
            ));
        }
    };
    match space.validate(&config) {
        Ok(()) => Ok(config),
        Err(error) => Err(Error::invalid_file(path, error.to_string())),
    }
}

/// Collects groups, and checks each name against the model and the previous groups.
struct Groups<'a> {
    path: &'a Path,
    known: HashSet<&'a str>,
    taken: HashSet<(Elastic, String)>,
    ids: HashSet<String>,
    groups: Vec<Group>,
}

impl<'a> Groups<'a> {
    fn new(path: &'a Path, layers: &'a [LayerShape]) -> Self {
        let known = layers.iter().map(|layer| layer.name.as_str()).collect();
        Self {
            path,
            known,
            taken: HashSet::new(),
            ids: HashSet::new(),
            groups: Vec::new(),
        }
    }

    fn push(
        &mut self,
        field: &str,
        kind: Elastic,
        layers: Vec<String>,
        choices: &[usize],
    ) -> Result<()> {
        if layers.is_empty() {
            return Err(bad_field(self.path, field, "it has no layers"));
        }
        for layer in &layers {
            if !self.known.contains(layer.as_str()) {
                let context = format!("{}: field `{field}`", self.path.display());
                return Err(Error::UnknownLayer {
                    context,
                    layer: layer.clone(),
                });
            }
            if !self.taken.insert((kind, layer.clone())) {
                return Err(bad_field(
                    self.path,
                    field,
                    format!("layer `{layer}` is in a group already"),
                ));
            }
        }
        let base = default_id(kind, &layers);
        let mut id = base.clone();
        for number in 2.. {
            if self.ids.insert(id.clone()) {
                break;
            }
            id = format!("{base}#{number}");
        }
        let group = Group::of_kind(kind, id, layers, choices.to_vec())
            .map_err(|error| bad_field(self.path, field, error))?;
        self.groups.push(group);
        Ok(())
    }

    fn finish(self) -> Result<SearchSpace> {
        SearchSpace::new(self.groups)
            .map_err(|error| Error::invalid_file(self.path, error.to_string()))
    }
}

// --- SQFT: [{"target": [...], "search_space": [...]}] --------------------------------------------

fn from_elastic_adapter_config(
    path: &Path,
    items: &[Value],
    layers: &[LayerShape],
) -> Result<SearchSpace> {
    let mut groups = Groups::new(path, layers);
    for (index, item) in items.iter().enumerate() {
        let field = format!("[{index}]");
        let map = object(path, &field, item)?;
        if !map.contains_key("search_space") && map.contains_key("active_rank_value") {
            return Err(bad_field(
                path,
                &field,
                "this is a subnet (`active_rank_value`), not a search space",
            ));
        }
        let choices = integers(
            path,
            &format!("{field}.search_space"),
            member(path, &field, map, "search_space")?,
        )?;
        groups.push(
            &format!("{field}.target"),
            Elastic::Rank,
            targets(path, &field, map)?,
            &choices,
        )?;
    }
    groups.finish()
}

fn from_custom_config(space: &SearchSpace, path: &Path, items: &[Value]) -> Result<SubnetConfig> {
    let mut config = SubnetConfig::new();
    for (index, item) in items.iter().enumerate() {
        let field = format!("[{index}]");
        let map = object(path, &field, item)?;
        let value_field = format!("{field}.active_rank_value");
        let value = positive(
            path,
            &value_field,
            member(path, &field, map, "active_rank_value")?,
        )?;
        for layer in targets(path, &field, map)? {
            let Some(group) = space.group_of_layer(&layer) else {
                let context = format!("{}: field `{field}.target`", path.display());
                return Err(Error::UnknownLayer { context, layer });
            };
            group
                .index_of(value)
                .map_err(|error| bad_field(path, &value_field, error))?;
            if let Some(other) = config
                .set(group.id(), value)
                .filter(|&other| other != value)
            {
                let reason = format!(
                    "{value} for `{layer}`, but its group `{}` has {other} already",
                    group.id()
                );
                return Err(bad_field(path, &value_field, reason));
            }
        }
    }
    Ok(config)
}

/// Returns the layers of `target` without PEFT's prefix and suffix. `lora_A` and `lora_B` of one
/// layer count once.
fn targets(path: &Path, field: &str, map: &Map<String, Value>) -> Result<Vec<String>> {
    let field = format!("{field}.target");
    let Some(Value::Array(items)) = map.get("target") else {
        return Err(bad_field(path, &field, "expected a list of names"));
    };
    let mut layers: Vec<String> = Vec::with_capacity(items.len());
    let mut seen = HashSet::new();
    for (index, item) in items.iter().enumerate() {
        let Value::String(name) = item else {
            return Err(bad_field(
                path,
                &format!("{field}[{index}]"),
                format!("{} is no name", kind_of(item)),
            ));
        };
        let layer = strip_peft(name);
        if seen.insert(layer) {
            layers.push(layer.to_string());
        }
    }
    Ok(layers)
}

/// Reduces `base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight` to the layer's
/// path: removes the prefix, and everything from `.lora_A` on.
fn strip_peft(name: &str) -> &str {
    let name = name.strip_prefix("base_model.model.").unwrap_or(name);
    let cut = [".lora_A", ".lora_B"].iter().filter_map(|mark| {
        let at = name.find(mark)?;
        let rest = &name[at + mark.len()..];
        (rest.is_empty() || rest.starts_with('.')).then_some(at)
    });
    match cut.min() {
        Some(at) => &name[..at],
        None => name.strip_suffix(".weight").unwrap_or(name),
    }
}

// --- NNCF: overwrite_groups, overwrite_groups_widths ---------------------------------------------

/// Returns the first object, in file order, that contains `overwrite_groups`, and its field path.
fn find_widths(map: &Map<String, Value>, field: String) -> Option<(String, &Map<String, Value>)> {
    if map.contains_key("overwrite_groups") {
        return Some((field, map));
    }
    map.iter().find_map(|(key, value)| match value {
        Value::Object(inner) => find_widths(inner, format!("{field}{key}.")),
        _ => None,
    })
}

fn from_nncf(
    path: &Path,
    prefix: &str,
    width: &Map<String, Value>,
    layers: &[LayerShape],
) -> Result<SearchSpace> {
    let list = |key: &str| match width.get(key) {
        Some(Value::Array(items)) => Ok(items),
        Some(other) => Err(bad_field(
            path,
            &format!("{prefix}{key}"),
            format!("{}, not a list", kind_of(other)),
        )),
        None => Err(bad_field(path, &format!("{prefix}{key}"), "missing")),
    };
    let (names, widths) = (list("overwrite_groups")?, list("overwrite_groups_widths")?);
    if names.len() != widths.len() {
        let reason = format!("{} lists for {} groups", widths.len(), names.len());
        return Err(bad_field(
            path,
            &format!("{prefix}overwrite_groups_widths"),
            reason,
        ));
    }
    let mut groups = Groups::new(path, layers);
    for (index, (names, widths)) in names.iter().zip(widths).enumerate() {
        let field = format!("{prefix}overwrite_groups[{index}]");
        let choices = integers(
            path,
            &format!("{prefix}overwrite_groups_widths[{index}]"),
            widths,
        )?;
        let Value::Array(names) = names else {
            return Err(bad_field(
                path,
                &field,
                format!("{}, not a list of names", kind_of(names)),
            ));
        };
        let mut kind = None;
        let mut layers_of_group: Vec<String> = Vec::with_capacity(names.len());
        for (at, name) in names.iter().enumerate() {
            let field = format!("{field}[{at}]");
            let Value::String(name) = name else {
                return Err(bad_field(
                    path,
                    &field,
                    format!("{} is no name", kind_of(name)),
                ));
            };
            let (of_node, layer) = nncf_layer(path, &field, name)?;
            if *kind.get_or_insert(of_node) != of_node {
                return Err(bad_field(
                    path,
                    &field,
                    format!("`{name}`: ranks and widths in one group"),
                ));
            }
            // A width lists both the base weight and `lora_B` of one layer.
            if of_node == Elastic::Rank || !layers_of_group.contains(&layer) {
                layers_of_group.push(layer);
            }
        }
        let kind = kind.unwrap_or_default();
        if layers_of_group.iter().any(|name| name.contains("{*}")) {
            for block in expand(path, &field, &layers_of_group, layers)? {
                groups.push(&field, kind, block, &choices)?;
            }
        } else {
            groups.push(&field, kind, layers_of_group, &choices)?;
        }
    }
    groups.finish()
}

/// Returns the layer of an NNCF node, and whether the node's output channels are its rank or its
/// width.
///
/// `.../LlamaDecoderLayer[0]/LlamaAttention[self_attn]/Linear[q_proj]/ModuleDict[lora_A]/...` is
/// the rank of `model.layers.0.self_attn.q_proj`. The same node without `lora_A`, or with `lora_B`,
/// is its width. Each part has the form `Type[name]`, except that the first is a type alone and the
/// last an operation.
fn nncf_layer(path: &Path, field: &str, node: &str) -> Result<(Elastic, String)> {
    let parts: Vec<&str> = node
        .strip_prefix("{re}")
        .unwrap_or(node)
        .split('/')
        .collect();
    let mut names = Vec::with_capacity(parts.len());
    for (at, part) in parts.iter().enumerate() {
        match part.strip_suffix(']').and_then(|part| part.split_once('[')) {
            Some((_, name)) => names.push(name),
            None if at == 0 || at + 1 == parts.len() => {}
            None => {
                return Err(bad_field(
                    path,
                    field,
                    format!("`{part}` in `{node}` is not of the form Type[name]"),
                ));
            }
        }
    }
    let end = names
        .iter()
        .position(|name| matches!(*name, "lora_A" | "lora_B"));
    let kind = if end.is_some_and(|at| names[at] == "lora_A") {
        Elastic::Rank
    } else {
        Elastic::Width
    };
    let path_of_layer = names[..end.unwrap_or(names.len())].join(".");
    let layer = strip_peft(&path_of_layer);
    // Names that PEFT and NNCF give to the linear layer inside an adapted one.
    let inner = [".base_layer", ".self_linear"];
    match inner
        .iter()
        .find_map(|inner| layer.strip_suffix(inner))
        .unwrap_or(layer)
    {
        "" => Err(bad_field(path, field, format!("`{node}` names no layer"))),
        layer => Ok((kind, layer.to_string())),
    }
}

/// Returns one list of layers per block of the model that matches `patterns`, each of which has one
/// `{*}` for the block's number.
fn expand(
    path: &Path,
    field: &str,
    patterns: &[String],
    layers: &[LayerShape],
) -> Result<Vec<Vec<String>>> {
    let mut blocks: Vec<(&str, Vec<String>)> = Vec::new();
    for pattern in patterns {
        let (head, tail) = match pattern.split_once("{*}") {
            Some((head, tail)) if !tail.contains("{*}") => (head, tail),
            _ => {
                return Err(bad_field(
                    path,
                    field,
                    format!("`{pattern}` needs exactly one {{*}}, as its group has"),
                ));
            }
        };
        let mut fits = false;
        for layer in layers {
            let Some(number) = layer
                .name
                .strip_prefix(head)
                .and_then(|rest| rest.strip_suffix(tail))
            else {
                continue;
            };
            if number.is_empty() || !number.bytes().all(|byte| byte.is_ascii_digit()) {
                continue;
            }
            fits = true;
            match blocks.iter_mut().find(|(block, _)| *block == number) {
                Some((_, names)) => names.push(layer.name.clone()),
                None => blocks.push((number, vec![layer.name.clone()])),
            }
        }
        if !fits {
            let context = format!("{}: field `{field}`", path.display());
            return Err(Error::UnknownLayer {
                context,
                layer: pattern.clone(),
            });
        }
    }
    Ok(blocks.into_iter().map(|(_, names)| names).collect())
}

// --- JSON values ---------------------------------------------------------------------------------

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn object<'a>(path: &Path, field: &str, value: &'a Value) -> Result<&'a Map<String, Value>> {
    value
        .as_object()
        .ok_or_else(|| bad_field(path, field, format!("{}, not an object", kind_of(value))))
}

fn member<'a>(
    path: &Path,
    field: &str,
    map: &'a Map<String, Value>,
    key: &str,
) -> Result<&'a Value> {
    map.get(key)
        .ok_or_else(|| bad_field(path, &format!("{field}.{key}"), "missing"))
}

fn positive(path: &Path, field: &str, value: &Value) -> Result<usize> {
    match value.as_u64().and_then(|value| usize::try_from(value).ok()) {
        Some(value) if value > 0 => Ok(value),
        _ => Err(bad_field(
            path,
            field,
            format!("{value} is not a whole number over 0"),
        )),
    }
}

fn integers(path: &Path, field: &str, value: &Value) -> Result<Vec<usize>> {
    let Value::Array(items) = value else {
        return Err(bad_field(
            path,
            field,
            format!("{}, not a list of numbers", kind_of(value)),
        ));
    };
    items
        .iter()
        .enumerate()
        .map(|(at, item)| positive(path, &format!("{field}[{at}]"), item))
        .collect()
}
