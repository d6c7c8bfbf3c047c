//! Measures a model: perplexity on a text, or exact match on problems with a final answer.

#[path = "common/mod.rs"]
mod common;

use std::path::{Path, PathBuf};

use clap::Parser;
use common::arithmetic::{self, Kind, Split};
use elastic_lora::data::{Template, TextTokenizer, load_records, load_text};
use elastic_lora::eval::{Perplexity, ProblemSet, perplexity, session_perplexity};
use elastic_lora::runtime::{Model, ModelOptions, Session, SessionConfig};
use elastic_lora::{Error, Result};

/// Measure a model, with or without an adapter: perplexity or exact-match accuracy.
///
/// Without arguments, measures the bundled model on generated arithmetic problems of every kind.
///
/// For perplexity, the whole text is tokenized once, with BOS if the tokenizer adds one, and cut
/// into non-overlapping windows of the context length. The mean is over all tokens except the first
/// of each window. A problem counts as correct if the final answer of the generated text (`####
/// 12`, or `answer is 12`) equals the answer of the record.
#[derive(Parser)]
struct Args {
    /// Model folder [default: the bundled model]
    #[arg(long)]
    model: Option<PathBuf>,
    /// PEFT adapter folder; the adapter is not merged
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Text file on which to compute perplexity
    #[arg(long, conflicts_with = "exact_match")]
    text: Option<PathBuf>,
    /// File of problems (JSON, JSON Lines or CSV; conversations, Alpaca or GSM8K form) on which to compute accuracy
    #[arg(long)]
    exact_match: Option<PathBuf>,
    /// Window of the perplexity in tokens [default: the model's context length]
    #[arg(long, requires = "text")]
    context: Option<usize>,
    /// Compute the perplexity in the runtime, on the CPU, of a folder, GGUF file or
    /// bundle as its weights are stored
    #[arg(long, requires_all = ["text", "model"], conflicts_with_all = ["adapter", "device"])]
    runtime: bool,
    /// Template of the prompts: auto (the model's chat template for conversations), chat (that for
    /// every record), alpaca, question_answer, raw, or a file with a chat template
    #[arg(long, default_value = "auto")]
    template: String,
    /// Print this many records as the model sees them, with the answers marked
    #[arg(long, default_value_t = 0)]
    show: usize,
    /// Maximum length of an answer in tokens
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// Backend: flex, or another whose feature is enabled in the build
    #[arg(long, default_value = "flex")]
    device: String,
    /// Print JSON, one object per line for each set of problems
    #[arg(long)]
    json: bool,
}

/// Tokenizes a text of at least two tokens, with BOS if the tokenizer adds one.
fn text_ids(text: &Path, tokenizer: &TextTokenizer) -> Result<Vec<u32>> {
    let ids = tokenizer.encode_prompt(&load_text(text)?)?;
    if ids.len() < 2 {
        let detail = format!(": {} tokens, and a text needs 2", ids.len());
        return Err(Error::EmptyDataset {
            path: text.into(),
            detail,
        });
    }
    Ok(ids)
}

fn say_perplexity(args: &Args, result: &Perplexity) {
    if args.json {
        common::say!("{}", serde_json::json!(result));
    } else {
        common::say!(
            "perplexity {:.4}, {:.6} nats a token, {} tokens predicted",
            result.perplexity,
            result.nll,
            result.predicted_tokens
        );
    }
}

/// Prints the perplexity of a model as the runtime computes it.
fn in_the_runtime(args: &Args, path: &Path, text: &Path) -> Result<()> {
    let model = Model::open(path, &ModelOptions::default())?;
    common::show_notices(&model.notices());
    let Some(tokenizer) = model.tokenizer() else {
        return Err(Error::Unsupported {
            what: format!(
                "the perplexity of {}, which has no tokenizer,",
                path.display()
            ),
        });
    };
    let ids = text_ids(text, tokenizer)?;
    let max = model.config().max_position_embeddings();
    let context = args.context.unwrap_or(max);
    let mut session = Session::new(&model, &SessionConfig::default().with_n_ctx(context))?;
    let result = session_perplexity(&mut session, &ids, context, &common::progress())?;
    say_perplexity(args, &result);
    Ok(())
}

fn run(args: &Args) -> Result<()> {
    if args.max_new_tokens == 0 {
        return Err(Error::argument("max-new-tokens", 0, "at least 1"));
    }
    if let (true, Some(path), Some(text)) = (args.runtime, &args.model, &args.text) {
        return in_the_runtime(args, path, text);
    }
    let pretrained = common::open(args.model.as_deref(), args.adapter.as_deref(), &args.device)?;
    let model = &pretrained.model;
    let progress = common::progress();
    if let Some(text) = &args.text {
        let ids = text_ids(text, &pretrained.tokenizer)?;
        let context = args
            .context
            .unwrap_or(model.config().max_position_embeddings());
        say_perplexity(args, &perplexity(model, &ids, context, &progress)?);
        return Ok(());
    }
    let room = model.config().max_position_embeddings();
    let generate = pretrained.generate_config(args.max_new_tokens.min(room));
    let shipped = common::shipped_model();
    let template = Template::for_model(&args.template, args.model.as_ref().unwrap_or(&shipped))?;
    let measure = |records: &[_]| -> Result<_> {
        let problems = ProblemSet::new(records, &template, &pretrained.tokenizer)?;
        problems.exact_match(model, &pretrained.tokenizer, &generate, &progress)
    };
    let sets: Vec<(String, Vec<_>)> = match &args.exact_match {
        Some(file) => vec![(file.display().to_string(), load_records(file)?)],
        None => Kind::ALL
            .into_iter()
            .map(|kind| {
                let problems = arithmetic::problems(kind, Split::Test, 500, 0)?;
                Ok((
                    kind.to_string(),
                    problems
                        .into_iter()
                        .map(arithmetic::Problem::into_record)
                        .collect(),
                ))
            })
            .collect::<Result<_>>()?,
    };
    for (name, records) in &sets {
        if let Some(at) = records
            .iter()
            .position(|record| record.final_answer().is_none())
        {
            return Err(Error::InvalidRecord {
                path: name.into(),
                record: at + 1,
                reason: "it has no final answer (`#### 12`, or a field `answer`)".into(),
            });
        }
        common::show_examples(records, &template, args.show)?;
        let result = measure(records)?;
        if args.json {
            let (correct, total, accuracy) = (result.correct, result.total, result.accuracy());
            common::say!(
                "{}",
                serde_json::json!({ "set": name, "accuracy": accuracy, "correct": correct, "total": total })
            );
        } else {
            common::say!(
                "{name}: {:.1} % ({} of {})",
                100.0 * result.accuracy(),
                result.correct,
                result.total
            );
        }
    }
    Ok(())
}

fn main() {
    common::exit_on_error(run(&common::parse()));
}
