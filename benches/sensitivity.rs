//! Compares searches on a space of which every subnet was evaluated once
//! (`tests/fixtures/search`): `cargo bench --bench sensitivity [-- COST]`, with `params` or `bytes` as
//! cost.
//!
//! Prints the hypervolume that each search reaches, relative to that of the whole space, and its
//! evaluations: mean and smallest of ten seeds. Volumes are measured from the loss of the smallest
//! subnet and the cost of the largest.

use std::collections::HashMap;
use std::path::Path;

use elastic_lora::progress::Silent;
use elastic_lora::search::{
    AdditiveModel, FixedList, NsgaConfig, RandomSearchConfig, SearchOutcome, SensitivityConfig,
    StudyConfig, pareto::hypervolume,
};
use elastic_lora::{Error, Result, SearchSpace, Searcher, SubnetConfig};

const SEEDS: u64 = 10;

/// Losses and costs of all subnets.
struct Table {
    space: SearchSpace,
    objectives: HashMap<SubnetConfig, Vec<f64>>,
}

impl Table {
    fn read(cost: &str) -> Result<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/search");
        let read = |name: &str| {
            let path = folder.join(name);
            std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))
        };
        let space = SearchSpace::from_json(&read("space.json")?)?;
        let text = read("subnets.csv")?;
        let mut lines = text.lines();
        let names: Vec<&str> = lines.next().unwrap_or_default().split(',').collect();
        let column = |name: &str| {
            let at = names.iter().position(|known| *known == name);
            at.ok_or_else(|| Error::argument("cost", name, "params or bytes"))
        };
        let (loss, cost) = (column("loss")?, column(cost)?);
        let mut objectives = HashMap::new();
        for line in lines {
            let fields: Vec<f64> = line.split(',').filter_map(|x| x.parse().ok()).collect();
            let values: Vec<usize> = fields[..space.len()].iter().map(|x| *x as usize).collect();
            objectives.insert(
                space.from_values(&values)?,
                vec![fields[loss], fields[cost]],
            );
        }
        Ok(Self { space, objectives })
    }

    fn at(&self, subnet: &SubnetConfig) -> Vec<f64> {
        self.objectives.get(subnet).cloned().unwrap_or_default()
    }

    fn run(&self, searcher: &mut dyn Searcher, n_evals: usize) -> Result<SearchOutcome> {
        StudyConfig::new(n_evals).init(&self.space)?.run(
            searcher,
            |subnet| Ok(self.at(subnet)),
            &Silent,
        )
    }

    fn volume<'a>(&self, points: impl Iterator<Item = &'a Vec<f64>>) -> f64 {
        let points: Vec<&Vec<f64>> = points.collect();
        let reference = [
            self.at(&self.space.minimal())[0],
            self.at(&self.space.maximal())[1],
        ];
        hypervolume(&points, &reference)
    }
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).filter(|one| !one.starts_with('-'));
    let cost = arguments.next_back().unwrap_or_else(|| "params".into());
    let table = Table::read(&cost)?;
    let space = &table.space;
    let all = table.volume(table.objectives.values());
    let n = table.objectives.len();
    println!("{n} subnets in {} groups, cost: {cost}", space.len());
    println!("| search | evaluations | of the space, % | hypervolume, %: mean | smallest |");
    println!("|---|---|---|---|---|");
    let row = |name: &str, runs: &[(f64, usize)]| {
        let mean = |f: &dyn Fn(&(f64, usize)) -> f64| {
            runs.iter().map(f).sum::<f64>() / runs.len().max(1) as f64
        };
        let evaluations = mean(&|run| run.1 as f64);
        let smallest = runs
            .iter()
            .fold(f64::INFINITY, |least, run| least.min(run.0));
        println!(
            "| {name} | {evaluations:.0} | {:.2} | {:.2} | {:.2} |",
            100.0 * evaluations / n as f64,
            100.0 * mean(&|run| run.0) / all,
            100.0 * smallest / all
        );
    };
    let measure = |outcome: SearchOutcome| {
        let evaluations = outcome.evaluations().iter().map(|e| &e.objectives);
        (table.volume(evaluations), outcome.evaluations().len())
    };
    for corrections in [0, 5, 10, 20] {
        let config = SensitivityConfig::new().with_corrections(corrections);
        let mut searcher = config.init(space)?;
        let outcome = table.run(&mut searcher, n)?;
        let n_evals = outcome.evaluations().len();
        // Its answer: what was evaluated, and the subnets that it predicts to be better.
        let front = searcher.front();
        let mut found: Vec<Vec<f64>> = front.iter().map(|one| table.at(&one.0)).collect();
        found.extend(outcome.evaluations().iter().map(|e| e.objectives.clone()));
        let name = format!("sensitivity, at most {corrections} corrections: evaluated");
        row(&name, &[measure(outcome)]);
        let name = format!("the same, and its front of {} subnets", front.len());
        row(&name, &[(table.volume(found.iter()), n_evals)]);
    }
    // Puzzletron: scores from the largest subnet, an exact program, nothing evaluated.
    let losses = AdditiveModel::measure(space, |subnet| Ok(table.at(subnet)[0]))?;
    let costs = AdditiveModel::measure(space, |subnet| Ok(table.at(subnet)[1]))?;
    let program = losses.front(&costs)?;
    let n_scores = 1 + space
        .groups()
        .iter()
        .map(|group| group.choices().len() - 1)
        .sum::<usize>();
    let found: Vec<Vec<f64>> = program.iter().map(|subnet| table.at(subnet)).collect();
    let name = format!("additive scores and knapsack, its {} subnets", found.len());
    row(&name, &[(table.volume(found.iter()), n_scores)]);
    let ten = losses.path(10, |subnet| Ok(table.at(subnet)[1]))?;
    let (volume, _) = measure(table.run(&mut FixedList::new(space, ten)?, n)?);
    row(
        "additive scores and knapsack, ten of them",
        &[(volume, n_scores)],
    );
    type Make<'a> = &'a dyn Fn(u64) -> Result<Box<dyn Searcher>>;
    let nsga = |config: NsgaConfig| Ok(Box::new(config.init(space)?) as Box<dyn Searcher>);
    let default = |seed| nsga(NsgaConfig::new().with_seed(seed));
    let reference = |seed| {
        let config = NsgaConfig::new().with_population(8).with_seed(seed);
        nsga(config.with_initial(Vec::new()).with_mutation(0.02, 3.0))
    };
    let screened = |seed| {
        nsga(
            NsgaConfig::new()
                .with_population(10)
                .with_screening(10)
                .with_seed(seed),
        )
    };
    let random = |seed| {
        let config = RandomSearchConfig::new().with_seed(seed);
        Ok(Box::new(config.init(space)?) as Box<dyn Searcher>)
    };
    let searches: [(&str, Make<'_>); 4] = [
        ("NSGA-II, default", &default),
        (
            "NSGA-II, the reference's settings (population 8)",
            &reference,
        ),
        ("NSGA-II, population 10, screening 10", &screened),
        ("random", &random),
    ];
    for (name, make) in searches {
        for n_evals in [50, 200] {
            let runs: Result<Vec<_>> = (0..SEEDS)
                .map(|seed| Ok(measure(table.run(&mut make(seed)?, n_evals)?)))
                .collect();
            row(name, &runs?);
        }
    }
    Ok(())
}
