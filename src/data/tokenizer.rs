//! Text to token ids and back, through a Hugging Face `tokenizer.json`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::Tokenizer;

use super::record::load_text;
use crate::error::{Error, Result};
use crate::io::Gguf;
use crate::io::gguf::is_gguf;

/// A tokenizer with the special tokens that it puts around a text.
#[derive(Clone)]
pub struct TextTokenizer {
    inner: Tokenizer,
    path: PathBuf,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
}

impl std::fmt::Debug for TextTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let vocab = self.vocab_size();
        write!(
            f,
            "TextTokenizer({}, vocabulary {vocab}, bos {:?}, eos {:?})",
            self.path.display(),
            self.bos,
            self.eos
        )
    }
}

impl TextTokenizer {
    /// Reads a `tokenizer.json`. If a `tokenizer_config.json` lies beside it, `bos_token` and `eos_token` are taken from
    /// there, where the post-processor itself does not show them. Truncation and padding settings in the file are ignored.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Json`] for the configuration; [`Error::Tokenizer`] where the file makes no tokenizer.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut tokenizer = Self::from_json(&load_text(path)?, path)?;
        let config = path.with_file_name("tokenizer_config.json");
        if config.is_file() {
            let value: Value =
                serde_json::from_str(&load_text(&config)?).map_err(|e| Error::json(&config, e))?;
            tokenizer = tokenizer.with_config(|key| value.get(key));
        }
        Ok(tokenizer)
    }

    /// Reads the `tokenizer.json` of a model folder, or the tokenizer of a GGUF file; see [`from_file`](Self::from_file).
    ///
    /// # Errors
    /// As [`from_file`](Self::from_file); those of a GGUF file's reader, [`Error::Tokenizer`] if it holds no tokenizer.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        if !is_gguf(dir) {
            return Self::from_file(dir.join("tokenizer.json"));
        }
        let Some(files) = Gguf::open(dir)?.tokenizer()? else {
            return Err(Error::Tokenizer {
                path: dir.into(),
                reason: "the file holds none".into(),
            });
        };
        let tokenizer = Self::from_json(&files.json, dir)?;
        Ok(tokenizer.with_config(|key| files.config.get(key)))
    }

    /// Takes `bos_token` and `eos_token` from a `tokenizer_config.json`, where they are not known.
    fn with_config<'a>(self, get: impl Fn(&str) -> Option<&'a Value>) -> Self {
        // A token is its text, or an object that holds the text.
        let id = |key: &str| {
            let token = get(key)?;
            self.token_to_id(token.as_str().or_else(|| token.get("content")?.as_str())?)
        };
        let (bos, eos) = (id("bos_token"), id("eos_token"));
        self.with_special_ids(bos, eos)
    }

    /// Makes a tokenizer of the text of a `tokenizer.json`; `path` names it in errors.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn from_json(json: &str, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let fail = |reason: String| Error::Tokenizer {
            path: path.clone(),
            reason,
        };
        // The `tokenizers` crate panics on some text that is not JSON; so that is found out before.
        serde_json::from_str::<serde::de::IgnoredAny>(json)
            .map_err(|e| fail(format!("not JSON: {e}")))?;
        let mut inner: Tokenizer = guarded(|| json.parse()).map_err(&fail)?;
        inner.with_padding(None);
        guarded(|| inner.with_truncation(None).map(|_| ())).map_err(&fail)?;
        // What the post-processor puts around a text is seen by trying it on one that the vocabulary can say.
        let probe = |text: &str, special| {
            let encoding = guarded(|| inner.encode_fast(text, special)).map_err(&fail)?;
            Ok::<_, Error>(encoding.get_ids().to_vec())
        };
        let mut bare: Vec<u32> = Vec::new();
        let mut full: Vec<u32> = Vec::new();
        for text in ["a", "0", "the", "."] {
            (bare, full) = (probe(text, false)?, probe(text, true)?);
            if !bare.is_empty() {
                break;
            }
        }
        let at = (0..=full.len().saturating_sub(bare.len()))
            .find(|i| full[*i..].starts_with(&bare))
            .filter(|_| !bare.is_empty())
            .ok_or_else(|| {
                fail("its post-processor cannot be told from the text's own tokens".into())
            })?;
        let (prefix, suffix) = (full[..at].to_vec(), full[at + bare.len()..].to_vec());
        let (bos, eos) = (prefix.first().copied(), suffix.last().copied());
        Ok(Self {
            inner,
            path,
            prefix,
            suffix,
            bos,
            eos,
        })
    }

    /// Token ids of `text`; with `special`, what the tokenizer puts before and after a text is added.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = guarded(|| self.inner.encode_fast(text, false)).map_err(|e| self.fail(e))?;
        if !special {
            return Ok(encoding.get_ids().to_vec());
        }
        Ok([
            self.prefix.as_slice(),
            encoding.get_ids(),
            self.suffix.as_slice(),
        ]
        .concat())
    }

    /// The ids of a text that goes on: [`encode`](Self::encode) with what stands before a text, but not what ends it.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = guarded(|| self.inner.encode_fast(text, false)).map_err(|e| self.fail(e))?;
        Ok([self.prefix.as_slice(), encoding.get_ids()].concat())
    }

    /// The text of `ids`, special tokens left out.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`] for an id that no token has; [`Error::Tokenizer`].
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        if let Some(id) = ids.iter().find(|id| self.inner.id_to_token(**id).is_none()) {
            return Err(Error::TokenOutOfRange {
                found: *id,
                vocab_size: self.vocab_size(),
            });
        }
        guarded(|| self.inner.decode(ids, true)).map_err(|e| self.fail(e))
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The id of a token.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// What the tokenizer puts before a text.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// The token that begins a text, whether or not the tokenizer adds it by itself.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text, whether or not the tokenizer adds it by itself.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }

    /// Fills in special tokens that the tokenizer's files do not tell, as from a model's `config.json`. Those known stay.
    pub fn with_special_ids(mut self, bos: Option<u32>, eos: Option<u32>) -> Self {
        self.bos = self.bos.or(bos);
        self.eos = self.eos.or(eos);
        self
    }

    /// The file, or whatever stood for it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn fail(&self, reason: String) -> Error {
        Error::Tokenizer {
            path: self.path.clone(),
            reason,
        }
    }
}

/// Runs a call of the `tokenizers` crate. On some files it panics (a template that names a token which it does not declare,
/// say) where it should refuse; a file is input, so that becomes an error, too.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("no message");
            Err(format!("the file is not consistent: {text}"))
        }
    }
}
