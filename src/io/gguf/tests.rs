use std::fs;
use std::path::Path;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::blocks::Encoding;
use super::*;
use crate::arch::RopeScaling;
use crate::io::hf::HfFolder;
use crate::io::testing::{pick, shared};
use crate::io::{Checkpoint, DType, HfConfig, HostTensor};

/// A file in the making.
#[derive(Clone, Default)]
struct Writer {
    keys: Vec<(String, Vec<u8>)>,
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes(), value.as_bytes()].concat()
}

fn list(kind: u32, items: &[Vec<u8>]) -> Vec<u8> {
    let head = [9_u32.to_le_bytes(), kind.to_le_bytes()].concat();
    [
        head,
        (items.len() as u64).to_le_bytes().to_vec(),
        items.concat(),
    ]
    .concat()
}

fn texts(items: &[&str]) -> Vec<u8> {
    list(8, &items.iter().map(|item| text(item)).collect::<Vec<_>>())
}

impl Writer {
    fn key(mut self, name: &str, value: Vec<u8>) -> Self {
        self.keys.retain(|(other, _)| other != name);
        self.keys.push((name.into(), value));
        self
    }

    fn int(self, name: &str, value: u32) -> Self {
        self.key(name, [4_u32.to_le_bytes(), value.to_le_bytes()].concat())
    }

    fn float(self, name: &str, value: f32) -> Self {
        self.key(name, [6_u32.to_le_bytes(), value.to_le_bytes()].concat())
    }

    fn text(self, name: &str, value: &str) -> Self {
        self.key(name, [8_u32.to_le_bytes().to_vec(), text(value)].concat())
    }

    fn flag(self, name: &str, value: bool) -> Self {
        self.key(
            name,
            [7_u32.to_le_bytes().to_vec(), vec![value.into()]].concat(),
        )
    }

    /// Sizes are the outermost first.
    fn tensor(mut self, name: &str, shape: &[u64], kind: u32, bytes: Vec<u8>) -> Self {
        self.tensors.retain(|(other, ..)| other != name);
        let shape = shape.iter().rev().copied().collect();
        self.tensors.push((name.into(), shape, kind, bytes));
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.keys.retain(|(other, _)| other != name);
        self.tensors.retain(|(other, ..)| other != name);
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3_u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (name, value) in &self.keys {
            out.extend([text(name), value.clone()].concat());
        }
        let (mut data, mut infos) = (Vec::new(), Vec::new());
        for (name, shape, kind, bytes) in &self.tensors {
            infos.extend(text(name));
            infos.extend((shape.len() as u32).to_le_bytes());
            shape
                .iter()
                .for_each(|size| infos.extend(size.to_le_bytes()));
            infos.extend(kind.to_le_bytes());
            infos.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        out.extend(infos);
        out.resize(out.len().next_multiple_of(32), 0);
        [out, data].concat()
    }

    fn write(&self, folder: &Path) -> PathBuf {
        let path = folder.join("m.gguf");
        fs::write(&path, self.bytes()).unwrap();
        path
    }

    fn refused(&self) -> String {
        refused(&self.bytes())
    }
}

/// Why a file cannot be opened as a checkpoint.
fn refused(bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    fs::write(&path, bytes).unwrap();
    Checkpoint::open(&path).unwrap_err().to_string()
}

fn floats(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

/// Numbers that say which row and column they are of.
fn numbered(rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols)
        .map(|i| (i / cols * 100 + i % cols) as f32)
        .collect()
}

/// `[rows, cols]` in blocks of Q8_0 with the row's number as scale.
fn q8_0(rows: usize, cols: usize) -> Vec<u8> {
    let block = |row: usize| {
        let scale = half::f16::from_f32(row as f32 + 1.0).to_le_bytes();
        scale
            .into_iter()
            .chain((0..32).map(|i| (i as u8).wrapping_sub(16)))
            .collect::<Vec<u8>>()
    };
    (0..rows)
        .flat_map(|row| block(row).repeat(cols / 32))
        .collect()
}

const HIDDEN: usize = 32;
const MLP: usize = 64;
const VOCAB: usize = 40;

/// A Llama of one block, 4 heads of 8 and 2 key/value heads; its keys are in blocks.
fn llama() -> Writer {
    let matrix = |writer: Writer, name: &str, rows: usize, cols: usize| {
        let shape = [rows as u64, cols as u64];
        writer.tensor(name, &shape, 0, floats(&numbered(rows, cols)))
    };
    let mut writer = Writer::default()
        .text("general.architecture", "llama")
        .int("llama.context_length", 64)
        .int("llama.embedding_length", HIDDEN as u32)
        .int("llama.block_count", 1)
        .int("llama.feed_forward_length", MLP as u32)
        .int("llama.attention.head_count", 4)
        .int("llama.attention.head_count_kv", 2)
        .float("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .float("llama.rope.freq_base", 10_000.0);
    writer = matrix(writer, "token_embd.weight", VOCAB, HIDDEN);
    for norm in ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"] {
        let name = format!("{norm}.weight");
        writer = writer.tensor(&name, &[HIDDEN as u64], 0, floats(&[1.0; HIDDEN]));
    }
    for (name, rows, cols) in [
        ("attn_q", HIDDEN, HIDDEN),
        ("attn_v", 16, HIDDEN),
        ("attn_output", HIDDEN, HIDDEN),
        ("ffn_gate", MLP, HIDDEN),
        ("ffn_up", MLP, HIDDEN),
        ("ffn_down", HIDDEN, MLP),
    ] {
        writer = matrix(writer, &format!("blk.0.{name}.weight"), rows, cols);
    }
    writer.tensor(
        "blk.0.attn_k.weight",
        &[16, HIDDEN as u64],
        8,
        q8_0(16, HIDDEN),
    )
}

/// The same as an architecture whose blocks may differ: a list for each size.
fn deci() -> Writer {
    let mut writer = llama().text("general.architecture", "deci");
    for (key, _) in &mut writer.keys {
        *key = key.replace("llama.", "deci.");
    }
    for (name, value) in [
        ("feed_forward_length", MLP as u32),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
    ] {
        let value = list(4, &[value.to_le_bytes().to_vec()]);
        writer = writer.key(&format!("deci.{name}"), value);
    }
    writer
}

/// Where llama.cpp's converter puts row `row` of heads of 8.
fn place(row: usize) -> usize {
    row / 8 * 8 + 2 * (row % 4) + row % 8 / 4
}

#[test]
fn every_type_is_read_as_the_gguf_package_reads_it() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/gguf/blocks.gguf"
    );
    let model = Gguf::open(path).unwrap();
    let all = model.first().bytes.as_ref();
    let mut types = 0;
    for tensor in &model.first().tensors {
        let Encoding::Blocks(blocks) = tensor.encoding else {
            continue;
        };
        let (_, expected) = model.tensor(&format!("{}.f32", tensor.name)).unwrap();
        let expected: Vec<f32> = all[expected.range.clone()]
            .as_chunks()
            .0
            .iter()
            .map(|bytes| f32::from_le_bytes(*bytes))
            .collect();
        let (bytes, cols) = (&all[tensor.range.clone()], tensor.shape[1]);
        assert_eq!(cols, blocks.len);
        let rows: Vec<&[u8]> = bytes.chunks_exact(bytes.len() / 2).collect();
        assert_eq!(
            blocks::dequantize_rows(blocks, &rows, cols),
            expected,
            "{}",
            tensor.name
        );
        // Codes are the same numbers; the types with a minimum have none for such blocks.
        let codes = blocks.quantized(&rows, cols).unwrap();
        let with_min = ["Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"].contains(&blocks.name);
        assert_eq!(codes.is_none(), with_min, "{}", tensor.name);
        if let Some(codes) = codes {
            assert_eq!(codes.dequantize().as_slice(), expected, "{}", tensor.name);
        }
        types += 1;
    }
    assert_eq!(types, 12);
}

#[test]
fn four_bits_keep_every_code_and_minima_that_are_zero_points() {
    let half = |value: f32| half::f16::from_f32(value).to_le_bytes();
    let read = |id, block: &[u8]| {
        let Ok(Encoding::Blocks(blocks)) = Encoding::from_id(id) else {
            panic!("no type {id}")
        };
        let numbers = blocks::dequantize_rows(blocks, &[block], 32);
        let codes = blocks.quantized(&[block], 32).unwrap();
        if let Some(codes) = &codes {
            assert_eq!(codes.dequantize().as_slice(), numbers);
        }
        (numbers, codes.map(|codes| codes.into_parts()))
    };
    // The reference quantizer maps the largest number to -8, so its scale may be negative.
    let nibbles: Vec<u8> = (0..16).map(|i| i | (15 - i) << 4).collect();
    for scale in [0.5, -0.5] {
        let (numbers, codes) = read(2, &[&half(scale)[..], &nibbles].concat());
        assert_eq!(numbers[0], -8.0 * scale);
        assert_eq!(numbers[16], 7.0 * scale);
        let codes = codes.unwrap();
        assert_eq!((codes.bits, codes.scales[0]), (4, 0.5));
        assert_eq!(codes.symmetric, scale > 0.0);
    }
    let (numbers, codes) = read(3, &[&half(0.5)[..], &half(-1.5), &nibbles].concat());
    assert_eq!((numbers[0], numbers[16]), (-1.5, 6.0));
    assert_eq!(codes.unwrap().zeros, [3]);
    assert!(
        read(3, &[&half(0.5)[..], &half(-1.25), &nibbles].concat())
            .1
            .is_none()
    );
    assert!(
        read(3, &[&half(0.5)[..], &half(1.0), &nibbles].concat())
            .1
            .is_none()
    );
}

#[test]
fn a_model_is_that_of_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let path = llama().write(folder.path());
    let config = HfConfig::open(&path).unwrap();
    assert_eq!(config.family().model_type(), "llama");
    assert_eq!(config.rms_norm_eps(), 1e-5);
    assert!(config.tie_word_embeddings());
    for mmap in [true, false] {
        let file = Checkpoint::open_with(&path, mmap).unwrap();
        config.check(&file).unwrap();
        assert_eq!(file.names().len(), 11);
        let values = numbered(HIDDEN, HIDDEN);
        let plain = "model.layers.0.self_attn.o_proj.weight";
        assert_eq!(file.load_f32(plain).unwrap(), values);
        assert_eq!(file.bytes(plain).unwrap(), floats(&values));
        assert!(
            file.load_quantized(plain, [HIDDEN, HIDDEN])
                .unwrap()
                .is_none()
        );

        let name = "model.layers.0.self_attn.q_proj.weight";
        let rows = |row: usize| values[place(row) * HIDDEN..][..HIDDEN].to_vec();
        let expected: Vec<f32> = (0..HIDDEN).flat_map(rows).collect();
        assert_eq!(file.load_f32(name).unwrap(), expected);
        assert_eq!(*file.buffer(name).unwrap(), *floats(&expected));
        assert!(file.bytes(name).unwrap_err().to_string().contains("q_proj"));

        let name = "model.layers.0.self_attn.k_proj.weight";
        let row = |row: usize| (0..32).map(move |i| (place(row) as f32 + 1.0) * (i as f32 - 16.0));
        let expected: Vec<f32> = (0..16).flat_map(row).collect();
        assert_eq!(file.load_f32(name).unwrap(), expected);
        assert_eq!(*file.buffer(name).unwrap(), *floats(&expected));
        let codes = file.load_quantized(name, [16, HIDDEN]).unwrap().unwrap();
        assert_eq!(codes.dequantize().as_slice(), expected);
        assert!(file.load_quantized(name, [16, 16]).is_err());
        assert_eq!(
            config
                .load_linear(&file, "model.layers.0.self_attn.k_proj", [16, HIDDEN])
                .unwrap(),
            codes.dequantize()
        );
    }
}

#[test]
fn what_was_added_to_norms_is_subtracted() {
    let layout = Layout {
        offset: 1.0,
        ..Layout::default()
    };
    let info = TensorInfo {
        dtype: DType::F32,
        shape: vec![3],
    };
    let bytes = layout.bytes(&info, &floats(&[1.0, 1.5, -2.0]));
    assert_eq!(bytes, floats(&[0.0, 0.5, -3.0]));
    assert!(!layout.is_plain() && layout.name().contains("larger by 1"));
}

#[test]
fn qwen2_has_biases_and_no_permutation() {
    let mut writer = llama().text("general.architecture", "qwen2");
    for (key, _) in &mut writer.keys {
        *key = key.replace("llama.", "qwen2.");
    }
    for (name, rows) in [("q", 32), ("k", 16), ("v", 16)] {
        let bias: Vec<f32> = (0..rows).map(|i| i as f32).collect();
        writer = writer.tensor(
            &format!("blk.0.attn_{name}.bias"),
            &[rows],
            0,
            floats(&bias),
        );
    }
    writer = writer.tensor("output.weight", &[40, 32], 1, vec![0; 40 * 32 * 2]);
    let folder = tempfile::tempdir().unwrap();
    let path = writer.write(folder.path());
    let (config, file) = (
        HfConfig::open(&path).unwrap(),
        Checkpoint::open(&path).unwrap(),
    );
    config.check(&file).unwrap();
    assert!(!config.tie_word_embeddings());
    let q = file
        .load_f32("model.layers.0.self_attn.q_proj.weight")
        .unwrap();
    assert_eq!(q, numbered(32, 32));
    let bias = file
        .load_f32("model.layers.0.self_attn.q_proj.bias")
        .unwrap();
    assert_eq!(bias[3], 3.0);
    // A Llama's biases are in llama.cpp's order, as its rows are.
    let mut writer = llama();
    for (name, rows) in [("q", 32), ("k", 16), ("v", 16), ("output", 32)] {
        let bias: Vec<f32> = (0..rows).map(|i| i as f32).collect();
        writer = writer.tensor(
            &format!("blk.0.attn_{name}.bias"),
            &[rows],
            0,
            floats(&bias),
        );
    }
    let path = writer.write(folder.path());
    let (config, file) = (
        HfConfig::open(&path).unwrap(),
        Checkpoint::open(&path).unwrap(),
    );
    config.check(&file).unwrap();
    let bias = file
        .load_f32("model.layers.0.self_attn.q_proj.bias")
        .unwrap();
    assert_eq!(
        bias,
        (0..32).map(|row| place(row) as f32).collect::<Vec<_>>()
    );
}

#[test]
fn a_folder_written_from_a_file_is_the_same_model() {
    let root = tempfile::tempdir().unwrap();
    let path = with_pieces(llama())
        .text("tokenizer.chat_template", "{{ x }}")
        .write(root.path());
    let (config, file) = (
        HfConfig::open(&path).unwrap(),
        Checkpoint::open(&path).unwrap(),
    );
    let out = root.path().join("out");
    let folder = HfFolder::create(&out, false).unwrap();
    let tensor = |name| {
        let shape = file.info(name).unwrap().shape.clone();
        HostTensor::from_f32(name, DType::F32, shape, file.load_f32(name).unwrap())
    };
    folder
        .write_model(&config, DType::F32, file.names().map(tensor).collect())
        .unwrap();
    let carried = folder.carry_over(&path).unwrap();
    assert_eq!(carried, ["tokenizer.json", "tokenizer_config.json"]);
    folder.commit().unwrap();
    let written = Checkpoint::open(&out).unwrap();
    assert_eq!(HfConfig::open(&out).unwrap().arch(), config.arch());
    for name in file.names() {
        assert_eq!(
            written.load_f32(name).unwrap(),
            file.load_f32(name).unwrap()
        );
    }
    let text = fs::read_to_string(out.join("tokenizer_config.json")).unwrap();
    let fields: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (&fields["bos_token"], &fields["chat_template"]),
        (&"<s>".into(), &"{{ x }}".into())
    );
    // A folder with nothing but a GGUF file: the error says what to open.
    fs::create_dir(root.path().join("only")).unwrap();
    fs::copy(&path, root.path().join("only/m.gguf")).unwrap();
    let error = Checkpoint::open(root.path().join("only"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("give its own path"), "{error}");
    fs::copy(&path, root.path().join("only/config.json")).unwrap();
    let error = HfConfig::open(root.path().join("only"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("config.json: a GGUF file, expected JSON"),
        "{error}"
    );
}

#[test]
fn rotary_scaling_is_taken_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let scaling = |writer: &Writer| {
        let path = writer.write(folder.path());
        HfConfig::open(&path).map(|config| config.rope_scaling().clone())
    };
    assert_eq!(scaling(&llama()).unwrap(), RopeScaling::Default);
    let linear = llama().text("llama.rope.scaling.type", "linear");
    let linear = linear.float("llama.rope.scaling.factor", 4.0);
    assert_eq!(
        scaling(&linear).unwrap(),
        RopeScaling::Linear { factor: 4.0 }
    );
    let yarn = linear.clone().text("llama.rope.scaling.type", "yarn");
    let error = scaling(&yarn).unwrap_err().to_string();
    assert!(error.contains("original_context_length"), "{error}");
    let yarn = yarn.int("llama.rope.scaling.original_context_length", 4);
    let found = scaling(&yarn).unwrap();
    assert!(
        matches!(
            found,
            RopeScaling::Yarn {
                factor: 4.0,
                original_max_position_embeddings: 4,
                ..
            }
        ),
        "{found:?}"
    );
    let other = linear.clone().text("llama.rope.scaling.type", "axial");
    let error = scaling(&other).unwrap_err().to_string();
    assert!(error.contains("rope.scaling.type` = `axial`"), "{error}");
    // Llama 3.2's rule at heads of 8, by its formula.
    let divisors: Vec<f32> = (0..4)
        .map(|i| {
            let wavelength = std::f64::consts::TAU * 500_000_f64.powf(f64::from(i) / 4.0);
            let smooth = ((8192.0 / wavelength - 1.0) / 3.0).clamp(0.0, 1.0);
            (1.0 / ((1.0 - smooth) / 32.0 + smooth)) as f32
        })
        .collect();
    assert!(divisors[0] == 1.0 && divisors[3] == 32.0 && divisors[2] > 1.0 && divisors[2] < 32.0);
    let llama3 = llama().float("llama.rope.freq_base", 500_000.0);
    let found = scaling(
        &llama3
            .clone()
            .tensor("rope_freqs.weight", &[4], 0, floats(&divisors)),
    );
    assert!(
        matches!(found, Ok(RopeScaling::Llama3 { factor: 32.0, .. })),
        "{found:?}"
    );
    let ones = llama3
        .clone()
        .tensor("rope_freqs.weight", &[4], 0, floats(&[1.0; 4]));
    assert_eq!(scaling(&ones).unwrap(), RopeScaling::Default);
    let others = llama3
        .clone()
        .tensor("rope_freqs.weight", &[4], 0, floats(&[1.0, 1.0, 2.0, 3.0]));
    assert!(
        scaling(&others)
            .unwrap_err()
            .to_string()
            .contains("rope_freqs.weight")
    );
    let short = llama3.tensor("rope_freqs.weight", &[3], 0, floats(&[1.0; 3]));
    assert!(
        scaling(&short)
            .unwrap_err()
            .to_string()
            .contains("expected F32 of [4]")
    );
}

#[test]
fn what_would_change_the_model_is_refused_by_name() {
    let zeros = |n: usize| vec![0; n];
    let rows: [(Writer, &str); 22] = [
        (
            llama().text("general.architecture", "mamba"),
            "`mamba (GGUF)` is not supported",
        ),
        (
            llama().text("general.type", "adapter"),
            "`general.type` = `adapter`",
        ),
        (
            llama().without("general.architecture"),
            "key `general.architecture`: missing",
        ),
        (
            llama().without("llama.block_count"),
            "key `llama.block_count`: missing",
        ),
        (
            llama().int("llama.expert_count", 8),
            "key `llama.expert_count` is not supported",
        ),
        (
            llama().float("llama.logit_scale", 0.5),
            "key `llama.logit_scale`",
        ),
        (
            llama().int("llama.attention.sliding_window", 16),
            "sliding_window` = 16",
        ),
        (
            llama().int("llama.rope.dimension_count", 4),
            "rope.dimension_count` = 4 beside 8",
        ),
        (
            llama().int("llama.attention.value_length", 16),
            "value_length` = 16",
        ),
        (
            llama().int("llama.vocab_size", 41),
            "vocab_size` = 41 beside 40",
        ),
        (
            llama().text("llama.block_count", "one"),
            "key `llama.block_count`: not a whole",
        ),
        (
            llama().float("llama.embedding_length", 32.0),
            "`llama.embedding_length`: not a whole",
        ),
        (
            llama().key(
                "llama.feed_forward_length",
                list(
                    4,
                    &[64_u32.to_le_bytes().into(), 32_u32.to_le_bytes().into()],
                ),
            ),
            "`llama.feed_forward_length` that differs between blocks",
        ),
        (
            llama().int("llama.feed_forward_length", 32),
            "`blk.0.ffn_gate.weight`: shape [64, 32], expected [32, 32]",
        ),
        (
            llama().tensor("blk.0.attn_sinks", &[4], 0, zeros(16)),
            "tensor `blk.0.attn_sinks`",
        ),
        (
            llama().tensor("blk.1.attn_norm.weight", &[32], 0, zeros(128)),
            "tensor `blk.1.attn_norm.weight`",
        ),
        (
            llama().tensor("blk.00.attn_norm.weight", &[32], 0, zeros(128)),
            "tensor `blk.00.attn_norm.weight`",
        ),
        (
            llama().tensor("blk.0.attn_v.bias", &[16], 0, zeros(64)),
            "tensor `blk.0.attn_v.bias`",
        ),
        (
            llama().without("token_embd.weight"),
            "tensor `token_embd.weight` is missing",
        ),
        (
            llama().tensor("output_norm.weight", &[32], 26, zeros(128)),
            "`output_norm.weight`: ggml type I32",
        ),
        (
            llama().tensor("output_norm.weight", &[32], 99, zeros(128)),
            "ggml type number 99",
        ),
        (
            llama().tensor("output.weight", &[40, 32], 19, zeros(50)),
            "`output.weight`: ggml type IQ1_S",
        ),
    ];
    for (writer, expected) in rows {
        let found = writer.refused();
        assert!(found.contains(expected), "{found}\nexpected {expected}");
    }
    // Lists of equal sizes, zeros and other tools' notes are fine.
    let fine = llama()
        .key(
            "llama.feed_forward_length",
            list(4, &[64_u32.to_le_bytes().into()]),
        )
        .int("llama.expert_count", 0)
        .text("quantize.imatrix.file", "x");
    let folder = tempfile::tempdir().unwrap();
    Checkpoint::open(fine.write(folder.path())).unwrap();
}

#[test]
fn files_that_break_a_rule_are_refused() {
    let good = llama().bytes();
    let at = |what: &[u8]| {
        good.windows(what.len())
            .position(|window| window == what)
            .unwrap()
    };
    let with = |at: usize, bytes: &[u8]| {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        refused(&bad)
    };
    let embedding = at(b"token_embd.weight") + 17;
    let next = at(b"output_norm.weight") + 18;
    let rows = [
        (with(0, b"GGUX"), "not a GGUF file"),
        (with(0, br#"{"a": 1}"#), "it seems to be JSON"),
        (
            refused(b"\x08\0\0\0\0\0\0\0{\"a\":{}}"),
            "it seems to be a safetensors file",
        ),
        (with(4, &1_u32.to_le_bytes()), "GGUF of version 1"),
        (
            with(4, &3_u32.to_be_bytes()),
            "big-endian GGUF of version 3",
        ),
        (with(8, &u64::MAX.to_le_bytes()), "tensors in a file of"),
        (with(16, &(1_u64 << 40).to_le_bytes()), "keys in a file of"),
        (
            with(24, &u64::MAX.to_le_bytes()),
            "a key: 18446744073709551615 bytes, more than",
        ),
        (with(32, &[0xFF]), "a key: not UTF-8"),
        (
            with(52, &[99]),
            "key `general.architecture`: a value of type 99",
        ),
        (
            with(56, &u64::MAX.to_le_bytes()),
            "cut off: key `general.architecture`",
        ),
        (
            with(embedding, &9_u32.to_le_bytes()),
            "`token_embd.weight`: 9 dimensions",
        ),
        (
            with(embedding, &0_u32.to_le_bytes()),
            "`token_embd.weight`: 0 dimensions",
        ),
        (
            with(embedding + 4, &(1_u64 << 60).to_le_bytes()),
            "whose product fits",
        ),
        (
            with(embedding + 4, &0_u64.to_le_bytes()),
            "expected sizes of at least 1",
        ),
        (
            with(embedding + 12, &(1_u64 << 50).to_le_bytes()),
            "cut off: tensor `token_embd.weight`",
        ),
        (
            with(embedding + 20, &12_u32.to_le_bytes()),
            "rows of 32, expected a multiple of 256, the block of",
        ),
        (
            with(next + 16, &32_u64.to_le_bytes()),
            "`output_norm.weight`: offset 32, expected 5120",
        ),
        (
            with(next + 16, &u64::MAX.to_le_bytes()),
            "`output_norm.weight`: offset",
        ),
        (
            refused(&good[..good.len() - 1]),
            "cut off: tensor `blk.0.attn_k.weight`",
        ),
        (refused(&good[..400]), "cut off"),
        (refused(&good[..6]), "cut off: the version"),
        (refused(&[&good[..], &[0; 40]].concat()), "too long"),
        (refused(b""), "not a GGUF file"),
    ];
    for (found, expected) in rows {
        assert!(found.contains(expected), "{found}\nexpected {expected}");
    }
    let nested = llama().key("a", list(9, &[]));
    assert!(nested.refused().contains("key `a`: a list of lists"));
    let bad_bool = llama().key("a", vec![7, 0, 0, 0, 2]);
    assert!(bad_bool.refused().contains("key `a`: a bool of value 2"));
    let aligned = llama().int("general.alignment", 12);
    assert!(aligned.refused().contains("general.alignment"));
    let mut twice = llama();
    twice.keys.push(twice.keys[0].clone());
    assert!(
        twice
            .refused()
            .contains("key `general.architecture` is there twice")
    );
    let mut twice = llama();
    twice.tensors.push(twice.tensors[0].clone());
    assert!(
        twice
            .refused()
            .contains("tensor `token_embd.weight` is there twice")
    );
    let long = llama().tensor(&"x".repeat(64), &[1], 0, vec![0; 4]);
    assert!(long.refused().contains("a tensor's name: 64 bytes"));
    let infinite = llama().tensor(
        "blk.0.attn_k.weight",
        &[16, 32],
        8,
        [0x00, 0x7c].repeat(16 * 17),
    );
    let folder = tempfile::tempdir().unwrap();
    let file = Checkpoint::open(infinite.write(folder.path())).unwrap();
    let name = "model.layers.0.self_attn.k_proj.weight";
    for error in [
        file.load_f32(name).unwrap_err(),
        file.load_quantized(name, [16, 32]).unwrap_err(),
    ] {
        assert!(error.to_string().contains("k_proj"), "{error}");
    }
}

#[test]
fn parts_are_one_model() {
    let folder = tempfile::tempdir().unwrap();
    let name = |number: usize| folder.path().join(format!("m-{number:05}-of-00002.gguf"));
    let short = |writer: Writer, key: &str, value: u16| {
        writer.key(
            key,
            [2_u32.to_le_bytes().to_vec(), value.to_le_bytes().to_vec()].concat(),
        )
    };
    let parts = |first: Writer, second: Writer| {
        fs::write(name(1), first.bytes()).unwrap();
        fs::write(name(2), second.bytes()).unwrap();
        Checkpoint::open(name(1))
    };
    let numbered = |writer: Writer, number| {
        let writer = short(writer, "split.no", number);
        short(writer, "split.count", 2).int("split.tensors.count", 11)
    };
    let mut first = numbered(llama(), 0);
    let mut second = numbered(Writer::default(), 1);
    second.tensors = first.tensors.split_off(5);
    let whole = Checkpoint::open(llama().write(folder.path())).unwrap();
    let file = parts(first.clone(), second.clone()).unwrap();
    assert_eq!(
        file.names().collect::<Vec<_>>(),
        whole.names().collect::<Vec<_>>()
    );
    for tensor in whole.names() {
        assert_eq!(
            file.load_f32(tensor).unwrap(),
            whole.load_f32(tensor).unwrap()
        );
    }
    let error = Checkpoint::open(name(2)).unwrap_err().to_string();
    assert!(
        error.contains("part 2 of 2; open the first, `m-00001-of-00002.gguf`"),
        "{error}"
    );
    let again = short(second.clone(), "split.no", 0);
    let error = parts(first.clone(), again).unwrap_err().to_string();
    assert!(
        error.contains("00002.gguf: key `split.no`: 0, expected 1"),
        "{error}"
    );
    let error = parts(first.clone().int("split.tensors.count", 12), second.clone()).unwrap_err();
    assert!(
        error.to_string().contains("its parts hold 11 tensors"),
        "{error}"
    );
    let mut both = second.clone();
    both.tensors.push(first.tensors[0].clone());
    let error = parts(first.clone(), both).unwrap_err().to_string();
    assert!(
        error.contains("tensor `token_embd.weight` is also in"),
        "{error}"
    );
    fs::remove_file(name(2)).unwrap();
    assert!(
        Checkpoint::open(name(1))
            .unwrap_err()
            .to_string()
            .contains("m-00002-of-00002.gguf")
    );
    assert!(
        first
            .refused()
            .contains("whose name should end in `-00001-of-00002.gguf`")
    );
}

/// Opens and reads everything; the result does not matter, that there is one does.
fn exercise(path: &Path) -> bool {
    let _ = HfConfig::open(path);
    if let Ok(model) = Gguf::open(path) {
        let _ = model.tokenizer();
    }
    let Ok(file) = Checkpoint::open(path) else {
        return false;
    };
    for name in file.names() {
        let _ = file.load_f32(name);
        let _ = file.buffer(name);
        let shape = file.info(name).unwrap().shape.clone();
        if let [rows, cols] = shape[..] {
            let _ = file.load_quantized(name, [rows, cols]);
        }
    }
    true
}

#[test]
fn mutated_files_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    let all = [with_words(llama()), with_pieces(llama()), deci()].map(|writer| writer.bytes());
    let path = folder.path().join("m.gguf");
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let rounds = crate::io::testing::rounds(3000);
    let mut opened = 0;
    for round in 0..rounds {
        let mut bytes = all[round / 3 % 3].clone();
        let header = bytes.len() / 14;
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..header);
            bytes[at] = match round % 3 {
                0 => rng.random(),
                1 => pick(&mut rng, &[0, 1, 2, 4, 6, 8, 9, 12, 0x7F, 0x80, 0xFF]),
                _ => bytes[at] ^ (1 << rng.random_range(0..8)),
            };
        }
        if rng.random_bool(0.1) {
            bytes.truncate(rng.random_range(0..=bytes.len()));
        }
        fs::write(&path, &bytes).unwrap();
        opened += usize::from(exercise(&path));
    }
    assert!(opened > 0 && opened < rounds, "{opened} of {rounds}");
}

/// A byte-level tokenizer of a few tokens.
fn with_words(writer: Writer) -> Writer {
    let kinds = [1_i32, 1, 1, 1, 1, 3, 4, 5, 5].map(|kind| kind.to_le_bytes().to_vec());
    writer
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "gpt-2")
        .key(
            "tokenizer.ggml.tokens",
            texts(&[
                "a", "b", "Ġ", "ab", "Ġab", "<s>", "<tool>", "[PAD]", "[PAD]",
            ]),
        )
        .key("tokenizer.ggml.token_type", list(5, &kinds))
        .key("tokenizer.ggml.merges", texts(&["a b", "Ġ ab"]))
        .int("tokenizer.ggml.bos_token_id", 5)
        .flag("tokenizer.ggml.add_bos_token", true)
        .text("tokenizer.chat_template", "{{ messages }}")
}

/// A tokenizer of SentencePiece's kind.
fn with_pieces(writer: Writer) -> Writer {
    let kinds = [2_i32, 3, 3, 1, 1, 1, 1, 1].map(|kind| kind.to_le_bytes().to_vec());
    let scores = [0.0_f32, 0.0, 0.0, -1.0, -2.0, -10.0, -11.0, -12.0];
    writer
        .text("tokenizer.ggml.model", "llama")
        .key(
            "tokenizer.ggml.tokens",
            texts(&["<unk>", "<s>", "</s>", "ab", "▁ab", "a", "b", "▁"]),
        )
        .key("tokenizer.ggml.token_type", list(5, &kinds))
        .key(
            "tokenizer.ggml.scores",
            list(6, &scores.map(|s| s.to_le_bytes().to_vec())),
        )
        .int("tokenizer.ggml.bos_token_id", 1)
        .int("tokenizer.ggml.eos_token_id", 2)
}

fn json_of(writer: &Writer) -> Result<serde_json::Value> {
    let folder = tempfile::tempdir().unwrap();
    let files = Gguf::open(writer.write(folder.path()))?
        .tokenizer()?
        .unwrap();
    Ok(serde_json::from_str(&files.json).unwrap())
}

#[test]
fn tokenizers_are_described_as_in_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let model = Gguf::open(with_words(llama()).write(folder.path())).unwrap();
    assert_eq!(model.chat_template().unwrap(), Some("{{ messages }}"));
    let files = model.tokenizer().unwrap().unwrap();
    assert_eq!(files.config["bos_token"], "<s>");
    assert_eq!(files.config["chat_template"], "{{ messages }}");
    let json = json_of(&with_words(llama())).unwrap();
    assert_eq!(
        json["model"]["merges"],
        serde_json::json!([["a", "b"], ["Ġ", "ab"]])
    );
    assert_eq!(json["model"]["vocab"]["Ġab"], 4);
    assert_eq!(json["added_tokens"][0]["content"], "<s>");
    assert_eq!(json["added_tokens"][1]["special"], false);
    assert_eq!(json["post_processor"]["special_tokens"]["<s>"]["ids"][0], 5);
    let json = json_of(&with_pieces(llama())).unwrap();
    assert_eq!(
        json["model"]["merges"],
        serde_json::json!([["a", "b"], ["▁", "ab"]])
    );
    // llama.cpp finds the unknown token's name in a text too, as transformers does.
    assert_eq!(json["added_tokens"][0]["content"], "<unk>");
    assert_eq!(json["added_tokens"][0]["special"], true);
    assert!(
        Gguf::open(llama().write(folder.path()))
            .unwrap()
            .tokenizer()
            .unwrap()
            .is_none()
    );
    let whole = with_words(llama()).text("tokenizer.huggingface.json", "{\"version\": 1}");
    assert_eq!(
        json_of(&whole).unwrap(),
        serde_json::json!({ "version": 1 })
    );

    let words = || with_words(llama());
    let pieces = || with_pieces(llama());
    let rows = [
        (
            words().text("tokenizer.ggml.model", "rwkv"),
            "`tokenizer.ggml.model` = `rwkv`",
        ),
        (
            words().text("tokenizer.ggml.pre", "default"),
            "`tokenizer.ggml.pre` = `default`",
        ),
        (
            words().without("tokenizer.ggml.pre"),
            "key `tokenizer.ggml.pre`: missing",
        ),
        (
            words().without("tokenizer.ggml.merges"),
            "key `tokenizer.ggml.merges`: missing",
        ),
        (
            words().without("tokenizer.ggml.tokens"),
            "key `tokenizer.ggml.tokens`: missing",
        ),
        (
            words().key("tokenizer.ggml.merges", texts(&["ab"])),
            "\"ab\" is no pair",
        ),
        (
            words().key("tokenizer.ggml.tokens", texts(&["a"; 9])),
            "tokens 0 and 1 are both \"a\"",
        ),
        (
            words().key("tokenizer.ggml.token_type", list(5, &[])),
            "a number of 1 to 6",
        ),
        (
            words().int("tokenizer.ggml.bos_token_id", 50),
            "`tokenizer.ggml.bos_token_id`: 50",
        ),
        (
            words().without("tokenizer.ggml.bos_token_id"),
            "there is no `bos_token_id`",
        ),
        (
            pieces().without("tokenizer.ggml.scores"),
            "key `tokenizer.ggml.scores`: missing",
        ),
        (
            pieces().key("tokenizer.ggml.scores", list(6, &[])),
            "a number for each token",
        ),
    ];
    for (writer, expected) in rows {
        let found = json_of(&writer).unwrap_err().to_string();
        assert!(found.contains(expected), "{found}\nexpected {expected}");
    }
}

#[test]
fn stories_are_those_of_the_folder() {
    let Some(folder) = shared("models/stories260K") else {
        return;
    };
    let ours = Checkpoint::open(folder.join("stories260K.gguf")).unwrap();
    let theirs = Checkpoint::open(&folder).unwrap();
    for name in theirs.names() {
        assert_eq!(
            ours.load_f32(name).unwrap(),
            theirs.load_f32(name).unwrap(),
            "{name}"
        );
    }
}

/// The ids of a text by the tokenizer that a file describes.
fn tokenizer_of(writer: &Writer) -> tokenizers::Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    let model = Gguf::open(writer.write(folder.path())).unwrap();
    model.tokenizer().unwrap().unwrap().json.parse().unwrap()
}

/// Compares a tokenizer with llama.cpp's vectors for it.
fn agrees(tokenizer: &tokenizers::Tokenizer, vectors: &Path) {
    let read = |suffix: &str| {
        let name = format!("{}{suffix}", vectors.display());
        fs::read_to_string(name).unwrap()
    };
    let (inputs, outputs) = (read(".inp"), read(".out"));
    let inputs: Vec<&str> = inputs.split("\n__ggml_vocab_test__\n").collect();
    let mut compared = 0;
    for (input, output) in inputs.iter().zip(outputs.lines()) {
        let expected: Vec<u32> = output
            .split_whitespace()
            .map(|id| id.parse().unwrap())
            .collect();
        let found = tokenizer.encode(*input, false).unwrap();
        assert_eq!(found.get_ids(), expected, "{input:?}");
        compared += 1;
    }
    assert!(compared > 30);
}

#[test]
fn byte_level_tokens_are_llama_cpps() {
    let Some(folder) = shared("models/tokenizers") else {
        return;
    };
    let json = fs::read_to_string(folder.join("gpt2/tokenizer.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![""; vocab.len()];
    for (text, id) in vocab {
        tokens[id.as_u64().unwrap() as usize] = text;
    }
    let merges: Vec<String> = json["model"]["merges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pair| match pair.as_array() {
            Some(pair) => format!(
                "{} {}",
                pair[0].as_str().unwrap(),
                pair[1].as_str().unwrap()
            ),
            None => pair.as_str().unwrap().into(),
        })
        .collect();
    let merges: Vec<&str> = merges.iter().map(String::as_str).collect();
    let kinds: Vec<Vec<u8>> = tokens
        .iter()
        .map(|text| {
            if *text == "<|endoftext|>" { 3_i32 } else { 1 }
                .to_le_bytes()
                .to_vec()
        })
        .collect();
    let writer = llama()
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "gpt-2")
        .key("tokenizer.ggml.tokens", texts(&tokens))
        .key("tokenizer.ggml.token_type", list(5, &kinds))
        .key("tokenizer.ggml.merges", texts(&merges));
    agrees(
        &tokenizer_of(&writer),
        &folder.join("ggml-vocab-gpt-2.gguf"),
    );
}

/// A field of a protocol buffer: its number, its own bytes, and what follows.
fn field(bytes: &[u8]) -> Option<(u64, &[u8], &[u8])> {
    fn varint(mut bytes: &[u8]) -> Option<(u64, &[u8])> {
        let (mut value, mut shift) = (0, 0);
        loop {
            let (byte, rest) = bytes.split_first()?;
            value |= u64::from(byte & 127) << shift;
            (bytes, shift) = (rest, shift + 7);
            if byte & 128 == 0 {
                return Some((value, bytes));
            }
        }
    }
    let (key, rest) = varint(bytes)?;
    let (len, rest) = match key & 7 {
        0 => (rest.len() - varint(rest)?.1.len(), rest),
        1 => (8, rest),
        2 => {
            let (len, rest) = varint(rest)?;
            (len as usize, rest)
        }
        _ => (4, rest),
    };
    let (value, rest) = rest.split_at_checked(len)?;
    Some((key >> 3, value, rest))
}

/// Llama 2's tokenizer, from its SentencePiece model.
fn llama2() -> Option<Writer> {
    let model = fs::read(shared("models/tokenizers/llama2.model")?).unwrap();
    let (mut tokens, mut scores, mut kinds) = (Vec::new(), Vec::new(), Vec::new());
    let mut rest = model.as_slice();
    while let Some((number, value, after)) = field(rest) {
        rest = after;
        if number != 1 {
            continue;
        }
        let (mut piece, mut kind) = (value, 1_i32);
        while let Some((number, value, after)) = field(piece) {
            piece = after;
            match number {
                1 => tokens.push(std::str::from_utf8(value).unwrap()),
                2 => scores.push(value.to_vec()),
                _ => kind = value[0].into(),
            }
        }
        kinds.push(kind.to_le_bytes().to_vec());
    }
    let writer = llama()
        .text("tokenizer.ggml.model", "llama")
        .key("tokenizer.ggml.tokens", texts(&tokens))
        .key("tokenizer.ggml.token_type", list(5, &kinds))
        .key("tokenizer.ggml.scores", list(6, &scores))
        .int("tokenizer.ggml.bos_token_id", 1);
    Some(writer)
}

/// The `tokenizer.json` of Llama 2.
pub(super) fn llama2_json() -> Option<String> {
    Some(json_of(&llama2()?).unwrap().to_string())
}

#[test]
fn pieces_are_llama_cpps() {
    let (Some(writer), Some(folder)) = (llama2(), shared("models/tokenizers")) else {
        return;
    };
    let tokenizer = tokenizer_of(&writer);
    agrees(&tokenizer, &folder.join("ggml-vocab-llama-spm.gguf"));
    let ids = tokenizer.encode("a b", true).unwrap();
    assert_eq!(ids.get_ids()[0], 1);
    assert_eq!(tokenizer.decode(ids.get_ids(), true).unwrap(), "a b");
}
