//! Scales and zero points of a row of codes, by units: runs of columns that share a scale of the
//! weight and a scale of the inputs.

use std::arch::x86_64::*;

use super::loads::first_lanes;
use crate::format::Grid;
use crate::kernels::linear::input::{self, BLOCK, GROUPS, Input, Order};

/// Maximum number of rows of a weight, and of inputs, at a time.
const ROWS: usize = 4;

/// Count of numbers past the last unit that may be read.
const PAD: usize = 16;

/// Returns masks of the units, among 16, that are in the second block of a pair of blocks. The
/// first mask is for the 1st, 3rd, .. 16 units of a row, and the second for the 2nd, 4th, .. 16
/// units.
fn second_blocks(of_block: usize) -> [u16; 2] {
    match of_block {
        1 => [0xAAAA; 2],
        2 => [0xCCCC; 2],
        4 => [0xF0F0; 2],
        8 => [0xFF00; 2],
        _ => [0, 0xFFFF],
    }
}

/// Returns the distance between arrays, in numbers.
fn stride(units: usize) -> usize {
    units.next_multiple_of(16) + PAD
}

/// Returns the count of numbers of scratch memory: for each row of the weight its scales and zero
/// points, and the products of scales for each row of inputs.
pub(super) fn floats(inputs: usize, units: usize) -> usize {
    ROWS * (2 + ROWS) * stride(units.max(GROUP_LANES * inputs.div_ceil(BLOCK)))
}

/// The most products of scales that a block has, if its groups have scales.
const GROUP_LANES: usize = 2 * GROUPS;

/// Scales and zero points of the rows of a weight.
#[derive(Clone, Copy)]
pub(super) struct OfWeight<'a> {
    grid: &'a Grid,
    scales: &'a [u8],
    zeros: &'a [u8],
    groups: usize,
    /// Whether each group is one unit.
    direct: bool,
    /// Whether each group is one unit, scales have 16 bits, and zero points are found by shifts.
    plain: bool,
    /// The zero point of symmetric codes.
    middle: u8,
}

/// Scales, zero points and products of scales of the current rows.
#[derive(Clone, Copy)]
pub(super) struct Units<'a> {
    first: *mut f32,
    stride: usize,
    weight: OfWeight<'a>,
    pub inputs: input::Units,
    /// If the groups of a block of inputs have scales and a block is one unit: for each of the 16
    /// products after another, its block and its group's number among 16.
    spread: Option<Spread>,
    /// Masks of the units that are in a second block, for the 1st, 3rd, .. and for the 2nd, 4th, ..
    /// 16 units of a row. Codes of a second block are multiplied in the high halves of bytes, as 16
    /// times their value.
    high: [u16; 2],
}

/// How the scales of units and groups become the scales of lanes: as `[g0, g1, g2, g3]` for each
/// block if a lane has eight columns, or as `[g0, g0, g1, g1, g2, g2, g3, g3]` if it has four.
#[derive(Clone, Copy)]
struct Spread {
    /// Number of products of a block.
    of_block: usize,
    /// For each of 16 products, its block.
    blocks: __m512i,
    /// For each of 16 products, its group, counted from the first group of the first block.
    groups: __m512i,
}

impl Spread {
    fn new(order: Order) -> Self {
        let twice = if order == Order::EvenOdd { 1 } else { 2 };
        let blocks: [i32; 16] = std::array::from_fn(|at| (at / (twice * GROUPS)) as i32);
        let groups: [i32; 16] = std::array::from_fn(|at| (at / twice) as i32);
        // SAFETY: both types are plain values of 64 bytes.
        let vector = |all: [i32; 16]| unsafe { std::mem::transmute::<[i32; 16], __m512i>(all) };
        Self {
            of_block: twice * GROUPS,
            blocks: vector(blocks),
            groups: vector(groups),
        }
    }

    /// Writes the products of the scales of 16 blocks of a weight, from block `at` on, with those
    /// of the groups of the inputs.
    ///
    /// # Safety
    /// The products of all blocks that begin before `count` must have room, rounded up to 16, and
    /// as many groups must be readable.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn write(
        &self,
        at: usize,
        count: usize,
        scales: __m512,
        groups: *const f32,
        out: *mut f32,
    ) {
        let step = 16 / self.of_block;
        for first in (0..16).step_by(step) {
            let block = at + first;
            if block >= count {
                break;
            }
            let of_lanes = _mm512_add_epi32(self.blocks, _mm512_set1_epi32(first as i32));
            // SAFETY: the caller upholds this function's contract; 16 zeros follow the groups.
            unsafe {
                let groups = _mm512_loadu_ps(groups.wrapping_add(GROUPS * block));
                let groups = _mm512_permutexvar_ps(self.groups, groups);
                let scales = _mm512_permutexvar_ps(of_lanes, scales);
                let to = out.wrapping_add(self.of_block * block);
                _mm512_storeu_ps(to, _mm512_mul_ps(groups, scales));
            }
        }
    }
}

impl<'a> Units<'a> {
    /// Prepares the units of a weight whose codes are in an order. If `alternate` is set, the zero
    /// points of every second block are multiplied by 16, and its products of scales are divided by
    /// 16.
    ///
    /// # Panics
    /// Panics if the memory is smaller than [`floats`] requires.
    pub fn new(
        grid: &'a Grid,
        (unit, order): (usize, Order),
        alternate: bool,
        input: &Input<'_>,
        scratch: &mut [f32],
    ) -> Self {
        let inputs = input.units(unit);
        let count = inputs.count;
        assert!(scratch.len() >= floats(input.inputs, count));
        let units = Self {
            first: scratch.as_mut_ptr(),
            stride: stride(count.max(GROUP_LANES * input.inputs.div_ceil(BLOCK))),
            spread: (unit == BLOCK && !input.wide()).then(|| Spread::new(order)),
            weight: OfWeight::new(grid, unit),
            inputs,
            high: if alternate {
                second_blocks(BLOCK / unit)
            } else {
                [0; 2]
            },
        };
        if grid.symmetric {
            let middle = four_times(units.weight.middle);
            for w in 0..ROWS {
                let zeros = units.array(w, 1).cast::<u32>();
                for at in 0..inputs.count.next_multiple_of(16) {
                    let high = units.high[at / 16 % 2] >> (at % 16) & 1 == 1;
                    // SAFETY: the index is within the memory, as asserted above.
                    unsafe { *zeros.add(at) = if high { middle << 4 } else { middle } };
                }
            }
        }
        units
    }

    fn array(&self, w: usize, index: usize) -> *mut f32 {
        self.first
            .wrapping_add((w * (2 + ROWS) + index) * self.stride)
    }

    /// Returns the products of the scales of row `w` of the weight and row `i` of inputs: one for
    /// each unit, or, if the groups of a block have scales and a block is one unit, those of
    /// [`Spread`]. 16 more elements may be read.
    pub fn products(&self, w: usize, i: usize) -> *const f32 {
        self.array(w, 2 + i)
    }

    /// Returns the zero points of row `w` of the weight, each repeated in all four bytes of the
    /// 32-bit number of its unit.
    pub fn zeros(&self, w: usize) -> *const u32 {
        self.array(w, 1).cast()
    }

    /// Fills slot `w` for row `row` of the weight and `R` rows of inputs from `from` on. Returns
    /// the negated contribution of the zero points to the products, spread over the lanes in any
    /// way.
    ///
    /// # Safety
    /// `w < ROWS` and `R <= ROWS`, and the rows must exist.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,bmi2")]
    pub unsafe fn fill<const R: usize>(&self, row: usize, w: usize, from: usize) -> [__m512; R] {
        let inputs = self.inputs.rows(from);
        // SAFETY: the caller upholds this function's contract.
        unsafe {
            match (self.weight.plain, self.weight.grid.symmetric) {
                (true, true) => self.fill_plain::<true, R>(row, w, from, inputs),
                (true, false) => self.fill_plain::<false, R>(row, w, from, inputs),
                (false, _) => self.fill_any(row, w, from, inputs),
            }
        }
    }

    /// Same as [`fill`](Self::fill), for weights whose groups are units and whose scales have 16
    /// bits. Most weights are like this, and the time matters with one row of inputs. If
    /// `SYMMETRIC`, the zero points stay as initialized.
    ///
    /// # Safety
    /// As for [`fill`](Self::fill).
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,bmi2")]
    #[allow(clippy::needless_range_loop)] // constant loops, which are unrolled
    unsafe fn fill_plain<const SYMMETRIC: bool, const R: usize>(
        &self,
        row: usize,
        w: usize,
        from: usize,
        inputs: [[*const f32; 2]; R],
    ) -> [__m512; R] {
        let (weight, count) = (&self.weight, self.inputs.count);
        let mut taken = [_mm512_setzero_ps(); R];
        let scales = weight.scales.as_ptr().wrapping_add(2 * row * weight.groups);
        let zeros = weight
            .zeros
            .as_ptr()
            .wrapping_add(row * weight.groups.div_ceil(2));
        let (zeros_out, products) = (self.array(w, 1).cast::<u32>(), self.array(w, 2));
        let (sixteenth, low) = (_mm512_set1_ps(1.0 / 16.0), _mm_set1_epi8(0x0F));
        // Copies the lowest byte of each number to all four bytes.
        let lowest = _mm512_set4_epi32(0x0C0C_0C0C, 0x0808_0808, 0x0404_0404, 0);
        let mut at = 0;
        // SAFETY: the masks cover only groups of the row; the rest is as in `fill_any`.
        unsafe {
            while at < count {
                let high = self.high[at / 16 % 2];
                let left = weight.groups.saturating_sub(at);
                let half =
                    _mm256_maskz_loadu_epi16(first_lanes(left), scales.wrapping_add(2 * at).cast());
                let scale = _mm512_cvtph_ps(half);
                let mut with_zero = scale;
                if !SYMMETRIC {
                    let mask = first_lanes(left.min(16).div_ceil(2));
                    let pairs = _mm_maskz_loadu_epi8(mask, zeros.wrapping_add(at / 2).cast());
                    let second = _mm_and_si128(_mm_srli_epi16::<4>(pairs), low);
                    let each =
                        _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(_mm_and_si128(pairs, low), second));
                    let four = _mm512_shuffle_epi8(each, lowest);
                    let four = _mm512_mask_slli_epi32::<4>(four, high, four);
                    _mm512_storeu_si512(zeros_out.wrapping_add(at).cast(), four);
                    with_zero = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(each));
                }
                let placed = _mm512_mask_mul_ps(scale, high, scale, sixteenth);
                for i in 0..R {
                    let products = products.wrapping_add(i * self.stride);
                    if let Some(spread) = &self.spread {
                        let groups = self.inputs.groups(from + i);
                        spread.write(at, count, placed, groups, products);
                    } else {
                        let of_row = _mm512_loadu_ps(inputs[i][0].add(at));
                        let product = _mm512_mul_ps(of_row, placed);
                        _mm512_storeu_ps(products.wrapping_add(at), product);
                    }
                    taken[i] =
                        _mm512_fmadd_ps(_mm512_loadu_ps(inputs[i][1].add(at)), with_zero, taken[i]);
                }
                at += 16;
            }
        }
        let middle = if SYMMETRIC {
            -f32::from(weight.middle)
        } else {
            -1.0
        };
        for i in 0..R {
            taken[i] = _mm512_mul_ps(taken[i], _mm512_set1_ps(middle));
        }
        taken
    }

    #[inline(never)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,bmi2")]
    #[allow(clippy::needless_range_loop)] // over constants
    unsafe fn fill_any<const R: usize>(
        &self,
        row: usize,
        w: usize,
        from: usize,
        inputs: [[*const f32; 2]; R],
    ) -> [__m512; R] {
        let (weight, count) = (&self.weight, self.inputs.count);
        let mut taken = [_mm512_setzero_ps(); R];
        let (scales, zeros) = (self.array(w, 0), self.array(w, 1).cast::<u32>());
        // SAFETY: the arrays are as long as the units, rounded up to 16, and their padding. The
        // prepared inputs are followed by 16 zeros.
        unsafe {
            if !weight.direct {
                one_by_one(weight.grid, row, count, scales, zeros);
            }
            for at in (0..count).step_by(16) {
                let high = self.high[at / 16 % 2];
                let scale = if weight.direct {
                    weight.some_scales(row, at)
                } else {
                    _mm512_loadu_ps(scales.add(at))
                };
                let four = if weight.grid.symmetric {
                    _mm512_set1_epi32(four_times(weight.middle) as i32)
                } else if weight.direct {
                    _mm512_mullo_epi32(weight.some_zeros(row, at), _mm512_set1_epi32(0x0101_0101))
                } else {
                    _mm512_loadu_si512(zeros.add(at).cast())
                };
                _mm512_storeu_si512(
                    zeros.add(at).cast(),
                    _mm512_mask_slli_epi32::<4>(four, high, four),
                );
                let zero = _mm512_cvtepi32_ps(_mm512_and_si512(four, _mm512_set1_epi32(0xFF)));
                let with_zero = _mm512_mul_ps(scale, zero);
                let placed = _mm512_mask_mul_ps(scale, high, scale, _mm512_set1_ps(1.0 / 16.0));
                for i in 0..R {
                    let products = self.array(w, 2 + i);
                    if let Some(spread) = &self.spread {
                        let groups = self.inputs.groups(from + i);
                        spread.write(at, count, placed, groups, products);
                    } else {
                        let of_inputs = _mm512_loadu_ps(inputs[i][0].add(at));
                        let product = _mm512_mul_ps(of_inputs, placed);
                        _mm512_storeu_ps(products.add(at), product);
                    }
                    let sum = _mm512_loadu_ps(inputs[i][1].add(at));
                    taken[i] = _mm512_fnmadd_ps(sum, with_zero, taken[i]);
                }
            }
        }
        taken
    }
}

impl<'a> OfWeight<'a> {
    pub fn new(grid: &'a Grid, unit: usize) -> Self {
        Self {
            grid,
            scales: &grid.scales,
            zeros: &grid.zeros,
            groups: grid.groups(),
            direct: grid.group_size == unit,
            plain: grid.group_size == unit && !grid.wide && (grid.symmetric || grid.bits == 4),
            middle: 1 << (grid.bits - 1),
        }
    }

    /// Returns the scales of 16 groups of a row, from `at` on. They are 0 past the last group.
    ///
    /// # Safety
    /// The row must exist.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
    unsafe fn some_scales(&self, row: usize, at: usize) -> __m512 {
        let mask = first_lanes(self.groups.saturating_sub(at));
        let first = row * self.groups + at;
        // SAFETY: the masks cover only groups of the row.
        unsafe {
            if self.grid.wide {
                _mm512_maskz_loadu_ps(mask, self.scales.as_ptr().wrapping_add(4 * first).cast())
            } else {
                let from = self.scales.as_ptr().wrapping_add(2 * first);
                _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from.cast()))
            }
        }
    }

    /// Returns the zero points of 16 groups of a row, from `at` on. They are 0 past the last group.
    #[inline]
    #[target_feature(enable = "avx512f,bmi2")]
    fn some_zeros(&self, row: usize, at: usize) -> __m512i {
        if self.grid.bits != 4 {
            let mut zeros = [0; 16];
            self.grid.some_zeros(
                row,
                at,
                &mut zeros[..(self.groups.saturating_sub(at)).min(16)],
            );
            // SAFETY: the array has 16 bytes.
            return unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(zeros.as_ptr().cast())) };
        }
        let len = self.groups.div_ceil(2);
        let zeros = &self.zeros[row * len..(row + 1) * len];
        let some = zeros.get(at / 2..).unwrap_or(&[]);
        let word = some.first_chunk().copied().unwrap_or_else(|| {
            let mut word = [0; 8];
            word[..some.len()].copy_from_slice(some);
            word
        });
        let word = u64::from_le_bytes(word);
        let spread = 0x0F0F_0F0F_0F0F_0F0F;
        let bytes = _mm_set_epi64x(
            _pdep_u64(word >> 32, spread) as i64,
            _pdep_u64(word, spread) as i64,
        );
        _mm512_cvtepu8_epi32(bytes)
    }
}

/// Returns a number with the same byte four times.
fn four_times(byte: u8) -> u32 {
    u32::from(byte) * 0x0101_0101
}

/// Fills the units of a row one by one, for groups that are larger than units.
///
/// # Safety
/// The arrays must have room for `count` units, rounded up to 16.
unsafe fn one_by_one(grid: &Grid, row: usize, count: usize, scales: *mut f32, zeros: *mut u32) {
    let (groups, units) = (grid.groups(), (grid.group_size / 128).max(1));
    let mut at = 0;
    for group in 0..groups {
        let (scale, zero) = grid.at(row, group);
        let end = if group + 1 == groups {
            count
        } else {
            (at + units).min(count)
        };
        while at < end {
            // SAFETY: the caller guarantees that the arrays have room.
            unsafe {
                *scales.add(at) = scale;
                *zeros.add(at) = four_times(zero);
            }
            at += 1;
        }
    }
    for at in count..count.next_multiple_of(16) {
        // SAFETY: as above.
        unsafe {
            *scales.add(at) = 0.0;
            *zeros.add(at) = 0;
        }
    }
}

/// Calls `put` for each 16 units of a row with their scales and the products of the scales with the
/// zero points. Scales past the last group are 0.
///
/// # Panics
/// Panics if the row is out of range.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,bmi2")]
pub(super) fn for_sixteens(
    weight: &OfWeight<'_>,
    row: usize,
    count: usize,
    mut put: impl FnMut(usize, &[f32; 16], &[f32; 16]),
) {
    let [mut scales, mut with_zeros] = [[0.0_f32; 16]; 2];
    assert!(row < weight.grid.rows);
    for at in (0..count).step_by(16) {
        if weight.direct {
            // SAFETY: the row exists, as asserted above, and the arrays have 16 numbers.
            unsafe {
                let scale = weight.some_scales(row, at);
                let zero = if weight.grid.symmetric {
                    _mm512_set1_epi32(i32::from(weight.middle))
                } else {
                    weight.some_zeros(row, at)
                };
                _mm512_storeu_ps(scales.as_mut_ptr(), scale);
                _mm512_storeu_ps(
                    with_zeros.as_mut_ptr(),
                    _mm512_mul_ps(scale, _mm512_cvtepi32_ps(zero)),
                );
            }
        } else {
            let groups = weight.grid.groups();
            let wide = weight
                .grid
                .group_size
                .min(weight.grid.cols.next_multiple_of(BLOCK));
            for index in 0..16 {
                let group = (at + index) * BLOCK / wide;
                let (scale, zero) = if group < groups {
                    weight.grid.at(row, group)
                } else {
                    (0.0, 0)
                };
                (scales[index], with_zeros[index]) = (scale, scale * f32::from(zero));
            }
        }
        put(at, &scales, &with_zeros);
    }
}

/// Returns, for each lane, the unit of its columns, counted from the first lane's, if a lane has
/// `columns` columns and a unit has `unit`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn lanes(columns: usize, unit: usize) -> __m512i {
    let lane: [i32; 16] = std::array::from_fn(|lane| (lane * columns / unit) as i32);
    // SAFETY: the array has 64 bytes.
    unsafe { _mm512_loadu_si512(lane.as_ptr().cast()) }
}

/// Returns the products of scales of a block for the lanes of a step of `N` registers: each lane
/// has eight columns if `N` is 2, and four otherwise.
///
/// # Safety
/// The block must have products as in [`Spread`].
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) unsafe fn products_of_lanes<const N: usize>(
    products: *const f32,
    block: usize,
) -> __m512 {
    // SAFETY: the caller upholds this function's contract.
    unsafe {
        if N == 2 {
            _mm512_broadcast_f32x4(_mm_loadu_ps(products.add(GROUPS * block)))
        } else {
            _mm512_broadcast_f32x8(_mm256_loadu_ps(products.add(2 * GROUPS * block)))
        }
    }
}

/// Returns the scales of the groups of a block for the lanes of a step, as for
/// [`products_of_lanes`].
///
/// # Safety
/// The groups of the block must exist.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) unsafe fn groups_of_lanes<const N: usize>(groups: *const f32, block: usize) -> __m512 {
    // SAFETY: the caller upholds this function's contract.
    let four = unsafe { _mm_loadu_ps(groups.add(GROUPS * block)) };
    if N == 2 {
        _mm512_broadcast_f32x4(four)
    } else {
        _mm512_broadcast_f32x8(_mm256_set_m128(
            _mm_unpackhi_ps(four, four),
            _mm_unpacklo_ps(four, four),
        ))
    }
}
