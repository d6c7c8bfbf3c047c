//! The tasks that the crate knows.

use std::path::Path;

use serde_json::Value;

use super::spec::{TaskSpec, Values, parse, values};
use crate::error::Result;

/// The descriptions: those of lm-evaluation-harness 0.4.13, and those of LLM-Adapters.
const FILES: [(&str, &str); 2] = [
    ("harness.json", include_str!("builtin/harness.json")),
    (
        "llm_adapters.json",
        include_str!("builtin/llm_adapters.json"),
    ),
];

/// Returns all descriptions.
pub(super) fn all() -> Result<Vec<TaskSpec>> {
    let mut all = Vec::new();
    for (name, text) in FILES {
        all.extend(parse(text.as_bytes(), Path::new(name), &Values::new())?);
    }
    Ok(all)
}

/// Returns the descriptions as they stand, by their names and aliases.
pub(super) fn values_by_name() -> Result<Values> {
    let mut known = Values::new();
    for (name, text) in FILES {
        for map in values(text.as_bytes(), Path::new(name), &Values::new())? {
            let aliases = map.get("aliases").and_then(Value::as_array).cloned();
            let names = aliases
                .unwrap_or_default()
                .into_iter()
                .chain(map.get("task").cloned());
            for name in names {
                if let Value::String(name) = name {
                    known.insert(name, map.clone());
                }
            }
        }
    }
    Ok(known)
}
