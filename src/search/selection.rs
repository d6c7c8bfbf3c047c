//! How an evolutionary search ranks a pool of subnets and cuts it to the next parents.
//!
//! All variants share one frame: the pool is split into levels, whole levels stay while there is
//! room, and the level that does not fit is cut by a preference. The variants differ in the levels
//! and in the preference. Crowding is NSGA-II (Deb et al., 2002), reference points are R-NSGA-II
//! (Deb and Sundar, 2006), and directions are NSGA-III (Deb and Jain, 2014). NaN is the worst
//! value.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::Goal;
use super::directions::das_dennis;
use super::pareto::{crowding_distance, fast_non_dominated_sort, nan_is_worst};
use super::state::Objectives;
use crate::error::{Error, Result};

/// What an evolutionary search prefers among the subnets of a pool.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Selection {
    /// The whole front, evenly spread by crowding distance (NSGA-II). For two objectives.
    #[default]
    Crowding,
    /// The parts of the front nearest to these points of objectives (R-NSGA-II). Distances are
    /// measured with each objective scaled to its range so far.
    ReferencePoints {
        /// The points, each with one value per objective.
        points: Vec<Vec<f64>>,
        /// Scaled distance within which one subnet stands for all others, at least 0. A larger
        /// value keeps a wider part of the front.
        epsilon: f64,
    },
    /// The whole front, spread along directions that divide each axis into this many parts
    /// (NSGA-III). For three and more objectives. The population should be about the number of
    /// directions: 91 for 12 parts of three objectives.
    Directions {
        /// Number of parts of each axis, at least 1.
        partitions: usize,
    },
    /// A single subnet.
    Goal(Goal),
}

impl Selection {
    /// Checks the numbers of the selection.
    pub(super) fn check(&self) -> Result<()> {
        match self {
            Self::Crowding => Ok(()),
            Self::ReferencePoints { points, epsilon } => {
                if points.is_empty() || points.iter().flatten().any(|x| !x.is_finite()) {
                    let expected = "at least one reference point, all finite";
                    return Err(Error::argument(
                        "selection",
                        format!("{points:?}"),
                        expected,
                    ));
                }
                if !(*epsilon >= 0.0 && epsilon.is_finite()) {
                    return Err(Error::argument("epsilon", epsilon, "finite and at least 0"));
                }
                Ok(())
            }
            Self::Directions { partitions } if !(1..=1000).contains(partitions) => {
                Err(Error::argument("partitions", partitions, "in 1..=1000"))
            }
            Self::Directions { .. } => Ok(()),
            Self::Goal(goal) => goal.check(),
        }
    }

    /// Name of the search that selects in this way.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Crowding => "nsga2",
            Self::ReferencePoints { .. } => "r-nsga2",
            Self::Directions { .. } => "nsga3",
            Self::Goal(_) => "genetic",
        }
    }
}

/// A member of a pool that was chosen.
pub(super) struct Chosen {
    /// Position in the pool.
    pub index: usize,
    /// Level; a parent of a lower level is better.
    pub rank: usize,
    /// Preference within the level; larger is better.
    pub preference: f64,
}

/// A selection with what it has learned of the objectives.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Selector {
    selection: Selection,
    /// Smallest value of each objective so far.
    ideal: Objectives,
    /// Largest finite value of each objective so far.
    worst: Objectives,
    /// The points that are extreme along each axis so far.
    extremes: Vec<Objectives>,
}

impl Selector {
    pub(super) fn new(selection: Selection) -> Self {
        Self {
            selection,
            ideal: Objectives::default(),
            worst: Objectives::default(),
            extremes: Vec::new(),
        }
    }

    pub(super) fn name(&self) -> &'static str {
        self.selection.name()
    }

    /// Chooses at most `n` of a pool, the best first. Older members win ties.
    pub(super) fn choose<P: AsRef<[f64]>>(
        &mut self,
        pool: &[P],
        n: usize,
        rng: &mut ChaCha8Rng,
    ) -> Vec<Chosen> {
        let levels = match &self.selection {
            Selection::Goal(goal) => {
                let mut order: Vec<usize> = (0..pool.len()).collect();
                order.sort_by(|&a, &b| goal.compare(pool[a].as_ref(), pool[b].as_ref()));
                order.into_iter().map(|index| vec![index]).collect()
            }
            _ => fast_non_dominated_sort(pool),
        };
        self.widen(pool);
        if let Selection::Directions { partitions } = self.selection {
            return self.spread(pool, &levels, n, partitions, rng);
        }
        let ranges = self.ideal.0.iter().zip(&self.worst.0);
        let scale = Scale(
            ranges
                .map(|(low, high)| if high > low { high - low } else { 1.0 })
                .collect(),
        );
        let mut chosen = Vec::with_capacity(n.min(pool.len()));
        for (rank, level) in levels.into_iter().enumerate() {
            let members: Vec<&[f64]> = level.iter().map(|&index| pool[index].as_ref()).collect();
            let preference = match &self.selection {
                Selection::ReferencePoints { points, epsilon } => {
                    nearness(&members, points, *epsilon, &scale)
                }
                _ => crowding_distance(&members),
            };
            let mut order: Vec<usize> = (0..level.len()).collect();
            // The sort is stable, so the older member wins ties.
            order.sort_by(|&a, &b| preference[b].total_cmp(&preference[a]));
            order.truncate(n - chosen.len());
            chosen.extend(order.into_iter().map(|at| Chosen {
                index: level[at],
                rank,
                preference: preference[at],
            }));
            if chosen.len() == n {
                break;
            }
        }
        chosen
    }

    /// Updates the ranges of the objectives.
    fn widen<P: AsRef<[f64]>>(&mut self, pool: &[P]) {
        let n_objectives = pool.first().map_or(0, |point| point.as_ref().len());
        self.ideal.0.resize(n_objectives, f64::INFINITY);
        self.worst.0.resize(n_objectives, f64::NEG_INFINITY);
        for point in pool {
            for axis in 0..n_objectives {
                let x = value(point.as_ref(), axis);
                self.ideal.0[axis] = self.ideal.0[axis].min(x);
                if x.is_finite() {
                    self.worst.0[axis] = self.worst.0[axis].max(x);
                }
            }
        }
    }

    /// Chooses by directions. All chosen ones have the same rank and preference, because the method
    /// mates at random.
    fn spread<P: AsRef<[f64]>>(
        &mut self,
        pool: &[P],
        levels: &[Vec<usize>],
        n: usize,
        partitions: usize,
        rng: &mut ChaCha8Rng,
    ) -> Vec<Chosen> {
        let mut kept: Vec<usize> = Vec::new();
        let mut last: Vec<usize> = Vec::new();
        for level in levels {
            if kept.len() + level.len() > n {
                last = level.clone();
                break;
            }
            kept.extend(level);
        }
        let n_objectives = pool.first().map_or(0, |point| point.as_ref().len());
        if !last.is_empty() && n_objectives > 0 {
            let first = levels.first().map_or(&[][..], Vec::as_slice);
            let considered: Vec<usize> = kept.iter().chain(&last).copied().collect();
            let (low, range) = self.normalize(pool, first, &considered, n_objectives);
            let directions = das_dennis(n_objectives, partitions);
            let niche = |index: usize| nearest(pool[index].as_ref(), &low, &range, &directions);
            let mut counts = vec![0usize; directions.len()];
            kept.iter().for_each(|&index| counts[niche(index).0] += 1);
            let mut waiting: Vec<Vec<(f64, usize)>> = vec![Vec::new(); directions.len()];
            for &index in &last {
                let (at, distance) = niche(index);
                waiting[at].push((distance, index));
            }
            while kept.len() < n {
                let open = (0..directions.len()).filter(|&at| !waiting[at].is_empty());
                let Some(least) = open.clone().map(|at| counts[at]).min() else {
                    break;
                };
                let candidates: Vec<usize> = open.filter(|&at| counts[at] == least).collect();
                let at = candidates[rng.random_range(0..candidates.len())];
                // A direction without a member takes the nearest one, another any one.
                let next = match least {
                    0 => (0..waiting[at].len())
                        .min_by(|&a, &b| waiting[at][a].0.total_cmp(&waiting[at][b].0))
                        .unwrap_or(0),
                    _ => rng.random_range(0..waiting[at].len()),
                };
                kept.push(waiting[at].remove(next).1);
                counts[at] += 1;
            }
        }
        kept.into_iter()
            .map(|index| Chosen {
                index,
                rank: 0,
                preference: 0.0,
            })
            .collect()
    }

    /// Updates the extreme points, and returns the ideal and the ranges to the
    /// intercepts of the plane through the extreme points. Where there is no such plane, a range is
    /// that of the front.
    fn normalize<P: AsRef<[f64]>>(
        &mut self,
        pool: &[P],
        front: &[usize],
        considered: &[usize],
        n_objectives: usize,
    ) -> (Vec<f64>, Vec<f64>) {
        let value = |index: usize, axis: usize| value(pool[index].as_ref(), axis);
        let mut worst = vec![f64::NEG_INFINITY; n_objectives];
        let mut worst_of_front = worst.clone();
        for axis in 0..n_objectives {
            for x in considered.iter().map(|&index| value(index, axis)) {
                if x.is_finite() {
                    worst[axis] = worst[axis].max(x);
                }
            }
            for x in front.iter().map(|&index| value(index, axis)) {
                if x.is_finite() {
                    worst_of_front[axis] = worst_of_front[axis].max(x);
                }
            }
        }
        let ideal = self.ideal.0.clone();
        // A candidate is extreme along an axis if it is small along all others.
        let along = |point: &[f64], axis: usize| {
            let terms = point
                .iter()
                .zip(&ideal)
                .enumerate()
                .map(|(other, (x, low))| {
                    let above = if x - low < 1e-3 { 0.0 } else { x - low };
                    if other == axis { above } else { 1e6 * above }
                });
            terms.fold(0.0, f64::max)
        };
        let candidates: Vec<Vec<f64>> = self
            .extremes
            .iter()
            .map(|extreme| extreme.0.clone())
            .chain(front.iter().map(|&index| pool[index].as_ref().to_vec()))
            .filter(|point| point.iter().all(|x| x.is_finite()))
            .collect();
        let extreme = |axis: usize| {
            candidates
                .iter()
                .min_by(|a, b| along(a, axis).total_cmp(&along(b, axis)))
                .cloned()
                .map(Objectives)
        };
        let extremes: Option<Vec<Objectives>> = (0..n_objectives).map(extreme).collect();
        self.extremes = extremes.unwrap_or_default();
        let rows: Vec<Vec<f64>> = self
            .extremes
            .iter()
            .map(|extreme| {
                extreme
                    .0
                    .iter()
                    .zip(&ideal)
                    .map(|(x, low)| x - low)
                    .collect()
            })
            .collect();
        let plane = (rows.len() == n_objectives)
            .then(|| solve(rows, vec![1.0; n_objectives]))
            .flatten()
            .filter(|plane| plane.iter().all(|x| *x > 0.0 && 1.0 / x > 1e-6));
        let ranges = (0..n_objectives).map(|axis| {
            let of_front = worst_of_front[axis] - ideal[axis];
            let of_all = worst[axis] - ideal[axis];
            let range = match &plane {
                Some(plane) => (1.0 / plane[axis]).min(of_all),
                None => of_front,
            };
            match range > 1e-6 {
                true => range,
                false if of_all > 1e-6 => of_all,
                false => 1.0,
            }
        });
        let ranges = ranges.collect();
        (ideal, ranges)
    }
}

fn value(point: &[f64], axis: usize) -> f64 {
    point.get(axis).map_or(f64::INFINITY, |&x| nan_is_worst(x))
}

/// Returns the direction nearest to a point, and the distance from it, with each objective scaled.
fn nearest(point: &[f64], low: &[f64], range: &[f64], directions: &[Vec<f64>]) -> (usize, f64) {
    /// Stands for infinity, so that distances are not NaN.
    const FAR: f64 = 1e12;
    let scaled: Vec<f64> = low
        .iter()
        .zip(range)
        .enumerate()
        .map(|(axis, (low, range))| ((value(point, axis) - low) / range).min(FAR))
        .collect();
    let mut best = (0, f64::INFINITY);
    for (at, direction) in directions.iter().enumerate() {
        let dot: f64 = scaled.iter().zip(direction).map(|(x, d)| x * d).sum();
        let length: f64 = direction.iter().map(|d| d * d).sum();
        let along = dot / length;
        let distance: f64 = scaled
            .iter()
            .zip(direction)
            .map(|(x, d)| (x - along * d).powi(2))
            .sum();
        if distance < best.1 {
            best = (at, distance);
        }
    }
    best
}

/// Solves a small system of linear equations by elimination with pivots. Returns `None` if the
/// matrix is singular.
fn solve(mut rows: Vec<Vec<f64>>, mut right: Vec<f64>) -> Option<Vec<f64>> {
    let n = right.len();
    for at in 0..n {
        let pivot = (at..n).max_by(|&a, &b| rows[a][at].abs().total_cmp(&rows[b][at].abs()))?;
        rows.swap(at, pivot);
        right.swap(at, pivot);
        if rows[at][at].abs() < 1e-12 {
            return None;
        }
        for below in at + 1..n {
            let factor = rows[below][at] / rows[at][at];
            let (above, rest) = rows.split_at_mut(below);
            let terms = rest[0].iter_mut().zip(&above[at]).skip(at);
            terms.for_each(|(x, pivot)| *x -= factor * pivot);
            right[below] -= factor * right[at];
        }
    }
    for at in (0..n).rev() {
        let known: f64 = (at + 1..n).map(|col| rows[at][col] * right[col]).sum();
        right[at] = (right[at] - known) / rows[at][at];
    }
    right.iter().all(|x| x.is_finite()).then_some(right)
}

/// Range of each objective, by which distances are scaled.
struct Scale(Vec<f64>);

impl Scale {
    fn distance(&self, a: &[f64], b: &[f64]) -> f64 {
        let squares = self.0.iter().enumerate().map(|(axis, range)| {
            let (a, b) = (value(a, axis), value(b, axis));
            if a == b {
                0.0
            } else {
                ((a - b) / range).powi(2)
            }
        });
        squares.sum::<f64>().sqrt()
    }
}

/// Returns the preference of each member of a front: minus its best place in the orders by distance
/// from each reference point. Members within `epsilon` of a better one come after all others.
fn nearness(front: &[&[f64]], points: &[Vec<f64>], epsilon: f64, scale: &Scale) -> Vec<f64> {
    let n = front.len();
    let mut place = vec![n; n];
    for point in points {
        let distance: Vec<f64> = front.iter().map(|x| scale.distance(x, point)).collect();
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| distance[a].total_cmp(&distance[b]));
        for (at, member) in order.into_iter().enumerate() {
            place[member] = place[member].min(at);
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by_key(|&member| place[member]);
    let mut cleared = vec![false; n];
    for (at, &member) in order.iter().enumerate() {
        if cleared[member] {
            continue;
        }
        for &other in &order[at + 1..] {
            cleared[other] |= scale.distance(front[member], front[other]) < epsilon;
        }
    }
    let preference = |member| -((place[member] + if cleared[member] { n } else { 0 }) as f64);
    (0..n).map(preference).collect()
}
