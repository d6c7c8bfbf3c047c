//! Measures Wanda, the Hessian and GPTQ (4 bits, groups of 128) on one layer. With `--pytorch`, it
//! also measures the plain algorithms in PyTorch (`benches/pytorch/quantize.py`):
//! `cargo bench --bench quantize -- --pytorch python3`.
//!
//! Each method runs in its own process, so that the peak memory is that of the method, and both
//! programs take turns. For that reason this bench is a separate program.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use common::{ask, gemm_rate, median, name, status_mib, timed};
use elastic_lora::linalg::{Factor, FactorConfig, Hessian, Matrix};
use elastic_lora::quant::{GptqConfig, GridConfig, gptq};
use elastic_lora::sparsity::{InputNorms, Method as PruneMethod, Pattern, prune};
use elastic_lora::{Error, Result};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Method {
    Wanda,
    Hessian,
    Gptq,
}

/// Measure pruning and quantization of a layer.
#[derive(Parser)]
struct Args {
    /// Number of outputs of the layer
    #[arg(long, default_value_t = 4096)]
    rows: usize,
    /// Number of inputs of the layer
    #[arg(long, default_value_t = 11008)]
    cols: usize,
    /// Number of tokens for the Hessian
    #[arg(long, default_value_t = 2048)]
    tokens: usize,
    /// Methods to measure
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Method::Wanda, Method::Hessian, Method::Gptq])]
    methods: Vec<Method>,
    /// Number of runs per process
    #[arg(long, default_value_t = 1)]
    repeats: usize,
    /// Number of processes per method and program
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Also measure PyTorch with this interpreter
    #[arg(long, num_args = 0..=1, default_missing_value = "python3", value_name = "PYTHON")]
    pytorch: Option<PathBuf>,
    /// Measure the given method in this process
    #[arg(long, hide = true)]
    child: bool,
    /// Use one process per method and a layer of 1024 x 1024
    #[arg(long)]
    quick: bool,
}

/// Output of a process.
#[derive(Serialize, Deserialize)]
struct Measured {
    seconds: Vec<f64>,
    peak_mib: Option<f64>,
    /// Parts of the time in seconds.
    #[serde(default)]
    parts: Vec<(String, f64)>,
    #[serde(default)]
    version: String,
}

/// Returns activations whose columns depend on the previous ones and differ in size.
fn inputs(tokens: usize, cols: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut x = vec![0.0_f32; tokens * cols];
    for row in x.chunks_exact_mut(cols) {
        let mut last = 0.0;
        for (j, value) in row.iter_mut().enumerate() {
            last = 0.8 * last + rng.random_range(-1.0_f32..1.0);
            *value = last * (0.3 + (j * 7 % 11) as f32 * 0.2);
        }
    }
    x
}

fn measure(args: &Args, method: Method) -> Result<Measured> {
    let x = inputs(args.tokens, args.cols);
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let weight = Matrix::from_fn(args.rows, args.cols, |_, _| {
        rng.random_range(-0.04_f32..0.04)
    });
    let (mut seconds, mut parts) = (Vec::new(), Vec::<(String, f64)>::new());
    let mut run = |run: &mut dyn FnMut() -> Result<()>| -> Result<()> {
        for _ in 0..args.repeats {
            seconds.push(timed(&mut *run)?.as_secs_f64());
        }
        Ok(())
    };
    match method {
        Method::Wanda => {
            let mut norms = InputNorms::new(args.cols);
            norms.update(&x, 1)?;
            drop(x);
            run(&mut || {
                let mut pruned = weight.clone();
                let scores = PruneMethod::Wanda.scores(&pruned, Some(&norms))?;
                prune(&mut pruned, &scores, &Pattern::Unstructured { ratio: 0.5 })?;
                Ok(())
            })?;
        }
        Method::Hessian => run(&mut || Hessian::new(args.cols).update(&x))?,
        Method::Gptq => {
            let mut hessian = Hessian::new(args.cols);
            hessian.update(&x)?;
            drop(x);
            let config = GptqConfig::new(GridConfig::new(4));
            run(&mut || {
                let start = Instant::now();
                let factor = Factor::new(&hessian, &FactorConfig::new())?;
                let factored = start.elapsed().as_secs_f64();
                gptq(&weight, &factor, &config, None)?;
                let columns = start.elapsed().as_secs_f64() - factored;
                parts.extend([("factor".into(), factored), ("columns".into(), columns)]);
                Ok(())
            })?;
        }
    }
    Ok(Measured {
        seconds,
        peak_mib: status_mib("VmHWM"),
        parts,
        version: String::new(),
    })
}

/// Runs a program and returns its measurement.
fn run(program: &Path, first: [&str; 2], args: &Args, method: Method) -> Result<Measured> {
    let mut command = Command::new(program);
    command.args(first).arg(name(method));
    let sizes = [
        ("--rows", args.rows),
        ("--cols", args.cols),
        ("--tokens", args.tokens),
        ("--repeats", args.repeats),
    ];
    for (option, size) in sizes {
        command.args([option, &size.to_string()]);
    }
    ask(command)
}

fn bench(args: &mut Args) -> Result<()> {
    if args.quick {
        (args.rows, args.cols, args.rounds) = (1024, 1024, 1);
    }
    if let (true, Some(method)) = (args.child, args.methods.first()) {
        println!("{}", serde_json::json!(measure(args, *method)?));
        return Ok(());
    }
    let own = std::env::current_exe().map_err(|source| Error::io("this program", source))?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/pytorch/quantize.py");
    let rate = gemm_rate(args.tokens, args.cols, args.rows, 0);
    let forward = (args.tokens * args.rows * args.cols) as f64 / rate;
    println!(
        "layer of {} x {}, {} tokens; the `gemm` crate computes their product in {forward:.3} s",
        args.rows, args.cols, args.tokens
    );
    for method in &args.methods {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..args.rounds {
            ours.push(run(&own, ["--child", "--methods"], args, *method)?);
            if let Some(python) = &args.pytorch {
                theirs.push(run(python, [script, "--method"], args, *method)?);
            }
        }
        let time = |all: &[Measured]| {
            let seconds: Vec<f64> = all.iter().flat_map(|one| one.seconds.clone()).collect();
            median(&seconds)
        };
        let peak = |all: &[Measured]| {
            let peaks: Vec<f64> = all.iter().filter_map(|one| one.peak_mib).collect();
            median(&peaks)
        };
        print!(
            "{method:?}: {:.3} s, {:.2} of that product, peak {:.0} MiB",
            time(&ours),
            time(&ours) / forward,
            peak(&ours)
        );
        for (part, seconds) in ours.first().map(|one| &one.parts).into_iter().flatten() {
            print!(" ({part} {seconds:.2} s)");
        }
        if let Some(one) = theirs.first() {
            print!(
                "; PyTorch {} {:.3} s, peak {:.0} MiB; {:.2} times as fast",
                one.version,
                time(&theirs),
                peak(&theirs),
                time(&theirs) / time(&ours)
            );
        }
        println!();
    }
    Ok(())
}

fn main() {
    common::program(bench);
}
