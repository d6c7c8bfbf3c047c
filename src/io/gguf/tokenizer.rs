//! The tokenizer, as the two files that describe it in a Hugging Face folder.

use serde_json::{Map, Value, json};

use super::Gguf;
use super::container::Value as Item;
use crate::error::{Error, Result};
use crate::io::tokenizer::TokenizerFiles;
use crate::io::tokenizer::json::{
    AddedToken, BYTE, Bpe, CONTROL, MAX_PIECE_BYTES, NORMAL, PieceRules, Prefix, Surroundings,
    Tokenizer, Tokens, UNKNOWN, USER_DEFINED, post_processor,
};

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

/// The parts of `tokenizer.json` that depend on the kind of tokenizer.
struct Kind<'a> {
    around: Surroundings,
    model: Bpe<'a>,
    add_bos: bool,
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
                notices: Vec::new(),
                path: first.path.clone(),
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
            let (path, json) = (first.path.clone(), json.into());
            return Ok(Some(TokenizerFiles {
                path,
                json,
                config,
                notices: Vec::new(),
            }));
        }
        let tokens = self.tokens()?;
        let kind = match kind {
            "gpt2" => self.byte_level(&tokens)?,
            "llama" => self.sentence_pieces(&tokens)?,
            other => {
                let what = format!("key `tokenizer.ggml.model` = `{other}`");
                return Err(self.unsupported(what));
            }
        };
        let kinds = tokens.kinds.iter().enumerate();
        let added = kinds
            .filter(|(_, kind)| matches!(**kind, UNKNOWN | CONTROL | USER_DEFINED))
            .map(|(id, kind)| AddedToken::new(id, tokens.texts[id], *kind != USER_DEFINED));
        let tokenizer = Tokenizer::new(
            added.collect(),
            kind.around,
            self.post_processor(&tokens, kind.add_bos)?,
            kind.model,
        );
        let json = serde_json::to_string(&tokenizer).map_err(|e| Error::json(&first.path, e))?;
        let path = first.path.clone();
        Ok(Some(TokenizerFiles {
            path,
            json,
            config,
            notices: Vec::new(),
        }))
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
        Tokens::new(texts, kinds).map_err(|(one, other, text)| {
            let reason = format!("tokens {one} and {other} are both {text:?}");
            first.bad_key("tokenizer.ggml.tokens", reason)
        })
    }

    /// Byte-level BPE, as in GPT-2.
    fn byte_level<'a>(&'a self, tokens: &Tokens<'a>) -> Result<Kind<'a>> {
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
        Ok(Kind {
            around: Surroundings {
                // Like llama.cpp, no normalization, even if the original tokenizer has one (NFC).
                normalizer: Value::Null,
                pre_tokenizer: json!({ "type": "Sequence", "pretokenizers": steps }),
                decoder: byte_level,
            },
            model: Bpe {
                ignore_merges: cut.ignore_merges,
                ..Bpe::new(tokens.numbers.clone(), merges)
            },
            add_bos: cut.add_bos,
        })
    }

    /// BPE as in SentencePiece. Pairs are merged in the order of the scores of their products.
    fn sentence_pieces<'a>(&'a self, tokens: &Tokens<'a>) -> Result<Kind<'a>> {
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
        let rules = PieceRules {
            prefix: if prefix {
                Prefix::Pieces
            } else {
                Prefix::Nowhere
            },
            charsmap: "",
            trim: false,
            // These are added tokens, as in llama.cpp.
            user_defined: Vec::new(),
        };
        let unknown = self.token_id("unknown_token_id")?.unwrap_or(0) as usize;
        Ok(Kind {
            around: rules.surroundings(),
            model: Bpe {
                unk_token: tokens.texts.get(unknown).copied(),
                fuse_unk: true,
                byte_fallback: tokens.kinds.contains(&BYTE),
                ..Bpe::new(tokens.numbers.clone(), merges)
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
                Some(text) => Ok(Some((id as usize, *text))),
                None => {
                    let reason = format!("{id}, there are {} tokens", tokens.texts.len());
                    Err(first.bad_key(&format!("tokenizer.ggml.{id_key}"), reason))
                }
            }
        };
        let bos = add("add_bos_token", add_bos, "bos_token_id")?;
        let eos = add("add_eos_token", false, "eos_token_id")?;
        Ok(post_processor(bos, eos))
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
