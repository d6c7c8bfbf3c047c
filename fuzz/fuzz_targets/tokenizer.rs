//! `tokenizer.json`, and SentencePiece models after a byte that is odd.
#![no_main]

use elastic_lora::data::TextTokenizer;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    let tokenizer = if kind % 2 == 1 {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("tokenizer.model");
        std::fs::write(&path, data).expect("a file");
        TextTokenizer::from_file(path)
    } else {
        let Ok(text) = std::str::from_utf8(data) else {
            return;
        };
        TextTokenizer::from_json(text, "fuzzed")
    };
    if let Ok(tokenizer) = tokenizer {
        if let Ok(ids) = tokenizer.encode("The fox\t jumps <s> \u{fb01} 12\u{301} \u{65e5}\u{672c}", true) {
            let _ = tokenizer.decode(&ids);
        }
    }
});
