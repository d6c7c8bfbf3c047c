//! A thread pool for the kernels. Waiting threads first spin for about as long as a running model
//! takes to submit its next piece of work, then sleep.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};

/// Number of rounds that a thread spins before it sleeps. One round takes some tens of nanoseconds.
const SPINS: usize = 4000;

/// A job that several threads run together. It is called with the number of the thread.
type Job = *const (dyn Fn(usize) + Sync);

/// Layout of the state. The lower half holds whether the job may be joined (`OPEN`) and how many
/// threads have joined it (`JOINED`). The upper half is the number of the job.
const OPEN: u64 = 1 << 31;
const JOINED: u64 = OPEN - 1;
const NEXT: u64 = 1 << 32;

struct State {
    /// See [`OPEN`] for the layout.
    state: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    /// Set by the caller whose job runs.
    busy: AtomicBool,
    asleep: Vec<AtomicBool>,
    ended: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written only by the thread that holds `busy`, while the state is not open and no
// thread has joined. It is read only by threads that have joined. The job is `Sync`, so it may be
// called from any thread.
unsafe impl Sync for State {}
// SAFETY: the pointer is only used as described above.
unsafe impl Send for State {}

impl State {
    fn work(&self, number: usize) {
        let mut last = 0;
        let mut spins = 0;
        loop {
            let state = self.state.load(Ordering::Acquire);
            if state & OPEN != 0 && state / NEXT != last {
                let joined = self.state.compare_exchange_weak(
                    state,
                    state + 1,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
                if joined.is_ok() {
                    last = state / NEXT;
                    spins = 0;
                    self.take_part(number);
                    self.state.fetch_sub(1, Ordering::Release);
                }
                continue;
            }
            if self.ended.load(Ordering::Acquire) {
                return;
            }
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
                continue;
            }
            // The thread that opens a job reads `asleep` after it has opened it. Therefore at least
            // one of the two threads sees what the other wrote.
            self.asleep[number - 1].store(true, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            let state = self.state.load(Ordering::SeqCst);
            if !(state & OPEN != 0 && state / NEXT != last || self.ended.load(Ordering::SeqCst)) {
                std::thread::park();
            }
            self.asleep[number - 1].store(false, Ordering::SeqCst);
            spins = 0;
        }
    }

    fn take_part(&self, number: usize) {
        // SAFETY: this thread has joined, so the job was written before and stays valid until the
        // thread leaves.
        let Some(job) = (unsafe { *self.job.get() }) else {
            return;
        };
        // SAFETY: as above.
        let result = catch_unwind(AssertUnwindSafe(|| unsafe { (*job)(number) }));
        if let Err(panic) = result {
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
    }
}

/// A pool of threads for the kernels, which includes the caller's thread.
///
/// One caller at a time uses the pool; the work of any other caller runs on its own thread alone,
/// with the same results. Idle threads spin for some tens of microseconds, since the parts of a
/// model follow each other closely, and sleep after that.
pub struct Pool {
    shared: Arc<State>,
    workers: Vec<(JoinHandle<()>, Thread)>,
}

impl Pool {
    /// Creates a pool of `threads` threads, including the caller's. 0 means as many as the machine
    /// has. The pool is smaller if the operating system does not start that many.
    pub fn new(threads: usize) -> Self {
        let available = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if threads == 0 { available() } else { threads }.min(JOINED as usize);
        let shared = Arc::new(State {
            state: AtomicU64::new(NEXT),
            job: UnsafeCell::new(None),
            busy: AtomicBool::new(false),
            asleep: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            ended: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let spawn = |number| {
            let shared = shared.clone();
            let builder = std::thread::Builder::new().name(format!("kernels {number}"));
            builder.spawn(move || shared.work(number)).ok()
        };
        let workers = (1..threads).map_while(spawn).map(|handle| {
            let thread = handle.thread().clone();
            (handle, thread)
        });
        let workers = workers.collect();
        Self { shared, workers }
    }

    /// Returns the number of threads, including the caller's.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(thread, index)` once for each `index` less than `tasks`, on any free thread.
    /// `thread` is less than [`threads`](Self::threads), and no two simultaneous calls have the
    /// same. Returns when all calls have returned.
    ///
    /// # Panics
    /// Panics if a call panics.
    pub fn for_each(&self, tasks: usize, task: impl Fn(usize, usize) + Sync) {
        let alone = self.workers.is_empty() || tasks < 2;
        if alone
            || self
                .shared
                .busy
                .compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed)
                .is_err()
        {
            (0..tasks).for_each(|index| task(0, index));
            return;
        }
        let next = AtomicUsize::new(0);
        self.run(&|thread| {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= tasks {
                    return;
                }
                task(thread, index);
            }
        });
    }

    /// Runs a job on the caller's thread and on all threads that join in time. The caller holds
    /// `busy`.
    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        // Ends the job, even if the caller's part of it panics.
        struct Close<'a>(&'a State);
        impl Drop for Close<'_> {
            fn drop(&mut self) {
                let mut state = self.0.state.fetch_and(!OPEN, Ordering::AcqRel);
                let mut spins = 0;
                while state & JOINED != 0 {
                    spins += 1;
                    if spins < SPINS {
                        std::hint::spin_loop()
                    } else {
                        std::thread::yield_now()
                    }
                    state = self.0.state.load(Ordering::Acquire);
                }
                self.0.busy.store(false, Ordering::Release);
            }
        }
        // SAFETY: `busy` is held, the state is closed, and no thread has joined. The lifetime is
        // extended until `Close` has waited for all threads that have joined, which happens before
        // this function returns or unwinds.
        unsafe {
            *shared.job.get() = Some(std::mem::transmute::<&(dyn Fn(usize) + Sync), Job>(job));
        }
        let close = Close(shared);
        let number =
            (shared.state.load(Ordering::Relaxed) / NEXT).wrapping_add(1) & (u64::MAX / NEXT);
        shared
            .state
            .store((number.max(1) * NEXT) | OPEN, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        for ((_, thread), asleep) in self.workers.iter().zip(&shared.asleep) {
            if asleep.load(Ordering::SeqCst) {
                thread.unpark();
            }
        }
        job(0);
        drop(close);
        // A panic of a worker. A panic in the caller's own part has already unwound.
        let panic = shared
            .panic
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        for (handle, thread) in self.workers.drain(..) {
            thread.unpark();
            // A worker catches the panics of its jobs, so that `join` does not fail.
            let _ = handle.join();
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pool({} threads)", self.threads())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in 1..=4 {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for tasks in (0..50).chain([1000]) {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                let inside: Vec<AtomicBool> =
                    (0..threads).map(|_| AtomicBool::new(false)).collect();
                pool.for_each(tasks, |thread, task| {
                    assert!(!inside[thread].swap(true, Ordering::SeqCst));
                    counts[task].fetch_add(1, Ordering::SeqCst);
                    inside[thread].store(false, Ordering::SeqCst);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::SeqCst) == 1));
                if tasks == 20 {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
            }
        }
    }

    #[test]
    fn a_busy_pool_leaves_the_work_to_the_caller() {
        let pool = Pool::new(3);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..300 {
                        pool.for_each(7, |_, task| {
                            // Nested calls are allowed, too.
                            pool.for_each(2, |_, inner| {
                                total.fetch_add(task * inner, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 300 * 21);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_leaves_the_pool_in_order() {
        let pool = Pool::new(3);
        for bad in 0..40 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.for_each(40, |_, task| assert_ne!(task, bad, "wanted"));
            }));
            assert!(result.is_err());
        }
        let total = AtomicUsize::new(0);
        pool.for_each(10, |_, task| {
            total.fetch_add(task, Ordering::Relaxed);
        });
        assert_eq!(total.into_inner(), 45);
    }

    /// The limit of threads is one of the user, and does not hold for root. So the test runs again
    /// in a process of its own, as another user where it is root.
    #[cfg(target_os = "linux")]
    #[test]
    fn threads_that_cannot_start_are_left_out() {
        use std::os::unix::fs::PermissionsExt;
        use std::os::unix::process::CommandExt;
        const CHILD: &str = "ELASTIC_LORA_FEW_THREADS";
        const NOBODY: u32 = 65534;
        if std::env::var_os(CHILD).is_some() {
            let pool = Pool::new(64);
            println!("{} of 64 threads", pool.threads());
            assert!(pool.threads() < 64);
            let total = AtomicUsize::new(0);
            for _ in 0..100 {
                pool.for_each(10, |_, task| {
                    total.fetch_add(task, Ordering::Relaxed);
                });
            }
            assert_eq!(total.into_inner(), 4500);
            return;
        }
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let uid = status.lines().find_map(|line| line.strip_prefix("Uid:"));
        let is_root = uid.unwrap().split_whitespace().nth(1) == Some("0");
        let folder = tempfile::tempdir().unwrap();
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(folder.path(), open.clone()).unwrap();
        let program = folder.path().join("tests");
        std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
        std::fs::set_permissions(&program, open).unwrap();
        let mut command = std::process::Command::new("sh");
        let name = "kernels::pool::tests::threads_that_cannot_start_are_left_out";
        // Shells differ in the option's name.
        let limit = "if (ulimit -u 8) 2>/dev/null; then ulimit -u 8; else ulimit -p 8; fi";
        let run = format!("{limit} && exec ./tests --exact {name} --nocapture --test-threads 1");
        command
            .args(["-c", &run])
            .env(CHILD, "1")
            .current_dir(folder.path());
        if is_root {
            command.uid(NOBODY).gid(NOBODY);
        }
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let text = text + &String::from_utf8_lossy(&output.stderr);
        // A user with more processes than that cannot start the test at all.
        if text.contains("of 64 threads") {
            assert!(output.status.success(), "{text}");
        } else {
            eprintln!("skipped: {text}");
            assert!(!is_root, "{text}");
        }
    }
}
