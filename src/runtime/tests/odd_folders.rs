//! Tests of folders whose config and weights do not agree, through [`HfConfig::fitted`] and the
//! runtime.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::io::tensors::write_safetensors;
use crate::io::{Checkpoint, DType, HfConfig, HostTensor};
use crate::runtime::{Model, ModelOptions};

fn raw() -> Value {
    json!({"model_type": "llama", "vocab_size": 31, "hidden_size": 12, "intermediate_size": 20,
        "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "tie_word_embeddings": true})
}

type Tensors = Vec<HostTensor<'static>>;

fn tensor(name: &str, shape: &[usize], value: impl Fn(usize) -> f32) -> HostTensor<'static> {
    let values: Vec<f32> = (0..shape.iter().product()).map(value).collect();
    HostTensor::from_f32(name, DType::BF16, shape.to_vec(), values)
}

/// Writes a model in `folder`, with changes of its tensors.
fn write(folder: &Path, raw: &Value, file: &str, change: impl Fn(&mut Tensors)) {
    let config = HfConfig::from_json(self::raw().as_object().unwrap().clone()).unwrap();
    let mut tensors: Vec<HostTensor<'_>> = (config.arch().tensors().into_iter())
        .map(|(name, shape)| tensor(&name, &shape, |i| (i as f32 * 0.7).sin()))
        .collect();
    change(&mut tensors);
    write_safetensors(folder.join(file), tensors, &BTreeMap::new()).unwrap();
    fs::write(folder.join("config.json"), raw.to_string()).unwrap();
}

/// The fitted config of a model with such changes, if the runtime opens the model as well.
fn fit(raw: &Value, change: impl Fn(&mut Tensors)) -> Result<HfConfig> {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), raw, "model.safetensors", change);
    let config = HfConfig::open(folder.path())?.fitted(&Checkpoint::open(folder.path())?)?;
    let model = Model::open(folder.path(), &ModelOptions::default())?;
    assert_eq!(model.notices(), config.notices());
    Ok(config)
}

const HEAD: &str = "lm_head.weight";
const Q: &str = "model.layers.1.self_attn.q_proj";

#[test]
fn two_heads_are_untied_if_they_differ() {
    let head = |value: fn(usize) -> f32, dtype: DType| {
        move |tensors: &mut Tensors| {
            let values: Vec<f32> = (0..31 * 12).map(value).collect();
            tensors.push(HostTensor::from_f32(HEAD, dtype, vec![31, 12], values));
        }
    };
    let same = |i: usize| (i as f32 * 0.7).sin();
    let config = fit(&raw(), head(same, DType::BF16)).unwrap();
    assert!(config.tie_word_embeddings() && config.notices().is_empty());
    // The same numbers in another dtype.
    let rounded = |i: usize| half::bf16::from_f32((i as f32 * 0.7).sin()).to_f32();
    let config = fit(&raw(), head(rounded, DType::F32)).unwrap();
    assert!(config.tie_word_embeddings());
    let config = fit(&raw(), head(|i| (i as f32 * 0.3).cos(), DType::BF16)).unwrap();
    assert!(!config.tie_word_embeddings());
    assert!(config.notices()[0].contains(HEAD), "{:?}", config.notices());
    assert_eq!(config.raw()["tie_word_embeddings"], false);
    // Fitting again changes nothing more.
    assert_eq!(config.notices().len(), 1);
}

#[test]
fn tensors_that_the_config_does_not_ask_for_are_named() {
    let with = |names: &'static [&'static str], value: f32| {
        fit(&raw(), move |tensors| {
            tensors.extend(names.iter().map(|name| tensor(name, &[12], |_| value)));
        })
    };
    for names in [
        &["model.layers.1.self_attn.q_proj.bias"][..],
        &["model.layers.0.self_attn.q_norm.weight"],
        &["model.layers.0.self_attn.q_proj.weight_scale_inv"],
        &["lm_head.bias"],
        &["model.norm.bias"],
    ] {
        let error = with(names, 0.5).unwrap_err().to_string();
        assert!(
            error.contains(names[0]) && error.contains("1 tensor ("),
            "{error}"
        );
    }
    let zeros = &["model.layers.1.self_attn.q_proj.bias", "lm_head.bias"];
    assert!(with(zeros, 0.0).unwrap().notices().is_empty());
    let zeros = &["model.layers.0.self_attn.q_norm.weight"];
    assert!(with(zeros, 0.0).is_err());
    let buffers = &[
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.0.self_attn.k_scale",
    ];
    assert!(with(buffers, 0.5).unwrap().notices().is_empty());
    let others = &[
        "model.layers.2.self_attn.q_proj.weight",
        "vision_tower.a.weight",
        "vision_tower.b.weight",
        "score.weight",
    ];
    let config = with(others, 0.5).unwrap();
    let [notice] = config.notices() else {
        panic!("{:?}", config.notices());
    };
    for part in [
        "4 tensors",
        "`model.layers.2.self_attn.q_proj.weight`",
        "`score.weight`",
        "...",
    ] {
        assert!(notice.contains(part), "{notice}");
    }
    // What the config does ask for is applied.
    let mut biased = raw();
    biased["attention_bias"] = true.into();
    let missing = fit(&biased, |_| {}).unwrap_err();
    assert!(matches!(missing, Error::MissingTensor { .. }));
}

#[test]
fn stale_quantization_configs_are_told_and_not_written() {
    for settings in [
        json!({"quant_method": "bitsandbytes", "load_in_4bit": true}),
        json!({"quant_method": "fp8"}),
        json!({"quant_method": "gptq", "bits": 4, "group_size": 4}),
        json!({"quant_method": "gptq", "bits": 5, "group_size": 4}),
    ] {
        let mut raw = raw();
        raw["quantization_config"] = settings.clone();
        let config = fit(&raw, |_| {}).unwrap();
        assert!(config.quantization().is_none());
        assert!(config.raw().get("quantization_config").is_none());
        assert!(
            config.notices()[0].contains("quantization_config"),
            "{settings}"
        );
        // It is not stale if a layer is not stored as plain numbers.
        let error = fit(&raw, |tensors| {
            tensors.retain(|tensor| tensor.name() != format!("{Q}.weight"));
            tensors.push(tensor(&format!("{Q}.weight"), &[72, 1], |_| 1.0));
        });
        assert!(error.is_err(), "{settings}");
    }
    let mut raw = raw();
    raw["quantization_config"] = json!({"quant_method": "bitsandbytes"});
    let error = HfConfig::from_json(raw.as_object().unwrap().clone()).unwrap_err();
    assert!(error.to_string().contains("bitsandbytes"), "{error}");
    let error = fit(&raw, |tensors| {
        tensors.retain(|tensor| tensor.name() != format!("{Q}.weight"))
    })
    .unwrap_err();
    assert!(error.to_string().contains("bitsandbytes"), "{error}");
}

#[test]
fn numbers_that_are_not_finite_are_refused_at_their_first_use() {
    for name in [format!("{Q}.weight"), "model.embed_tokens.weight".into()] {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for mmap in [true, false] {
                let folder = tempfile::tempdir().unwrap();
                write(folder.path(), &raw(), "model.safetensors", |_| {});
                // What writes files refuses such numbers.
                let path = folder.path().join("model.safetensors");
                let offset = Checkpoint::open(&path).unwrap().offset(&name).unwrap();
                let mut bytes = fs::read(&path).unwrap();
                let number = half::bf16::from_f32(value).to_le_bytes();
                bytes[offset + 280..offset + 282].copy_from_slice(&number);
                fs::write(&path, bytes).unwrap();
                let options = ModelOptions::default().with_mmap(mmap);
                let model = Model::open(folder.path(), &options).unwrap();
                let config = crate::runtime::SessionConfig::default();
                let mut session = crate::runtime::Session::new(&model, &config).unwrap();
                let used = session.decode(&[3], None).err();
                let saved = model.save(folder.path().join("x.elora"), false).err();
                let refused = |error: Option<Error>| match error {
                    Some(Error::NotFinite { tensor, index, .. }) => (tensor, index),
                    other => panic!("{other:?}"),
                };
                assert_eq!(refused(used), (name.clone(), 140));
                assert_eq!(refused(saved), (name.clone(), 140));
                let model = Model::open(
                    folder.path(),
                    &options.with_verify(crate::runtime::Verify::OnOpen),
                );
                assert_eq!(refused(model.err()), (name.clone(), 140));
            }
        }
    }
}

#[test]
fn other_names_of_files_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    write(path, &raw(), "gptq_model-4bit-32g.safetensors", |_| {});
    Checkpoint::open(path).unwrap();
    fs::copy(
        path.join("gptq_model-4bit-32g.safetensors"),
        path.join("adapter_model.safetensors"),
    )
    .unwrap();
    Checkpoint::open(path).unwrap();
    // Two files, of which none is named.
    fs::copy(
        path.join("adapter_model.safetensors"),
        path.join("other.safetensors"),
    )
    .unwrap();
    assert!(Checkpoint::open(path).is_err());
    let settings = json!({"bits": 4, "group_size": 4, "model_file_base_name": "other"});
    fs::write(path.join("quantize_config.json"), settings.to_string()).unwrap();
    assert!(
        Checkpoint::open(path)
            .unwrap()
            .path()
            .ends_with("other.safetensors")
    );
    // A pointer of Git LFS in place of any file.
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
    for file in [
        "other.safetensors",
        "config.json",
        "tokenizer.json",
        "model.gguf",
    ] {
        let kept = fs::read(path.join(file)).ok();
        fs::write(path.join(file), pointer).unwrap();
        let opened = if file.ends_with("gguf") {
            path.join(file)
        } else {
            path.into()
        };
        let error = Model::open(opened, &ModelOptions::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains("Git LFS") && error.contains(file), "{error}");
        match kept {
            Some(bytes) => fs::write(path.join(file), bytes).unwrap(),
            None => fs::remove_file(path.join(file)).unwrap(),
        }
    }
    // A byte order mark.
    let text = format!("\u{feff}{}", raw());
    fs::write(path.join("config.json"), text).unwrap();
    Model::open(path, &ModelOptions::default()).unwrap();
}
