//! Structs that grow: the caller says how large its own is.
//!
//! A field is only ever added at the end, without padding before it, so that a program that was compiled with an
//! older header gives a prefix, and one with a newer header more than is known here.

use super::status::{ELORA_STATUS_NULL_POINTER, ELORA_STATUS_UNSUPPORTED, Failure, Outcome};

/// More than any version of these structs will have: a size over it was never set.
const LARGEST: usize = 4096;

/// A struct of the header that begins with its own size.
///
/// # Safety
/// `repr(C)`, the first field a `usize` that is the struct's size, no padding, and every pattern of bits a value of every
/// field.
pub(super) unsafe trait Growing: Copy {
    /// Its name in C.
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

/// What the caller's struct says; `default` where it says nothing.
///
/// # Safety
/// `pointer` is `NULL` or to as many bytes as its first field says, or to a `size_t` at least.
pub(super) unsafe fn read<T: Growing>(pointer: *const T, default: T) -> Outcome<T> {
    if pointer.is_null() {
        return Ok(default);
    }
    let mut value = default;
    // SAFETY: as asked of the caller; `T` takes any bits.
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

/// Writes as much of `value` as the caller's struct has room for; what is unknown here becomes 0. The size stays the
/// caller's.
///
/// # Safety
/// `pointer` is `NULL` or to `struct_size` bytes.
pub(super) unsafe fn write<T: Growing>(pointer: *mut T, struct_size: usize, value: T) -> Outcome {
    if pointer.is_null() {
        return Err(null::<T>());
    }
    let found = size::<T>(struct_size)?;
    let known = found.min(size_of::<T>());
    // SAFETY: as asked of the caller.
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

/// [`write`], with the size that stands in the struct.
///
/// # Safety
/// `pointer` is `NULL` or to as many bytes as its first field says, or to a `size_t` at least.
pub(super) unsafe fn fill<T: Growing>(
    pointer: *mut T,
    value: impl FnOnce() -> Outcome<T>,
) -> Outcome {
    if pointer.is_null() {
        return Err(null::<T>());
    }
    // SAFETY: as asked of the caller.
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

    // SAFETY: integers, the first of which is the size; no padding.
    unsafe impl Growing for Small {
        const NAME: &'static str = "small";
    }
    // SAFETY: as above.
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
        // SAFETY: each is as long as its first field says.
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
