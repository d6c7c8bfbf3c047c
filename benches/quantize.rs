//! Wanda, the Hessian and GPTQ (4 bits, groups of 128) on one layer; with `--pytorch`, beside the plain algorithms in PyTorch
//! (`benches/pytorch/quantize.py`): `cargo bench --bench quantize -- --pytorch python3`.
//!
//! Each method runs in a process of its own, so that the peak of its memory is its own, and both programs take turns.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use clap::{Parser, ValueEnum};
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
    /// Outputs of the layer
    #[arg(long, default_value_t = 4096)]
    rows: usize,
    /// Inputs of the layer
    #[arg(long, default_value_t = 11008)]
    cols: usize,
    /// Tokens that the Hessian is computed from
    #[arg(long, default_value_t = 2048)]
    tokens: usize,
    /// What is measured
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Method::Wanda, Method::Hessian, Method::Gptq])]
    methods: Vec<Method>,
    /// Runs in a process
    #[arg(long, default_value_t = 1)]
    repeats: usize,
    /// Processes of each program for a method
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Measure PyTorch as well, with this interpreter
    #[arg(long, num_args = 0..=1, default_missing_value = "python3", value_name = "PYTHON")]
    pytorch: Option<PathBuf>,
    /// Measure the one method that is named, in this process
    #[arg(long, hide = true)]
    child: bool,
    /// What cargo passes to a bench
    #[arg(long, hide = true)]
    bench: bool,
}

/// What a process printed.
#[derive(Serialize, Deserialize)]
struct Measured {
    seconds: Vec<f64>,
    peak_mib: Option<f64>,
    /// Parts of the time, in seconds.
    #[serde(default)]
    parts: Vec<(String, f64)>,
    #[serde(default)]
    version: String,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    if n == 0 {
        f64::NAN
    } else {
        (values[(n - 1) / 2] + values[n / 2]) / 2.0
    }
}

/// A size of this process in MiB by its name in the kernel's account, where there is one.
fn status_mib(field: &str) -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let value = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    value
        .split_whitespace()
        .next()?
        .parse::<f64>()
        .ok()
        .map(|kib| kib / 1024.0)
}

/// Activations whose columns depend on the ones before them and differ in size.
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
    let (mut seconds, mut parts) = (Vec::new(), Vec::new());
    match method {
        Method::Wanda => {
            let mut norms = InputNorms::new(args.cols);
            norms.update(&x, 1)?;
            drop(x);
            for _ in 0..args.repeats {
                let start = Instant::now();
                let mut pruned = weight.clone();
                let scores = PruneMethod::Wanda.scores(&pruned, Some(&norms))?;
                prune(&mut pruned, &scores, &Pattern::Unstructured { ratio: 0.5 })?;
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
        Method::Hessian => {
            for _ in 0..args.repeats {
                let start = Instant::now();
                Hessian::new(args.cols).update(&x)?;
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
        Method::Gptq => {
            let mut hessian = Hessian::new(args.cols);
            hessian.update(&x)?;
            drop(x);
            let config = GptqConfig::new(GridConfig::new(4));
            for _ in 0..args.repeats {
                let start = Instant::now();
                let factor = Factor::new(&hessian, &FactorConfig::new())?;
                let factored = start.elapsed().as_secs_f64();
                gptq(&weight, &factor, &config, None)?;
                let all = start.elapsed().as_secs_f64();
                seconds.push(all);
                parts.extend([
                    ("factor".to_string(), factored),
                    ("columns".to_string(), all - factored),
                ]);
            }
        }
    }
    Ok(Measured {
        seconds,
        peak_mib: status_mib("VmHWM"),
        parts,
        version: String::new(),
    })
}

/// Runs a program that prints [`Measured`] as its last line.
fn run(program: &Path, first: &[&str], args: &Args, method: Method) -> Result<Measured> {
    let name = method
        .to_possible_value()
        .map(|value| value.get_name().to_string())
        .unwrap_or_default();
    let option = if first.contains(&"--child") {
        "--methods"
    } else {
        "--method"
    };
    let output = Command::new(program)
        .args(first)
        .args([
            option,
            &name,
            "--rows",
            &args.rows.to_string(),
            "--cols",
            &args.cols.to_string(),
        ])
        .args([
            "--tokens",
            &args.tokens.to_string(),
            "--repeats",
            &args.repeats.to_string(),
        ])
        .output()
        .map_err(|source| Error::io(program, source))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(Error::io(program, std::io::Error::other(stderr)));
    }
    serde_json::from_str(text.lines().last().unwrap_or_default())
        .map_err(|source| Error::json(program, source))
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let (true, Some(method)) = (args.child, args.methods.first()) {
        let measured = measure(&args, *method)?;
        println!(
            "{}",
            serde_json::to_string(&measured).map_err(|source| Error::json("measured", source))?
        );
        return Ok(());
    }
    let own = std::env::current_exe().map_err(|source| Error::io("this program", source))?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/pytorch/quantize.py");
    println!(
        "layer of {} x {}, Hessian of {} tokens",
        args.rows, args.cols, args.tokens
    );
    for method in &args.methods {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..args.rounds {
            ours.push(run(&own, &["--child"], &args, *method)?);
            if let Some(python) = &args.pytorch {
                theirs.push(run(python, &[script], &args, *method)?);
            }
        }
        let time =
            |all: &[Measured]| median(all.iter().flat_map(|one| one.seconds.clone()).collect());
        let peak = |all: &[Measured]| median(all.iter().filter_map(|one| one.peak_mib).collect());
        print!(
            "{method:?}: {:.3} s, peak {:.0} MiB",
            time(&ours),
            peak(&ours)
        );
        for (part, seconds) in ours.first().map(|one| &one.parts).into_iter().flatten() {
            print!(" ({part} {seconds:.2} s)");
        }
        if let Some(one) = theirs.first() {
            print!(
                "; PyTorch {} {:.3} s, peak {:.0} MiB",
                one.version,
                time(&theirs),
                peak(&theirs)
            );
            print!("; {:.2} times as fast", time(&theirs) / time(&ours));
        }
        println!();
    }
    Ok(())
}
