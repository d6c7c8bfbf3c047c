//! Progress reports of long work, and its interruption.
//!
//! Functions that may run for minutes take a `&dyn Progress` as their last argument. Pass
//! [`Silent`] to show nothing, [`TerminalProgress`] for a bar on a terminal and a line every 30
//! seconds elsewhere, or your own implementation.
//!
//! ```
//! use elastic_lora::progress::{Progress, Silent, Task};
//!
//! fn work(progress: &dyn Progress) -> elastic_lora::Result<()> {
//!     let mut task = Task::begin(progress, "sum", 3, "numbers")?;
//!     for number in 1..=3 {
//!         task.step(&format!("number {number}"))?;
//!     }
//!     Ok(())
//! }
//! work(&Silent)?;
//! # Ok::<(), elastic_lora::Error>(())
//! ```

use std::fmt::Write as _;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

#[cfg(feature = "report")]
use indicatif::{ProgressBar, ProgressStyle};

use crate::error::{Error, Result};

/// Receives reports of long work, and can stop it.
///
/// Every method has a default that does nothing. Tasks may be nested (a validation within a
/// training), and tasks of different threads may overlap.
pub trait Progress: Sync {
    /// Reports that a task begins.
    fn begin(&self, _task: &Task<'_>) {}

    /// Reports that steps of a task are done: [`Task::done`] of [`Task::total`]. `note` is a short
    /// text such as `loss 0.1234`, or empty.
    fn step(&self, _task: &Task<'_>, _note: &str) {}

    /// Reports that a task has ended, whether or not all of its steps are done.
    fn end(&self, _task: &Task<'_>) {}

    /// Returns whether the work should stop with [`Error::Interrupted`]. It is called often:
    /// between batches, layers and tokens.
    fn is_interrupted(&self) -> bool {
        false
    }
}

/// Shows nothing and never interrupts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {}

/// Shows nothing, and interrupts the work once the flag is true.
impl Progress for AtomicBool {
    fn is_interrupted(&self) -> bool {
        self.load(Ordering::Relaxed)
    }
}

/// A piece of long work with a known number of steps. Dropping it ends the task.
pub struct Task<'a> {
    progress: &'a dyn Progress,
    id: u64,
    label: String,
    unit: &'static str,
    first: usize,
    done: usize,
    total: usize,
}

impl<'a> Task<'a> {
    /// Begins a task of `total` steps. `unit` is the plural name of a step, such as `layers`.
    ///
    /// # Errors
    /// Returns [`Error::Interrupted`] if the caller asked to stop.
    pub fn begin(
        progress: &'a dyn Progress,
        label: impl Into<String>,
        total: usize,
        unit: &'static str,
    ) -> Result<Self> {
        Self::resume(progress, label, 0, total, unit)
    }

    /// Begins a task of `total` steps, `done` of which were done earlier.
    ///
    /// # Errors
    /// Returns [`Error::Interrupted`] if the caller asked to stop.
    pub fn resume(
        progress: &'a dyn Progress,
        label: impl Into<String>,
        done: usize,
        total: usize,
        unit: &'static str,
    ) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let task = Self {
            progress,
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            label: label.into(),
            unit,
            first: done,
            done,
            total,
        };
        progress.begin(&task);
        task.check()?;
        Ok(task)
    }

    /// Counts one more step as done, and checks for an interruption.
    ///
    /// # Errors
    /// Returns the error of [`check`](Self::check).
    pub fn step(&mut self, note: &str) -> Result<()> {
        self.advance(1, note);
        self.check()
    }

    /// Counts `n` more steps as done, without checking for an interruption.
    pub fn advance(&mut self, n: usize, note: &str) {
        if n > 0 {
            self.done += n;
            self.progress.step(self, note);
        }
    }

    /// Checks whether the caller asked to stop.
    ///
    /// # Errors
    /// Returns [`Error::Interrupted`], which names the task, if so.
    pub fn check(&self) -> Result<()> {
        if self.progress.is_interrupted() {
            let task = self.label.clone();
            return Err(Error::Interrupted { task });
        }
        Ok(())
    }

    /// Identifier of the task, unique within the process.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Name of the work, such as `prune`.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Plural name of a step, such as `layers`.
    pub fn unit(&self) -> &'static str {
        self.unit
    }

    /// Number of steps that were done before the task began.
    pub fn first(&self) -> usize {
        self.first
    }

    /// Number of steps done, including those done before the task began.
    pub fn done(&self) -> usize {
        self.done
    }

    /// Total number of steps.
    pub fn total(&self) -> usize {
        self.total
    }
}

impl Drop for Task<'_> {
    fn drop(&mut self) {
        self.progress.end(self);
    }
}

/// Shows progress on a terminal or in a log.
///
/// If standard error is a terminal, shows a bar there (with the feature `report`, which `burn`
/// implies). Otherwise writes a line every 30 seconds with the time, the task, its completed share,
/// its rate and the remaining time, and one line at the end of each outermost task. Of nested tasks, the outermost has the bar, and the innermost is
/// named after it.
pub struct TerminalProgress {
    shown: Arc<Mutex<Shown>>,
    interrupt: Option<Arc<AtomicBool>>,
}

/// Time between two lines.
const INTERVAL: Duration = Duration::from_secs(30);

/// Maximum length of the label beside a bar, in characters.
#[cfg(feature = "report")]
const LABEL: usize = 20;

impl TerminalProgress {
    /// Shows progress on standard error.
    pub fn new() -> Self {
        #[cfg(feature = "report")]
        if std::io::IsTerminal::is_terminal(&std::io::stderr()) {
            return Self::with_output(Output::Bar(None));
        }
        Self::to_writer(std::io::stderr())
    }

    /// Writes lines to `writer`, whether or not it is a terminal.
    pub fn to_writer(writer: impl Write + Send + 'static) -> Self {
        let last = SystemTime::now();
        Self::with_output(Output::Lines(Box::new(writer), last))
    }

    fn with_output(output: Output) -> Self {
        let tasks = Vec::new();
        let shown = Arc::new(Mutex::new(Shown { tasks, output }));
        // A thread keeps the time, because a single step may take longer than the time between two
        // lines.
        let board = Arc::downgrade(&shown);
        let tick = move || {
            loop {
                std::thread::sleep(Duration::from_secs(1));
                let Some(shown) = Weak::upgrade(&board) else {
                    return;
                };
                lock(&shown).tick(SystemTime::now());
            }
        };
        // Where no thread can be had, steps alone show the time.
        drop(std::thread::Builder::new().spawn(tick));
        let interrupt = None;
        Self { shown, interrupt }
    }

    /// Interrupts the work once the flag is set, for example by a Ctrl-C handler.
    pub fn with_interrupt(mut self, flag: Arc<AtomicBool>) -> Self {
        self.interrupt = Some(flag);
        self
    }
}

impl Default for TerminalProgress {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress for TerminalProgress {
    fn begin(&self, task: &Task<'_>) {
        lock(&self.shown).begin(task, SystemTime::now());
    }

    fn step(&self, task: &Task<'_>, note: &str) {
        lock(&self.shown).step(task, note, SystemTime::now());
    }

    fn end(&self, task: &Task<'_>) {
        lock(&self.shown).end(task, SystemTime::now());
    }

    fn is_interrupted(&self) -> bool {
        let flag = self.interrupt.as_ref();
        flag.is_some_and(|flag| flag.is_interrupted())
    }
}

fn lock(shown: &Mutex<Shown>) -> MutexGuard<'_, Shown> {
    shown.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Destination of the reports: a bar while a task runs, or a writer with the time of its last line.
enum Output {
    #[cfg(feature = "report")]
    Bar(Option<ProgressBar>),
    Lines(Box<dyn Write + Send>, SystemTime),
}

/// The running tasks, outermost first. All methods take the current time as an argument.
struct Shown {
    tasks: Vec<Running>,
    output: Output,
}

struct Running {
    id: u64,
    label: String,
    unit: &'static str,
    first: usize,
    done: usize,
    total: usize,
    started: SystemTime,
    note: String,
}

impl Shown {
    fn begin(&mut self, task: &Task<'_>, now: SystemTime) {
        self.tasks.push(Running {
            id: task.id,
            label: task.label.clone(),
            unit: task.unit,
            first: task.first,
            done: task.done,
            total: task.total,
            started: now,
            note: String::new(),
        });
        if self.tasks.len() == 1 {
            match &mut self.output {
                #[cfg(feature = "report")]
                Output::Bar(bar) => *bar = Some(new_bar(task)),
                Output::Lines(_, last) => *last = now,
            }
        }
        self.tick(now);
    }

    fn step(&mut self, task: &Task<'_>, note: &str, now: SystemTime) {
        if let Some(running) = self.tasks.iter_mut().find(|running| running.id == task.id) {
            running.done = task.done;
            running.note = note.to_string();
        }
        self.tick(now);
    }

    fn end(&mut self, task: &Task<'_>, now: SystemTime) {
        let Some(index) = self.tasks.iter().position(|running| running.id == task.id) else {
            return;
        };
        let ended = self.tasks.remove(index);
        if index > 0 {
            return;
        }
        match &mut self.output {
            #[cfg(feature = "report")]
            Output::Bar(bar) => {
                if let Some(bar) = bar.take() {
                    bar.finish_and_clear();
                }
            }
            Output::Lines(writer, last) => {
                let (stamp, text) = (time_stamp(now), ended.summary(now));
                let _ = writeln!(writer, "{stamp} {}: {text}", ended.label);
                *last = now;
            }
        }
    }

    /// Updates the bar, or writes a line if the last one is at least [`INTERVAL`] old.
    fn tick(&mut self, now: SystemTime) {
        let Some(outer) = self.tasks.first() else {
            return;
        };
        let inner = self.tasks.last().filter(|inner| inner.id != outer.id);
        let inner = inner.map_or(String::new(), |inner| {
            format!("; {} {}/{}", inner.label, inner.done, inner.total)
        });
        match &mut self.output {
            #[cfg(feature = "report")]
            Output::Bar(Some(bar)) => {
                bar.set_position(outer.done as u64);
                bar.set_message(outer.brief(now) + &inner);
            }
            #[cfg(feature = "report")]
            Output::Bar(None) => {}
            Output::Lines(writer, last) => {
                if now.duration_since(*last).unwrap_or_default() >= INTERVAL {
                    let (stamp, text) = (time_stamp(now), outer.state(now));
                    let _ = writeln!(writer, "{stamp} {}: {text}{inner}", outer.label);
                    *last = now;
                }
            }
        }
    }
}

#[cfg(feature = "report")]
/// Creates a bar whose message fills the rest of the line and is cut at the edge of the terminal.
fn new_bar(task: &Task<'_>) -> ProgressBar {
    let bar = ProgressBar::new(task.total as u64);
    if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:16}] {wide_msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    let mut label: String = task.label.chars().take(LABEL).collect();
    if label.len() < task.label.len() {
        label.pop();
        label.push('…');
    }
    bar.set_prefix(label);
    bar
}

impl Running {
    /// Formats a line such as `12/35 layers (34 %), 4.2 layers/s, 0:05 left, loss 0.1234`.
    fn state(&self, now: SystemTime) -> String {
        let share = 100.0 * self.done as f64 / self.total.max(1) as f64;
        let mut text = format!("{}/{} {} ({share:.0} %)", self.done, self.total, self.unit);
        let rate = self.rate(now);
        if rate > 0.0 {
            let _ = write!(text, ", {}", per_time(rate, self.unit));
        }
        self.with_note(text + &self.left(now))
    }

    #[cfg(feature = "report")]
    /// Formats a short state such as `12/35, 0:05 left, loss 0.1234`, for the message of a bar.
    fn brief(&self, now: SystemTime) -> String {
        self.with_note(format!("{}/{}{}", self.done, self.total, self.left(now)))
    }

    /// Formats the remaining time, such as `, 0:05 left`; empty if the rate is not known yet.
    fn left(&self, now: SystemTime) -> String {
        let rate = self.rate(now);
        if rate == 0.0 {
            return String::new();
        }
        let left = self.total.saturating_sub(self.done) as f64 / rate;
        format!(", {} left", clock(left))
    }

    /// Formats a summary such as `35 layers in 0:08, 4.4 layers/s`.
    fn summary(&self, now: SystemTime) -> String {
        let seconds = clock(self.seconds(now));
        let mut text = if self.done < self.total {
            let (done, total) = (self.done, self.total);
            format!("ended at {done} of {total} {}, {seconds}", self.unit)
        } else {
            format!("{} {} in {seconds}", self.done - self.first, self.unit)
        };
        let rate = self.rate(now);
        if rate > 0.0 {
            let _ = write!(text, ", {}", per_time(rate, self.unit));
        }
        self.with_note(text)
    }

    fn with_note(&self, mut text: String) -> String {
        if !self.note.is_empty() {
            let _ = write!(text, ", {}", self.note);
        }
        text
    }

    fn seconds(&self, now: SystemTime) -> f64 {
        let elapsed = now.duration_since(self.started).unwrap_or_default();
        elapsed.as_secs_f64()
    }

    /// Number of steps per second; 0 if no time has passed.
    fn rate(&self, now: SystemTime) -> f64 {
        let seconds = self.seconds(now);
        if seconds > 0.0 {
            (self.done - self.first) as f64 / seconds
        } else {
            0.0
        }
    }
}

/// Formats a rate per second, minute or hour: the first of them that gives at least 1, else per
/// hour.
fn per_time(rate: f64, unit: &str) -> String {
    let (factor, time) = [(1.0, "s"), (60.0, "min")]
        .into_iter()
        .find(|(factor, _)| rate * factor >= 1.0)
        .unwrap_or((3600.0, "h"));
    format!("{:.1} {unit}/{time}", rate * factor)
}

/// Formats a duration such as `1:05` or `2:03:20`.
fn clock(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 {
        format!("{hours}:{minutes:02}:{seconds:02}")
    } else {
        format!("{minutes}:{seconds:02}")
    }
}

/// Formats a time such as `2026-02-28T23:59:59Z`.
fn time_stamp(now: SystemTime) -> String {
    let since = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let seconds = since.as_secs();
    // Days are counted from 1 March of year 0 in cycles of 400 years, so that a leap day is the
    // last day of its year.
    let days = seconds / 86_400 + 719_468;
    let (cycle, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = 400 * cycle + year + u64::from(month <= 2);
    let (hours, minutes, seconds) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hours:02}:{minutes:02}:{seconds:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A writer that a test can read.
    #[derive(Clone, Default)]
    struct Page(Arc<Mutex<Vec<u8>>>);

    impl Write for Page {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Page {
        fn take(&self) -> String {
            String::from_utf8(std::mem::take(&mut self.0.lock().unwrap())).unwrap()
        }
    }

    fn at(seconds: u64) -> SystemTime {
        // 2024-02-29T23:59:00Z
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_709_251_140 + seconds)
    }

    #[test]
    fn lines_come_every_30_seconds_and_at_the_end_of_outermost_tasks() {
        let page = Page::default();
        let mut shown = Shown {
            tasks: Vec::new(),
            output: Output::Lines(Box::new(page.clone()), at(0)),
        };
        let mut outer = Task::resume(&Silent, "search", 4, 40, "subnets").unwrap();
        shown.begin(&outer, at(0));
        for second in 1..30 {
            shown.tick(at(second));
        }
        assert_eq!(page.take(), "");
        // No step is done yet, so the line shows the share but no rate.
        shown.tick(at(30));
        assert_eq!(
            page.take(),
            "2024-02-29T23:59:30Z search: 4/40 subnets (10 %)\n"
        );
        outer.advance(6, "");
        shown.step(&outer, "loss 0.5", at(40));
        let mut inner = Task::begin(&Silent, "evaluate", 12, "batches").unwrap();
        shown.begin(&inner, at(50));
        inner.advance(3, "");
        shown.step(&inner, "", at(60));
        assert_eq!(
            page.take(),
            "2024-03-01T00:00:00Z search: 10/40 subnets (25 %), 6.0 subnets/min, 5:00 left, loss 0.5; evaluate 3/12\n"
        );
        shown.end(&inner, at(61));
        shown.tick(at(89));
        assert_eq!(page.take(), "");
        outer.advance(30, "");
        shown.step(&outer, "", at(89));
        shown.end(&outer, at(90));
        assert_eq!(
            page.take(),
            "2024-03-01T00:00:30Z search: 36 subnets in 1:30, 24.0 subnets/min\n"
        );
        shown.tick(at(500));
        assert_eq!(page.take(), "");
    }

    #[test]
    fn a_task_that_fails_says_how_far_it_came() {
        let page = Page::default();
        let progress = TerminalProgress::to_writer(page.clone());
        let result = (|| {
            let mut task = Task::begin(&progress, "prune", 7, "layers")?;
            task.step("")?;
            Err::<(), _>(Error::OutOfMemory {
                what: "x",
                bytes: 1,
            })
        })();
        assert!(result.is_err());
        let text = page.take();
        assert!(
            text.contains("Z prune: ended at 1 of 7 layers, 0:00"),
            "{text}"
        );
        assert_eq!(text.lines().count(), 1);
    }

    #[test]
    fn the_flag_interrupts_by_name() {
        let flag = Arc::new(AtomicBool::new(false));
        let progress = TerminalProgress::to_writer(std::io::sink()).with_interrupt(flag.clone());
        let mut task = Task::begin(&progress, "merge", 2, "layers").unwrap();
        task.step("").unwrap();
        flag.store(true, Ordering::Relaxed);
        let error = task.step("").unwrap_err();
        assert_eq!(error.to_string(), "merge: interrupted");
        assert!(Task::begin(&progress, "x", 1, "layers").is_err());
        assert_eq!((task.done(), task.total()), (2, 2));
    }

    #[test]
    fn times_and_rates_are_short() {
        let shown = [(0.4, "0:00"), (65.0, "1:05"), (7400.0, "2:03:20")];
        for (seconds, text) in shown {
            assert_eq!(clock(seconds), text);
        }
        let rates = [(12.34, "12.3 x/s"), (0.5, "30.0 x/min"), (0.001, "3.6 x/h")];
        for (rate, text) in rates {
            assert_eq!(per_time(rate, "x"), text);
        }
        let stamps = [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ];
        for (seconds, text) in stamps {
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            assert_eq!(time_stamp(time), text);
        }
    }
}
