//! The content of `tokenizer.json`, and the parts of it that several formats share.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

/// Kinds of tokens, with the numbers that SentencePiece and GGUF use.
pub(in crate::io) const NORMAL: i128 = 1;
pub(in crate::io) const UNKNOWN: i128 = 2;
pub(in crate::io) const CONTROL: i128 = 3;
pub(in crate::io) const USER_DEFINED: i128 = 4;
pub(in crate::io) const UNUSED: i128 = 5;
pub(in crate::io) const BYTE: i128 = 6;

/// Longest SentencePiece token in bytes. Limits the work of finding its merges.
pub(in crate::io) const MAX_PIECE_BYTES: usize = 512;

/// Replaces a space in SentencePiece's tokens.
pub(in crate::io) const SPACE: &str = "▁";

/// The content of `tokenizer.json`.
#[derive(Serialize)]
pub(in crate::io) struct Tokenizer<'a, M> {
    pub version: &'static str,
    pub truncation: Value,
    pub padding: Value,
    pub added_tokens: Vec<AddedToken<'a>>,
    pub normalizer: Value,
    pub pre_tokenizer: Value,
    pub post_processor: Value,
    pub decoder: Value,
    pub model: M,
}

impl<'a, M> Tokenizer<'a, M> {
    pub fn new(
        added_tokens: Vec<AddedToken<'a>>,
        around: Surroundings,
        post_processor: Value,
        model: M,
    ) -> Self {
        Self {
            version: "1.0",
            truncation: Value::Null,
            padding: Value::Null,
            added_tokens,
            normalizer: around.normalizer,
            pre_tokenizer: around.pre_tokenizer,
            post_processor,
            decoder: around.decoder,
            model,
        }
    }
}

/// A token that is found in a text before the model sees it.
#[derive(Serialize)]
pub(in crate::io) struct AddedToken<'a> {
    pub id: usize,
    pub content: &'a str,
    pub single_word: bool,
    pub lstrip: bool,
    pub rstrip: bool,
    pub normalized: bool,
    pub special: bool,
}

impl<'a> AddedToken<'a> {
    /// A token that is found as it is written.
    pub fn new(id: usize, content: &'a str, special: bool) -> Self {
        Self {
            id,
            content,
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: false,
            special,
        }
    }
}

#[derive(Serialize)]
pub(in crate::io) struct Bpe<'a> {
    pub r#type: &'static str,
    pub dropout: Value,
    pub unk_token: Option<&'a str>,
    pub continuing_subword_prefix: Value,
    pub end_of_word_suffix: Value,
    pub fuse_unk: bool,
    pub byte_fallback: bool,
    pub ignore_merges: bool,
    #[serde(serialize_with = "as_map")]
    pub vocab: BTreeMap<&'a str, usize>,
    pub merges: Vec<(&'a str, &'a str)>,
}

impl<'a> Bpe<'a> {
    pub fn new(vocab: BTreeMap<&'a str, usize>, merges: Vec<(&'a str, &'a str)>) -> Self {
        Self {
            r#type: "BPE",
            dropout: Value::Null,
            unk_token: None,
            continuing_subword_prefix: Value::Null,
            end_of_word_suffix: Value::Null,
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: false,
            vocab,
            merges,
        }
    }
}

fn as_map<S: Serializer>(vocab: &BTreeMap<&str, usize>, to: S) -> Result<S::Ok, S::Error> {
    to.collect_map(vocab)
}

#[derive(Serialize)]
pub(in crate::io) struct Unigram<'a> {
    pub r#type: &'static str,
    pub unk_id: usize,
    pub vocab: Vec<(&'a str, f64)>,
    pub byte_fallback: bool,
}

/// What is done to a text before the model sees it, and after decoding.
pub(in crate::io) struct Surroundings {
    pub normalizer: Value,
    pub pre_tokenizer: Value,
    pub decoder: Value,
}

/// The vocabulary.
pub(in crate::io) struct Tokens<'a> {
    pub texts: Vec<&'a str>,
    pub kinds: Vec<i128>,
    pub numbers: BTreeMap<&'a str, usize>,
}

impl<'a> Tokens<'a> {
    /// Numbers the tokens. Returns the numbers and the text of two equal ones as an error, unless one
    /// is unused.
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

/// Where SentencePiece's dummy prefix, a space before the text, is put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::io) enum Prefix {
    Nowhere,
    /// Before the text, unless it begins with an added token.
    Text,
    /// Before the text and after each added token.
    Pieces,
}

/// What SentencePiece does to a text.
pub(in crate::io) struct PieceRules<'a> {
    pub prefix: Prefix,
    /// The normalizer's table in base 64, or an empty text.
    pub charsmap: &'a str,
    /// Whether spaces at both ends are removed and several are replaced by one.
    pub trim: bool,
    /// Tokens that are found before the model sees the text, but after spaces are replaced.
    pub user_defined: Vec<&'a str>,
}

impl PieceRules<'_> {
    pub fn surroundings(&self) -> Surroundings {
        let replace = |pattern: Value, content: &str| json!({ "type": "Replace", "pattern": pattern, "content": content });
        let text = |text: &str| json!({ "String": text });
        let regex = |pattern: &str| json!({ "Regex": pattern });
        let mut normalizers = Vec::new();
        if !self.charsmap.is_empty() {
            normalizers
                .push(json!({ "type": "Precompiled", "precompiled_charsmap": self.charsmap }));
        }
        if self.trim {
            let ends = match self.prefix {
                Prefix::Nowhere => r"\A +|[ ▁]+\z",
                // A space before the text stands for the prefix.
                _ => r"[ ▁]+\z",
            };
            normalizers.push(replace(regex(ends), ""));
            normalizers.push(replace(regex(" {2,}"), " "));
        }
        let mut steps = Vec::new();
        // A `Metaspace` puts its character before a text that does not begin with it. The prefix is
        // a space at first, because a text may begin with the character that replaces spaces.
        // Without `trim`, a text may also begin with a space, so those are replaced before.
        if self.prefix == Prefix::Nowhere || !self.trim {
            normalizers.push(replace(text(" "), SPACE));
        }
        let metaspace = |replacement: &str, scheme: &str| {
            json!({
                "type": "Metaspace", "replacement": replacement, "prepend_scheme": scheme,
                "split": false,
            })
        };
        let scheme = match self.prefix {
            Prefix::Nowhere => None,
            Prefix::Text => Some("first"),
            Prefix::Pieces => Some("always"),
        };
        if let Some(scheme) = scheme {
            steps.extend([metaspace(" ", scheme), metaspace(SPACE, "never")]);
        }
        if !self.user_defined.is_empty() {
            let mut all = self.user_defined.clone();
            all.sort_by_key(|text| std::cmp::Reverse(text.len()));
            let all: Vec<String> = all.into_iter().map(regex::escape).collect();
            steps.push(json!({
                "type": "Split", "pattern": regex(&all.join("|")), "behavior": "Isolated",
                "invert": false,
            }));
        }
        let mut decoders = vec![
            replace(text(SPACE), " "),
            json!({ "type": "ByteFallback" }),
            json!({ "type": "Fuse" }),
        ];
        // SentencePiece removes all spaces before a text if it does so in encoding.
        let n_spaces = match self.prefix {
            _ if self.trim => u32::MAX,
            Prefix::Nowhere => 0,
            _ => 1,
        };
        if n_spaces > 0 {
            decoders.push(json!({ "type": "Strip", "content": " ", "start": n_spaces, "stop": 0 }));
        }
        Surroundings {
            normalizer: json!({ "type": "Sequence", "normalizers": normalizers }),
            pre_tokenizer: if steps.is_empty() {
                Value::Null
            } else {
                json!({ "type": "Sequence", "pretokenizers": steps })
            },
            decoder: json!({ "type": "Sequence", "decoders": decoders }),
        }
    }
}

/// Makes the post-processor that puts tokens, each an id and a text, before and after a text.
pub(in crate::io) fn post_processor(
    bos: Option<(usize, &str)>,
    eos: Option<(usize, &str)>,
) -> Value {
    if bos.is_none() && eos.is_none() {
        return Value::Null;
    }
    let around = |sequence: &str, type_id: u8| {
        let special = |token: Option<(usize, &str)>| {
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
    json!({
        "type": "TemplateProcessing", "single": single, "pair": pair,
        "special_tokens": special,
    })
}
