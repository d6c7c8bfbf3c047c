//! One optimizer step of LoRA, of NLS (a random subnet a step), of SparsePEFT and of QA-SparsePEFT (half the base zero), through the
//! public trainer; with `--pytorch`, beside the same step in eager PyTorch (`benches/pytorch/train_step.py`):
//! `cargo bench --bench train_step -- --pytorch python3`.
//!
//! Each configuration runs in a process of its own, so that the peak of its memory is its own, and all take turns, so that
//! whatever else the machine does falls on each.

#[path = "../examples/common/mod.rs"]
mod common;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use clap::{Parser, ValueEnum};
use elastic_lora::adapter::LoraConfig;
use elastic_lora::data::{Batcher, Sequence};
use elastic_lora::format::QuantizedMatrix;
use elastic_lora::io::DType;
use elastic_lora::io::hf::{HfConfig, LlamaDims};
use elastic_lora::model::Decoder;
use elastic_lora::progress::Silent;
use elastic_lora::quant::{GridConfig, round_to_nearest};
use elastic_lora::sparsity::{self, Pattern};
use elastic_lora::supernet::{QaConfig, SuperNetConfig};
use elastic_lora::train::{Schedule, TrainConfig, Trainer};
use elastic_lora::{Error, Result, SearchSpace, SuperNet};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

const VOCAB: usize = 32_000;
const ROWS: usize = 4;
const LEN: usize = 256;
const RANKS: [usize; 3] = [32, 24, 16];
/// Steps before the timed ones. Two, so that the second has the optimizer's moments beside the activations in memory.
const WARM_UP: usize = 2;

/// Width of the residual stream, blocks, heads.
const SIZES: [[usize; 3]; 3] = [[288, 6, 6], [512, 8, 8], [1024, 12, 16]];

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Method {
    Lora,
    Nls,
    SparsePeft,
    /// Through a grid of 4 bits, in groups of 32
    QaSparsePeft,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Weights {
    F32,
    Bf16,
    /// Packed integers, in groups of 32
    Int4,
}

/// Measure a training step.
#[derive(Parser)]
struct Args {
    /// Widths of the models
    #[arg(long, value_delimiter = ',', default_values_t = SIZES.map(|size| size[0]))]
    sizes: Vec<usize>,
    /// What is trained
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Method::Lora, Method::Nls, Method::SparsePeft, Method::QaSparsePeft])]
    methods: Vec<Method>,
    /// How the frozen weights are stored
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Weights::F32, Weights::Bf16, Weights::Int4])]
    weights: Vec<Weights>,
    /// Timed steps of a process [default: 8, 5 and 3 for the three sizes]
    #[arg(long)]
    steps: Option<usize>,
    /// Processes per configuration
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Measure PyTorch as well, with this interpreter
    #[arg(long, num_args = 0..=1, default_missing_value = "python3", value_name = "PYTHON")]
    pytorch: Option<PathBuf>,
    /// Make the gradients of masked updates of products of bf16 numbers
    #[arg(long)]
    bf16_gradient: bool,
    /// Where the model lies: the name of a backend's feature
    #[arg(long, default_value = "flex")]
    device: String,
    /// Write the figures, those of every step too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure the one configuration that is named, in this process
    #[arg(long, hide = true)]
    child: bool,
    /// What cargo passes to a bench
    #[arg(long, hide = true)]
    bench: bool,
}

/// What is measured in a process.
#[derive(Clone, Copy, Serialize)]
struct Case {
    hidden: usize,
    layers: usize,
    heads: usize,
    method: Method,
    weights: Weights,
    bf16_gradient: bool,
}

/// What a process printed; the other program's has further fields.
#[derive(Serialize, Deserialize)]
struct Measured {
    median_ms: f64,
    steps_ms: Vec<f64>,
    /// Peak of the process's memory, and what it had before there was a model: on the host, so none for other devices.
    peak_mib: Option<f64>,
    start_mib: Option<f64>,
    #[serde(flatten)]
    more: serde_json::Map<String, serde_json::Value>,
}

/// All rounds of one program on one case.
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
        let peaks = rounds.iter().filter_map(|round| round.peak_mib).collect();
        Some(Self {
            min_ms: steps.iter().copied().min_by(f64::total_cmp)?,
            median_ms: median(steps)?,
            peak_mib: median(peaks),
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

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    (n > 0).then(|| (values[(n - 1) / 2] + values[n / 2]) / 2.0)
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

/// The layers' weights in 4 bits.
fn quantized(model: &Decoder) -> Result<BTreeMap<String, QuantizedMatrix>> {
    let grid = GridConfig::new(4).with_group_size(Some(32));
    model
        .linears()
        .map(|(name, layer)| {
            Ok((
                name,
                round_to_nearest(&layer.base.to_matrix(), &grid, None)?,
            ))
        })
        .collect()
}

fn with_weights(model: Decoder, weights: Weights) -> Result<Decoder> {
    match weights {
        Weights::F32 => model.with_weight_dtype(DType::F32),
        Weights::Bf16 => model.with_weight_dtype(DType::BF16),
        Weights::Int4 => {
            let layers = quantized(&model)?;
            model.with_quantized(&layers)
        }
    }
}

/// What all methods train: the adapters of q, k, v, up, gate and down.
fn net(case: &Case, device: &str) -> Result<SuperNet> {
    let config = HfConfig::new_llama(&LlamaDims {
        vocab_size: VOCAB,
        hidden_size: case.hidden,
        intermediate_size: case.hidden * 8 / 3,
        num_hidden_layers: case.layers,
        num_attention_heads: case.heads,
        num_key_value_heads: case.heads,
        max_position_embeddings: LEN,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
        bos_token_id: None,
        eos_token_id: None,
        pad_token_id: None,
        dtype: DType::F32,
    })?;
    let mut model = Decoder::init(&config, 1, &common::device(device)?)?;
    let aware = case.method == Method::QaSparsePeft;
    let sparse = aware || case.method == Method::SparsePeft;
    if sparse {
        model.try_for_each_linear(|_, layer| {
            let mut weight = layer.base.to_matrix();
            let scores = sparsity::magnitude_scores(&weight);
            sparsity::prune(&mut weight, &scores, &Pattern::Unstructured { ratio: 0.5 })?;
            layer.base.set_matrix(&weight)
        })?;
    }
    let model = with_weights(model, case.weights)?;
    let choices = if case.method == Method::Nls {
        &RANKS[..]
    } else {
        &RANKS[..1]
    };
    let groups = [
        &["q_proj", "k_proj", "v_proj"][..],
        &["up_proj", "gate_proj"],
        &["down_proj"],
    ];
    let space = SearchSpace::grouped(&model.layer_shapes(), &groups, choices)?;
    let mut grids = if aware {
        quantized(&model)?
    } else {
        BTreeMap::new()
    };
    let lora = LoraConfig::new(RANKS[0]).with_bf16_gradient(case.bf16_gradient);
    let net = SuperNet::new(
        model,
        space,
        SuperNetConfig::new(lora).with_sparse_peft(sparse),
    )?;
    if !aware {
        return Ok(net);
    }
    let adapted = net.ranks(net.active())?;
    grids.retain(|name, _| adapted.contains_key(name));
    net.with_quantization(&QaConfig::new(grids))
}

fn data() -> Result<Batcher> {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut sequence = || {
        Sequence::unmasked(
            (0..LEN)
                .map(|_| rng.random_range(0..VOCAB as u32))
                .collect(),
        )
    };
    Batcher::new((0..4 * ROWS).map(|_| sequence()).collect(), ROWS, 0, 3)
}

/// Milliseconds of a run's steps together, without the run's own beginning and end.
fn run(net: &mut SuperNet, data: &mut Batcher, steps: usize, seed: u64) -> Result<f64> {
    let mut config = TrainConfig::new(steps);
    config.schedule = Schedule::Constant;
    config.seed = seed;
    Ok(1e3 * Trainer::new(config)?.run(net, data, &[], &Silent)?.seconds)
}

/// Measures in this process. A run has one timed step, since a report has but the sum of its steps' times.
fn measure(case: &Case, steps: usize, device: &str) -> Result<Measured> {
    let on_host = ["flex", "ndarray"].contains(&device);
    let size = |field| if on_host { status_mib(field) } else { None };
    let start_mib = size("VmRSS");
    let (mut net, mut data) = (net(case, device)?, data()?);
    run(&mut net, &mut data, WARM_UP, 0)?;
    let steps_ms = (1..=steps as u64)
        .map(|seed| run(&mut net, &mut data, 1, seed))
        .collect::<Result<Vec<_>>>()?;
    let median_ms =
        median(steps_ms.clone()).ok_or_else(|| Error::argument("steps", 0, "at least 1"))?;
    Ok(Measured {
        median_ms,
        steps_ms,
        peak_mib: size("VmHWM"),
        start_mib,
        more: serde_json::Map::new(),
    })
}

fn name(value: impl ValueEnum) -> String {
    value
        .to_possible_value()
        .map_or(String::new(), |value| value.get_name().to_string())
}

/// Runs a program that prints what it measured; where it does not, what it said is passed on.
fn ask(mut command: Command) -> Option<Measured> {
    let output = command.output();
    let told = output
        .map_err(|error| error.to_string())
        .and_then(|output| {
            let text = String::from_utf8_lossy(&output.stdout);
            let line = text.lines().next_back().unwrap_or_default();
            serde_json::from_str(line)
                .map_err(|_| String::from_utf8_lossy(&output.stderr).trim().to_string())
        });
    told.inspect_err(|error| eprintln!("{}: {error}", command.get_program().display()))
        .ok()
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
    ask(command)
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
    ask(command)
}

/// The cases of one size and one kind of weights, in turns.
fn turns(args: &Args, cases: &[Case], steps: usize) -> Vec<Line> {
    let mut rounds: Vec<_> = cases.iter().map(|_| (Vec::new(), Vec::new())).collect();
    for _ in 0..args.rounds {
        for (case, (of_ours, of_pytorch)) in cases.iter().zip(&mut rounds) {
            of_ours.extend(ours(case, steps, &args.device));
            // The other program has neither grids nor packed weights.
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
        common::say!(
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

fn bench(args: &Args) -> Result<()> {
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
                    common::say!("{}", serde_json::json!(measure(case, steps, &args.device)?));
                }
                continue;
            }
            if !std::mem::replace(&mut head, true) {
                common::say!(
                    "{ROWS} x {LEN} tokens, vocabulary {VOCAB}, rank {}; medians of steps",
                    RANKS[0]
                );
                common::say!(
                    "{:<24} {:>9} {:>9} {:>8} {:>9} {:>9} {:>8} {:>9} {:>9} {:>9}",
                    "",
                    "ours, ms",
                    "least",
                    "MiB",
                    "PyTorch",
                    "least",
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
    let args: Args = common::parse();
    // `cargo test --all-targets` runs benches too; there it is enough that they build.
    if args.bench || args.child {
        common::exit_on_error(bench(&args));
    } else {
        common::say!("nothing is measured without --bench, which `cargo bench` passes");
    }
}
