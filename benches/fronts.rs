//! Writes the fronts that NSGA-II finds on ZDT1-4 and 6 and NSGA-III on DTLZ2, with integer genomes:
//! `cargo bench --bench fronts -- FILE.csv [SEEDS]`. `benches/pymoo/compare.py` compares them with
//! pymoo's.
//!
//! The problems are those of Zitzler, Deb and Thiele (2000) and of Deb, Thiele, Laumanns and
//! Zitzler (2002). Each variable has 101 choices from 0 to 1. A line of the file is a problem, a
//! seed, and the objectives of a member of the front.

use std::f64::consts::PI;
use std::fmt::Write as _;

use elastic_lora::progress::Silent;
use elastic_lora::search::{NsgaConfig, Selection, StudyConfig};
use elastic_lora::space::{Elastic, Group};
use elastic_lora::{Error, Result, SearchSpace, SubnetConfig};

/// Number of steps between 0 and 1.
const STEPS: usize = 100;

/// A problem: name, number of variables, population, evaluations, and parts of each axis for
/// directions.
type Problem = (&'static str, usize, usize, usize, Option<usize>);

const PROBLEMS: [Problem; 6] = [
    ("ZDT1", 30, 100, 10_000, None),
    ("ZDT2", 30, 100, 10_000, None),
    ("ZDT3", 30, 100, 10_000, None),
    ("ZDT4", 10, 100, 20_000, None),
    ("ZDT6", 10, 100, 20_000, None),
    ("DTLZ2", 12, 92, 18_400, Some(12)),
];

fn space(n_groups: usize) -> Result<SearchSpace> {
    let group = |index| {
        let layers = vec![format!("layer.{index}")];
        let choices = (1..=STEPS + 1).collect();
        Group::of_kind(Elastic::Rank, format!("x{index:02}"), layers, choices)
    };
    SearchSpace::new((0..n_groups).map(group).collect::<Result<_>>()?)
}

fn value(name: &str, x: &[f64]) -> Vec<f64> {
    if name == "DTLZ2" {
        let g: f64 = 1.0 + x[2..].iter().map(|x| (x - 0.5).powi(2)).sum::<f64>();
        let (a, b) = (x[0] * PI / 2.0, x[1] * PI / 2.0);
        return vec![g * a.cos() * b.cos(), g * a.cos() * b.sin(), g * a.sin()];
    }
    let mean = x[1..].iter().sum::<f64>() / (x.len() - 1) as f64;
    let f = match name {
        "ZDT6" => 1.0 - (-4.0 * x[0]).exp() * (6.0 * PI * x[0]).sin().powi(6),
        _ => x[0],
    };
    let g = match name {
        "ZDT4" => {
            let wave = |x: f64| 10.0 * x - 5.0;
            let term = |x: &f64| 10.0 + wave(*x).powi(2) - 10.0 * (4.0 * PI * wave(*x)).cos();
            1.0 + x[1..].iter().map(term).sum::<f64>()
        }
        "ZDT6" => 1.0 + 9.0 * mean.powf(0.25),
        _ => 1.0 + 9.0 * mean,
    };
    let h = match name {
        "ZDT2" | "ZDT6" => 1.0 - (f / g).powi(2),
        "ZDT3" => 1.0 - (f / g).sqrt() - f / g * (10.0 * PI * f).sin(),
        _ => 1.0 - (f / g).sqrt(),
    };
    vec![f, g * h]
}

/// Appends the front of the last population's size of one search.
fn search(problem: &Problem, seed: u64, text: &mut String) -> Result<()> {
    let (name, n, population, n_evals, partitions) = *problem;
    let space = space(n)?;
    let mut config = NsgaConfig::new()
        .with_population(population)
        .with_initial(Vec::new())
        .with_seed(seed);
    if let Some(partitions) = partitions {
        config = config.with_selection(Selection::Directions { partitions });
    }
    let objective = |subnet: &SubnetConfig| {
        let values = subnet
            .iter()
            .map(|(_, value)| (value - 1) as f64 / STEPS as f64);
        Ok(value(name, &values.collect::<Vec<_>>()))
    };
    let mut searcher = config.init(&space)?;
    StudyConfig::new(n_evals)
        .init(&space)?
        .run(&mut searcher, objective, &Silent)?;
    for objectives in searcher.population() {
        let values: Vec<String> = objectives.iter().map(f64::to_string).collect();
        let _ = writeln!(text, "{name},{seed},{}", values.join(","));
    }
    Ok(())
}

fn main() -> Result<()> {
    let arguments = std::env::args().skip(1).filter(|one| !one.starts_with('-'));
    let arguments: Vec<String> = arguments.collect();
    let Some(path) = arguments.first() else {
        println!("fronts: skipped without a file to write");
        return Ok(());
    };
    let n_seeds = arguments.get(1).and_then(|n| n.parse().ok()).unwrap_or(10);
    let mut text = String::new();
    for problem in &PROBLEMS {
        for seed in 0..n_seeds {
            search(problem, seed, &mut text)?;
        }
    }
    std::fs::write(path, text).map_err(|error| Error::io(path, error))
}
