//! Compares products with stored weights with the machine's read bandwidth and with dense f16:
//! `cargo bench --bench kernels -- 4096x4096`, or any other part of a name.
//!
//! Each format cycles through copies of its weight with a total size of `BENCH_MIB`, so that they
//! do not fit into a cache. It takes turns with the f16 product of the same shape and with a read
//! of a part of a buffer in four streams, on the same threads. A table after criterion's output
//! shows the fifth percentile of the times, which other processes disturb least, and the median.
//! `share` is the rate at which the bytes of the weight are read, divided by that of the read.
//! `f16/` is the speed of a product divided by that of f16.
//!
//! Settings: `BENCH_SHAPES` (outputs x inputs), `BENCH_ROWS` (rows of inputs), `BENCH_GROUP`
//! (columns per group), `BENCH_SPARSITY`, `BENCH_THREADS` (0 for all), `BENCH_MIB`, `BENCH_INT8=1`
//! for 8-bit inputs, and `BENCH_LEVELS=1` for every instruction set of the machine instead of the
//! best one.

mod common;

use std::cell::OnceCell;
use std::hint::black_box;
use std::time::Duration;

use common::{Shape, Subject, best, flag, in_turns, median, ok, setting, settings, timed};
use criterion::{Criterion, Throughput};
use elastic_lora::Result;
use elastic_lora::format::{StoredMatrix, WeightFormat};
use elastic_lora::kernels::{
    Activations, Level, Linear, Pool, Rows, RowsMut, Scratch, forward_on, scratch_bytes,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A pattern of zeros, N of M.
type NofM = (usize, usize);

/// The formats by name, with their pattern where zeros are not random.
fn formats(group: usize) -> [(&'static str, WeightFormat, Option<NofM>); 14] {
    let group_size = Some(group);
    let int = |bits, symmetric| WeightFormat::Int {
        bits,
        group_size,
        symmetric,
    };
    let sparse = |symmetric| WeightFormat::SparseInt4 {
        group_size,
        symmetric,
    };
    [
        ("f32", WeightFormat::F32, None),
        ("f16", WeightFormat::F16, None),
        ("bf16", WeightFormat::Bf16, None),
        ("sparse-f16", WeightFormat::SparseF16, None),
        ("sparse-bf16", WeightFormat::SparseBf16, None),
        ("nm", WeightFormat::NmF16 { n: 2, m: 4 }, None),
        ("int4", int(4, true), None),
        ("sparse-int4", sparse(true), None),
        ("sparse-int4-16:32", sparse(true), Some((16, 32))),
        ("int4-asym", int(4, false), None),
        ("sparse-int4-asym", sparse(false), None),
        ("int8", int(8, true), None),
        ("int3", int(3, true), None),
        ("int2", int(2, true), None),
    ]
}

/// Returns copies of a random weight with a total size of at least `bytes`.
fn copies(
    format: WeightFormat,
    pattern: Option<NofM>,
    shape: [usize; 2],
    bytes: usize,
) -> Result<Vec<StoredMatrix>> {
    let weight = common::weight(format, shape, setting("BENCH_SPARSITY", "0.5"), pattern)?;
    let count = bytes.div_ceil(weight.bytes()).max(1);
    let mut copies = vec![weight];
    while copies.len() < count {
        copies.push(common::copy(&copies[0])?);
    }
    Ok(copies)
}

/// Returns a measurement of the product, which uses one copy after another.
fn product<'a>(
    level: Level,
    pool: &'a Pool,
    copies: &'a [StoredMatrix],
    x: &'a [f32],
    activations: Activations,
) -> impl FnMut() -> Result<Duration> + 'a {
    let (outputs, inputs) = (copies[0].rows(), copies[0].cols());
    let layer = move |weight| Linear {
        weight,
        outputs,
        bias: None,
        adapter: None,
    };
    let rows = x.len() / inputs;
    let bytes = scratch_bytes(pool, &[layer(&copies[0])], rows, inputs, activations);
    let (mut memory, mut values) = (vec![0; bytes], vec![0.0; rows * outputs]);
    let mut weights = copies.iter().cycle();
    move || {
        let Some(weight) = weights.next() else {
            return Ok(Duration::ZERO);
        };
        let x = Rows {
            values: x,
            rows,
            stride: inputs,
        };
        let y = RowsMut {
            values: &mut values,
            rows,
            stride: outputs,
        };
        let mut scratch = Scratch::new(&mut memory);
        let time = timed(|| {
            let layers = [layer(weight)];
            forward_on(
                level,
                pool,
                &layers,
                x,
                inputs,
                &mut [y],
                activations,
                &mut scratch,
            )
        })?;
        black_box(&values);
        Ok(time)
    }
}

/// Returns a measurement of reading consecutive parts of 8 MiB of a buffer.
fn reads<'a>(pool: &'a Pool, buffer: &'a [u64]) -> impl FnMut() -> Result<Duration> + 'a {
    let mut parts = buffer.chunks_exact(READ).cycle();
    move || Ok(common::read(pool, parts.next().unwrap_or_default()))
}

/// Number of values that are read at once.
const READ: usize = 1 << 20;

fn bench(criterion: &mut Criterion) -> Result<()> {
    let pool = Pool::new(setting("BENCH_THREADS", "0"));
    let activations = match flag("BENCH_INT8") {
        true => Activations::Int8,
        false => Activations::Int16,
    };
    let levels = match flag("BENCH_LEVELS") {
        true => Level::available(),
        false => vec![Level::detect()],
    };
    let [shapes, mib] = match common::quick() {
        true => ["4096x4096", "256"],
        false => ["4096x4096,4096x11008", "1024"],
    };
    let bytes = setting::<usize>("BENCH_MIB", mib) << 20;
    let group_size = setting("BENCH_GROUP", "128");
    let shapes: Vec<Shape> = settings("BENCH_SHAPES", shapes);
    let all_rows: Vec<usize> = settings("BENCH_ROWS", "1");
    let buffer = vec![1; bytes.div_ceil(8).max(READ)];
    println!(
        "{} threads, inputs quantized to {activations:?}",
        pool.threads()
    );
    for Shape(shape) in shapes {
        let dense = OnceCell::new();
        for (level, rows) in levels
            .iter()
            .flat_map(|level| all_rows.iter().map(|n| (*level, *n)))
        {
            let [outputs, inputs] = shape;
            let mut rng = ChaCha8Rng::seed_from_u64(2);
            let x: Vec<f32> = (0..rows * inputs)
                .map(|_| rng.random_range(-1.0..1.0))
                .collect();
            let name = format!("kernels/{}/{outputs}x{inputs}/{rows}", level.name());
            let mut group = criterion.benchmark_group(&name);
            let mut measured = Vec::new();
            for (format_name, format, pattern) in formats(group_size) {
                let own = OnceCell::new();
                let make = || {
                    let dense =
                        dense.get_or_init(|| ok(copies(WeightFormat::F16, None, shape, bytes)));
                    let own = own.get_or_init(|| ok(copies(format, pattern, shape, bytes)));
                    Ok([
                        Box::new(product(level, &pool, own, &x, activations)) as Subject,
                        Box::new(product(level, &pool, dense, &x, activations)),
                        Box::new(reads(&pool, &buffer)),
                    ])
                };
                group.throughput(Throughput::Elements((outputs * inputs * rows) as u64));
                if let Some(seconds) = in_turns(&mut group, format_name, make) {
                    let size = own.get().map_or(0, |own| own[0].bytes());
                    measured.push((format_name, size as f64, seconds));
                }
            }
            group.finish();
            show(&name, (outputs * inputs * rows) as f64, &measured);
        }
    }
    Ok(())
}

fn show(name: &str, macs: f64, measured: &[(&str, f64, [Vec<f64>; 3])]) {
    let of_reads: Vec<f64> = measured
        .iter()
        .flat_map(|(.., seconds)| seconds[2].clone())
        .collect();
    if of_reads.is_empty() {
        return;
    }
    let rate = |seconds: f64| 8e-9 * READ as f64 / seconds;
    println!(
        "{name} rows; memory is read at {:.1} GB/s at best, {:.1} in the median",
        rate(best(&of_reads)),
        rate(median(&of_reads))
    );
    println!(
        "{:<17} {:>8} {:>9} {:>9} {:>8} {:>7} {:>7} {:>7} {:>7} {:>9}",
        "", "MB", "best us", "median", "GB/s", "share", "median", "f16/", "median", "GFLOP/s"
    );
    for (format, size, [own, dense, reads]) in measured {
        let share = |of: fn(&[f64]) -> f64| size / of(own) / 1e9 / rate(of(reads));
        println!(
            "{format:<17} {:>8.2} {:>9.1} {:>9.1} {:>8.1} {:>7.3} {:>7.3} {:>7.2} {:>7.2} {:>9.1}",
            size / 1e6,
            1e6 * best(own),
            1e6 * median(own),
            size / best(own) / 1e9,
            share(best),
            share(median),
            best(dense) / best(own),
            median(dense) / median(own),
            2.0 * macs / best(own) / 1e9
        );
    }
    println!();
}

fn main() {
    common::main(bench);
}
