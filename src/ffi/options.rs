//! Versioned structs, whose first field is the size that the caller compiled.
//!
//! Fields are only added at the end, without padding before them. A program compiled with an older
//! header therefore passes a prefix of the struct, and one with a newer header passes more than
//! this version knows.

use super::status::{ELORA_STATUS_NULL_POINTER, ELORA_STATUS_UNSUPPORTED, Failure, Outcome};

/// Upper limit of `struct_size`. A larger value means that the caller never set it.
const LARGEST: usize = 4096;

/// A struct of the header that begins with its own size.
///
/// # Safety
/// The type must be `repr(C)` without padding, its first field must be a `usize` that holds the
/// struct's size, and every bit pattern must be valid for every field.
pub(super) unsafe trait Growing: Copy {
    /// The name of the struct in C.
    const NAME: &'static str;
}

fn size<T: Growing>(found: usize) -> Outcome<usize> {
    if (size_of::<usize>()..=LARGEST).contains(&found) {
        return Ok(found);
    }
    Err(Failure::argument(format!(
        "`struct_size` of {} is {found}: set it to sizeof of the struct",
        T::NAME
    )))
}

fn null<T: Growing>() -> Failure {
    Failure::new(ELORA_STATUS_NULL_POINTER, format!("{} is NULL", T::NAME))
}

/// Reads the caller's struct. Fields that the caller's version lacks have the values of `default`,
/// and so have all fields if `pointer` is `NULL`.
///
/// # Safety
/// `pointer` must be `NULL` or point to as many bytes as its first field states, and at least to a
/// `size_t`.
pub(super) unsafe fn read<T: Growing>(pointer: *const T, default: T) -> Outcome<T> {
    if pointer.is_null() {
        return Ok(default);
    }
    let mut value = default;
    // SAFETY: the caller guarantees `found` bytes; at most `size_of::<T>()` of them are copied, and
    // `T` is valid for any bits.
    unsafe {
        let found = size::<T>(pointer.cast::<usize>().read_unaligned())?;
        let known = found.min(size_of::<T>());
        std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), (&raw mut value).cast::<u8>(), known);
        let unknown = std::slice::from_raw_parts(pointer.cast::<u8>().add(known), found - known);
        if unknown.iter().any(|byte| *byte != 0) {
            let text = format!(
                "{} of {found} bytes sets fields that this version does not know",
                T::NAME
            );
            return Err(Failure::new(ELORA_STATUS_UNSUPPORTED, text));
        }
    }
    Ok(value)
}

/// Writes as much of `value` as the caller's struct has room for. Bytes of unknown fields become 0,
/// and `struct_size` keeps the caller's value.
///
/// # Safety
/// `pointer` must be `NULL` or point to `struct_size` bytes.
pub(super) unsafe fn write<T: Growing>(pointer: *mut T, struct_size: usize, value: T) -> Outcome {
    if pointer.is_null() {
        return Err(null::<T>());
    }
    let found = size::<T>(struct_size)?;
    let known = found.min(size_of::<T>());
    // SAFETY: the pointer is not NULL, and the caller guarantees `found` bytes.
    unsafe {
        std::ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), pointer.cast::<u8>(), known);
        pointer
            .cast::<u8>()
            .add(known)
            .write_bytes(0, found - known);
        pointer.cast::<usize>().write_unaligned(found);
    }
    Ok(())
}

/// Writes like [`write()`], with the size from the struct's first field.
///
/// # Safety
/// `pointer` must be `NULL` or point to as many bytes as its first field states, and at least to a
/// `size_t`.
pub(super) unsafe fn fill<T: Growing>(
    pointer: *mut T,
    value: impl FnOnce() -> Outcome<T>,
) -> Outcome {
    if pointer.is_null() {
        return Err(null::<T>());
    }
    // SAFETY: the pointer is not NULL, and the caller guarantees as many bytes as the first field
    // states.
    unsafe {
        let found = size::<T>(pointer.cast::<usize>().read_unaligned())?;
        write(pointer, found, value()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Small {
        struct_size: usize,
        a: u64,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Large {
        struct_size: usize,
        a: u64,
        b: u64,
    }

    // SAFETY: `repr(C)` integers, the first of which is the size; no padding.
    unsafe impl Growing for Small {
        const NAME: &'static str = "small";
    }
    // SAFETY: `repr(C)` integers, the first of which is the size; no padding.
    unsafe impl Growing for Large {
        const NAME: &'static str = "large";
    }

    #[test]
    fn an_older_and_a_newer_header_are_understood() {
        let default = Large {
            struct_size: size_of::<Large>(),
            a: 1,
            b: 2,
        };
        let old = Small {
            struct_size: size_of::<Small>(),
            a: 5,
        };
        let new = Large {
            struct_size: size_of::<Large>(),
            a: 5,
            b: 0,
        };
        // SAFETY: each struct is as long as its first field states, or as the size passed to
        // `write`.
        unsafe {
            let read_old = read((&raw const old).cast::<Large>(), default).unwrap();
            assert_eq!((read_old.a, read_old.b), (5, 2));
            let small = Small {
                struct_size: 0,
                a: 9,
            };
            assert_eq!(read((&raw const new).cast::<Small>(), small).unwrap().a, 5);
            let unknown = Large { b: 1, ..new };
            assert_eq!(
                read((&raw const unknown).cast::<Small>(), small)
                    .unwrap_err()
                    .status,
                ELORA_STATUS_UNSUPPORTED
            );
            assert!(read(&raw const small, small).is_err());
            let mut out = Large {
                struct_size: 0,
                a: 7,
                b: 7,
            };
            write((&raw mut out).cast::<Small>(), size_of::<Large>(), old).unwrap();
            assert_eq!(
                out,
                Large {
                    struct_size: size_of::<Large>(),
                    a: 5,
                    b: 0
                }
            );
            let mut out = Large {
                struct_size: size_of::<Small>(),
                a: 7,
                b: 7,
            };
            fill(&raw mut out, || Ok(new)).unwrap();
            assert_eq!(
                out,
                Large {
                    struct_size: size_of::<Small>(),
                    a: 5,
                    b: 7
                }
            );
        }
    }
}
