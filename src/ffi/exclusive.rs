//! Handles that one thread at a time may use.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU8, Ordering};

use super::status::{ELORA_STATUS_INVALID_STATE, Failure, Outcome};

const IDLE: u8 = 0;
const BUSY: u8 = 1;
/// A call panicked and may have left the value in an inconsistent state.
const BROKEN: u8 = 2;

/// A value that one call at a time may use. Others are refused.
pub(super) struct Exclusive<T> {
    /// One of [`IDLE`], [`BUSY`] and [`BROKEN`].
    state: AtomicU8,
    /// What the value is called in error texts.
    name: &'static str,
    inner: UnsafeCell<T>,
}

// SAFETY: the inner value is accessed only through an `Entered`, and `enter` admits one thread at a
// time. It may then be used by a thread other than the one that made it, so it must be `Send`.
unsafe impl<T: Send> Sync for Exclusive<T> {}

/// Exclusive access to a value. If it is dropped before [`leave`](Self::leave), the call panicked.
pub(super) struct Entered<'a, T> {
    of: &'a Exclusive<T>,
    next: u8,
}

impl<T> Exclusive<T> {
    pub fn new(name: &'static str, value: T) -> Self {
        Self {
            state: AtomicU8::new(IDLE),
            name,
            inner: UnsafeCell::new(value),
        }
    }

    pub fn enter(&self) -> Outcome<Entered<'_, T>> {
        let name = self.name;
        match self
            .state
            .compare_exchange(IDLE, BUSY, Ordering::Acquire, Ordering::Relaxed)
        {
            Ok(_) => Ok(Entered {
                of: self,
                next: BROKEN,
            }),
            Err(BUSY) => Err(Failure::new(
                ELORA_STATUS_INVALID_STATE,
                format!(
                    "the {name} is in another call: one thread at a time, and not from its own \
                     callback"
                ),
            )),
            Err(_) => Err(Failure::new(
                ELORA_STATUS_INVALID_STATE,
                format!("a call of this {name} ended in ELORA_STATUS_PANIC: free it"),
            )),
        }
    }

    /// Runs a call with exclusive access.
    pub fn with<R>(&self, body: impl FnOnce(&mut T) -> Outcome<R>) -> Outcome<R> {
        let mut entered = self.enter()?;
        let outcome = body(entered.get());
        entered.leave();
        outcome
    }
}

impl<T> Entered<'_, T> {
    pub fn get(&mut self) -> &mut T {
        // SAFETY: `enter` changed the state from idle to busy, so no other call has access.
        unsafe { &mut *self.of.inner.get() }
    }

    pub fn leave(&mut self) {
        self.next = IDLE;
    }
}

impl<T> Drop for Entered<'_, T> {
    fn drop(&mut self) {
        self.of.state.store(self.next, Ordering::Release);
    }
}
