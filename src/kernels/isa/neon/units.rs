//! Scales and zero points of rows of codes, by units of columns that have one scale of weight and inputs.

use std::arch::aarch64::*;

use super::lanes::widen;
use crate::format::Grid;
use crate::kernels::linear::input::{self, Input};

/// Rows of a weight whose scales are known at a time.
pub(super) const SLOTS: usize = 16;
/// Pairs of a row of the weight and one of inputs that are multiplied at a time, at most.
pub(super) const PAIRS: usize = 8;
/// Numbers that may be read past the last unit.
const PAD: usize = 16;

/// Numbers from one array to the next.
fn stride(units: usize) -> usize {
    units.next_multiple_of(16) + PAD
}

/// Numbers of scratch memory: for each slot scales, their products with zero points, and zero points, which are bytes; for each pair
/// products of scales.
pub(super) fn floats(units: usize) -> usize {
    (2 * SLOTS + SLOTS / 4 + PAIRS) * stride(units)
}

/// What is known of some rows.
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
    /// Where the memory is less than [`floats`] says.
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

    /// Zero points of a slot's row, a byte for each unit; 16 more may be read.
    pub fn zeros(&self, slot: usize) -> *mut u8 {
        self.first
            .wrapping_add(2 * SLOTS * self.stride)
            .cast::<u8>()
            .wrapping_add(slot * self.stride)
    }

    /// Products of the scales of a pair; 16 more may be read.
    pub fn products(&self, pair: usize) -> *mut f32 {
        self.first
            .wrapping_add((2 * SLOTS + SLOTS / 4 + pair) * self.stride)
    }

    /// Fills a slot with what belongs to a row of the weight. Past its last group scales are 0, or the last group's, where inputs are 0.
    ///
    /// # Safety
    /// `slot < SLOTS`, and no other reference to the scratch memory is used.
    ///
    /// # Panics
    /// For a row that there is not.
    #[inline(never)]
    #[target_feature(enable = "neon")]
    pub unsafe fn decode(&self, row: usize, slot: usize) {
        let (grid, len) = (self.grid, self.stride);
        // SAFETY: arrays of the scratch memory, which `new` saw to be long enough; any bytes are numbers.
        let (scales, with_zeros, zeros) = unsafe {
            (
                std::slice::from_raw_parts_mut(self.scales(slot), len),
                std::slice::from_raw_parts_mut(self.with_zeros(slot), len),
                std::slice::from_raw_parts_mut(self.zeros(slot), len),
            )
        };
        // Codes of whole bytes are multiplied as signed ones.
        let less = if grid.bits == 8 { 128.0 } else { 0.0 };
        let groups = grid.groups();
        let known = groups.min(self.inputs.count);
        if grid.group_size != self.unit || grid.wide {
            // A group is one unit, or several whole ones, or all.
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
            // SAFETY: an array of 16 bytes; from `at` on, a multiple of 8, all arrays have room for 8 numbers.
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

    /// Fills the products of a pair: a slot's scales by those of a row of inputs. Returns what the zero points take from the products of
    /// codes, negative, in any lanes.
    ///
    /// # Safety
    /// The slot is filled, `pair < PAIRS`, and the row of inputs is there.
    #[inline(always)]
    pub unsafe fn multiply(&self, slot: usize, pair: usize, row: usize) -> float32x4_t {
        let (of_inputs, sums) = (self.inputs.scales(row), self.inputs.sums(row));
        let (scales, with_zeros, products) = (
            self.scales(slot),
            self.with_zeros(slot),
            self.products(pair),
        );
        // SAFETY: arrays are 16 longer than units, and so is what was prepared of the inputs, with zeros there.
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
