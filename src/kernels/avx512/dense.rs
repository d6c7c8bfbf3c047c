//! Dense numbers.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{LONG, ROWS, for_tiles, prefetch, some_floats, some_words};
use crate::format::{Dense, Number};
use crate::kernels::disjoint::DisjointRows;
use crate::kernels::input::Input;

pub(super) const F32: u8 = 0;
pub(super) const F16: u8 = 1;
pub(super) const BF16: u8 = 2;

/// # Safety
/// As for [`super::multiply`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")]
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
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")]
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
    // A row of inputs that is long is read once for rows that are far from each other; else rows follow each other.
    let part = if input.rows == 1 && input.inputs > LONG {
        rows.len() / ROWS
    } else {
        0
    };
    let at = |row: usize| first.wrapping_add(row * stride);
    let rest = rows.start + ROWS * part..rows.end;
    // SAFETY: the rows are in the values, as was asserted; the rest is the caller's promise.
    unsafe {
        for row in rows.start..rows.start + part {
            tile::<N, ROWS, 1>(at(row), stride, row, part, input, 0, output);
        }
        match N {
            F32 => {
                for_tiles!(rest, input.rows, 1 x 1, 4 x 4, |row, from| tile_f32(
                    at(row),
                    stride,
                    row,
                    input,
                    from,
                    output
                ))
            }
            F16 => {
                for_tiles!(rest, input.rows, 1 x 1, 4 x 4, |row, from| tile_f16(
                    at(row),
                    stride,
                    row,
                    input,
                    from,
                    output
                ))
            }
            _ => {
                for_tiles!(rest, input.rows, 1 x 1, 4 x 4, |row, from| tile_bf16(
                    at(row),
                    stride,
                    row,
                    input,
                    from,
                    output
                ))
            }
        }
    }
}

macro_rules! tile {
    ($name:ident, $number:ident) => {
        /// # Safety
        /// `W` rows of the weight and `R` of the inputs are there, and their outputs this task's.
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")]
        unsafe fn $name<const W: usize, const R: usize>(
            weight: *const u8,
            stride: usize,
            row: usize,
            input: &Input<'_>,
            from: usize,
            output: DisjointRows<'_>,
        ) {
            // SAFETY: the caller's promise.
            unsafe { tile::<$number, W, R>(weight, stride, row, 1, input, from, output) };
        }
    };
}

tile!(tile_f32, F32);
tile!(tile_f16, F16);
tile!(tile_bf16, BF16);

/// Rows of the weight that are `apart` from each other.
///
/// # Safety
/// `W` rows of the weight and `R` of the inputs are there, and their outputs this task's.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")]
#[allow(clippy::needless_range_loop)] // loops over constants, which become straight code on registers
unsafe fn tile<const N: u8, const W: usize, const R: usize>(
    weight: *const u8,
    stride: usize,
    row: usize,
    apart: usize,
    input: &Input<'_>,
    from: usize,
    output: DisjointRows<'_>,
) {
    let size = if N == F32 { 4 } else { 2 };
    let x: [*const f32; R] = std::array::from_fn(|i| input.row(from + i).as_ptr());
    // Two for each pair of rows, so that additions wait less for each other.
    let mut sums = [[[_mm512_setzero_ps(); 2]; R]; W];
    let whole = input.inputs / 32 * 32;
    // SAFETY: all loads are in the rows, the last ones masked.
    unsafe {
        let mut column = 0;
        while column < whole {
            for w in 0..W {
                prefetch(weight.add(w * apart * stride + column * size));
                if N == F32 {
                    prefetch(weight.add(w * apart * stride + column * size + 64));
                }
            }
            for part in 0..2 {
                let mut xs = [_mm512_setzero_ps(); R];
                for i in 0..R {
                    xs[i] = _mm512_loadu_ps(x[i].add(column + 16 * part));
                }
                for w in 0..W {
                    let ws =
                        sixteen::<N>(weight.add(w * apart * stride + (column + 16 * part) * size));
                    for i in 0..R {
                        sums[w][i][part] = _mm512_fmadd_ps(ws, xs[i], sums[w][i][part]);
                    }
                }
            }
            column += 32;
        }
        let mut column = whole;
        while column < input.inputs {
            let rest = input.inputs - column;
            for w in 0..W {
                let at = weight.add(w * apart * stride + column * size);
                let ws = match N {
                    F32 => some_floats(at.cast(), rest),
                    F16 => _mm512_cvtph_ps(some_words(at, rest)),
                    _ => from_bf16(some_words(at, rest)),
                };
                for i in 0..R {
                    sums[w][i][0] =
                        _mm512_fmadd_ps(ws, some_floats(x[i].add(column), rest), sums[w][i][0]);
                }
            }
            column += 16;
        }
        for w in 0..W {
            for i in 0..R {
                output.set(
                    from + i,
                    row + w * apart,
                    _mm512_reduce_add_ps(_mm512_add_ps(sums[w][i][0], sums[w][i][1])),
                );
            }
        }
    }
}

/// # Safety
/// Sixteen numbers are there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
pub(super) unsafe fn sixteen<const N: u8>(at: *const u8) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        match N {
            F32 => _mm512_loadu_ps(at.cast()),
            F16 => _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())),
            _ => from_bf16(_mm256_loadu_si256(at.cast())),
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn from_bf16(words: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words)))
}
