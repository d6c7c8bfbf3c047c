//! SentencePiece's `tokenizer.model` (Kudo and Richardson, arXiv 1808.06226) as a `tokenizer.json`.
//!
//! A text gets the tokens that SentencePiece gives, with two additions of transformers: control
//! tokens in the text are found, and the files next to the model may add or rename tokens. After an
//! added token there is no dummy prefix, except where `tokenizer_config.json` says `legacy`.
//!
//! Two things differ. In BPE, merges with the same score are made in a fixed order, not from left to
//! right; models that SentencePiece trained have no two of them. In a unigram model that lacks one of
//! its characters, the name of a byte (`<0x0A>`) in a text is that byte.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::TokenizerFiles;
use super::json::{
    AddedToken, BYTE, Bpe, CONTROL, MAX_PIECE_BYTES, NORMAL, PieceRules, Prefix, Surroundings,
    Tokenizer, Tokens, UNKNOWN, UNUSED, USER_DEFINED, Unigram, post_processor,
};
use super::protobuf::Message;
use crate::error::{Error, Result};
use crate::io::fields::Fields;

/// Largest number of a token.
const MAX_ID: usize = 1 << 26;

/// Score of a piece of a unigram model that should not be found in a text. The scores of others are
/// logarithms of probabilities.
const NEVER: f64 = -1000.0;

/// Classes of transformers that number the tokens in another way than the model.
const OTHER_NUMBERS: [&str; 14] = [
    "Barthez",
    "Bartpho",
    "Camembert",
    "ErnieM",
    "Fairseq",
    "M2M100",
    "MBart",
    "Marian",
    "Nllb",
    "Pegasus",
    "PLBart",
    "SeamlessM4T",
    "XGLM",
    "XLMRoberta",
];

/// Fields of `tokenizer_config.json` that name a special token.
pub(super) const SPECIAL: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
];

/// Fields that list more of them.
pub(super) const LISTS: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];

/// A parsed model, with the defaults of its format.
struct Model<'a> {
    path: &'a Path,
    texts: Vec<&'a str>,
    scores: Vec<f32>,
    kinds: Vec<i128>,
    /// 1 is a unigram model, 2 is BPE.
    model_type: i32,
    byte_fallback: bool,
    space_after: bool,
    bos: Option<&'a str>,
    eos: Option<&'a str>,
    charsmap: &'a [u8],
    dummy_prefix: bool,
    trim: bool,
    escape: bool,
}

impl<'a> Model<'a> {
    fn parse(path: &'a Path, bytes: &'a [u8]) -> Result<Self> {
        let mut model = Self {
            path,
            texts: Vec::new(),
            scores: Vec::new(),
            kinds: Vec::new(),
            model_type: 1,
            byte_fallback: false,
            space_after: false,
            bos: Some("<s>"),
            eos: Some("</s>"),
            charsmap: &[],
            dummy_prefix: true,
            trim: true,
            escape: true,
        };
        let (mut bos, mut eos) = (("<s>", 1), ("</s>", 2));
        let bad = |reason: String| Error::invalid_file(path, reason);
        for field in Message::new(bytes) {
            let (number, value) = field.map_err(|at| {
                bad(format!(
                    "byte {at}: not a field of a SentencePiece model, which alone is read"
                ))
            })?;
            let name = match number {
                1 => "pieces",
                2 => "trainer_spec",
                3 => "normalizer_spec",
                _ => continue,
            };
            let at = || match number {
                1 => format!("piece {}", model.texts.len()),
                _ => format!("`{name}`"),
            };
            let Some(bytes) = value.bytes() else {
                return Err(bad(format!("{}: not a message", at())));
            };
            let wrong = |number| bad(format!("{}: field {number} has a wrong type", at()));
            let (mut text, mut score, mut kind) = ("", 0.0, NORMAL);
            for field in Message::new(bytes) {
                let (sub, value) =
                    field.map_err(|offset| bad(format!("{}: no field at byte {offset}", at())))?;
                let number_of = || value.i32().ok_or_else(|| wrong(sub));
                let text_of = || value.text().ok_or_else(|| wrong(sub));
                let flag = || value.bool().ok_or_else(|| wrong(sub));
                match (number, sub) {
                    (1, 1) => text = text_of()?,
                    (1, 2) => score = value.f32().ok_or_else(|| wrong(sub))?,
                    (1, 3) => kind = number_of()?.into(),
                    (2, 3) => model.model_type = number_of()?,
                    (2, 24) => model.space_after = flag()?,
                    (2, 35) => model.byte_fallback = flag()?,
                    (2, 41) => bos.1 = number_of()?,
                    (2, 42) => eos.1 = number_of()?,
                    (2, 46) => bos.0 = text_of()?,
                    (2, 47) => eos.0 = text_of()?,
                    (3, 2) => model.charsmap = value.bytes().ok_or_else(|| wrong(sub))?,
                    (3, 3) => model.dummy_prefix = flag()?,
                    (3, 4) => model.trim = flag()?,
                    (3, 5) => model.escape = flag()?,
                    _ => {}
                }
            }
            if number == 1 {
                let broken = |what: String| Err(bad(format!("{}: {what}", at())));
                if text.is_empty() || text.len() > MAX_PIECE_BYTES {
                    return broken(format!(
                        "{} bytes, expected 1 to {MAX_PIECE_BYTES}",
                        text.len()
                    ));
                }
                if !score.is_finite() {
                    return broken(format!("score {score}"));
                }
                if !(NORMAL..=BYTE).contains(&kind) {
                    return broken(format!("type {kind}, expected 1 to 6"));
                }
                model.texts.push(text);
                model.scores.push(score);
                model.kinds.push(kind);
            }
        }
        // A number below 0 says that there is no such token.
        model.bos = Some(bos.0).filter(|_| bos.1 >= 0);
        model.eos = Some(eos.0).filter(|_| eos.1 >= 0);
        model.check()?;
        Ok(model)
    }

    /// Checks what SentencePiece checks, and refuses what cannot be done with the tokenizers crate.
    fn check(&self) -> Result<()> {
        let bad = |reason: String| Err(Error::invalid_file(self.path, reason));
        if self.texts.is_empty() {
            return bad("not a SentencePiece model, which alone is read: no pieces".into());
        }
        let n_unknown = self.kinds.iter().filter(|kind| **kind == UNKNOWN).count();
        if n_unknown != 1 {
            return bad(format!(
                "{n_unknown} of {} pieces are of type unknown, expected 1",
                self.kinds.len()
            ));
        }
        if self.byte_fallback {
            let bytes = |id: &usize| self.kinds[*id] == BYTE;
            let found: Vec<&str> = (0..self.texts.len())
                .filter(bytes)
                .map(|id| self.texts[id])
                .collect();
            let missing = (0..=255_u8)
                .map(|byte| format!("<0x{byte:02X}>"))
                .find(|name| !found.contains(&name.as_str()));
            if let Some(name) = missing {
                return bad(format!("byte fallback, but no piece {name}"));
            }
        }
        if !self.charsmap.is_empty() {
            let fits = self
                .charsmap
                .split_first_chunk()
                .map(|(len, rest)| (u32::from_le_bytes(*len) as usize, rest.len()))
                .is_some_and(|(len, rest)| len > 0 && len % 4 == 0 && len <= rest);
            if !fits {
                return bad("`normalizer_spec`: precompiled_charsmap is cut off".into());
            }
        }
        let what = match self.model_type {
            1 | 2 if self.space_after => "treat_whitespace_as_suffix",
            1 | 2 if !self.escape => "escape_whitespaces = false",
            1 if self.kinds.contains(&UNUSED) => "unused pieces in a unigram model",
            1 | 2 => return Ok(()),
            3 => "model_type = word",
            4 => "model_type = char",
            _ => "this model_type",
        };
        Err(Error::Unsupported {
            what: format!("{}: SentencePiece's {what}", self.path.display()),
        })
    }
}

/// Reads a token of `tokenizer_config.json`: its text, or an object with the text.
pub(super) fn content(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

/// Collects the tokens that the files next to the model add or rename, by number.
pub(super) fn added_tokens<'a>(
    path: &Path,
    config: &'a Map<String, Value>,
    added: &'a Map<String, Value>,
) -> Result<BTreeMap<usize, AddedToken<'a>>> {
    let number = |id: Option<usize>, name: &str, found: &dyn std::fmt::Display| {
        id.filter(|id| *id < MAX_ID).ok_or_else(|| {
            Error::invalid_file(
                path.with_file_name(name),
                format!("{found}: not the number of a token"),
            )
        })
    };
    let mut all = BTreeMap::new();
    for (text, id) in added {
        let known = id.as_u64().and_then(|id| usize::try_from(id).ok());
        let id = number(known, "added_tokens.json", id)?;
        let token = AddedToken {
            normalized: true,
            ..AddedToken::new(id, text, false)
        };
        all.insert(id, token);
    }
    let Some(decoder) = config
        .get("added_tokens_decoder")
        .and_then(Value::as_object)
    else {
        return Ok(all);
    };
    for (id, token) in decoder {
        let id = number(id.parse().ok(), "tokenizer_config.json", id)?;
        let Some(text) = content(token) else {
            return Err(Error::invalid_file(
                path.with_file_name("tokenizer_config.json"),
                format!("added_tokens_decoder: token {id} has no content"),
            ));
        };
        let flag = |name: &str| token.get(name).and_then(Value::as_bool).unwrap_or(false);
        let token = AddedToken {
            id,
            content: text,
            single_word: flag("single_word"),
            lstrip: flag("lstrip"),
            rstrip: flag("rstrip"),
            normalized: flag("normalized"),
            special: flag("special"),
        };
        all.insert(id, token);
    }
    Ok(all)
}

/// Makes the tokenizer files of a model. `config` is the `tokenizer_config.json` and `added` the
/// `added_tokens.json` next to it; they are empty if there is no such file.
pub(super) fn files(
    path: &Path,
    bytes: &[u8],
    mut config: Map<String, Value>,
    added: &Map<String, Value>,
) -> Result<TokenizerFiles> {
    let model = Model::parse(path, bytes)?;
    let bad = |reason: String| Error::invalid_file(path, reason);
    let fields = Fields {
        map: &config,
        prefix: "tokenizer_config.",
    };
    if let Some(class) = fields.str("tokenizer_class")?
        && OTHER_NUMBERS.iter().any(|name| class.starts_with(name))
    {
        let what = format!("{}: `tokenizer_class` = `{class}`", path.display());
        return Err(Error::Unsupported { what });
    }

    // The tokens: the pieces, with other names and more tokens from the files next to the model.
    let mut all = added_tokens(path, &config, added)?;
    let mut texts = model.texts.clone();
    let n_pieces = texts.len();
    for (id, token) in all.range(..n_pieces) {
        texts[*id] = token.content;
    }
    let twice = |one: usize, other: usize, text: &str| {
        bad(format!("tokens {one} and {other} are both {text:?}"))
    };
    let mut tokens = Tokens::new(texts, model.kinds.clone())
        .map_err(|(one, other, text)| twice(one, other, text))?;
    for (id, token) in all.range(n_pieces..) {
        if let Some(other) = tokens.numbers.insert(token.content, *id) {
            return Err(twice(other, *id, token.content));
        }
    }
    for (id, kind) in tokens.kinds.iter().enumerate() {
        if matches!(*kind, CONTROL | UNKNOWN) {
            let text = tokens.texts[id];
            all.entry(id)
                .or_insert_with(|| AddedToken::new(id, text, true));
        }
    }
    let named = SPECIAL.iter().filter_map(|key| config.get(*key));
    let listed = LISTS
        .iter()
        .filter_map(|key| config.get(*key)?.as_array())
        .flatten();
    for text in named.chain(listed).filter_map(content) {
        if let Some((text, id)) = tokens.numbers.get_key_value(text) {
            let new = || AddedToken::new(*id, text, true);
            all.entry(*id).or_insert_with(new).special = true;
        }
    }

    // The special tokens around a text.
    let edge = |key: &str, own: Option<&str>| {
        let text = match config.get(key) {
            None => own,
            Some(token) => content(token),
        }?;
        Some((*tokens.numbers.get(text)?, text.to_string()))
    };
    let (bos, eos) = (edge("bos_token", model.bos), edge("eos_token", model.eos));
    let around = |key: &str, absent: bool, token: &Option<(usize, String)>| {
        let asked = fields.bool(key)?;
        match token {
            None if asked == Some(true) => Err(bad(format!(
                "`tokenizer_config.{key}`, but the model has no such token"
            ))),
            None => Ok(None),
            Some(token) => Ok(asked.unwrap_or(absent).then(|| token.clone())),
        }
    };
    let before = around("add_bos_token", true, &bos)?;
    let after = around("add_eos_token", false, &eos)?;
    fn pair(token: &Option<(usize, String)>) -> Option<(usize, &str)> {
        token.as_ref().map(|(id, text)| (*id, text.as_str()))
    }
    let post_processor = post_processor(pair(&before), pair(&after));

    let wanted = fields.bool("add_prefix_space")?.unwrap_or(true);
    let legacy = fields.bool("legacy")?.unwrap_or(false);
    let charsmap = base64(model.charsmap);
    let is_bpe = model.model_type == 2;
    // BPE never merges these. In a unigram model they have a score.
    let user_defined = tokens.kinds.iter().enumerate().filter(|_| is_bpe);
    let rules = PieceRules {
        prefix: match model.dummy_prefix && wanted {
            false => Prefix::Nowhere,
            true if legacy => Prefix::Pieces,
            true => Prefix::Text,
        },
        charsmap: &charsmap,
        trim: model.trim,
        user_defined: user_defined
            .filter(|(_, kind)| **kind == USER_DEFINED)
            .map(|(id, _)| tokens.texts[id])
            .collect(),
    };
    let surroundings = rules.surroundings();
    let whole = !rules.user_defined.is_empty();
    let added = all.into_values().collect();
    let json = if is_bpe {
        let bpe = bpe(&model, &tokens, whole)?;
        to_json(path, added, surroundings, post_processor, bpe)
    } else {
        let unigram = unigram(&model, &tokens)?;
        to_json(path, added, surroundings, post_processor, unigram)
    }?;
    for (key, token) in [("bos_token", &bos), ("eos_token", &eos)] {
        if let Some((_, text)) = token {
            config.insert(key.into(), json!(text));
        }
    }
    Ok(TokenizerFiles {
        notices: Vec::new(),
        path: path.into(),
        json,
        config,
    })
}

fn to_json<M: serde::Serialize>(
    path: &Path,
    added: Vec<AddedToken<'_>>,
    around: Surroundings,
    post_processor: Value,
    model: M,
) -> Result<String> {
    let tokenizer = Tokenizer::new(added, around, post_processor, model);
    serde_json::to_string(&tokenizer).map_err(|e| Error::json(path, e))
}

/// The unknown token.
fn unknown(tokens: &Tokens<'_>) -> usize {
    let at = tokens.kinds.iter().position(|kind| *kind == UNKNOWN);
    at.unwrap_or(0)
}

/// `whole` says that a piece that stands alone is not split, which user-defined ones need.
fn bpe<'a>(model: &Model<'_>, tokens: &Tokens<'a>, whole: bool) -> Result<Bpe<'a>> {
    // SentencePiece makes an unused piece and splits it at last.
    let part = |text: &str| {
        let id = tokens.numbers.get(text).copied();
        id.and_then(|id| tokens.kinds.get(id))
            .is_some_and(|kind| matches!(*kind, NORMAL | UNUSED))
    };
    for (id, text) in tokens.texts.iter().enumerate() {
        let made = |(at, _)| part(&text[..at]) && part(&text[at..]);
        if tokens.kinds[id] == UNUSED && text.char_indices().skip(1).any(made) {
            let what = format!(
                "{}: unused piece {id} ({text:?}), of which others are made,",
                model.path.display()
            );
            return Err(Error::Unsupported { what });
        }
    }
    let merges = tokens
        .merges(&model.scores)
        .map_err(|id| Error::invalid_file(model.path, format!("token {id} is too long")))?;
    Ok(Bpe {
        unk_token: Some(tokens.texts[unknown(tokens)]),
        fuse_unk: true,
        byte_fallback: model.byte_fallback,
        ignore_merges: whole,
        ..Bpe::new(tokens.numbers.clone(), merges)
    })
}

fn unigram<'a>(model: &Model<'_>, tokens: &Tokens<'a>) -> Result<Unigram<'a>> {
    let normal = model.scores.iter().zip(&tokens.kinds);
    let best = normal
        .filter(|(_, kind)| **kind == NORMAL)
        .map(|(score, _)| f64::from(*score))
        .fold(f64::from(f32::MIN_POSITIVE), f64::max);
    let mut vocab: Vec<(&str, f64)> = tokens
        .texts
        .iter()
        .zip(&model.scores)
        .zip(&tokens.kinds)
        .map(|((text, score), kind)| match *kind {
            // SentencePiece prefers these to all pieces with negative scores.
            USER_DEFINED => (*text, text.len() as f64 * best - 0.1),
            // These stand for bytes, not for their own text.
            BYTE => (*text, NEVER),
            _ => (*text, f64::from(*score)),
        })
        .collect();
    // Tokens from other files are found before.
    let mut more: Vec<(usize, &str)> = tokens
        .numbers
        .iter()
        .filter(|(_, id)| **id >= vocab.len())
        .map(|(text, id)| (*id, *text))
        .collect();
    more.sort_unstable();
    for (id, text) in more {
        if id != vocab.len() {
            let what = format!(
                "{}: added token {id} ({text:?}) after {} tokens, in a unigram model,",
                model.path.display(),
                vocab.len()
            );
            return Err(Error::Unsupported { what });
        }
        vocab.push((text, NEVER));
    }
    Ok(Unigram {
        r#type: "Unigram",
        unk_id: unknown(tokens),
        vocab,
        byte_fallback: model.byte_fallback,
    })
}

/// Encodes bytes in base 64 (RFC 4648) with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |at: usize| u32::from(chunk.get(at).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for at in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * at) & 63) as usize];
            text.push(if at > chunk.len() { '=' } else { digit.into() });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn base_64_is_that_of_the_rfc() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(super::base64(bytes.as_bytes()), text);
        }
    }
}
