//! Checks of what a `tokenizer.json` does to a text before the tokenizers crate runs it. The crate
//! does not check them: some files make it use any amount of memory, and others make it panic.
//!
//! Opening a file that passes takes at most 64 MiB and 64 times its size. What normalizers,
//! pre-tokenizers and decoders make of a text is bounded by [`Limits`], from which the largest text
//! follows that is given to the crate at once.

use std::cell::Cell;
use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, Visitor};
use serde_json::Value;

use super::charsmap;
use crate::input::json::Limited;

/// Largest number of bytes that a normalizer, a pre-tokenizer or a decoder may make of one.
const MAX_GROWTH: f64 = 1024.0;
/// Largest number of bytes that normalizer and pre-tokenizer together may make of one. For that of
/// ALBERT, which decomposes letters twice, it is some 1500.
const MAX_JOINT_GROWTH: f64 = 2048.0;
/// Largest number of bytes that it may add to a text.
const MAX_ADDED_BYTES: f64 = 4096.0;
/// Largest number of values in the settings that are not the vocabulary. Tokenizers have some
/// hundred.
const MAX_VALUES: u32 = 1 << 16;
/// Largest number of tokens that are put around a text.
const MAX_SPECIAL_TOKENS: usize = 1024;
/// Longest prefix or suffix of parts of words, which is copied for each character.
const MAX_AFFIX_BYTES: usize = 256;
/// Longest added token.
const MAX_TOKEN_BYTES: usize = 4096;
/// Memory for each byte of an added token that the search for them takes. For few tokens it is a
/// table with a column for each byte.
const SEARCH_BYTES: (usize, f64, f64) = (100, 1024.0, 64.0);
/// Memory that the search may take besides a multiple of the file.
const SEARCH_FREE: f64 = (32 << 20) as f64;
const SEARCH_FACTOR: f64 = 32.0;

/// How long a text can become: `factor * bytes + added`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Growth {
    factor: f64,
    added: f64,
}

impl Growth {
    const NONE: Self = Self::new(1.0, 0.0);

    const fn new(factor: f64, added: f64) -> Self {
        Self { factor, added }
    }

    /// What a step makes of what this one made.
    fn then(self, next: Self) -> Self {
        Self {
            factor: self.factor * next.factor,
            added: self.added * next.factor + next.added,
        }
    }

    /// Largest number of bytes that become of a text of `bytes`.
    pub fn of(self, bytes: usize) -> f64 {
        self.factor * bytes as f64 + self.added
    }

    fn check(self, what: &str, most: f64) -> Result<(), String> {
        let Self { factor, added } = self;
        if factor > most {
            return Err(format!(
                "its {what} can make a text {factor:.0} times as long, more than the {most} that \
                 are allowed"
            ));
        }
        if added > MAX_ADDED_BYTES {
            return Err(format!(
                "its {what} can add {added:.0} bytes to a text, more than the {MAX_ADDED_BYTES} \
                 that are allowed"
            ));
        }
        Ok(())
    }
}

/// What a tokenizer can make of a text, and of a token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// A text before it is cut into tokens.
    pub text: Growth,
    /// The text of a token when it is decoded.
    pub token: Growth,
}

/// Checks the text of a `tokenizer.json`, and returns what it can make of a text. The error says
/// what is wrong.
pub(crate) fn check(json: &str) -> Result<Limits, String> {
    let file = Settings::parse(json).map_err(|error| format!("not JSON: {error}"))?;
    let part = |what: &str, step: &Value, own: fn(&str, &Value) -> Growth| {
        let growth = growth(step, own)?;
        growth.check(what, MAX_GROWTH)?;
        Ok::<_, String>(growth)
    };
    let normalizer = part("normalizer", &file.normalizer, normalized)?;
    let pre_tokenizer = part("pre-tokenizer", &file.pre_tokenizer, pre_tokenized)?;
    let token = part("decoder", &file.decoder, decoded)?;
    let text = normalizer.then(pre_tokenizer);
    text.check("normalizer with its pre-tokenizer", MAX_JOINT_GROWTH)?;
    let around = special_tokens(&file.post_processor)?;
    if around > MAX_SPECIAL_TOKENS {
        return Err(format!(
            "its post-processor puts {around} tokens around a text, more than {MAX_SPECIAL_TOKENS}"
        ));
    }
    if let Some((name, len)) = file
        .affix
        .as_ref()
        .filter(|(_, len)| *len > MAX_AFFIX_BYTES)
    {
        return Err(format!(
            "its model's `{name}` has {len} bytes, more than {MAX_AFFIX_BYTES}"
        ));
    }
    added_tokens(&file, normalizer, json.len())?;
    Ok(Limits { text, token })
}

/// Checks the memory that the search for added tokens takes.
fn added_tokens(file: &Settings, normalizer: Growth, json: usize) -> Result<(), String> {
    let (few, table, list) = SEARCH_BYTES;
    let n = file.added.len();
    let mut bytes = 0.0;
    for (len, is_normalized) in &file.added {
        if *len > MAX_TOKEN_BYTES {
            return Err(format!(
                "an added token of {len} bytes, more than {MAX_TOKEN_BYTES}"
            ));
        }
        let growth = if *is_normalized {
            normalizer
        } else {
            Growth::NONE
        };
        bytes += growth.of(*len);
    }
    let memory = bytes * if n <= few { table } else { list };
    if memory > SEARCH_FREE + SEARCH_FACTOR * json as f64 {
        return Err(format!(
            "its {n} added tokens can have {bytes:.0} bytes when they are normalized, too many for \
             a file of {json}"
        ));
    }
    Ok(())
}

/// What the steps of a sequence make of a text, `own` being what a single step does.
fn growth(step: &Value, own: fn(&str, &Value) -> Growth) -> Result<Growth, String> {
    if let Some(table) = step.get("precompiled_charsmap").and_then(Value::as_str)
        && !table.is_empty()
    {
        let factor =
            charsmap::growth(table).ok_or("its normalizer: `precompiled_charsmap` is damaged")?;
        return Ok(Growth::new(factor, 0.0));
    }
    let lists = ["normalizers", "pretokenizers", "decoders"].into_iter();
    let parts = lists
        .filter_map(|name| step.get(name)?.as_array())
        .flatten();
    let kind = step.get("type").and_then(Value::as_str).unwrap_or("");
    let mut all = own(kind, step).then(replaced(step));
    for part in parts {
        all = all.then(growth(part, own)?);
    }
    Ok(all)
}

/// What a replacement makes of a text.
fn replaced(step: &Value) -> Growth {
    let (Some(content), Some(pattern)) = (step.get("content"), step.get("pattern")) else {
        return Growth::NONE;
    };
    let content = len(content);
    match pattern.get("String").map(len) {
        Some(pattern) if pattern > 0.0 => Growth::new((content / pattern).max(1.0), 0.0),
        // A pattern may match between any two characters.
        _ => Growth::new(1.0 + content, content),
    }
}

fn len(text: &Value) -> f64 {
    text.as_str().map_or(0.0, |text| text.len() as f64)
}

/// What a normalizer makes of a text, besides what it replaces. The factors are those of Unicode's
/// tables: the longest decompositions, and the longest lowercase letter.
fn normalized(kind: &str, step: &Value) -> Growth {
    match kind {
        "NFC" | "NFD" => Growth::new(3.0, 0.0),
        "NFKC" | "NFKD" => Growth::new(11.0, 0.0),
        "Lowercase" => Growth::new(1.5, 0.0),
        // Spaces around ideographs, decomposition, lowercase.
        "BertNormalizer" | "Bert" => Growth::new(9.0, 0.0),
        "ByteLevel" => Growth::new(2.0, 0.0),
        _ => Growth::new(1.0, step.get("prepend").map_or(0.0, len)),
    }
}

/// What a pre-tokenizer makes of a text.
fn pre_tokenized(kind: &str, step: &Value) -> Growth {
    match kind {
        "ByteLevel" => Growth::new(2.0, 2.0),
        // A sign in the place of each space, and one before each part.
        "Metaspace" => {
            let sign = step.get("replacement").map_or(4.0, len);
            Growth::new(1.0 + sign, sign)
        }
        _ => Growth::NONE,
    }
}

/// What a decoder makes of the text of a token, besides what it replaces.
fn decoded(kind: &str, step: &Value) -> Growth {
    let is_empty = |name: &str| step.get(name).is_none_or(|text| len(text) == 0.0);
    match kind {
        // Bytes that are not UTF-8 become signs of three bytes.
        "ByteLevel" => Growth::new(3.0, 0.0),
        "WordPiece" => Growth::new(1.0, 1.0),
        // An empty text is found between all characters.
        "BPEDecoder" if is_empty("suffix") => Growth::new(2.0, 1.0),
        "CTC" if is_empty("word_delimiter_token") => Growth::new(2.0, 1.0),
        _ => Growth::NONE,
    }
}

/// Counts the tokens that a post-processor puts around a text, and refuses one that multiplies the
/// text.
fn special_tokens(step: &Value) -> Result<usize, String> {
    let mut count: usize = match step.get("type").and_then(Value::as_str) {
        Some("BertProcessing" | "RobertaProcessing") => 2,
        _ => 0,
    };
    if let Some(single) = step.get("single").and_then(Value::as_array) {
        let texts = single
            .iter()
            .filter(|piece| piece.get("Sequence").is_some());
        // Without a text there is nothing to tokenize.
        if texts.count() != 1 {
            return Err("its post-processor does not put one text in its place".into());
        }
        for piece in single {
            let name = piece.get("SpecialToken").and_then(|piece| piece.get("id"));
            let tokens = name.and_then(Value::as_str).and_then(|name| {
                let token = step.get("special_tokens")?.get(name)?;
                token.get("ids")?.as_array()
            });
            count = count.saturating_add(tokens.map_or(0, Vec::len));
        }
    }
    let parts = step.get("processors").and_then(Value::as_array);
    for part in parts.into_iter().flatten() {
        count = count.saturating_add(special_tokens(part)?);
    }
    Ok(count)
}

/// The parts of `tokenizer.json` that are checked.
#[derive(Default)]
struct Settings {
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    /// Lengths of the added tokens, and whether they are normalized.
    added: Vec<(usize, bool)>,
    /// Longest prefix or suffix of the model's.
    affix: Option<(String, usize)>,
}

impl Settings {
    fn parse(json: &str) -> serde_json::Result<Self> {
        let mut settings = Self::default();
        let left = Cell::new(MAX_VALUES);
        let mut parser = serde_json::Deserializer::from_str(json);
        File {
            settings: &mut settings,
            left: &left,
        }
        .deserialize(&mut parser)?;
        parser.end()?;
        Ok(settings)
    }
}

/// Reads the whole file, and keeps the parts.
struct File<'a> {
    settings: &'a mut Settings,
    left: &'a Cell<u32>,
}

impl<'de> DeserializeSeed<'de> for File<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for File<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        #[derive(serde::Deserialize)]
        struct Added {
            content: String,
            normalized: Option<bool>,
            special: Option<bool>,
        }
        let Self { settings, left } = self;
        while let Some(key) = map.next_key::<String>()? {
            let part = match key.as_str() {
                "normalizer" => &mut settings.normalizer,
                "pre_tokenizer" => &mut settings.pre_tokenizer,
                "post_processor" => &mut settings.post_processor,
                "decoder" => &mut settings.decoder,
                "added_tokens" => {
                    let all: Option<Vec<Added>> = map.next_value()?;
                    let sizes = all.into_iter().flatten().map(|token| {
                        let default = !token.special.unwrap_or(false);
                        (token.content.len(), token.normalized.unwrap_or(default))
                    });
                    settings.added = sizes.collect();
                    continue;
                }
                "model" => {
                    settings.affix = map.next_value_seed(Model)?;
                    continue;
                }
                _ => {
                    map.next_value::<de::IgnoredAny>()?;
                    continue;
                }
            };
            *part = map.next_value_seed(Limited(left))?;
        }
        Ok(())
    }
}

/// Finds the longest prefix or suffix of a model's.
struct Model;

impl<'de> DeserializeSeed<'de> for Model {
    type Value = Option<(String, usize)>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        #[derive(Default, serde::Deserialize)]
        #[serde(default)]
        struct Affixes {
            continuing_subword_prefix: Option<String>,
            end_of_word_suffix: Option<String>,
        }
        let affixes: Affixes = de::Deserialize::deserialize(from)?;
        let all = [
            (
                "continuing_subword_prefix",
                affixes.continuing_subword_prefix,
            ),
            ("end_of_word_suffix", affixes.end_of_word_suffix),
        ];
        let sizes = all
            .into_iter()
            .filter_map(|(name, text)| Some((name.to_string(), text?.len())));
        Ok(sizes.max_by_key(|(_, len)| *len))
    }
}
