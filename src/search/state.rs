//! How the states of searchers are written as JSON, which has neither numbers that are not finite nor
//! maps with other keys than strings.

use std::collections::HashMap;
use std::hash::Hash;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A finite number, or the name of a number that JSON cannot represent.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum JsonNumber {
    Finite(f64),
    Named(String),
}

/// Writes numbers, and those that are not finite by name: `"NaN"`, `"inf"` or `"-inf"`.
pub(super) mod numbers {
    use super::*;

    pub fn serialize<S: Serializer>(values: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(values.iter().map(|&value| match value.is_finite() {
            true => JsonNumber::Finite(value),
            false => JsonNumber::Named(value.to_string()),
        }))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f64>, D::Error> {
        let number = |number: JsonNumber| match number {
            JsonNumber::Finite(value) => Ok(value),
            JsonNumber::Named(name) => match name.as_str() {
                "NaN" => Ok(f64::NAN),
                "inf" => Ok(f64::INFINITY),
                "-inf" => Ok(f64::NEG_INFINITY),
                _ => Err(serde::de::Error::custom(format!(
                    "objective `{name}` is not a number"
                ))),
            },
        };
        Vec::<JsonNumber>::deserialize(deserializer)?
            .into_iter()
            .map(number)
            .collect()
    }
}

/// Writes one number like [`numbers`].
pub(super) mod number {
    use super::*;

    pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        numbers::serialize(&[*value], serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        let values = numbers::deserialize(deserializer)?;
        let value = values.first().copied();
        value.ok_or_else(|| serde::de::Error::custom("a number is missing"))
    }
}

/// Objectives within the state of a searcher.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Objectives(#[serde(with = "numbers")] pub Vec<f64>);

impl AsRef<[f64]> for Objectives {
    fn as_ref(&self) -> &[f64] {
        &self.0
    }
}

/// Writes a map as a list of pairs, in the order of its keys.
pub(super) mod pairs {
    use super::*;

    pub fn serialize<S, K, V>(map: &HashMap<K, V>, serializer: S) -> Result<S::Ok, S::Error>
    where
        S: Serializer,
        K: Serialize + Ord,
        V: Serialize,
    {
        let mut pairs: Vec<(&K, &V)> = map.iter().collect();
        pairs.sort_by_key(|(key, _)| *key);
        serializer.collect_seq(pairs)
    }

    pub fn deserialize<'de, D, K, V>(deserializer: D) -> Result<HashMap<K, V>, D::Error>
    where
        D: Deserializer<'de>,
        K: Deserialize<'de> + Eq + Hash,
        V: Deserialize<'de>,
    {
        Ok(Vec::<(K, V)>::deserialize(deserializer)?
            .into_iter()
            .collect())
    }
}
