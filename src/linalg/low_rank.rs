//! Low-rank approximation by randomized subspace iteration (Halko, Martinsson, Tropp, arXiv
//! 0909.4061).

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::Matrix;
use super::eigen::symmetric_eigen;
use super::product::{View, add_product};
use crate::error::{Error, Result};

/// Number of directions beyond the requested rank, so that the last requested ones are as accurate
/// as the first.
const EXTRA: usize = 8;
/// Number of rows of a product that one task computes.
const ROWS: usize = 64;
/// Number of passes over the matrix and its transpose.
const PASSES: usize = 4;
/// Singular values below this fraction of the largest are treated as rounding errors.
const NEGLIGIBLE: f64 = 1e-6;

/// A matrix `left * right` of rank `rank`, with its terms in order of decreasing singular value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LowRank {
    /// `[rows, rank]`. The norm of column `i` is the square root of singular value `i`.
    pub left: Matrix,
    /// `[rank, cols]`. The norm of row `i` is the square root of singular value `i`.
    pub right: Matrix,
    /// Singular values, `[rank]`. They are 0 beyond the matrix's own rank, as are the columns of
    /// `left` and the rows of `right` there.
    pub singular: Vec<f64>,
}

/// Approximates `matrix` by the matrix of rank `rank` nearest to it in the sum of squares.
///
/// The result is exact for a matrix of that rank, and otherwise as accurate as four passes allow.
/// Its first terms are the approximation of a smaller rank. The cost is `O(rows * cols * rank)`.
/// The same seed gives the same result with any number of threads.
///
/// # Errors
/// Returns [`Error::NotFinite`] if the matrix has a NaN or infinite element, and
/// [`Error::InvalidArgument`] if the rank is 0.
pub(crate) fn low_rank(matrix: &Matrix, rank: usize, seed: u64) -> Result<LowRank> {
    if rank == 0 {
        return Err(Error::argument("rank", 0, "at least 1"));
    }
    if let Some(index) = matrix
        .as_slice()
        .iter()
        .position(|value| !value.is_finite())
    {
        return Err(Error::NotFinite {
            tensor: "matrix".into(),
            index,
            value: matrix.as_slice()[index],
        });
    }
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let mut found = LowRank {
        left: Matrix::zeros(rows, rank),
        right: Matrix::zeros(rank, cols),
        singular: vec![0.0; rank],
    };
    let k = (rank + EXTRA).min(rows).min(cols);
    if k == 0 {
        return Ok(found);
    }
    let transposed = matrix.transposed();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // The rows of `right` and `left` are directions.
    let mut right = Matrix::from_fn(k, cols, |_, _| rng.random_range(-1.0..1.0));
    let mut left = products(matrix, &right);
    for _ in 0..PASSES {
        orthonormalize(&mut left);
        right = products(&transposed, &left);
        orthonormalize(&mut right);
        left = products(matrix, &right);
    }
    orthonormalize(&mut left);
    // `right` is the matrix in the basis `left`. It has k rows, and its singular vectors follow
    // from a small symmetric matrix.
    right = products(&transposed, &left);
    // Both (i, j) and (j, i) multiply the same rows in the same order, so the matrix is exactly
    // symmetric.
    let entry = |i: usize, j: usize| dot(right.row(i.max(j)), right.row(i.min(j)));
    let gram = (0..k)
        .map(|i| (0..k).map(|j| entry(i, j)).collect())
        .collect();
    let (values, vectors) = symmetric_eigen(gram);
    let mut order: Vec<usize> = (0..k).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
    let largest = values[order[0]].max(0.0).sqrt();
    for (term, index) in order.into_iter().take(rank).enumerate() {
        let value = values[index].max(0.0).sqrt();
        if value <= NEGLIGIBLE * largest {
            break;
        }
        found.singular[term] = value;
        // `u = Q w`, and `w^T Q^T M = value * v^T`.
        let rotated = |of: &Matrix, position: usize| -> f64 {
            (0..k)
                .map(|i| vectors[i][index] * f64::from(of.row(i)[position]))
                .sum()
        };
        for row in 0..rows {
            found.left.row_mut(row)[term] = (rotated(&left, row) * value.sqrt()) as f32;
        }
        for (column, out) in found.right.row_mut(term).iter_mut().enumerate() {
            *out = (rotated(&right, column) / value.sqrt()) as f32;
        }
    }
    Ok(found)
}

/// Multiplies a matrix with each row of `directions`, and returns the products as rows.
fn products(matrix: &Matrix, directions: &Matrix) -> Matrix {
    let (rows, cols, k) = (matrix.rows(), matrix.cols(), directions.rows());
    let mut out = vec![0.0_f32; rows * k];
    let transposed = View::rows(directions.as_slice(), [k, cols], cols).transposed();
    out.par_chunks_mut(ROWS * k)
        .zip(matrix.as_slice().par_chunks(ROWS * cols))
        .for_each(|(out, part)| {
            let part = View::rows(part, [out.len() / k, cols], cols);
            add_product(out, k, 1.0, part, transposed);
        });
    Matrix::from_fn(k, rows, |index, row| out[row * k + index])
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter()
        .zip(b)
        .map(|(a, b)| f64::from(*a) * f64::from(*b))
        .sum()
}

/// Makes the rows orthonormal (Gram-Schmidt, twice). A row that depends linearly on earlier ones
/// becomes 0.
fn orthonormalize(rows: &mut Matrix) {
    for i in 0..rows.rows() {
        let before = dot(rows.row(i), rows.row(i)).sqrt();
        for _ in 0..2 {
            for j in 0..i {
                let other = rows.row(j).to_vec();
                let along = dot(rows.row(i), &other);
                rows.row_mut(i)
                    .iter_mut()
                    .zip(&other)
                    .for_each(|(x, y)| *x -= (along * f64::from(*y)) as f32);
            }
        }
        let length = dot(rows.row(i), rows.row(i)).sqrt();
        let factor = if length > 1e-6 * before {
            1.0 / length
        } else {
            0.0
        };
        rows.row_mut(i)
            .iter_mut()
            .for_each(|x| *x = (f64::from(*x) * factor) as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, cols: usize, seed: u64) -> Matrix {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        Matrix::from_fn(rows, cols, |_, _| rng.random_range(-1.0..1.0))
    }

    fn product(a: &Matrix, b: &Matrix) -> Matrix {
        let entry = |i: usize, j: usize| (0..a.cols()).map(|k| a.row(i)[k] * b.row(k)[j]).sum();
        Matrix::from_fn(a.rows(), b.cols(), entry)
    }

    fn square_distance(a: &Matrix, b: &Matrix) -> f64 {
        a.as_slice()
            .iter()
            .zip(b.as_slice())
            .map(|(a, b)| f64::from(a - b).powi(2))
            .sum()
    }

    #[test]
    fn a_matrix_of_low_rank_is_found_whole_and_in_order() {
        for (rows, cols) in [(41, 27), (9, 60), (60, 9)] {
            let matrix = product(&random(rows, 3, 1), &random(3, cols, 2));
            let found = low_rank(&matrix, 5, 7).unwrap();
            assert!(square_distance(&product(&found.left, &found.right), &matrix) < 1e-8);
            assert!(
                found.singular[..3]
                    .windows(2)
                    .all(|pair| pair[0] >= pair[1])
                    && found.singular[2] > 0.1
            );
            assert_eq!(&found.singular[3..], [0.0, 0.0]);
            assert!(found.right.row(3).iter().all(|value| *value == 0.0));
            // The column and the row have the same norm, the square root of the singular value.
            for (term, singular) in found.singular.iter().enumerate() {
                let left: f64 = (0..rows)
                    .map(|row| f64::from(found.left.row(row)[term]).powi(2))
                    .sum();
                let right = dot(found.right.row(term), found.right.row(term));
                assert!(
                    (left - singular).abs() < 1e-4 && (right - singular).abs() < 1e-4,
                    "{left} {right} {singular}"
                );
            }
        }
    }

    #[test]
    fn no_matrix_of_that_rank_is_much_nearer() {
        let matrix = random(50, 33, 3);
        // With all singular values known: the squares of those that are left out sum to the least
        // distance (Eckart and Young).
        let all = low_rank(&matrix, 33, 5).unwrap();
        assert!(square_distance(&product(&all.left, &all.right), &matrix) < 1e-6);
        for rank in [1, 4, 12] {
            let found = low_rank(&matrix, rank, 5).unwrap();
            let least: f64 = all.singular[rank..].iter().map(|value| value * value).sum();
            let distance = square_distance(&product(&found.left, &found.right), &matrix);
            assert!(
                distance >= least * 0.9999 && distance < least * 1.01,
                "rank {rank}: {distance}, least {least}"
            );
            assert_eq!(found, low_rank(&matrix, rank, 5).unwrap());
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_and_zeros_are_fine() {
        let mut matrix = random(4, 3, 1);
        assert!(low_rank(&matrix, 0, 1).is_err());
        matrix.as_mut_slice()[5] = f32::NAN;
        assert!(matches!(
            low_rank(&matrix, 2, 1),
            Err(Error::NotFinite { index: 5, .. })
        ));
        let none = low_rank(&Matrix::zeros(4, 3), 2, 1).unwrap();
        assert_eq!((none.singular, none.left.count_zeros()), (vec![0.0; 2], 8));
    }
}
