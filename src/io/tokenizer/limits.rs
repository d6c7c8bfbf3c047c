//! Checks of what a `tokenizer.json` does to a text before the tokenizers crate runs it. The crate
//! does not check them: some files make it use any amount of memory, and others make it panic.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::Value;

/// Largest number of characters that replacements may make of one.
const MAX_GROWTH: f64 = 1024.0;

/// The parts of `tokenizer.json` that change a text.
#[derive(Deserialize)]
struct Steps {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    decoder: Value,
}

/// Checks the text of a `tokenizer.json`. The error says what is wrong.
pub(crate) fn check(json: &str) -> Result<(), String> {
    let steps: Steps = serde_json::from_str(json).map_err(|error| format!("not JSON: {error}"))?;
    for (what, step) in [
        ("normalizer", &steps.normalizer),
        ("decoder", &steps.decoder),
    ] {
        let factor = growth(step);
        if factor > MAX_GROWTH {
            return Err(format!(
                "its {what} can make a text {factor:.0} times as long, more than the {MAX_GROWTH} \
                 that are allowed"
            ));
        }
        check_tables(step)?;
    }
    Ok(())
}

/// The steps of a sequence of normalizers or decoders.
fn parts(step: &Value) -> impl Iterator<Item = &Value> {
    let lists = ["normalizers", "decoders"].into_iter();
    lists
        .filter_map(|name| step.get(name)?.as_array())
        .flatten()
}

/// The number of characters that the replacements of a step may make of one.
fn growth(step: &Value) -> f64 {
    let chars = |text: &Value| text.as_str().map_or(0, |text| text.chars().count()) as f64;
    let own = match (step.get("content"), step.get("pattern")) {
        (Some(content), Some(pattern)) => match pattern.get("String") {
            Some(text) => chars(content) / chars(text).max(1.0),
            // A pattern may match between any two characters.
            None => chars(content) + 1.0,
        },
        _ => 1.0,
    };
    parts(step)
        .map(growth)
        .fold(own.max(1.0), |all, one| all * one)
}

/// Checks the tables of SentencePiece's normalizers.
fn check_tables(step: &Value) -> Result<(), String> {
    if let Some(table) = step.get("precompiled_charsmap").and_then(Value::as_str)
        && !table.is_empty()
        && !table_is_whole(table)
    {
        return Err("its normalizer: `precompiled_charsmap` is damaged".into());
    }
    parts(step).try_for_each(check_tables)
}

/// Whether a table in base 64 is whole: all places to which it leads exist. It is the size of a
/// trie in bytes, the trie (a double array, as Darts stores it), and texts that end with 0.
fn table_is_whole(table: &str) -> bool {
    let whole = || {
        let bytes = decoded(table)?;
        let (size, rest) = bytes.split_first_chunk()?;
        let (trie, texts) = rest.split_at_checked(u32::from_le_bytes(*size) as usize)?;
        let texts = std::str::from_utf8(texts).ok()?;
        let (units, []) = trie.as_chunks() else {
            return None;
        };
        let unit = |at: usize| Some(u32::from_le_bytes(*units.get(at)?));
        let offset = |unit: u32| ((unit >> 10) << ((unit & 1 << 9) >> 6)) as usize;
        let (mut seen, mut open) = (BTreeSet::new(), vec![offset(unit(0)?)]);
        while let Some(base) = open.pop() {
            if !seen.insert(base) {
                continue;
            }
            for byte in 1..=255 {
                let at = base ^ byte;
                let found = unit(at)?;
                if (found & (1 << 31 | 0xFF)) as usize != byte {
                    continue;
                }
                let next = at ^ offset(found);
                if found >> 8 & 1 == 1 {
                    let value = unit(next)? & ((1 << 31) - 1);
                    texts.get(value as usize..)?;
                }
                open.push(next);
            }
        }
        Some(())
    };
    whole().is_some()
}

/// Decodes base 64.
fn decoded(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end_matches('=').as_bytes();
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3 + 2);
    for group in text.chunks(4) {
        let mut all: u32 = 0;
        for at in 0..4 {
            let digit = match group.get(at).copied().unwrap_or(b'A') {
                letter @ b'A'..=b'Z' => letter - b'A',
                letter @ b'a'..=b'z' => letter - b'a' + 26,
                digit @ b'0'..=b'9' => digit - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            all = all << 6 | u32::from(digit);
        }
        let n = group.len().checked_sub(1).filter(|n| *n > 0)?;
        bytes.extend_from_slice(&all.to_be_bytes()[1..=n]);
    }
    Some(bytes)
}
