//! Sparse numbers of 16 bits: a table puts the numbers of each eight columns at their places.

use std::arch::x86_64::*;
use std::marker::PhantomData;

use super::lanes::{Avx2, sum_of, widen};
use crate::format::{Number, Sparse16};
use crate::kernels::linear::dense::Products;
use crate::kernels::linear::task::Task;
use crate::kernels::linear::tiles::Features;
use crate::kernels::memory::readable;

/// Bytes that are read for eight columns, as many as their numbers may take.
const LOADED: usize = 16;
/// Bytes that are asked for ahead of those that are needed: what memory delivers in some of its latencies. Codes want none: their products take longer than
/// what the processor asks for by itself.
const AHEAD: usize = 4096;

/// Asks for what lies [`AHEAD`] of a place of a stream to come into the second-level cache.
#[inline(always)]
fn prefetch(at: *const u8) {
    // SAFETY: nothing is read, whatever the address.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(AHEAD).cast()) };
}

/// A byte of the bits. Volatile, so that it is read by itself: compilers see that bytes are a word's, and shift them out of it, which
/// takes three instructions for each.
///
/// # Safety
/// It is there.
#[inline(always)]
pub(super) unsafe fn byte_at(at: *const u8) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { u64::from(at.read_volatile()) }
}

/// For each eight bits the bytes of a `vpshufb` that puts words one after another at the bits' places; 0 elsewhere.
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
                (all[bits][2 * column], all[bits][2 * column + 1]) = (next, next + 1);
                next += 2;
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
pub(super) unsafe fn multiply(weight: &Sparse16, task: Task<'_>, scratch: &mut [f32]) {
    let words = weight.bits.cols.div_ceil(64);
    let (bits, values): (&[[u8; 8]], &[u8]) = (weight.bits.bytes.as_chunks().0, &weight.values);
    assert!(task.input.inputs <= weight.bits.cols);
    for row in task.rows.clone() {
        let bits = &bits[row * words..(row + 1) * words];
        let at = weight.offsets.get(row);
        let source = Source { bits, values, at };
        // As far as a row's values may reach, whatever its bits are.
        let far = 2 * at + 128 * words + LOADED <= values.len();
        // SAFETY: the caller's promise; what is not checked was.
        unsafe {
            match (weight.number == Number::F16, far) {
                (true, true) => products::<true, false>(source, row, &task, scratch),
                (true, false) => products::<true, true>(source, row, &task, scratch),
                (false, true) => products::<false, false>(source, row, &task, scratch),
                (false, false) => products::<false, true>(source, row, &task, scratch),
            }
        }
    }
}

/// The numbers of a row, and where the next ones are.
#[derive(Clone, Copy)]
struct Source<'a> {
    bits: &'a [[u8; 8]],
    values: &'a [u8],
    /// In numbers.
    at: usize,
}

impl Source<'_> {
    /// Calls `take` with the numbers of each eight columns of word `index` of 64.
    ///
    /// # Safety
    /// The caller has AVX2, F16C and BMI, and the row the columns; if not `CHECKED`, as many bytes are left of the values as the bits may
    /// ask for. (Always inlined, so that it has them too.)
    #[inline(always)]
    unsafe fn next<const HALF: bool, const CHECKED: bool>(
        &mut self,
        index: usize,
        mut take: impl FnMut(usize, __m256),
    ) {
        // SAFETY: the caller's promise; the table has all bytes.
        unsafe {
            let bits = self.bits.as_ptr().add(index).cast::<u8>();
            // Two lines, since a word's values may be as many.
            let from = self.values.as_ptr().wrapping_add(2 * self.at);
            prefetch(from);
            prefetch(from.wrapping_add(64));
            let mut at = self.at;
            // Of the word, not of its bytes, so that the next word need not wait for them.
            self.at += bits.cast::<u64>().read_unaligned().count_ones() as usize;
            for eight in 0..8 {
                let mut end = [0; LOADED];
                let from = if CHECKED {
                    readable(self.values, 2 * at, &mut end)
                } else {
                    self.values.as_ptr().wrapping_add(2 * at)
                };
                let byte = byte_at(bits.add(eight));
                at += byte.count_ones() as usize;
                let places = _mm_load_si128(PLACES.0.as_ptr().add(byte as usize).cast());
                let words = _mm_shuffle_epi8(_mm_loadu_si128(from.cast()), places);
                take(eight, widen::<HALF>(words));
            }
        }
    }
}

/// Products of a row with all rows of inputs.
///
/// # Safety
/// The outputs are this task's; the row has the inputs; if not `CHECKED`, as many bytes are left of the values as the bits may ask for.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,popcnt")]
unsafe fn products<const HALF: bool, const CHECKED: bool>(
    mut source: Source<'_>,
    row: usize,
    task: &Task<'_>,
    scratch: &mut [f32],
) {
    let Task { input, output, .. } = task;
    // SAFETY: the caller's promise; memory has room for as many words as there are.
    unsafe {
        match input.rows {
            1 => return tile::<HALF, CHECKED, 1>(source, row, task),
            2 => return tile::<HALF, CHECKED, 2>(source, row, task),
            _ => (),
        }
        let numbers = &mut scratch[..input.inputs.next_multiple_of(64)];
        for (index, out) in numbers.as_chunks_mut::<64>().0.iter_mut().enumerate() {
            source.next::<HALF, CHECKED>(index, |eight, numbers| {
                _mm256_storeu_ps(out.as_mut_ptr().add(8 * eight), numbers);
            });
        }
        let weight = numbers.as_ptr().cast();
        macro_rules! some_rows {
            ($r:literal, $from:expr) => {{
                let products = Avx2::run(Products::<f32, 1, $r> {
                    weight,
                    stride: 0,
                    x: input.values.as_ptr().wrapping_add($from * input.stride),
                    x_stride: input.stride,
                    count: input.inputs,
                    of: PhantomData,
                });
                for (i, [product]) in products.into_iter().enumerate() {
                    output.set($from + i, row, product);
                }
                $r
            }};
        }
        let mut from = 0;
        while from < input.rows {
            from += match input.rows - from {
                4.. => some_rows!(4, from),
                2.. => some_rows!(2, from),
                _ => some_rows!(1, from),
            };
        }
    }
}

/// Products of a row with all `R` rows of inputs.
///
/// # Safety
/// As above.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,popcnt")]
#[allow(clippy::needless_range_loop)] // loops over constants, which become straight code on registers
unsafe fn tile<const HALF: bool, const CHECKED: bool, const R: usize>(
    mut source: Source<'_>,
    row: usize,
    task: &Task<'_>,
) {
    let Task { input, output, .. } = task;
    // Several for a row, so that not each addition waits for the one before; as many as there are registers for.
    let mut sums = [[_mm256_setzero_ps(); 4]; R];
    let chains = if R == 1 { 4 } else { 2 };
    let x: [*const f32; R] = std::array::from_fn(|i| input.row(i).as_ptr());
    let whole = input.inputs / 64;
    // SAFETY: the caller's promise; inputs are read where they are, what is left of them in a copy.
    unsafe {
        for index in 0..whole {
            source.next::<HALF, CHECKED>(index, |eight, numbers| {
                for i in 0..R {
                    let x = _mm256_loadu_ps(x[i].add(64 * index + 8 * eight));
                    sums[i][eight % chains] = _mm256_fmadd_ps(numbers, x, sums[i][eight % chains]);
                }
            });
        }
        let left = input.inputs - 64 * whole;
        if left > 0 {
            let mut rest = [[0.0; 64]; R];
            for i in 0..R {
                rest[i][..left].copy_from_slice(&input.row(i)[64 * whole..]);
            }
            source.next::<HALF, CHECKED>(whole, |eight, numbers| {
                for i in 0..R {
                    let x = _mm256_loadu_ps(rest[i].as_ptr().add(8 * eight));
                    sums[i][eight % chains] = _mm256_fmadd_ps(numbers, x, sums[i][eight % chains]);
                }
            });
        }
        for i in 0..R {
            let [a, b, c, d] = sums[i];
            output.set(
                i,
                row,
                sum_of(_mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d))),
            );
        }
    }
}
