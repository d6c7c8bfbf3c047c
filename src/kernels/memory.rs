//! Memory sizes, and safe reads near the end of a buffer.

/// Rounds a number of bytes up to a multiple of the cache line size.
pub(super) fn lines(bytes: usize) -> usize {
    bytes.next_multiple_of(64)
}

/// Returns a pointer from which `N` bytes may be read, beginning at `at`: into `bytes` itself, or,
/// if fewer than `N` bytes are left, into `copy`, which holds the remaining bytes followed by
/// zeros.
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
