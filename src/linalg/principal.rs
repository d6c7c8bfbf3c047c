//! Parts of a matrix in subspaces of its own: that of its largest singular values, and that of its
//! first columns. Computed in f64, as accurate as the matrix determines them.
//!
//! The singular vectors come from a block Lanczos process with full orthogonalization and restarts
//! (Golub and Van Loan, Matrix Computations, 10.3), on the smaller side of the matrix.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::Matrix;
use super::eigen::symmetric_eigen;
use super::product::{View, add_product};

/// Number of directions beyond the requested rank.
const EXTRA: usize = 8;
/// Largest size of a side whose whole spectrum is computed.
const SMALL: usize = 160;
/// Size of the basis at which the process restarts, if three blocks fit in it.
const MAX_BASIS: usize = 256;
/// Number of restarts after which the process gives up.
const RESTARTS: usize = 500;
/// Largest error of an eigenvector of `M M^T`, as a fraction of the largest eigenvalue.
const TOLERANCE: f64 = 1e-10;
/// Least distance, as a fraction of the largest eigenvalue, between the last eigenvalue of the part
/// and the next one, for the part to be determined.
const GAP: f64 = 1e-6;
/// Fraction of the largest eigenvalue below which eigenvalues are treated as zero.
const NEGLIGIBLE: f64 = 1e-11;
/// Number of rows of a product that one task computes.
const ROWS: usize = 64;

/// Returns `matrix` minus its part in the `rank` largest singular values. Returns `None` if the
/// matrix does not determine that part, because the next singular value is as large.
///
/// The cost is that of some ten to some hundred products with `rank + 8` vectors. The result does
/// not depend on the number of threads.
pub(crate) fn without_principal(matrix: &Matrix, rank: usize) -> Option<Matrix> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let values: Vec<f64> = matrix.as_slice().iter().map(|v| f64::from(*v)).collect();
    let view = View::rows(&values, [rows, cols], cols);
    if rows <= cols {
        return Some(without(matrix, leading(view, rank)?, rows, 1.0));
    }
    // The directions are those of the inputs.
    let basis = leading(view.transposed(), rank)?;
    let transposed = without(&matrix.transposed(), basis, cols, 1.0);
    Some(transposed.transposed())
}

/// Returns `matrix` minus `factor` times its projection on the span of its first `rank` columns.
/// Returns `None` if these depend on each other linearly.
pub(crate) fn without_columns(matrix: &Matrix, rank: usize, factor: f32) -> Option<Matrix> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    if rank > rows.min(cols) {
        return None;
    }
    let column = |j: usize| (0..rows).map(move |i| f64::from(matrix.row(i)[j]));
    let columns: Vec<f64> = (0..rank).flat_map(column).collect();
    let basis = orthonormal(&[], columns, rows);
    // A column that is lost depends on those before it.
    (basis.len() == rank * rows).then(|| without(matrix, basis, rows, f64::from(factor)))
}

/// Returns `matrix - factor * Q Q^T matrix`; `basis` holds the columns of Q, `rows` numbers each.
fn without(matrix: &Matrix, basis: Vec<f64>, rows: usize, factor: f64) -> Matrix {
    let (cols, n) = (matrix.cols(), basis.len() / rows.max(1));
    let values: Vec<f64> = matrix.as_slice().iter().map(|v| f64::from(*v)).collect();
    let view = View::rows(&values, [rows, cols], cols);
    let images = products(view.transposed(), &basis);
    let basis = View::rows(&basis, [n, rows], rows).transposed();
    let images = View::rows(&images, [n, cols], cols);
    let mut left = values.clone();
    left.par_chunks_mut((ROWS * cols).max(1))
        .enumerate()
        .for_each(|(chunk, out)| {
            add_product(out, cols, -factor, basis.part(chunk * ROWS, ROWS), images);
        });
    Matrix::from_fn(rows, cols, |i, j| left[i * cols + j] as f32)
}

/// Returns the eigenvectors of `a a^T` with the `rank` largest eigenvalues, one after the other, or
/// all of them if there are fewer. Returns `None` if they are not determined.
fn leading(a: View<'_, f64>, rank: usize) -> Option<Vec<f64>> {
    let [side, long] = a.size();
    let rank = rank.min(side);
    if rank == side || rank == 0 || long == 0 {
        let unit = |at: usize| f64::from(u8::from(at / side.max(1) == at % side.max(1)));
        return Some((0..rank * side).map(unit).collect());
    }
    let block = (rank + EXTRA).min(side);
    let mut rng = ChaCha8Rng::seed_from_u64(0x5eed);
    if side <= SMALL || 4 * block >= side {
        let unit = |at: usize| f64::from(u8::from(at / side == at % side));
        let basis: Vec<f64> = (0..side * side).map(unit).collect();
        let images = products(a.transposed(), &basis);
        let found = ritz(&basis, &images, side, long, side);
        return determined(&found.values, rank).then(|| found.vectors[..rank * side].to_vec());
    }
    let random = (0..block * side)
        .map(|_| rng.random_range(-1.0..1.0))
        .collect();
    let mut basis = orthonormal(&[], random, side);
    let mut images = products(a.transposed(), &basis);
    let mut last = 0;
    for _ in 0..RESTARTS {
        while basis.len() / side + block <= MAX_BASIS.max(3 * block) {
            // The newest block's products, made orthogonal to all that came before.
            let next = products(a, &images[last * long..]);
            let next = orthonormal(&basis, next, side);
            if next.is_empty() {
                break;
            }
            last = basis.len() / side;
            images.extend(products(a.transposed(), &next));
            basis.extend(next);
        }
        let found = ritz(&basis, &images, side, long, block);
        let mut residual = products(a, &found.images);
        for (at, residual) in residual.iter_mut().enumerate() {
            *residual -= found.values[at / side] * found.vectors[at];
        }
        let error = |i: usize| norm(&residual[i * side..(i + 1) * side]);
        let largest = found.values[0];
        if (0..rank).all(|i| error(i) <= TOLERANCE * largest) {
            return determined(&found.values, rank).then(|| found.vectors[..rank * side].to_vec());
        }
        let next = orthonormal(&found.vectors, residual, side);
        (basis, images) = (found.vectors, found.images);
        last = basis.len() / side;
        images.extend(products(a.transposed(), &next));
        basis.extend(next);
    }
    None
}

/// Returns whether the eigenvalues, in descending order, set apart the first `rank`.
fn determined(values: &[f64], rank: usize) -> bool {
    let largest = values[0];
    match values.get(rank) {
        Some(next) => values[rank - 1] - next > GAP * largest || *next <= NEGLIGIBLE * largest,
        None => true,
    }
}

/// Approximate eigenvectors, their images under the transposed matrix, and eigenvalues, in
/// descending order.
struct Ritz {
    vectors: Vec<f64>,
    images: Vec<f64>,
    values: Vec<f64>,
}

/// Returns the best `count` approximations of eigenvectors in the span of `basis`.
fn ritz(basis: &[f64], images: &[f64], side: usize, long: usize, count: usize) -> Ritz {
    let n = basis.len() / side;
    let rows = View::rows(images, [n, long], long);
    let gram = products(rows, images);
    let entry = |i: usize, j: usize| gram[i.max(j) * n + i.min(j)];
    let (values, vectors) = symmetric_eigen(
        (0..n)
            .map(|i| (0..n).map(|j| entry(i, j)).collect())
            .collect(),
    );
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
    order.truncate(count);
    let weights: Vec<f64> = order
        .iter()
        .flat_map(|index| vectors.iter().map(|row| row[*index]))
        .collect();
    let combined =
        |of: &[f64], len: usize| products(View::rows(of, [n, len], len).transposed(), &weights);
    Ritz {
        vectors: combined(basis, side),
        images: combined(images, long),
        values: order.iter().map(|index| values[*index].max(0.0)).collect(),
    }
}

/// Multiplies a matrix with each of the vectors, which follow one another, as do the products.
fn products(matrix: View<'_, f64>, vectors: &[f64]) -> Vec<f64> {
    let [rows, cols] = matrix.size();
    let n = vectors.len() / cols.max(1);
    if n == 0 || rows == 0 {
        return Vec::new();
    }
    let right = View::rows(vectors, [n, cols], cols).transposed();
    let mut out = vec![0.0; rows * n];
    out.par_chunks_mut(ROWS * n)
        .enumerate()
        .for_each(|(chunk, out)| {
            add_product(out, n, 1.0, matrix.part(chunk * ROWS, ROWS), right);
        });
    (0..n)
        .flat_map(|vector| (0..rows).map(move |row| (row, vector)))
        .map(|(row, vector)| out[row * n + vector])
        .collect()
}

fn norm(vector: &[f64]) -> f64 {
    vector.iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// Makes vectors of length `len` orthonormal to `basis` and among themselves (Gram-Schmidt, twice).
/// Vectors that depend on earlier ones are left out.
fn orthonormal(basis: &[f64], vectors: Vec<f64>, len: usize) -> Vec<f64> {
    let mut done: Vec<f64> = Vec::with_capacity(vectors.len());
    for vector in vectors.chunks_exact(len.max(1)) {
        let mut vector = vector.to_vec();
        let before = norm(&vector);
        for _ in 0..2 {
            let all = basis.chunks_exact(len).chain(done.chunks_exact(len));
            for other in all {
                let along: f64 = vector.iter().zip(other).map(|(a, b)| a * b).sum();
                vector
                    .iter_mut()
                    .zip(other)
                    .for_each(|(a, b)| *a -= along * b);
            }
        }
        let after = norm(&vector);
        if after > 1e-10 * before {
            done.extend(vector.iter().map(|v| v / after));
        }
    }
    done
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

    fn difference(a: &Matrix, b: &Matrix) -> f32 {
        let pairs = a.as_slice().iter().zip(b.as_slice());
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    /// A matrix with orthonormal columns.
    fn orthonormal_columns(rows: usize, cols: usize, seed: u64) -> Matrix {
        let values = random(cols, rows, seed).into_vec();
        let basis = orthonormal(&[], values.into_iter().map(f64::from).collect(), rows);
        Matrix::from_fn(rows, cols, |i, j| basis[j * rows + i] as f32)
    }

    /// A matrix of known singular values, split after the first `rank`.
    fn parts(rows: usize, cols: usize, singular: &[f32], rank: usize) -> [Matrix; 2] {
        let n = singular.len();
        let (u, v) = (
            orthonormal_columns(rows, n, 1),
            orthonormal_columns(cols, n, 2).transposed(),
        );
        let part = |range: std::ops::Range<usize>| {
            let (u, v, range) = (&u, &v, &range);
            let entry = |i: usize, j: usize| {
                let terms = range
                    .clone()
                    .map(|k| u.row(i)[k] * singular[k] * v.row(k)[j]);
                terms.sum()
            };
            Matrix::from_fn(rows, cols, entry)
        };
        [part(0..rank), part(rank..n)]
    }

    #[test]
    fn the_principal_part_is_taken_out_whatever_the_shape() {
        // Small sides and large ones; singular values that are near each other.
        for (rows, cols, rank) in [(23, 17, 3), (17, 40, 5), (190, 230, 4), (260, 200, 16)] {
            let n = rows.min(cols);
            let singular: Vec<f32> = (0..n).map(|i| 3.0 * 0.985_f32.powi(i as i32)).collect();
            let [principal, rest] = parts(rows, cols, &singular, rank);
            let sum = principal.as_slice().iter().zip(rest.as_slice());
            let whole = Matrix::new(rows, cols, sum.map(|(a, b)| a + b).collect()).unwrap();
            let found = without_principal(&whole, rank).unwrap();
            let off = difference(&found, &rest);
            assert!(off < 2e-5, "{rows} x {cols}, rank {rank}: {off}");
        }
    }

    #[test]
    fn a_matrix_of_lower_rank_leaves_nothing() {
        let matrix = product(&random(30, 2, 3), &random(2, 21, 4));
        let left = without_principal(&matrix, 5).unwrap();
        assert!(difference(&left, &Matrix::zeros(30, 21)) < 1e-5);
        let all = without_principal(&random(4, 9, 5), 4).unwrap();
        assert!(difference(&all, &Matrix::zeros(4, 9)) < 1e-6);
    }

    #[test]
    fn equal_singular_values_determine_nothing() {
        let unit = Matrix::from_fn(9, 9, |i, j| f32::from(u8::from(i == j)));
        assert_eq!(without_principal(&unit, 3), None);
        let [a, b] = parts(200, 220, &vec![1.0; 200], 100);
        let sum = a.as_slice().iter().zip(b.as_slice());
        let flat = Matrix::new(200, 220, sum.map(|(a, b)| a + b).collect()).unwrap();
        assert_eq!(without_principal(&flat, 100), None);
    }

    #[test]
    fn the_first_columns_are_taken_out_times_a_factor() {
        let matrix = random(19, 14, 6);
        let found = without_columns(&matrix, 4, 1.0).unwrap();
        for i in 0..19 {
            // The columns themselves lie in their span; the others keep what is orthogonal to it.
            assert!(found.row(i)[..4].iter().all(|v| v.abs() < 1e-6));
        }
        for j in 4..14 {
            for k in 0..4 {
                let dot: f32 = (0..19).map(|i| found.row(i)[j] * matrix.row(i)[k]).sum();
                assert!(dot.abs() < 1e-5, "{dot}");
            }
        }
        let twice = without_columns(&matrix, 4, 2.0).unwrap();
        let expected = Matrix::from_fn(19, 14, |i, j| 2.0 * found.row(i)[j] - matrix.row(i)[j]);
        assert!(difference(&twice, &expected) < 1e-5);
        let copied = Matrix::from_fn(19, 14, |i, j| matrix.row(i)[j / 2]);
        assert_eq!(without_columns(&copied, 4, 1.0), None);
        assert_eq!(without_columns(&matrix, 15, 1.0), None);
    }
}
