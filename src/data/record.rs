//! Records and the files that contain them.

use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::answers::{extract_answer, normalize_number};
use crate::error::{Error, Result};

/// Largest file that is read. Files are read into memory as a whole.
pub const MAX_FILE_BYTES: u64 = 2 << 30;

/// Separator of documents in GPT-2's text files.
const END_OF_TEXT: &str = "<|endoftext|>";

/// A record of a data set. It serializes to the format that it was read from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Record {
    /// Alpaca's format, with the additional `answer` of LLM-Adapters' files.
    Instruction {
        /// The task.
        instruction: String,
        /// Input of the task; empty if the instruction is complete.
        #[serde(default)]
        input: String,
        /// The response.
        output: String,
        /// The final answer alone, if the file has it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        answer: Option<String>,
    },
    /// GSM8K's format.
    Question {
        /// The question.
        question: String,
        /// The worked answer.
        answer: String,
    },
    /// A document of plain text.
    Text {
        /// The text.
        text: String,
    },
}

impl Record {
    /// Returns the reference for the final answer: the `answer` of an instruction, or else the
    /// number after `####`. Numbers are normalized (see [`extract_answer`]).
    pub fn final_answer(&self) -> Option<String> {
        match self {
            Record::Instruction {
                answer: Some(answer),
                ..
            } => Some(normalize_number(answer).unwrap_or_else(|| answer.trim().to_string())),
            Record::Instruction { output, .. } => extract_answer(output),
            Record::Question { answer, .. } => extract_answer(answer),
            Record::Text { .. } => None,
        }
    }
}

/// Reads the records of a file: a JSON array, JSON Lines or plain text. The first character selects
/// the format (`[`, `{`, or any other), except that a file whose name ends in `.txt` is always
/// plain text.
///
/// JSON records have Alpaca's fields (`instruction`, `output`, optional `input` and `answer`),
/// GSM8K's fields (`question`, `answer`), or the single field `text`. Plain text is split at
/// `<|endoftext|>` if it contains that, else at blank lines. Empty pieces are dropped.
///
/// # Errors
/// Returns [`Error::Io`]; [`Error::InvalidFile`] if the file is larger than [`MAX_FILE_BYTES`] or
/// not UTF-8; [`Error::Json`] if it is not valid JSON; [`Error::InvalidRecord`] with the number of
/// an invalid record; and [`Error::EmptyDataset`] if it has no records.
pub fn load_records(path: impl AsRef<Path>) -> Result<Vec<Record>> {
    let path = path.as_ref();
    parse_records(&load_text(path)?, path)
}

/// Reads a whole text file and removes a byte order mark.
///
/// # Errors
/// Returns [`Error::Io`], or [`Error::InvalidFile`] if the file is larger than [`MAX_FILE_BYTES`]
/// or not UTF-8.
pub fn load_text(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    let file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
    let mut bytes = Vec::new();
    // Limit the size while reading, because the size of a pipe is unknown.
    file.take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(Error::invalid_file(
            path,
            format!("over {MAX_FILE_BYTES} bytes"),
        ));
    }
    let mut text = String::from_utf8(bytes).map_err(|e| {
        Error::invalid_file(
            path,
            format!("not UTF-8 from byte {}", e.utf8_error().valid_up_to()),
        )
    })?;
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok(text)
}

/// Parses records like [`load_records`] from a text in memory. `path` is used in errors and to
/// recognize `.txt`.
///
/// # Errors
/// Returns the errors of [`load_records`], except those of reading the file.
#[doc(hidden)]
pub fn parse_records(text: &str, path: &Path) -> Result<Vec<Record>> {
    let is_text = path
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("txt"));
    let first = if is_text {
        None
    } else {
        text.trim_start().chars().next()
    };
    let records = match first {
        Some('[') => {
            let values: Vec<Value> =
                serde_json::from_str(text).map_err(|e| Error::json(path, e))?;
            let numbered = values.into_iter().enumerate();
            numbered
                .map(|(i, v)| record_of(v).map_err(|r| bad_record(path, i, r)))
                .collect::<Result<Vec<_>>>()?
        }
        Some('{') => {
            // A stream of objects covers JSON Lines, and also objects that span several lines.
            let mut records = Vec::new();
            for (i, value) in serde_json::Deserializer::from_str(text)
                .into_iter::<Value>()
                .enumerate()
            {
                let value = value.map_err(|e| bad_record(path, i, format!("not JSON: {e}")))?;
                records.push(record_of(value).map_err(|r| bad_record(path, i, r))?);
            }
            records
        }
        _ => split_documents(text)
            .into_iter()
            .map(|text| Record::Text { text })
            .collect(),
    };
    if records.is_empty() {
        return Err(Error::EmptyDataset {
            path: path.to_path_buf(),
            detail: String::new(),
        });
    }
    let blank = |r: &Record| matches!(r, Record::Text { text } if text.trim().is_empty());
    if records.iter().all(blank) {
        let detail = format!(" ({} of them are blank)", records.len());
        return Err(Error::EmptyDataset {
            path: path.to_path_buf(),
            detail,
        });
    }
    Ok(records.into_iter().filter(|r| !blank(r)).collect())
}

fn bad_record(path: &Path, index: usize, reason: String) -> Error {
    Error::InvalidRecord {
        path: path.to_path_buf(),
        record: index + 1,
        reason,
    }
}

fn split_documents(text: &str) -> Vec<String> {
    let keep = |s: &str| Some(s.trim()).filter(|s| !s.is_empty()).map(str::to_string);
    if text.contains(END_OF_TEXT) {
        return text.split(END_OF_TEXT).filter_map(keep).collect();
    }
    let mut documents = Vec::new();
    let mut current = String::new();
    for line in text.lines() {
        if line.trim().is_empty() {
            documents.extend(keep(&current));
            current.clear();
        } else {
            current.push_str(line);
            current.push('\n');
        }
    }
    documents.extend(keep(&current));
    documents
}

fn record_of(value: Value) -> Result<Record, String> {
    let Value::Object(mut map) = value else {
        return Err(format!("an object is needed, found {}", type_name(&value)));
    };
    if map.contains_key("instruction") {
        return Ok(Record::Instruction {
            instruction: text_field(&mut map, "instruction")?,
            input: optional_field(&mut map, "input")?.unwrap_or_default(),
            output: text_field(&mut map, "output")?,
            answer: optional_field(&mut map, "answer")?,
        });
    }
    if map.contains_key("question") {
        return Ok(Record::Question {
            question: text_field(&mut map, "question")?,
            answer: text_field(&mut map, "answer")?,
        });
    }
    if map.contains_key("text") {
        return Ok(Record::Text {
            text: text_field(&mut map, "text")?,
        });
    }
    let keys: Vec<&str> = map.keys().take(8).map(String::as_str).collect();
    Err(format!(
        "needs `instruction` and `output`, `question` and `answer`, or `text`; its fields are {keys:?}"
    ))
}

fn text_field(map: &mut Map<String, Value>, field: &str) -> Result<String, String> {
    match map.get_mut(field).map(Value::take) {
        Some(Value::String(s)) => Ok(s),
        Some(other) => Err(format!(
            "`{field}` must be a string, found {}",
            type_name(&other)
        )),
        None => Err(format!("`{field}` is missing")),
    }
}

/// Returns a field that may be missing or null. Numbers and booleans are converted to text.
fn optional_field(map: &mut Map<String, Value>, field: &str) -> Result<Option<String>, String> {
    match map.get_mut(field).map(Value::take) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(s)) => Ok(Some(s)),
        Some(Value::Number(n)) => Ok(Some(n.to_string())),
        Some(Value::Bool(b)) => Ok(Some(b.to_string())),
        Some(other) => Err(format!(
            "`{field}` must be a string, found {}",
            type_name(&other)
        )),
    }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
