//! Sparse codes of 4 bits: a table puts the codes of each eight columns at their places, among their zero points.

use std::arch::x86_64::*;

use super::sparse16::byte_at;
use super::units::{Columns, Units};
use super::words::{Call, Word, products, split};
use crate::format::{SparseInt4, Starts, is_high};
use crate::kernels::linear::codes::Codes;
use crate::kernels::linear::input::Order;
use crate::kernels::linear::task::Task;
use crate::kernels::memory::readable;

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
/// As for [`multiply`](crate::kernels::linear::task::Kernels::multiply).
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,popcnt")]
pub(super) unsafe fn multiply(
    weight: &SparseInt4,
    unit: usize,
    task: Task<'_>,
    scratch: &mut [f32],
) {
    assert!(task.input.inputs <= weight.bits.cols);
    let (memory, scratch) = split(task.input, scratch);
    let mut units = Units::new(&weight.grid, unit, task.input, scratch);
    let columns = Columns::new(unit);
    let (near_end, far) = (
        Sparse::<true>::new(weight, columns),
        Sparse::<false>::new(weight, columns),
    );
    let call = Call {
        columns,
        task: &task,
    };
    for row in task.rows.clone() {
        units.read(row);
        // As far as a row's codes may reach, whatever its bits are.
        let reach = far.starts.get(row).saturating_add(64 * far.words + LOADED);
        // SAFETY: the caller's promise; what is not checked was.
        unsafe {
            if reach <= far.codes.len() {
                products(&far, &mut units, row, &call, memory);
            } else {
                products(&near_end, &mut units, row, &call, memory);
            }
        }
    }
}

/// The codes of a weight; if not `CHECKED`, those of a row lie in the weight's, wherever they may begin.
#[derive(Clone, Copy)]
struct Sparse<'a, const CHECKED: bool> {
    starts: Starts<'a>,
    words: usize,
    bits: &'a [[u8; 8]],
    codes: &'a [u8],
    columns: Columns,
}

/// A row, and where the next codes of low and of high words are.
struct Row<'a> {
    bits: &'a [[u8; 8]],
    at: [usize; 2],
    zeros: *const f32,
}

impl<'a, const CHECKED: bool> Sparse<'a, CHECKED> {
    fn new(weight: &'a SparseInt4, columns: Columns) -> Self {
        Self {
            starts: weight.offsets.starts(),
            words: weight.bits.cols.div_ceil(64),
            bits: weight.bits.bytes.as_chunks().0,
            codes: &weight.codes,
            columns,
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

impl<'a, const CHECKED: bool> Codes for Sparse<'a, CHECKED> {
    type Row = Row<'a>;
    type Step = Word;

    const ORDER: Order = Order::Words;
    const BITS: u8 = 4;

    #[inline(always)]
    fn row(&self, row: usize, zeros: *const u8) -> Row<'a> {
        Row {
            bits: &self.bits[row * self.words..(row + 1) * self.words],
            at: [self.starts.get(row); 2],
            zeros: zeros.cast(),
        }
    }

    fn is_high(&self, index: usize) -> bool {
        is_high(index, self.words)
    }

    #[inline(always)]
    unsafe fn step<const SMALL: bool, const HIGH: bool>(
        &self,
        row: &mut Row<'a>,
        index: usize,
    ) -> Word {
        let mut at = row.at[usize::from(HIGH)];
        // SAFETY: the row has the columns; the table has all bytes, and codes are read where as many are left, and copied where not.
        unsafe {
            let zeros = self.columns.some::<SMALL>(row.zeros, index);
            let word = row.bits.as_ptr().add(index).cast::<u8>();
            // Of the word, not of its bytes, so that the next word need not wait for them.
            row.at[usize::from(HIGH)] =
                at + word.cast::<u64>().read_unaligned().count_ones() as usize;
            let low = _mm256_set1_epi16(0x0F);
            let mut out = [low; 4];
            for (part, (out, zeros)) in out.iter_mut().zip(zeros).enumerate() {
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
                let zeros = _mm256_castps_si256(zeros);
                *out = _mm256_blendv_epi8(_mm256_and_si256(codes, low), zeros, places);
            }
            out
        }
    }
}
