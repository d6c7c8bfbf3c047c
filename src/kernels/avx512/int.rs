//! Packed codes of any width, in the order of columns: `vpermb` gives each eight of them eight bytes of their own, in which
//! `vpmultishiftqb` finds them. Lane `i` of 64 columns has four.

use std::arch::x86_64::*;
use std::ops::Range;

use super::units::{Units, lanes};
use super::{for_tiles, prefetch};
use crate::format::PackedMatrix;
use crate::format::bits::packed_len;
use crate::kernels::disjoint::DisjointRows;
use crate::kernels::input::{BLOCK, Input, Order};

/// How codes come out of their bytes.
#[derive(Clone, Copy)]
pub(super) struct Spread {
    bits: usize,
    bytes: __m512i,
    shifts: __m512i,
    mask: __m512i,
}

impl Spread {
    #[target_feature(enable = "avx512f")]
    pub fn new(bits: u8) -> Self {
        let width = usize::from(bits);
        let bytes: [u8; 64] = std::array::from_fn(|at| (at / 8 * width + at % 8) as u8);
        let shifts: [u8; 64] = std::array::from_fn(|at| (at % 8 * width) as u8);
        // SAFETY: arrays of 64 bytes.
        unsafe {
            Self {
                bits: width,
                bytes: _mm512_loadu_si512(bytes.as_ptr().cast()),
                shifts: _mm512_loadu_si512(shifts.as_ptr().cast()),
                mask: _mm512_set1_epi8((u8::MAX >> (8 - bits)) as i8),
            }
        }
    }

    /// The codes of word `index` of 64 columns of a row of so many bytes, one in each byte, zeros past the last.
    ///
    /// # Safety
    /// The row is there.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,bmi2")]
    pub unsafe fn codes(&self, row: *const u8, len: usize, index: usize) -> __m512i {
        let from = 8 * self.bits * index;
        let at = row.wrapping_add(from);
        prefetch(at);
        let mask = _bzhi_u64(u64::MAX, len.saturating_sub(from).min(8 * self.bits) as u32);
        // SAFETY: the mask covers bytes of the row alone.
        let packed = unsafe { _mm512_maskz_loadu_epi8(mask, at.cast()) };
        let eights = _mm512_permutexvar_epi8(self.bytes, packed);
        _mm512_and_si512(_mm512_multishift_epi64_epi8(self.shifts, eights), self.mask)
    }
}

/// # Safety
/// As for [`super::multiply`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma,f16c,bmi2")]
pub(super) unsafe fn multiply(
    weight: &PackedMatrix,
    unit: usize,
    rows: Range<usize>,
    input: &Input<'_>,
    output: DisjointRows<'_>,
    scratch: &mut [f32],
) {
    let stride = packed_len(weight.cols(), weight.bits());
    let codes: &[u8] = weight.codes();
    assert!(rows.end * stride <= codes.len() && input.inputs <= weight.cols());
    let units = Units::new(weight.whole_grid(), unit, false, input, scratch);
    let call = Call {
        codes: codes.as_ptr(),
        spread: Spread::new(weight.bits()),
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
    codes: *const u8,
    spread: Spread,
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
        #[target_feature(
            enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma,f16c,bmi2"
        )]
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
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma,f16c,bmi2")]
#[allow(clippy::needless_range_loop)] // loops over constants, which become straight code on registers
unsafe fn tile<const WIDE: bool, const SMALL: bool, const W: usize, const R: usize>(
    call: &Call<'_>,
    row: usize,
    from: usize,
) {
    let Call {
        codes,
        spread,
        unit,
        stride,
        input,
        output,
        units,
    } = *call;
    let mut sums = [[_mm512_setzero_ps(); R]; W];
    let lanes = if SMALL {
        lanes(4, unit)
    } else {
        _mm512_setzero_si512()
    };
    let x: [*const u8; R] = std::array::from_fn(|i| input.codes(from + i, Order::InOrder).as_ptr());
    let size = input.layout.block_bytes();
    let prepared = units.prepared::<R>(from);
    // SAFETY: codes are read in their rows; inputs and units in what was prepared.
    unsafe {
        let rows: [*const u8; W] = std::array::from_fn(|w| codes.add((row + w) * stride));
        for w in 0..W {
            sums[w] = units.fill(row + w, w, &prepared);
        }
        for index in 0..input.inputs.div_ceil(64) {
            let part = index / 2 * size + index % 2 * 64;
            for w in 0..W {
                let codes = spread.codes(rows[w], stride, index);
                for i in 0..R {
                    let x = x[i].add(part);
                    let at = |part: usize| _mm512_loadu_si512(x.add(part).cast());
                    let mut sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, at(0));
                    if WIDE {
                        sum = _mm512_dpbusd_epi32(_mm512_slli_epi32::<8>(sum), codes, at(BLOCK));
                    }
                    let scales = units.products(w, i);
                    let scale = if SMALL {
                        _mm512_permutexvar_ps(
                            lanes,
                            _mm512_loadu_ps(scales.add(index * (64 / unit))),
                        )
                    } else {
                        _mm512_set1_ps(*scales.add(index / 2))
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
