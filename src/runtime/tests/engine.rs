//! What an engine needs of sessions: steps of many sessions, copies, states, interruption, and
//! adapters that are loaded at run time.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use super::{close, mixed, model, tokens, windowed};
use crate::error::Error;
use crate::format::WeightFormat;
use crate::input::rounds;
use crate::io::peft::{LoraAdapter, LoraWeights, PeftOptions};
use crate::io::{GgufType, HfConfig};
use crate::linalg::Matrix;
use crate::progress::Progress;
use crate::runtime::{
    Adapter, CacheFormat, Model, ModelOptions, Session, SessionConfig, Step, decode_steps,
};

pub(super) fn session(model: &Model) -> Session {
    let config = SessionConfig::default().with_prefill_rows(50);
    Session::new(model, &config).unwrap()
}

/// The logits after the last of some tokens.
pub(super) fn last(session: &mut Session, tokens: &[u32]) -> Vec<f32> {
    let mut logits = vec![f32::NAN; 19];
    session.decode(tokens, Some(&mut logits)).unwrap();
    logits
}

#[test]
fn steps_of_any_length_compute_what_sessions_do_alone() {
    for model in [model(json!({})), windowed(70, 1000), mixed(70, 1000)] {
        let all = tokens(400);
        // A long prompt, a token, a part of a prompt, two tokens, and one after a long context.
        let before = [0, 5, 30, 1, 211];
        let new = [130, 1, 60, 2, 1];
        let rows = [1, 1, 0, 2, 1];
        let mut alone: Vec<Session> = before.iter().map(|_| session(&model)).collect();
        let mut together: Vec<Session> = before.iter().map(|_| session(&model)).collect();
        for sessions in [&mut alone, &mut together] {
            for (session, n) in sessions.iter_mut().zip(before) {
                if n > 0 {
                    session.decode(&all[..n], None).unwrap();
                }
            }
        }
        let mut found: Vec<Vec<f32>> = rows.iter().map(|n| vec![f32::NAN; n * 19]).collect();
        let mut steps: Vec<Step<'_>> = Vec::new();
        let parts = together.iter_mut().zip(&mut found);
        for (at, (session, logits)) in parts.enumerate() {
            let tokens = &all[before[at]..before[at] + new[at]];
            steps.push(Step {
                session,
                tokens,
                logits,
            });
        }
        decode_steps(&mut steps).unwrap();
        for (at, session) in alone.iter_mut().enumerate() {
            let new = &all[before[at]..before[at] + new[at]];
            let mut logits = vec![f32::NAN; new.len() * 19];
            session.decode_all(new, &mut logits).unwrap();
            close(&found[at], &logits[logits.len() - rows[at] * 19..]);
            assert_eq!(session.tokens(), together[at].tokens());
        }
        // They go on alike.
        for (one, other) in alone.iter_mut().zip(&mut together) {
            close(&last(one, &[3]), &last(other, &[3]));
        }
    }
}

#[test]
fn a_step_that_fails_changes_no_session() {
    let model = model(json!({"max_position_embeddings": 40}));
    let (mut one, mut other) = (session(&model), session(&model));
    one.decode(&[1, 2], None).unwrap();
    let mut logits = [0.0; 19];
    let mut run = |first: &[u32], second: &[u32], n: usize| {
        let mut steps = [
            Step {
                session: &mut one,
                tokens: first,
                logits: &mut [],
            },
            Step {
                session: &mut other,
                tokens: second,
                logits: &mut logits[..n],
            },
        ];
        let result = decode_steps(&mut steps);
        (result, one.position(), other.position())
    };
    for (first, second, n) in [
        (&[1, 2][..], &[][..], 0),
        (&[1, 2], &[19], 0),
        (&[1, 2], &[0; 41], 0),
        (&[1, 2], &[1], 18),
    ] {
        let (result, first, second) = run(first, second, n);
        assert!(result.is_err());
        assert_eq!((first, second), (2, 0));
    }
    let (result, first, second) = run(&[1, 2], &[3], 19);
    result.unwrap();
    assert_eq!((first, second), (4, 1));
}

#[test]
fn copies_go_on_by_themselves() {
    for model in [model(json!({})), windowed(70, 1000), mixed(70, 1000)] {
        for format in [CacheFormat::F32, CacheFormat::F16] {
            let config = SessionConfig::default()
                .with_prefill_rows(50)
                .with_cache(format);
            let mut first = Session::new(&model, &config).unwrap();
            let prefix = tokens(300);
            first.decode(&prefix, None).unwrap();
            let mut copies: Vec<Session> = (0..3).map(|_| first.copy()).collect();
            for (at, copy) in copies.iter_mut().enumerate() {
                let mut fresh = Session::new(&model, &config).unwrap();
                fresh.decode(&prefix, None).unwrap();
                let ends: Vec<u32> = (0..90).map(|i| (i * (at + 2)) as u32 % 19).collect();
                assert_eq!(last(copy, &ends), last(&mut fresh, &ends));
                copy.truncate(250);
                fresh.truncate(250);
                assert_eq!(last(copy, &[7]), last(&mut fresh, &[7]));
            }
            // The original has not seen any of this.
            let mut fresh = Session::new(&model, &config).unwrap();
            fresh.decode(&prefix, None).unwrap();
            assert_eq!(last(&mut first, &[4]), last(&mut fresh, &[4]));
        }
    }
}

#[test]
fn states_restore_sessions_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    for model in [model(json!({})), windowed(70, 1000), mixed(70, 1000)] {
        let mut first = session(&model);
        first.decode(&tokens(300), None).unwrap();
        first.truncate(290);
        let state = first.state().unwrap();
        assert_eq!(state.len(), first.state_bytes());
        let path = folder.path().join("state");
        first.save(&path, true).unwrap();
        assert!(first.save(&path, false).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), state);
        let (mut restored, mut loaded) = (session(&model), session(&model));
        restored.decode(&[1, 2, 3], None).unwrap();
        restored.restore(&state).unwrap();
        loaded.load(&path).unwrap();
        assert_eq!(restored.tokens(), first.tokens());
        let expected = last(&mut first, &[4, 5]);
        assert_eq!(last(&mut restored, &[4, 5]), expected);
        assert_eq!(last(&mut loaded, &[4, 5]), expected);

        // Any change is found, and the session goes on as it was.
        let mut other = session(&model);
        other.decode(&[1, 2, 3], None).unwrap();
        let expected = last(&mut other.copy(), &[4]);
        for at in (0..state.len()).step_by(state.len() / 97) {
            let mut bad = state.clone();
            bad[at] ^= 4;
            assert!(other.restore(&bad).is_err(), "{at}");
            assert!(other.restore(&state[..at]).is_err());
        }
        assert!(other.restore(&[&state[..], &[0]].concat()).is_err());
        assert_eq!(other.tokens(), [1, 2, 3]);
        close(&last(&mut other, &[4]), &expected);
    }
    // Of another model, setting or size.
    let whole = model(json!({}));
    let mut first = session(&whole);
    first.decode(&tokens(60), None).unwrap();
    let state = first.state().unwrap();
    let other = model(json!({"rms_norm_eps": 1e-3}));
    let error = session(&other).restore(&state).unwrap_err().to_string();
    assert!(error.contains("another model"), "{error}");
    let config = SessionConfig::default().with_cache(CacheFormat::F16);
    let mut half = Session::new(&whole, &config).unwrap();
    let error = half.restore(&state).unwrap_err().to_string();
    assert!(error.contains("another format"), "{error}");
    let config = SessionConfig::default().with_n_ctx(59);
    let mut short = Session::new(&whole, &config).unwrap();
    assert!(matches!(
        short.restore(&state),
        Err(Error::SequenceTooLong { found: 60, .. })
    ));
    let config = SessionConfig::default().with_n_ctx(64);
    let mut just = Session::new(&whole, &config).unwrap();
    just.restore(&state).unwrap();
    assert_eq!(last(&mut just, &[1]), last(&mut first, &[1]));
}

/// Interrupts after it was asked some times.
struct Limit(AtomicUsize);

impl Progress for Limit {
    fn is_interrupted(&self) -> bool {
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1))
            .is_err()
    }
}

#[test]
fn an_interrupted_prefill_leaves_the_session_as_it_was() {
    let model = model(json!({}));
    let mut session = session(&model);
    session.decode(&tokens(70), None).unwrap();
    let expected = last(&mut session.copy(), &tokens(200));
    for n in [0, 1, 5] {
        session.set_progress(Some(Arc::new(Limit(AtomicUsize::new(n)))));
        let result = session.decode(&tokens(200), None);
        assert!(matches!(result, Err(Error::Interrupted { .. })));
        assert_eq!(session.position(), 70);
    }
    session.set_progress(None);
    assert_eq!(last(&mut session, &tokens(200)), expected);
    let path = tempfile::tempdir().unwrap();
    let path = path.path().join("model.elora");
    model.save(&path, false).unwrap();
    let limit = Limit(AtomicUsize::new(3));
    let result = Model::open_with(&path, &ModelOptions::default(), &limit);
    assert!(matches!(result, Err(Error::Interrupted { .. })));
}

#[test]
fn bundles_open_from_memory_and_from_files() {
    let (model, folder) = (model(json!({})), tempfile::tempdir().unwrap());
    let path = folder.path().join("model.elora");
    model.save(&path, false).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let expected = last(&mut session(&model), &[1, 2, 3]);
    let options = ModelOptions::default().with_n_threads(1);
    // At any address.
    for shift in [0, 1, 8] {
        let shifted: Arc<dyn AsRef<[u8]> + Send + Sync> = Arc::new(Part {
            bytes: [vec![0; shift], bytes.clone()].concat(),
            shift,
        });
        let open = Model::from_bytes("here", shifted, &options, &crate::progress::Silent);
        assert_eq!(last(&mut session(&open.unwrap()), &[1, 2, 3]), expected);
    }
    for mmap in [false, true] {
        let file = std::fs::File::open(&path).unwrap();
        let options = options.clone().with_mmap(mmap);
        let open = Model::from_file("here", file, &options, &crate::progress::Silent);
        assert_eq!(last(&mut session(&open.unwrap()), &[1, 2, 3]), expected);
    }
    for (content, says) in [
        (&b"GGUF\x03\0\0\0 and so on"[..], "a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "LFS"),
        (b"#include <stdio.h>\nint main", "a text file"),
        (b"PK\x03\x04........", "a ZIP archive"),
        (b"short", "too short"),
    ] {
        let bytes = Arc::new(content.to_vec());
        let result = Model::from_bytes("here", bytes, &options, &crate::progress::Silent);
        let error = result.unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("here"), "{error}");
    }
}

struct Part {
    bytes: Vec<u8>,
    shift: usize,
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[self.shift..]
    }
}

/// An adapter of some layers, with values from a formula.
pub(super) fn lora(model: &Model, rank: usize, phase: f32, kinds: &[&str]) -> LoraAdapter {
    let wave = |i: usize, j: usize| ((i * 31 + j * 7) as f32 * 0.37 + phase).sin() * 0.3;
    let mut adapter = LoraAdapter::default();
    for layer in model.layers() {
        if kinds.iter().any(|kind| layer.name.ends_with(kind)) {
            let a = Matrix::from_fn(rank, layer.d_input, wave);
            let b = Matrix::from_fn(layer.d_output, rank, |i, k| wave(k + 3, i));
            let pair = LoraWeights::new(a, b, 1.5).unwrap();
            adapter.layers.insert(layer.name.clone(), pair);
        }
    }
    adapter
}

/// The model with an update added to its dense weights.
fn summed(model: &Model, adapters: &[(&LoraAdapter, f32)]) -> Model {
    let mut whole = model.clone();
    for (lora, scale) in adapters {
        let adapter = Adapter::from_lora(&whole, lora, "made").unwrap();
        whole = whole
            .with_adapter(&adapter, *scale)
            .unwrap()
            .merged()
            .unwrap();
    }
    whole
}

#[test]
fn adapters_are_chosen_scaled_and_put_together_for_a_session() {
    let model = model(json!({}));
    let (one, two) = (
        lora(&model, 3, 0.2, &["q_proj", "down_proj"]),
        lora(&model, 5, 1.1, &["q_proj", "v_proj", "up_proj"]),
    );
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter");
    one.write(&path, &PeftOptions::for_model(model.config()))
        .unwrap();
    let first = Adapter::open(&model, &path).unwrap();
    let second = Adapter::from_lora(&model, &two, "made").unwrap();
    assert_eq!((first.max_rank(), first.layers().len()), (3, 4));
    // The same from llama.cpp's file.
    let path = folder.path().join("lora.gguf");
    one.write_gguf(&path, model.config(), GgufType::F32, false)
        .unwrap();
    let read = LoraAdapter::open_gguf(&path, model.config()).unwrap();
    assert_eq!(read.layers.len(), one.layers.len());
    for (name, pair) in &one.layers {
        let found = read.layers[name].delta();
        close(found.as_slice(), pair.delta().as_slice());
    }
    assert_eq!(Adapter::open(&model, &path).unwrap().max_rank(), 3);
    let other = HfConfig::from_json(
        json!({"model_type": "qwen2", "vocab_size": 19, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1})
        .as_object()
        .unwrap()
        .clone(),
    )
    .unwrap();
    let error = LoraAdapter::open_gguf(&path, &other)
        .unwrap_err()
        .to_string();
    assert!(error.contains("general.architecture"), "{error}");
    let prompt = tokens(20);
    let session_of = |model: &Model| session(model);
    let mut session = session_of(&model);
    let plain = last(&mut session, &prompt);
    for chosen in [
        vec![(first.clone(), 1.0)],
        vec![(second.clone(), -0.5)],
        vec![(first.clone(), 0.75), (second.clone(), 1.25)],
        vec![],
    ] {
        // Not while it holds tokens.
        let changed = session.set_adapters(&chosen);
        assert!(matches!(changed, Err(Error::InvalidState { .. })));
        session.reset();
        session.set_adapters(&chosen).unwrap();
        let found = last(&mut session, &prompt);
        let parts: Vec<(&LoraAdapter, f32)> = chosen
            .iter()
            .map(|(adapter, scale)| (if adapter.same(&first) { &one } else { &two }, *scale))
            .collect();
        let expected = last(&mut session_of(&summed(&model, &parts)), &prompt);
        close(&found, &expected);
        assert_eq!(found == plain, chosen.is_empty());
    }
    // In one batch with a session that has none.
    let (mut with, mut without) = (session_of(&model), session_of(&model));
    with.set_adapters(&[(first.clone(), 1.0)]).unwrap();
    let (mut a, mut b) = (vec![0.0; 19], vec![0.0; 19]);
    decode_steps(&mut [
        Step {
            session: &mut with,
            tokens: &prompt,
            logits: &mut a,
        },
        Step {
            session: &mut without,
            tokens: &prompt,
            logits: &mut b,
        },
    ])
    .unwrap();
    assert_eq!(b, plain);
    close(
        &a,
        &last(&mut session_of(&summed(&model, &[(&one, 1.0)])), &prompt),
    );
    // A state belongs to its adapters.
    let state = with.state().unwrap();
    assert!(without.restore(&state).is_err());
    // As a part of the model, also in a bundle and in another format.
    let path = folder.path().join("model.elora");
    let attached = model.with_adapter(&first, 1.0).unwrap();
    attached
        .with_format(WeightFormat::F32)
        .unwrap()
        .save(&path, false)
        .unwrap();
    let opened = Model::open(&path, &ModelOptions::default()).unwrap();
    close(&last(&mut session_of(&opened), &prompt), &a);
    let both = opened.with_adapter(&second, 1.0).unwrap();
    let expected = summed(&model, &[(&one, 1.0), (&two, 1.0)]);
    close(
        &last(&mut session_of(&both), &prompt),
        &last(&mut session_of(&expected), &prompt),
    );
}

#[test]
fn mutated_adapters_are_errors_or_numbers() {
    let (model, folder) = (model(json!({})), tempfile::tempdir().unwrap());
    let path = folder.path().join("lora.gguf");
    let whole = lora(&model, 2, 0.4, &["q_proj", "up_proj"]);
    whole
        .write_gguf(&path, model.config(), GgufType::F16, false)
        .unwrap();
    assert!(damaged(&model, &path, &path));
    let (folder, kept) = (folder.path().join("peft"), PeftOptions::default());
    whole.write(&folder, &kept).unwrap();
    assert!(damaged(
        &model,
        &folder,
        &folder.join("adapter_model.safetensors")
    ));
}

/// Damages a file of an adapter again and again. Returns whether some were opened and others not.
fn damaged(model: &Model, adapter: &Path, file: &Path) -> bool {
    let bytes = std::fs::read(file).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let (mut opened, mut refused) = (0, 0);
    for _ in 0..rounds(400) {
        let mut bad = bytes.clone();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..bad.len());
            bad[at] = rng.random();
        }
        if rng.random::<f64>() < 0.1 {
            bad.truncate(rng.random_range(0..bad.len()));
        }
        std::fs::write(file, &bad).unwrap();
        match Adapter::open(model, adapter) {
            Ok(adapter) => {
                opened += 1;
                let mut session = session(model);
                if session.set_adapters(&[(adapter, 0.7)]).is_ok() {
                    let _ = session.decode(&[1, 2, 3], None);
                }
            }
            Err(_) => refused += 1,
        }
    }
    opened > 20 && refused > 20
}

#[test]
fn mutated_states_are_refused_or_restored() {
    let mut rng = ChaCha8Rng::seed_from_u64(10);
    for model in [model(json!({})), mixed(70, 1000)] {
        let mut first = session(&model);
        first.decode(&tokens(130), None).unwrap();
        let state = first.state().unwrap();
        let mut other = session(&model);
        let mut restored = 0;
        for _ in 0..rounds(1000) {
            let mut bad = state.clone();
            for _ in 0..rng.random_range(1..4) {
                // The numbers before the tokens have most of the rules.
                let most = if rng.random() { 72 } else { bad.len() - 4 };
                let at = rng.random_range(12..most);
                bad[at] = match rng.random_range(0..3) {
                    0 => rng.random(),
                    1 => 0xff,
                    _ => bad[at] ^ (1 << rng.random_range(0..8)),
                };
            }
            if rng.random_bool(0.1) {
                bad.truncate(rng.random_range(4..bad.len()));
            }
            // Whoever changes a state can write the right checksum.
            let end = bad.len() - 4;
            let checksum = crc32fast::hash(&bad[..end]);
            bad[end..].copy_from_slice(&checksum.to_ne_bytes());
            restored += usize::from(other.restore(&bad).is_ok());
            let _ = other.decode(&[4, 5], None);
            other.truncate(other.position() / 2);
            let _ = other.decode(&[6], None);
        }
        assert!(restored > 20, "{restored}");
        other.restore(&state).unwrap();
        assert_eq!(last(&mut other, &[4]), last(&mut first.copy(), &[4]));
    }
}

#[test]
fn adapters_of_other_models_are_refused() {
    let (model, wide) = (model(json!({})), model(json!({"intermediate_size": 40})));
    let lora = lora(&wide, 2, 0.0, &["up_proj"]);
    assert!(Adapter::from_lora(&model, &lora, "made").is_err());
    let adapter = Adapter::from_lora(&wide, &lora, "made").unwrap();
    let chosen = [(adapter.clone(), 1.0)];
    let result = session(&model).set_adapters(&chosen);
    assert!(matches!(result, Err(Error::TensorShape { .. })));
    assert!(model.with_adapter(&adapter, 1.0).is_err());
    let result = session(&wide).set_adapters(&[(adapter.clone(), f32::NAN)]);
    assert!(matches!(result, Err(Error::InvalidArgument { .. })));
    let sparse = LoraAdapter {
        sparse: true,
        ..lora
    };
    let error = Adapter::from_lora(&wide, &sparse, "made").unwrap_err();
    assert!(error.to_string().contains("sparse_adapter"), "{error}");
}
