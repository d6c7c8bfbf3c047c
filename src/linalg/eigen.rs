//! Eigenvalues and eigenvectors of symmetric matrices of some hundred rows: Householder's reduction
//! to three diagonals, then QL steps with implicit shifts (Golub and Van Loan, Matrix Computations,
//! 8.3).

/// Number of QL steps for one eigenvalue; three are usual.
const STEPS: usize = 60;

/// Returns the eigenvalues of a symmetric matrix, in no order, and its eigenvectors, as columns.
pub(super) fn symmetric_eigen(matrix: Vec<Vec<f64>>) -> (Vec<f64>, Vec<Vec<f64>>) {
    let n = matrix.len();
    let (mut diagonal, mut beside, mut rows) = tridiagonal(matrix);
    // Eigenvectors are the rows of `rows`, so that a rotation takes two contiguous lines.
    for first in 0..n {
        for _ in 0..STEPS {
            let end = (first..n - 1)
                .find(|&i| {
                    let scale = diagonal[i].abs() + diagonal[i + 1].abs();
                    beside[i].abs() <= f64::EPSILON * scale
                })
                .unwrap_or(n - 1);
            if end == first {
                break;
            }
            step(&mut diagonal, &mut beside, &mut rows, first, end);
        }
    }
    let columns = (0..n).map(|i| (0..n).map(|j| rows[j][i]).collect());
    (diagonal, columns.collect())
}

/// One implicit QL step on the rows `first..=end`, which are coupled.
fn step(diagonal: &mut [f64], beside: &mut [f64], rows: &mut [Vec<f64>], first: usize, end: usize) {
    // Wilkinson's shift: the eigenvalue of the upper corner that is nearer to its first entry.
    let half = (diagonal[first + 1] - diagonal[first]) / (2.0 * beside[first]);
    let root = half.hypot(1.0).copysign(half);
    let mut bulge = diagonal[end] - diagonal[first] + beside[first] / (half + root);
    let (mut sin, mut cos, mut shift) = (1.0, 1.0, 0.0);
    for i in (first..end).rev() {
        let (off, next) = (sin * beside[i], cos * beside[i]);
        let length = off.hypot(bulge);
        if i + 1 < end {
            beside[i + 1] = length;
        }
        if length == 0.0 {
            // The matrix falls apart here; the next step goes on with a part of it.
            diagonal[i + 1] -= shift;
            return;
        }
        (sin, cos) = (off / length, bulge / length);
        let base = diagonal[i + 1] - shift;
        let turned = (diagonal[i] - base) * sin + 2.0 * cos * next;
        shift = sin * turned;
        diagonal[i + 1] = base + shift;
        bulge = cos * turned - next;
        let (before, after) = rows.split_at_mut(i + 1);
        for (a, b) in before[i].iter_mut().zip(&mut after[0]) {
            (*a, *b) = (cos * *a - sin * *b, sin * *a + cos * *b);
        }
    }
    diagonal[first] -= shift;
    beside[first] = bulge;
}

/// Returns the diagonal and the entries beside it of a matrix of three diagonals, `Q^T A Q`, and the
/// columns of `Q` as lines.
fn tridiagonal(mut matrix: Vec<Vec<f64>>) -> (Vec<f64>, Vec<f64>, Vec<Vec<f64>>) {
    let n = matrix.len();
    let mut beside = vec![0.0; n.saturating_sub(1)];
    let mut reflections: Vec<Option<(Vec<f64>, f64)>> = Vec::new();
    for k in 0..n.saturating_sub(2) {
        let mut v: Vec<f64> = (k + 1..n).map(|i| matrix[i][k]).collect();
        let length = v.iter().map(|x| x * x).sum::<f64>().sqrt();
        if v[1..].iter().all(|x| *x == 0.0) {
            beside[k] = v[0];
            reflections.push(None);
            continue;
        }
        // The sign adds up to a longer vector, without cancellation.
        let target = -length.copysign(v[0]);
        v[0] -= target;
        beside[k] = target;
        let factor = 2.0 / v.iter().map(|x| x * x).sum::<f64>();
        // A becomes A - v w^T - w v^T.
        let below = &mut matrix[k + 1..];
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let mut w: Vec<f64> = below
            .iter()
            .map(|row| factor * dot(&row[k + 1..], &v))
            .collect();
        let along = factor / 2.0 * dot(&v, &w);
        w.iter_mut().zip(&v).for_each(|(w, v)| *w -= along * v);
        for (i, row) in below.iter_mut().enumerate() {
            for (j, x) in row[k + 1..].iter_mut().enumerate() {
                *x -= v[i] * w[j] + w[i] * v[j];
            }
        }
        reflections.push(Some((v, factor)));
    }
    if n >= 2 {
        beside[n - 2] = matrix[n - 1][n - 2];
    }
    let diagonal = (0..n).map(|i| matrix[i][i]).collect();
    // Lines are columns of Q, so that a reflection acts on each line alone.
    let mut lines: Vec<Vec<f64>> = (0..n)
        .map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect())
        .collect();
    for (k, reflection) in reflections.iter().enumerate().rev() {
        let Some((v, factor)) = reflection else {
            continue;
        };
        for line in &mut lines[k + 1..] {
            let part = &mut line[k + 1..];
            let along: f64 = factor * part.iter().zip(v).map(|(a, b)| a * b).sum::<f64>();
            part.iter_mut().zip(v).for_each(|(a, v)| *a -= along * v);
        }
    }
    (diagonal, beside, lines)
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn vectors_are_orthonormal_and_give_the_matrix() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for n in [0, 1, 2, 3, 5, 17, 80] {
            let some: Vec<f64> = (0..n * n).map(|_| rng.random_range(-1.0..1.0)).collect();
            let random: Vec<Vec<f64>> = (0..n)
                .map(|i| (0..n).map(|j| some[i * n + j] + some[j * n + i]).collect())
                .collect();
            let outer: Vec<Vec<f64>> = (0..n)
                .map(|i| (0..n).map(|j| (i + 1) as f64 * (j + 1) as f64).collect())
                .collect();
            let unit = (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect());
            let scaled = random
                .iter()
                .enumerate()
                .map(|(i, row)| {
                    let scale = |j: usize| 1e-6_f64.powf((i + j) as f64 / (2 * n) as f64);
                    row.iter().enumerate().map(|(j, x)| x * scale(j)).collect()
                })
                .collect();
            let zero = vec![vec![0.0; n]; n];
            for matrix in [random.clone(), outer, unit.collect(), scaled, zero] {
                let largest = matrix
                    .iter()
                    .flatten()
                    .fold(0.0, |m: f64, x| m.max(x.abs()));
                let (values, vectors) = symmetric_eigen(matrix.clone());
                for i in 0..n {
                    for j in 0..n {
                        let sum = |of: &dyn Fn(usize) -> f64| (0..n).map(of).sum::<f64>();
                        let entry = sum(&|k| vectors[i][k] * values[k] * vectors[j][k]);
                        assert!((entry - matrix[i][j]).abs() <= 1e-13 * largest * n as f64);
                        let dot = sum(&|k| vectors[k][i] * vectors[k][j]);
                        let unit = f64::from(u8::from(i == j));
                        assert!((dot - unit).abs() < 1e-13 * n as f64);
                    }
                }
            }
        }
    }
}
