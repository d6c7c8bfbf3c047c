//! Tokens that `tokenizer.json` does not know, and that the files next to it add. They are added as
//! transformers adds them.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::json::AddedToken;
use super::sentencepiece::{LISTS, SPECIAL, added_tokens, content};
use crate::error::{Error, Result};

/// The part of `tokenizer.json` that is enough for most files.
#[derive(Deserialize)]
struct Known {
    #[serde(default)]
    added_tokens: Vec<KnownToken>,
}

#[derive(Deserialize)]
struct KnownToken {
    id: usize,
    content: String,
}

/// Adds tokens of `tokenizer_config.json` (`config`) and of `added_tokens.json` (`added`) to the
/// text of a `tokenizer.json`. Returns notices of numbers that contradict it.
///
/// # Errors
/// Returns [`Error::InvalidFile`] if a token is described wrongly, or would get another number than
/// the one that is stated.
pub(super) fn complete(
    path: &Path,
    json: &mut String,
    config: &Map<String, Value>,
    added: &Map<String, Value>,
) -> Result<Vec<String>> {
    let numbered = added_tokens(path, config, added)?;
    let named = SPECIAL.iter().filter_map(|key| config.get(*key));
    let listed = LISTS.iter().filter_map(|key| config.get(*key)?.as_array());
    let named: Vec<&str> = named.chain(listed.flatten()).filter_map(content).collect();
    // A text that is not a tokenizer is refused where it is parsed as one.
    let Ok(known) = serde_json::from_str::<Known>(json) else {
        return Ok(Vec::new());
    };
    let mut notices = Vec::new();
    let mut new: Vec<(Option<usize>, AddedToken<'_>)> = Vec::new();
    for (id, token) in numbered {
        let found = known
            .added_tokens
            .iter()
            .find(|known| known.content == token.content);
        match found {
            Some(known) if known.id != id => {
                notices.push(contradiction(token.content, id, known.id))
            }
            Some(_) => {}
            None => {
                let special = token.special || named.contains(&token.content);
                new.push((Some(id), AddedToken { special, ..token }));
            }
        }
    }
    for text in named {
        let known = known.added_tokens.iter().any(|known| known.content == text);
        if !known && !new.iter().any(|(_, token)| token.content == text) {
            new.push((None, AddedToken::new(0, text, true)));
        }
    }
    if new.is_empty() {
        return Ok(notices);
    }
    let Ok(Value::Object(mut whole)) = serde_json::from_str::<Value>(json) else {
        return Ok(notices);
    };
    let vocab = whole.get("model").and_then(|model| model.get("vocab"));
    let piece = |entry: &Value| entry.get(0).and_then(Value::as_str).map(String::from);
    let number = |text: &str| match vocab {
        Some(Value::Object(vocab)) => vocab
            .get(text)
            .and_then(Value::as_u64)
            .map(|id| id as usize),
        Some(Value::Array(vocab)) => vocab
            .iter()
            .position(|entry| piece(entry).as_deref() == Some(text)),
        _ => None,
    };
    // The rule of the tokenizers crate for the number of a new token.
    let size = vocab.map_or(0, |vocab| match vocab {
        Value::Object(vocab) => vocab.len(),
        Value::Array(vocab) => vocab.len(),
        _ => 0,
    });
    let last = known.added_tokens.iter().map(|known| known.id + 1).max();
    let mut next = size.max(last.unwrap_or(0));
    let mut entries = Vec::new();
    for (stated, token) in new {
        let id = number(token.content).unwrap_or(next);
        match stated {
            Some(stated) if stated != id && id == next => {
                let reason = format!(
                    "token {stated} ({:?}) would be number {id}, since tokenizer.json has {next} tokens",
                    token.content
                );
                return Err(Error::invalid_file(
                    path.with_file_name("tokenizer_config.json"),
                    reason,
                ));
            }
            Some(stated) if stated != id => notices.push(contradiction(token.content, stated, id)),
            _ => {}
        }
        next = next.max(id + 1);
        entries.push(json!(AddedToken { id, ..token }));
    }
    match whole.entry("added_tokens").or_insert_with(|| json!([])) {
        Value::Array(tokens) => tokens.extend(entries),
        _ => return Ok(notices),
    }
    *json = Value::Object(whole).to_string();
    Ok(notices)
}

fn contradiction(text: &str, stated: usize, known: usize) -> String {
    format!(
        "token {text:?} is {stated} in the files next to tokenizer.json and {known} in it; \
         the latter is used"
    )
}
