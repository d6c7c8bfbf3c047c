//! What a call says: a status, and a text for people.

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
/// Counts the breaks of binary compatibility; compare with elora_abi_version().
pub const ELORA_ABI_VERSION: u32 = 0;

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

/// Outcome of a call: ELORA_STATUS_OK or the kind of failure. Numbers are never reused; take one that you do not know
/// for a failure.
pub type elora_status = i32;

/// Success.
pub const ELORA_STATUS_OK: elora_status = 0;
/// A pointer that must not be NULL is.
pub const ELORA_STATUS_NULL_POINTER: elora_status = 1;
/// An argument is out of its range: a size, an index, an enumerator, a string that is not UTF-8, buffers that overlap.
pub const ELORA_STATUS_INVALID_ARGUMENT: elora_status = 2;
/// A buffer is too short for what would be written to it.
pub const ELORA_STATUS_INSUFFICIENT_SIZE: elora_status = 3;
/// The operating system refused to read or write a file.
pub const ELORA_STATUS_IO: elora_status = 4;
/// A file is damaged, or not what it should be.
pub const ELORA_STATUS_INVALID_FORMAT: elora_status = 5;
/// The file or request is well-formed, but this library does not implement it.
pub const ELORA_STATUS_UNSUPPORTED: elora_status = 6;
/// There is nothing of that name.
pub const ELORA_STATUS_NOT_FOUND: elora_status = 7;
/// The handle is not in a state for this call, as a session with tokens when its subnet is to change.
pub const ELORA_STATUS_INVALID_STATE: elora_status = 8;
/// The caller's callback asked to stop.
pub const ELORA_STATUS_CANCELLED: elora_status = 9;
/// The session has no room for so many tokens.
pub const ELORA_STATUS_CONTEXT_FULL: elora_status = 10;
/// The system gave no memory.
pub const ELORA_STATUS_OUT_OF_MEMORY: elora_status = 11;
/// A bug in the library. The process goes on; free the handle, and do not use it again.
pub const ELORA_STATUS_PANIC: elora_status = 100;

/// A failed call: what it returns, and what it says.
#[derive(Debug)]
pub(super) struct Failure {
    pub status: elora_status,
    pub text: String,
}

/// What the body of a call gives.
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
            Error::Io { .. } => ELORA_STATUS_IO,
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
            | Error::Tokenizer { .. } => ELORA_STATUS_INVALID_FORMAT,
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

/// Keeps the text of a failed call for its thread. A thread that is ending has nowhere to keep it.
pub(super) fn remember(text: String) {
    // The old text is dropped after the borrow.
    let _old = LAST.try_with(|last| {
        last.try_borrow_mut()
            .map(|mut last| std::mem::replace(&mut *last, text))
    });
}

/// The name of a status, such as "ELORA_STATUS_OK"; "unknown status" for a number that this library does not know.
/// Static, never NULL.
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

/// Copies the text of this thread's last failed call to `buf`, with a NUL, and writes its length without the NUL to
/// `*len`; an empty text before the first failure. Calls that succeed leave it as it is, and so does this one.
///
/// `buf` may be NULL where `cap` is 0, and `len` may be NULL. ELORA_STATUS_INSUFFICIENT_SIZE, with nothing written to
/// `buf` but the length to `*len`, where `cap` is less than the length plus 1.
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
        // SAFETY: as the header asks of the caller.
        unsafe { memory::copy_text(&text.unwrap_or_default(), buf, cap, len) }
    })
}

/// ELORA_ABI_VERSION of the library that is linked: a program must not go on if it differs from that of its header.
#[unsafe(no_mangle)]
pub extern "C" fn elora_abi_version() -> u32 {
    ELORA_ABI_VERSION
}

/// Version of the library that is linked, such as "0.1.0". Static, never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn elora_version() -> *const c_char {
    const TEXT: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    TEXT.as_ptr().cast()
}
