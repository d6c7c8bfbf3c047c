//! The tokenizer, as the two files that describe it in a Hugging Face folder.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::Gguf;
use super::container::Value as Item;
use crate::error::{Error, Result};

/// Values of `tokenizer.ggml.token_type`.
pub(super) const NORMAL: i128 = 1;
pub(super) const UNKNOWN: i128 = 2;
pub(super) const CONTROL: i128 = 3;
pub(super) const USER_DEFINED: i128 = 4;
pub(super) const UNUSED: i128 = 5;
pub(super) const BYTE: i128 = 6;

/// Longest SentencePiece token in bytes. Limits the work of finding its merges.
const MAX_PIECE_BYTES: usize = 512;

/// The text of `tokenizer.json` and the fields of `tokenizer_config.json`.
pub(crate) struct TokenizerFiles {
    pub json: String,
    pub config: Map<String, Value>,
}

/// Pre-tokenization of a byte-level tokenizer.
pub(super) struct Cut {
    /// Values of `tokenizer.ggml.pre`; the first one is written.
    pub names: &'static [&'static str],
    /// Pattern of the pieces, or `None` for that of GPT-2.
    pub pattern: Option<&'static str>,
    /// Whether every digit is a piece of its own.
    pub digits: bool,
    /// Whether a piece that is a token is not split.
    pub ignore_merges: bool,
    /// Default of `tokenizer.ggml.add_bos_token`.
    add_bos: bool,
}

const GPT2: Cut = Cut {
    names: &["gpt-2", "phi-2", "olmo", "mpt"],
    pattern: None,
    digits: false,
    ignore_merges: false,
    add_bos: false,
};

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

pub(super) const CUTS: [Cut; 7] = [
    GPT2,
    Cut {
        names: &["llama-bpe", "llama3", "llama-v3"],
        pattern: Some(LLAMA3),
        ignore_merges: true,
        add_bos: true,
        ..GPT2
    },
    Cut {
        names: &["dbrx", "smaug-bpe"],
        pattern: Some(LLAMA3),
        ..GPT2
    },
    Cut {
        names: &["qwen2", "deepseek-r1-qwen"],
        pattern: Some(QWEN2),
        ..GPT2
    },
    Cut {
        names: &["smollm", "starcoder", "refact"],
        digits: true,
        ..GPT2
    },
    Cut {
        names: &["gpt-4o"],
        pattern: Some(GPT4O),
        ..GPT2
    },
    Cut {
        names: &["tekken"],
        pattern: Some(TEKKEN),
        ignore_merges: true,
        add_bos: true,
        ..GPT2
    },
];

/// The content of `tokenizer.json`.
#[derive(Serialize)]
struct Tokenizer<'a> {
    version: &'static str,
    truncation: Value,
    padding: Value,
    added_tokens: Vec<AddedToken<'a>>,
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: Bpe<'a>,
}

#[derive(Serialize)]
struct AddedToken<'a> {
    id: usize,
    content: &'a str,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

#[derive(Serialize)]
struct Bpe<'a> {
    r#type: &'static str,
    dropout: Value,
    unk_token: Option<&'a str>,
    continuing_subword_prefix: Value,
    end_of_word_suffix: Value,
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    #[serde(serialize_with = "as_map")]
    vocab: BTreeMap<&'a str, usize>,
    merges: Vec<(&'a str, &'a str)>,
}

fn as_map<S: Serializer>(vocab: &BTreeMap<&str, usize>, to: S) -> Result<S::Ok, S::Error> {
    to.collect_map(vocab)
}

/// The parts of `tokenizer.json` that depend on the kind of tokenizer.
struct Surroundings<'a> {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Bpe<'a>,
    add_bos: bool,
}

/// The vocabulary.
pub(super) struct Tokens<'a> {
    pub texts: Vec<&'a str>,
    pub kinds: Vec<i128>,
    pub numbers: BTreeMap<&'a str, usize>,
}

impl<'a> Tokens<'a> {
    /// Numbers the tokens. Returns the numbers and the text of two equal ones as an error, unless
    /// one is unused.
    pub fn new(texts: Vec<&'a str>, kinds: Vec<i128>) -> Result<Self, (usize, usize, &'a str)> {
        let mut numbers = BTreeMap::new();
        for (number, (text, kind)) in texts.iter().zip(&kinds).enumerate() {
            // Unused tokens may share a name.
            if *kind == UNUSED && numbers.contains_key(text) {
                continue;
            }
            if let Some(other) = numbers.insert(*text, number)
                && kinds[other] != UNUSED
            {
                return Err((other, number, text));
            }
        }
        Ok(Self {
            texts,
            kinds,
            numbers,
        })
    }

    /// Finds the merges of SentencePiece's BPE, which merges the pair whose product has the best
    /// score. Returns the number of a token that is too long as an error.
    ///
    /// `scores` has a number for each token. Of several merges with the same product, or the same
    /// score, the one with the longer left part comes first, as in transformers.
    pub fn merges(&self, scores: &[f32]) -> Result<Vec<(&'a str, &'a str)>, usize> {
        let number = |text: &str| self.numbers.get(text).copied();
        let is_piece = |id: usize| self.kinds[id] == NORMAL;
        let mut merges = Vec::new();
        for (id, text) in self
            .texts
            .iter()
            .enumerate()
            .filter(|(id, _)| is_piece(*id))
        {
            if text.len() > MAX_PIECE_BYTES {
                return Err(id);
            }
            let mut pairs: Vec<_> = text
                .char_indices()
                .skip(1)
                .filter_map(|(at, _)| {
                    let (left, right) = text.split_at(at);
                    Some((number(left)?, number(right)?, (left, right)))
                })
                .filter(|(left, right, _)| is_piece(*left) && is_piece(*right))
                .collect();
            pairs.sort_unstable();
            merges.extend(pairs.into_iter().map(|(_, _, pair)| (scores[id], pair)));
        }
        let chars = |text: &str| text.chars().count();
        merges.sort_by(|(a, (a_left, a_right)), (b, (b_left, b_right))| {
            let longer = |a: &str, b: &str| chars(b).cmp(&chars(a));
            b.total_cmp(a)
                .then_with(|| longer(a_left, b_left))
                .then_with(|| longer(a_right, b_right))
        });
        Ok(merges.into_iter().map(|(_, pair)| pair).collect())
    }
}

impl Gguf {
    /// Makes the tokenizer files, or returns `None` if the file contains no tokenizer.
    ///
    /// # Errors
    /// Returns [`Error::Unsupported`] if the kind of tokenizer is not implemented, and
    /// [`Error::InvalidFile`] if a key is missing or wrong.
    pub(crate) fn tokenizer(&self) -> Result<Option<TokenizerFiles>> {
        let first = self.first();
        let whole = first.text("tokenizer.huggingface.json")?;
        let Some(kind) = first.text("tokenizer.ggml.model")? else {
            let config = Map::new();
            return Ok(whole.map(|json| TokenizerFiles {
                json: json.into(),
                config,
            }));
        };
        // Files without a tokenizer say so.
        if whole.is_none() && matches!(kind, "none" | "no_vocab") {
            return Ok(None);
        }
        let config = self.tokenizer_config()?;
        if let Some(json) = whole {
            let json = json.into();
            return Ok(Some(TokenizerFiles { json, config }));
        }
        let tokens = self.tokens()?;
        let around = match kind {
            "gpt2" => self.byte_level(&tokens)?,
            "llama" => self.sentence_pieces(&tokens)?,
            other => {
                let what = format!("key `tokenizer.ggml.model` = `{other}`");
                return Err(self.unsupported(what));
            }
        };
        let special = |(id, kind): (usize, &i128)| {
            matches!(*kind, CONTROL | USER_DEFINED).then(|| AddedToken {
                id,
                content: tokens.texts[id],
                single_word: false,
                lstrip: false,
                rstrip: false,
                normalized: false,
                special: *kind == CONTROL,
            })
        };
        let tokenizer = Tokenizer {
            version: "1.0",
            truncation: Value::Null,
            padding: Value::Null,
            added_tokens: tokens
                .kinds
                .iter()
                .enumerate()
                .filter_map(special)
                .collect(),
            normalizer: around.normalizer,
            pre_tokenizer: around.pre_tokenizer,
            post_processor: self.post_processor(&tokens, around.add_bos)?,
            decoder: around.decoder,
            model: around.model,
        };
        let json = serde_json::to_string(&tokenizer).map_err(|e| Error::json(&first.path, e))?;
        Ok(Some(TokenizerFiles { json, config }))
    }

    fn tokens(&self) -> Result<Tokens<'_>> {
        let first = self.first();
        let key = "tokenizer.ggml.tokens";
        let texts = first
            .texts(key)?
            .ok_or_else(|| first.bad_key(key, "missing"))?;
        let key = "tokenizer.ggml.token_type";
        let kinds: Vec<i128> = match first.items(key)? {
            None => vec![NORMAL; texts.len()],
            Some(items) => items
                .map(|item| if let Item::Int(kind) = item { kind } else { 0 })
                .collect(),
        };
        if kinds.len() != texts.len() || kinds.iter().any(|kind| !(1..=6).contains(kind)) {
            return Err(first.bad_key(key, "not a number of 1 to 6 for each token"));
        }
        Tokens::new(texts, kinds).map_err(|(other, number, text)| {
            let reason = format!("tokens {other} and {number} are both {text:?}");
            first.bad_key("tokenizer.ggml.tokens", reason)
        })
    }

    /// Byte-level BPE, as in GPT-2.
    fn byte_level<'a>(&'a self, tokens: &Tokens<'a>) -> Result<Surroundings<'a>> {
        let first = self.first();
        let key = "tokenizer.ggml.pre";
        let Some(pre) = first.text(key)? else {
            return Err(first.bad_key(key, "missing: there are several for this kind of tokenizer"));
        };
        let Some(cut) = CUTS.iter().find(|cut| cut.names.contains(&pre)) else {
            return Err(self.unsupported(format!("key `{key}` = `{pre}`")));
        };
        let key = "tokenizer.ggml.merges";
        let lines = first
            .texts(key)?
            .ok_or_else(|| first.bad_key(key, "missing"))?;
        let mut merges = Vec::with_capacity(lines.len());
        for line in lines {
            // A token may begin with a space, but not contain one.
            let at = line.char_indices().skip(1).find(|(_, c)| *c == ' ');
            let Some(at) = at.map(|(at, _)| at) else {
                return Err(first.bad_key(key, format!("{line:?} is no pair")));
            };
            merges.push((&line[..at], &line[at + 1..]));
        }
        let byte_level = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
            "use_regex": cut.pattern.is_none(),
        });
        let mut steps = Vec::new();
        if cut.digits {
            steps.push(json!({ "type": "Digits", "individual_digits": true }));
        }
        if let Some(pattern) = cut.pattern {
            steps.push(json!({
                "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false,
            }));
        }
        steps.push(byte_level.clone());
        Ok(Surroundings {
            // Like llama.cpp, no normalization, even if the original tokenizer has one (NFC).
            normalizer: Value::Null,
            pre_tokenizer: json!({ "type": "Sequence", "pretokenizers": steps }),
            decoder: byte_level,
            model: Bpe {
                r#type: "BPE",
                dropout: Value::Null,
                unk_token: None,
                continuing_subword_prefix: Value::Null,
                end_of_word_suffix: Value::Null,
                fuse_unk: false,
                byte_fallback: false,
                ignore_merges: cut.ignore_merges,
                vocab: tokens.numbers.clone(),
                merges,
            },
            add_bos: cut.add_bos,
        })
    }

    /// BPE as in SentencePiece. Pairs are merged in the order of the scores of their products.
    fn sentence_pieces<'a>(&'a self, tokens: &Tokens<'a>) -> Result<Surroundings<'a>> {
        let first = self.first();
        let key = "tokenizer.ggml.scores";
        let items = first
            .items(key)?
            .ok_or_else(|| first.bad_key(key, "missing"))?;
        let scores: Vec<f32> = items
            .map(|item| {
                if let Item::F32(score) = item {
                    score
                } else {
                    f32::NAN
                }
            })
            .collect();
        if scores.len() != tokens.texts.len() || scores.iter().any(|score| score.is_nan()) {
            return Err(first.bad_key(key, "not a number for each token"));
        }
        let merges = tokens.merges(&scores).map_err(|id| {
            let reason = format!("token {id}: more than {MAX_PIECE_BYTES} bytes");
            first.bad_key("tokenizer.ggml.tokens", reason)
        })?;
        let prefix = first
            .flag("tokenizer.ggml.add_space_prefix")?
            .unwrap_or(true);
        let space = json!({ "String": " " });
        let mut normalizers = vec![json!({ "type": "Replace", "pattern": space, "content": "▁" })];
        let mut decoders = vec![
            json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
            json!({ "type": "ByteFallback" }),
            json!({ "type": "Fuse" }),
        ];
        if prefix {
            normalizers.insert(0, json!({ "type": "Prepend", "prepend": "▁" }));
            decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
        }
        let unknown = self.token_id("unknown_token_id")?.unwrap_or(0) as usize;
        Ok(Surroundings {
            normalizer: json!({ "type": "Sequence", "normalizers": normalizers }),
            pre_tokenizer: Value::Null,
            decoder: json!({ "type": "Sequence", "decoders": decoders }),
            model: Bpe {
                r#type: "BPE",
                dropout: Value::Null,
                unk_token: tokens.texts.get(unknown).copied(),
                continuing_subword_prefix: Value::Null,
                end_of_word_suffix: Value::Null,
                fuse_unk: true,
                byte_fallback: tokens.kinds.contains(&BYTE),
                ignore_merges: false,
                vocab: tokens.numbers.clone(),
                merges,
            },
            add_bos: true,
        })
    }

    /// Makes the post-processor, which adds tokens before and after a text.
    fn post_processor(&self, tokens: &Tokens<'_>, add_bos: bool) -> Result<Value> {
        let first = self.first();
        let add = |key: &str, absent: bool, id_key: &str| {
            let asked = first.flag(&format!("tokenizer.ggml.{key}"))?;
            let Some(id) = self.token_id(id_key)?.filter(|_| asked.unwrap_or(absent)) else {
                return match asked {
                    Some(true) => {
                        let reason = format!("true, but there is no `{id_key}`");
                        Err(first.bad_key(&format!("tokenizer.ggml.{key}"), reason))
                    }
                    _ => Ok(None),
                };
            };
            match tokens.texts.get(id as usize) {
                Some(text) => Ok(Some((id, *text))),
                None => {
                    let reason = format!("{id}, there are {} tokens", tokens.texts.len());
                    Err(first.bad_key(&format!("tokenizer.ggml.{id_key}"), reason))
                }
            }
        };
        let bos = add("add_bos_token", add_bos, "bos_token_id")?;
        let eos = add("add_eos_token", false, "eos_token_id")?;
        if bos.is_none() && eos.is_none() {
            return Ok(Value::Null);
        }
        let around = |sequence: &str, type_id: u8| {
            let special = |token: Option<(u32, &str)>| {
                token.map(|(_, text)| json!({ "SpecialToken": { "id": text, "type_id": type_id } }))
            };
            let middle = json!({ "Sequence": { "id": sequence, "type_id": type_id } });
            let all = [special(bos), Some(middle), special(eos)];
            all.into_iter().flatten().collect::<Vec<Value>>()
        };
        let special: Map<String, Value> = [bos, eos]
            .into_iter()
            .flatten()
            .map(|(id, text)| {
                (
                    text.into(),
                    json!({ "id": text, "ids": [id], "tokens": [text] }),
                )
            })
            .collect();
        let single = around("A", 0);
        let pair = [single.clone(), around("B", 1)].concat();
        Ok(json!({
            "type": "TemplateProcessing", "single": single, "pair": pair,
            "special_tokens": special,
        }))
    }

    /// Makes `tokenizer_config.json`, with the special tokens and the chat template.
    fn tokenizer_config(&self) -> Result<Map<String, Value>> {
        let first = self.first();
        let texts = first.texts("tokenizer.ggml.tokens")?.unwrap_or_default();
        let mut config = Map::new();
        config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        let names = [
            ("bos_token", "bos_token_id"),
            ("eos_token", "eos_token_id"),
            ("unk_token", "unknown_token_id"),
            ("pad_token", "padding_token_id"),
        ];
        for (name, key) in names {
            if let Some(text) = self.token_id(key)?.and_then(|id| texts.get(id as usize)) {
                config.insert(name.into(), (*text).into());
            }
        }
        for name in ["add_bos_token", "add_eos_token"] {
            if let Some(flag) = first.flag(&format!("tokenizer.ggml.{name}"))? {
                config.insert(name.into(), flag.into());
            }
        }
        config.insert("clean_up_tokenization_spaces".into(), false.into());
        if let Some(template) = self.chat_template()? {
            config.insert("chat_template".into(), template.into());
        }
        Ok(config)
    }
}
