//! The text of single tokens, and the text of tokens that come one after another.

use tokenizers::DecoderWrapper;

use super::{TextTokenizer, guarded};
use crate::error::{Error, Result};

/// How a tokenizer writes bytes that are no text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bytes {
    /// Each character of a token stands for a byte, as in GPT-2.
    Level,
    /// A token such as `<0xE2>` stands for a byte, as in SentencePiece.
    Fallback,
    /// In no way: tokens are text.
    None,
}

/// Most tokens whose text is held back because it ends in U+FFFD, which may be a character that is
/// not complete. A character has four bytes at most.
const HELD: usize = 4;

impl TextTokenizer {
    fn bytes(&self) -> Bytes {
        let parts = match self.inner.get_decoder() {
            Some(DecoderWrapper::Sequence(sequence)) => sequence.get_decoders(),
            Some(one) => std::slice::from_ref(one),
            None => &[],
        };
        let falls_back = |part: &DecoderWrapper| matches!(part, DecoderWrapper::ByteFallback(_));
        match parts {
            [DecoderWrapper::ByteLevel(_)] => Bytes::Level,
            parts if parts.iter().any(falls_back) => Bytes::Fallback,
            _ => Bytes::None,
        }
    }

    fn text_of(&self, ids: &[u32]) -> Result<String> {
        guarded(|| self.inner.decode(ids, false)).map_err(|e| self.fail(e))
    }

    /// Returns whether [`decode`](Self::decode) leaves a token out.
    fn is_left_out(&self, token: &str) -> bool {
        self.inner.get_added_vocabulary().is_special_token(token)
    }

    /// Returns the bytes that a token adds to a text when other tokens are before it. They may be a
    /// part of a character. Special tokens have their names. Ids that stand for no token have no
    /// bytes.
    ///
    /// # Errors
    /// Returns [`Error::Tokenizer`] if the tokenizer fails.
    pub fn piece(&self, id: u32) -> Result<Vec<u8>> {
        let Some(token) = self.inner.id_to_token(id) else {
            return Ok(Vec::new());
        };
        if let Some(bytes) = own_bytes(self.bytes(), &token) {
            return Ok(bytes);
        }
        // What the token adds to another one: the first token of a text may lose its spaces.
        let mut before = id;
        if self.text_of(&[id])?.is_empty() {
            let mut others = (0..self.n_ids as u32).filter(|other| self.is_plain(*other));
            before = others.next().unwrap_or(id);
        }
        let (one, two) = (self.text_of(&[before])?, self.text_of(&[before, id])?);
        Ok(match two.strip_prefix(&one) {
            Some(added) => added.into(),
            None => token.into_bytes(),
        })
    }

    /// Returns whether a token is text by itself.
    fn is_plain(&self, id: u32) -> bool {
        let token = self.inner.id_to_token(id);
        let text = token.filter(|token| !self.is_left_out(token));
        text.is_some_and(|token| {
            own_bytes(self.bytes(), &token).is_none()
                && self.text_of(&[id]).is_ok_and(|text| !text.is_empty())
        })
    }
}

/// Returns the bytes of a token, where they do not depend on the tokens before it.
fn own_bytes(bytes: Bytes, token: &str) -> Option<Vec<u8>> {
    match bytes {
        Bytes::Level => {
            let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
            Some(bytes.unwrap_or_else(|| token.into()))
        }
        Bytes::Fallback => {
            let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
            let byte = u8::from_str_radix(hex, 16).ok()?;
            (hex.len() == 2).then(|| vec![byte])
        }
        Bytes::None => None,
    }
}

/// Returns the byte that a character stands for in byte-level BPE: printable characters of Latin-1
/// for themselves, and the characters from U+0100 on for the other bytes in their order.
fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// Makes text of tokens that come one after another, as during generation.
///
/// All parts together are what [`TextTokenizer::decode`] makes of all tokens, except that bytes
/// which are no UTF-8 may become another number of U+FFFD. Each part is whole characters: a
/// character of several tokens comes with its last token. The cost of a token does not depend on
/// the number of tokens before it.
///
/// The same tokenizer must be given to each call.
#[derive(Clone, Debug, Default)]
pub struct Detokenizer {
    special: bool,
    /// The last token whose text was returned, which the next one continues.
    last: Option<u32>,
    /// The last one before it that is not blank, if it is blank: a blank at the beginning of a text
    /// may be left out.
    before: Option<u32>,
    /// Tokens after it whose text is held back.
    held: Vec<u32>,
    /// The first bytes of a character.
    bytes: Vec<u8>,
    /// The text that the last call returned.
    text: String,
}

impl Detokenizer {
    /// Creates a detokenizer at the beginning of a text. Special tokens are left out.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets whether special tokens are written by their names, not left out.
    pub fn with_special(mut self, special: bool) -> Self {
        self.special = special;
        self
    }

    /// Adds a token, and returns the text that is complete with it, which may be empty.
    ///
    /// # Errors
    /// Returns [`Error::Tokenizer`] if the tokenizer fails. The token then adds no text.
    pub fn push(&mut self, tokenizer: &TextTokenizer, id: u32) -> Result<&str> {
        self.text.clear();
        let token = tokenizer.inner.id_to_token(id);
        let shown = |token: &String| self.special || !tokenizer.is_left_out(token);
        let Some(token) = token.filter(shown) else {
            return Ok(&self.text);
        };
        let kind = tokenizer.bytes();
        let own = own_bytes(kind, &token);
        // The first token of a text may lose a space, also one that stands for a byte.
        let begins = self.last.is_none() && kind == Bytes::Fallback;
        match own.filter(|bytes| !(begins && bytes.is_ascii())) {
            Some(bytes) => {
                self.bytes.extend(bytes);
                self.follow(tokenizer, kind, id)?;
            }
            None => self.add_text(tokenizer, id)?,
        }
        self.take(false);
        Ok(&self.text)
    }

    /// Ends the text: returns what was held back. A part of a character becomes U+FFFD. The next
    /// token begins another text.
    pub fn finish(&mut self) -> &str {
        self.text.clear();
        if !self.held.is_empty() {
            self.text.push(char::REPLACEMENT_CHARACTER);
        }
        self.take(true);
        (self.last, self.before) = (None, None);
        self.bytes.clear();
        self.held.clear();
        &self.text
    }

    /// Adds what a token adds to the text of the last one.
    fn add_text(&mut self, tokenizer: &TextTokenizer, id: u32) -> Result<()> {
        let context = [self.before.as_slice(), self.last.as_slice()].concat();
        let known = match &*context {
            [] => String::new(),
            context => tokenizer.text_of(context)?,
        };
        self.held.push(id);
        let all = tokenizer.text_of(&[&context[..], &self.held].concat());
        let all = match all {
            Ok(all) => all,
            Err(error) => {
                self.held.pop();
                return Err(error);
            }
        };
        let added = match all.strip_prefix(&known) {
            Some(added) => added.to_string(),
            // The token changes the text before it, which was already returned.
            None => String::from_utf8_lossy(&tokenizer.piece(id)?).into_owned(),
        };
        if added.ends_with(char::REPLACEMENT_CHARACTER) && self.held.len() < HELD {
            return Ok(());
        }
        self.bytes.extend(added.as_bytes());
        self.held.clear();
        self.follow(tokenizer, Bytes::None, id)
    }

    /// Makes a token the one that the next one continues.
    fn follow(&mut self, tokenizer: &TextTokenizer, kind: Bytes, id: u32) -> Result<()> {
        // Bytes of byte-level BPE do not depend on the tokens before them.
        if kind != Bytes::Level {
            let blank = tokenizer.text_of(&[id])?.is_empty();
            // What was before a blank one is before this one, too.
            self.before = match (blank, self.before) {
                (false, _) => None,
                (true, None) => self.last,
                (true, before) => before,
            };
        }
        self.last = Some(id);
        Ok(())
    }

    /// Moves whole characters from the bytes to the text, and all bytes at the end of the text.
    fn take(&mut self, all: bool) {
        loop {
            match std::str::from_utf8(&self.bytes) {
                Ok(text) => {
                    self.text.push_str(text);
                    return self.bytes.clear();
                }
                Err(error) => {
                    let (valid, bad) = (error.valid_up_to(), error.error_len());
                    let rest = self.bytes.len() - valid;
                    let whole = String::from_utf8_lossy(&self.bytes[..valid]);
                    self.text.push_str(&whole);
                    let skipped = match bad {
                        None if !all => 0,
                        bad => {
                            self.text.push(char::REPLACEMENT_CHARACTER);
                            bad.unwrap_or(rest)
                        }
                    };
                    self.bytes.drain(..valid + skipped);
                    if skipped == 0 {
                        return;
                    }
                }
            }
        }
    }
}

/// Ends a text at strings that the caller gives.
///
/// Text that may be the beginning of such a string is held back until it is known. Where the text
/// ends does not depend on how it is split into parts.
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    strings: Vec<String>,
    held: String,
    text: String,
    stopped: bool,
}

impl StopStrings {
    /// Creates a search for these strings.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if one of them is empty.
    pub fn new(strings: impl IntoIterator<Item = impl Into<String>>) -> Result<Self> {
        let strings: Vec<String> = strings.into_iter().map(Into::into).collect();
        if let Some(at) = strings.iter().position(String::is_empty) {
            let found = format!("an empty one at {at}");
            return Err(Error::argument("stop strings", found, "at least one byte"));
        }
        Ok(Self {
            strings,
            ..Self::default()
        })
    }

    /// Adds text, and returns the text that can be shown. Ends before the stop string whose end
    /// comes first; the longest one if several end there.
    pub fn push(&mut self, text: &str) -> &str {
        self.text.clear();
        if self.stopped {
            return &self.text;
        }
        self.held.push_str(text);
        let found = self.strings.iter().filter_map(|stop| {
            let at = self.held.find(stop.as_str())?;
            Some((at + stop.len(), at))
        });
        let upto = match found.min() {
            Some((_, at)) => {
                self.stopped = true;
                at
            }
            None => self.held.len() - self.suffix(),
        };
        self.text.extend(self.held.drain(..upto));
        if self.stopped {
            self.held.clear();
        }
        &self.text
    }

    /// Returns the length of the longest end of the held text with which a stop string begins.
    fn suffix(&self) -> usize {
        let longest = self.strings.iter().map(String::len).max().unwrap_or(0);
        let first = (self.held.len() + 1).saturating_sub(longest);
        let starts = (first..self.held.len()).filter(|at| self.held.is_char_boundary(*at));
        let begins = |rest: &str| self.strings.iter().any(|stop| stop.starts_with(rest));
        let mut ends = starts.filter_map(|at| self.held.get(at..).filter(|rest| begins(rest)));
        ends.next().map_or(0, str::len)
    }

    /// Returns whether a stop string was found.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Ends the text: returns what was held back. The next text begins anew.
    pub fn finish(&mut self) -> &str {
        self.text.clear();
        std::mem::swap(&mut self.text, &mut self.held);
        self.stopped = false;
        &self.text
    }
}

#[cfg(test)]
mod tests;
