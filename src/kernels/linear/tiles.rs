//! Tiles: a few rows of a weight with a few of inputs, whose sums are in registers; and the features that they are compiled with.

use std::ops::Range;

use super::input::{BLOCK, Input};

/// Work that is compiled with the features of an instruction set. Implementations are always inlined, so that they have them.
pub(in crate::kernels) trait Work<I> {
    type Output;

    /// # Safety
    /// The processor has the features of `I`; what else the work says.
    unsafe fn run(self) -> Self::Output;
}

/// An instruction set, or the part of it that some kernels need.
pub(in crate::kernels) trait Features: Sized {
    /// Does work with the features.
    ///
    /// # Safety
    /// As for [`Work::run`].
    unsafe fn run<W: Work<Self>>(work: W) -> W::Output;
}

/// Implements [`Features`] for a type.
macro_rules! features {
    ($name:ident, $features:literal) => {
        impl $crate::kernels::linear::tiles::Features for $name {
            #[inline(always)]
            unsafe fn run<W: $crate::kernels::linear::tiles::Work<Self>>(work: W) -> W::Output {
                #[inline(never)] // several in one function have too few registers
                #[target_feature(enable = $features)]
                unsafe fn with<W: $crate::kernels::linear::tiles::Work<$name>>(
                    work: W,
                ) -> W::Output {
                    // SAFETY: the caller's promise.
                    unsafe { work.run() }
                }
                // SAFETY: the caller's promise.
                unsafe { with(work) }
            }
        }
    };
}
pub(in crate::kernels) use features;

/// Rows of a weight that are far from each other in one tile; see [`Tiles::LONG`].
pub(in crate::kernels) const FAR: usize = 4;

/// Tiles of a product.
pub(in crate::kernels) trait Tiles {
    /// Rows of the weight at a time with one row of inputs: 1, 2 or 4.
    const ONE: usize;
    /// The same with more.
    const MORE: usize;
    /// A single row of more inputs than these is read once for [`FAR`] rows of the weight, a quarter of a task apart, so that what
    /// memory reads ahead is needed.
    const LONG: usize = usize::MAX;

    /// Products of `W` rows of the weight from `row` on with `R` of inputs from `from` on.
    ///
    /// # Safety
    /// The rows are there, and their outputs this task's.
    unsafe fn tile<const W: usize, const R: usize>(&self, row: usize, from: usize);

    /// Products of [`FAR`] rows, `apart` from each other, with the one row of inputs.
    ///
    /// # Safety
    /// As for [`tile`](Self::tile).
    unsafe fn far(&self, _row: usize, _apart: usize) {}
}

/// Computes all tiles of some rows of a weight: 1, 2 or 4 rows of inputs at a time, and rows of the weight one by one where not
/// enough are left. Tasks begin at multiples of 16 rows, so that a row is in the same tile in whatever task it is.
///
/// # Safety
/// As for [`Tiles::tile`].
#[inline(always)]
pub(in crate::kernels) unsafe fn for_tiles<T: Tiles>(
    tiles: &T,
    rows: Range<usize>,
    input: &Input<'_>,
) {
    let mut row = rows.start;
    if const { T::LONG != usize::MAX } && input.rows == 1 && input.inputs > T::LONG {
        let apart = rows.len() / FAR;
        for row in rows.start..rows.start + apart {
            // SAFETY: the caller's promise; so below.
            unsafe { tiles.far(row, apart) };
        }
        row += FAR * apart;
    }
    let most = if input.rows == 1 { T::ONE } else { T::MORE };
    while row < rows.end {
        let count = if rows.end - row >= most { most } else { 1 };
        let mut from = 0;
        while from < input.rows {
            unsafe {
                from += match input.rows - from {
                    1 => some_rows::<T, 1>(tiles, row, count, from),
                    2..=3 => some_rows::<T, 2>(tiles, row, count, from),
                    _ => some_rows::<T, 4>(tiles, row, count, from),
                };
            }
        }
        row += count;
    }
}

/// # Safety
/// As for [`Tiles::tile`].
#[inline(always)]
unsafe fn some_rows<T: Tiles, const R: usize>(
    tiles: &T,
    row: usize,
    count: usize,
    from: usize,
) -> usize {
    // SAFETY: the caller's promise.
    unsafe {
        if const { T::ONE == 4 || T::MORE == 4 } && count == 4 {
            tiles.tile::<4, R>(row, from);
        } else if const { T::ONE == 2 || T::MORE == 2 } && count == 2 {
            tiles.tile::<2, R>(row, from);
        } else {
            tiles.tile::<1, R>(row, from);
        }
    }
    R
}

/// [`Tiles`] of codes: `WIDE` where inputs have two bytes, `SMALL` where a block has several units.
pub(in crate::kernels) trait CodeTiles {
    /// See [`Tiles::ONE`].
    const ONE: usize;
    /// See [`Tiles::MORE`].
    const MORE: usize;

    /// # Safety
    /// As for [`Tiles::tile`].
    unsafe fn tile<const WIDE: bool, const SMALL: bool, const W: usize, const R: usize>(
        &self,
        row: usize,
        from: usize,
    );
}

/// The tiles of inputs and units of one kind.
struct Of<'a, T, const WIDE: bool, const SMALL: bool>(&'a T);

impl<T: CodeTiles, const WIDE: bool, const SMALL: bool> Tiles for Of<'_, T, WIDE, SMALL> {
    const ONE: usize = T::ONE;
    const MORE: usize = T::MORE;

    #[inline(always)]
    unsafe fn tile<const W: usize, const R: usize>(&self, row: usize, from: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.0.tile::<WIDE, SMALL, W, R>(row, from) };
    }
}

/// Computes all tiles of some rows of codes.
///
/// # Safety
/// As for [`Tiles::tile`].
pub(in crate::kernels) unsafe fn for_code_tiles<T: CodeTiles>(
    tiles: &T,
    rows: Range<usize>,
    input: &Input<'_>,
    unit: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match (input.wide(), unit < BLOCK) {
            (true, false) => for_tiles(&Of::<_, true, false>(tiles), rows, input),
            (true, true) => for_tiles(&Of::<_, true, true>(tiles), rows, input),
            (false, false) => for_tiles(&Of::<_, false, false>(tiles), rows, input),
            (false, true) => for_tiles(&Of::<_, false, true>(tiles), rows, input),
        }
    }
}
