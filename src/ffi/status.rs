//! The outcome of a call: a status and an error text.

use std::cell::RefCell;
use std::ffi::{CStr, c_char};

use super::guard;
use super::memory;
use crate::error::Error;

/// Major version of the library that this header belongs to.
pub const ELORA_VERSION_MAJOR: u32 = 0;
/// Minor version of the library that this header belongs to.
pub const ELORA_VERSION_MINOR: u32 = 1;
/// Patch version of the library that this header belongs to.
pub const ELORA_VERSION_PATCH: u32 = 0;
/// Version of the binary interface. Within a version, functions, constants and types are only added,
/// and structs only grow at their end: a program runs with any library of the same version that is
/// at least as new as its header. Compare it with elora_abi_version().
pub const ELORA_ABI_VERSION: u32 = 1;

// The header has the version of the crate.
const _: () = {
    const fn number(text: &str) -> u32 {
        match u32::from_str_radix(text, 10) {
            Ok(number) => number,
            Err(_) => u32::MAX,
        }
    }
    assert!(ELORA_VERSION_MAJOR == number(env!("CARGO_PKG_VERSION_MAJOR")));
    assert!(ELORA_VERSION_MINOR == number(env!("CARGO_PKG_VERSION_MINOR")));
    assert!(ELORA_VERSION_PATCH == number(env!("CARGO_PKG_VERSION_PATCH")));
};

/// Outcome of a call: ELORA_STATUS_OK or another ELORA_STATUS_ constant. Numbers are never reused.
/// Treat an unknown number as a failure.
pub type elora_status = i32;

/// Success.
pub const ELORA_STATUS_OK: elora_status = 0;
/// A pointer that must not be NULL is NULL.
pub const ELORA_STATUS_NULL_POINTER: elora_status = 1;
/// An argument is out of its range: a size, an index, an enumerator, a string that is not UTF-8, or
/// buffers that overlap.
pub const ELORA_STATUS_INVALID_ARGUMENT: elora_status = 2;
/// A buffer is too short for its contents.
pub const ELORA_STATUS_INSUFFICIENT_SIZE: elora_status = 3;
/// The operating system could not read or write a file.
pub const ELORA_STATUS_IO: elora_status = 4;
/// A file is damaged or does not have the expected format.
pub const ELORA_STATUS_INVALID_FORMAT: elora_status = 5;
/// The file or request is valid, but this library does not support it.
pub const ELORA_STATUS_UNSUPPORTED: elora_status = 6;
/// No item has the given name.
pub const ELORA_STATUS_NOT_FOUND: elora_status = 7;
/// The handle's state does not allow this call, such as changing the subnet of a session that holds
/// tokens.
pub const ELORA_STATUS_INVALID_STATE: elora_status = 8;
/// The caller's callback stopped the call.
pub const ELORA_STATUS_CANCELLED: elora_status = 9;
/// The session has no room for the tokens.
pub const ELORA_STATUS_CONTEXT_FULL: elora_status = 10;
/// Memory could not be allocated.
pub const ELORA_STATUS_OUT_OF_MEMORY: elora_status = 11;
/// A bug in the library. The process continues. Free the handle that was used and do not use it
/// otherwise; a session refuses further calls with ELORA_STATUS_INVALID_STATE.
pub const ELORA_STATUS_PANIC: elora_status = 100;

/// A failed call: its status and its error text.
#[derive(Debug)]
pub(super) struct Failure {
    pub status: elora_status,
    pub text: String,
}

/// Result of the body of a call.
pub(super) type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    pub fn new(status: elora_status, text: impl Into<String>) -> Self {
        Self {
            status,
            text: text.into(),
        }
    }

    pub fn argument(text: impl Into<String>) -> Self {
        Self::new(ELORA_STATUS_INVALID_ARGUMENT, text)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::Io { .. } | Error::NoThreads { .. } => ELORA_STATUS_IO,
            Error::Json { .. }
            | Error::InvalidFile { .. }
            | Error::MissingTensor { .. }
            | Error::TensorShape { .. }
            | Error::TensorDtype { .. }
            | Error::NotFinite { .. }
            | Error::OffGrid { .. }
            | Error::TensorOverflow { .. }
            | Error::InvalidConfig { .. }
            | Error::InvalidSpace { .. }
            | Error::Tokenizer { .. }
            | Error::Template { .. } => ELORA_STATUS_INVALID_FORMAT,
            Error::UnsupportedArchitecture { .. } | Error::Unsupported { .. } => {
                ELORA_STATUS_UNSUPPORTED
            }
            Error::UnknownLayer { .. }
            | Error::UnknownGroup { .. }
            | Error::UnknownSubnet { .. } => ELORA_STATUS_NOT_FOUND,
            Error::InvalidState { .. } | Error::HasAdapter { .. } | Error::ZerosLost { .. } => {
                ELORA_STATUS_INVALID_STATE
            }
            Error::SequenceTooLong { .. } => ELORA_STATUS_CONTEXT_FULL,
            Error::OutOfMemory { .. } => ELORA_STATUS_OUT_OF_MEMORY,
            Error::Interrupted { .. } => ELORA_STATUS_CANCELLED,
            _ => ELORA_STATUS_INVALID_ARGUMENT,
        };
        Self::new(status, error.to_string())
    }
}

thread_local! {
    static LAST: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Stores the text of a failed call for its thread. If the thread is ending, the text is dropped.
pub(super) fn remember(text: String) {
    // The old text is dropped after the borrow ends.
    let _old = LAST.try_with(|last| {
        last.try_borrow_mut()
            .map(|mut last| std::mem::replace(&mut *last, text))
    });
}

/// Name of a status, such as "ELORA_STATUS_OK", or "unknown status" for a number that this library
/// does not know. The string is static and never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn elora_status_name(status: elora_status) -> *const c_char {
    let name: &CStr = match status {
        ELORA_STATUS_OK => c"ELORA_STATUS_OK",
        ELORA_STATUS_NULL_POINTER => c"ELORA_STATUS_NULL_POINTER",
        ELORA_STATUS_INVALID_ARGUMENT => c"ELORA_STATUS_INVALID_ARGUMENT",
        ELORA_STATUS_INSUFFICIENT_SIZE => c"ELORA_STATUS_INSUFFICIENT_SIZE",
        ELORA_STATUS_IO => c"ELORA_STATUS_IO",
        ELORA_STATUS_INVALID_FORMAT => c"ELORA_STATUS_INVALID_FORMAT",
        ELORA_STATUS_UNSUPPORTED => c"ELORA_STATUS_UNSUPPORTED",
        ELORA_STATUS_NOT_FOUND => c"ELORA_STATUS_NOT_FOUND",
        ELORA_STATUS_INVALID_STATE => c"ELORA_STATUS_INVALID_STATE",
        ELORA_STATUS_CANCELLED => c"ELORA_STATUS_CANCELLED",
        ELORA_STATUS_CONTEXT_FULL => c"ELORA_STATUS_CONTEXT_FULL",
        ELORA_STATUS_OUT_OF_MEMORY => c"ELORA_STATUS_OUT_OF_MEMORY",
        ELORA_STATUS_PANIC => c"ELORA_STATUS_PANIC",
        _ => c"unknown status",
    };
    name.as_ptr()
}

/// Copies the error text of this thread's last failed call, with a terminating NUL, to `buf`, a
/// buffer of `cap` bytes. Writes the length of the text without the NUL to `*len`. The text is
/// empty before the first failure. Calls that succeed do not change it, and neither does this one.
///
/// `buf` may be NULL if `cap` is 0, and `len` may be NULL. ELORA_STATUS_INSUFFICIENT_SIZE if `cap`
/// is less than the length plus 1; then only `*len` is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_last_error(
    buf: *mut c_char,
    cap: usize,
    len: *mut usize,
) -> elora_status {
    // A failure of this call must not replace the text that was asked for.
    guard::silent(|| {
        let text = LAST.try_with(|last| {
            last.try_borrow()
                .map(|text| text.clone())
                .unwrap_or_default()
        });
        // SAFETY: the caller meets the requirements stated in the header.
        unsafe { memory::copy_text(&text.unwrap_or_default(), buf, cap, len) }
    })
}

/// ELORA_ABI_VERSION of the linked library. A program must stop if it differs from the header's
/// ELORA_ABI_VERSION.
#[unsafe(no_mangle)]
pub extern "C" fn elora_abi_version() -> u32 {
    ELORA_ABI_VERSION
}

/// Version of the linked library, such as "0.1.0". The string is static and never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn elora_version() -> *const c_char {
    const TEXT: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    TEXT.as_ptr().cast()
}
