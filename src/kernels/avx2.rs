//! AVX2 with FMA and F16C: dense numbers and packed codes of 4 bits. What else there is goes the plain way, with vector code for the
//! products.

use std::arch::x86_64::*;
use std::ops::Range;

use super::common::Output;
use super::input::{BLOCK, Input, Order};
use crate::format::{Body, Dense, Grid, Number, PackedMatrix};

/// Numbers that may be read past the last unit.
const PAD: usize = 8;

/// Numbers of scratch memory for a thread: scales, and their products with those of inputs.
pub(super) fn scratch_floats(units: usize) -> usize {
    2 * (units.next_multiple_of(8) + PAD)
}

/// Products of the inputs with some rows of a weight. False where there is no kernel for it.
///
/// # Safety
/// The processor has the features, the outputs are this task's and in the output's memory.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn multiply(
    weight: &Body,
    unit: Option<usize>,
    rows: Range<usize>,
    input: &Input<'_>,
    output: Output,
    scratch: &mut [f32],
) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        match (weight, unit) {
            (Body::Dense(weight), _) => dense(weight, rows, input, output),
            (Body::Int(weight), Some(unit)) => int4(weight, unit, rows, input, output, scratch),
            _ => return false,
        }
    }
    true
}

#[inline]
#[target_feature(enable = "avx")]
fn sum_of(lanes: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// # Safety
/// As for [`multiply`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dense(weight: &Dense, rows: Range<usize>, input: &Input<'_>, output: Output) {
    let stride = weight.cols * weight.number.bytes();
    let values: &[u8] = &weight.values;
    for row in rows {
        let values = &values[row * stride..(row + 1) * stride];
        let mut first = 0;
        while first < input.rows {
            // SAFETY: the caller's promise; the row is as long as the inputs, at least.
            unsafe {
                first += match (weight.number, input.rows - first) {
                    (Number::F32, 4..) => dense_rows::<0, 4>(values, row, input, first, output),
                    (Number::F32, _) => dense_rows::<0, 1>(values, row, input, first, output),
                    (Number::F16, 4..) => dense_rows::<1, 4>(values, row, input, first, output),
                    (Number::F16, _) => dense_rows::<1, 1>(values, row, input, first, output),
                    (Number::Bf16, 4..) => dense_rows::<2, 4>(values, row, input, first, output),
                    (Number::Bf16, _) => dense_rows::<2, 1>(values, row, input, first, output),
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
unsafe fn dense_rows<const N: u8, const R: usize>(
    weight: &[u8],
    row: usize,
    input: &Input<'_>,
    first: usize,
    output: Output,
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
        unsafe { output.set(first + i, row, sum_of(_mm256_add_ps(sums[i][0], sums[i][1])) + last) };
    }
    R
}

/// # Safety
/// As for [`multiply`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn int4(
    weight: &PackedMatrix,
    unit: usize,
    rows: Range<usize>,
    input: &Input<'_>,
    output: Output,
    scratch: &mut [f32],
) {
    let units = input.inputs.div_ceil(BLOCK) * (BLOCK / unit);
    let (scales, products) = scratch.split_at_mut(units.next_multiple_of(8) + PAD);
    let (first, half, bytes) = input.units_at(unit);
    let stride = weight.cols().div_ceil(2);
    let codes: &[u8] = weight.codes();
    for row in rows {
        let codes = &codes[row * stride..(row + 1) * stride];
        for index in 0..input.rows {
            // SAFETY: prepared inputs have as many units.
            unsafe {
                let of_inputs = first.add(index * bytes).cast::<f32>();
                let sums = first.add(index * bytes + half).cast::<f32>();
                let (of_inputs, sums) =
                    (std::slice::from_raw_parts(of_inputs, units), std::slice::from_raw_parts(sums, units));
                let mut taken = 0.0;
                if index == 0 {
                    fill(weight.whole_grid(), row, unit, &mut scales[..units]);
                }
                let all = products.iter_mut().zip(scales.iter()).zip(of_inputs.iter().zip(sums)).enumerate();
                for (at, ((product, scale), (of_input, sum))) in all {
                    *product = scale * of_input;
                    taken += scale * sum * zero(weight.whole_grid(), row, unit, at);
                }
                products[units..][..PAD].fill(0.0);
                let x = input.codes(index, Order::EvenOdd);
                let all = match (input.wide(), unit < BLOCK) {
                    (true, false) => int4_row::<true, false>(codes, x, products, unit),
                    (true, true) => int4_row::<true, true>(codes, x, products, unit),
                    (false, false) => int4_row::<false, false>(codes, x, products, unit),
                    (false, true) => int4_row::<false, true>(codes, x, products, unit),
                };
                output.set(index, row, all - taken);
            }
        }
    }
}

/// The group of a unit, where there is one.
#[inline]
fn group(grid: &Grid, unit: usize, at: usize) -> Option<usize> {
    let group = if grid.group_size >= grid.cols { 0 } else { at * unit / grid.group_size };
    (group < grid.groups()).then_some(group)
}

#[inline]
fn zero(grid: &Grid, row: usize, unit: usize, at: usize) -> f32 {
    if grid.symmetric {
        return 8.0;
    }
    group(grid, unit, at).map_or(0.0, |group| f32::from(grid.at(row, group).1))
}

/// Scales of a row by units; 0 past the last group.
#[target_feature(enable = "avx2,f16c")]
fn fill(grid: &Grid, row: usize, unit: usize, scales: &mut [f32]) {
    let groups = grid.groups();
    if grid.wide || grid.group_size != unit {
        for (at, scale) in scales.iter_mut().enumerate() {
            *scale = group(grid, unit, at).map_or(0.0, |group| grid.at(row, group).0);
        }
        return;
    }
    let bytes = &grid.scales[2 * row * groups..2 * (row + 1) * groups];
    for (out, bytes) in scales.chunks_mut(8).zip(bytes.chunks(16)) {
        let mut words = [0; 16];
        words[..bytes.len()].copy_from_slice(bytes);
        let mut eight = [0.0; 8];
        // SAFETY: arrays of 16 and 32 bytes.
        unsafe { _mm256_storeu_ps(eight.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(words.as_ptr().cast()))) };
        out.copy_from_slice(&eight[..out.len()]);
    }
    let known = groups.min(scales.len());
    scales[known..].fill(0.0);
}

/// The sum of products of codes with a row's inputs. A lane of 32 bits has eight columns of 64.
///
/// # Safety
/// `products` has the units of `x`, and 8 more.
#[target_feature(enable = "avx2,fma")]
unsafe fn int4_row<const WIDE: bool, const SMALL: bool>(codes: &[u8], x: &[u8], products: &[f32], unit: usize) -> f32 {
    let size = if WIDE { 2 * BLOCK } else { BLOCK };
    let (low, ones) = (_mm256_set1_epi8(0x0F), _mm256_set1_epi16(1));
    let lane: [i32; 8] = std::array::from_fn(|lane| (8 * lane / unit) as i32);
    let mut total = _mm256_setzero_ps();
    for (block, x) in x.chunks_exact(size).enumerate() {
        let mut end = [0; 64];
        let codes = codes.get(64 * block..).unwrap_or(&[]);
        let codes = if codes.len() >= 64 {
            codes.as_ptr()
        } else {
            end[..codes.len()].copy_from_slice(codes);
            end.as_ptr()
        };
        let mut sums = [_mm256_setzero_si256(); 2];
        for (half, sum) in sums.iter_mut().enumerate() {
            // SAFETY: 64 bytes of codes and a block of inputs are there.
            unsafe {
                let pairs = _mm256_loadu_si256(codes.add(32 * half).cast());
                let even = _mm256_and_si256(pairs, low);
                let odd = _mm256_and_si256(_mm256_srli_epi16::<4>(pairs), low);
                let part = |plane: usize| {
                    let at =
                        |odd: usize| _mm256_loadu_si256(x.as_ptr().add(BLOCK * plane + 64 * odd + 32 * half).cast());
                    // At most 4 * 15 * 128: no sum of 16 bits overflows.
                    let words = _mm256_add_epi16(_mm256_maddubs_epi16(even, at(0)), _mm256_maddubs_epi16(odd, at(1)));
                    _mm256_madd_epi16(words, ones)
                };
                *sum = part(0);
                if WIDE {
                    *sum = _mm256_add_epi32(_mm256_slli_epi32::<8>(*sum), part(1));
                }
            }
        }
        // SAFETY: the caller's promise.
        unsafe {
            if SMALL {
                let lanes = _mm256_loadu_si256(lane.as_ptr().cast());
                for (half, sum) in sums.into_iter().enumerate() {
                    let scales = _mm256_loadu_ps(products.as_ptr().add((2 * block + half) * (64 / unit)));
                    let scales = _mm256_permutevar8x32_ps(scales, lanes);
                    total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scales, total);
                }
            } else {
                let sum = _mm256_cvtepi32_ps(_mm256_add_epi32(sums[0], sums[1]));
                total = _mm256_fmadd_ps(sum, _mm256_set1_ps(products[block]), total);
            }
        }
    }
    sum_of(total)
}
