//! Entry guards of the exported functions: the body of every call runs here, and each error or
//! panic leaves as a status.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::status::{
    ELORA_STATUS_OK, ELORA_STATUS_PANIC, Failure, Outcome, elora_status, remember,
};

/// Runs a call that returns a status.
pub(super) fn status(body: impl FnOnce() -> Outcome) -> elora_status {
    finish(run(body)).map_or_else(|status| status, |()| ELORA_STATUS_OK)
}

/// Runs a call that returns a value, or `failed` if it fails. The caller then learns the reason
/// only from the thread's error text.
pub(super) fn value<T>(failed: T, body: impl FnOnce() -> Outcome<T>) -> T {
    finish(run(body)).unwrap_or(failed)
}

/// Runs a call like [`status`], but keeps the thread's error text.
pub(super) fn silent(body: impl FnOnce() -> Outcome) -> elora_status {
    run(body).map_or_else(|failure| failure.status, |()| ELORA_STATUS_OK)
}

/// Runs a call that returns nothing and fails only by a bug.
pub(super) fn quiet(body: impl FnOnce()) {
    value((), || {
        body();
        Ok(())
    });
}

fn run<T>(body: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    // A panic can leave only a session in an inconsistent state, and a session that panicked is
    // refused in later calls.
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| Err(of_panic(panic)))
}

fn finish<T>(outcome: Outcome<T>) -> Result<T, elora_status> {
    outcome.map_err(|failure| {
        remember(failure.text);
        failure.status
    })
}

#[cold]
fn of_panic(panic: Box<dyn Any + Send>) -> Failure {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    let failure = Failure::new(ELORA_STATUS_PANIC, format!("a bug in elastic-lora: {text}"));
    // Dropping the payload may panic again.
    if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
        std::mem::forget(again);
    }
    failure
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_a_status_whatever_it_carries() {
        struct Worse;
        impl Drop for Worse {
            fn drop(&mut self) {
                panic!("again");
            }
        }
        assert_eq!(status(|| panic!("one {}", 1)), ELORA_STATUS_PANIC);
        assert_eq!(status(|| std::panic::panic_any(Worse)), ELORA_STATUS_PANIC);
        assert_eq!(value(7, || panic!("two")), 7);
        assert_eq!(status(|| Ok(())), ELORA_STATUS_OK);
    }
}
