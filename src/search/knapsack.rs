//! The multiple-choice knapsack: one choice of each group, with the lowest loss for every budget.
//!
//! Dynamic programming over the groups (Nemhauser and Ullmann, 1969). The states after a group are
//! all pairs of cost and loss that no other pair dominates, so one pass solves every budget at once.
//! With integer costs there are at most as many states as there are costs.

use super::proposals::Genome;

/// Maximum number of states after a group for which a solution should be exact.
pub(super) const MAX_STATES: usize = 8192;

/// Cost and loss of a choice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Item {
    pub cost: f64,
    pub loss: f64,
}

/// A state: its cost and loss, the state before it, and the choice that leads to it.
#[derive(Clone, Copy)]
struct State {
    item: Item,
    from: u32,
    choice: u32,
}

/// Returns the genomes that no other genome dominates in sums of cost and loss, cheapest first.
/// Choices whose cost or loss is not finite are not used; a group without any other leaves no
/// genome. If there are more than `max_states` states after a group, they are thinned to the best one
/// in each of as many equal parts of the range of costs.
pub(super) fn solve(groups: &[Vec<Item>], max_states: usize) -> Vec<Genome> {
    let start = State {
        item: Item {
            cost: 0.0,
            loss: 0.0,
        },
        from: 0,
        choice: 0,
    };
    let mut layers: Vec<Vec<State>> = vec![vec![start]];
    for items in groups {
        let last = layers.last().map_or(&[][..], Vec::as_slice);
        let mut next = Vec::with_capacity(last.len() * items.len());
        for (choice, item) in items.iter().enumerate() {
            if !(item.cost.is_finite() && item.loss.is_finite()) {
                continue;
            }
            next.extend(last.iter().enumerate().map(|(from, state)| State {
                item: Item {
                    cost: state.item.cost + item.cost,
                    loss: state.item.loss + item.loss,
                },
                from: from as u32,
                choice: choice as u32,
            }));
        }
        // The sort is stable, so larger choices, which come first, win ties.
        next.sort_by(|a, b| {
            let cost = a.item.cost.total_cmp(&b.item.cost);
            cost.then(a.item.loss.total_cmp(&b.item.loss))
        });
        layers.push(thin(next, max_states));
    }
    let Some(last) = layers.last() else {
        return Vec::new();
    };
    (0..last.len()).map(|at| trace(&layers[1..], at)).collect()
}

/// Keeps what is not dominated, in ascending order of cost, and at most `max_states` of it.
fn thin(sorted: Vec<State>, max_states: usize) -> Vec<State> {
    let mut kept: Vec<State> = Vec::new();
    for state in sorted {
        if kept
            .last()
            .is_none_or(|last| state.item.loss < last.item.loss)
        {
            kept.push(state);
        }
    }
    let (Some(first), Some(last)) = (kept.first().copied(), kept.last().copied()) else {
        return kept;
    };
    if kept.len() <= max_states {
        return kept;
    }
    let range = last.item.cost - first.item.cost;
    let part = |state: &State| {
        let share = (state.item.cost - first.item.cost) / range;
        (share * max_states.saturating_sub(1) as f64) as usize
    };
    // The last state of a part has the lowest loss.
    let mut thinned: Vec<State> = Vec::with_capacity(max_states);
    for state in kept {
        match thinned.last_mut() {
            Some(last) if part(last) == part(&state) => *last = state,
            _ => thinned.push(state),
        }
    }
    thinned
}

fn trace(layers: &[Vec<State>], mut at: usize) -> Genome {
    let mut genome = vec![0; layers.len()];
    for (gene, layer) in genome.iter_mut().zip(layers).rev() {
        let state = &layer[at];
        *gene = state.choice as usize;
        at = state.from as usize;
    }
    genome
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::search::pareto::non_dominated;

    #[test]
    fn all_budgets_are_solved() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for _ in 0..20 {
            let groups: Vec<Vec<Item>> = (0..6)
                .map(|_| {
                    (0..rng.random_range(1..5))
                        .map(|_| Item {
                            cost: rng.random_range(0..50) as f64,
                            loss: rng.random_range(-20..90) as f64 / 8.0,
                        })
                        .collect()
                })
                .collect();
            let sums = |genome: &[usize]| {
                let items = groups.iter().zip(genome).map(|(items, gene)| items[*gene]);
                items.fold([0.0, 0.0], |[cost, loss], item| {
                    [cost + item.cost, loss + item.loss]
                })
            };
            let mut all: Vec<Genome> = vec![Vec::new()];
            for items in &groups {
                let longer = |genome: &Genome| {
                    let genome = genome.clone();
                    (0..items.len()).map(move |gene| [&genome[..], &[gene]].concat())
                };
                all = all.iter().flat_map(longer).collect();
            }
            let points: Vec<[f64; 2]> = all.iter().map(|genome| sums(genome)).collect();
            let mut expected: Vec<[f64; 2]> = non_dominated(&points)
                .into_iter()
                .map(|at| points[at])
                .collect();
            expected.sort_by(|a, b| a[0].total_cmp(&b[0]));
            expected.dedup();
            let found: Vec<[f64; 2]> = solve(&groups, MAX_STATES)
                .iter()
                .map(|genome| sums(genome))
                .collect();
            assert_eq!(found, expected);
        }
        let nan = Item {
            cost: 1.0,
            loss: f64::NAN,
        };
        assert!(solve(&[vec![nan]], 9).is_empty());
        let one = Item {
            cost: 1.0,
            loss: 2.0,
        };
        assert_eq!(solve(&[vec![nan, one]], 9), [[1]]);
    }

    #[test]
    fn many_groups_stay_within_bounds() {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let groups: Vec<Vec<Item>> = (0..200)
            .map(|_| {
                (0..4)
                    .map(|choice| Item {
                        cost: rng.random_range(0.9..1.1) * (4 - choice) as f64,
                        loss: rng.random_range(0.5..1.5) * choice as f64,
                    })
                    .collect()
            })
            .collect();
        let started = std::time::Instant::now();
        let front = solve(&groups, MAX_STATES);
        assert!(front.len() > 1000 && front.len() <= MAX_STATES);
        assert!(started.elapsed().as_secs_f64() < 20.0);
    }
}
