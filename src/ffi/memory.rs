//! Checks of the caller's pointers and buffers, as far as they can be checked.

use std::ffi::{CStr, c_char};
use std::ops::Range;
use std::sync::Arc;

use super::status::{ELORA_STATUS_INSUFFICIENT_SIZE, ELORA_STATUS_NULL_POINTER, Failure, Outcome};

fn null(name: &str) -> Failure {
    Failure::new(ELORA_STATUS_NULL_POINTER, format!("`{name}` is NULL"))
}

fn aligned<T>(pointer: *const T, name: &str) -> Outcome {
    if pointer.is_aligned() {
        return Ok(());
    }
    Err(Failure::argument(format!(
        "`{name}` is at {pointer:p}, which is no multiple of {}",
        align_of::<T>()
    )))
}

/// Returns a reference to a handle, or to another argument whose pointer must not be `NULL`.
///
/// # Safety
/// A pointer that is not `NULL` must point to a live `T`.
pub(super) unsafe fn required<'a, T>(pointer: *const T, name: &str) -> Outcome<&'a T> {
    if pointer.is_null() {
        return Err(null(name));
    }
    aligned(pointer, name)?;
    // SAFETY: the pointer is not NULL and is aligned, and the caller guarantees that the value is
    // alive.
    Ok(unsafe { &*pointer })
}

/// Adds a reference to a handle and returns it.
///
/// # Safety
/// A pointer that is not `NULL` must come from [`Arc::into_raw`] and must not have been freed.
pub(super) unsafe fn shared<T>(pointer: *const T, name: &str) -> Outcome<Arc<T>> {
    // SAFETY: `required` checked the pointer, and the caller guarantees that it came from
    // `Arc::into_raw`.
    unsafe {
        required(pointer, name)?;
        Arc::increment_strong_count(pointer);
        Ok(Arc::from_raw(pointer))
    }
}

/// Releases one reference to a handle. `NULL` is ignored.
///
/// # Safety
/// The requirements are those of [`shared`].
pub(super) unsafe fn free<T>(pointer: *const T) {
    if !pointer.is_null() {
        // SAFETY: the pointer is not NULL, and the caller guarantees that it came from
        // `Arc::into_raw`.
        drop(unsafe { Arc::from_raw(pointer) });
    }
}

/// A place for a result, checked before anything is computed.
pub(super) struct Out<T>(*mut T);

impl<T> Out<T> {
    /// A place that must not be `NULL`.
    pub fn required(pointer: *mut T, name: &str) -> Outcome<Self> {
        if pointer.is_null() {
            return Err(null(name));
        }
        aligned(pointer, name)?;
        Ok(Self(pointer))
    }

    /// A place that may be `NULL`.
    pub fn optional(pointer: *mut T, name: &str) -> Outcome<Self> {
        if !pointer.is_null() {
            aligned(pointer, name)?;
        }
        Ok(Self(pointer))
    }

    /// Writes the result unless the pointer is `NULL`.
    ///
    /// # Safety
    /// A pointer that is not `NULL` must point to writable memory for a `T`.
    pub unsafe fn write(self, value: T) {
        if !self.0.is_null() {
            // SAFETY: the pointer is not NULL and was checked for alignment; the caller guarantees
            // the memory.
            unsafe { self.0.write(value) }
        }
    }
}

fn count<T>(len: usize, name: &str) -> Outcome {
    match len.checked_mul(size_of::<T>()) {
        Some(bytes) if bytes <= isize::MAX as usize => Ok(()),
        _ => Err(Failure::argument(format!(
            "{len} elements of `{name}` are more than memory has"
        ))),
    }
}

/// Returns a buffer for reading. It may be `NULL` if it has no elements.
///
/// # Safety
/// A pointer that is not `NULL` must point to `len` elements that nothing writes while the slice is
/// in use.
pub(super) unsafe fn slice<'a, T>(pointer: *const T, len: usize, name: &str) -> Outcome<&'a [T]> {
    if len == 0 {
        return Ok(&[]);
    }
    if pointer.is_null() {
        return Err(null(name));
    }
    aligned(pointer, name)?;
    count::<T>(len, name)?;
    // SAFETY: NULL, alignment and length were checked; the caller guarantees the elements.
    Ok(unsafe { std::slice::from_raw_parts(pointer, len) })
}

/// Returns a buffer for writing. It may be `NULL` if it has no elements.
///
/// # Safety
/// A pointer that is not `NULL` must point to `len` elements that nothing else reads or writes
/// while the slice is in use.
pub(super) unsafe fn slice_mut<'a, T>(
    pointer: *mut T,
    len: usize,
    name: &str,
) -> Outcome<&'a mut [T]> {
    if len == 0 {
        return Ok(&mut []);
    }
    if pointer.is_null() {
        return Err(null(name));
    }
    aligned(pointer, name)?;
    count::<T>(len, name)?;
    // SAFETY: NULL, alignment and length were checked; the caller guarantees the elements.
    Ok(unsafe { std::slice::from_raw_parts_mut(pointer, len) })
}

/// Returns a string argument.
///
/// # Safety
/// A pointer that is not `NULL` must point to bytes that end in a NUL and that nothing writes while
/// the string is in use.
pub(super) unsafe fn text<'a>(pointer: *const c_char, name: &str) -> Outcome<&'a str> {
    if pointer.is_null() {
        return Err(null(name));
    }
    // SAFETY: the pointer is not NULL, and the caller guarantees the NUL at the end.
    let bytes = unsafe { CStr::from_ptr(pointer) };
    bytes
        .to_str()
        .map_err(|error| Failure::argument(format!("`{name}` is not UTF-8: {error}")))
}

/// Returns an array of string arguments. It may be `NULL` if it has no elements.
///
/// # Safety
/// The requirements of [`slice`], and those of [`text`] for each element.
pub(super) unsafe fn texts<'a>(
    pointer: *const *const c_char,
    len: usize,
    name: &str,
) -> Outcome<Vec<&'a str>> {
    // SAFETY: the caller meets the requirements of `slice`.
    let all = unsafe { slice(pointer, len, name)? };
    // SAFETY: the caller meets the requirements of `text`.
    let one = |(at, one): (usize, &*const c_char)| unsafe { text(*one, &format!("{name}[{at}]")) };
    all.iter().enumerate().map(one).collect()
}

/// Copies a text and a NUL to the caller's buffer. The length without the NUL is written even if
/// the buffer is too short.
///
/// # Safety
/// `buf` must be `NULL` or point to `cap` bytes. `len` must be `NULL` or point to a `size_t`.
pub(super) unsafe fn copy_text(
    text: &str,
    buf: *mut c_char,
    cap: usize,
    len: *mut usize,
) -> Outcome {
    let len = Out::optional(len, "len")?;
    let needed = text.len().saturating_add(1);
    // SAFETY: the caller guarantees `cap` bytes at `buf`, and `needed` was checked to be at most
    // `cap` before anything is copied.
    unsafe {
        if cap > 0 && buf.is_null() {
            return Err(null("buf"));
        }
        len.write(text.len());
        if cap < needed {
            return Err(short("buf", cap, needed));
        }
        std::ptr::copy_nonoverlapping(text.as_ptr(), buf.cast::<u8>(), text.len());
        buf.add(text.len()).write(0);
    }
    Ok(())
}

/// Copies elements to the caller's buffer. Their number is written even if the buffer is too short.
///
/// # Safety
/// `buf` must be `NULL` or point to `cap` elements. `len` must be `NULL` or point to a `size_t`.
pub(super) unsafe fn copy_elements<T: Copy>(
    from: &[T],
    buf: *mut T,
    cap: usize,
    len: *mut usize,
) -> Outcome {
    let len = Out::optional(len, "n")?;
    // SAFETY: the caller guarantees the memory at `buf` and `len`; `slice_mut` checks `buf` and
    // `cap`.
    unsafe {
        let to = slice_mut(buf, cap, "buf")?;
        len.write(from.len());
        match to.get_mut(..from.len()) {
            Some(to) => to.copy_from_slice(from),
            None => return Err(short("buf", cap, from.len())),
        }
    }
    Ok(())
}

/// The failure of a call whose buffer is too short.
pub(super) fn short(name: &str, found: usize, needed: impl std::fmt::Display) -> Failure {
    Failure::new(
        ELORA_STATUS_INSUFFICIENT_SIZE,
        format!("`{name}` has {found} elements, and {needed} are needed"),
    )
}

/// Refuses overlapping buffers before the library makes slices of them. Each is a name and its
/// [`region`].
pub(super) fn disjoint(buffers: &[(&str, Range<usize>)]) -> Outcome {
    for (index, (name, one)) in buffers.iter().enumerate() {
        for (other_name, other) in &buffers[..index] {
            if !one.is_empty()
                && !other.is_empty()
                && one.start < other.end
                && other.start < one.end
            {
                return Err(Failure::argument(format!(
                    "`{other_name}` and `{name}` overlap"
                )));
            }
        }
    }
    Ok(())
}

/// Returns the addresses of a buffer.
pub(super) fn region<T>(pointer: *const T, len: usize) -> Range<usize> {
    let start = pointer.addr();
    start..start.saturating_add(len.saturating_mul(size_of::<T>()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_that_touch_are_apart_and_those_that_share_a_byte_are_not() {
        let region =
            |start: usize, len: usize| region(std::ptr::without_provenance::<f32>(start), len);
        assert!(
            disjoint(&[
                ("a", region(64, 4)),
                ("b", region(80, 4)),
                ("c", region(32, 8))
            ])
            .is_ok()
        );
        let failure = disjoint(&[
            ("a", region(64, 4)),
            ("b", region(0, 1)),
            ("c", region(76, 4)),
        ])
        .unwrap_err();
        assert_eq!(failure.text, "`a` and `c` overlap");
        assert!(disjoint(&[("a", region(64, 4)), ("b", region(64, 0))]).is_ok());
        assert!(disjoint(&[("a", region(64, usize::MAX)), ("b", region(128, 1))]).is_err());
    }

    #[test]
    fn texts_are_copied_whole_or_not_at_all() {
        let (mut buf, mut len) = ([7 as c_char; 8], 0);
        // SAFETY: `cap` is at most the size of `buf`.
        unsafe {
            assert!(copy_text("räder", buf.as_mut_ptr(), 6, &mut len).is_err());
            assert_eq!((buf, len), ([7; 8], 6));
            copy_text("räder", buf.as_mut_ptr(), 7, std::ptr::null_mut()).unwrap();
            assert_eq!(CStr::from_ptr(buf.as_ptr()).to_str().unwrap(), "räder");
            assert_eq!(buf[7], 7);
        }
    }

    #[test]
    fn buffers_are_refused_by_pointer_and_size() {
        let values = [1.0f32; 4];
        let odd = values.as_ptr().cast::<u8>().wrapping_add(1).cast::<f32>();
        // SAFETY: the slices that would be read out of bounds are refused.
        unsafe {
            assert!(slice::<f32>(std::ptr::null(), 0, "x").unwrap().is_empty());
            assert!(slice::<f32>(std::ptr::null(), 1, "x").is_err());
            assert!(slice(odd, 2, "x").is_err());
            assert!(slice(values.as_ptr(), usize::MAX / 4, "x").is_err());
            assert_eq!(slice(values.as_ptr(), 4, "x").unwrap(), values);
        }
    }
}
