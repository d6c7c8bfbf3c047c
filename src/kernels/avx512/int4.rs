//! Packed codes of 4 bits: 64 bytes are 128 columns, the even ones in the lower halves. Lane `i` has columns `8 i .. 8 i + 8`.

use std::arch::x86_64::*;
use std::ops::Range;

use super::units::{Units, lanes};
use super::{for_tiles, prefetch};
use crate::format::PackedMatrix;
use crate::kernels::disjoint::DisjointRows;
use crate::kernels::input::{BLOCK, Input, Order};

/// # Safety
/// As for [`super::multiply`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c,bmi2")]
pub(super) unsafe fn multiply(
    weight: &PackedMatrix,
    unit: usize,
    rows: Range<usize>,
    input: &Input<'_>,
    output: DisjointRows<'_>,
    scratch: &mut [f32],
) {
    let stride = weight.cols().div_ceil(2);
    let codes: &[u8] = weight.codes();
    assert!(rows.end * stride <= codes.len() && input.inputs <= weight.cols());
    let units = Units::new(weight.whole_grid(), unit, false, input, scratch);
    let call = Call {
        weight,
        unit,
        stride,
        input,
        output,
        units,
    };
    // SAFETY: the rows are in the codes, as was asserted; the rest is the caller's promise.
    unsafe {
        match (input.wide(), unit < BLOCK) {
            (true, false) => {
                for_tiles!(rows, input.rows, 2 x 1, 2 x 4, |row, from| tile_wide(&call, row, from))
            }
            (true, true) => {
                for_tiles!(rows, input.rows, 2 x 1, 2 x 4, |row, from| tile_wide_small(&call, row, from))
            }
            (false, false) => {
                for_tiles!(rows, input.rows, 2 x 1, 2 x 4, |row, from| tile_narrow(&call, row, from))
            }
            (false, true) => {
                for_tiles!(rows, input.rows, 2 x 1, 2 x 4, |row, from| tile_narrow_small(&call, row, from))
            }
        }
    }
}

struct Call<'a> {
    weight: &'a PackedMatrix,
    unit: usize,
    stride: usize,
    input: &'a Input<'a>,
    output: DisjointRows<'a>,
    units: Units<'a>,
}

macro_rules! tile {
    ($name:ident, $wide:literal, $small:literal) => {
        /// # Safety
        /// `W` rows of the weight and `R` of the inputs are there, and their outputs this task's.
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c,bmi2")]
        unsafe fn $name<const W: usize, const R: usize>(call: &Call<'_>, row: usize, from: usize) {
            // SAFETY: the caller's promise.
            unsafe { tile::<$wide, $small, W, R>(call, row, from) };
        }
    };
}

tile!(tile_wide, true, false);
tile!(tile_wide_small, true, true);
tile!(tile_narrow, false, false);
tile!(tile_narrow_small, false, true);

/// # Safety
/// As above.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c,bmi2")]
#[allow(clippy::needless_range_loop)] // loops over constants, which become straight code on registers
unsafe fn tile<const WIDE: bool, const SMALL: bool, const W: usize, const R: usize>(
    call: &Call<'_>,
    row: usize,
    from: usize,
) {
    let Call {
        weight,
        unit,
        stride,
        input,
        output,
        units,
    } = *call;
    let codes = weight.codes().as_ptr();
    let mut sums = [[_mm512_setzero_ps(); R]; W];
    let lanes = if SMALL {
        lanes(8, unit)
    } else {
        _mm512_setzero_si512()
    };
    let x: [*const u8; R] = std::array::from_fn(|i| input.codes(from + i, Order::EvenOdd).as_ptr());
    let size = input.layout.block_bytes();
    let prepared = units.prepared::<R>(from);
    let blocks = input.inputs.div_ceil(BLOCK);
    let whole = blocks.min(stride / 64);
    let low = _mm512_set1_epi8(0x0F);
    // SAFETY: loads of codes are in their rows, the last ones masked; those of inputs and units in what was prepared.
    unsafe {
        let rows: [*const u8; W] = std::array::from_fn(|w| codes.add((row + w) * stride));
        for w in 0..W {
            sums[w] = units.fill(row + w, w, &prepared);
        }
        for block in 0..blocks {
            for w in 0..W {
                let at = rows[w].add(64 * block);
                prefetch(at);
                let pairs = if block < whole {
                    _mm512_loadu_si512(at.cast())
                } else {
                    let rest = stride.saturating_sub(64 * block).min(63);
                    _mm512_maskz_loadu_epi8((1 << rest) - 1, at.cast())
                };
                let even = _mm512_and_si512(pairs, low);
                let odd = _mm512_and_si512(_mm512_srli_epi16::<4>(pairs), low);
                for i in 0..R {
                    let x = x[i].add(block * size);
                    let at = |part: usize| _mm512_loadu_si512(x.add(64 * part).cast());
                    let none = _mm512_setzero_si512();
                    let mut sum =
                        _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(none, even, at(0)), odd, at(1));
                    if WIDE {
                        let low =
                            _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(none, even, at(2)), odd, at(3));
                        sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(sum), low);
                    }
                    let scales = units.products(w, i);
                    let scale = if SMALL {
                        _mm512_permutexvar_ps(
                            lanes,
                            _mm512_loadu_ps(scales.add(block * (BLOCK / unit))),
                        )
                    } else {
                        _mm512_set1_ps(*scales.add(block))
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
