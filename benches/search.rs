//! Measures the overhead of a search: NSGA-II's ask and tell per subnet, with a population of 100
//! and 200 groups of four choices: `cargo bench --bench search`.
//!
//! Then the whole of a sensitivity search and the last of NSGA-III's generations are timed once.
//!
//! NSGA-II takes turns with random search and with the toy objective. The time of the objective is
//! not included in the other two.

mod common;

use std::time::{Duration, Instant};

use common::{Subject, best, in_turns, median, timed};
use criterion::{Criterion, Throughput};
use elastic_lora::search::{
    Evaluation, NsgaConfig, RandomSearchConfig, Selection, SensitivityConfig,
};
use elastic_lora::space::{Elastic, Group};
use elastic_lora::{Result, SearchSpace, Searcher, SubnetConfig};

const GROUPS: usize = 200;
const POPULATION: usize = 100;
/// Target for the overhead of a search, in microseconds per evaluation.
const TARGET_US: f64 = 1000.0;

fn space() -> Result<SearchSpace> {
    let group = |index| {
        let layers = vec![format!("layer.{index}")];
        Group::of_kind(
            Elastic::Rank,
            format!("group.{index}"),
            layers,
            vec![32, 24, 16, 8],
        )
    };
    SearchSpace::new((0..GROUPS).map(group).collect::<Result<_>>()?)
}

/// Two conflicting objectives: a cost, and a score to which each group contributes differently.
fn objective(config: SubnetConfig) -> Evaluation {
    let (mut score, mut cost) = (0.0, 0.0);
    for (index, (_, choice)) in config.iter().enumerate() {
        let choice = choice as f64;
        cost += choice;
        score += (1 + index * 7 % 11) as f64 / choice;
    }
    Evaluation::new(config, vec![score, cost])
}

/// Returns a measurement of the ask and tell of one generation.
fn generation(mut searcher: impl Searcher) -> impl FnMut() -> Result<Duration> {
    move || {
        let started = Instant::now();
        let asked = searcher.ask(POPULATION);
        let asking = started.elapsed();
        let evaluated: Vec<Evaluation> = asked.into_iter().map(objective).collect();
        Ok(asking + timed(|| searcher.tell(&evaluated))?)
    }
}

fn bench(criterion: &mut Criterion) -> Result<()> {
    let space = space()?;
    let make = || {
        let nsga = NsgaConfig::new().with_population(POPULATION).init(&space)?;
        let configs = vec![space.heuristic(); POPULATION];
        let evaluate = move || {
            let configs = configs.clone();
            timed(|| Ok(configs.into_iter().map(objective).collect::<Vec<_>>()))
        };
        Ok([
            Box::new(generation(nsga)) as Subject,
            Box::new(generation(RandomSearchConfig::new().init(&space)?)),
            Box::new(evaluate),
        ])
    };
    let mut group = criterion.benchmark_group("search");
    group.throughput(Throughput::Elements(POPULATION as u64));
    let measured = in_turns(&mut group, "nsga2", make);
    group.finish();
    if let Some([nsga, random, toy]) = measured {
        let us = |seconds: f64| 1e6 * seconds / POPULATION as f64;
        println!("us per evaluation:                best   median");
        for (name, seconds) in [
            ("NSGA-II", &nsga),
            ("random search", &random),
            ("toy objective", &toy),
        ] {
            println!(
                "{name:<26} {:>10.2} {:>8.2}",
                us(best(seconds)),
                us(median(seconds))
            );
        }
        println!(
            "NSGA-II: {:.1} times random search; {:.3} of the target of {TARGET_US} us",
            median(&nsga) / median(&random),
            us(median(&nsga)) / TARGET_US
        );
    }
    Ok(())
}

/// Returns the overhead of a whole search per evaluation, in microseconds, and its evaluations.
fn whole(mut searcher: impl Searcher, most: usize) -> Result<(f64, usize)> {
    let (mut seconds, mut n) = (0.0, 0);
    while n < most {
        let started = Instant::now();
        let asked = searcher.ask(POPULATION);
        seconds += started.elapsed().as_secs_f64();
        if asked.is_empty() {
            break;
        }
        n += asked.len();
        let evaluated: Vec<Evaluation> = asked.into_iter().map(objective).collect();
        seconds += timed(|| searcher.tell(&evaluated))?.as_secs_f64();
    }
    Ok((1e6 * seconds / n.max(1) as f64, n))
}

fn once() -> Result<()> {
    let space = space()?;
    let selection = Selection::Directions { partitions: 99 };
    let nsga3 = NsgaConfig::new().with_population(POPULATION);
    let nsga3 = nsga3.with_selection(selection).init(&space)?;
    let sensitivity = SensitivityConfig::new().init(&space)?;
    for (name, (us, n)) in [
        ("NSGA-III", whole(nsga3, 3000)?),
        ("sensitivity search", whole(sensitivity, usize::MAX)?),
    ] {
        println!("{name}: {us:.0} us per evaluation of {n}");
    }
    Ok(())
}

fn main() {
    common::main(bench);
    if let Err(error) = once() {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}
