//! Sparse codes of 4 bits: a table puts the codes of each eight columns at their places, among their zero points.

use std::arch::x86_64::*;
use std::ops::Range;

use super::byte_at;
use super::units::Units;
use super::words::{Call, Codes, products, split};
use crate::format::{SparseInt4, is_high};
use crate::kernels::common::readable;
use crate::kernels::disjoint::DisjointRows;
use crate::kernels::input::Input;

/// Bytes that are read for eight columns: more than their codes take.
const LOADED: usize = 16;

/// For each eight bits the bytes of a `vpshufb` that puts bytes one after another at the bits' places; what is 128 gives 0.
static PLACES: Places = Places(places());

#[repr(align(64))]
struct Places([[u8; 8]; 256]);

const fn places() -> [[u8; 8]; 256] {
    let mut all = [[0x80; 8]; 256];
    let mut bits = 0;
    while bits < 256 {
        let (mut column, mut next) = (0, 0);
        while column < 8 {
            if bits >> column & 1 == 1 {
                all[bits][column] = next;
                next += 1;
            }
            column += 1;
        }
        bits += 1;
    }
    all
}

/// # Safety
/// As for [`super::multiply`].
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,popcnt")]
pub(super) unsafe fn multiply(
    weight: &SparseInt4,
    unit: usize,
    rows: Range<usize>,
    input: &Input<'_>,
    output: DisjointRows<'_>,
    scratch: &mut [f32],
) {
    let words = weight.bits.cols.div_ceil(64);
    let (bits, codes): (&[[u8; 8]], &[u8]) = (weight.bits.bytes.as_chunks().0, &weight.codes);
    assert!(input.inputs <= weight.bits.cols);
    let (memory, scratch) = split(input, scratch);
    let mut units = Units::new(&weight.grid, unit, input, scratch);
    let call = Call::new(unit, input, output);
    for row in rows {
        let bits = &bits[row * words..(row + 1) * words];
        units.read(row);
        let start = weight.offsets.get(row);
        // As far as a row's codes may reach, whatever its bits are.
        let far = start.saturating_add(64 * words + LOADED) <= codes.len();
        // SAFETY: the caller's promise; what is not checked was.
        unsafe {
            if far {
                let source = Sparse::<false>::new(bits, codes, start);
                products(source, &mut units, row, &call, memory);
            } else {
                let source = Sparse::<true>::new(bits, codes, start);
                products(source, &mut units, row, &call, memory);
            }
        }
    }
}

/// The codes of a row; if not `CHECKED`, they lie in the weight's, wherever they may begin.
struct Sparse<'a, const CHECKED: bool> {
    bits: &'a [[u8; 8]],
    codes: &'a [u8],
    /// Where the next codes of low and of high words are.
    at: [usize; 2],
}

impl<'a, const CHECKED: bool> Sparse<'a, CHECKED> {
    fn new(bits: &'a [[u8; 8]], codes: &'a [u8], start: usize) -> Self {
        Self {
            bits,
            codes,
            at: [start; 2],
        }
    }

    /// Where codes are, or a copy.
    #[inline(always)]
    fn from(&self, at: usize, end: &mut [u8; LOADED]) -> *const __m128i {
        if CHECKED {
            readable(self.codes, at, end).cast()
        } else {
            self.codes.as_ptr().wrapping_add(at).cast()
        }
    }
}

impl<const CHECKED: bool> Codes for Sparse<'_, CHECKED> {
    fn is_high(&self, index: usize) -> bool {
        is_high(index, self.bits.len())
    }

    #[inline(always)]
    unsafe fn next<const HIGH: bool>(&mut self, index: usize, zeros: [__m256i; 4]) -> [__m256i; 4] {
        let mut at = self.at[usize::from(HIGH)];
        let mut out = zeros;
        // SAFETY: the row has the columns; the table has all bytes, and codes are read where as many are left, and copied where not.
        unsafe {
            let word = self.bits.as_ptr().add(index).cast::<u8>();
            // Of the word, not of its bytes, so that the next word need not wait for them.
            self.at[usize::from(HIGH)] =
                at + word.cast::<u64>().read_unaligned().count_ones() as usize;
            let low = _mm256_set1_epi16(0x0F);
            for (part, out) in out.iter_mut().enumerate() {
                let mut ends = [[0; LOADED]; 2];
                let first = byte_at(word.add(2 * part));
                let from = self.from(at, &mut ends[0]);
                at += first.count_ones() as usize;
                let second = byte_at(word.add(2 * part + 1));
                let then = self.from(at, &mut ends[1]);
                at += second.count_ones() as usize;
                let place = |byte: u64| PLACES.0.as_ptr().add(byte as usize);
                let places = _mm_loadh_pd(
                    _mm_castsi128_pd(_mm_loadl_epi64(place(first).cast())),
                    place(second).cast(),
                );
                // The upper bytes of words are any of these; they are cut off.
                let places = _mm256_cvtepu8_epi16(_mm_castpd_si128(places));
                let spread = _mm256_shuffle_epi8(_mm256_loadu2_m128i(then, from), places);
                let codes = if HIGH {
                    _mm256_srli_epi16::<4>(spread)
                } else {
                    spread
                };
                *out = _mm256_blendv_epi8(_mm256_and_si256(codes, low), *out, places);
            }
        }
        out
    }
}
