//! GGUF files are models as folders are.

use std::path::PathBuf;

use elastic_lora::data::TextTokenizer;
use elastic_lora::runtime::{Model, ModelOptions, Session, SessionConfig};

fn shared(relative: &str) -> Option<PathBuf> {
    let root = std::env::var_os("ELASTIC_LORA_SHARED").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared")),
        PathBuf::from,
    );
    let path = root.join(relative);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: {} is missing", path.display());
    None
}

fn logits(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let config = SessionConfig::default().with_n_ctx(512);
    let mut session = Session::new(model, &config).unwrap();
    let mut logits = vec![0.0; tokens.len() * model.config().vocab_size()];
    session.decode_all(tokens, &mut logits).unwrap();
    logits
}

/// Mean negative log likelihood of tokens, in windows of 512 without overlap; the number of tokens predicted.
fn mean_nll(model: &Model, tokens: &[u32]) -> (f64, usize) {
    let (mut sum, mut count) = (0.0, 0);
    let vocab_size = model.config().vocab_size();
    for window in tokens.chunks(512) {
        let all = logits(model, window);
        for (row, target) in all.chunks(vocab_size).zip(&window[1..]) {
            let largest = row.iter().copied().fold(f32::MIN, f32::max);
            let total: f64 = row.iter().map(|x| f64::from(x - largest).exp()).sum();
            sum += total.ln() - f64::from(row[*target as usize] - largest);
            count += 1;
        }
    }
    (sum / f64::from(count), count as usize)
}

#[test]
fn a_file_computes_what_its_folder_does() {
    let Some(folder) = shared("models/stories260K") else {
        return;
    };
    let file = folder.join("stories260K.gguf");
    let tokens: Vec<u32> = (1..60).map(|i| i * 37 % 512).collect();
    let expected = logits(
        &Model::open(&folder, &ModelOptions::default()).unwrap(),
        &tokens,
    );
    for mmap in [true, false] {
        let model = Model::open(&file, &ModelOptions::default().with_mmap(mmap)).unwrap();
        assert_eq!(logits(&model, &tokens), expected);
        let tokenizer = model.tokenizer().unwrap();
        let text = "Once upon a time, there was a little girl.";
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(ids[0], 1);
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        assert_eq!(model.stop_ids(), [2]);
    }
    let tokenizer = TextTokenizer::from_dir(&file).unwrap();
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(1), Some(2)));
}

/// A real model, named by `ELASTIC_LORA_GGUF`: its tokens are those of a file that `tests/fixtures/gguf/tokens.py` wrote
/// (`ELASTIC_LORA_GGUF_TOKENS`), and its mean loss on a text (`ELASTIC_LORA_GGUF_TEXT`) is within 5e-3 of
/// `ELASTIC_LORA_GGUF_NLL`.
#[test]
#[ignore = "needs a real model"]
fn a_real_model() {
    let var = |name: &str| std::env::var(format!("ELASTIC_LORA_GGUF{name}")).unwrap();
    let start = std::time::Instant::now();
    let model = Model::open(var(""), &ModelOptions::default()).unwrap();
    eprintln!("opened in {:?}", start.elapsed());
    let tokenizer = model.tokenizer().unwrap();
    let expected = std::fs::read_to_string(var("_TOKENS")).unwrap();
    let expected: Vec<(String, Vec<u32>)> = serde_json::from_str(&expected).unwrap();
    for (text, ids) in &expected {
        assert_eq!(tokenizer.encode(text, true).unwrap(), *ids, "{text:?}");
    }
    eprintln!("{} texts have the expected tokens", expected.len());
    let text = std::fs::read(var("_TEXT")).unwrap();
    let text = String::from_utf8_lossy(&text[..text.len().min(40_000)]);
    let tokens = tokenizer.encode(&text, true).unwrap();
    let start = std::time::Instant::now();
    let (nll, count) = mean_nll(&model, &tokens);
    eprintln!(
        "mean loss {nll:.5} over {count} tokens in {:?}",
        start.elapsed()
    );
    let expected: f64 = var("_NLL").parse().unwrap();
    assert!((nll - expected).abs() < 5e-3, "{nll}, expected {expected}");
}
