//! A blocked Cholesky factorization, from the last column to the first.

use rayon::prelude::*;

use super::Matrix;
use super::product::{View, add_product};

/// Number of columns factored at a time.
const PANEL: usize = 128;
/// Number of rows per task.
const CHUNK: usize = 256;

/// A pivot that is NaN, infinite or not larger than rounding errors.
pub(super) struct BadPivot {
    pub index: usize,
    pub value: f64,
}

/// Overwrites the upper triangle of the symmetric `a` with the upper triangular `u` of `a = u u^T`.
/// The lower triangle is not read, and its contents are unspecified afterwards.
///
/// For each panel of columns, it subtracts one product of the columns already factored, factors the
/// diagonal block in `f64`, and multiplies with the inverse of that block. This takes `n^3 / 3`
/// multiplications in `f32`. The result is the same with any number of threads.
pub(super) fn factor_upper(a: &mut Matrix) -> Result<(), BadPivot> {
    let n = a.rows();
    let diagonal: Vec<f32> = (0..n).map(|i| a.row(i)[i]).collect();
    let values = a.as_mut_slice();
    let mut end = n;
    while end > 0 {
        let start = (end - 1) / PANEL * PANEL;
        let (width, done) = (end - start, n - end);
        let right: Vec<f32> = (start..end)
            .flat_map(|row| &values[row * n + end..(row + 1) * n])
            .copied()
            .collect();
        let right = View::rows(&right, [width, done], done).transposed();
        update_panel(&mut values[..end * n], n, start..end, |rows, count, out| {
            if done > 0 {
                add_product(
                    out,
                    width,
                    -1.0,
                    View::rows(&rows[end..], [count, done], n),
                    right,
                );
            }
        });

        let mut block: Vec<f64> = (start..end)
            .flat_map(|row| &values[row * n + start..row * n + end])
            .map(|value| f64::from(*value))
            .collect();
        factor_block(&mut block, &diagonal[start..end]).map_err(|bad| BadPivot {
            index: start + bad.index,
            ..bad
        })?;
        for (row, line) in block.chunks_exact(width).enumerate() {
            let out = &mut values[(start + row) * n + start..][..width];
            out.iter_mut()
                .zip(line)
                .for_each(|(out, value)| *out = *value as f32);
        }
        let inverse = invert_block(&block, width);
        let inverse = View::rows(&inverse, [width, width], width).transposed();
        update_panel(&mut values[..start * n], n, start..end, |_, count, out| {
            let panel = out.to_vec();
            out.fill(0.0);
            add_product(
                out,
                width,
                1.0,
                View::rows(&panel, [count, width], width),
                inverse,
            );
        });
        end = start;
    }
    Ok(())
}

/// Calls `change` for each chunk of rows, with the rows, their number and a copy of their columns
/// in `columns`, and writes the changed copy back.
fn update_panel(
    values: &mut [f32],
    n: usize,
    columns: std::ops::Range<usize>,
    change: impl Fn(&[f32], usize, &mut [f32]) + Sync,
) {
    let width = columns.len();
    values
        .par_chunks_mut(CHUNK * n)
        .for_each_init(Vec::new, |copy: &mut Vec<f32>, rows| {
            copy.clear();
            rows.chunks_exact(n)
                .for_each(|row| copy.extend_from_slice(&row[columns.clone()]));
            change(rows, rows.len() / n, copy);
            for (row, copy) in rows.chunks_exact_mut(n).zip(copy.chunks_exact(width)) {
                row[columns.clone()].copy_from_slice(copy);
            }
        });
}

/// Does the work of [`factor_upper`] for one small block. A pivot is rejected if it is within
/// rounding errors of 0, measured by the block's original diagonal.
fn factor_block(a: &mut [f64], diagonal: &[f32]) -> Result<(), BadPivot> {
    let n = diagonal.len();
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    for j in (0..n).rev() {
        let (above, row) = a.split_at_mut(j * n);
        let value = row[j] - dot(&row[j + 1..n], &row[j + 1..n]);
        // A NaN fails the first comparison.
        let sound =
            value > f64::from(f32::EPSILON) * f64::from(diagonal[j]).abs() && value.is_finite();
        if !sound {
            return Err(BadPivot { index: j, value });
        }
        row[j] = value.sqrt();
        for line in above.chunks_exact_mut(n) {
            line[j] = (line[j] - dot(&line[j + 1..], &row[j + 1..n])) / row[j];
        }
    }
    for i in 1..n {
        a[i * n..i * n + i].fill(0.0);
    }
    Ok(())
}

/// Returns the inverse of an upper triangular block, which is upper triangular as well.
fn invert_block(a: &[f64], n: usize) -> Vec<f32> {
    let mut inverse = vec![0.0_f64; n * n];
    for i in (0..n).rev() {
        let (done, rest) = inverse.split_at_mut((i + 1) * n);
        let line = &mut done[i * n..];
        line[i] = 1.0;
        // Row i of the inverse is the unit row minus the contributions of the rows below it.
        for (k, below) in (i + 1..n).zip(rest.chunks_exact(n)) {
            let factor = a[i * n + k];
            line[k..]
                .iter_mut()
                .zip(&below[k..])
                .for_each(|(out, value)| *out -= factor * value);
        }
        line[i..]
            .iter_mut()
            .for_each(|value| *value /= a[i * n + i]);
    }
    inverse.into_iter().map(|value| value as f32).collect()
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn gram(n: usize, rows: usize, seed: u64) -> Matrix {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let x: Vec<f64> = (0..rows * n).map(|_| rng.random_range(-1.0..1.0)).collect();
        Matrix::from_fn(n, n, |i, j| {
            (0..rows).map(|r| x[r * n + i] * x[r * n + j]).sum::<f64>() as f32
        })
    }

    #[test]
    fn the_factor_times_its_transpose_is_the_matrix() {
        for n in [1, 2, 17, 128, 129, 300, 401] {
            let a = gram(n, 2 * n, n as u64);
            let mut spoiled = a.clone();
            for i in 0..n {
                spoiled.row_mut(i)[..i].fill(f32::NAN);
            }
            let mut u = spoiled;
            assert!(factor_upper(&mut u).is_ok());
            let size = a
                .as_slice()
                .iter()
                .fold(0.0_f32, |size, x| size.max(x.abs()));
            for i in 0..n {
                for j in i..n {
                    let sum: f64 = (j..n)
                        .map(|k| f64::from(u.row(i)[k]) * f64::from(u.row(j)[k]))
                        .sum();
                    let off = (sum as f32 - a.row(i)[j]).abs();
                    assert!(off <= 2e-6 * size, "{n}: ({i}, {j}) off by {off} of {size}");
                }
            }
        }
    }

    #[test]
    fn a_singular_matrix_has_no_factor() {
        let mut a = gram(150, 40, 3);
        assert!(factor_upper(&mut a).is_err());
        let mut a = gram(9, 20, 3);
        a.row_mut(4)[7] = f32::NAN;
        assert!(factor_upper(&mut a).is_err());
        assert!(factor_upper(&mut Matrix::zeros(3, 3)).is_err());
        assert!(factor_upper(&mut Matrix::zeros(0, 0)).is_ok());
    }
}
