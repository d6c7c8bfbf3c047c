//! A summed weight on a grid, and packed weights, on every device of the build.

use std::sync::Arc;

use burn::tensor::{Bool, Device, Tensor};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::{Random, close, compare_all, devices, slack, values};
use crate::format::testing::random_quantized;
use crate::format::{PackedMatrix, QuantizedMatrix, StoredMatrix, WeightFormat};
use crate::linalg::Matrix;
use crate::nn::ops::{self, Dropout, GridTerm, LoraTerm};
use crate::nn::{InputGroups, StoredWeight, tensor_from_matrix};

/// A weight with all its parameters: maximum rank 5, partly active, and a scale other than 1.
struct Case {
    weight: Tensor<2>,
    mask: Tensor<2, Bool>,
    a: Tensor<2>,
    b: Tensor<2>,
    scales: Tensor<2>,
    zeros: Tensor<2>,
    term: GridTerm,
}

const MAX_RANK: usize = 5;

impl Case {
    /// The step size is chosen so that some weights are outside the grid.
    fn new(
        [d_input, d_output]: [usize; 2],
        bits: u8,
        size: usize,
        rank: usize,
        device: &Device,
        seed: u64,
    ) -> Self {
        let mut random = Random::new(seed);
        let top = f32::from(u8::MAX >> (8 - bits));
        let n_groups = d_input.div_ceil(size);
        let order = (seed % 2 == 1).then(|| {
            (0..d_input)
                .map(|_| random.0.random_range(0..n_groups as u32))
                .collect::<Arc<[u32]>>()
        });
        let mask = random
            .tensor::<2>([d_input, d_output], 1.0, device)
            .greater_elem(0.0);
        let weight = random
            .tensor::<2>([d_input, d_output], 1.0, device)
            .mask_fill(mask.clone().bool_not(), 0.0);
        let scales = random.tensor::<2>([n_groups, d_output], 0.4, device).abs() / f64::from(top)
            + 0.9 / f64::from(top);
        let zeros: Vec<f32> = (0..n_groups * d_output)
            .map(|_| random.0.random_range(0..=top as u32) as f32)
            .collect();
        Self {
            weight,
            mask,
            a: random.tensor([d_input, MAX_RANK], 0.5, device),
            b: random.tensor([MAX_RANK, d_output], 0.5, device),
            scales,
            zeros: Tensor::from_data(
                burn::tensor::TensorData::new(zeros, [n_groups, d_output]),
                device,
            ),
            term: GridTerm {
                lora: LoraTerm {
                    rank,
                    scale: 1.7,
                    dropout: Dropout::NONE,
                },
                bits,
                groups: InputGroups { size, order },
            },
        }
    }

    fn top(&self) -> f32 {
        f32::from(u8::MAX >> (8 - self.term.bits))
    }

    fn sum(&self, a: Tensor<2>, b: Tensor<2>, scales: Tensor<2>) -> Tensor<2> {
        let (weight, mask, zeros) = (self.weight.clone(), self.mask.clone(), self.zeros.clone());
        ops::quantized_sum(weight, mask, a, b, scales, zeros, self.term.clone())
    }

    /// Plain operations, where rounding adds a constant, so that gradients are straight-through.
    fn plain(&self, a: Tensor<2>, b: Tensor<2>, scales: Tensor<2>) -> Tensor<2> {
        let [d_input, _] = self.weight.dims();
        let rank = self.term.lora.rank;
        let delta = (a.narrow(1, 0, rank) * self.term.lora.scale).matmul(b.narrow(0, 0, rank));
        let sum = self.weight.clone() + delta.mask_fill(self.mask.clone().bool_not(), 0.0);
        let groups: Vec<i32> = (0..d_input)
            .map(|row| self.term.groups.of(row) as i32)
            .collect();
        let groups = Tensor::from_data(groups.as_slice(), &self.weight.device());
        let (scales, zeros) = (
            scales.select(0, groups.clone()),
            self.zeros.clone().select(0, groups),
        );
        // The value through the scales alone, and the value through the sum alone.
        let x = sum.clone().detach() / scales.clone().detach();
        let (low, high) = (zeros.clone().neg(), zeros.clone().neg() + self.top());
        let step = x
            .clone()
            .max_pair(low.clone())
            .min_pair(high.clone())
            .round();
        let outside = x.clone().lower(low).bool_or(x.clone().greater(high));
        let slope = step.clone() - x.mask_fill(outside, 0.0);
        let value = (step * scales.clone().detach()).detach();
        let by_scales = slope.detach() * scales;
        value + (sum.clone() - sum.detach()) + (by_scales.clone() - by_scales.detach())
    }
}

fn three(inputs: Vec<Tensor<2>>) -> [Tensor<2>; 3] {
    inputs.try_into().unwrap()
}

#[test]
fn results_and_straight_through_gradients_are_those_of_plain_operations() {
    for device in devices() {
        let tape = device.clone().autodiff();
        for (seed, bits) in [2_u8, 3, 4, 8, 4, 3].into_iter().enumerate() {
            for rank in 1..=MAX_RANK {
                let shape = [[23, 17], [7, 33], [40, 5]][rank % 3];
                let case = Case::new(shape, bits, [5, 8, 64][seed % 3], rank, device, seed as u64);
                let name = format!("{bits} bits, rank {rank}, case {seed} on {device:?}");
                let run = |op: &dyn Fn([Tensor<2>; 3]) -> Tensor<2>| {
                    let leaf =
                        |x: &Tensor<2>| Tensor::<2>::from_data(x.to_data(), &tape).require_grad();
                    let inputs = [leaf(&case.a), leaf(&case.b), leaf(&case.scales)];
                    let y = op(inputs.clone());
                    let weights = Random::new(9).tensor::<2>(shape, 1.0, device);
                    let gradients = (y.clone() * weights).sum().backward();
                    let mut all = vec![values(y.inner())];
                    all.extend(
                        inputs
                            .iter()
                            .map(|input| values(input.grad(&gradients).unwrap())),
                    );
                    all
                };
                let got = run(&|[a, b, scales]| case.sum(a, b, scales));
                let want = run(&|[a, b, scales]| case.plain(a, b, scales));
                // A sum halfway between two steps, up to rounding, may go to either.
                let flips = got[0]
                    .iter()
                    .zip(&want[0])
                    .filter(|(a, b)| (**a - **b).abs() > 1e-5)
                    .count();
                assert_eq!(flips, 0, "{name}: {flips} other codes");
                for (index, (got, want)) in got.iter().zip(&want).enumerate() {
                    close(&format!("{name}, {index}"), got, want, 2e-5 * slack(device));
                }
                // The same bits without autodiff, and the same gradients if the scales are not
                // trained.
                let plain = case.sum(case.a.clone(), case.b.clone(), case.scales.clone());
                assert_eq!(values(plain), got[0], "{name}: off the tape");
                let fixed = run(&|[a, b, scales]| {
                    case.sum(a, b, case.scales.clone()) + scales.sum().unsqueeze() * 0.0
                });
                assert_eq!(
                    (&fixed[1], &fixed[2]),
                    (&got[1], &got[2]),
                    "{name}: fixed scales"
                );
                // Zeros stay zero, and rows beyond the active rank get no gradient.
                let kept = values(case.mask.clone().float());
                assert!(
                    got[0]
                        .iter()
                        .zip(kept)
                        .all(|(value, kept)| kept != 0.0 || value.to_bits() == 0)
                );
                assert!(got[2][rank * shape[1]..].iter().all(|slope| *slope == 0.0));
            }
        }
    }
}

/// With steps much smaller than the tolerance, the grid has no effect, and finite differences
/// measure the gradients.
#[test]
fn gradients_on_a_fine_grid_are_slopes() {
    let device = Device::flex();
    for rank in [1, 3, MAX_RANK] {
        let mut case = Case::new([14, 9], 8, 5, rank, &device, 4);
        case.zeros = case.zeros.clone() * 0.0 + 128.0;
        case.weight = case.weight.clone() * 0.4;
        case.scales = case.scales.clone() * 0.0 + 0.02;
        let inputs = vec![case.a.clone() * 0.3, case.b.clone() * 0.3];
        // One weighted sum over all weights, so that rounding errors average out.
        let smooth = |inputs: Vec<Tensor<2>>| {
            let mask = case.mask.clone();
            ops::summed_weight(
                case.weight.clone(),
                mask,
                inputs[0].clone(),
                inputs[1].clone(),
                case.term.lora,
            )
        };
        let fused = |inputs: Vec<Tensor<2>>| {
            let [a, b, scales] = three(vec![
                inputs[0].clone(),
                inputs[1].clone(),
                case.scales.clone(),
            ]);
            let rounded = case.sum(a, b, scales);
            // Adds back the rounding error as a constant.
            let sum = smooth(inputs);
            rounded.clone() + (sum.clone() - rounded).detach() + (sum.clone() - sum) * 0.0
        };
        compare_all("a fine grid", inputs, fused, smooth);
    }
}

#[test]
fn a_group_without_a_scale_is_zero_and_sends_no_gradient_to_it() {
    for device in devices() {
        let case = Case::new([11, 6], 4, 4, 2, device, 6);
        let none = Tensor::<2>::from_data([[1.0_f32], [0.0], [-1.0]], device).expand([3, 6]);
        let tape = device.clone().autodiff();
        let scales =
            Tensor::<2>::from_data((case.scales.clone() * none).to_data(), &tape).require_grad();
        let y = case.sum(case.a.clone(), case.b.clone(), scales.clone());
        let gradients = y.clone().square().sum().backward();
        assert!(values(y.inner())[4 * 6..].iter().all(|value| *value == 0.0));
        let slopes = values(scales.grad(&gradients).unwrap());
        assert!(
            slopes[6..].iter().all(|slope| *slope == 0.0)
                && slopes[..6].iter().any(|slope| *slope != 0.0)
        );
    }
}

/// A weight of every stored format, with a name.
fn stored([d_input, d_output]: [usize; 2], rng: &mut ChaCha8Rng) -> Vec<(String, StoredMatrix)> {
    let mut weights = Vec::new();
    for bits in [2, 3, 4, 8] {
        let matrix = random_quantized(
            d_output,
            d_input,
            bits,
            if bits == 8 { 7 } else { 32 },
            bits == 4,
            rng,
        );
        weights.push((
            format!("{bits} bits"),
            StoredMatrix::from(PackedMatrix::new(&matrix)),
        ));
        if bits == 4 {
            let mut parts = matrix.into_parts();
            parts
                .codes
                .iter_mut()
                .filter(|_| rng.random_bool(0.5))
                .for_each(|code| *code = 8);
            let matrix = QuantizedMatrix::new(parts).unwrap();
            weights.push((
                "sparse, 4 bits".into(),
                StoredMatrix::from_quantized(&matrix, true).unwrap(),
            ));
        }
    }
    let matrix = Matrix::from_fn(d_output, d_input, |_, column| {
        if column % 4 < 2 && rng.random_bool(0.9) {
            rng.random_range(-1.0..1.0)
        } else {
            0.0
        }
    });
    for format in [
        WeightFormat::F32,
        WeightFormat::F16,
        WeightFormat::SparseF16,
        WeightFormat::SparseBf16,
        WeightFormat::NmF16 { n: 2, m: 4 },
    ] {
        weights.push((
            format!("{format:?}"),
            StoredMatrix::from_matrix(&matrix, format).unwrap(),
        ));
    }
    weights
}

#[test]
fn a_stored_weight_gives_what_the_dense_one_gives() {
    for device in devices() {
        for (dims, rows) in [
            ([19, 30], 1),
            ([301, 257], 3),
            ([64, 5], 8),
            ([130, 33], 11),
        ] {
            let mut random = Random::new(rows as u64);
            for (name, matrix) in stored(dims, &mut random.0) {
                let [d_input, d_output] = dims;
                let dense = tensor_from_matrix(&matrix.to_matrix(), device);
                let weight = StoredWeight::new(matrix);
                let dropout = Dropout {
                    probability: 0.3,
                    seed: 5,
                };
                let term = LoraTerm {
                    rank: 2,
                    scale: 0.7,
                    dropout,
                };
                let x = random.tensor::<3>([1, rows, d_input], 1.0, device);
                let factors = [
                    random.tensor([d_input, 3], 0.1, device),
                    random.tensor([3, d_output], 0.1, device),
                ];
                let both = |x: Tensor<3>, [a, b]: [Tensor<2>; 2]| {
                    let got = ops::linear(x.clone(), &weight)
                        + ops::lora_linear(x.clone(), &weight, a.clone(), b.clone(), term);
                    let want = ops::linear(x.clone(), dense.clone())
                        + ops::lora_linear(x, dense.clone(), a, b, term);
                    [got, want]
                };
                let name = format!("{name}, {rows} rows, {dims:?}, {device:?}");
                // On the host, few rows of inputs are rounded to 16 bits before they multiply
                // codes.
                let tolerance = 2e-5 * slack(device);
                let [got, want] = both(x.clone(), factors.clone()).map(values);
                close(&name, &got, &want, tolerance);

                let tape = device.clone().autodiff();
                let slopes = |which: usize| {
                    let x = Tensor::<3>::from_data(x.to_data(), &tape).require_grad();
                    let factors = factors.clone().map(|factor| {
                        Tensor::<2>::from_data(factor.to_data(), &tape).require_grad()
                    });
                    let y = both(x.clone(), factors.clone())[which].clone();
                    let weights = Random::new(7).tensor(y.dims(), 1.0, &tape);
                    let gradients = (y * weights).sum().backward();
                    let mut slopes = vec![values(x.grad(&gradients).unwrap())];
                    slopes.extend(factors.map(|factor| values(factor.grad(&gradients).unwrap())));
                    slopes
                };
                for (index, (got, want)) in slopes(0).iter().zip(&slopes(1)).enumerate() {
                    close(
                        &format!("{name}, gradient {index}"),
                        got,
                        want,
                        5e-6 * slack(device),
                    );
                }
            }
        }
    }
}
