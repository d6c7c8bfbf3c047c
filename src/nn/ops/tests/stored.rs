//! Stored weights on GPUs: the kernel compared with `f64` sums over the stored values.

use burn::backend::Dispatch;
use burn::tensor::{DType, FloatDType, Tensor};
use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Random, devices, hosts, values};
use crate::format::testing::random_quantized;
use crate::format::{Buffer, MatrixHeader, QuantizedMatrix, StoredMatrix, WeightFormat};
use crate::kernels::{Linear, reference};
use crate::linalg::Matrix;
use crate::nn::ops::extension::DecoderOps;
use crate::nn::ops::terms::FEW_ROWS;
use crate::nn::ops::{self, Dropout, LoraTerm};
use crate::nn::{StoredWeight, host_values};

type Rng = ChaCha8Rng;

/// Codes, some of which equal the zero point, including a whole row and a whole group. Depending on
/// the case, with 32-bit scales, tiny scales, or reordered columns.
fn quantized([rows, cols]: [usize; 2], bits: u8, case: usize, rng: &mut Rng) -> QuantizedMatrix {
    let group_size = [32, 128, 7, 10_000, 24][case % 5];
    let mut parts =
        random_quantized(rows, cols, bits, group_size, case.is_multiple_of(2), rng).into_parts();
    let groups = cols.div_ceil(group_size);
    if case % 3 == 1 {
        parts.group_of = Some(
            (0..cols)
                .map(|_| rng.random_range(0..groups as u32))
                .collect(),
        );
    }
    match case % 4 {
        1 => parts.scales[0] = 0.1,
        2 => parts
            .scales
            .iter_mut()
            .for_each(|scale| *scale = f16::from_f32(*scale * 1e-4).to_f32()),
        _ => {}
    }
    for row in 0..rows {
        for col in 0..cols {
            let group = parts
                .group_of
                .as_ref()
                .map_or(col / group_size, |of| of[col] as usize);
            if row == rows / 2 || (row, group) == (0, 0) || rng.random_bool(0.5) {
                parts.codes[row * cols + col] = parts.zeros[row * groups + group];
            }
        }
    }
    QuantizedMatrix::new(parts).unwrap()
}

/// Numbers at a density of at most two in four, including small ones that are subnormal in half
/// precision, and one empty row.
fn numbers([rows, cols]: [usize; 2], density: f64, rng: &mut Rng) -> Matrix {
    let mut matrix = Matrix::from_fn(rows, cols, |row, col| {
        let size = if row % 3 == 0 { 2e-5 } else { 2.0 };
        if col % 4 < 2 && rng.random_bool(density) {
            rng.random_range(-size..size)
        } else {
            0.0
        }
    });
    matrix.row_mut(rows / 2).fill(0.0);
    matrix
}

fn stored(size: [usize; 2], case: usize, rng: &mut Rng) -> Vec<StoredMatrix> {
    use WeightFormat as F;
    let mut all = Vec::new();
    let density = [0.9, 0.3, 1.0][case % 3];
    for format in [
        F::F32,
        F::F16,
        F::Bf16,
        F::SparseF16,
        F::SparseBf16,
        F::NmF16 { n: 2, m: 4 },
        F::NmBf16 { n: 2, m: 4 },
    ] {
        all.push(StoredMatrix::from_matrix(&numbers(size, density, rng), format).unwrap());
    }
    for (bits, sparse) in [(2, false), (3, false), (4, false), (8, false), (4, true)] {
        all.push(StoredMatrix::from_quantized(&quantized(size, bits, case, rng), sparse).unwrap());
    }
    all
}

/// Fails if a sum differs by more than the error of an `f32` sum.
fn check(name: &str, matrix: &StoredMatrix, x: &[f32], got: &[f32]) {
    let (outputs, cols) = (matrix.rows(), matrix.cols());
    let dense = matrix.to_matrix();
    let layer = Linear {
        weight: matrix,
        outputs,
        bias: None,
        adapter: None,
    };
    assert_eq!(got.len(), x.len() / cols * outputs, "{name}");
    for (x, got) in x.chunks(cols).zip(got.chunks(outputs)) {
        for (row, (want, got)) in reference::forward_row(&layer, x)
            .unwrap()
            .iter()
            .zip(got)
            .enumerate()
        {
            let size: f64 = dense
                .row(row)
                .iter()
                .zip(x)
                .map(|(w, x)| f64::from((w * x).abs()))
                .sum();
            let off = (want - f64::from(*got)).abs();
            assert!(
                off <= 2e-6 * size + 1e-30,
                "{name}, row {row}: {got} instead of {want}, of {size}"
            );
        }
    }
}

#[test]
fn the_kernel_agrees_with_the_oracle() {
    let mut rng = Rng::seed_from_u64(1);
    let sizes = [[3, 1], [5, 257], [37, 64], [4, 5003], [2, 2048]];
    for device in devices().iter().filter(|device| !hosts().contains(device)) {
        for (case, size) in sizes.into_iter().enumerate() {
            for matrix in stored(size, case, &mut rng) {
                let [rows, cols] = size;
                let weight = StoredWeight::new(matrix);
                let matrix = weight.matrix();
                // Each number of inputs needs its own kernel, which takes longer to compile than to
                // run.
                let several = if case == 3 { FEW_ROWS } else { 2 + case };
                for inputs in [1, several] {
                    let name = format!(
                        "{:?} {size:?}, {inputs} inputs, {device:?}",
                        matrix.format()
                    );
                    let x = Random::new(case as u64).tensor::<3>([1, inputs, cols], 1.0, device);
                    let y = ops::linear(x.clone(), &weight);
                    assert_eq!(y.dims(), [1, inputs, rows], "{name}");
                    check(&name, matrix, &values(x), &values(y));
                }
                // Inputs with another memory layout.
                let x = Random::new(7)
                    .tensor::<2>([cols, several], 1.0, device)
                    .transpose();
                let name = format!("{:?} {size:?}, a view, {device:?}", matrix.format());
                check(
                    &name,
                    matrix,
                    &host_values(x.clone()),
                    &values(ops::linear(x, &weight)),
                );
                // All products share one copy: the weight was transferred only once.
                assert_eq!(weight.copies(), 1, "{name}");
            }
        }
    }
}

#[test]
fn many_rows_are_multiplied_with_what_the_kernel_unpacks() {
    let mut rng = Rng::seed_from_u64(2);
    for device in devices().iter().filter(|device| !hosts().contains(device)) {
        for (case, size) in [[7, 45], [33, 600]].into_iter().enumerate() {
            for matrix in stored(size, case, &mut rng) {
                let [rows, cols] = size;
                let weight = StoredWeight::new(matrix);
                let matrix = weight.matrix();
                let name = format!("{:?} {size:?}, {device:?}", matrix.format());
                // Multiplying with the identity returns the weight exactly.
                let identity = Matrix::from_fn(cols, cols, |row, col| f32::from(row == col));
                let identity =
                    Tensor::<1>::from_floats(identity.as_slice(), device).reshape([cols, cols]);
                let got = values(ops::linear(identity, &weight).transpose());
                assert_eq!(got, matrix.to_matrix().as_slice(), "{name}");

                let tape = device.clone().autodiff();
                for inputs in [3, FEW_ROWS + 3] {
                    let grad = Random::new(3).tensor::<2>([inputs, rows], 1.0, device);
                    let x = Random::new(4)
                        .tensor::<2>([inputs, cols], 1.0, &tape)
                        .require_grad();
                    let [a, b] = [[cols, 3], [3, rows]]
                        .map(|size| Random::new(5).tensor::<2>(size, 0.1, &tape));
                    let term = LoraTerm {
                        rank: 2,
                        scale: 0.0,
                        dropout: Dropout {
                            probability: 0.3,
                            seed: 5,
                        },
                    };
                    let y = ops::lora_linear(x.clone(), &weight, a, b, term);
                    let y_grad = (y.clone() * Tensor::from_data(grad.to_data(), &tape))
                        .sum()
                        .backward();
                    check(
                        &name,
                        matrix,
                        &values(x.clone().inner()),
                        &values(y.inner()),
                    );
                    // The products of the transposed weight, by the same oracle.
                    let dense = matrix.to_matrix();
                    let transposed = Matrix::from_fn(cols, rows, |row, col| dense.row(col)[row]);
                    let transposed =
                        StoredMatrix::from_matrix(&transposed, WeightFormat::F32).unwrap();
                    let slopes = values(x.grad(&y_grad).unwrap());
                    check(
                        &format!("{name}, gradient"),
                        &transposed,
                        &values(grad),
                        &slopes,
                    );
                }
                assert_eq!(weight.copies(), 1, "{name}");
            }
        }
    }
}

/// More rows than a launch can have cubes along one axis.
#[test]
fn a_vocabulary_is_multiplied_too() {
    let mut rng = Rng::seed_from_u64(3);
    for device in devices().iter().filter(|device| !hosts().contains(device)) {
        for matrix in [
            StoredMatrix::from_matrix(
                &numbers([70_001, 9], 0.9, &mut rng),
                WeightFormat::SparseF16,
            )
            .unwrap(),
            StoredMatrix::from_quantized(&quantized([70_001, 9], 4, 0, &mut rng), false).unwrap(),
        ] {
            let weight = StoredWeight::new(matrix);
            let x = Random::new(1).tensor::<2>([2, 9], 1.0, device);
            let y = values(ops::linear(x.clone(), &weight));
            check(&format!("{device:?}"), weight.matrix(), &values(x), &y);
            assert_eq!(weight.copies(), 1);
        }
    }
}

/// All special values of half precision.
#[test]
fn halves_are_widened_exactly() {
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for device in devices().iter().filter(|device| !hosts().contains(device)) {
        for format in [WeightFormat::F16, WeightFormat::Bf16] {
            let header = MatrixHeader::new(format, 256, 256);
            let part = |_: &str| Some(Buffer::from_vec(all.clone()));
            let weight = StoredWeight::new(StoredMatrix::from_parts(&header, part).unwrap());
            let beside = Tensor::<2>::zeros([FEW_ROWS + 1, 256], device);
            let got = Dispatch::stored_dense(beside.into_dispatch(), weight.clone());
            let got = values(Tensor::<2>::from_dispatch(got).transpose());
            for (index, (got, want)) in got
                .iter()
                .zip(weight.matrix().to_matrix().as_slice())
                .enumerate()
            {
                // A device may treat subnormal `f32`s as zero; of these formats only bfloat16 has
                // such values.
                let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
                assert!(
                    same || want.is_subnormal() && *got == 0.0,
                    "{format:?} {index:#x}: {got} instead of {want}"
                );
            }
        }
    }
}

#[test]
fn inputs_of_other_types_and_no_inputs_are_served() {
    let mut rng = Rng::seed_from_u64(4);
    for device in devices().iter().filter(|device| !hosts().contains(device)) {
        for matrix in stored([6, 40], 0, &mut rng) {
            let weight = StoredWeight::new(matrix);
            let none = ops::linear(Tensor::<2>::zeros([0, 40], device), &weight);
            assert_eq!(none.dims(), [0, 6]);
            if !device.supports_dtype(DType::F16) {
                continue;
            }
            let x = Random::new(1)
                .tensor::<2>([2, 40], 1.0, device)
                .cast(FloatDType::F16);
            let y = ops::linear(x.clone(), &weight);
            assert_eq!(y.dtype(), DType::F16);
            let want = ops::linear(x.cast(FloatDType::F32), &weight);
            let size = values(want.clone().abs().max())[0];
            let off = values((y.cast(FloatDType::F32) - want).abs().max())[0];
            assert!(off <= 1e-3 * size, "{off} of {size}");
        }
    }
}
