//! Measures the speed of compressed weights in decoding and prefill, by format, on random models of
//! LLaMA's shapes: `cargo bench --bench decode`.
//!
//! Decoding reads every weight once per token, so memory bandwidth limits it. The limit is the read
//! bandwidth of all threads, measured in the same run before and after each model, divided by the
//! bytes read per token: weights, head, keys and values. `share` is the fraction of this limit that
//! is reached. Arithmetic limits prefill, so its rate is shown next to that of the `gemm` crate's
//! `f32` product of the same shape on the same number of threads. Random weights suffice, since
//! neither speed depends on their values.
//!
//! This bench is a separate program because `benches/llama_cpp/compare.py` compares it with
//! llama.cpp, and because it measures memory.

mod common;

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use common::{copy, gemm_rate, name, read, weight};
use elastic_lora::arch::Architecture;
use elastic_lora::format::{StoredMatrix, WeightFormat};
use elastic_lora::io::DType;
use elastic_lora::io::hf::{HfConfig, LlamaDims};
use elastic_lora::kernels::{Activations, Pool};
use elastic_lora::runtime::{CacheFormat, Model, ModelOptions, Session, SessionConfig};
use elastic_lora::{Error, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Size {
    /// 0.55 billion: hidden 1536, MLP 4096, 16 layers, 12 heads
    Half,
    /// 0.95 billion: hidden 2048, MLP 5632, 16 layers, 32 heads
    One,
    /// 2.1 billion: hidden 3072, MLP 8448, 16 layers, 24 heads; in f16 a bundle of more than 4 GB
    Two,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Dense, 16 bits
    F16,
    /// Half of the weights zero, 16 bits
    SparseF16,
    /// Dense, 4 bits, groups of 128
    Int4,
    /// Half of the weights zero, 4 bits, groups of 128
    SparseInt4,
    /// Dense, 16 bits, MLPs of half the width, as extracted by LoNAS
    ExtractedF16,
}

/// Measure the speed of compressed models.
#[derive(Parser)]
struct Args {
    /// Model sizes
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Size::Half, Size::One])]
    sizes: Vec<Size>,
    /// Weight formats
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Kind::F16, Kind::SparseF16, Kind::Int4, Kind::SparseInt4, Kind::ExtractedF16])]
    formats: Vec<Kind>,
    /// Number of threads; 0 for one per core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Number of tokens in the cache before decoding
    #[arg(long, default_value_t = 64)]
    context: usize,
    /// Number of tokens in the prompt
    #[arg(long, default_value_t = 256)]
    prompt: usize,
    /// Number of turns; each decodes eight tokens
    #[arg(long, default_value_t = 6)]
    turns: usize,
    /// Number of prefill runs
    #[arg(long, default_value_t = 2)]
    prefills: usize,
    /// Round the inputs of integer weights to 8 bits
    #[arg(long)]
    int8: bool,
    /// Store keys and values in 16 bits
    #[arg(long)]
    half_cache: bool,
    /// Write each model as a bundle into this folder, and measure opening it
    #[arg(long)]
    bundles: Option<PathBuf>,
    /// Measure only the smallest model in f16 and INT4, with two turns
    #[arg(long)]
    quick: bool,
}

fn config(size: Size, kind: Kind) -> Result<HfConfig> {
    let (hidden_size, mlp, heads) = match size {
        Size::Half => (1536, 4096, 12),
        Size::One => (2048, 5632, 32),
        Size::Two => (3072, 8448, 24),
    };
    HfConfig::new_llama(&LlamaDims {
        vocab_size: 32_000,
        hidden_size,
        intermediate_size: if kind == Kind::ExtractedF16 {
            mlp / 2
        } else {
            mlp
        },
        num_hidden_layers: 16,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        max_position_embeddings: 2048,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
        bos_token_id: None,
        eos_token_id: None,
        pad_token_id: None,
        dtype: DType::F16,
    })
}

/// Returns the weight format of a kind.
fn format(kind: Kind) -> WeightFormat {
    let (group_size, symmetric) = (Some(128), false);
    match kind {
        Kind::F16 | Kind::ExtractedF16 => WeightFormat::F16,
        Kind::SparseF16 => WeightFormat::SparseF16,
        Kind::Int4 => WeightFormat::Int {
            bits: 4,
            group_size,
            symmetric,
        },
        Kind::SparseInt4 => WeightFormat::SparseInt4 {
            group_size,
            symmetric,
        },
    }
}

/// Creates a model in which weights of the same shape have the same values. Each weight has memory
/// of its own.
fn model(size: Size, kind: Kind, threads: usize) -> Result<Model> {
    let config = config(size, kind)?;
    let mut made: HashMap<[usize; 2], StoredMatrix> = HashMap::new();
    let matrix = |name: &str, shape: [usize; 2]| {
        if name == Architecture::EMBEDDING {
            return weight(WeightFormat::F16, shape, 0.0, None);
        }
        if let Some(matrix) = made.get(&shape) {
            return copy(matrix);
        }
        let matrix = weight(format(kind), shape, 0.5, None)?;
        let copy = copy(&matrix)?;
        made.insert(shape, matrix);
        Ok(copy)
    };
    Model::from_matrices(&config, matrix, |_, len| Ok(vec![1.0; len]))?.with_n_threads(threads)
}

/// Returns the read bandwidth of all threads in bytes per second: the best of several runs over
/// memory far larger than the caches.
fn bandwidth(memory: &[u64], pool: &Pool) -> f64 {
    let least = (0..4).map(|_| read(pool, memory)).min().unwrap_or_default();
    size_of_val(memory) as f64 / least.as_secs_f64()
}

/// Returns the resident memory of this process in megabytes.
fn resident_mb() -> f64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: f64 = text
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse().ok())
        .unwrap_or(0.0);
    pages * 4096.0 / 1e6
}

struct Measured {
    read_mb: f64,
    decode: f64,
    share: f64,
    bandwidth: f64,
    prefill: f64,
    macs: f64,
}

fn measure(args: &Args, model: &Model, memory: &[u64]) -> Result<Measured> {
    let pool = Pool::new(model.n_threads());
    let config = model.config();
    let mut settings = SessionConfig::default();
    if args.int8 {
        settings = settings.with_activations(Activations::Int8);
    }
    if args.half_cache {
        settings = settings.with_cache(CacheFormat::F16);
    }
    let mut session = Session::new(model, &settings)?;
    let ids = |n: usize| {
        (0..n as u32)
            .map(|id| (id * 7919) % 32_000)
            .collect::<Vec<u32>>()
    };
    let mut logits = vec![0.0; config.vocab_size()];
    let before = bandwidth(memory, &pool);
    session.decode(&ids(args.context.max(1)), None)?;
    let (mut best, mut during) = (f64::INFINITY, 0.0_f64);
    for turn in 0..args.turns {
        session.truncate(args.context.max(1));
        for token in ids(8) {
            let started = Instant::now();
            session.decode(&[token], Some(&mut logits))?;
            best = best.min(started.elapsed().as_secs_f64());
        }
        if turn % 2 == 1 {
            during = during.max(bandwidth(memory, &pool));
        }
    }
    let bandwidth = before.max(during);
    let prompt = ids(args.prompt);
    let mut prefill = f64::INFINITY;
    for _ in 0..args.prefills {
        session.reset();
        let started = Instant::now();
        session.decode(&prompt, Some(&mut logits))?;
        prefill = prefill.min(started.elapsed().as_secs_f64());
    }
    let weights: usize = model.layers().iter().map(|layer| layer.bytes).sum();
    let number = if args.half_cache { 2 } else { 4 };
    let kept: usize = config
        .blocks()
        .iter()
        .map(|block| 2 * block.n_kv_heads * config.head_dim())
        .sum();
    let read = (weights + number * kept * (args.context + 4)) as f64;
    let macs: usize = model
        .layers()
        .iter()
        .filter(|layer| layer.name != "lm_head")
        .map(|layer| layer.d_input * layer.d_output)
        .sum();
    Ok(Measured {
        read_mb: read / 1e6,
        decode: 1.0 / best,
        share: read / best / bandwidth,
        bandwidth,
        prefill: args.prompt as f64 / prefill,
        macs: (macs * args.prompt) as f64 / prefill,
    })
}

fn bundle(folder: &std::path::Path, name: &str, model: &Model) -> Result<()> {
    let path = folder.join(format!("{name}.elora"));
    model.save(&path, true)?;
    let (started, before) = (Instant::now(), resident_mb());
    let opened = Model::open(&path, &ModelOptions::default())?;
    let (ms, touched) = (
        1e3 * started.elapsed().as_secs_f64(),
        resident_mb() - before,
    );
    let started = Instant::now();
    opened.verify()?;
    let verified = started.elapsed().as_secs_f64();
    let bytes = opened.bytes() as f64;
    println!(
        "{name:<14} bundle of {:.0} MB: opened in {ms:.1} ms, {touched:.1} MB touched; verified in {verified:.2} s, {:.1} GB/s",
        bytes / 1e6,
        bytes / verified / 1e9
    );
    drop(opened);
    std::fs::remove_file(&path).map_err(|error| Error::io(&path, error))
}

fn bench(args: &mut Args) -> Result<()> {
    if args.quick {
        (args.sizes, args.formats) = (vec![Size::Half], vec![Kind::F16, Kind::Int4]);
        (args.turns, args.prefills) = (2, 1);
    }
    // 512 MB.
    let memory: Vec<u64> = (0..64 << 20).collect();
    for size in &args.sizes {
        let mut dense = None;
        let mut printed = false;
        for kind in &args.formats {
            let model = model(*size, *kind, args.threads)?;
            let name = name(*kind);
            if !printed {
                printed = true;
                let params: usize = model
                    .layers()
                    .iter()
                    .map(|layer| layer.d_input * layer.d_output)
                    .sum();
                let (rows, hidden) = (args.prompt, model.config().hidden_size());
                let rate = gemm_rate(
                    rows,
                    hidden,
                    model.config().intermediate_size(),
                    model.n_threads(),
                );
                println!(
                    "{:.2} billion weights per token, {} threads, context of {}, prompts of {}; gemm in f32: {:.0} GMAC/s",
                    params as f64 / 1e9,
                    model.n_threads(),
                    args.context,
                    args.prompt,
                    rate / 1e9
                );
                let head = [
                    "MB/token",
                    "tokens/s",
                    "GB/s read",
                    "share",
                    "x f16",
                    "prefill/s",
                    "GMAC/s",
                ];
                println!(
                    "{:<14} {}",
                    "",
                    head.map(|cell| format!("{cell:>10}")).join(" ")
                );
            }
            let measured = measure(args, &model, &memory)?;
            let dense = *dense.get_or_insert(measured.decode);
            let cells = [
                format!("{:.1}", measured.read_mb),
                format!("{:.1}", measured.decode),
                format!("{:.1}", measured.bandwidth / 1e9),
                format!("{:.3}", measured.share),
                format!("{:.2}", measured.decode / dense),
                format!("{:.0}", measured.prefill),
                format!("{:.0}", measured.macs / 1e9),
            ];
            println!(
                "{name:<14} {}",
                cells.map(|cell| format!("{cell:>10}")).join(" ")
            );
            if let Some(folder) = &args.bundles {
                bundle(folder, &name, &model)?;
            }
        }
    }
    Ok(())
}

fn main() {
    common::program(bench);
}
