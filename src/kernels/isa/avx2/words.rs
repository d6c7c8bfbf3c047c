//! Codes as words of 16 bits, which multiply 16-bit inputs: one way for codes of all widths, packed or sparse.
//!
//! A source gives the codes of 64 columns after 64, as four registers of 16. With a few rows of inputs these multiply at once; with many,
//! a row's codes are written to memory first, from where all rows of inputs take them.

use std::arch::x86_64::*;

use super::lanes::sum_of;
use super::units::{Columns, Units};
use crate::format::PackedMatrix;
use crate::format::bits::packed_len;
use crate::kernels::linear::codes::Codes;
use crate::kernels::linear::input::{BLOCK, Input, Order};
use crate::kernels::linear::task::Task;
use crate::kernels::memory::readable;

/// Rows of inputs from which on a row of a weight is unpacked once for all of them.
pub(super) const MANY: usize = 3;

/// The codes of a word of 64 columns, each in 16 bits.
pub(super) type Word = [__m256i; 4];

/// # Safety
/// As for [`multiply`](crate::kernels::linear::task::Kernels::multiply).
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn multiply(
    weight: &PackedMatrix,
    unit: usize,
    task: Task<'_>,
    scratch: &mut [f32],
) {
    let (row_words, scratch) = split(task.input, scratch);
    let mut units = Units::new(weight.whole_grid(), unit, task.input, scratch);
    let codes = Packed::new(weight);
    let call = Call {
        columns: Columns::new(unit),
        task: &task,
    };
    for row in task.rows.clone() {
        units.read(row);
        // SAFETY: the caller's promise.
        unsafe { products(&codes, &mut units, row, &call, row_words) };
    }
}

/// Memory for the codes of a row where there are many rows of inputs, and what is left.
pub(super) fn split<'a>(
    input: &Input<'_>,
    scratch: &'a mut [f32],
) -> (&'a mut [f32], &'a mut [f32]) {
    scratch.split_at_mut(if input.rows >= MANY {
        input.inputs.next_multiple_of(BLOCK) / 2
    } else {
        0
    })
}

/// Packed codes of up to 8 bits; the last bytes of a row may be the next one's, which inputs of 0 multiply. Each word gets the two bytes
/// that its code begins in, a product moves the code to the top of the word, a shift from there to the bottom.
#[derive(Clone, Copy)]
struct Packed<'a> {
    codes: &'a [u8],
    /// Bytes of a row.
    len: usize,
    bits: usize,
    bytes: __m256i,
    up: __m256i,
    down: __m128i,
}

impl<'a> Packed<'a> {
    #[target_feature(enable = "avx2")]
    fn new(weight: &'a PackedMatrix) -> Self {
        let bits = usize::from(weight.bits());
        // The second byte only where the code goes on in it, which a code of 8 bits does not.
        let bytes: [u8; 32] = std::array::from_fn(|at| {
            let (first, last) = (at / 2 * bits, (at / 2 + 1) * bits - 1);
            let byte = first / 8 + at % 2;
            if byte <= last / 8 { byte as u8 } else { 0x80 }
        });
        let up: [u16; 16] = std::array::from_fn(|at| 1 << (16 - bits - at * bits % 8));
        // SAFETY: arrays of 32 bytes.
        unsafe {
            Self {
                codes: weight.codes(),
                len: packed_len(weight.cols(), weight.bits()),
                bits,
                bytes: _mm256_loadu_si256(bytes.as_ptr().cast()),
                up: _mm256_loadu_si256(up.as_ptr().cast()),
                down: _mm_cvtsi32_si128(16 - bits as i32),
            }
        }
    }
}

impl Codes for Packed<'_> {
    /// Its first byte.
    type Row = usize;
    type Step = Word;

    const ORDER: Order = Order::Words;
    const BITS: u8 = 8;

    #[inline(always)]
    fn row(&self, row: usize, _zeros: *const u8) -> usize {
        row * self.len
    }

    #[inline(always)]
    unsafe fn step<const SMALL: bool, const HIGH: bool>(
        &self,
        first: &mut usize,
        index: usize,
    ) -> Word {
        // The last of four loads reads from byte 6 * bits on, 16 bytes.
        let mut end = [0; 64];
        let from = readable(self.codes, *first + 8 * self.bits * index, &mut end);
        let mut out = [self.up; 4];
        for (part, out) in out.iter_mut().enumerate() {
            // SAFETY: the caller's promise; 64 bytes are there, of which at most 6 * 8 + 16 are read.
            unsafe {
                let some = _mm_loadu_si128(from.add(2 * self.bits * part).cast());
                let pairs = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(some), self.bytes);
                *out = _mm256_srl_epi16(_mm256_mullo_epi16(pairs, self.up), self.down);
            }
        }
        out
    }
}

/// Codes that are words in memory.
#[derive(Clone, Copy)]
struct Unpacked(*const u8);

impl Codes for Unpacked {
    type Row = *const u8;
    type Step = Word;

    const ORDER: Order = Order::Words;
    const BITS: u8 = 8;

    #[inline(always)]
    fn row(&self, _row: usize, _zeros: *const u8) -> *const u8 {
        self.0
    }

    #[inline(always)]
    unsafe fn step<const SMALL: bool, const HIGH: bool>(
        &self,
        row: &mut *const u8,
        index: usize,
    ) -> Word {
        let from = row.wrapping_add(128 * index).cast::<__m256i>();
        // SAFETY: the words of the row's columns are there.
        unsafe {
            let [a, b, c, d] = [from, from.add(1), from.add(2), from.add(3)];
            [
                _mm256_loadu_si256(a),
                _mm256_loadu_si256(b),
                _mm256_loadu_si256(c),
                _mm256_loadu_si256(d),
            ]
        }
    }
}

/// Products of a row of the weight, whose units are read, with all rows of inputs.
///
/// # Safety
/// The outputs are this task's; `memory` is as [`split`] gives it.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,popcnt")]
pub(super) unsafe fn products(
    codes: &impl Codes<Step = Word>,
    units: &mut Units<'_, '_>,
    row: usize,
    call: &Call<'_>,
    memory: &mut [f32],
) {
    let (input, unit) = (call.task.input, call.columns.unit);
    // SAFETY: the caller's promise.
    unsafe {
        if input.rows < MANY {
            match (input.rows, unit < 64) {
                (1, false) => tile::<_, false, 1>(codes, units, row, call, 0),
                (1, true) => tile::<_, true, 1>(codes, units, row, call, 0),
                (_, false) => tile::<_, false, 2>(codes, units, row, call, 0),
                (_, true) => tile::<_, true, 2>(codes, units, row, call, 0),
            };
            return;
        }
        assert!(memory.len() >= input.inputs.next_multiple_of(64) / 2);
        let words = memory.as_mut_ptr().cast::<u8>();
        let mut of_row = codes.row(row, units.zeros().as_ptr().cast());
        for index in 0..input.inputs.div_ceil(64) {
            let some = match (unit < 64, codes.is_high(index)) {
                (false, false) => codes.step::<false, false>(&mut of_row, index),
                (false, true) => codes.step::<false, true>(&mut of_row, index),
                (true, false) => codes.step::<true, false>(&mut of_row, index),
                (true, true) => codes.step::<true, true>(&mut of_row, index),
            };
            for (part, some) in some.into_iter().enumerate() {
                _mm256_storeu_si256(words.add(128 * index + 32 * part).cast(), some);
            }
        }
        let mut from = 0;
        while from < input.rows {
            let codes = &Unpacked(words);
            from += match (input.rows - from, unit < 64) {
                (4.., false) => tile::<_, false, 4>(codes, units, row, call, from),
                (4.., true) => tile::<_, true, 4>(codes, units, row, call, from),
                (2.., false) => tile::<_, false, 2>(codes, units, row, call, from),
                (2.., true) => tile::<_, true, 2>(codes, units, row, call, from),
                (_, false) => tile::<_, false, 1>(codes, units, row, call, from),
                (_, true) => tile::<_, true, 1>(codes, units, row, call, from),
            };
        }
    }
}

/// What all rows have in common.
pub(super) struct Call<'a> {
    pub columns: Columns,
    pub task: &'a Task<'a>,
}

/// A row of the weight with `R` of the inputs; returns `R`. For itself, so that registers go to its loop.
///
/// # Safety
/// The rows are there, and their outputs this task's.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,popcnt")]
#[allow(clippy::needless_range_loop)] // loops over constants, which become straight code on registers
unsafe fn tile<C: Codes<Step = Word>, const SMALL: bool, const R: usize>(
    codes: &C,
    units: &mut Units<'_, '_>,
    row: usize,
    call: &Call<'_>,
    from: usize,
) -> usize {
    let Task { input, output, .. } = call.task;
    // SAFETY: inputs are prepared in whole blocks of words, and as many units; the rest is the caller's promise.
    unsafe {
        let mut taken = [0.0; R];
        for i in 0..R {
            taken[i] = units.multiply(i, from + i);
        }
        let units = &*units;
        let scales: [*const f32; R] = std::array::from_fn(|i| units.products(i).as_ptr());
        let x: [*const u8; R] =
            std::array::from_fn(|i| input.codes(from + i, Order::Words).as_ptr());
        let mut sums = [_mm256_setzero_ps(); R];
        let mut of_row = codes.row(row, units.zeros().as_ptr().cast());
        let mut word = Products::<C, SMALL, R> {
            codes,
            row: &mut of_row,
            scales: &scales,
            x: &x,
            columns: &call.columns,
            sums: &mut sums,
        };
        let words = input.inputs.div_ceil(64);
        for index in (0..words / 4 * 4).step_by(4) {
            word.add::<false>(index);
            word.add::<false>(index + 1);
            word.add::<true>(index + 2);
            word.add::<true>(index + 3);
        }
        for index in words / 4 * 4..words {
            if codes.is_high(index) {
                word.add::<true>(index);
            } else {
                word.add::<false>(index);
            }
        }
        for i in 0..R {
            output.set(from + i, row, sum_of(sums[i]) - taken[i]);
        }
    }
    R
}

/// What a row's words are added up with.
struct Products<'a, C: Codes, const SMALL: bool, const R: usize> {
    codes: &'a C,
    row: &'a mut C::Row,
    scales: &'a [*const f32; R],
    x: &'a [*const u8; R],
    columns: &'a Columns,
    sums: &'a mut [__m256; R],
}

impl<C: Codes<Step = Word>, const SMALL: bool, const R: usize> Products<'_, C, SMALL, R> {
    /// Adds the products of word `index` of 64 columns.
    ///
    /// # Safety
    /// The caller has the features of [`tile`]; the word is there, and the units, and the inputs. (Always inlined.)
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // over constants
    unsafe fn add<const HIGH: bool>(&mut self, index: usize) {
        let sums = &mut *self.sums;
        // SAFETY: the caller's promise.
        unsafe {
            let codes = self.codes.step::<SMALL, HIGH>(self.row, index);
            for i in 0..R {
                let x = self.x[i].add(128 * index).cast::<__m256i>();
                // At most 64 * 255 * 32639 in all lanes: no sum of 32 bits overflows.
                let mut products = codes;
                for part in 0..4 {
                    products[part] =
                        _mm256_madd_epi16(codes[part], _mm256_loadu_si256(x.add(part)));
                }
                let scales = self.columns.some::<SMALL>(self.scales[i], index);
                if SMALL {
                    for part in 0..4 {
                        let products = _mm256_cvtepi32_ps(products[part]);
                        sums[i] = _mm256_fmadd_ps(products, scales[part], sums[i]);
                    }
                } else {
                    let [a, b, c, d] = products;
                    let all = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
                    sums[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(all), scales[0], sums[i]);
                }
            }
        }
    }
}
