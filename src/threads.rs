//! Makes rayon's global pool smaller where the operating system does not start as many threads as
//! it asks for: it would end the program.

use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use crate::error::{Error, Result};

/// Threads that are tried beyond those that are needed, because a thread that has ended is counted
/// for a moment.
const SPARE: usize = 2;

/// Prepares the pool, if no call before has done so. Functions call it that come before work on
/// several threads: opening files, making models, encoding text, searches.
///
/// # Errors
/// Returns [`Error::NoThreads`] if not one thread can be started. A later call tries it again.
pub(crate) fn ready() -> Result<()> {
    static DONE: Mutex<bool> = Mutex::new(false);
    let mut done = DONE.lock().unwrap_or_else(PoisonError::into_inner);
    if !*done {
        prepare()?;
        *done = true;
    }
    Ok(())
}

fn prepare() -> Result<()> {
    let wanted = wanted();
    let started = start(wanted.saturating_add(SPARE))?;
    // A pool that starts as usual is left to start when it is used.
    if started < wanted.saturating_add(SPARE) {
        std::thread::sleep(Duration::from_millis(50));
        let threads = started.saturating_sub(SPARE).clamp(1, wanted);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        if let Err(error) = pool.build_global() {
            // Without a cause, the program has made a pool of its own before.
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            return cause.map_or(Ok(()), |cause| {
                Err(Error::NoThreads {
                    source: std::io::Error::other(cause),
                })
            });
        }
    }
    Ok(())
}

/// Number of threads that rayon starts.
fn wanted() -> usize {
    let set = std::env::var("RAYON_NUM_THREADS").ok();
    let set = set.and_then(|n| n.parse().ok()).filter(|n| *n > 0);
    let available = || std::thread::available_parallelism().map_or(1, usize::from);
    set.unwrap_or_else(available).min(rayon::max_num_threads())
}

/// Starts up to `n` threads at a time, ends them, and returns how many there were.
fn start(n: usize) -> Result<usize> {
    let state = (Mutex::new(false), Condvar::new());
    let state = std::sync::Arc::new(state);
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    let mut failed = None;
    for _ in 0..n {
        let state = state.clone();
        let wait = move || {
            let (over, changed) = &*state;
            let over = over.lock().unwrap_or_else(PoisonError::into_inner);
            drop(changed.wait_while(over, |over| !*over));
        };
        match Builder::new().spawn(wait) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                failed = Some(error);
                break;
            }
        }
    }
    *state.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
    state.1.notify_all();
    let started = threads.len();
    for thread in threads {
        // They do not panic.
        let _ = thread.join();
    }
    match failed {
        Some(source) if started == 0 => Err(Error::NoThreads { source }),
        _ => Ok(started),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_counted() {
        assert_eq!(start(5).unwrap(), 5);
        assert!(wanted() > 0);
        ready().unwrap();
        ready().unwrap();
    }
}
