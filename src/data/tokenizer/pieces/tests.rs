use std::path::Path;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use super::{Detokenizer, StopStrings, byte_of};
use crate::data::TextTokenizer;

/// Tokenizers of three kinds: byte-level, with bytes as tokens, and of words.
fn tokenizers() -> Vec<TextTokenizer> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let words = json!({"model": {"type": "WordPiece", "unk_token": "?", "max_input_chars_per_word": 9,
        "continuing_subword_prefix": "##", "vocab": {"?": 0, "fo": 1, "##x": 2, "you": 3, "'": 4, "s": 5}},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "added_tokens": [{"id": 6, "content": "[END]", "special": true, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false}]});
    let mut all = vec![
        TextTokenizer::from_file(root.join("assets/arithmetic-llama/tokenizer.json")).unwrap(),
        TextTokenizer::from_json(&words.to_string(), "words").unwrap(),
    ];
    for name in ["bpe", "bpe_rules", "bpe_bare", "unigram"] {
        let path = root.join(format!("tests/fixtures/sentencepiece/{name}.model"));
        all.push(TextTokenizer::from_file(path).unwrap());
    }
    all
}

/// The text of tokens in parts.
fn parts(tokenizer: &TextTokenizer, ids: &[u32]) -> Vec<String> {
    let mut detokenizer = Detokenizer::new();
    let push = |id: &u32| detokenizer.push(tokenizer, *id).unwrap().to_string();
    let mut parts: Vec<String> = ids.iter().map(push).collect();
    parts.push(detokenizer.finish().to_string());
    parts
}

#[test]
fn parts_make_the_text_of_all_tokens_and_break_no_character() {
    let texts = [
        "How many pens?",
        "  two spaces, then ünïcödé and 漢字 🦊🦊 end ",
        "\t\nfox </s> fox",
        "🦊",
        "é",
        "",
    ];
    for tokenizer in tokenizers() {
        for text in texts {
            let ids = tokenizer.encode(text, true).unwrap();
            let parts = parts(&tokenizer, &ids);
            let whole = tokenizer.decode(&ids).unwrap();
            assert_eq!(parts.concat(), whole, "{tokenizer:?} {parts:?}");
            if !whole.contains('\u{fffd}') {
                assert!(!parts.iter().any(|part| part.contains('\u{fffd}')));
            }
        }
    }
}

#[test]
fn any_tokens_have_the_text_that_they_have_together() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for tokenizer in tokenizers() {
        let n = tokenizer.n_ids() as u32;
        for _ in 0..300 {
            let ids: Vec<u32> = (0..rng.random_range(0..12))
                .map(|_| rng.random_range(0..n + 2))
                .collect();
            let (found, expected) = (
                parts(&tokenizer, &ids).concat(),
                tokenizer.decode(&ids).unwrap(),
            );
            // The number of U+FFFD for bytes that are no text is another.
            if !expected.contains('\u{fffd}') {
                assert_eq!(found, expected, "{tokenizer:?} {ids:?}");
            }
        }
    }
}

#[test]
fn pieces_are_the_bytes_of_a_token_within_a_text() {
    for tokenizer in tokenizers() {
        let ids = tokenizer.encode("you fox 🦊 fox é", false).unwrap();
        let (first, rest) = ids.split_first().unwrap();
        let mut bytes = tokenizer.decode(&[*first]).unwrap().into_bytes();
        // A token for what is unknown is special.
        for id in rest.iter().filter(|id| !tokenizer.is_special(**id)) {
            bytes.extend(tokenizer.piece(*id).unwrap());
        }
        let text = String::from_utf8(bytes).unwrap();
        assert_eq!(text, tokenizer.decode(&ids).unwrap(), "{tokenizer:?}");
        assert_eq!(tokenizer.piece(u32::MAX).unwrap(), b"");
    }
    let all: Vec<u8> = (0..0x150)
        .filter_map(|c| byte_of(char::from_u32(c)?))
        .collect();
    let sorted: std::collections::BTreeSet<u8> = all.iter().copied().collect();
    assert_eq!((all.len(), sorted.len()), (256, 256));
    assert_eq!(
        [byte_of('Ġ'), byte_of('Ċ'), byte_of('ł')],
        [32, 10, 0xa0].map(Some)
    );
}

#[test]
fn special_tokens_are_named_if_asked_for() {
    let tokenizer = &tokenizers()[0];
    let ids = [1, 40, 2];
    let mut detokenizer = Detokenizer::new().with_special(true);
    let text: String = ids
        .iter()
        .map(|id| detokenizer.push(tokenizer, *id).unwrap().to_string())
        .collect();
    assert!(text.starts_with("<s>") && text.ends_with("</s>"), "{text}");
    assert_eq!(
        parts(tokenizer, &ids).concat(),
        tokenizer.decode(&ids).unwrap()
    );
}

#[test]
fn stop_strings_end_a_text_wherever_it_is_split() {
    let text = "one two\n\nUser: three ünd END";
    let cases: [(&[&str], &str, bool); 6] = [
        (&["\n\nUser:"], "one two", true),
        (&["\n\nUsers", "three"], "one two\n\nUser: ", true),
        (&["ünd", "nd"], "one two\n\nUser: three ", true),
        (&["two\n\nUser", "wo"], "one t", true),
        (&["ENDE"], text, false),
        (&[], text, false),
    ];
    for (stops, expected, stopped) in cases {
        for step in 1..text.len() {
            let mut search = StopStrings::new(stops.iter().copied()).unwrap();
            let (mut shown, mut rest) = (String::new(), text);
            while !rest.is_empty() {
                let cut = (step.min(rest.len())..=rest.len())
                    .find(|at| rest.is_char_boundary(*at))
                    .unwrap();
                shown += search.push(&rest[..cut]);
                rest = &rest[cut..];
            }
            assert_eq!(search.stopped(), stopped);
            shown += search.finish();
            assert_eq!(shown, expected, "{stops:?} {step}");
        }
    }
    // Only what may begin a stop string is held back.
    let mut search = StopStrings::new(["abab!"]).unwrap();
    assert_eq!(search.push("xabab"), "x");
    assert_eq!(search.push("a"), "ab");
    assert_eq!(search.push("c"), "abac");
    assert!(StopStrings::new(["a", ""]).is_err());
}
