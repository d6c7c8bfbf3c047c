//! Packed codes of 2, 3, 4 or 8 bits. However many they are, the even columns of a block come out first, then the odd ones, so that layers
//! on the same inputs want these in one order.

use std::arch::aarch64::*;

use crate::format::PackedMatrix;
use crate::format::bits::packed_len;
use crate::kernels::linear::codes::Codes;
use crate::kernels::linear::input::{BLOCK, Order};
use crate::kernels::linear::task::Task;
use crate::kernels::memory::readable;

/// The codes of a packed weight.
#[derive(Clone, Copy)]
pub(super) struct Packed<'a, const BITS: u8> {
    codes: &'a [u8],
    stride: usize,
}

impl<'a, const BITS: u8> Packed<'a, BITS> {
    /// # Panics
    /// Where the weight has not the rows and columns of the task.
    pub fn new(weight: &'a PackedMatrix, task: &Task<'_>) -> Self {
        let stride = packed_len(weight.cols(), BITS);
        let codes: &[u8] = weight.codes();
        assert!(task.rows.end * stride <= codes.len() && task.input.inputs <= weight.cols());
        Self { codes, stride }
    }
}

impl<'a, const BITS: u8> Codes for Packed<'a, BITS> {
    /// From its first byte on, and what follows it: past the row's end inputs are zeros.
    type Row = &'a [u8];
    type Step = [int8x16_t; 8];

    const ORDER: Order = Order::EvenOdd;
    const BITS: u8 = BITS;

    #[inline(always)]
    fn row(&self, row: usize, _zeros: *const u8) -> &'a [u8] {
        &self.codes[row * self.stride..]
    }

    #[inline(always)]
    unsafe fn step<const SMALL: bool, const HIGH: bool>(
        &self,
        row: &mut &'a [u8],
        block: usize,
    ) -> [int8x16_t; 8] {
        let at = BLOCK / 8 * usize::from(BITS) * block;
        // SAFETY: as many bytes are there as `readable` says.
        unsafe {
            match BITS {
                2 => of_two(readable(row, at, &mut [0; 32])),
                3 => of_three(readable(row, at, &mut [0; 52])),
                4 => of_four(readable(row, at, &mut [0; 64])),
                _ => of_eight(readable(row, at, &mut [0; 128])),
            }
        }
    }
}

/// A byte has columns 0 to 3 of four.
///
/// # Safety
/// 32 bytes are there.
#[inline(always)]
unsafe fn of_two(from: *const u8) -> [int8x16_t; 8] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut codes = [vdupq_n_s8(0); 8];
        let low = vdupq_n_u8(3);
        for half in 0..2 {
            let fours = vld1q_u8(from.add(16 * half));
            let [a, c] = [vandq_u8(fours, low), vandq_u8(vshrq_n_u8::<4>(fours), low)];
            let [b, d] = [
                vandq_u8(vshrq_n_u8::<2>(fours), low),
                vshrq_n_u8::<6>(fours),
            ];
            codes[2 * half] = vreinterpretq_s8_u8(vzip1q_u8(a, c));
            codes[2 * half + 1] = vreinterpretq_s8_u8(vzip2q_u8(a, c));
            codes[2 * half + 4] = vreinterpretq_s8_u8(vzip1q_u8(b, d));
            codes[2 * half + 5] = vreinterpretq_s8_u8(vzip2q_u8(b, d));
        }
        codes
    }
}

/// Where the codes of 3 bits of 32 columns lie in 12 bytes: for the even columns and for the odd ones, eight after eight, the first of the
/// two bytes that have all of a code, and the next.
static WINDOWS: [[[u8; 16]; 2]; 2] = {
    let mut windows = [[[0; 16]; 2]; 2];
    let mut column = 0;
    while column < 32 {
        let (odd, index) = (column % 2, column / 2);
        let byte = (3 * column / 8) as u8;
        windows[odd][index / 8][2 * (index % 8)] = byte;
        windows[odd][index / 8][2 * (index % 8) + 1] = byte + 1;
        column += 1;
    }
    windows
};

/// By how many bits to the left to shift what [`WINDOWS`] finds: to the right, that is. The same for each eight, which take six bytes.
static SHIFTS: [[i16; 8]; 2] = {
    let mut shifts = [[0; 8]; 2];
    let mut column = 0;
    while column < 16 {
        shifts[column % 2][column / 2] = -((3 * column % 8) as i16);
        column += 1;
    }
    shifts
};

/// A code of 3 bits lies in two bytes at most.
///
/// # Safety
/// 52 bytes are there, the last ones of any value.
#[inline(always)]
unsafe fn of_three(from: *const u8) -> [int8x16_t; 8] {
    // SAFETY: the caller's promise; arrays of 16 bytes.
    unsafe {
        let mut codes = [vdupq_n_s8(0); 8];
        for part in 0..4 {
            // 12 of them are this part's.
            let bytes = vld1q_u8(from.add(12 * part));
            for odd in 0..2 {
                let shifts = vld1q_s16(SHIFTS[odd].as_ptr());
                let window = |eight: usize| {
                    let pairs = vqtbl1q_u8(bytes, vld1q_u8(WINDOWS[odd][eight].as_ptr()));
                    vreinterpretq_u8_u16(vshlq_u16(vreinterpretq_u16_u8(pairs), shifts))
                };
                let both = vuzp1q_u8(window(0), window(1));
                codes[part + 4 * odd] = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(7)));
            }
        }
        codes
    }
}

/// The even columns are in the lower halves.
///
/// # Safety
/// 64 bytes are there.
#[inline(always)]
unsafe fn of_four(from: *const u8) -> [int8x16_t; 8] {
    // SAFETY: the caller's promise.
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

/// Less 128, so that they are signed bytes.
///
/// # Safety
/// 128 bytes are there.
#[inline(always)]
unsafe fn of_eight(from: *const u8) -> [int8x16_t; 8] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut codes = [vdupq_n_s8(0); 8];
        for part in 0..4 {
            let uint8x16x2_t(even, odd) = vld2q_u8(from.add(32 * part));
            codes[part] = vreinterpretq_s8_u8(veorq_u8(even, vdupq_n_u8(0x80)));
            codes[4 + part] = vreinterpretq_s8_u8(veorq_u8(odd, vdupq_n_u8(0x80)));
        }
        codes
    }
}
