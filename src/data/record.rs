//! Records and the files that contain them.

mod messages;
mod numbers;
mod table;

use std::borrow::Cow;
use std::cell::Cell;
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Message;
use super::answers::{alone, final_answer, is_gsm8k_reference};
use crate::error::{Error, Result};
use crate::input::{json, read_capped};

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
    /// A conversation: OpenAI's `messages`, ShareGPT's `conversations`, or a prompt and a completion
    /// that are lists of messages.
    Conversation {
        /// The turns.
        messages: Vec<Message>,
        /// JSON schemas of the tools that the model may call. A [`Template`](super::Template)
        /// leaves them out; [`notices`] counts them.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        tools: Vec<Value>,
        /// Number of messages at the start that are a prompt: nothing in them is learned.
        #[serde(default, skip_serializing_if = "is_zero")]
        prompt_messages: usize,
    },
    /// A prompt and its continuation, as they stand.
    Completion {
        /// The prompt.
        prompt: String,
        /// The continuation.
        completion: String,
    },
    /// A document of plain text.
    Text {
        /// The text.
        text: String,
    },
}

/// Returns sentences about what records hold and what is not done with it: tools, which are left
/// out.
pub fn notices(records: &[Record]) -> Vec<String> {
    let tools = records.iter().filter_map(|record| match record {
        Record::Conversation { tools, .. } => Some(tools.len()).filter(|n| *n > 0),
        _ => None,
    });
    let (with, all) = tools.fold((0, 0), |(with, all), n| (with + 1, all + n));
    let said = (with > 0).then(|| {
        let n = records.len();
        format!("{with} of {n} records declare tools, {all} in all; the declarations are left out")
    });
    said.into_iter().collect()
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

impl Record {
    /// Returns the conversation that a record is: itself, or the user's question and the model's
    /// answer. Returns `None` for plain text.
    pub fn to_messages(&self) -> Option<Cow<'_, [Message]>> {
        let (question, answer) = match self {
            Record::Conversation { messages, .. } => return Some(messages.into()),
            Record::Text { .. } => return None,
            Record::Instruction {
                instruction,
                input,
                output,
                ..
            } if !input.is_empty() => (format!("{instruction}\n{input}"), output),
            Record::Instruction {
                instruction,
                output,
                ..
            } => (instruction.clone(), output),
            Record::Question { question, answer } => (question.clone(), answer),
            Record::Completion { prompt, completion } => (prompt.clone(), completion),
        };
        Some(vec![Message::user(question), Message::assistant(answer)].into())
    }

    /// Returns the turns before the model's last one, and that one, if the conversation ends with it.
    pub(crate) fn split_last(messages: &[Message]) -> Option<(&[Message], &Message)> {
        let (last, before) = messages.split_last()?;
        last.is_assistant().then_some((before, last))
    }

    /// Returns the reference for the final answer: the `answer` of an instruction, or else what
    /// stands after `####` or `answer is` in the solution, or a solution that is a final answer
    /// itself, such as `12` or `(B)`. A number is normalized: `1,012.50` becomes `1012.5`. Returns
    /// `None` if there is nothing that an output could be compared with.
    pub fn final_answer(&self) -> Option<String> {
        match self {
            Record::Instruction {
                answer: Some(answer),
                ..
            } => alone(answer),
            Record::Instruction { output, .. } => final_answer(output, false),
            Record::Question { answer, .. } => final_answer(answer, true),
            Record::Completion { completion, .. } => final_answer(completion, false),
            Record::Conversation { messages, .. } => {
                final_answer(&Self::split_last(messages)?.1.content, false)
            }
            Record::Text { .. } => None,
        }
    }

    /// Returns why [`final_answer`](Self::final_answer) has nothing to return.
    pub fn without_answer(&self) -> &'static str {
        match self {
            Record::Instruction {
                answer: Some(_), ..
            } => "its `answer` is empty",
            Record::Text { .. } => "it is plain text, without a final answer",
            _ => "it has no final answer (`#### 12`, or a field `answer`)",
        }
    }

    /// Returns GSM8K's worked answer, if the record is a question whose answer has that form.
    pub fn gsm8k_solution(&self) -> Option<&str> {
        match self {
            Record::Question { answer, .. } if is_gsm8k_reference(answer) => Some(answer),
            _ => None,
        }
    }
}

/// Reads the records of a file: JSON, JSON Lines, a table or plain text.
///
/// A file whose name ends in `.csv` or `.tsv` is a table whose first row names the fields. A file
/// whose name ends in `.txt`, `.text`, `.md`, `.raw` or `.tokens` is plain text. Any other file is
/// JSON: an array of records, one record after another, an object that has the records under one
/// key (`{"data": [...]}`), or an object of columns (`{"question": [...], "answer": [...]}`).
/// [`load_documents`] reads any file as plain text.
///
/// A record has the fields `messages` (OpenAI: `role`, `content`), `conversations` (ShareGPT:
/// `from`, `value`), `prompt` and `completion` (texts or lists of messages), `instruction` and
/// `output` (Alpaca; optional `input` and `answer`), `question` and `answer` (GSM8K), or `text`.
/// Numbers are taken as their text. Other fields are ignored. Plain text is split at
/// `<|endoftext|>` if it contains that, else at blank lines. Empty pieces are dropped.
///
/// # Errors
/// Returns [`Error::Io`]; [`Error::InvalidFile`] if the file is larger than [`MAX_FILE_BYTES`],
/// not UTF-8, a page of HTML, a Git LFS pointer, or of none of the forms above; [`Error::Json`] if
/// it is not valid JSON; [`Error::InvalidRecord`] with the number of an invalid record; and
/// [`Error::EmptyDataset`] if it has no records.
pub fn load_records(path: impl AsRef<Path>) -> Result<Vec<Record>> {
    let path = path.as_ref();
    parse_records(&load_text(path)?, path)
}

/// Reads a file as plain text, whatever its name is. The text is split as [`load_records`] does.
///
/// # Errors
/// Returns the errors of [`load_text`], and [`Error::EmptyDataset`] if it is blank.
pub fn load_documents(path: impl AsRef<Path>) -> Result<Vec<Record>> {
    let path = path.as_ref();
    checked(documents(&load_text(path)?), path)
}

/// Reads a whole text file and removes a byte order mark.
///
/// # Errors
/// Returns [`Error::Io`], or [`Error::InvalidFile`] if the file is larger than [`MAX_FILE_BYTES`],
/// not UTF-8, or a folder, a pipe or a device. Returns [`Error::OutOfMemory`] if it does not fit.
pub fn load_text(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    let bytes = read_capped(path, MAX_FILE_BYTES)?;
    let known = [
        (&b"PAR1"[..], "a Parquet file; JSON Lines or CSV is needed"),
        (b"\x1f\x8b", "compressed by gzip; unpack it first"),
        (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it first"),
        (b"PK\x03\x04", "a ZIP archive; unpack it first"),
        (b"\xff\xfe", "UTF-16, but UTF-8 is needed"),
        (b"\xfe\xff", "UTF-16, but UTF-8 is needed"),
    ];
    if let Some((_, what)) = known.iter().find(|(magic, _)| bytes.starts_with(magic)) {
        return Err(Error::invalid_file(path, *what));
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
    if text.starts_with(LFS_POINTER) {
        let reason = "a Git LFS pointer, not the file; `git lfs pull` fetches it";
        return Err(Error::invalid_file(path, reason));
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
    if is_text_file(path) {
        return checked(documents(text), path);
    }
    let extension = extension(path);
    let table = match extension.as_str() {
        "csv" => Some(','),
        "tsv" => Some('\t'),
        _ => None,
    };
    if let Some(what) = foreign(text) {
        return Err(Error::invalid_file(path, what));
    }
    if let Some(separator) = table {
        return checked(table::records(text, separator, path)?, path);
    }
    let text = &*numbers::as_written(text);
    let records = match text.trim_start().chars().next() {
        Some('[') => list(text, path)?,
        Some('{') => stream(text, path)?,
        Some(_) => {
            let reason = "neither JSON nor a table by its name; plain text is read from files named .txt, or by \
                          the option for it";
            return Err(Error::invalid_file(path, reason));
        }
        None => Vec::new(),
    };
    checked(records, path)
}

/// Reads a list of records, one at a time.
fn list(text: &str, path: &Path) -> Result<Vec<Record>> {
    struct List<'a> {
        records: &'a mut Vec<Record>,
        bad: &'a mut Option<String>,
        len: usize,
    }
    impl<'de> Visitor<'de> for List<'_> {
        type Value = ();

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a list of records")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
            loop {
                let left = Cell::new(json::budget_of_records(self.len));
                let Some(value) = seq.next_element_seed(json::Limited(&left))? else {
                    return Ok(());
                };
                match record_of(value) {
                    Ok(record) => self.records.push(record),
                    Err(reason) => {
                        *self.bad = Some(reason);
                        return Err(serde::de::Error::custom("a record is not valid"));
                    }
                }
            }
        }
    }
    let (mut records, mut bad) = (Vec::new(), None);
    let mut parser = serde_json::Deserializer::from_str(text);
    let visitor = List {
        records: &mut records,
        bad: &mut bad,
        len: text.len(),
    };
    let read = parser.deserialize_seq(visitor).and_then(|()| parser.end());
    match (bad, read) {
        (Some(reason), _) => Err(bad_record(path, records.len(), reason)),
        (None, Err(error)) => Err(Error::json(path, error)),
        (None, Ok(())) => Ok(records),
    }
}

/// Reads objects that follow one another, one at a time. This covers JSON Lines, and also objects
/// that span several lines. A single object may hold the records.
fn stream(text: &str, path: &Path) -> Result<Vec<Record>> {
    let mut parser = serde_json::Deserializer::from_str(text);
    let mut records = Vec::new();
    loop {
        let left = Cell::new(json::budget_of_records(text.len()));
        let number = records.len();
        let mut value = json::Limited(&left)
            .deserialize(&mut parser)
            .map_err(|e| bad_record(path, number, format!("not JSON: {e}")))?;
        let is_last = parser.end().is_ok();
        if number == 0
            && is_last
            && let Value::Object(map) = &mut value
        {
            let values = unwrapped(map).map_err(|r| bad_record(path, 0, r))?;
            let numbered = values.into_iter().enumerate();
            return numbered
                .map(|(i, v)| record_of(v).map_err(|r| bad_record(path, i, r)))
                .collect();
        }
        records.push(record_of(value).map_err(|r| bad_record(path, number, r))?);
        if is_last {
            return Ok(records);
        }
    }
}

/// Returns whether the name of a file says that it is plain text: it ends in `.txt`, `.text`,
/// `.md`, `.raw` or `.tokens`.
pub fn is_text_file(path: impl AsRef<Path>) -> bool {
    TEXT_EXTENSIONS.contains(&extension(path.as_ref()).as_str())
}

/// Returns the extension of a path in lower case.
fn extension(path: &Path) -> String {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
    extension.to_ascii_lowercase()
}

/// Start of a file that Git LFS leaves in the place of a large one.
const LFS_POINTER: &str = "version https://git-lfs.github.com/spec/";

/// Extensions of files that are plain text. Those of WikiText are among them.
const TEXT_EXTENSIONS: [&str; 5] = ["txt", "text", "md", "raw", "tokens"];

/// Returns what a text is that is stored in the place of a file, if it is such a text.
fn foreign(text: &str) -> Option<&'static str> {
    let start: String = text.trim_start().chars().take(64).collect();
    let start = start.to_ascii_lowercase();
    if start.starts_with("<!doctype") || start.starts_with("<html") {
        return Some("a page of HTML, not data; the download may have failed");
    }
    start
        .starts_with(LFS_POINTER)
        .then_some("a Git LFS pointer, not the file; `git lfs pull` fetches it")
}

/// Returns the records of a single object: itself, those under its only list of objects, or those
/// of its columns.
fn unwrapped(map: &mut Map<String, Value>) -> Result<Vec<Value>, String> {
    let is_column = |value: &Value| value.as_array().is_some_and(|list| !list.is_empty());
    let is_list = |value: &Value| {
        let list = value.as_array().filter(|list| !list.is_empty());
        list.is_some_and(|list| list.iter().all(Value::is_object))
    };
    let known: Vec<&String> = map
        .keys()
        .filter(|key| FIELDS.contains(&key.as_str()))
        .collect();
    if !known.is_empty() {
        let columns = known.iter().all(|key| {
            map.get(*key)
                .is_some_and(|value| is_column(value) && !is_list(value))
        });
        if !columns {
            return Ok(vec![Value::Object(std::mem::take(map))]);
        }
        let rows = map
            .get(known[0])
            .and_then(Value::as_array)
            .map_or(0, Vec::len);
        let mut records = vec![Map::new(); rows];
        for (key, value) in std::mem::take(map) {
            let Value::Array(values) = value else {
                continue;
            };
            if values.len() != rows {
                let found = values.len();
                return Err(format!(
                    "columns of {rows} and {found} values; the latter is `{key}`"
                ));
            }
            for (record, value) in records.iter_mut().zip(values) {
                record.insert(key.clone(), value);
            }
        }
        return Ok(records.into_iter().map(Value::Object).collect());
    }
    let lists: Vec<String> = map
        .iter()
        .filter(|(_, value)| is_list(value))
        .map(|(key, _)| key.clone())
        .collect();
    match lists.as_slice() {
        [key] => match map.remove(key) {
            Some(Value::Array(values)) => Ok(values),
            _ => Ok(Vec::new()),
        },
        [] => Ok(vec![Value::Object(std::mem::take(map))]),
        several => Err(format!(
            "several lists of records: {several:?}; store each in its own file"
        )),
    }
}

fn documents(text: &str) -> Vec<Record> {
    let pieces = split_documents(text).into_iter();
    pieces.map(|text| Record::Text { text }).collect()
}

/// Removes blank texts, and refuses what has no record.
fn checked(records: Vec<Record>, path: &Path) -> Result<Vec<Record>> {
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
    let filled = |map: &Map<String, Value>, key: &str| map.get(key).is_some_and(|v| !v.is_null());
    for key in ["messages", "conversations", "conversation"] {
        if filled(&map, key) {
            let messages = messages::conversation(&mut map, key)?;
            let tools = messages::tools(&mut map)?;
            return Ok(Record::Conversation {
                messages,
                tools,
                prompt_messages: 0,
            });
        }
    }
    if filled(&map, "prompt") && filled(&map, "completion") {
        if !matches!(map.get("prompt"), Some(Value::Array(_)))
            && !matches!(map.get("completion"), Some(Value::Array(_)))
        {
            return Ok(Record::Completion {
                prompt: text_field(&mut map, "prompt")?,
                completion: text_field(&mut map, "completion")?,
            });
        }
        let mut messages = messages::list(&mut map, "prompt", "user")?;
        let prompt_messages = messages.len();
        messages.extend(messages::list(&mut map, "completion", "assistant")?);
        let tools = messages::tools(&mut map)?;
        return Ok(Record::Conversation {
            messages,
            tools,
            prompt_messages,
        });
    }
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
        "needs `messages`, `conversations`, `prompt` and `completion`, `instruction` and `output`, `question` and \
         `answer`, or `text`; its fields are {keys:?}"
    ))
}

/// Fields of which a record has one at least.
const FIELDS: [&str; 11] = [
    "messages",
    "conversations",
    "conversation",
    "prompt",
    "completion",
    "instruction",
    "output",
    "question",
    "answer",
    "text",
    "input",
];

fn text_field(map: &mut Map<String, Value>, field: &str) -> Result<String, String> {
    optional_field(map, field)?.ok_or_else(|| format!("`{field}` is missing"))
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
