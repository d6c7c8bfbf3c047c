//! Sparse numbers of 16 bits: `vpexpandw` puts them at their columns.

use std::arch::x86_64::*;
use std::ops::Range;

use super::dense::from_bf16;
use super::{for_tiles, mask16, prefetch, some_floats};
use crate::format::{Number, Sparse16};
use crate::kernels::common::Output;
use crate::kernels::input::Input;

/// # Safety
/// As for [`super::multiply`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,fma,f16c,popcnt")]
pub(super) unsafe fn multiply(weight: &Sparse16, rows: Range<usize>, input: &Input<'_>, output: Output) {
    let words = weight.bits.cols.div_ceil(64);
    assert!(rows.end * words * 8 <= weight.bits.bytes.len() && input.inputs <= weight.bits.cols);
    let call = Call { weight, words, bits: weight.bits.bytes.as_ptr(), values: &weight.values, input, output };
    // SAFETY: the rows are in the bits, as was asserted; the rest is the caller's promise.
    unsafe {
        if weight.number == Number::F16 {
            for_tiles!(rows, input.rows, |row, from| tile_f16(&call, row, from));
        } else {
            for_tiles!(rows, input.rows, |row, from| tile_bf16(&call, row, from));
        }
    }
}

struct Call<'a> {
    weight: &'a Sparse16,
    words: usize,
    bits: *const u8,
    values: &'a [u8],
    input: &'a Input<'a>,
    output: Output,
}

macro_rules! tile {
    ($name:ident, $half:literal) => {
        /// # Safety
        /// `W` rows of the weight and `R` of the inputs are there, and their outputs this task's.
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,fma,f16c,popcnt")]
        unsafe fn $name<const W: usize, const R: usize>(call: &Call<'_>, row: usize, from: usize) {
            // SAFETY: the caller's promise.
            unsafe { tile::<$half, W, R>(call, row, from) };
        }
    };
}

tile!(tile_f16, true);
tile!(tile_bf16, false);

/// The numbers of 64 columns, 16 after 16, whose bits are the 8 bytes at `bits`, from 128 bytes at `values`.
///
/// # Safety
/// They are there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,fma,f16c,popcnt")]
unsafe fn expand<const HALF: bool>(values: *const u8, bits: *const u8) -> [__m512; 4] {
    let mut at = values;
    let mut numbers = [_mm512_setzero_ps(); 4];
    for (part, numbers) in numbers.iter_mut().enumerate() {
        // SAFETY: at most 32 bytes for each of the parts before, and two of the bits.
        let (some, count, mask) = unsafe {
            let bits = bits.add(2 * part).cast::<u16>();
            (_mm256_loadu_si256(at.cast()), bits.read_unaligned().count_ones(), mask16(bits))
        };
        let spread = _mm256_maskz_expand_epi16(mask, some);
        *numbers = if HALF { _mm512_cvtph_ps(spread) } else { from_bf16(spread) };
        at = at.wrapping_add(2 * count as usize);
    }
    numbers
}

/// # Safety
/// As above.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,fma,f16c,popcnt")]
#[allow(clippy::needless_range_loop)] // loops over constants, which become straight code on registers
unsafe fn tile<const HALF: bool, const W: usize, const R: usize>(call: &Call<'_>, row: usize, from: usize) {
    let Call { weight, words, bits, values, input, output } = *call;
    // One for each 16 columns of a word, so that no addition waits for the one before.
    let mut sums = [[[_mm512_setzero_ps(); 4]; R]; W];
    let x: [*const f32; R] = std::array::from_fn(|i| input.row(from + i).as_ptr());
    let mut at: [usize; W] = std::array::from_fn(|w| 2 * weight.offsets.get(row + w));
    let mut end = [0; 128];
    // SAFETY: words are in the bits' rows; values are read where 128 bytes are left, and copied where they are not; inputs are read
    // where they are, the last ones masked.
    unsafe {
        let bits: [*const u8; W] = std::array::from_fn(|w| bits.add((row + w) * words * 8));
        for block in 0..input.inputs.div_ceil(64) {
            let left = input.inputs - 64 * block;
            for w in 0..W {
                let word = bits[w].add(8 * block);
                let from = if at[w] + 128 <= values.len() {
                    values.as_ptr().add(at[w])
                } else {
                    copy_rest(values, at[w], &mut end)
                };
                prefetch(from);
                if block % 8 == 0 {
                    prefetch(word);
                }
                at[w] += 2 * word.cast::<u64>().read_unaligned().count_ones() as usize;
                let numbers = expand::<HALF>(from, word);
                for i in 0..R {
                    let x = x[i].add(64 * block);
                    for part in 0..4 {
                        let x = if left >= 64 {
                            _mm512_loadu_ps(x.add(16 * part))
                        } else {
                            some_floats(x.wrapping_add(16 * part), left.saturating_sub(16 * part))
                        };
                        sums[w][i][part] = _mm512_fmadd_ps(numbers[part], x, sums[w][i][part]);
                    }
                }
            }
        }
        for w in 0..W {
            for i in 0..R {
                let [a, b, c, d] = sums[w][i];
                let sum = _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d));
                output.set(from + i, row + w, _mm512_reduce_add_ps(sum));
            }
        }
    }
}

/// Copies what is left of `bytes` from `at` on, zeros after it.
#[cold]
pub(super) fn copy_rest<const N: usize>(bytes: &[u8], at: usize, out: &mut [u8; N]) -> *const u8 {
    let rest = bytes.get(at..).unwrap_or(&[]);
    let rest = &rest[..rest.len().min(N)];
    out.fill(0);
    out[..rest.len()].copy_from_slice(rest);
    out.as_ptr()
}
