//! Products of codes, however they are stored, with inputs that were rounded to bytes; and with many rows of inputs, for which
//! 16 rows of the weight are unpacked to bytes.

use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

use super::units::{SLOTS, Units};
use super::{MANY, for_tiles, units};
use crate::format::Grid;
use crate::kernels::disjoint::DisjointRows;
use crate::kernels::input::{BLOCK, Input, Order};

/// Where codes come from, in blocks of 128: eight vectors, in the order of the inputs' bytes.
pub(super) trait Source {
    /// A row, and how far it was read.
    type Row;
    /// The codes of a block, or where they are.
    type Block: Copy;

    /// Whether a block's first four vectors are its even columns, and the others the odd ones: a lane of four bytes of one and of its
    /// partner are eight columns. Else columns are in order, and a lane is four.
    const PAIRED: bool;
    /// Whether codes have 8 bits, less 128 each; else they are at most 15.
    const WHOLE_BYTES: bool;

    /// A row from its first block on. `zeros` are its zero points by units, of which a block may read 16 from its own first one on.
    ///
    /// # Panics
    /// For a row that there is not.
    fn row(&self, row: usize, zeros: *const u8) -> Self::Row;

    /// The next block, which is number `block`; `SMALL` where it has more than one unit.
    ///
    /// # Safety
    /// The block has inputs, and the row's zero points are there.
    unsafe fn block<const SMALL: bool>(&self, row: &mut Self::Row, block: usize) -> Self::Block;

    /// Vector `index` of a block.
    ///
    /// # Safety
    /// `index < 8`, and what the block was made of is there.
    unsafe fn vector(block: &Self::Block, index: usize) -> int8x16_t;
}

/// How bytes are multiplied.
trait Dots {
    /// Sums of up to eight products of codes and bytes in each part.
    type Sums: Copy;
    /// Rows of a weight that is unpacked at a time, as many as registers hold sums of.
    const ROWS: usize;

    fn none() -> Self::Sums;

    /// Adds the products of codes and bytes.
    ///
    /// # Safety
    /// The processor can.
    unsafe fn add(sums: Self::Sums, codes: int8x16_t, x: int8x16_t) -> Self::Sums;

    /// The sums of each four bytes.
    fn of_fours(sums: Self::Sums) -> int32x4_t;

    /// Calls [`body`] with the processor's features.
    ///
    /// # Safety
    /// As for [`body`], and the processor has them.
    unsafe fn tile<S: Source, const WIDE: bool, const SMALL: bool, const W: usize, const R: usize>(
        call: &Call<'_, S>,
        row: usize,
        from: usize,
    );
}

/// [`Dots::tile`] for what needs these features.
macro_rules! with_features {
    ($features:literal, $dots:ident) => {
        #[inline(always)]
        unsafe fn tile<
            S: Source,
            const WIDE: bool,
            const SMALL: bool,
            const W: usize,
            const R: usize,
        >(
            call: &Call<'_, S>,
            row: usize,
            from: usize,
        ) {
            #[inline(never)] // several in one function have too few registers
            #[target_feature(enable = $features)]
            unsafe fn with<
                S: Source,
                const WIDE: bool,
                const SMALL: bool,
                const W: usize,
                const R: usize,
            >(
                call: &Call<'_, S>,
                row: usize,
                from: usize,
            ) {
                // SAFETY: the caller's promise.
                unsafe { body::<$dots, S, WIDE, SMALL, W, R>(call, row, from) };
            }
            // SAFETY: the caller's promise.
            unsafe { with::<S, WIDE, SMALL, W, R>(call, row, from) };
        }
    };
}

/// What NEON has: products of 16 bits, of codes up to 15, so at most `15 * 128`, of which eight are added.
struct Products;

impl Dots for Products {
    type Sums = [int16x8_t; 2];
    const ROWS: usize = 2;

    #[inline(always)]
    fn none() -> [int16x8_t; 2] {
        // SAFETY: NEON is there, or nobody would call.
        unsafe { [vdupq_n_s16(0); 2] }
    }

    #[inline(always)]
    unsafe fn add(sums: [int16x8_t; 2], codes: int8x16_t, x: int8x16_t) -> [int16x8_t; 2] {
        // SAFETY: as above.
        unsafe {
            [
                vmlal_s8(sums[0], vget_low_s8(codes), vget_low_s8(x)),
                vmlal_high_s8(sums[1], codes, x),
            ]
        }
    }

    #[inline(always)]
    fn of_fours(sums: [int16x8_t; 2]) -> int32x4_t {
        // SAFETY: as above. Two sums of eight products are at most `16 * 15 * 128`, which 16 bits hold.
        unsafe { vpaddlq_s16(vpaddq_s16(sums[0], sums[1])) }
    }

    with_features!("neon", Products);
}

/// The same of codes that are bytes: two such products may be too many for 16 bits.
struct Wide;

impl Dots for Wide {
    type Sums = int32x4_t;
    const ROWS: usize = 2;

    #[inline(always)]
    fn none() -> int32x4_t {
        // SAFETY: NEON is there, or nobody would call.
        unsafe { vdupq_n_s32(0) }
    }

    #[inline(always)]
    unsafe fn add(sums: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
        // SAFETY: as above.
        unsafe {
            let low = vpaddlq_s16(vmull_s8(vget_low_s8(codes), vget_low_s8(x)));
            let high = vpaddlq_s16(vmull_high_s8(codes, x));
            vaddq_s32(sums, vpaddq_s32(low, high))
        }
    }

    #[inline(always)]
    fn of_fours(sums: int32x4_t) -> int32x4_t {
        sums
    }

    with_features!("neon", Wide);
}

/// Dot products of four bytes.
struct Fours;

impl Dots for Fours {
    type Sums = int32x4_t;
    const ROWS: usize = 4;

    #[inline(always)]
    fn none() -> int32x4_t {
        // SAFETY: NEON is there, or nobody would call.
        unsafe { vdupq_n_s32(0) }
    }

    #[inline(always)]
    unsafe fn add(sums: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
        /// The standard library's is not stable.
        #[inline]
        #[target_feature(enable = "neon,dotprod")]
        fn sdot(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
            // SAFETY: works on registers alone.
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
        // SAFETY: the caller's promise.
        unsafe { sdot(sums, codes, x) }
    }

    #[inline(always)]
    fn of_fours(sums: int32x4_t) -> int32x4_t {
        sums
    }

    with_features!("neon,dotprod", Fours);
}

struct Call<'a, S> {
    source: S,
    unit: usize,
    units: Units<'a>,
    /// The row of the first slot where the slots are filled; else a tile fills those of its rows.
    filled: Option<usize>,
    input: &'a Input<'a>,
    output: DisjointRows<'a>,
}

/// The order of the inputs' bytes.
#[inline(always)]
fn order<S: Source>() -> Order {
    if S::PAIRED {
        Order::EvenOdd
    } else {
        Order::InOrder
    }
}

/// Products of the inputs with some rows of a weight.
///
/// # Safety
/// The outputs are this task's, and in the output's memory; where `dots`, the processor has `sdot`.
#[allow(clippy::too_many_arguments)] // those of all kernels, and where codes come from
pub(super) unsafe fn multiply<S: Source + Copy>(
    dots: bool,
    source: S,
    grid: &Grid,
    unit: usize,
    rows: Range<usize>,
    input: &Input<'_>,
    output: DisjointRows<'_>,
    scratch: &mut [f32],
) {
    // SAFETY: the caller's promise.
    unsafe {
        match (dots, input.rows >= MANY) {
            (true, false) => few::<Fours, S>(source, grid, unit, rows, input, output, scratch),
            (true, true) => many::<Fours, S>(source, grid, unit, rows, input, output, scratch),
            (false, false) if S::WHOLE_BYTES => {
                few::<Wide, S>(source, grid, unit, rows, input, output, scratch)
            }
            (false, true) if S::WHOLE_BYTES => {
                many::<Wide, S>(source, grid, unit, rows, input, output, scratch)
            }
            (false, false) => few::<Products, S>(source, grid, unit, rows, input, output, scratch),
            (false, true) => many::<Products, S>(source, grid, unit, rows, input, output, scratch),
        }
    }
}

/// # Safety
/// As for [`multiply`], and the processor has what `D` needs.
unsafe fn few<D: Dots, S: Source>(
    source: S,
    grid: &Grid,
    unit: usize,
    rows: Range<usize>,
    input: &Input<'_>,
    output: DisjointRows<'_>,
    scratch: &mut [f32],
) {
    let call = Call {
        source,
        unit,
        units: Units::new(grid, unit, input, scratch),
        filled: None,
        input,
        output,
    };
    macro_rules! tile {
        ($w:literal, $r:literal, $wide:literal, $small:literal, $row:expr, $from:expr) => {
            D::tile::<S, $wide, $small, $w, $r>(&call, $row, $from)
        };
    }
    // SAFETY: the caller's promise.
    unsafe {
        match (input.wide(), unit < BLOCK) {
            (true, false) => {
                for_tiles!(rows, input.rows, 2 x 1, 1 x 4, |row, from| tile(true, false, row, from))
            }
            (true, true) => {
                for_tiles!(rows, input.rows, 2 x 1, 1 x 4, |row, from| tile(true, true, row, from))
            }
            (false, false) => {
                for_tiles!(rows, input.rows, 2 x 1, 1 x 4, |row, from| tile(false, false, row, from))
            }
            (false, true) => {
                for_tiles!(rows, input.rows, 2 x 1, 1 x 4, |row, from| tile(false, true, row, from))
            }
        }
    }
}

/// Numbers of scratch memory for rows that are unpacked.
pub(super) fn panel_floats(inputs: usize, units: usize) -> usize {
    units::floats(units) + SLOTS * inputs.next_multiple_of(BLOCK) / 4
}

/// # Safety
/// As for [`few`].
unsafe fn many<D: Dots, S: Source>(
    source: S,
    grid: &Grid,
    unit: usize,
    rows: Range<usize>,
    input: &Input<'_>,
    output: DisjointRows<'_>,
    scratch: &mut [f32],
) {
    let stride = input.inputs.next_multiple_of(BLOCK);
    let (panel, scratch) = scratch.split_at_mut(SLOTS * stride / 4);
    let panel: *mut u8 = panel.as_mut_ptr().cast();
    let units = Units::new(grid, unit, input, scratch);
    for first in rows.clone().step_by(SLOTS) {
        let rows = first..rows.end.min(first + SLOTS);
        for (slot, row) in rows.clone().enumerate() {
            // SAFETY: there are as many slots; the panel has room for as many rows of whole blocks.
            unsafe {
                units.decode(row, slot);
                let out = panel.add(slot * stride);
                if unit < BLOCK {
                    unpack::<S, true>(&source, source.row(row, units.zeros(slot)), stride, out);
                } else {
                    unpack::<S, false>(&source, source.row(row, units.zeros(slot)), stride, out);
                }
            }
        }
        // SAFETY: the caller's promise; the slots of the rows are filled.
        unsafe {
            if S::PAIRED {
                let source = Panel::<true> {
                    first: panel,
                    base: first,
                    stride,
                };
                unpacked::<D, true>(
                    &Call {
                        source,
                        unit,
                        units,
                        filled: Some(first),
                        input,
                        output,
                    },
                    rows,
                );
            } else {
                let source = Panel::<false> {
                    first: panel,
                    base: first,
                    stride,
                };
                unpacked::<D, false>(
                    &Call {
                        source,
                        unit,
                        units,
                        filled: Some(first),
                        input,
                        output,
                    },
                    rows,
                );
            }
        }
    }
}

/// Writes a row's codes, a byte each, as many as `count`, in whole blocks.
///
/// # Safety
/// They have room, and the row's zero points are there.
#[target_feature(enable = "neon")]
unsafe fn unpack<S: Source, const SMALL: bool>(
    source: &S,
    mut row: S::Row,
    count: usize,
    out: *mut u8,
) {
    for block in 0..count / BLOCK {
        // SAFETY: the caller's promise.
        unsafe {
            let codes = source.block::<SMALL>(&mut row, block);
            for index in 0..8 {
                vst1q_s8(
                    out.add(BLOCK * block + 16 * index).cast(),
                    S::vector(&codes, index),
                );
            }
        }
    }
}

/// Rows that are unpacked, in the order of what they come from.
struct Panel<const PAIRED: bool> {
    first: *const u8,
    /// The row that is the panel's first.
    base: usize,
    stride: usize,
}

impl<const PAIRED: bool> Source for Panel<PAIRED> {
    type Row = *const u8;
    type Block = *const u8;

    const PAIRED: bool = PAIRED;
    const WHOLE_BYTES: bool = true; // for all that is known

    #[inline(always)]
    fn row(&self, row: usize, _zeros: *const u8) -> *const u8 {
        self.first.wrapping_add((row - self.base) * self.stride)
    }

    #[inline(always)]
    unsafe fn block<const SMALL: bool>(&self, row: &mut *const u8, block: usize) -> *const u8 {
        row.wrapping_add(BLOCK * block)
    }

    #[inline(always)]
    unsafe fn vector(block: &*const u8, index: usize) -> int8x16_t {
        // SAFETY: a block of a row is there, by the caller's promise.
        unsafe { vld1q_s8(block.add(16 * index).cast()) }
    }
}

/// Products of all inputs with a panel.
///
/// # Safety
/// As for [`body`]; the slots of the rows are filled.
unsafe fn unpacked<D: Dots, const PAIRED: bool>(
    call: &Call<'_, Panel<PAIRED>>,
    rows: Range<usize>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match (call.input.wide(), call.unit < BLOCK) {
            (true, false) => panel_tiles::<D, PAIRED, true, false>(call, rows),
            (true, true) => panel_tiles::<D, PAIRED, true, true>(call, rows),
            (false, false) => panel_tiles::<D, PAIRED, false, false>(call, rows),
            (false, true) => panel_tiles::<D, PAIRED, false, true>(call, rows),
        }
    }
}

/// Products of two rows of inputs at a time with all rows of a panel, so that the inputs' bytes come from the first-level cache.
///
/// # Safety
/// As for [`body`]; the slots of the rows are filled.
unsafe fn panel_tiles<D: Dots, const PAIRED: bool, const WIDE: bool, const SMALL: bool>(
    call: &Call<'_, Panel<PAIRED>>,
    rows: Range<usize>,
) {
    let mut from = 0;
    while from < call.input.rows {
        let two = call.input.rows - from >= 2;
        let mut row = rows.start;
        while row < rows.end {
            let whole = rows.end - row >= D::ROWS;
            // SAFETY: the caller's promise.
            unsafe {
                match (whole, two) {
                    (true, true) if D::ROWS == 4 => {
                        D::tile::<Panel<PAIRED>, WIDE, SMALL, 4, 2>(call, row, from)
                    }
                    (true, false) if D::ROWS == 4 => {
                        D::tile::<Panel<PAIRED>, WIDE, SMALL, 4, 1>(call, row, from)
                    }
                    (true, true) => D::tile::<Panel<PAIRED>, WIDE, SMALL, 2, 2>(call, row, from),
                    (true, false) => D::tile::<Panel<PAIRED>, WIDE, SMALL, 2, 1>(call, row, from),
                    (false, true) => D::tile::<Panel<PAIRED>, WIDE, SMALL, 1, 2>(call, row, from),
                    (false, false) => D::tile::<Panel<PAIRED>, WIDE, SMALL, 1, 1>(call, row, from),
                }
            }
            row += if whole { D::ROWS } else { 1 };
        }
        from += if two { 2 } else { 1 };
    }
}

/// Products of `W` rows of the weight with `R` of the inputs.
///
/// # Safety
/// The rows are there, and their outputs this task's; the processor has what `D` needs.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // loops over constants, which become straight code on registers
unsafe fn body<
    D: Dots,
    S: Source,
    const WIDE: bool,
    const SMALL: bool,
    const W: usize,
    const R: usize,
>(
    call: &Call<'_, S>,
    row: usize,
    from: usize,
) {
    let Call {
        source,
        unit,
        units,
        filled,
        input,
        output,
    } = call;
    let (size, of_block) = (input.layout.block_bytes(), BLOCK / unit);
    let x: [*const i8; R] =
        std::array::from_fn(|i| input.codes(from + i, order::<S>()).as_ptr().cast());
    let slot = filled.map_or(0, |first| row - first);
    // SAFETY: `W` slots are there, and `W * R` pairs; what was prepared has whole blocks, and so has each row of the weight or what stands
    // for it, by the promises of `Source`.
    unsafe {
        if filled.is_none() && from == 0 {
            for w in 0..W {
                units.decode(row + w, w);
            }
        }
        let mut sums = [[vdupq_n_f32(0.0); R]; W];
        for w in 0..W {
            for i in 0..R {
                sums[w][i] = units.multiply(slot + w, w * R + i, from + i);
            }
        }
        let mut rows: [S::Row; W] =
            std::array::from_fn(|w| source.row(row + w, units.zeros(slot + w)));
        let products: [[*const f32; R]; W] = std::array::from_fn(|w| {
            std::array::from_fn(|i| units.products(w * R + i).cast_const())
        });
        let lanes = lanes(if S::PAIRED { 8 } else { 4 }, *unit);
        for block in 0..input.inputs.div_ceil(BLOCK) {
            // Not by a closure, which would not always be inlined.
            let mut blocks = [source.block::<SMALL>(&mut rows[0], block); W];
            for w in 1..W {
                blocks[w] = source.block::<SMALL>(&mut rows[w], block);
            }
            let x: [*const i8; R] = std::array::from_fn(|i| x[i].add(block * size));
            if SMALL {
                let steps = if S::PAIRED { 4 } else { 8 };
                for step in 0..steps {
                    // The first unit of this vector, or pair of them.
                    let at = block * of_block + step * of_block / steps;
                    for i in 0..R {
                        for w in 0..W {
                            let [mut high, mut low] = [D::none(); 2];
                            for index in
                                [step, step + 4]
                                    .into_iter()
                                    .take(if S::PAIRED { 2 } else { 1 })
                            {
                                let codes = S::vector(&blocks[w], index);
                                high = D::add(high, codes, vld1q_s8(x[i].add(16 * index)));
                                if WIDE {
                                    low =
                                        D::add(low, codes, vld1q_s8(x[i].add(BLOCK + 16 * index)));
                                }
                            }
                            let scales = vreinterpretq_u8_f32(vld1q_f32(products[w][i].add(at)));
                            let scales = vreinterpretq_f32_u8(vqtbl1q_u8(scales, lanes));
                            sums[w][i] = vfmaq_f32(sums[w][i], whole::<D, WIDE>(high, low), scales);
                        }
                    }
                }
            } else {
                let [mut high, mut low] = [[[D::none(); R]; W]; 2];
                for index in 0..8 {
                    for i in 0..R {
                        let x_high = vld1q_s8(x[i].add(16 * index));
                        let x_low = if WIDE {
                            vld1q_s8(x[i].add(BLOCK + 16 * index))
                        } else {
                            x_high
                        };
                        for w in 0..W {
                            let codes = S::vector(&blocks[w], index);
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
                        sums[w][i] =
                            vfmaq_n_f32(sums[w][i], whole::<D, WIDE>(high[w][i], low[w][i]), scale);
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

/// The sums of products with inputs, of their high bytes and, where there are some, their low ones.
#[inline(always)]
fn whole<D: Dots, const WIDE: bool>(high: D::Sums, low: D::Sums) -> float32x4_t {
    // SAFETY: NEON is there, or nobody would call.
    unsafe {
        let high = D::of_fours(high);
        vcvtq_f32_s32(if WIDE {
            vaddq_s32(vshlq_n_s32::<8>(high), D::of_fours(low))
        } else {
            high
        })
    }
}

/// Indices of the bytes of each lane's unit among four units, where a lane has `columns`.
#[inline(always)]
fn lanes(columns: usize, unit: usize) -> uint8x16_t {
    let lanes: [u8; 16] =
        std::array::from_fn(|byte| (4 * (byte / 4 * columns / unit) + byte % 4) as u8);
    // SAFETY: an array of 16 bytes.
    unsafe { vld1q_u8(lanes.as_ptr()) }
}
