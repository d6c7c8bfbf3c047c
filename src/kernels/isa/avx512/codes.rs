//! Packed codes with a few rows of inputs. 4-bit codes are unpacked by a mask and a shift, 128
//! columns a step, even columns apart from odd ones. Codes of any width are unpacked in column
//! order, 64 a step: `vpermb` gives each eight codes their own eight bytes, and `vpmultishiftqb`
//! extracts the codes from them.

use std::arch::x86_64::*;
use std::ops::Range;

use super::loads::prefetch;
use super::units::{Units, groups_of_lanes, lanes, products_of_lanes};
use crate::format::PackedMatrix;
use crate::format::bits::packed_len;
use crate::kernels::linear::codes::Codes;
use crate::kernels::linear::input::{BLOCK, Order, Quantized};
use crate::kernels::linear::task::Task;
use crate::kernels::linear::tiles::{CodeTiles, firsts, for_code_tiles};

/// The rows of a packed weight.
#[derive(Clone, Copy)]
struct Rows {
    first: *const u8,
    /// Number of bytes of a row.
    len: usize,
}

impl Rows {
    /// # Panics
    /// Panics if the weight has fewer rows or columns than the task.
    fn new(weight: &PackedMatrix, task: &Task<'_>) -> Self {
        let len = packed_len(weight.cols(), weight.bits());
        let codes: &[u8] = weight.codes();
        assert!(task.rows.end * len <= codes.len() && task.input.inputs <= weight.cols());
        Self {
            first: codes.as_ptr(),
            len,
        }
    }

    #[inline(always)]
    fn row(&self, row: usize) -> *const u8 {
        self.first.wrapping_add(row * self.len)
    }
}

/// 4-bit codes.
#[derive(Clone, Copy)]
struct Halves(Rows);

impl Codes for Halves {
    type Row = *const u8;
    type Step = [__m512i; 2];

    const ORDER: Order = Order::EvenOdd;
    const BITS: u8 = 4;

    #[inline(always)]
    fn row(&self, row: usize, _zeros: *const u8) -> *const u8 {
        self.0.row(row)
    }

    #[inline(always)]
    unsafe fn step<const SMALL: bool, const HIGH: bool>(
        &self,
        row: &mut *const u8,
        index: usize,
    ) -> [__m512i; 2] {
        let at = row.wrapping_add(64 * index);
        prefetch(at);
        // SAFETY: the caller upholds this function's contract; loads are within the row, and a
        // partial last load is masked.
        unsafe {
            let low = _mm512_set1_epi8(0x0F);
            let pairs = if index < self.0.len / 64 {
                _mm512_loadu_si512(at.cast())
            } else {
                let rest = self.0.len.saturating_sub(64 * index).min(63);
                _mm512_maskz_loadu_epi8((1 << rest) - 1, at.cast())
            };
            [
                _mm512_and_si512(pairs, low),
                _mm512_and_si512(_mm512_srli_epi16::<4>(pairs), low),
            ]
        }
    }
}

/// Codes of any width.
#[derive(Clone, Copy)]
pub(super) struct Packed {
    rows: Rows,
    bits: usize,
    bytes: __m512i,
    shifts: __m512i,
    mask: __m512i,
}

impl Packed {
    /// # Panics
    /// Panics if the weight has fewer rows or columns than the task.
    pub fn new(weight: &PackedMatrix, task: &Task<'_>) -> Self {
        let bits = usize::from(weight.bits());
        let bytes: [u8; 64] = std::array::from_fn(|at| (at / 8 * bits + at % 8) as u8);
        let shifts: [u8; 64] = std::array::from_fn(|at| (at % 8 * bits) as u8);
        let mask = [u8::MAX >> (8 - bits); 64];
        // SAFETY: both types are plain values of 64 bytes.
        let vector = |bytes: [u8; 64]| unsafe { std::mem::transmute::<[u8; 64], __m512i>(bytes) };
        Self {
            rows: Rows::new(weight, task),
            bits,
            bytes: vector(bytes),
            shifts: vector(shifts),
            mask: vector(mask),
        }
    }
}

impl Codes for Packed {
    type Row = *const u8;
    type Step = [__m512i; 1];

    const ORDER: Order = Order::InOrder;
    const BITS: u8 = 8;

    #[inline(always)]
    fn row(&self, row: usize, _zeros: *const u8) -> *const u8 {
        self.rows.row(row)
    }

    #[inline(always)]
    unsafe fn step<const SMALL: bool, const HIGH: bool>(
        &self,
        row: &mut *const u8,
        index: usize,
    ) -> [__m512i; 1] {
        let from = 8 * self.bits * index;
        let at = row.wrapping_add(from);
        prefetch(at);
        // SAFETY: the caller upholds this function's contract; the mask covers only bytes of the
        // row.
        unsafe {
            let left = self.rows.len.saturating_sub(from).min(8 * self.bits);
            let mask = _bzhi_u64(u64::MAX, left as u32);
            let packed = _mm512_maskz_loadu_epi8(mask, at.cast());
            let eights = _mm512_permutexvar_epi8(self.bytes, packed);
            let codes = _mm512_multishift_epi64_epi8(self.shifts, eights);
            [_mm512_and_si512(codes, self.mask)]
        }
    }
}

/// # Safety
/// As for [`multiply`](crate::kernels::linear::task::Kernels::multiply).
pub(super) unsafe fn multiply(
    weight: &PackedMatrix,
    unit: usize,
    task: Task<'_>,
    scratch: &mut [f32],
) {
    // SAFETY: the caller upholds this function's contract.
    unsafe {
        let grid = weight.whole_grid();
        if weight.bits() == 4 {
            let units = Units::new(grid, (unit, Halves::ORDER), false, task.input, scratch);
            products(Halves(Rows::new(weight, &task)), unit, units, &task);
        } else {
            let units = Units::new(grid, (unit, Packed::ORDER), false, task.input, scratch);
            products(Packed::new(weight, &task), unit, units, &task);
        }
    }
}

/// # Safety
/// The codes have the task's rows; the rest as for [`multiply`].
unsafe fn products<const N: usize, C: Codes<Step = [__m512i; N]>>(
    codes: C,
    unit: usize,
    units: Units<'_>,
    task: &Task<'_>,
) {
    let call = Call {
        codes,
        unit,
        units,
        x: task.input.quantized(C::ORDER),
        task,
    };
    // SAFETY: the caller upholds this function's contract.
    unsafe { for_code_tiles(&call, task.rows.clone(), task.input, unit) };
}

struct Call<'a, C> {
    codes: C,
    unit: usize,
    units: Units<'a>,
    x: Quantized,
    task: &'a Task<'a>,
}

impl<const N: usize, C: Codes<Step = [__m512i; N]>> CodeTiles for Call<'_, C> {
    const ONE: usize = 2;
    const MORE: usize = 2;

    #[inline(always)]
    unsafe fn tile<const WIDE: bool, const SMALL: bool, const W: usize, const R: usize>(
        &self,
        rows: Range<usize>,
        _apart: usize,
        from: usize,
    ) {
        // SAFETY: the caller upholds this function's contract.
        unsafe { tile::<N, C, WIDE, SMALL, W, R>(self, rows, from) };
    }
}

/// # Safety
/// As for [`CodeTiles::tile`], for rows that follow each other.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma,f16c,bmi2")]
#[allow(clippy::needless_range_loop)] // loops over constants, which become straight code on registers
unsafe fn tile<
    const N: usize,
    C: Codes<Step = [__m512i; N]>,
    const WIDE: bool,
    const SMALL: bool,
    const W: usize,
    const R: usize,
>(
    call: &Call<'_, C>,
    rows: Range<usize>,
    from: usize,
) {
    let Call {
        codes,
        unit,
        units,
        x,
        task,
    } = *call;
    let Task { input, output, .. } = task;
    let lanes = if SMALL {
        lanes(4 * N, unit)
    } else {
        _mm512_setzero_si512()
    };
    let x: [*const u8; R] = std::array::from_fn(|i| x.row(from + i));
    let size = input.layout.block_bytes();
    let none = _mm512_setzero_si512();
    for row in firsts::<W>(rows, 1) {
        let mut sums = [[_mm512_setzero_ps(); R]; W];
        let mut of_rows: [C::Row; W] =
            std::array::from_fn(|w| codes.row(row + w, std::ptr::null()));
        // SAFETY: codes are read in their rows; inputs and units in what was prepared.
        unsafe {
            for w in 0..W {
                sums[w] = units.fill(row + w, w, from);
            }
            for index in 0..input.inputs.div_ceil(64 * N) {
                let column = 64 * N * index;
                let part = column / BLOCK * size + column % BLOCK;
                for w in 0..W {
                    let codes = codes.step::<SMALL, false>(&mut of_rows[w], index);
                    for i in 0..R {
                        let x = x[i].add(part);
                        let dots = |mut sum: __m512i, plane: usize| {
                            for n in 0..N {
                                let x = _mm512_loadu_si512(x.add(plane * BLOCK + 64 * n).cast());
                                sum = _mm512_dpbusd_epi32(sum, codes[n], x);
                            }
                            sum
                        };
                        let mut sum = dots(none, 0);
                        if WIDE {
                            let high = _mm512_slli_epi32::<8>(sum);
                            // Use one sum, or two if more products wait for each other.
                            sum = if N == 1 {
                                dots(high, 1)
                            } else {
                                _mm512_add_epi32(high, dots(none, 1))
                            };
                        }
                        let scales = units.products(w, i);
                        let scale = if SMALL {
                            let some = _mm512_loadu_ps(scales.add(index * (64 * N / unit)));
                            let scale = _mm512_permutexvar_ps(lanes, some);
                            if WIDE {
                                scale
                            } else {
                                let groups = units.inputs.groups(from + i);
                                _mm512_mul_ps(scale, groups_of_lanes::<N>(groups, column / BLOCK))
                            }
                        } else if WIDE {
                            _mm512_set1_ps(*scales.add(column / BLOCK))
                        } else {
                            products_of_lanes::<N>(scales, column / BLOCK)
                        };
                        sums[w][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, sums[w][i]);
                    }
                }
            }
            for w in 0..W {
                for i in 0..R {
                    output.set(from + i, row + w, _mm512_reduce_add_ps(sums[w][i]));
                }
            }
        }
    }
}
