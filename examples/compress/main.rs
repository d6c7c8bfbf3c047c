//! The main program: prunes a model, trains an elastic supernet of adapters on it, searches the
//! supernet, merges a subnet without losing a zero, and writes the results, with one table that
//! shows the effect of each step.
//!
//! Without arguments it uses the bundled model and generated arithmetic word problems.

#[path = "../common/mod.rs"]
mod common;
mod lonas;
mod pipeline;
mod report;
mod settings;
mod sqft;
mod target;
mod task;
mod unused;

use std::path::PathBuf;

use clap::{ArgAction, ArgMatches, Parser, ValueEnum};
use elastic_lora::eval::Cost;
use elastic_lora::io::{DType, QuantFormat};
use elastic_lora::{Result, sparsity};
use serde::Serialize;

/// Prune, fine-tune, search and merge a language model.
///
/// Without arguments, runs LoRA, Shears and SparsePEFT on the bundled model and on generated
/// arithmetic problems.
// The serialized fields are the arguments that a resumed run must share. The skipped ones are
// compared by content or do not matter.
#[derive(Parser, Debug, Serialize)]
#[command(
    version,
    after_help = "Training files are JSON or JSON Lines with `instruction`, `input`, `output` (Alpaca) or \
    `question`, `answer` (GSM8K), or plain text. Accuracy is the exact match of the final answer \
    (`#### 12`, `answer is 12`, the field `answer`, or a solution of one word or number). Records \
    without one are left out of it. If these are more than half, the table shows losses only."
)]
pub struct Args {
    /// Model folder, GGUF file, or id in the local Hugging Face cache [default: the bundled model]
    #[arg(long, requires = "train")]
    #[serde(skip)]
    model: Option<PathBuf>,
    /// Training file [default: generated arithmetic problems]
    #[arg(long, requires = "valid")]
    #[serde(skip)]
    train: Option<PathBuf>,
    /// Validation file, on which the search evaluates subnets
    #[arg(long, requires = "train")]
    #[serde(skip)]
    valid: Option<PathBuf>,
    /// Test file, on which the models in the table are measured [default: the validation file]
    #[arg(long, requires = "train")]
    #[serde(skip)]
    test: Option<PathBuf>,
    /// File of records or text, on which pruning and quantization see the inputs of the layers
    /// [default: the training file]
    #[arg(long)]
    #[serde(skip)]
    calibration: Option<PathBuf>,
    /// Number of calibration samples [default: 128, fewer for models of over 40 million weights,
    /// such that calibration takes minutes]
    #[arg(long)]
    calibration_samples: Option<usize>,
    /// Length of a calibration sample in tokens [default: the model's context, at most 2048, less
    /// for models of over 40 million weights]
    #[arg(long)]
    calibration_length: Option<usize>,
    /// Method to run on the pruned model
    #[arg(long, value_enum, default_value_t = Method::All)]
    method: Method,
    /// Criterion that chooses the weights to prune: wanda, sparsegpt, ria or magnitude
    #[arg(long, default_value = "wanda")]
    prune: sparsity::Method,
    /// Fraction of weights to remove, from 0 to 1; not with an N:M pattern
    #[arg(long, default_value_t = 0.5)]
    sparsity: f64,
    /// Pattern of the zeros: unstructured (the fraction is removed from each row), layer (from each
    /// matrix), or N:M (N of M consecutive inputs are kept)
    #[arg(long, default_value = "unstructured")]
    pattern: String,
    /// Ranks that the supernet offers; plain LoRA uses the largest
    #[arg(long, value_delimiter = ',', default_value = "32,24,16")]
    ranks: Vec<usize>,
    /// Layers of a block that share a rank, given by the ends of their names; ';' separates groups
    #[arg(
        long,
        default_value = "q_proj,k_proj,v_proj;up_proj,gate_proj;down_proj"
    )]
    groups: String,
    /// lonas: widths that each MLP offers, as fractions of the full width
    #[arg(long, value_delimiter = ',', default_value = "1,0.875,0.75,0.625,0.5")]
    widths: Vec<f64>,
    /// lonas: numbers of heads that each attention offers, as fractions of all heads, rounded to
    /// whole key/value groups
    #[arg(long, value_delimiter = ',', default_value = "1")]
    heads: Vec<f64>,
    /// lonas: maximum number of attention and MLP sub-blocks a subnet may drop, least influential
    /// first
    #[arg(long, default_value_t = 0)]
    depth: usize,
    /// lonas: round MLP widths to a multiple of this number
    #[arg(long, default_value_t = 32)]
    multiple: usize,
    /// lonas: importance score by which channels are sorted before training: l1, l2, activation,
    /// taylor, or none
    #[arg(long, default_value = "activation")]
    order: String,
    /// lonas: which subnets each step trains
    #[arg(long, value_enum, default_value_t = Subnets::Sandwich)]
    subnets: Subnets,
    /// lonas: train the supernet only, without the LoRA baseline and without a search
    #[arg(long)]
    elastic_only: bool,
    /// sqft: bits per weight: 2, 3, 4 or 8
    #[arg(long, default_value_t = 4)]
    bits: u8,
    /// sqft: number of consecutive weights of a row that share a scale and a zero point, or `row`
    /// for the whole row
    #[arg(long, default_value = "32")]
    group_size: String,
    /// sqft: use symmetric grids, whose zero point is in the middle
    #[arg(long)]
    symmetric: bool,
    /// sqft: method that quantizes the base
    #[arg(long, value_enum, default_value_t = Quantize::Gptq)]
    quantize: Quantize,
    /// sqft: checkpoint format of the quantized models
    #[arg(long, value_enum, default_value_t = FileFormat::Gptq)]
    file_format: FileFormat,
    /// sqft: weights that quantization-aware training starts from [default: sparse; gptq with
    /// --quantize joint]
    #[arg(long, value_enum)]
    qa_start: Option<QaStart>,
    /// Initialization of adapters
    #[arg(long, value_enum, default_value_t = Init::Fresh)]
    init: Init,
    /// sqft: train the scales of the grids too (the paper's authors do not)
    #[arg(long, action = ArgAction::Set, default_value_t = true, default_missing_value = "true", num_args = 0..=1)]
    train_scales: bool,
    /// Read the search space from a file: this crate's JSON, elastic_adapter_config.json, or an
    /// NNCF config
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
    /// LoRA alpha of the adapters [default: twice the largest rank]
    #[arg(long)]
    alpha: Option<f64>,
    /// Dropout on the adapters' inputs
    #[arg(long, default_value_t = 0.0)]
    dropout: f64,
    /// Template of the records: auto (the model's chat template for conversations), chat (that for
    /// every record), alpaca, question_answer, raw, or a file with a chat template
    #[arg(long, default_value = "auto")]
    template: String,
    /// Print this many training records as the model sees them, with what it learns marked
    #[arg(long, default_value_t = 0)]
    #[serde(skip)]
    show: usize,
    /// Read the data files as plain text, whatever their names are
    #[arg(long)]
    plain_text: bool,
    /// Include the prompt's tokens in the loss
    #[arg(long)]
    train_on_inputs: bool,
    /// Data type of the frozen weights in memory; bf16 and f16 take half the memory of f32
    #[arg(long, value_enum, default_value_t = Weights::F32)]
    weights: Weights,
    /// Recompute activations in the backward pass (gradient checkpointing): less memory, more time
    #[arg(long)]
    checkpointing: bool,
    /// Maximum length of a sequence in tokens; longer records are cut at the end, and left out if
    /// nothing of their answer remains [default: the model's context, at most 512]
    #[arg(long)]
    max_len: Option<usize>,
    /// Pack short records into sequences of at most --max-len tokens, each record still by itself;
    /// --batch counts these sequences
    #[arg(long)]
    pack: bool,
    /// Search algorithm
    #[arg(long, value_enum, default_value_t = Search::Nsga2)]
    search: Search,
    /// Number of subnets that the search evaluates
    #[arg(long, default_value_t = 40)]
    evals: usize,
    /// Score that the search optimizes, on the validation file
    #[arg(long, value_enum, default_value_t = SearchMetric::Loss)]
    metric: SearchMetric,
    /// Cost that the search trades against the score
    #[arg(long, value_enum, default_value_t = SearchCost::Macs)]
    cost: SearchCost,
    /// Choose and write the best subnet that costs at most this: bytes of the stored weights
    /// (300MB), the time of a token or, with --cost prefill, of a prompt (12ms), or a share of the
    /// largest subnet's cost (40%)
    #[arg(long)]
    target: Option<target::Target>,
    /// Number of subnets of the front that the bundle names, evenly spaced by cost [default: all]
    #[arg(long)]
    front: Option<usize>,
    /// Fraction of the validation data on which --search sensitivity scores each choice
    #[arg(long, default_value_t = 1.0)]
    scoring_share: f64,
    /// Random seed
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Backend: flex, or another whose feature is enabled in the build
    #[arg(long, default_value = "flex")]
    device: String,
    /// Folder for the results, which must be new or empty [default: target/compress, replaced at
    /// each run]
    #[arg(long)]
    #[serde(skip)]
    out: Option<PathBuf>,
    /// Continue the interrupted run in --out; the arguments must be the same
    #[arg(long)]
    #[serde(skip)]
    resume: bool,
    /// Replace the results of an earlier run in --out; other files are kept
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
    /// Elastic adapters, searched, not merged
    Shears,
    /// Elastic adapters that keep the zeros of the weights, merged
    SparsePeft,
    /// Elastic widths and adapters on the dense model, searched, extracted as smaller models: the
    /// paper's table 1
    Lonas,
    /// Elastic adapters on a sparse quantized base, not merged
    Sqft,
    /// SparsePEFT, as a row of table 2
    SqftSparsePeft,
    /// Elastic adapters trained with quantization, merged into sparse quantized weights
    SqftQaSparsePeft,
    /// All of these, LoRA, Shears, and quantization without training: the paper's table 2
    Table2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Quantize {
    /// GPTQ, which keeps the pruned model's zeros
    Gptq,
    /// Rounding to nearest
    Rtn,
    /// SparseGPT and GPTQ in one pass; ignores --prune
    Joint,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum FileFormat {
    /// GPTQ as written by AutoGPTQ
    Gptq,
    /// GPTQ v2, whose zero points are stored without an offset
    GptqV2,
    /// compressed-tensors, `pack-quantized`
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
    /// Pruned weights before quantization
    Sparse,
    /// Quantized weights
    Gptq,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Init {
    /// Standard LoRA initialization (the update is zero)
    Fresh,
    /// sqft, adapters that are not merged: low-rank approximation of the error of compression,
    /// weighted by the norms of the inputs
    Error,
    /// The part of the weight in its largest singular values, as many as the smallest rank; the
    /// base is what is left (PiSSA). For dense bases and for adapters under a mask
    Pissa,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Subnets {
    /// One random subnet, as the paper's authors do
    Uniform,
    /// Largest, random and smallest subnet (sandwich rule), with distillation from the largest
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
    /// Evolution of the Pareto front of score against cost
    Nsga2,
    /// Scores of each choice alone, an exact program for every budget, and corrections by the last
    /// tenth of --evals, at least ten
    Sensitivity,
    /// Random subnets
    Random,
    /// Repeated moves to better neighbors, starting from the heuristic subnet
    HillClimbing,
    /// Heuristic subnet only: the middle choice of every group
    Heuristic,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum SearchCost {
    /// Multiply-accumulates per token
    Macs,
    /// Number of weights, zeros included
    Params,
    /// Bytes of the weights at 16 bits each
    Bytes,
    /// lonas: time of a prompt, predicted from measured parts
    Prefill,
    /// lonas: time of a token after others, predicted from measured parts
    Decode,
}

impl From<SearchCost> for Cost {
    fn from(cost: SearchCost) -> Self {
        match cost {
            SearchCost::Macs => Cost::Macs,
            SearchCost::Params => Cost::Params,
            SearchCost::Bytes => Cost::Bytes,
            SearchCost::Prefill | SearchCost::Decode => Cost::Latency,
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

    /// Returns whether the method produces rows of table 2.
    fn is_sqft(self) -> bool {
        self == Method::Table2 || Method::Table2.includes(self)
    }
}

fn run(args: &Args, matches: &ArgMatches) -> Result<()> {
    unused::refuse(args, matches)?;
    // Check everything that depends only on the arguments before reading any file.
    let device = common::device(&args.device)?;
    let settings = settings::Settings::new(args)?;
    let task = task::Task::load(args, &device)?;
    pipeline::run(args, &settings, &task)
}

fn main() {
    let (args, matches) = common::parse_with_matches();
    common::exit_on_error(run(&args, &matches));
}
