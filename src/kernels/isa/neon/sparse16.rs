//! Sparse 16-bit numbers.

use std::arch::aarch64::*;
use std::ops::Range;

use super::expand::Word;
use super::lanes::{Lanes, chains, totals, widen};
use crate::format::{Number, Sparse16, Starts};
use crate::kernels::linear::lanes::Lanes as _;
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
        bits: weight.bits.bytes.as_chunks().0,
        values: &weight.values,
        task: &task,
    };
    // SAFETY: the caller upholds this function's contract.
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
    bits: &'a [[u8; 8]],
    values: &'a [u8],
    task: &'a Task<'a>,
}

/// Numbers in half precision, or in bfloat16.
struct Of<'a, const HALF: bool>(&'a Call<'a>);

impl<const HALF: bool> Tiles for Of<'_, HALF> {
    const ONE: usize = 2;
    const MORE: usize = 2;

    #[inline(always)]
    unsafe fn tile<const W: usize, const R: usize>(
        &self,
        rows: Range<usize>,
        apart: usize,
        from: usize,
    ) {
        for row in firsts::<W>(rows, apart) {
            // SAFETY: the caller upholds this function's contract.
            unsafe { tile::<HALF, W, R>(self.0, row, from) };
        }
    }
}

/// # Safety
/// `W` rows of the weight and `R` rows of inputs must exist, and their outputs must belong to this
/// task.
#[target_feature(enable = "neon")]
#[allow(clippy::needless_range_loop)] // constant loops, which are unrolled
unsafe fn tile<const HALF: bool, const W: usize, const R: usize>(
    call: &Call<'_>,
    row: usize,
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
    let chains = chains(W * R);
    let mut sums = [[[vdupq_n_f32(0.0); 4]; R]; W];
    let x: [&[f32]; R] = std::array::from_fn(|i| input.row(from + i));
    let mut at: [usize; W] = std::array::from_fn(|w| 2 * starts.get(row + w));
    let bits: [&[[u8; 8]]; W] =
        std::array::from_fn(|w| &bits[(row + w) * words..(row + w + 1) * words]);
    let mut copies = [[0_u8; LOADED]; W];
    let mut last = [[0.0_f32; 64]; R];
    for block in 0..input.inputs.div_ceil(64) {
        let mut x: [*const f32; R] =
            std::array::from_fn(|i| x[i].as_ptr().wrapping_add(64 * block));
        let left = input.inputs - 64 * block;
        if left < 64 {
            for i in 0..R {
                let row = input.row(from + i);
                last[i][..left].copy_from_slice(&row[64 * block..]);
                x[i] = last[i].as_ptr();
            }
        }
        let mut of_rows = [Word::new(0); W];
        let mut from = [values.as_ptr(); W];
        for w in 0..W {
            of_rows[w] = Word::new(u64::from_le_bytes(bits[w][block]));
            from[w] = readable(values, at[w], &mut copies[w]);
            at[w] += 2 * of_rows[w].stored;
        }
        for part in 0..8 {
            // SAFETY: 64 inputs are readable, in place or in a copy, and `readable` provides 128
            // bytes of values.
            unsafe {
                let mut xs = [[vdupq_n_f32(0.0); 2]; R];
                for i in 0..R {
                    xs[i] = Lanes::load::<f32>(x[i].add(8 * part).cast());
                }
                for w in 0..W {
                    let ws = widen::<HALF>(of_rows[w].pairs(from[w], part));
                    for half in 0..2 {
                        let chain = (2 * part + half) % chains;
                        for i in 0..R {
                            sums[w][i][chain] = vfmaq_f32(sums[w][i][chain], ws[half], xs[i][half]);
                        }
                    }
                }
            }
        }
    }
    for i in 0..R {
        let mut of_row = [[vdupq_n_f32(0.0); 4]; W];
        for w in 0..W {
            of_row[w] = sums[w][i];
        }
        for (w, total) in totals(of_row, chains).into_iter().enumerate() {
            // SAFETY: the caller upholds this function's contract.
            unsafe { output.set(from + i, row + w, total) };
        }
    }
}

/// Expands some columns of a row to numbers, beginning at a whole word. `at` is the position of the
/// row's next values, in bytes. Numbers written beyond the last column, up to a whole word, have no
/// meaning.
///
/// # Panics
/// Panics if a word does not exist or there is no room for the numbers.
#[target_feature(enable = "neon")]
pub(super) fn spread(
    weight: &Sparse16,
    row: usize,
    first: usize,
    at: &mut usize,
    out: &mut [[f32; 64]],
) {
    let words = weight.bits.cols.div_ceil(64);
    let (bits, values): (&[[u8; 8]], &[u8]) = (weight.bits.bytes.as_chunks().0, &weight.values);
    let bits = &bits[row * words..(row + 1) * words][first / 64..][..out.len()];
    let mut copy = [0_u8; LOADED];
    for (bits, out) in bits.iter().zip(out) {
        let word = Word::new(u64::from_le_bytes(*bits));
        let from = readable(values, *at, &mut copy);
        *at += 2 * word.stored;
        for (part, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            // SAFETY: `readable` provides 128 bytes of values, and there is room for eight numbers.
            unsafe {
                let pairs = word.pairs(from, part);
                let numbers = if weight.number == Number::F16 {
                    widen::<true>(pairs)
                } else {
                    widen::<false>(pairs)
                };
                vst1q_f32(out.as_mut_ptr(), numbers[0]);
                vst1q_f32(out.as_mut_ptr().add(4), numbers[1]);
            }
        }
    }
}
