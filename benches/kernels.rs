//! Products with weights as they are stored, against the machine's read bandwidth:
//! `cargo bench --bench kernels -- --threads 2`.
//!
//! Each format cycles through copies of its weight, at least `--mib` together, so that no cache holds them. Formats and a plain sum
//! over a buffer, by the same threads, take turns. Each product, and each part of the sum of about as many bytes, is timed by itself;
//! figures are the time that a twentieth of them stay under, which other processes disturb least, and the median. `share` is the
//! rate at which the weight's bytes are read, as a share of the sum's; `f16/` says how many times as fast as dense f16 a product is.

#[path = "../examples/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use clap::{Parser, ValueEnum};
use elastic_lora::Result;
use elastic_lora::format::{Buffer, QuantizedMatrix, QuantizedParts, StoredMatrix, WeightFormat};
use elastic_lora::kernels::{
    Activations, Level, Linear, Pool, Rows, RowsMut, Scratch, forward_on, scratch_bytes,
};
use elastic_lora::linalg::Matrix;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    F32,
    F16,
    Bf16,
    SparseF16,
    SparseBf16,
    Nm,
    Int4,
    SparseInt4,
    Int4Asym,
    SparseInt4Asym,
    Int8,
    Int3,
    Int2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Instructions {
    Portable,
    Avx2,
    Avx512,
    Avx512Vnni,
    Neon,
    NeonDot,
}

impl Instructions {
    fn level(self) -> Option<Level> {
        let name = match self {
            Self::Portable => "portable",
            Self::Avx2 => "AVX2",
            Self::Avx512 => "AVX-512",
            Self::Avx512Vnni => "AVX-512 VNNI",
            Self::Neon => "NEON",
            Self::NeonDot => "NEON with dot products",
        };
        let mut levels = Level::available().into_iter();
        levels.find(|level| level.name() == name)
    }
}

/// Measure kernels.
#[derive(Parser)]
struct Args {
    /// Sizes of the weight, outputs x inputs
    #[arg(long, value_delimiter = ',', default_values_t = ["4096x4096".to_string(), "4096x11008".to_string()])]
    shapes: Vec<String>,
    /// How the weight is stored
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Format::F16, Format::SparseF16, Format::Int4, Format::SparseInt4])]
    formats: Vec<Format>,
    /// Columns of a group
    #[arg(long, default_value_t = 128)]
    group: usize,
    /// Share of weights that are zero
    #[arg(long, default_value_t = 0.5)]
    sparsity: f64,
    /// Rows of inputs
    #[arg(long, value_delimiter = ',', default_values_t = [1])]
    rows: Vec<usize>,
    /// Threads; 0 for as many as there are
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Mebibytes of copies of each weight
    #[arg(long, default_value_t = 1024)]
    mib: usize,
    /// Turns
    #[arg(long, default_value_t = 7)]
    turns: usize,
    /// 8-bit inputs
    #[arg(long)]
    int8: bool,
    /// Instructions to use; the best by default
    #[arg(long, value_enum)]
    instructions: Option<Instructions>,
    /// What cargo passes to a bench
    #[arg(long, hide = true)]
    bench: bool,
}

/// A weight of random numbers, each zero with some probability.
fn weight(format: Format, rows: usize, cols: usize, args: &Args) -> Result<StoredMatrix> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let threshold = (args.sparsity * 65536.0) as u32;
    let number = |rng: &mut ChaCha8Rng, sparse: bool| {
        let random: u32 = rng.random();
        if sparse && (random & 0xFFFF) < threshold {
            0.0
        } else {
            (random >> 16) as f32 / 32768.0 - 1.0
        }
    };
    let stored = match format {
        Format::F32 => WeightFormat::F32,
        Format::F16 => WeightFormat::F16,
        Format::Bf16 => WeightFormat::Bf16,
        Format::SparseF16 => WeightFormat::SparseF16,
        Format::SparseBf16 => WeightFormat::SparseBf16,
        Format::Nm => WeightFormat::NmF16 { n: 2, m: 4 },
        _ => {
            let bits = match format {
                Format::Int8 => 8,
                Format::Int3 => 3,
                Format::Int2 => 2,
                _ => 4,
            };
            let symmetric = !matches!(format, Format::Int4Asym | Format::SparseInt4Asym);
            let sparse = matches!(format, Format::SparseInt4 | Format::SparseInt4Asym);
            let groups = cols.div_ceil(args.group);
            let zero = if symmetric { 1 << (bits - 1) } else { 5 };
            let code = |rng: &mut ChaCha8Rng| {
                let random: u32 = rng.random();
                let code = (random >> (32 - bits)) as u8;
                if !sparse {
                    return code;
                }
                // Any code but the zero point's, or that.
                if (random & 0xFFFF) < threshold {
                    zero
                } else if code == zero {
                    zero + 1
                } else {
                    code
                }
            };
            let codes = (0..rows * cols).map(|_| code(&mut rng)).collect();
            let parts = QuantizedParts {
                rows,
                cols,
                bits,
                group_size: args.group,
                symmetric,
                codes,
                scales: vec![0.0078125; rows * groups],
                zeros: vec![zero; rows * groups],
                group_of: None,
            };
            return StoredMatrix::from_quantized(&QuantizedMatrix::new(parts)?, sparse);
        }
    };
    let sparse = matches!(format, Format::SparseF16 | Format::SparseBf16);
    let matrix = if format == Format::Nm {
        Matrix::from_fn(rows, cols, |row, col| {
            if (row + col) % 4 < 2 {
                number(&mut rng, false)
            } else {
                0.0
            }
        })
    } else {
        Matrix::from_fn(rows, cols, |_, _| number(&mut rng, sparse))
    };
    StoredMatrix::from_matrix(&matrix, stored)
}

/// The same weight in other memory.
fn copy(weight: &StoredMatrix) -> Result<StoredMatrix> {
    StoredMatrix::from_parts(&weight.header(), |name| {
        let part = weight.parts().into_iter().find(|part| part.name == name)?;
        Some(Buffer::from_vec(part.bytes.to_vec()))
    })
}

/// Seconds for a sum over each 8 MiB of a buffer.
fn sums(pool: &Pool, buffer: &[u8], seconds: &mut Vec<f64>) {
    const WHOLE: usize = 1 << 23;
    const PART: usize = 1 << 18;
    let total = AtomicU64::new(0);
    for buffer in buffer.chunks_exact(WHOLE) {
        let started = Instant::now();
        pool.for_each(WHOLE / PART, |_, task| {
            let mut sums = [0_u64; 32];
            for words in buffer[task * PART..(task + 1) * PART]
                .as_chunks::<8>()
                .0
                .as_chunks::<32>()
                .0
            {
                sums.iter_mut()
                    .zip(words)
                    .for_each(|(sum, word)| *sum = sum.wrapping_add(u64::from_le_bytes(*word)));
            }
            total.fetch_add(
                sums.iter().fold(0, |all, sum| all.wrapping_add(*sum)),
                Ordering::Relaxed,
            );
        });
        seconds.push(started.elapsed().as_secs_f64() / WHOLE as f64);
    }
    black_box(total.into_inner());
}

/// What a share of the values stay under.
fn quantile(values: &[f64], share: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values
        .get((share * values.len() as f64) as usize)
        .copied()
        .unwrap_or(f64::NAN)
}

fn best(values: &[f64]) -> f64 {
    quantile(values, 0.05)
}

fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

struct Subject {
    format: Format,
    copies: Vec<StoredMatrix>,
    /// Seconds of products.
    seconds: Vec<f64>,
}

/// Seconds of the product with each copy.
#[allow(clippy::too_many_arguments)] // what is measured, and where it goes
fn products(
    pool: &Pool,
    level: Level,
    copies: &[StoredMatrix],
    x: &[f32],
    rows: usize,
    activations: Activations,
    seconds: &mut Vec<f64>,
) -> Result<()> {
    let (outputs, inputs) = (copies[0].rows(), copies[0].cols());
    let layer = |weight| Linear {
        weight,
        outputs,
        bias: None,
        adapter: None,
    };
    let mut memory = vec![0; scratch_bytes(pool, &[layer(&copies[0])], rows, inputs, activations)];
    let mut values = vec![0.0; rows * outputs];
    for weight in copies {
        let started = Instant::now();
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
        forward_on(
            level,
            pool,
            &[layer(weight)],
            x,
            inputs,
            &mut [y],
            activations,
            &mut Scratch::new(&mut memory),
        )?;
        seconds.push(started.elapsed().as_secs_f64());
    }
    black_box(&values);
    Ok(())
}

fn bench(args: &Args) -> Result<()> {
    let pool = Pool::new(args.threads);
    let level = match args.instructions {
        None => Level::detect(),
        Some(wanted) => wanted.level().ok_or_else(|| {
            let what = "instructions that this machine has";
            elastic_lora::Error::argument("instructions", format!("{wanted:?}"), what)
        })?,
    };
    let activations = if args.int8 {
        Activations::Int8
    } else {
        Activations::Int16
    };
    let bytes = args.mib << 20;
    let buffer = Buffer::from_vec(vec![1; bytes]);
    let threads = pool.threads();
    common::say!(
        "{} threads, {}, inputs of codes {activations:?}",
        threads,
        level.name()
    );
    for shape in &args.shapes {
        let [rows, cols] = match shape
            .split_once('x')
            .map(|(rows, cols)| (rows.parse(), cols.parse()))
        {
            Some((Ok(rows), Ok(cols))) => [rows, cols],
            _ => {
                return Err(elastic_lora::Error::argument(
                    "shapes",
                    shape,
                    "outputs x inputs, such as 4096x4096",
                ));
            }
        };
        let mut subjects = Vec::new();
        for format in &args.formats {
            let weight = weight(*format, rows, cols, args)?;
            let count = bytes.div_ceil(weight.bytes()).max(1);
            let mut copies = vec![weight];
            while copies.len() < count {
                copies.push(copy(&copies[0])?);
            }
            subjects.push(Subject {
                format: *format,
                copies,
                seconds: Vec::new(),
            });
        }
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for n in &args.rows {
            let x: Vec<f32> = (0..n * cols).map(|_| rng.random_range(-1.0..1.0)).collect();
            subjects
                .iter_mut()
                .for_each(|subject| subject.seconds.clear());
            let mut of_sums = Vec::new();
            for _ in 0..args.turns {
                sums(&pool, &buffer, &mut of_sums);
                for subject in &mut subjects {
                    // Many rows take their time, whatever the memory.
                    let copies = &subject.copies[..subject.copies.len().min(4096 / n).max(1)];
                    products(
                        &pool,
                        level,
                        copies,
                        &x,
                        *n,
                        activations,
                        &mut subject.seconds,
                    )?;
                }
            }
            let rates = [best(&of_sums), median(&of_sums)].map(|seconds| 1e-9 / seconds);
            common::say!(
                "{shape}, {n} rows; a plain sum reads {:.1} GB/s at best, {:.1} in the median",
                rates[0],
                rates[1]
            );
            common::say!(
                "{:<16} {:>8} {:>9} {:>9} {:>8} {:>7} {:>7} {:>7} {:>7} {:>9}",
                "",
                "MB",
                "best us",
                "median",
                "GB/s",
                "share",
                "median",
                "f16/",
                "median",
                "GFLOP/s"
            );
            let dense = subjects
                .iter()
                .find(|subject| subject.format == Format::F16);
            let dense = dense.map_or([f64::NAN; 2], |dense| {
                [best(&dense.seconds), median(&dense.seconds)]
            });
            for subject in &subjects {
                let size = subject.copies[0].bytes() as f64;
                let seconds = [best(&subject.seconds), median(&subject.seconds)];
                let shares = [0, 1].map(|i| size / seconds[i] / 1e9 / rates[i]);
                let name = subject
                    .format
                    .to_possible_value()
                    .map_or(String::new(), |value| value.get_name().to_string());
                common::say!(
                    "{name:<16} {:>8.2} {:>9.1} {:>9.1} {:>8.1} {:>7.3} {:>7.3} {:>7.2} {:>7.2} {:>9.1}",
                    size / 1e6,
                    1e6 * seconds[0],
                    1e6 * seconds[1],
                    size / seconds[0] / 1e9,
                    shares[0],
                    shares[1],
                    dense[0] / seconds[0],
                    dense[1] / seconds[1],
                    2.0 * (rows * cols * n) as f64 / seconds[0] / 1e9
                );
            }
        }
    }
    Ok(())
}

fn main() {
    let args: Args = common::parse();
    // `cargo test --all-targets` runs benches too; there it is enough that they build.
    if args.bench {
        common::exit_on_error(bench(&args));
    } else {
        common::say!("nothing is measured without --bench, which `cargo bench` passes");
    }
}
