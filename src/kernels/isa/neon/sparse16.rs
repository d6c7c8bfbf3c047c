//! Sparse numbers of 16 bits.

use std::arch::aarch64::*;

use super::expand::Word;
use super::lanes::{Lanes, chains, totals, widen};
use crate::format::{Number, Sparse16, Starts};
use crate::kernels::linear::lanes::Lanes as _;
use crate::kernels::linear::task::Task;
use crate::kernels::linear::tiles::{Tiles, for_tiles};
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
        bits: weight.bits.bytes.as_chunks().0,
        values: &weight.values,
        task: &task,
    };
    // SAFETY: the caller's promise.
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

/// Numbers of half precision, or of bfloat16.
struct Of<'a, const HALF: bool>(&'a Call<'a>);

impl<const HALF: bool> Tiles for Of<'_, HALF> {
    const ONE: usize = 2;
    const MORE: usize = 2;

    #[inline(always)]
    unsafe fn tile<const W: usize, const R: usize>(&self, row: usize, from: usize) {
        // SAFETY: the caller's promise.
        unsafe { tile::<HALF, W, R>(self.0, row, from) };
    }
}

/// # Safety
/// `W` rows of the weight and `R` of the inputs are there, and their outputs this task's.
#[target_feature(enable = "neon")]
#[allow(clippy::needless_range_loop)] // loops over constants, which become straight code on registers
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
            // SAFETY: 64 inputs are there, or their copy; 128 bytes of values, as `readable` says.
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
            // SAFETY: the caller's promise.
            unsafe { output.set(from + i, row + w, total) };
        }
    }
}

/// Some columns of a row as numbers, from a whole word on; `at` says where the row's values go on, in bytes. What is written beyond the
/// last column, up to a whole word, does not matter.
///
/// # Panics
/// For words that there are not, or numbers that have no room.
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
            // SAFETY: 128 bytes of values are there, as `readable` says, and room for eight numbers.
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
