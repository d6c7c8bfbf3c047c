//! Sparse codes of 4 bits, put at their columns among their zero points.

use std::arch::aarch64::*;

use super::codes::Source;
use super::expand::Word;
use super::readable;
use crate::format::{SparseInt4, Starts, is_high};
use crate::kernels::input::{BLOCK, Input, Order};

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
    /// Where the weight has no rows up to `end`, or fewer columns than inputs.
    pub fn new(weight: &'a SparseInt4, unit: usize, end: usize, input: &Input<'_>) -> Self {
        let words = weight.bits.cols.div_ceil(64);
        let bits = weight.bits.bytes.as_chunks().0;
        assert!(end * words <= bits.len() && input.inputs <= weight.bits.cols);
        let of_columns =
            std::array::from_fn(|index| std::array::from_fn(|column| ((16 * index + column) / unit) as u8));
        Self { starts: weight.offsets.starts(), words, bits, codes: &weight.codes, units: BLOCK / unit, of_columns }
    }
}

/// A row, and where the codes of its two streams go on.
pub(super) struct Row<'a> {
    bits: &'a [[u8; 8]],
    at: [usize; 2],
    zeros: *const u8,
}

impl<'a> Source for Sparse<'a> {
    type Row = Row<'a>;
    type Block = [int8x16_t; 8];

    const PAIRED: bool = false;
    const ORDER: Order = Order::InOrder;

    #[inline(always)]
    fn row(&self, row: usize, zeros: *const u8) -> Row<'a> {
        let bits = &self.bits[row * self.words..(row + 1) * self.words];
        Row { bits, at: [self.starts.get(row); 2], zeros }
    }

    #[inline(always)]
    unsafe fn block<const SMALL: bool>(&self, row: &mut Row<'a>, block: usize) -> [int8x16_t; 8] {
        // SAFETY: 16 zero points are there from each block's first one on, by the caller's promise; arrays of 16 bytes; 64 bytes of codes,
        // as `readable` says.
        unsafe {
            let of_block =
                if SMALL { vld1q_u8(row.zeros.add(block * self.units)) } else { vdupq_n_u8(*row.zeros.add(block)) };
            let mut all = [vdupq_n_s8(0); 8];
            for half in 0..2 {
                let index = 2 * block + half;
                // Past the last word inputs are zeros.
                let Some(bits) = row.bits.get(index) else { break };
                let word = Word::new(u64::from_le_bytes(*bits));
                let high = is_high(index, self.words);
                let at = &mut row.at[usize::from(high)];
                let mut copy = [0; LOADED];
                let from = readable(self.codes, *at, &mut copy);
                *at += word.stored;
                for sixteen in 0..4 {
                    let zeros = if SMALL {
                        vqtbl1q_u8(of_block, vld1q_u8(self.of_columns[4 * half + sixteen].as_ptr()))
                    } else {
                        of_block
                    };
                    let codes = if high {
                        word.halves::<true>(from, sixteen, zeros)
                    } else {
                        word.halves::<false>(from, sixteen, zeros)
                    };
                    all[4 * half + sixteen] = vreinterpretq_s8_u8(codes);
                }
            }
            all
        }
    }

    #[inline(always)]
    unsafe fn vector(block: &[int8x16_t; 8], index: usize) -> int8x16_t {
        block[index]
    }
}
