//! Typed, checked access to the fields of a JSON configuration.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

pub(crate) fn bad_field(field: impl Into<String>, reason: impl Into<String>) -> Error {
    Error::InvalidConfig {
        field: field.into(),
        reason: reason.into(),
    }
}

/// Typed access to a JSON object. A `null` field counts as absent.
pub(crate) struct Fields<'a> {
    pub map: &'a Map<String, Value>,
    /// Prefix of field names in errors.
    pub prefix: &'a str,
}

impl<'a> Fields<'a> {
    fn wrong(&self, name: &str, found: &Value, expected: &str) -> Error {
        let mut found = found.to_string();
        if found.len() > 60 {
            found = format!("{}...", found.chars().take(60).collect::<String>());
        }
        bad_field(
            format!("{}{name}", self.prefix),
            format!("{found}, expected {expected}"),
        )
    }

    fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|v| !v.is_null())
    }

    fn required<T>(&self, name: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| bad_field(format!("{}{name}", self.prefix), "missing"))
    }

    /// Returns a whole number in `1..=max`.
    pub fn size(&self, name: &str, max: usize) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (1..=max).contains(&n) => Ok(Some(n)),
            _ => Err(self.wrong(name, value, &format!("a whole number in 1..={max}"))),
        }
    }

    pub fn required_size(&self, name: &str, max: usize) -> Result<usize> {
        self.required(name, self.size(name, max)?)
    }

    pub fn f64(&self, name: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(v) => Ok(Some(v)),
            None => Err(self.wrong(name, value, "a number")),
        }
    }

    pub fn required_f64(&self, name: &str) -> Result<f64> {
        self.required(name, self.f64(name)?)
    }

    pub fn bool(&self, name: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        value
            .as_bool()
            .map(Some)
            .ok_or_else(|| self.wrong(name, value, "true or false"))
    }

    pub fn str(&self, name: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        value
            .as_str()
            .map(Some)
            .ok_or_else(|| self.wrong(name, value, "a string"))
    }

    /// Returns a token id or a list of them as a list, empty if absent. Ids of -1, an old spelling
    /// of "none", are skipped.
    pub fn token_ids(&self, name: &str) -> Result<Vec<u32>> {
        let Some(value) = self.get(name) else {
            return Ok(Vec::new());
        };
        let list = value
            .as_array()
            .map_or(std::slice::from_ref(value), Vec::as_slice);
        let mut ids = Vec::new();
        for item in list {
            match (
                item.as_i64(),
                item.as_u64().and_then(|id| u32::try_from(id).ok()),
            ) {
                (Some(-1), _) => {}
                (_, Some(id)) => ids.push(id),
                _ => return Err(self.wrong(name, value, "a token id or a list of them")),
            }
        }
        Ok(ids)
    }
}
