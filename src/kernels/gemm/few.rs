//! Products with few rows, as in decoding. Their cost is reading the weight, so all threads read it
//! together, once, in memory order, and widen it in registers.

use std::ops::Range;

use rayon::prelude::*;

use super::operand::{Matrix, Output};
use crate::kernels::Level;
use crate::kernels::disjoint::Disjoint;
use crate::kernels::number::Stored;
use crate::kernels::rows::lines::{ADDED, add_dots, add_lines};

/// Maximum number of rows.
pub(super) const MOST_ROWS: usize = 4;
/// Minimum amount of the weight that one task reads, in numbers.
const TASK: usize = 64 * 1024;
/// Maximum number of parts into which the inner dimension is split. Each part has its own sums,
/// which must be added up at the end.
const PARTS: usize = 8;
/// Columns per task, so that the sums of a task stay in the first-level cache.
const COLUMNS: usize = 4096;
/// Number of lines that are multiplied by all rows before the next lines, so that they are read
/// from memory once.
const DOTTED: usize = 4;

/// Writes zeros into some columns of `m` rows, unless the product is added to the output.
///
/// # Safety
/// The columns must be within the output, and nothing else may use them.
unsafe fn begin(output: Output<'_>, m: usize, columns: Range<usize>) {
    if !output.add {
        for row in 0..m {
            let first = output.to.at(row, columns.start);
            // SAFETY: the caller guarantees that the columns are within the output.
            unsafe { first.write_bytes(0, columns.len()) };
        }
    }
}

/// Runs all tasks, on all threads if `parallel`.
fn each(tasks: usize, parallel: bool, task: impl Fn(usize) + Sync + Send) {
    if parallel && tasks > 1 {
        (0..tasks).into_par_iter().with_max_len(1).for_each(task);
    } else {
        (0..tasks).for_each(task);
    }
}

/// Computes `a W` for `a` `[m, k]` and the weight `[k, n]` in `values`. Returns false and does
/// nothing if neither axis of the weight is contiguous.
///
/// # Safety
/// `a` must be in live memory. The output must have room for the product, and nothing else may use
/// it.
pub(super) unsafe fn multiply<T: Stored>(
    m: usize,
    a: Matrix,
    values: &[T],
    dims: [usize; 2],
    strides: [usize; 2],
    output: Output<'_>,
) -> bool {
    // SAFETY: the caller upholds this function's contract.
    unsafe { multiply_at(Level::detect(), m, a, values, dims, strides, output) }
}

unsafe fn multiply_at<T: Stored>(
    level: Level,
    m: usize,
    a: Matrix,
    values: &[T],
    [k, n]: [usize; 2],
    strides: [usize; 2],
    output: Output<'_>,
) -> bool {
    if !strides.contains(&1) {
        return false;
    }
    let mut x = Vec::with_capacity(m * k);
    for row in 0..m {
        let first = a.first.wrapping_offset(row as isize * a.row);
        // SAFETY: the caller upholds this function's contract.
        x.extend(
            (0..k as isize)
                .map(|column| output.factor * unsafe { *first.wrapping_offset(column * a.column) }),
        );
    }
    // SAFETY: the caller upholds this function's contract, here and below.
    unsafe {
        if strides[1] == 1 {
            along_outputs(level, &x, values, [k, n], strides[0], output);
        } else {
            along_inputs(level, &x, values, [k, n], strides[1], output);
        }
    }
    true
}

/// Multiplies by a weight whose lines are its rows, `stride` numbers apart: each line times its
/// element of `x` is added to all results.
unsafe fn along_outputs<T: Stored>(
    level: Level,
    x: &[f32],
    values: &[T],
    [k, n]: [usize; 2],
    stride: usize,
    output: Output<'_>,
) {
    let (m, blocks) = (x.len() / k, n.div_ceil(COLUMNS));
    let some = (k.div_ceil((k * n / TASK).clamp(1, PARTS))).next_multiple_of(ADDED);
    let parts = k.div_ceil(some);
    let columns = |block: usize| block * COLUMNS..((block + 1) * COLUMNS).min(n);
    let mut sums = vec![0.0_f32; (parts - 1) * m * n];
    let others = Disjoint::new(&mut sums);
    let task = |index: usize| {
        let (part, columns) = (index / blocks, columns(index % blocks));
        let output = match part {
            0 => output,
            _ => Output::new(others.from((part - 1) * m * n), n).added(),
        };
        // SAFETY: the caller upholds this function's contract; these columns of the sums of this
        // part belong to this task, here and below.
        unsafe { begin(output, m, columns.clone()) };
        let lines = part * some..((part + 1) * some).min(k);
        for first in lines.clone().step_by(ADDED) {
            let count = ADDED.min(lines.end - first);
            for (row, x) in x.chunks_exact(k).enumerate() {
                // SAFETY: as above.
                let out = unsafe { output.to.row(row, columns.clone()) };
                add_lines(
                    level,
                    &x[first..first + count],
                    &values[first * stride + columns.start..],
                    stride,
                    out,
                );
            }
        }
    };
    each(parts * blocks, k * n >= 2 * TASK, task);
    for part in sums.chunks_exact(m * n) {
        for (row, sums) in part.chunks_exact(n).enumerate() {
            // SAFETY: the tasks have written the row and are done.
            let out = unsafe { output.to.row(row, 0..n) };
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
        }
    }
}

/// Multiplies by a weight whose lines are its columns, `stride` numbers apart: each line gives one
/// result for each row of `x`.
unsafe fn along_inputs<T: Stored>(
    level: Level,
    x: &[f32],
    values: &[T],
    [k, n]: [usize; 2],
    stride: usize,
    output: Output<'_>,
) {
    let m = x.len() / k;
    let some = (TASK / k).max(1).next_multiple_of(DOTTED);
    let task = |index: usize| {
        let columns = index * some..((index + 1) * some).min(n);
        // SAFETY: the caller upholds this function's contract; these columns belong to this task,
        // here and below.
        unsafe { begin(output, m, columns.clone()) };
        for first in columns.clone().step_by(DOTTED) {
            let columns = first..(first + DOTTED).min(columns.end);
            for (row, x) in x.chunks_exact(k).enumerate() {
                // SAFETY: as above.
                let out = unsafe { output.to.row(row, columns.clone()) };
                add_dots(level, x, &values[first * stride..], stride, out);
            }
        }
    };
    each(n.div_ceil(some), k * n >= 2 * TASK, task);
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const FACTOR: f32 = -0.5;

    /// Computes `FACTOR` times a product by its definition.
    fn naive(x: &[f32], weight: impl Fn(usize, usize) -> f32, [m, n, k]: [usize; 3]) -> Vec<f32> {
        let element = |row: usize, column: usize| {
            (0..k)
                .map(|i| f64::from(x[row * k + i]) * f64::from(weight(i, column)))
                .sum::<f64>() as f32
                * FACTOR
        };
        (0..m * n)
            .map(|index| element(index / n, index % n))
            .collect()
    }

    fn check<T: Stored>(name: &str, narrow: impl Fn(f32) -> T, size: [usize; 3]) {
        let [m, n, k] = size;
        let mut rng = ChaCha8Rng::seed_from_u64((m * n + k) as u64);
        let mut random =
            |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-1.0..1.0)).collect() };
        let x = random(m * k);
        // Rows and columns with gaps between them, which must not be read as part of the weight.
        for (strides, len) in [
            ([n + 3, 1], k * (n + 3)),
            ([1, k + 5], n * (k + 5)),
            ([2 * n, 2], 2 * k * n),
        ] {
            let values: Vec<T> = random(len).into_iter().map(&narrow).collect();
            let want = naive(
                &x,
                |i, j| values[i * strides[0] + j * strides[1]].widen(),
                size,
            );
            for (level, add) in Level::available()
                .into_iter()
                .flat_map(|level| [(level, false), (level, true)])
            {
                let name = format!("{name} {size:?} {strides:?} {level:?} {add}");
                let width = n + 2;
                let before = if add { 0.5 } else { f32::NAN };
                let run = || {
                    let mut out = vec![before; m * width];
                    let output = Output::new(Disjoint::new(&mut out), width)
                        .times(FACTOR)
                        .added_if(add);
                    // SAFETY: `x` and `out` have the sizes that are passed.
                    let done = unsafe {
                        multiply_at(
                            level,
                            m,
                            Matrix::rows(&x, k),
                            &values,
                            [k, n],
                            strides,
                            output,
                        )
                    };
                    assert_eq!(done, strides.contains(&1), "{name}");
                    out
                };
                let out = run();
                let untouched = |value: &f32| value.to_bits() == before.to_bits();
                if !strides.contains(&1) {
                    assert!(out.iter().all(untouched), "{name}");
                    continue;
                }
                let more = if add { before } else { 0.0 };
                for (row, want) in out.chunks_exact(width).zip(want.chunks_exact(n)) {
                    let size = want.iter().fold(1e-2_f32, |size, x| size.max(x.abs()));
                    for (got, want) in row.iter().zip(want) {
                        let error = (got - (want + more)).abs();
                        assert!(error <= 3e-6 * size.max(more), "{name}: off by {error}");
                    }
                    assert!(row[n..].iter().all(untouched), "{name}");
                }
                for threads in [1, 3] {
                    let pool = rayon::ThreadPoolBuilder::new()
                        .num_threads(threads)
                        .build()
                        .unwrap();
                    let again = pool.install(run);
                    assert!(
                        out.iter()
                            .zip(&again)
                            .all(|(a, b)| a.to_bits() == b.to_bits()),
                        "{name}"
                    );
                }
            }
        }
    }

    #[test]
    fn products_of_few_rows_are_the_naive_sums() {
        for size in [
            [1, 1, 1],
            [2, 3, 17],
            [4, 33, 8],
            [3, 17, 100],
            [1, 4200, 129],
            [2, 130, 1031],
        ] {
            check("f32", |x| x, size);
            check("bf16", bf16::from_f32, size);
            check("f16", f16::from_f32, size);
        }
    }
}
