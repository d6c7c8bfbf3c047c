//! Rotary frequencies that depend on the length of the sequence: sessions on a device, batches and
//! perplexity have those of passes over whole sequences, and the runtime has the same.

use crate::common::runtime::{F32, full, llama, session};
use crate::common::{max_diff, random_ids, tiny_dims};
use elastic_lora::eval::perplexity;
use elastic_lora::io::hf::LlamaDims;
use elastic_lora::model::{Decoder, DeviceSession, generate_batch};
use elastic_lora::nn::host_values;
use elastic_lora::progress::Silent;
use elastic_lora::runtime::{GenerateConfig, Model};
use serde_json::{Value, json};

/// Number of tokens above which the frequencies change.
const LIMIT: usize = 12;

fn dims(context: usize) -> LlamaDims {
    LlamaDims {
        max_position_embeddings: context,
        rope_theta: 100.0,
        ..tiny_dims(false)
    }
}

fn longrope(limit: usize) -> Value {
    json!({"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": limit,
        "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 5.0, 9.0], "attention_factor": 1.2}})
}

fn models() -> [(&'static str, Decoder); 2] {
    let dynamic = json!({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}});
    [
        ("longrope", llama(&dims(48), longrope(LIMIT), 3)),
        ("dynamic", llama(&dims(LIMIT), dynamic, 4)),
    ]
}

/// Prompts on both sides of the limit, some of the same length.
fn prompts() -> Vec<Vec<u32>> {
    [5, 14, 3, 11, 12, 14, 9, 5, 20, 5, 13]
        .into_iter()
        .enumerate()
        .map(|(i, len)| random_ids(len, 41, 60 + i as u64))
        .collect()
}

#[test]
fn sessions_have_the_frequencies_of_their_length() {
    let ids = random_ids(30, 41, 9);
    for (name, decoder) in models() {
        assert_eq!(decoder.config().max_position_embeddings(), 48);
        let model = Model::from_decoder(&decoder, F32).unwrap();
        let (mut device, mut host) = (DeviceSession::new(&decoder), session(&model));
        for pieces in [[7, 5, 1, 1, 16], [10, 1, 6, 1, 12]] {
            let mut start = 0;
            for n in pieces {
                let (piece, end) = (&ids[start..start + n], start + n);
                let found = device.decode(piece).unwrap();
                let mut logits = vec![0.0; 41];
                host.decode(piece, Some(&mut logits)).unwrap();
                assert!(max_diff(&found, &logits) < 1e-4, "{name}, {end} tokens");
                let whole = full(&decoder, &ids[..end]);
                let off = max_diff(&found, &whole[whole.len() - 41..]);
                if name == "longrope" || start == 0 || end <= LIMIT {
                    assert!(off < 1e-4, "{name}, {end} tokens: off by {off}");
                } else {
                    // The keys of earlier tokens stay as they were rotated.
                    assert!(off > 1e-3, "{name}, {end} tokens: off by {off}");
                }
                assert_eq!(device.position(), end);
                start = end;
            }
            // What is refused changes nothing.
            assert!(device.decode(&[41]).is_err() && device.decode(&[1; 30]).is_err());
            assert_eq!(device.position(), 30);
            device.reset();
            host.reset();
            assert_eq!((device.position(), host.position()), (0, 0));
        }
    }
}

#[test]
fn sequences_of_a_batch_are_those_that_run_alone() {
    for (name, decoder) in models() {
        for (max_new_tokens, batch_size) in [(2, 64), (9, 64), (9, 2), (40, 64)] {
            let config = GenerateConfig::new(max_new_tokens, vec![7]).with_batch_size(batch_size);
            let prompts = prompts();
            let together = generate_batch(&decoder, &prompts, &config, &Silent).unwrap();
            for (prompt, together) in prompts.iter().zip(&together) {
                let mut alone = DeviceSession::new(&decoder);
                let alone = alone.generate(prompt, &config, |_| true).unwrap();
                assert_eq!(
                    together, &alone,
                    "{name}, {max_new_tokens} after {prompt:?}"
                );
            }
        }
    }
}

#[test]
fn windows_of_the_perplexity_are_whole_sequences() {
    // More than what runs at once, so that the second piece passes the limit.
    let (limit, context) = (4099, 4110);
    let dims = LlamaDims {
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        hidden_size: 12,
        ..dims(context)
    };
    let decoder = llama(&dims, longrope(limit), 5);
    let ids = random_ids(context, 41, 8);
    let found = perplexity(&decoder, &ids, context, &Silent).unwrap();
    let targets: Vec<(usize, u32)> = (1..context).map(|i| (i - 1, ids[i])).collect();
    let whole = decoder.nll_sum(decoder.tokens(&ids, 1).unwrap(), &targets);
    let whole = f64::from(host_values(whole.unwrap())[0]) / targets.len() as f64;
    assert!(
        (found.nll - whole).abs() < 1e-5,
        "{} is not {whole}",
        found.nll
    );
}
