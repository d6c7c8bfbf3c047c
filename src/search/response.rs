//! Predicts one objective of subnets from evaluations: a sum over groups, corrected by a Gaussian
//! process on what the sum leaves.
//!
//! The sum is exact for the largest subnet and for those that differ from it in one group. What is
//! left has two parts. The first is a smooth function of the whole sum, because many small losses
//! together are often worth more, or less, than one by one. The second is a term for each pair of
//! groups, which is 0 where at most one group is smaller, and the larger the more the two groups
//! matter by themselves. The share of each, and the noise, are those of the greatest marginal
//! likelihood.

use super::surrogate::{cholesky, solve};

/// Maximum number of evaluations of a fit, whose cost is cubic in it. The last ones are used.
const MAX_ROWS: usize = 400;

/// Maximum number of evaluations by which the shares and the noise are chosen.
const MAX_CHOOSING: usize = 100;

/// Shares of the two parts that are tried.
const SHARES: [[f64; 2]; 5] = [[1.0, 0.0], [0.9, 0.1], [0.5, 0.5], [0.1, 0.9], [0.0, 1.0]];

/// Variances of the noise that are tried, relative to that of what is left.
const NOISE: [f64; 4] = [1e-6, 1e-4, 1e-2, 0.3];

/// Weight of the position of a choice within its group, beside that of its measured effect, in the
/// terms of pairs.
const POSITION_WEIGHT: f64 = 0.2;

/// An evaluation of a subnet: its genome and one objective. `apart` marks evaluations on other data
/// than those of the sum, which may differ by a constant.
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    pub genome: &'a [usize],
    pub value: f64,
    pub apart: bool,
}

pub(super) struct Response {
    base: f64,
    effects: Vec<Vec<f64>>,
    /// Weights of choices in the terms of pairs.
    weights: Vec<Vec<f64>>,
    /// Sum of the largest effects, by which sums are scaled.
    scale: f64,
    process: Option<Process>,
}

/// What is left, given the evaluations.
struct Process {
    points: Vec<Point>,
    shares: [f64; 2],
    /// Mean of each part of the kernel over the evaluations, by which it is divided.
    norms: [f64; 2],
    /// Solution for the residuals.
    alpha: Vec<f64>,
    /// Whether a constant is learned between data.
    has_apart: bool,
}

/// What a genome is to the kernel.
#[derive(Clone)]
struct Point {
    weights: Vec<f64>,
    sum: f64,
    apart: bool,
}

impl Response {
    /// Creates the sum: the value of the largest subnet, and for each group the change that each
    /// choice brings alone.
    pub(super) fn new(base: f64, effects: Vec<Vec<f64>>) -> Self {
        let most = |effects: &Vec<f64>| effects.iter().fold(0.0f64, |most, x| most.max(x.abs()));
        let scale: f64 = effects.iter().map(most).sum();
        let scale = if scale > 0.0 { scale } else { 1.0 };
        let n = effects.len().max(1) as f64;
        let weights = effects.iter().map(|effects| {
            let last = effects.len().saturating_sub(1).max(1) as f64;
            let weight = |(at, effect): (usize, &f64)| {
                effect.abs() / scale + POSITION_WEIGHT * at as f64 / last / n
            };
            effects.iter().enumerate().map(weight).collect()
        });
        Self {
            weights: weights.collect(),
            base,
            effects,
            scale,
            process: None,
        }
    }

    /// Corrects the sum by evaluations.
    pub(super) fn fit(&mut self, rows: &[Row<'_>]) {
        let rows: Vec<&Row<'_>> = rows.iter().filter(|row| row.value.is_finite()).collect();
        let rows = &rows[rows.len().saturating_sub(MAX_ROWS)..];
        let points: Vec<Point> = rows
            .iter()
            .map(|row| self.point(row.genome, row.apart))
            .collect();
        let residuals: Vec<f64> = rows
            .iter()
            .map(|row| row.value - self.sum(row.genome))
            .collect();
        let n = points.len();
        self.process = None;
        if residuals.iter().all(|residual| *residual == 0.0) {
            return;
        }
        let has_apart = points.iter().any(|point| point.apart);
        let mut norms = [0.0; 2];
        for point in &points {
            let parts = [
                Products::of(point, point).pairs(),
                spline(point.sum, point.sum),
            ];
            (0..2).for_each(|at| norms[at] += parts[at] / n as f64);
        }
        norms.iter_mut().for_each(|norm| {
            if *norm <= 0.0 {
                *norm = 1.0;
            }
        });
        // The shares and the noise are chosen on fewer evaluations, if there are many.
        let step = n.div_ceil(MAX_CHOOSING);
        let sample: Vec<usize> = (0..n).rev().step_by(step).collect();
        let mut best: Option<(f64, [f64; 2], f64)> = None;
        let mut process = Process {
            points,
            shares: SHARES[0],
            norms,
            alpha: Vec::new(),
            has_apart,
        };
        for shares in SHARES {
            process.shares = shares;
            for noise in NOISE {
                let Some((_, likelihood)) = process.solve(&sample, &residuals, noise) else {
                    continue;
                };
                if best.is_none_or(|(most, ..)| likelihood > most) {
                    best = Some((likelihood, shares, noise));
                }
            }
        }
        let Some((_, shares, noise)) = best else {
            return;
        };
        process.shares = shares;
        let all: Vec<usize> = (0..n).collect();
        if let Some((alpha, _)) = process.solve(&all, &residuals, noise) {
            process.alpha = alpha;
            self.process = Some(process);
        }
    }

    /// Returns the prediction, on the data of evaluations that are `apart` if there are any.
    pub(super) fn predict(&self, genome: &[usize]) -> f64 {
        let Some(process) = &self.process else {
            return self.sum(genome);
        };
        let point = self.point(genome, process.has_apart);
        let rest = process
            .points
            .iter()
            .zip(&process.alpha)
            .map(|(known, alpha)| alpha * process.kernel(&point, known))
            .sum::<f64>();
        self.sum(genome) + rest
    }

    /// Returns the predicted change that each choice of each group brings to a genome.
    pub(super) fn around(&self, genome: &[usize]) -> Vec<Vec<f64>> {
        let mut changes: Vec<Vec<f64>> = Vec::with_capacity(genome.len());
        for (effects, gene) in self.effects.iter().zip(genome) {
            changes.push(effects.iter().map(|x| x - effects[*gene]).collect());
        }
        let Some(process) = &self.process else {
            return changes;
        };
        let here = self.point(genome, process.has_apart);
        let raw = self.sum(genome) - self.base;
        for (known, alpha) in process.points.iter().zip(&process.alpha) {
            let products = Products::of(&here, known);
            let at_here = process.value(&products, here.sum, known);
            for (at, gene) in genome.iter().enumerate() {
                let (old, other) = (here.weights[at], known.weights[at]);
                for (choice, change) in changes[at].iter_mut().enumerate() {
                    if choice == *gene {
                        continue;
                    }
                    let moved = products.replaced(old * other, self.weights[at][choice] * other);
                    let sum = raw + self.effects[at][choice] - self.effects[at][*gene];
                    let sum = (sum / self.scale).max(0.0);
                    *change += alpha * (process.value(&moved, sum, known) - at_here);
                }
            }
        }
        changes
    }

    fn sum(&self, genome: &[usize]) -> f64 {
        let effects = self.effects.iter().zip(genome);
        self.base + effects.map(|(effects, gene)| effects[*gene]).sum::<f64>()
    }

    fn point(&self, genome: &[usize], apart: bool) -> Point {
        let weights = self.weights.iter().zip(genome);
        Point {
            weights: weights.map(|(weights, gene)| weights[*gene]).collect(),
            sum: ((self.sum(genome) - self.base) / self.scale).max(0.0),
            apart,
        }
    }
}

impl Process {
    fn kernel(&self, a: &Point, b: &Point) -> f64 {
        let apart = if a.apart && b.apart { 1.0 } else { 0.0 };
        self.value(&Products::of(a, b), a.sum, b) + apart
    }

    /// The kernel without the constant between data.
    fn value(&self, products: &Products, sum: f64, b: &Point) -> f64 {
        let parts = [products.pairs(), spline(sum, b.sum)];
        (0..2)
            .map(|at| self.shares[at] * parts[at] / self.norms[at])
            .sum()
    }

    /// Solves for the residuals of some points, with this noise. Returns the solution, and the
    /// logarithm of the marginal likelihood with the amplitude that makes it greatest.
    fn solve(&self, of: &[usize], residuals: &[f64], noise: f64) -> Option<(Vec<f64>, f64)> {
        let n = of.len();
        let mut factor = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..=i {
                let value = self.kernel(&self.points[of[i]], &self.points[of[j]]);
                (factor[i * n + j], factor[j * n + i]) = (value, value);
            }
            factor[i * n + i] += noise;
        }
        cholesky(&mut factor, n)?;
        let mut alpha: Vec<f64> = of.iter().map(|&at| residuals[at]).collect();
        solve(&factor, n, &mut alpha);
        let fit = of.iter().zip(&alpha).map(|(&at, a)| residuals[at] * a);
        let fit = fit.sum::<f64>() / n as f64;
        let size: f64 = (0..n).map(|i| factor[i * n + i].ln()).sum();
        let likelihood = -0.5 * n as f64 * fit.max(f64::MIN_POSITIVE).ln() - size;
        Some((alpha, likelihood))
    }
}

/// Sums over groups of the products of two points' weights, and of their squares. The sum of products
/// over all pairs of groups follows from them.
struct Products {
    sum: f64,
    squares: f64,
}

impl Products {
    fn of(a: &Point, b: &Point) -> Self {
        let (mut sum, mut squares) = (0.0, 0.0);
        for (x, y) in a.weights.iter().zip(&b.weights) {
            sum += x * y;
            squares += (x * y) * (x * y);
        }
        Self { sum, squares }
    }

    /// The same with another product for one group.
    fn replaced(&self, old: f64, new: f64) -> Self {
        Self {
            sum: self.sum - old + new,
            squares: self.squares - old * old + new * new,
        }
    }

    fn pairs(&self) -> f64 {
        0.5 * (self.sum * self.sum - self.squares)
    }
}

/// The kernel of cubic splines with value and slope 0 at 0.
fn spline(a: f64, b: f64) -> f64 {
    let (low, high) = (a.min(b), a.max(b));
    low * low * (3.0 * high - low) / 6.0
}
