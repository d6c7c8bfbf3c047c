//! JSON values whose memory is in proportion to their text.
//!
//! A value takes up to a hundred bytes, and its text may have two. Real files have ten to forty bytes
//! of text for a value, so that what has many more values than that is refused.

use std::cell::Cell;
use std::fmt;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// Number of values that any text may have.
const FREE: usize = 1 << 16;
/// Number of bytes of text for each further value.
const BYTES: usize = 16;

/// Returns how many values a text of `len` bytes may have.
pub(crate) fn budget(len: usize) -> u32 {
    u32::try_from(FREE.saturating_add(len / BYTES)).unwrap_or(u32::MAX)
}

/// Returns how many values a record may have in a file of `len` bytes, which may be one object of
/// columns of short texts.
pub(crate) fn budget_of_records(len: usize) -> u32 {
    u32::try_from(FREE.saturating_add(len / 8)).unwrap_or(u32::MAX)
}

/// Parses a value.
pub(crate) fn value(text: &[u8]) -> serde_json::Result<Value> {
    let left = Cell::new(budget(text.len()));
    let mut parser = serde_json::Deserializer::from_slice(text);
    let value = Limited(&left).deserialize(&mut parser)?;
    parser.end()?;
    Ok(value)
}

/// Parses an object.
pub(crate) fn object(text: &[u8]) -> serde_json::Result<Map<String, Value>> {
    match value(text)? {
        Value::Object(map) => Ok(map),
        // For the words of the error.
        other => Map::deserialize(other),
    }
}

/// Reads a value of at most [`FREE`] values, as a field of a type that derives `Deserialize`.
pub(crate) fn field<'de, D: Deserializer<'de>>(from: D) -> Result<Value, D::Error> {
    Limited(&Cell::new(budget(0))).deserialize(from)
}

/// Reads a value, and takes the number of values in it from what is left.
#[derive(Clone, Copy)]
pub(crate) struct Limited<'a>(pub &'a Cell<u32>);

impl<'de> DeserializeSeed<'de> for Limited<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Value, D::Error> {
        let Some(left) = self.0.get().checked_sub(1) else {
            let what = "more values than a text of this length may have";
            return Err(Error::custom(what));
        };
        self.0.set(left);
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Limited<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut all = Vec::new();
        while let Some(value) = seq.next_element_seed(self)? {
            all.push(value);
        }
        Ok(all.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut all = serde_json::Map::new();
        while let Some(key) = map.next_key::<String>()? {
            all.insert(key, map.next_value_seed(self)?);
        }
        Ok(all.into())
    }
}
