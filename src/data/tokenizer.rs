//! Converts text to token ids and back with a Hugging Face `tokenizer.json` or a SentencePiece
//! model.

mod long;

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::{Encoding, ModelWrapper, Token, Tokenizer};

use crate::error::{Error, Result};
use crate::io::cache;
use crate::io::tokenizer::limits::{self, Limits};
use crate::io::tokenizer::{TokenizerFiles, quietly};
use long::Found;

/// A tokenizer with the special tokens that it puts around a text.
#[derive(Clone)]
pub struct TextTokenizer {
    inner: Tokenizer,
    path: PathBuf,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    n_ids: usize,
    /// Length in bytes of the longest token.
    longest: usize,
    limits: Limits,
    notices: Vec<String>,
}

/// Largest number of bytes that a text may become before it is cut into tokens. The tokenizers crate
/// takes up to some 200 bytes of memory for each.
const MAX_MADE_BYTES: f64 = (1 << 22) as f64;

/// Longest text that is tokenized at once, in bytes, where the limit above allows it.
const MAX_PIECE_BYTES: usize = 1 << 16;

/// Largest number of bytes that tokens may become when they are decoded.
const MAX_DECODED_BYTES: f64 = (1_u64 << 28) as f64;

/// Stands for a text where it is found out what is put around it.
const TEXT: u32 = u32::MAX;

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
    /// Reads a `tokenizer.json`, or a SentencePiece model, whose name ends in `.model`.
    ///
    /// If there is a `tokenizer_config.json` next to it, its `bos_token` and `eos_token` are used
    /// where the post-processor does not determine them, and tokens that it adds are known. So are
    /// those of `special_tokens_map.json` and `added_tokens.json`, if it does not list added
    /// tokens. Truncation and padding settings in the file are ignored. A SentencePiece model also takes from there, and from `added_tokens.json`,
    /// tokens that are added and whether tokens are put before and after a text; without such files
    /// the model's beginning-of-sequence token is put before.
    ///
    /// # Errors
    /// Returns [`Error::Io`], [`Error::Json`] if a file next to it is not valid JSON, and
    /// [`Error::Tokenizer`] if the file does not describe a tokenizer. Returns
    /// [`Error::InvalidFile`] if a SentencePiece model breaks a rule of its format, and
    /// [`Error::Unsupported`] if it is of another kind than BPE or unigram.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        Self::from_files(&TokenizerFiles::open_file(path.as_ref())?)
    }

    /// Reads the `tokenizer.json` of a model folder, or else its `tokenizer.model`, or the
    /// tokenizer of a GGUF file; see [`from_file`](Self::from_file).
    ///
    /// # Errors
    /// Returns the errors of [`from_file`](Self::from_file) or of reading a GGUF file, and
    /// [`Error::Tokenizer`] if there is no tokenizer.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = &*cache::resolve(dir.as_ref())?;
        match TokenizerFiles::open(dir)? {
            Some(files) => Self::from_files(&files),
            None if dir.is_file() => Err(Error::Tokenizer {
                path: dir.into(),
                reason: "the file holds none".into(),
            }),
            None => Self::from_file(dir.join("tokenizer.json")),
        }
    }

    fn from_files(files: &TokenizerFiles) -> Result<Self> {
        let tokenizer = Self::from_json(&files.json, &files.path)?;
        Ok(tokenizer.with_files(files))
    }

    /// Takes the special tokens of the files next to `tokenizer.json`, and their notices.
    pub(crate) fn with_files(self, files: &TokenizerFiles) -> Self {
        let mut tokenizer = self.with_config(|key| files.config.get(key));
        tokenizer.notices.extend_from_slice(&files.notices);
        let put = |ids: &[u32], id: Option<u32>| id.is_some_and(|id| ids.contains(&id));
        let sides = [
            (
                "add_bos_token",
                "before",
                put(&tokenizer.prefix, tokenizer.bos),
            ),
            (
                "add_eos_token",
                "after",
                put(&tokenizer.suffix, tokenizer.eos),
            ),
        ];
        for (field, side, is_put) in sides {
            let Some(flag) = files.config.get(field).and_then(Value::as_bool) else {
                continue;
            };
            if flag != is_put {
                let which = if is_put { "one" } else { "no such token" };
                tokenizer.notices.push(format!(
                    "tokenizer_config.json says `{field}`: {flag}, but tokenizer.json puts {which} \
                     {side} a text; the latter is done, as in transformers 5"
                ));
            }
        }
        tokenizer
    }

    /// Takes `bos_token` and `eos_token` from a `tokenizer_config.json`, where they are not known.
    pub(crate) fn with_config<'a>(self, get: impl Fn(&str) -> Option<&'a Value>) -> Self {
        // A token is its text, or an object that holds the text.
        let id = |key: &str| {
            let token = get(key)?;
            self.token_to_id(token.as_str().or_else(|| token.get("content")?.as_str())?)
        };
        let (bos, eos) = (id("bos_token"), id("eos_token"));
        self.with_special_ids(bos, eos)
    }

    /// Parses the text of a `tokenizer.json`. `path` names it in errors.
    ///
    /// # Errors
    /// Returns [`Error::Tokenizer`] if the text does not describe a tokenizer.
    pub fn from_json(json: &str, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let fail = |reason: String| Error::Tokenizer {
            path: path.clone(),
            reason,
        };
        // The `tokenizers` crate panics on some text that is not JSON, so check that first.
        let limits = limits::check(json).map_err(&fail)?;
        let mut inner: Tokenizer = guarded(|| json.parse()).map_err(&fail)?;
        inner.with_padding(None);
        guarded(|| inner.with_truncation(None).map(|_| ())).map_err(&fail)?;
        // Find out what the post-processor puts around a text.
        let text = Token::new(TEXT, String::new(), (0, 0));
        let text = Encoding::from_tokens(vec![text], 0);
        let full = guarded(|| inner.post_process(text, None, true)).map_err(&fail)?;
        let mut parts = full.get_ids().split(|id| *id == TEXT);
        let (Some(prefix), Some(suffix), None) = (parts.next(), parts.next(), parts.next()) else {
            return Err(fail(
                "its post-processor does not put one text in its place".into(),
            ));
        };
        let (prefix, suffix) = (prefix.to_vec(), suffix.to_vec());
        let (bos, eos) = (prefix.first().copied(), suffix.last().copied());
        let vocab = inner.get_vocab(true);
        let last = vocab.values().copied().max();
        let longest = vocab.keys().map(String::len).max().unwrap_or(0);
        drop(vocab);
        Ok(Self {
            n_ids: last.map_or(0, |last| last as usize + 1),
            longest,
            limits,
            notices: Vec::new(),
            inner,
            path,
            prefix,
            suffix,
            bos,
            eos,
        })
    }

    /// Returns the token ids of `text`. If `special` is true, the tokens that the tokenizer puts
    /// before and after a text are added.
    ///
    /// A text of more than 64 kB is tokenized in parts that overlap, with the same result. The
    /// work takes some ten megabytes besides the ids.
    ///
    /// # Errors
    /// Returns [`Error::Tokenizer`] if the tokenizer fails, or if it finds no tokens that two parts
    /// of a long text have in common, as in one word of many kilobytes.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let ids = self.ids(text)?;
        if !special || (self.prefix.is_empty() && self.suffix.is_empty()) {
            return Ok(ids);
        }
        Ok([self.prefix.as_slice(), &ids, &self.suffix].concat())
    }

    /// Returns the token ids of `text` without special tokens around it, and the bytes that each
    /// comes from. Bytes of white space that a tokenizer assigns to no token belong to the next one.
    ///
    /// # Errors
    /// Returns the errors of [`encode`](Self::encode).
    pub(super) fn encode_with_bytes(&self, text: &str) -> Result<(Vec<u32>, Vec<Range<usize>>)> {
        let (mut ids, mut spans) = (Vec::new(), Vec::new());
        let mut end = 0;
        let keep = |tokens: &[Found]| {
            for token in tokens {
                // Tokens that share a character have the same bytes.
                let start = end.min(token.bytes.start);
                end = end.max(token.bytes.end);
                ids.push(token.id);
                spans.push(start..end);
            }
        };
        long::tokenize(text, self.piece_bytes(), |part| self.found(part), keep)
            .map_err(|e| self.fail(e))?;
        Ok((ids, spans))
    }

    /// Returns the token ids of `text` without special tokens around it.
    fn ids(&self, text: &str) -> Result<Vec<u32>> {
        let piece = self.piece_bytes();
        if text.len() <= piece {
            let encoding =
                guarded(|| self.inner.encode_fast(text, false)).map_err(|e| self.fail(e))?;
            return Ok(encoding.get_ids().to_vec());
        }
        let mut ids = Vec::new();
        let keep = |tokens: &[Found]| ids.extend(tokens.iter().map(|token| token.id));
        long::tokenize(text, piece, |part| self.found(part), keep).map_err(|e| self.fail(e))?;
        Ok(ids)
    }

    /// Returns the tokens of a text that is not too long.
    fn found(&self, text: &str) -> std::result::Result<Vec<Found>, String> {
        let encoding = guarded(|| self.inner.encode(text, false))?;
        let tokens = encoding.get_ids().iter().zip(encoding.get_offsets());
        let found = tokens.map(|(id, (start, end))| Found {
            id: *id,
            bytes: *start..*end,
        });
        Ok(found.collect())
    }

    /// Largest number of bytes that is tokenized at once.
    fn piece_bytes(&self) -> usize {
        let mut bytes = MAX_PIECE_BYTES;
        while bytes > 1 && self.limits.text.of(bytes) > MAX_MADE_BYTES {
            bytes /= 2;
        }
        bytes
    }

    /// Returns whether a token is special: not a part of a text, but a sign such as the end of a
    /// turn.
    pub(crate) fn is_special(&self, id: u32) -> bool {
        let tokens = self.inner.get_added_vocabulary();
        self.eos == Some(id)
            || self
                .inner
                .id_to_token(id)
                .is_some_and(|token| tokens.is_special_token(&token))
    }

    /// Returns the token ids of a text to be continued: [`encode`](Self::encode) with the special
    /// tokens before the text, but without those after it.
    ///
    /// # Errors
    /// Returns [`Error::Tokenizer`] if the tokenizer fails.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.ids(text)?;
        if self.prefix.is_empty() {
            return Ok(ids);
        }
        Ok([self.prefix.as_slice(), &ids].concat())
    }

    /// Returns the text of `ids` without special tokens. Ids that stand for no token, as in padded
    /// vocabularies, have no text.
    ///
    /// # Errors
    /// Returns [`Error::Tokenizer`] if the tokenizer fails, or could make more than 256 MiB of them.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let most = |len: usize| self.limits.token.of(len);
        if ids.len() as f64 * most(self.longest) > MAX_DECODED_BYTES {
            let len = |id: &u32| self.inner.id_to_token(*id).map_or(0, |token| token.len());
            let all: f64 = ids.iter().map(|id| most(len(id))).sum();
            if all > MAX_DECODED_BYTES {
                return Err(self.fail(format!(
                    "{} tokens can become {all:.0} bytes of text, more than {MAX_DECODED_BYTES:.0}",
                    ids.len()
                )));
            }
        }
        guarded(|| self.inner.decode(ids, true)).map_err(|e| self.fail(e))
    }

    /// Returns the kind of the model: `BPE`, `Unigram`, `WordPiece` or `WordLevel`.
    pub fn kind(&self) -> &'static str {
        match self.inner.get_model() {
            ModelWrapper::BPE(_) => "BPE",
            ModelWrapper::Unigram(_) => "Unigram",
            ModelWrapper::WordPiece(_) => "WordPiece",
            ModelWrapper::WordLevel(_) => "WordLevel",
        }
    }

    /// Returns the special tokens with their ids, in the order of ids.
    pub fn special_tokens(&self) -> Vec<(u32, String)> {
        let all = self.inner.get_added_tokens_decoder();
        let special = all.into_iter().filter(|(_, token)| token.special);
        let mut tokens: Vec<_> = special.map(|(id, token)| (id, token.content)).collect();
        tokens.sort_unstable();
        tokens
    }

    /// Returns the number of tokens, including added ones.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Returns the largest id of a token plus 1. Ids from there on, which the vocabulary of a model
    /// may have for padding, stand for nothing. At least [`vocab_size`](Self::vocab_size).
    pub fn n_ids(&self) -> usize {
        self.n_ids
    }

    /// Returns sentences about what the tokenizer's files say and what is not done.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Returns the id of a token.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Returns the token with an id.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Returns the special tokens that the tokenizer puts before a text.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// Returns the special tokens that the tokenizer puts after a text.
    pub fn suffix(&self) -> &[u32] {
        &self.suffix
    }

    /// Returns the token that begins a text, whether or not the tokenizer adds it.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// Returns the token that ends a text, whether or not the tokenizer adds it.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }

    /// Sets special tokens that the tokenizer's files do not define, for example from a model's
    /// `config.json`. Known tokens are kept.
    pub fn with_special_ids(mut self, bos: Option<u32>, eos: Option<u32>) -> Self {
        self.bos = self.bos.or(bos);
        self.eos = self.eos.or(eos);
        self
    }

    /// Returns the path of the file, or the path given to [`from_json`](Self::from_json).
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

/// Runs a call of the `tokenizers` crate and turns panics into errors. The crate panics on some
/// invalid files, such as one with a template that names an undeclared token.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match quietly(call) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(text) => Err(format!("the file is not consistent: {text}")),
    }
}

mod pieces;
#[cfg(test)]
mod tests;

pub use pieces::{Detokenizer, StopStrings};
