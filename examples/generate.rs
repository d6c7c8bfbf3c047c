//! Continues a prompt, token by token.

#[path = "common/mod.rs"]
mod common;

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use elastic_lora::Result;
use elastic_lora::infer::{GenerateConfig, SampleConfig, DeviceSession};

/// Continue a prompt with a model, with or without an adapter; greedy unless a temperature is given.
///
/// Without arguments: the shipped model answers an arithmetic problem.
#[derive(Parser)]
struct Args {
    /// Model folder [default: the shipped model]
    #[arg(long)]
    model: Option<PathBuf>,
    /// PEFT adapter folder, used unmerged
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// The prompt; `\n` is a line break
    #[arg(
        long,
        default_value = "Question: Mia has 23 shells and finds 18 more. How many shells does Mia have now?\\nAnswer:"
    )]
    prompt: String,
    /// New tokens at most
    #[arg(long, default_value_t = 64)]
    max_new_tokens: usize,
    /// 0 is greedy
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Only the k most likely tokens; 0 for all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Only the most likely tokens that together reach this probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Backend: flex, or another that the build has a feature for
    #[arg(long, default_value = "flex")]
    device: String,
}

fn run(args: &Args) -> Result<()> {
    let pretrained = common::open(args.model.as_deref(), args.adapter.as_deref(), &args.device)?;
    let prompt = args.prompt.replace("\\n", "\n");
    let ids = pretrained.tokenizer.encode_prompt(&prompt)?;
    let mut config = GenerateConfig::new(args.max_new_tokens, pretrained.stop_ids());
    config.sample =
        SampleConfig { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed };
    let mut stdout = std::io::stdout();
    let _ = write!(stdout, "{prompt}").and_then(|()| stdout.flush());
    let started = Instant::now();
    let mut first = None;
    let mut so_far = Vec::new();
    let mut shown = 0;
    let output = DeviceSession::new(&pretrained.model).generate(&ids, &config, |token| {
        first.get_or_insert_with(|| started.elapsed());
        so_far.push(token);
        // A token can be a part of a character: what is incomplete waits for the next one.
        if let Ok(text) = pretrained.tokenizer.decode(&so_far)
            && !text.ends_with('\u{FFFD}')
            && text.is_char_boundary(shown)
        {
            let written = write!(stdout, "{}", &text[shown..]).and_then(|()| stdout.flush());
            shown = text.len();
            // Where nobody reads any more (`| head`), there is no more to do.
            return written.is_ok();
        }
        true
    })?;
    common::say!();
    let total = started.elapsed().as_secs_f64();
    let prefill = first.map_or(total, |first| first.as_secs_f64());
    let decoded = output.len().saturating_sub(1);
    eprintln!(
        "prompt: {} tokens in {:.1} ms; generated {} tokens, {:.0} tokens/s",
        ids.len(),
        1000.0 * prefill,
        output.len(),
        decoded as f64 / (total - prefill).max(1e-9)
    );
    Ok(())
}

fn main() {
    common::exit_on_error(run(&common::parse()));
}
