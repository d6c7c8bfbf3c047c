//! Tasks, and perplexities by the rules of others, in the runtime.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use elastic_lora::data::load_text;
use elastic_lora::runtime::{Adapter, Model, ModelOptions, Session, SessionConfig};
use elastic_lora::tasks::{
    EvaluateOptions, RuntimeModel, TaskReport, TaskSpec, WindowRule, evaluate, windowed_perplexity,
};
use elastic_lora::{Error, Result};
use serde_json::json;

use crate::common::{self, say};
use crate::{Args, Windows};

/// What the scores of the built-in tasks are equal to.
const HARNESS: &str = "lm-evaluation-harness 0.4.13";

fn model_path(args: &Args) -> PathBuf {
    args.model.clone().unwrap_or_else(common::shipped_model)
}

/// Opens the model in the format that the arguments ask for, with its subnet and adapter.
fn open(args: &Args, n_ctx: Option<usize>) -> Result<RuntimeModel> {
    let path = model_path(args);
    let options = ModelOptions::default().with_n_threads(args.threads);
    let mut model = Model::open(&path, &options)?;
    common::show_notices(&model.notices());
    let [format, embedding] = [&args.format, &args.embedding].map(Option::as_deref);
    if let Some(plan) = common::format::plan(format, embedding, args.group_size as usize)? {
        model = model.with_format(plan)?;
    }
    let mut config = SessionConfig {
        n_ctx,
        ..Default::default()
    };
    if let Some(inputs) = args.inputs {
        config = config.with_activations(inputs.into());
    }
    let mut session = Session::new(&model, &config)?;
    if let Some(subnet) = &args.subnet {
        session.set_subnet_named(subnet)?;
    }
    if let Some(path) = &args.adapter {
        session.set_adapters(&[(Adapter::open(&model, path)?, 1.0)])?;
    }
    Ok(RuntimeModel::new(session)?.with_sessions(args.batch))
}

/// Runs the tasks that the arguments name.
pub fn run(args: &Args) -> Result<()> {
    if args.tasks.iter().any(|name| name == "list") {
        for name in TaskSpec::builtin_names()? {
            say!("{name}");
        }
        return Ok(());
    }
    let mut specs = Vec::new();
    for name in &args.tasks {
        specs.push(TaskSpec::builtin(name)?);
    }
    for file in &args.task {
        specs.extend(TaskSpec::from_file(file)?);
    }
    let dir = args.data.as_deref().unwrap_or(Path::new("."));
    let data = specs
        .iter()
        .map(|spec| spec.load(dir))
        .collect::<Result<Vec<_>>>()?;
    let mut log = args.log.as_deref().map(create).transpose()?;
    let mut report_file = match &args.json {
        Some(Some(path)) => Some((path, create(path)?)),
        _ => None,
    };
    let mut model = open(args, None)?;
    let chat = model.model().chat_template().cloned().filter(|_| args.chat);
    if args.chat && chat.is_none() {
        let expected = "a model with a chat template";
        return Err(Error::argument(
            "chat",
            model_path(args).display(),
            expected,
        ));
    }
    let options = EvaluateOptions::default()
        .with_limit(args.limit)
        .with_num_fewshot(args.num_fewshot)
        .with_chat(chat)
        .with_fewshot_as_multiturn(args.fewshot_as_multiturn)
        .with_max_gen_toks(args.max_new_tokens);
    let progress = common::progress();
    let mut reports: Vec<TaskReport> = Vec::new();
    for (spec, data) in specs.iter().zip(&data) {
        let report = evaluate(&mut model, spec, data, &options, &progress)?;
        if let Some((writer, path)) = log.as_mut().zip(args.log.as_deref()) {
            let written = report.write_samples(writer).and_then(|()| writer.flush());
            written.map_err(|e| Error::io(path, e))?;
        }
        if args.json.is_none() {
            if reports.is_empty() {
                say!(
                    "{}",
                    line(["task", "n", "shots", "score", "value", "stderr"])
                );
            }
            say_report(&report);
        }
        reports.push(report);
    }
    let mean = mean(&reports);
    if let Some(mean) = mean.filter(|_| args.json.is_none()) {
        let n = format!("mean of {}", reports.len());
        say!(
            "{}",
            line([&n, "", "", "acc_norm or the task's", &percent(mean), ""])
        );
    }
    let seconds: f64 = reports.iter().map(|report| report.seconds).sum();
    let documents: usize = reports.iter().map(|report| report.n_documents).sum();
    eprintln!(
        "{documents} documents in {seconds:.1} s, {:.2} a second; {:.1} MB of weights, {} threads",
        documents as f64 / seconds.max(1e-9),
        model.model().bytes() as f64 / 1e6,
        model.model().n_threads()
    );
    let Some(wanted) = &args.json else {
        return Ok(());
    };
    let report = json!({
        "model": model_path(args), "subnet": args.subnet, "adapter": args.adapter,
        "format": args.format, "embedding": args.embedding, "weight_bytes": model.model().bytes(),
        "threads": model.model().n_threads(), "chat": args.chat, "limit": args.limit,
        "scores_equal": HARNESS, "seconds": seconds, "mean": mean, "tasks": reports,
    });
    match (wanted, &mut report_file) {
        (Some(_), Some((path, file))) => {
            let written = writeln!(file, "{report:#}").and_then(|()| file.flush());
            written.map_err(|e| Error::io(path, e))
        }
        _ => {
            say!("{report}");
            Ok(())
        }
    }
}

fn create(path: impl AsRef<Path>) -> Result<BufWriter<File>> {
    let file = File::create(&path).map_err(|e| Error::io(&path, e))?;
    Ok(BufWriter::new(file))
}

/// Returns the mean of the tasks' main scores, if there are several and all are fractions.
fn mean(reports: &[TaskReport]) -> Option<f64> {
    let main = reports.iter().map(|report| report.main_score());
    let values: Option<Vec<f64>> = main
        .map(|score| {
            score
                .filter(|score| score.stderr.is_some())
                .map(|score| score.value)
        })
        .collect();
    let values = values.filter(|values| values.len() > 1)?;
    Some(values.iter().sum::<f64>() / values.len() as f64)
}

/// Returns a line of the table, of 79 characters where its texts fit.
fn line(cells: [&str; 6]) -> String {
    let [task, n, shots, score, value, stderr] = cells;
    format!("{task:<22}{n:>6}{shots:>6}  {score:<27}{value:>8}{stderr:>8}")
        .trim_end()
        .to_string()
}

fn percent(value: f64) -> String {
    format!("{:.2} %", 100.0 * value)
}

fn say_report(report: &TaskReport) {
    let (n, shots) = (
        report.n_documents.to_string(),
        report.num_fewshot.to_string(),
    );
    for score in &report.scores {
        let name = match score.filter.as_str() {
            "none" => score.metric.clone(),
            filter => format!("{} {filter}", score.metric.replace("exact_match", "exact")),
        };
        let is_fraction = score.metric.starts_with("acc") || score.metric.ends_with("_match");
        let [value, stderr] = match is_fraction {
            true => [Some(score.value), score.stderr].map(|v| v.map_or(String::new(), percent)),
            false => [format!("{:.4}", score.value), String::new()],
        };
        say!(
            "{}",
            line([&report.task, &n, &shots, &name, &value, &stderr])
        );
    }
}

/// Computes the perplexity of a text by the rule of others.
pub fn windows(args: &Args) -> Result<()> {
    let Some(text) = &args.text else {
        return Ok(());
    };
    let rule = match args.windows {
        Windows::LlamaCpp => WindowRule::LlamaCpp,
        _ => WindowRule::Papers,
    };
    let content = load_text(text)?;
    let model = open(args, None)?;
    let context = args.context.unwrap_or(model.max_len());
    let started = Instant::now();
    let found = windowed_perplexity(&model, &content, context, rule, &common::progress())?;
    if args.json.is_some() {
        say!("{}", json!(found));
        return Ok(());
    }
    say!(
        "perplexity {:.4}{}, {:.6} nats a token, {} tokens predicted in {} windows of {context}",
        found.perplexity,
        found.nll_stderr.map_or(String::new(), |e| format!(
            " +/- {:.4}",
            e * found.perplexity
        )),
        found.nll,
        found.predicted_tokens,
        found.n_windows
    );
    eprintln!("{:.1} s", started.elapsed().as_secs_f64());
    Ok(())
}
