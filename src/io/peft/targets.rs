//! Which modules an adapter's config names.
//!
//! The rules are those of PEFT's `check_target_module_exists`.

use regex::{Regex, RegexBuilder};
use serde_json::{Map, Value};

use crate::error::Result;
use crate::io::fields::bad_field;

/// Maximum number of names, of bytes in an expression, and of bytes in a compiled one.
const MAX_NAMES: usize = 1 << 16;
const MAX_BYTES: usize = 1 << 14;
const REGEX_BYTES: usize = 1 << 22;

/// The value that stands for all linear layers but the head.
const ALL_LINEAR: &str = "all-linear";

/// A choice of modules.
enum Names {
    /// Whole paths, or ends of paths after a dot.
    List(Vec<String>),
    /// An expression that matches whole paths.
    Expression(Box<Regex>),
    AllLinear,
}

impl Names {
    /// Parses a field: a list of names or an expression. Returns `None` for an absent or null
    /// field, and for an expression that cannot be read here, of which `notices` then tells.
    fn parse(
        raw: &Map<String, Value>,
        field: &str,
        notices: &mut Vec<String>,
    ) -> Result<Option<Self>> {
        match raw.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(name)) if name == ALL_LINEAR => Ok(Some(Self::AllLinear)),
            Some(Value::String(text)) => {
                let regex = RegexBuilder::new(&format!("^(?:{text})$"))
                    .size_limit(REGEX_BYTES)
                    .build();
                match regex {
                    Ok(regex) if text.len() <= MAX_BYTES => {
                        Ok(Some(Self::Expression(regex.into())))
                    }
                    _ => {
                        let shown: String = text.chars().take(60).collect();
                        notices.push(format!(
                            "the expression of `{field}` cannot be read here, so all tensors of \
                             the adapter are applied: {shown:?}"
                        ));
                        Ok(None)
                    }
                }
            }
            Some(_) => strings(raw, field).map(|names| names.map(Self::List)),
        }
    }

    fn has(&self, module: &str) -> bool {
        match self {
            Self::List(names) => names.iter().any(|name| ends_in(module, name)),
            Self::Expression(regex) => regex.is_match(module),
            Self::AllLinear => !["lm_head", "embed_tokens"]
                .iter()
                .any(|table| ends_in(module, table)),
        }
    }
}

/// Whether `end` is the path of a module, or its last segments.
pub(super) fn ends_in(module: &str, end: &str) -> bool {
    module
        .strip_suffix(end)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Parses a list of strings, or one string as a list of one. Returns `None` if the field is absent
/// or null.
///
/// # Errors
/// Returns [`Error::InvalidConfig`](crate::Error::InvalidConfig) for anything else.
pub(super) fn strings(raw: &Map<String, Value>, field: &str) -> Result<Option<Vec<String>>> {
    let wrong = |found: &Value| {
        let shown: String = found.to_string().chars().take(60).collect();
        bad_field(field, format!("{shown}, expected a list of names"))
    };
    match raw.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(name)) => Ok(Some(vec![name.clone()])),
        Some(Value::Array(items)) if items.len() <= MAX_NAMES => items
            .iter()
            .map(|item| item.as_str().map(String::from).ok_or_else(|| wrong(item)))
            .collect::<Result<_>>()
            .map(Some),
        Some(other) => Err(wrong(other)),
    }
}

/// The modules that have a pair.
pub(super) struct Targets {
    /// `None` for all that are stored.
    include: Option<Names>,
    exclude: Option<Names>,
    /// Modules that are trained whole, and what lies in them.
    saved: Vec<String>,
    /// Indices of blocks; `None` for all.
    layers: Option<Vec<u64>>,
    /// Names of lists of blocks; empty for any.
    lists: Vec<String>,
}

impl Targets {
    /// Parses `target_modules`, `exclude_modules`, `modules_to_save`, `layers_to_transform` and
    /// `layers_pattern`.
    ///
    /// # Errors
    /// Returns [`Error::InvalidConfig`](crate::Error::InvalidConfig) for a field of another type.
    pub fn parse(raw: &Map<String, Value>, notices: &mut Vec<String>) -> Result<Self> {
        let index = |value: &Value| {
            let field = "layers_to_transform";
            let reason = || format!("{value}, expected indices of blocks");
            value.as_u64().ok_or_else(|| bad_field(field, reason()))
        };
        let layers = match raw.get("layers_to_transform") {
            None | Some(Value::Null) => None,
            Some(Value::Array(items)) if items.is_empty() => None,
            Some(Value::Array(items)) => Some(items.iter().map(index).collect::<Result<Vec<_>>>()?),
            Some(one) => Some(vec![index(one)?]),
        };
        Ok(Self {
            include: Names::parse(raw, "target_modules", notices)?,
            exclude: Names::parse(raw, "exclude_modules", notices)?,
            saved: strings(raw, "modules_to_save")?.unwrap_or_default(),
            layers,
            lists: strings(raw, "layers_pattern")?.unwrap_or_default(),
        })
    }

    /// Whether the config gives a pair to a module, by its path in the base model.
    pub fn has(&self, module: &str) -> bool {
        let dotted = format!(".{module}.");
        let saved = |name: &String| dotted.contains(&format!(".{name}."));
        if self.exclude.as_ref().is_some_and(|names| names.has(module))
            || self.saved.iter().any(saved)
        {
            return false;
        }
        match &self.include {
            None => true,
            Some(names @ Names::List(list)) => {
                // A path that is named whole is taken whatever its block.
                list.iter().any(|name| name == module)
                    || (names.has(module) && self.has_block_of(module))
            }
            Some(names) => names.has(module),
        }
    }

    /// Whether `layers_to_transform` has the block of a module.
    fn has_block_of(&self, module: &str) -> bool {
        let Some(layers) = &self.layers else {
            return true;
        };
        let segments: Vec<&str> = module.split('.').collect();
        // The index follows the name of the list, and something follows the index.
        let of_list = |at: usize| {
            let before = segments[..at].join(".");
            match self.lists.is_empty() {
                true => at >= 2,
                false => self.lists.iter().any(|list| ends_in(&before, list)),
            }
        };
        let block = (1..segments.len().saturating_sub(1))
            .filter(|at| of_list(*at))
            .find_map(|at| segments[at].parse().ok());
        block.is_some_and(|block: u64| layers.contains(&block))
    }

    /// Whether a module is trained whole, as `modules_to_save` says. PEFT compares the ends of
    /// paths, even inside a segment.
    pub fn saves(&self, module: &str) -> bool {
        self.saved
            .iter()
            .any(|name| module.ends_with(name.as_str()))
    }

    /// The names of modules that are trained whole.
    pub fn saved(&self) -> &[String] {
        &self.saved
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const Q: &str = "model.layers.11.self_attn.q_proj";

    fn targets(config: Value) -> (Targets, Vec<String>) {
        let mut notices = Vec::new();
        let targets = Targets::parse(config.as_object().unwrap(), &mut notices).unwrap();
        (targets, notices)
    }

    #[test]
    fn modules_are_named_as_peft_names_them() {
        for (config, module, expected) in [
            (json!({}), Q, true),
            (json!({"target_modules": ["q_proj"]}), Q, true),
            (json!({"target_modules": ["proj"]}), Q, false),
            (
                json!({"target_modules": ["self_attn.q_proj", "x"]}),
                Q,
                true,
            ),
            (json!({"target_modules": "q_proj"}), Q, false),
            (json!({"target_modules": r".*\.(q|k)_proj"}), Q, true),
            (json!({"target_modules": r"layers\.\d+\..*"}), Q, false),
            (json!({"target_modules": "all-linear"}), Q, true),
            (json!({"target_modules": "all-linear"}), "lm_head", false),
            (json!({"target_modules": ["lm_head"]}), "lm_head", true),
            (
                json!({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}),
                Q,
                false,
            ),
            (
                json!({"target_modules": ["q_proj"], "exclude_modules": r".*\.11\..*"}),
                Q,
                false,
            ),
            (
                json!({"target_modules": ["q_proj"], "exclude_modules": ["k_proj"]}),
                Q,
                true,
            ),
            (
                json!({"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]}),
                Q,
                false,
            ),
            (
                json!({"target_modules": ["q_proj"], "modules_to_save": ["attn"]}),
                Q,
                true,
            ),
            (
                json!({"target_modules": ["q_proj"], "layers_to_transform": 11}),
                Q,
                true,
            ),
            (
                json!({"target_modules": ["q_proj"], "layers_to_transform": [1, 11]}),
                Q,
                true,
            ),
            (
                json!({"target_modules": ["q_proj"], "layers_to_transform": [1]}),
                Q,
                false,
            ),
            (
                json!({"target_modules": ["q_proj"], "layers_to_transform": []}),
                Q,
                true,
            ),
            (
                json!({"target_modules": [Q], "layers_to_transform": [1]}),
                Q,
                true,
            ),
            (
                json!({"target_modules": ["q_proj"], "layers_to_transform": [11], "layers_pattern": "layers"}),
                Q,
                true,
            ),
            (
                json!({"target_modules": ["q_proj"], "layers_to_transform": [11], "layers_pattern": ["h"]}),
                Q,
                false,
            ),
            (
                json!({"target_modules": ["head"], "layers_to_transform": [0]}),
                "lm_head",
                false,
            ),
        ] {
            let (targets, notices) = targets(config.clone());
            assert_eq!(targets.has(module), expected, "{config}");
            assert!(notices.is_empty(), "{notices:?}");
        }
    }

    #[test]
    fn an_expression_that_cannot_be_read_is_told_of() {
        let config = json!({"target_modules": r"^(?!.*visual).*q_proj"});
        let (targets, notices) = targets(config);
        assert!(targets.has(Q));
        assert!(notices[0].contains("target_modules") && notices[0].contains("visual"));
    }

    #[test]
    fn fields_of_another_type_are_refused() {
        for config in [
            json!({"target_modules": [3]}),
            json!({"target_modules": {}}),
            json!({"layers_to_transform": "x"}),
            json!({"layers_to_transform": [-1]}),
            json!({"modules_to_save": [[]]}),
        ] {
            let raw = config.as_object().unwrap();
            assert!(Targets::parse(raw, &mut Vec::new()).is_err(), "{config}");
        }
    }
}
