//! Codes as words of 16 bits, which multiply 16-bit inputs: one way for codes of all widths, packed or sparse.
//!
//! A source gives the codes of 64 columns after 64, as four registers of 16. With a few rows of inputs these multiply at once; with many,
//! a row's codes are written to memory first, from where all rows of inputs take them.

use std::arch::x86_64::*;
use std::ops::Range;

use super::units::Units;
use super::{MANY, sum_of};
use crate::format::PackedMatrix;
use crate::format::bits::packed_len;
use crate::kernels::common::readable;
use crate::kernels::disjoint::DisjointRows;
use crate::kernels::input::{BLOCK, Input, Order};

/// Where a row's codes come from.
pub(super) trait Codes {
    /// Whether a word of 64 columns is one of the second kind that [`next`](Self::next) is told of; words 2 and 3 of four are.
    fn is_high(&self, index: usize) -> bool {
        index & 2 != 0
    }

    /// The codes of word `index` of 64 columns, which are asked for in order; `zeros` are the columns' zero points.
    ///
    /// # Safety
    /// The caller has AVX2 and BMI, and the row the columns. (Always inlined, so that it has them too.)
    unsafe fn next<const HIGH: bool>(&mut self, index: usize, zeros: [__m256i; 4]) -> [__m256i; 4];
}

/// # Safety
/// As for [`super::multiply`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn multiply(
    weight: &PackedMatrix,
    unit: usize,
    rows: Range<usize>,
    input: &Input<'_>,
    output: DisjointRows<'_>,
    scratch: &mut [f32],
) {
    let (bits, stride) = (
        usize::from(weight.bits()),
        packed_len(weight.cols(), weight.bits()),
    );
    let spread = Spread::new(bits);
    let codes: &[u8] = weight.codes();
    let (row_words, scratch) = split(input, scratch);
    let mut units = Units::new(weight.whole_grid(), unit, input, scratch);
    let call = Call::new(unit, input, output);
    for row in rows {
        units.read(row);
        let source = Packed {
            codes,
            at: row * stride,
            bits,
            spread,
        };
        // SAFETY: the caller's promise.
        unsafe { products(source, &mut units, row, &call, row_words) };
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

/// How packed codes become words: each word gets the two bytes that its code begins in, a product moves the code to the top of the word,
/// a shift from there to the bottom.
#[derive(Clone, Copy)]
struct Spread {
    bytes: __m256i,
    up: __m256i,
    down: __m128i,
}

impl Spread {
    #[target_feature(enable = "avx2")]
    fn new(bits: usize) -> Self {
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
                bytes: _mm256_loadu_si256(bytes.as_ptr().cast()),
                up: _mm256_loadu_si256(up.as_ptr().cast()),
                down: _mm_cvtsi32_si128(16 - bits as i32),
            }
        }
    }
}

/// Packed codes of up to 8 bits; the last bytes of a row may be the next one's, which inputs of 0 multiply.
struct Packed<'a> {
    codes: &'a [u8],
    at: usize,
    bits: usize,
    spread: Spread,
}

impl Codes for Packed<'_> {
    #[inline(always)]
    unsafe fn next<const HIGH: bool>(&mut self, index: usize, _: [__m256i; 4]) -> [__m256i; 4] {
        // The last of four loads reads from byte 6 * bits on, 16 bytes.
        let mut end = [0; 64];
        let from = readable(self.codes, self.at + 8 * self.bits * index, &mut end);
        let Spread { bytes, up, down } = self.spread;
        let mut out = [up; 4];
        for (part, out) in out.iter_mut().enumerate() {
            // SAFETY: the caller's promise; 64 bytes are there, of which at most 6 * 8 + 16 are read.
            unsafe {
                let some = _mm_loadu_si128(from.add(2 * self.bits * part).cast());
                let pairs = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(some), bytes);
                *out = _mm256_srl_epi16(_mm256_mullo_epi16(pairs, up), down);
            }
        }
        out
    }
}

/// Codes that are words in memory.
struct Stored(*const u8);

impl Codes for Stored {
    #[inline(always)]
    unsafe fn next<const HIGH: bool>(&mut self, index: usize, _: [__m256i; 4]) -> [__m256i; 4] {
        let from = self.0.wrapping_add(128 * index).cast::<__m256i>();
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
    mut codes: impl Codes,
    units: &mut Units<'_, '_>,
    row: usize,
    call: &Call<'_>,
    memory: &mut [f32],
) {
    let Call { unit, input, .. } = *call;
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
        let zeros = units.zeros().as_ptr().cast();
        for index in 0..input.inputs.div_ceil(64) {
            let zeros = if unit < 64 {
                call.zeros::<true>(zeros, index)
            } else {
                call.zeros::<false>(zeros, index)
            };
            let high = codes.is_high(index);
            let some = if high {
                codes.next::<true>(index, zeros)
            } else {
                codes.next::<false>(index, zeros)
            };
            for (part, some) in some.into_iter().enumerate() {
                _mm256_storeu_si256(words.add(128 * index + 32 * part).cast(), some);
            }
        }
        let mut from = 0;
        while from < input.rows {
            let codes = Stored(words);
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
    /// Of each 16 columns of 64, the unit of each two, counted from the first's.
    lanes: [__m256i; 4],
    unit: usize,
    input: &'a Input<'a>,
    output: DisjointRows<'a>,
}

impl<'a> Call<'a> {
    #[target_feature(enable = "avx2")]
    pub fn new(unit: usize, input: &'a Input<'a>, output: DisjointRows<'a>) -> Self {
        Self {
            lanes: lanes(unit),
            unit,
            input,
            output,
        }
    }

    /// Of the units of columns from word `index` on, those of each 16 columns; numbers of 32 bits.
    ///
    /// # Safety
    /// The caller has AVX2, and the units are there, and 8 numbers more. (Always inlined.)
    #[inline(always)]
    unsafe fn some<const SMALL: bool>(&self, units: *const f32, index: usize) -> [__m256; 4] {
        let first = units.wrapping_add((64 * index) >> self.unit.trailing_zeros());
        // SAFETY: the caller's promise.
        unsafe {
            if SMALL {
                let (eight, [a, b, c, d]) = (_mm256_loadu_ps(first), self.lanes);
                let [a, b] = [
                    _mm256_permutevar8x32_ps(eight, a),
                    _mm256_permutevar8x32_ps(eight, b),
                ];
                [
                    a,
                    b,
                    _mm256_permutevar8x32_ps(eight, c),
                    _mm256_permutevar8x32_ps(eight, d),
                ]
            } else {
                [_mm256_broadcast_ss(&*first); 4]
            }
        }
    }

    /// Zero points of the columns of word `index`.
    ///
    /// # Safety
    /// As above.
    #[inline(always)]
    unsafe fn zeros<const SMALL: bool>(&self, zeros: *const f32, index: usize) -> [__m256i; 4] {
        // SAFETY: the caller's promise.
        let [a, b, c, d] = unsafe { self.some::<SMALL>(zeros, index) };
        // SAFETY: as above.
        unsafe {
            [
                _mm256_castps_si256(a),
                _mm256_castps_si256(b),
                _mm256_castps_si256(c),
                _mm256_castps_si256(d),
            ]
        }
    }
}

/// For each 16 columns of 64 and each two of them the unit that they are in, counted from the first one's.
#[target_feature(enable = "avx2")]
fn lanes(unit: usize) -> [__m256i; 4] {
    std::array::from_fn(|part| {
        let lanes: [i32; 8] = std::array::from_fn(|lane| ((16 * part + 2 * lane) / unit) as i32);
        // SAFETY: an array of 32 bytes.
        unsafe { _mm256_loadu_si256(lanes.as_ptr().cast()) }
    })
}

/// A row of the weight with `R` of the inputs; returns `R`. For itself, so that registers go to its loop.
///
/// # Safety
/// The rows are there, and their outputs this task's.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,popcnt")]
#[allow(clippy::needless_range_loop)] // loops over constants, which become straight code on registers
unsafe fn tile<C: Codes, const SMALL: bool, const R: usize>(
    mut codes: C,
    units: &mut Units<'_, '_>,
    row: usize,
    call: &Call<'_>,
    from: usize,
) -> usize {
    let Call { input, output, .. } = *call;
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
        let zeros = units.zeros().as_ptr().cast();
        let words = input.inputs.div_ceil(64);
        for index in (0..words / 4 * 4).step_by(4) {
            word::<C, SMALL, false, R>(&mut codes, index, zeros, &scales, &x, call, &mut sums);
            word::<C, SMALL, false, R>(&mut codes, index + 1, zeros, &scales, &x, call, &mut sums);
            word::<C, SMALL, true, R>(&mut codes, index + 2, zeros, &scales, &x, call, &mut sums);
            word::<C, SMALL, true, R>(&mut codes, index + 3, zeros, &scales, &x, call, &mut sums);
        }
        for index in words / 4 * 4..words {
            if codes.is_high(index) {
                word::<C, SMALL, true, R>(&mut codes, index, zeros, &scales, &x, call, &mut sums);
            } else {
                word::<C, SMALL, false, R>(&mut codes, index, zeros, &scales, &x, call, &mut sums);
            }
        }
        for i in 0..R {
            output.set(from + i, row, sum_of(sums[i]) - taken[i]);
        }
    }
    R
}

/// Adds the products of word `index` of 64 columns.
///
/// # Safety
/// The caller has the features of [`tile`]; the word is there, and the units, and the inputs. (Always inlined.)
#[inline(always)]
#[allow(clippy::needless_range_loop, clippy::too_many_arguments)] // over constants; the registers of a loop
unsafe fn word<C: Codes, const SMALL: bool, const HIGH: bool, const R: usize>(
    codes: &mut C,
    index: usize,
    zeros: *const f32,
    scales: &[*const f32; R],
    x: &[*const u8; R],
    call: &Call<'_>,
    sums: &mut [__m256; R],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let codes = codes.next::<HIGH>(index, call.zeros::<SMALL>(zeros, index));
        for i in 0..R {
            let x = x[i].add(128 * index).cast::<__m256i>();
            // At most 64 * 255 * 32639 in all lanes: no sum of 32 bits overflows.
            let mut products = codes;
            for part in 0..4 {
                products[part] = _mm256_madd_epi16(codes[part], _mm256_loadu_si256(x.add(part)));
            }
            let scales = call.some::<SMALL>(scales[i], index);
            if SMALL {
                for part in 0..4 {
                    sums[i] =
                        _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[part]), scales[part], sums[i]);
                }
            } else {
                let [a, b, c, d] = products;
                let all = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
                sums[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(all), scales[0], sums[i]);
            }
        }
    }
}
