//! The main job: prune a model, train an elastic supernet of adapters on it, search it, merge a subnet without losing a
//! zero, and write the results, with one table of what each step was worth.
//!
//! Without arguments it runs on the model that the crate ships, on generated arithmetic word problems.

#[path = "../common/mod.rs"]
mod common;
mod pipeline;
mod task;

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use elastic_lora::Result;

/// Prune, fine-tune, search and merge a language model.
///
/// Without arguments: the shipped model, generated arithmetic problems, all methods.
#[derive(Parser, Debug)]
#[command(
    version,
    after_help = "Training files: JSON or JSON Lines with `instruction`, `input`, `output` (Alpaca) or \
    `question`, `answer` (GSM8K), or plain text. Accuracy is by exact match of the final answer (`#### 12`, or the Alpaca \
    form's `answer`); without final answers the table has losses alone."
)]
pub struct Args {
    /// Model folder (config.json, safetensors, tokenizer.json)
    #[arg(long)]
    model: Option<PathBuf>,
    /// Training file; needed with --model
    #[arg(long, requires = "valid")]
    train: Option<PathBuf>,
    /// Validation file: what the search sees
    #[arg(long, requires = "train")]
    valid: Option<PathBuf>,
    /// Test file: what the table is measured on [default: the validation file]
    #[arg(long, requires = "train")]
    test: Option<PathBuf>,
    /// What to run on the pruned model
    #[arg(long, value_enum, default_value_t = Method::All)]
    method: Method,
    /// How weights are chosen for pruning: wanda or magnitude
    #[arg(long, default_value = "wanda")]
    prune: String,
    /// Share of weights to remove, 0 to 1 (unstructured)
    #[arg(long, default_value_t = 0.5)]
    sparsity: f64,
    /// unstructured, layer, or N:M (at most N of M consecutive inputs stay)
    #[arg(long, default_value = "unstructured")]
    pattern: String,
    /// Ranks that the supernet offers; the largest is plain LoRA's
    #[arg(long, value_delimiter = ',', default_value = "32,24,16")]
    ranks: Vec<usize>,
    /// Layers that share a choice, by the end of their names: groups separated by ';'
    #[arg(long, default_value = "q_proj,k_proj,v_proj;up_proj,gate_proj;down_proj")]
    groups: String,
    /// A search space from a file instead: ours, elastic_adapter_config.json, or an NNCF config
    #[arg(long)]
    space: Option<PathBuf>,
    /// Optimizer steps of each training run
    #[arg(long, default_value_t = 400)]
    steps: usize,
    /// Sequences per step
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Peak learning rate
    #[arg(long, default_value_t = 2e-3)]
    lr: f64,
    /// Alpha of the adapters [default: twice the largest rank]
    #[arg(long)]
    alpha: Option<f64>,
    /// Dropout of the adapters' inputs
    #[arg(long, default_value_t = 0.0)]
    dropout: f64,
    /// Let the prompt count in the loss, too
    #[arg(long)]
    train_on_inputs: bool,
    /// Longest sequence in tokens; longer records are cut [default: the model's context, at most 512]
    #[arg(long)]
    max_len: Option<usize>,
    /// nsga2, random, hill-climbing or heuristic
    #[arg(long, default_value = "nsga2")]
    search: String,
    /// Subnets that the search may evaluate
    #[arg(long, default_value_t = 40)]
    evals: usize,
    /// What the search wants to be good, on the validation file
    #[arg(long, value_enum, default_value_t = SearchMetric::Loss)]
    metric: SearchMetric,
    /// What the search trades that against: macs, params or bytes
    #[arg(long, default_value = "macs")]
    cost: String,
    /// Seed of everything
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Backend: flex, or another that the build has a feature for
    #[arg(long, default_value = "flex")]
    device: String,
    /// Folder for the results [default: target/compress, replaced at each run]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Go on with an interrupted run in --out
    #[arg(long)]
    resume: bool,
    /// Replace the results in --out
    #[arg(long, conflicts_with = "resume")]
    overwrite: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Method {
    /// Everything below, in one table
    All,
    /// Plain LoRA
    Lora,
    /// Elastic adapters, searched, kept apart
    Shears,
    /// Elastic adapters under the weights' mask, merged
    SparsePeft,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum SearchMetric {
    /// Negative log-likelihood
    Loss,
    /// Exact match of the final answer
    Accuracy,
}

impl Method {
    fn includes(self, other: Method) -> bool {
        self == Method::All || self == other
    }
}

fn run(args: &Args) -> Result<()> {
    let device = common::device(&args.device)?;
    let task = task::Task::load(args, &device)?;
    pipeline::run(args, &task)
}

fn main() {
    common::exit_on_error(run(&Args::parse()));
}
