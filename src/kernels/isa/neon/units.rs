//! Scales and zero points of rows of codes, by units: runs of columns that share a scale of the
//! weight and a scale of the inputs.

use std::arch::aarch64::*;

use super::lanes::widen;
use crate::format::Grid;
use crate::kernels::linear::input::{self, Input};

/// Number of rows of a weight whose scales are kept at a time.
pub(super) const SLOTS: usize = 16;
/// Maximum number of pairs of a row of the weight and a row of inputs at a time.
pub(super) const PAIRS: usize = 8;
/// Count of numbers past the last unit that may be read.
const PAD: usize = 16;

/// Returns the distance between arrays, in numbers.
fn stride(units: usize) -> usize {
    units.next_multiple_of(16) + PAD
}

/// Returns the count of numbers of scratch memory: for each slot its scales, their products with
/// zero points, and its zero points, which are bytes; for each pair its products of scales.
pub(super) fn floats(units: usize) -> usize {
    (2 * SLOTS + SLOTS / 4 + PAIRS) * stride(units)
}

/// Scales, zero points and products of scales of the current rows.
#[derive(Clone, Copy)]
pub(super) struct Units<'a> {
    first: *mut f32,
    stride: usize,
    grid: &'a Grid,
    unit: usize,
    inputs: input::Units,
}

impl<'a> Units<'a> {
    /// # Panics
    /// Panics if the memory is smaller than [`floats`] requires.
    pub fn new(grid: &'a Grid, unit: usize, input: &Input<'_>, scratch: &mut [f32]) -> Self {
        let inputs = input.units(unit);
        assert!(scratch.len() >= floats(inputs.count));
        let (first, stride) = (scratch.as_mut_ptr(), stride(inputs.count));
        Self {
            first,
            stride,
            grid,
            unit,
            inputs,
        }
    }

    fn scales(&self, slot: usize) -> *mut f32 {
        self.first.wrapping_add(slot * self.stride)
    }

    fn with_zeros(&self, slot: usize) -> *mut f32 {
        self.first.wrapping_add((SLOTS + slot) * self.stride)
    }

    /// Returns the zero points of the row in a slot, one byte for each unit. 16 more bytes may be
    /// read.
    pub fn zeros(&self, slot: usize) -> *mut u8 {
        self.first
            .wrapping_add(2 * SLOTS * self.stride)
            .cast::<u8>()
            .wrapping_add(slot * self.stride)
    }

    /// Returns the products of scales of a pair. 16 more elements may be read.
    pub fn products(&self, pair: usize) -> *mut f32 {
        self.first
            .wrapping_add((2 * SLOTS + SLOTS / 4 + pair) * self.stride)
    }

    /// Fills a slot with the scales and zero points of a row of the weight. Past the last group of
    /// the row, where inputs are 0, scales are either 0 or those of the last group.
    ///
    /// # Safety
    /// `slot < SLOTS`, and no other reference to the scratch memory may be used.
    ///
    /// # Panics
    /// Panics if the row is out of range.
    #[inline(never)]
    #[target_feature(enable = "neon")]
    pub unsafe fn decode(&self, row: usize, slot: usize) {
        let (grid, len) = (self.grid, self.stride);
        // SAFETY: the arrays are within the scratch memory, whose length `new` checked; any bytes
        // are valid numbers.
        let (scales, with_zeros, zeros) = unsafe {
            (
                std::slice::from_raw_parts_mut(self.scales(slot), len),
                std::slice::from_raw_parts_mut(self.with_zeros(slot), len),
                std::slice::from_raw_parts_mut(self.zeros(slot), len),
            )
        };
        // 8-bit codes are multiplied as signed bytes.
        let less = if grid.bits == 8 { 128.0 } else { 0.0 };
        let groups = grid.groups();
        let known = groups.min(self.inputs.count);
        if grid.group_size != self.unit || grid.wide {
            // A group is one unit, several whole units, or all units.
            let of_group = if grid.group_size >= grid.cols {
                usize::MAX
            } else {
                (grid.group_size / self.unit).max(1)
            };
            let mut at = 0_usize;
            for group in 0..known {
                let (scale, zero) = grid.at(row, group);
                let end = if group + 1 == groups {
                    self.inputs.count
                } else {
                    at.saturating_add(of_group).min(self.inputs.count)
                };
                scales[at..end].fill(scale);
                with_zeros[at..end].fill(scale * (f32::from(zero) - less));
                zeros[at..end].fill(zero);
                at = end;
            }
            clear(at, scales, with_zeros, zeros);
            return;
        }
        let of_row = &grid.scales[2 * row * groups..2 * (row + 1) * groups];
        if grid.symmetric {
            zeros[..known].fill(1 << (grid.bits - 1));
        } else {
            grid.some_zeros(row, 0, &mut zeros[..known]);
        }
        for at in (0..known).step_by(8) {
            let end = known.min(at + 8);
            let mut words = [0; 16];
            words[..2 * (end - at)].copy_from_slice(&of_row[2 * at..2 * end]);
            // SAFETY: the array has 16 bytes; from `at` on, a multiple of 8, all arrays have room
            // for 8 numbers.
            unsafe {
                let scale = widen::<true>(vld1q_u16(words.as_ptr().cast()));
                let zero = vmovl_u8(vld1_u8(zeros.as_ptr().add(at)));
                let zero = [vmovl_u16(vget_low_u16(zero)), vmovl_high_u16(zero)];
                for half in 0..2 {
                    let at = at + 4 * half;
                    let zero = vsubq_f32(vcvtq_f32_u32(zero[half]), vdupq_n_f32(less));
                    vst1q_f32(scales.as_mut_ptr().add(at), scale[half]);
                    vst1q_f32(
                        with_zeros.as_mut_ptr().add(at),
                        vmulq_f32(scale[half], zero),
                    );
                }
            }
        }
        clear(known, scales, with_zeros, zeros);
    }

    /// Fills the products of a pair: the scales of a slot times those of a row of inputs. Returns
    /// the sum of the zero-point terms, negated and distributed over the lanes, to be added to the
    /// sum of products.
    ///
    /// # Safety
    /// The slot must be filled, `pair < PAIRS`, and the row of inputs must exist.
    #[inline(always)]
    pub unsafe fn multiply(&self, slot: usize, pair: usize, row: usize) -> float32x4_t {
        let (of_inputs, sums) = (self.inputs.scales(row), self.inputs.sums(row));
        let (scales, with_zeros, products) = (
            self.scales(slot),
            self.with_zeros(slot),
            self.products(pair),
        );
        // SAFETY: the arrays are 16 longer than the units, and the prepared inputs are followed by
        // 16 zeros.
        unsafe {
            let mut taken = vdupq_n_f32(0.0);
            for at in (0..self.inputs.count).step_by(4) {
                let product = vmulq_f32(vld1q_f32(scales.add(at)), vld1q_f32(of_inputs.add(at)));
                vst1q_f32(products.add(at), product);
                taken = vfmsq_f32(
                    taken,
                    vld1q_f32(with_zeros.add(at)),
                    vld1q_f32(sums.add(at)),
                );
            }
            taken
        }
    }
}

fn clear(from: usize, scales: &mut [f32], with_zeros: &mut [f32], zeros: &mut [u8]) {
    scales[from..].fill(0.0);
    with_zeros[from..].fill(0.0);
    zeros[from..].fill(0);
}
