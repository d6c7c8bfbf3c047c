//! Sparse numbers of 16 bits.

use std::arch::aarch64::*;
use std::ops::Range;

use super::expand::Word;
use super::{F32, eight, for_tiles, sums_of, widen};
use crate::format::{Number, Sparse16, Starts};
use crate::kernels::common::readable;
use crate::kernels::disjoint::DisjointRows;
use crate::kernels::input::Input;

/// Bytes that are read for 64 columns, as many as their values may take.
const LOADED: usize = 128;

/// # Safety
/// As for [`super::multiply`].
pub(super) unsafe fn multiply(
    weight: &Sparse16,
    rows: Range<usize>,
    input: &Input<'_>,
    output: DisjointRows<'_>,
) {
    let words = weight.bits.cols.div_ceil(64);
    assert!(rows.end * words * 8 <= weight.bits.bytes.len() && input.inputs <= weight.bits.cols);
    let bits: &[[u8; 8]] = weight.bits.bytes.as_chunks().0;
    let call = Call {
        starts: weight.offsets.starts(),
        words,
        bits,
        values: &weight.values,
        input,
        output,
    };
    macro_rules! f16 {
        ($w:literal, $r:literal, $row:expr, $from:expr) => {
            tile::<true, $w, $r>(&call, $row, $from)
        };
    }
    macro_rules! bf16 {
        ($w:literal, $r:literal, $row:expr, $from:expr) => {
            tile::<false, $w, $r>(&call, $row, $from)
        };
    }
    // SAFETY: the caller's promise.
    unsafe {
        if weight.number == Number::F16 {
            for_tiles!(rows, input.rows, 2 x 1, 2 x 4, |row, from| f16(row, from));
        } else {
            for_tiles!(rows, input.rows, 2 x 1, 2 x 4, |row, from| bf16(row, from));
        }
    }
}

struct Call<'a> {
    starts: Starts<'a>,
    words: usize,
    bits: &'a [[u8; 8]],
    values: &'a [u8],
    input: &'a Input<'a>,
    output: DisjointRows<'a>,
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
        input,
        output,
    } = *call;
    let chains = (8 / (W * R)).clamp(1, 4);
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
                    xs[i] = eight::<F32>(x[i].add(8 * part).cast());
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
        let mut lanes = [vdupq_n_f32(0.0); W];
        for w in 0..W {
            lanes[w] = sums[w][i][0];
            for chain in 1..chains {
                lanes[w] = vaddq_f32(lanes[w], sums[w][i][chain]);
            }
        }
        for (w, sum) in sums_of(lanes).into_iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { output.set(from + i, row + w, sum) };
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
