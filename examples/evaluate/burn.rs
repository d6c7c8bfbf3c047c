//! Perplexity and exact match, computed by Burn or by the runtime.

use std::path::Path;

use elastic_lora::data::{Record, Template, TextTokenizer, is_text_file, load_text};
use elastic_lora::eval::{
    Answer, ExactMatch, Perplexity, ProblemSet, perplexity, session_perplexity,
};
use elastic_lora::io::{is_gguf, model_path};
use elastic_lora::model::Pretrained;
use elastic_lora::progress::TerminalProgress;
use elastic_lora::runtime::{
    Activations, GenerateConfig, Model, ModelOptions, Session, SessionConfig,
};
use elastic_lora::{Error, Result};

use crate::Args;
use crate::common;
use crate::common::arithmetic::{self, Kind, Split};

/// Largest number of tokens of an answer, unless another is given.
const MAX_NEW_TOKENS: usize = 256;

/// Number of sequences that the runtime generates at once.
const SESSIONS: usize = 16;

/// The model with what computes it.
enum Executor {
    Burn(Box<Pretrained>),
    Runtime {
        model: Model,
        tokenizer: Box<TextTokenizer>,
        subnet: Option<String>,
        activations: Activations,
    },
}

impl Executor {
    fn open(args: &Args, model: &Path) -> Result<Self> {
        let path = model_path(model)?;
        let is_bundle = path.is_file() && !is_gguf(&path);
        let by_runtime = args.runtime || args.subnet.is_some() || args.inputs.is_some();
        if !(by_runtime || is_bundle) {
            let adapter = args.adapter.as_deref();
            let pretrained = common::open(Some(model), adapter, &args.device)?;
            return Ok(Self::Burn(Box::new(pretrained)));
        }
        // A bundle that is not a file of its own kind is refused when it is opened.
        let model = Model::open(&path, &ModelOptions::default())?;
        if let Some(adapter) = &args.adapter {
            let expected = "no adapter beside a bundle, which the runtime computes";
            return Err(Error::argument("adapter", adapter.display(), expected));
        }
        if args.device != "flex" {
            let expected = "a folder or GGUF file as the model; the runtime computes bundles";
            return Err(Error::argument("device", &args.device, expected));
        }
        common::show_notices(&model.notices());
        let Some(tokenizer) = model.tokenizer().cloned() else {
            let what = format!("measuring {}, which has no tokenizer,", path.display());
            return Err(Error::Unsupported { what });
        };
        Ok(Self::Runtime {
            model,
            tokenizer: Box::new(tokenizer),
            subnet: args.subnet.clone(),
            activations: args.inputs.map_or_else(Activations::default, Into::into),
        })
    }

    fn tokenizer(&self) -> &TextTokenizer {
        match self {
            Executor::Burn(pretrained) => &pretrained.tokenizer,
            Executor::Runtime { tokenizer, .. } => tokenizer,
        }
    }

    /// Maximum number of tokens of a sequence.
    fn context(&self) -> usize {
        let config = match self {
            Executor::Burn(pretrained) => pretrained.model.config(),
            Executor::Runtime { model, .. } => model.config(),
        };
        config.max_position_embeddings()
    }

    /// Creates sessions on the runtime's model.
    fn sessions(
        model: &Model,
        subnet: Option<&str>,
        config: &SessionConfig,
        n: usize,
    ) -> Result<Vec<Session>> {
        let session = |_| -> Result<Session> {
            let mut session = Session::new(model, config)?;
            if let Some(subnet) = subnet {
                session.set_subnet_named(subnet)?;
            }
            Ok(session)
        };
        (0..n).map(session).collect()
    }

    fn perplexity(
        &self,
        ids: &[u32],
        context: usize,
        progress: &TerminalProgress,
    ) -> Result<Perplexity> {
        match self {
            Executor::Burn(pretrained) => perplexity(&pretrained.model, ids, context, progress),
            Executor::Runtime {
                model,
                subnet,
                activations,
                ..
            } => {
                let config = SessionConfig::default()
                    .with_n_ctx(context)
                    .with_activations(*activations);
                let mut sessions = Self::sessions(model, subnet.as_deref(), &config, 1)?;
                session_perplexity(&mut sessions[0], ids, context, progress)
            }
        }
    }

    fn answers(
        &self,
        problems: &ProblemSet,
        max_new_tokens: usize,
        progress: &TerminalProgress,
    ) -> Result<Vec<Answer>> {
        match self {
            Executor::Burn(pretrained) => {
                let config = pretrained.generate_config(max_new_tokens);
                problems.answers(&pretrained.model, &pretrained.tokenizer, &config, progress)
            }
            Executor::Runtime {
                model,
                tokenizer,
                subnet,
                activations,
            } => {
                let n = problems.len().min(SESSIONS);
                let config = SessionConfig::default().with_activations(*activations);
                let mut sessions = Self::sessions(model, subnet.as_deref(), &config, n)?;
                let config = GenerateConfig::new(max_new_tokens, model.stop_ids().to_vec());
                problems.session_answers(&mut sessions, tokenizer, &config, progress)
            }
        }
    }
}

/// Tokenizes a text of at least two tokens, with BOS if the tokenizer adds one.
fn text_ids(args: &Args, text: &Path, tokenizer: &TextTokenizer) -> Result<Vec<u32>> {
    if !args.plain_text && !is_text_file(text) {
        return Err(Error::InvalidFile {
            path: text.into(),
            reason: "plain text by neither its name (.txt, .text, .md, .raw, .tokens) nor \
                     --plain-text; --exact-match reads records"
                .into(),
        });
    }
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
    if args.json.is_some() {
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

/// Prints what the model wrote to a problem.
fn say_answer(args: &Args, prompt: &str, answer: &Answer) {
    let Answer {
        record,
        output,
        reference,
        correct,
        ..
    } = answer;
    if args.json.is_some() {
        common::say!(
            "{}",
            serde_json::json!({
                "record": record, "prompt": prompt, "output": output, "reference": reference,
                "correct": correct
            })
        );
    } else {
        let verdict = if *correct { "correct" } else { "wrong" };
        common::say!(
            "--- record {record}\n{prompt}[[{output}]]\nreference: {reference}\nverdict: {verdict}"
        );
    }
}

fn say_accuracy(args: &Args, name: &str, left_out: usize, result: &ExactMatch) {
    let share = |n: usize| n as f64 / result.total.max(1) as f64;
    if args.json.is_some() {
        let mut line = serde_json::json!({
            "set": name, "accuracy": result.accuracy(), "correct": result.correct,
            "total": result.total, "left_out": left_out
        });
        if let Some(gsm8k) = result.gsm8k {
            line["strict_match"] = share(gsm8k.strict).into();
            line["flexible_extract"] = share(gsm8k.flexible).into();
        }
        common::say!("{line}");
        return;
    }
    let gsm8k = result.gsm8k.map_or(String::new(), |gsm8k| {
        let (strict, flexible) = (100.0 * share(gsm8k.strict), 100.0 * share(gsm8k.flexible));
        format!("; GSM8K's strict match {strict:.1} %, flexible extract {flexible:.1} %")
    });
    common::say!(
        "{name}: {:.1} % ({} of {}){gsm8k}",
        100.0 * result.accuracy(),
        result.correct,
        result.total
    );
}

/// Returns the sets of problems with their names.
fn sets(args: &Args) -> Result<Vec<(String, Vec<Record>)>> {
    let mut sets = match &args.exact_match {
        Some(file) => vec![(
            file.display().to_string(),
            common::load_records(file, false)?,
        )],
        None => Kind::ALL
            .into_iter()
            .map(|kind| {
                let problems = arithmetic::problems(kind, Split::Test, 500, 0)?;
                let records = problems.into_iter().map(arithmetic::Problem::into_record);
                Ok((kind.to_string(), records.collect()))
            })
            .collect::<Result<_>>()?,
    };
    if let Some(limit) = args.limit {
        sets.iter_mut()
            .for_each(|(_, records)| records.truncate(limit));
    }
    Ok(sets)
}

/// Measures perplexity or exact match, by Burn unless the model or the arguments ask for the runtime.
pub fn run(args: &Args) -> Result<()> {
    let model = args.model.clone().unwrap_or_else(common::shipped_model);
    let executor = Executor::open(args, &model)?;
    let progress = common::progress();
    if let Some(text) = &args.text {
        let ids = text_ids(args, text, executor.tokenizer())?;
        let context = args.context.unwrap_or(executor.context());
        say_perplexity(args, &executor.perplexity(&ids, context, &progress)?);
        return Ok(());
    }
    let template = Template::for_model(&args.template, &model)?;
    for (name, records) in &sets(args)? {
        let problems = ProblemSet::new(records, &template, executor.tokenizer())?
            .with_max_prompt(executor.context().saturating_sub(1))?;
        let fate = "are not counted in the accuracy";
        common::show_misfits(name, fate, problems.left_out(), records.len());
        let n_new = args
            .max_new_tokens
            .unwrap_or(MAX_NEW_TOKENS)
            .min(executor.context());
        let answers = executor.answers(&problems, n_new, &progress)?;
        for answer in answers.iter().take(args.show) {
            let prompt = template.prompt_text(&records[answer.record - 1])?;
            say_answer(args, &prompt, answer);
        }
        let left_out = problems.left_out().len();
        say_accuracy(args, name, left_out, &ExactMatch::new(&answers));
    }
    Ok(())
}
