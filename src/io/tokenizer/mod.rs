//! Tokenizers, as the two files that describe one in a Hugging Face folder. Those of other formats
//! are turned into such files.

mod added;
mod charsmap;
pub(in crate::io) mod json;
pub(crate) mod limits;
mod protobuf;
mod quiet;
mod sentencepiece;

pub(crate) use quiet::quietly;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::io::gguf::{Gguf, is_gguf};
use crate::io::{BYTE_ORDER_MARK, MAX_JSON_BYTES, cache, read_capped, read_large_json_object};

/// Largest size of a `tokenizer.json` that is read, in bytes. The largest of real models, with
/// 262,144 tokens, have 33 MB.
const MAX_BYTES: u64 = 1 << 26;

/// The text of `tokenizer.json` and the fields of `tokenizer_config.json`.
#[derive(Debug)]
pub(crate) struct TokenizerFiles {
    /// The file that was read.
    pub path: PathBuf,
    pub json: String,
    pub config: Map<String, Value>,
    /// What the files say and what is not done.
    pub notices: Vec<String>,
}

impl TokenizerFiles {
    /// Reads the tokenizer of a model folder or of a GGUF file, or returns `None` if there is none.
    /// In a folder, `tokenizer.json` is preferred to SentencePiece's `tokenizer.model`.
    ///
    /// # Errors
    /// Returns the errors of [`open_file`](Self::open_file) and of reading a GGUF file.
    pub fn open(path: &Path) -> Result<Option<Self>> {
        let path = &*cache::resolve(path)?;
        if is_gguf(path) {
            return Gguf::open(path)?.tokenizer();
        }
        for name in ["tokenizer.json", "tokenizer.model"] {
            let file = path.join(name);
            if file.exists() {
                return Self::open_file(&file).map(Some);
            }
        }
        Ok(None)
    }

    /// Reads a `tokenizer.json`, or a SentencePiece model, whose name ends in `.model`, and the
    /// `tokenizer_config.json` next to it. If that does not list the added tokens,
    /// `special_tokens_map.json` and `added_tokens.json` hold as well, as in transformers.
    ///
    /// # Errors
    /// Returns [`Error::Io`] or [`Error::Json`] if a file cannot be read or parsed,
    /// [`Error::InvalidFile`] if it breaks a rule of its format, and [`Error::Unsupported`] if a
    /// model does what is not implemented.
    pub fn open_file(path: &Path) -> Result<Self> {
        let mut bytes = read_capped(path, MAX_BYTES)?;
        let mut config = beside(path, "tokenizer_config.json")?;
        if path.extension().is_some_and(|ext| ext == "model") {
            return sentencepiece::files(path, &bytes, config, &beside(path, "added_tokens.json")?);
        }
        if bytes.starts_with(BYTE_ORDER_MARK) {
            bytes.drain(..BYTE_ORDER_MARK.len());
        }
        let mut json = String::from_utf8(bytes).map_err(|e| {
            let at = e.utf8_error().valid_up_to();
            Error::invalid_file(path, format!("not UTF-8 from byte {at}"))
        })?;
        let mut added = Map::new();
        if !config.contains_key("added_tokens_decoder") {
            config.extend(beside(path, "special_tokens_map.json")?);
            added = beside(path, "added_tokens.json")?;
        }
        let notices = added::complete(path, &mut json, &config, &added)?;
        Ok(Self {
            path: path.into(),
            json,
            config,
            notices,
        })
    }
}

/// Reads a JSON object in the same folder; it is empty if there is no such file.
fn beside(path: &Path, name: &str) -> Result<Map<String, Value>> {
    let file = path.with_file_name(name);
    if file.is_file() {
        read_large_json_object(&file, MAX_JSON_BYTES)
    } else {
        Ok(Map::new())
    }
}
