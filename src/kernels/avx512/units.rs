//! Scales and zero points of a row of codes, by units of columns that have one scale of weight and inputs.

use std::arch::x86_64::*;

use super::{ROWS, first_lanes};
use crate::format::Grid;
use crate::kernels::input::Input;

/// Numbers that may be read past the last unit.
const PAD: usize = 16;

/// Numbers from one array to the next.
fn stride(units: usize) -> usize {
    units.next_multiple_of(16) + PAD
}

/// Numbers of scratch memory: for each row of the weight its scales, their products with its zero points, its zero points, and the
/// products of scales for each row of inputs.
pub(super) fn floats(units: usize) -> usize {
    ROWS * (3 + ROWS) * stride(units)
}

/// What is known of some rows.
#[derive(Clone, Copy)]
pub(super) struct Units {
    first: *mut f32,
    stride: usize,
}

impl Units {
    /// # Panics
    /// Where the memory is less than [`floats`] says.
    pub fn new(scratch: &mut [f32], units: usize) -> Self {
        assert!(scratch.len() >= floats(units));
        Self { first: scratch.as_mut_ptr(), stride: stride(units) }
    }

    /// Products of scales of row `w` of the weight and row `i` of the inputs; 16 more may be read.
    pub fn products(self, w: usize, i: usize) -> *const f32 {
        self.first.wrapping_add((w * (3 + ROWS) + 3 + i) * self.stride)
    }

    /// Zero points, each in all four bytes of a unit's number of 32 bits.
    pub fn zeros(self, w: usize) -> *const u32 {
        self.first.wrapping_add((w * (3 + ROWS) + 2) * self.stride).cast()
    }

    /// Fills what belongs to row `row` of the weight, the `w`-th of its rows here, with `R` rows of inputs from `from` on. Returns what
    /// the zero points take from their products, in any lanes.
    ///
    /// # Safety
    /// `w < ROWS` and `R <= ROWS`; the rows are there.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,bmi2")]
    #[allow(clippy::needless_range_loop)] // over constants
    pub unsafe fn fill<const R: usize>(
        self,
        grid: &Grid,
        row: usize,
        w: usize,
        unit: usize,
        input: &Input<'_>,
        from: usize,
    ) -> [__m512; R] {
        let first = self.first.wrapping_add(w * (3 + ROWS) * self.stride);
        let (scales, with_zeros) = (first, first.wrapping_add(self.stride));
        let zeros = first.wrapping_add(2 * self.stride).cast::<u32>();
        let count = input.inputs.div_ceil(128) * (128 / unit);
        let mut taken = [_mm512_setzero_ps(); R];
        // SAFETY: arrays are as long as units, rounded up to 16, and their padding.
        unsafe {
            if grid.group_size == unit {
                by_sixteen(grid, row, count, scales, with_zeros, zeros);
            } else {
                one_by_one(grid, row, count, scales, with_zeros, zeros);
            }
            for i in 0..R {
                let (of_inputs, sums) = input.units(from + i, unit);
                let products = first.wrapping_add((3 + i) * self.stride);
                let mut at = 0;
                while at < count {
                    let mask = first_lanes(count - at);
                    let scale = _mm512_maskz_loadu_ps(mask, of_inputs.as_ptr().add(at));
                    _mm512_storeu_ps(products.add(at), _mm512_mul_ps(scale, _mm512_loadu_ps(scales.add(at))));
                    let sum = _mm512_maskz_loadu_ps(mask, sums.as_ptr().add(at));
                    taken[i] = _mm512_fnmadd_ps(sum, _mm512_loadu_ps(with_zeros.add(at)), taken[i]);
                    at += 16;
                }
                _mm512_storeu_ps(products.add(at), _mm512_setzero_ps());
            }
        }
        taken
    }
}

/// Units that are groups. Past the last group scales are 0.
///
/// # Safety
/// The arrays have room for `count`, rounded up to 16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,bmi2")]
unsafe fn by_sixteen(grid: &Grid, row: usize, count: usize, scales: *mut f32, with_zeros: *mut f32, zeros: *mut u32) {
    let groups = grid.groups();
    let row_zeros = if grid.symmetric { &[][..] } else { grid.row_zeros(row) };
    let size = if grid.wide { 4 } else { 2 };
    let row_scales = &grid.scales[row * groups * size..(row + 1) * groups * size];
    for at in (0..count).step_by(16) {
        let mask = first_lanes(groups.saturating_sub(at));
        let from = row_scales.as_ptr().wrapping_add(at * size);
        // SAFETY: masks cover groups of the row alone.
        let scale = unsafe {
            if grid.wide {
                _mm512_maskz_loadu_ps(mask, from.cast())
            } else {
                _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from.cast()))
            }
        };
        let zero = if grid.symmetric {
            _mm512_set1_epi32(1 << (grid.bits - 1))
        } else {
            let mut word = [0; 8];
            let some = row_zeros.get(at / 2..).unwrap_or(&[]);
            let some = &some[..some.len().min(8)];
            word[..some.len()].copy_from_slice(some);
            let word = u64::from_le_bytes(word);
            let spread = 0x0F0F_0F0F_0F0F_0F0F;
            let bytes = _mm_set_epi64x(_pdep_u64(word >> 32, spread) as i64, _pdep_u64(word, spread) as i64);
            _mm512_cvtepu8_epi32(bytes)
        };
        // SAFETY: the arrays have room.
        unsafe {
            _mm512_storeu_ps(scales.add(at), scale);
            _mm512_storeu_ps(with_zeros.add(at), _mm512_mul_ps(scale, _mm512_cvtepi32_ps(zero)));
            let four = _mm512_mullo_epi32(zero, _mm512_set1_epi32(0x0101_0101));
            _mm512_storeu_si512(zeros.add(at).cast(), four);
        }
    }
}

/// Units of groups that are larger.
///
/// # Safety
/// As for [`by_sixteen`].
unsafe fn one_by_one(grid: &Grid, row: usize, count: usize, scales: *mut f32, with_zeros: *mut f32, zeros: *mut u32) {
    let (groups, units) = (grid.groups(), (grid.group_size / 128).max(1));
    let mut at = 0;
    for group in 0..groups {
        let (scale, zero) = grid.at(row, group);
        let end = if group + 1 == groups { count } else { (at + units).min(count) };
        while at < end {
            // SAFETY: the arrays have room.
            unsafe {
                *scales.add(at) = scale;
                *with_zeros.add(at) = scale * f32::from(zero);
                *zeros.add(at) = u32::from(zero) * 0x0101_0101;
            }
            at += 1;
        }
    }
    for at in count..count.next_multiple_of(16) {
        // SAFETY: as above.
        unsafe {
            *scales.add(at) = 0.0;
            *with_zeros.add(at) = 0.0;
            *zeros.add(at) = 0;
        }
    }
}

/// For each lane the unit that its columns are in, counted from the first one's, where a lane has `columns` and a unit `unit`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn lanes(columns: usize, unit: usize) -> __m512i {
    let lane: [i32; 16] = std::array::from_fn(|lane| (lane * columns / unit) as i32);
    // SAFETY: an array of 64 bytes.
    unsafe { _mm512_loadu_si512(lane.as_ptr().cast()) }
}
