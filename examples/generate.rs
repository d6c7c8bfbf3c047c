//! Continues a prompt, token by token, and converts model folders to bundles.

#[path = "common/mod.rs"]
mod common;

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use elastic_lora::data::{ChatTemplate, Detokenizer, Message, TextTokenizer};
use elastic_lora::model::DeviceSession;
use elastic_lora::runtime::{
    CacheFormat, FormatPlan, GenerateConfig, Model, ModelOptions, SampleConfig, Session,
    SessionConfig,
};
use elastic_lora::{Error, Result, SuperNet};

/// Continue a prompt with a model, with or without an adapter. Decoding is greedy unless a
/// temperature is given.
///
/// Without arguments, the bundled model answers an arithmetic problem. `--model llama --format int4
/// --save llama.elora` converts a Hugging Face folder to a bundle, and `--model llama.elora` runs
/// it.
#[derive(Parser)]
struct Args {
    /// Bundle or model folder [default: the bundled model]
    #[arg(long)]
    model: Option<PathBuf>,
    /// PEFT adapter folder; the adapter is not merged
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Name of a subnet of a supernet bundle [default: the whole supernet]
    #[arg(long)]
    subnet: Option<String>,
    /// Draft that proposes tokens: the name of a subnet of the model, or another bundle or model
    /// folder with the same vocabulary. The text stays the same; it comes sooner if the draft is
    /// much faster and often right
    #[arg(long, conflicts_with = "device")]
    draft: Option<String>,
    /// Largest number of tokens that the draft proposes at a time, 1 to 7
    #[arg(long, default_value_t = 5, requires = "draft")]
    draft_tokens: usize,
    /// Format of the linear layers: f32, f16, bf16, sparse-f16, sparse-bf16, int8, int4,
    /// sparse-int4, or N:M such as 2:4 [default: as stored]. Floats are rounded to nearest in
    /// groups of --group-size; codes keep their own groups
    #[arg(long)]
    format: Option<String>,
    /// Format of the embedding and of the head, as for --format [default: as stored, or 16-bit
    /// floats with --format]
    #[arg(long)]
    embedding: Option<String>,
    /// Number of consecutive weights of a row that share a scale in an integer format
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    group_size: u32,
    /// Write the model to this bundle; then text is only generated if a prompt is given too
    #[arg(long)]
    save: Option<PathBuf>,
    /// Replace the bundle if it exists
    #[arg(long)]
    overwrite: bool,
    /// Prompt; `\n` is replaced by a line break
    #[arg(long)]
    prompt: Option<String>,
    /// Have a conversation on the terminal, with the model's chat template: each line is a turn,
    /// and Ctrl-D ends it
    #[arg(long, conflicts_with_all = ["prompt", "device"])]
    chat: bool,
    /// Text of the system that begins the conversation
    #[arg(long, requires = "chat")]
    system: Option<String>,
    /// File with a chat template, in the place of the model's own
    #[arg(long, requires = "chat")]
    template: Option<PathBuf>,
    /// Maximum number of new tokens
    #[arg(long, default_value_t = 64)]
    max_new_tokens: usize,
    /// Sampling temperature; 0 is greedy
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Sample from the k most likely tokens; 0 for all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Sample from the most likely tokens that together reach this probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Sample from tokens whose probability is at least this fraction of the largest; 0 for all
    #[arg(long, default_value_t = 0.0)]
    min_p: f64,
    /// Random seed
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Number of threads, at most 4096; 0 for one per core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Store keys and values as 16-bit floats
    #[arg(long)]
    half_cache: bool,
    /// Rounding of the inputs of integer weights
    #[arg(long, default_value = "int16", conflicts_with = "device")]
    inputs: common::format::Inputs,
    /// Run the uncompressed model on a Burn backend: flex, or another whose feature is enabled in
    /// the build
    #[arg(long)]
    device: Option<String>,
}

const PROMPT: &str =
    "Question: Mia has 23 shells and finds 18 more. How many shells does Mia have now?\\nAnswer:";

/// Prints text at once. Returns whether the reader is still there: if it has closed the pipe
/// (`| head`), generation stops.
fn print_now(text: &str) -> bool {
    let mut stdout = std::io::stdout();
    let written = write!(stdout, "{text}").and_then(|()| stdout.flush());
    written.is_ok()
}

/// Reads turns of the user from standard input, and answers each by the model. The session keeps
/// the tokens that the next turn begins with.
fn converse(args: &Args, template: &ChatTemplate, session: &mut Session) -> Result<()> {
    let model = session.model().clone();
    let Some(tokenizer) = model.tokenizer() else {
        return Ok(());
    };
    let config = settings(args, model.stop_ids().to_vec());
    let mut messages: Vec<Message> = args.system.iter().map(Message::system).collect();
    let mut lines = std::io::stdin().lines();
    loop {
        eprint!("> ");
        let Some(line) = lines.next() else {
            eprintln!();
            return Ok(());
        };
        let line = line.map_err(|e| Error::io("standard input", e))?;
        if line.trim().is_empty() {
            continue;
        }
        messages.push(Message::user(line));
        // The template writes the special tokens itself.
        let ids = tokenizer.encode(&template.render(&messages, &[], true)?, false)?;
        let known = session
            .tokens()
            .iter()
            .zip(&ids)
            .take_while(|(a, b)| a == b);
        let known = known.count().min(ids.len().saturating_sub(1));
        session.truncate(known);
        let mut answer = Vec::new();
        show("", ids.len() - known, tokenizer, |on_token| {
            answer = session.generate(&ids[known..], &config, on_token)?;
            Ok(answer.clone())
        })?;
        answer.retain(|id| tokenizer.id_to_token(*id).is_some());
        messages.push(Message::assistant(tokenizer.decode(&answer)?));
    }
}

/// Returns the chat template that the arguments name, or that of the model.
fn chat_template(args: &Args) -> Result<ChatTemplate> {
    let shipped = common::shipped_model();
    let model = args.model.as_ref().unwrap_or(&shipped);
    if let Some(file) = &args.template {
        return ChatTemplate::from_file(file, model);
    }
    let none = || {
        let expected = "a model with a chat template, or --template";
        Error::argument("chat", model.display(), expected)
    };
    ChatTemplate::open(model)?.ok_or_else(none)
}

/// Generates text, prints it, and reports the speed.
fn show(
    prompt: &str,
    n_prompt: usize,
    tokenizer: &TextTokenizer,
    generate: impl FnOnce(&mut dyn FnMut(u32) -> bool) -> Result<Vec<u32>>,
) -> Result<()> {
    print_now(prompt);
    let mut text = Detokenizer::new();
    let (started, mut first) = (Instant::now(), None);
    let output = generate(&mut |token| {
        first.get_or_insert_with(|| started.elapsed());
        // Parts of a character wait for the rest of it.
        text.push(tokenizer, token).map_or(true, print_now)
    })?;
    print_now(text.finish());
    common::say!();
    let total = started.elapsed().as_secs_f64();
    let prefill = first.map_or(total, |first| first.as_secs_f64());
    let decoded = output.len().saturating_sub(1);
    eprintln!(
        "prompt: {n_prompt} tokens in {:.1} ms, {:.0} tokens/s; generated {} tokens, {:.0} tokens/s",
        1e3 * prefill,
        n_prompt as f64 / prefill.max(1e-9),
        output.len(),
        decoded as f64 / (total - prefill).max(1e-9)
    );
    Ok(())
}

fn settings(args: &Args, stop_ids: Vec<u32>) -> GenerateConfig {
    let Args {
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        ..
    } = *args;
    let sample = SampleConfig {
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        ..SampleConfig::default()
    };
    GenerateConfig::new(args.max_new_tokens, stop_ids).with_sample(sample)
}

/// Runs the model on a Burn device, as the other examples do.
fn run_on_device(args: &Args, device: &str, prompt: &str) -> Result<()> {
    let pretrained = common::open(args.model.as_deref(), args.adapter.as_deref(), device)?;
    let ids = pretrained.tokenizer.encode_prompt(prompt)?;
    let n_ids = pretrained.tokenizer.n_ids();
    let config = settings(args, pretrained.stop_ids()).with_n_ids(Some(n_ids));
    let mut session = DeviceSession::new(&pretrained.model);
    show(prompt, ids.len(), &pretrained.tokenizer, |on_token| {
        session.generate(&ids, &config, on_token)
    })
}

fn open(args: &Args) -> Result<Model> {
    let path = args.model.clone().unwrap_or_else(common::shipped_model);
    if let Some(folder) = &args.adapter {
        let pretrained = common::open(Some(&path), None, "flex")?;
        let adapter = elastic_lora::io::peft::LoraAdapter::open(folder)?;
        let before = pretrained.model.config().vocab_size();
        common::show_notices(adapter.notices());
        let net = SuperNet::from_adapter(pretrained.model, &adapter)?;
        let resized = net.model().config().vocab_size() != before;
        let own = common::tokenizer_of(folder)?.filter(|_| resized);
        return Model::from_supernet(&net, &[], plan(args)?.unwrap_or_default())?
            .with_n_threads(args.threads)?
            .with_tokenizer(own.as_ref().unwrap_or(&path));
    }
    let model = Model::open(&path, &ModelOptions::default().with_n_threads(args.threads))?;
    common::show_notices(&model.notices());
    match plan(args)? {
        Some(plan) => model.with_format(plan),
        None => Ok(model),
    }
}

/// Returns the formats that the arguments ask for, if they ask for any.
fn plan(args: &Args) -> Result<Option<FormatPlan>> {
    let [format, embedding] = [&args.format, &args.embedding].map(Option::as_deref);
    common::format::plan(format, embedding, args.group_size as usize)
}

fn run(args: &Args) -> Result<()> {
    settings(args, Vec::new()).sample.validate()?;
    let prompt = args
        .prompt
        .as_deref()
        .unwrap_or(PROMPT)
        .replace("\\n", "\n");
    if let Some(device) = &args.device {
        return run_on_device(args, device, &prompt);
    }
    let started = Instant::now();
    let model = open(args)?;
    let opened = started.elapsed();
    if let Some(path) = &args.save {
        model.save(path, args.overwrite)?;
        eprintln!(
            "{}: {:.1} MB of weights",
            path.display(),
            model.bytes() as f64 / 1e6
        );
        if args.prompt.is_none() && !args.chat {
            return Ok(());
        }
    }
    let Some(tokenizer) = model.tokenizer() else {
        let reason = "the model has no tokenizer".to_string();
        return Err(Error::InvalidState {
            what: "generating",
            reason,
        });
    };
    let chat = args.chat.then(|| chat_template(args)).transpose()?;
    let ids = tokenizer.encode_prompt(&prompt)?;
    let cache = if args.half_cache {
        CacheFormat::F16
    } else {
        CacheFormat::F32
    };
    let config = SessionConfig::default()
        .with_cache(cache)
        .with_activations(args.inputs.into());
    let mut session = Session::new(&model, &config)?;
    if let Some(subnet) = &args.subnet {
        session.set_subnet_named(subnet)?;
    }
    if let Some(draft) = &args.draft {
        let draft = draft_session(args, &model, draft, &config)?;
        session.set_draft(Some(draft), args.draft_tokens)?;
    }
    eprintln!(
        "opened in {:.1} ms: {:.1} MB of weights, {} threads",
        1e3 * opened.as_secs_f64(),
        model.bytes() as f64 / 1e6,
        model.n_threads()
    );
    if let Some(template) = chat {
        return converse(args, &template, &mut session);
    }
    let config = settings(args, model.stop_ids().to_vec());
    show(&prompt, ids.len(), tokenizer, |on_token| {
        session.generate(&ids, &config, on_token)
    })?;
    if args.draft.is_some() {
        let [proposed, drawn] = session.draft_counts();
        eprintln!("draft: {proposed} tokens proposed, {drawn} of them right");
    }
    Ok(())
}

/// Returns the session of a draft: on a subnet of the model, or on another model.
fn draft_session(
    args: &Args,
    model: &Model,
    name: &str,
    config: &SessionConfig,
) -> Result<Session> {
    if model.subnets().iter().any(|subnet| subnet.name == name) {
        let mut session = Session::new(model, config)?;
        session.set_subnet_named(name)?;
        return Ok(session);
    }
    if !std::path::Path::new(name).exists() {
        let expected = "the name of a subnet of the model, or a bundle or folder that exists";
        return Err(Error::argument("draft", name, expected));
    }
    let options = ModelOptions::default().with_n_threads(args.threads);
    let draft = Model::open(name, &options)?;
    common::show_notices(&draft.notices());
    Session::new(&draft, config)
}

fn main() {
    common::exit_on_error(run(&common::parse()));
}
