//! Vector registers of `f32` numbers, for code that is generic over instruction sets.

use super::tiles::Features;
use crate::kernels::number::Stored;

/// Maximum count of numbers of a group.
const ROOM: usize = 16;

/// The vectors of an instruction set. All functions are always inlined.
///
/// # Safety
/// The caller of any function must have the features of the instruction set. Pointers must be valid
/// for what is read or written, but need not be aligned.
pub(in crate::kernels) trait Lanes: Features {
    type Vector: Copy;
    /// Numbers that are loaded together: one vector, or two.
    type Group: Copy;

    /// Count of numbers of a group, at most [`ROOM`].
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
    /// Returns `a * b + sum`.
    unsafe fn fma(a: Self::Group, b: Self::Group, sum: Self::Group) -> Self::Group;

    /// Returns over how many sums the products of one pair of rows are spread when `pairs` pairs
    /// are computed together: 1, 2 or 4. Several sums reduce the time that an addition waits for
    /// the one before.
    fn chains(pairs: usize) -> usize;

    /// Adds the products of group number `index` to some of the first `chains` sums.
    unsafe fn add_products(
        sums: &mut [Self::Vector; 4],
        chains: usize,
        index: usize,
        a: Self::Group,
        b: Self::Group,
    );

    /// Returns, for each of `W` rows, the sum of all lanes of its first `chains` sums.
    unsafe fn totals<const W: usize>(sums: [[Self::Vector; 4]; W], chains: usize) -> [f32; W];

    /// Loads the first `count` numbers of a group. The others are zero.
    #[inline(always)]
    unsafe fn load_some<T: Stored>(at: *const u8, count: usize) -> Self::Group {
        let mut bytes = [0_u8; 4 * ROOM];
        // SAFETY: the numbers exist as the caller guarantees, and no more are copied than there is
        // room for.
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
        // SAFETY: there is room as the caller guarantees, and no more are copied than the group
        // has.
        unsafe {
            Self::store(numbers.as_mut_ptr(), group);
            std::ptr::copy_nonoverlapping(numbers.as_ptr(), at, count.min(Self::COLUMNS));
        }
    }

    /// Prefetches the part of a stream that will be needed after the bytes at `at`.
    #[inline(always)]
    fn prefetch(_at: *const u8) {}
}
