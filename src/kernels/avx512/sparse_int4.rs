//! Sparse codes of 4 bits: `vpexpandb` puts them at their columns, among their zero point. Lane `i` of 64 columns has four.

use std::arch::x86_64::*;
use std::ops::Range;

use super::sparse16::copy_rest;
use super::units::{Units, lanes};
use super::{for_tiles, mask64, prefetch};
use crate::format::SparseInt4;
use crate::kernels::common::Output;
use crate::kernels::input::{BLOCK, Input, Order};

/// # Safety
/// As for [`super::multiply`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi2,fma,f16c,bmi2,popcnt")]
pub(super) unsafe fn multiply(
    weight: &SparseInt4,
    unit: usize,
    rows: Range<usize>,
    input: &Input<'_>,
    output: Output,
    scratch: &mut [f32],
) {
    let words = weight.bits.cols.div_ceil(64);
    assert!(rows.end * words * 8 <= weight.bits.bytes.len() && input.inputs <= weight.bits.cols);
    let units = Units::new(&weight.grid, unit, input, scratch);
    let (bits, codes) = (weight.bits.bytes.as_ptr(), &*weight.codes);
    let call = Call { weight, unit, words, bits, codes, input, output, units };
    // SAFETY: the rows are in the bits, as was asserted; the rest is the caller's promise.
    unsafe {
        match (input.wide(), unit < BLOCK) {
            (true, false) => for_tiles!(rows, input.rows, |row, from| tile_wide(&call, row, from)),
            (true, true) => for_tiles!(rows, input.rows, |row, from| tile_wide_small(&call, row, from)),
            (false, false) => for_tiles!(rows, input.rows, |row, from| tile_narrow(&call, row, from)),
            (false, true) => for_tiles!(rows, input.rows, |row, from| tile_narrow_small(&call, row, from)),
        }
    }
}

struct Call<'a> {
    weight: &'a SparseInt4,
    unit: usize,
    words: usize,
    bits: *const u8,
    codes: &'a [u8],
    input: &'a Input<'a>,
    output: Output,
    units: Units<'a>,
}

macro_rules! tile {
    ($name:ident, $wide:literal, $small:literal) => {
        /// # Safety
        /// `W` rows of the weight and `R` of the inputs are there, and their outputs this task's.
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi2,fma,f16c,bmi2,popcnt")]
        unsafe fn $name<const W: usize, const R: usize>(call: &Call<'_>, row: usize, from: usize) {
            // SAFETY: the caller's promise.
            unsafe { tile::<$wide, $small, W, R>(call, row, from) };
        }
    };
}

tile!(tile_wide, true, false);
tile!(tile_wide_small, true, true);
tile!(tile_narrow, false, false);
tile!(tile_narrow_small, false, true);

/// # Safety
/// As above.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi2,fma,f16c,bmi2,popcnt")]
#[allow(clippy::needless_range_loop)] // loops over constants, which become straight code on registers
unsafe fn tile<const WIDE: bool, const SMALL: bool, const W: usize, const R: usize>(
    call: &Call<'_>,
    row: usize,
    from: usize,
) {
    let Call { weight, unit, words, bits, codes, input, output, units } = *call;
    let mut sums = [[_mm512_setzero_ps(); R]; W];
    let lanes = lanes(4, unit);
    let x: [*const u8; R] = std::array::from_fn(|i| input.codes(from + i, Order::InOrder).as_ptr());
    let size = input.layout.block_bytes();
    let blocks = input.inputs.div_ceil(BLOCK);
    let low = _mm512_set1_epi8(0x0F);
    let (symmetric, middle) = (weight.grid.symmetric, _mm512_set1_epi8(8));
    let mut at: [usize; W] = std::array::from_fn(|w| weight.offsets.get(row + w));
    let mut end = [0; 32];
    // SAFETY: words are in the bits' rows; codes are read where 32 bytes are left, and copied where they are not; inputs and units are
    // read in what was prepared.
    unsafe {
        let bits: [*const u8; W] = std::array::from_fn(|w| bits.add((row + w) * words * 8));
        for w in 0..W {
            sums[w] = units.fill::<R>(row + w, w, from);
        }
        // The codes of 64 columns.
        let mut expand = |w: usize, index: usize, zeros: __m512i| {
            // Past the last word inputs are zeros.
            if index >= words {
                return zeros;
            }
            let at_word = bits[w].add(8 * index).cast::<u64>();
            let (word, mask) = (u64::from_le(at_word.read_unaligned()), mask64(at_word));
            let from =
                if at[w] + 32 <= codes.len() { codes.as_ptr().add(at[w]) } else { copy_rest(codes, at[w], &mut end) };
            if index % 2 == 0 {
                prefetch(from);
            }
            if index % 8 == 0 {
                prefetch(at_word.cast());
            }
            at[w] += word.count_ones().div_ceil(2) as usize;
            let pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(from.cast()));
            let spread = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16::<4>(pairs)), low);
            _mm512_mask_expand_epi8(zeros, mask, spread)
        };
        for block in 0..blocks {
            for w in 0..W {
                if SMALL {
                    for half in 0..2 {
                        let first = (2 * block + half) * (64 / unit);
                        let zeros = if symmetric {
                            middle
                        } else {
                            _mm512_permutexvar_epi32(lanes, _mm512_loadu_si512(units.zeros(w).add(first).cast()))
                        };
                        let codes = expand(w, 2 * block + half, zeros);
                        for i in 0..R {
                            let x = x[i].add(block * size + 64 * half);
                            let at = |part: usize| _mm512_loadu_si512(x.add(BLOCK * part).cast());
                            let mut sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, at(0));
                            if WIDE {
                                sum = _mm512_dpbusd_epi32(_mm512_slli_epi32::<8>(sum), codes, at(1));
                            }
                            let scale = _mm512_loadu_ps(units.products(w, i).add(first));
                            let scale = _mm512_permutexvar_ps(lanes, scale);
                            sums[w][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, sums[w][i]);
                        }
                    }
                    continue;
                }
                let zeros = if symmetric { middle } else { _mm512_set1_epi32(*units.zeros(w).add(block) as i32) };
                let first = expand(w, 2 * block, zeros);
                let second = expand(w, 2 * block + 1, zeros);
                for i in 0..R {
                    let x = x[i].add(block * size);
                    let at = |part: usize| _mm512_loadu_si512(x.add(64 * part).cast());
                    let none = _mm512_setzero_si512();
                    let mut sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(none, first, at(0)), second, at(1));
                    if WIDE {
                        let low = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(none, first, at(2)), second, at(3));
                        sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(sum), low);
                    }
                    let scale = _mm512_set1_ps(*units.products(w, i).add(block));
                    sums[w][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, sums[w][i]);
                }
            }
        }
        for w in 0..W {
            for i in 0..R {
                output.set(from + i, row + w, _mm512_reduce_add_ps(sums[w][i]));
            }
        }
    }
}
