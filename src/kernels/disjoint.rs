//! Memory that several tasks write at the same time, each task its own disjoint part.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// A mutable slice that is shared between tasks, each of which uses its own part.
#[derive(Debug)]
pub(crate) struct Disjoint<'a, T> {
    first: *mut T,
    len: usize,
    borrowed: PhantomData<&'a mut [T]>,
}

impl<T> Clone for Disjoint<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Disjoint<'_, T> {}

// SAFETY: elements are accessed through `part` and `shared`, whose callers guarantee that no two
// tasks use an element that one of them writes, or through raw pointers, whose use is unsafe
// itself. `borrowed` keeps the memory borrowed for `'a`.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

#[allow(dead_code)] // where nothing trains
impl<'a, T> Disjoint<'a, T> {
    pub fn new(all: &'a mut [T]) -> Self {
        Self {
            first: all.as_mut_ptr(),
            len: all.len(),
            borrowed: PhantomData,
        }
    }

    /// Wraps memory that is not yet initialized and is to be written through the pointers that
    /// [`at`](Self::at) returns.
    pub fn uninit(all: &'a mut [MaybeUninit<T>]) -> Self {
        Self {
            first: all.as_mut_ptr().cast(),
            len: all.len(),
            borrowed: PhantomData,
        }
    }

    /// Wraps `len` elements that begin at `first`.
    ///
    /// # Safety
    /// The elements must be valid and exclusively borrowed for the lifetime `'a`.
    pub unsafe fn from_raw(first: *mut T, len: usize) -> Self {
        Self {
            first,
            len,
            borrowed: PhantomData,
        }
    }

    pub fn len(self) -> usize {
        self.len
    }

    /// Returns a pointer to an element. It may be dereferenced only if `index` is less than the
    /// length.
    #[inline(always)]
    pub fn at(self, index: usize) -> *mut T {
        debug_assert!(index <= self.len, "element {index} of {}", self.len);
        self.first.wrapping_add(index)
    }

    /// Returns the elements from `index` to the end.
    #[inline(always)]
    pub fn from(self, index: usize) -> Self {
        assert!(index <= self.len, "from {index} on of {}", self.len);
        Self {
            first: self.first.wrapping_add(index),
            len: self.len - index,
            borrowed: PhantomData,
        }
    }

    /// Returns a part of the slice for writing.
    ///
    /// # Safety
    /// The elements must be initialized, and nothing else may use them while the returned slice is
    /// alive.
    #[inline(always)]
    pub unsafe fn part(self, range: Range<usize>) -> &'a mut [T] {
        let len = self.check(&range);
        // SAFETY: `check` verified that the range is in bounds, and the memory is borrowed for
        // `'a`; the caller guarantees the rest.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(range.start), len) }
    }

    /// Returns a part of the slice for reading.
    ///
    /// # Safety
    /// The elements must be initialized, and nothing may write them while the returned slice is
    /// alive.
    #[inline(always)]
    pub unsafe fn shared(self, range: Range<usize>) -> &'a [T] {
        let len = self.check(&range);
        // SAFETY: as in `part`.
        unsafe { std::slice::from_raw_parts(self.first.add(range.start), len) }
    }

    #[inline(always)]
    fn check(self, range: &Range<usize>) -> usize {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:?} of {}",
            self.len
        );
        range.end - range.start
    }
}

impl<'a> Disjoint<'a, u8> {
    /// Returns `count` numbers that begin at byte `from`.
    ///
    /// # Panics
    /// Panics if the numbers are not within the memory or not aligned.
    pub fn floats(self, from: usize, count: usize) -> Disjoint<'a, f32> {
        assert!(count <= self.len / 4 && from <= self.len - 4 * count);
        let first: *mut f32 = self.first.wrapping_add(from).cast();
        assert!(count == 0 || first.is_aligned());
        Disjoint {
            first: if count == 0 {
                std::ptr::dangling_mut()
            } else {
                first
            },
            len: count,
            borrowed: PhantomData,
        }
    }
}

/// Rows of a matrix that several tasks write, each task its own columns.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DisjointRows<'a> {
    pub all: Disjoint<'a, f32>,
    /// Distance from the start of one row to the start of the next, in numbers.
    pub stride: usize,
}

impl<'a> DisjointRows<'a> {
    /// Returns a pointer to an element. It may be dereferenced only if the element is in the
    /// memory.
    #[inline(always)]
    pub fn at(self, row: usize, column: usize) -> *mut f32 {
        self.all.at(row * self.stride + column)
    }

    /// Writes an element.
    ///
    /// # Safety
    /// The element must be in the memory and belong to this task.
    #[inline(always)]
    pub unsafe fn set(self, row: usize, column: usize, value: f32) {
        // SAFETY: the caller guarantees that the element is in the memory and belongs to this task.
        unsafe { self.at(row, column).write(value) };
    }

    /// Returns some columns of a row for writing.
    ///
    /// # Safety
    /// The elements must be initialized, and nothing else may use them while the returned slice is
    /// alive.
    #[inline(always)]
    pub unsafe fn row(self, row: usize, columns: Range<usize>) -> &'a mut [f32] {
        let first = row * self.stride;
        // SAFETY: the caller upholds the contract of `part`, which is the same.
        unsafe { self.all.part(first + columns.start..first + columns.end) }
    }
}
