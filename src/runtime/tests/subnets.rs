//! Sessions whose subnets differ in one pass, and subnets with weights of their own.

use serde_json::json;

use super::engine::{last, lora, session};
use super::{close, model, tokens};
use crate::error::Error;
use crate::format::WeightFormat;
use crate::linalg::Matrix;
use crate::runtime::{Adapter, Model, ModelOptions, Session, Step, decode_batch, decode_steps};

const INT4: WeightFormat = WeightFormat::Int {
    bits: 4,
    group_size: Some(8),
    symmetric: false,
};

/// A model with adapters of rank 6 on most layers.
fn adapted() -> Model {
    let model = model(json!({}));
    let own = lora(&model, 6, 0.3, &["q_proj", "v_proj", "o_proj", "up_proj"]);
    let adapter = Adapter::from_lora(&model, &own, "made").unwrap();
    model.with_adapter(&adapter, 1.0).unwrap()
}

/// Ranks of a subnet: each layer has at most `most`, and every third one less.
fn ranks(model: &Model, most: usize) -> Vec<u32> {
    let layers = model.layers().iter().enumerate();
    layers
        .map(|(at, layer)| {
            layer
                .max_rank
                .min(most - most.min(usize::from(at % 3 == 0))) as u32
        })
        .collect()
}

#[test]
fn sessions_with_other_ranks_and_adapters_share_a_pass() {
    for format in [WeightFormat::F32, INT4, WeightFormat::SparseF16] {
        let model = adapted().with_format(format).unwrap();
        let first = lora(&model, 3, 0.9, &["q_proj", "down_proj"]);
        let first = Adapter::from_lora(&model, &first, "made").unwrap();
        // The same settings are apart in the list, and some come back later.
        let settings = [
            (6, 0.0),
            (2, 0.0),
            (6, 0.0),
            (0, 0.0),
            (6, 0.5),
            (2, 1.5),
            (6, 0.5),
        ];
        let new_session = |(rank, scale): (usize, f32)| {
            let mut session = session(&model);
            session.set_ranks(&ranks(&model, rank)).unwrap();
            if scale != 0.0 {
                session.set_adapters(&[(first.clone(), scale)]).unwrap();
            }
            session
        };
        let mut alone = settings.map(new_session);
        let mut together = settings.map(new_session);
        let all = tokens(400);
        for lens in [[1; 7], [3, 1, 70, 1, 2, 130, 1], [1, 1, 1, 5, 1, 1, 1]] {
            let rows = [1, 1, 1, 0, 2, 1, 1];
            let rows: Vec<usize> = rows.iter().zip(lens).map(|(n, len)| len.min(*n)).collect();
            let mut found: Vec<Vec<f32>> = rows.iter().map(|n| vec![f32::NAN; n * 19]).collect();
            let start: Vec<usize> = alone.iter().map(Session::position).collect();
            let mut steps = Vec::new();
            for (at, (session, logits)) in together.iter_mut().zip(&mut found).enumerate() {
                let tokens = &all[start[at]..start[at] + lens[at]];
                steps.push(Step {
                    session,
                    tokens,
                    logits,
                });
            }
            decode_steps(&mut steps).unwrap();
            for (at, session) in alone.iter_mut().enumerate() {
                let new = &all[start[at]..start[at] + lens[at]];
                let mut logits = vec![f32::NAN; new.len() * 19];
                session.decode_all(new, &mut logits).unwrap();
                close(&found[at], &logits[logits.len() - rows[at] * 19..]);
            }
            assert!(
                found[0][..19] != found[1][..19],
                "the settings compute the same"
            );
        }
        // A batch of single tokens is still of one setting.
        let (one, others) = together.split_at_mut(1);
        let mut logits = vec![0.0; 38];
        let result = decode_batch(&mut [&mut one[0], &mut others[0]], &[1, 2], &mut logits);
        assert!(matches!(result, Err(Error::InvalidState { .. })));
    }
}

/// The model with other weights in some layers.
fn changed(model: &Model, phase: f32, layers: &[&str], format: WeightFormat) -> Model {
    Model::from_matrices(
        model.config(),
        |name, [rows, cols]| {
            let layer = name.strip_suffix(".weight").unwrap_or(name);
            let index = model.layer_index(layer);
            let mut matrix = match index {
                Some(index) => model.weight(index)?.to_matrix(),
                None => model.embedding()?.to_matrix(),
            };
            if layers.iter().any(|end| layer.ends_with(end)) {
                matrix = Matrix::from_fn(rows, cols, |i, j| {
                    matrix.row(i)[j] + 0.1 * ((i * 3 + j) as f32 + phase).sin()
                });
            }
            crate::format::StoredMatrix::from_matrix(&matrix, WeightFormat::F32)
        },
        |name, _| Ok(model.norm(name).unwrap().to_vec()),
    )
    .unwrap()
    .with_format(format)
    .unwrap()
    .with_n_threads(1)
    .unwrap()
}

#[test]
fn merged_subnets_are_held_in_one_bundle() {
    for (tied, format) in [(false, INT4), (true, WeightFormat::SparseF16)] {
        let base = model(json!({"tie_word_embeddings": tied}));
        let base = base.with_format(format).unwrap();
        let plain = |phase, layers: &[&str]| changed(&base, phase, layers, format);
        let merged = [
            plain(0.0, &[]),
            plain(1.0, &["q_proj", "down_proj"]),
            plain(2.0, &["q_proj", "gate_proj"]),
            plain(1.0, &["q_proj", "down_proj"]),
        ];
        let names = ["largest", "middle", "small", "again"];
        let mut whole = merged[0].clone();
        for (name, model) in names.iter().zip(&merged) {
            whole = whole.with_subnet(*name, model).unwrap();
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("subnets.elora");
        whole.save(&path, false).unwrap();
        let opened = Model::open(&path, &ModelOptions::default().with_n_threads(1)).unwrap();
        opened.verify().unwrap();
        // Three weights of `q_proj`, two of two others, and one of all else.
        let added = |model: &Model| model.bytes() - merged[0].bytes();
        let bytes = |end: &str| -> usize {
            let layers = merged[0].layers().iter();
            layers
                .filter(|layer| layer.name.ends_with(end))
                .map(|layer| layer.bytes)
                .sum()
        };
        let expected = 2 * bytes("q_proj") + bytes("down_proj") + bytes("gate_proj");
        assert!((added(&opened) as isize - expected as isize).unsigned_abs() < 200);
        assert_eq!(added(&opened), added(&whole));
        let prompt = tokens(30);
        for model in [&whole, &opened] {
            assert_eq!(model.subnets().len(), 5);
            let mut all: Vec<Session> = Vec::new();
            for (name, merged) in names.iter().zip(&merged) {
                let mut switched = session(model);
                switched.set_subnet_named(name).unwrap();
                let expected = last(&mut session(merged), &prompt);
                assert_eq!(last(&mut switched, &prompt), expected, "{name}");
                assert!(switched.set_subnet(0).is_err() || *name == "largest");
                // Alone, and as another format.
                let subnet = model.subnet_index(name).unwrap();
                let cut = model.extract(subnet).unwrap();
                assert_eq!(cut.subnets().len(), 1);
                assert_eq!(last(&mut session(&cut), &prompt), expected);
                let floats = model.with_format(WeightFormat::F32).unwrap();
                let mut other = session(&floats);
                other.set_subnet(subnet).unwrap();
                let plain = merged.with_format(WeightFormat::F32).unwrap();
                assert_eq!(
                    last(&mut other, &prompt),
                    last(&mut session(&plain), &prompt)
                );
                // One layer.
                let layer = model.layer_index("model.layers.1.mlp.down_proj").unwrap();
                let x: Vec<f32> = (0..24).map(|i| (i as f32 * 0.7).cos()).collect();
                let apply = |model: &Model, subnet| {
                    let mut y = vec![0.0; 16];
                    let linear = model.linear(layer, subnet).unwrap();
                    linear.forward(1, &x, 24, &mut y, 16, None).unwrap();
                    y
                };
                assert_eq!(apply(model, subnet), apply(merged, 0));
                all.push(switched);
            }
            // All of them in one call.
            let mut found = vec![vec![0.0; 19]; 4];
            let mut expected = Vec::new();
            for (name, merged) in names.iter().zip(&merged) {
                let mut session = session(merged);
                session.decode(&prompt, None).unwrap();
                expected.push((name, last(&mut session, &[3, 4])));
            }
            let steps = all.iter_mut().zip(&mut found);
            let mut steps: Vec<Step<'_>> = steps
                .map(|(session, logits)| Step {
                    session,
                    tokens: &[3, 4],
                    logits,
                })
                .collect();
            decode_steps(&mut steps).unwrap();
            for (found, (_, expected)) in found.iter().zip(&expected) {
                close(found, expected);
            }
            // A state belongs to its subnet.
            let state = all[1].state().unwrap();
            let mut other = session(model);
            other.set_subnet_named("small").unwrap();
            assert!(other.restore(&state).is_err());
            other.set_subnet_named("middle").unwrap();
            other.restore(&state).unwrap();
        }
        assert!(whole.with_subnet("small", &merged[0]).is_err());
        assert!(whole.with_subnet("", &merged[0]).is_err());
        let other = model(json!({"tie_word_embeddings": tied, "rms_norm_eps": 1e-3}));
        let other = other.with_format(format).unwrap();
        let error = whole.with_subnet("other", &other).unwrap_err().to_string();
        assert!(error.contains("architecture"), "{error}");
    }
    let plain = model(json!({}));
    let error = plain.with_subnet("x", &adapted()).unwrap_err().to_string();
    assert!(error.contains("an adapter of"), "{error}");
}

/// Times of a step of eight sessions with four settings, in one call and in a call for each setting
/// (what they took before they shared a pass): `cargo test --release --no-default-features --lib --
/// --ignored --nocapture times_of_mixed`.
#[test]
#[ignore = "a measurement"]
fn times_of_mixed_batches() {
    let big = model(
        json!({"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 8,
        "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2000}),
    );
    let layers = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"];
    let own = lora(&big, 32, 0.3, &layers);
    let adapter = Adapter::from_lora(&big, &own, "made").unwrap();
    let int4 = WeightFormat::Int {
        bits: 4,
        group_size: Some(128),
        symmetric: false,
    };
    let model = big.with_adapter(&adapter, 1.0).unwrap();
    let model = model.with_format(int4).unwrap().with_n_threads(0).unwrap();
    let settings = [32, 24, 16, 0];
    let sessions = |same: bool| -> Vec<Session> {
        let all = (0..8).map(|at| {
            let mut session = session(&model);
            let rank = if same { 32 } else { settings[at % 4] };
            session.set_ranks(&ranks(&model, rank)).unwrap();
            session.decode(&[1, 2, 3], None).unwrap();
            session
        });
        all.collect()
    };
    let time = |what: &str, same: bool, apart: bool| {
        let mut all = sessions(same);
        let (mut best, n) = (f64::INFINITY, 8);
        for _ in 0..9 {
            let start = std::time::Instant::now();
            for _ in 0..n {
                let mut logits = vec![vec![0.0; 2000]; 8];
                let mut groups: Vec<Vec<Step<'_>>> =
                    vec![Vec::new(), Vec::new(), Vec::new(), Vec::new()];
                for (at, (session, logits)) in all.iter_mut().zip(&mut logits).enumerate() {
                    let group = if apart { at % 4 } else { 0 };
                    groups[group].push(Step {
                        session,
                        tokens: &[7],
                        logits,
                    });
                }
                for group in groups.iter_mut().filter(|group| !group.is_empty()) {
                    decode_steps(group).unwrap();
                }
            }
            best = best.min(start.elapsed().as_secs_f64() * 1e3 / f64::from(n));
        }
        println!("{what}: {best:.2} ms a step");
    };
    time("eight sessions of one setting", true, false);
    time("four settings, together", false, false);
    time("four settings, a pass each", false, true);
}
