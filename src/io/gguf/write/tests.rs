use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::super::container::{File, Value as Item};
use super::quantize::{exact, round};
use super::*;
use crate::arch::Family;
use crate::format::testing::random_quantized;
use crate::format::{QuantizedMatrix, QuantizedParts};
use crate::io::gguf::Gguf;
use crate::io::hf::HfFolder;
use crate::io::testing::shared;
use crate::io::{Checkpoint, HostTensor, LoraAdapter, LoraWeights, QuantFormat};
use crate::linalg::Matrix;

fn values(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-0.5..0.5)).collect()
}

/// Sizes that differ from each other, biases, Llama 3's positions and several ends.
fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 40, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 5e5, "hidden_act": "silu", "attention_bias": true,
        "mlp_bias": true, "bos_token_id": 1, "eos_token_id": [2, 7],
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192
        },
    })
}

fn parse(value: Value) -> HfConfig {
    HfConfig::from_json(value.as_object().unwrap().clone()).unwrap()
}

/// Writes a folder of random weights.
fn folder(path: &Path, config: &HfConfig, seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let out = HfFolder::create(path, false).unwrap();
    let tensors = config.arch().tensors().into_iter().map(|(name, shape)| {
        let n = shape.iter().product();
        HostTensor::from_f32(name, DType::F32, shape, values(&mut rng, n))
    });
    out.write_model(config, DType::F32, tensors.collect())
        .unwrap();
    out.commit().unwrap();
}

fn convert(from: &Path, options: &GgufOptions) -> (PathBuf, GgufReport) {
    let path = from.with_extension("gguf");
    let options = options.clone().with_overwrite(true);
    let report = write_gguf(from, &path, &options).unwrap();
    (path, report)
}

fn refusal(from: &Path, options: &GgufOptions) -> String {
    let path = from.with_extension("refused.gguf");
    let error = write_gguf(from, &path, options).unwrap_err().to_string();
    let left = fs::read_dir(from.parent().unwrap()).unwrap().flatten();
    let names: Vec<_> = left.map(|entry| entry.file_name()).collect();
    assert!(
        !names
            .iter()
            .any(|name| name.to_string_lossy().contains("refused")),
        "{names:?}"
    );
    error
}

#[test]
fn a_file_is_the_model_of_its_folder() {
    let root = tempfile::tempdir().unwrap();
    for (index, tied) in [false, true].into_iter().enumerate() {
        let mut value = llama();
        value["tie_word_embeddings"] = tied.into();
        let config = parse(value);
        let from = root.path().join(format!("m{index}"));
        folder(&from, &config, 1);
        let source = Checkpoint::open(&from).unwrap();
        for (kind, tolerance) in [
            (None, 0.0),
            (Some(GgufType::F32), 0.0),
            (Some(GgufType::F16), 0.5 / 2048.0),
            (Some(GgufType::Bf16), 0.5 / 256.0),
            (Some(GgufType::Q8_0), 0.5 / 254.0 + 1e-3),
            (Some(GgufType::Q4_0), 0.5 / 8.0 + 1e-3),
            (Some(GgufType::Q4_1), 0.5 / 15.0 + 1e-3),
        ] {
            let options = GgufOptions {
                linears: kind,
                ..GgufOptions::default()
            };
            let (path, report) = convert(&from, &options);
            let read = HfConfig::open(&path).unwrap();
            assert_eq!(read.arch(), config.arch());
            assert_eq!(read.eos_token_ids(), config.eos_token_ids());
            assert_eq!(read.bos_token_id(), config.bos_token_id());
            let file = Checkpoint::open(&path).unwrap();
            read.check(&file).unwrap();
            for (name, shape) in config.arch().tensors() {
                let (found, expected) = (
                    file.load_f32(&name).unwrap(),
                    source.load_f32(&name).unwrap(),
                );
                let tolerance = if shape.len() == 1 { 0.0 } else { tolerance };
                for (found, expected) in found.iter().zip(&expected) {
                    assert!(
                        (found - expected).abs() <= tolerance,
                        "{kind:?} {name}: {found} {expected}"
                    );
                }
            }
            // 96 heads' rows are no whole blocks in o_proj only if the type has none that long.
            let blocks = report.types.keys().any(|name| name.starts_with('Q'));
            let expected = kind.is_some_and(|kind| kind.name().starts_with('q'));
            assert_eq!(blocks, expected, "{:?}", report.types);
            // The head has a finer type than weights of 4 bits: Q8_0, as its rows are short.
            let head = if tied { EMBEDDING } else { HEAD };
            let gguf = Gguf::open(&path).unwrap();
            let (_, head) = gguf.tensor(head).unwrap();
            let of_head = match kind {
                Some(GgufType::Q4_0 | GgufType::Q4_1) => GgufType::Q8_0,
                kind => kind.unwrap_or(GgufType::F32),
            };
            assert_eq!(GgufType::of(head.encoding), Some(of_head));
        }
    }
}

#[test]
fn numbers_become_ggmls_blocks() {
    // Checksums of what `ggml_quantize_chunk` makes of these numbers.
    let x: Vec<f32> = (0..1024_usize)
        .map(|i| ((i * 37 + 11) % 101) as f32 - 50.0)
        .enumerate()
        .map(|(i, x)| x / 16.0 * ((i / 32) % 5 + 1) as f32)
        .collect();
    for (kind, bytes, checksum) in [
        (Kind::Q4_0, 576, 0xfba7_b349),
        (Kind::Q4_1, 640, 0xbd5a_982b),
        (Kind::Q8_0, 1088, 0x202f_a632),
        (Kind::Q6K, 840, 0x2282_4a8c_u32),
    ] {
        let blocks = round("x", kind, &x).unwrap();
        assert_eq!(
            (blocks.len(), crc32fast::hash(&blocks)),
            (bytes, checksum),
            "{kind:?}"
        );
        // Zeros stay zeros.
        let zeros = round("x", kind, &[0.0; 256]).unwrap();
        let id = TYPES.iter().find(|row| row.4 == Some(kind)).unwrap().2;
        let Ok(Encoding::Blocks(read)) = Encoding::from_id(id) else {
            panic!()
        };
        let mut back = vec![1.0; 256];
        read.dequantize(&zeros, &mut back);
        assert_eq!(back, [0.0; 256]);
        // A scale beyond f16 is an error, not infinity.
        let mut large = vec![0.5; 256];
        large[40] = 1e9;
        let error = round("big", kind, &large).unwrap_err().to_string();
        assert!(error.contains("big") && error.contains("1e9") || error.contains("1000000000"));
    }
}

/// Reads blocks back.
fn dequantized(kind: GgufType, bytes: &[u8], n: usize) -> Vec<f32> {
    let Encoding::Blocks(blocks) = kind.encoding() else {
        panic!()
    };
    let mut out = vec![f32::NAN; n];
    blocks.dequantize(bytes, &mut out);
    out
}

#[test]
fn codes_keep_their_values_or_are_refused() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let spoiled = |matrix: &QuantizedMatrix, spoil: &dyn Fn(&mut QuantizedParts)| {
        let mut parts = matrix.parts().clone();
        spoil(&mut parts);
        QuantizedMatrix::new(parts).unwrap()
    };
    let kinds = [
        (GgufType::Q4_0, Kind::Q4_0),
        (GgufType::Q4_1, Kind::Q4_1),
        (GgufType::Q8_0, Kind::Q8_0),
    ];
    // Which types hold the codes: bits, group size, symmetric.
    for (bits, group_size, symmetric, holds) in [
        (4, 32, true, [true, true, true]),
        (4, 128, true, [true, true, true]),
        (4, 48, true, [false, false, false]),
        (4, 16, true, [false, false, false]),
        (4, 64, false, [false, false, true]),
        (8, 32, true, [false, false, true]),
        (8, 64, false, [false, false, false]),
        (3, 96, true, [true, true, true]),
        (2, 32, false, [true, false, true]),
    ] {
        let matrix = random_quantized(6, 192, bits, group_size, symmetric, &mut rng);
        let weights = matrix.dequantize();
        for ((kind, inner), holds) in kinds.into_iter().zip(holds) {
            let blocks = exact(&matrix, inner, 192);
            // Whether a minimum is an f16 depends on the scale: Q4_1 may or may not hold a grid
            // with zero points.
            if holds || inner != Kind::Q4_1 || symmetric {
                assert_eq!(
                    blocks.is_some(),
                    holds,
                    "{bits} {group_size} {symmetric} {kind}"
                );
            }
            if let Some(blocks) = blocks {
                let back = dequantized(kind, &blocks, 6 * 192);
                assert_eq!(back, weights.as_slice(), "{bits} {group_size} {kind}");
                let zeros = back.iter().filter(|x| **x == 0.0).count();
                assert_eq!(zeros, matrix.count_zeros());
            }
        }
    }
    let good = random_quantized(3, 64, 4, 32, true, &mut rng);
    // A scale that is no f16, and groups that are not those of the columns.
    let fine = spoiled(&good, &|parts| parts.scales[1] = 0.1);
    assert!(exact(&fine, Kind::Q4_0, 64).is_none());
    let ordered = spoiled(&good, &|parts| {
        parts.group_of = Some((0..64).map(|i| i % 2).collect());
    });
    assert!(exact(&ordered, Kind::Q8_0, 64).is_none());
    // Zero points of 7 with the level 8: the sign of the scale changes.
    let turned = spoiled(&good, &|parts| {
        parts.symmetric = false;
        parts.zeros.fill(7);
        parts.codes[..8].fill(15);
    });
    let blocks = exact(&turned, Kind::Q4_0, 64).unwrap();
    let back = dequantized(GgufType::Q4_0, &blocks, 3 * 64);
    assert_eq!(back, turned.dequantize().as_slice());
    // Rows that are filled up.
    let blocks = exact(&good, Kind::Q4_0, 128).unwrap();
    let back = dequantized(GgufType::Q4_0, &blocks, 3 * 128);
    for (row, expected) in back
        .chunks(128)
        .zip(good.dequantize().as_slice().chunks(64))
    {
        assert_eq!((&row[..64], &row[64..]), (expected, &[0.0; 64][..]));
    }
    let narrow = random_quantized(2, 40, 4, 8, true, &mut rng);
    let one_scale = spoiled(&narrow, &|parts| parts.scales.fill(0.25));
    let blocks = exact(&one_scale, Kind::Q4_1, 64).unwrap();
    let back = dequantized(GgufType::Q4_1, &blocks, 2 * 64);
    for (row, expected) in back
        .chunks(64)
        .zip(one_scale.dequantize().as_slice().chunks(40))
    {
        assert_eq!((&row[..40], &row[40..]), (expected, &[0.0; 24][..]));
    }
}

/// Writes the folder of a quantized model and returns its layers.
fn quantized_folder(
    path: &Path,
    config: &HfConfig,
    grid: (u8, usize, bool),
    format: QuantFormat,
) -> BTreeMap<String, QuantizedMatrix> {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let (bits, group_size, symmetric) = grid;
    let layers: BTreeMap<String, QuantizedMatrix> = config
        .arch()
        .linears()
        .into_iter()
        .map(|layer| {
            let (rows, cols) = (layer.d_output, layer.d_input);
            let matrix = random_quantized(rows, cols, bits, group_size, symmetric, &mut rng);
            (layer.name, matrix)
        })
        .collect();
    let dense = config.arch().tensors().into_iter().filter(|(name, _)| {
        let layer = name.strip_suffix(".weight");
        !layer.is_some_and(|layer| layers.contains_key(layer))
    });
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let tensors = dense.map(|(name, shape)| {
        let n = shape.iter().product();
        HostTensor::from_f32(name, DType::F16, shape, values(&mut rng, n))
    });
    let tensors = tensors.collect();
    let out = HfFolder::create(path, true).unwrap();
    out.write_quantized(config, DType::F16, tensors, &layers, format)
        .unwrap();
    out.commit().unwrap();
    layers
}

#[test]
fn a_symmetric_grid_becomes_q4_0_bit_for_bit() {
    let root = tempfile::tempdir().unwrap();
    let config = parse(llama());
    let q4_0 = GgufOptions::default().with_linears(GgufType::Q4_0);
    for format in [
        QuantFormat::Gptq,
        QuantFormat::GptqV2,
        QuantFormat::CompressedTensors,
    ] {
        let from = root.path().join("symmetric");
        let layers = quantized_folder(&from, &config, (4, 32, true), format);
        for options in [q4_0.clone(), GgufOptions::default()] {
            let (path, report) = convert(&from, &options);
            assert!(report.types["Q4_0"] >= layers.len(), "{report:?}");
            let (read, file) = (
                HfConfig::open(&path).unwrap(),
                Checkpoint::open(&path).unwrap(),
            );
            assert_eq!(read.arch(), config.arch());
            for (layer, matrix) in &layers {
                let shape = [matrix.rows(), matrix.cols()];
                let found = read.load_quantized(&file, layer, shape).unwrap().unwrap();
                assert_eq!(found.parts(), matrix.parts(), "{layer}");
            }
        }
    }
    // Zero points: the error names the layer and a type that holds the codes, unless rounding is
    // allowed.
    let from = root.path().join("asymmetric");
    let layers = quantized_folder(&from, &config, (4, 32, false), QuantFormat::GptqV2);
    let error = refusal(&from, &q4_0);
    let expected = "model.layers.0.self_attn.q_proj.weight` again, to q4_0 (q8_0";
    assert!(error.contains(expected), "{error}");
    let (path, _) = convert(&from, &q4_0.clone().with_requantize(true));
    assert!(Checkpoint::open(&path).is_ok());
    let (path, report) = convert(&from, &GgufOptions::default());
    assert!(report.types.contains_key("Q8_0"), "{report:?}");
    let (read, file) = (
        HfConfig::open(&path).unwrap(),
        Checkpoint::open(&path).unwrap(),
    );
    for (layer, matrix) in &layers {
        let shape = [matrix.rows(), matrix.cols()];
        let found = read.load_linear(&file, layer, shape).unwrap();
        assert_eq!(found, matrix.dequantize(), "{layer}");
    }
    // Groups of 16 fit no type of blocks. They are kept as numbers, or refused.
    let from = root.path().join("small");
    let layers = quantized_folder(&from, &config, (4, 16, true), QuantFormat::GptqV2);
    assert!(refusal(&from, &q4_0).contains("f32 holds them exactly"));
    let (path, _) = convert(&from, &GgufOptions::default());
    let file = Checkpoint::open(&path).unwrap();
    let (layer, matrix) = layers.first_key_value().unwrap();
    let found = file.load_f32(&format!("{layer}.weight")).unwrap();
    assert_eq!(found, matrix.dequantize().as_slice());
}

#[test]
fn a_file_is_copied_byte_by_byte() {
    let root = tempfile::tempdir().unwrap();
    let config = parse(llama());
    let from = root.path().join("m");
    folder(&from, &config, 5);
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/arithmetic-llama");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        if fs::copy(shipped.join(name), from.join(name)).is_err() {
            eprintln!("skipped: no shipped model");
            return;
        }
    }
    for kind in [
        GgufType::Q4_0,
        GgufType::Q4_1,
        GgufType::Q8_0,
        GgufType::F16,
    ] {
        let (first, _) = convert(&from, &GgufOptions::default().with_linears(kind));
        let copy = root.path().join("copy.gguf");
        for options in [
            GgufOptions::default(),
            GgufOptions::default().with_linears(kind),
        ] {
            write_gguf(&first, &copy, &options.with_overwrite(true)).unwrap();
            let [first, copy] = [&first, &copy].map(|path| Gguf::open(path).unwrap());
            let keys = |gguf: &Gguf| {
                let file = gguf.first();
                let keys = file.values.iter();
                keys.map(|(key, value)| (key.clone(), file.encoded(value)))
                    .collect::<Vec<_>>()
            };
            assert!(keys(&first) == keys(&copy), "{kind}");
            for (a, b) in first.first().tensors.iter().zip(&copy.first().tensors) {
                assert_eq!((&a.name, &a.shape), (&b.name, &b.shape));
                let bytes = |gguf: &Gguf, tensor: &super::super::container::Tensor| {
                    gguf.first().bytes.as_ref()[tensor.range.clone()].to_vec()
                };
                assert!(bytes(&first, a) == bytes(&copy, b), "{kind} {}", a.name);
            }
        }
        let refused = write_gguf(&first, &copy, &GgufOptions::default()).unwrap_err();
        assert!(refused.to_string().contains("already"), "{refused}");
    }
    // From blocks to other blocks only if that is exact, or asked for.
    let (eight, _) = convert(&from, &GgufOptions::default().with_linears(GgufType::Q8_0));
    let four = GgufOptions::default().with_linears(GgufType::Q4_0);
    assert!(refusal(&eight, &four).contains("again, to q4_0"));
    let out = root.path().join("four.gguf");
    write_gguf(&eight, &out, &four.with_requantize(true)).unwrap();
    let (four, _) = convert(&from, &GgufOptions::default().with_linears(GgufType::Q4_0));
    let out = root.path().join("eight.gguf");
    let eight = GgufOptions::default().with_linears(GgufType::Q8_0);
    write_gguf(&four, &out, &eight).unwrap();
    let (a, b) = (
        Checkpoint::open(&four).unwrap(),
        Checkpoint::open(&out).unwrap(),
    );
    for name in a.names() {
        assert_eq!(a.load_f32(name).unwrap(), b.load_f32(name).unwrap());
    }
}

#[test]
fn blocks_of_different_sizes_are_written_as_deci() {
    let root = tempfile::tempdir().unwrap();
    let dims = |n_heads, n_kv_heads, d_mlp| BlockDims {
        n_heads,
        n_kv_heads,
        d_mlp,
    };
    let mut value = llama();
    value["num_hidden_layers"] = 5.into();
    value["hidden_size"] = 96.into();
    let blocks = [
        dims(4, 2, 64),
        dims(2, 1, 96),
        dims(0, 0, 32),
        dims(4, 2, 0),
        dims(4, 4, 160),
    ];
    let config = parse(value).with_blocks(&blocks).unwrap();
    assert_eq!(config.family(), Family::ElasticLlama);
    let from = root.path().join("deci");
    folder(&from, &config, 6);
    let (path, report) = convert(&from, &GgufOptions::default());
    assert!(report.notices.iter().any(|n| n.contains("zeros")));
    let gguf = Gguf::open(&path).unwrap();
    assert_eq!(
        gguf.first().text("general.architecture").unwrap(),
        Some("deci")
    );
    let read = HfConfig::open(&path).unwrap();
    let mut expected = blocks.to_vec();
    expected[3].d_mlp = SMALL_MLP;
    assert_eq!(read.blocks(), expected);
    let (source, file) = (
        Checkpoint::open(&from).unwrap(),
        Checkpoint::open(&path).unwrap(),
    );
    read.check(&file).unwrap();
    for (name, _) in config.arch().tensors() {
        assert_eq!(
            file.load_f32(&name).unwrap(),
            source.load_f32(&name).unwrap(),
            "{name}"
        );
    }
    let down = file.load_f32("model.layers.3.mlp.down_proj.weight");
    assert_eq!(down.unwrap(), [0.0; 96 * SMALL_MLP]);
    // A first block without attention gets one of zeros.
    let blocks = [dims(0, 0, 64), dims(4, 2, 96)];
    let mut value = llama();
    value["tie_word_embeddings"] = true.into();
    let config = parse(value).with_blocks(&blocks).unwrap();
    let from = root.path().join("first");
    folder(&from, &config, 7);
    let (path, _) = convert(&from, &GgufOptions::default());
    let read = HfConfig::open(&path).unwrap();
    assert_eq!(read.blocks(), [dims(2, 1, 64), dims(4, 2, 96)]);
    let file = Checkpoint::open(&path).unwrap();
    let output = file.load_f32("model.layers.0.self_attn.o_proj.weight");
    assert_eq!(output.unwrap(), [0.0; 64 * 48]);
}

#[test]
fn blocks_are_filled_up_where_they_must_be_alike() {
    let root = tempfile::tempdir().unwrap();
    let dims = |n_heads, n_kv_heads, d_mlp| BlockDims {
        n_heads,
        n_kv_heads,
        d_mlp,
    };
    let value = json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu", "bos_token_id": 1,
        "eos_token_id": 2, "tie_word_embeddings": true,
    });
    let blocks = [dims(2, 1, 64), dims(4, 2, 0), dims(0, 0, 96)];
    let config = parse(value.clone()).with_blocks(&blocks).unwrap();
    assert_eq!(config.family(), Family::Qwen2);
    let from = root.path().join("qwen");
    folder(&from, &config, 8);
    for kind in [GgufType::F32, GgufType::Q8_0] {
        let (path, report) = convert(&from, &GgufOptions::default().with_linears(kind));
        assert!(report.notices.iter().any(|n| n.contains("zeros")));
        let read = HfConfig::open(&path).unwrap();
        assert_eq!(read.blocks(), [dims(4, 2, 96); 3]);
        let (source, file) = (
            Checkpoint::open(&from).unwrap(),
            Checkpoint::open(&path).unwrap(),
        );
        read.check(&file).unwrap();
        for (name, shape) in read.arch().tensors() {
            let found = file.load_f32(&name).unwrap();
            let cols = *shape.last().unwrap();
            if !source.contains(&name) {
                let fill = if name.contains("norm") { 1.0 } else { 0.0 };
                assert!(found.iter().all(|x| *x == fill), "{name}");
                continue;
            }
            let part = source.info(&name).unwrap().shape.clone();
            let expected = source.load_f32(&name).unwrap();
            let width = *part.last().unwrap();
            for (row, found) in found.chunks(cols).enumerate() {
                let inside = expected.chunks(width).nth(row).unwrap_or(&[]);
                let tolerance = if kind == GgufType::F32 { 0.0 } else { 0.004 };
                for (column, found) in found.iter().enumerate() {
                    let expected = inside.get(column).copied().unwrap_or(0.0);
                    assert!(
                        (found - expected).abs() <= tolerance,
                        "{name} {row} {column}"
                    );
                }
            }
        }
    }
    // The query heads of a key/value head must be those of the whole model.
    let blocks = [dims(4, 2, 64), dims(2, 2, 96)];
    let config = parse(value).with_blocks(&blocks).unwrap();
    let from = root.path().join("groups");
    folder(&from, &config, 9);
    let error = refusal(&from, &GgufOptions::default());
    assert!(
        error.contains("query heads for each key/value head"),
        "{error}"
    );
}

#[test]
fn a_window_limits_the_context() {
    let root = tempfile::tempdir().unwrap();
    let mut value = llama();
    value["model_type"] = "mistral".into();
    value["architectures"] = json!(["MistralForCausalLM"]);
    value["sliding_window"] = 48.into();
    value["rope_scaling"] = json!({ "rope_type": "linear", "factor": 4.0 });
    let config = parse(value);
    let from = root.path().join("m");
    folder(&from, &config, 10);
    let (path, report) = convert(&from, &GgufOptions::default());
    let read = HfConfig::open(&path).unwrap();
    assert_eq!(read.max_position_embeddings(), 48);
    assert_eq!(*read.rope_scaling(), RopeScaling::Linear { factor: 4.0 });
    assert!(report.notices.iter().any(|n| n.contains("window")));
}

#[test]
fn rows_that_are_no_blocks_are_f16() {
    let root = tempfile::tempdir().unwrap();
    let mut value = llama();
    value["intermediate_size"] = 90.into();
    let from = root.path().join("m");
    folder(&from, &parse(value), 15);
    let options = GgufOptions::default().with_linears(GgufType::Q4_0);
    let (path, report) = convert(&from, &options);
    assert!(
        report
            .notices
            .iter()
            .any(|n| n.starts_with("2 tensors are F16"))
    );
    let file = Checkpoint::open(&path).unwrap();
    let info = file.info("model.layers.1.mlp.down_proj.weight").unwrap();
    assert_eq!(info.dtype, DType::F16);
}

/// llama.cpp refuses a file with a tensor that it does not use.
#[test]
fn biases_that_llama_cpp_lacks_are_refused() {
    let root = tempfile::tempdir().unwrap();
    for (kind, class, bias) in [
        ("qwen3", "Qwen3ForCausalLM", "attention_bias"),
        ("smollm3", "SmolLM3ForCausalLM", "mlp_bias"),
        ("gemma", "GemmaForCausalLM", "attention_bias"),
    ] {
        let mut value = llama();
        value["model_type"] = kind.into();
        value["architectures"] = json!([class]);
        value["num_hidden_layers"] = 4.into();
        value["rope_scaling"] = Value::Null;
        value["hidden_act"] = if kind == "gemma" { "gelu" } else { "silu" }.into();
        value["tie_word_embeddings"] = true.into();
        for key in ["attention_bias", "mlp_bias"] {
            value[key] = (key == bias).into();
        }
        let from = root.path().join(kind);
        folder(&from, &parse(value.clone()), 11);
        let error = refusal(&from, &GgufOptions::default());
        assert!(error.contains("bias` in GGUF of architecture"), "{error}");
        value[bias] = false.into();
        let from = root.path().join(format!("{kind}-without"));
        folder(&from, &parse(value), 11);
        convert(&from, &GgufOptions::default());
    }
}

/// Ids of a text by the tokenizer of a folder or file.
fn ids(json: &str, text: &str) -> Vec<u32> {
    let tokenizer: tokenizers::Tokenizer = json.parse().unwrap();
    tokenizer.encode(text, true).unwrap().get_ids().to_vec()
}

#[test]
fn tokenizers_are_carried_over() {
    let root = tempfile::tempdir().unwrap();
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/arithmetic-llama");
    let mut cases = vec![(shipped.join("tokenizer.json"), 520, "smollm")];
    cases.extend(
        shared("models/story-llama-0.6M/tokenizer.json").map(|path| (path, 2048, "default")),
    );
    cases.extend(
        shared("models/tokenizers/gpt2/tokenizer.json").map(|path| (path, 50_300, "gpt-2")),
    );
    let text = "Once upon a time, 12 (or 345) cats sat:\n  def f(x): return x";
    for (path, vocab_size, pre) in cases {
        let Ok(json) = fs::read_to_string(&path) else {
            eprintln!("skipped: {} is missing", path.display());
            continue;
        };
        let mut value = llama();
        value["vocab_size"] = vocab_size.into();
        value["hidden_size"] = 8.into();
        value["bos_token_id"] = Value::Null;
        value["eos_token_id"] = Value::Null;
        let config = parse(value);
        let from = root.path().join(pre);
        folder(&from, &config, 11);
        fs::write(from.join("tokenizer.json"), &json).unwrap();
        let fields = json!({
            "chat_template": [
                { "name": "default", "template": "{{ a }}" },
                { "name": "tool_use", "template": "{{ b }}" },
            ],
        });
        fs::write(from.join("tokenizer_config.json"), fields.to_string()).unwrap();
        let (file, _) = convert(&from, &GgufOptions::default());
        let gguf = Gguf::open(&file).unwrap();
        assert_eq!(gguf.first().text("tokenizer.ggml.pre").unwrap(), Some(pre));
        assert_eq!(gguf.chat_template().unwrap(), Some("{{ a }}"));
        let other = gguf.first().text("tokenizer.chat_template.tool_use");
        assert_eq!(other.unwrap(), Some("{{ b }}"));
        let tokens = gguf
            .first()
            .texts("tokenizer.ggml.tokens")
            .unwrap()
            .unwrap();
        assert_eq!(tokens.len(), vocab_size);
        let written = gguf.tokenizer().unwrap().unwrap();
        assert_eq!(ids(&written.json, text), ids(&json, text), "{pre}");
        // A template in a file of its own has priority.
        fs::write(from.join("chat_template.jinja"), "{{ c }}").unwrap();
        let (file, _) = convert(&from, &GgufOptions::default());
        let gguf = Gguf::open(&file).unwrap();
        assert_eq!(gguf.chat_template().unwrap(), Some("{{ c }}"));
    }
}

#[test]
fn scores_of_pieces_give_the_same_merges() {
    let Some(json) = crate::io::gguf::tests::llama2_json() else {
        return;
    };
    let root = tempfile::tempdir().unwrap();
    let mut value = llama();
    value["vocab_size"] = 32_010.into();
    value["hidden_size"] = 8.into();
    let from = root.path().join("m");
    folder(&from, &parse(value), 14);
    fs::write(from.join("tokenizer.json"), &json).unwrap();
    let (file, report) = convert(&from, &GgufOptions::default());
    assert!(report.notices.is_empty(), "{:?}", report.notices);
    let gguf = Gguf::open(&file).unwrap();
    let written = gguf.tokenizer().unwrap().unwrap().json;
    let [ours, theirs] = [&written, &json].map(|json| {
        let value: Value = serde_json::from_str(json).unwrap();
        value["model"]["merges"].clone()
    });
    let pairs = |value: &Value| value.as_array().unwrap().len();
    assert_eq!((pairs(&ours), ours == theirs), (pairs(&theirs), true));
}

#[test]
fn tokenizers_that_llama_cpp_lacks_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let config = parse(llama());
    let from = root.path().join("m");
    folder(&from, &config, 12);
    // Without a tokenizer, the file says so.
    let (file, report) = convert(&from, &GgufOptions::default());
    assert!(report.notices.iter().any(|n| n.contains("no tokenizer")));
    assert!(Gguf::open(&file).unwrap().tokenizer().unwrap().is_none());
    let tokenizer = |changes: Value| {
        let mut value = json!({
            "added_tokens": [{ "id": 2, "content": "<end>", "special": true }],
            "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false },
            "model": { "type": "BPE", "vocab": { "a": 0, "b": 1 }, "merges": [] },
        });
        for (key, change) in changes.as_object().unwrap() {
            value[key] = change.clone();
        }
        fs::write(from.join("tokenizer.json"), value.to_string()).unwrap();
    };
    tokenizer(json!({}));
    convert(&from, &GgufOptions::default());
    let split = json!({ "type": "Sequence", "pretokenizers": [
        { "type": "Split", "pattern": { "Regex": "[a-z]+" }, "behavior": "Isolated" },
        { "type": "ByteLevel", "add_prefix_space": false, "use_regex": false },
    ] });
    for (changes, expected) in [
        (json!({ "pre_tokenizer": split }), "[a-z]+"),
        (
            json!({ "model": { "type": "Unigram", "vocab": [] } }),
            "Unigram",
        ),
        (
            json!({ "pre_tokenizer": { "type": "Whitespace" } }),
            "neither",
        ),
        (
            json!({ "post_processor": { "type": "BertProcessing" } }),
            "BertProcessing",
        ),
        (
            json!({ "model": { "vocab": { "a": 0 }, "merges": ["a"] } }),
            "merge",
        ),
        (json!({ "model": { "vocab": { "a": -1 } } }), "number"),
    ] {
        tokenizer(changes);
        let error = refusal(&from, &GgufOptions::default());
        assert!(error.contains(expected), "{error}");
    }
    tokenizer(json!({ "pre_tokenizer": split }));
    let named = GgufOptions::default().with_pre_tokenizer("qwen2");
    let (file, _) = convert(&from, &named);
    let gguf = Gguf::open(&file).unwrap();
    assert_eq!(
        gguf.first().text("tokenizer.ggml.pre").unwrap(),
        Some("qwen2")
    );
}

#[test]
fn adapters_have_the_scale_of_each_layer() {
    let root = tempfile::tempdir().unwrap();
    let config = parse(llama());
    let mut rng = ChaCha8Rng::seed_from_u64(13);
    let mut adapter = LoraAdapter::default();
    let layers = [
        ("self_attn.q_proj", 3, 2.0),
        ("self_attn.v_proj", 8, 2.0),
        ("mlp.down_proj", 8, 0.5),
    ];
    for (path, rank, scale) in layers {
        let name = format!("model.layers.1.{path}");
        let linears = config.arch().linears();
        let layer = linears.iter().find(|layer| layer.name == name).unwrap();
        let a = Matrix::new(rank, layer.d_input, values(&mut rng, rank * layer.d_input)).unwrap();
        let b = Matrix::new(
            layer.d_output,
            rank,
            values(&mut rng, layer.d_output * rank),
        )
        .unwrap();
        adapter
            .layers
            .insert(name, LoraWeights::new(a, b, scale).unwrap());
    }
    let path = root.path().join("lora.gguf");
    adapter
        .write_gguf(&path, &config, GgufType::F32, false)
        .unwrap();
    let file = File::parse(&path, crate::io::tensors::read_file(&path, false).unwrap()).unwrap();
    let text = |key: &str| file.text(key).unwrap().unwrap().to_string();
    assert_eq!(
        (
            text("general.type"),
            text("adapter.type"),
            text("general.architecture")
        ),
        ("adapter".into(), "lora".into(), "llama".into())
    );
    let Some(Item::F32(alpha)) = file.values.get("adapter.lora.alpha").cloned() else {
        panic!()
    };
    let numbers = |name: &str| {
        let tensor = file.tensors.iter().find(|t| t.name == name).unwrap();
        let bytes = &file.bytes.as_ref()[tensor.range.clone()];
        let all = bytes.chunks_exact(4);
        let values: Vec<f32> = all
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        Matrix::new(tensor.shape[0], tensor.shape[1], values).unwrap()
    };
    for (path, part) in [
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.v_proj", "attn_v"),
        ("mlp.down_proj", "ffn_down"),
    ] {
        let ours = &adapter.layers[&format!("model.layers.1.{path}")];
        let a = numbers(&format!("blk.1.{part}.weight.lora_a"));
        let b = numbers(&format!("blk.1.{part}.weight.lora_b"));
        assert_eq!(a, *ours.a());
        // llama.cpp's scale.
        let scale = alpha / b.cols() as f32;
        let theirs = LoraWeights::new(a, b, scale).unwrap().delta();
        for row in 0..ours.d_output() {
            let place = if part == "attn_q" {
                place(row, 24)
            } else {
                row
            };
            for (x, y) in theirs.row(place).iter().zip(ours.delta().row(row)) {
                assert!((x - y).abs() < 1e-5, "{path} {row}");
            }
        }
    }
    let again = adapter.write_gguf(&path, &config, GgufType::F32, false);
    assert!(again.unwrap_err().to_string().contains("already"));
    let quantized = adapter.write_gguf(&path, &config, GgufType::Q8_0, true);
    assert!(quantized.unwrap_err().to_string().contains("f16"));
    let mut embedding = adapter.clone();
    let (rows, cols) = (config.vocab_size(), config.hidden_size());
    let pair = LoraWeights::new(Matrix::zeros(2, cols), Matrix::zeros(rows, 2), 1.0);
    let module = "model.embed_tokens".to_string();
    embedding.layers.insert(module, pair.unwrap());
    let refused = embedding.write_gguf(&path, &config, GgufType::F16, true);
    assert!(refused.unwrap_err().to_string().contains("embed_tokens"));
    adapter.sparse = true;
    let sparse = adapter.write_gguf(&path, &config, GgufType::F16, true);
    assert!(sparse.unwrap_err().to_string().contains("merge"));
}

#[test]
fn types_have_names() {
    for (kind, name, ..) in TYPES {
        assert_eq!(name.parse::<GgufType>().unwrap(), kind);
        assert_eq!(GgufType::of(kind.encoding()), Some(kind));
        assert_eq!(kind.to_string(), name);
        let (len, bytes) = kind.encoding().block();
        if let Some(inner) = kind.row().4 {
            assert_eq!(inner.block(), (len, bytes));
        }
    }
    assert!(
        "q9".parse::<GgufType>()
            .unwrap_err()
            .to_string()
            .contains("q4_0")
    );
    assert_eq!(GgufType::Q6K.for_rows(512), GgufType::Q6K);
    assert_eq!(GgufType::Q6K.for_rows(96), GgufType::Q8_0);
    assert_eq!(GgufType::Q6K.for_rows(90), GgufType::F16);
    assert_eq!(GgufType::Q4_0.for_rows(40), GgufType::F16);
}
