//! Shows what a model or an adapter is, and what of it would be refused.

mod report;

use std::path::{Path, PathBuf};

use clap::Parser;
use elastic_lora::Result;
use report::Report;

/// Show what a model or an adapter is: family, sizes, how each weight is stored, sparsity and bits
/// per weight, tokenizer, chat template, and what of it would be refused and why.
///
/// Weights are read one tensor at a time. A part that is refused does not hide the others: of a
/// model of an unknown family, the tensors are listed.
#[derive(Parser)]
struct Args {
    /// Model folder, GGUF file, bundle, or the id of a repository in the local Hugging Face cache
    #[arg(long, required_unless_present = "adapter")]
    model: Option<PathBuf>,
    /// PEFT adapter folder, or its id
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Read headers alone; zeros are not counted
    #[arg(long)]
    no_weights: bool,
}

fn inspect(args: &Args) -> Result<Report> {
    let mut report = Report::default();
    let config = match &args.model {
        Some(model) => report.add_model(model, !args.no_weights)?,
        None => None,
    };
    if let Some(adapter) = &args.adapter {
        report.add_adapter(adapter, config.as_ref())?;
    }
    Ok(report)
}

fn main() {
    let args = Args::try_parse().unwrap_or_else(|error| {
        let _ = error.print();
        std::process::exit(i32::from(error.use_stderr()))
    });
    let report = inspect(&args).unwrap_or_else(|error| {
        eprintln!("error: {error}");
        std::process::exit(1)
    });
    use std::io::Write;
    let text = if args.json {
        report.to_json()
    } else {
        report.to_string()
    };
    // A closed pipe (`| head`) is no error.
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Number of bytes of a file, or of the files in a folder. Links are followed.
fn bytes_of(path: &Path) -> u64 {
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |meta| meta.len());
    match std::fs::read_dir(path) {
        Ok(entries) => entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.is_file())
            .map(|path| size(&path))
            .sum(),
        Err(_) => size(path),
    }
}
