//! Settings that depend on the arguments alone, and the folder of results.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use elastic_lora::adapter::LoraConfig;
use elastic_lora::calib::ChannelScore;
use elastic_lora::io::atomic::{self, Lock};
use elastic_lora::io::{HfConfig, QuantizationConfig};
use elastic_lora::linalg::Matrix;
use elastic_lora::quant::{GridConfig, ScaleDtype, round_to_nearest};
use elastic_lora::sparsity::Pattern;
use elastic_lora::train::{Checkpointing, TrainConfig};
use elastic_lora::{Error, Result};
use serde_json::{Map, Value};

use crate::target::{self, LATENCY};
use crate::{Args, FileFormat, Method, QaStart, Quantize, SearchCost};

/// Folders that a run creates.
const FOLDERS: [&str; 23] = [
    BLOCKS,
    "lora",
    "shears",
    "sparse-peft",
    "pruned",
    "merged",
    "adapter",
    "lora-dense",
    "lonas",
    "best",
    "smallest",
    "target",
    "lora-adapter",
    "sqft",
    "sqft-adapter",
    "sqft-qa",
    "pruned-rtn",
    "pruned-gptq",
    "sparsegpt-gptq",
    "joint",
    "merged-rtn",
    "merged-gptq",
    "merged-quantized",
];

/// Files that a run creates.
const FILES: [&str; 32] = [
    RUN,
    "report.json",
    "merge_report.json",
    "search_progression.svg",
    "search_progression.csv",
    "search_progression.json",
    "search_front.md",
    "search_hypervolume.svg",
    "search_predicted.svg",
    "adapter_space.json",
    "adapter_subnet.json",
    "adapter_ranks.json",
    "merged_space.json",
    "merged_subnet.json",
    "merged_ranks.json",
    "channel_order.json",
    "best_subnet.json",
    "smallest_subnet.json",
    "target_subnet.json",
    LATENCY,
    "merge_report_quantized.json",
    "sqft-adapter_space.json",
    "sqft-adapter_subnet.json",
    "sqft-adapter_ranks.json",
    "merged-quantized_space.json",
    "merged-quantized_subnet.json",
    "merged-quantized_ranks.json",
    "supernet.elora",
    "sqft-supernet.elora",
    MEASURED,
    "merged.elora",
    "merged-quantized.elora",
];

/// File with the arguments and the inputs of the run that a folder belongs to. It exists from the
/// start of the run.
const RUN: &str = "run.json";

/// Folder of finished blocks of pruning and quantizing, until the run is over.
pub const BLOCKS: &str = "blocks";

/// File of the rows' losses and accuracies, until the run is over.
pub const MEASURED: &str = "measured.json";

/// File that is locked while a run uses a folder.
const LOCK: &str = "run.lock";

/// The folder of results, which no other run uses.
pub struct Claim {
    /// Whether this run made the folder.
    made: bool,
    lock: Lock,
}

/// Checked settings.
pub struct Settings {
    pub pattern: Pattern,
    pub train: TrainConfig,
    /// Score by which channels are sorted, if they are sorted.
    pub order: Option<ChannelScore>,
    /// Quantization grid of the weights.
    pub grid: GridConfig,
    pub out: PathBuf,
}

/// Returns the quantization grid that the arguments select, restricted to zero points that the file
/// format can store.
fn grid(args: &Args) -> Result<GridConfig> {
    let group_size = match args.group_size.as_str() {
        "row" => None,
        size => match size.parse() {
            Ok(size) if size > 0 => Some(size),
            _ => {
                return Err(Error::argument(
                    "group-size",
                    size,
                    "a number of weights, or `row`",
                ));
            }
        },
    };
    let grid = GridConfig::new(args.bits)
        .with_group_size(group_size)
        .with_symmetric(args.symmetric)
        .with_scale_dtype(ScaleDtype::F16)
        .with_zero_from_one(args.file_format == FileFormat::Gptq);
    grid.validate()?;
    if args.quantize == Quantize::Joint && args.qa_start == Some(QaStart::Sparse) {
        let expected =
            "gptq: pruning and rounding in one pass leaves no weights that are pruned alone";
        return Err(Error::argument("qa-start", "sparse", expected));
    }
    Ok(grid)
}

/// Returns the settings of the adapters for a largest rank.
pub fn lora_config(args: &Args, max_rank: usize) -> LoraConfig {
    let lora = LoraConfig::new(max_rank).with_dropout(args.dropout);
    match args.alpha {
        Some(alpha) => lora.with_alpha(alpha),
        None => lora,
    }
}

impl Settings {
    /// Checks everything that can be checked without the model and the data.
    pub fn new(args: &Args) -> Result<Self> {
        let pattern = Pattern::from_name(&args.pattern, args.sparsity)?;
        for (name, value, least) in [
            ("batch", args.batch, 1),
            ("evals", args.evals, 1),
            ("max-len", args.max_len.unwrap_or(2), 2),
            (
                "calibration-samples",
                args.calibration_samples.unwrap_or(1),
                1,
            ),
            (
                "calibration-length",
                args.calibration_length.unwrap_or(1),
                1,
            ),
        ] {
            if value < least {
                return Err(Error::argument(name, value, format!("at least {least}")));
            }
        }
        for (name, shares) in [("widths", &args.widths), ("heads", &args.heads)] {
            if let Some(share) = shares
                .iter()
                .find(|share| !(**share > 0.0 && **share <= 1.0))
            {
                return Err(Error::argument(name, share, "shares over 0 and at most 1"));
            }
        }
        target::check(args.method, args.target)?;
        if matches!(args.cost, SearchCost::Prefill | SearchCost::Decode)
            && args.method != Method::Lonas
        {
            let expected = "another cost: ranks hardly change the time; --method lonas does";
            return Err(Error::argument(
                "cost",
                format!("{:?}", args.cost),
                expected,
            ));
        }
        if args.front == Some(0) {
            return Err(Error::argument("front", 0, "at least 1"));
        }
        if !(args.scoring_share > 0.0 && args.scoring_share <= 1.0) {
            let expected = "above 0 and at most 1";
            return Err(Error::argument(
                "scoring-share",
                args.scoring_share,
                expected,
            ));
        }
        if args.multiple == 0 {
            return Err(Error::argument("multiple", 0, "at least 1"));
        }
        let order = match args.order.as_str() {
            "none" => None,
            name => Some(name.parse()?),
        };
        if args.ranks.contains(&0) {
            return Err(Error::argument(
                "ranks",
                format!("{:?}", args.ranks),
                "each at least 1",
            ));
        }
        lora_config(args, args.ranks.iter().copied().max().unwrap_or(1)).validate()?;
        let mut train = TrainConfig::new(args.steps);
        train.lr = args.lr;
        train.warmup = (args.steps / 20).min(100);
        train.seed = args.seed;
        if args.checkpointing {
            train.checkpointing = Checkpointing::Blocks;
        }
        train.eval_every = (args.steps / 4).max(1);
        train.checkpoint_every = (args.steps / 4).max(1);
        train.validate()?;
        let out = args
            .out
            .clone()
            .unwrap_or_else(|| PathBuf::from("target/compress"));
        Lock::check_free(&out.join(LOCK), &out)?;
        check_out(args, &out)?;
        Ok(Self {
            pattern,
            train,
            order,
            grid: grid(args)?,
            out,
        })
    }

    /// Checks that the file format can hold the integers of every layer of a model.
    pub fn check_format(&self, args: &Args, config: &HfConfig) -> Result<()> {
        let mut shapes = BTreeSet::new();
        for layer in config.arch().linears() {
            if !shapes.insert([layer.d_output, layer.d_input]) {
                continue;
            }
            if let Some(size) = self.grid.group_size.filter(|size| *size > layer.d_input) {
                let expected = format!(
                    "at most the {} inputs of `{}`, or `row`",
                    layer.d_input, layer.name
                );
                return Err(Error::argument("group-size", size, expected));
            }
            let rounded = round_to_nearest(
                &Matrix::zeros(layer.d_output, layer.d_input),
                &self.grid,
                None,
            )?;
            let layers = BTreeMap::from([(layer.name.clone(), rounded)]);
            let name = layer.name.clone();
            let format =
                QuantizationConfig::for_layers(args.file_format.into(), &layers, &[layer])?;
            format.layer_tensors(&name, &layers[&name])?;
        }
        Ok(())
    }

    /// Prepares the folder of results for a new run, or for a resumed run if `identity` and the
    /// arguments equal those of the original run.
    pub fn prepare_out(&self, args: &Args, identity: Map<String, Value>) -> Result<Claim> {
        let out = &self.out;
        let made = !out.exists();
        std::fs::create_dir_all(out).map_err(|e| Error::io(out, e))?;
        let lock = Lock::acquire(out.join(LOCK), out)?;
        let claim = Claim { made, lock };
        // Another run may have written to it since it was looked at.
        match check_out(args, out).and_then(|()| self.begin(args, identity)) {
            Ok(()) => Ok(claim),
            Err(error) => {
                self.release(claim);
                Err(error)
            }
        }
    }

    /// Writes what the run is, or compares it. A run that is killed at any moment of this leaves a
    /// folder without results, or one with the former run's `run.json`.
    fn begin(&self, args: &Args, identity: Map<String, Value>) -> Result<()> {
        let out = &self.out;
        let file = out.join(RUN);
        let arguments = serde_json::to_value(args).map_err(|e| Error::json(&file, e))?;
        let mut run = Map::from_iter([("arguments".to_string(), arguments)]);
        run.extend(identity);
        if args.resume && file.exists() {
            let text = std::fs::read_to_string(&file).map_err(|e| Error::io(&file, e))?;
            let found: Map<String, Value> =
                serde_json::from_str(&text).map_err(|e| Error::json(&file, e))?;
            same(&file, &run, &found)?;
            return sweep(out);
        }
        remove_results(out, &[RUN])?;
        atomic::write_json(&file, &run)
    }

    /// Gives the folder free, and removes it if the run has made it and it is empty.
    fn release(&self, claim: Claim) {
        let Claim { made, lock } = claim;
        drop(lock);
        if made {
            let _ = std::fs::remove_dir(&self.out);
        }
    }

    /// Cleans up after a run that failed before its first checkpoint and its first finished block,
    /// since it cannot be resumed.
    pub fn discard_unless_resumable(&self, claim: Claim) {
        let checkpoint = |name: &&str| self.out.join(name).join("checkpoint").is_dir();
        if FOLDERS.iter().any(checkpoint) || self.out.join(BLOCKS).is_dir() {
            eprintln!(
                "what is finished is in {}; the same command with --resume goes on from there",
                self.out.display()
            );
            return;
        }
        // The original error is reported, not one from cleaning up.
        let _ = remove_results(&self.out, &[]);
        self.release(claim);
    }
}

/// Checks that results may be written to `out`.
fn check_out(args: &Args, out: &Path) -> Result<()> {
    let refused = |expected: &str| Err(Error::argument("out", out.display(), expected));
    // A run that was killed before it wrote `run.json` leaves its lock and a temporary file.
    let is_start = |name: &std::ffi::OsStr| {
        let name = name.to_string_lossy();
        name == LOCK
            || name
                .strip_prefix('.')
                .is_some_and(|name| name.starts_with(RUN))
    };
    let occupied = match std::fs::read_dir(out) {
        Ok(entries) => entries.flatten().any(|entry| !is_start(&entry.file_name())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => false,
        Err(e) => return Err(Error::io(out, e)),
    };
    let ours = out.join(RUN).is_file();
    if occupied && args.resume && !ours {
        return refused("there is something in it, but no run to go on with (run.json)");
    }
    if occupied && args.out.is_some() && !args.resume {
        if !args.overwrite {
            return refused("a new or empty folder is needed, or --resume or --overwrite");
        }
        if !ours {
            return refused(
                "there is something in it that is not the results of a former run (no run.json)",
            );
        }
    }
    if let (Some(model), Ok(out_path)) = (&args.model, out.canonicalize()) {
        let model = elastic_lora::io::model_path(model)?;
        let model = model.canonicalize().map_err(|e| Error::io(&model, e))?;
        if model.starts_with(&out_path) {
            return refused("--model lies in it and would be replaced");
        }
    }
    Ok(())
}

/// Removes files that a killed run had not finished writing, and its locks. A folder that it was
/// about to replace is kept for whoever writes it next.
fn sweep(out: &Path) -> Result<()> {
    let names = FOLDERS
        .iter()
        .chain(&FILES)
        .chain(&["checkpoint", "losses.csv", "old"]);
    let names: Vec<String> = names.map(|name| format!(".{name}")).collect();
    let is_left = |found: &str| {
        names.iter().any(|name| {
            let rest = found.strip_prefix(name.as_str());
            rest.is_some_and(|rest| {
                rest == ".lock" || (rest.starts_with('-') && rest.ends_with(".tmp"))
            })
        })
    };
    for folder in [out.to_path_buf()]
        .into_iter()
        .chain(FOLDERS.map(|name| out.join(name)))
    {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let (name, path) = (entry.file_name(), entry.path());
            if !is_left(&name.to_string_lossy()) || path.join("old").is_dir() {
                continue;
            }
            let result = if path.is_dir() {
                std::fs::remove_dir_all(&path)
            } else {
                std::fs::remove_file(&path)
            };
            result.map_err(|e| Error::io(&path, e))?;
        }
    }
    Ok(())
}

/// Removes the files and folders that a run creates but for those in `kept`, and nothing else.
fn remove_results(out: &Path, kept: &[&str]) -> Result<()> {
    sweep(out)?;
    let gone = |path: PathBuf, result: std::io::Result<()>| match result {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, e)),
        _ => Ok(()),
    };
    for name in FOLDERS {
        let path = out.join(name);
        let result = std::fs::remove_dir_all(&path);
        gone(path, result)?;
    }
    // `run.json` comes last: without it the rest would be nobody's.
    for name in FILES.iter().rev().filter(|name| !kept.contains(name)) {
        let path = out.join(name);
        let result = std::fs::remove_file(&path);
        gone(path, result)?;
    }
    Ok(())
}

/// Checks that a run may be resumed. The error names the first difference.
fn same(file: &Path, expected: &Map<String, Value>, found: &Map<String, Value>) -> Result<()> {
    for (name, expected) in expected {
        let found = found.get(name).unwrap_or(&Value::Null);
        match (expected, found) {
            (Value::Object(expected), Value::Object(found)) if name == "arguments" => {
                for (argument, expected) in expected {
                    let found = found.get(argument).unwrap_or(&Value::Null);
                    differ(
                        file,
                        &format!("--{}", argument.replace('_', "-")),
                        expected,
                        found,
                    )?;
                }
            }
            _ => differ(file, name, expected, found)?,
        }
    }
    Ok(())
}

fn differ(file: &Path, field: &str, expected: &Value, found: &Value) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::CheckpointMismatch {
        path: file.to_path_buf(),
        field: field.to_string(),
        expected: expected.to_string(),
        found: found.to_string(),
    })
}
