//! Pruning and quantization from files to files: the folders are those that the model in memory
//! gives, whatever happens on the way.

use std::collections::BTreeMap;
use std::path::Path;

use crate::common::families::Fixture;
use crate::common::{Heard, load, random_ids};
use burn::tensor::Device;
use elastic_lora::calib::{
    PruneConfig, PrunedLayer, QuantizeConfig, QuantizeMethod, Streaming, prune_model,
    quantize_model,
};
use elastic_lora::io::hf::{HfConfig, HfFolder};
use elastic_lora::io::{Checkpoint, DType, GgufOptions, QuantFormat, write_gguf};
use elastic_lora::model::Decoder;
use elastic_lora::progress::{Progress, Silent};
use elastic_lora::quant::GridConfig;
use elastic_lora::sparsity::{Method, OwlConfig, Pattern};
use elastic_lora::{Error, Result};

const HALF: Pattern = Pattern::Unstructured { ratio: 0.5 };

/// What is done to a model.
#[derive(Clone, Copy)]
enum Work {
    Prune(PruneConfig),
    Quantize(QuantizeConfig, QuantFormat),
}

impl Work {
    fn prune(method: Method) -> Self {
        Self::Prune(PruneConfig::new(method, HALF))
    }

    fn quantize(method: QuantizeMethod, grid: GridConfig, format: QuantFormat) -> Self {
        Self::Quantize(QuantizeConfig::new(method, grid), format)
    }

    /// Works in memory, and writes a folder.
    fn in_memory(&self, source: &Path, samples: &[Vec<u32>], out: &Path) -> Result<Report> {
        let mut model = load(source);
        let checkpoint = Checkpoint::open(source)?;
        let name = model.config().embedding_name(&checkpoint)?;
        let dtype = checkpoint.info(name)?.dtype;
        let folder = HfFolder::create(out, false)?;
        let report = match self {
            Self::Prune(config) => {
                let report = prune_model(&mut model, samples, config, &Silent)?;
                folder.write_model(model.config(), dtype, model.tensors(dtype)?)?;
                report
            }
            Self::Quantize(config, format) => {
                let layers = quantize_model(&mut model, samples, config, &Silent)?;
                let tensors = model.tensors(dtype)?;
                folder.write_quantized(model.config(), dtype, tensors, &layers, *format)?;
                Vec::new()
            }
        };
        folder.carry_over(source)?;
        folder.commit()?;
        Ok(report)
    }

    fn streamed(
        &self,
        streaming: &Streaming,
        samples: &[Vec<u32>],
        heard: &dyn Progress,
    ) -> Result<Report> {
        match self {
            Self::Prune(config) => streaming.prune(samples, config, heard),
            Self::Quantize(config, format) => streaming
                .quantize(samples, config, *format, heard)
                .map(|_| Vec::new()),
        }
    }
}

type Report = Vec<PrunedLayer>;

fn open(source: &Path, out: &Path) -> Streaming {
    Streaming::open(source, out, &Device::flex()).unwrap()
}

fn samples(vocab: u32) -> Vec<Vec<u32>> {
    let lens = [11, 11, 7, 11, 0, 7];
    let samples = lens.iter().zip(1..);
    samples
        .map(|(len, seed)| random_ids(*len, vocab, seed))
        .collect()
}

/// The files of a folder.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = folder
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_string();
    entries
        .map(|path| (name(&path), std::fs::read(path).unwrap()))
        .collect()
}

fn assert_same(what: &str, a: &Path, b: &Path) {
    let (a, b) = (files(a), files(b));
    let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&a), names(&b), "{what}");
    a.iter()
        .for_each(|(name, bytes)| assert!(*bytes == b[name], "{what}: {name}"));
}

fn works() -> Vec<(&'static str, Work)> {
    let grid = |size| GridConfig::new(4).with_group_size(size);
    let (gptq, nearest) = (QuantizeMethod::Gptq, QuantizeMethod::Nearest);
    let joint = QuantizeMethod::SparseGptq(HALF);
    let owl = PruneConfig::new(Method::Wanda, HALF).with_owl(OwlConfig::default());
    vec![
        ("magnitude", Work::prune(Method::Magnitude)),
        ("wanda", Work::prune(Method::Wanda)),
        ("ria", Work::prune(Method::Ria)),
        ("sparsegpt", Work::prune(Method::SparseGpt)),
        ("owl", Work::Prune(owl)),
        (
            "rtn",
            Work::quantize(nearest, grid(None), QuantFormat::Gptq),
        ),
        (
            "gptq",
            Work::quantize(gptq, grid(Some(8)), QuantFormat::GptqV2),
        ),
        (
            "joint",
            Work::quantize(joint, grid(Some(8)), QuantFormat::CompressedTensors),
        ),
    ]
}

/// A random model of a fixture's family, whose widths fill whole words at 4 bits.
fn wide(fixture: &Fixture, out: &Path) {
    let mut raw = HfConfig::open(&fixture.path).unwrap().raw().clone();
    for (name, size) in [
        ("hidden_size", 64),
        ("intermediate_size", 96),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 2),
        ("head_dim", 16),
    ] {
        raw.insert(name.into(), size.into());
    }
    let config = HfConfig::from_json(raw).unwrap();
    let model = Decoder::init(&config, 5, &Device::flex()).unwrap();
    let folder = HfFolder::create(out, false).unwrap();
    let tensors = model.tensors(DType::BF16).unwrap();
    folder.write_model(&config, DType::BF16, tensors).unwrap();
    folder.commit().unwrap();
}

#[test]
fn a_streamed_folder_is_the_one_from_memory() {
    let mut n_quantized = 0;
    let root = tempfile::tempdir().unwrap();
    let mut sources = Vec::new();
    for fixture in Fixture::all() {
        // The other fixtures vary what depends on sizes.
        let plain = [
            "gemma",
            "gemma2",
            "gemma3",
            "mistral",
            "phi3",
            "qwen2",
            "qwen3",
            "llama-biases",
        ];
        if plain.contains(&fixture.name.as_str()) {
            let path = root.path().join(&fixture.name);
            wide(&fixture, &path);
            sources.push((format!("wide {}", fixture.name), path));
        }
        sources.push((fixture.name, fixture.path));
    }
    for (name, source) in sources {
        let vocab = HfConfig::open(&source).unwrap().vocab_size() as u32;
        for (label, work) in works() {
            let what = format!("{name}, {label}");
            let root = tempfile::tempdir().unwrap();
            let (a, b) = (root.path().join("a"), root.path().join("b"));
            let samples = samples(vocab);
            let streaming = open(&source, &b);
            let expected = work.in_memory(&source, &samples, &a);
            let found = work.streamed(&streaming, &samples, &Silent);
            match (expected, found) {
                (Ok(expected), Ok(found)) => {
                    assert_eq!(expected, found, "{what}");
                    assert_same(&what, &a, &b);
                    n_quantized += usize::from(expected.is_empty());
                }
                // Sizes that do not fill the words of a format.
                (Err(a), Err(b)) => assert_eq!(a.to_string(), b.to_string(), "{what}"),
                (a, b) => panic!("{what}: {a:?}, {b:?}"),
            }
            assert!(
                !root.path().join("b.unfinished").exists() || !b.exists(),
                "{what}"
            );
        }
    }
    assert!(n_quantized >= 3 * 8, "{n_quantized}");
}

fn shipped() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/arithmetic-llama")
}

#[test]
fn interrupted_streams_go_on_and_give_the_same_bytes() {
    let source = shipped();
    let samples: Vec<_> = (0..4).map(|seed| random_ids(24, 60, seed)).collect();
    for (label, work) in works() {
        if !["magnitude", "owl", "sparsegpt", "joint"].contains(&label) {
            continue;
        }
        let root = tempfile::tempdir().unwrap();
        let (a, b) = (root.path().join("a"), root.path().join("b"));
        let expected = work.in_memory(&source, &samples, &a).unwrap();
        let heard = Heard::default();
        work.streamed(&open(&source, &b), &samples, &heard).unwrap();
        assert_same(label, &a, &b);
        let asked = heard.asked();
        // Each process goes on where the one before was interrupted.
        let out = root.path().join("out");
        let (mut stops, mut n) = ((asked / 9).max(2), 0);
        loop {
            match work.streamed(&open(&source, &out), &samples, &Heard::stopping_at(stops)) {
                Ok(found) => {
                    assert_eq!(found, expected, "{label}");
                    break;
                }
                Err(Error::Interrupted { .. }) => (stops, n) = (stops + asked / 20, n + 1),
                Err(other) => panic!("{label}: {other}"),
            }
            assert!(!out.exists());
        }
        assert!(n >= 2, "{label}: {n} of {asked}");
        assert_same(label, &a, &out);
        assert!(!root.path().join("out.unfinished").exists(), "{label}");
    }
}

#[test]
fn what_a_killed_stream_left_is_checked() {
    let source = shipped();
    let samples: Vec<_> = (0..4).map(|seed| random_ids(24, 60, seed)).collect();
    let work = Work::prune(Method::Wanda);
    let root = tempfile::tempdir().unwrap();
    let (a, out) = (root.path().join("a"), root.path().join("out"));
    work.in_memory(&source, &samples, &a).unwrap();
    let notes = root.path().join("out.unfinished");
    let stop = |streaming: &Streaming| {
        let error = work
            .streamed(streaming, &samples, &Heard::stopping_at(25))
            .unwrap_err();
        assert!(matches!(error, Error::Interrupted { .. }), "{error}");
    };
    stop(&open(&source, &out));
    let states = || {
        let states = files_of(&notes, "states-");
        assert_eq!(states.len(), 1, "{states:?}");
        states[0].clone()
    };
    // Other settings, samples or numbers are another job.
    let other = Work::prune(Method::Ria);
    for error in [
        other.streamed(&open(&source, &out), &samples, &Silent),
        work.streamed(&open(&source, &out), &samples[1..], &Silent),
        work.streamed(
            &open(&source, &out).with_dtype(DType::F32),
            &samples,
            &Silent,
        ),
    ] {
        let error = error.unwrap_err();
        assert!(matches!(error, Error::InvalidState { .. }), "{error}");
        assert!(error.to_string().contains("out.unfinished"), "{error}");
    }
    // Hidden states that are damaged or missing are computed again.
    let mut bytes = std::fs::read(states()).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(states(), bytes).unwrap();
    stop(&open(&source, &out));
    std::fs::remove_file(states()).unwrap();
    stop(&open(&source, &out));
    // A file that was being written.
    std::fs::write(notes.join("states-1.tmp"), b"half").unwrap();
    std::fs::write(
        notes.join("folder/.model-00003-of-00006.safetensors-abcdef.tmp"),
        b"half",
    )
    .unwrap();
    work.streamed(&open(&source, &out), &samples, &Silent)
        .unwrap();
    assert_same("after damage", &a, &out);

    // A model that has changed in the meantime.
    let copy = root.path().join("copy");
    std::fs::create_dir(&copy).unwrap();
    for (name, bytes) in files(&source) {
        std::fs::write(copy.join(name), bytes).unwrap();
    }
    let out = root.path().join("changed");
    stop(&open(&copy, &out));
    let file = copy.join("model.safetensors");
    let offset = Checkpoint::open(&copy)
        .unwrap()
        .offset("model.layers.0.mlp.up_proj.weight")
        .unwrap();
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[offset] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let error = work
        .streamed(&open(&copy, &out), &samples, &Silent)
        .unwrap_err();
    assert!(matches!(error, Error::InvalidState { .. }), "{error}");
    assert!(error.to_string().contains("block 0"), "{error}");
}

fn files_of(folder: &Path, prefix: &str) -> Vec<std::path::PathBuf> {
    let entries = folder
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let named = |path: &std::path::PathBuf| {
        path.file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .starts_with(prefix)
    };
    entries.filter(named).collect()
}

#[test]
fn shards_of_a_large_folder_hold_a_block_each() {
    let source = shipped();
    let samples: Vec<_> = (0..3).map(|seed| random_ids(24, 60, seed)).collect();
    for (label, work) in works() {
        if !["wanda", "gptq"].contains(&label) {
            continue;
        }
        let root = tempfile::tempdir().unwrap();
        let (a, b) = (root.path().join("a"), root.path().join("b"));
        work.in_memory(&source, &samples, &a).unwrap();
        let streaming = open(&source, &b).with_max_shard_bytes(10_000);
        work.streamed(&streaming, &samples, &Silent).unwrap();
        let (one, many) = (Checkpoint::open(&a).unwrap(), Checkpoint::open(&b).unwrap());
        let n_blocks = HfConfig::open(&a).unwrap().num_hidden_layers();
        assert_eq!(files_of(&b, "model-").len(), n_blocks + 1);
        assert!(one.names().eq(many.names()), "{label}");
        for name in one.names() {
            assert_eq!(one.info(name).unwrap(), many.info(name).unwrap());
            assert!(
                one.bytes(name).unwrap() == many.bytes(name).unwrap(),
                "{label}: {name}"
            );
        }
        load(&b);
        // A folder that is there is not replaced unasked.
        let again = || open(&source, &b).with_max_shard_bytes(10_000);
        assert!(work.streamed(&again(), &samples, &Silent).is_err());
        work.streamed(&again().with_overwrite(true), &samples, &Silent)
            .unwrap();
        assert_eq!(files(&b).len(), files(&a).len() + n_blocks + 1);
    }
}

#[test]
fn gguf_files_and_quantized_folders_are_streamed() {
    let source = shipped();
    let samples: Vec<_> = (0..3).map(|seed| random_ids(24, 60, seed)).collect();
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("model.gguf");
    let options = GgufOptions {
        linears: Some("q8_0".parse().unwrap()),
        ..GgufOptions::default()
    };
    write_gguf(&source, &file, &options).unwrap();
    let folder = root.path().join("int4");
    let grid = GridConfig::new(4).with_group_size(Some(32));
    let nearest = Work::quantize(QuantizeMethod::Nearest, grid, QuantFormat::Gptq);
    nearest.in_memory(&source, &[], &folder).unwrap();
    for (index, from) in [file, folder].iter().enumerate() {
        let (a, b) = (
            root.path().join(format!("a{index}")),
            root.path().join(format!("b{index}")),
        );
        let work = Work::prune(Method::Wanda);
        // The embedding of a quantized GGUF file stands in blocks; in memory, it is f32.
        work.in_memory(from, &samples, &a).unwrap();
        work.streamed(&open(from, &b), &samples, &Silent).unwrap();
        assert_same(&format!("{}", from.display()), &a, &b);
    }
}
