//! Calls of code that may panic, whose panics become errors and print nothing.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook, take_hook};
use std::sync::{Arc, Mutex, PoisonError};

type Hook = Box<dyn Fn(&PanicHookInfo<'_>) + Send + Sync>;

thread_local! {
    /// Whether panics of this thread are caught by [`quietly`].
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// The hook of the host while calls run, and what tells this module's own hook from others.
struct Replaced {
    calls: usize,
    host: Option<(Arc<Hook>, usize)>,
}

static REPLACED: Mutex<Replaced> = Mutex::new(Replaced {
    calls: 0,
    host: None,
});

/// Returns what tells a hook from others that exist at the same time.
fn address(hook: &Hook) -> usize {
    std::ptr::from_ref(&**hook).cast::<()>().addr()
}

/// While it lives, panics of this thread print nothing. Those of other threads reach the hook that
/// the host had set. That hook is put back in its place when the last one is dropped, unless the
/// host has set another one in the meantime.
struct Quiet {
    before: bool,
}

impl Quiet {
    /// Returns `None` if hooks cannot be changed, because this thread is panicking.
    fn new() -> Option<Self> {
        if std::thread::panicking() {
            return None;
        }
        let mut replaced = REPLACED.lock().unwrap_or_else(PoisonError::into_inner);
        if replaced.calls == 0 {
            let host = Arc::new(take_hook());
            let other = host.clone();
            let hook: Hook = Box::new(move |info| {
                // A thread that ends has no variables any more.
                if !QUIET.try_with(Cell::get).unwrap_or(false) {
                    other(info);
                }
            });
            replaced.host = Some((host, address(&hook)));
            set_hook(hook);
        }
        replaced.calls += 1;
        let before = QUIET.with(|quiet| quiet.replace(true));
        Some(Self { before })
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        QUIET.with(|quiet| quiet.set(self.before));
        let mut replaced = REPLACED.lock().unwrap_or_else(PoisonError::into_inner);
        replaced.calls -= 1;
        if replaced.calls > 0 {
            return;
        }
        let Some((host, own)) = replaced.host.take() else {
            return;
        };
        let current = take_hook();
        if address(&current) != own {
            // The host's new hook.
            set_hook(current);
            return;
        }
        drop(current);
        set_hook(match Arc::try_unwrap(host) {
            Ok(hook) => hook,
            Err(shared) => Box::new(move |info| shared(info)),
        });
    }
}

/// Calls `call` and returns the text of its panic, if it panics, as an error. Nothing is printed.
pub(crate) fn quietly<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    let quiet = Quiet::new();
    let result = catch_unwind(AssertUnwindSafe(call));
    drop(quiet);
    result.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        text.unwrap_or("no message").to_string()
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// The only test that sets hooks: they are the whole process's.
    #[test]
    fn panics_print_nothing_and_the_hosts_hook_stays() {
        static SEEN: AtomicUsize = AtomicUsize::new(0);
        // Changes the hook while no call runs: other tests may tokenize at the same time.
        let exchange = |hook: Hook| loop {
            let replaced = REPLACED.lock().unwrap();
            if replaced.calls == 0 {
                let old = take_hook();
                set_hook(hook);
                return old;
            }
            drop(replaced);
            std::thread::sleep(std::time::Duration::from_millis(1));
        };
        let start = "hook test".to_string();
        let own: Hook = Box::new(move |info| {
            let text = info.payload().downcast_ref::<String>();
            if text.is_some_and(|text| text.starts_with(&start)) {
                SEEN.fetch_add(1, Ordering::SeqCst);
            }
        });
        let placed = address(&own);
        let original = exchange(own);
        let number = 7;
        let panics = move || panic!("hook test {number}");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let error = quietly(panics).unwrap_err();
                        assert_eq!(error, "hook test 7");
                        let nested = quietly(|| quietly(panics).unwrap_err());
                        assert_eq!(nested.unwrap(), "hook test 7");
                    }
                });
            }
        });
        assert_eq!(SEEN.load(Ordering::SeqCst), 0);
        // A panic of another thread is seen while a call runs.
        quietly(|| {
            let other = std::thread::spawn(panics);
            assert!(other.join().is_err());
        })
        .unwrap();
        assert_eq!(SEEN.load(Ordering::SeqCst), 1);
        let own = exchange(original);
        assert_eq!(address(&own), placed);
    }
}
