//! Sparse numbers of 16 bits: `vpexpandw` puts them at their columns.

use std::arch::x86_64::*;

use super::lanes::{Avx512, LONG, from_bf16};
use super::loads::{mask16, prefetch, some_floats};
use crate::format::{Number, Sparse16, Starts};
use crate::kernels::linear::task::Task;
use crate::kernels::linear::tiles::{FAR, Features, Tiles, Work, for_tiles};
use crate::kernels::memory::readable;

/// Bytes that are read for 64 columns, as many as their values may take.
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
    // SAFETY: the rows are in the bits, as was asserted; the rest is the caller's promise.
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

/// Numbers of half precision, or of bfloat16.
struct Of<'a, const HALF: bool>(&'a Call<'a>);

impl<const HALF: bool> Of<'_, HALF> {
    /// # Safety
    /// `W` rows of the weight, `apart` from each other, and `R` of the inputs are there, and their outputs this task's.
    #[inline(always)]
    unsafe fn products<const W: usize, const R: usize>(
        &self,
        row: usize,
        apart: usize,
        from: usize,
    ) {
        let call = self.0;
        // As far as a row's values may reach, whatever its bits are.
        let far = |w: usize| {
            2 * call.starts.get(row + w * apart) + LOADED * (call.words + 1) <= call.values.len()
        };
        let tile = Tile {
            call,
            row,
            apart,
            from,
        };
        // SAFETY: the caller's promise; what is not checked was.
        unsafe {
            if (0..W).all(far) {
                Avx512::run(Run::<HALF, false, W, R>(tile));
            } else {
                Avx512::run(Run::<HALF, true, W, R>(tile));
            }
        }
    }
}

impl<const HALF: bool> Tiles for Of<'_, HALF> {
    const ONE: usize = 2;
    const MORE: usize = 2;
    const LONG: usize = LONG;

    #[inline(always)]
    unsafe fn tile<const W: usize, const R: usize>(&self, row: usize, from: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.products::<W, R>(row, 1, from) };
    }

    #[inline(always)]
    unsafe fn far(&self, row: usize, apart: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.products::<FAR, 1>(row, apart, 0) };
    }
}

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

/// Some rows of the weight with some of the inputs.
struct Tile<'a> {
    call: &'a Call<'a>,
    row: usize,
    /// How far the rows are from each other.
    apart: usize,
    from: usize,
}

/// `W` rows of the weight with `R` of the inputs; if not `CHECKED`, [`LOADED`] bytes for each word and once more are left from the
/// rows' values on.
struct Run<'a, const HALF: bool, const CHECKED: bool, const W: usize, const R: usize>(Tile<'a>);

impl<const HALF: bool, const CHECKED: bool, const W: usize, const R: usize> Work<Avx512>
    for Run<'_, HALF, CHECKED, W, R>
{
    type Output = ();

    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // loops over constants, which become straight code on registers
    unsafe fn run(self) {
        let Tile {
            call,
            row,
            apart,
            from,
        } = self.0;
        let Call {
            starts,
            words,
            bits,
            values,
            task,
        } = *call;
        let Task { input, output, .. } = task;
        // SAFETY: the caller has the features.
        let zero = unsafe { _mm512_setzero_ps() };
        // One for each 16 columns of a word, so that no addition waits for the one before.
        let mut sums = [[[zero; 4]; R]; W];
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
