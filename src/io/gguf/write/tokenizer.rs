//! The tokenizer of a Hugging Face folder as GGUF keys.

use std::collections::{HashMap, HashSet};

use serde::Deserialize;
use serde_json::Value;

use super::super::tokenizer::{CUTS, Cut};
use super::container::Keys;
use super::{GgufOptions, GgufReport};
use crate::error::{Error, Result};
use crate::io::source::{ModelSource, TokenizerTexts};
use crate::io::tokenizer::json::{BYTE, CONTROL, NORMAL, Tokens, UNKNOWN, UNUSED, USER_DEFINED};

/// The parts of `tokenizer.json` that are used.
#[derive(Deserialize)]
struct Json {
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    model: Model,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Model {
    #[serde(default)]
    r#type: Option<String>,
    /// A map of a BPE model, a list of a Unigram model.
    vocab: Value,
    #[serde(default)]
    merges: Vec<Merge>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: Option<bool>,
    #[serde(default)]
    unk_token: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

impl Merge {
    fn pair(&self) -> Option<(&str, &str)> {
        match self {
            Self::Pair(left, right) => Some((left, right)),
            // A token may begin with a space, but not contain one.
            Self::Line(line) => {
                let at = line.char_indices().skip(1).find(|(_, c)| *c == ' ')?.0;
                Some((&line[..at], &line[at + 1..]))
            }
        }
    }
}

/// The steps of a normalizer, pre-tokenizer, post-processor or decoder, without the sequences that
/// hold them.
fn steps(value: &Value) -> Vec<&Value> {
    let inner = ["normalizers", "pretokenizers", "processors", "decoders"];
    match inner.iter().find_map(|key| value.get(key)?.as_array()) {
        Some(all) => all.iter().flat_map(steps).collect(),
        None if value.is_null() => Vec::new(),
        None => vec![value],
    }
}

fn kind_of(step: &Value) -> &str {
    step.get("type").and_then(Value::as_str).unwrap_or_default()
}

fn flag(step: &Value, name: &str, absent: bool) -> bool {
    step.get(name).and_then(Value::as_bool).unwrap_or(absent)
}

/// A tokenizer that is being converted.
struct Converter<'a> {
    texts: &'a TokenizerTexts,
    json: &'a Json,
    /// Ids by token.
    ids: HashMap<&'a str, u32>,
    /// Tokens of the vocabulary, one for each row of the embedding.
    tokens: Vec<String>,
    kinds: Vec<i32>,
}

/// Writes the keys `tokenizer.*`. Those of a GGUF source are kept.
pub(super) fn keys(
    source: &dyn ModelSource,
    options: &GgufOptions,
    keys: &mut Keys,
    report: &mut GgufReport,
) -> Result<()> {
    if let Some(gguf) = source.gguf() {
        let first = gguf.first();
        let all = first.values.iter();
        for (key, value) in all.filter(|(key, _)| key.starts_with("tokenizer.")) {
            keys.raw(key, first.encoded(value));
        }
        if let Some(pre) = &options.pre_tokenizer {
            keys.text("tokenizer.ggml.pre", pre);
        }
        return Ok(());
    }
    let Some(texts) = source.tokenizer()? else {
        keys.text("tokenizer.ggml.model", "none");
        let notice = "the model has no tokenizer, and the file takes token ids only";
        report.notices.push(notice.into());
        let config = source.config();
        let mut ends = config.eos_token_ids().iter().copied();
        let ids = [
            ("bos_token_id", config.bos_token_id()),
            ("eos_token_id", ends.next()),
            ("eot_token_id", ends.next()),
            ("eom_token_id", ends.next()),
            ("padding_token_id", config.pad_token_id()),
        ];
        for (name, id) in ids {
            if let Some(id) = id.filter(|id| (*id as usize) < config.vocab_size()) {
                keys.u32(format!("tokenizer.ggml.{name}"), id);
            }
        }
        return Ok(());
    };
    let json: Json =
        serde_json::from_str(&texts.json).map_err(|error| Error::json(&texts.path, error))?;
    let converter = Converter::new(&texts, &json, source.config().vocab_size(), report)?;
    converter.vocabulary(options, keys, report)?;
    converter.special_tokens(source, keys)?;
    converter.chat_templates(keys)
}

impl<'a> Converter<'a> {
    fn new(
        texts: &'a TokenizerTexts,
        json: &'a Json,
        vocab_size: usize,
        report: &mut GgufReport,
    ) -> Result<Self> {
        let bad = |reason: String| Error::Tokenizer {
            path: texts.path.clone(),
            reason,
        };
        let unsupported = |what: String| Error::Unsupported {
            what: format!("{}: {what}, in GGUF", texts.path.display()),
        };
        let kind = json.model.r#type.as_deref().unwrap_or("BPE");
        let Some(vocab) = json.model.vocab.as_object().filter(|_| kind == "BPE") else {
            return Err(unsupported(format!("a tokenizer of model `{kind}`")));
        };
        let mut ids = HashMap::new();
        for (token, id) in vocab {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let id = id.ok_or_else(|| bad(format!("token {token:?} has no number")))?;
            ids.insert(token.as_str(), id);
        }
        let mut kinds = vec![i32_of(UNUSED); vocab_size];
        let mut tokens: Vec<String> = (0..vocab_size).map(|id| format!("[PAD{id}]")).collect();
        let mut beyond = 0_usize;
        let mut set = |id: u32, token: &str, kind: i128| match tokens.get_mut(id as usize) {
            Some(place) => {
                *place = token.into();
                kinds[id as usize] = i32_of(kind);
            }
            None => beyond += 1,
        };
        for (token, id) in &ids {
            set(*id, token, NORMAL);
        }
        if json.model.byte_fallback {
            for byte in 0..=u8::MAX {
                let token = format!("<0x{byte:02X}>");
                if let Some(id) = ids.get(token.as_str()) {
                    set(*id, &token, BYTE);
                }
            }
        }
        for added in &json.added_tokens {
            let kind = if added.special { CONTROL } else { USER_DEFINED };
            set(added.id, &added.content, kind);
            ids.insert(&added.content, added.id);
        }
        let unknown = json.model.unk_token.as_deref();
        if let Some((token, id)) = unknown.and_then(|token| Some((token, ids.get(token)?))) {
            set(*id, token, UNKNOWN);
        }
        if beyond > 0 {
            report.notices.push(format!(
                "{beyond} tokens have numbers beyond the embedding's {vocab_size} rows and are \
                 left out"
            ));
        }
        Ok(Self {
            texts,
            json,
            ids,
            tokens,
            kinds,
        })
    }

    fn bad(&self, reason: impl Into<String>) -> Error {
        Error::Tokenizer {
            path: self.texts.path.clone(),
            reason: reason.into(),
        }
    }

    fn unsupported(&self, what: impl std::fmt::Display) -> Error {
        Error::Unsupported {
            what: format!("{}: {what}, in GGUF", self.texts.path.display()),
        }
    }

    /// Writes the tokens and what splits a text into them.
    fn vocabulary(
        &self,
        options: &GgufOptions,
        keys: &mut Keys,
        report: &mut GgufReport,
    ) -> Result<()> {
        let pre = steps(&self.json.pre_tokenizer);
        let byte_level = |step: &&Value| kind_of(step) == "ByteLevel";
        if pre.iter().any(byte_level) {
            self.byte_level(&pre, options, keys, report)?;
        } else if self.has_space_symbol(&pre) {
            self.sentence_pieces(&pre, keys, report)?;
        } else {
            return Err(self.unsupported(
                "a tokenizer that is neither byte-level BPE nor of SentencePiece's kind",
            ));
        }
        keys.texts("tokenizer.ggml.tokens", &self.tokens);
        keys.i32s("tokenizer.ggml.token_type", &self.kinds);
        Ok(())
    }

    /// Byte-level BPE, as in GPT-2.
    fn byte_level(
        &self,
        pre: &[&Value],
        options: &GgufOptions,
        keys: &mut Keys,
        report: &mut GgufReport,
    ) -> Result<()> {
        let name = match &options.pre_tokenizer {
            Some(name) => name.as_str(),
            None => self.recognize(pre)?,
        };
        for step in steps(&self.json.normalizer) {
            report.notices.push(format!(
                "the tokenizer normalizes text ({}), which llama.cpp does not",
                kind_of(step)
            ));
        }
        keys.text("tokenizer.ggml.model", "gpt2");
        keys.text("tokenizer.ggml.pre", name);
        let mut lines = Vec::with_capacity(self.json.model.merges.len());
        for merge in &self.json.model.merges {
            let pair = merge.pair();
            let Some((left, right)) = pair.filter(|(l, r)| !l.contains(' ') && !r.contains(' '))
            else {
                return Err(self.bad("a merge that is no pair of tokens without spaces"));
            };
            lines.push(format!("{left} {right}"));
        }
        keys.texts("tokenizer.ggml.merges", &lines);
        Ok(())
    }

    /// Finds llama.cpp's name of a pre-tokenizer by what it does.
    fn recognize(&self, pre: &[&Value]) -> Result<&'static str> {
        let mut digits = false;
        let mut pattern = None;
        let mut simple = true;
        for step in pre {
            match kind_of(step) {
                "Digits" => {
                    digits = true;
                    simple &= flag(step, "individual_digits", false);
                }
                "Split" => {
                    simple &= pattern.is_none()
                        && step.get("behavior").and_then(Value::as_str) == Some("Isolated")
                        && !flag(step, "invert", false);
                    let regex = step.get("pattern").and_then(|pattern| pattern.get("Regex"));
                    pattern = Some(regex.and_then(Value::as_str).unwrap_or_default());
                }
                "ByteLevel" => {
                    simple &= !flag(step, "add_prefix_space", false)
                        && flag(step, "use_regex", true) == pattern.is_none();
                }
                _ => simple = false,
            }
        }
        let ignore_merges = self.json.model.ignore_merges.unwrap_or(false);
        let same = |cut: &&Cut| {
            cut.digits == digits
                && cut.ignore_merges == ignore_merges
                && pattern.map_or(cut.pattern.is_none(), |found| {
                    cut.pattern.is_some_and(|known| same_pattern(known, found))
                })
        };
        let found = CUTS.iter().find(same).filter(|_| simple);
        found
            .and_then(|cut| cut.names.first())
            .copied()
            .ok_or_else(|| {
                let known: Vec<&str> = CUTS
                    .iter()
                    .filter_map(|cut| cut.names.first())
                    .copied()
                    .collect();
                self.unsupported(format!(
                "a pre-tokenizer that is none of llama.cpp's ({}): {}; if one of them is meant, \
                 name it by `pre_tokenizer`",
                known.join(", "),
                self.json.pre_tokenizer
            ))
            })
    }

    /// Returns whether spaces become the symbol `▁`, as in SentencePiece.
    fn has_space_symbol(&self, pre: &[&Value]) -> bool {
        let normalizer = steps(&self.json.normalizer);
        let mut all = normalizer.iter().chain(pre);
        self.json.model.byte_fallback
            || all.any(|step| match kind_of(step) {
                "Metaspace" => true,
                "Replace" => step.get("content").and_then(Value::as_str) == Some("▁"),
                _ => false,
            })
    }

    /// BPE as in SentencePiece: pairs are merged in the order of the scores of their products.
    fn sentence_pieces(
        &self,
        pre: &[&Value],
        keys: &mut Keys,
        report: &mut GgufReport,
    ) -> Result<()> {
        let mut prefix = false;
        for step in steps(&self.json.normalizer).iter().chain(pre) {
            match kind_of(step) {
                "Prepend" => prefix = true,
                "Metaspace" => {
                    let scheme = step.get("prepend_scheme").and_then(Value::as_str);
                    prefix = match scheme {
                        Some(scheme) => scheme != "never",
                        None => flag(step, "add_prefix_space", true),
                    };
                }
                "Replace" => {}
                // Where Gemma's tokenizer cuts at spaces, spaces are symbols already.
                "Split" => {}
                other => report.notices.push(format!(
                    "the tokenizer has a step `{other}`, which llama.cpp does not"
                )),
            }
        }
        let mut merges = Vec::with_capacity(self.json.model.merges.len());
        for merge in &self.json.model.merges {
            let pair = merge.pair();
            merges.push(pair.ok_or_else(|| self.bad("a merge that is no pair of tokens"))?);
        }
        let (scores, misplaced) = self.scores(&merges)?;
        if misplaced > 0 {
            report.notices.push(format!(
                "llama.cpp splits words by scores of tokens, which differ from this tokenizer's {} \
                 merges at {misplaced} pairs, so some words may be split in another way",
                merges.len()
            ));
        }
        let byte = |byte: &u8| {
            let token = format!("<0x{byte:02X}>");
            let plain = char::from(*byte).to_string();
            let mut names = vec![token];
            names.extend(byte.is_ascii().then_some(plain));
            names
                .iter()
                .any(|name| self.ids.contains_key(name.as_str()))
        };
        let missing = (0..=u8::MAX).filter(|value| !byte(value)).count();
        if missing > 0 {
            report.notices.push(format!(
                "the vocabulary has no token for {missing} of the 256 bytes, and llama.cpp ends the \
                 process at a character that has no token"
            ));
        }
        keys.text("tokenizer.ggml.model", "llama");
        keys.text("tokenizer.ggml.pre", "default");
        keys.f32s("tokenizer.ggml.scores", &scores);
        keys.flag("tokenizer.ggml.add_space_prefix", prefix);
        Ok(())
    }

    /// Scores of the tokens, which give the merges their order, and the number of pairs for which
    /// they do not: merges between those of another product, and pairs that are no merge although
    /// their product is a token.
    fn scores(&self, merges: &[(&str, &str)]) -> Result<(Vec<f32>, usize)> {
        // Places of the first and the last merge of each product.
        let mut places: HashMap<String, (usize, usize)> = HashMap::new();
        for (place, (left, right)) in merges.iter().enumerate() {
            let product = format!("{left}{right}");
            places.entry(product).or_insert((place, place)).1 = place;
        }
        // SentencePiece gives runs of spaces one score, so that their merges are mixed.
        let mut spans: Vec<(usize, usize)> = places.values().copied().collect();
        spans.sort_unstable();
        let mut together: Vec<(usize, usize)> = Vec::new();
        for (start, end) in spans {
            match together.last_mut() {
                Some(last) if start <= last.1 => last.1 = last.1.max(end),
                _ => together.push((start, end)),
            }
        }
        let mixed = |place: usize| together.partition_point(|span| span.0 <= place) - 1;
        let texts: Vec<&str> = self.tokens.iter().map(String::as_str).collect();
        let kinds: Vec<i128> = self.kinds.iter().map(|kind| i128::from(*kind)).collect();
        let tokens = Tokens::new(texts, kinds)
            .map_err(|(a, b, text)| self.bad(format!("tokens {a} and {b} are both {text:?}")))?;
        let rebuilt = |scores: &[f32]| {
            let long = |id| self.bad(format!("token {id} is too long"));
            tokens.merges(scores).map_err(long)
        };
        let by = |rank: &dyn Fn(usize) -> usize| -> Vec<f32> {
            let rank = |token: &String| places.get(token).map(|(first, _)| rank(*first));
            let scores = self.tokens.iter().zip(&self.kinds).map(|(token, kind)| {
                let normal = *kind == i32_of(NORMAL);
                // Tokens that no merge makes come after all others.
                let rank = rank(token).unwrap_or(merges.len());
                if normal { -(rank as f32) } else { 0.0 }
            });
            scores.collect()
        };
        let scores = by(&mixed);
        if rebuilt(&scores)? == merges {
            return Ok((scores, 0));
        }
        let scores = by(&|place| place);
        let found = rebuilt(&scores)?;
        let known: HashSet<&(&str, &str)> = merges.iter().collect();
        let surplus = found.iter().filter(|pair| !known.contains(pair)).count();
        let mut last = None;
        let mut apart = 0;
        for (place, (left, right)) in merges.iter().enumerate() {
            let first = places.get(&format!("{left}{right}")).map(|places| places.0);
            apart += usize::from(first != Some(place) && first != last);
            last = first;
        }
        Ok((scores, surplus + apart))
    }

    /// Writes the ids of the special tokens, and which are put around a text.
    fn special_tokens(&self, source: &dyn ModelSource, keys: &mut Keys) -> Result<()> {
        let id_key = |name: &str| format!("tokenizer.ggml.{name}");
        // A token is its text, or an object that holds the text.
        let named = |name: &str| {
            let token = self.texts.config.get(name)?;
            let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
            self.ids.get(text).copied()
        };
        let exists = |id: &u32| (*id as usize) < self.tokens.len();
        let config = source.config();
        let (before, after) = self.around()?;
        let bos = before
            .or(named("bos_token"))
            .or(config.bos_token_id())
            .filter(exists);
        let mut ends: Vec<u32> = Vec::new();
        let all = [after, named("eos_token")].into_iter().flatten();
        for id in all.chain(config.eos_token_ids().iter().copied()) {
            if exists(&id) && !ends.contains(&id) {
                ends.push(id);
            }
        }
        let ids = [
            ("bos_token_id", bos),
            ("eos_token_id", ends.first().copied()),
            ("eot_token_id", ends.get(1).copied()),
            ("eom_token_id", ends.get(2).copied()),
            (
                "unknown_token_id",
                named("unk_token").or_else(|| {
                    let unknown = self.json.model.unk_token.as_deref()?;
                    self.ids.get(unknown).copied()
                }),
            ),
            (
                "padding_token_id",
                named("pad_token").or(config.pad_token_id()),
            ),
        ];
        for (name, id) in ids {
            if let Some(id) = id.filter(exists) {
                keys.u32(id_key(name), id);
            }
        }
        let asked = |name: &str| self.texts.config.get(name).and_then(Value::as_bool);
        let has_processor = !steps(&self.json.post_processor)
            .iter()
            .all(|step| kind_of(step) == "ByteLevel");
        // The post-processor decides; its absence leaves the decision to the config.
        let add = |found: bool, name: &str| found || !has_processor && asked(name).unwrap_or(false);
        keys.flag(
            id_key("add_bos_token"),
            bos.is_some() && add(before.is_some(), "add_bos_token"),
        );
        keys.flag(
            id_key("add_eos_token"),
            !ends.is_empty() && add(after.is_some(), "add_eos_token"),
        );
        Ok(())
    }

    /// The tokens that the post-processor puts before and after a text.
    fn around(&self) -> Result<(Option<u32>, Option<u32>)> {
        let (mut before, mut after) = (None, None);
        for step in steps(&self.json.post_processor) {
            match kind_of(step) {
                "ByteLevel" => {}
                "TemplateProcessing" => {
                    let single = step.get("single").and_then(Value::as_array);
                    let mut text_seen = false;
                    for item in single.into_iter().flatten() {
                        let Some(token) = item.get("SpecialToken") else {
                            text_seen = true;
                            continue;
                        };
                        let name = token.get("id").and_then(Value::as_str).unwrap_or_default();
                        let declared = step.get("special_tokens").and_then(|all| all.get(name));
                        let ids = declared.and_then(|token| token.get("ids")?.as_array());
                        let id = match ids.map(Vec::as_slice) {
                            Some([id]) => id.as_u64().and_then(|id| u32::try_from(id).ok()),
                            _ => None,
                        };
                        let side = if text_seen { &mut after } else { &mut before };
                        if id.is_none() || side.is_some() {
                            let what = "a post-processor that adds more than one token on a side";
                            return Err(self.unsupported(what));
                        }
                        *side = id;
                    }
                }
                other => {
                    return Err(self.unsupported(format!("a post-processor of type `{other}`")));
                }
            }
        }
        Ok((before, after))
    }

    /// Writes the chat template, or all of them if there are several.
    fn chat_templates(&self, keys: &mut Keys) -> Result<()> {
        let key = "tokenizer.chat_template";
        if let Some(template) = &self.texts.template {
            keys.text(key, template);
            return Ok(());
        }
        match self.texts.config.get("chat_template") {
            None | Some(Value::Null) => {}
            Some(Value::String(template)) => keys.text(key, template),
            Some(Value::Array(all)) => {
                let mut names = Vec::new();
                for item in all {
                    let field = |name: &str| item.get(name).and_then(Value::as_str);
                    let (Some(name), Some(template)) = (field("name"), field("template")) else {
                        return Err(self.bad("`chat_template`: an entry without name or template"));
                    };
                    if name == "default" {
                        keys.text(key, template);
                    } else {
                        keys.text(format!("{key}.{name}"), template);
                        names.push(name);
                    }
                }
                keys.texts("tokenizer.chat_templates", &names);
            }
            Some(_) => return Err(self.bad("`chat_template` is neither a text nor a list")),
        }
        Ok(())
    }
}

fn i32_of(kind: i128) -> i32 {
    kind as i32
}

/// Compares patterns, whose contractions have two spellings.
fn same_pattern(known: &str, found: &str) -> bool {
    const SHORT: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
    const LONG: &str = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])";
    known == found || known == found.replace(LONG, SHORT)
}
