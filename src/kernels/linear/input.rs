//! Inputs in the forms that the kernels need: as `f32`, and as integers.
//!
//! Each block of 128 inputs has one scale: `x = scale * q`, `q = 256 hi + lo` with signed bytes
//! `hi` and `lo`. If inputs are rounded to one byte, a quarter of a block has a scale of its own
//! where the kernels can use it ([`Sharing`]). Weights of codes are `w = sw (code - zero)` in
//! groups. A *unit* is a run of columns that share both the scale of the weight and the scale of
//! the inputs, so that `x . w = sum_u sw_u scale_u (q . code) - sum_u sw_u zero_u (scale_u sum q)`
//! over units `u`. The factors `scale_u sum q` of the second sum depend on `x` alone and are
//! computed here, once for all rows of the weight.

use crate::kernels::disjoint::Disjoint;
use crate::kernels::level::{Level, dispatch};
use crate::kernels::memory::lines;

/// Number of inputs that share a scale.
pub(in crate::kernels) const BLOCK: usize = 128;
/// Largest magnitude of the integers: `127 * 256 + 127`.
const LARGEST: f32 = 32639.0;
/// Blocks without a larger input are treated as zeros, because their scale would not be a normal
/// number.
const TINY: f32 = 1e-33;
/// Sizes of units that the kernels support.
const UNITS: [usize; 5] = [8, 16, 32, 64, 128];
/// Count of numbers past the last unit that may be read.
const PAD: usize = 16;

/// Order of the bytes of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::enum_variant_names)] // the names describe the order
pub(in crate::kernels) enum Order {
    /// Columns 0, 2, .. 126, then 1, 3, .. 127: the order in which packed 4-bit codes are unpacked
    /// from their bytes.
    EvenOdd,
    /// In column order, as bytes.
    InOrder,
    /// In column order, as 16-bit words.
    Words,
}

impl Order {
    const ALL: [Self; 3] = [Self::EvenOdd, Self::InOrder, Self::Words];
}

/// Returns the size of units for groups of a size, if the kernels support it.
pub(super) fn unit_of(group_size: usize, cols: usize) -> Option<usize> {
    if group_size >= cols || group_size.is_multiple_of(BLOCK) {
        return Some(BLOCK);
    }
    UNITS.contains(&group_size).then_some(group_size)
}

/// The inputs of a block that share a scale, if they are rounded to 8 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::kernels) enum Sharing {
    /// All of them.
    #[default]
    Block,
    /// 32 columns: every fourth run of 8. The lanes of a register of codes have the scales of the
    /// four groups in turn then, so that one sum serves all of them.
    EveryFourth,
    /// 32 columns that follow each other.
    Quarter,
}

impl Sharing {
    /// Returns the group of a run of 8 columns of a block.
    fn group(self, run: usize) -> usize {
        match self {
            Self::Block => 0,
            Self::EveryFourth => run % GROUPS,
            Self::Quarter => run / GROUPS,
        }
    }
}

/// Number of groups of a block that have a scale of their own.
pub(in crate::kernels) const GROUPS: usize = 4;
/// Number of columns of which all have the same scale in any case.
const RUN: usize = 8;

/// Forms of the inputs that the layers of a call need.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Needs {
    orders: [bool; 3],
    units: [bool; 5],
    wide: bool,
    /// [`Sharing::Block`] if wide.
    sharing: Sharing,
}

impl Needs {
    /// Adds the form for one weight. `narrow` is how inputs of 8 bits share scales, or `None` if
    /// they have 16.
    pub fn add(&mut self, order: Order, unit: usize, narrow: Option<Sharing>) {
        self.orders[order as usize] = true;
        self.wide = narrow.is_none();
        self.sharing = narrow.unwrap_or_default();
        for (need, of) in self.units.iter_mut().zip(UNITS) {
            *need |= of == unit;
        }
    }
}

/// Layout of the memory of a row of inputs.
#[derive(Clone, Copy, Debug)]
pub(in crate::kernels) struct Layout {
    needs: Needs,
    inputs: usize,
    units_at: [usize; 5],
    /// Offset of the scales of groups, if there are any.
    groups_at: usize,
    pub bytes: usize,
}

impl Layout {
    pub(super) fn new(needs: Needs, inputs: usize) -> Self {
        let mut layout = Self {
            needs,
            inputs,
            units_at: [0; 5],
            groups_at: 0,
            bytes: 0,
        };
        layout.bytes = layout.orders().map(|order| layout.codes_bytes(order)).sum();
        for (index, (unit, need)) in UNITS.into_iter().zip(needs.units).enumerate() {
            layout.units_at[index] = layout.bytes;
            layout.bytes += if need { layout.unit_bytes(unit) } else { 0 };
        }
        layout.groups_at = layout.bytes;
        if layout.has_groups() {
            layout.bytes += lines(4 * (layout.groups() + PAD));
        }
        layout
    }

    /// Returns whether groups of a block have scales of their own. Those of units are 1 then.
    fn has_groups(&self) -> bool {
        self.needs.sharing != Sharing::Block
    }

    /// Returns the number of groups of a row.
    fn groups(&self) -> usize {
        self.inputs.div_ceil(BLOCK) * GROUPS
    }

    /// Returns the orders that are needed. A row stores its codes in each of them, one after the
    /// other.
    fn orders(&self) -> impl Iterator<Item = Order> {
        Order::ALL
            .into_iter()
            .zip(self.needs.orders)
            .filter_map(|(order, need)| need.then_some(order))
    }

    /// Returns the number of bytes of a row in one order.
    fn codes_bytes(&self, order: Order) -> usize {
        self.inputs.div_ceil(BLOCK) * self.bytes_of_block(order)
    }

    fn bytes_of_block(&self, order: Order) -> usize {
        if order == Order::Words {
            2 * BLOCK
        } else {
            self.block_bytes()
        }
    }

    /// Returns the number of bytes of a block in an order of bytes: 128 of `hi`, then, if wide, 128
    /// of `lo`.
    pub fn block_bytes(&self) -> usize {
        if self.needs.wide { 2 * BLOCK } else { BLOCK }
    }

    /// Returns the number of bytes of the scales and sums for one size of units.
    fn unit_bytes(&self, unit: usize) -> usize {
        2 * lines(4 * (self.units(unit) + PAD))
    }

    fn units(&self, unit: usize) -> usize {
        self.inputs.div_ceil(BLOCK) * (BLOCK / unit)
    }

    /// Returns the number of units of a row for the smallest size that is needed.
    pub fn most_units(&self) -> usize {
        let smallest = UNITS
            .into_iter()
            .zip(self.needs.units)
            .find(|(_, need)| *need);
        smallest.map_or(0, |(unit, _)| self.units(unit))
    }

    pub fn codes_at(&self, order: Order) -> usize {
        self.orders()
            .take_while(|before| *before != order)
            .map(|before| self.codes_bytes(before))
            .sum()
    }

    /// Returns the offset of the scales of units. The sums follow `unit_bytes / 2` later.
    fn unit_at(&self, unit: usize) -> usize {
        // Sizes of units are 8, 16, and so on.
        self.units_at[unit.trailing_zeros() as usize - 3]
    }
}

/// The inputs of a call.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Input<'a> {
    pub level: Level,
    pub values: &'a [f32],
    pub rows: usize,
    pub stride: usize,
    pub inputs: usize,
    pub layout: Layout,
    /// Memory of the prepared rows, each of `layout.bytes`.
    pub memory: Disjoint<'a, u8>,
    pub at: usize,
}

/// The bytes of the inputs in one order, row by row.
#[derive(Clone, Copy)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(in crate::kernels) struct Quantized {
    first: *const u8,
    stride: usize,
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
impl Quantized {
    /// Returns a pointer to the first block of a row.
    #[inline(always)]
    pub fn row(&self, row: usize) -> *const u8 {
        self.first.wrapping_add(row * self.stride)
    }
}

/// The units of the inputs, row by row, with 16 zeros after the last row.
#[derive(Clone, Copy)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(in crate::kernels) struct Units {
    first: *const u8,
    /// Distance from the scales to the sums, in bytes.
    half: usize,
    /// Distance from the scales of units to those of groups, in bytes.
    groups: usize,
    /// Distance between rows, in bytes.
    stride: usize,
    /// Number of units of a row.
    pub count: usize,
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
impl Units {
    /// Returns the scales of the units of a row.
    #[inline(always)]
    pub fn scales(&self, row: usize) -> *const f32 {
        self.first.wrapping_add(row * self.stride).cast()
    }

    /// Returns pointers to the scales and sums of `R` rows from `from` on.
    #[inline(always)]
    pub fn rows<const R: usize>(&self, from: usize) -> [[*const f32; 2]; R] {
        std::array::from_fn(|i| [self.scales(from + i), self.sums(from + i)])
    }

    /// Returns the scales of the groups of a row, [`GROUPS`] of each block, if groups have scales.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub fn groups(&self, row: usize) -> *const f32 {
        self.first
            .wrapping_add(row * self.stride + self.groups)
            .cast()
    }

    /// Returns the sums of a row's units: the sum of the integers times their scale.
    #[inline(always)]
    pub fn sums(&self, row: usize) -> *const f32 {
        self.first
            .wrapping_add(row * self.stride + self.half)
            .cast()
    }
}

impl<'a> Input<'a> {
    pub fn row(&self, row: usize) -> &'a [f32] {
        &self.values[row * self.stride..row * self.stride + self.inputs]
    }

    /// Returns the bytes of a row, block by block.
    pub fn codes(&self, row: usize, order: Order) -> &'a [u8] {
        let from = self.at + row * self.layout.bytes + self.layout.codes_at(order);
        // SAFETY: `prepare` wrote the bytes before any task reads them.
        unsafe {
            self.memory
                .shared(from..from + self.layout.codes_bytes(order))
        }
    }

    /// Returns the bytes of all rows in one order.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    pub fn quantized(&self, order: Order) -> Quantized {
        let all = self.memory.from(self.at + self.layout.codes_at(order));
        let stride = self.layout.bytes;
        // Up to the end of the last row.
        let reach = (self.rows.max(1) - 1) * stride + self.layout.codes_bytes(order);
        assert!(reach <= all.len());
        Quantized {
            first: all.at(0),
            stride,
        }
    }

    /// Returns the units of one size.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    pub fn units(&self, unit: usize) -> Units {
        let (from, all) = (
            self.at + self.layout.unit_at(unit),
            self.layout.unit_bytes(unit),
        );
        // Up to the end of the last row. The groups come last.
        let groups = self.layout.groups_at - self.layout.unit_at(unit);
        let of_row = if self.layout.has_groups() {
            self.layout.bytes - self.layout.unit_at(unit)
        } else {
            all
        };
        let reach = (self.rows.max(1) - 1) * self.layout.bytes + of_row;
        Units {
            first: self.memory.floats(from, reach / 4).at(0).cast(),
            half: all / 2,
            groups,
            stride: self.layout.bytes,
            count: self.layout.units(unit),
        }
    }

    pub fn wide(&self) -> bool {
        self.layout.needs.wide
    }

    /// Prepares a row: writes its codes, scales and sums.
    ///
    /// # Safety
    /// Nothing else may read or write the memory of the row.
    pub unsafe fn prepare(&self, row: usize) {
        let (x, needs, start) = (
            self.row(row),
            self.layout.needs,
            self.at + row * self.layout.bytes,
        );
        for (nth, order) in self.layout.orders().enumerate() {
            let (size, len) = (
                self.layout.bytes_of_block(order),
                self.layout.codes_bytes(order),
            );
            // SAFETY: the caller upholds this function's contract, and the parts of a row do not
            // overlap.
            let codes = unsafe {
                self.memory
                    .from(start + self.layout.codes_at(order))
                    .part(0..len)
            };
            for (index, (x, codes)) in x
                .chunks(BLOCK)
                .zip(codes.chunks_exact_mut(size))
                .enumerate()
            {
                let mut q = [0; BLOCK];
                let scales = round(self.level, x, needs.wide, needs.sharing, &mut q);
                place(self.level, &q, order, codes);
                if nth == 0 {
                    // SAFETY: as above.
                    unsafe { self.set_units(start, index, scales, &q) };
                }
            }
        }
        if self.layout.has_groups() {
            let from = start + self.layout.groups_at + 4 * self.layout.groups();
            // SAFETY: as above.
            unsafe { self.memory.floats(from, PAD).part(0..PAD) }.fill(0.0);
        }
        for (unit, need) in UNITS.into_iter().zip(needs.units) {
            if need {
                let (from, half) = (
                    start + self.layout.unit_at(unit),
                    self.layout.unit_bytes(unit) / 2,
                );
                for from in [from, from + half] {
                    // SAFETY: as above.
                    unsafe {
                        self.memory
                            .floats(from + 4 * self.layout.units(unit), PAD)
                            .part(0..PAD)
                    }
                    .fill(0.0);
                }
            }
        }
    }

    /// # Safety
    /// As for [`prepare`](Self::prepare).
    unsafe fn set_units(
        &self,
        start: usize,
        block: usize,
        scales: [f32; GROUPS],
        q: &[i32; BLOCK],
    ) {
        let sharing = self.layout.needs.sharing;
        let has_groups = self.layout.has_groups();
        if has_groups {
            let from = start + self.layout.groups_at + 4 * block * GROUPS;
            // SAFETY: the caller upholds this function's contract.
            unsafe { self.memory.floats(from, GROUPS).part(0..GROUPS) }.copy_from_slice(&scales);
        }
        for (unit, need) in UNITS.into_iter().zip(self.layout.needs.units) {
            if !need {
                continue;
            }
            let count = BLOCK / unit;
            let from = start + self.layout.unit_at(unit) + 4 * block * count;
            // SAFETY: the caller upholds this function's contract.
            let (scales_out, sums) = unsafe {
                let half = self.layout.unit_bytes(unit) / 2;
                (
                    self.memory.floats(from, count).part(0..count),
                    self.memory.floats(from + half, count).part(0..count),
                )
            };
            scales_out.fill(if has_groups { 1.0 } else { scales[0] });
            for (index, (sum, q)) in sums.iter_mut().zip(q.chunks_exact(unit)).enumerate() {
                *sum = if has_groups {
                    let runs = q.chunks_exact(RUN).enumerate();
                    runs.map(|(run, q)| {
                        let group = sharing.group(index * unit / RUN + run);
                        scales[group] * q.iter().sum::<i32>() as f32
                    })
                    .sum()
                } else {
                    scales[0] * q.iter().sum::<i32>() as f32
                };
            }
        }
    }
}

dispatch! {
    /// Rounds up to one block of inputs to integers and returns the scales of its groups, which are
    /// NaN if an input is not finite. Without groups, all of them are the same.
    fn round<const FMA: bool>(
        x: &[f32],
        wide: bool,
        sharing: Sharing,
        q: &mut [i32; BLOCK],
    ) -> [f32; GROUPS] {
        let mut padded = [0.0_f32; BLOCK];
        padded[..x.len()].copy_from_slice(x);
        let mut sum = [0.0_f32; RUN];
        let mut most = [[0.0_f32; RUN]; GROUPS];
        for (run, chunk) in padded.as_chunks::<RUN>().0.iter().enumerate() {
            let most = &mut most[sharing.group(run)];
            for lane in 0..RUN {
                let size = chunk[lane].abs();
                most[lane] = if size > most[lane] { size } else { most[lane] };
                // Zero for finite inputs, NaN for infinities and NaN.
                sum[lane] += chunk[lane] * 0.0;
            }
        }
        if sum.iter().sum::<f32>().is_nan() {
            q.fill(0);
            return [f32::NAN; GROUPS];
        }
        let largest = if wide { LARGEST } else { 127.0 };
        // Adding this constant leaves the nearest integer of a number in the lowest bits of the
        // mantissa.
        const ROUND: f32 = 12_582_912.0;
        let most = most.map(|most| most.into_iter().fold(0.0_f32, |a, b| if b > a { b } else { a }));
        let inverse = most.map(|most| if most < TINY { 0.0 } else { largest / most });
        let runs = q.as_chunks_mut::<RUN>().0.iter_mut().zip(padded.as_chunks::<RUN>().0);
        for (run, (q, x)) in runs.enumerate() {
            let inverse = inverse[sharing.group(run)];
            for (q, x) in q.iter_mut().zip(x) {
                *q = (x * inverse + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
            }
        }
        let scales = most.map(|most| if most < TINY { 0.0 } else { most / largest });
        match sharing {
            Sharing::Block => [scales[0]; GROUPS],
            _ => scales,
        }
    }
}

dispatch! {
    /// Stores integers in an order: as words, or as 128 high bytes followed, if there is room, by
    /// as many low bytes.
    fn place<const FMA: bool>(q: &[i32; BLOCK], order: Order, out: &mut [u8]) {
        let mut sorted = [0; BLOCK];
        let q = match order {
            Order::InOrder => q,
            Order::Words => {
                let out = out.as_chunks_mut::<2>().0;
                out.iter_mut().zip(q).for_each(|(out, q)| *out = (*q as i16).to_le_bytes());
                return;
            }
            Order::EvenOdd => {
                let (even, odd) = sorted.split_at_mut(BLOCK / 2);
                for ((even, odd), pair) in even.iter_mut().zip(odd).zip(q.as_chunks::<2>().0) {
                    [*even, *odd] = *pair;
                }
                &sorted
            }
        };
        if out.len() <= BLOCK {
            out.iter_mut().zip(q).for_each(|(out, q)| *out = *q as u8);
            return;
        }
        let (high, low) = out.split_at_mut(BLOCK);
        for ((high, low), q) in high.iter_mut().zip(low).zip(q) {
            let top = (q + 128) >> 8;
            *high = top as u8;
            *low = (q - (top << 8)) as u8;
        }
    }
}
