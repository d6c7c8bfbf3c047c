//! Tokenizers, as the two files that describe one in a Hugging Face folder. Those of other formats
//! are turned into such files.

pub(in crate::io) mod json;
mod protobuf;
mod sentencepiece;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::io::gguf::{Gguf, is_gguf};
use crate::io::{cache, read_capped, read_json_object};

/// Largest size of a `tokenizer.json` that is read, in bytes.
const MAX_BYTES: u64 = 1 << 28;

/// The text of `tokenizer.json` and the fields of `tokenizer_config.json`.
#[derive(Debug)]
pub(crate) struct TokenizerFiles {
    /// The file that was read.
    pub path: PathBuf,
    pub json: String,
    pub config: Map<String, Value>,
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
    /// `tokenizer_config.json` next to it.
    ///
    /// # Errors
    /// Returns [`Error::Io`] or [`Error::Json`] if a file cannot be read or parsed,
    /// [`Error::InvalidFile`] if it breaks a rule of its format, and [`Error::Unsupported`] if a
    /// model does what is not implemented.
    pub fn open_file(path: &Path) -> Result<Self> {
        let mut bytes = read_capped(path, MAX_BYTES)?;
        let config = beside(path, "tokenizer_config.json")?;
        if path.extension().is_some_and(|ext| ext == "model") {
            return sentencepiece::files(path, &bytes, config, &beside(path, "added_tokens.json")?);
        }
        if bytes.starts_with("\u{feff}".as_bytes()) {
            bytes.drain(.."\u{feff}".len());
        }
        let json = String::from_utf8(bytes).map_err(|e| {
            let at = e.utf8_error().valid_up_to();
            Error::invalid_file(path, format!("not UTF-8 from byte {at}"))
        })?;
        Ok(Self {
            path: path.into(),
            json,
            config,
        })
    }
}

/// Reads a JSON object in the same folder; it is empty if there is no such file.
fn beside(path: &Path, name: &str) -> Result<Map<String, Value>> {
    let file = path.with_file_name(name);
    if file.is_file() {
        read_json_object(&file)
    } else {
        Ok(Map::new())
    }
}
