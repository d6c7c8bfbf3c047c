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
        (8, json!({"bias": "all"}), None, "bias"),
        (8, json!({"use_dora": true}), None, "use_dora"),
        (8, json!({"fan_in_fan_out": true}), None, "fan_in_fan_out"),
        (
            8,
            json!({"modules_to_save": ["lm_head"]}),
            None,
            "modules_to_save",
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
        (
            8,
            json!({}),
            Some("base_model.model.lm_head.weight"),
            "modules_to_save",
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
