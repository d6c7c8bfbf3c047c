//! Functions for the tests of the ABI. They are built only with `--cfg elastic_lora_test_hooks` and
//! are not in the header.

use super::guard;
use super::memory;
use super::session::elora_session;
use super::status::elora_status;

/// Panics inside a call.
#[unsafe(no_mangle)]
pub extern "C" fn elora_test_panic() -> elora_status {
    guard::status(|| panic!("asked for by elora_test_panic"))
}

/// Panics inside a call that uses a session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_test_panic_in_session(session: *mut elora_session) -> elora_status {
    // SAFETY: the caller meets the requirements of every function that takes a session.
    guard::status(|| unsafe {
        memory::required(session.cast_const(), "session")?
            .with(|_| panic!("asked for by elora_test_panic_in_session"))
    })
}
