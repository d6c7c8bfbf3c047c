//! Measures the overhead of a search: NSGA-II's ask and tell per subnet, with a population of 100
//! and 200 groups of four choices: `cargo bench --bench search`.
//!
//! NSGA-II takes turns with random search and with the toy objective. The time of the objective is
//! not included in the other two.

mod common;

use std::time::{Duration, Instant};

use common::{Subject, best, in_turns, median, timed};
use criterion::{Criterion, Throughput};
use elastic_lora::search::{Evaluation, NsgaConfig, RandomSearchConfig};
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

fn main() {
    common::main(bench);
}
