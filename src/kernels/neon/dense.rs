//! Dense numbers.

use std::arch::aarch64::*;
use std::ops::Range;

use super::{BF16, F16, F32, eight, for_tiles, size_of_number, some, sums_of};
use crate::format::{Dense, Number};
use crate::kernels::disjoint::DisjointRows;
use crate::kernels::input::Input;

/// # Safety
/// As for [`super::multiply`].
pub(super) unsafe fn multiply(
    weight: &Dense,
    rows: Range<usize>,
    input: &Input<'_>,
    output: DisjointRows<'_>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match weight.number {
            Number::F32 => of::<F32>(weight, rows, input, output),
            Number::F16 => of::<F16>(weight, rows, input, output),
            Number::Bf16 => of::<BF16>(weight, rows, input, output),
        }
    }
}

/// # Safety
/// As for [`super::multiply`].
unsafe fn of<const N: u8>(
    weight: &Dense,
    rows: Range<usize>,
    input: &Input<'_>,
    output: DisjointRows<'_>,
) {
    let stride = weight.cols * weight.number.bytes();
    let values: &[u8] = &weight.values;
    assert!(rows.end * stride <= values.len() && input.inputs <= weight.cols);
    let first = values.as_ptr();
    // Some rows of the weight with some of inputs.
    macro_rules! tile {
        ($w:literal, $r:literal, $row:expr, $from:expr) => {{
            let x = input.values.as_ptr().wrapping_add($from * input.stride);
            let sums = tile::<N, $w, $r>(
                first.add($row * stride),
                stride,
                x,
                input.stride,
                input.inputs,
            );
            for (i, sums) in sums.into_iter().enumerate() {
                for (w, sum) in sums.into_iter().enumerate() {
                    output.set($from + i, $row + w, sum);
                }
            }
        }};
    }
    // SAFETY: the rows are in the values, as was asserted; the rest is the caller's promise.
    unsafe { for_tiles!(rows, input.rows, 2 x 1, 4 x 4, |row, from| tile(row, from)) }
}

/// Products of `W` rows of numbers, `stride` bytes from one to the next, with `R` of inputs, `x_stride` numbers from one to the next; by
/// rows of inputs.
///
/// # Safety
/// Each row has `count` numbers.
#[inline]
#[target_feature(enable = "neon")]
#[allow(clippy::needless_range_loop)] // loops over constants, which become straight code on registers
pub(super) unsafe fn tile<const N: u8, const W: usize, const R: usize>(
    weight: *const u8,
    stride: usize,
    x: *const f32,
    x_stride: usize,
    count: usize,
) -> [[f32; W]; R] {
    let size = size_of_number(N);
    // As many sums for each pair of rows that there are eight in all, so that additions wait less for each other.
    let chains = (8 / (W * R)).clamp(1, 4);
    let mut sums = [[[vdupq_n_f32(0.0); 4]; R]; W];
    let whole = count / 16 * 16;
    let mut column = 0;
    // SAFETY: all loads are of the `count` numbers of their rows.
    unsafe {
        while column < whole {
            for half in 0..2 {
                let column = column + 8 * half;
                let mut xs = [[vdupq_n_f32(0.0); 2]; R];
                for i in 0..R {
                    xs[i] = eight::<F32>(x.add(i * x_stride + column).cast());
                }
                for w in 0..W {
                    let ws = eight::<N>(weight.add(w * stride + column * size));
                    for part in 0..2 {
                        let chain = (2 * half + part) % chains;
                        for i in 0..R {
                            sums[w][i][chain] = vfmaq_f32(sums[w][i][chain], ws[part], xs[i][part]);
                        }
                    }
                }
            }
            column += 16;
        }
        while column < count {
            let left = (count - column).min(8);
            for w in 0..W {
                let ws = some::<N>(weight.add(w * stride + column * size), left);
                for i in 0..R {
                    let xs = some::<F32>(x.add(i * x_stride + column).cast(), left);
                    for part in 0..2 {
                        let chain = part % chains;
                        sums[w][i][chain] = vfmaq_f32(sums[w][i][chain], ws[part], xs[part]);
                    }
                }
            }
            column += 8;
        }
    }
    let mut all = [[0.0; W]; R];
    for i in 0..R {
        let mut lanes = [vdupq_n_f32(0.0); W];
        for w in 0..W {
            lanes[w] = sums[w][i][0];
            for chain in 1..chains {
                lanes[w] = vaddq_f32(lanes[w], sums[w][i][chain]);
            }
        }
        all[i] = sums_of(lanes);
    }
    all
}
