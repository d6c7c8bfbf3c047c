//! Tiles, which multiply a few rows of a weight by a few rows of inputs with all sums in registers,
//! and the instruction set features that they are compiled with.

use std::ops::Range;

use super::input::{BLOCK, Input};

/// Work that is compiled with the features of an instruction set. Implementations must always be
/// inlined, so that they get these features.
pub(in crate::kernels) trait Work<I> {
    type Output;

    /// Runs the work.
    ///
    /// # Safety
    /// The processor must have the features of `I`, and the requirements of the implementation must
    /// hold.
    unsafe fn run(self) -> Self::Output;
}

/// An instruction set, or the part of it that some kernels need.
pub(in crate::kernels) trait Features: Sized {
    /// Runs work that is compiled with the features.
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
                    // SAFETY: the caller of `run` upholds the contract of the work.
                    unsafe { work.run() }
                }
                // SAFETY: the caller of `run` guarantees that the processor has the features.
                unsafe { with(work) }
            }
        }
    };
}
pub(in crate::kernels) use features;

/// Number of distant rows of a weight in one tile; see [`Tiles::LONG`].
pub(in crate::kernels) const FAR: usize = 4;

/// Number of rows of a weight that stay in a near cache: a multiple of a tile's rows.
const NEAR: usize = 4;

/// Tiles of a product.
pub(in crate::kernels) trait Tiles {
    /// Number of rows of the weight in a tile with one row of inputs: 1, 2 or 4.
    const ONE: usize;
    /// Number of rows of the weight in a tile with several rows of inputs: 1, 2 or 4.
    const MORE: usize;
    /// If a single row of inputs is longer than this, it is read once for [`FAR`] rows of the
    /// weight that are a quarter of a task apart, so that the memory that the processor reads ahead
    /// is used.
    const LONG: usize = usize::MAX;

    /// Computes the products of some rows of the weight with `R` rows of inputs from `from` on, `W`
    /// rows of the weight at a time, `apart` rows from each other. The first rows of the tiles are
    /// the [`firsts`] of `rows`.
    ///
    /// # Safety
    /// The rows must exist, and their outputs must belong to this task.
    unsafe fn tile<const W: usize, const R: usize>(
        &self,
        rows: Range<usize>,
        apart: usize,
        from: usize,
    );
}

/// Returns the first row of each tile: every `W`-th row if the rows of a tile follow each other, and
/// every row if they are apart.
#[inline(always)]
pub(in crate::kernels) fn firsts<const W: usize>(
    rows: Range<usize>,
    apart: usize,
) -> impl Iterator<Item = usize> {
    rows.step_by(if apart == 1 { W } else { 1 })
}

/// Computes all tiles of some rows of a weight, with 1, 2 or 4 rows of inputs at a time. Rows of
/// the weight that do not fill a tile are computed one by one. Tasks begin at multiples of 16 rows,
/// so that a row is computed in the same kind of tile for any division into tasks.
///
/// # Safety
/// As for [`Tiles::tile`].
#[inline(always)]
pub(in crate::kernels) unsafe fn for_tiles<T: Tiles>(
    tiles: &T,
    mut rows: Range<usize>,
    input: &Input<'_>,
) {
    // SAFETY: the caller upholds this function's contract.
    unsafe {
        if const { T::LONG != usize::MAX } && input.rows == 1 && input.inputs > T::LONG {
            let apart = rows.len() / FAR;
            tiles.tile::<FAR, 1>(rows.start..rows.start + apart, apart, 0);
            rows.start += FAR * apart;
        }
        let most = if input.rows == 1 { T::ONE } else { T::MORE };
        let whole = rows.end - rows.len() % most;
        for (rows, count) in [(rows.start..whole, most), (whole..rows.end, 1)] {
            // All rows at once if a tile has all inputs. Otherwise as many rows as stay in a near
            // cache until all inputs are done.
            let step = if matches!(input.rows, 1 | 2 | 4) {
                rows.len().max(1)
            } else {
                NEAR
            };
            for first in rows.clone().step_by(step) {
                let some = first..rows.end.min(first + step);
                let mut from = 0;
                while from < input.rows {
                    from += match input.rows - from {
                        1 => some_rows::<T, 1>(tiles, some.clone(), count, from),
                        2..=3 => some_rows::<T, 2>(tiles, some.clone(), count, from),
                        _ => some_rows::<T, 4>(tiles, some.clone(), count, from),
                    };
                }
            }
        }
    }
}

/// `count` rows of the weight at a time; returns `R`.
///
/// # Safety
/// As for [`Tiles::tile`].
#[inline(always)]
unsafe fn some_rows<T: Tiles, const R: usize>(
    tiles: &T,
    rows: Range<usize>,
    count: usize,
    from: usize,
) -> usize {
    // SAFETY: the caller upholds this function's contract.
    unsafe {
        if const { T::ONE == 4 || T::MORE == 4 } && count == 4 {
            tiles.tile::<4, R>(rows, 1, from);
        } else if const { T::ONE == 2 || T::MORE == 2 } && count == 2 {
            tiles.tile::<2, R>(rows, 1, from);
        } else {
            tiles.tile::<1, R>(rows, 1, from);
        }
    }
    R
}

/// [`Tiles`] of codes. `WIDE` is set if inputs have two bytes, `SMALL` if a block has several
/// units.
pub(in crate::kernels) trait CodeTiles {
    /// See [`Tiles::ONE`].
    const ONE: usize;
    /// See [`Tiles::MORE`].
    const MORE: usize;
    /// See [`Tiles::LONG`].
    const LONG: usize = usize::MAX;

    /// # Safety
    /// As for [`Tiles::tile`].
    unsafe fn tile<const WIDE: bool, const SMALL: bool, const W: usize, const R: usize>(
        &self,
        rows: Range<usize>,
        apart: usize,
        from: usize,
    );
}

/// The tiles for one choice of `WIDE` and `SMALL`.
struct Of<'a, T, const WIDE: bool, const SMALL: bool>(&'a T);

impl<T: CodeTiles, const WIDE: bool, const SMALL: bool> Tiles for Of<'_, T, WIDE, SMALL> {
    const ONE: usize = T::ONE;
    const MORE: usize = T::MORE;
    /// Inputs of one byte may be twice as many in the same memory.
    const LONG: usize = if WIDE {
        T::LONG
    } else {
        T::LONG.saturating_mul(2)
    };

    #[inline(always)]
    unsafe fn tile<const W: usize, const R: usize>(
        &self,
        rows: Range<usize>,
        apart: usize,
        from: usize,
    ) {
        // SAFETY: the caller upholds this function's contract.
        unsafe { self.0.tile::<WIDE, SMALL, W, R>(rows, apart, from) };
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
    // SAFETY: the caller upholds this function's contract.
    unsafe {
        match (input.wide(), unit < BLOCK) {
            (true, false) => for_tiles(&Of::<_, true, false>(tiles), rows, input),
            (true, true) => for_tiles(&Of::<_, true, true>(tiles), rows, input),
            (false, false) => for_tiles(&Of::<_, false, false>(tiles), rows, input),
            (false, true) => for_tiles(&Of::<_, false, true>(tiles), rows, input),
        }
    }
}
