//! What the kernels share: places to write, memory for tasks.

use std::ops::Range;

/// Where results go: element `(row, column)` at `row * stride + column`. Tasks write disjoint parts.
#[derive(Clone, Copy)]
pub(super) struct Output {
    pub first: *mut f32,
    pub stride: usize,
}

// SAFETY: every task writes and reads columns of its own, and the memory outlives them.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

impl Output {
    /// # Safety
    /// The element is in the memory, and this task's.
    #[inline(always)]
    pub unsafe fn set(self, row: usize, column: usize, value: f32) {
        // SAFETY: the caller's promise.
        unsafe { *self.first.add(row * self.stride + column) = value };
    }

    /// Some columns of a row.
    ///
    /// # Safety
    /// The elements are in the memory, initialized, and this task's, and no other slice of them lives.
    #[inline(always)]
    pub unsafe fn slice<'a>(self, row: usize, columns: Range<usize>) -> &'a mut [f32] {
        // SAFETY: the caller's promise.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.first.add(row * self.stride + columns.start),
                columns.len(),
            )
        }
    }
}

/// Memory that tasks share, each thread with a part of its own.
#[derive(Clone, Copy)]
pub(super) struct Memory {
    first: *mut u8,
    len: usize,
}

// SAFETY: parts are handed out by `part`, whose callers promise that they do not overlap.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// From the first line of the cache on.
    pub fn new(bytes: &mut [u8]) -> Self {
        let skip = bytes.as_ptr().align_offset(64).min(bytes.len());
        let bytes = &mut bytes[skip..];
        Self {
            first: bytes.as_mut_ptr(),
            len: bytes.len(),
        }
    }

    pub fn len(self) -> usize {
        self.len
    }

    /// Some numbers from a byte on, a multiple of 4.
    ///
    /// # Safety
    /// No other slice of them is written while this one lives, nor read where this one is written.
    pub unsafe fn floats<'a>(self, from: usize, count: usize) -> &'a mut [f32] {
        // SAFETY: in the memory, as `pointer` asserts, and aligned, as the memory's beginning is where it is not empty; any bytes are
        // numbers; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(from, count), count) }
    }

    /// Some numbers to read.
    ///
    /// # Safety
    /// Nobody writes them while the slice lives.
    pub unsafe fn numbers<'a>(self, from: usize, count: usize) -> &'a [f32] {
        // SAFETY: as in `floats`; of slices that are read there may be several.
        unsafe { std::slice::from_raw_parts(self.pointer(from, count), count) }
    }

    /// Where some numbers are.
    pub fn pointer(self, from: usize, count: usize) -> *mut f32 {
        assert!(from.is_multiple_of(4) && count <= self.len / 4 && from <= self.len - 4 * count);
        // SAFETY: in the memory, as was asserted.
        unsafe { self.first.add(from).cast() }
    }

    /// Some bytes to read.
    ///
    /// # Safety
    /// Nobody writes them while the slice lives.
    pub unsafe fn shared<'a>(self, from: usize, count: usize) -> &'a [u8] {
        assert!(count <= self.len && from <= self.len - count);
        // SAFETY: in the memory, as was asserted; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.first.add(from), count) }
    }

    /// Some bytes.
    ///
    /// # Safety
    /// As for [`floats`](Self::floats).
    pub unsafe fn bytes<'a>(self, from: usize, count: usize) -> &'a mut [u8] {
        assert!(count <= self.len && from <= self.len - count);
        // SAFETY: in the memory, as was asserted; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(from), count) }
    }
}

/// The next multiple of a line of the cache.
pub(super) fn lines(bytes: usize) -> usize {
    bytes.next_multiple_of(64)
}

/// Where `N` bytes from `at` on may be read: in `bytes`, or, where not as many are left, in a copy that zeros follow.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
pub(super) fn readable<const N: usize>(bytes: &[u8], at: usize, copy: &mut [u8; N]) -> *const u8 {
    match bytes.get(at..) {
        Some(rest) if rest.len() >= N => rest.as_ptr(),
        rest => copy_rest(rest.unwrap_or(&[]), copy),
    }
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[cold]
fn copy_rest<const N: usize>(rest: &[u8], copy: &mut [u8; N]) -> *const u8 {
    copy.fill(0);
    copy[..rest.len()].copy_from_slice(rest);
    copy.as_ptr()
}
