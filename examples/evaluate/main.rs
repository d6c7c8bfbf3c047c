//! Measures a model: tasks of lm-evaluation-harness and LLM-Adapters, perplexity on a text, or exact
//! match on problems with a final answer.

#[path = "../common/mod.rs"]
mod common;

#[cfg(feature = "burn")]
mod burn;
mod tasks;

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use elastic_lora::{Error, Result};

/// Measure a model, with or without an adapter: scores of tasks, perplexity or exact-match accuracy.
///
/// Without arguments, measures the bundled model on generated arithmetic problems of every kind.
///
/// `--tasks` computes the scores of lm-evaluation-harness (or those of LLM-Adapters: adapters_boolq,
/// ...) in the runtime, on rows of files that lie in `--data`: `boolq/validation.jsonl`, or .json.
///
/// For perplexity, the whole text is tokenized once, with BOS if the tokenizer adds one, and cut
/// into non-overlapping windows of the context length. The mean is over all tokens except the first
/// of each window. A problem counts as correct if the final answer of the generated text (after
/// `####` or `answer is`, or the whole text) equals the answer of the record. If all problems have
/// GSM8K's form, the two scores of lm-evaluation-harness are shown too. Records that cannot be
/// compared or do not fit into the context are named and left out.
#[derive(Parser)]
#[cfg_attr(not(feature = "burn"), allow(dead_code))]
struct Args {
    /// Model folder, GGUF file, bundle, or id in the local Hugging Face cache [default: the bundled
    /// model]
    #[arg(long)]
    model: Option<PathBuf>,
    /// PEFT adapter folder; the adapter is not merged
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Names of tasks, separated by commas; `list` prints those that there are
    #[arg(long, value_delimiter = ',', conflicts_with_all = ["text", "exact_match", "device"])]
    tasks: Vec<String>,
    /// File with descriptions of tasks (JSON), all of which are run; may be given several times
    #[arg(long, conflicts_with_all = ["text", "exact_match", "device"])]
    task: Vec<PathBuf>,
    /// Folder with the tasks' rows
    #[arg(long)]
    data: Option<PathBuf>,
    /// Number of examples in each prompt of a task [default: the task's own]
    #[arg(long)]
    num_fewshot: Option<usize>,
    /// Write prompts by the model's chat template
    #[arg(long)]
    chat: bool,
    /// Make each example of a prompt a turn of the user and one of the model
    #[arg(long, requires = "chat")]
    fewshot_as_multiturn: bool,
    /// Write each question of a task, what the model said, and the verdict to this file, as JSON
    /// Lines
    #[arg(long)]
    log: Option<PathBuf>,
    /// Text file on which to compute perplexity
    #[arg(long, conflicts_with = "exact_match")]
    text: Option<PathBuf>,
    /// File of problems (JSON, JSON Lines or CSV; conversations, Alpaca or GSM8K form) on which to
    /// compute accuracy
    #[arg(long)]
    exact_match: Option<PathBuf>,
    /// Window of the perplexity in tokens [default: the model's context length]
    #[arg(long, requires = "text")]
    context: Option<usize>,
    /// Windows of the perplexity, and what is scored of them
    #[arg(long, requires = "text", default_value = "all")]
    windows: Windows,
    /// Read the text file as plain text, whatever its name is
    #[arg(long, requires = "text")]
    plain_text: bool,
    /// Compute in the runtime, on the CPU, with the weights as they are stored; bundles always are
    #[arg(long, conflicts_with_all = ["adapter", "device"])]
    runtime: bool,
    /// Subnet of a supernet bundle, by name [default: the whole supernet]
    #[arg(long, conflicts_with = "device")]
    subnet: Option<String>,
    /// For tasks: format of the linear layers, as in `generate` (f32, bf16, int8, int4, ...)
    /// [default: as stored]
    #[arg(long)]
    format: Option<String>,
    /// For tasks: format of the embedding and of the head [default: as stored, or 16-bit floats with
    /// --format]
    #[arg(long)]
    embedding: Option<String>,
    /// Number of consecutive weights of a row that share a scale in an integer format
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    group_size: u32,
    /// Rounding of the inputs of integer weights, in the runtime [default: int16]
    #[arg(long, conflicts_with = "device")]
    inputs: Option<common::format::Inputs>,
    /// For tasks: number of threads; 0 for one per core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// For tasks: number of sequences that are generated at a time
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Template of the prompts: auto (the model's chat template for conversations), chat (that for
    /// every record), alpaca, question_answer, raw, or a file with a chat template
    #[arg(long, default_value = "auto", conflicts_with = "text")]
    template: String,
    /// Use this many records of each set, or documents of each task, the first ones
    #[arg(long, conflicts_with = "text")]
    limit: Option<usize>,
    /// Print prompt, output, reference and verdict of this many problems
    #[arg(long, default_value_t = 0, conflicts_with = "text")]
    show: usize,
    /// Maximum length of an answer in tokens [default: the task's, or 256]
    #[arg(long, conflicts_with = "text")]
    max_new_tokens: Option<usize>,
    /// Backend: flex, or another whose feature is enabled in the build
    #[arg(long, default_value = "flex")]
    device: String,
    /// Print JSON, one object per line for each set of problems, and for each problem that is shown;
    /// with --tasks, write the report to this file instead
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    json: Option<Option<PathBuf>>,
}

/// How a text is cut into windows.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Windows {
    /// All tokens but the first of each window; the last window may be shorter
    All,
    /// As GPTQ, SparseGPT and Wanda: whole windows only
    Papers,
    /// As llama.cpp: the second half of whole windows
    #[value(name = "llama.cpp")]
    LlamaCpp,
}

fn run(args: &Args) -> Result<()> {
    for (name, value) in [
        ("max-new-tokens", args.max_new_tokens),
        ("limit", args.limit),
    ] {
        if value == Some(0) {
            return Err(Error::argument(name, 0, "at least 1"));
        }
    }
    let has_tasks = !(args.tasks.is_empty() && args.task.is_empty());
    let alone = |name, given: bool| match given && !has_tasks {
        true => Err(Error::argument(
            name,
            "given",
            "nothing without --tasks or --task",
        )),
        false => Ok(()),
    };
    alone("data", args.data.is_some())?;
    alone("num-fewshot", args.num_fewshot.is_some())?;
    alone("chat", args.chat)?;
    alone("log", args.log.is_some())?;
    if has_tasks {
        return tasks::run(args);
    }
    if args.windows != Windows::All {
        return tasks::windows(args);
    }
    alone("format", args.format.is_some())?;
    alone("embedding", args.embedding.is_some())?;
    if let Some(Some(file)) = &args.json {
        let expected = "no file without --tasks; the JSON goes to standard output";
        return Err(Error::argument("json", file.display(), expected));
    }
    #[cfg(feature = "burn")]
    return burn::run(args);
    #[cfg(not(feature = "burn"))]
    Err(Error::Unsupported {
        what: "a build without the feature `flex`, without --tasks and --windows,".into(),
    })
}

fn main() {
    common::exit_on_error(run(&common::parse()));
}
