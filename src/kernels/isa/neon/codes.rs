//! Products of codes, in any storage format, with inputs that were rounded to bytes. With many rows
//! of inputs, 16 rows of the weight are first unpacked to bytes.

use std::arch::aarch64::*;
use std::arch::asm;
use std::marker::PhantomData;
use std::ops::Range;

use super::units::{self, SLOTS, Units};
use crate::format::Grid;
use crate::kernels::linear::codes::Codes;
use crate::kernels::linear::input::{BLOCK, Order, Quantized};
use crate::kernels::linear::task::Task;
use crate::kernels::linear::tiles::{CodeTiles, Features, Work, features, firsts, for_code_tiles};

/// The codes of a block of 128 columns: eight vectors, in the order of the inputs' bytes.
pub(super) trait Block: Copy {
    /// Returns vector number `index`.
    ///
    /// # Safety
    /// `index < 8`, and the data that the block refers to must be readable.
    unsafe fn vector(&self, index: usize) -> int8x16_t;
}

impl Block for [int8x16_t; 8] {
    #[inline(always)]
    unsafe fn vector(&self, index: usize) -> int8x16_t {
        self[index]
    }
}

/// Returns whether the first four vectors of a block are its even columns, and the others its odd
/// ones. Then a lane of four bytes of one vector and the same lane of its partner are eight
/// columns. Otherwise columns are in order, and a lane is four columns.
#[inline(always)]
fn paired<C: Codes>() -> bool {
    matches!(C::ORDER, Order::EvenOdd)
}

/// Sums of up to eight products of codes and bytes in each part.
trait Sums: Copy {
    fn none() -> Self;

    /// Returns the sum of each four bytes' products.
    fn of_fours(self) -> int32x4_t;
}

impl Sums for [int16x8_t; 2] {
    #[inline(always)]
    fn none() -> Self {
        // SAFETY: `Level::detect` found NEON before it returned the level of these kernels.
        unsafe { [vdupq_n_s16(0); 2] }
    }

    #[inline(always)]
    fn of_fours(self) -> int32x4_t {
        // SAFETY: as above. Two sums of eight products are at most `16 * 15 * 128`, which fits into
        // 16 bits.
        unsafe { vpaddlq_s16(vpaddq_s16(self[0], self[1])) }
    }
}

impl Sums for int32x4_t {
    #[inline(always)]
    fn none() -> Self {
        // SAFETY: `Level::detect` found NEON before it returned the level of these kernels.
        unsafe { vdupq_n_s32(0) }
    }

    #[inline(always)]
    fn of_fours(self) -> int32x4_t {
        self
    }
}

/// A method of multiplying bytes.
trait Dots: Features {
    type Sums: Sums;
    /// Number of rows of an unpacked weight at a time, limited by the registers for their sums: 2
    /// or 4.
    const ROWS: usize;

    /// Adds the products of codes and bytes.
    ///
    /// # Safety
    /// The processor must have the features.
    unsafe fn add(sums: Self::Sums, codes: int8x16_t, x: int8x16_t) -> Self::Sums;
}

/// Plain NEON: 16-bit products of codes up to 15. Each is at most `15 * 128`, and eight of them are
/// added.
struct Products;

features!(Products, "neon");

impl Dots for Products {
    type Sums = [int16x8_t; 2];
    const ROWS: usize = 2;

    #[inline(always)]
    unsafe fn add(sums: [int16x8_t; 2], codes: int8x16_t, x: int8x16_t) -> [int16x8_t; 2] {
        // SAFETY: the caller guarantees that the processor has the features.
        unsafe {
            [
                vmlal_s8(sums[0], vget_low_s8(codes), vget_low_s8(x)),
                vmlal_high_s8(sums[1], codes, x),
            ]
        }
    }
}

/// Plain NEON for codes that are whole bytes. The sum of two such products may not fit into 16
/// bits.
struct Wide;

features!(Wide, "neon");

impl Dots for Wide {
    type Sums = int32x4_t;
    const ROWS: usize = 2;

    #[inline(always)]
    unsafe fn add(sums: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
        // SAFETY: the caller guarantees that the processor has the features.
        unsafe {
            let low = vpaddlq_s16(vmull_s8(vget_low_s8(codes), vget_low_s8(x)));
            let high = vpaddlq_s16(vmull_high_s8(codes, x));
            vaddq_s32(sums, vpaddq_s32(low, high))
        }
    }
}

/// Dot products of four bytes (`sdot`).
struct Fours;

features!(Fours, "neon,dotprod");

impl Dots for Fours {
    type Sums = int32x4_t;
    const ROWS: usize = 4;

    #[inline(always)]
    unsafe fn add(sums: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
        /// The intrinsic of the standard library is not stable yet.
        #[inline]
        #[target_feature(enable = "neon,dotprod")]
        fn sdot(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
            // SAFETY: the instruction only uses registers.
            unsafe {
                asm!(
                    "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
                    inout(vreg) sums,
                    in(vreg) a,
                    in(vreg) b,
                    options(pure, nomem, nostack, preserves_flags)
                );
            }
            sums
        }
        // SAFETY: the caller guarantees that the processor has the features.
        unsafe { sdot(sums, codes, x) }
    }
}

/// The products of a task with codes.
pub(super) struct Call<'a> {
    dots: bool,
    many: bool,
    grid: &'a Grid,
    unit: usize,
    pub task: Task<'a>,
}

impl<'a> Call<'a> {
    /// `dots` is set if the processor has `sdot`, and `many` if rows of the weight are unpacked for
    /// all rows of inputs.
    pub fn new(dots: bool, many: bool, grid: &'a Grid, unit: usize, task: Task<'a>) -> Self {
        Self {
            dots,
            many,
            grid,
            unit,
            task,
        }
    }

    /// # Safety
    /// As for [`multiply`](crate::kernels::linear::task::Kernels::multiply), and the codes must
    /// have the rows of the task.
    pub unsafe fn multiply<C: Codes<Step: Block>>(&self, codes: C, scratch: &mut [f32]) {
        // SAFETY: the caller upholds this function's contract.
        unsafe {
            if self.dots {
                self.by::<Fours, C>(codes, scratch);
            } else if const { C::BITS == 8 } {
                self.by::<Wide, C>(codes, scratch);
            } else {
                self.by::<Products, C>(codes, scratch);
            }
        }
    }

    /// # Safety
    /// As for [`multiply`](Self::multiply), and the processor must have the features of `D`.
    unsafe fn by<D: Dots, C: Codes<Step: Block>>(&self, codes: C, scratch: &mut [f32]) {
        // SAFETY: the caller upholds this function's contract.
        unsafe {
            if self.many {
                self.unpacked::<D, C>(codes, scratch);
                return;
            }
            let tiles = Tiles::<D, C> {
                codes,
                unit: self.unit,
                units: Units::new(self.grid, self.unit, self.task.input, scratch),
                filled: None,
                x: self.task.input.quantized(C::ORDER),
                task: &self.task,
                of: PhantomData,
            };
            for_code_tiles(&tiles, self.task.rows.clone(), self.task.input, self.unit);
        }
    }

    /// # Safety
    /// As for [`by`](Self::by).
    unsafe fn unpacked<D: Dots, C: Codes<Step: Block>>(&self, codes: C, scratch: &mut [f32]) {
        let Task { rows, input, .. } = &self.task;
        let unit = self.unit;
        let stride = input.inputs.next_multiple_of(BLOCK);
        let (panel, scratch) = scratch.split_at_mut(SLOTS * stride / 4);
        let panel: *mut u8 = panel.as_mut_ptr().cast();
        let units = Units::new(self.grid, unit, input, scratch);
        for first in rows.clone().step_by(SLOTS) {
            let rows = first..rows.end.min(first + SLOTS);
            for (slot, row) in rows.clone().enumerate() {
                // SAFETY: there are as many slots, and the panel has room for as many rows of whole
                // blocks.
                unsafe {
                    units.decode(row, slot);
                    let out = panel.add(slot * stride);
                    let row = codes.row(row, units.zeros(slot));
                    if unit < BLOCK {
                        unpack::<C, true>(&codes, row, stride, out);
                    } else {
                        unpack::<C, false>(&codes, row, stride, out);
                    }
                }
            }
            // SAFETY: the caller upholds this function's contract, and the slots of the rows are
            // filled.
            unsafe {
                if paired::<C>() {
                    self.panel::<D, true>(panel, stride, units, rows);
                } else {
                    self.panel::<D, false>(panel, stride, units, rows);
                }
            }
        }
    }

    /// Computes the products of all inputs with some unpacked rows.
    ///
    /// # Safety
    /// As for [`by`](Self::by), and the slots of the rows must be filled.
    unsafe fn panel<D: Dots, const PAIRED: bool>(
        &self,
        first: *const u8,
        stride: usize,
        units: Units<'_>,
        rows: Range<usize>,
    ) {
        let tiles = Tiles::<D, Panel<PAIRED>> {
            codes: Panel {
                first,
                base: rows.start,
                stride,
            },
            unit: self.unit,
            units,
            filled: Some(rows.start),
            x: self.task.input.quantized(Panel::<PAIRED>::ORDER),
            task: &self.task,
            of: PhantomData,
        };
        // SAFETY: the caller upholds this function's contract.
        unsafe {
            match (self.task.input.wide(), self.unit < BLOCK) {
                (true, false) => tiles.by_two::<true, false>(rows),
                (true, true) => tiles.by_two::<true, true>(rows),
                (false, false) => tiles.by_two::<false, false>(rows),
                (false, true) => tiles.by_two::<false, true>(rows),
            }
        }
    }
}

/// Returns the count of numbers of scratch memory for unpacked rows.
pub(super) fn panel_floats(inputs: usize, units: usize) -> usize {
    units::floats(units) + SLOTS * inputs.next_multiple_of(BLOCK) / 4
}

/// Writes `count` codes of a row in whole blocks, one byte each.
///
/// # Safety
/// There must be room for them, and the zero points of the row must exist.
#[target_feature(enable = "neon")]
unsafe fn unpack<C: Codes<Step: Block>, const SMALL: bool>(
    codes: &C,
    mut row: C::Row,
    count: usize,
    out: *mut u8,
) {
    for block in 0..count / BLOCK {
        // SAFETY: the caller upholds this function's contract.
        unsafe {
            let step = codes.step::<SMALL, false>(&mut row, block);
            for index in 0..8 {
                let out = out.add(BLOCK * block + 16 * index);
                vst1q_s8(out.cast(), step.vector(index));
            }
        }
    }
}

/// Unpacked rows. Their codes are in the order of the codes that they were unpacked from.
#[derive(Clone, Copy)]
struct Panel<const PAIRED: bool> {
    first: *const u8,
    /// Index of the first row of the panel.
    base: usize,
    stride: usize,
}

/// A block of a panel.
#[derive(Clone, Copy)]
struct InPanel(*const u8);

impl Block for InPanel {
    #[inline(always)]
    unsafe fn vector(&self, index: usize) -> int8x16_t {
        // SAFETY: the caller guarantees that the block of the row exists.
        unsafe { vld1q_s8(self.0.add(16 * index).cast()) }
    }
}

impl<const PAIRED: bool> Codes for Panel<PAIRED> {
    type Row = *const u8;
    type Step = InPanel;

    const ORDER: Order = if PAIRED {
        Order::EvenOdd
    } else {
        Order::InOrder
    };
    const BITS: u8 = 8; // the maximum, since panels hold codes of any width

    #[inline(always)]
    fn row(&self, row: usize, _zeros: *const u8) -> *const u8 {
        self.first.wrapping_add((row - self.base) * self.stride)
    }

    #[inline(always)]
    unsafe fn step<const SMALL: bool, const HIGH: bool>(
        &self,
        row: &mut *const u8,
        block: usize,
    ) -> InPanel {
        InPanel(row.wrapping_add(BLOCK * block))
    }
}

/// Tiles of codes.
struct Tiles<'a, D, C> {
    codes: C,
    unit: usize,
    units: Units<'a>,
    /// The row of the first slot, if the slots are filled already. Otherwise each tile fills the
    /// slots of its rows.
    filled: Option<usize>,
    x: Quantized,
    task: &'a Task<'a>,
    of: PhantomData<D>,
}

impl<D: Dots, C: Codes<Step: Block>> CodeTiles for Tiles<'_, D, C> {
    const ONE: usize = 2;
    const MORE: usize = 1;

    #[inline(always)]
    unsafe fn tile<const WIDE: bool, const SMALL: bool, const W: usize, const R: usize>(
        &self,
        rows: Range<usize>,
        apart: usize,
        from: usize,
    ) {
        let tiles = self;
        for row in firsts::<W>(rows, apart) {
            // SAFETY: the caller upholds this function's contract.
            unsafe { D::run(Tile::<D, C, WIDE, SMALL, W, R> { tiles, row, from }) };
        }
    }
}

impl<D: Dots, const PAIRED: bool> Tiles<'_, D, Panel<PAIRED>> {
    /// Computes the products of two rows of inputs at a time with all rows of a panel, so that the
    /// inputs' bytes stay in the first-level cache.
    ///
    /// # Safety
    /// As for [`CodeTiles::tile`], and the slots of the rows must be filled.
    unsafe fn by_two<const WIDE: bool, const SMALL: bool>(&self, rows: Range<usize>) {
        let inputs = self.task.input.rows;
        let mut from = 0;
        while from < inputs {
            let two = inputs - from >= 2;
            let mut row = rows.start;
            while row < rows.end {
                let count = if rows.end - row >= D::ROWS {
                    D::ROWS
                } else {
                    1
                };
                let some = row..row + count;
                // SAFETY: the caller upholds this function's contract.
                unsafe {
                    match (count, two) {
                        (4, true) => self.tile::<WIDE, SMALL, 4, 2>(some, 1, from),
                        (4, false) => self.tile::<WIDE, SMALL, 4, 1>(some, 1, from),
                        (2, true) => self.tile::<WIDE, SMALL, 2, 2>(some, 1, from),
                        (2, false) => self.tile::<WIDE, SMALL, 2, 1>(some, 1, from),
                        (_, true) => self.tile::<WIDE, SMALL, 1, 2>(some, 1, from),
                        (_, false) => self.tile::<WIDE, SMALL, 1, 1>(some, 1, from),
                    }
                }
                row += count;
            }
            from += if two { 2 } else { 1 };
        }
    }
}

/// The products of `W` rows of the weight with `R` rows of inputs. The rows must exist, and their
/// outputs must belong to this task.
struct Tile<'a, D, C, const WIDE: bool, const SMALL: bool, const W: usize, const R: usize> {
    tiles: &'a Tiles<'a, D, C>,
    row: usize,
    from: usize,
}

impl<
    D: Dots,
    C: Codes<Step: Block>,
    const WIDE: bool,
    const SMALL: bool,
    const W: usize,
    const R: usize,
> Work<D> for Tile<'_, D, C, WIDE, SMALL, W, R>
{
    type Output = ();

    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // constant loops, which are unrolled
    unsafe fn run(self) {
        let Self { tiles, row, from } = self;
        let Tiles {
            codes,
            unit,
            units,
            filled,
            x,
            task,
            ..
        } = tiles;
        let (Task { input, output, .. }, unit) = (task, *unit);
        let (size, of_block) = (input.layout.block_bytes(), BLOCK / unit);
        let x: [*const i8; R] = std::array::from_fn(|i| x.row(from + i).cast());
        // Consecutive tiles have different slots.
        let slot = filled.map_or(row / W % (SLOTS / W) * W, |first| row - first);
        // SAFETY: there are `W` slots and `W * R` pairs. Prepared inputs consist of whole blocks,
        // and so does each row of the weight, or its replacement, by the contract of `Codes`.
        unsafe {
            if filled.is_none() && from == 0 {
                for w in 0..W {
                    units.decode(row + w, slot + w);
                }
            }
            let mut sums = [[vdupq_n_f32(0.0); R]; W];
            for w in 0..W {
                for i in 0..R {
                    sums[w][i] = units.multiply(slot + w, w * R + i, from + i);
                }
            }
            let mut rows: [C::Row; W] =
                std::array::from_fn(|w| codes.row(row + w, units.zeros(slot + w)));
            let products: [[*const f32; R]; W] = std::array::from_fn(|w| {
                std::array::from_fn(|i| units.products(w * R + i).cast_const())
            });
            let lanes = lanes(if paired::<C>() { 8 } else { 4 }, unit);
            for block in 0..input.inputs.div_ceil(BLOCK) {
                // A closure would not always be inlined here.
                let mut blocks = [codes.step::<SMALL, false>(&mut rows[0], block); W];
                for w in 1..W {
                    blocks[w] = codes.step::<SMALL, false>(&mut rows[w], block);
                }
                let x: [*const i8; R] = std::array::from_fn(|i| x[i].add(block * size));
                if SMALL {
                    let steps = if paired::<C>() { 4 } else { 8 };
                    for step in 0..steps {
                        // The first unit of this vector or pair of vectors.
                        let at = block * of_block + step * of_block / steps;
                        for i in 0..R {
                            for w in 0..W {
                                let [mut high, mut low] = [D::Sums::none(); 2];
                                for index in [step, step + 4].into_iter().take(if paired::<C>() {
                                    2
                                } else {
                                    1
                                }) {
                                    let codes = blocks[w].vector(index);
                                    high = D::add(high, codes, vld1q_s8(x[i].add(16 * index)));
                                    if WIDE {
                                        low = D::add(
                                            low,
                                            codes,
                                            vld1q_s8(x[i].add(BLOCK + 16 * index)),
                                        );
                                    }
                                }
                                let scales =
                                    vreinterpretq_u8_f32(vld1q_f32(products[w][i].add(at)));
                                let scales = vreinterpretq_f32_u8(vqtbl1q_u8(scales, lanes));
                                sums[w][i] =
                                    vfmaq_f32(sums[w][i], whole::<D, WIDE>(high, low), scales);
                            }
                        }
                    }
                } else {
                    let [mut high, mut low] = [[[D::Sums::none(); R]; W]; 2];
                    for index in 0..8 {
                        for i in 0..R {
                            let x_high = vld1q_s8(x[i].add(16 * index));
                            let x_low = if WIDE {
                                vld1q_s8(x[i].add(BLOCK + 16 * index))
                            } else {
                                x_high
                            };
                            for w in 0..W {
                                let codes = blocks[w].vector(index);
                                high[w][i] = D::add(high[w][i], codes, x_high);
                                if WIDE {
                                    low[w][i] = D::add(low[w][i], codes, x_low);
                                }
                            }
                        }
                    }
                    for w in 0..W {
                        for i in 0..R {
                            let scale = *products[w][i].add(block);
                            sums[w][i] = vfmaq_n_f32(
                                sums[w][i],
                                whole::<D, WIDE>(high[w][i], low[w][i]),
                                scale,
                            );
                        }
                    }
                }
            }
            for w in 0..W {
                for i in 0..R {
                    output.set(from + i, row + w, vaddvq_f32(sums[w][i]));
                }
            }
        }
    }
}

/// Returns the sums of products with inputs: with their high bytes and, if `WIDE`, their low bytes.
#[inline(always)]
fn whole<D: Dots, const WIDE: bool>(high: D::Sums, low: D::Sums) -> float32x4_t {
    // SAFETY: `Level::detect` found NEON before it returned the level of these kernels.
    unsafe {
        let high = high.of_fours();
        vcvtq_f32_s32(if WIDE {
            vaddq_s32(vshlq_n_s32::<8>(high), low.of_fours())
        } else {
            high
        })
    }
}

/// Returns the indices of the bytes of each lane's unit among four units, if a lane has `columns`
/// columns.
#[inline(always)]
fn lanes(columns: usize, unit: usize) -> uint8x16_t {
    let lanes: [u8; 16] =
        std::array::from_fn(|byte| (4 * (byte / 4 * columns / unit) + byte % 4) as u8);
    // SAFETY: the array has 16 bytes.
    unsafe { vld1q_u8(lanes.as_ptr()) }
}
