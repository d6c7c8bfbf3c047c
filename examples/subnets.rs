//! Evaluates every subnet of a space on a bundle that holds a supernet, and writes a table: the loss
//! on the answers of some records, and the active weights, multiply-accumulates and bytes.
//!
//! ```text
//! cargo run --release --example subnets -- --model supernet.elora --data problems.jsonl \
//!     --space space.json --out subnets.csv
//! ```
//!
//! The space may be coarser than that of the model: a group stands for all groups of the model of its
//! kind whose first layer it has, and its choices are theirs. Groups of the model that the space does
//! not mention keep their largest choice.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::Parser;
use elastic_lora::data::{Sequence, Template, TokenizeOptions, load_records, tokenize_records};
use elastic_lora::progress::Silent;
use elastic_lora::runtime::{Model, ModelOptions, Session, SessionConfig};
use elastic_lora::search::{Evaluation, Exhaustive, StudyConfig};
use elastic_lora::{Error, Result, SearchSpace, SubnetConfig};

/// Evaluate every subnet of a space with the runtime.
#[derive(Parser)]
struct Args {
    /// Bundle with a supernet
    #[arg(long)]
    model: PathBuf,
    /// JSON or JSON Lines file of records
    #[arg(long)]
    data: PathBuf,
    /// Number of records
    #[arg(long, default_value_t = 48)]
    records: usize,
    /// Search space as JSON
    #[arg(long)]
    space: PathBuf,
    /// Table to write: the choices of the groups, and what was measured
    #[arg(long)]
    out: PathBuf,
}

/// Returns the subnet of the model that a subnet of the coarser space stands for.
fn refine(of: &SearchSpace, space: &SearchSpace, subnet: &SubnetConfig) -> Result<SubnetConfig> {
    let mut refined = of.maximal();
    for group in of.groups() {
        let coarse = group.layers().first();
        if let Some(coarse) = coarse.and_then(|layer| space.group_of(group.kind(), layer)) {
            let value = subnet.get(coarse.id()).unwrap_or_default();
            group.index_of(value)?;
            refined.set(group.id(), value);
        }
    }
    Ok(refined)
}

/// Returns loss, active weights, multiply-accumulates per token and bytes.
fn evaluate(model: &Model, sequences: &[Sequence], subnet: &SubnetConfig) -> Result<Vec<f64>> {
    let mut session = Session::new(model, &SessionConfig::default())?;
    session.set_config(subnet)?;
    let (mut sum, mut n) = (0.0f64, 0usize);
    for sequence in sequences {
        session.reset();
        let likelihoods = session.log_likelihoods(&sequence.ids)?;
        for (likelihood, _) in likelihoods
            .iter()
            .zip(sequence.loss_mask.iter().skip(1))
            .filter(|(_, is_target)| **is_target)
        {
            sum -= f64::from(*likelihood);
            n += 1;
        }
    }
    let size = session.active_size()?;
    let counts = [size.params, size.macs_per_token, size.bytes];
    let mut measured = vec![sum / n.max(1) as f64];
    measured.extend(counts.map(|count| count as f64));
    Ok(measured)
}

fn run(args: &Args) -> Result<()> {
    let model = Model::open(&args.model, &ModelOptions::default().with_n_threads(1))?;
    let of = model.space().ok_or_else(|| {
        Error::argument("model", args.model.display(), "a bundle with a supernet")
    })?;
    let text = std::fs::read_to_string(&args.space).map_err(|e| Error::io(&args.space, e))?;
    let space = SearchSpace::from_json(&text)?;
    let tokenizer = model
        .tokenizer()
        .ok_or_else(|| Error::argument("model", args.model.display(), "one with a tokenizer"))?;
    let mut records = load_records(&args.data)?;
    records.truncate(args.records);
    let options = TokenizeOptions::new(model.config().max_position_embeddings());
    let sequences = tokenize_records(&records, Template::auto(None), tokenizer, &options)?;
    let sequences = sequences.sequences;

    let total = space.n_subnets();
    let done = AtomicUsize::new(0);
    let objective = |subnet: &SubnetConfig| {
        let n = done.fetch_add(1, Ordering::Relaxed) + 1;
        if n.is_multiple_of(500) {
            eprintln!("{n} of {total}");
        }
        evaluate(&model, &sequences, &refine(of, &space, subnet)?)
    };
    let outcome = StudyConfig::new(usize::MAX)
        .with_batch(64)
        .init(&space)?
        .run_parallel(&mut Exhaustive::new(&space), objective, &Silent)?;
    let ids = space.groups().iter().map(|group| group.id());
    let mut table = ids.collect::<Vec<_>>().join(",") + ",loss,params,macs_per_token,bytes\n";
    for Evaluation {
        config, objectives, ..
    } in outcome.evaluations()
    {
        let values: Vec<String> = space.values(config)?.iter().map(usize::to_string).collect();
        let [loss, params, macs, bytes] = objectives[..] else {
            continue;
        };
        let _ = writeln!(
            table,
            "{},{loss:.5},{params},{macs},{bytes}",
            values.join(",")
        );
    }
    std::fs::write(&args.out, table).map_err(|e| Error::io(&args.out, e))
}

fn main() {
    if let Err(error) = run(&Args::parse()) {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}
