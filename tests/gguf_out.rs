//! llama.cpp on GGUF files that this crate writes.
//!
//! If there is a Python with `llama_cpp`, numpy and safetensors (`ELASTIC_LORA_LLAMA_PYTHON`, else
//! `python3`), a script loads the files and compares logits and tokens. Otherwise these tests print
//! that they were skipped.
//!
//! `any_file_computes_the_same_in_llama_cpp` takes files of the user's: `ELASTIC_LORA_GGUF` names
//! GGUF files, `ELASTIC_LORA_GGUF_MODEL` the model that they were made of (else each is compared
//! with itself), and `ELASTIC_LORA_GGUF_TEXT` a text whose first `ELASTIC_LORA_GGUF_TOKENS` tokens are
//! run. With `ELASTIC_LORA_GGUF_FLOAT` llama.cpp multiplies by 32-bit inputs, if it can.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use elastic_lora::arch::BlockDims;
use elastic_lora::data::TextTokenizer;
use elastic_lora::format::QuantizedMatrix;
use elastic_lora::io::hf::HfFolder;
use elastic_lora::io::tensors::write_safetensors;
use elastic_lora::io::{
    Checkpoint, DType, GgufOptions, GgufType, HfConfig, HostTensor, LoraAdapter, LoraWeights,
    QuantFormat, write_gguf,
};
use elastic_lora::linalg::Matrix;
use elastic_lora::quant::{GridConfig, ScaleDtype, round_to_nearest};
use elastic_lora::runtime::{Model, ModelOptions, Session, SessionConfig};
use elastic_lora::sparsity::{Pattern, magnitude_scores, prune};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

const CONTEXT: usize = 128;

const TEXTS: [&str; 8] = [
    "Once upon a time, there was a little girl named Lily.",
    "def f(x):\n    return {'a': x**2, \"b\": [1, 22, 333]}\n",
    "12 345 6789 0.5e-3",
    "Ünïcödé, 你好世界, привет, مرحبا, नमस्ते 🙂🚀",
    "   leading and  double   spaces\n\n\ntrailing ",
    "It's I'LL they've don't",
    "a\tb\r\nc",
    "",
];

fn shared(relative: &str) -> Option<PathBuf> {
    let root = std::env::var_os("ELASTIC_LORA_SHARED").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared")),
        PathBuf::from,
    );
    let path = root.join(relative);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: {} is missing", path.display());
    None
}

/// A Python that has the modules.
fn python() -> Option<PathBuf> {
    let python = std::env::var_os("ELASTIC_LORA_LLAMA_PYTHON")
        .map_or_else(|| "python3".into(), PathBuf::from);
    let probe = Command::new(&python)
        .args(["-c", "import llama_cpp, numpy, safetensors"])
        .output();
    if probe.is_ok_and(|probe| probe.status.success()) {
        return Some(python);
    }
    eprintln!("skipped: no Python with llama_cpp (name one in ELASTIC_LORA_LLAMA_PYTHON)");
    None
}

/// What llama.cpp is compared in.
#[derive(Default)]
struct Check<'a> {
    /// Largest difference of logits, as a share of the largest logit.
    tolerance: f32,
    /// Smallest share of tokens with the same largest logit.
    top1: f32,
    lora: Option<&'a Path>,
    tokens: Option<&'a Path>,
}

impl Check<'_> {
    fn run(&self, python: &Path, file: &Path, vectors: &Path) {
        let script =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/interop/check_gguf.py");
        let mut command = Command::new(python);
        command.arg(script).args([file, vectors]);
        command.args(["--context", &CONTEXT.to_string()]);
        command.args(["--tolerance", &self.tolerance.to_string()]);
        command.args(["--top1", &self.top1.to_string()]);
        if std::env::var_os("ELASTIC_LORA_GGUF_FLOAT").is_some() {
            command.arg("--float-inputs");
        }
        for (option, path) in [("--lora", self.lora), ("--tokens", self.tokens)] {
            if let Some(path) = path {
                command.arg(option).arg(path);
            }
        }
        let output = command.output().unwrap();
        let (out, err) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        eprint!("{out}");
        assert!(output.status.success(), "{out}\n{err}");
    }
}

fn open(path: &Path) -> Model {
    Model::open(path, &ModelOptions::default()).unwrap()
}

/// Writes what a model computes on tokens, a window after another.
fn vectors(path: &Path, model: &Model, ids: &[u32]) {
    let vocab_size = model.config().vocab_size();
    let mut session = Session::new(model, &SessionConfig::default()).unwrap();
    let mut logits = vec![0.0; ids.len() * vocab_size];
    let windows = ids
        .chunks(CONTEXT)
        .zip(logits.chunks_mut(CONTEXT * vocab_size));
    for (ids, logits) in windows {
        session.reset();
        session.decode_all(ids, logits).unwrap();
    }
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let tensors = vec![
        HostTensor::from_bytes("input_ids", DType::I32, vec![ids.len()], bytes),
        HostTensor::from_f32("logits", DType::F32, vec![ids.len(), vocab_size], logits),
    ];
    write_safetensors(path, tensors, &BTreeMap::new()).unwrap();
}

fn random_ids(n: usize, vocab_size: u32) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    (0..n).map(|_| rng.random_range(0..vocab_size)).collect()
}

fn random(rng: &mut ChaCha8Rng, n: usize, size: f32) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-size..size)).collect()
}

fn parse(value: &Value) -> HfConfig {
    HfConfig::from_json(value.as_object().unwrap().clone()).unwrap()
}

/// Writes a folder of random weights that are large enough to matter.
fn folder(path: &Path, config: &HfConfig, seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let tensors = config.arch().tensors().into_iter().map(|(name, shape)| {
        let n = shape.iter().product();
        let mut values = random(&mut rng, n, 0.3);
        if name.contains("norm") {
            values.iter_mut().for_each(|value| *value += 1.0);
        }
        HostTensor::from_f32(name, DType::F32, shape, values)
    });
    let out = HfFolder::create(path, false).unwrap();
    out.write_model(config, DType::F32, tensors.collect())
        .unwrap();
    out.commit().unwrap();
}

fn config(model_type: &str, architecture: &str) -> Value {
    json!({
        "architectures": [architecture], "model_type": model_type, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu", "bos_token_id": 1,
        "eos_token_id": 2, "tie_word_embeddings": false,
    })
}

#[test]
fn every_type_computes_the_same_in_llama_cpp() {
    let (Some(python), Some(story)) = (python(), shared("models/story-llama-0.6M")) else {
        return;
    };
    let root = tempfile::tempdir().unwrap();
    let ids = story_ids(&story, 300);
    // llama.cpp rounds inputs to the type of the weights, and those of blocks to 8 bits.
    for (kind, tolerance) in [
        (GgufType::F32, 2e-5),
        (GgufType::F16, 2e-3),
        (GgufType::Bf16, 2e-2),
        (GgufType::Q8_0, 2e-2),
        (GgufType::Q4_0, 3e-2),
        (GgufType::Q4_1, 3e-2),
    ] {
        let file = root.path().join(format!("{kind}.gguf"));
        write_gguf(&story, &file, &GgufOptions::default().with_linears(kind)).unwrap();
        let expected = root.path().join("expected.safetensors");
        vectors(&expected, &open(&file), &ids);
        let check = Check {
            tolerance,
            top1: 0.9,
            ..Check::default()
        };
        check.run(&python, &file, &expected);
    }
}

#[test]
fn models_of_every_shape_compute_the_same_in_llama_cpp() {
    let Some(python) = python() else { return };
    let root = tempfile::tempdir().unwrap();
    let dims = |n_heads, n_kv_heads, d_mlp| BlockDims {
        n_heads,
        n_kv_heads,
        d_mlp,
    };
    let mut biased = config("llama", "LlamaForCausalLM");
    biased["attention_bias"] = true.into();
    biased["head_dim"] = 24.into();
    biased["rope_theta"] = 500_000.0.into();
    biased["rope_scaling"] = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    });
    let mut linear = config("mistral", "MistralForCausalLM");
    linear["sliding_window"] = Value::Null;
    linear["rope_scaling"] = json!({ "rope_type": "linear", "factor": 2.5 });
    let mut qwen = config("qwen2", "Qwen2ForCausalLM");
    qwen["tie_word_embeddings"] = true.into();
    let llama = parse(&config("llama", "LlamaForCausalLM"));
    let uneven = [dims(4, 2, 96), dims(2, 1, 64), dims(4, 4, 160)];
    let without = [
        dims(0, 0, 96),
        dims(4, 2, 0),
        dims(0, 0, 32),
        dims(4, 2, 64),
    ];
    let cases = [
        ("biased", parse(&biased)),
        ("linear", parse(&linear)),
        ("qwen2", parse(&qwen)),
        ("uneven", llama.with_blocks(&uneven).unwrap()),
        ("without", llama.with_blocks(&without).unwrap()),
        (
            "filled",
            parse(&qwen)
                .with_blocks(&[dims(2, 1, 96), dims(4, 2, 0), dims(0, 0, 64)])
                .unwrap(),
        ),
    ];
    for (index, (name, config)) in cases.into_iter().enumerate() {
        let from = root.path().join(name);
        folder(&from, &config, index as u64);
        let file = root.path().join(format!("{name}.gguf"));
        write_gguf(&from, &file, &GgufOptions::default()).unwrap();
        let expected = root.path().join("expected.safetensors");
        vectors(&expected, &open(&from), &random_ids(200, 300));
        let check = Check {
            tolerance: 1e-4,
            top1: 0.99,
            ..Check::default()
        };
        check.run(&python, &file, &expected);
    }
}

#[test]
fn an_adapter_of_mixed_ranks_computes_the_same_in_llama_cpp() {
    let (Some(python), Some(story)) = (python(), shared("models/story-llama-0.6M")) else {
        return;
    };
    let root = tempfile::tempdir().unwrap();
    let config = HfConfig::open(&story).unwrap();
    let source = Checkpoint::open(&story).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut adapter = LoraAdapter::default();
    for (index, layer) in config.arch().linears().into_iter().enumerate() {
        let rank = [4, 6, 16][index % 3];
        let a = random(&mut rng, rank * layer.d_input, 0.1);
        let b = random(&mut rng, layer.d_output * rank, 0.1);
        let weights = LoraWeights::new(
            Matrix::new(rank, layer.d_input, a).unwrap(),
            Matrix::new(layer.d_output, rank, b).unwrap(),
            [1.5, 0.75][index % 2],
        );
        adapter.layers.insert(layer.name, weights.unwrap());
    }
    let merged = root.path().join("merged");
    let tensors = config.arch().tensors().into_iter().map(|(name, shape)| {
        let stored = if source.contains(&name) {
            name.as_str()
        } else {
            "lm_head.weight"
        };
        let mut values = source.load_f32(stored).unwrap();
        let layer = name.strip_suffix(".weight");
        if let Some(weights) = layer.and_then(|layer| adapter.layers.get(layer)) {
            let delta = weights.delta();
            let all = values.iter_mut().zip(delta.as_slice());
            all.for_each(|(value, delta)| *value += delta);
        }
        HostTensor::from_f32(name, DType::F32, shape, values)
    });
    let out = HfFolder::create(&merged, false).unwrap();
    out.write_model(&config, DType::F32, tensors.collect())
        .unwrap();
    out.commit().unwrap();
    let base = root.path().join("base.gguf");
    write_gguf(&story, &base, &GgufOptions::default()).unwrap();
    let ids = story_ids(&story, 300);
    let expected = root.path().join("expected.safetensors");
    vectors(&expected, &open(&merged), &ids);
    for (kind, tolerance) in [(GgufType::F32, 1e-4), (GgufType::F16, 3e-3)] {
        let lora = root.path().join(format!("lora-{kind}.gguf"));
        adapter.write_gguf(&lora, &config, kind, false).unwrap();
        let check = Check {
            tolerance,
            top1: 0.98,
            lora: Some(&lora),
            ..Check::default()
        };
        check.run(&python, &base, &expected);
    }
}

/// Tokens of a story, if there is one.
fn story_ids(model: &Path, n: usize) -> Vec<u32> {
    let tokenizer = TextTokenizer::from_dir(model).unwrap();
    let Some(path) = shared("data/tinystories/sample.txt") else {
        return random_ids(n, 2048);
    };
    let text = std::fs::read_to_string(path).unwrap();
    let ids = tokenizer.encode(&text, true).unwrap();
    ids.into_iter().take(n).collect()
}

/// What a QA-SparsePEFT run on a symmetric grid leaves: sparse weights of 4 bits in groups of 32.
#[test]
fn a_sparse_model_of_4_bits_chooses_the_same_tokens_in_llama_cpp() {
    let (Some(python), Some(story)) = (python(), shared("models/story-llama-0.6M")) else {
        return;
    };
    let root = tempfile::tempdir().unwrap();
    let config = HfConfig::open(&story).unwrap();
    let source = Checkpoint::open(&story).unwrap();
    let grid = GridConfig::new(4)
        .with_group_size(Some(32))
        .with_symmetric(true)
        .with_scale_dtype(ScaleDtype::F16);
    let mut layers: BTreeMap<String, QuantizedMatrix> = BTreeMap::new();
    let mut zeros = 0;
    for layer in config.arch().linears() {
        let name = format!("{}.weight", layer.name);
        let mut weight = source
            .load_matrix(&name, [layer.d_output, layer.d_input])
            .unwrap();
        let scores = magnitude_scores(&weight);
        let mask = prune(&mut weight, &scores, &Pattern::Unstructured { ratio: 0.3 }).unwrap();
        let matrix = round_to_nearest(&weight, &grid, Some(&mask)).unwrap();
        zeros += matrix.count_zeros();
        layers.insert(layer.name, matrix);
    }
    let from = root.path().join("sparse");
    let tensors = config
        .arch()
        .tensors()
        .into_iter()
        .filter_map(|(name, shape)| {
            let layer = name.strip_suffix(".weight").unwrap_or(&name);
            if layers.contains_key(layer) {
                return None;
            }
            let stored = if source.contains(&name) {
                name.as_str()
            } else {
                "lm_head.weight"
            };
            let values = source.load_f32(stored).unwrap();
            Some(HostTensor::from_f32(name, DType::F32, shape, values))
        });
    let tensors = tensors.collect();
    let out = HfFolder::create(&from, false).unwrap();
    out.write_quantized(
        &config,
        DType::F32,
        tensors,
        &layers,
        QuantFormat::CompressedTensors,
    )
    .unwrap();
    out.carry_over(&story).unwrap();
    out.commit().unwrap();
    let file = root.path().join("sparse.gguf");
    let options = GgufOptions::default()
        .with_linears(GgufType::Q4_0)
        .with_head(GgufType::F32);
    write_gguf(&from, &file, &options).unwrap();
    let written = Checkpoint::open(&file).unwrap();
    let mut kept = 0;
    for (layer, matrix) in &layers {
        let values = written.load_f32(&format!("{layer}.weight")).unwrap();
        assert_eq!(values, matrix.dequantize().as_slice(), "{layer}");
        kept += values.iter().filter(|value| **value == 0.0).count();
    }
    assert_eq!(kept, zeros);
    let expected = root.path().join("expected.safetensors");
    vectors(&expected, &open(&from), &story_ids(&story, 2000));
    // llama.cpp rounds the inputs of blocks to 8 bits. With the same values as numbers of 32 bits,
    // or with 32-bit inputs, it chooses the same tokens.
    let float = std::env::var_os("ELASTIC_LORA_GGUF_FLOAT").is_some();
    let same = Check {
        tolerance: 1e-3,
        top1: 0.999,
        ..Check::default()
    };
    let near = Check {
        tolerance: 3e-2,
        top1: 0.95,
        ..Check::default()
    };
    let check = if float { &same } else { &near };
    check.run(&python, &file, &expected);
    let numbers = root.path().join("numbers.gguf");
    let options = GgufOptions::default().with_linears(GgufType::F32);
    write_gguf(&from, &numbers, &options).unwrap();
    same.run(&python, &numbers, &expected);
}

#[test]
fn a_tokenizer_splits_texts_as_in_llama_cpp() {
    let Some(python) = python() else { return };
    let root = tempfile::tempdir().unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/arithmetic-llama");
    if !model.join("tokenizer.json").exists() {
        eprintln!("skipped: no shipped model");
        return;
    }
    let file = root.path().join("shipped.gguf");
    write_gguf(&model, &file, &GgufOptions::default()).unwrap();
    compare_tokens_and_logits(&python, &model, &file, root.path(), 2e-3);
}

/// Files named by the user, such as those of large models.
#[test]
fn any_file_computes_the_same_in_llama_cpp() {
    let Some(files) = std::env::var_os("ELASTIC_LORA_GGUF") else {
        return;
    };
    let Some(python) = python() else { return };
    let root = tempfile::tempdir().unwrap();
    let model = std::env::var_os("ELASTIC_LORA_GGUF_MODEL").map(PathBuf::from);
    for file in std::env::split_paths(&files) {
        let model = model.as_ref().unwrap_or(&file);
        compare_tokens_and_logits(&python, model, &file, root.path(), 5e-2);
    }
}

/// Compares the tokens and logits of a model with those of llama.cpp on its file.
fn compare_tokens_and_logits(
    python: &Path,
    model: &Path,
    file: &Path,
    scratch: &Path,
    tolerance: f32,
) {
    let tokenizer = TextTokenizer::from_dir(model).unwrap();
    let ids = |text: &str| tokenizer.encode(text, true).unwrap();
    let cases: Vec<(&str, Vec<u32>)> = TEXTS.iter().map(|text| (*text, ids(text))).collect();
    let tokens = scratch.join("tokens.json");
    std::fs::write(&tokens, serde_json::to_string(&cases).unwrap()).unwrap();
    let expected = scratch.join("expected.safetensors");
    let text = std::env::var_os("ELASTIC_LORA_GGUF_TEXT");
    let all = match text {
        Some(path) => std::fs::read_to_string(path).unwrap(),
        None => TEXTS.join("\n").repeat(2),
    };
    let count = std::env::var("ELASTIC_LORA_GGUF_TOKENS");
    let count = count.map_or(2 * CONTEXT, |count| count.parse().unwrap());
    let all: Vec<u32> = ids(&all).into_iter().take(count).collect();
    vectors(&expected, &open(model), &all);
    let check = Check {
        tolerance,
        top1: 0.9,
        tokens: Some(&tokens),
        ..Check::default()
    };
    check.run(python, file, &expected);
}

/// Runs the example `convert`, if it was built.
fn example(folder: &Path, arguments: &[&str]) -> Option<(bool, String)> {
    let test = std::env::current_exe().ok()?;
    let path = test.parent()?.parent()?.join("examples/convert");
    let path = path.with_extension(std::env::consts::EXE_EXTENSION);
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/arithmetic-llama");
    if !path.is_file() || !shipped.join("model.safetensors").is_file() {
        eprintln!("skipped: no example convert, or no shipped model");
        return None;
    }
    let shipped = shipped.to_string_lossy().into_owned();
    let arguments = arguments.iter().map(|argument| match *argument {
        "SHIPPED" => shipped.as_str(),
        other => other,
    });
    let output = Command::new(path)
        .current_dir(folder)
        .args(arguments)
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    Some((
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    ))
}

#[test]
fn convert_goes_both_ways_and_says_what_it_does_not_do() {
    let root = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| example(root.path(), arguments);
    let Some((ok, help)) = run(&["--help"]) else {
        return;
    };
    assert!(ok && help.contains("--requantize"), "{help}");
    let refused: [(&[&str], &str); 9] = [
        (
            &["--model", "nowhere", "--to", "gguf", "--out", "x"],
            "nowhere",
        ),
        (
            &[
                "--model", "SHIPPED", "--to", "gguf", "--out", "x", "--type", "q9",
            ],
            "q4_0",
        ),
        (
            &[
                "--model", "SHIPPED", "--to", "hf", "--out", "x", "--type", "q4_0",
            ],
            "q4_0",
        ),
        (
            &["--model", "SHIPPED", "--to", "gptq", "--out", "x"],
            "without weights on a grid",
        ),
        (
            &[
                "--model", "SHIPPED", "--to", "gptq", "--out", "x", "--type", "f16",
            ],
            "--type",
        ),
        (
            &[
                "--model", "SHIPPED", "--to", "bundle", "--out", "x", "--head", "f16",
            ],
            "--head",
        ),
        (
            &[
                "--model",
                "SHIPPED",
                "--to",
                "hf",
                "--out",
                "x",
                "--adapter",
                "y",
            ],
            "--adapter",
        ),
        (
            &[
                "--model",
                "SHIPPED",
                "--to",
                "gguf",
                "--out",
                "x",
                "--adapter",
                "y",
            ],
            "y",
        ),
        (
            &[
                "--model",
                "SHIPPED",
                "--to",
                "gguf",
                "--out",
                "x",
                "--adapter",
                "y",
                "--name",
                "z",
            ],
            "--name",
        ),
    ];
    for (arguments, expected) in refused {
        let (ok, text) = run(arguments).unwrap();
        assert!(!ok && text.contains(expected), "{arguments:?}: {text}");
        let left = std::fs::read_dir(root.path()).unwrap().count();
        assert_eq!(left, 0, "{arguments:?}");
    }
    let steps: [&[&str]; 8] = [
        &[
            "--model", "SHIPPED", "--to", "gguf", "--type", "q4_0", "--out", "a.gguf",
        ],
        &["--model", "a.gguf", "--to", "bundle", "--out", "b.elora"],
        &["--model", "b.elora", "--to", "gguf", "--out", "c.gguf"],
        &["--model", "a.gguf", "--to", "hf", "--out", "d"],
        &[
            "--model",
            "a.gguf",
            "--to",
            "compressed-tensors",
            "--out",
            "e",
        ],
        &[
            "--model", "e", "--to", "gguf", "--type", "q4_0", "--head", "f32", "--out", "f.gguf",
        ],
        &["--model", "e", "--to", "gptq-v2", "--out", "g"],
        &[
            "--model", "g", "--to", "bundle", "--type", "f32", "--out", "h.elora",
        ],
    ];
    for step in steps {
        let (ok, text) = run(step).unwrap();
        assert!(ok, "{step:?}: {text}");
    }
    let ids = random_ids(60, 512);
    let logits = |name: &str| {
        let model = open(&root.path().join(name));
        let mut session = Session::new(&model, &SessionConfig::default()).unwrap();
        let mut logits = vec![0.0; ids.len() * 512];
        session.decode_all(&ids, &mut logits).unwrap();
        logits
    };
    let expected = logits("a.gguf");
    let largest = expected.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
    for name in ["b.elora", "c.gguf", "d", "e", "f.gguf", "g", "h.elora"] {
        let off = logits(name)
            .iter()
            .zip(&expected)
            .fold(0.0, |max: f32, (a, b)| max.max((a - b).abs()));
        assert!(off <= 1e-3 * largest, "{name}: {off} of {largest}");
    }
}
