//! Packed codes of 4 bits with a few rows of inputs: bytes multiply bytes, 64 bytes of codes are 128 columns.

use std::arch::x86_64::*;

use super::lanes::sum_of;
use super::units::Units;
use crate::format::PackedMatrix;
use crate::kernels::linear::input::{BLOCK, Order};
use crate::kernels::linear::task::Task;
use crate::kernels::memory::readable;

/// # Safety
/// As for [`multiply`](crate::kernels::linear::task::Kernels::multiply).
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn multiply(
    weight: &PackedMatrix,
    unit: usize,
    task: Task<'_>,
    scratch: &mut [f32],
) {
    let Task {
        rows,
        input,
        output,
    } = task;
    let stride = weight.cols().div_ceil(2);
    let codes: &[u8] = weight.codes();
    let mut units = Units::new(weight.whole_grid(), unit, input, scratch);
    for row in rows {
        let codes = &codes[row * stride..(row + 1) * stride];
        units.read(row);
        for index in 0..input.rows {
            // SAFETY: the caller's promise; products are as many as the units of inputs, and 8 more.
            unsafe {
                let taken = units.multiply(0, index);
                let (x, products) = (input.codes(index, Order::EvenOdd), units.products(0));
                let all = match (input.wide(), unit < BLOCK) {
                    (true, false) => products_of::<true, false>(codes, x, products, unit),
                    (true, true) => products_of::<true, true>(codes, x, products, unit),
                    (false, false) => products_of::<false, false>(codes, x, products, unit),
                    (false, true) => products_of::<false, true>(codes, x, products, unit),
                };
                output.set(index, row, all - taken);
            }
        }
    }
}

/// The sum of products of codes with a row's inputs. A lane of 32 bits has eight columns of 64.
///
/// # Safety
/// `products` has the units of `x`, and 8 more.
#[target_feature(enable = "avx2,fma")]
unsafe fn products_of<const WIDE: bool, const SMALL: bool>(
    codes: &[u8],
    x: &[u8],
    products: &[f32],
    unit: usize,
) -> f32 {
    let size = if WIDE { 2 * BLOCK } else { BLOCK };
    let (low, ones) = (_mm256_set1_epi8(0x0F), _mm256_set1_epi16(1));
    let lane: [i32; 8] = std::array::from_fn(|lane| (8 * lane / unit) as i32);
    let mut total = _mm256_setzero_ps();
    for (block, x) in x.chunks_exact(size).enumerate() {
        let mut end = [0; 64];
        let codes = readable(codes, 64 * block, &mut end);
        let mut sums = [_mm256_setzero_si256(); 2];
        for (half, sum) in sums.iter_mut().enumerate() {
            // SAFETY: 64 bytes of codes and a block of inputs are there.
            unsafe {
                let pairs = _mm256_loadu_si256(codes.add(32 * half).cast());
                let even = _mm256_and_si256(pairs, low);
                let odd = _mm256_and_si256(_mm256_srli_epi16::<4>(pairs), low);
                let part = |plane: usize| {
                    let at = |odd: usize| {
                        _mm256_loadu_si256(
                            x.as_ptr().add(BLOCK * plane + 64 * odd + 32 * half).cast(),
                        )
                    };
                    // At most 4 * 15 * 128: no sum of 16 bits overflows.
                    let words = _mm256_add_epi16(
                        _mm256_maddubs_epi16(even, at(0)),
                        _mm256_maddubs_epi16(odd, at(1)),
                    );
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
                    let scales =
                        _mm256_loadu_ps(products.as_ptr().add((2 * block + half) * (64 / unit)));
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
