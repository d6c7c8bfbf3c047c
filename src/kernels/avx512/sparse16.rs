//! Sparse numbers of 16 bits: `vpexpandw` puts them at their columns.

use std::arch::x86_64::*;
use std::ops::Range;

use super::dense::from_bf16;
use super::{LONG, ROWS, for_tiles, mask16, prefetch, some_floats};
use crate::format::{Number, Sparse16, Starts};
use crate::kernels::common::readable;
use crate::kernels::disjoint::DisjointRows;
use crate::kernels::input::Input;

/// Bytes that are read for 64 columns, as many as their values may take.
const LOADED: usize = 128;

/// # Safety
/// As for [`super::multiply`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,fma,f16c,popcnt")]
pub(super) unsafe fn multiply(
    weight: &Sparse16,
    rows: Range<usize>,
    input: &Input<'_>,
    output: DisjointRows<'_>,
) {
    let words = weight.bits.cols.div_ceil(64);
    assert!(rows.end * words * 8 <= weight.bits.bytes.len() && input.inputs <= weight.bits.cols);
    let starts = weight.offsets.starts();
    // A row of inputs that is long is read once for rows that are far from each other; else rows follow each other.
    let part = if input.rows == 1 && input.inputs > LONG {
        rows.len() / ROWS
    } else {
        0
    };
    let (bits, values) = (weight.bits.bytes.as_ptr(), &*weight.values);
    let mut call = Call {
        starts,
        words,
        bits,
        values,
        input,
        output,
        apart: part,
    };
    let rest = rows.start + ROWS * part..rows.end;
    // SAFETY: the rows are in the bits, as was asserted; the rest is the caller's promise.
    unsafe {
        for row in rows.start..rows.start + part {
            if weight.number == Number::F16 {
                tile_f16::<ROWS, 1>(&call, row, 0);
            } else {
                tile_bf16::<ROWS, 1>(&call, row, 0);
            }
        }
        call.apart = 1;
        if weight.number == Number::F16 {
            for_tiles!(rest, input.rows, 2 x 1, 2 x 4, |row, from| tile_f16(&call, row, from));
        } else {
            for_tiles!(rest, input.rows, 2 x 1, 2 x 4, |row, from| tile_bf16(&call, row, from));
        }
    }
}

struct Call<'a> {
    starts: Starts<'a>,
    words: usize,
    bits: *const u8,
    values: &'a [u8],
    input: &'a Input<'a>,
    output: DisjointRows<'a>,
    /// How far the rows of a tile are from each other.
    apart: usize,
}

macro_rules! tile {
    ($name:ident, $half:literal) => {
        /// # Safety
        /// `W` rows of the weight and `R` of the inputs are there, and their outputs this task's.
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,fma,f16c,popcnt")]
        unsafe fn $name<const W: usize, const R: usize>(call: &Call<'_>, row: usize, from: usize) {
            let far = |w: usize| {
                // As far as a row's values may reach, whatever its bits are.
                2 * call.starts.get(row + w * call.apart) + LOADED * (call.words + 1)
                    <= call.values.len()
            };
            // SAFETY: the caller's promise; what is not checked was.
            unsafe {
                if (0..W).all(far) {
                    tile::<$half, false, W, R>(call, row, from);
                } else {
                    tile::<$half, true, W, R>(call, row, from);
                }
            }
        }
    };
}

tile!(tile_f16, true);
tile!(tile_bf16, false);

/// The numbers of 64 columns, 16 after 16, and how many are stored.
///
/// # Safety
/// [`LOADED`] bytes of values and the word are there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,fma,f16c,popcnt")]
unsafe fn expand<const HALF: bool>(values: *const u8, word: *const u64) -> ([__m512; 4], usize) {
    let mut numbers = [_mm512_setzero_ps(); 4];
    // SAFETY: the caller's promise.
    let bits = u64::from_le(unsafe { word.read_unaligned() });
    for (part, numbers) in numbers.iter_mut().enumerate() {
        // Counted from the word's beginning, so that no part waits for the one before.
        let before = if part == 0 {
            0
        } else {
            (bits << (64 - 16 * part)).count_ones() as usize
        };
        // SAFETY: at most 32 bytes for each of the parts before, and two of the bits.
        let (some, mask) = unsafe {
            (
                _mm256_loadu_si256(values.add(2 * before).cast()),
                mask16(word.cast::<u16>().add(part)),
            )
        };
        let spread = _mm256_maskz_expand_epi16(mask, some);
        *numbers = if HALF {
            _mm512_cvtph_ps(spread)
        } else {
            from_bf16(spread)
        };
    }
    (numbers, bits.count_ones() as usize)
}

/// # Safety
/// As above; if not `CHECKED`, [`LOADED`] bytes for each word and once more are left from the rows' values on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,fma,f16c,popcnt")]
#[allow(clippy::needless_range_loop)] // loops over constants, which become straight code on registers
unsafe fn tile<const HALF: bool, const CHECKED: bool, const W: usize, const R: usize>(
    call: &Call<'_>,
    row: usize,
    from: usize,
) {
    let Call {
        starts,
        words,
        bits,
        values,
        input,
        output,
        apart,
    } = *call;
    // One for each 16 columns of a word, so that no addition waits for the one before.
    let mut sums = [[[_mm512_setzero_ps(); 4]; R]; W];
    let x: [*const f32; R] = std::array::from_fn(|i| input.row(from + i).as_ptr());
    let mut at: [usize; W] = std::array::from_fn(|w| 2 * starts.get(row + w * apart));
    let mut end = [0; LOADED];
    // SAFETY: words are in the bits' rows; values are read where as many bytes are left, and copied where they are not; inputs are read
    // where they are, the last ones masked.
    unsafe {
        let bits: [*const u64; W] =
            std::array::from_fn(|w| bits.add((row + w * apart) * words * 8).cast());
        let mut next = |w: usize, block: usize| {
            let word = bits[w].add(block);
            let from = if CHECKED {
                readable(values, at[w], &mut end)
            } else {
                values.as_ptr().add(at[w])
            };
            // Two lines, since a word's values may be as many.
            prefetch(from);
            prefetch(from.wrapping_add(64));
            if block.is_multiple_of(8) {
                prefetch(word.cast());
            }
            let (numbers, count) = expand::<HALF>(from, word);
            at[w] += 2 * count;
            numbers
        };
        let whole = input.inputs / 64;
        for block in 0..whole {
            for w in 0..W {
                let numbers = next(w, block);
                for i in 0..R {
                    for part in 0..4 {
                        let x = _mm512_loadu_ps(x[i].add(64 * block + 16 * part));
                        sums[w][i][part] = _mm512_fmadd_ps(numbers[part], x, sums[w][i][part]);
                    }
                }
            }
        }
        let left = input.inputs - 64 * whole;
        if left > 0 {
            for w in 0..W {
                let numbers = next(w, whole);
                for i in 0..R {
                    for part in 0..4 {
                        let x = x[i].wrapping_add(64 * whole + 16 * part);
                        let x = some_floats(x, left.saturating_sub(16 * part));
                        sums[w][i][part] = _mm512_fmadd_ps(numbers[part], x, sums[w][i][part]);
                    }
                }
            }
        }
        for w in 0..W {
            for i in 0..R {
                let [a, b, c, d] = sums[w][i];
                let sum = _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d));
                output.set(from + i, row + w * apart, _mm512_reduce_add_ps(sum));
            }
        }
    }
}

/// The numbers of 64 columns, whose values begin at byte `at`, and how many are stored.
///
/// # Safety
/// The word is there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,fma,f16c,popcnt")]
pub(super) unsafe fn some_numbers(
    half: bool,
    values: &[u8],
    at: usize,
    word: *const u64,
) -> ([__m512; 4], usize) {
    let mut end = [0; LOADED];
    let from = readable(values, at, &mut end);
    // SAFETY: as many bytes are there, and the word by the caller's promise.
    unsafe {
        if half {
            expand::<true>(from, word)
        } else {
            expand::<false>(from, word)
        }
    }
}
