//! Matches the keys of `rank_pattern` and `alpha_pattern` against modules.
//!
//! PEFT evaluates `re.match(rf"(.*\.)?({key})$", module_path)` for each key in the order of the
//! file, and uses the first match.

use regex::{Regex, RegexBuilder};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::io::fields::bad_field;

/// Maximum number of keys and of bytes per key; no real adapter comes close.
const MAX_KEYS: usize = 1 << 16;
const MAX_KEY_BYTES: usize = 1 << 12;
/// Maximum size of a compiled regex in bytes and maximum number of them. Keys that need a regex are
/// rare.
const REGEX_BYTES: usize = 1 << 20;
const MAX_REGEXES: usize = 256;

enum Key {
    /// A module path or the end of one. A dot matches only a dot here, where PEFT's regex matches
    /// any character.
    Plain(String),
    Expression(Regex),
}

/// Keys in order, with their values.
#[derive(Default)]
pub(super) struct Pattern(Vec<(Key, f64)>);

impl Pattern {
    /// Parses the field `name`, an object of numbers. An absent or null field gives an empty
    /// pattern.
    pub fn parse(name: &str, value: Option<&Value>) -> Result<Self> {
        let map = match value {
            None | Some(Value::Null) => return Ok(Self::default()),
            Some(Value::Object(map)) => map,
            Some(other) => return Err(bad_field(name, format!("{other}, expected an object"))),
        };
        if map.len() > MAX_KEYS {
            return Err(bad_field(
                name,
                format!("{} keys, more than {MAX_KEYS}", map.len()),
            ));
        }
        let mut pattern = Self::default();
        let mut regexes = 0;
        for (key, value) in map {
            let Some(number) = value.as_f64().filter(|v| v.is_finite()) else {
                return Err(bad_field(
                    format!("{name}[{key:?}]"),
                    format!("{value}, expected a number"),
                ));
            };
            if key.len() > MAX_KEY_BYTES {
                return Err(bad_field(
                    name,
                    format!("a key of {} bytes, more than {MAX_KEY_BYTES}", key.len()),
                ));
            }
            if needs_regex(key) {
                regexes += 1;
                if regexes > MAX_REGEXES {
                    return Err(bad_field(
                        name,
                        format!("more than {MAX_REGEXES} keys that are expressions"),
                    ));
                }
            }
            pattern.push(name, key, number)?;
        }
        Ok(pattern)
    }

    /// Appends a key.
    pub fn push(&mut self, name: &str, key: &str, value: f64) -> Result<()> {
        let key = if needs_regex(key) {
            let regex = RegexBuilder::new(&format!(r"^(?:.*\.)?(?:{key})$"))
                .size_limit(REGEX_BYTES)
                .build();
            Key::Expression(regex.map_err(|e| Error::Unsupported {
                what: format!("key {key:?} of `{name}`: {e}"),
            })?)
        } else {
            Key::Plain(key.into())
        };
        self.0.push((key, value));
        Ok(())
    }

    /// Returns the value of the first key that matches `module`.
    pub fn find(&self, module: &str) -> Option<f64> {
        let matches = |key: &Key| match key {
            Key::Plain(key) => module
                .strip_suffix(key.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.ends_with('.')),
            Key::Expression(regex) => regex.is_match(module),
        };
        self.0
            .iter()
            .find(|(key, _)| matches(key))
            .map(|(_, value)| *value)
    }
}

/// Returns whether a key contains regex syntax other than dots.
pub(super) fn needs_regex(key: &str) -> bool {
    key.contains([
        '\\', '^', '$', '*', '+', '?', '(', ')', '[', ']', '{', '}', '|',
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn first_match_wins_at_a_dot() {
        let value = json!({
            "model.layers.1.self_attn.q_proj": 1, "q_proj": 2, r"layers\.(0|2)\..*v_proj": 3, "^lm_head": 4, "v_proj": 5
        });
        let pattern = Pattern::parse("rank_pattern", Some(&value)).unwrap();
        for (module, expected) in [
            ("model.layers.1.self_attn.q_proj", Some(1.0)),
            ("model.layers.11.self_attn.q_proj", Some(2.0)),
            ("model.layers.0.self_attn.v_proj", Some(3.0)),
            ("model.layers.1.self_attn.v_proj", Some(5.0)),
            ("lm_head", Some(4.0)),
            ("model.lm_head", None),
            ("model.layers.0.self_attn.qq_proj", None),
            ("q_proj", Some(2.0)),
        ] {
            assert_eq!(pattern.find(module), expected, "{module}");
        }
    }

    #[test]
    fn bad_patterns_are_refused() {
        for value in [
            json!([1]),
            json!({"q_proj": "x"}),
            json!({"(unclosed": 1}),
            json!({"(?=ahead)": 1}),
            json!({"(a{999}){999}": 1}),
        ] {
            assert!(
                Pattern::parse("rank_pattern", Some(&value)).is_err(),
                "{value}"
            );
        }
    }
}
