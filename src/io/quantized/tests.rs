use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::*;
use crate::arch::{LinearKind, LinearSpec};
use crate::error::{Error, Result};
use crate::format::testing::random_quantized;
use crate::format::{QuantizedMatrix, QuantizedParts};
use crate::io::testing::{pick, shared};
use crate::io::{Checkpoint, DType, HostTensor, tensors::write_safetensors};

const FORMATS: [QuantFormat; 3] = [
    QuantFormat::Gptq,
    QuantFormat::GptqV2,
    QuantFormat::CompressedTensors,
];
const LAYER: &str = "model.layers.0.mlp.up_proj";

fn config_of(format: QuantFormat, matrix: &QuantizedMatrix) -> Result<QuantizationConfig> {
    QuantizationConfig::for_layers(
        format,
        &BTreeMap::from([(LAYER.to_string(), matrix.clone())]),
        &[],
    )
}

fn parse(value: &Value) -> Result<QuantizationConfig> {
    QuantizationConfig::from_json(value.as_object().unwrap().clone())
}

fn write(path: &Path, config: &QuantizationConfig, matrix: &QuantizedMatrix) {
    write_safetensors(
        path,
        config.layer_tensors(LAYER, matrix).unwrap(),
        &BTreeMap::new(),
    )
    .unwrap();
}

fn changed(matrix: QuantizedMatrix, change: impl FnOnce(&mut QuantizedParts)) -> QuantizedMatrix {
    let mut parts = matrix.into_parts();
    change(&mut parts);
    QuantizedMatrix::new(parts).unwrap()
}

#[test]
fn every_layer_comes_back_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("layer.safetensors");
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for case in 0..240 {
        let format = FORMATS[case % 3];
        let gptq = format != QuantFormat::CompressedTensors;
        let bits = if gptq {
            [2, 3, 4, 8][case / 3 % 4]
        } else {
            [2, 4, 8][case / 3 % 3]
        };
        // GPTQ needs whole words and allows ragged groups; compressed-tensors needs whole groups.
        let unit = if bits == 3 {
            32
        } else {
            32 / usize::from(bits)
        };
        let (rows, cols, group_size) = if gptq {
            let (rows, cols) = (unit * rng.random_range(1..4), unit * rng.random_range(1..6));
            (rows, cols, [16, 17, 32, cols][rng.random_range(0..4)])
        } else {
            let group_size = rng.random_range(1..40);
            (
                rng.random_range(1..40),
                group_size * rng.random_range(1..5),
                group_size,
            )
        };
        let symmetric = rng.random();
        let mut matrix = random_quantized(rows, cols, bits, group_size, symmetric, &mut rng);
        let groups = matrix.groups() as u32;
        if gptq && rng.random_bool(0.4) && groups > 1 {
            let mut group_of: Vec<u32> = (0..cols).map(|_| rng.random_range(0..groups)).collect();
            group_of[0] = 1;
            matrix = changed(matrix, |parts| parts.group_of = Some(group_of));
        }
        let dtype = if rng.random() { DType::F16 } else { DType::F32 };
        if dtype == DType::F32 {
            matrix = changed(matrix, |parts| parts.scales[0] = 0.1);
        }
        if format != QuantFormat::Gptq && !symmetric {
            matrix = changed(matrix, |parts| parts.zeros[0] = 0);
        } else if !symmetric {
            // Use a zero point that no symmetric grid has, so that the flag is false.
            matrix = changed(matrix, |parts| parts.zeros[0] = 1 + u8::from(bits == 2) * 2);
        }
        let config = config_of(format, &matrix).unwrap();
        assert_eq!(
            (config.format(), config.bits(), config.symmetric()),
            (format, bits, symmetric)
        );
        assert_eq!(parse(&Value::Object(config.raw().clone())).unwrap(), config);
        write(&path, &config, &matrix);
        let file = Checkpoint::open(&path).unwrap();
        assert!(
            config.has_layer(&file, LAYER)
                && !config.has_layer(&file, "model.layers.0.mlp.down_proj")
        );
        let scales = if gptq { "scales" } else { "weight_scale" };
        assert_eq!(
            file.info(&format!("{LAYER}.{scales}")).unwrap().dtype,
            dtype
        );
        assert_eq!(
            config.read_layer(&file, LAYER, [rows, cols]).unwrap(),
            matrix,
            "{format:?} {bits} {group_size}"
        );
    }
}

#[test]
fn words_hold_what_the_format_says() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("layer.safetensors");
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let word = |file: &Checkpoint, name: &str, at: usize| {
        let bytes = file.bytes(&format!("{LAYER}.{name}")).unwrap();
        u32::from_le_bytes(bytes[4 * at..4 * at + 4].try_into().unwrap())
    };
    let nibble = |word: u32, at: usize| word >> (4 * at) & 15;
    for symmetric in [true, false] {
        let matrix = random_quantized(16, 24, 4, 10, symmetric, &mut rng);
        let parts = matrix.parts();
        for (format, less) in [(QuantFormat::Gptq, 1), (QuantFormat::GptqV2, 0)] {
            write(&path, &config_of(format, &matrix).unwrap(), &matrix);
            let file = Checkpoint::open(&path).unwrap();
            for output in 0..16 {
                for input in 0..24 {
                    let found = nibble(word(&file, "qweight", input / 8 * 16 + output), input % 8);
                    assert_eq!(found, u32::from(parts.codes[output * 24 + input]));
                }
                for group in 0..3 {
                    let found = nibble(word(&file, "qzeros", group * 2 + output / 8), output % 8);
                    assert_eq!(found, u32::from(parts.zeros[output * 3 + group]) - less);
                }
            }
            if symmetric {
                assert_eq!(
                    word(&file, "qzeros", 0),
                    if less == 1 { 0x7777_7777 } else { 0x8888_8888 }
                );
            }
            assert_eq!((word(&file, "g_idx", 9), word(&file, "g_idx", 10)), (0, 1));
        }
        let matrix = random_quantized(11, 20, 4, 10, symmetric, &mut rng);
        let parts = matrix.parts();
        write(
            &path,
            &config_of(QuantFormat::CompressedTensors, &matrix).unwrap(),
            &matrix,
        );
        let file = Checkpoint::open(&path).unwrap();
        for output in 0..11 {
            for input in 0..20 {
                let found = nibble(
                    word(&file, "weight_packed", output * 3 + input / 8),
                    input % 8,
                );
                assert_eq!(found, u32::from(parts.codes[output * 20 + input]));
            }
            assert_eq!(word(&file, "weight_packed", output * 3 + 2) >> 16, 0);
            for group in (0..2).filter(|_| !symmetric) {
                let found = nibble(
                    word(&file, "weight_zero_point", output / 8 * 2 + group),
                    output % 8,
                );
                assert_eq!(found, u32::from(parts.zeros[output * 2 + group]));
            }
        }
        assert_eq!(
            file.contains(&format!("{LAYER}.weight_zero_point")),
            !symmetric
        );
    }
}

/// AutoGPTQ's own test: the product computed by its half-precision kernel.
#[test]
fn autogptqs_product() {
    let Some(path) = shared("vectors/gptq/reference_old_no_half_256x256.safetensors") else {
        return;
    };
    let file = Checkpoint::open(path).unwrap();
    let config =
        parse(&json!({"bits": 4, "group_size": 128, "sym": false, "desc_act": false})).unwrap();
    let matrix = config.read_layer(&file, "", [256, 256]).unwrap();
    assert!(
        matrix.parts().zeros.iter().all(|zero| *zero == 1) && matrix.parts().group_of.is_none()
    );
    let (x, y) = (
        file.load_f32("input_recovered").unwrap(),
        file.load_f32("expected").unwrap(),
    );
    let weight = matrix.dequantize();
    let mut worst = 0.0_f32;
    for (row, expected) in y.iter().enumerate() {
        let found: f32 = weight.row(row).iter().zip(&x).map(|(w, x)| w * x).sum();
        worst = worst.max((found - expected).abs());
    }
    eprintln!("max abs diff {worst:.3e}");
    assert!(worst < 2e-3);
    // Writing the layer again gives the same bits.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("layer.safetensors");
    write_safetensors(
        &path,
        config.layer_tensors("", &matrix).unwrap(),
        &BTreeMap::new(),
    )
    .unwrap();
    let again = Checkpoint::open(path).unwrap();
    for name in ["qweight", "qzeros", "scales", "g_idx"] {
        assert_eq!(
            again.bytes(name).unwrap(),
            file.bytes(name).unwrap(),
            "{name}"
        );
    }
}

#[test]
fn what_a_format_cannot_hold_is_not_written() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let good = random_quantized(32, 64, 4, 16, false, &mut rng);
    let refused = |format, matrix: &QuantizedMatrix| {
        let error = config_of(format, matrix)
            .and_then(|config| config.layer_tensors(LAYER, matrix).map(|_| ()));
        error.map_or_else(|error| error.to_string(), |()| String::new())
    };
    let zero = changed(good.clone(), |parts| parts.zeros[7] = 0);
    let text = refused(QuantFormat::Gptq, &zero);
    assert!(
        text.contains("up_proj.qzeros")
            && text.contains("output 1, group 3")
            && text.contains("v1"),
        "{text}"
    );
    assert_eq!(refused(QuantFormat::GptqV2, &zero), "");
    assert_eq!(refused(QuantFormat::CompressedTensors, &zero), "");
    for (rows, cols, bits, name) in [
        (31, 64, 4, "qzeros"),
        (32, 60, 4, "qweight"),
        (32, 48, 3, "qweight"),
        (8, 16, 2, "qzeros"),
    ] {
        let text = refused(
            QuantFormat::Gptq,
            &random_quantized(rows, cols, bits, 16, true, &mut rng),
        );
        assert!(
            text.contains(name) && text.contains("whole words"),
            "{text}"
        );
    }
    let ordered = changed(good.clone(), |parts| {
        parts.group_of = Some((0..64).rev().map(|i| i / 16).collect())
    });
    assert!(refused(QuantFormat::CompressedTensors, &ordered).contains("out of order"));
    assert_eq!(refused(QuantFormat::Gptq, &ordered), "");
    assert!(
        refused(
            QuantFormat::CompressedTensors,
            &random_quantized(32, 65, 4, 16, true, &mut rng)
        )
        .contains("65 inputs")
    );
    assert!(
        refused(
            QuantFormat::CompressedTensors,
            &random_quantized(32, 64, 3, 16, true, &mut rng)
        )
        .contains("two ways")
    );

    // A matrix with the config of another matrix.
    let config = config_of(QuantFormat::Gptq, &good).unwrap();
    for (other, name) in [
        (random_quantized(32, 64, 8, 16, false, &mut rng), "bits"),
        (
            random_quantized(32, 64, 4, 32, false, &mut rng),
            "group_size",
        ),
        (
            random_quantized(32, 64, 4, 64, false, &mut rng),
            "group_size",
        ),
        (ordered.clone(), "desc_act"),
    ] {
        let text = config.layer_tensors(LAYER, &other).unwrap_err().to_string();
        assert!(text.contains(name), "{text}");
    }
    let symmetric = config_of(
        QuantFormat::GptqV2,
        &random_quantized(32, 64, 4, 16, true, &mut rng),
    )
    .unwrap();
    assert!(
        symmetric
            .layer_tensors(LAYER, &good)
            .unwrap_err()
            .to_string()
            .contains("symmetric")
    );
}

#[test]
fn configs_of_folders() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let kinds = [LinearKind::Q, LinearKind::Up, LinearKind::Down];
    let all: Vec<LinearSpec> = (0..2)
        .flat_map(|block| {
            kinds.map(|kind| LinearSpec {
                name: kind.name(block),
                block,
                kind,
                d_output: 32,
                d_input: 32,
                bias: false,
            })
        })
        .collect();
    let matrix = random_quantized(32, 32, 4, 32, true, &mut rng);
    let layers = |names: &[&str]| -> BTreeMap<String, QuantizedMatrix> {
        names
            .iter()
            .map(|name| (format!("model.layers.{name}"), matrix.clone()))
            .collect()
    };
    let whole: Vec<String> = all.iter().map(|layer| layer.name.clone()).collect();
    let whole = whole
        .into_iter()
        .map(|name| (name, matrix.clone()))
        .collect();
    let config = QuantizationConfig::for_layers(QuantFormat::Gptq, &whole, &all).unwrap();
    assert_eq!(config.group_size(), None);
    assert_eq!(config.raw()["group_size"], -1);
    assert!(
        !config.raw().contains_key("dynamic")
            && !config.raw().contains_key("modules_in_block_to_quantize")
    );

    let some = layers(&[
        "0.self_attn.q_proj",
        "1.self_attn.q_proj",
        "0.mlp.down_proj",
        "1.mlp.down_proj",
    ]);
    let config = QuantizationConfig::for_layers(QuantFormat::GptqV2, &some, &all).unwrap();
    assert_eq!(
        config.raw()["modules_in_block_to_quantize"],
        json!([["self_attn.q_proj", "mlp.down_proj"]])
    );
    assert_eq!(
        config.raw()["dynamic"],
        json!({"-:.*\\.mlp\\.up_proj$": {}})
    );
    assert_eq!(config.raw()["checkpoint_format"], "gptq_v2");

    let uneven = layers(&["0.self_attn.q_proj", "1.mlp.down_proj"]);
    let error = QuantizationConfig::for_layers(QuantFormat::Gptq, &uneven, &all)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("model.layers.0.self_attn.q_proj") && error.contains("another block"),
        "{error}"
    );
    let config =
        QuantizationConfig::for_layers(QuantFormat::CompressedTensors, &uneven, &all).unwrap();
    assert_eq!(config.raw()["ignore"].as_array().unwrap().len(), 5);
    let weights = &config.raw()["config_groups"]["group_0"]["weights"];
    assert_eq!(
        (&weights["strategy"], &weights["group_size"]),
        (&json!("channel"), &Value::Null)
    );

    let mut mixed = uneven.clone();
    mixed.insert(
        "model.layers.1.mlp.up_proj".into(),
        random_quantized(32, 32, 8, 32, true, &mut rng),
    );
    let error = QuantizationConfig::for_layers(QuantFormat::CompressedTensors, &mixed, &all)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("model.layers.1.mlp.up_proj") && error.contains("8 bits"),
        "{error}"
    );
    mixed.insert(
        "model.layers.1.mlp.up_proj".into(),
        random_quantized(32, 32, 4, 16, true, &mut rng),
    );
    assert!(QuantizationConfig::for_layers(QuantFormat::CompressedTensors, &mixed, &all).is_err());
    assert!(QuantizationConfig::for_layers(QuantFormat::Gptq, &BTreeMap::new(), &all).is_err());
}

#[test]
fn configs_of_others_are_read_or_refused() {
    // Configs as written by AutoGPTQ, transformers and GPTQModel.
    for (value, expected) in [
        (
            json!({"bits": 4, "group_size": 128, "desc_act": true, "sym": true}),
            (QuantFormat::Gptq, Some(128), true),
        ),
        (
            json!({"bits": 3, "group_size": -1, "sym": false, "quant_method": "gptq", "checkpoint_format": "gptq_v2",
                "pack_dtype": "int32", "dynamic": {"-:.*mlp.*": {}}, "meta": {"quantizer": ["x:1"]}}),
            (QuantFormat::GptqV2, None, false),
        ),
        (
            json!({"bits": 8, "group_size": 32, "quant_method": "gptq", "format": "gptq_v2", "dynamic": null}),
            (QuantFormat::GptqV2, Some(32), true),
        ),
    ] {
        let config = parse(&value).unwrap();
        assert_eq!(
            (config.format(), config.group_size(), config.symmetric()),
            expected
        );
    }
    let weights = json!({"num_bits": 8, "type": "int", "symmetric": false, "strategy": "group", "group_size": 64,
        "actorder": "weight", "dynamic": false, "observer": "minmax"});
    let good = json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "sparsity_config": {},
        "transform_config": {}, "kv_cache_scheme": null,
        "config_groups": {"g": {"targets": ["Linear"], "weights": weights, "input_activations": null}}});
    let config = parse(&good).unwrap();
    assert_eq!(
        (
            config.bits(),
            config.group_size(),
            config.symmetric(),
            config.act_order()
        ),
        (8, Some(64), false, false)
    );

    let gptq = |field: &str, value: Value| {
        let mut config = json!({"quant_method": "gptq", "bits": 4, "group_size": 64});
        config[field] = value;
        config
    };
    let packed = |path: &str, value: Value| {
        let mut config = good.clone();
        *config.pointer_mut(path).unwrap() = value;
        config
    };
    let bad = [
        (gptq("quant_method", json!("aqlm")), "aqlm"),
        (gptq("checkpoint_format", json!("marlin")), "marlin"),
        (gptq("pack_dtype", json!("int64")), "int64"),
        (
            gptq("dynamic", json!({"+:.*up.*": {"bits": 8}})),
            "+:.*up.*",
        ),
        (gptq("bits", json!(5)), "bits`: 5"),
        (gptq("bits", json!(260)), "260"),
        (gptq("bits", Value::Null), "bits`: missing"),
        (gptq("group_size", json!(0)), "group_size"),
        (gptq("group_size", json!(-2)), "group_size"),
        (gptq("sym", json!("yes")), "sym"),
        (
            packed("/format", json!("float-quantized")),
            "float-quantized",
        ),
        (packed("/config_groups", json!({})), "one group"),
        (
            packed(
                "/config_groups",
                json!({"g": {"weights": {"num_bits": 4, "strategy": "channel"}},
                    "h": {"weights": {"num_bits": 8, "strategy": "channel"}}}),
            ),
            "different settings",
        ),
        (packed("/config_groups", json!(3)), "config_groups"),
        (packed("/config_groups/g/weights", Value::Null), "weights"),
        (
            packed("/config_groups/g/input_activations", json!({"num_bits": 8})),
            "input_activations",
        ),
        (
            packed("/config_groups/g/weights/num_bits", json!(3)),
            "two ways",
        ),
        (packed("/config_groups/g/weights/num_bits", json!(6)), "6"),
        (
            packed("/config_groups/g/weights/type", json!("float")),
            "float",
        ),
        (
            packed("/config_groups/g/weights/strategy", json!("tensor")),
            "tensor",
        ),
        (
            packed("/config_groups/g/weights/group_size", Value::Null),
            "group_size",
        ),
        (
            packed("/config_groups/g/weights/dynamic", json!(true)),
            "dynamic",
        ),
        (
            packed("/sparsity_config", json!({"format": "sparse-24-bitmask"})),
            "sparse-24-bitmask",
        ),
        (
            packed("/transform_config", json!({"a": 1})),
            "transform_config",
        ),
        (
            packed("/kv_cache_scheme", json!({"num_bits": 8})),
            "kv_cache_scheme",
        ),
    ];
    for (value, expected) in bad {
        let error = parse(&value).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Unsupported { .. } | Error::InvalidConfig { .. }
            ),
            "{error:?}"
        );
        assert!(error.to_string().contains(expected), "{expected}: {error}");
    }
}

type Parts = BTreeMap<String, (DType, Vec<usize>, Vec<u8>)>;

/// Writes a layer's tensors after a change, and reads the layer.
fn read_spoiled(
    config: &QuantizationConfig,
    good: &Checkpoint,
    spoil: impl FnOnce(&mut Parts),
) -> Result<QuantizedMatrix> {
    let mut parts: Parts = good
        .names()
        .map(|name| {
            let info = good.info(name).unwrap();
            let suffix = name.strip_prefix(LAYER).unwrap()[1..].to_string();
            (
                suffix,
                (
                    info.dtype,
                    info.shape.clone(),
                    good.bytes(name).unwrap().to_vec(),
                ),
            )
        })
        .collect();
    spoil(&mut parts);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.safetensors");
    let tensors = parts.into_iter().map(|(suffix, (dtype, shape, bytes))| {
        HostTensor::from_bytes(format!("{LAYER}.{suffix}"), dtype, shape, bytes)
    });
    write_safetensors(&path, tensors.collect(), &BTreeMap::new()).unwrap();
    config.read_layer(&Checkpoint::open(path).unwrap(), LAYER, [32, 64])
}

#[test]
fn a_bad_file_for_every_rule() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("layer.safetensors");
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let matrix = random_quantized(32, 64, 4, 16, false, &mut rng);
    // Use a zero point below 15, so that not every stored zero point is ambiguous.
    let matrix = changed(matrix, |parts| {
        parts
            .zeros
            .iter_mut()
            .for_each(|zero| *zero = (*zero).min(14))
    });
    fn reshape(parts: &mut Parts, name: &str, shape: &[usize]) {
        parts.get_mut(name).unwrap().1 = shape.to_vec();
    }
    fn set(parts: &mut Parts, name: &str, at: usize, bytes: &[u8]) {
        parts.get_mut(name).unwrap().2[at..at + bytes.len()].copy_from_slice(bytes);
    }
    type Rule = (&'static str, &'static str, fn(&mut Parts));
    let gptq: [Rule; 12] = [
        ("qweight", "missing", |parts| drop(parts.remove("qweight"))),
        ("qzeros", "missing", |parts| drop(parts.remove("qzeros"))),
        ("scales", "missing", |parts| drop(parts.remove("scales"))),
        ("qweight", "[32, 8]", |parts| {
            reshape(parts, "qweight", &[32, 8])
        }),
        ("qweight", "F32", |parts| {
            parts.get_mut("qweight").unwrap().0 = DType::F32
        }),
        ("qzeros", "[16]", |parts| reshape(parts, "qzeros", &[16])),
        ("scales", "I16", |parts| {
            parts.get_mut("scales").unwrap().0 = DType::I16
        }),
        ("scales", "[32, 4]", |parts| {
            reshape(parts, "scales", &[32, 4])
        }),
        ("scales", "NaN", |parts| {
            set(parts, "scales", 6, &[0x00, 0x7E])
        }),
        ("scale", "-1", |parts| {
            set(parts, "scales", 6, &[0x00, 0xBC])
        }),
        ("g_idx", "element 5 is 4", |parts| {
            set(parts, "g_idx", 20, &[4, 0, 0, 0])
        }),
        ("g_idx", "is -2", |parts| {
            set(parts, "g_idx", 8, &[0xFE, 0xFF, 0xFF, 0xFF])
        }),
    ];
    for format in [QuantFormat::Gptq, QuantFormat::GptqV2] {
        let config = config_of(format, &matrix).unwrap();
        write(&path, &config, &matrix);
        let good = Checkpoint::open(&path).unwrap();
        assert_eq!(read_spoiled(&config, &good, |_| {}).unwrap(), matrix);
        assert_eq!(
            read_spoiled(&config, &good, |parts| drop(parts.remove("g_idx"))).unwrap(),
            matrix
        );
        for (tensor, expected, spoil) in gptq {
            let error = read_spoiled(&config, &good, spoil).unwrap_err().to_string();
            assert!(
                error.contains(tensor) && error.contains(expected),
                "{tensor} {expected}: {error}"
            );
        }
        // The stored value means a zero point of 16 or of 0.
        let full = read_spoiled(&config, &good, |parts| set(parts, "qzeros", 3, &[0xF3]));
        match full {
            Err(error) if format == QuantFormat::Gptq => {
                assert!(
                    error.to_string().contains("qzeros")
                        && error.to_string().contains("16 or of 0"),
                    "{error}"
                );
            }
            other => assert_eq!(other.unwrap().grid(7, 0).1, 15),
        }
        // A symmetric v1 file labelled v2, and the reverse.
        let mut raw = Value::Object(config.raw().clone());
        raw["sym"] = true.into();
        let error = read_spoiled(&parse(&raw).unwrap(), &good, |_| {})
            .unwrap_err()
            .to_string();
        assert!(
            ["bad.safetensors", "qzeros", "symmetric"]
                .iter()
                .all(|part| error.contains(part)),
            "{error}"
        );
        raw["sym"] = false.into();
        raw["desc_act"] = true.into();
        let error = read_spoiled(&parse(&raw).unwrap(), &good, |parts| {
            drop(parts.remove("g_idx"))
        })
        .unwrap_err();
        assert!(matches!(error, Error::MissingTensor { .. }));
    }
    let packed: [Rule; 9] = [
        ("weight_packed", "missing", |parts| {
            drop(parts.remove("weight_packed"))
        }),
        ("weight_scale", "missing", |parts| {
            drop(parts.remove("weight_scale"))
        }),
        ("weight_shape", "missing", |parts| {
            drop(parts.remove("weight_shape"))
        }),
        ("weight_zero_point", "missing", |parts| {
            drop(parts.remove("weight_zero_point"))
        }),
        ("weight_packed", "[8, 32]", |parts| {
            reshape(parts, "weight_packed", &[8, 32])
        }),
        ("weight_shape", "[32, 65]", |parts| {
            set(parts, "weight_shape", 8, &[65])
        }),
        ("weight_shape", "[-1, 64]", |parts| {
            set(parts, "weight_shape", 0, &[0xFF; 8])
        }),
        ("weight_zero_point", "[16, 1]", |parts| {
            reshape(parts, "weight_zero_point", &[16, 1])
        }),
        ("weight_g_idx", "9", |parts| {
            let bytes = [9_u8, 0, 0, 0].repeat(64);
            parts.insert("weight_g_idx".into(), (DType::I32, vec![64], bytes));
        }),
    ];
    let config = config_of(QuantFormat::CompressedTensors, &matrix).unwrap();
    write(&path, &config, &matrix);
    let good = Checkpoint::open(&path).unwrap();
    for (tensor, expected, spoil) in packed {
        let error = read_spoiled(&config, &good, spoil).unwrap_err().to_string();
        assert!(
            error.contains(tensor) && error.contains(expected),
            "{tensor} {expected}: {error}"
        );
    }
    // Files of older versions: with an unused order and with a used one.
    let order = |group: fn(usize) -> i32| {
        let bytes = (0..64)
            .flat_map(|column| group(column).to_le_bytes())
            .collect();
        read_spoiled(&config, &good, |parts| {
            drop(parts.insert("weight_g_idx".into(), (DType::I32, vec![64], bytes)))
        })
    };
    assert_eq!(order(|_| -1).unwrap(), matrix);
    let turned: Vec<u32> = (0..64).map(|column| 3 - column / 16).collect();
    assert_eq!(
        order(|column| 3 - column as i32 / 16)
            .unwrap()
            .parts()
            .group_of,
        Some(turned)
    );
    let mut raw = Value::Object(config.raw().clone());
    raw["config_groups"]["group_0"]["weights"]["symmetric"] = true.into();
    let error = read_spoiled(&parse(&raw).unwrap(), &good, |_| {})
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("weight_zero_point") && error.contains("symmetric"),
        "{error}"
    );

    for shape in [
        [0, 64],
        [32, 0],
        [usize::MAX, 64],
        [32, usize::MAX / 32],
        [usize::MAX, usize::MAX],
    ] {
        assert!(config.read_layer(&good, LAYER, shape).is_err());
    }
}

/// A file of AWQ's layout with the expected weight, which a script wrote, and its config.
fn awq(name: &str, group_size: i64) -> (std::path::PathBuf, QuantizationConfig) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/awq");
    let config = json!({
        "quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": true,
        "version": "gemm", "modules_to_not_convert": null,
    });
    (folder.join(name), parse(&config).unwrap())
}

#[test]
fn awq_layers_are_what_another_implementation_reads() {
    for (name, group_size, shape) in [
        ("groups.safetensors", 16, [32, 64]),
        ("rows.safetensors", -1, [24, 17]),
    ] {
        let (path, config) = awq(name, group_size);
        let file = Checkpoint::open(&path).unwrap();
        assert!(config.has_layer(&file, LAYER));
        let matrix = config.read_layer(&file, LAYER, shape).unwrap();
        let expected = file
            .load_matrix(&format!("expected.{LAYER}"), shape)
            .unwrap();
        assert_eq!(matrix.dequantize(), expected);
        let zeros = expected.as_slice().iter().filter(|value| **value == 0.0);
        assert!(zeros.count() * 4 > shape[0] * shape[1]);
        assert_eq!(matrix.grid(0, 0).1, 0);
        assert_eq!(matrix.grid(1, 0).1, 15);
        assert!(!matrix.parts().symmetric);
    }
}

#[test]
fn awq_rules() {
    let (path, config) = awq("groups.safetensors", 16);
    let file = Checkpoint::open(&path).unwrap();
    assert_eq!(config.format(), QuantFormat::Awq);
    assert_eq!((config.bits(), config.group_size()), (4, Some(16)));
    let old = json!({"quant_method": "awq", "w_bit": 4, "q_group_size": 16, "version": "GEMM"});
    let matrix = config.read_layer(&file, LAYER, [32, 64]).unwrap();
    let by_old = parse(&old).unwrap().read_layer(&file, LAYER, [32, 64]);
    assert_eq!(by_old.unwrap(), matrix);

    let with = |field: &str, value: Value| {
        let mut raw = Value::Object(config.raw().clone());
        raw[field] = value;
        parse(&raw)
    };
    for (field, value, text) in [
        (
            "version",
            json!("gemv"),
            "`quantization_config.version`: gemv",
        ),
        (
            "version",
            json!("marlin"),
            "`quantization_config.version`: marlin",
        ),
        (
            "version",
            json!("exllama"),
            "`quantization_config.version`: exllama",
        ),
        (
            "format",
            json!("gemv_fast"),
            "`quantization_config.format`: gemv_fast",
        ),
        (
            "backend",
            json!("llm-awq"),
            "`quantization_config.backend`: llm-awq",
        ),
        ("bits", json!(8), "`quantization_config.bits`: 8"),
        ("group_size", json!(0), "group_size"),
        ("zero_point", json!(3), "zero_point"),
        (
            "modules_to_not_convert",
            json!("lm_head"),
            "modules_to_not_convert",
        ),
    ] {
        let error = with(field, value).unwrap_err().to_string();
        assert!(error.contains(text), "{error}\nexpected {text}");
    }
    assert!(with("modules_to_not_convert", json!(["lm_head"])).is_ok());

    type Rule<'a> = (&'a str, &'a str, fn(&mut Parts));
    let rules: [Rule<'_>; 7] = [
        ("qweight", "missing", |parts| drop(parts.remove("qweight"))),
        ("qzeros", "missing", |parts| drop(parts.remove("qzeros"))),
        ("scales", "missing", |parts| drop(parts.remove("scales"))),
        ("qweight", "[8, 32]", |parts| {
            parts.get_mut("qweight").unwrap().1 = vec![8, 32]
        }),
        ("qzeros", "F32", |parts| {
            parts.get_mut("qzeros").unwrap().0 = DType::F32
        }),
        ("scales", "[32, 4]", |parts| {
            parts.get_mut("scales").unwrap().1 = vec![32, 4]
        }),
        ("scale", "-1", |parts| {
            parts.get_mut("scales").unwrap().2[6..8].copy_from_slice(&[0x00, 0xBC])
        }),
    ];
    let good = folder_without_expected(&file);
    for (tensor, expected, spoil) in rules {
        let error = read_spoiled(&config, &good.1, spoil)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(tensor) && error.contains(expected),
            "{tensor} {expected}: {error}"
        );
    }
    for (shape, text) in [([36, 64], "36 outputs"), ([32, 60], "60 inputs")] {
        let error = config
            .read_layer(&file, LAYER, shape)
            .unwrap_err()
            .to_string();
        assert!(error.contains(text), "{error}");
    }
    // It is not written.
    let layers = BTreeMap::from([(LAYER.to_string(), matrix.clone())]);
    let made = QuantizationConfig::for_layers(QuantFormat::Awq, &layers, &[]);
    assert!(made.unwrap_err().to_string().contains("writing AWQ"));
    assert!(config.layer_tensors(LAYER, &matrix).is_err());
}

/// The tensors of the layer alone.
fn folder_without_expected(file: &Checkpoint) -> (tempfile::TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("layer.safetensors");
    let names = file.names().filter(|name| name.starts_with(LAYER));
    let tensors = names.map(|name| {
        let info = file.info(name).unwrap();
        let bytes = file.bytes(name).unwrap().to_vec();
        HostTensor::from_bytes(name, info.dtype, info.shape.clone(), bytes)
    });
    write_safetensors(&path, tensors.collect(), &BTreeMap::new()).unwrap();
    let file = Checkpoint::open(&path).unwrap();
    (folder, file)
}

#[test]
fn mutated_layers_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("layer.safetensors");
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let mut read = 0;
    let rounds = crate::io::testing::rounds(2000);
    for format in FORMATS.into_iter().chain([QuantFormat::Awq]) {
        let config = if format == QuantFormat::Awq {
            let (from, config) = awq("groups.safetensors", 16);
            let (_folder, file) = folder_without_expected(&Checkpoint::open(from).unwrap());
            fs::copy(file.path(), &path).unwrap();
            config
        } else {
            let bits = if format == QuantFormat::Gptq { 3 } else { 4 };
            let matrix = random_quantized(32, 64, bits, 24, false, &mut rng);
            let matrix = if format == QuantFormat::CompressedTensors {
                random_quantized(32, 64, bits, 16, false, &mut rng)
            } else {
                matrix
            };
            let config = config_of(format, &matrix).unwrap();
            write(&path, &config, &matrix);
            config
        };
        let good = fs::read(&path).unwrap();
        let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
        for round in 0..rounds {
            let mut bytes = good.clone();
            for _ in 0..rng.random_range(1..4) {
                let end = if rng.random() { header } else { bytes.len() };
                let at = rng.random_range(0..end.min(bytes.len()));
                match rng.random_range(0..5) {
                    0 => bytes[at] = rng.random(),
                    1 => bytes[at] ^= 1 << rng.random_range(0..8),
                    2 if rng.random_bool(0.2) => bytes.truncate(at.max(1)),
                    _ => bytes[at] = pick(&mut rng, b"0123456789[]{},:\"-eF"),
                }
            }
            let target = folder.path().join(format!("m{}.safetensors", round % 2));
            fs::write(&target, &bytes).unwrap();
            let Ok(file) = Checkpoint::open(&target) else {
                continue;
            };
            if let Ok(matrix) = config.read_layer(&file, LAYER, [32, 64]) {
                assert_eq!((matrix.rows(), matrix.cols()), (32, 64));
                read += 1;
            }
        }
        // Mutate configs too.
        let text = serde_json::to_vec(config.raw()).unwrap();
        let file = Checkpoint::open(&path).unwrap();
        for _ in 0..rounds {
            let mut text = text.clone();
            for _ in 0..rng.random_range(1..3) {
                let at = rng.random_range(0..text.len());
                text[at] = if rng.random_bool(0.2) {
                    rng.random()
                } else {
                    pick(&mut rng, b"0123456789[]{},:\"-efl")
                };
            }
            let Ok(Value::Object(raw)) = serde_json::from_slice(&text) else {
                continue;
            };
            if let Ok(config) = QuantizationConfig::from_json(raw) {
                let _ = config.read_layer(&file, LAYER, [32, 64]);
            }
        }
    }
    assert!(
        read > 100,
        "the loop should also reach what lies behind the header: {read}"
    );
}
