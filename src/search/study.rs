//! Runs a searcher against an objective, with a budget, a cache, a log and interruption.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{Evaluation, SearchOutcome, Searcher, StopReason};
use crate::error::{Error, Result};
use crate::input::open_regular;
use crate::progress::{Progress, Task};
use crate::space::{SearchSpace, SubnetConfig};
use crate::threads;

/// Largest line of a log that is read, in bytes.
const MAX_LINE_BYTES: u64 = 16 << 20;

/// Settings of a [`Study`].
#[derive(Clone, Debug)]
pub struct StudyConfig {
    /// Maximum number of different subnets that a search proposes. Evaluations of a lower fidelity
    /// count as that fraction.
    pub n_evals: usize,
    /// Maximum number of subnets that [`Study::run_parallel`] evaluates in parallel. It does not
    /// change the result.
    pub batch: usize,
    /// A JSON Lines file to which each evaluation is appended when it completes. Evaluations in an
    /// existing file are reused: if an interrupted search is run again with the same seed, it
    /// continues and ends as if it had not been interrupted.
    pub log: Option<PathBuf>,
    /// Identifies what is evaluated (model, data, ...). A log with another tag is refused.
    pub tag: String,
    /// Number of evaluations that may fail in a search. A failed evaluation is recorded with its
    /// error and objectives of NaN. The search ends with the error of the next one, and with that
    /// of the first evaluation of all.
    pub max_failures: usize,
}

impl StudyConfig {
    /// Creates settings for at most `n_evals` different subnets, without a log.
    pub fn new(n_evals: usize) -> Self {
        Self {
            n_evals,
            batch: 16,
            log: None,
            tag: String::new(),
            max_failures: 16,
        }
    }

    setters! {
        with_batch(batch: usize);
        with_log(log: impl Into<PathBuf>) = Some(log.into());
        with_tag(tag: impl Into<String>) = tag.into();
        with_max_failures(max_failures: usize);
    }

    /// Creates the study over `space` and reads an existing log.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if `batch` is 0. Returns [`Error::Io`] if the log cannot
    /// be read, [`Error::InvalidRecord`] if it contains an invalid line or a subnet of another
    /// space, and [`Error::CheckpointMismatch`] if it has another tag or version.
    pub fn init(&self, space: &SearchSpace) -> Result<Study> {
        if self.batch == 0 {
            return Err(Error::argument("batch", 0, "must be at least 1"));
        }
        let mut cache = HashMap::new();
        let log = match &self.log {
            Some(path) => Some(Log::open(path, &self.tag, space, &mut cache)?),
            None => None,
        };
        Ok(Study {
            settings: self.clone(),
            cache,
            log,
        })
    }
}

/// What an evaluation measured.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measurement {
    /// Objectives, to be minimised; see [`super::SCORE`] and [`super::COST`].
    pub objectives: Vec<f64>,
    /// Standard error of the score, if it is known.
    pub score_error: Option<f64>,
}

impl From<Vec<f64>> for Measurement {
    fn from(objectives: Vec<f64>) -> Self {
        Self {
            objectives,
            score_error: None,
        }
    }
}

/// A subnet and the bits of the fidelity of its evaluation.
type Key = (SubnetConfig, u64);

/// Evaluations by subnet and fidelity. What is measured at one fidelity does not answer for
/// another, because scores on different data are not comparable.
type Cache = HashMap<Key, Evaluation>;

/// Runs searches and keeps their results, so that no subnet is evaluated twice, even by different
/// searchers.
pub struct Study {
    settings: StudyConfig,
    cache: Cache,
    log: Option<Log>,
}

impl Study {
    /// Returns the number of different subnets with known objectives, from all runs and the log.
    #[cfg(test)]
    pub(super) fn n_known(&self) -> usize {
        self.cache.len()
    }

    /// Searches with one evaluation at a time.
    ///
    /// The search ends when `n_evals` different subnets have been proposed (evaluated or already
    /// known), or when the searcher is finished. `objective` returns at least one number; all are
    /// minimised. See [`super::SCORE`].
    ///
    /// Subnets are evaluated in full, whatever fidelity the searcher asks for; see
    /// [`run_at`](Self::run_at).
    ///
    /// # Errors
    /// Returns the errors of the searcher, those of `objective` beyond
    /// [`StudyConfig::max_failures`], [`Error::ShapeMismatch`] if the number of objectives changes,
    /// [`Error::Io`] if the log cannot be written, and [`Error::Interrupted`]. Completed
    /// evaluations stay in the cache and in the log.
    pub fn run<S, F>(
        &mut self,
        searcher: &mut S,
        mut objective: F,
        progress: &dyn Progress,
    ) -> Result<SearchOutcome>
    where
        S: Searcher + ?Sized,
        F: FnMut(&SubnetConfig) -> Result<Vec<f64>>,
    {
        let mut evaluate = |configs: &[SubnetConfig], _, task: &Task<'_>| -> Vec<Timed> {
            let one = |config| timed(|| task.check().and_then(|()| objective(config)));
            configs.iter().map(one).collect()
        };
        self.drive(searcher, 1, &mut |_| 1.0, &mut evaluate, progress)
    }

    /// Searches like [`run`](Self::run), with an objective that can use a part of its data.
    ///
    /// `objective` gets the fraction of a full evaluation's data that it should use, above 0 and at
    /// most 1; it should be the same part of the data for all subnets. The budget counts these
    /// fractions.
    ///
    /// # Errors
    /// Returns the errors of [`run`](Self::run).
    pub fn run_at<S, F>(
        &mut self,
        searcher: &mut S,
        mut objective: F,
        progress: &dyn Progress,
    ) -> Result<SearchOutcome>
    where
        S: Searcher + ?Sized,
        F: FnMut(&SubnetConfig, f64) -> Result<Measurement>,
    {
        let mut evaluate = |configs: &[SubnetConfig], fidelity, task: &Task<'_>| -> Vec<Timed> {
            let one = |config| timed(|| task.check().and_then(|()| objective(config, fidelity)));
            configs.iter().map(one).collect()
        };
        let mut fidelity = |searcher: &S| match searcher.fidelity() {
            fidelity if fidelity > 0.0 => fidelity.min(1.0),
            _ => 1.0,
        };
        self.drive(searcher, 1, &mut fidelity, &mut evaluate, progress)
    }

    /// Searches like [`run`](Self::run), but evaluates the subnets of a batch in parallel in
    /// Rayon's current pool. The outcome is the same except for the times.
    ///
    /// # Errors
    /// Returns the errors of [`run`](Self::run). If several evaluations of a batch fail, the error
    /// is that of the first one in the order of proposals.
    pub fn run_parallel<S, F>(
        &mut self,
        searcher: &mut S,
        objective: F,
        progress: &dyn Progress,
    ) -> Result<SearchOutcome>
    where
        S: Searcher + ?Sized,
        F: Fn(&SubnetConfig) -> Result<Vec<f64>> + Sync,
    {
        threads::ready()?;
        let batch = self.settings.batch;
        let mut evaluate = |configs: &[SubnetConfig], _, task: &Task<'_>| -> Vec<Timed> {
            let one = |config| timed(|| task.check().and_then(|()| objective(config)));
            configs.par_iter().map(one).collect()
        };
        self.drive(searcher, batch, &mut |_| 1.0, &mut evaluate, progress)
    }

    fn drive<S: Searcher + ?Sized>(
        &mut self,
        searcher: &mut S,
        batch: usize,
        fidelity: &mut dyn FnMut(&S) -> f64,
        evaluate: &mut Evaluate<'_>,
        progress: &dyn Progress,
    ) -> Result<SearchOutcome> {
        let n_evals = self.settings.n_evals;
        let mut task = Task::begin(progress, "search", n_evals, "subnets")?;
        let mut evaluations: Vec<Evaluation> = Vec::new();
        let mut proposed: HashSet<Key> = HashSet::new();
        let (mut n_repeats, mut n_failures) = (0usize, 0usize);
        // Cost so far in full evaluations.
        let mut spent = 0.0f64;
        let stopped = loop {
            let fidelity = fidelity(searcher);
            // The small term is for sums of fractions that are not exact.
            let left = ((n_evals as f64 - spent) / fidelity + 1e-6).max(0.0) as usize;
            if left == 0 {
                break StopReason::Budget;
            }
            let asked = searcher.ask(batch.min(left));
            // All objectives have been told, so a searcher that proposes nothing is done. So is one
            // that only repeats its proposals.
            if asked.is_empty() || n_repeats > 100 + 10 * n_evals {
                break match searcher.is_finished() {
                    true => searcher.reason(),
                    false => StopReason::Exhausted,
                };
            }
            let key = |config: &SubnetConfig| (config.clone(), fidelity.to_bits());
            let mut fresh: Vec<SubnetConfig> = Vec::new();
            for config in &asked {
                if !proposed.insert(key(config)) {
                    n_repeats += 1;
                    continue;
                }
                spent += fidelity;
                if !self.cache.contains_key(&key(config)) {
                    fresh.push(config.clone());
                }
            }
            let results = evaluate(&fresh, fidelity, &task);
            let mut done: HashSet<SubnetConfig> = HashSet::new();
            let mut failure = None;
            for (config, (result, seconds)) in fresh.into_iter().zip(results) {
                let is_first = self.cache.is_empty();
                let (measured, error) = match result {
                    Ok(measured) => (measured, None),
                    Err(error @ Error::Interrupted { .. }) => {
                        failure = failure.or(Some(error));
                        continue;
                    }
                    Err(error) if failure.is_some() || is_first => {
                        failure = failure.or(Some(error));
                        continue;
                    }
                    Err(error) => {
                        n_failures += 1;
                        if n_failures > self.settings.max_failures {
                            failure = Some(error);
                            continue;
                        }
                        let objectives = vec![f64::NAN; self.arity().unwrap_or(1)];
                        (Measurement::from(objectives), Some(error.to_string()))
                    }
                };
                self.remember(Evaluation {
                    score_error: measured.score_error,
                    fidelity,
                    error,
                    seconds,
                    index: self.cache.len(),
                    ..Evaluation::new(config.clone(), measured.objectives)
                })?;
                done.insert(config);
            }
            if let Some(error) = failure {
                return Err(error);
            }
            let first = evaluations.len();
            for config in asked {
                let Some(known) = self.cache.get(&key(&config)) else {
                    continue;
                };
                let fresh = done.remove(&config);
                evaluations.push(Evaluation {
                    index: evaluations.len(),
                    cached: !fresh,
                    seconds: if fresh { known.seconds } else { 0.0 },
                    ..known.clone()
                });
            }
            searcher.tell(&evaluations[first..])?;
            task.advance((spent + 1e-6) as usize - task.done(), "");
        };
        let outcome = SearchOutcome::new(searcher.name(), stopped, evaluations);
        Ok(outcome.with_predicted(searcher.predicted()))
    }

    /// Number of objectives, once one evaluation is known.
    fn arity(&self) -> Option<usize> {
        let known = self.cache.values().next();
        known.map(|evaluation| evaluation.objectives.len())
    }

    fn remember(&mut self, evaluation: Evaluation) -> Result<()> {
        let found = evaluation.objectives.len();
        let expected = self.arity().unwrap_or(found.max(1));
        if found != expected {
            let what = format!("objectives of subnet {}", evaluation.config);
            return Err(Error::ShapeMismatch {
                what,
                expected: vec![expected],
                found: vec![found],
            });
        }
        if let Some(log) = &mut self.log {
            log.write(&evaluation)?;
        }
        let key = (evaluation.config.clone(), evaluation.fidelity.to_bits());
        self.cache.insert(key, evaluation);
        Ok(())
    }
}

/// What an evaluation gave, and its seconds.
type Timed = (Result<Measurement>, f64);

/// Evaluates subnets at a fidelity, and checks for interruption before each one.
type Evaluate<'a> = dyn FnMut(&[SubnetConfig], f64, &Task<'_>) -> Vec<Timed> + 'a;

fn timed<M: Into<Measurement>>(objective: impl FnOnce() -> Result<M>) -> Timed {
    let start = Instant::now();
    let result = objective().map(Into::into);
    (result, start.elapsed().as_secs_f64())
}

/// First line of a log.
#[derive(Serialize, Deserialize)]
struct Header {
    elastic_lora_search: u32,
    tag: String,
}

const LOG_VERSION: u32 = 1;

struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// Reads the log into `cache` and opens it for appending. An incomplete last line, which a
    /// killed process leaves behind, is removed.
    fn open(path: &Path, tag: &str, space: &SearchSpace, cache: &mut Cache) -> Result<Self> {
        let io = |source| Error::io(path, source);
        if path.exists() {
            // A pipe would be waited for.
            open_regular(path)?;
        }
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(io)?;
        let mut whole = 0u64;
        let mut record = 0usize;
        let mut arity = None;
        let mut reader = BufReader::new(&mut file);
        loop {
            let mut line = Vec::new();
            let n = reader
                .by_ref()
                .take(MAX_LINE_BYTES + 1)
                .read_until(b'\n', &mut line)
                .map_err(io)? as u64;
            let broken = |reason: String| Error::InvalidRecord {
                path: path.to_path_buf(),
                record: record + 1,
                reason,
            };
            if n > MAX_LINE_BYTES {
                return Err(broken(format!(
                    "a line of over {} MiB",
                    MAX_LINE_BYTES >> 20
                )));
            }
            if line.pop() != Some(b'\n') {
                break;
            }
            if record == 0 {
                let header: Header =
                    serde_json::from_slice(&line).map_err(|error| broken(error.to_string()))?;
                let version = (
                    header.elastic_lora_search.to_string(),
                    LOG_VERSION.to_string(),
                );
                for (field, found, expected) in [
                    ("version", version.0, version.1),
                    ("tag", header.tag, tag.to_string()),
                ] {
                    if found != expected {
                        let (path, field) = (path.to_path_buf(), field.to_string());
                        return Err(Error::CheckpointMismatch {
                            path,
                            field,
                            expected,
                            found,
                        });
                    }
                }
            } else {
                let evaluation: Evaluation =
                    serde_json::from_slice(&line).map_err(|error| broken(error.to_string()))?;
                space
                    .validate(&evaluation.config)
                    .map_err(|error| broken(error.to_string()))?;
                let found = evaluation.objectives.len();
                let expected = *arity.get_or_insert(found.max(1));
                if found != expected {
                    return Err(broken(format!(
                        "{found} objectives, the record before has {expected}"
                    )));
                }
                let key = (evaluation.config.clone(), evaluation.fidelity.to_bits());
                cache.insert(key, evaluation);
            }
            whole += n;
            record += 1;
        }
        drop(reader);
        file.set_len(whole).map_err(io)?;
        file.seek(SeekFrom::End(0)).map_err(io)?;
        let mut log = Self {
            path: path.to_path_buf(),
            file,
        };
        if record == 0 {
            log.write(&Header {
                elastic_lora_search: LOG_VERSION,
                tag: tag.to_string(),
            })?;
        }
        Ok(log)
    }

    fn write(&mut self, value: &impl Serialize) -> Result<()> {
        let mut line =
            serde_json::to_vec(value).map_err(|source| Error::json(&self.path, source))?;
        line.push(b'\n');
        self.file
            .write_all(&line)
            .map_err(|source| Error::io(&self.path, source))
    }
}
