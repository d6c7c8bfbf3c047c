use super::*;
use crate::progress::Silent;
use crate::search::{Exhaustive, Measurement, NsgaConfig, SearchOutcome, StudyConfig};
use crate::space::LayerShape;

fn space(n_groups: usize, choices: &[usize]) -> SearchSpace {
    let layers: Vec<LayerShape> = (0..n_groups)
        .map(|block| LayerShape::new(format!("model.layers.{block}.mlp.up_proj"), 5, 7))
        .collect();
    SearchSpace::per_layer(&layers, choices).unwrap()
}

/// A loss that is no sum: small losses together are worth more than one by one, and neighbours
/// interact. Costs have products of neighbours.
fn objective(space: &SearchSpace, config: &SubnetConfig) -> Result<Vec<f64>> {
    let sizes: Vec<f64> = space.values(config)?.iter().map(|x| *x as f64).collect();
    let (mut damage, mut pairs, mut cost) = (0.0, 0.0, 0.0);
    for (at, size) in sizes.iter().enumerate() {
        damage += (0.2 + (at * 7 % 5) as f64) * (1.0 / size - 1.0 / 32.0);
        cost += size * (8.0 + (at * 3 % 4) as f64);
        if at > 0 {
            pairs += (1.0 / size - 1.0 / 32.0) * (1.0 / sizes[at - 1] - 1.0 / 32.0);
            cost += 0.05 * size * sizes[at - 1];
        }
    }
    Ok(vec![1.0 + damage + damage * damage + 20.0 * pairs, cost])
}

fn volume(space: &SearchSpace, outcome: &SearchOutcome) -> f64 {
    let reference = [
        objective(space, &space.minimal()).unwrap()[0],
        objective(space, &space.maximal()).unwrap()[1],
    ];
    outcome.hypervolumes(&reference).last().copied().unwrap()
}

fn run(space: &SearchSpace, searcher: &mut dyn Searcher) -> SearchOutcome {
    let mut study = StudyConfig::new(100_000).init(space).unwrap();
    let objective = |config: &SubnetConfig| objective(space, config);
    study.run(searcher, objective, &Silent).unwrap()
}

#[test]
fn ten_corrections_find_nearly_the_whole_front() {
    let space = space(7, &[32, 24, 16, 8]);
    let all = volume(&space, &run(&space, &mut Exhaustive::new(&space)));
    let mut searcher = SensitivityConfig::new().init(&space).unwrap();
    let outcome = run(&space, &mut searcher);
    assert_eq!(searcher.n_scored(), 3 + 2 * 7 * 3);
    let n_scored = SensitivityConfig::new().n_scored(&space).unwrap();
    assert_eq!(searcher.n_scored(), n_scored);
    assert!(searcher.n_corrections() <= 10);
    assert!(outcome.evaluations().len() < 60);
    let found = volume(&space, &outcome) / all;
    let nsga = NsgaConfig::new().with_population(20).init(&space).unwrap();
    let mut study = StudyConfig::new(200).init(&space).unwrap();
    let evolved = study
        .run(&mut { nsga }, |c| objective(&space, c), &Silent)
        .unwrap();
    let evolved = volume(&space, &evolved) / all;
    eprintln!("sensitivity {found:.4}, NSGA-II {evolved:.4}");
    assert!(found > 0.97, "{found}");
    // Predictions were near, and better than the sum's.
    assert_eq!(outcome.predicted().len(), searcher.n_corrections());
    for (config, predicted) in outcome.predicted() {
        let measured = &outcome.get(config).unwrap().objectives;
        assert!((predicted[0] - measured[0]).abs() < 0.1 * measured[0]);
        assert!((predicted[1] - measured[1]).abs() < 0.05 * measured[1]);
    }
}

#[test]
fn the_search_stops_when_the_front_is_stable() {
    // Sums are solved by the first round.
    let space = space(6, &[32, 24, 16]);
    let sums = |config: &SubnetConfig| {
        let values = space.values(config)?;
        let weight = |at: usize| 1.0 + (at * 5 % 7) as f64;
        let terms = values.iter().enumerate();
        let loss: f64 = terms.map(|(at, x)| weight(at) / *x as f64).sum();
        Ok(vec![loss, values.iter().sum::<usize>() as f64])
    };
    let config = SensitivityConfig::new().with_corrections(1000);
    let mut searcher = config.with_tolerance(0.01).init(&space).unwrap();
    let mut study = StudyConfig::new(729).init(&space).unwrap();
    let outcome = study.run(&mut searcher, sums, &Silent).unwrap();
    assert_eq!(outcome.stopped(), StopReason::Converged);
    assert!(searcher.n_corrections() < 12);
    assert!(searcher.is_finished() && searcher.ask(3).is_empty());
    let mut none = SensitivityConfig::new()
        .with_corrections(0)
        .init(&space)
        .unwrap();
    let outcome = study.run(&mut none, sums, &Silent).unwrap();
    assert_eq!(outcome.stopped(), StopReason::Budget);
}

#[test]
fn parts_of_the_data_score_as_well() {
    let space = space(6, &[32, 24, 16, 8]);
    let all = volume(&space, &run(&space, &mut Exhaustive::new(&space)));
    let config = SensitivityConfig::new()
        .with_fidelity(0.1)
        .with_corrections(13);
    let mut searcher = config.init(&space).unwrap();
    let mut study = StudyConfig::new(100).init(&space).unwrap();
    let evaluate = |config: &SubnetConfig, fidelity: f64| {
        let mut objectives = objective(&space, config)?;
        // Other data are easier.
        objectives[0] -= 0.3 * (1.0 - fidelity);
        Ok(Measurement::from(objectives))
    };
    let outcome = study.run_at(&mut searcher, evaluate, &Silent).unwrap();
    let n_full = outcome.evaluations().iter().filter(|e| e.is_full()).count();
    assert!(n_full <= 13 && outcome.evaluations().len() > 40);
    assert!(
        (outcome.n_full_evaluations() - n_full as f64 - 0.1 * searcher.n_scored() as f64).abs()
            < 1e-9
    );
    let found = volume(&space, &outcome) / all;
    assert!(found > 0.9, "{found}");
}

#[test]
fn a_goal_is_met_with_few_corrections() {
    let space = space(7, &[32, 24, 16, 8]);
    let all = run(&space, &mut Exhaustive::new(&space));
    let half = objective(&space, &space.maximal()).unwrap()[1] / 2.0;
    for goal in [Goal::ScoreUnder(half), Goal::CostWithin(1.4)] {
        let best = all.best(&goal).unwrap().objectives.clone();
        let config = SensitivityConfig::new().with_goal(goal.clone());
        let mut searcher = config.init(&space).unwrap();
        let outcome = run(&space, &mut searcher);
        let found = outcome.best(&goal).unwrap().objectives.clone();
        assert!(searcher.n_corrections() <= 10);
        let axis = usize::from(matches!(goal, Goal::CostWithin(_)));
        assert!(
            found[axis] <= 1.01 * best[axis],
            "{goal:?}: {found:?} {best:?}"
        );
    }
}

#[test]
fn failures_and_batches_do_no_harm() {
    let space = space(6, &[32, 24, 16]);
    for batch in [1, 4] {
        let config = SensitivityConfig::new().with_batch(batch);
        let mut searcher = config.init(&space).unwrap();
        let mut n = 0;
        let evaluate = |config: &SubnetConfig| {
            n += 1;
            match n % 5 {
                0 => Ok(vec![f64::NAN, f64::NAN]),
                3 => Err(Error::argument("n", n, "another")),
                _ => objective(&space, config),
            }
        };
        let mut study = StudyConfig::new(200).init(&space).unwrap();
        let outcome = study.run(&mut searcher, evaluate, &Silent).unwrap();
        assert!(searcher.n_corrections() > 0);
        assert!(outcome.front().len() > 5);
    }
    // Without a value for the largest subnet, there is nothing to start from.
    let mut searcher = SensitivityConfig::new().init(&space).unwrap();
    let asked = searcher.ask(1000);
    let nothing = |config| Evaluation::new(config, vec![f64::NAN, f64::NAN]);
    let told: Vec<Evaluation> = asked.into_iter().map(nothing).collect();
    searcher.tell(&told).unwrap();
    assert!(searcher.is_finished());
}

#[test]
fn the_state_goes_on_from_json() {
    let space = space(5, &[32, 24, 16]);
    let evaluate = |asked: Vec<SubnetConfig>| -> Vec<Evaluation> {
        let one = |config: SubnetConfig| {
            let objectives = objective(&space, &config).unwrap();
            Evaluation::new(config, objectives)
        };
        asked.into_iter().map(one).collect()
    };
    let mut searcher = SensitivityConfig::new().init(&space).unwrap();
    let half = searcher.ask(10);
    searcher.tell(&evaluate(half)).unwrap();
    let text = serde_json::to_string(&searcher).unwrap();
    let mut copy: Sensitivity = serde_json::from_str(&text).unwrap();
    while !searcher.is_finished() {
        let asked = searcher.ask(7);
        assert_eq!(copy.ask(7), asked);
        searcher.tell(&evaluate(asked.clone())).unwrap();
        copy.tell(&evaluate(asked)).unwrap();
    }
    assert!(copy.is_finished());
}

#[test]
fn settings_are_checked() {
    let space = space(2, &[2, 1]);
    let config = SensitivityConfig::new;
    assert!(config().with_batch(0).init(&space).is_err());
    assert!(config().with_fidelity(0.0).init(&space).is_err());
    assert!(config().with_fidelity(f64::NAN).init(&space).is_err());
    assert!(config().with_tolerance(-1.0).init(&space).is_err());
    let mut searcher = config().init(&space).unwrap();
    let first = searcher.ask(1).remove(0);
    assert!(searcher.tell(&[Evaluation::new(first, vec![1.0])]).is_err());
}

/// A space of which every subnet was evaluated (`tests/fixtures/search`): with ten corrections, the
/// front is worth 99 % of the whole space's hypervolume, for 5 % of its evaluations.
#[test]
fn a_measured_space_is_searched() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/search");
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    let space = SearchSpace::from_json(&read("space.json")).unwrap();
    let table = read("subnets.csv");
    let measured: HashMap<SubnetConfig, Vec<f64>> = table
        .lines()
        .skip(1)
        .map(|line| {
            let fields: Vec<f64> = line.split(',').map(|x| x.parse().unwrap()).collect();
            let (values, found) = fields.split_at(space.len());
            let values: Vec<usize> = values.iter().map(|x| *x as usize).collect();
            (space.from_values(&values).unwrap(), found[..2].to_vec())
        })
        .collect();
    assert_eq!(measured.len() as f64, space.n_subnets());
    let at = |subnet: &SubnetConfig| measured[subnet].clone();
    let reference = [at(&space.minimal())[0], at(&space.maximal())[1]];
    let mut searcher = SensitivityConfig::new().init(&space).unwrap();
    let mut study = StudyConfig::new(1000).init(&space).unwrap();
    let outcome = study.run(&mut searcher, |c| Ok(at(c)), &Silent).unwrap();
    let mut found: Vec<Vec<f64>> = searcher.front().iter().map(|one| at(&one.0)).collect();
    found.extend(outcome.evaluations().iter().map(|e| e.objectives.clone()));
    let all: Vec<&Vec<f64>> = measured.values().collect();
    let share = hypervolume(&found, &reference) / hypervolume(&all, &reference);
    assert!(searcher.n_corrections() <= 10);
    assert!(outcome.evaluations().len() as f64 <= 0.05 * space.n_subnets());
    assert!(share > 0.99, "{share}");
}
