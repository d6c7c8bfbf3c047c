//! Sparse codes of 4 bits: a table puts the codes of each eight columns at their places, among their zero points.

use std::arch::x86_64::*;
use std::ops::Range;

use super::units::Units;
use super::words::{Codes, products, split};
use super::{prefetch, readable};
use crate::format::SparseInt4;
use crate::kernels::common::Output;
use crate::kernels::input::Input;

/// Bytes that are read for eight columns: more than their codes take.
const LOADED: usize = 16;

/// For each eight bits the bytes of a `vpshufb` that puts bytes one after another into words at the bits' places; 0 elsewhere.
static PLACES: Places = Places(places());

#[repr(align(64))]
struct Places([[u8; 16]; 256]);

const fn places() -> [[u8; 16]; 256] {
    let mut all = [[0x80; 16]; 256];
    let mut bits = 0;
    while bits < 256 {
        let (mut column, mut next) = (0, 0);
        while column < 8 {
            if bits >> column & 1 == 1 {
                all[bits][2 * column] = next;
                next += 1;
            }
            column += 1;
        }
        bits += 1;
    }
    all
}

/// Whether the codes of a word of 64 columns, of so many in a row, lie in the upper halves of bytes.
fn is_high(word: usize, words: usize) -> bool {
    word / 2 % 2 == 1 || words % 4 == 2 && word + 1 == words
}

/// # Safety
/// As for [`super::multiply`].
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,popcnt")]
pub(super) unsafe fn multiply(
    weight: &SparseInt4,
    unit: usize,
    rows: Range<usize>,
    input: &Input<'_>,
    output: Output,
    scratch: &mut [f32],
) {
    let words = weight.bits.cols.div_ceil(64);
    let (bits, codes): (&[[u8; 8]], &[u8]) = (weight.bits.bytes.as_chunks().0, &weight.codes);
    assert!(input.inputs <= weight.bits.cols);
    let (memory, scratch) = split(input, scratch);
    let mut units = Units::new(&weight.grid, unit, input, scratch);
    for row in rows {
        let bits = &bits[row * words..(row + 1) * words];
        units.read(row);
        let start = weight.offsets.get(row);
        // As far as a row's codes may reach, whatever its bits are.
        let far = start.saturating_add(64 * words + LOADED) <= codes.len();
        // SAFETY: the caller's promise; what is not checked was.
        unsafe {
            if far {
                let source = Sparse::<false> { bits, codes, at: [start; 2] };
                products(source, &mut units, unit, row, input, output, memory);
            } else {
                let source = Sparse::<true> { bits, codes, at: [start; 2] };
                products(source, &mut units, unit, row, input, output, memory);
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

impl<const CHECKED: bool> Codes for Sparse<'_, CHECKED> {
    #[inline]
    #[target_feature(enable = "avx2,bmi1,bmi2,popcnt")]
    unsafe fn next(&mut self, index: usize, zeros: [__m256i; 4]) -> [__m256i; 4] {
        let high = is_high(index, self.bits.len());
        // SAFETY: the row has the columns; the table has all bytes, and codes are read where as many are left, and copied where not.
        unsafe {
            let word = self.bits.as_ptr().add(index).cast::<u8>();
            let mut at = self.at[usize::from(high)];
            prefetch(self.codes.as_ptr().wrapping_add(at));
            let pairs: [[__m256i; 2]; 4] = std::array::from_fn(|part| {
                let mut ends = [[0; LOADED]; 2];
                let [first, second] = std::array::from_fn(|half| {
                    let byte = *word.add(2 * part + half);
                    let from = if CHECKED {
                        readable(self.codes, at, &mut ends[half])
                    } else {
                        self.codes.as_ptr().wrapping_add(at)
                    };
                    at += byte.count_ones() as usize;
                    (PLACES.0.as_ptr().add(usize::from(byte)).cast(), from.cast())
                });
                [_mm256_loadu2_m128i(second.0, first.0), _mm256_loadu2_m128i(second.1, first.1)]
            });
            self.at[usize::from(high)] = at;
            let spread = pairs.map(|[places, codes]| _mm256_shuffle_epi8(codes, places));
            let codes = if high {
                spread.map(|codes| _mm256_srli_epi16::<4>(codes))
            } else {
                spread.map(|codes| _mm256_and_si256(codes, _mm256_set1_epi16(0x0F)))
            };
            // The upper bytes of words are those of zero points, which are 0.
            std::array::from_fn(|part| _mm256_blendv_epi8(codes[part], zeros[part], pairs[part][0]))
        }
    }
}
