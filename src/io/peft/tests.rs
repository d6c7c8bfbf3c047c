use std::path::Path;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::*;
use crate::io::testing::{pick, shared};
use crate::io::{Checkpoint, DType, HostTensor, tensors::write_safetensors};

fn random(rng: &mut ChaCha8Rng, rows: usize, cols: usize) -> Matrix {
    Matrix::from_fn(rows, cols, |_, _| rng.random_range(-1.0f32..1.0))
}

/// An adapter with mixed ranks and scales and odd sizes.
fn mixed() -> LoraAdapter {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut adapter = LoraAdapter {
        base_model: Some("some/base".into()),
        ..Default::default()
    };
    for (layer, rank, scale) in [
        ("m.0.q_proj", 5, 2.0),
        ("m.0.v_proj", 3, 2.0),
        ("m.1.q_proj", 2, 0.3),
        ("m.1.v_proj", 5, 1.7),
    ] {
        let (a, b) = (random(&mut rng, rank, 17), random(&mut rng, 11, rank));
        adapter
            .layers
            .insert(layer.into(), LoraWeights::new(a, b, scale).unwrap());
    }
    adapter
}

fn config(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join("adapter_config.json")).unwrap()).unwrap()
}

#[test]
fn mixed_ranks_and_scales_round_trip_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter");
    let adapter = mixed();
    adapter.write(&path, &PeftOptions::default()).unwrap();
    assert_eq!(LoraAdapter::open(&path).unwrap(), adapter);
    let written = config(&path);
    assert_eq!(written["r"], 5);
    assert_eq!(written["lora_alpha"], 10);
    assert_eq!(
        written["rank_pattern"],
        json!({"m.0.v_proj": 3, "m.1.q_proj": 2})
    );
    // PEFT computes alpha / rank in double precision.
    for (layer, weights) in &adapter.layers {
        let alpha = written["alpha_pattern"]
            .get(layer)
            .unwrap_or(&written["lora_alpha"])
            .as_f64()
            .unwrap();
        let rank = written["rank_pattern"]
            .get(layer)
            .unwrap_or(&written["r"])
            .as_f64()
            .unwrap();
        assert_eq!((alpha / rank) as f32, weights.scale(), "{layer}");
    }
    assert_eq!(
        written["target_modules"],
        json!(["m.0.q_proj", "m.0.v_proj", "m.1.q_proj", "m.1.v_proj"])
    );
}

#[test]
fn one_scale_follows_the_elastic_rule() {
    let folder = tempfile::tempdir().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let mut adapter = LoraAdapter::default();
    for (layer, rank) in [("a.q_proj", 32), ("b.q_proj", 24), ("c.q_proj", 16)] {
        let weights =
            LoraWeights::new(random(&mut rng, rank, 9), random(&mut rng, 7, rank), 2.0).unwrap();
        adapter.layers.insert(layer.into(), weights);
    }
    let model_layers: Vec<String> = ["a.q_proj", "b.q_proj", "c.q_proj", "c.k_proj"]
        .map(String::from)
        .into();
    let options = PeftOptions {
        model_layers: model_layers.clone(),
        ..Default::default()
    };
    adapter.write(folder.path(), &options).unwrap();
    let written = config(folder.path());
    assert_eq!(
        (&written["r"], &written["lora_alpha"]),
        (&json!(32), &json!(64))
    );
    assert_eq!(
        written["rank_pattern"],
        json!({"b.q_proj": 24, "c.q_proj": 16})
    );
    assert_eq!(
        written["alpha_pattern"],
        json!({"b.q_proj": 48, "c.q_proj": 32})
    );
    assert_eq!(written["target_modules"], json!(["q_proj"]));

    // A second write is refused unless requested. Padding preserves every product.
    assert!(matches!(
        adapter.write(folder.path(), &options),
        Err(Error::InvalidFile { .. })
    ));
    let options = PeftOptions {
        pad_to_max_rank: true,
        overwrite: true,
        ..options
    };
    adapter.write(folder.path(), &options).unwrap();
    let written = config(folder.path());
    assert_eq!(
        (&written["rank_pattern"], &written["alpha_pattern"]),
        (&json!({}), &json!({}))
    );
    let padded = LoraAdapter::open(folder.path()).unwrap();
    for (layer, weights) in &adapter.layers {
        assert_eq!(padded.layers[layer].rank(), 32);
        assert_eq!(padded.layers[layer].delta(), weights.delta());
    }
}

#[test]
fn paths_that_end_in_each_other_keep_their_own_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut adapter = LoraAdapter::default();
    for (layer, rank, scale) in [("proj", 2, 0.5), ("x.proj", 6, 2.0), ("y.x.proj", 3, 2.0)] {
        let weights =
            LoraWeights::new(random(&mut rng, rank, 9), random(&mut rng, 7, rank), scale).unwrap();
        adapter.layers.insert(layer.into(), weights);
    }
    adapter
        .write(folder.path(), &PeftOptions::default())
        .unwrap();
    assert_eq!(LoraAdapter::open(folder.path()).unwrap(), adapter);
}

#[test]
fn f16_is_half_the_bytes_and_close() {
    let folder = tempfile::tempdir().unwrap();
    let adapter = mixed();
    adapter
        .write(
            folder.path(),
            &PeftOptions {
                dtype: DType::F16,
                ..Default::default()
            },
        )
        .unwrap();
    let back = LoraAdapter::open(folder.path()).unwrap();
    for (layer, weights) in &adapter.layers {
        for (x, y) in weights
            .a()
            .as_slice()
            .iter()
            .zip(back.layers[layer].a().as_slice())
        {
            assert!((x - y).abs() <= 2f32.powi(-11), "{layer}: {x} {y}");
        }
        assert_eq!(back.layers[layer].scale(), weights.scale());
    }
}

/// Writes a folder with one pair of the given rank and a default config with these fields replaced.
fn hand_made(folder: &Path, rank: usize, changes: Value, extra: Option<&str>) {
    let mut config =
        json!({"peft_type": "LORA", "r": 8, "lora_alpha": 24, "bias": "none", "use_dora": false});
    for (k, v) in changes.as_object().unwrap() {
        config[k] = v.clone();
    }
    std::fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let (a, b) = (random(&mut rng, rank, 5), random(&mut rng, 7, rank));
    let mut tensors = vec![
        HostTensor::from_f32(
            "base_model.model.l.q_proj.lora_A.weight",
            DType::F32,
            [rank, 5],
            a.into_vec(),
        ),
        HostTensor::from_f32(
            "base_model.model.l.q_proj.lora_B.weight",
            DType::F32,
            [7, rank],
            b.into_vec(),
        ),
    ];
    if let Some(name) = extra {
        tensors.push(HostTensor::from_f32(name, DType::F32, [2], vec![0.5, 0.25]));
    }
    write_safetensors(
        folder.join("adapter_model.safetensors"),
        tensors,
        &BTreeMap::new(),
    )
    .unwrap();
}

#[test]
fn scales_follow_the_config() {
    let folder = tempfile::tempdir().unwrap();
    for (rank, changes, scale) in [
        (8, json!({}), 3.0),
        (
            8,
            json!({"use_rslora": true}),
            (24.0f64 / 8f64.sqrt()) as f32,
        ),
        // The authors' extraction: the tensors are cut and the config is unchanged.
        (3, json!({}), 3.0),
        (3, json!({"rank_pattern": {"q_proj": 3}}), 8.0),
        (
            3,
            json!({"rank_pattern": {"l.q_proj": 3}, "alpha_pattern": {".*q_proj": 1.5}}),
            0.5,
        ),
        (12, json!({"rank_pattern": {"[qv]_proj": 12}}), 2.0),
    ] {
        hand_made(folder.path(), rank, changes.clone(), None);
        let adapter = LoraAdapter::open(folder.path()).unwrap();
        assert_eq!(adapter.layers["l.q_proj"].scale(), scale, "{changes}");
    }
}

#[test]
fn what_cannot_be_read_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    for (rank, changes, extra, named) in [
        (8, json!({"peft_type": "LOHA"}), None, "LOHA"),
        (8, json!({"bias": "some"}), None, "bias"),
        (
            8,
            json!({"use_dora": true}),
            None,
            "q_proj.lora_magnitude_vector",
        ),
        (8, json!({"use_qalora": true}), None, "use_qalora"),
        (8, json!({"use_xlora": true}), None, "use_xlora"),
        (8, json!({"kasa_config": {"a": 1}}), None, "kasa_config"),
        (
            8,
            json!({"layer_replication": [[0, 1]]}),
            None,
            "layer_replication",
        ),
        (8, json!({"target_modules": ["k_proj"]}), None, "l.q_proj"),
        (
            3,
            json!({"init_lora_weights": "pissa", "target_modules": ["q_proj"]}),
            None,
            "l.q_proj",
        ),
        (
            8,
            json!({"init_lora_weights": 3}),
            None,
            "init_lora_weights",
        ),
        (
            8,
            json!({"init_lora_weights": "pissa", "sparse_adapter": true}),
            None,
            "init_lora_weights",
        ),
        (
            8,
            json!({"trainable_token_indices": [1, 2]}),
            Some("base_model.model.embed_tokens.token_adapter.trainable_tokens_delta"),
            "trainable_tokens_delta",
        ),
        (
            8,
            json!({}),
            Some("base_model.model.embed_tokens.token_adapter.trainable_tokens_delta"),
            "trainable_token_indices",
        ),
        (8, json!({"r": 0}), None, "`r`"),
        (8, json!({"r": -3}), None, "`r`"),
        (8, json!({"lora_alpha": 1e60}), None, "lora_alpha"),
        (8, json!({"lora_alpha": null}), None, "lora_alpha"),
        (9, json!({}), None, "l.q_proj"),
        (3, json!({"rank_pattern": {"q_proj": 4}}), None, "l.q_proj"),
        (
            3,
            json!({"rank_pattern": {"q_proj": 2.5}}),
            None,
            "rank_pattern",
        ),
        (
            8,
            json!({}),
            Some("base_model.model.l.q_proj.lora_magnitude_vector"),
            "DoRA",
        ),
        (
            8,
            json!({}),
            Some("base_model.model.e.lora_embedding_A"),
            "embedding",
        ),
        (8, json!({}), Some("something.else"), "something.else"),
        (
            8,
            json!({}),
            Some("base_model.model.l.k_proj.lora_A.weight"),
            "k_proj",
        ),
    ] {
        hand_made(folder.path(), rank, changes.clone(), extra);
        let error = LoraAdapter::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(named), "{changes} {extra:?}: {error}");
    }
    assert!(
        LoraAdapter::default()
            .write(folder.path(), &PeftOptions::default())
            .is_err()
    );
    assert!(LoraWeights::new(Matrix::zeros(2, 3), Matrix::zeros(3, 3), 1.0).is_err());
    assert!(LoraWeights::new(Matrix::zeros(2, 3), Matrix::zeros(3, 2), f32::NAN).is_err());
}

#[test]
fn mutated_configs_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    mixed()
        .write(folder.path(), &PeftOptions::default())
        .unwrap();
    let path = folder.path().join("adapter_config.json");
    let good = std::fs::read(&path).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut read = 0;
    for _ in 0..crate::io::testing::rounds(2000) {
        let mut bytes = good.clone();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..bytes.len());
            bytes[at] = if rng.random_bool(0.3) {
                rng.random()
            } else {
                pick(&mut rng, b"0123456789.(*+{}[]\\\",:e-")
            };
        }
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(adapter) = LoraAdapter::open(folder.path()) {
            read += 1;
            assert!(adapter.layers.values().all(|w| w.scale().is_finite()));
        }
    }
    assert!(read > 50, "{read}");
}

#[test]
fn an_adapter_that_peft_made() {
    let (Some(folder), Some(base)) = (
        shared("vectors/peft/q_v_r8"),
        shared("models/story-llama-0.6M"),
    ) else {
        return;
    };
    let adapter = LoraAdapter::open(&folder).unwrap();
    assert_eq!(adapter.layers.len(), 4);
    assert_eq!(adapter.base_model.as_deref(), Some("story-llama-0.6M"));
    adapter.check(&HfConfig::open(&base).unwrap()).unwrap();
    let layer = "model.layers.0.self_attn.q_proj";
    assert_eq!(
        (adapter.layers[layer].rank(), adapter.layers[layer].scale()),
        (8, 2.0)
    );
    let base = Checkpoint::open(&base)
        .unwrap()
        .load_matrix(&format!("{layer}.weight"), [128, 128])
        .unwrap();
    let reference = Checkpoint::open(folder.join("reference.safetensors")).unwrap();
    let merged = reference
        .load_matrix("merged_q_proj_l0", [128, 128])
        .unwrap();
    let delta = adapter.layers[layer].delta();
    for ((w, d), m) in base
        .as_slice()
        .iter()
        .zip(delta.as_slice())
        .zip(merged.as_slice())
    {
        assert!((w + d - m).abs() < 1e-6, "{w} + {d} != {m}");
    }
    let out = tempfile::tempdir().unwrap();
    adapter.write(out.path(), &PeftOptions::default()).unwrap();
    assert_eq!(LoraAdapter::open(out.path()).unwrap(), adapter);
}

/// Reads a folder of [`hand_made`].
fn read(rank: usize, changes: &Value, extra: Option<&str>) -> Result<LoraAdapter> {
    let folder = tempfile::tempdir().unwrap();
    hand_made(folder.path(), rank, changes.clone(), extra);
    LoraAdapter::open(folder.path())
}

#[test]
fn flags_without_matter_change_nothing() {
    let plain = read(8, &json!({}), None).unwrap();
    assert!(plain.changes.is_empty() && plain.notices().is_empty());
    for changes in [
        json!({"bias": "all"}),
        json!({"bias": "lora_only", "lora_bias": true}),
        json!({"fan_in_fan_out": true, "megatron_core": "megatron.core", "peft_version": "0.21"}),
        json!({"init_lora_weights": false}),
        json!({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}),
        json!({"init_lora_weights": "gaussian", "use_qalora": false, "qalora_group_size": 16}),
        json!({"init_lora_weights": "orthogonal", "runtime_config": {"x": 1}}),
        json!({"target_modules": ["q_proj", "v_proj"], "layer_replication": []}),
        json!({"target_modules": ".*q_proj", "exclude_modules": "x", "use_xlora": false}),
    ] {
        assert_eq!(read(8, &changes, None).unwrap(), plain, "{changes}");
    }
}

#[test]
fn what_is_not_used_is_told() {
    for (changes, extra, named) in [
        (json!({"colour": "red"}), None, "`colour`"),
        (json!({"modules_to_save": ["lm_head"]}), None, "`lm_head`"),
        (json!({"target_modules": "(?=q).*"}), None, "target_modules"),
    ] {
        let adapter = read(8, &changes, extra).unwrap();
        let [notice] = adapter.notices() else {
            panic!("{changes}: {:?}", adapter.notices());
        };
        assert!(notice.contains(named), "{notice}");
        assert_eq!(adapter.layers.len(), 1);
    }
}

#[test]
fn initializations_that_changed_the_base_follow_from_it_or_are_refused() {
    for (name, expected) in [("pissa", BaseInit::Pissa), ("olora", BaseInit::Olora)] {
        let adapter = read(8, &json!({"init_lora_weights": name}), None).unwrap();
        assert_eq!(adapter.changes.init, expected);
        let folder = tempfile::tempdir().unwrap();
        let error = adapter
            .write(folder.path().join("out"), &PeftOptions::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains(name) && error.contains("merge"), "{error}");
    }
    for name in ["pissa_niter_4", "corda", "loftq", "lora_ga", "something"] {
        let error = read(8, &json!({"init_lora_weights": name}), None).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("`init_lora_weights`") && error.contains(name),
            "{error}"
        );
        assert_eq!(
            error.contains("path_initial_model"),
            name != "something",
            "{error}"
        );
    }
}

/// Writes a folder with the given tensors, of small numbers, and a config.
fn with_tensors(tensors: &[(&str, &[usize])], changes: Value) -> Result<LoraAdapter> {
    let folder = tempfile::tempdir().unwrap();
    hand_made(folder.path(), 8, changes, None);
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let tensors = tensors.iter().map(|(name, shape)| {
        let n = shape.iter().product();
        let values: Vec<f32> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
        HostTensor::from_f32(*name, DType::F32, shape.to_vec(), values)
    });
    write_safetensors(
        folder.path().join("adapter_model.safetensors"),
        tensors.collect(),
        &BTreeMap::new(),
    )
    .unwrap();
    LoraAdapter::open(folder.path())
}

#[test]
fn keys_with_the_adapters_name_are_read_as_plain() {
    let names = |inserted: &str| {
        ["k_proj", "q_proj"].map(|layer| {
            ["A", "B"].map(|m| format!("base_model.model.l.{layer}.lora_{m}{inserted}.weight"))
        })
    };
    let open = |inserted: &str| {
        let names = names(inserted);
        let [[ka, kb], [qa, qb]] = &names;
        with_tensors(
            &[(ka, &[8, 5]), (kb, &[7, 8]), (qa, &[8, 5]), (qb, &[7, 8])],
            json!({"target_modules": ["q_proj"]}),
        )
        .unwrap()
    };
    let plain = open("");
    assert_eq!(open(".default"), plain);
    // The layer that the config does not name is left out, and a notice names it.
    assert_eq!(plain.layers.keys().collect::<Vec<_>>(), ["l.q_proj"]);
    assert!(
        plain.notices()[0].contains("`l.k_proj`"),
        "{:?}",
        plain.notices()
    );
}

#[test]
fn pairs_of_embedding_and_head_are_read_and_written() {
    let adapter = with_tensors(
        &[
            (
                "base_model.model.model.embed_tokens.lora_embedding_A",
                &[8, 19],
            ),
            (
                "base_model.model.model.embed_tokens.lora_embedding_B",
                &[5, 8],
            ),
            ("base_model.model.lm_head.lora_A.weight", &[8, 5]),
            ("base_model.model.lm_head.lora_B.weight", &[19, 8]),
        ],
        json!({"target_modules": ["embed_tokens", "lm_head"]}),
    )
    .unwrap();
    for module in ["model.embed_tokens", "lm_head"] {
        let pair = &adapter.layers[module];
        assert_eq!([pair.d_output(), pair.rank(), pair.d_input()], [19, 8, 5]);
    }
    let folder = tempfile::tempdir().unwrap();
    let options = PeftOptions::new().with_model_layers(vec!["l.q_proj".into()]);
    adapter.write(folder.path().join("a"), &options).unwrap();
    assert_eq!(LoraAdapter::open(folder.path().join("a")).unwrap(), adapter);
}

#[test]
fn a_module_that_is_stored_twice_must_be_the_same() {
    let names = [
        "base_model.model.lm_head.weight",
        "base_model.model.lm_head.modules_to_save.weight",
        "base_model.model.lm_head.original_module.weight",
    ];
    let saved = json!({"modules_to_save": ["lm_head"]});
    let two = with_tensors(&[(names[0], &[3, 5]), (names[2], &[3, 5])], saved.clone()).unwrap();
    let [stored, copy] =
        [&two.changes.tensors, &two.changes.copies].map(|of| &of["lm_head.weight"]);
    assert_ne!(stored, copy);
    let error = with_tensors(&[(names[0], &[3, 5]), (names[1], &[3, 5])], saved).unwrap_err();
    assert!(error.to_string().contains(names[1]), "{error}");
}

#[test]
fn magnitudes_are_the_norms_of_rows() {
    let pair = "base_model.model.l.q_proj.";
    let names = ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"];
    let [a, b, m] = names.map(|end| format!("{pair}{end}"));
    let open = |rows: usize, dora: bool| {
        with_tensors(
            &[(&a, &[8, 5]), (&b, &[7, 8]), (&m, &[rows])],
            json!({"use_dora": dora, "use_rslora": true}),
        )
    };
    assert!(open(7, false).unwrap_err().to_string().contains("use_dora"));
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let weight = random(&mut rng, 7, 5);
    let wrong = open(6, true).unwrap();
    let plain = &wrong.layers["l.q_proj"];
    assert!(
        wrong
            .changes
            .applied("l.q_proj", weight.clone(), plain)
            .is_err()
    );
    let adapter = open(7, true).unwrap();
    let pair = &adapter.layers["l.q_proj"];
    assert_eq!(pair.scale(), (24.0 / 8f64.sqrt()) as f32);
    let (base, scaled) = adapter
        .changes
        .applied("l.q_proj", weight.clone(), pair)
        .unwrap();
    for i in 0..7 {
        let sum = |base: &Matrix, pair: &LoraWeights| -> Vec<f32> {
            let delta = pair.delta();
            base.row(i)
                .iter()
                .zip(delta.row(i))
                .map(|(w, d)| w + d)
                .collect()
        };
        let (before, after) = (sum(&weight, pair), sum(&base, &scaled));
        let norm = |v: &[f32]| v.iter().map(|v| v * v).sum::<f32>().sqrt();
        let factor = adapter.changes.magnitudes["l.q_proj"][i] / norm(&before);
        for (before, after) in before.iter().zip(&after) {
            assert!((factor * before - after).abs() < 1e-5);
        }
    }
}
