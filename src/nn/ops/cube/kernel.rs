//! The kernel for products with a stored weight.
//!
//! Each cube computes one row of the weight. In a dense row, its units (threads) process the words
//! in turn. A unit loads several words at a time, so that several loads are in flight and adjacent
//! units load adjacent words. In a sparse row, a team of 32 units processes a block: each unit has
//! one column of each mask word, and locates its element by counting the bits below.

use cubecl::prelude::*;

use super::layout::{BLOCK_WORDS, Elements, Form};

/// Units in a cube; a power of two.
pub(super) const UNITS: usize = 128;
/// Units in a team: one for each bit of a mask word.
const TEAM: usize = 32;
/// Words of a dense row that a unit loads at a time.
const STEPS: usize = 4;

/// Converts an IEEE 754 half to `f32`.
#[cube]
fn half_value(half: u32) -> f32 {
    let exponent = (half >> 10) & 31;
    let mantissa = half & 1023;
    // Subnormal value, in multiples of 2^-24.
    let small = f32::cast_from(mantissa) * 5.960_464_5e-8;
    let widened = select(exponent == 31, 255, exponent + 112);
    let normal = f32::reinterpret((widened << 23) | (mantissa << 13));
    let size = select(exponent == 0, small, normal);
    select(half >= 0x8000, -size, size)
}

/// Converts a stored float to `f32`.
#[cube]
fn number(stored: u32, #[comptime] elements: Elements) -> f32 {
    if comptime!(elements == Elements::F32) {
        f32::reinterpret(stored)
    } else if comptime!(elements == Elements::Bf16) {
        f32::reinterpret(stored << 16)
    } else {
        half_value(stored)
    }
}

/// The scale of a group; groups are counted over all rows.
#[cube]
fn scale_of(grid: &[u32], group: usize, #[comptime] form: Form) -> f32 {
    if comptime!(form.wide) {
        f32::reinterpret(grid[2 * group])
    } else {
        half_value(grid[group] & 0xFFFF)
    }
}

/// The zero point of a group; groups are counted over all rows.
#[cube]
fn zero_of(grid: &[u32], group: usize, #[comptime] form: Form) -> f32 {
    if comptime!(form.wide) {
        f32::cast_from(grid[2 * group + 1])
    } else {
        f32::cast_from(grid[group] >> 16)
    }
}

/// The group of a column within its row.
#[cube]
fn group_of(groups: &[u32], column: usize, #[comptime] form: Form) -> usize {
    if comptime!(form.group_size.is_none()) {
        groups[column] as usize
    } else {
        column / comptime!(form.group_size.unwrap_or(1))
    }
}

/// Decodes a stored element to a weight.
#[cube]
fn weight_of(
    stored: u32,
    grid: &[u32],
    groups: &[u32],
    first_group: usize,
    column: usize,
    #[comptime] form: Form,
) -> f32 {
    if comptime!(form.elements.is_code()) {
        let group = first_group + group_of(groups, column, form);
        scale_of(grid, group, form) * (f32::cast_from(stored) - zero_of(grid, group, form))
    } else {
        number(stored, form.elements)
    }
}

/// Element `index` of a packed array.
#[cube]
fn element(words: &[u32], index: u32, #[comptime] elements: Elements) -> u32 {
    let per_word = comptime!(elements.per_word() as u32);
    let word = words[(index / per_word) as usize];
    (word >> (index % per_word * comptime!(elements.bits() as u32))) & comptime!(elements.mask())
}

/// Adds the products of one weight with every input to the sums.
#[cube]
fn add(
    sums: &mut Array<f32>,
    weight: f32,
    x: &[f32],
    column: usize,
    cols: usize,
    #[comptime] inputs: usize,
) {
    #[unroll]
    for input in 0..inputs {
        sums[input] += weight * x[input * cols + column];
    }
}

/// Computes `y = x W^T` for `inputs` rows of `x`. If `inputs` is 0, writes the dense `W` to `y`,
/// row-major.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)] // the weight's arrays and sizes
pub(super) fn stored_product(
    x: &[f32],
    words: &[u32],
    mask: &[u32],
    starts: &[u32],
    grid: &[u32],
    groups: &[u32],
    y: &mut [f32],
    rows: u32,
    cols: u32,
    n_groups: u32,
    #[comptime] form: Form,
    #[comptime] inputs: usize,
) {
    let row = CUBE_POS;
    if row >= rows as usize {
        terminate!();
    }
    let (rows, cols) = (rows as usize, cols as usize);
    let first_group = row * n_groups as usize;
    let unit = UNIT_POS as usize;
    let widen = comptime!(inputs == 0);
    let mut sums = Array::<f32>::new(comptime!(inputs.max(1)));
    #[unroll]
    for input in 0..comptime!(inputs.max(1)) {
        sums[input] = 0.0f32;
    }

    if comptime!(form.sparse) {
        let row_blocks = (cols + comptime!(32 * BLOCK_WORDS - 1)) / comptime!(32 * BLOCK_WORDS);
        let lane = unit % TEAM;
        let below = (1u32 << (lane as u32)) - 1;
        let mut block = unit / TEAM;
        while block < row_blocks {
            let at_block = row * row_blocks + block;
            let mut next = starts[at_block];
            let mut bits = Array::<u32>::new(BLOCK_WORDS);
            let mut held = Array::<u32>::new(BLOCK_WORDS);
            // A unit whose bit is 0 loads a neighbouring element instead, so that no load depends
            // on a branch.
            #[unroll]
            for word in 0..BLOCK_WORDS {
                let found = mask[at_block * BLOCK_WORDS + word];
                bits[word] = (found >> (lane as u32)) & 1;
                held[word] = element(words, next + (found & below).count_ones(), form.elements);
                next += found.count_ones();
            }
            #[unroll]
            for word in 0..BLOCK_WORDS {
                let column = (block * BLOCK_WORDS + word) * TEAM + lane;
                if comptime!(widen) {
                    if column < cols {
                        let mut weight = 0.0f32;
                        if bits[word] == 1 {
                            weight = weight_of(held[word], grid, groups, first_group, column, form);
                        }
                        y[row * cols + column] = weight;
                    }
                } else {
                    // No bit is set past the last column.
                    if bits[word] == 1 {
                        let weight = weight_of(held[word], grid, groups, first_group, column, form);
                        add(&mut sums, weight, x, column, cols, inputs);
                    }
                }
            }
            block += comptime!(UNITS / TEAM);
        }
    } else {
        let per_word = comptime!(form.elements.per_word());
        let row_words = (cols + comptime!(per_word - 1)) / per_word;
        let mut word = unit;
        while word < row_words {
            let mut held = Array::<u32>::new(STEPS);
            #[unroll]
            for step in 0..STEPS {
                let at = word + step * UNITS;
                held[step] = words[row * row_words + select(at < row_words, at, row_words - 1)];
            }
            #[unroll]
            for step in 0..STEPS {
                let first = (word + step * UNITS) * per_word;
                let mut scale = 1.0f32;
                let mut zero = 0.0f32;
                if comptime!(form.one_group()) {
                    let column = select(first < cols, first, 0);
                    let group = first_group + group_of(groups, column, form);
                    scale = scale_of(grid, group, form);
                    zero = zero_of(grid, group, form);
                }
                let mut rest = held[step];
                for index in 0..per_word {
                    let column = first + index;
                    let stored = rest & comptime!(form.elements.mask());
                    // Shifts by 0 if one element fills the word: a shift by 32 would be undefined,
                    // and nothing is left to shift.
                    rest >>= comptime!(form.elements.bits() as u32 % 32);
                    if column < cols {
                        let weight = if comptime!(form.one_group()) {
                            scale * (f32::cast_from(stored) - zero)
                        } else {
                            weight_of(stored, grid, groups, first_group, column, form)
                        };
                        if comptime!(widen) {
                            y[row * cols + column] = weight;
                        } else {
                            add(&mut sums, weight, x, column, cols, inputs);
                        }
                    }
                }
            }
            word += comptime!(STEPS * UNITS);
        }
    }

    if comptime!(!widen) {
        let mut shared = Shared::<[f32]>::new_slice(comptime!(UNITS * inputs));
        #[unroll]
        for input in 0..inputs {
            shared[input * UNITS + unit] = sums[input];
        }
        let mut half = comptime!(UNITS / 2).runtime();
        while half > 0 {
            sync_cube();
            if unit < half {
                #[unroll]
                for input in 0..inputs {
                    let at = input * UNITS + unit;
                    shared[at] += shared[at + half];
                }
            }
            half /= 2;
        }
        if unit == 0 {
            #[unroll]
            for input in 0..inputs {
                y[input * rows + row] = shared[input * UNITS];
            }
        }
    }
}
