//! Subnet configurations: one value for every group.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The value (in mode A, a rank) of each group of a [`SearchSpace`](super::SearchSpace), by the
/// group's id.
///
/// The JSON form is a plain object: `{"layers.0.q_proj+k_proj+v_proj": 24, ...}`. Two
/// configurations are equal if all their values are, so a configuration can be the key of a cache.
///
/// [`Display`](fmt::Display) writes the values run-length encoded, such as `32x4,24x2`, with the
/// groups in the natural order of their ids (`layers.2` before `layers.10`).
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SubnetConfig {
    values: BTreeMap<String, usize>,
}

impl SubnetConfig {
    /// Creates a configuration without groups, to be filled with [`set`](Self::set).
    pub fn new() -> Self {
        Self::default()
    }

    /// The value of a group, or `None` if the configuration does not have the group.
    pub fn get(&self, group: &str) -> Option<usize> {
        self.values.get(group).copied()
    }

    /// Sets the value of a group and returns the previous one. The value is not checked against a
    /// space; see [`SearchSpace::validate`](super::SearchSpace::validate).
    pub fn set(&mut self, group: impl Into<String>, value: usize) -> Option<usize> {
        self.values.insert(group.into(), value)
    }

    /// Group ids and values, in byte order of the ids.
    pub fn iter(&self) -> impl Iterator<Item = (&str, usize)> {
        self.values.iter().map(|(id, &value)| (id.as_str(), value))
    }

    /// Number of groups.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether the configuration has no groups.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Mean of the values, for tables and plots; 0 if there are none.
    pub fn mean(&self) -> f64 {
        self.values.values().map(|&value| value as f64).sum::<f64>()
            / self.values.len().max(1) as f64
    }

    /// Reads a JSON object of group ids and values.
    ///
    /// # Errors
    /// Returns [`Error::Json`] with line and column if the text is malformed.
    pub fn from_json(text: &str) -> Result<Self> {
        serde_json::from_str(text).map_err(|source| Error::json("subnet configuration", source))
    }

    /// Returns the configuration as indented JSON.
    ///
    /// # Errors
    /// Returns [`Error::Json`] if serialization fails, which does not happen for this type.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string_pretty(self)
            .map_err(|source| Error::json("subnet configuration", source))
    }
}

impl FromIterator<(String, usize)> for SubnetConfig {
    fn from_iter<I: IntoIterator<Item = (String, usize)>>(values: I) -> Self {
        Self {
            values: values.into_iter().collect(),
        }
    }
}

impl fmt::Display for SubnetConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut entries: Vec<(&str, usize)> = self.iter().collect();
        entries.sort_by(|a, b| natural_order(a.0, b.0));
        for (index, run) in entries.chunk_by(|a, b| a.1 == b.1).enumerate() {
            let comma = if index > 0 { "," } else { "" };
            match run.len() {
                1 => write!(f, "{comma}{}", run[0].1)?,
                n => write!(f, "{comma}{}x{n}", run[0].1)?,
            }
        }
        Ok(())
    }
}

/// Compares dot-separated paths part by part, with numbers compared by value.
fn natural_order(a: &str, b: &str) -> Ordering {
    let number = |part: &str| part.parse::<u64>().ok();
    let (mut left, mut right) = (a.split('.'), b.split('.'));
    loop {
        let order = match (left.next(), right.next()) {
            (None, None) => return a.cmp(b), // "01" and "1" are equal as numbers but not as names
            (None, Some(_)) => return Ordering::Less,
            (Some(_), None) => return Ordering::Greater,
            (Some(x), Some(y)) => match (number(x), number(y)) {
                (Some(x), Some(y)) => x.cmp(&y),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (None, None) => x.cmp(y),
            },
        };
        if order != Ordering::Equal {
            return order;
        }
    }
}
