//! Predicts the objectives of a subnet by ridge regression, additive over groups.
//!
//! The cost of a subnet is a sum over its layers, and the loss nearly so for small changes. Puzzle
//! (arXiv 2411.19146) and HAWQ choose configurations with additive models. Here the model only
//! orders proposals and never replaces a measurement.

use super::proposals::Genome;

/// Weight of the feature of a single choice, relative to the linear feature of its group. A small
/// weight makes a straight line the prior.
const STEP_WEIGHT: f64 = 0.3;
const RIDGE: f64 = 0.03;

/// Maximum number of features. The cost of a fit is cubic in it, and would exceed the gain.
const MAX_FEATURES: usize = 1500;

/// One linear model per objective.
pub(super) struct Surrogate {
    offsets: Vec<usize>,
    n_choices: Vec<usize>,
    models: Vec<Model>,
}

struct Model {
    mean: f64,
    weights: Vec<f64>,
}

impl Surrogate {
    /// Fits the evaluations. Returns `None` if fewer than 8 of them are finite or if there are too
    /// many features.
    pub(super) fn fit<O: AsRef<[f64]>>(n_choices: &[usize], told: &[(Genome, O)]) -> Option<Self> {
        let told: Vec<_> = told
            .iter()
            .filter(|(_, objectives)| objectives.as_ref().iter().all(|value| value.is_finite()))
            .collect();
        let mut offsets = Vec::with_capacity(n_choices.len());
        let mut n_features = 0;
        for &n in n_choices {
            offsets.push(n_features);
            n_features += 1 + n;
        }
        if n_features > MAX_FEATURES || told.len() < 8 {
            return None;
        }
        let mut surrogate = Self {
            offsets,
            n_choices: n_choices.to_vec(),
            models: Vec::new(),
        };
        let rows: Vec<Vec<(usize, f64)>> = told
            .iter()
            .map(|(genome, _)| surrogate.features(genome))
            .collect();
        let mut factor = vec![0.0; n_features * n_features];
        for row in &rows {
            for &(i, x) in row {
                for &(j, y) in row {
                    factor[i * n_features + j] += x * y;
                }
            }
        }
        for i in 0..n_features {
            factor[i * n_features + i] += RIDGE;
        }
        cholesky(&mut factor, n_features)?;
        for objective in 0..told.first()?.1.as_ref().len() {
            let mean = told
                .iter()
                .map(|(_, values)| values.as_ref()[objective])
                .sum::<f64>()
                / told.len() as f64;
            let mut weights = vec![0.0; n_features];
            for (row, (_, values)) in rows.iter().zip(&told) {
                for &(i, x) in row {
                    weights[i] += x * (values.as_ref()[objective] - mean);
                }
            }
            solve(&factor, n_features, &mut weights);
            surrogate.models.push(Model { mean, weights });
        }
        Some(surrogate)
    }

    /// Returns the predicted objectives of a genome.
    pub(super) fn predict(&self, genome: &Genome) -> Vec<f64> {
        let features = self.features(genome);
        let value = |model: &Model| {
            model.mean
                + features
                    .iter()
                    .map(|&(i, x)| x * model.weights[i])
                    .sum::<f64>()
        };
        self.models.iter().map(value).collect()
    }

    fn features(&self, genome: &Genome) -> Vec<(usize, f64)> {
        let mut features = Vec::with_capacity(2 * genome.len());
        for ((&gene, &n), &offset) in genome.iter().zip(&self.n_choices).zip(&self.offsets) {
            if n > 1 {
                features.push((offset, 2.0 * gene as f64 / (n - 1) as f64 - 1.0));
                features.push((offset + 1 + gene, STEP_WEIGHT));
            }
        }
        features
    }
}

/// Replaces a symmetric positive definite matrix by its lower Cholesky factor. Returns `None` if it
/// is not positive definite.
pub(super) fn cholesky(a: &mut [f64], n: usize) -> Option<()> {
    for i in 0..n {
        for j in 0..=i {
            let dot: f64 = a[i * n..i * n + j]
                .iter()
                .zip(&a[j * n..j * n + j])
                .map(|(x, y)| x * y)
                .sum();
            let rest = a[i * n + j] - dot;
            a[i * n + j] = match i == j {
                true if rest > 0.0 => rest.sqrt(),
                true => return None,
                false => rest / a[j * n + j],
            };
        }
    }
    Some(())
}

/// Solves `L L^T x = b` in place of `b`.
pub(super) fn solve(factor: &[f64], n: usize, b: &mut [f64]) {
    for i in 0..n {
        let dot: f64 = (0..i).map(|j| factor[i * n + j] * b[j]).sum();
        b[i] = (b[i] - dot) / factor[i * n + i];
    }
    for i in (0..n).rev() {
        let dot: f64 = (i + 1..n).map(|j| factor[j * n + i] * b[j]).sum();
        b[i] = (b[i] - dot) / factor[i * n + i];
    }
}
