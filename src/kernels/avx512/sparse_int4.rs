//! Sparse codes of 4 bits: `vpexpandb` puts them at their columns, among their zero point. Lane `i` of 64 columns has four.

use std::arch::x86_64::*;
use std::ops::Range;

use super::sparse16::copy_rest;
use super::units::{Units, lanes};
use super::{for_tiles, mask64, near, prefetch};
use crate::format::{SparseInt4, Starts};
use crate::kernels::common::Output;
use crate::kernels::input::{BLOCK, Input, Order};

/// Bytes that are read for 64 columns, as many as their codes may take.
const LOADED: usize = 32;

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
    let starts = weight.offsets.starts();
    let call = Call { weight, starts, unit, words, bits, codes, input, output, units };
    // SAFETY: the rows are in the bits, as was asserted; the rest is the caller's promise.
    unsafe {
        match (input.wide(), unit < BLOCK) {
            (true, false) => for_tiles!(rows, input.rows, 2 x 1, 2 x 4, |row, from| tile_wide(&call, row, from)),
            (true, true) => for_tiles!(rows, input.rows, 2 x 1, 2 x 4, |row, from| tile_wide_small(&call, row, from)),
            (false, false) => for_tiles!(rows, input.rows, 2 x 1, 2 x 4, |row, from| tile_narrow(&call, row, from)),
            (false, true) => {
                for_tiles!(rows, input.rows, 2 x 1, 2 x 4, |row, from| tile_narrow_small(&call, row, from))
            }
        }
    }
}

struct Call<'a> {
    weight: &'a SparseInt4,
    starts: Starts<'a>,
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
            let far = |w: usize| {
                // As far as a row's codes may reach, whatever its bits are.
                let end = call.starts.get(row + w).saturating_add(LOADED * (call.words + 1));
                end <= call.codes.len()
            };
            // SAFETY: the caller's promise; what is not checked was.
            unsafe {
                if (0..W).all(far) {
                    tile::<$wide, $small, false, W, R>(call, row, from);
                } else {
                    tile::<$wide, $small, true, W, R>(call, row, from);
                }
            }
        }
    };
}

tile!(tile_wide, true, false);
tile!(tile_wide_small, true, true);
tile!(tile_narrow, false, false);
tile!(tile_narrow_small, false, true);

/// The codes of 64 columns, one in each byte, zero points where none is stored.
///
/// # Safety
/// [`LOADED`] bytes and the word are there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2")]
unsafe fn expand(codes: *const u8, word: *const u64, zeros: __m512i) -> __m512i {
    // SAFETY: the caller's promise.
    let (pairs, mask) = unsafe { (_mm512_cvtepu8_epi16(_mm256_loadu_si256(codes.cast())), mask64(word)) };
    // A product, not a shift: those who shift also expand, and are busy.
    let high = _mm512_mullo_epi16(pairs, _mm512_set1_epi16(16));
    let spread = _mm512_and_si512(_mm512_or_si512(pairs, high), _mm512_set1_epi8(0x0F));
    _mm512_mask_expand_epi8(zeros, mask, spread)
}

/// # Safety
/// As above; if not `CHECKED`, [`LOADED`] bytes for each word and once more are left from the rows' codes on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi2,fma,f16c,bmi2,popcnt")]
#[allow(clippy::needless_range_loop)] // loops over constants, which become straight code on registers
unsafe fn tile<const WIDE: bool, const SMALL: bool, const CHECKED: bool, const W: usize, const R: usize>(
    call: &Call<'_>,
    row: usize,
    from: usize,
) {
    let Call { weight, starts, unit, words, bits, codes, input, output, units } = *call;
    let mut sums = [[_mm512_setzero_ps(); R]; W];
    let lanes = if SMALL { lanes(4, unit) } else { _mm512_setzero_si512() };
    let x: [*const u8; R] = std::array::from_fn(|i| input.codes(from + i, Order::InOrder).as_ptr());
    let size = input.layout.block_bytes();
    let blocks = input.inputs.div_ceil(BLOCK);
    let (symmetric, middle) = (weight.grid.symmetric, _mm512_set1_epi8(8));
    let mut at: [usize; W] = std::array::from_fn(|w| starts.get(row + w));
    let mut end = [0; LOADED];
    // SAFETY: words are in the bits' rows; codes are read where as many bytes are left, and copied where they are not; inputs and units
    // are read in what was prepared.
    unsafe {
        let bits: [*const u64; W] = std::array::from_fn(|w| bits.add((row + w) * words * 8).cast());
        for w in 0..W {
            sums[w] = units.fill::<R>(row + w, w, from);
        }
        let mut next = |w: usize, index: usize, zeros: __m512i| {
            let word = bits[w].add(index);
            let from = if CHECKED && at[w] + LOADED > codes.len() {
                copy_rest(codes, at[w], &mut end)
            } else {
                codes.as_ptr().add(at[w])
            };
            at[w] += (word.read_unaligned().count_ones() as usize).div_ceil(2);
            (expand(from, word, zeros), from)
        };
        for block in 0..blocks {
            // Past the last word inputs are zeros.
            let whole = 2 * block + 1 < words;
            for w in 0..W {
                if SMALL {
                    for half in 0..1 + usize::from(whole) {
                        let first = (2 * block + half) * (64 / unit);
                        let zeros = if symmetric {
                            middle
                        } else {
                            _mm512_permutexvar_epi32(lanes, _mm512_loadu_si512(units.zeros(w).add(first).cast()))
                        };
                        let (codes, from) = next(w, 2 * block + half, zeros);
                        prefetch(from);
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
                } else {
                    let zeros = if symmetric { middle } else { _mm512_set1_epi32(*units.zeros(w).add(block) as i32) };
                    let (first, from) = next(w, 2 * block, zeros);
                    prefetch(from);
                    let second = if whole { next(w, 2 * block + 1, zeros).0 } else { zeros };
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
                if block % 4 == 0 {
                    prefetch(bits[w].add(2 * block).cast());
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

/// The codes of word `index` of 64 columns of a row of a weight with these bits and codes, one in each byte, where those of the word begin at byte `at`, which goes on to the
/// next word's.
///
/// # Panics
/// For a row that there is not.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")]
pub(super) fn some_codes(
    weight: &SparseInt4,
    bits: &[u8],
    codes: &[u8],
    row: usize,
    index: usize,
    at: &mut usize,
) -> __m512i {
    let words = weight.bits.cols.div_ceil(64);
    if index >= words {
        return _mm512_setzero_si512();
    }
    let bits = &bits.as_chunks::<8>().0[row * words + index];
    let zeros = if weight.grid.symmetric {
        _mm512_set1_epi8(8)
    } else {
        // A unit is no less than eight columns.
        let groups = weight.grid.groups();
        let of_unit = if weight.grid.group_size >= weight.grid.cols { usize::MAX } else { weight.grid.group_size };
        let zero = |eight: usize| {
            let group = (64 * index + 8 * eight) / of_unit;
            u64::from(if group < groups { weight.grid.at(row, group).1 } else { 0 }) * 0x0101_0101_0101_0101
        };
        let zeros: [u64; 8] = std::array::from_fn(zero);
        // SAFETY: an array of 64 bytes.
        unsafe { _mm512_loadu_si512(zeros.as_ptr().cast()) }
    };
    let mut end = [0; LOADED];
    near(codes.as_ptr().wrapping_add(*at + 256));
    let from = match codes.get(*at..) {
        Some(codes) if codes.len() >= LOADED => codes.as_ptr(),
        _ => copy_rest(codes, *at, &mut end),
    };
    *at += u64::from_le_bytes(*bits).count_ones().div_ceil(2) as usize;
    // SAFETY: as many bytes are there, and the word.
    unsafe { expand(from, bits.as_ptr().cast(), zeros) }
}
