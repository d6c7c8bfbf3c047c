//! Converts models and adapters between the formats of other tools, without rounding a weight twice
//! unasked.
//!
//! ```text
//! cargo run --release --example convert -- --model merged-int4 --to gguf --out model.gguf
//! ```

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::{Parser, ValueEnum};
use elastic_lora::format::WeightFormat;
use elastic_lora::io::{
    Conversion, DType, FolderOptions, GgufOptions, GgufReport, GgufType, HfConfig, LoraAdapter,
    QuantFormat,
};
use elastic_lora::progress::TerminalProgress;
use elastic_lora::runtime::{FormatPlan, Model, ModelOptions};
use elastic_lora::{Error, Result};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum To {
    /// A file for llama.cpp; with --adapter, a LoRA for llama.cpp
    Gguf,
    /// A Hugging Face folder with plain numbers
    Hf,
    /// A Hugging Face folder with the codes in GPTQ's layout (AutoGPTQ)
    Gptq,
    /// The same in GPTQModel's second layout
    GptqV2,
    /// A Hugging Face folder with the codes in compressed-tensors' layout (vLLM)
    CompressedTensors,
    /// This crate's own file, which is opened without reading it
    Bundle,
}

/// Converts a model to another format.
///
/// The model may be a Hugging Face folder with plain, GPTQ or compressed-tensors weights, a GGUF
/// file, or a bundle. Weights on a grid keep their values: a conversion that would round them again
/// is refused, unless --requantize is given.
#[derive(Parser)]
struct Args {
    /// Model folder, GGUF file or bundle
    #[arg(long)]
    model: PathBuf,
    /// Format to write
    #[arg(long, value_enum)]
    to: To,
    /// File or folder to write
    #[arg(long)]
    out: PathBuf,
    /// Type of the weights. For gguf: f32, f16, bf16, q8_0, q4_0 or q4_1; for hf and bundle: f32,
    /// f16 or bf16. By default weights keep their types
    #[arg(long = "type")]
    kind: Option<GgufType>,
    /// Type of the embedding in a GGUF file, if it is another
    #[arg(long)]
    embedding: Option<GgufType>,
    /// Type of the head in a GGUF file (by default q6_k if the other weights have 4 bits)
    #[arg(long)]
    head: Option<GgufType>,
    /// Convert this PEFT adapter of the model instead of the model itself
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Add this PEFT adapter to the weights of the model that is written (hf or gguf); one weight is
    /// in memory at a time
    #[arg(long, conflicts_with = "adapter")]
    merge: Option<PathBuf>,
    /// Allow rounding weights that are on a grid already
    #[arg(long)]
    requantize: bool,
    /// Name of the model in a GGUF file
    #[arg(long)]
    name: Option<String>,
    /// llama.cpp's name of the tokenizer's splitting rule, if it is not recognized
    #[arg(long)]
    pre_tokenizer: Option<String>,
    /// Replace what is at --out
    #[arg(long)]
    overwrite: bool,
}

/// Returns whether the model is a bundle of this crate: a file that is not GGUF.
fn is_bundle(path: &Path) -> bool {
    let mut start = [0; 4];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut start));
    path.is_file() && read.is_ok() && start != *b"GGUF"
}

fn dtype(kind: GgufType) -> Result<DType> {
    match kind {
        GgufType::F32 => Ok(DType::F32),
        GgufType::F16 => Ok(DType::F16),
        GgufType::Bf16 => Ok(DType::BF16),
        other => Err(Error::InvalidArgument {
            name: "type",
            found: other.to_string(),
            expected: "f32, f16 or bf16".into(),
        }),
    }
}

/// Refuses options that do nothing for the chosen format.
fn check(args: &Args) -> Result<()> {
    let for_gguf = [
        ("--embedding", args.embedding.is_some()),
        ("--head", args.head.is_some()),
        ("--requantize", args.requantize),
        ("--name", args.name.is_some()),
        ("--pre-tokenizer", args.pre_tokenizer.is_some()),
    ];
    let wrong = |option: &str, with: &str| Error::InvalidArgument {
        name: "options",
        found: option.into(),
        expected: format!("no {option} {with}"),
    };
    let model_only = args.to != To::Gguf || args.adapter.is_some();
    if let Some((option, _)) = for_gguf.iter().find(|(_, given)| *given && model_only) {
        return Err(wrong(option, "except for a model with --to gguf"));
    }
    if args.adapter.is_some() && args.to != To::Gguf {
        return Err(wrong("--adapter", "except with --to gguf"));
    }
    if args.merge.is_some() && (args.to == To::Bundle || is_bundle(&args.model)) {
        return Err(wrong(
            "--merge",
            "with a bundle (merge into a folder, and convert that to a bundle)",
        ));
    }
    if args.kind.is_some() && matches!(args.to, To::Gptq | To::GptqV2 | To::CompressedTensors) {
        return Err(wrong("--type", "where codes are kept as they are"));
    }
    Ok(())
}

/// Prints what is not used, or is written in another way than it was read.
fn show_notices(notices: &[String]) {
    for notice in notices {
        eprintln!("notice: {notice}");
    }
}

fn to_gguf(args: &Args) -> Result<GgufReport> {
    if let Some(adapter) = &args.adapter {
        let config = if is_bundle(&args.model) {
            Model::open(&args.model, &ModelOptions::default())?
                .config()
                .clone()
        } else {
            HfConfig::open(&args.model)?
        };
        let adapter = LoraAdapter::open(adapter)?;
        show_notices(adapter.notices());
        let kind = args.kind.unwrap_or(GgufType::F32);
        adapter.write_gguf(&args.out, &config, kind, args.overwrite)?;
        return Ok(GgufReport::default());
    }
    let options = GgufOptions {
        linears: args.kind,
        embedding: args.embedding,
        head: args.head,
        requantize: args.requantize,
        name: args.name.clone(),
        pre_tokenizer: args.pre_tokenizer.clone(),
        overwrite: args.overwrite,
    };
    if is_bundle(&args.model) {
        return Model::open(&args.model, &ModelOptions::default())?.write_gguf(&args.out, &options);
    }
    let merged = merged_adapter(args)?;
    conversion(args, &merged)?.write_gguf(&args.out, &options, &TerminalProgress::new())
}

fn merged_adapter(args: &Args) -> Result<Option<LoraAdapter>> {
    args.merge.as_ref().map(LoraAdapter::open).transpose()
}

fn conversion<'a>(args: &Args, merged: &'a Option<LoraAdapter>) -> Result<Conversion<'a>> {
    let conversion = Conversion::open(&args.model)?;
    match merged {
        Some(adapter) => conversion.with_adapter(adapter),
        None => Ok(conversion),
    }
}

/// Writes a folder, with codes in `format`, or all in plain numbers.
fn to_folder(args: &Args, format: Option<QuantFormat>) -> Result<()> {
    if is_bundle(&args.model) {
        return Err(Error::Unsupported {
            what: format!(
                "{}: a bundle, as a Hugging Face folder",
                args.model.display()
            ),
        });
    }
    let options = FolderOptions {
        dtype: args.kind.map(dtype).transpose()?,
        codes: format,
        overwrite: args.overwrite,
        ..FolderOptions::default()
    };
    let merged = merged_adapter(args)?;
    let written = conversion(args, &merged)?;
    show_notices(&written.write_folder(&args.out, &options, &TerminalProgress::new())?);
    Ok(())
}

fn to_bundle(args: &Args) -> Result<()> {
    let model = Model::open(&args.model, &ModelOptions::default())?;
    show_notices(&model.notices());
    let model = match args.kind.map(dtype).transpose()? {
        None => model,
        Some(DType::F32) => model.with_format(FormatPlan::new(WeightFormat::F32))?,
        Some(DType::F16) => model.with_format(FormatPlan::new(WeightFormat::F16))?,
        Some(_) => model.with_format(FormatPlan::new(WeightFormat::Bf16))?,
    };
    model.save(&args.out, args.overwrite)
}

fn run(args: &Args) -> Result<()> {
    check(args)?;
    let report = match args.to {
        To::Gguf => to_gguf(args)?,
        To::Hf => to_folder(args, None).map(|()| GgufReport::default())?,
        To::Gptq => to_folder(args, Some(QuantFormat::Gptq)).map(|()| GgufReport::default())?,
        To::GptqV2 => to_folder(args, Some(QuantFormat::GptqV2)).map(|()| GgufReport::default())?,
        To::CompressedTensors => {
            let format = Some(QuantFormat::CompressedTensors);
            to_folder(args, format).map(|()| GgufReport::default())?
        }
        To::Bundle => to_bundle(args).map(|()| GgufReport::default())?,
    };
    show_notices(&report.notices);
    let types: Vec<String> = report
        .types
        .iter()
        .map(|(name, count)| format!("{count} {name}"))
        .collect();
    if types.is_empty() {
        eprintln!("{} is written", args.out.display());
    } else {
        eprintln!(
            "{}: {:.1} MB of tensors ({})",
            args.out.display(),
            report.tensor_bytes as f64 / 1e6,
            types.join(", ")
        );
    }
    Ok(())
}

fn main() {
    let args = Args::try_parse().unwrap_or_else(|error| {
        let _ = error.print();
        std::process::exit(i32::from(error.use_stderr()))
    });
    if let Err(error) = run(&args) {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}
