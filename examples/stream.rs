//! Prunes or quantizes a model from files to files, with one block in memory at a time: models that
//! do not fit into memory, and any other.
//!
//! ```text
//! cargo run --release --example stream -- --model llama-7b --method wanda --sparsity 0.5 \
//!     --calibration texts.jsonl --out llama-7b-sparse
//! ```

mod common;

use std::path::{Path, PathBuf};

use clap::{Parser, ValueEnum};
use elastic_lora::calib::{PruneConfig, QuantizeConfig, QuantizeMethod, StreamNeeds, Streaming};
use elastic_lora::data::{
    CalibrationSize, Template, TextTokenizer, calibration_windows, join_documents,
};
use elastic_lora::io::{QuantFormat, model_path};
use elastic_lora::quant::{GridConfig, ScaleDtype};
use elastic_lora::sparsity::{self, OwlConfig, Pattern};
use elastic_lora::{Error, Result};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use common::say;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Method {
    /// Prune the weights of the smallest magnitudes; needs no calibration
    Magnitude,
    /// Prune by Wanda's scores
    Wanda,
    /// Prune by RIA's scores
    Ria,
    /// Prune with SparseGPT
    Sparsegpt,
    /// Round each weight to nearest; needs no calibration
    Nearest,
    /// Quantize with GPTQ; zeros stay zeros
    Gptq,
    /// Prune with SparseGPT and quantize with GPTQ, in one pass
    Joint,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FileFormat {
    Gptq,
    GptqV2,
    CompressedTensors,
}

/// Prunes or quantizes a model of any size into a new folder, one block in memory at a time.
///
/// An interrupted or killed run leaves what is finished in OUT.unfinished. The same command goes on
/// from there, and the folder gets the same bytes.
#[derive(Parser)]
struct Args {
    /// Model folder, GGUF file, or id in the local Hugging Face cache
    #[arg(long)]
    model: PathBuf,
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
    /// What to do
    #[arg(long, value_enum)]
    method: Method,
    /// Fraction of weights to remove, from 0 to 1; not with an N:M pattern
    #[arg(long, default_value_t = 0.5)]
    sparsity: f64,
    /// Pattern of the zeros: unstructured (the fraction is removed from each row), layer (from each
    /// matrix), or N:M (N of M consecutive inputs are kept)
    #[arg(long, default_value = "unstructured")]
    pattern: String,
    /// Let blocks with more outliers keep more of their weights (OWL)
    #[arg(long)]
    owl: bool,
    /// Bits of a quantized weight
    #[arg(long, default_value_t = 4)]
    bits: u8,
    /// Number of weights that share a scale, or `row`
    #[arg(long, default_value = "128")]
    group_size: String,
    /// Grids without zero points
    #[arg(long)]
    symmetric: bool,
    /// Format of a quantized folder
    #[arg(long, value_enum, default_value_t = FileFormat::Gptq)]
    file_format: FileFormat,
    /// File of records or text on which the inputs of the layers are seen, or `random` for random
    /// tokens, which show how long it takes
    #[arg(long)]
    calibration: Option<PathBuf>,
    /// Read the calibration file as plain text
    #[arg(long)]
    plain_text: bool,
    /// Template of the prompts in the calibration file
    #[arg(long, default_value = "auto")]
    template: String,
    /// Number of calibration samples [default: 128, fewer for models of over 40 million weights]
    #[arg(long)]
    calibration_samples: Option<usize>,
    /// Length of a calibration sample in tokens [default: the model's context, at most 2048, less
    /// for models of over 40 million weights]
    #[arg(long)]
    calibration_length: Option<usize>,
    /// Seed of the samples
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Memory that may be used, such as 6G. What would need more is refused beforehand
    #[arg(long)]
    memory: Option<String>,
    /// Size in bytes above which each block gets a file of its own
    #[arg(long, default_value_t = 5_000_000_000)]
    shard_bytes: u64,
    /// Device: flex, or a GPU backend that the build has
    #[arg(long, default_value = "flex")]
    device: String,
    /// Replace what is at --out
    #[arg(long)]
    overwrite: bool,
}

impl Args {
    fn pattern(&self) -> Result<Pattern> {
        Pattern::from_name(&self.pattern, self.sparsity)
    }

    fn pruning(&self) -> Result<Option<PruneConfig>> {
        let method = match self.method {
            Method::Magnitude => sparsity::Method::Magnitude,
            Method::Wanda => sparsity::Method::Wanda,
            Method::Ria => sparsity::Method::Ria,
            Method::Sparsegpt => sparsity::Method::SparseGpt,
            Method::Nearest | Method::Gptq | Method::Joint => return Ok(None),
        };
        let config = PruneConfig::new(method, self.pattern()?);
        Ok(Some(match self.owl {
            true => config.with_owl(OwlConfig::default()),
            false => config,
        }))
    }

    fn quantizing(&self) -> Result<QuantizeConfig> {
        let method = match self.method {
            Method::Gptq => QuantizeMethod::Gptq,
            Method::Joint => QuantizeMethod::SparseGptq(self.pattern()?),
            _ => QuantizeMethod::Nearest,
        };
        let group_size = match self.group_size.as_str() {
            "row" => None,
            size => match size.parse() {
                Ok(size) if size > 0 => Some(size),
                _ => {
                    return Err(argument(
                        "group-size",
                        size,
                        "a number of weights, or `row`",
                    ));
                }
            },
        };
        let grid = GridConfig::new(self.bits)
            .with_group_size(group_size)
            .with_symmetric(self.symmetric)
            .with_scale_dtype(ScaleDtype::F16)
            .with_zero_from_one(self.file_format == FileFormat::Gptq);
        Ok(QuantizeConfig::new(method, grid))
    }

    fn format(&self) -> QuantFormat {
        match self.file_format {
            FileFormat::Gptq => QuantFormat::Gptq,
            FileFormat::GptqV2 => QuantFormat::GptqV2,
            FileFormat::CompressedTensors => QuantFormat::CompressedTensors,
        }
    }
}

fn argument(name: &'static str, found: &str, expected: impl Into<String>) -> Error {
    Error::InvalidArgument {
        name,
        found: found.into(),
        expected: expected.into(),
    }
}

/// Reads a size such as `6G`, `500M` or a number of bytes.
fn bytes_of(text: &str) -> Result<u64> {
    let bad = || {
        argument(
            "memory",
            text,
            "a size such as 6G, 1.5G, 500M or a number of bytes",
        )
    };
    let number = text.trim_end_matches(['B', 'b', 'i']);
    let (number, factor) = match number.chars().last() {
        Some('K' | 'k') => (&number[..number.len() - 1], 1e3),
        Some('M' | 'm') => (&number[..number.len() - 1], 1e6),
        Some('G' | 'g') => (&number[..number.len() - 1], 1e9),
        _ => (number, 1.0),
    };
    let size = number.parse::<f64>().map_err(|_| bad())? * factor;
    match (1.0..1e18).contains(&size) {
        true => Ok(size as u64),
        false => Err(bad()),
    }
}

/// Draws the calibration samples.
fn samples(args: &Args, streaming: &Streaming) -> Result<Vec<Vec<u32>>> {
    let Some(file) = &args.calibration else {
        return Ok(Vec::new());
    };
    let config = streaming.config();
    let linears = config.arch().linears();
    let n_weights = linears
        .iter()
        .map(|layer| layer.d_input * layer.d_output)
        .sum();
    let mut size = CalibrationSize::for_model(n_weights, config.max_position_embeddings());
    size.samples = args.calibration_samples.unwrap_or(size.samples);
    size.seq_len = args.calibration_length.unwrap_or(size.seq_len);
    if file == Path::new("random") {
        let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
        let vocab = config.vocab_size() as u32;
        let mut row = |_| {
            (0..size.seq_len)
                .map(|_| rng.random_range(0..vocab))
                .collect()
        };
        eprintln!(
            "calibration: {} samples of {} random tokens",
            size.samples, size.seq_len
        );
        return Ok((0..size.samples).map(&mut row).collect());
    }
    let folder = model_path(&args.model)?;
    let tokenizer = TextTokenizer::from_dir(&folder)?;
    let template = Template::for_model(&args.template, &folder)?;
    let (mut texts, mut refused) = (Vec::new(), None);
    for record in &common::load_records(file, args.plain_text)? {
        match template.render(record) {
            Ok(rendered) => texts.push(rendered.text),
            Err(error @ Error::Template { .. }) => refused = Some(error),
            Err(error) => return Err(error),
        }
    }
    if let (Some(error), true) = (refused, texts.is_empty()) {
        return Err(error);
    }
    let ids = join_documents(&texts, &tokenizer, false)?;
    let CalibrationSize { samples, seq_len } = size.within(ids.len());
    eprintln!(
        "calibration: {samples} samples of {seq_len} tokens from {}",
        file.display()
    );
    calibration_windows(&ids, samples, seq_len, args.seed)
}

/// Says what the work needs, and refuses what does not fit.
fn check(needs: StreamNeeds, args: &Args) -> Result<()> {
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    eprintln!(
        "needs about {:.1} GB of memory, and {:.1} GB on the disk of {}",
        gigabytes(needs.memory_bytes),
        gigabytes(needs.disk_bytes),
        args.out.display()
    );
    if let Some(limit) = &args.memory
        && bytes_of(limit)? < needs.memory_bytes
    {
        let expected = format!(
            "at least {} bytes for this model and method",
            needs.memory_bytes
        );
        return Err(argument("memory", limit, expected));
    }
    Ok(())
}

fn run(args: &Args) -> Result<()> {
    let pruning = args.pruning()?;
    if args.owl && pruning.is_none() {
        return Err(argument("owl", "given", "a method that prunes alone"));
    }
    let device = common::device(&args.device)?;
    let streaming = Streaming::open(&args.model, &args.out, &device)?
        .with_overwrite(args.overwrite)
        .with_max_shard_bytes(args.shard_bytes);
    common::show_notices(streaming.notices());
    let samples = samples(args, &streaming)?;
    let progress = common::progress();
    match pruning {
        Some(config) => {
            check(streaming.prune_needs(&samples, &config), args)?;
            let layers = streaming.prune(&samples, &config, &progress)?;
            let zeros: usize = layers.iter().map(|layer| layer.zeros).sum();
            let params: usize = layers.iter().map(|layer| layer.params).sum();
            say!(
                "{}: {:.2} % of {params} weights in {} layers are zero",
                args.out.display(),
                100.0 * zeros as f64 / params.max(1) as f64,
                layers.len()
            );
        }
        None => {
            let config = args.quantizing()?;
            check(streaming.quantize_needs(&samples, &config), args)?;
            let n = streaming.quantize(&samples, &config, args.format(), &progress)?;
            say!("{}: {n} layers in {} bits", args.out.display(), args.bits);
        }
    }
    Ok(())
}

fn main() {
    common::exit_on_error(run(&common::parse()));
}
