//! Sparse 4-bit codes. `vpexpandb` moves them to their columns, and the other columns get their
//! zero point. Each lane of 32 bits has four columns.
//!
//! The expansions, masks and products alone take all the time that memory needs to deliver the
//! weight, so nothing else may be added. Therefore a single `and` extracts the codes of a word in
//! place: from the low halves of bytes, or, as 16 times their value, from the high halves. Software
//! prefetching is not used: the hardware prefetcher is sufficient here, and prefetching into the
//! second-level cache is slower.

use std::arch::x86_64::*;
use std::ops::Range;

use super::lanes::LONG;
use super::loads::near;
use super::units::{Units, groups_of_lanes, lanes, products_of_lanes};
use crate::format::{EVEN, SparseInt4, Starts, even_row_bytes, is_high};
use crate::kernels::linear::codes::Codes;
use crate::kernels::linear::input::{BLOCK, Order, Quantized};
use crate::kernels::linear::task::Task;
use crate::kernels::linear::tiles::{CodeTiles, firsts, for_code_tiles};
use crate::kernels::memory::readable;

/// Number of bytes that are read for 64 columns, which is the maximum that their codes take.
const LOADED: usize = 64;

/// # Safety
/// As for [`multiply`](crate::kernels::linear::task::Kernels::multiply).
#[target_feature(
    enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi2,fma,f16c,bmi2,popcnt"
)]
pub(super) unsafe fn multiply(
    weight: &SparseInt4,
    unit: usize,
    task: Task<'_>,
    scratch: &mut [f32],
) {
    let Task { rows, input, .. } = task.clone();
    let words = weight.bits.cols.div_ceil(64);
    assert!(rows.end * words * 8 <= weight.bits.bytes.len() && input.inputs <= weight.bits.cols);
    let units = Units::new(&weight.grid, (unit, Order::InOrder), true, input, scratch);
    let (bits, codes) = (weight.bits.bytes.as_ptr(), &*weight.codes);
    let starts = weight.offsets.starts();
    let even = weight.is_even();
    assert!(!even || rows.end * even_row_bytes(weight.bits.cols) <= codes.len());
    let call = Call {
        even,
        starts,
        unit,
        words,
        bits,
        codes,
        x: input.quantized(Order::InOrder),
        task: &task,
        units,
    };
    // SAFETY: the rows are within the mask, as asserted above; the caller guarantees the rest.
    unsafe { for_code_tiles(&call, rows, input, unit) };
}

struct Call<'a> {
    /// Whether the codes of whole words are at fixed places, which are within `codes`.
    even: bool,
    starts: Starts<'a>,
    unit: usize,
    words: usize,
    bits: *const u8,
    codes: &'a [u8],
    x: Quantized,
    task: &'a Task<'a>,
    units: Units<'a>,
}

impl CodeTiles for Call<'_> {
    const ONE: usize = 1;
    const MORE: usize = 1;
    const LONG: usize = LONG;

    #[inline(always)]
    unsafe fn tile<const WIDE: bool, const SMALL: bool, const W: usize, const R: usize>(
        &self,
        rows: Range<usize>,
        apart: usize,
        from: usize,
    ) {
        // SAFETY: the caller upholds this function's contract.
        unsafe { tile::<WIDE, SMALL, W, R>(self, rows, apart, from) };
    }
}

/// Position of the codes of a word in their bytes, and the form in which they are returned.
const LOW: u8 = 0;
/// From the high halves, as 16 times their value.
const HIGH: u8 = 1;
/// From the high halves, as their value, for a block whose other half is in the low halves.
const DOWN: u8 = 2;

/// Returns the codes of 64 columns, one in each byte. Columns without a stored code get their zero
/// point.
///
/// # Safety
/// [`LOADED`] bytes of codes and the word must be readable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2")]
unsafe fn expand<const FROM: u8>(codes: *const u8, word: *const u64, zeros: __m512i) -> __m512i {
    // SAFETY: the caller upholds this function's contract. The word is loaded into a register
    // because its bits are counted too.
    let (pairs, mask) = unsafe { (_mm512_loadu_si512(codes.cast()), word.read_unaligned()) };
    let some = match FROM {
        LOW => _mm512_and_si512(pairs, _mm512_set1_epi8(0x0F)),
        HIGH => _mm512_and_si512(pairs, _mm512_set1_epi8(0xF0_u8 as i8)),
        _ => _mm512_and_si512(_mm512_srli_epi16::<4>(pairs), _mm512_set1_epi8(0x0F)),
    };
    _mm512_mask_expand_epi8(zeros, mask, some)
}

/// As [`expand`], for a word of an even weight.
///
/// # Safety
/// [`EVEN`] bytes of codes and the word must be readable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2")]
unsafe fn expand_even<const FROM: u8>(
    codes: *const u8,
    word: *const u64,
    zeros: __m512i,
) -> __m512i {
    // SAFETY: the caller upholds this function's contract.
    let (pairs, mask) = unsafe { (_mm256_loadu_si256(codes.cast()), word.read_unaligned()) };
    let half = if FROM == LOW { 0x0F } else { 0xF0_u8 };
    let some = _mm256_and_si256(pairs, _mm256_set1_epi8(half as i8));
    _mm512_mask_expand_epi8(zeros, mask, _mm512_castsi256_si512(some))
}

/// # Safety
/// As for [`CodeTiles::tile`].
#[target_feature(
    enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi2,fma,f16c,bmi2,popcnt"
)]
#[allow(clippy::needless_range_loop)] // constant loops, which are unrolled
#[allow(unused_assignments)] // the last position in a stream
unsafe fn tile<const WIDE: bool, const SMALL: bool, const W: usize, const R: usize>(
    call: &Call<'_>,
    rows: Range<usize>,
    apart: usize,
    from: usize,
) {
    let Call {
        even,
        starts,
        unit,
        words,
        bits,
        codes,
        x,
        task,
        units,
    } = *call;
    let Task { input, output, .. } = task;
    let lanes = if SMALL {
        lanes(4, unit)
    } else {
        _mm512_setzero_si512()
    };
    let x: [*const u8; R] = std::array::from_fn(|i| x.row(from + i));
    let size = if WIDE { 2 * BLOCK } else { BLOCK };
    let (blocks, of_block) = (input.inputs.div_ceil(BLOCK), BLOCK / unit);
    let products: [[*const f32; R]; W] =
        std::array::from_fn(|w| std::array::from_fn(|i| units.products(w, i)));
    let zeros: [*const u32; W] = std::array::from_fn(|w| units.zeros(w));
    let mut end = [0; LOADED];
    // SAFETY: the words are within the rows of the mask. Codes are read in place if enough bytes
    // are left, and from a copy otherwise. Inputs and units are read within the prepared memory.
    unsafe {
        // Returns the codes of a word and advances to the next word of the same stream.
        macro_rules! next {
            ($checked:literal, $from:ident, $at:expr, $word:expr, $zeros:expr) => {{
                let word: *const u64 = $word;
                let from = if $checked {
                    readable(codes, $at, &mut end)
                } else {
                    codes.as_ptr().add($at)
                };
                $at += word.read_unaligned().count_ones() as usize;
                expand::<$from>(from, word, $zeros)
            }};
        }
        for row in firsts::<W>(rows, apart) {
            let bits: [*const u64; W] =
                std::array::from_fn(|w| bits.add((row + w * apart) * words * 8).cast());
            let mut low: [usize; W] = std::array::from_fn(|w| starts.get(row + w * apart));
            let mut high = low;
            // Do not use the arrays that `fill` returns, because they have addresses and would not
            // stay in registers.
            let mut sums = [[_mm512_setzero_ps(); R]; W];
            for w in 0..W {
                let filled = units.fill::<R>(row + w * apart, w, from);
                sums[w] = std::array::from_fn(|i| filled[i]);
            }
            // Adds a block, or the half of it that the row has, if not `whole`. Inputs past the last
            // word are zeros. `next` returns the codes of one of its words for a row, a half and zero
            // points.
            macro_rules! add {
                ($block:expr, $whole:expr, $next:ident) => {{
                    let block: usize = $block;
                    let whole: bool = $whole;
                    let x: [*const u8; R] = std::array::from_fn(|i| x[i].add(block * size));
                    let at = |i: usize, part: usize| _mm512_loadu_si512(x[i].add(64 * part).cast());
                    let none = _mm512_setzero_si512();
                    for w in 0..W {
                        let word = bits[w].add(2 * block);
                        if SMALL {
                            macro_rules! half {
                                ($half:tt) => {{
                                    let first = block * of_block + $half * (64 / unit);
                                    let zeros = _mm512_loadu_si512(zeros[w].add(first).cast());
                                    let zeros = _mm512_permutexvar_epi32(lanes, zeros);
                                    let codes = $next!(w, $half, word.add($half), zeros);
                                    for i in 0..R {
                                        let mut sum =
                                            _mm512_dpbusd_epi32(none, codes, at(i, $half));
                                        if WIDE {
                                            sum = _mm512_dpbusd_epi32(
                                                _mm512_slli_epi32::<8>(sum),
                                                codes,
                                                at(i, 2 + $half),
                                            );
                                        }
                                        let scale = _mm512_loadu_ps(products[w][i].add(first));
                                        let scale = _mm512_permutexvar_ps(lanes, scale);
                                        let scale = if WIDE {
                                            scale
                                        } else {
                                            let groups = units.inputs.groups(from + i);
                                            _mm512_mul_ps(
                                                scale,
                                                groups_of_lanes::<1>(groups, block),
                                            )
                                        };
                                        sums[w][i] = _mm512_fmadd_ps(
                                            _mm512_cvtepi32_ps(sum),
                                            scale,
                                            sums[w][i],
                                        );
                                    }
                                }};
                            }
                            half!(0);
                            if whole {
                                half!(1);
                            }
                        } else {
                            let zeros = _mm512_set1_epi32(*zeros[w].add(block) as i32);
                            let first = $next!(w, 0, word, zeros);
                            let second = if whole {
                                $next!(w, 1, word.add(1), zeros)
                            } else {
                                zeros
                            };
                            for i in 0..R {
                                let mut sum = _mm512_dpbusd_epi32(none, first, at(i, 0));
                                sum = _mm512_dpbusd_epi32(sum, second, at(i, 1));
                                if WIDE {
                                    // Use one sum, so that no extra addition is needed.
                                    sum = _mm512_dpbusd_epi32(
                                        _mm512_slli_epi32::<8>(sum),
                                        first,
                                        at(i, 2),
                                    );
                                    sum = _mm512_dpbusd_epi32(sum, second, at(i, 3));
                                }
                                let scale = if WIDE {
                                    _mm512_set1_ps(*products[w][i].add(block))
                                } else {
                                    products_of_lanes::<1>(products[w][i], block)
                                };
                                sums[w][i] =
                                    _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, sums[w][i]);
                            }
                        }
                    }
                }};
            }
            // Words of the low and of the high stream, unchecked and checked, and a block that has
            // one of each.
            macro_rules! low {
                ($w:expr, $half:literal, $word:expr, $zeros:expr) => {
                    next!(false, LOW, low[$w], $word, $zeros)
                };
            }
            macro_rules! high {
                ($w:expr, $half:literal, $word:expr, $zeros:expr) => {
                    next!(false, HIGH, high[$w], $word, $zeros)
                };
            }
            macro_rules! last_low {
                ($w:expr, $half:literal, $word:expr, $zeros:expr) => {
                    next!(true, LOW, low[$w], $word, $zeros)
                };
            }
            macro_rules! last_high {
                ($w:expr, $half:literal, $word:expr, $zeros:expr) => {
                    next!(true, HIGH, high[$w], $word, $zeros)
                };
            }
            macro_rules! last_both {
                ($w:expr, 0, $word:expr, $zeros:expr) => {
                    next!(true, LOW, low[$w], $word, $zeros)
                };
                ($w:expr, 1, $word:expr, $zeros:expr) => {
                    next!(true, DOWN, high[$w], $word, $zeros)
                };
            }
            // Words of a pair of blocks of an even weight.
            macro_rules! even_low {
                ($w:expr, $half:literal, $word:expr, $zeros:expr) => {
                    expand_even::<LOW>(codes.as_ptr().add(low[$w] + EVEN * $half), $word, $zeros)
                };
            }
            macro_rules! even_high {
                ($w:expr, $half:literal, $word:expr, $zeros:expr) => {
                    expand_even::<HIGH>(codes.as_ptr().add(low[$w] + EVEN * $half), $word, $zeros)
                };
            }
            let mut block = 0;
            // Pairs of whole blocks, whose codes cannot extend past the last word.
            let pairs = (blocks / 2).min(words / 4);
            if even {
                while block < 2 * pairs {
                    add!(block, true, even_low);
                    add!(block + 1, true, even_high);
                    low.iter_mut().for_each(|at| *at += 2 * EVEN);
                    block += 2;
                }
                high = low;
            } else if let Some(last) = codes.len().checked_sub(2 * LOADED) {
                while block < 2 * pairs && (0..W).all(|w| low[w].max(high[w]) <= last) {
                    add!(block, true, low);
                    add!(block + 1, true, high);
                    block += 2;
                }
            }
            while block < blocks {
                let whole = 2 * block + 1 < words;
                if block % 2 == 1 {
                    add!(block, whole, last_high);
                } else if is_high(2 * block + 1, words) {
                    add!(block, whole, last_both);
                } else {
                    add!(block, whole, last_low);
                }
                block += 1;
            }
            for w in 0..W {
                for i in 0..R {
                    output.set(from + i, row + w * apart, _mm512_reduce_add_ps(sums[w][i]));
                }
            }
        }
    }
}

/// The codes of a weight, word by word.
#[derive(Clone, Copy)]
pub(super) struct Unpack<'a> {
    starts: Starts<'a>,
    words: usize,
    bits: &'a [[u8; 8]],
    codes: &'a [u8],
    /// The zero points of all rows, or `None` if all are the same.
    zeros: Option<&'a [u8]>,
    row_zeros: usize,
    groups: usize,
    /// Number of columns of a group. It is larger than the number of columns if there is only one
    /// group.
    group: usize,
}

impl<'a> Unpack<'a> {
    pub fn new(weight: &'a SparseInt4) -> Self {
        let grid = &weight.grid;
        Self {
            starts: weight.offsets.starts(),
            words: weight.bits.cols.div_ceil(64),
            bits: weight.bits.bytes.as_chunks().0,
            codes: &weight.codes,
            zeros: if grid.symmetric {
                None
            } else {
                Some(&grid.zeros)
            },
            row_zeros: grid.groups().div_ceil(2),
            groups: grid.groups(),
            group: if grid.group_size >= grid.cols {
                usize::MAX
            } else {
                grid.group_size
            },
        }
    }

    /// Returns the codes of word `index`. The next codes of the row's two streams begin at bytes
    /// `at`.
    ///
    /// # Panics
    /// Panics if the row is out of range.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")]
    fn word(&self, (row, at): &mut (usize, [usize; 2]), index: usize) -> __m512i {
        let row = *row;
        if index >= self.words {
            return _mm512_setzero_si512();
        }
        let bits = &self.bits[row * self.words + index];
        near(bits.as_ptr().wrapping_add(128));
        let zeros = match self.zeros {
            None => _mm512_set1_epi8(8),
            Some(zeros) => {
                let zeros = &zeros[row * self.row_zeros..(row + 1) * self.row_zeros];
                let zero = |group: usize| {
                    if group < self.groups {
                        zeros[group / 2] >> (4 * (group % 2)) & 0x0F
                    } else {
                        0
                    }
                };
                if self.group >= 64 {
                    _mm512_set1_epi8(zero(64 * index / self.group) as i8)
                } else {
                    // A unit has at least eight columns.
                    let eight = |eight: usize| {
                        u64::from(zero((64 * index + 8 * eight) / self.group))
                            * 0x0101_0101_0101_0101
                    };
                    let zeros: [u64; 8] = std::array::from_fn(eight);
                    // SAFETY: the array has 64 bytes.
                    unsafe { _mm512_loadu_si512(zeros.as_ptr().cast()) }
                }
            }
        };
        let high = is_high(index, self.words);
        let at = &mut at[usize::from(high)];
        let mut end = [0; LOADED];
        near(self.codes.as_ptr().wrapping_add(*at + 256));
        let from = readable(self.codes, *at, &mut end);
        *at += u64::from_le_bytes(*bits).count_ones() as usize;
        // SAFETY: `readable` provides enough bytes, and the word exists.
        unsafe {
            if high {
                expand::<DOWN>(from, bits.as_ptr().cast(), zeros)
            } else {
                expand::<LOW>(from, bits.as_ptr().cast(), zeros)
            }
        }
    }
}

impl Codes for Unpack<'_> {
    /// The index of the row, and the positions of the next codes of its two streams.
    type Row = (usize, [usize; 2]);
    type Step = [__m512i; 1];

    const ORDER: Order = Order::InOrder;
    const BITS: u8 = 4;

    #[inline(always)]
    fn row(&self, row: usize, _zeros: *const u8) -> (usize, [usize; 2]) {
        (row, [self.starts.get(row); 2])
    }

    #[inline(always)]
    unsafe fn step<const SMALL: bool, const HIGH: bool>(
        &self,
        row: &mut (usize, [usize; 2]),
        index: usize,
    ) -> [__m512i; 1] {
        // SAFETY: the caller has the features, since this is inlined into it.
        [unsafe { self.word(row, index) }]
    }
}
