use std::collections::HashSet;
use std::f64::consts::PI;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::pareto::*;
use super::*;
use crate::error::Error;
use crate::progress::Silent;
use crate::space::{LayerShape, SearchSpace};

fn space(n_groups: usize, choices: &[usize]) -> SearchSpace {
    let layers: Vec<LayerShape> = (0..n_groups)
        .map(|block| LayerShape::new(format!("model.layers.{block}.mlp.up_proj"), 5, 7))
        .collect();
    SearchSpace::per_layer(&layers, choices).unwrap()
}

/// A toy loss and cost: layers differ in the benefit and the cost of rank, and neighbours interact.
fn toy(space: &SearchSpace, config: &SubnetConfig) -> Result<Vec<f64>> {
    let ranks: Vec<f64> = space
        .values(config)?
        .into_iter()
        .map(|rank| rank as f64)
        .collect();
    let (mut loss, mut cost) = (2.0, 0.0);
    for (at, rank) in ranks.iter().enumerate() {
        loss += (1.0 + (at * 7 % 5) as f64) / (rank + 4.0);
        cost += rank * (1.0 + (at * 3 % 4) as f64);
        if at > 0 {
            loss += 0.0002 * (rank - ranks[at - 1]).abs();
        }
    }
    Ok(vec![loss, cost * 1e4])
}

fn run_toy(space: &SearchSpace, searcher: &mut dyn Searcher, n: usize) -> SearchOutcome {
    StudyConfig::new(n)
        .init(space)
        .unwrap()
        .run(searcher, |config| toy(space, config), &Silent)
        .unwrap()
}

fn objectives(outcome: &SearchOutcome) -> Vec<Vec<f64>> {
    outcome
        .evaluations()
        .iter()
        .map(|evaluation| evaluation.objectives.clone())
        .collect()
}

fn without_times(outcome: &SearchOutcome) -> Vec<(SubnetConfig, Vec<f64>)> {
    outcome
        .evaluations()
        .iter()
        .map(|e| (e.config.clone(), e.objectives.clone()))
        .collect()
}

/// Number of searchers that [`searchers`] returns.
const SEARCHERS: usize = 7;

fn selecting(space: &SearchSpace, seed: u64, selection: Selection) -> Nsga {
    NsgaConfig::new()
        .with_population(10)
        .with_selection(selection)
        .with_seed(seed)
        .init(space)
        .unwrap()
}

fn searchers(space: &SearchSpace, seed: u64) -> Vec<Box<dyn Searcher>> {
    vec![
        Box::new(
            RandomSearchConfig::new()
                .with_seed(seed)
                .with_initial(vec![space.maximal()])
                .init(space)
                .unwrap(),
        ),
        Box::new(
            HillClimbingConfig::new()
                .with_seed(seed)
                .init(space)
                .unwrap(),
        ),
        Box::new(
            NsgaConfig::new()
                .with_population(9)
                .with_seed(seed)
                .init(space)
                .unwrap(),
        ),
        Box::new(
            NsgaConfig::new()
                .with_population(10)
                .with_screening(6)
                .with_seed(seed)
                .init(space)
                .unwrap(),
        ),
        Box::new(selecting(
            space,
            seed,
            Selection::ReferencePoints {
                points: vec![vec![2.0, 1e6], vec![3.0, 0.0]],
                epsilon: 0.01,
            },
        )),
        Box::new(selecting(
            space,
            seed,
            Selection::Directions { partitions: 9 },
        )),
        Box::new(selecting(
            space,
            seed,
            Selection::Goal(Goal::CostWithin(4.0)),
        )),
    ]
}

// --- pareto ---

#[test]
fn dominance() {
    assert!(dominates(&[1.0, 2.0], &[1.0, 3.0]));
    assert!(!dominates(&[1.0, 2.0], &[1.0, 2.0]));
    assert!(!dominates(&[0.0, 3.0], &[1.0, 2.0]));
    assert!(dominates(&[1.0, 2.0], &[f64::NAN, 2.0]));
    assert!(!dominates(&[f64::NAN, 1.0], &[5.0, 2.0]));
    assert!(!dominates(&[f64::NAN, 1.0], &[f64::INFINITY, 1.0]));
}

#[test]
fn sort_agrees_with_peeling() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for n_objectives in 1..4 {
        let points: Vec<Vec<f64>> = (0..60)
            .map(|_| {
                (0..n_objectives)
                    .map(|_| rng.random_range(0..9) as f64)
                    .collect()
            })
            .collect();
        let fronts = fast_non_dominated_sort(&points);
        let mut left: Vec<usize> = (0..points.len()).collect();
        for front in &fronts {
            let remaining: Vec<&Vec<f64>> = left.iter().map(|&i| &points[i]).collect();
            let expected: Vec<usize> = non_dominated(&remaining)
                .into_iter()
                .map(|at| left[at])
                .collect();
            assert_eq!(*front, expected);
            left.retain(|i| !front.contains(i));
        }
        assert!(left.is_empty());
    }
    assert!(fast_non_dominated_sort::<Vec<f64>>(&[]).is_empty());
}

#[test]
fn crowding() {
    let front = [[0.0, 10.0], [1.0, 6.0], [4.0, 5.0], [5.0, 0.0]];
    let distance = crowding_distance(&front);
    assert!(distance[0].is_infinite() && distance[3].is_infinite());
    assert!((distance[1] - (4.0 / 5.0 + 5.0 / 10.0)).abs() < 1e-12);
    assert!((distance[2] - (4.0 / 5.0 + 6.0 / 10.0)).abs() < 1e-12);
    assert_eq!(crowding_distance(&[[1.0, 1.0]; 4]), [0.0; 4]);
    let odd = [
        [0.0, f64::INFINITY],
        [1.0, f64::NAN],
        [2.0, 3.0],
        [3.0, 2.0],
    ];
    assert!(
        crowding_distance(&odd)
            .iter()
            .all(|distance| !distance.is_nan())
    );
}

#[test]
fn hypervolume_against_counting() {
    assert_eq!(
        hypervolume(
            &[[1.0, 2.0], [2.0, 1.0], [2.0, 2.0], [5.0, 0.0]],
            &[4.0, 4.0]
        ),
        8.0
    );
    assert_eq!(hypervolume(&[[1.0], [3.0]], &[4.0]), 3.0);
    assert_eq!(hypervolume::<[f64; 2]>(&[], &[1.0, 1.0]), 0.0);
    assert_eq!(hypervolume(&[[f64::NAN, 0.0]], &[1.0, 1.0]), 0.0);
    // With integer points, count the unit cells that some point dominates.
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    for n_points in [1, 2, 5, 17] {
        let points: Vec<[f64; 3]> = (0..n_points)
            .map(|_| std::array::from_fn(|_| rng.random_range(0..7) as f64))
            .collect();
        let cells = (0..6 * 6 * 6).filter(|cell| {
            let cell = [cell % 6, cell / 6 % 6, cell / 36];
            points
                .iter()
                .any(|point| point.iter().zip(cell).all(|(x, c)| *x <= c as f64))
        });
        assert_eq!(hypervolume(&points, &[6.0; 3]), cells.count() as f64);
        let flat: Vec<[f64; 2]> = points.iter().map(|p| [p[0], p[1]]).collect();
        let squares = (0..36).filter(|c| {
            flat.iter()
                .any(|p| p[0] <= (c % 6) as f64 && p[1] <= (c / 6) as f64)
        });
        assert_eq!(hypervolume(&flat, &[6.0; 2]), squares.count() as f64);
    }
}

#[test]
fn igd_is_the_mean_distance() {
    assert_eq!(
        igd(
            &[[0.0, 0.0], [3.0, 4.0]],
            &[[0.0, 1.0], [3.0, 4.0], [0.0, 0.0], [3.0, 1.0]]
        ),
        (1.0 + 3.0) / 4.0
    );
    assert_eq!(igd::<[f64; 2], _>(&[], &[[0.0, 1.0]]), f64::INFINITY);
}

// --- searchers ---

#[test]
fn heuristic_and_list() {
    let space = space(5, &[32, 24, 16]);
    let outcome = run_toy(&space, &mut Heuristic::new(&space), 10);
    assert_eq!(outcome.evaluations().len(), 1);
    assert_eq!(outcome.evaluations()[0].config, space.heuristic());
    assert_eq!(outcome.stopped(), StopReason::Exhausted);

    let configs = vec![space.minimal(), space.maximal(), space.minimal()];
    let outcome = run_toy(&space, &mut FixedList::new(&space, configs).unwrap(), 10);
    assert_eq!(outcome.evaluations().len(), 2);
    let mut wrong = space.minimal();
    wrong.set("layers.0.mlp.up_proj", 31);
    assert!(FixedList::new(&space, [wrong]).is_err());
}

#[test]
fn every_searcher_exhausts_a_small_space_without_repeating() {
    let space = space(3, &[9, 7, 4]);
    for mut searcher in searchers(&space, 2) {
        let outcome = run_toy(&space, &mut searcher, 1000);
        let distinct: HashSet<&SubnetConfig> =
            outcome.evaluations().iter().map(|e| &e.config).collect();
        assert_eq!(
            (distinct.len(), outcome.evaluations().len()),
            (27, 27),
            "{}",
            searcher.name()
        );
        assert_eq!(outcome.stopped(), StopReason::Exhausted);
        assert!(searcher.is_finished());
        assert!(searcher.ask(5).is_empty());
    }
    // A space of one subnet is plain LoRA.
    let one = SearchSpace::fixed(&[LayerShape::new("l", 2, 2)], 8).unwrap();
    for mut searcher in searchers(&one, 2) {
        assert_eq!(run_toy(&one, &mut searcher, 9).evaluations().len(), 1);
    }
}

#[test]
fn same_seed_same_result_however_it_is_driven() {
    let space = space(12, &[32, 24, 16, 8]);
    for which in 0..SEARCHERS {
        let make = |seed| searchers(&space, seed).swap_remove(which);
        let reference = run_toy(&space, &mut make(7), 120);
        assert_eq!(
            without_times(&run_toy(&space, &mut make(7), 120)),
            without_times(&reference)
        );
        assert_ne!(
            without_times(&run_toy(&space, &mut make(8), 120)),
            without_times(&reference)
        );
        for (threads, batch) in [(1, 3), (2, 16), (3, 50)] {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let mut study = StudyConfig::new(120)
                .with_batch(batch)
                .init(&space)
                .unwrap();
            let parallel = pool.install(|| {
                study
                    .run_parallel(&mut make(7), |c| toy(&space, c), &Silent)
                    .unwrap()
            });
            assert_eq!(without_times(&parallel), without_times(&reference));
            assert!(
                parallel.front().eq(parallel.front())
                    && parallel.front().len() == reference.front().len()
            );
        }
        // Tell the objectives in random order and in pieces.
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let (mut searcher, mut order, mut waiting) = (make(7), Vec::new(), Vec::new());
        while order.len() < 120 {
            let asked = searcher.ask(rng.random_range(1..9).min(120 - order.len()));
            order.extend(asked.iter().cloned());
            waiting.extend(asked);
            waiting.shuffle(&mut rng);
            let keep = rng.random_range(0..=waiting.len() / 2);
            let told: Vec<Evaluation> = waiting
                .drain(keep..)
                .map(|c| Evaluation::new(c.clone(), toy(&space, &c).unwrap()))
                .collect();
            searcher.tell(&told).unwrap();
        }
        let expected: Vec<SubnetConfig> = reference
            .evaluations()
            .iter()
            .map(|e| e.config.clone())
            .collect();
        assert_eq!(order, expected);
    }
}

/// The state of a searcher, written as JSON in the middle of a generation, goes on like the searcher
/// itself.
#[test]
fn states_go_on_from_json() {
    fn check<S: Searcher + serde::Serialize + serde::de::DeserializeOwned>(mut searcher: S) {
        let space = space(7, &[32, 24, 16, 8]);
        let tell = |searcher: &mut S, asked: Vec<SubnetConfig>| {
            let mut told: Vec<Evaluation> = asked
                .into_iter()
                .map(|config| Evaluation::new(config.clone(), toy(&space, &config).unwrap()))
                .collect();
            if let Some(last) = told.last_mut() {
                last.objectives[0] = f64::NAN;
            }
            searcher.tell(&told).unwrap();
        };
        for n in [5, 3, 4, 7, 1, 6] {
            let asked = searcher.ask(n);
            tell(&mut searcher, asked);
        }
        let asked = searcher.ask(4);
        let text = serde_json::to_string(&searcher).unwrap();
        let mut copy: S = serde_json::from_str(&text).unwrap();
        tell(&mut copy, asked.clone());
        tell(&mut searcher, asked);
        for n in [3, 9, 2, 20, 20, 20] {
            let asked = searcher.ask(n);
            assert_eq!(copy.ask(n), asked, "{}", searcher.name());
            tell(&mut copy, asked.clone());
            tell(&mut searcher, asked);
        }
    }
    let space = space(7, &[32, 24, 16, 8]);
    check(RandomSearchConfig::new().init(&space).unwrap());
    check(Exhaustive::new(&space));
    check(HillClimbingConfig::new().init(&space).unwrap());
    let nsga = NsgaConfig::new().with_population(8);
    check(nsga.clone().init(&space).unwrap());
    check(nsga.with_screening(4).init(&space).unwrap());
    check(selecting(
        &space,
        2,
        Selection::Directions { partitions: 5 },
    ));
}

#[test]
fn tell_refuses_what_was_not_asked() {
    let space = space(6, &[4, 3, 2]);
    for mut searcher in searchers(&space, 1) {
        let never = Evaluation::new(space.decode(&[2, 0, 1, 1, 0, 2]).unwrap(), vec![1.0, 2.0]);
        assert!(matches!(
            searcher.tell(std::slice::from_ref(&never)),
            Err(Error::InvalidArgument { .. })
        ));
        let first = Evaluation::new(searcher.ask(1).remove(0), vec![1.0, 2.0]);
        searcher.tell(std::slice::from_ref(&first)).unwrap();
        assert!(searcher.tell(&[first]).is_err());
        let next = searcher.ask(1).remove(0);
        assert!(matches!(
            searcher.tell(&[Evaluation::new(next, vec![1.0])]),
            Err(Error::ShapeMismatch { .. })
        ));
    }
}

#[test]
fn settings_are_checked() {
    let space = space(2, &[2, 1]);
    assert!(NsgaConfig::new().with_population(1).init(&space).is_err());
    assert!(NsgaConfig::new().with_screening(0).init(&space).is_err());
    assert!(
        NsgaConfig::new()
            .with_crossover(1.5, 1.0)
            .init(&space)
            .is_err()
    );
    assert!(
        NsgaConfig::new()
            .with_mutation(f64::NAN, 1.0)
            .init(&space)
            .is_err()
    );
    assert!(
        NsgaConfig::new()
            .with_mutation(0.5, -1.0)
            .init(&space)
            .is_err()
    );
    assert!(
        NsgaConfig::new()
            .with_initial(vec![SubnetConfig::new()])
            .init(&space)
            .is_err()
    );
    assert!(
        HillClimbingConfig::new()
            .with_neighbours_per_step(0)
            .init(&space)
            .is_err()
    );
    assert!(
        HillClimbingConfig::new()
            .with_goal(Goal::ScoreUnder(f64::NAN))
            .init(&space)
            .is_err()
    );
    assert!(
        RandomSearchConfig::new()
            .with_initial(vec![SubnetConfig::new()])
            .init(&space)
            .is_err()
    );
    assert!(StudyConfig::new(3).with_batch(0).init(&space).is_err());
}

#[test]
fn nsga2_starts_with_the_given_subnets() {
    let space = space(8, &[32, 24, 16]);
    let first = |mut searcher: Nsga| searcher.ask(3);
    let default = first(NsgaConfig::new().init(&space).unwrap());
    assert_eq!(
        default,
        [space.heuristic(), space.maximal(), space.minimal()]
    );
    let own = first(
        NsgaConfig::new()
            .with_initial(vec![space.minimal(), space.minimal()])
            .init(&space)
            .unwrap(),
    );
    assert_eq!(own[0], space.minimal());
    assert_ne!(own[1], space.minimal());
}

#[test]
fn nsga2_beats_random_on_a_toy_space() {
    let space = space(16, &[32, 28, 24, 20, 16]);
    let reference = [5.0, 16.0 * 32.0 * 2.5 * 1e4];
    let (mut evolved, mut drawn) = (0.0, 0.0);
    for seed in 0..6 {
        let initial = vec![space.heuristic(), space.maximal(), space.minimal()];
        let mut random = RandomSearchConfig::new()
            .with_seed(seed)
            .with_initial(initial)
            .init(&space)
            .unwrap();
        let mut nsga = NsgaConfig::new()
            .with_population(20)
            .with_seed(seed)
            .init(&space)
            .unwrap();
        let outcome = run_toy(&space, &mut nsga, 400);
        evolved += hypervolume(&objectives(&outcome), &reference);
        drawn += hypervolume(&objectives(&run_toy(&space, &mut random, 400)), &reference);

        let front: Vec<&[f64]> = outcome.front().map(|e| e.objectives.as_slice()).collect();
        assert_eq!(non_dominated(&front).len(), front.len());
        // The search finds a better subnet than the heuristic at no more cost.
        let heuristic = outcome.get(&space.heuristic()).unwrap();
        let better = outcome.best_under(heuristic.cost()).unwrap();
        assert!(better.score() < heuristic.score());
        assert!(outcome.no_worse_than(heuristic.score()).unwrap().cost() < heuristic.cost());
    }
    assert!(evolved > 1.03 * drawn, "{evolved} {drawn}");
}

/// Screening pays off with a budget of a few hundred evaluations, on a nearly additive loss and on
/// one that is not additive.
#[test]
fn screening_beats_plain_nsga2_at_a_small_budget() {
    let space = space(24, &[32, 28, 24, 20, 16]);
    let reference = [8.0, 24.0 * 32.0 * 2.6 * 1e4];
    for coupling in [0.0, 0.004] {
        let volume = |screening, seed| {
            let config = NsgaConfig::new()
                .with_population(20)
                .with_screening(screening)
                .with_seed(seed);
            let value = |config: &SubnetConfig| {
                let mut objectives = toy(&space, config)?;
                let ranks = space.values(config)?;
                objectives[0] += coupling
                    * ranks
                        .windows(2)
                        .map(|w| w[0].abs_diff(w[1]) as f64)
                        .sum::<f64>();
                Ok(objectives)
            };
            let mut study = StudyConfig::new(200).init(&space).unwrap();
            hypervolume(
                &objectives(
                    &study
                        .run(&mut config.init(&space).unwrap(), value, &Silent)
                        .unwrap(),
                ),
                &reference,
            )
        };
        let mean = |screening| (0..5).map(|seed| volume(screening, seed)).sum::<f64>() / 5.0;
        let (plain, screened) = (mean(1), mean(10));
        eprintln!("coupling {coupling}: hypervolume {plain:.4e} plain, {screened:.4e} screened");
        assert!(screened > 1.005 * plain, "{coupling}: {screened} {plain}");
    }
}

#[test]
fn hill_climbing_keeps_its_budget_and_finds_optima() {
    let space = space(10, &[32, 24, 16, 8]);
    let start = toy(&space, &space.heuristic()).unwrap();
    for k in [1, 8, 1000] {
        let mut searcher = HillClimbingConfig::new()
            .with_neighbours_per_step(k)
            .init(&space)
            .unwrap();
        let outcome = run_toy(&space, &mut searcher, 300);
        let found = outcome.best_under(start[1]).unwrap();
        assert!(
            found.score() < start[0] - 0.01,
            "{k}: {} {}",
            found.score(),
            start[0]
        );
    }
    // Without a limit and restarts, it ends in a local optimum, here the largest subnet.
    let config = HillClimbingConfig::new()
        .with_goal(Goal::ScoreUnder(f64::INFINITY))
        .with_restarts(0)
        .with_start(space.minimal());
    let mut searcher = config.init(&space).unwrap();
    let outcome = run_toy(&space, &mut searcher, 5000);
    assert_eq!(outcome.stopped(), StopReason::Exhausted);
    let best = outcome.best_score().unwrap();
    let genome = space.encode(&best.config).unwrap();
    for at in 0..genome.len() {
        for gene in [genome[at].wrapping_sub(1), genome[at] + 1] {
            let mut other = genome.clone();
            other[at] = gene;
            if let Ok(other) = space.decode(&other) {
                assert!(toy(&space, &other).unwrap()[0] >= best.score());
            }
        }
    }
    // A start over the budget moves into the budget.
    let limit = start[1] * 0.8;
    let mut searcher = HillClimbingConfig::new()
        .with_goal(Goal::ScoreUnder(limit))
        .init(&space)
        .unwrap();
    assert!(
        run_toy(&space, &mut searcher, 200)
            .best_under(limit)
            .is_some()
    );
}

#[test]
fn searchers_survive_nan() {
    let space = space(6, &[32, 24, 16]);
    for mut searcher in searchers(&space, 4) {
        let mut n = 0;
        let outcome = StudyConfig::new(90).init(&space).unwrap().run(
            &mut searcher,
            |config| {
                n += 1;
                let mut values = toy(&space, config)?;
                if n % 3 == 0 {
                    values[0] = f64::NAN;
                }
                if n % 7 == 0 {
                    values[1] = f64::INFINITY;
                }
                Ok(values)
            },
            &Silent,
        );
        let outcome = outcome.unwrap();
        assert!(outcome.best_score().unwrap().score().is_finite());
        assert!(outcome.knee().unwrap().score().is_finite());
        #[cfg(feature = "report")]
        SearchReport::new(&space, &outcome, &ObjectiveNames::default())
            .to_svg()
            .unwrap();
    }
}

/// Each goal is reached by evolution and by hill climbing, and beats random search.
#[test]
fn goals_are_met() {
    let space = space(14, &[32, 24, 16, 8]);
    let start = toy(&space, &space.heuristic()).unwrap();
    let goals = [
        Goal::ScoreUnder(0.8 * start[1]),
        Goal::CostWithin(1.02 * start[0]),
        Goal::WeightedSum(vec![1.0, 1e-6]),
    ];
    for goal in goals {
        let best = |searcher: &mut dyn Searcher| {
            let outcome = run_toy(&space, searcher, 400);
            outcome.best(&goal).map(|e| e.objectives.clone())
        };
        let mut random = RandomSearchConfig::new().init(&space).unwrap();
        let mut climb = HillClimbingConfig::new().with_goal(goal.clone());
        climb.restarts = 3;
        let mut climb = climb.init(&space).unwrap();
        let mut evolve = selecting(&space, 1, Selection::Goal(goal.clone()));
        let drawn = best(&mut random).unwrap();
        for found in [best(&mut climb).unwrap(), best(&mut evolve).unwrap()] {
            assert!(goal.is_met(&found));
            assert!(
                goal.compare(&found, &drawn).is_lt(),
                "{goal:?}: {found:?} {drawn:?}"
            );
        }
    }
    assert!(Goal::WeightedSum(vec![0.0]).check().is_err());
    assert!(Goal::WeightedSum(vec![1.0, -1.0]).check().is_err());
}

#[test]
fn reference_points_draw_the_search() {
    let space = space(14, &[32, 24, 16, 8]);
    // Points near the front: subnets of one rank.
    let at = |rank: usize| toy(&space, &space.from_values(&[rank; 14]).unwrap()).unwrap();
    let near = |point: &[f64], found: &[f64]| (found[1] - point[1]).abs() / at(32)[1];
    for share in [16, 24] {
        let selection = Selection::ReferencePoints {
            points: vec![at(share)],
            epsilon: 0.001,
        };
        let outcome = run_toy(&space, &mut selecting(&space, 1, selection), 400);
        let last = &outcome.evaluations()[300..];
        let mean = |of: &[Evaluation]| {
            of.iter()
                .map(|e| near(&at(share), &e.objectives))
                .sum::<f64>()
                / of.len() as f64
        };
        assert!(mean(last) < 0.12, "{share}: {}", mean(last));
    }
    let check = |selection| {
        NsgaConfig::new()
            .with_selection(selection)
            .init(&space)
            .is_err()
    };
    assert!(check(Selection::Directions { partitions: 0 }));
    assert!(check(Selection::Goal(Goal::CostWithin(f64::NAN))));
    let (points, epsilon) = (Vec::new(), 0.0);
    assert!(check(Selection::ReferencePoints { points, epsilon }));
}

#[test]
fn exhaustive_search_knows_the_front() {
    let space = space(4, &[32, 24, 16, 8]);
    let all = run_toy(&space, &mut Exhaustive::new(&space), 1000);
    assert_eq!(
        (all.evaluations().len(), all.stopped()),
        (256, StopReason::Exhausted)
    );
    assert_eq!(all.evaluations()[0].config, space.maximal());
    assert_eq!(all.evaluations()[255].config, space.minimal());
    let part = run_toy(&space, &mut searchers(&space, 1)[2], 60);
    for found in part.front() {
        assert!(
            !all.front()
                .any(|other| dominates(&found.objectives, &other.objectives))
        );
    }
    let reference = [10.0, 1e7];
    let volumes = part.hypervolumes(&reference);
    assert!(volumes.windows(2).all(|pair| pair[0] <= pair[1]) && volumes.len() == 60);
    assert!((volumes[59] - hypervolume(&objectives(&part), &reference)).abs() < 1e-6);
    assert!(volumes[59] <= hypervolume(&objectives(&all), &reference));
}

/// Evaluations of a part of the data count as that part, and are neither on the front nor mixed up
/// with full ones.
#[test]
fn fidelities_are_counted_and_kept_apart() {
    /// Asks for each subnet at a quarter of the data, and then in full.
    struct Twice(FixedList, FixedList);
    impl Searcher for Twice {
        fn name(&self) -> &str {
            "twice"
        }
        fn ask(&mut self, n: usize) -> Vec<SubnetConfig> {
            match self.0.is_finished() {
                true => self.1.ask(n),
                false => self.0.ask(n),
            }
        }
        fn tell(&mut self, evaluated: &[Evaluation]) -> Result<()> {
            evaluated.iter().try_for_each(|one| match one.is_full() {
                true => self.1.tell(std::slice::from_ref(one)),
                false => self.0.tell(std::slice::from_ref(one)),
            })
        }
        fn is_finished(&self) -> bool {
            self.1.is_finished()
        }
        fn fidelity(&self) -> f64 {
            if self.0.is_finished() { 1.0 } else { 0.25 }
        }
    }
    let space = space(3, &[32, 24]);
    let configs = vec![space.maximal(), space.minimal(), space.heuristic()];
    let list = || FixedList::new(&space, configs.clone()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let settings = StudyConfig::new(3).with_log(dir.path().join("log.jsonl"));
    let evaluate = |config: &SubnetConfig, fidelity: f64| {
        let mut objectives = toy(&space, config)?;
        objectives[0] -= 1.0 - fidelity;
        let score_error = Some(0.1 / fidelity.sqrt());
        Ok(Measurement {
            objectives,
            score_error,
        })
    };
    let mut study = settings.init(&space).unwrap();
    let outcome = study
        .run_at(&mut Twice(list(), list()), evaluate, &Silent)
        .unwrap();
    // Three quarters, and two whole ones: the third would exceed the budget.
    let at: Vec<f64> = outcome.evaluations().iter().map(|e| e.fidelity).collect();
    assert_eq!(at, [0.25, 0.25, 1.0, 1.0]);
    assert_eq!(outcome.n_full_evaluations(), 2.5);
    assert!(outcome.front().all(|evaluation| evaluation.is_full()));
    assert_eq!(outcome.evaluations()[0].score_error, Some(0.2));
    drop(study);
    let mut study = settings.init(&space).unwrap();
    assert_eq!(study.n_known(), 4);
    let again = study
        .run_at(&mut Twice(list(), list()), |_, _| panic!("known"), &Silent)
        .unwrap();
    assert_eq!(without_times(&again), without_times(&outcome));
    // An objective that knows no parts is evaluated in full.
    let mut study = StudyConfig::new(3).init(&space).unwrap();
    let plain = study
        .run(&mut list(), |config| toy(&space, config), &Silent)
        .unwrap();
    assert!(plain.evaluations().iter().all(Evaluation::is_full));
}

// --- known fronts ---

fn shared() -> PathBuf {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared");
    std::env::var_os("ELASTIC_LORA_SHARED").map_or_else(|| PathBuf::from(default), PathBuf::from)
}

fn zdt(number: usize, x: &[f64]) -> Vec<f64> {
    let n = (x.len() - 1) as f64;
    let mean = x[1..].iter().sum::<f64>() / n;
    let (f, g) = match number {
        4 => {
            let wave = |x: f64| 10.0 * x - 5.0;
            (
                x[0],
                1.0 + x[1..]
                    .iter()
                    .map(|&x| 10.0 + wave(x).powi(2) - 10.0 * (4.0 * PI * wave(x)).cos())
                    .sum::<f64>(),
            )
        }
        6 => (
            1.0 - (-4.0 * x[0]).exp() * (6.0 * PI * x[0]).sin().powi(6),
            1.0 + 9.0 * mean.powf(0.25),
        ),
        _ => (x[0], 1.0 + 9.0 * mean),
    };
    let h = match number {
        2 | 6 => 1.0 - (f / g).powi(2),
        3 => 1.0 - (f / g).sqrt() - f / g * (10.0 * PI * f).sin(),
        _ => 1.0 - (f / g).sqrt(),
    };
    vec![f, g * h]
}

fn dtlz2(x: &[f64]) -> Vec<f64> {
    let g = 1.0 + x[2..].iter().map(|x| (x - 0.5).powi(2)).sum::<f64>();
    let (a, b) = (x[0] * PI / 2.0, x[1] * PI / 2.0);
    vec![g * a.cos() * b.cos(), g * a.cos() * b.sin(), g * a.sin()]
}

/// Returns the distances of the fronts of NSGA-II and of random search from the true front. x has
/// steps of 1 / (n_choices - 1).
fn distances(
    file: &str,
    n_groups: usize,
    n_evals: usize,
    f: impl Fn(&[f64]) -> Vec<f64>,
) -> Option<(f64, f64)> {
    let path = shared().join("vectors/fronts").join(file);
    let Ok(text) = fs::read_to_string(&path) else {
        eprintln!("skipped: {} is not there", path.display());
        return None;
    };
    let front: Vec<Vec<f64>> = text
        .lines()
        .map(|line| line.split(',').map(|x| x.trim().parse().unwrap()).collect())
        .collect();
    let front: Vec<&Vec<f64>> = front.iter().step_by(1.max(front.len() / 1000)).collect();
    let choices: Vec<usize> = (1..=101).collect();
    let space = space(n_groups, &choices);
    let value = |config: &SubnetConfig| {
        let x: Vec<f64> = space
            .values(config)?
            .iter()
            .map(|&value| (value - 1) as f64 / 100.0)
            .collect();
        Ok(f(&x))
    };
    let distance = |searcher: &mut dyn Searcher| {
        let outcome = StudyConfig::new(n_evals)
            .init(&space)
            .unwrap()
            .run(searcher, value, &Silent)
            .unwrap();
        let found: Vec<&[f64]> = outcome.front().map(|e| e.objectives.as_slice()).collect();
        igd(&found, &front)
    };
    let mut nsga = NsgaConfig::new()
        .with_population(100)
        .with_initial(vec![])
        .with_seed(5)
        .init(&space)
        .unwrap();
    let mut random = RandomSearchConfig::new().with_seed(5).init(&space).unwrap();
    Some((distance(&mut nsga), distance(&mut random)))
}

#[test]
fn nsga2_reaches_the_known_fronts() {
    // The grid alone puts the front 0.0159 away from ZDT3's front.
    for (number, limit, n_evals) in [
        (1, 0.01, 6000),
        (2, 0.01, 6000),
        (3, 0.018, 6000),
        (4, 0.01, 15000),
        (6, 0.03, 6000),
    ] {
        let name = format!("ZDT{number}.csv");
        let Some((evolved, drawn)) = distances(&name, 8, n_evals, |x| zdt(number, x)) else {
            return;
        };
        eprintln!("{name}: IGD {evolved:.4}, random {drawn:.4}");
        assert!(
            evolved < limit && evolved < 0.2 * drawn,
            "{name}: {evolved}, random {drawn}"
        );
    }
    let Some((evolved, drawn)) = distances("DTLZ2.3D.csv", 8, 6000, dtlz2) else {
        return;
    };
    eprintln!("DTLZ2: IGD {evolved:.4}, random {drawn:.4}");
    assert!(
        evolved < 0.08 && evolved < 0.5 * drawn,
        "DTLZ2: {evolved}, random {drawn}"
    );
}

// --- studies ---

#[test]
fn nothing_is_evaluated_twice() {
    let space = space(4, &[32, 24, 16]);
    let mut study = StudyConfig::new(40).init(&space).unwrap();
    let seen = std::cell::RefCell::new(HashSet::new());
    for mut searcher in searchers(&space, 3) {
        let objective = |config: &SubnetConfig| {
            assert!(seen.borrow_mut().insert(config.clone()), "{config} twice");
            toy(&space, config)
        };
        let outcome = study.run(&mut searcher, objective, &Silent);
        let outcome = outcome.unwrap();
        assert_eq!(outcome.evaluations().len(), 40);
        assert!(
            outcome
                .evaluations()
                .iter()
                .enumerate()
                .all(|(index, e)| e.index == index)
        );
    }
    assert_eq!(study.n_known(), seen.borrow().len());
    // All subnets are known, so nothing is evaluated but everything is told.
    let outcome = study
        .run(&mut searchers(&space, 3)[2], |_| panic!("cached"), &Silent)
        .unwrap();
    assert!(
        outcome
            .evaluations()
            .iter()
            .all(|e| e.cached && e.seconds == 0.0)
    );
}

#[test]
fn a_search_resumes_from_its_log() {
    let space = space(10, &[32, 24, 16]);
    let dir = tempfile::tempdir().unwrap();
    for which in 0..SEARCHERS {
        let make = || searchers(&space, 5).swap_remove(which);
        let whole = run_toy(&space, &mut make(), 60);
        let path = dir.path().join(format!("{which}.jsonl"));
        let settings = StudyConfig::new(60)
            .with_log(&path)
            .with_tag("toy")
            .with_batch(4);

        // Interrupt the search by a flag after some evaluations ...
        let flag = AtomicBool::new(false);
        let n = AtomicUsize::new(0);
        let mut study = settings.clone().init(&space).unwrap();
        let objective = |config: &SubnetConfig| {
            flag.store(n.fetch_add(1, Ordering::SeqCst) >= 20, Ordering::SeqCst);
            toy(&space, config)
        };
        let interrupted = study.run_parallel(&mut make(), objective, &flag);
        let error = interrupted.unwrap_err();
        assert!(
            matches!(&error, Error::Interrupted { task } if task == "search"),
            "{error}"
        );
        let n_part = study.n_known();
        assert!((21..28).contains(&n_part));
        drop(study);
        // ... and kill it while it writes a line.
        let mut text = fs::read_to_string(&path).unwrap();
        text.push_str(r#"{"index": 99, "config": {"layers.0"#);
        fs::write(&path, text).unwrap();

        let mut study = settings.init(&space).unwrap();
        assert_eq!(study.n_known(), n_part);
        let n = AtomicUsize::new(0);
        let objective = |config: &SubnetConfig| {
            n.fetch_add(1, Ordering::SeqCst);
            toy(&space, config)
        };
        let resumed = study.run_parallel(&mut make(), objective, &Silent);
        assert_eq!(without_times(&resumed.unwrap()), without_times(&whole));
        assert_eq!(n.into_inner(), 60 - n_part);
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 61);
    }
}

#[test]
fn logs_are_checked() {
    let space = space(2, &[32, 24]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log.jsonl");
    let open = |tag: &str| {
        StudyConfig::new(3)
            .with_log(&path)
            .with_tag(tag)
            .init(&space)
            .map(|study| study.n_known())
    };
    assert_eq!(open("a").unwrap(), 0);
    assert!(matches!(open("b"), Err(Error::CheckpointMismatch { .. })));
    let header = r#"{"elastic_lora_search":1,"tag":""}"#;
    let line = r#"{"index":0,"config":{"layers.0.mlp.up_proj":32,"layers.1.mlp.up_proj":24},"objectives":[1.5,"NaN"]}"#;
    let bad = [
        "nonsense\n".to_string(),
        format!("{line}\n{line}\n"),
        header.replace('1', "2") + "\n",
        format!("{header}\n\n"),
        format!("{header}\n{}\n", line.replace("24", "25")),
        format!("{header}\n{}\n", line.replace("layers.1", "layers.7")),
        format!("{header}\n{}\n", line.replace("NaN", "many")),
        format!("{header}\n{}\n", line.replace("[1.5,\"NaN\"]", "[]")),
        format!("{header}\n{line}\n{}\n", line.replace("1.5,", "")),
    ];
    for text in bad {
        fs::write(&path, &text).unwrap();
        let error = open("").unwrap_err();
        assert!(error.to_string().contains("log.jsonl"), "{text}: {error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
    fs::write(&path, format!("{header}\n{line}\n{line}")).unwrap();
    assert_eq!(open("").unwrap(), 1);
    assert_eq!(
        fs::read_to_string(&path).unwrap(),
        format!("{header}\n{line}\n")
    );
    assert!(
        StudyConfig::new(3)
            .with_log(dir.path().join("no/such/folder"))
            .init(&space)
            .is_err()
    );
}

#[test]
fn failures_are_recorded_and_do_no_harm() {
    let space = space(5, &[32, 24, 16]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log.jsonl");
    let settings = StudyConfig::new(60).with_log(&path).with_max_failures(20);
    let fails = |config: &SubnetConfig| space.encode(config).unwrap()[0] == 1;
    let objective = |config: &SubnetConfig| match fails(config) {
        true => Err(Error::argument("subnet", config, "another one")),
        false => toy(&space, config),
    };
    let seed = vec![space.maximal()];
    let make = || {
        let config = NsgaConfig::new().with_population(9).with_seed(1);
        config.with_initial(seed.clone()).init(&space).unwrap()
    };
    let mut study = settings.init(&space).unwrap();
    let outcome = study.run(&mut make(), objective, &Silent).unwrap();
    let failed: Vec<&Evaluation> = outcome
        .evaluations()
        .iter()
        .filter(|evaluation| evaluation.error.is_some())
        .collect();
    assert_eq!(outcome.evaluations().len(), 60);
    assert!(!failed.is_empty());
    for evaluation in failed {
        assert!(fails(&evaluation.config) && evaluation.objectives.iter().all(|x| x.is_nan()));
        assert!(evaluation.error.as_ref().unwrap().contains("another one"));
    }
    assert!(outcome.front().all(|evaluation| !fails(&evaluation.config)));
    // From its log, the search is the same and evaluates nothing.
    drop(study);
    let mut study = settings.init(&space).unwrap();
    let again = study
        .run(&mut make(), |_| panic!("known"), &Silent)
        .unwrap();
    let text = |outcome: &SearchOutcome| format!("{:?}", without_times(outcome));
    assert_eq!(text(&again), text(&outcome));
}

#[test]
fn failures_come_through() {
    let space = space(3, &[32, 24]);
    let mut study = StudyConfig::new(8)
        .with_max_failures(1)
        .init(&space)
        .unwrap();
    let mut n = 0;
    let objective = |config: &SubnetConfig| {
        n += 1;
        if n == 4 || n == 6 {
            Err(Error::argument("n", n, "less"))
        } else {
            toy(&space, config)
        }
    };
    let result = study.run(&mut searchers(&space, 1)[2], objective, &Silent);
    assert!(matches!(result, Err(Error::InvalidArgument { .. })));
    assert_eq!(study.n_known(), 5);
    // If the first evaluation fails, so would probably all.
    let fail = |_: &SubnetConfig| Err(Error::argument("n", 0, "more"));
    let mut other = StudyConfig::new(8).init(&space).unwrap();
    let result = other.run(&mut searchers(&space, 1)[2], fail, &Silent);
    assert!(matches!(result, Err(Error::InvalidArgument { .. })));
    let result = study.run(&mut searchers(&space, 1)[2], |_| Ok(vec![1.0]), &Silent);
    assert!(matches!(result, Err(Error::ShapeMismatch { .. })));
    let result = StudyConfig::new(8).init(&space).unwrap().run(
        &mut searchers(&space, 1)[0],
        |_| Ok(vec![]),
        &Silent,
    );
    assert!(matches!(result, Err(Error::ShapeMismatch { .. })));
}

// --- outcomes and reports ---

fn outcome(space: &SearchSpace, points: &[[f64; 2]]) -> SearchOutcome {
    let n = space.n_subnets_exact().unwrap() as usize;
    let evaluation = |(index, point): (usize, &[f64; 2])| {
        let mut code = n - 1 - index;
        let genome: Vec<usize> = space
            .groups()
            .iter()
            .map(|group| (code % group.choices().len(), code /= group.choices().len()).0)
            .collect();
        Evaluation {
            index,
            ..Evaluation::new(space.decode(&genome).unwrap(), point.to_vec())
        }
    };
    let evaluations = points.iter().enumerate().map(evaluation).collect();
    SearchOutcome::new("hand-made", StopReason::Budget, evaluations)
}

#[test]
fn outcomes_select() {
    let space = space(4, &[32, 24, 16]);
    let points = [
        [1.0, 10.0],
        [2.0, 4.0],
        [1.2, 5.0],
        [4.0, 1.0],
        [1.0, 11.0],
        [f64::NAN, 0.5],
        [3.9, 3.9],
    ];
    let outcome = outcome(&space, &points);
    let at = |evaluation: Option<&Evaluation>| evaluation.map(|evaluation| evaluation.index);
    assert_eq!(
        outcome.front().map(|e| e.index).collect::<Vec<_>>(),
        [5, 3, 6, 1, 2, 0]
    );
    assert!(outcome.is_on_front(2) && !outcome.is_on_front(4));
    assert_eq!(at(outcome.best_score()), Some(0));
    assert_eq!(at(outcome.best_under(9.0)), Some(2));
    assert_eq!(at(outcome.best_under(0.1)), None);
    assert_eq!(at(outcome.no_worse_than(2.5)), Some(1));
    assert_eq!(at(outcome.no_worse_than(0.5)), None);
    assert_eq!(at(outcome.knee()), Some(2));
    let empty = SearchOutcome::new("none", StopReason::Exhausted, vec![]);
    assert!(empty.knee().is_none() && empty.front().len() == 0);
}

#[test]
fn evaluations_round_trip_through_json() {
    let values = vec![0.1 + 0.2, f64::INFINITY, f64::NEG_INFINITY, -1e-300];
    let evaluation = Evaluation::new(space(3, &[2, 1]).minimal(), values);
    let text = serde_json::to_string(&evaluation).unwrap();
    assert_eq!(
        serde_json::from_str::<Evaluation>(&text).unwrap(),
        evaluation
    );
    let nan = Evaluation {
        objectives: vec![f64::NAN],
        ..evaluation
    };
    let back: Evaluation = serde_json::from_str(&serde_json::to_string(&nan).unwrap()).unwrap();
    assert!(back.objectives[0].is_nan());
}

#[test]
#[cfg(feature = "report")]
fn reports_are_complete() {
    let space = space(16, &[32, 24, 16]);
    let mut searcher = NsgaConfig::new()
        .with_population(16)
        .with_seed(2)
        .init(&space)
        .unwrap();
    let outcome = run_toy(&space, &mut searcher, 200);
    let names = ObjectiveNames::default();
    let dir = tempfile::tempdir().unwrap();
    let paths = SearchReport::new(&space, &outcome, &names)
        .write(dir.path())
        .unwrap();
    let [svg, csv, json] = paths.map(|path| fs::read_to_string(path).unwrap());
    assert_eq!(
        svg.matches("<circle").count(),
        200 + 2 + outcome.front().len()
    );
    for part in [
        "MACs per token [M]",
        "validation loss [nats per token]",
        "heuristic",
        "maximal",
        "Pareto front",
    ] {
        assert!(svg.contains(part), "{part}");
    }
    assert_eq!(csv.lines().count(), 201);
    assert!(csv.lines().all(|line| line.split(',').count() == 10));
    assert!(csv.lines().nth(1).unwrap().contains(",heuristic,"));
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["evaluations"].as_array().unwrap().len(), 200);
    assert_eq!(json["hypervolume"]["after"].as_array().unwrap().len(), 200);
    assert_eq!(json["predicted"].as_array().unwrap().len(), 0);
    assert_eq!(
        json["front"].as_array().unwrap().len(),
        outcome.front().len()
    );
    assert_eq!(
        (&json["heuristic"], &json["maximal"]),
        (&0.into(), &1.into())
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
    if let Some(keep) = std::env::var_os("ELASTIC_LORA_KEEP_PLOTS") {
        fs::write(PathBuf::from(keep).join("toy.svg"), &svg).unwrap();
    }
    let report = SearchReport::new(&space, &outcome, &names);
    assert_eq!(report.to_table().lines().count(), 2 + outcome.front().len());
    // Predictions of subnets that were not evaluated are left out.
    let mut config = space.maximal();
    config.set("layers.0.mlp.up_proj", 24);
    let guesses = [
        (space.maximal(), vec![2.9, 6e6]),
        (space.heuristic(), vec![3.0, f64::NAN]),
        (config, vec![3.0, 4e6]),
    ];
    let outcome = outcome.with_predicted(guesses.to_vec());
    let report = SearchReport::new(&space, &outcome, &names);
    let curves = report.write_curves(dir.path().join("curves")).unwrap();
    assert_eq!(curves.len(), 3);
    let json: serde_json::Value = serde_json::from_str(&report.to_json().unwrap()).unwrap();
    assert_eq!(json["predicted"].as_array().unwrap().len(), 2);
    for path in curves
        .iter()
        .filter(|path| path.extension().unwrap() == "svg")
    {
        let svg = fs::read_to_string(path).unwrap();
        assert!(svg.trim_end().ends_with("</svg>") && !svg.contains("NaN"));
    }
    // A folder that is missing is made; a file in its place is named.
    let report = SearchReport::new(&space, &outcome, &names);
    let made = report.write(dir.path().join("made/twice")).unwrap();
    assert!(made.iter().all(|path| path.is_file()));
    let error = report.write(dir.path().join("search_progression.csv"));
    let error = error.unwrap_err().to_string();
    assert!(error.contains("search_progression.csv"), "{error}");
}

#[test]
#[cfg(feature = "report")]
fn plots_of_odd_outcomes() {
    let space = space(4, &[32, 24, 16]);
    let accuracy = ObjectiveNames::new("accuracy <exact & match>", "latency")
        .with_units("%", "ms")
        .with_larger_is_better(true);
    let cases: [(&str, &[[f64; 2]]); 6] = [
        ("none", &[]),
        ("single", &[[-41.5, 3.25]]),
        ("equal", &[[-50.0, 2.0]; 5]),
        ("line", &[[-50.0, 2.0], [-50.0, 3.0], [-50.0, 9.0]]),
        (
            "infinite",
            &[
                [f64::NAN, 2.0],
                [-3.0, f64::INFINITY],
                [-4.0, 2.5],
                [-6.0, 3e12],
            ],
        ),
        ("zero", &[[0.0, 0.0], [0.0, 0.0]]),
    ];
    for (name, points) in cases {
        let outcome = outcome(&space, points);
        let report = SearchReport::new(&space, &outcome, &accuracy);
        let svg = report.to_svg().unwrap();
        assert!(
            svg.trim_end().ends_with("</svg>") && !svg.contains("NaN") && !svg.contains("<exact"),
            "{name}"
        );
        assert!(!report.to_csv().contains("-0,"), "{name}");
        report.to_json().unwrap();
        if let Some(keep) = std::env::var_os("ELASTIC_LORA_KEEP_PLOTS") {
            fs::write(PathBuf::from(keep).join(format!("{name}.svg")), &svg).unwrap();
        }
    }
}
