//! Measures one optimizer step of LoRA, NLS (a random subnet per step), SparsePEFT and
//! QA-SparsePEFT (with half of the base weights zero) through the public trainer. With `--pytorch`,
//! it also measures the same step in eager PyTorch (`benches/pytorch/train_step.py`):
//! `cargo bench --bench train_step -- --pytorch python3`.
//!
//! Each configuration runs in its own process, so that the peak memory is that of the
//! configuration. All configurations take turns, so that other load on the machine affects all of
//! them.
//!
//! This bench is a separate program because it compares processes and measures their memory.

mod common;

use std::path::PathBuf;
use std::process::Command;

use clap::Parser;
use common::training::{Case, LEN, Method, RANKS, ROWS, VOCAB, Weights, data, net, run};
use common::{ask, median, name, status_mib};
use elastic_lora::{Error, Result};
use serde::{Deserialize, Serialize};

/// Number of steps before the timed ones. In the second one, the optimizer's moments are in memory
/// together with the activations.
const WARM_UP: usize = 2;

/// Width of the residual stream, number of blocks and number of heads.
const SIZES: [[usize; 3]; 3] = [[288, 6, 6], [512, 8, 8], [1024, 12, 16]];

/// Measure training steps.
#[derive(Parser)]
struct Args {
    /// Widths of the models
    #[arg(long, value_delimiter = ',', default_values_t = SIZES.map(|size| size[0]))]
    sizes: Vec<usize>,
    /// Training methods
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Method::Lora, Method::Nls, Method::SparsePeft, Method::QaSparsePeft])]
    methods: Vec<Method>,
    /// Storage of the frozen weights
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Weights::F32, Weights::Bf16, Weights::Int4])]
    weights: Vec<Weights>,
    /// Number of timed steps per process [default: 8, 5 and 3 for the three sizes]
    #[arg(long)]
    steps: Option<usize>,
    /// Number of processes per configuration
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Also measure PyTorch with this interpreter
    #[arg(long, num_args = 0..=1, default_missing_value = "python3", value_name = "PYTHON")]
    pytorch: Option<PathBuf>,
    /// Compute the gradients of masked updates from bf16 products
    #[arg(long)]
    bf16_gradient: bool,
    /// Device of the model: the name of a backend feature
    #[arg(long, default_value = "flex")]
    device: String,
    /// Write the results, including those of every step, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure the given configuration in this process
    #[arg(long, hide = true)]
    child: bool,
    /// Use one process, the smallest model with f32 weights, and two steps
    #[arg(long)]
    quick: bool,
}

/// Output of a process. PyTorch's output has further fields.
#[derive(Serialize, Deserialize)]
struct Measured {
    median_ms: f64,
    steps_ms: Vec<f64>,
    /// Peak memory of the process, and memory before the model was created. Both are host memory,
    /// and `None` for other devices.
    peak_mib: Option<f64>,
    start_mib: Option<f64>,
    #[serde(flatten)]
    more: serde_json::Map<String, serde_json::Value>,
}

/// All rounds of one program for one case.
#[derive(Serialize)]
struct Figures {
    median_ms: f64,
    min_ms: f64,
    peak_mib: Option<f64>,
    rounds: Vec<Measured>,
}

impl Figures {
    fn new(rounds: Vec<Measured>) -> Option<Self> {
        let steps: Vec<f64> = rounds
            .iter()
            .flat_map(|round| round.steps_ms.clone())
            .collect();
        let peaks: Vec<f64> = rounds.iter().filter_map(|round| round.peak_mib).collect();
        Some(Self {
            min_ms: steps.iter().copied().min_by(f64::total_cmp)?,
            median_ms: median(&steps),
            peak_mib: (!peaks.is_empty()).then(|| median(&peaks)),
            rounds,
        })
    }
}

#[derive(Serialize)]
struct Line {
    #[serde(flatten)]
    case: Case,
    ours: Option<Figures>,
    pytorch: Option<Figures>,
}

/// Measures in this process. Each run has a single timed step, because a report only has the total
/// time of its steps.
fn measure(case: &Case, steps: usize, device: &str) -> Result<Measured> {
    let on_host = ["flex", "ndarray"].contains(&device);
    let size = |field| if on_host { status_mib(field) } else { None };
    let start_mib = size("VmRSS");
    let (mut net, mut data) = (net(case, device)?, data()?);
    run(&mut net, &mut data, WARM_UP, 0)?;
    let steps_ms = (1..=steps as u64)
        .map(|seed| run(&mut net, &mut data, 1, seed))
        .collect::<Result<Vec<_>>>()?;
    Ok(Measured {
        median_ms: median(&steps_ms),
        steps_ms,
        peak_mib: size("VmHWM"),
        start_mib,
        more: serde_json::Map::new(),
    })
}

/// Returns the measurement, or prints the error.
fn told(measured: Result<Measured>) -> Option<Measured> {
    measured.inspect_err(|error| eprintln!("{error}")).ok()
}

fn ours(case: &Case, steps: usize, device: &str) -> Option<Measured> {
    let mut command = Command::new(std::env::current_exe().ok()?);
    command.args([
        "--child",
        "--sizes",
        &case.hidden.to_string(),
        "--methods",
        &name(case.method),
    ]);
    command.args([
        "--weights",
        &name(case.weights),
        "--steps",
        &steps.to_string(),
        "--device",
        device,
    ]);
    command.args(case.bf16_gradient.then_some("--bf16-gradient"));
    told(ask(command))
}

fn pytorch(python: &PathBuf, case: &Case, steps: usize, device: &str) -> Option<Measured> {
    let mut command = Command::new(python);
    command.args([
        concat!(env!("CARGO_MANIFEST_DIR"), "/benches/pytorch/train_step.py"),
        "--json",
    ]);
    let numbers = [
        ("--hidden", case.hidden),
        ("--layers", case.layers),
        ("--heads", case.heads),
        ("--vocab", VOCAB),
    ];
    let numbers = numbers.into_iter().chain([
        ("--rows", ROWS),
        ("--len", LEN),
        ("--rank", RANKS[0]),
        ("--steps", steps),
    ]);
    numbers.for_each(|(option, value)| {
        command.args([option, &value.to_string()]);
    });
    command.args([
        "--method",
        &name(case.method),
        "--dtype",
        &name(case.weights),
    ]);
    command.args([
        "--device",
        if ["cuda", "rocm"].contains(&device) {
            "cuda"
        } else {
            "cpu"
        },
    ]);
    told(ask(command))
}

/// Measures the cases of one size and one storage of weights in turns.
fn turns(args: &Args, cases: &[Case], steps: usize) -> Vec<Line> {
    let mut rounds: Vec<_> = cases.iter().map(|_| (Vec::new(), Vec::new())).collect();
    for _ in 0..args.rounds {
        for (case, (of_ours, of_pytorch)) in cases.iter().zip(&mut rounds) {
            of_ours.extend(ours(case, steps, &args.device));
            // The PyTorch program has neither grids nor packed weights.
            let both = case.method != Method::QaSparsePeft && case.weights != Weights::Int4;
            if let Some(python) = args.pytorch.as_ref().filter(|_| both) {
                of_pytorch.extend(pytorch(python, case, steps, &args.device));
            }
        }
    }
    let figures = cases.iter().zip(rounds);
    figures
        .map(|(case, (a, b))| Line {
            case: *case,
            ours: Figures::new(a),
            pytorch: Figures::new(b),
        })
        .collect()
}

fn show(lines: &[Line]) {
    let cell = |value: Option<f64>, digits: usize| {
        value.map_or("-".into(), |value| format!("{value:.digits$}"))
    };
    let ratio = |a: Option<f64>, b: Option<f64>| Some(a? / b?);
    for line in lines {
        let (ours, other) = (line.ours.as_ref(), line.pytorch.as_ref());
        let base = lines
            .iter()
            .find(|base| base.case.method == Method::Lora && line.case.method != Method::Lora);
        let ms = |figures: Option<&Figures>| figures.map(|figures| figures.median_ms);
        let mib = |figures: Option<&Figures>| figures.and_then(|figures| figures.peak_mib);
        println!(
            "{:<24} {:>9} {:>9} {:>8} {:>9} {:>9} {:>8} {:>9} {:>9} {:>9}",
            format!(
                "{}/{} {} {}",
                line.case.hidden,
                line.case.layers,
                name(line.case.method),
                name(line.case.weights)
            ),
            cell(ms(ours), 1),
            cell(ours.map(|ours| ours.min_ms), 1),
            cell(mib(ours), 0),
            cell(ms(other), 1),
            cell(other.map(|other| other.min_ms), 1),
            cell(mib(other), 0),
            cell(ratio(ms(other), ms(ours)), 2),
            cell(ratio(mib(other), mib(ours)), 2),
            cell(
                ratio(ms(ours), base.and_then(|base| ms(base.ours.as_ref()))),
                3
            ),
        );
    }
}

fn bench(args: &mut Args) -> Result<()> {
    if args.quick {
        (args.sizes, args.weights) = (vec![SIZES[0][0]], vec![Weights::F32]);
        (args.steps, args.rounds) = (Some(2), 1);
    }
    let mut sizes = Vec::new();
    for hidden in &args.sizes {
        let size = SIZES
            .into_iter()
            .zip([8, 5, 3])
            .find(|(size, _)| size[0] == *hidden);
        sizes.push(size.ok_or_else(|| Error::argument("sizes", hidden, "of 288, 512 and 1024"))?);
    }
    let mut all = Vec::new();
    let mut head = false;
    for ([hidden, layers, heads], default_steps) in sizes {
        for weights in &args.weights {
            let steps = args.steps.unwrap_or(default_steps);
            let case = |method: &Method| {
                let (method, weights, bf16_gradient) = (*method, *weights, args.bf16_gradient);
                Case {
                    hidden,
                    layers,
                    heads,
                    method,
                    weights,
                    bf16_gradient,
                }
            };
            let cases: Vec<Case> = args.methods.iter().map(case).collect();
            if args.child {
                for case in &cases {
                    println!("{}", serde_json::json!(measure(case, steps, &args.device)?));
                }
                continue;
            }
            if !std::mem::replace(&mut head, true) {
                println!(
                    "{ROWS} x {LEN} tokens, vocabulary {VOCAB}, rank {}; median step times",
                    RANKS[0]
                );
                println!(
                    "{:<24} {:>9} {:>9} {:>8} {:>9} {:>9} {:>8} {:>9} {:>9} {:>9}",
                    "",
                    "ours, ms",
                    "min",
                    "MiB",
                    "PyTorch",
                    "min",
                    "MiB",
                    "x faster",
                    "x smaller",
                    "of LoRA"
                );
            }
            let lines = turns(args, &cases, steps);
            show(&lines);
            all.extend(lines);
        }
    }
    if let Some(path) = &args.json {
        let text = format!("{:#}\n", serde_json::json!(all));
        std::fs::write(path, text).map_err(|error| Error::Io {
            path: path.clone(),
            source: error,
        })?;
    }
    Ok(())
}

fn main() {
    common::program(bench);
}
