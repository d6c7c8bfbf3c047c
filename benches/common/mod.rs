//! Code shared by the benches.
//!
//! `cargo bench -- --quick` runs all of them on small inputs, which takes about a minute each.
//! Benches that use criterion take its options and a filter of names; their other settings come
//! from the environment ([`setting`]). Benches that compare processes or measure the memory of a
//! process are separate programs, whose options `--help` describes.
#![allow(dead_code)] // No bench uses everything.

#[cfg(feature = "flex")]
pub mod training;

use std::hint::black_box;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion};
use elastic_lora::format::{Buffer, QuantizedMatrix, QuantizedParts, StoredMatrix, WeightFormat};
use elastic_lora::kernels::Pool;
use elastic_lora::linalg::Matrix;
use elastic_lora::{Error, Result};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn has(flag: &str) -> bool {
    std::env::args().any(|argument| argument == flag)
}

/// Returns whether to measure. `cargo test --all-targets` runs benches without `--bench`, and only
/// needs to build them.
fn wanted() -> bool {
    let wanted = has("--bench") || has("--child");
    if !wanted {
        println!("nothing is measured without --bench, which `cargo bench` passes");
    }
    wanted
}

/// Returns whether a short run was requested.
pub fn quick() -> bool {
    has("--quick")
}

/// Returns the value, or prints the error and exits.
pub fn ok<T>(result: Result<T>) -> T {
    result.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        std::process::exit(1)
    })
}

/// Main function of a bench that uses criterion.
pub fn main(bench: impl FnOnce(&mut Criterion) -> Result<()>) {
    if wanted() {
        // With `--quick`, criterion measures until the relative deviation is at most `deviation`.
        let (seconds, deviation) = if quick() { (1, 0.01) } else { (5, 0.05) };
        let mut criterion = Criterion::default()
            .without_plots()
            .nresamples(10_000)
            .sample_size(20)
            .warm_up_time(Duration::from_secs(1))
            .measurement_time(Duration::from_secs(seconds))
            .significance_level(deviation)
            .configure_from_args();
        ok(bench(&mut criterion));
        criterion.final_summary();
    }
}

/// Main function of a bench that is a separate program.
pub fn program<A: clap::Parser>(bench: impl FnOnce(&mut A) -> Result<()>) {
    if wanted() {
        let arguments = std::env::args().filter(|argument| argument != "--bench");
        ok(bench(&mut A::parse_from(arguments)));
    }
}

/// Returns the value of an environment variable, or a default value.
pub fn setting<T: FromStr>(name: &str, default: &str) -> T {
    settings(name, default).swap_remove(0) // `split` returns at least one part.
}

/// Returns the comma-separated values of an environment variable, or default values.
pub fn settings<T: FromStr>(name: &str, default: &str) -> Vec<T> {
    let text = std::env::var(name).unwrap_or_else(|_| default.into());
    let value = |part: &str| {
        part.trim().parse().unwrap_or_else(|_| {
            eprintln!("error: {name} cannot be `{part}`; {default}, for example, it can be");
            std::process::exit(1)
        })
    };
    text.split(',').map(value).collect()
}

/// Returns whether an environment variable is 1.
pub fn flag(name: &str) -> bool {
    setting::<u8>(name, "0") == 1
}

/// Returns the name of a value on the command line.
pub fn name(value: impl ValueEnum) -> String {
    let value = value.to_possible_value();
    value.map_or(String::new(), |value| value.get_name().to_string())
}

/// Shape of a matrix: outputs x inputs.
#[derive(Clone, Copy)]
pub struct Shape(pub [usize; 2]);

impl FromStr for Shape {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        let (rows, cols) = text.split_once('x').unwrap_or((text, ""));
        Ok(Self([rows.parse()?, cols.parse()?]))
    }
}

/// A measurement, which returns the time of one call.
pub type Subject<'a> = Box<dyn FnMut() -> Result<Duration> + 'a>;

/// Returns the time of a call.
pub fn timed<T>(run: impl FnOnce() -> Result<T>) -> Result<Duration> {
    let started = Instant::now();
    black_box(run()?);
    Ok(started.elapsed())
}

/// Measures several subjects in turns, so that other load on the machine affects all of them.
/// criterion reports the first one. Returns the seconds of each call of each subject, or `None` if
/// criterion's filter excludes the bench; `make` is not called then.
pub fn in_turns<'a, const N: usize>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: &str,
    make: impl Fn() -> Result<[Subject<'a>; N]>,
) -> Option<[Vec<f64>; N]> {
    let mut subjects = None;
    let mut seconds = [const { Vec::new() }; N];
    group.bench_function(id, |bencher| {
        let subjects = subjects.get_or_insert_with(|| ok(make()));
        bencher.iter_custom(|turns| {
            let mut first = Duration::ZERO;
            for _ in 0..turns {
                let times = subjects.each_mut().map(|subject| ok(subject()));
                first += times[0];
                for (all, time) in seconds.iter_mut().zip(times) {
                    all.push(time.as_secs_f64());
                }
            }
            first
        });
    });
    subjects.map(|_| seconds)
}

/// Returns a quantile of the values, or NaN if there are none.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let at = (share * values.len() as f64) as usize;
    values.get(at).copied().unwrap_or(f64::NAN)
}

/// Returns the fifth percentile of times, which other processes disturb least.
pub fn best(values: &[f64]) -> f64 {
    quantile(values, 0.05)
}

pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
    (at(values.len().saturating_sub(1) / 2) + at(values.len() / 2)) / 2.0
}

/// Returns a field of `/proc/self/status` in MiB, if that file exists.
pub fn status_mib(field: &str) -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let mut lines = status.lines();
    let value = lines.find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let kib: f64 = value.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024.0)
}

/// Returns the time to read memory on all threads as fast as it can be done, which measures the read
/// bandwidth. A plain sum is slower where a core must ask for many lines at once.
pub fn read(pool: &Pool, memory: &[u64]) -> Duration {
    const PART: usize = 1 << 15;
    let started = Instant::now();
    let total = AtomicU64::new(0);
    pool.for_each(memory.len().div_ceil(PART), |_, task| {
        let part = &memory[task * PART..memory.len().min((task + 1) * PART)];
        total.fetch_add(combine(part), Ordering::Relaxed);
    });
    black_box(total.into_inner());
    started.elapsed()
}

/// Combines all words with the widest loads of the machine.
fn combine(words: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f")]
        fn widest(words: &[u64]) -> u64 {
            combine_lines(words)
        }
        #[target_feature(enable = "avx2")]
        fn wide(words: &[u64]) -> u64 {
            combine_lines(words)
        }
        if std::is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has the instructions.
            return unsafe { widest(words) };
        }
        if std::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has the instructions.
            return unsafe { wide(words) };
        }
    }
    combine_lines(words)
}

/// Combines all words, in four streams that are prefetched.
#[inline(always)]
fn combine_lines(words: &[u64]) -> u64 {
    /// Number of words ahead that are prefetched.
    const AHEAD: usize = 1024;
    const LINE: usize = 8;
    let stream = words.len() / 4 / LINE * LINE;
    let mut sums = [[0_u64; LINE]; 4];
    for at in (0..stream).step_by(LINE) {
        for (index, sums) in sums.iter_mut().enumerate() {
            let from = index * stream + at;
            prefetch(words.as_ptr().wrapping_add(from + AHEAD));
            let line = &words[from..from + LINE];
            sums.iter_mut()
                .zip(line)
                .for_each(|(sum, word)| *sum |= word);
        }
    }
    sums.into_iter()
        .flatten()
        .chain(words[4 * stream..].iter().copied())
        .fold(0, |all, word| all | word)
}

/// Prefetches an address into the second-level cache, where the instruction set can be asked for it.
#[inline(always)]
fn prefetch(at: *const u64) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch does not access memory, so any address is allowed.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Returns the multiply-accumulates per second of the `gemm` crate for `[rows, k] x [k, n]`, with
/// the columns split among the threads (0 for all).
pub fn gemm_rate(rows: usize, k: usize, n: usize, threads: usize) -> f64 {
    let available = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if threads == 0 { available() } else { threads };
    let (a, b) = (vec![0.5_f32; rows * k], vec![0.25_f32; k * n]);
    let part = n.div_ceil(threads);
    let run = || {
        let started = Instant::now();
        std::thread::scope(|scope| {
            for first in (0..n).step_by(part) {
                let (a, b) = (&a, &b);
                scope.spawn(move || {
                    let n = part.min(b.len() / k - first);
                    let mut c = vec![0.0_f32; rows * n];
                    // SAFETY: `a` is [rows, k], `c` is [rows, n], and `b`, stored as [n, k], has at
                    // least `(first + n) * k` elements, because `n` is at most
                    // `b.len() / k - first`. The strides match these shapes.
                    unsafe {
                        gemm_f32::gemm::f32::get_gemm_fn()(
                            rows,
                            n,
                            k,
                            c.as_mut_ptr(),
                            1,
                            n as isize,
                            false,
                            a.as_ptr(),
                            1,
                            k as isize,
                            b.as_ptr().add(first * k),
                            k as isize,
                            1,
                            0.0,
                            1.0,
                            false,
                            false,
                            false,
                            gemm_common::Parallelism::None,
                        );
                    }
                    black_box(c[0])
                });
            }
        });
        (rows * k * n) as f64 / started.elapsed().as_secs_f64()
    };
    (0..3).map(|_| run()).fold(0.0, f64::max)
}

/// Returns a random weight. In sparse formats, a fraction of `sparsity` is zero.
pub fn weight(
    format: WeightFormat,
    [rows, cols]: [usize; 2],
    sparsity: f64,
    pattern: Option<(usize, usize)>,
) -> Result<StoredMatrix> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    // With a pattern, no weight is removed at random.
    let sparsity = if pattern.is_some() { 0.0 } else { sparsity };
    let threshold = (sparsity * 65536.0) as u32;
    let (bits, group_size, symmetric, sparse) = match format {
        WeightFormat::Int {
            bits,
            group_size,
            symmetric,
        } => (bits, group_size, symmetric, false),
        WeightFormat::SparseInt4 {
            group_size,
            symmetric,
        } => (4, group_size, symmetric, true),
        _ => {
            let value = |row: usize, col: usize| {
                let random: u32 = rng.random();
                let zero = match format {
                    WeightFormat::SparseF16 | WeightFormat::SparseBf16 => {
                        (random & 0xFFFF) < threshold
                    }
                    WeightFormat::NmF16 { n, m } | WeightFormat::NmBf16 { n, m } => {
                        (row + col) % usize::from(m) >= usize::from(n)
                    }
                    _ => false,
                };
                let value = ((random >> 16) as f32 / 32768.0 - 1.0) / 32.0;
                if zero { 0.0 } else { value }
            };
            return StoredMatrix::from_matrix(&Matrix::from_fn(rows, cols, value), format);
        }
    };
    let zero = (1 << (bits - 1)) - u8::from(!symmetric);
    let mut code = || {
        let random: u32 = rng.random();
        let code = (random >> (32 - bits)) as u8;
        match sparse {
            // A fraction of `sparsity` of the codes is the zero point, and the others are not.
            true if (random & 0xFFFF) < threshold => zero,
            true if code == zero => zero + 1,
            _ => code,
        }
    };
    let group_size = group_size.unwrap_or(cols);
    let groups = rows * cols.div_ceil(group_size);
    let mut codes: Vec<u8> = (0..rows * cols).map(|_| code()).collect();
    if let Some((n, m)) = pattern {
        for codes in codes.chunks_mut(cols).flat_map(|row| row.chunks_mut(m)) {
            // Chooses the columns that stay in the way of Knuth's algorithm S.
            let (mut left, mut wanted) = (codes.len(), n);
            for code in codes {
                if rng.random_range(0..left) < wanted {
                    wanted -= 1;
                } else {
                    *code = zero;
                }
                left -= 1;
            }
        }
    }
    let parts = QuantizedParts {
        rows,
        cols,
        bits,
        group_size,
        symmetric,
        codes,
        scales: vec![1.0 / 256.0; groups],
        zeros: vec![zero; groups],
        group_of: None,
    };
    StoredMatrix::from_quantized(&QuantizedMatrix::new(parts)?, sparse)
}

/// Copies a weight to other memory.
pub fn copy(weight: &StoredMatrix) -> Result<StoredMatrix> {
    StoredMatrix::from_parts(&weight.header(), |name| {
        let part = weight.parts().into_iter().find(|part| part.name == name)?;
        Some(Buffer::from_vec(part.bytes.to_vec()))
    })
}

/// Runs a program and parses the last line of its output as JSON.
pub fn ask<T: serde::de::DeserializeOwned>(mut command: std::process::Command) -> Result<T> {
    let program = std::path::PathBuf::from(command.get_program());
    let output = command
        .output()
        .map_err(|source| Error::io(&program, source))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next_back().unwrap_or_default();
    serde_json::from_str(line).map_err(|_| {
        let told = String::from_utf8_lossy(&output.stderr).trim().to_string();
        Error::io(&program, std::io::Error::other(told))
    })
}
