//! Packed codes of 4 bits: 64 bytes are 128 columns, the even ones in the lower halves.

use std::arch::aarch64::*;

use super::codes::Source;
use super::readable;
use crate::format::PackedMatrix;
use crate::kernels::input::{Input, Order};

/// Bytes of a block.
const LOADED: usize = 64;

/// The codes of a packed weight.
#[derive(Clone, Copy)]
pub(super) struct Packed<'a> {
    codes: &'a [u8],
    stride: usize,
}

impl<'a> Packed<'a> {
    /// # Panics
    /// Where the weight has no rows up to `end`, or fewer columns than inputs.
    pub fn new(weight: &'a PackedMatrix, end: usize, input: &Input<'_>) -> Self {
        let stride = weight.cols().div_ceil(2);
        let codes: &[u8] = weight.codes();
        assert!(end * stride <= codes.len() && input.inputs <= weight.cols());
        Self { codes, stride }
    }
}

impl<'a> Source for Packed<'a> {
    type Row = &'a [u8];
    type Block = [int8x16_t; 8];

    const PAIRED: bool = true;
    const ORDER: Order = Order::EvenOdd;

    #[inline(always)]
    fn row(&self, row: usize, _zeros: *const u8) -> &'a [u8] {
        &self.codes[row * self.stride..(row + 1) * self.stride]
    }

    #[inline(always)]
    unsafe fn block<const SMALL: bool>(&self, row: &mut &'a [u8], block: usize) -> [int8x16_t; 8] {
        let mut copy = [0; LOADED];
        let from = readable(row, LOADED * block, &mut copy);
        // SAFETY: 64 bytes are there, as `readable` says.
        unsafe {
            let mut codes = [vdupq_n_s8(0); 8];
            for part in 0..4 {
                let pairs = vld1q_u8(from.add(16 * part));
                codes[part] = vreinterpretq_s8_u8(vandq_u8(pairs, vdupq_n_u8(0x0F)));
                codes[4 + part] = vreinterpretq_s8_u8(vshrq_n_u8::<4>(pairs));
            }
            codes
        }
    }

    #[inline(always)]
    unsafe fn vector(block: &[int8x16_t; 8], index: usize) -> int8x16_t {
        block[index]
    }
}
