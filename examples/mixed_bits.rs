//! Stores the layers of a model in different numbers of bits: the best allocation under a budget of
//! bytes, found by sensitivity search.
//!
//! ```text
//! cargo run --release --no-default-features --example mixed_bits -- --bits 8,4,3,2 --as-uniform 3
//! ```

use std::path::{Path, PathBuf};

use clap::Parser;
use elastic_lora::data::{
    Sequence, Template, TokenizeOptions, load_records, load_text, tokenize_records,
};
use elastic_lora::progress::Silent;
use elastic_lora::runtime::{MixedStorage, Model, ModelOptions, Session, SessionConfig};
use elastic_lora::search::{Goal, SensitivityConfig, StudyConfig};
use elastic_lora::space::{Elastic, Group};
use elastic_lora::{Error, Result, SearchSpace, SubnetConfig};

/// Store the layers of a model in different numbers of bits and densities, under a budget of bytes.
///
/// Scores each choice of each layer alone, solves for the budget, and corrects the solution by a few
/// evaluations. Half of the data is for the search, and half for the table.
#[derive(Parser)]
struct Args {
    /// Model folder, GGUF file or bundle with float weights [default: the bundled model]
    #[arg(long)]
    model: Option<PathBuf>,
    /// File of records; the loss is that of their answers [default: the bundled problems]
    #[arg(long, conflicts_with = "text")]
    data: Option<PathBuf>,
    /// Text file; the loss is that of all tokens
    #[arg(long)]
    text: Option<PathBuf>,
    /// Number of records, or of windows of --window tokens
    #[arg(long, default_value_t = 64)]
    samples: usize,
    /// Length of a window of --text in tokens
    #[arg(long, default_value_t = 256)]
    window: usize,
    /// Bits that each layer may have: 2, 3, 4, 8 or 16
    #[arg(long, value_delimiter = ',', default_value = "8,4,3,2")]
    bits: Vec<usize>,
    /// Percentages of its weights that each layer may keep
    #[arg(long, value_delimiter = ',', default_value = "100")]
    densities: Vec<usize>,
    /// Columns that share a scale
    #[arg(long, default_value_t = 32)]
    group_size: usize,
    /// Budget: the bytes of all layers in this many bits
    #[arg(long, default_value_t = 3)]
    as_uniform: usize,
    /// Maximum number of evaluations after the scores
    #[arg(long, default_value_t = 40)]
    corrections: usize,
    /// Bundle to write
    #[arg(long)]
    out: Option<PathBuf>,
}

/// The groups of bits and densities: one of each for every layer.
fn space(args: &Args, model: &Model) -> Result<SearchSpace> {
    let mut groups = Vec::new();
    for layer in model.layers() {
        if !layer.name.contains(".layers.") {
            continue;
        }
        for (kind, choices) in [
            (Elastic::Bits, &args.bits),
            (Elastic::Density, &args.densities),
        ] {
            if kind == Elastic::Bits || choices.len() > 1 {
                let id = format!("{}.{kind:?}", layer.name).to_lowercase();
                let layers = vec![layer.name.clone()];
                groups.push(Group::of_kind(kind, id, layers, choices.clone())?);
            }
        }
    }
    SearchSpace::new(groups)
}

fn sequences(args: &Args, model: &Model) -> Result<Vec<Sequence>> {
    let tokenizer = model
        .tokenizer()
        .ok_or_else(|| Error::argument("model", "no tokenizer", "a model with a tokenizer"))?;
    if let Some(text) = &args.text {
        let ids = tokenizer.encode(&load_text(text)?, false)?;
        let windows = ids.chunks_exact(args.window.max(2)).take(args.samples);
        return Ok(windows
            .map(|ids| Sequence::unmasked(ids.to_vec()))
            .collect());
    }
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/arithmetic-problems.jsonl");
    let mut records = load_records(args.data.as_ref().unwrap_or(&default))?;
    records.truncate(args.samples);
    let options = TokenizeOptions::new(model.config().max_position_embeddings().min(2048));
    let set = tokenize_records(&records, Template::auto(None), tokenizer, &options)?;
    Ok(set.sequences)
}

fn loss(model: &Model, sequences: &[Sequence]) -> Result<f64> {
    let mut session = Session::new(model, &SessionConfig::default())?;
    let (mut sum, mut n) = (0.0, 0usize);
    for sequence in sequences {
        session.reset();
        let likelihoods = session.log_likelihoods(&sequence.ids)?;
        let targets = likelihoods.iter().zip(sequence.loss_mask.iter().skip(1));
        for (likelihood, _) in targets.filter(|(_, is_target)| **is_target) {
            sum -= f64::from(*likelihood);
            n += 1;
        }
    }
    Ok(sum / n.max(1) as f64)
}

fn run(args: &Args) -> Result<()> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/arithmetic-llama");
    let path = args.model.as_ref().unwrap_or(&default);
    let model = Model::open(path, &ModelOptions::default())?;
    let space = space(args, &model)?;
    let storage = MixedStorage::new(&model, &space, Some(args.group_size))?;
    let all = sequences(args, &model)?;
    let (searched, held_out) = all.split_at(all.len() / 2);
    let bytes = |subnet: &SubnetConfig| Ok::<_, Error>(storage.model(subnet)?.bytes());
    let uniform = |bits: usize| {
        let mut subnet = space.maximal();
        for group in space.groups_of_kind(Elastic::Bits) {
            subnet.set(group.id(), bits);
        }
        subnet
    };
    println!("as given: loss {:.4}", loss(&model, held_out)?);
    let mut of_uniform = Vec::new();
    for bits in &args.bits {
        let subnet = uniform(*bits);
        let found = loss(&storage.model(&subnet)?, held_out)?;
        println!("{bits} bits: loss {found:.4}, {} bytes", bytes(&subnet)?);
        of_uniform.push((*bits, found));
    }
    let budget = bytes(&uniform(args.as_uniform))? as f64;
    let goal = Goal::ScoreUnder(budget);
    let config = SensitivityConfig::new()
        .with_corrections(args.corrections)
        .with_goal(goal.clone());
    let mut searcher = config.init(&space)?;
    let objective = |subnet: &SubnetConfig| {
        let stored = storage.model(subnet)?;
        Ok(vec![loss(&stored, searched)?, stored.bytes() as f64])
    };
    let outcome =
        StudyConfig::new(usize::MAX)
            .init(&space)?
            .run(&mut searcher, objective, &Silent)?;
    let Some(best) = outcome.best(&goal) else {
        let expected = "a number of bits for which the smallest choices leave room";
        return Err(Error::argument("as-uniform", args.as_uniform, expected));
    };
    let stored = storage.model(&best.config)?;
    let found = loss(&stored, held_out)?;
    println!(
        "mixed: loss {found:.4}, {} bytes, after {} scores and {} corrections",
        stored.bytes(),
        searcher.n_scored(),
        searcher.n_corrections()
    );
    let at = |bits: usize| of_uniform.iter().find(|row| row.0 == bits).map(|row| row.1);
    if let (Some(here), Some(above)) = (at(args.as_uniform), at(args.as_uniform + 1)) {
        let share = 100.0 * (here - found) / (here - above);
        println!(
            "of the way from {} to {} bits: {share:.0} %",
            args.as_uniform,
            args.as_uniform + 1
        );
    }
    for group in space.groups() {
        println!(
            "{}: {}",
            group.id(),
            best.config.get(group.id()).unwrap_or(0)
        );
    }
    match &args.out {
        Some(out) => stored.save(out, true),
        None => Ok(()),
    }
}

fn main() {
    if let Err(error) = run(&Args::parse()) {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}
