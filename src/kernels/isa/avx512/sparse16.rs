//! Sparse 16-bit numbers. `vpexpandw` moves them to their columns.

use std::arch::x86_64::*;
use std::ops::Range;

use super::lanes::{LONG, from_bf16};
use super::loads::{mask16, prefetch, some_floats};
use crate::format::{Number, Sparse16, Starts};
use crate::kernels::linear::task::Task;
use crate::kernels::linear::tiles::{Tiles, firsts, for_tiles};
use crate::kernels::memory::readable;

/// Number of bytes that are read for 64 columns, which is the maximum that their values take.
const LOADED: usize = 128;

/// # Safety
/// As for [`multiply`](crate::kernels::linear::task::Kernels::multiply).
pub(super) unsafe fn multiply(weight: &Sparse16, task: Task<'_>) {
    let words = weight.bits.cols.div_ceil(64);
    assert!(
        task.rows.end * words * 8 <= weight.bits.bytes.len()
            && task.input.inputs <= weight.bits.cols
    );
    let call = Call {
        starts: weight.offsets.starts(),
        words,
        bits: weight.bits.bytes.as_ptr(),
        values: &weight.values,
        task: &task,
    };
    // SAFETY: the rows are within the mask, as asserted above; the caller guarantees the rest.
    unsafe {
        if weight.number == Number::F16 {
            for_tiles(&Of::<true>(&call), task.rows.clone(), task.input);
        } else {
            for_tiles(&Of::<false>(&call), task.rows.clone(), task.input);
        }
    }
}

struct Call<'a> {
    starts: Starts<'a>,
    words: usize,
    bits: *const u8,
    values: &'a [u8],
    task: &'a Task<'a>,
}

/// Numbers in half precision, or in bfloat16.
struct Of<'a, const HALF: bool>(&'a Call<'a>);

impl<const HALF: bool> Tiles for Of<'_, HALF> {
    const ONE: usize = 2;
    const MORE: usize = 2;
    const LONG: usize = LONG;

    #[inline(always)]
    unsafe fn tile<const W: usize, const R: usize>(
        &self,
        rows: Range<usize>,
        apart: usize,
        from: usize,
    ) {
        let call = self.0;
        for row in firsts::<W>(rows, apart) {
            // The end of the longest row of values that any mask can have.
            let far = |w: usize| {
                2 * call.starts.get(row + w * apart) + LOADED * (call.words + 1)
                    <= call.values.len()
            };
            // SAFETY: the caller upholds this function's contract, and `end` was checked above.
            unsafe {
                if (0..W).all(far) {
                    tile::<HALF, false, W, R>(call, row, apart, from);
                } else {
                    tile::<HALF, true, W, R>(call, row, apart, from);
                }
            }
        }
    }
}

/// Returns the numbers of 64 columns, 16 in each vector, and how many of them are stored.
///
/// # Safety
/// [`LOADED`] bytes of values and the word must be readable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,fma,f16c,popcnt")]
unsafe fn expand<const HALF: bool>(values: *const u8, word: *const u64) -> ([__m512; 4], usize) {
    let mut numbers = [_mm512_setzero_ps(); 4];
    // SAFETY: the caller upholds this function's contract.
    let bits = u64::from_le(unsafe { word.read_unaligned() });
    for (part, numbers) in numbers.iter_mut().enumerate() {
        // Counted from the beginning of the word, so that no part waits for the one before it.
        let before = if part == 0 {
            0
        } else {
            (bits << (64 - 16 * part)).count_ones() as usize
        };
        // SAFETY: the parts before take at most 32 bytes each, and the mask of a part is two bytes.
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
/// `W` rows of the weight and `R` rows of inputs must exist, and their outputs must belong to this
/// task. If not `CHECKED`, [`LOADED`] bytes for each word and one more must be readable from each
/// row's values on.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,fma,f16c,popcnt")]
#[allow(clippy::needless_range_loop)] // loops over constants, which become straight code on registers
unsafe fn tile<const HALF: bool, const CHECKED: bool, const W: usize, const R: usize>(
    call: &Call<'_>,
    row: usize,
    apart: usize,
    from: usize,
) {
    let Call {
        starts,
        words,
        bits,
        values,
        task,
    } = *call;
    let Task { input, output, .. } = task;
    // One sum for each 16 columns of a word, so that no addition waits for the one before.
    let mut sums = [[[_mm512_setzero_ps(); 4]; R]; W];
    let x: [*const f32; R] = std::array::from_fn(|i| input.row(from + i).as_ptr());
    let mut at: [usize; W] = std::array::from_fn(|w| 2 * starts.get(row + w * apart));
    let mut end = [0; LOADED];
    // SAFETY: the words are within the rows of the mask. Values are read in place if enough bytes
    // are left, and from a copy otherwise. Loads of inputs are within the row, the last one masked.
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
            // Two cache lines, because the values of a word can fill both.
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

/// Returns the numbers of 64 columns, whose values begin at byte `at`, and how many of them are
/// stored.
///
/// # Safety
/// The word must be readable.
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
    // SAFETY: `readable` provides enough bytes, and the caller guarantees the word.
    unsafe {
        if half {
            expand::<true>(from, word)
        } else {
            expand::<false>(from, word)
        }
    }
}
