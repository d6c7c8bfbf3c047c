//! Model folders with quantized layers: they are read back as written, and other tools compute the
//! same results from them.
//!
//! The scripts of this test need transformers with GPTQModel and optimum, and with
//! compressed-tensors. Scripts whose modules the Python (`ELASTIC_LORA_PYTHON`, else `python3`)
//! lacks are skipped, and the test prints so.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{load, random_ids, random_values, shared};
use burn::tensor::Device;
use elastic_lora::Error;
use elastic_lora::format::{PackedMatrix, QuantizedMatrix, QuantizedParts};
use elastic_lora::io::hf::{HfConfig, HfFolder, LlamaDims};
use elastic_lora::io::tensors::write_safetensors;
use elastic_lora::io::{Checkpoint, DType, HostTensor, QuantFormat};
use elastic_lora::linalg::Matrix;
use elastic_lora::model::{Decoder, Pretrained};
use elastic_lora::nn::host_values;
use half::f16;

const FORMATS: [QuantFormat; 3] = [
    QuantFormat::Gptq,
    QuantFormat::GptqV2,
    QuantFormat::CompressedTensors,
];

/// Quantization of the layers of a test.
#[derive(Clone, Copy)]
struct Grid {
    bits: u8,
    /// Group size, or `None` for one group per row.
    group_size: Option<usize>,
    symmetric: bool,
    act_order: bool,
}

/// A Llama with biases whose widths all fill whole words at any number of bits.
fn model(seed: u64) -> Decoder {
    let config = HfConfig::new_llama(&LlamaDims {
        vocab_size: 61,
        hidden_size: 64,
        intermediate_size: 96,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 64,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
        bos_token_id: Some(1),
        eos_token_id: Some(2),
        pad_token_id: None,
        dtype: DType::F32,
    });
    let mut raw = config.unwrap().raw().clone();
    raw.insert("attention_bias".into(), true.into());
    let model = Decoder::init(&HfConfig::from_json(raw).unwrap(), seed, &Device::flex()).unwrap();
    // Weights and biases that f16 can represent, and that are large enough to matter.
    let mut model = model.with_weight_dtype(DType::F32).unwrap();
    let mut salt = seed;
    model
        .try_for_each_linear(|_, layer| {
            salt += 1;
            let [d_input, d_output] = layer.base.dims();
            let values = random_values(d_input * d_output, salt).into_iter();
            let values = values
                .map(|v| f16::from_f32(v * (3.0 / d_input as f32).sqrt()).to_f32())
                .collect();
            layer
                .base
                .set_matrix(&Matrix::new(d_output, d_input, values)?)?;
            if let Some(bias) = &mut layer.base.bias {
                let values: Vec<f32> = random_values(d_output, salt + 100)
                    .iter()
                    .map(|v| f16::from_f32(*v).to_f32())
                    .collect();
                let device = bias.val().device();
                *bias = bias
                    .clone()
                    .map(|_| burn::tensor::Tensor::from_data(values.as_slice(), &device));
            }
            Ok(())
        })
        .unwrap();
    let head: Vec<f32> = random_values(61 * 64, seed + 200)
        .iter()
        .map(|v| f16::from_f32(*v).to_f32())
        .collect();
    model
        .lm_head
        .as_mut()
        .unwrap()
        .set_matrix(&Matrix::new(61, 64, head).unwrap())
        .unwrap();
    model
}

/// Rounds the weights of a layer to a grid that spans them.
fn quantize(weight: &Matrix, grid: Grid, seed: u64) -> QuantizedMatrix {
    let (rows, cols) = (weight.rows(), weight.cols());
    let group_size = grid.group_size.unwrap_or(cols);
    let groups = cols.div_ceil(group_size);
    let shuffled: Vec<u32> = {
        let keys = random_values(cols, seed);
        let mut order: Vec<usize> = (0..cols).collect();
        order.sort_by(|a, b| keys[*a].total_cmp(&keys[*b]));
        let mut group_of = vec![0; cols];
        order
            .iter()
            .enumerate()
            .for_each(|(rank, column)| group_of[*column] = (rank / group_size) as u32);
        group_of
    };
    let group_of = grid.act_order.then_some(shuffled);
    let group = |column: usize| {
        group_of
            .as_ref()
            .map_or(column / group_size, |group_of| group_of[column] as usize)
    };
    let top = f32::from(u8::MAX >> (8 - grid.bits));
    let middle = f32::from(1_u8 << (grid.bits - 1));
    let mut parts = QuantizedParts {
        rows,
        cols,
        bits: grid.bits,
        group_size,
        symmetric: grid.symmetric,
        codes: Vec::new(),
        scales: Vec::new(),
        zeros: Vec::new(),
        group_of: group_of.clone(),
    };
    for row in 0..rows {
        let values = weight.row(row);
        let mut grids = Vec::new();
        for index in 0..groups {
            let members = || {
                (0..cols)
                    .filter(|column| group(*column) == index)
                    .map(|column| values[column])
            };
            let (low, high) = members().fold((0.0_f32, 0.0_f32), |(low, high), v| {
                (low.min(v), high.max(v))
            });
            let (scale, zero) = if grid.symmetric {
                (low.abs().max(high) / (top - middle), middle)
            } else {
                let scale = (high - low) / top;
                (scale, (-low / scale).round().clamp(1.0, top))
            };
            grids.push((f16::from_f32(scale).to_f32(), zero));
        }
        for (column, value) in values.iter().enumerate() {
            let (scale, zero) = grids[group(column)];
            parts
                .codes
                .push((value / scale + zero).round().clamp(0.0, top) as u8);
        }
        parts.scales.extend(grids.iter().map(|(scale, _)| *scale));
        parts
            .zeros
            .extend(grids.iter().map(|(_, zero)| *zero as u8));
    }
    QuantizedMatrix::new(parts).unwrap()
}

/// Quantizes the layers whose names end in one of `kinds`, also in the model itself.
fn quantize_model(
    model: &mut Decoder,
    grid: Grid,
    kinds: &[&str],
) -> BTreeMap<String, QuantizedMatrix> {
    let mut layers = BTreeMap::new();
    model
        .try_for_each_linear(|name, layer| {
            if kinds.iter().any(|kind| name.ends_with(kind)) {
                let matrix = quantize(&layer.base.to_matrix(), grid, layers.len() as u64);
                layer.base.set_matrix(&matrix.dequantize())?;
                layers.insert(name.to_string(), matrix);
            }
            Ok(())
        })
        .unwrap();
    layers
}

fn logits(model: &Decoder, ids: &[u32]) -> Vec<f32> {
    host_values(model.forward(model.tokens(ids, 1).unwrap()))
}

fn write(
    model: &Decoder,
    layers: &BTreeMap<String, QuantizedMatrix>,
    format: QuantFormat,
    folder: &Path,
    dtype: DType,
) {
    let out = HfFolder::create(folder, false)
        .unwrap()
        .with_max_shard_bytes(40_000);
    out.write_quantized(
        model.config(),
        dtype,
        model.tensors(dtype).unwrap(),
        layers,
        format,
    )
    .unwrap();
    out.commit().unwrap();
}

const ALL: [&str; 1] = ["_proj"];

#[test]
fn folders_come_back_with_every_code_and_the_same_logits() {
    let scratch = tempfile::tempdir().unwrap();
    let grids = [
        Grid {
            bits: 4,
            group_size: Some(32),
            symmetric: true,
            act_order: false,
        },
        Grid {
            bits: 8,
            group_size: None,
            symmetric: false,
            act_order: false,
        },
        Grid {
            bits: 3,
            group_size: Some(32),
            symmetric: false,
            act_order: true,
        },
        Grid {
            bits: 2,
            group_size: Some(16),
            symmetric: false,
            act_order: false,
        },
    ];
    for (which, grid) in grids.into_iter().enumerate() {
        for format in FORMATS {
            if format == QuantFormat::CompressedTensors && (grid.act_order || grid.bits == 3) {
                continue;
            }
            let kinds: &[&str] = if which == 1 {
                &["q_proj", "down_proj"]
            } else {
                &ALL
            };
            let mut model = model(7 + which as u64);
            let layers = quantize_model(&mut model, grid, kinds);
            let folder = scratch.path().join(format!("{which}-{}", format.name()));
            write(&model, &layers, format, &folder, DType::F32);

            let config = HfConfig::open(&folder).unwrap();
            assert_eq!(config.quantization().unwrap().format(), format);
            let checkpoint = Checkpoint::open(&folder).unwrap();
            config.check(&checkpoint).unwrap();
            assert_eq!(config.quantized_layers(&checkpoint).unwrap(), layers);
            assert_eq!(
                layers
                    .keys()
                    .filter(|name| checkpoint.contains(&format!("{name}.weight")))
                    .count(),
                0
            );
            let ids = random_ids(40, 61, 3);
            assert_eq!(
                logits(&load(&folder), &ids),
                logits(&model, &ids),
                "{which} {format:?}"
            );

            // The packed weights take the size of their layout, which is close to the size of the
            // file.
            let packed: usize = layers
                .values()
                .map(|matrix| PackedMatrix::new(matrix).bytes())
                .sum();
            let n: usize = layers
                .values()
                .map(|matrix| matrix.rows() * matrix.cols())
                .sum();
            assert!(
                packed >= n * usize::from(grid.bits) / 8
                    && packed < n * (usize::from(grid.bits) + 2) / 8
            );

            // Written again without codes, it is a plain folder.
            let dense = scratch
                .path()
                .join(format!("{which}-{}-dense", format.name()));
            let read = load(&folder);
            let out = HfFolder::create(&dense, false).unwrap();
            out.write_model(read.config(), DType::F32, read.tensors(DType::F32).unwrap())
                .unwrap();
            out.commit().unwrap();
            assert!(HfConfig::open(&dense).unwrap().quantization().is_none());
            assert_eq!(logits(&load(&dense), &ids), logits(&model, &ids));
        }
    }
}

#[test]
fn an_old_gptq_folder_has_its_config_beside() {
    let scratch = tempfile::tempdir().unwrap();
    let mut model = model(3);
    let grid = Grid {
        bits: 4,
        group_size: Some(32),
        symmetric: true,
        act_order: false,
    };
    let layers = quantize_model(&mut model, grid, &ALL);
    let folder = scratch.path().join("model");
    write(&model, &layers, QuantFormat::Gptq, &folder, DType::F32);
    let path = folder.join("config.json");
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config
        .as_object_mut()
        .unwrap()
        .remove("quantization_config")
        .unwrap();
    std::fs::write(&path, config.to_string()).unwrap();
    let config = HfConfig::open(&folder).unwrap();
    assert_eq!(
        config
            .quantized_layers(&Checkpoint::open(&folder).unwrap())
            .unwrap(),
        layers
    );
    // Without a quantization config, the weights of the folder count as missing.
    std::fs::remove_file(folder.join("quantize_config.json")).unwrap();
    let config = HfConfig::open(&folder).unwrap();
    let checkpoint = Checkpoint::open(&folder).unwrap();
    assert!(matches!(
        Decoder::load(&config, &checkpoint, &Device::flex()),
        Err(Error::MissingTensor { .. })
    ));
}

#[test]
fn a_folder_that_cannot_be_written_does_not_appear() {
    let scratch = tempfile::tempdir().unwrap();
    let mut model = model(4);
    let grid = Grid {
        bits: 4,
        group_size: Some(32),
        symmetric: false,
        act_order: false,
    };
    let layers = quantize_model(&mut model, grid, &ALL);
    let folder = scratch.path().join("model");
    let refused = |layers: &BTreeMap<String, QuantizedMatrix>, format| {
        let out = HfFolder::create(&folder, false).unwrap();
        let error = out.write_quantized(
            model.config(),
            DType::F32,
            model.tensors(DType::F32).unwrap(),
            layers,
            format,
        );
        drop(out);
        assert!(!folder.exists());
        error.unwrap_err()
    };
    let name = "model.layers.1.mlp.up_proj";
    let mut parts = layers[name].clone().into_parts();
    parts.zeros[5] = 0;
    let mut zero = layers.clone();
    zero.insert(name.into(), QuantizedMatrix::new(parts).unwrap());
    let error = refused(&zero, QuantFormat::Gptq).to_string();
    assert!(
        error.contains("model.layers.1.mlp.up_proj.qzeros"),
        "{error}"
    );

    let mut unknown = layers.clone();
    unknown.insert("model.layers.2.mlp.up_proj".into(), layers[name].clone());
    assert!(matches!(
        refused(&unknown, QuantFormat::GptqV2),
        Error::UnknownLayer { .. }
    ));
    let mut other = layers.clone();
    other.insert("model.layers.1.mlp.down_proj".into(), layers[name].clone());
    assert!(matches!(
        refused(&other, QuantFormat::GptqV2),
        Error::TensorShape { .. }
    ));
    assert!(matches!(
        refused(&BTreeMap::new(), QuantFormat::GptqV2),
        Error::InvalidArgument { .. }
    ));
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
}

#[test]
fn a_trained_model_keeps_its_tokenizer() {
    let Some(dir) = shared("models/story-llama-0.6M") else {
        return;
    };
    let scratch = tempfile::tempdir().unwrap();
    let pretrained = Pretrained::open(dir, &Device::flex()).unwrap();
    let mut model = pretrained.model.clone();
    let grid = Grid {
        bits: 4,
        group_size: Some(32),
        symmetric: true,
        act_order: false,
    };
    let layers = quantize_model(&mut model, grid, &ALL);
    for format in FORMATS {
        let folder = scratch.path().join(format.name());
        pretrained
            .write_quantized(&model, &layers, format, &folder, false)
            .unwrap();
        let read = Pretrained::open(&folder, &Device::flex()).unwrap();
        let ids = random_ids(50, 2048, 9);
        let difference = crate::common::max_diff(&logits(&read.model, &ids), &logits(&model, &ids));
        let size: u64 = std::fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .sum();
        eprintln!(
            "{}: {size} bytes, max abs diff {difference:.3e}",
            format.name()
        );
        assert!(difference <= 1e-5);
        let config = HfConfig::open(&folder).unwrap();
        assert_eq!(
            config
                .quantized_layers(&Checkpoint::open(&folder).unwrap())
                .unwrap(),
            layers
        );
    }
}

/// Runs a script of `fixtures/interop` on folders and vectors. Returns its exit code and its
/// output, or `None` if one of its modules is missing.
fn run(script: &str, arguments: &[PathBuf]) -> Option<(Option<i32>, String)> {
    let python =
        std::env::var_os("ELASTIC_LORA_PYTHON").map_or_else(|| "python3".into(), PathBuf::from);
    let script = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/interop")
        .join(script);
    let output = Command::new(&python)
        .arg(&script)
        .args(arguments)
        .args(["--tolerance", "1e-4"])
        .envs([("HF_HUB_OFFLINE", "1"), ("CUDA_VISIBLE_DEVICES", "")])
        .output();
    let Ok(output) = output else {
        eprintln!(
            "skipped: no {} (name a Python in ELASTIC_LORA_PYTHON)",
            python.display()
        );
        return None;
    };
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    // GPTQModel logs to standard output.
    out.lines()
        .filter(|line| line.contains("max abs diff") || line.starts_with("torch"))
        .for_each(|l| eprintln!("{l}"));
    if output.status.code() == Some(77) {
        eprintln!("skipped: {err}");
        return None;
    }
    Some((output.status.code(), format!("{out}\n{err}")))
}

/// Checks that the scripts accept correct folders and report wrong ones.
fn check(script: &str, arguments: &[PathBuf]) {
    let Some((code, said)) = run(script, arguments) else {
        return;
    };
    assert_eq!(code, Some(0), "{said}");
    // The first folder with the vectors of the second one.
    let Some((code, said)) = run(script, &[arguments[0].clone(), arguments[3].clone()]) else {
        return;
    };
    assert!(
        code == Some(1) && said.contains("logits differ by"),
        "{said}"
    );
}

/// Writes models with these grids and formats, and their outputs. Returns the arguments of the
/// script.
fn folders(scratch: &Path, cases: &[(Grid, QuantFormat, &[&str])]) -> Vec<PathBuf> {
    let mut arguments = Vec::new();
    for (which, (grid, format, kinds)) in cases.iter().enumerate() {
        let mut model = model(20 + which as u64);
        let layers = quantize_model(&mut model, *grid, kinds);
        let folder = scratch.join(format!("{which}-{}-{}", format.name(), grid.bits));
        write(&model, &layers, *format, &folder, DType::F16);
        // The reference is the folder as it is read here, including its f16 head and norms.
        let model = load(&folder);
        let ids = random_ids(33, 61, which as u64);
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let tensors = vec![
            HostTensor::from_bytes("input_ids", DType::I32, [ids.len()], bytes),
            HostTensor::from_f32("logits", DType::F32, [ids.len(), 61], logits(&model, &ids)),
        ];
        let names: Vec<&String> = layers.keys().collect();
        let metadata = BTreeMap::from([(
            "quantized".to_string(),
            serde_json::to_string(&names).unwrap(),
        )]);
        let vectors = folder.with_extension("safetensors");
        write_safetensors(&vectors, tensors, &metadata).unwrap();
        arguments.extend([folder, vectors]);
    }
    arguments
}

#[test]
fn transformers_reads_gptq_folders() {
    let scratch = tempfile::tempdir().unwrap();
    let grid = |bits, group_size, symmetric, act_order| Grid {
        bits,
        group_size,
        symmetric,
        act_order,
    };
    let some: &[&str] = &["self_attn.q_proj", "mlp.down_proj"];
    let cases: [(Grid, QuantFormat, &[&str]); 8] = [
        (grid(4, Some(32), true, false), QuantFormat::Gptq, &ALL),
        (grid(4, Some(32), false, false), QuantFormat::Gptq, &ALL),
        (grid(4, Some(32), true, true), QuantFormat::Gptq, some),
        (grid(3, Some(32), false, false), QuantFormat::Gptq, &ALL),
        (grid(4, None, false, false), QuantFormat::GptqV2, &ALL),
        (grid(3, Some(32), true, true), QuantFormat::GptqV2, &ALL),
        (grid(8, Some(16), false, false), QuantFormat::GptqV2, some),
        (grid(2, Some(16), false, false), QuantFormat::GptqV2, &ALL),
    ];
    check("check_gptq.py", &folders(scratch.path(), &cases));
}

#[test]
fn transformers_reads_compressed_tensors_folders() {
    let scratch = tempfile::tempdir().unwrap();
    let grid = |bits, group_size, symmetric| Grid {
        bits,
        group_size,
        symmetric,
        act_order: false,
    };
    let format = QuantFormat::CompressedTensors;
    let cases: [(Grid, QuantFormat, &[&str]); 5] = [
        (grid(4, Some(32), true), format, &ALL),
        (grid(4, Some(16), false), format, &ALL),
        (grid(8, Some(32), false), format, &["up_proj"]),
        (grid(8, None, true), format, &ALL),
        (grid(4, None, false), format, &["q_proj", "0.mlp.down_proj"]),
    ];
    check(
        "check_compressed_tensors.py",
        &folders(scratch.path(), &cases),
    );
}
