//! Compares the kernels for every format and instruction set with sums in `f64`.

#[cfg(unix)]
mod bounds;

use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::linear::units_of;
use super::{
    Activations, Adapter, Level, Linear, Pool, Rows, RowsMut, Scratch, forward_on, reference,
    scratch_bytes,
};
use crate::format::testing::random_quantized;
use crate::format::{Buffer, QuantizedMatrix, StoredMatrix, WeightFormat};
use crate::linalg::Matrix;

type Rng = ChaCha8Rng;

/// Rounding error of `f32` sums, relative to the sum of the absolute values of the products.
const F32_TOLERANCE: f64 = 2e-6;

fn sparse_matrix(rows: usize, cols: usize, density: f64, rng: &mut Rng) -> Matrix {
    let mut matrix = Matrix::from_fn(rows, cols, |_, _| {
        if rng.random_bool(density) {
            rng.random_range(-2.0..2.0)
        } else {
            0.0
        }
    });
    if rows > 2 && rng.random() {
        let empty = rng.random_range(0..rows);
        matrix.row_mut(empty).fill(0.0);
    }
    matrix
}

fn keep_two_of_four(matrix: &mut Matrix) {
    let cols = matrix.cols();
    for group in matrix
        .as_mut_slice()
        .chunks_mut(cols)
        .flat_map(|row| row.chunks_mut(4))
    {
        let mut kept = 0;
        for value in group {
            kept += usize::from(*value != 0.0);
            if kept > 2 {
                *value = 0.0;
            }
        }
    }
}

fn quantized(rows: usize, cols: usize, bits: u8, rng: &mut Rng) -> QuantizedMatrix {
    let group_size = [8, 16, 32, 64, 128, 256, 17, 24, 100_000][rng.random_range(0..9)];
    let mut parts = random_quantized(rows, cols, bits, group_size, rng.random(), rng).into_parts();
    let groups = cols.div_ceil(group_size);
    let density = rng.random_range(0.0..1.0);
    for row in 0..rows {
        for col in 0..cols {
            if !rng.random_bool(density) {
                parts.codes[row * cols + col] = parts.zeros[row * groups + col / group_size];
            }
        }
    }
    // A group of zeros, 32-bit scales, tiny scales, and a custom order of groups.
    if rng.random_bool(0.3) {
        let at = rng.random_range(0..parts.scales.len());
        parts.scales[at] = 0.0;
        let (row, group) = (at / groups, at % groups);
        let start = row * cols + group * group_size;
        let zero = parts.zeros[at];
        let end = row * cols + cols.min((group + 1).saturating_mul(group_size));
        parts.codes[start..end].fill(zero);
    }
    if rng.random_bool(0.2) {
        parts.scales[0] = 0.1;
    }
    if rng.random_bool(0.1) {
        parts
            .scales
            .iter_mut()
            .for_each(|scale| *scale = f16::from_f32(*scale * 1e-4).to_f32());
    }
    if rng.random_bool(0.1) {
        parts.group_of = Some(
            (0..cols)
                .map(|_| rng.random_range(0..groups as u32))
                .collect(),
        );
    }
    QuantizedMatrix::new(parts).unwrap()
}

/// Keeps at most half of the codes of each group of columns, which makes a weight even unless it
/// has few codes.
fn half_of(weight: QuantizedMatrix, rng: &mut Rng) -> QuantizedMatrix {
    let m = [4, 16, 32, 64][rng.random_range(0..4)];
    let mut parts = weight.into_parts();
    let groups = parts.zeros.len() / parts.rows;
    for row in 0..parts.rows {
        for first in (0..parts.cols).step_by(m) {
            let mut kept = 0;
            for col in first..parts.cols.min(first + m) {
                let group = match &parts.group_of {
                    Some(groups) => groups[col] as usize,
                    None => col / parts.group_size,
                };
                let zero = parts.zeros[row * groups + group];
                let code = &mut parts.codes[row * parts.cols + col];
                kept += usize::from(*code != zero);
                if kept > m / 2 {
                    *code = zero;
                }
            }
        }
    }
    QuantizedMatrix::new(parts).unwrap()
}

const FORMATS: usize = 14;

fn stored(kind: usize, rows: usize, cols: usize, rng: &mut Rng) -> StoredMatrix {
    use WeightFormat as F;
    let density = [0.02, 0.5, 0.5, 0.9, 1.0][rng.random_range(0..5)];
    let mut matrix = sparse_matrix(rows, cols, density, rng);
    if rng.random_bool(0.1) {
        // Subnormal half-precision numbers.
        matrix
            .as_mut_slice()
            .iter_mut()
            .for_each(|value| *value *= 1e-5);
    }
    let format = match kind {
        0 => F::F32,
        1 => F::F16,
        2 => F::Bf16,
        3 => F::SparseF16,
        4 => F::SparseBf16,
        5 | 6 => {
            keep_two_of_four(&mut matrix);
            if kind == 5 {
                F::NmF16 { n: 2, m: 4 }
            } else {
                F::NmBf16 { n: 2, m: 4 }
            }
        }
        7 => return StoredMatrix::from_quantized(&quantized(rows, cols, 2, rng), false).unwrap(),
        8 => return StoredMatrix::from_quantized(&quantized(rows, cols, 3, rng), false).unwrap(),
        9 => return StoredMatrix::from_quantized(&quantized(rows, cols, 8, rng), false).unwrap(),
        10 | 11 => {
            return StoredMatrix::from_quantized(&quantized(rows, cols, 4, rng), false).unwrap();
        }
        12 => return StoredMatrix::from_quantized(&quantized(rows, cols, 4, rng), true).unwrap(),
        _ => {
            let weight = half_of(quantized(rows, cols, 4, rng), rng);
            return StoredMatrix::from_quantized(&weight, true).unwrap();
        }
    };
    StoredMatrix::from_matrix(&matrix, format).unwrap()
}

fn is_codes(weight: &StoredMatrix) -> bool {
    weight.to_quantized().is_some()
}

/// Returns random numbers of several magnitudes, with a block of zeros now and then.
fn inputs(count: usize, rng: &mut Rng) -> Vec<f32> {
    let size = [1.0, 1.0, 1e-3, 100.0][rng.random_range(0..4)];
    let mut x: Vec<f32> = (0..count).map(|_| rng.random_range(-size..size)).collect();
    if rng.random_bool(0.2) {
        let from = rng.random_range(0..count);
        x[from..(from + 200).min(count)].fill(0.0);
    }
    if rng.random_bool(0.2) {
        x[rng.random_range(0..count)] = 30.0 * size;
    }
    x
}

struct Case {
    weight: StoredMatrix,
    outputs: usize,
    bias: Option<Vec<f32>>,
    adapter: Option<(StoredMatrix, StoredMatrix, usize, f32)>,
}

impl Case {
    fn random(kind: usize, cols: usize, rng: &mut Rng) -> Self {
        let rows = rng.random_range(1..60);
        let weight = stored(kind, rows, cols, rng);
        let bias = rng.random_bool(0.4).then(|| inputs(rows + 2, rng));
        let adapter = rng.random_bool(0.5).then(|| {
            let most = rng.random_range(1..20);
            let number = rng.random_range(0..3);
            let [a, bt] = [cols, rows].map(|width| stored(number, most, width, rng));
            (
                a,
                bt,
                rng.random_range(0..=most),
                rng.random_range(0.1..3.0),
            )
        });
        Self {
            weight,
            outputs: rng.random_range(0..=rows),
            bias,
            adapter,
        }
    }

    fn linear(&self) -> Linear<'_> {
        Linear {
            weight: &self.weight,
            outputs: self.outputs,
            bias: self.bias.as_deref(),
            adapter: self.adapter.as_ref().map(|(a, bt, rank, scale)| Adapter {
                a,
                bt,
                rank: *rank,
                scale: *scale,
            }),
        }
    }

    /// Returns the error allowed for each output: a part of the absolute values of the products,
    /// and, for codes, a part of the largest input in each block times the weights of that block.
    fn tolerances(&self, x: &[f32], rounding: f64) -> Vec<f64> {
        let weight = self.weight.to_matrix();
        let codes = is_codes(&self.weight);
        let grid = self.weight.to_quantized();
        let size = |row: &[f32]| -> f64 {
            row.iter()
                .zip(x)
                .map(|(w, x)| f64::from((w * x).abs()))
                .sum()
        };
        let mut all = vec![0.0; self.outputs];
        for (row, all) in all.iter_mut().enumerate() {
            let w = weight.row(row);
            let mut sizes = size(w);
            // Integer codes count from 0, not from their zero point.
            if let Some(grid) = &grid {
                let of = |col: usize| {
                    f64::from(grid.grid(row, grid.group_of(col)).0)
                        * f64::from(1_u32 << grid.parts().bits)
                };
                sizes += x
                    .iter()
                    .enumerate()
                    .map(|(col, x)| of(col) * f64::from(x.abs()))
                    .sum::<f64>();
            }
            *all = F32_TOLERANCE
                * (sizes
                    + self
                        .bias
                        .as_ref()
                        .map_or(0.0, |bias| f64::from(bias[row].abs())));
            if codes {
                for (x, w) in x.chunks(128).zip(w.chunks(128)) {
                    let most = f64::from(x.iter().fold(0.0_f32, |most, x| most.max(x.abs())));
                    *all += rounding * most * w.iter().map(|w| f64::from(w.abs())).sum::<f64>();
                }
            }
        }
        if let Some((a, bt, rank, scale)) = &self.adapter {
            let (a, bt) = (a.to_matrix(), bt.to_matrix());
            for rank in 0..*rank {
                let h = f64::from(*scale) * size(a.row(rank));
                all.iter_mut()
                    .zip(bt.row(rank))
                    .for_each(|(all, b)| *all += F32_TOLERANCE * h * f64::from(b.abs()));
            }
        }
        all.iter_mut().for_each(|all| *all += 1e-30);
        all
    }
}

/// Returns the results of all layers. Each row of outputs is followed by a margin that must stay
/// unchanged.
fn run(
    level: Level,
    pool: &Pool,
    cases: &[Case],
    x: &[f32],
    [rows, stride, inputs]: [usize; 3],
    activations: Activations,
) -> Vec<Vec<f32>> {
    let layers: Vec<Linear<'_>> = cases.iter().map(Case::linear).collect();
    let mut y: Vec<Vec<f32>> = cases
        .iter()
        .map(|case| vec![7.5; rows * (case.outputs + 3)])
        .collect();
    let mut memory = vec![0xA5; scratch_bytes(pool, &layers, rows, inputs, activations)];
    let mut outputs: Vec<RowsMut<'_>> = y
        .iter_mut()
        .zip(cases)
        .map(|(values, case)| RowsMut {
            values,
            rows,
            stride: case.outputs + 3,
        })
        .collect();
    let x = Rows {
        values: x,
        rows,
        stride,
    };
    let mut scratch = Scratch::new(&mut memory);
    forward_on(
        level,
        pool,
        &layers,
        x,
        inputs,
        &mut outputs,
        activations,
        &mut scratch,
    )
    .unwrap();
    y
}

fn compare(
    level: Level,
    cases: &[Case],
    x: &[f32],
    [rows, stride, inputs]: [usize; 3],
    y: &[Vec<f32>],
    rounding: f64,
) {
    for (case, y) in cases.iter().zip(y) {
        for row in 0..rows {
            let x = &x[row * stride..row * stride + inputs];
            let expected = reference::forward_row(&case.linear(), x).unwrap();
            let tolerances = case.tolerances(x, rounding);
            let y = &y[row * (case.outputs + 3)..(row + 1) * (case.outputs + 3)];
            for (index, ((y, expected), tolerance)) in
                y.iter().zip(expected).zip(tolerances).enumerate()
            {
                let error = (f64::from(*y) - expected).abs();
                assert!(
                    error <= tolerance,
                    "{} {:?} {} x {} of {}, {inputs} inputs, row {row} of {rows}, output {index}: {y}, not {expected}; {error:e} over {tolerance:e}",
                    level.name(),
                    case.weight.format(),
                    case.weight.rows(),
                    case.weight.cols(),
                    case.outputs,
                );
            }
            assert_eq!(y[case.outputs..], [7.5; 3], "written past the outputs");
        }
    }
}

#[test]
fn every_format_agrees_with_the_oracle_on_every_instruction_set() {
    let mut rng = Rng::seed_from_u64(1);
    let pools: Vec<Pool> = (1..=4).map(Pool::new).collect();
    for number in 0..FORMATS * 24 {
        let cols = match number % 4 {
            0 => rng.random_range(1..70),
            1 => 64 * rng.random_range(1..9),
            2 => 128 * rng.random_range(1..22),
            _ => rng.random_range(1..1200),
        };
        let kind = number % FORMATS;
        let mut cases = vec![Case::random(kind, cols, &mut rng)];
        // Add more layers on the same inputs.
        while rng.random_bool(0.3) {
            let kind = rng.random_range(0..FORMATS);
            cases.push(Case::random(kind, cols, &mut rng));
        }
        let inputs_active = if rng.random_bool(0.6) {
            cols
        } else {
            rng.random_range(1..=cols)
        };
        let rows = if rng.random_bool(0.7) {
            rng.random_range(1..10)
        } else {
            rng.random_range(10..41)
        };
        let stride = inputs_active + rng.random_range(0..5);
        let x = inputs(rows * stride, &mut rng);
        let size = [rows, stride, inputs_active];
        let activations = if rng.random_bool(0.7) {
            Activations::Int16
        } else {
            Activations::Int8
        };
        let rounding = if activations == Activations::Int16 {
            1.6e-5
        } else {
            4.0e-3
        };
        for level in Level::available() {
            let y = run(level, &pools[0], &cases, &x, size, activations);
            compare(level, &cases, &x, size, &y, rounding);
            let pool = &pools[rng.random_range(1..4)];
            let bits =
                |y: &[Vec<f32>]| y.concat().iter().map(|y| y.to_bits()).collect::<Vec<u32>>();
            assert_eq!(
                bits(&run(level, pool, &cases, &x, size, activations)),
                bits(&y),
                "{pool:?}"
            );
        }
    }
}

#[test]
fn codes_of_every_width_multiply_integers_wherever_there_is_vector_code() {
    let mut rng = Rng::seed_from_u64(5);
    for bits in [2, 3, 4, 8] {
        for group_size in [8, 16, 32, 64, 128, 384, 1000] {
            let matrix = random_quantized(3, 700, bits, group_size, rng.random(), &mut rng);
            for sparse in [false, true]
                .into_iter()
                .filter(|sparse| !sparse || bits == 4)
            {
                let weight = StoredMatrix::from_quantized(&matrix, sparse).unwrap();
                for level in Level::available() {
                    for rows in [1, 2, 3, 40] {
                        let has = units_of(level, rows, weight.body()).is_some();
                        assert_eq!(
                            has,
                            level != Level::PORTABLE,
                            "{} {:?}",
                            level.name(),
                            weight.format()
                        );
                    }
                }
            }
        }
    }
}

/// Checks each kernel by itself at the sizes where something ends: words, blocks, two blocks, and
/// the memory after a row.
#[test]
fn every_length_of_rows_agrees_with_the_oracle() {
    let mut rng = Rng::seed_from_u64(6);
    let pool = Pool::new(1);
    for cols in [
        1, 7, 8, 9, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 320, 384, 385, 448,
        512, 641,
    ] {
        for kind in 0..FORMATS {
            let cases = [Case {
                adapter: None,
                ..Case::random(kind, cols, &mut rng)
            }];
            for rows in [1, 2, 3, 4, 11] {
                let inputs_active = if rng.random() {
                    cols
                } else {
                    rng.random_range(1..=cols)
                };
                let x = inputs(rows * cols, &mut rng);
                let (activations, rounding) = if rng.random() {
                    (Activations::Int16, 1.6e-5)
                } else {
                    (Activations::Int8, 4.0e-3)
                };
                for level in Level::available() {
                    let size = [rows, cols, inputs_active];
                    let y = run(level, &pool, &cases, &x, size, activations);
                    compare(level, &cases, &x, size, &y, rounding);
                }
            }
        }
    }
}

/// Checks rows of inputs that do not fit into a first-level cache, for which rows of the weight are
/// grouped.
#[test]
fn long_rows_agree_with_the_oracle() {
    let mut rng = Rng::seed_from_u64(7);
    let pools = [1, 2].map(Pool::new);
    for kind in 0..FORMATS {
        for cols in [6145, 6464, 6912, 11008] {
            let cases = [Case {
                adapter: None,
                ..Case::random(kind, cols, &mut rng)
            }];
            let inputs_active = if rng.random() {
                cols
            } else {
                rng.random_range(6145..=cols)
            };
            let x = inputs(cols, &mut rng);
            for level in Level::available() {
                let size = [1, cols, inputs_active];
                let y = run(level, &pools[0], &cases, &x, size, Activations::Int16);
                compare(level, &cases, &x, size, &y, 1.6e-5);
                assert_eq!(
                    run(level, &pools[1], &cases, &x, size, Activations::Int16),
                    y
                );
            }
        }
    }
}

#[test]
fn one_row_is_the_same_alone_and_numbers_that_are_none_stay_so() {
    let mut rng = Rng::seed_from_u64(2);
    let pool = Pool::new(2);
    for kind in 0..FORMATS {
        let cols = rng.random_range(200..700);
        let cases = [Case {
            adapter: None,
            bias: None,
            ..Case::random(kind, cols, &mut rng)
        }];
        let mut x = inputs(cols, &mut rng);
        for level in Level::available() {
            x[5] = 1e-40;
            let y = run(
                level,
                &pool,
                &cases,
                &x,
                [1, cols, cols],
                Activations::Int16,
            );
            compare(level, &cases, &x, [1, cols, cols], &y, 1.6e-5);
            let tiny: Vec<f32> = x.iter().map(|x| x * 1e-36).collect();
            let y = run(
                level,
                &pool,
                &cases,
                &tiny,
                [1, cols, cols],
                Activations::Int16,
            );
            assert!(y[0].iter().all(|y| y.is_finite()));
        }
        let [mut infinite, mut none] = [x.clone(), x.clone()];
        infinite[7] = f32::INFINITY;
        none[130] = f32::NAN;
        for level in Level::available() {
            for x in [&infinite, &none] {
                let y = run(level, &pool, &cases, x, [1, cols, cols], Activations::Int16);
                let weight = cases[0].weight.to_matrix();
                for (row, y) in y[0][..cases[0].outputs].iter().enumerate() {
                    let exact: f32 = weight.row(row).iter().zip(x).map(|(w, x)| w * x).sum();
                    // A zero in a sparse weight may hide the input that it would have multiplied.
                    let seen = weight.row(row)[7] != 0.0 && weight.row(row)[130] != 0.0;
                    assert!(
                        !seen || exact.is_finite() || !y.is_finite(),
                        "{:?}",
                        cases[0].weight.format()
                    );
                }
            }
        }
    }
}

#[test]
fn lying_parts_never_reach_outside() {
    let mut rng = Rng::seed_from_u64(3);
    let pool = Pool::new(2);
    for number in 0..150 {
        let kind = [3, 4, 5, 6, 12, 13][number % 6];
        let cols = rng.random_range(1..400);
        let case = Case::random(kind, cols, &mut rng);
        let find = |name: &str| {
            let part = case
                .weight
                .parts()
                .into_iter()
                .find(|part| part.name == name)?;
            let mut bytes = part.bytes.to_vec();
            match rng.random_range(0..4) {
                0 => bytes.iter_mut().for_each(|byte| *byte = rng.random()),
                1 if ["values", "codes"].contains(&name) => {
                    bytes.truncate(rng.random_range(0..=bytes.len() / 2) * 2)
                }
                2 => bytes.fill(0xFF),
                _ => (),
            }
            Some(Buffer::from_vec(bytes))
        };
        let Ok(weight) = StoredMatrix::from_parts(&case.weight.header(), find) else {
            continue;
        };
        let case = Case { weight, ..case };
        for rows in [1, 2, 7, 40] {
            let x = inputs(rows * cols, &mut rng);
            for level in Level::available() {
                run(
                    level,
                    &pool,
                    std::slice::from_ref(&case),
                    &x,
                    [rows, cols, cols],
                    Activations::Int16,
                );
            }
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let mut rng = Rng::seed_from_u64(4);
    let pool = Pool::new(1);
    let [weight, a, bt] =
        [(6, 10), (3, 10), (3, 6)].map(|(rows, cols)| stored(0, rows, cols, &mut rng));
    let sparse = stored(3, 3, 6, &mut rng);
    let bias = [0.0; 6];
    let adapter = Adapter {
        a: &a,
        bt: &bt,
        rank: 3,
        scale: 1.0,
    };
    let good = Linear {
        weight: &weight,
        outputs: 6,
        bias: Some(&bias),
        adapter: Some(adapter),
    };
    let x = [0.5; 20];
    let ask = |layer: Linear<'_>,
               rows: usize,
               stride: usize,
               inputs: usize,
               [y_rows, y_stride, y_len]: [usize; 3],
               bytes: usize| {
        let mut values = vec![0.0; y_len];
        let mut memory = vec![0; bytes];
        let mut y = [RowsMut {
            values: &mut values,
            rows: y_rows,
            stride: y_stride,
        }];
        let x = Rows {
            values: &x,
            rows,
            stride,
        };
        super::forward(
            &pool,
            &[layer],
            x,
            inputs,
            &mut y,
            Activations::Int16,
            &mut Scratch::new(&mut memory),
        )
    };
    let bytes = scratch_bytes(&pool, &[good], 2, 10, Activations::Int16);
    ask(good, 2, 10, 10, [2, 6, 12], bytes).unwrap();
    for (layer, rows, stride, inputs, y, bytes) in [
        (good, 2, 11, 10, [2, 6, 12], bytes),
        (good, 2, 9, 10, [2, 6, 12], bytes),
        (good, 2, 10, 11, [2, 6, 12], bytes),
        (good, 2, 10, 10, [1, 6, 12], bytes),
        (good, 2, 10, 10, [2, 5, 12], bytes),
        (good, 2, 10, 10, [2, 6, 11], bytes),
        (good, 2, usize::MAX, 10, [2, 6, 12], bytes),
        (good, 2, 10, 10, [2, 6, 12], 64),
        (Linear { outputs: 7, ..good }, 2, 10, 10, [2, 7, 14], bytes),
        (
            Linear {
                bias: Some(&bias[..5]),
                ..good
            },
            2,
            10,
            10,
            [2, 6, 12],
            bytes,
        ),
        (
            Linear {
                adapter: Some(Adapter { rank: 4, ..adapter }),
                ..good
            },
            2,
            10,
            10,
            [2, 6, 12],
            2 * bytes,
        ),
        (
            Linear {
                adapter: Some(Adapter {
                    bt: &sparse,
                    ..adapter
                }),
                ..good
            },
            2,
            10,
            10,
            [2, 6, 12],
            bytes,
        ),
        (
            Linear {
                adapter: Some(Adapter { a: &bt, ..adapter }),
                ..good
            },
            2,
            10,
            10,
            [2, 6, 12],
            bytes,
        ),
    ] {
        assert!(ask(layer, rows, stride, inputs, y, bytes).is_err());
    }
}

/// With 8 bits, a large input costs the precision of its group only, where groups have scales.
#[test]
fn a_large_input_costs_its_group_only() {
    use super::linear::Sharing;
    let mut rng = Rng::seed_from_u64(11);
    let pool = Pool::new(1);
    for (rows, bits, sparse, group_size, level) in [1, 3, 12]
        .into_iter()
        .flat_map(|rows| [(rows, 4, true), (rows, 4, false), (rows, 3, false)])
        .flat_map(|(rows, bits, sparse)| {
            [16, 128].map(|group_size| (rows, bits, sparse, group_size))
        })
        .flat_map(|(rows, bits, sparse, group_size)| {
            Level::available()
                .into_iter()
                .map(move |level| (rows, bits, sparse, group_size, level))
        })
    {
        let sharing = super::linear::sharing(level, rows);
        let first_group = |col: usize| match sharing {
            Sharing::Block => col.is_multiple_of(128),
            Sharing::EveryFourth => (col % 128 / 8).is_multiple_of(4),
            Sharing::Quarter => col % 128 < 32,
        };
        let (outputs, cols) = (20, 300);
        let mut parts =
            random_quantized(outputs, cols, bits, group_size, true, &mut rng).into_parts();
        for (index, code) in parts.codes.iter_mut().enumerate() {
            if first_group(index % cols) {
                *code = 1 << (bits - 1);
            }
        }
        let weight = QuantizedMatrix::new(parts).unwrap();
        let case = Case {
            weight: StoredMatrix::from_quantized(&weight, sparse).unwrap(),
            outputs,
            bias: None,
            adapter: None,
        };
        let mut x: Vec<f32> = (0..rows * cols)
            .map(|_| rng.random_range(-1.0..1.0))
            .collect();
        let ordinary = x.clone();
        for (index, x) in x.iter_mut().enumerate() {
            if index % cols % 128 == 0 {
                *x = 1000.0;
            }
        }
        let sizes = [rows, cols, cols];
        let cases = [case];
        let y = run(level, &pool, &cases, &x, sizes, Activations::Int8);
        // The tolerance is that of the ordinary inputs, or else that of all.
        let rounding = if sharing == Sharing::Block {
            1000.0 * 0.51 / 127.0
        } else {
            0.51 / 127.0
        };
        compare(level, &cases, &ordinary, sizes, &y, rounding);
    }
}
