//! The subnets that the models of a sensitivity search expect to be best.

use std::collections::HashSet;

use super::super::COST;
use super::super::knapsack::{self, Item};
use super::super::pareto::dominates;
use super::super::proposals::Genome;
use super::super::response::Response;
use super::Sensitivity;

/// Number of operations that a round may spend on predictions.
const WORK: usize = 100_000_000;

/// Number of solutions for these budgets that are predicted.
const SAMPLES: usize = 100;

/// Number of budgets for which sums are solved.
const STATES: usize = 1024;

/// Returns all genomes that differ from one in one group.
pub(super) fn singles(n_choices: &[usize], base: &Genome) -> Vec<Genome> {
    let mut genomes = Vec::new();
    for (at, n) in n_choices.iter().enumerate() {
        for gene in (0..*n).filter(|gene| *gene != base[at]) {
            let mut genome = base.clone();
            genome[at] = gene;
            genomes.push(genome);
        }
    }
    genomes
}

impl Sensitivity {
    /// Returns subnets that no other is expected to dominate, with their predictions.
    ///
    /// The sums of choices around some subnets are solved for all budgets, and the solutions are
    /// improved by changes of one or two groups.
    pub(super) fn candidates(&self, score: &Response, cost: &Response) -> Vec<(Genome, [f64; 2])> {
        let n = self.n_choices.len();
        let predict = |genome: &Genome| [score.predict(genome), cost.predict(genome)];
        let rows = self.scored.len() + self.full.len();
        let mut left = (WORK / (n * rows).max(1)).clamp(500, 50_000);
        let mut archive = Archive::default();
        let smallest: Genome = self.n_choices.iter().map(|n| n - 1).collect();
        let mut anchors = vec![vec![0; n], self.heuristic.clone(), smallest];
        let mut at = 0;
        while at < anchors.len() && left > 0 {
            let anchor = anchors[at].clone();
            let (scores, costs) = (score.around(&anchor), cost.around(&anchor));
            let item = |at: usize, gene: usize| Item {
                cost: costs[at][gene],
                loss: scores[at][gene],
            };
            let choices = self.n_choices.iter().enumerate();
            let items: Vec<Vec<Item>> = choices
                .map(|(at, n)| (0..*n).map(|gene| item(at, gene)).collect())
                .collect();
            let found = knapsack::solve(&items, STATES);
            // Of very many, evenly spaced ones are enough.
            for genome in found.iter().step_by(1 + found.len() / SAMPLES) {
                archive.insert(genome.clone(), &predict);
                left = left.saturating_sub(1);
            }
            at += 1;
            if at == 3 {
                let members: Vec<Genome> = archive.by_cost();
                anchors.extend(
                    (1..6)
                        .filter_map(|part| members.get(part * members.len() / 6))
                        .cloned(),
                );
            }
        }
        while left > 0 {
            let Some(genome) = archive.next() else {
                break;
            };
            for neighbour in self.neighbours(&genome) {
                archive.insert(neighbour, &predict);
                left = left.saturating_sub(1);
                if left == 0 {
                    break;
                }
            }
        }
        archive.members
    }

    /// Returns the genomes with another choice in one group, and with one group a step larger and
    /// another a step smaller.
    fn neighbours(&self, genome: &Genome) -> Vec<Genome> {
        let mut found = singles(&self.n_choices, genome);
        let n = genome.len();
        // The number of exchanges grows with the square of the number of groups.
        if n <= 64 {
            for (up, down) in (0..n * n).map(|pair| (pair / n, pair % n)) {
                if up != down && genome[up] > 0 && genome[down] + 1 < self.n_choices[down] {
                    let mut next = genome.clone();
                    next[up] -= 1;
                    next[down] += 1;
                    found.push(next);
                }
            }
        }
        found
    }
}

/// Genomes that are not dominated by their predictions.
#[derive(Default)]
struct Archive {
    members: Vec<(Genome, [f64; 2])>,
    seen: HashSet<Genome>,
    expanded: HashSet<Genome>,
}

impl Archive {
    fn insert(&mut self, genome: Genome, predict: &impl Fn(&Genome) -> [f64; 2]) {
        if !self.seen.insert(genome.clone()) {
            return;
        }
        let point = predict(&genome);
        let members = &mut self.members;
        if members
            .iter()
            .any(|(_, other)| dominates(other, &point) || *other == point)
        {
            return;
        }
        members.retain(|(_, other)| !dominates(&point, other));
        members.push((genome, point));
    }

    /// Returns a member whose neighbours were not looked at yet, and notes that they are.
    fn next(&mut self) -> Option<Genome> {
        let mut members = self.members.iter();
        let next = members.find(|(genome, _)| !self.expanded.contains(genome));
        let genome = next.map(|(genome, _)| genome.clone())?;
        self.expanded.insert(genome.clone());
        Some(genome)
    }

    fn by_cost(&self) -> Vec<Genome> {
        let mut members: Vec<&(Genome, [f64; 2])> = self.members.iter().collect();
        members.sort_by(|a, b| a.1[COST].total_cmp(&b.1[COST]));
        members
            .into_iter()
            .map(|(genome, _)| genome.clone())
            .collect()
    }
}
