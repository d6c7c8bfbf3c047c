//! Memory in which tasks write disjoint parts at the same time.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// A mutable slice of which each task uses a part of its own.
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

// SAFETY: access is by `part` and `shared`, whose callers promise that no two tasks use an element that one of them writes, or by
// pointers, whose use is unsafe itself; the memory is borrowed for as long as this lives.
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

    /// Memory that is not yet initialized, to be written by the pointers that [`at`](Self::at) gives.
    pub fn uninit(all: &'a mut [MaybeUninit<T>]) -> Self {
        Self {
            first: all.as_mut_ptr().cast(),
            len: all.len(),
            borrowed: PhantomData,
        }
    }

    /// # Safety
    /// `len` elements from `first` on are memory that stays borrowed mutably for the lifetime.
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

    /// A pointer to an element, which may be used while the index is under the length.
    #[inline(always)]
    pub fn at(self, index: usize) -> *mut T {
        debug_assert!(index <= self.len, "element {index} of {}", self.len);
        self.first.wrapping_add(index)
    }

    /// The elements from an index on.
    #[inline(always)]
    pub fn from(self, index: usize) -> Self {
        assert!(index <= self.len, "from {index} on of {}", self.len);
        Self {
            first: self.first.wrapping_add(index),
            len: self.len - index,
            borrowed: PhantomData,
        }
    }

    /// A part of it, to write.
    ///
    /// # Safety
    /// The elements are initialized, and until the slice is gone nothing else uses them.
    #[inline(always)]
    pub unsafe fn part(self, range: Range<usize>) -> &'a mut [T] {
        let len = self.check(&range);
        // SAFETY: in bounds, as was checked; alive as long as the borrow; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(range.start), len) }
    }

    /// A part of it, to read.
    ///
    /// # Safety
    /// The elements are initialized, and until the slice is gone nothing writes them.
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
    /// `count` numbers from a byte on.
    ///
    /// # Panics
    /// Panics unless they are within the memory and aligned.
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

/// Rows of a matrix of which each task writes columns of its own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DisjointRows<'a> {
    pub all: Disjoint<'a, f32>,
    /// Numbers from one row's first to the next one's.
    pub stride: usize,
}

impl<'a> DisjointRows<'a> {
    /// A pointer to an element, which may be used while the element is in the memory.
    #[inline(always)]
    pub fn at(self, row: usize, column: usize) -> *mut f32 {
        self.all.at(row * self.stride + column)
    }

    /// # Safety
    /// The element is in the memory, and this task's.
    #[inline(always)]
    pub unsafe fn set(self, row: usize, column: usize, value: f32) {
        // SAFETY: the caller's promise.
        unsafe { self.at(row, column).write(value) };
    }

    /// Some columns of a row.
    ///
    /// # Safety
    /// The elements are initialized, and until the slice is gone nothing else uses them.
    #[inline(always)]
    pub unsafe fn row(self, row: usize, columns: Range<usize>) -> &'a mut [f32] {
        let first = row * self.stride;
        // SAFETY: the caller's promise.
        unsafe { self.all.part(first + columns.start..first + columns.end) }
    }
}
