use std::fs;
use std::path::{Path, PathBuf};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::TextTokenizer;
use crate::error::Error;
use crate::io::testing::{pick, shared};
use crate::io::tokenizer::TokenizerFiles;

/// Models that SentencePiece trained; `make.py` in the folder made them.
fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sentencepiece")
}

const MODELS: [&str; 5] = ["bpe", "bpe_rules", "bpe_bare", "unigram", "unigram_rules"];

#[test]
fn texts_get_the_tokens_that_sentencepiece_gives() {
    let cases: Value =
        serde_json::from_slice(&fs::read(fixtures().join("cases.json")).unwrap()).unwrap();
    for name in MODELS {
        let tokenizer = TextTokenizer::from_file(fixtures().join(format!("{name}.model"))).unwrap();
        // SentencePiece writes the unknown token as " ⁇ ".
        let unknown = tokenizer.token_to_id("<unk>").unwrap();
        for case in cases[name].as_array().unwrap() {
            let text = case[0].as_str().unwrap();
            let ids: Vec<u32> = serde_json::from_value(case[1].clone()).unwrap();
            assert_eq!(
                tokenizer.encode(text, false).unwrap(),
                ids,
                "{name} {text:?}"
            );
            if !ids.contains(&unknown) {
                assert_eq!(tokenizer.decode(&ids).unwrap(), case[2], "{name} {text:?}");
            }
        }
        assert_eq!(tokenizer.prefix(), [1]);
        assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(1), Some(2)));
    }
}

#[test]
fn llama_2_is_llama_cpps() {
    let Some(folder) = shared("models/tokenizers") else {
        return;
    };
    let tokenizer = TextTokenizer::from_file(folder.join("llama2.model")).unwrap();
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
    let (inputs, outputs) = (
        read("ggml-vocab-llama-spm.gguf.inp"),
        read("ggml-vocab-llama-spm.gguf.out"),
    );
    let inputs = inputs.split("\n__ggml_vocab_test__\n");
    let mut compared = 0;
    for (input, output) in inputs.zip(outputs.lines()) {
        let ids = output.split_whitespace().map(|id| id.parse().unwrap());
        let expected: Vec<u32> = ids.collect();
        assert_eq!(
            tokenizer.encode(input, false).unwrap(),
            expected,
            "{input:?}"
        );
        compared += 1;
    }
    assert!(compared > 30);
}

/// Copies a model into a folder, with these files next to it.
fn folder(model: &str, files: &[(&str, Value)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let from = fixtures().join(format!("{model}.model"));
    fs::copy(from, folder.path().join("tokenizer.model")).unwrap();
    for (name, value) in files {
        fs::write(folder.path().join(name), value.to_string()).unwrap();
    }
    folder
}

fn open(model: &str, files: &[(&str, Value)]) -> Result<TextTokenizer, Error> {
    TextTokenizer::from_dir(folder(model, files).path())
}

#[test]
fn the_files_next_to_a_model_add_tokens() {
    let n = open("bpe", &[]).unwrap().vocab_size() as u32;
    let token = |content: &str, special: bool| json!({"content": content, "special": special});
    let config = json!({
        "add_bos_token": false, "add_eos_token": true, "eos_token": {"content": "<|end|>"},
        "additional_special_tokens": ["<sep>"],
        "added_tokens_decoder": {
            n.to_string(): token("<|end|>", true), "5": token("[five]", false),
        },
    });
    let more = json!({"<|more|>": n + 7});
    let t = open(
        "bpe",
        &[
            ("tokenizer_config.json", config),
            ("added_tokens.json", more),
        ],
    )
    .unwrap();
    assert_eq!((t.bos_id(), t.eos_id()), (Some(1), Some(n)));
    assert_eq!(t.vocab_size() as u32, n + 2);
    assert_eq!(t.token_to_id("<|more|>"), Some(n + 7));
    // Token 5 has another name now.
    assert_eq!(t.token_to_id("[five]"), Some(5));
    assert_eq!(t.encode("[five]", false).unwrap(), [5]);
    let ids = t.encode("fox<|more|>fox<|end|>", true).unwrap();
    let fox = t.encode("fox", false).unwrap();
    assert!(ids.starts_with(&[&fox[..], &[n + 7]].concat()), "{ids:?}");
    assert!(ids.ends_with(&[n, n]), "{ids:?}");
    let sep = t.token_to_id("<sep>").unwrap();
    assert_eq!(t.decode(&[sep, n]).unwrap(), "");
    assert_eq!(t.decode(&[n + 7]).unwrap(), "<|more|>");

    // A unigram model numbers its tokens without gaps.
    let gap = ("added_tokens.json", json!({"<|x|>": n + 100}));
    let error = open("unigram", &[gap]).unwrap_err().to_string();
    assert!(error.contains("\"<|x|>\""), "{error}");
    let n = open("unigram", &[]).unwrap().vocab_size();
    let t = open("unigram", &[("added_tokens.json", json!({"<|x|>": n}))]).unwrap();
    assert_eq!(t.encode("<|x|>", false).unwrap(), [n as u32]);
}

#[test]
fn the_dummy_prefix_follows_the_config() {
    let ids = |config: Value, text: &str| {
        let t = open("bpe", &[("tokenizer_config.json", config)]).unwrap();
        let ids = t.encode(text, false).unwrap();
        ids.iter()
            .map(|id| t.id_to_token(*id).unwrap())
            .collect::<String>()
    };
    assert_eq!(ids(json!({}), "fox</s>fox"), "▁fox</s>fox");
    assert_eq!(ids(json!({"legacy": false}), "</s>fox"), "</s>fox");
    assert_eq!(ids(json!({"legacy": true}), "fox</s>fox"), "▁fox</s>▁fox");
    assert_eq!(ids(json!({"legacy": true}), "fox</s> fox"), "▁fox</s>▁▁fox");
    assert_eq!(
        ids(json!({"add_prefix_space": false}), "fox</s>fox"),
        "fox</s>fox"
    );
}

#[test]
fn tokenizer_json_is_preferred() {
    let folder = folder("bpe", &[]);
    let files = TokenizerFiles::open(folder.path()).unwrap().unwrap();
    assert!(files.path.ends_with("tokenizer.model"));
    fs::write(folder.path().join("tokenizer.json"), &files.json).unwrap();
    let files = TokenizerFiles::open(folder.path()).unwrap().unwrap();
    assert!(files.path.ends_with("tokenizer.json"));
    let empty = tempfile::tempdir().unwrap();
    assert!(TokenizerFiles::open(empty.path()).unwrap().is_none());
}

/// A field of a message, whose value is bytes.
fn field(number: u8, value: &[u8]) -> Vec<u8> {
    assert!(value.len() < 128);
    [&[number << 3 | 2, value.len() as u8], value].concat()
}

/// A field whose value is a number.
fn number(number: u8, value: u8) -> Vec<u8> {
    let key = u16::from(number) << 3;
    vec![key as u8 & 0x7F | 0x80, (key >> 7) as u8, value]
}

fn piece(text: &str, score: f32, kind: u8) -> Vec<u8> {
    let score = [&[0x15], &score.to_le_bytes()[..]].concat();
    field(
        1,
        &[field(1, text.as_bytes()), score, number(3, kind)].concat(),
    )
}

/// A BPE model of these pieces.
fn model(pieces: &[Vec<u8>], trainer: &[Vec<u8>], normalizer: &[Vec<u8>]) -> Vec<u8> {
    let trainer = [&[number(3, 2)], trainer].concat().concat();
    let parts = [field(2, &trainer), field(3, &normalizer.concat())];
    [pieces, &parts].concat().concat()
}

fn opened(bytes: &[u8]) -> Result<TextTokenizer, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.model");
    fs::write(&path, bytes).unwrap();
    TextTokenizer::from_file(&path)
}

#[test]
fn broken_models_are_refused() {
    let pieces = |more: &[Vec<u8>]| {
        let few = [
            piece("<unk>", 0.0, 2),
            piece("<s>", 0.0, 3),
            piece("a", -1.0, 1),
            piece("b", -2.0, 1),
            piece("ab", 0.0, 1),
        ];
        [&few[..], more].concat()
    };
    let t = opened(&model(&pieces(&[]), &[], &[number(3, 0)])).unwrap();
    assert_eq!(t.encode("aba", true).unwrap(), [1, 4, 2]);
    let no_bos = field(
        2,
        &[
            number(3, 2),
            [vec![0xC8, 2], vec![255; 9], vec![1]].concat(),
        ]
        .concat(),
    );
    let t = opened(&[pieces(&[]).concat(), no_bos].concat()).unwrap();
    assert_eq!(t.bos_id(), None);

    let long = "a".repeat(100);
    let all = |more: &[Vec<u8>]| model(&pieces(more), &[], &[]);
    for (bytes, text) in [
        (Vec::new(), "not a SentencePiece model"),
        (b"IQ== 0\nIg== 1\n".to_vec(), "no pieces"),
        (all(&[])[..9].to_vec(), "byte 0: not a field"),
        (all(&[piece("", 0.0, 1)]), "piece 5: 0 bytes"),
        (all(&[piece("c", f32::NAN, 1)]), "piece 5: score NaN"),
        (all(&[piece("c", 0.0, 7)]), "piece 5: type 7"),
        (all(&[piece("a", 0.0, 1)]), "tokens 2 and 5 are both \"a\""),
        (
            all(&[piece("?", 0.0, 2)]),
            "2 of 6 pieces are of type unknown",
        ),
        (
            all(&[field(1, &field(1, &[0xFF]))]),
            "piece 5: field 1 has a wrong type",
        ),
        (all(&[field(1, &[0x0A, 9])]), "piece 5: no field at byte 0"),
        (all(&[number(1, 9)]), "piece 5: not a message"),
        (all(&[piece("abab", 0.0, 5)]), "unused piece 5 (\"abab\")"),
        (
            model(&pieces(&[]), &[number(35, 1)], &[]),
            "no piece <0x00>",
        ),
        (
            model(&pieces(&[]), &[number(3, 3)], &[]),
            "model_type = word",
        ),
        (
            model(&pieces(&[]), &[number(3, 4)], &[]),
            "model_type = char",
        ),
        (
            model(&pieces(&[]), &[number(24, 1)], &[]),
            "treat_whitespace_as_suffix",
        ),
        (
            model(&pieces(&[]), &[], &[number(5, 0)]),
            "escape_whitespaces",
        ),
        (
            model(&pieces(&[]), &[], &[field(2, &[8, 0, 0, 0, 1])]),
            "precompiled_charsmap is cut off",
        ),
        (
            model(&pieces(&[piece("c", 0.0, 5)]), &[number(3, 1)], &[]),
            "unused pieces in a unigram model",
        ),
    ] {
        let error = opened(&bytes).unwrap_err().to_string();
        assert!(error.contains(text), "{error}\nexpected {text}");
        assert!(error.contains("tokenizer.model"), "{error}");
    }
    let many: Vec<u8> = (0..6).flat_map(|_| field(1, long.as_bytes())).collect();
    let long = [&[0x0A, 0xE0, 0x04][..], &many[..608]].concat();
    assert!(opened(&long).is_err());
}

#[test]
fn broken_files_next_to_a_model_are_refused() {
    let config = |value: Value| open("bpe", &[("tokenizer_config.json", value)]);
    for (result, text) in [
        (
            config(json!({"tokenizer_class": "XLMRobertaTokenizer"})),
            "`tokenizer_class` = `XLMRobertaTokenizer`",
        ),
        (config(json!({"add_bos_token": 1})), "add_bos_token"),
        (
            config(json!({"add_bos_token": true, "bos_token": "<none>"})),
            "`tokenizer_config.add_bos_token`",
        ),
        (
            config(json!({"added_tokens_decoder": {"x": {"content": "y"}}})),
            "x: not the number of a token",
        ),
        (
            config(json!({"added_tokens_decoder": {"9": {}}})),
            "token 9 has no content",
        ),
        (
            config(json!({"added_tokens_decoder": {"9": {"content": "<sep>"}}})),
            "are both \"<sep>\"",
        ),
        (
            open("bpe", &[("added_tokens.json", json!({"<sep>": 5000}))]),
            "and 5000 are both \"<sep>\"",
        ),
        (
            open("bpe", &[("added_tokens.json", json!({"x": 1_u64 << 40}))]),
            "1099511627776: not the number of a token",
        ),
    ] {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(text), "{error}\nexpected {text}");
    }
}

#[test]
fn mutated_models_never_panic() {
    let all = MODELS.map(|name| fs::read(fixtures().join(format!("{name}.model"))).unwrap());
    let config = json!({
        "bos_token": "<s>", "add_bos_token": true, "legacy": false, "tokenizer_class": "Llama",
        "added_tokens_decoder": {"9": {"content": "nine", "special": true}},
    })
    .to_string();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.model");
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let rounds = crate::io::testing::rounds(2000);
    let mut n_opened = 0;
    for round in 0..rounds {
        let mut bytes = all[round / 3 % all.len()].clone();
        let mut config = config.clone().into_bytes();
        let target = if round % 4 == 3 {
            &mut config
        } else {
            &mut bytes
        };
        for _ in 0..rng.random_range(1..4) {
            // The specifications stand at the end.
            let near = rng.random_range(0..target.len().min(300));
            let at = match rng.random_bool(0.5) {
                true => target.len() - 1 - near,
                false => rng.random_range(0..target.len()),
            };
            target[at] = match round % 3 {
                0 => rng.random(),
                1 => pick(&mut rng, &[0, 1, 2, 5, 8, 10, 18, 26, 0x7F, 0x80, 0xFF]),
                _ => target[at] ^ (1 << rng.random_range(0..8)),
            };
        }
        if rng.random_bool(0.1) {
            bytes.truncate(rng.random_range(0..=bytes.len()));
        }
        fs::write(&path, &bytes).unwrap();
        fs::write(path.with_file_name("tokenizer_config.json"), &config).unwrap();
        if let Ok(tokenizer) = TextTokenizer::from_file(&path) {
            n_opened += 1;
            let ids = tokenizer.encode("the fox\tﬁ😀 <sep> \u{a0}", true);
            let _ = ids.map(|ids| tokenizer.decode(&ids));
        }
    }
    assert!(n_opened > 0 && n_opened < rounds, "{n_opened} of {rounds}");
}

/// A `tokenizer.json` of single letters, with changes.
fn letters(changes: Value) -> Value {
    let mut vocab = json!({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4});
    if let Some(more) = changes.get("vocab") {
        vocab = more.clone();
    }
    let mut value = json!({"version": "1.0", "added_tokens": [
        {"id": 0, "content": "<unk>", "single_word": false, "lstrip": false, "rstrip": false,
         "normalized": false, "special": true}],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>"}});
    for (key, change) in changes.as_object().unwrap() {
        if key != "vocab" {
            value[key] = change.clone();
        }
    }
    value
}

fn open_files(files: &[(&str, Value)]) -> Result<TextTokenizer, Error> {
    let folder = tempfile::tempdir().unwrap();
    for (name, value) in files {
        fs::write(folder.path().join(name), value.to_string()).unwrap();
    }
    TextTokenizer::from_dir(folder.path())
}

#[test]
fn the_files_next_to_a_tokenizer_json_add_tokens() {
    let json = || ("tokenizer.json", letters(json!({})));
    let token = |content: &str| json!({"content": content, "special": true});
    let config = json!({"eos_token": "<|end|>", "pad_token": "[PAD]", "added_tokens_decoder": {
        "6": token("<|end|>"), "5": token("<|start|>"), "1": token("<s>")}});
    // Where the config lists added tokens, the other files are not read.
    let map = (
        "special_tokens_map.json",
        json!({"bos_token": "<s>", "sep_token": "[SEP]"}),
    );
    let t = open_files(&[json(), ("tokenizer_config.json", config), map.clone()]).unwrap();
    assert_eq!(
        t.encode("<|start|>a<s>[PAD]<|end|>", false).unwrap(),
        [5, 3, 1, 7, 6]
    );
    assert_eq!(
        (t.bos_id(), t.eos_id(), t.vocab_size(), t.n_ids()),
        (None, Some(6), 8, 8)
    );
    assert_eq!(t.decode(&[5, 3, 1, 700, 6]).unwrap(), "a");
    assert!(t.notices().is_empty());
    let added = ("added_tokens.json", json!({"<|x|>": 5}));
    let t = open_files(&[json(), map, added]).unwrap();
    assert_eq!(t.encode("<s>[SEP]<|x|>b", false).unwrap(), [1, 6, 5, 4]);
    assert_eq!((t.bos_id(), t.token_to_id("[SEP]")), (Some(1), Some(6)));
    assert_eq!(t.decode(&[5, 6, 3]).unwrap(), "<|x|> a");

    // Numbers that contradict the file.
    let config = |id: &str, text: &str| {
        let config = json!({"added_tokens_decoder": {id: token(text)}});
        open_files(&[json(), ("tokenizer_config.json", config)])
    };
    let error = config("9", "<|x|>").unwrap_err().to_string();
    assert!(
        error.contains("token 9") && error.contains("<|x|>"),
        "{error}"
    );
    let t = config("3", "<unk>").unwrap();
    assert!(t.notices()[0].contains("<unk>"), "{:?}", t.notices());
}

#[test]
fn post_processors_are_read_without_a_text() {
    let special = |id: &str| json!({"SpecialToken": {"id": id, "type_id": 0}});
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let template = |single: Value| {
        json!({"type": "TemplateProcessing", "single": single, "pair": [text, text], "special_tokens": {
            "<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]},
            "x": {"id": "x", "ids": [4, 2], "tokens": ["b", "</s>"]}}})
    };
    let open = |post: Value| {
        // Without letters of English.
        let vocab = json!({"<unk>": 0, "<s>": 1, "</s>": 2, "я": 3, "ю": 4});
        open_files(&[(
            "tokenizer.json",
            letters(json!({"post_processor": post, "vocab": vocab})),
        )])
    };
    let around = template(json!([special("<s>"), text, special("x")]));
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let roberta = json!({"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1],
        "trim_offsets": true, "add_prefix_space": false});
    for (post, prefix, suffix) in [
        (Value::Null, &[][..], &[][..]),
        (bytes.clone(), &[], &[]),
        (around.clone(), &[1], &[4, 2]),
        (roberta, &[1], &[2]),
        (
            json!({"type": "Sequence", "processors": [bytes, around]}),
            &[1],
            &[4, 2],
        ),
    ] {
        let t = open(post.clone()).unwrap_or_else(|error| panic!("{post}: {error}"));
        assert_eq!((t.prefix(), t.suffix()), (prefix, suffix), "{post}");
    }
    for single in [json!([special("<s>")]), json!([text, text])] {
        let error = open(template(single)).unwrap_err().to_string();
        assert!(error.contains("post-processor"), "{error}");
    }
    // A flag that the file contradicts.
    for (flag, n) in [(true, 0), (false, 1)] {
        let config = json!({"add_bos_token": flag, "bos_token": "<s>"});
        let post = template(json!([special("<s>"), text]));
        let json = ("tokenizer.json", letters(json!({"post_processor": post})));
        let t = open_files(&[json, ("tokenizer_config.json", config)]).unwrap();
        assert_eq!(
            (t.notices().len(), t.prefix()),
            (n, &[1][..]),
            "{:?}",
            t.notices()
        );
    }
}

#[test]
fn texts_cannot_grow_without_limit() {
    let replace = |from: &str, to: String| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let sequence = |all: Vec<Value>| json!({"type": "Sequence", "normalizers": all});
    let steps = |n: usize, len: usize| sequence(vec![replace("a", "a".repeat(len)); n]);
    let regex = json!({"type": "Replace", "pattern": {"Regex": ""}, "content": "b".repeat(40)});
    for (normalizer, is_good) in [
        (steps(1, 1000), true),
        (steps(10, 2), true),
        (steps(4, 40), false),
        (sequence(vec![sequence(vec![regex.clone()]), regex]), false),
        (replace(" ", "▁".into()), true),
    ] {
        let opened = open_files(&[("tokenizer.json", letters(json!({"normalizer": normalizer})))]);
        match opened {
            Ok(_) => assert!(is_good, "{normalizer}"),
            Err(error) => assert!(
                !is_good && error.to_string().contains("times as long"),
                "{error}"
            ),
        }
    }
}

#[test]
fn tables_of_normalizers_are_whole() {
    let at = "\"precompiled_charsmap\":\"";
    let found = MODELS.iter().find_map(|name| {
        let path = fixtures().join(format!("{name}.model"));
        let json = TokenizerFiles::open_file(&path).unwrap().json;
        let (_, rest) = json.split_once(at)?;
        Some(rest.split('"').next()?.to_string())
    });
    let table = &found.expect("a model with a table")[..];
    let opened = |table: &str| {
        let normalizer = json!({"type": "Precompiled", "precompiled_charsmap": table});
        open_files(&[("tokenizer.json", letters(json!({"normalizer": normalizer})))])
    };
    opened(table).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let (mut n_opened, all) = (0, table.as_bytes());
    for broken in ["AAAA", "BAAAAAAA", "!!!!", "A", &table[..table.len() / 2]] {
        let error = opened(broken).unwrap_err().to_string();
        assert!(error.contains("precompiled_charsmap"), "{error}");
    }
    for _ in 0..30 {
        let mut bytes = all.to_vec();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..bytes.len());
            bytes[at] = pick(&mut rng, b"ABCDwxyz0189+/");
        }
        if let Ok(t) = opened(std::str::from_utf8(&bytes).unwrap()) {
            n_opened += 1;
            for text in ["ﬁ Ａ １ é ½", "a\u{301}한글 ㍿ \u{fffd}"] {
                let ids = t.encode(text, false);
                assert!(!format!("{ids:?}").contains("not consistent"), "{ids:?}");
            }
        }
    }
    assert!(n_opened > 0);
}

/// Opens a tokenizer of letters with these changes, and expects an error with `part` in it.
fn refused(changes: Value, part: &str) {
    let error = open_files(&[("tokenizer.json", letters(changes.clone()))]).unwrap_err();
    let shown: String = changes.to_string().chars().take(200).collect();
    assert!(
        error.to_string().contains(part),
        "{shown}: {error}\nexpected {part}"
    );
}

#[test]
fn what_a_tokenizer_makes_of_a_text_is_bounded() {
    let steps = |name: &str, list: Vec<Value>| json!({"type": "Sequence", name: list});
    let space = json!({"type": "Metaspace", "replacement": "😀", "prepend_scheme": "always"});
    refused(
        json!({"pre_tokenizer": steps("pretokenizers", vec![space; 5])}),
        "pre-tokenizer can make a text 3125 times as long",
    );
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": false});
    let compatible = steps("normalizers", vec![json!({"type": "NFKC"}); 2]);
    refused(
        json!({"normalizer": compatible, "pre_tokenizer": steps("pretokenizers", vec![bytes; 5])}),
        "normalizer with its pre-tokenizer can make a text 3872 times",
    );
    let before = json!({"type": "Prepend", "prepend": "a".repeat(5000)});
    refused(json!({"normalizer": before}), "can add 5000 bytes");
    let replace = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "a".repeat(40)});
    refused(
        json!({"decoder": steps("decoders", vec![replace.clone(); 2])}),
        "decoder can make a text 1600 times",
    );

    // A post-processor that multiplies a text, and one with many tokens.
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let template = |single: Value, n: usize| {
        json!({"type": "TemplateProcessing", "single": single, "pair": [text, text],
            "special_tokens": {"x": {"id": "x", "ids": vec![1; n], "tokens": vec!["<s>"; n]}}})
    };
    let twice = template(json!([text, text]), 1);
    refused(
        json!({"post_processor": {"type": "Sequence", "processors": vec![twice; 30]}}),
        "does not put one text in its place",
    );
    let special = json!({"SpecialToken": {"id": "x", "type_id": 0}});
    let mut single = vec![special; 40];
    single.push(text.clone());
    refused(
        json!({"post_processor": template(single.into(), 40)}),
        "1600 tokens around a text",
    );

    // Settings as large as a vocabulary, affixes that are copied for each letter, and added tokens
    // that grow.
    refused(
        json!({"decoder": {"x": vec![1; 70_000]}}),
        "more values than a text",
    );
    let mut model = letters(json!({}))["model"].clone();
    model["continuing_subword_prefix"] = "#".repeat(300).into();
    refused(
        json!({"model": model}),
        "`continuing_subword_prefix` has 300 bytes",
    );
    let token = |id: usize, len: usize| {
        json!({"id": id, "content": format!("{id:0len$}"), "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": true, "special": false})
    };
    refused(
        json!({"added_tokens": [token(5, 5000)]}),
        "an added token of 5000 bytes",
    );
    let grown = json!({"type": "Replace", "pattern": {"String": "0"}, "content": "0".repeat(1000)});
    let tokens: Vec<Value> = (5..55).map(|id| token(id, 1000)).collect();
    refused(
        json!({"added_tokens": tokens, "normalizer": grown}),
        "50 added tokens can have",
    );

    // What is decoded is bounded by the tokens at hand.
    let vocab = json!({"<unk>": 0, "a": 1, "a".repeat(100_000): 2});
    let changes = json!({"vocab": vocab, "decoder": replace});
    let t = open_files(&[("tokenizer.json", letters(changes))]).unwrap();
    assert_eq!(t.decode(&vec![1; 1000]).unwrap(), "a".repeat(40_000));
    let error = t.decode(&vec![2; 100]).unwrap_err().to_string();
    assert!(
        error.contains("100 tokens can become 400000000 bytes"),
        "{error}"
    );
}

#[test]
fn a_tokenizer_that_panics_is_refused_in_silence() {
    // `quiet` tests that nothing is printed.
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let unknown = json!({"SpecialToken": {"id": "x", "type_id": 0}});
    let post = json!({"type": "TemplateProcessing", "single": [unknown, text], "pair": [text, text], "special_tokens": {}});
    refused(
        json!({"post_processor": post}),
        "the file is not consistent",
    );
    let decoder = json!({"type": "Strip", "content": " ", "start": 0, "stop": 9});
    let t = open_files(&[("tokenizer.json", letters(json!({"decoder": decoder})))]).unwrap();
    let error = t.decode(&[3]).map(|text| text.len());
    assert!(
        error
            .as_ref()
            .is_err_and(|e| e.to_string().contains("not consistent"))
            || error.is_ok()
    );
}

#[test]
fn long_texts_in_pieces_have_the_tokens_of_the_whole() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    const WORDS: [&str; 14] = [
        "the",
        "fox",
        " jumps",
        "\n\n",
        "  ",
        ", ",
        "don't",
        "héllo",
        "日本語",
        "12345",
        "ﬁ",
        "\t",
        "</s>",
        "😀",
    ];
    let mut text = String::new();
    while text.len() < 300_000 {
        text.push_str(WORDS[rng.random_range(0..WORDS.len())]);
        if rng.random_bool(0.6) {
            text.push(' ');
        }
    }
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let signs: serde_json::Map<String, Value> = (33_u8..127)
        .map(|byte| ((byte as char).to_string(), usize::from(byte).into()))
        .collect();
    let level = json!({"pre_tokenizer": bytes, "post_processor": bytes, "vocab": signs});
    let mut all = vec![open_files(&[("tokenizer.json", letters_of(level))]).unwrap()];
    for name in MODELS {
        all.push(TextTokenizer::from_file(fixtures().join(format!("{name}.model"))).unwrap());
    }
    if let Some(gpt2) = shared("models/tokenizers/gpt2/tokenizer.json") {
        all.push(TextTokenizer::from_file(gpt2).unwrap());
    }
    for tokenizer in all {
        let whole = tokenizer.found(&text).unwrap();
        assert!(text.len() > tokenizer.piece_bytes());
        for piece in [1 << 10, 5000, 1 << 16] {
            let mut found = Vec::new();
            let keep = |tokens: &[super::Found]| found.extend_from_slice(tokens);
            super::long::tokenize(
                &text,
                piece,
                |part| {
                    assert!(part.len() <= piece);
                    tokenizer.found(part)
                },
                keep,
            )
            .unwrap();
            assert!(found == whole, "{tokenizer:?} {piece}");
        }
        assert!(
            tokenizer
                .encode(&text, false)
                .unwrap()
                .into_iter()
                .eq(whole.iter().map(|t| t.id))
        );
        assert_eq!(
            tokenizer.encode_with_bytes(&text).unwrap().0.len(),
            whole.len()
        );
    }
    // A tokenizer of whole texts has no tokens that two parts could have in common.
    let model = json!({"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1}, "unk_token": "<unk>"});
    let changes = json!({"model": model});
    let tokenizer = open_files(&[("tokenizer.json", letters(changes))]).unwrap();
    let error = tokenizer.encode(&"b ".repeat(50_000), false).unwrap_err();
    assert!(
        error.to_string().contains("cut it into documents"),
        "{error}"
    );
}

/// [`letters`] with the tokens of the vocabulary alone.
fn letters_of(changes: Value) -> Value {
    let mut value = letters(changes);
    value["added_tokens"] = json!([]);
    value["model"]["unk_token"] = Value::Null;
    value
}
