//! The decoder compared with the outputs of transformers for two real models.

use crate::common::{load, load_i32, max_diff, shared};
use elastic_lora::io::Checkpoint;
use elastic_lora::nn::{KvCache, host_values};

fn check(model: &str) {
    let (Some(dir), Some(vectors)) = (
        shared(&format!("models/{model}")),
        shared(&format!("vectors/logits/{model}.safetensors")),
    ) else {
        return;
    };
    let decoder = load(&dir);
    let vectors = Checkpoint::open(vectors).unwrap();
    let ids = load_i32(&vectors, "input_ids");
    let expected = vectors.load_f32("logits").unwrap();
    let vocab = decoder.config().vocab_size();

    let full = decoder.forward(decoder.tokens(&ids, 1).unwrap());
    let full = host_values(full);
    assert!(
        max_diff(&full, &expected) < 1e-4,
        "{}",
        max_diff(&full, &expected)
    );

    let hidden = host_values(decoder.hidden_states(decoder.tokens(&ids, 1).unwrap(), None));
    assert!(max_diff(&hidden, &vectors.load_f32("last_hidden").unwrap()) < 1e-4);

    // With a cache: a prefill of 5 tokens, then token by token, and a piece of 11 tokens at the
    // end.
    let mut cache = KvCache::new(decoder.config().num_hidden_layers());
    let mut cached = Vec::new();
    let mut start = 0;
    while start < ids.len() {
        let n = if start == 0 {
            5
        } else if ids.len() - start == 11 {
            11
        } else {
            1
        };
        let tokens = decoder.tokens(&ids[start..start + n], 1).unwrap();
        cached.extend(host_values(
            decoder.logits(decoder.hidden_states(tokens, Some(&mut cache))),
        ));
        start += n;
    }
    assert!(max_diff(&cached, &full) < 1e-4);

    let positions: Vec<(usize, u32)> = (0..ids.len() - 1).map(|t| (t, ids[t + 1])).collect();
    let sum = host_values(
        decoder
            .nll_sum(decoder.tokens(&ids, 1).unwrap(), &positions)
            .unwrap(),
    )[0];
    let mean = f64::from(sum) / positions.len() as f64;
    let published: f64 = vectors.metadata()["mean_nll"].parse().unwrap();
    assert!((mean - published).abs() < 5e-5, "{mean} {published}");
    assert_eq!(full.len(), ids.len() * vocab);
}

#[test]
fn story_llama() {
    check("story-llama-0.6M");
}

#[test]
fn stories_260k() {
    check("stories260K");
}
