//! Registers of `f32` numbers, for code that is one for all instruction sets.

use super::tiles::Features;
use crate::kernels::number::Stored;

/// Room for the numbers of a group.
const ROOM: usize = 16;

/// The vectors of an instruction set. All functions are always inlined.
///
/// # Safety
/// All functions: the caller has the features. Of functions with a pointer: what they read or write is there; it need not be
/// aligned.
pub(in crate::kernels) trait Lanes: Features {
    type Vector: Copy;
    /// Numbers that are loaded together: one vector, or two.
    type Group: Copy;

    /// Numbers of a group, at most [`ROOM`].
    const COLUMNS: usize;
    /// See [`Tiles`](super::tiles::Tiles).
    const ONE: usize;
    /// See [`Tiles`](super::tiles::Tiles).
    const MORE: usize;
    /// See [`Tiles`](super::tiles::Tiles).
    const LONG: usize = usize::MAX;

    unsafe fn zero() -> Self::Vector;
    unsafe fn splat(x: f32) -> Self::Group;
    unsafe fn load<T: Stored>(at: *const u8) -> Self::Group;
    unsafe fn store(at: *mut f32, group: Self::Group);
    /// `a * b + sum`.
    unsafe fn fma(a: Self::Group, b: Self::Group, sum: Self::Group) -> Self::Group;

    /// In how many sums the products of one of so many pairs of rows are added, so that additions wait less for each other: 1, 2
    /// or 4.
    fn chains(pairs: usize) -> usize;

    /// Adds the products of group number `index` to some of the first `chains` sums.
    unsafe fn add_products(
        sums: &mut [Self::Vector; 4],
        chains: usize,
        index: usize,
        a: Self::Group,
        b: Self::Group,
    );

    /// For each of `W` rows the sum of the lanes of its first `chains` sums.
    unsafe fn totals<const W: usize>(sums: [[Self::Vector; 4]; W], chains: usize) -> [f32; W];

    /// The first `count` numbers of a group, zeros for the others.
    #[inline(always)]
    unsafe fn load_some<T: Stored>(at: *const u8, count: usize) -> Self::Group {
        let mut bytes = [0_u8; 4 * ROOM];
        // SAFETY: the numbers are there, by the caller's promise; no more are copied than there is room for.
        unsafe {
            let size = count.min(Self::COLUMNS) * size_of::<T>();
            std::ptr::copy_nonoverlapping(at, bytes.as_mut_ptr(), size);
            Self::load::<T>(bytes.as_ptr())
        }
    }

    /// Stores the first `count` numbers of a group, fewer than it has.
    #[inline(always)]
    unsafe fn store_some(at: *mut f32, count: usize, group: Self::Group) {
        let mut numbers = [0.0; ROOM];
        // SAFETY: there is room, by the caller's promise; no more are copied than there are.
        unsafe {
            Self::store(numbers.as_mut_ptr(), group);
            std::ptr::copy_nonoverlapping(numbers.as_ptr(), at, count.min(Self::COLUMNS));
        }
    }

    /// Asks for what will be needed after the bytes at a place of a stream.
    #[inline(always)]
    fn prefetch(_at: *const u8) {}
}
