//! The main job: prune a model, train an elastic supernet of adapters on it, search it, merge a subnet without losing a
//! zero, and write the results, with one table of what each step was worth.
//!
//! Without arguments it runs on the model that the crate ships, on generated arithmetic word problems.

#[path = "../common/mod.rs"]
mod common;
mod lonas;
mod pipeline;
mod report;
mod settings;
mod sqft;
mod task;

use std::path::PathBuf;

use clap::{ArgAction, Parser, ValueEnum};
use elastic_lora::eval::Cost;
use elastic_lora::io::{DType, QuantFormat};
use elastic_lora::{Result, sparsity};
use serde::Serialize;

/// Prune, fine-tune, search and merge a language model.
///
/// Without arguments: the shipped model, generated arithmetic problems, all methods.
// Serialized are the arguments that a resumed run must share; the skipped ones are compared by content or do not matter.
#[derive(Parser, Debug, Serialize)]
#[command(
    version,
    after_help = "Training files: JSON or JSON Lines with `instruction`, `input`, `output` (Alpaca) or \
    `question`, `answer` (GSM8K), or plain text. Accuracy is by exact match of the final answer (`#### 12`, or the Alpaca \
    form's `answer`); without final answers the table has losses alone."
)]
pub struct Args {
    /// Model folder (config.json, safetensors, tokenizer.json) [default: the shipped model]
    #[arg(long, requires = "train")]
    #[serde(skip)]
    model: Option<PathBuf>,
    /// Training file [default: generated arithmetic problems]
    #[arg(long, requires = "valid")]
    #[serde(skip)]
    train: Option<PathBuf>,
    /// Validation file: what the search sees
    #[arg(long, requires = "train")]
    #[serde(skip)]
    valid: Option<PathBuf>,
    /// Test file: what the table is measured on [default: the validation file]
    #[arg(long, requires = "train")]
    #[serde(skip)]
    test: Option<PathBuf>,
    /// What to run on the pruned model
    #[arg(long, value_enum, default_value_t = Method::All)]
    method: Method,
    /// How weights are chosen for pruning: wanda, sparsegpt, ria or magnitude
    #[arg(long, default_value = "wanda")]
    prune: sparsity::Method,
    /// Share of weights to remove, 0 to 1; N:M has its own
    #[arg(long, default_value_t = 0.5)]
    sparsity: f64,
    /// unstructured (the share goes from each row), layer (from each matrix), or N:M (N of M consecutive inputs stay)
    #[arg(long, default_value = "unstructured")]
    pattern: String,
    /// Ranks that the supernet offers; the largest is plain LoRA's
    #[arg(long, value_delimiter = ',', default_value = "32,24,16")]
    ranks: Vec<usize>,
    /// Layers that share a choice, by the end of their names: groups separated by ';'
    #[arg(
        long,
        default_value = "q_proj,k_proj,v_proj;up_proj,gate_proj;down_proj"
    )]
    groups: String,
    /// lonas: widths that each MLP offers, as shares
    #[arg(long, value_delimiter = ',', default_value = "1,0.875,0.75,0.625,0.5")]
    widths: Vec<f64>,
    /// lonas: numbers of heads that each attention offers, as shares; whole groups of heads that share keys and values
    #[arg(long, value_delimiter = ',', default_value = "1")]
    heads: Vec<f64>,
    /// lonas: how many attentions and MLPs, the least influential ones, a subnet may leave out
    #[arg(long, default_value_t = 0)]
    depth: usize,
    /// lonas: what widths are multiples of
    #[arg(long, default_value_t = 32)]
    multiple: usize,
    /// lonas: how channels are ranked before they are sorted: l1, l2, activation, taylor, or none
    #[arg(long, default_value = "activation")]
    order: String,
    /// lonas: which subnets a step trains
    #[arg(long, value_enum, default_value_t = Subnets::Sandwich)]
    subnets: Subnets,
    /// lonas: the supernet alone, without LoRA beside it and without a search
    #[arg(long)]
    elastic_only: bool,
    /// sqft: bits of a weight: 2, 3, 4 or 8
    #[arg(long, default_value_t = 4)]
    bits: u8,
    /// sqft: consecutive weights of a row that share a scale and a zero point: a number, or row
    #[arg(long, default_value = "32")]
    group_size: String,
    /// sqft: the zero point is the middle of each grid
    #[arg(long)]
    symmetric: bool,
    /// sqft: how the base is rounded
    #[arg(long, value_enum, default_value_t = Quantize::Gptq)]
    quantize: Quantize,
    /// sqft: how integers are stored in files
    #[arg(long, value_enum, default_value_t = FileFormat::Gptq)]
    file_format: FileFormat,
    /// sqft: from which weights training through the grid starts [default: sparse; gptq with --quantize joint]
    #[arg(long, value_enum)]
    qa_start: Option<QaStart>,
    /// sqft: how adapters that stay apart from a compressed base begin
    #[arg(long, value_enum, default_value_t = Init::Fresh)]
    init: Init,
    /// sqft: train the grids' scales, too, which the authors do not
    #[arg(long, action = ArgAction::Set, default_value_t = true, default_missing_value = "true", num_args = 0..=1)]
    train_scales: bool,
    /// A search space from a file instead: ours, elastic_adapter_config.json, or an NNCF config
    #[arg(long)]
    #[serde(skip)]
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
    /// How the frozen weights are kept in memory: f32, or bf16 or f16 for half of it
    #[arg(long, value_enum, default_value_t = Weights::F32)]
    weights: Weights,
    /// Keep only the blocks' inputs for the backward pass and compute the rest again: less memory, more time
    #[arg(long)]
    checkpointing: bool,
    /// Longest sequence in tokens; longer records are cut [default: the model's context, at most 512]
    #[arg(long)]
    max_len: Option<usize>,
    /// How subnets are searched
    #[arg(long, value_enum, default_value_t = Search::Nsga2)]
    search: Search,
    /// Subnets that the search may evaluate
    #[arg(long, default_value_t = 40)]
    evals: usize,
    /// What the search wants to be good, on the validation file
    #[arg(long, value_enum, default_value_t = SearchMetric::Loss)]
    metric: SearchMetric,
    /// What the search trades that against
    #[arg(long, value_enum, default_value_t = SearchCost::Macs)]
    cost: SearchCost,
    /// Seed of everything
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Backend: flex, or another that the build has a feature for
    #[arg(long, default_value = "flex")]
    device: String,
    /// Folder for the results, new or empty [default: target/compress, replaced at each run]
    #[arg(long)]
    #[serde(skip)]
    out: Option<PathBuf>,
    /// Go on with the interrupted run in --out; its arguments must be the same
    #[arg(long)]
    #[serde(skip)]
    resume: bool,
    /// Replace the results of a former run in --out; other files there stay
    #[arg(long, conflicts_with = "resume")]
    #[serde(skip)]
    overwrite: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Method {
    /// LoRA, Shears and SparsePEFT, in one table
    All,
    /// Plain LoRA
    Lora,
    /// Elastic adapters, searched, kept apart
    Shears,
    /// Elastic adapters under the weights' mask, merged
    SparsePeft,
    /// Elastic channels and adapters on the dense model, searched, extracted as smaller models: the paper's table 1
    Lonas,
    /// Elastic adapters beside a sparse base of integers
    Sqft,
    /// Elastic adapters under the weights' mask, merged, as one row of table 2
    SqftSparsePeft,
    /// Elastic adapters trained through the base's integer grid under its mask, merged into sparse integers
    SqftQaSparsePeft,
    /// All of them, with LoRA, Shears and what rounds without training: the paper's table 2
    Table2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Quantize {
    /// By GPTQ, the pruned model's zeros kept
    Gptq,
    /// To nearest
    Rtn,
    /// By GPTQ, pruned by SparseGPT in the same pass, whatever --prune says
    Joint,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum FileFormat {
    /// GPTQ as AutoGPTQ has it
    Gptq,
    /// GPTQ with zero points as they are
    GptqV2,
    /// compressed-tensors, pack-quantized
    CompressedTensors,
}

impl From<FileFormat> for QuantFormat {
    fn from(format: FileFormat) -> Self {
        match format {
            FileFormat::Gptq => QuantFormat::Gptq,
            FileFormat::GptqV2 => QuantFormat::GptqV2,
            FileFormat::CompressedTensors => QuantFormat::CompressedTensors,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum QaStart {
    /// The pruned weights as they were before rounding
    Sparse,
    /// What they were rounded to
    Gptq,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Init {
    /// As nothing: LoRA's
    Fresh,
    /// As what pruning and rounding took from the weight, as far as the ranks go, inputs weighted by their norms
    Error,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Subnets {
    /// One drawn at random, as the authors do
    Uniform,
    /// The largest, a random one and the smallest, the largest teaching the others
    Sandwich,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Weights {
    F32,
    Bf16,
    F16,
}

impl From<Weights> for DType {
    fn from(weights: Weights) -> Self {
        match weights {
            Weights::F32 => DType::F32,
            Weights::Bf16 => DType::BF16,
            Weights::F16 => DType::F16,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum SearchMetric {
    /// Negative log-likelihood
    Loss,
    /// Exact match of the final answer
    Accuracy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Search {
    /// Evolution of a front of score against cost
    Nsga2,
    /// Subnets drawn at random
    Random,
    /// Steps to better neighbours, from the heuristic subnet on
    HillClimbing,
    /// The heuristic subnet alone: the middle choice of every group
    Heuristic,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum SearchCost {
    /// Multiply-accumulates a token
    Macs,
    /// Weights, zeros included
    Params,
    /// Bytes of weights at 16 bits each
    Bytes,
}

impl From<SearchCost> for Cost {
    fn from(cost: SearchCost) -> Self {
        match cost {
            SearchCost::Macs => Cost::Macs,
            SearchCost::Params => Cost::Params,
            SearchCost::Bytes => Cost::Bytes,
        }
    }
}

impl Method {
    fn includes(self, other: Method) -> bool {
        let of_all = [Method::Lora, Method::Shears, Method::SparsePeft];
        let of_table_2 = [
            Method::Sqft,
            Method::SqftSparsePeft,
            Method::SqftQaSparsePeft,
        ];
        self == other
            || (self == Method::All && of_all.contains(&other))
            || (self == Method::Table2 && of_table_2.contains(&other))
    }

    /// Whether it makes rows of table 2.
    fn is_sqft(self) -> bool {
        self == Method::Table2 || Method::Table2.includes(self)
    }
}

fn run(args: &Args) -> Result<()> {
    // What can be told from the arguments alone, before anything is read.
    let device = common::device(&args.device)?;
    let settings = settings::Settings::new(args)?;
    let task = task::Task::load(args, &device)?;
    pipeline::run(args, &settings, &task)
}

fn main() {
    common::exit_on_error(run(&common::parse()));
}
