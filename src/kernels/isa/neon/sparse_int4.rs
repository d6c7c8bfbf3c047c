//! Sparse codes of 4 bits, put at their columns among their zero points.

use std::arch::aarch64::*;

use super::expand::Word;
use crate::format::{SparseInt4, Starts, is_high};
use crate::kernels::linear::codes::Codes;
use crate::kernels::linear::input::{BLOCK, Order};
use crate::kernels::linear::task::Task;
use crate::kernels::memory::readable;

/// Bytes that are read for 64 columns, as many as their codes may take.
const LOADED: usize = 64;

/// The codes of a sparse weight.
#[derive(Clone, Copy)]
pub(super) struct Sparse<'a> {
    starts: Starts<'a>,
    words: usize,
    bits: &'a [[u8; 8]],
    codes: &'a [u8],
    /// Units of a block.
    units: usize,
    /// For each vector of a block the unit of each of its columns, counted from the block's first one.
    of_columns: [[u8; 16]; 8],
}

impl<'a> Sparse<'a> {
    /// # Panics
    /// Where the weight has not the rows and columns of the task.
    pub fn new(weight: &'a SparseInt4, unit: usize, task: &Task<'_>) -> Self {
        let words = weight.bits.cols.div_ceil(64);
        let bits = weight.bits.bytes.as_chunks().0;
        assert!(task.rows.end * words <= bits.len() && task.input.inputs <= weight.bits.cols);
        let of_columns = std::array::from_fn(|index| {
            std::array::from_fn(|column| ((16 * index + column) / unit) as u8)
        });
        Self {
            starts: weight.offsets.starts(),
            words,
            bits,
            codes: &weight.codes,
            units: BLOCK / unit,
            of_columns,
        }
    }

    /// The codes of half a block, which go on in its stream. `zeros` are the block's zero points: for each column, or, where `SMALL`, for
    /// each unit.
    #[inline(always)]
    fn half<const SMALL: bool, const HALF: usize>(
        &self,
        row: &mut Row<'_>,
        block: usize,
        zeros: uint8x16_t,
    ) -> [int8x16_t; 4] {
        let index = 2 * block + HALF;
        let Some(bits) = row.bits.get(index) else {
            // Past the last word inputs are zeros.
            // SAFETY: every caller has NEON.
            return unsafe { [vdupq_n_s8(0); 4] };
        };
        let word = Word::new(u64::from_le_bytes(*bits));
        let high = is_high(index, self.words);
        let at = &mut row.at[usize::from(high)];
        let mut copy = [0; LOADED];
        let from = readable(self.codes, *at, &mut copy);
        *at += word.stored;
        // SAFETY: arrays of 16 bytes; 64 bytes of codes are there, as `readable` says.
        unsafe {
            let mut others = [zeros; 4];
            if SMALL {
                for (sixteen, others) in others.iter_mut().enumerate() {
                    *others = vqtbl1q_u8(
                        zeros,
                        vld1q_u8(self.of_columns[4 * HALF + sixteen].as_ptr()),
                    );
                }
            }
            if high {
                word.halves::<true>(from, others)
            } else {
                word.halves::<false>(from, others)
            }
        }
    }
}

/// A row, and where the codes of its two streams go on.
pub(super) struct Row<'a> {
    bits: &'a [[u8; 8]],
    at: [usize; 2],
    zeros: *const u8,
}

impl<'a> Codes for Sparse<'a> {
    type Row = Row<'a>;
    type Step = [int8x16_t; 8];

    const ORDER: Order = Order::InOrder;
    const BITS: u8 = 4;

    #[inline(always)]
    fn row(&self, row: usize, zeros: *const u8) -> Row<'a> {
        let bits = &self.bits[row * self.words..(row + 1) * self.words];
        Row {
            bits,
            at: [self.starts.get(row); 2],
            zeros,
        }
    }

    #[inline(always)]
    unsafe fn step<const SMALL: bool, const HIGH: bool>(
        &self,
        row: &mut Row<'a>,
        block: usize,
    ) -> [int8x16_t; 8] {
        // SAFETY: 16 zero points are there from each block's first one on, by the caller's promise.
        let zeros = unsafe {
            if SMALL {
                vld1q_u8(row.zeros.add(block * self.units))
            } else {
                vdupq_n_u8(*row.zeros.add(block))
            }
        };
        let [a, b, c, d] = self.half::<SMALL, 0>(row, block, zeros);
        let [e, f, g, h] = self.half::<SMALL, 1>(row, block, zeros);
        [a, b, c, d, e, f, g, h]
    }
}
