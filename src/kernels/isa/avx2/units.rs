//! Scales and zero points of a row of codes, by units of columns that have one scale of weight and inputs.

use std::arch::x86_64::*;

use super::lanes::sum_of;
use crate::format::Grid;
use crate::kernels::linear::input::{self, Input};

/// Rows of inputs at a time.
const ROWS: usize = 4;

/// Numbers that may be read past the last unit.
const PAD: usize = 8;

/// Numbers from one array to the next.
fn stride(units: usize) -> usize {
    units.next_multiple_of(8) + PAD
}

/// Numbers of scratch memory: scales, zero points, and the products of scales for some rows of inputs.
pub(super) fn floats(units: usize) -> usize {
    (2 + ROWS) * stride(units)
}

/// What is known of a row of the weight.
pub(super) struct Units<'a, 'b> {
    grid: &'a Grid,
    unit: usize,
    /// Units, rounded up to 8.
    count: usize,
    inputs: input::Units,
    scales: &'b mut [f32],
    zeros: &'b mut [u32],
    products: &'b mut [f32],
}

impl<'a, 'b> Units<'a, 'b> {
    /// # Panics
    /// Where the memory is less than [`floats`] says.
    pub fn new(grid: &'a Grid, unit: usize, input: &Input<'_>, scratch: &'b mut [f32]) -> Self {
        let inputs = input.units(unit);
        let units = inputs.count;
        let (scales, rest) = scratch.split_at_mut(stride(units));
        let (zeros, rest) = rest.split_at_mut(stride(units));
        let products = &mut rest[..ROWS * stride(units)];
        products.fill(0.0);
        scales.fill(0.0);
        let zeros = bytemuck::cast_slice_mut::<f32, u32>(zeros);
        zeros.fill(if grid.symmetric {
            twice(1 << (grid.bits - 1))
        } else {
            0
        });
        let count = units.next_multiple_of(8);
        Self {
            grid,
            unit,
            count,
            inputs,
            scales,
            zeros,
            products,
        }
    }

    /// Zero points, each in both halves of a unit's 32 bits; 8 more may be read.
    pub fn zeros(&self) -> &[u32] {
        self.zeros
    }

    /// Products of scales for the `i`-th row of inputs; 8 more may be read.
    pub fn products(&self, i: usize) -> &[f32] {
        let stride = self.scales.len();
        &self.products[i * stride..(i + 1) * stride]
    }

    /// Reads what belongs to a row of the weight. Scales past the last group are 0.
    #[target_feature(enable = "avx2,f16c")]
    pub fn read(&mut self, row: usize) {
        let (grid, groups) = (self.grid, self.grid.groups());
        if grid.group_size != self.unit {
            // Groups are larger.
            let units = if grid.group_size >= grid.cols {
                usize::MAX
            } else {
                grid.group_size / self.unit
            };
            let all = self
                .scales
                .chunks_mut(units)
                .zip(self.zeros.chunks_mut(units))
                .take(groups);
            for (group, (scales, zeros)) in all.enumerate() {
                let (scale, zero) = grid.at(row, group);
                scales.fill(scale);
                zeros.fill(twice(zero));
            }
            return;
        }
        let known = groups.min(self.count);
        if grid.wide {
            let scales = &grid.scales.as_chunks::<4>().0[row * groups..][..known];
            self.scales
                .iter_mut()
                .zip(scales)
                .for_each(|(out, bytes)| *out = f32::from_le_bytes(*bytes));
        } else {
            let bytes = &grid.scales[2 * row * groups..2 * (row * groups + known)];
            for (out, bytes) in self.scales.chunks_exact_mut(8).zip(bytes.chunks(16)) {
                let mut words = [0; 16];
                words[..bytes.len()].copy_from_slice(bytes);
                // SAFETY: arrays of 16 and 32 bytes.
                unsafe {
                    let eight = _mm256_cvtph_ps(_mm_loadu_si128(words.as_ptr().cast()));
                    _mm256_storeu_ps(out.as_mut_ptr(), eight);
                }
            }
        }
        if !grid.symmetric {
            let mut some = [0; 64];
            for (index, out) in self.zeros[..known].chunks_mut(64).enumerate() {
                let some = &mut some[..out.len()];
                grid.some_zeros(row, 64 * index, some);
                out.iter_mut()
                    .zip(some)
                    .for_each(|(out, zero)| *out = twice(*zero));
            }
        }
    }

    /// Multiplies the scales with those of a row of inputs, as the `i`-th products. Returns what the zero points take from all products.
    ///
    /// # Safety
    /// The row of inputs is there.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn multiply(&mut self, i: usize, row: usize) -> f32 {
        let (scales, sums) = (self.inputs.scales(row), self.inputs.sums(row));
        let mut taken = _mm256_setzero_ps();
        let stride = self.scales.len();
        let products = self.products[i * stride..].chunks_exact_mut(8);
        let all = self
            .scales
            .chunks_exact(8)
            .zip(self.zeros.chunks_exact(8))
            .zip(products);
        for (index, ((scale, zero), product)) in all.take(self.count / 8).enumerate() {
            // SAFETY: eights of slices; what was prepared has as many units, and at least 16 zeros after them.
            unsafe {
                let scale = _mm256_loadu_ps(scale.as_ptr());
                let of_inputs = _mm256_loadu_ps(scales.add(8 * index));
                _mm256_storeu_ps(product.as_mut_ptr(), _mm256_mul_ps(scale, of_inputs));
                let zero = _mm256_and_si256(
                    _mm256_loadu_si256(zero.as_ptr().cast()),
                    _mm256_set1_epi32(0xFF),
                );
                let with_zero = _mm256_mul_ps(scale, _mm256_cvtepi32_ps(zero));
                taken = _mm256_fmadd_ps(with_zero, _mm256_loadu_ps(sums.add(8 * index)), taken);
            }
        }
        sum_of(taken)
    }
}

fn twice(zero: u8) -> u32 {
    u32::from(zero) * 0x0001_0001
}

/// Which unit the columns of a word of 64 are in.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    /// Of each 16 columns, the unit of each two, counted from the word's first.
    lanes: [__m256i; 4],
    pub unit: usize,
}

impl Columns {
    #[target_feature(enable = "avx2")]
    pub fn new(unit: usize) -> Self {
        let lanes = std::array::from_fn(|part| {
            let lanes: [i32; 8] =
                std::array::from_fn(|lane| ((16 * part + 2 * lane) / unit) as i32);
            // SAFETY: an array of 32 bytes.
            unsafe { _mm256_loadu_si256(lanes.as_ptr().cast()) }
        });
        Self { lanes, unit }
    }

    /// Of the units of columns from word `index` on, those of each 16 columns; numbers of 32 bits.
    ///
    /// # Safety
    /// The caller has AVX2, and the units are there, and 8 numbers more. (Always inlined.)
    #[inline(always)]
    pub unsafe fn some<const SMALL: bool>(&self, units: *const f32, index: usize) -> [__m256; 4] {
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
}
