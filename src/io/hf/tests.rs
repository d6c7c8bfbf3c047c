use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

use super::*;
use crate::arch::{Architecture, Family, RopeScaling};
use crate::error::{Error, Result};
use crate::io::testing::{pick, shared};
use crate::io::{Checkpoint, DType, HostTensor, tensors::write_safetensors};

fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 48, "intermediate_size": 100,
        "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 97,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "hidden_act": "silu",
        "bos_token_id": 1, "eos_token_id": [2, 7], "torch_dtype": "bfloat16", "unknown": {"kept": [1, null]}
    })
}

fn parse(value: &Value) -> Result<HfConfig> {
    HfConfig::from_json(value.as_object().unwrap().clone())
}

fn with(changes: Value) -> Value {
    let mut value = llama();
    for (k, v) in changes.as_object().unwrap() {
        value[k] = v.clone();
    }
    value
}

fn without(field: &str) -> Value {
    let mut value = llama();
    value.as_object_mut().unwrap().remove(field);
    value
}

#[test]
fn fields_and_layers_of_a_llama() {
    let config = parse(&llama()).unwrap();
    assert_eq!(config.family(), Family::Llama);
    assert_eq!((config.head_dim(), config.num_key_value_heads()), (8, 2));
    assert_eq!(
        (
            config.bos_token_id(),
            config.eos_token_ids(),
            config.pad_token_id()
        ),
        (Some(1), &[2, 7][..], None)
    );
    assert_eq!(
        (config.dtype(), config.rope_theta()),
        (Some(DType::BF16), 5e5)
    );
    assert_eq!(*config.rope_scaling(), RopeScaling::Default);
    assert!(
        !config.tie_word_embeddings()
            && config.arch().biased.is_empty()
            && config.sliding_window().is_none()
    );
    let layers = config.arch().linears();
    assert_eq!(layers.len(), 21);
    let shapes: Vec<_> = layers[7..14]
        .iter()
        .map(|l| (l.name.as_str(), l.d_output, l.d_input, l.bias))
        .collect();
    assert_eq!(
        shapes,
        [
            ("model.layers.1.self_attn.q_proj", 48, 48, false),
            ("model.layers.1.self_attn.k_proj", 16, 48, false),
            ("model.layers.1.self_attn.v_proj", 16, 48, false),
            ("model.layers.1.self_attn.o_proj", 48, 48, false),
            ("model.layers.1.mlp.gate_proj", 100, 48, false),
            ("model.layers.1.mlp.up_proj", 100, 48, false),
            ("model.layers.1.mlp.down_proj", 48, 100, false),
        ]
    );
    assert_eq!(config.arch().tensors().len(), 1 + 3 * 9 + 2);
}

#[test]
fn both_spellings_mean_the_same() {
    let llama3 = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_type": "llama3"});
    let old = parse(&with(json!({"rope_scaling": llama3}))).unwrap();
    let mut parameters = llama3.clone();
    parameters["rope_theta"] = 5e5.into();
    let mut value = without("rope_theta");
    value["rope_parameters"] = parameters;
    value["dtype"] = "bfloat16".into();
    value.as_object_mut().unwrap().remove("torch_dtype");
    let new = parse(&value).unwrap();
    assert_eq!(
        (old.rope_theta(), old.rope_scaling(), old.dtype()),
        (new.rope_theta(), new.rope_scaling(), new.dtype())
    );
    assert!(matches!(
        new.rope_scaling(),
        RopeScaling::Llama3 {
            factor: 8.0,
            original_max_position_embeddings: 32,
            ..
        }
    ));
    // Each spelling is written back, and both if the input had both.
    assert_eq!(new.to_json_with(DType::F16, false)["dtype"], "float16");
    assert!(
        new.to_json_with(DType::F16, false)
            .get("torch_dtype")
            .is_none()
    );
    let both = parse(&with(json!({"dtype": "bfloat16"})))
        .unwrap()
        .to_json_with(DType::F32, true);
    assert_eq!(
        (&both["dtype"], &both["torch_dtype"]),
        (&json!("float32"), &json!("float32"))
    );
    assert_eq!(
        (&both["tie_word_embeddings"], &both["unknown"]),
        (&json!(true), &llama()["unknown"])
    );
    let none = parse(&without("torch_dtype")).unwrap();
    assert_eq!(none.dtype(), None);
    assert_eq!(
        none.to_json_with(DType::F16, false)["torch_dtype"],
        "float16"
    );

    let linear = parse(&with(
        json!({"rope_scaling": {"type": "linear", "factor": 2}}),
    ))
    .unwrap();
    assert_eq!(*linear.rope_scaling(), RopeScaling::Linear { factor: 2.0 });
    // Files whose spellings contradict each other are refused.
    for changes in [
        json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        json!({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}}),
    ] {
        assert!(matches!(
            parse(&with(changes)),
            Err(Error::InvalidConfig { .. })
        ));
    }
}

#[test]
fn mistral_has_its_own_defaults() {
    let mut value = with(
        json!({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "head_dim": 10,
        "attention_bias": true}),
    );
    let config = parse(&value).unwrap();
    // As in transformers, an absent window is 4096 and a null one means none. Mistral has no biases,
    // even with `attention_bias`.
    assert_eq!(
        (
            config.sliding_window(),
            config.arch().biased.len(),
            config.head_dim()
        ),
        (Some(4096), 0, 10)
    );
    assert_eq!(config.arch().linears()[0].d_output, 60);
    assert_eq!(config.arch().linears()[3].d_input, 60);
    value["sliding_window"] = Value::Null;
    assert_eq!(parse(&value).unwrap().sliding_window(), None);
    value["sliding_window"] = 16.into();
    assert_eq!(parse(&value).unwrap().sliding_window(), Some(16));
    value["num_key_value_heads"] = Value::Null;
    assert_eq!(parse(&value).unwrap().num_key_value_heads(), 6);
}

#[test]
fn qwen2_has_biases_on_queries_keys_and_values() {
    let mut value = with(
        json!({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"],
        "num_key_value_heads": 3, "sliding_window": 64, "use_sliding_window": false,
        "attention_bias": false}),
    );
    let config = parse(&value).unwrap();
    assert_eq!(config.family(), Family::Qwen2);
    assert_eq!(config.sliding_window(), None);
    for layer in config.arch().linears() {
        let biased = ["q_proj", "k_proj", "v_proj"];
        assert_eq!(
            layer.bias,
            biased.iter().any(|name| layer.name.ends_with(name)),
            "{}",
            layer.name
        );
    }
    // Blocks that differ are written in this crate's own format, and the model remains a Qwen2.
    let mut blocks = config.blocks().to_vec();
    blocks[1].d_mlp -= 1;
    let uneven = config.with_blocks(&blocks).unwrap();
    assert_eq!(uneven.raw()["model_type"], "elastic-llama");
    assert_eq!(uneven.raw()["base_model_type"], "qwen2");
    assert_eq!(
        (uneven.family(), uneven.blocks()),
        (Family::Qwen2, &blocks[..])
    );
    assert_eq!(uneven.arch().biased, config.arch().biased);
    let even = uneven.with_blocks(config.blocks()).unwrap();
    assert_eq!(even.raw()["model_type"], "qwen2");
    assert_eq!(even.arch(), config.arch());
    value["use_sliding_window"] = true.into();
    value["sliding_window"] = 5.into();
    value["max_window_layers"] = 1.into();
    let windows = |value: &Value| -> Vec<_> {
        let config = parse(value).unwrap();
        let positions = config.arch().positions.iter();
        positions.map(|positions| positions.window).collect()
    };
    assert_eq!(windows(&value)[..2], [None, Some(5)]);
    value["layer_types"] = json!(vec!["sliding_attention"; config.blocks().len()]);
    assert_eq!(windows(&value)[..2], [Some(5), Some(5)]);
    value = with(json!({"model_type": "elastic-llama",
        "architectures": ["ElasticLlamaForCausalLM"], "base_model_type": "mistral"}));
    assert!(matches!(
        parse(&value),
        Err(Error::UnsupportedArchitecture { .. })
    ));
}

#[test]
fn sizes_of_blocks_as_transformers_writes_them() {
    // Alone, in a Llama.
    let value = with(json!({"per_layer_config": {
        "0": {"intermediate_size": 90, "num_key_value_heads": 3, "vocab_size": 97},
        "01": {"skip": ["mlp"]},
        "2": {"skip": ["attention"], "intermediate_size": 70},
    }}));
    let config = parse(&value).unwrap();
    let sizes = |config: &HfConfig| -> Vec<_> {
        let blocks = config.blocks().iter();
        blocks.map(|b| (b.n_heads, b.n_kv_heads, b.d_mlp)).collect()
    };
    assert_eq!(sizes(&config), [(6, 3, 90), (6, 2, 0), (0, 0, 70)]);
    assert_eq!(config.family(), Family::Llama);
    assert_eq!(
        config.to_json_with(DType::F32, false)["per_layer_config"],
        value["per_layer_config"]
    );
    assert_eq!(
        parse(&with(json!({"per_layer_config": {}})))
            .unwrap()
            .arch(),
        parse(&llama()).unwrap().arch()
    );

    // Written beside `block_configs`, and read again.
    let written = config.with_blocks(config.blocks()).unwrap();
    assert_eq!(written.blocks(), config.blocks());
    assert_eq!(
        written.raw()["per_layer_config"],
        json!({
            "1": {"num_key_value_heads": 2, "skip": ["mlp"]},
            "2": {"skip": ["attention"], "intermediate_size": 70},
        })
    );
    let even = written
        .with_blocks(parse(&llama()).unwrap().blocks())
        .unwrap();
    assert!(!even.raw().contains_key("per_layer_config"));
    // Other numbers of query heads cannot be said.
    let mut blocks = config.blocks().to_vec();
    blocks[0].n_heads = 3;
    let narrow = config.with_blocks(&blocks).unwrap();
    assert!(!narrow.raw().contains_key("per_layer_config"));
    assert_eq!(narrow.blocks(), blocks);

    // A contradiction.
    let mut raw = Value::Object(written.raw().clone());
    raw["per_layer_config"]["0"]["num_key_value_heads"] = 6.into();
    let error = parse(&raw).unwrap_err().to_string();
    assert!(
        error.contains("block 0 has") && error.contains("block_configs"),
        "{error}"
    );

    let bad = |item: Value| with(json!({"per_layer_config": item}));
    let mistral = json!({
        "model_type": "mistral", "architectures": ["MistralForCausalLM"],
        "per_layer_config": {"0": {"skip": ["mlp"]}},
    });
    for (value, text) in [
        (bad(json!([1])), "per_layer_config"),
        (bad(json!({"x": {}})), "`x` is no block"),
        (bad(json!({"3": {}})), "`3` is no block"),
        (bad(json!({"-1": {}})), "`-1` is no block"),
        (bad(json!({"1": {}, "01": {}})), "twice"),
        (bad(json!({"1": 5})), "per_layer_config.1"),
        (
            bad(json!({"1": {"sliding_window": 8}})),
            "per_layer_config.1.sliding_window",
        ),
        (
            bad(json!({"1": {"intermediate_size": 0}})),
            "per_layer_config.1.intermediate_size",
        ),
        (
            bad(json!({"1": {"num_key_value_heads": 4}})),
            "4 does not divide 6 heads",
        ),
        (
            bad(
                json!({"1": {"num_attention_heads": 1 << 14, "num_key_value_heads": 1, "skip": ["mlp"]}}),
            ),
            "",
        ),
        (
            bad(json!({"1": {"skip": "mlp"}})),
            "per_layer_config.1.skip",
        ),
        (
            bad(json!({"1": {"skip": ["norm"]}})),
            "per_layer_config.1.skip",
        ),
        (
            bad(json!({"1": {"skip": ["mlp", "attention"]}})),
            "neither attention nor MLP",
        ),
        (
            with(mistral),
            "`per_layer_config` with `model_type` = \"mistral\"",
        ),
    ] {
        match parse(&value) {
            Err(error) => assert!(error.to_string().contains(text), "{error}\nexpected {text}"),
            // 16384 heads of 8 are no more than the limit.
            Ok(config) => assert_eq!((text, config.blocks()[1].n_heads), ("", 1 << 14)),
        }
    }
}

#[test]
fn biases_are_listed() {
    let config = parse(&with(json!({"attention_bias": true, "mlp_bias": true}))).unwrap();
    assert!(config.arch().linears().iter().all(|l| l.bias));
    assert_eq!(config.arch().tensors().len(), 1 + 3 * 16 + 2);
}

#[test]
fn one_bad_config_per_rule() {
    for field in [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
    ] {
        for value in [
            without(field),
            with(json!({field: 0})),
            with(json!({field: -1})),
            with(json!({field: 1.5})),
            with(json!({field: 1u64 << 60})),
            with(json!({field: "12"})),
        ] {
            match parse(&value) {
                Err(Error::InvalidConfig { field: named, .. }) => assert_eq!(named, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }
    for (changes, named) in [
        (json!({"num_key_value_heads": 4}), "num_key_value_heads"),
        (json!({"num_key_value_heads": 0}), "num_key_value_heads"),
        (
            json!({"num_attention_heads": 5, "num_key_value_heads": 5}),
            "num_attention_heads",
        ),
        (json!({"head_dim": 7}), "head_dim"),
        (
            json!({"num_attention_heads": 16, "hidden_size": 48}),
            "head_dim",
        ),
        (
            json!({"num_attention_heads": 16384, "head_dim": 16384}),
            "head_dim",
        ),
        (json!({"rms_norm_eps": 0}), "rms_norm_eps"),
        (json!({"rms_norm_eps": -1e-5}), "rms_norm_eps"),
        (json!({"rms_norm_eps": "x"}), "rms_norm_eps"),
        (json!({"rope_theta": -1}), "rope_theta"),
        (json!({"rope_scaling": []}), "rope_scaling"),
        (
            json!({"rope_scaling": {"type": "linear"}}),
            "rope_scaling.factor",
        ),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 0}}),
            "rope_scaling.factor",
        ),
        (
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4,
            "original_max_position_embeddings": 8}}),
            "rope_scaling.high_freq_factor",
        ),
        (json!({"eos_token_id": ["x"]}), "eos_token_id"),
        (json!({"bos_token_id": 1.5}), "bos_token_id"),
        (json!({"pad_token_id": -2}), "pad_token_id"),
        (json!({"tie_word_embeddings": 1}), "tie_word_embeddings"),
        (json!({"model_type": 3}), "model_type"),
        (
            json!({"architectures": "LlamaForCausalLM"}),
            "architectures",
        ),
        (json!({"torch_dtype": 16}), "torch_dtype"),
    ] {
        match parse(&with(changes.clone())) {
            Err(Error::InvalidConfig { field, .. }) => assert_eq!(field, named, "{changes}"),
            other => panic!("{changes}: {other:?}"),
        }
    }
    for (changes, named) in [
        (json!({"hidden_act": "gelu"}), "gelu"),
        (
            json!({"rope_scaling": {"rope_type": "axial", "factor": 2}}),
            "axial",
        ),
        (
            json!({"partial_rotary_factor": 0.5}),
            "partial_rotary_factor",
        ),
        (
            json!({"quantization_config": {"quant_method": "aqlm"}}),
            "aqlm",
        ),
        (json!({"torch_dtype": "float4"}), "float4"),
    ] {
        match parse(&with(changes)) {
            Err(Error::Unsupported { what }) => assert!(what.contains(named), "{what}"),
            other => panic!("{named}: {other:?}"),
        }
    }
    for changes in [
        json!({"model_type": "mamba"}),
        json!({"architectures": ["LlamaForSequenceClassification"]}),
        json!({"model_type": null, "architectures": ["OPTForCausalLM"]}),
    ] {
        assert!(matches!(
            parse(&with(changes)),
            Err(Error::UnsupportedArchitecture { .. })
        ));
    }
    assert!(parse(&json!({})).is_err());
    // Spellings of old and lenient files.
    for changes in [
        json!({"pad_token_id": -1}),
        json!({"architectures": null}),
        json!({"model_type": null}),
    ] {
        parse(&with(changes)).unwrap();
    }
}

fn dims() -> LlamaDims {
    LlamaDims {
        vocab_size: 31,
        hidden_size: 12,
        intermediate_size: 17,
        num_hidden_layers: 2,
        num_attention_heads: 3,
        num_key_value_heads: 1,
        max_position_embeddings: 64,
        rope_theta: 1e4,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
        bos_token_id: Some(1),
        eos_token_id: Some(2),
        pad_token_id: None,
        dtype: DType::F16,
    }
}

fn random_tensors<'a>(config: &HfConfig, dtype: DType) -> Vec<HostTensor<'a>> {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let shapes = config.arch().tensors().into_iter();
    shapes
        .map(|(name, shape)| {
            let values: Vec<f32> = (0..shape.iter().product())
                .map(|_| rng.random_range(-1.0f32..1.0))
                .collect();
            HostTensor::from_f32(name, dtype, shape, values)
        })
        .collect()
}

#[test]
fn a_model_of_our_own_is_written_whole() {
    let config = HfConfig::new_llama(&dims()).unwrap();
    assert_eq!(
        (
            config.head_dim(),
            config.dtype(),
            config.tie_word_embeddings()
        ),
        (4, Some(DType::F16), true)
    );
    assert!(
        HfConfig::new_llama(&LlamaDims {
            num_attention_heads: 5,
            ..dims()
        })
        .is_err()
    );
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("model");
    let source = root.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("tokenizer.json"), b"{}").unwrap();
    fs::write(source.join("README.md"), b"not carried").unwrap();
    fs::write(
        source.join("generation_config.json"),
        br#"{"eos_token_id": [2, 5]}"#,
    )
    .unwrap();

    let folder = HfFolder::create(&out, false)
        .unwrap()
        .with_max_shard_bytes(1000);
    folder
        .write_model(&config, DType::F16, random_tensors(&config, DType::F16))
        .unwrap();
    assert_eq!(
        folder.carry_over(&source).unwrap(),
        ["tokenizer.json", "generation_config.json"]
    );
    folder.write_json("extra.json", &json!({"a": 1})).unwrap();
    folder.write_text("NOTE.txt", "text").unwrap();
    assert!(folder.write_text("../escape", "text").is_err());
    assert!(!out.exists());
    folder.commit().unwrap();
    assert!(out.join("model.safetensors.index.json").exists() && !out.join("README.md").exists());
    let back = HfConfig::open(&out).unwrap();
    assert_eq!(back.eos_token_ids(), [2, 5]);
    assert_eq!(back.raw(), config.raw());
    let weights = Checkpoint::open(&out).unwrap();
    back.check(&weights).unwrap();
    assert_eq!(
        weights.info(Architecture::EMBEDDING).unwrap().dtype,
        DType::F16
    );
    assert!(!weights.contains(Architecture::HEAD));

    // A failure leaves no files behind.
    for broken in 0..3 {
        let mut tensors = random_tensors(&config, DType::F16);
        match broken {
            0 => drop(tensors.pop()),
            1 => tensors[3] = HostTensor::from_f32(tensors[3].name(), DType::F16, [1], vec![1.0]),
            _ => tensors.push(HostTensor::from_f32(
                Architecture::HEAD,
                DType::F16,
                [31, 12],
                vec![0.5; 31 * 12],
            )),
        }
        let folder = HfFolder::create(root.path().join("broken"), false).unwrap();
        assert!(
            folder.write_model(&config, DType::F16, tensors).is_err(),
            "{broken}"
        );
        drop(folder);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2, "{broken}");
    }
}

#[test]
fn a_tied_matrix_is_found_under_either_name_and_written_under_one() {
    let config = HfConfig::new_llama(&dims()).unwrap();
    let root = tempfile::tempdir().unwrap();
    let renamed = |from: &str, to: &str| {
        let mut tensors = random_tensors(&config, DType::F32);
        tensors
            .iter_mut()
            .filter(|t| t.name() == from)
            .for_each(|t| t.rename(to));
        tensors
    };
    let path = root.path().join("head.safetensors");
    write_safetensors(
        &path,
        renamed(Architecture::EMBEDDING, Architecture::HEAD),
        &BTreeMap::new(),
    )
    .unwrap();
    let head_only = Checkpoint::open(&path).unwrap();
    assert_eq!(
        config.embedding_name(&head_only).unwrap(),
        Architecture::HEAD
    );
    config.check(&head_only).unwrap();
    let untied = HfConfig::new_llama(&LlamaDims {
        tie_word_embeddings: false,
        ..dims()
    })
    .unwrap();
    assert!(matches!(
        untied.embedding_name(&head_only),
        Err(Error::MissingTensor { .. })
    ));
    assert!(untied.check(&head_only).is_err());
    let folder = HfFolder::create(root.path().join("out"), false).unwrap();
    folder
        .write_model(
            &config,
            DType::F32,
            renamed(Architecture::EMBEDDING, Architecture::HEAD),
        )
        .unwrap();
    folder.commit().unwrap();
    let out = Checkpoint::open(root.path().join("out")).unwrap();
    assert!(out.contains(Architecture::EMBEDDING) && !out.contains(Architecture::HEAD));
    assert_eq!(
        out.bytes(Architecture::EMBEDDING).unwrap(),
        head_only.bytes(Architecture::HEAD).unwrap()
    );
    assert!(
        matches!(untied.check(&out), Err(Error::MissingTensor { tensor, .. }) if tensor == Architecture::HEAD)
    );
}

#[test]
fn mutated_configs_never_panic() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let mut base = with(
        json!({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
        "high_freq_factor": 4, "original_max_position_embeddings": 32}}),
    );
    base["generation"] = Value::Null;
    base["per_layer_config"] = json!({"1": {"intermediate_size": 90, "skip": ["attention"]}});
    let text = base.to_string();
    let nasty = [
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(1),
        json!(2),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(1e308),
        json!(1e-320),
        json!(4194304),
        json!(""),
        json!("llama"),
        json!([]),
        json!([[]]),
        json!({}),
        json!({"rope_type": "linear"}),
    ];
    let mut accepted = 0;
    let rounds = crate::io::testing::rounds(4000);
    for _ in 0..rounds {
        let parsed: Option<Map<String, Value>> = if rng.random_bool(0.5) {
            let mut map = base.as_object().unwrap().clone();
            for _ in 0..rng.random_range(1..4) {
                let key = map
                    .keys()
                    .nth(rng.random_range(0..map.len()))
                    .unwrap()
                    .clone();
                map.insert(key, nasty[rng.random_range(0..nasty.len())].clone());
            }
            Some(map)
        } else {
            let mut bytes = text.clone().into_bytes();
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(0..bytes.len());
                bytes[at] = if rng.random_bool(0.5) {
                    rng.random()
                } else {
                    pick(&mut rng, b"0123456789-e.,{}[]\"")
                };
            }
            serde_json::from_slice(&bytes).ok()
        };
        if let Some(config) = parsed.and_then(|map| HfConfig::from_json(map).ok()) {
            accepted += 1;
            assert!(config.arch().linears().len() <= 7 << 12);
            for (_, shape) in config.arch().tensors() {
                assert!(
                    shape
                        .iter()
                        .try_fold(8usize, |n, &d| n.checked_mul(d))
                        .is_some()
                );
            }
            let _ = config.to_json_with(DType::F16, true);
        }
    }
    assert!(accepted > 100, "{accepted}");
}

#[test]
fn other_models_read_and_rewritten() {
    for (name, tied_name, theta) in [
        ("stories260K", Architecture::EMBEDDING, 1e4),
        ("story-llama-0.6M", Architecture::HEAD, 1e4),
    ] {
        let Some(source) = shared(&format!("models/{name}")) else {
            return;
        };
        let (config, weights) = (
            HfConfig::open(&source).unwrap(),
            Checkpoint::open(&source).unwrap(),
        );
        config.check(&weights).unwrap();
        assert_eq!(config.embedding_name(&weights).unwrap(), tied_name);
        assert_eq!(
            (config.rope_theta(), config.eos_token_ids()),
            (theta, &[2][..])
        );
        let root = tempfile::tempdir().unwrap();
        let out = rewrite(&config, &weights, &source, root.path());
        let (config2, weights2) = (
            HfConfig::open(&out).unwrap(),
            Checkpoint::open(&out).unwrap(),
        );
        config2.check(&weights2).unwrap();
        for (n, _) in config.arch().tensors() {
            let from = if n == Architecture::EMBEDDING {
                tied_name
            } else {
                &n
            };
            assert_eq!(weights2.bytes(&n).unwrap(), weights.bytes(from).unwrap());
        }
        for (key, value) in config.raw() {
            assert_eq!(Some(value), config2.raw().get(key), "{key}");
        }
    }
}

fn rewrite(
    config: &HfConfig,
    weights: &Checkpoint,
    source: &Path,
    root: &Path,
) -> std::path::PathBuf {
    let out = root.join("out");
    let folder = HfFolder::create(&out, false).unwrap();
    let tensors = weights
        .names()
        .map(|n| {
            HostTensor::lazy_f32(
                n,
                DType::F32,
                weights.info(n).unwrap().shape.clone(),
                move || weights.load_f32(n),
            )
        })
        .collect();
    folder.write_model(config, DType::F32, tensors).unwrap();
    folder.carry_over(source).unwrap();
    folder.commit().unwrap();
    out
}
