//! Dense numbers.

use std::arch::x86_64::*;
use std::ops::Range;

use super::sum_of;
use crate::format::{Dense, Number};
use crate::kernels::disjoint::DisjointRows;
use crate::kernels::input::Input;

/// # Safety
/// As for [`super::multiply`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn multiply(
    weight: &Dense,
    rows: Range<usize>,
    input: &Input<'_>,
    output: DisjointRows<'_>,
) {
    let stride = weight.cols * weight.number.bytes();
    let values: &[u8] = &weight.values;
    for row in rows {
        let values = &values[row * stride..(row + 1) * stride];
        let mut first = 0;
        while first < input.rows {
            // SAFETY: the caller's promise; the row is as long as the inputs, at least.
            unsafe {
                first += match (weight.number, input.rows - first) {
                    (Number::F32, 4..) => products::<0, 4>(values, row, input, first, output),
                    (Number::F32, _) => products::<0, 1>(values, row, input, first, output),
                    (Number::F16, 4..) => products::<1, 4>(values, row, input, first, output),
                    (Number::F16, _) => products::<1, 1>(values, row, input, first, output),
                    (Number::Bf16, 4..) => products::<2, 4>(values, row, input, first, output),
                    (Number::Bf16, _) => products::<2, 1>(values, row, input, first, output),
                };
            }
        }
    }
}

/// A row of the weight with `R` of inputs; returns `R`.
///
/// # Safety
/// The row has as many numbers as there are inputs, and the outputs are this task's.
#[target_feature(enable = "avx2,fma,f16c")]
#[allow(clippy::needless_range_loop)] // loops over constants, which become straight code on registers
pub(super) unsafe fn products<const N: u8, const R: usize>(
    weight: &[u8],
    row: usize,
    input: &Input<'_>,
    first: usize,
    output: DisjointRows<'_>,
) -> usize {
    let number = [Number::F32, Number::F16, Number::Bf16][usize::from(N)];
    let (size, whole) = (number.bytes(), input.inputs / 16 * 16);
    let x: [&[f32]; R] = std::array::from_fn(|i| input.row(first + i));
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    for column in (0..whole).step_by(16) {
        for part in 0..2 {
            let column = column + 8 * part;
            // SAFETY: eight numbers are there.
            unsafe {
                let at = weight.as_ptr().add(column * size);
                let numbers = match N {
                    0 => _mm256_loadu_ps(at.cast()),
                    1 => _mm256_cvtph_ps(_mm_loadu_si128(at.cast())),
                    _ => {
                        let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
                    }
                };
                for i in 0..R {
                    let x = _mm256_loadu_ps(x[i].as_ptr().add(column));
                    sums[i][part] = _mm256_fmadd_ps(numbers, x, sums[i][part]);
                }
            }
        }
    }
    let mut rest = [0.0; 16];
    let rest = &mut rest[..input.inputs - whole];
    number.read(&weight[whole * size..], rest);
    for i in 0..R {
        let last: f32 = rest.iter().zip(&x[i][whole..]).map(|(w, x)| w * x).sum();
        // SAFETY: the caller's promise.
        unsafe {
            output.set(
                first + i,
                row,
                sum_of(_mm256_add_ps(sums[i][0], sums[i][1])) + last,
            )
        };
    }
    R
}
