//! Sizes of memory, and reading near its end.

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
