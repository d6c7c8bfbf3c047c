//! The way for every format and machine: a row of the weight becomes numbers, which multiply the inputs in plain loops.

use super::task::{Task, Update};
use crate::format::{Body, Number};
use crate::kernels::level::{Level, dispatch, mul_add};
use crate::kernels::memory::lines;

/// Partial sums.
const LANES: usize = 16;

/// Bytes that a thread needs for weights of so many columns: a row of numbers, and of codes.
pub(super) fn scratch_bytes(cols: usize) -> usize {
    lines(4 * cols) + lines(cols)
}

/// Products of the inputs with some rows of a weight.
///
/// # Safety
/// The outputs are this task's.
pub(super) unsafe fn multiply(
    level: Level,
    weight: &Body,
    task: Task<'_>,
    numbers: &mut [f32],
    codes: &mut [u8],
) {
    let Task {
        rows,
        input,
        output,
    } = task;
    for row in rows {
        match weight {
            Body::Dense(dense) => dense.dequantize_row(row, numbers),
            // As many as there are, so that it cannot fail.
            Body::Int(packed) => drop(packed.dequantize_rows(row, numbers)),
            Body::Sparse16(sparse) => sparse.dequantize_row(row, numbers),
            Body::SparseInt4(sparse) => sparse.dequantize_row(row, codes, numbers),
        }
        for index in 0..input.rows {
            // SAFETY: the caller's promise.
            unsafe { output.set(index, row, dot(level, numbers, input.row(index))) };
        }
    }
}

dispatch! {
    /// The sum of products of as many numbers as `x` has.
    fn dot<const FMA: bool>(weight: &[f32], x: &[f32]) -> f32 {
        let mut sums = [0.0_f32; LANES];
        let (x, x_rest) = x.as_chunks::<LANES>();
        let (weight, w_rest) = weight[..LANES * x.len() + x_rest.len()].as_chunks::<LANES>();
        for (weight, x) in weight.iter().zip(x) {
            for lane in 0..LANES {
                sums[lane] = mul_add::<FMA>(weight[lane], x[lane], sums[lane]);
            }
        }
        let rest: f32 = w_rest.iter().zip(x_rest).map(|(w, x)| w * x).sum();
        sums.iter().sum::<f32>() + rest
    }
}

dispatch! {
    /// `y += factor * row`.
    fn add_row<const FMA: bool>(y: &mut [f32], factor: f32, number: Number, row: &[u8]) {
        let mut part = [0.0; 64];
        for (y, row) in y.chunks_mut(64).zip(row.chunks(64 * number.bytes())) {
            number.read(row, &mut part);
            y.iter_mut().zip(part).for_each(|(y, b)| *y = mul_add::<FMA>(factor, b, *y));
        }
    }
}

/// Adds an update to the outputs of a task.
///
/// # Safety
/// The outputs are this task's, and written.
///
/// # Panics
/// Where the update has not the rows or columns.
pub(super) unsafe fn add_update(level: Level, update: &Update<'_>, task: Task<'_>) {
    let Task {
        rows: columns,
        input,
        output,
    } = task;
    let (number, stride) = (update.bt.number, update.stride(input.rows, &columns));
    let size = number.bytes();
    for row in 0..input.rows {
        // SAFETY: the caller's promise.
        let y = unsafe { output.row(row, columns.clone()) };
        for rank in 0..update.rank {
            let from = rank * stride;
            let bt = &update.bt.values[from + columns.start * size..from + columns.end * size];
            let h = update.h[row * update.rank + rank];
            add_row(level, y, update.scale * h, number, bt);
        }
    }
}
