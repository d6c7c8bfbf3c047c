//! Sessions on small models without Burn: sliding windows, rotary embeddings that depend on the
//! length, and sessions that go back.

mod chat;
mod draft;
mod engine;
mod mutated;
mod odd_folders;
mod subnets;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::cache::Cache;
use super::*;
use crate::io::hf::HfFolder;
use crate::io::{DType, HfConfig, HostTensor};

/// A model whose weights are a formula, so that others can compute with the same ones: tensor `t` in
/// the order of names has `0.6 sin(0.37 i + 1.7 t)` at `i`, and norms have `1 + 0.2 sin(..)`.
fn model(fields: Value) -> Model {
    let mut raw = json!({"model_type": "llama", "vocab_size": 19, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "rope_theta": 100.0, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": false});
    let (Some(all), Value::Object(fields)) = (raw.as_object_mut(), fields) else {
        panic!("expected objects");
    };
    all.extend(fields);
    let config = HfConfig::from_json(all.clone()).unwrap();
    let mut tensors = config.arch().tensors();
    tensors.sort();
    let tensors = tensors.into_iter().enumerate().map(|(t, (name, shape))| {
        let wave = |i: usize| (i as f64 * 0.37 + t as f64 * 1.7).sin();
        let value = |i: usize| match shape.len() {
            1 => 1.0 + 0.2 * wave(i),
            _ => 0.6 * wave(i),
        };
        let values = (0..shape.iter().product()).map(|i| value(i) as f32);
        let values: Vec<f32> = values.collect();
        HostTensor::from_f32(name, DType::F32, shape.clone(), values)
    });
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("model");
    let folder = HfFolder::create(&path, false).unwrap();
    folder
        .write_model(&config, DType::F32, tensors.collect())
        .unwrap();
    folder.commit().unwrap();
    let options = ModelOptions::default().with_n_threads(1).with_mmap(false);
    Model::open(&path, &options).unwrap()
}

fn windowed(window: usize, context: usize) -> Model {
    model(json!({"model_type": "mistral", "sliding_window": window,
        "max_position_embeddings": context}))
}

/// Three layers, of which the last has no window.
fn mixed(window: usize, context: usize) -> Model {
    model(
        json!({"model_type": "gemma3_text", "sliding_window": window, "num_hidden_layers": 3,
        "sliding_window_pattern": 3, "query_pre_attn_scalar": 8, "rope_local_base_freq": 50.0,
        "max_position_embeddings": context, "tie_word_embeddings": true}),
    )
}

fn tokens(n: usize) -> Vec<u32> {
    (0..n).map(|i| (i * 7 + i / 5 + 3) as u32 % 19).collect()
}

fn session(model: &Model, format: CacheFormat, prefill_rows: usize) -> Session {
    let config = SessionConfig::default()
        .with_cache(format)
        .with_prefill_rows(prefill_rows);
    Session::new(model, &config).unwrap()
}

/// The same, but all layers keep all tiles.
fn whole(model: &Model, format: CacheFormat, prefill_rows: usize) -> Session {
    let mut session = session(model, format, prefill_rows);
    let (arch, n_ctx) = (model.config().arch(), session.n_ctx());
    session.cache = Cache::new(format, arch, &arch.blocks, n_ctx, n_ctx);
    session
}

/// Goes back in both sessions, and returns whether they compute all tokens again.
fn go_back(ring: &mut Session, whole: &mut Session, n: usize) -> bool {
    ring.truncate(n);
    whole.truncate(n);
    let again = ring.cache.n_tokens() < ring.position();
    if again {
        // So that both have the same roundings.
        whole.cache.truncate(0);
    }
    again
}

/// Appends tokens and returns the logits after each of them.
fn all(session: &mut Session, tokens: &[u32]) -> Vec<f32> {
    let mut logits = vec![f32::NAN; tokens.len() * 19];
    session.decode_all(tokens, &mut logits).unwrap();
    logits
}

#[track_caller]
fn close(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!(
            (found - expected).abs() < 1e-4 * expected.abs().max(1.0),
            "{found} is not {expected}"
        );
    }
}

/// Sizes of pieces from 1 to `most` that sum up to `n`.
fn pieces(n: usize, most: usize) -> Vec<usize> {
    let mut sizes = Vec::new();
    let mut rest = n;
    for i in 0.. {
        let size = ((i * 11 + 5) % most + 1).min(rest);
        if size == 0 {
            break;
        }
        sizes.push(size);
        rest -= size;
    }
    sizes
}

#[test]
fn a_window_that_moves_over_its_tiles_sees_what_all_tiles_hold() {
    let context = 1500;
    for (model, kept) in [
        (windowed(70, context), 2),
        (windowed(64, context), 2),
        (windowed(1, context), 2),
        (windowed(129, context), 2),
        (mixed(70, context), 2),
    ] {
        let window = model.config().sliding_window().unwrap();
        for format in [CacheFormat::F32, CacheFormat::F16] {
            for rows in [1, 50] {
                let mut ring = session(&model, format, rows);
                let mut whole = whole(&model, format, rows);
                let ids = tokens(context);
                let mut start = 0;
                for n in pieces(context, 2 * rows) {
                    let ids = &ids[start..start + n];
                    assert_eq!(all(&mut ring, ids), all(&mut whole, ids), "at {start}");
                    start += n;
                }
                // One key/value head of 8 features, keys and values.
                let number = match format {
                    CacheFormat::F32 => 4,
                    CacheFormat::F16 => 2,
                };
                let tile = 64 * 8 * 2 * number;
                let layers = model.config().num_hidden_layers();
                assert_eq!(whole.cache_bytes(), layers * 24 * tile);
                let tiles = ((window + rows).div_ceil(64) + 1).next_multiple_of(4);
                let expected = kept * tiles + (layers - kept) * 24;
                assert_eq!(ring.cache_bytes(), expected * tile, "{window} and {rows}");
            }
        }
    }
}

#[test]
fn sessions_with_windows_are_decoded_together() {
    let model = mixed(70, 800);
    let start = |make: fn(&Model, CacheFormat, usize) -> Session| -> Vec<Session> {
        let lengths = [3, 70, 400];
        let filled = |n: usize| {
            let mut session = make(&model, CacheFormat::F32, 10);
            session.decode(&tokens(n), None).unwrap();
            session
        };
        lengths.into_iter().map(filled).collect()
    };
    let (mut rings, mut wholes) = (start(session), start(whole));
    for token in tokens(390) {
        let step = |sessions: &mut Vec<Session>| {
            let mut logits = vec![0.0; 3 * 19];
            let mut sessions: Vec<&mut Session> = sessions.iter_mut().collect();
            decode_batch(&mut sessions, &[token, 5, token / 2], &mut logits).unwrap();
            logits
        };
        assert_eq!(step(&mut rings), step(&mut wholes));
    }
    assert_eq!(rings[2].position(), 790);
    assert_eq!(rings[2].tokens()[789], tokens(390)[389] / 2);
    assert!(rings[2].cache_bytes() < wholes[2].cache_bytes());
}

#[test]
fn a_session_goes_back_behind_its_window() {
    for model in [windowed(70, 900), mixed(70, 900)] {
        let ids = tokens(900);
        let mut ring = session(&model, CacheFormat::F32, 30);
        let mut whole = whole(&model, CacheFormat::F32, 30);
        all(&mut ring, &ids[..700]);
        all(&mut whole, &ids[..700]);
        // Twice a few tokens, which takes no computing again, then many, and then all.
        for (n, again) in [
            (680, false),
            (671, false),
            (500, true),
            (3, true),
            (0, false),
        ] {
            assert_eq!(go_back(&mut ring, &mut whole, n), again, "{n}");
            assert_eq!((ring.position(), ring.tokens()), (n, &ids[..n]));
            let (found, expected) = (all(&mut ring, &ids[n..700]), all(&mut whole, &ids[n..700]));
            assert_eq!(found, expected, "after going back to {n}");
        }
        // In a batch, too.
        assert!(go_back(&mut ring, &mut whole, 100));
        let mut found = [0.0; 2 * 19];
        decode_batch(&mut [&mut ring, &mut whole], &[4, 4], &mut found).unwrap();
        assert_eq!(found[..19], found[19..]);
        assert_eq!((ring.position(), ring.tokens()[100]), (101, 4));
        // What does not fit changes nothing.
        assert!(ring.decode(&ids, None).is_err() && ring.decode(&[19], None).is_err());
        assert_eq!(ring.position(), 101);
        assert_eq!(all(&mut ring, &[7]), all(&mut whole, &[7]));
    }
}

#[test]
fn sessions_that_go_back_and_forth_at_random_see_what_all_tiles_hold() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for (model, rows) in [
        (windowed(64, 1000), 1),
        (windowed(100, 1000), 40),
        (mixed(3, 1000), 70),
        (mixed(190, 1000), 2),
    ] {
        let mut ring = session(&model, CacheFormat::F32, rows);
        let mut whole = whole(&model, CacheFormat::F32, rows);
        let mut recomputed = 0;
        for _ in 0..300 {
            let room = 1000 - ring.position();
            match rng.random_range(0..8) {
                0 => {
                    let back = match rng.random_range(0..4) {
                        0 => 1000,
                        1 => 200,
                        _ => 30,
                    };
                    let n = ring.position().saturating_sub(rng.random_range(0..back));
                    recomputed += usize::from(go_back(&mut ring, &mut whole, n));
                }
                1 if room > 0 => {
                    let token = rng.random_range(0..19);
                    let mut logits = [0.0; 2 * 19];
                    let mut both = [&mut ring, &mut whole];
                    decode_batch(&mut both, &[token; 2], &mut logits).unwrap();
                    assert_eq!(logits[..19], logits[19..]);
                }
                _ => {
                    let n = rng.random_range(0..90).min(room);
                    let ids: Vec<u32> = (0..n).map(|_| rng.random_range(0..19)).collect();
                    if n > 0 {
                        assert_eq!(all(&mut ring, &ids), all(&mut whole, &ids));
                    }
                }
            }
            assert_eq!(ring.tokens(), whole.tokens());
        }
        assert!(recomputed > 0 && ring.cache_bytes() < whole.cache_bytes());
    }
}

/// A model with LongRoPE, whose frequencies change after 16 tokens.
fn longrope() -> Model {
    model(
        json!({"max_position_embeddings": 64, "rope_scaling": {"rope_type": "longrope",
        "original_max_position_embeddings": 16, "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [2.0, 5.0, 9.0, 20.0]}}),
    )
}

/// Tokens of the tests whose results transformers computed.
fn reference_tokens(n: usize) -> Vec<u32> {
    (0..n).map(|i| (i * 7 + 3) as u32 % 19).collect()
}

// The expected numbers are the first four logits at the last position that LlamaForCausalLM of
// transformers 5.24 computes with the config and the weights of `model`, f32, from all tokens at
// once.
#[test]
fn sessions_that_pass_the_limit_of_longrope_are_computed_again() {
    let model = longrope();
    let expected: [(usize, [f32; 4]); 5] = [
        (10, [1.60326, 2.29496, 2.687258, 2.728978]),
        (16, [-1.404674, -0.174676, 1.078111, 2.190247]),
        (17, [-1.030522, -1.865002, -2.456174, -2.726914]),
        (18, [2.23671, 2.290625, 2.045705, 1.533902]),
        (40, [0.9270266, 1.939363, 2.698691, 3.105947]),
    ];
    let ids = reference_tokens(40);
    for rows in [3, 256] {
        let mut one = session(&model, CacheFormat::F32, rows);
        for (n, expected) in expected {
            // In one call, and token by token.
            let mut logits = [0.0; 19];
            let mut fresh = session(&model, CacheFormat::F32, rows);
            fresh.decode(&ids[..n], Some(&mut logits)).unwrap();
            close(&logits[..4], &expected);
            while one.position() < n {
                let token = ids[one.position()];
                one.decode(&[token], Some(&mut logits)).unwrap();
            }
            close(&logits[..4], &expected);
        }
        // Back below the limit, and over it again with other tokens in between.
        for (n, expected) in [expected[1], expected[3], expected[0]] {
            one.truncate(n - 1);
            let mut logits = [0.0; 19];
            let rest = &ids[one.position()..n];
            one.decode(rest, Some(&mut logits)).unwrap();
            close(&logits[..4], &expected);
        }
        // Each session of a batch has its own length.
        let mut short = session(&model, CacheFormat::F32, rows);
        let mut long = session(&model, CacheFormat::F32, rows);
        short.decode(&ids[..9], None).unwrap();
        long.decode(&ids[..16], None).unwrap();
        let mut logits = [0.0; 2 * 19];
        let mut both = [&mut short, &mut long];
        decode_batch(&mut both, &[ids[9], ids[16]], &mut logits).unwrap();
        close(&logits[..4], &expected[0].1);
        close(&logits[19..23], &expected[2].1);
    }
}

// The expected numbers were made like those above, with a cache and the same pieces.
#[test]
fn dynamic_frequencies_are_those_of_the_length_at_which_a_token_came() {
    let fields = json!({"max_position_embeddings": 16,
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}});
    let model = model(fields);
    assert_eq!(model.config().max_position_embeddings(), 64);
    let expected: [(usize, [f32; 4]); 7] = [
        (10, [1.585556, 2.280208, 2.677385, 2.725269]),
        (16, [-1.466806, -0.2397127, 1.018653, 2.144125]),
        (17, [-0.6231155, -1.493408, -2.16887, -2.561381]),
        (20, [0.7829232, -0.2575928, -1.264503, -2.106447]),
        (25, [-1.55918, -2.250738, -2.648664, -2.701045]),
        (26, [1.782696, 1.223525, 0.5047317, -0.2799085]),
        (40, [0.9629588, 1.951902, 2.686199, 3.070055]),
    ];
    let ids = reference_tokens(40);
    for rows in [2, 256] {
        let mut session = session(&model, CacheFormat::F32, rows);
        for n in [10].into_iter().chain([1; 10]).chain([5]).chain([1; 15]) {
            let mut logits = [0.0; 19];
            let start = session.position();
            let piece = &ids[start..start + n];
            session.decode(piece, Some(&mut logits)).unwrap();
            if let Some((_, expected)) = expected.iter().find(|(n, _)| *n == session.position()) {
                close(&logits[..4], expected);
            }
        }
        // All tokens at once have the frequencies of the whole length.
        for (n, expected) in [
            (17, [-0.6293365, -1.496446, -2.16833, -2.557333]),
            (40, [0.8426161, 1.859129, 2.6331, 3.063557]),
        ] {
            let mut logits = [0.0; 19];
            session.reset();
            session.decode(&ids[..n], Some(&mut logits)).unwrap();
            close(&logits[..4], &expected);
        }
    }
}

/// Opens a folder of `cases`, models and tokenizers as they are found in the field.
fn case(name: &str) -> Option<crate::error::Result<Model>> {
    let path = crate::io::testing::shared(&format!("cases/{name}"))?;
    Some(Model::open(path, &ModelOptions::default()))
}

#[test]
fn cases_from_the_field_have_the_perplexities_of_transformers() {
    let Some(text) = crate::io::testing::shared("cases/data/story.txt") else {
        return;
    };
    let text = std::fs::read_to_string(text).unwrap();
    for (name, expected, notice) in [
        ("ckpt-tied-but-two-heads", 36.6405, Some("`lm_head.weight`")),
        ("ckpt-index-lists-tied-head", 35.1393, None),
        ("ckpt-leftover-bnb-config", 35.1393, Some("bitsandbytes")),
        ("ckpt-rope-dynamic", 35.1393, None),
        ("ckpt-config-bom", 35.1393, None),
        ("tok-add-bos-true-no-template", 0.0, Some("add_bos_token")),
        ("tok-added-decoder-only", 35.1393, None),
        ("tok-padded-row-generated", 0.0, None),
        ("gptq-old-file-name", 0.0, None),
        ("ct-two-groups", 0.0, None),
    ] {
        let Some(model) = case(name) else { return };
        let model = model.unwrap_or_else(|error| panic!("{name}: {error}"));
        let ids = model.tokenizer().unwrap().encode_prompt(&text).unwrap();
        let context = model.config().max_position_embeddings().min(512);
        let mut session = Session::new(&model, &SessionConfig::default()).unwrap();
        let (mut sum, mut n) = (0.0, 0);
        for window in ids.chunks(context) {
            session.reset();
            let likelihoods = session.log_likelihoods(window).unwrap();
            sum -= likelihoods.iter().map(|l| f64::from(*l)).sum::<f64>();
            n += likelihoods.len();
        }
        let found = (sum / n as f64).exp();
        eprintln!("{name}: perplexity {found:.4}, {:?}", model.notices());
        assert!(
            expected == 0.0 || (found - expected).abs() < 6e-4,
            "{name}: {found}"
        );
        match notice {
            None => assert!(model.notices().is_empty(), "{name}: {:?}", model.notices()),
            Some(part) => assert!(model.notices().concat().contains(part), "{name}"),
        }
    }
    for (name, part) in [
        ("ckpt-bias-not-in-config", "q_proj.bias"),
        ("ckpt-rope-v4-v5-conflict", "rope_parameters"),
        ("ckpt-lfs-pointer-weights", "Git LFS"),
        ("hostile/tokenizer-bomb", "times as long"),
        (
            "hostile/tokenizer-precompiled-panic",
            "precompiled_charsmap",
        ),
    ] {
        let Some(model) = case(name) else { return };
        let error = model.unwrap_err().to_string();
        eprintln!("{name}: {error}");
        assert!(error.contains(part), "{name}: {error}");
    }
}

#[test]
fn padding_of_a_vocabulary_is_never_drawn() {
    let Some(model) = case("tok-padded-row-generated") else {
        return;
    };
    let model = model.unwrap();
    let tokenizer = model.tokenizer().unwrap();
    let prompt = tokenizer.encode_prompt("Once upon a time").unwrap();
    for temperature in [0.0, 3.0] {
        let mut session = Session::new(&model, &SessionConfig::default()).unwrap();
        let config = GenerateConfig {
            sample: SampleConfig {
                temperature,
                ..SampleConfig::default()
            },
            ..GenerateConfig::new(200, Vec::new())
        };
        let ids = session.generate(&prompt, &config, |_| true).unwrap();
        assert_eq!(ids.len(), 200);
        assert!(ids.iter().all(|id| tokenizer.id_to_token(*id).is_some()));
    }
    let text = tokenizer.decode(&[80, 2100, 147]).unwrap();
    assert_eq!(text, tokenizer.decode(&[80, 147]).unwrap());
}

#[test]
fn prompts_are_continued_the_same_on_any_number_of_sessions() {
    let model = windowed(8, 64);
    // The context ends some of the sequences before the others.
    let starts = (0..7).map(|i| tokens(63)[i * (i + 3)..].to_vec());
    let prompts: Vec<Vec<u32>> = starts.collect();
    let open = |n: usize| -> Vec<Session> {
        (0..n)
            .map(|_| session(&model, CacheFormat::F32, 5))
            .collect()
    };
    let silent = crate::progress::Silent;
    let mut one = open(1);
    let mut by_generate = |config: &GenerateConfig| -> Vec<Vec<u32>> {
        let answers = prompts.iter().map(|prompt| {
            one[0].reset();
            one[0].generate(prompt, config, |_| true).unwrap()
        });
        answers.collect()
    };
    let greedy = GenerateConfig::new(12, vec![]).with_n_ids(Some(17));
    let endless = by_generate(&greedy);
    let lengths: Vec<usize> = endless.iter().map(Vec::len).collect();
    assert_eq!(lengths, [2, 6, 12, 12, 12, 12, 12]);
    let greedy = GenerateConfig {
        stop_ids: vec![endless[3][4]],
        ..greedy
    };
    let expected = by_generate(&greedy);
    assert_ne!(expected, endless);
    let drawn = SampleConfig {
        temperature: 1.5,
        seed: 3,
        ..SampleConfig::default()
    };
    let drawn = greedy.clone().with_sample(drawn);
    let by_one = generate_many(&mut one, &prompts, &drawn, &silent).unwrap();
    for n in [1, 2, 3, 7, 9] {
        let mut sessions = open(n);
        // What sessions hold before does not matter.
        sessions[0].decode(&[1, 2, 3], None).unwrap();
        for (config, expected) in [(&greedy, &expected), (&drawn, &by_one)] {
            let found = generate_many(&mut sessions, &prompts, config, &silent).unwrap();
            assert_eq!(found, *expected, "{n} sessions");
        }
    }
    // The context is full: one token comes after the last that fits, as with one session.
    let long = vec![tokens(63), tokens(64), tokens(9)];
    let more = GenerateConfig::new(5, vec![]);
    let found = generate_many(&mut open(2), &long, &more, &silent).unwrap();
    assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [2, 1, 5]);
    let none = GenerateConfig::new(0, vec![]);
    let found = generate_many(&mut open(2), &long, &none, &silent).unwrap();
    assert_eq!(found, vec![Vec::<u32>::new(); 3]);
    assert!(generate_many(&mut [], &prompts, &greedy, &silent).is_err());
    assert!(
        generate_many(&mut [], &[], &greedy, &silent)
            .unwrap()
            .is_empty()
    );
    assert!(generate_many(&mut open(1), &[tokens(65)], &greedy, &silent).is_err());
    let stop = std::sync::atomic::AtomicBool::new(true);
    let stopped = generate_many(&mut open(2), &prompts, &greedy, &stop);
    assert!(matches!(stopped, Err(crate::Error::Interrupted { .. })));
}

#[test]
fn more_threads_than_a_bound_are_refused() {
    let options = ModelOptions::default().with_n_threads(4097);
    let error = Model::open("nowhere", &options).unwrap_err().to_string();
    assert!(
        error.contains("n_threads") && error.contains("4096"),
        "{error}"
    );
}

/// A mixed storage is the uniform one where all layers are alike, prunes rows to their densities, and
/// refuses what it cannot store.
#[test]
fn layers_are_stored_in_bits_of_their_own() {
    use crate::format::WeightFormat;
    use crate::space::{Elastic, Group, SearchSpace};
    let model = model(json!({}));
    let groups = |kind: Elastic, choices: &[usize]| {
        let layers = model
            .layers()
            .iter()
            .filter(|layer| layer.name != "lm_head");
        layers
            .map(|layer| {
                let id = format!("{}.{kind:?}", layer.name);
                Group::of_kind(kind, id, vec![layer.name.clone()], choices.to_vec()).unwrap()
            })
            .collect::<Vec<_>>()
    };
    let space = SearchSpace::new(groups(Elastic::Bits, &[16, 8, 4, 3, 2]))
        .unwrap()
        .with_groups(groups(Elastic::Density, &[100, 50]))
        .unwrap();
    let storage = MixedStorage::new(&model, &space, Some(8)).unwrap();
    let mut subnet = space.maximal();
    for group in space.groups_of_kind(Elastic::Bits) {
        subnet.set(group.id(), 3);
    }
    let three = WeightFormat::Int {
        bits: 3,
        group_size: Some(8),
        symmetric: false,
    };
    let plan = FormatPlan {
        linears: Some(three),
        ..FormatPlan::kept()
    };
    let uniform = model.with_format(plan).unwrap();
    let stored = storage.model(&subnet).unwrap();
    assert_eq!(stored.bytes(), uniform.bytes());
    let tokens = tokens(9);
    let logits = |model: &Model| all(&mut session(model, CacheFormat::F32, 8), &tokens);
    assert_eq!(logits(&stored), logits(&uniform));
    let name = "model.layers.1.mlp.down_proj";
    subnet.set(format!("{name}.Bits"), 8);
    subnet.set(format!("{name}.Density"), 50);
    let stored = storage.model(&subnet).unwrap();
    let index = stored.layer_index(name).unwrap();
    let info = &stored.layers()[index];
    assert!(matches!(info.format, WeightFormat::Int { bits: 8, .. }));
    let matrix = stored.weight(index).unwrap().to_matrix();
    let zeros = |row| matrix.row(row).iter().filter(|x| **x == 0.0).count();
    assert!((0..matrix.rows()).all(|row| zeros(row) >= 12));
    subnet.set(format!("{name}.Bits"), 16);
    let sparse = storage.model(&subnet).unwrap();
    assert_eq!(sparse.layers()[index].format, WeightFormat::SparseF16);
    assert!(storage.model(&crate::SubnetConfig::new()).is_err());
    assert!(MixedStorage::new(&uniform, &space, None).is_err());
    let ranks = SearchSpace::fixed(&[crate::space::LayerShape::new(name, 24, 16)], 4);
    assert!(MixedStorage::new(&model, &ranks.unwrap(), None).is_err());
    assert!(Group::of_kind(Elastic::Bits, "b", vec!["l".into()], vec![5]).is_err());
    assert!(Group::of_kind(Elastic::Density, "d", vec!["l".into()], vec![101]).is_err());
}

/// The active part of a model is the whole model without a subnet.
#[test]
fn active_sizes_are_counted() {
    let model = model(json!({}));
    let size = session(&model, CacheFormat::F32, 8).active_size().unwrap();
    assert_eq!(size.bytes, model.bytes());
    let linears: usize = model.layers().iter().map(|l| l.d_input * l.d_output).sum();
    assert_eq!(size.macs_per_token, linears);
    assert_eq!(size.params, linears + 19 * 16);
}
