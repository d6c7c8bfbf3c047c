//! Products with a summed weight as a single node, on every device of the build.

use burn::tensor::{Bool, Device, FloatDType, Tensor, TensorData};
use half::bf16;

use super::{Random, close, compare_all, devices, slack, values};
use crate::nn::InputGroups;
use crate::nn::ops::{self, Dropout, GridTerm, LoraTerm};

const MAX_RANK: usize = 5;
/// Sizes large enough for the kernels that do not store the gradient of the sum.
const LARGE: [usize; 3] = [131, 141, 133];

fn term(rank: usize) -> LoraTerm {
    LoraTerm {
        rank,
        scale: 0.6,
        dropout: Dropout::NONE,
    }
}

struct Case {
    x: Tensor<2>,
    weight: Tensor<2>,
    mask: Tensor<2, Bool>,
    a: Tensor<2>,
    b: Tensor<2>,
}

impl Case {
    fn new([rows, d_input, d_output]: [usize; 3], seed: u64, device: &Device) -> Self {
        let mut random = Random::new(seed);
        let mask = random
            .tensor::<2>([d_input, d_output], 1.0, device)
            .greater_elem(0.0);
        let weight = random
            .tensor::<2>([d_input, d_output], 1.0, device)
            .mask_fill(mask.clone().bool_not(), 0.0);
        Self {
            x: random.tensor([rows, d_input], 1.0, device),
            weight,
            mask,
            a: random.tensor([d_input, MAX_RANK], 0.5, device),
            b: random.tensor([MAX_RANK, d_output], 0.5, device),
        }
    }

    fn inputs(&self) -> Vec<Tensor<2>> {
        vec![self.x.clone(), self.a.clone(), self.b.clone()]
    }

    /// The result, and the gradients of input and factors, under a weighted sum.
    fn run(&self, op: impl Fn(Tensor<2>, Tensor<2>, Tensor<2>) -> Tensor<2>) -> Vec<Vec<f32>> {
        let tape = self.x.device().autodiff();
        let leaves: Vec<Tensor<2>> = self
            .inputs()
            .iter()
            .map(|input| Tensor::from_data(input.to_data(), &tape).require_grad())
            .collect();
        let y = op(leaves[0].clone(), leaves[1].clone(), leaves[2].clone());
        let weights = Random::new(9).tensor::<2>(y.dims(), 1.0, &tape);
        let gradients = (y.clone() * weights).sum().backward();
        let gradients = leaves
            .iter()
            .map(|leaf| values(leaf.grad(&gradients).unwrap()));
        std::iter::once(values(y.inner()))
            .chain(gradients)
            .collect()
    }
}

#[test]
fn one_node_is_the_plain_composition() {
    for device in devices() {
        for (seed, shape) in [[1, 1, 1], [7, 17, 5], [66, 65, 41], LARGE]
            .into_iter()
            .enumerate()
        {
            let case = Case::new(shape, 40 + seed as u64, device);
            for rank in [1, 3, MAX_RANK] {
                compare_all(
                    &format!("{shape:?}, rank {rank}"),
                    case.inputs(),
                    |inputs| {
                        let [x, a, b]: [Tensor<2>; 3] = inputs.try_into().unwrap();
                        ops::summed_linear(
                            x,
                            case.weight.clone(),
                            case.mask.clone(),
                            [a, b],
                            term(rank),
                            false,
                        )
                    },
                    |inputs| {
                        let [x, a, b]: [Tensor<2>; 3] = inputs.try_into().unwrap();
                        let delta = a.narrow(1, 0, rank).matmul(b.narrow(0, 0, rank)) * 0.6;
                        x.matmul(case.weight.clone() + delta * case.mask.clone().float())
                    },
                );
            }
        }
    }
}

#[test]
fn rounded_gradients_are_close_and_nothing_else_changes() {
    for device in devices() {
        for shape in [[7, 17, 5], LARGE, [300, 97, 260]] {
            let case = Case::new(shape, 50, device);
            let run = |rounded| {
                case.run(|x, a, b| {
                    ops::summed_linear(
                        x,
                        case.weight.clone(),
                        case.mask.clone(),
                        [a, b],
                        term(3),
                        rounded,
                    )
                })
            };
            let (got, want) = (run(true), run(false));
            assert_eq!(
                (&got[0], &got[1]),
                (&want[0], &want[1]),
                "{shape:?}: the result and the gradient of the input"
            );
            for (got, want) in got[2..].iter().zip(&want[2..]) {
                let norm = |values: &mut dyn Iterator<Item = f32>| {
                    values
                        .map(|value| f64::from(value).powi(2))
                        .sum::<f64>()
                        .sqrt()
                };
                let error = norm(&mut got.iter().zip(want).map(|(got, want)| got - want));
                let share = error / norm(&mut want.iter().copied());
                eprintln!(
                    "{shape:?} on {device:?}: rounded gradients are off by {:.3} %",
                    100.0 * share
                );
                assert!(share < 6e-3, "{shape:?} on {device:?}: off by {share}");
            }
        }
    }
}

#[test]
fn threads_do_not_matter() {
    let case = Case::new([150, 260, 330], 60, &Device::flex());
    for rounded in [false, true] {
        let run = || {
            case.run(|x, a, b| {
                ops::summed_linear(
                    x,
                    case.weight.clone(),
                    case.mask.clone(),
                    [a, b],
                    term(4),
                    rounded,
                )
            })
        };
        let want = run();
        for threads in [1, 2, 3] {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            assert!(
                pool.install(run) == want,
                "{threads} threads, rounded {rounded}"
            );
        }
    }
}

#[test]
fn beside_a_weight_of_bf16_the_sum_is_the_nearest_of_bf16() {
    for device in devices()
        .iter()
        .filter(|device| device.supports_dtype(FloatDType::BF16))
    {
        for [d_input, d_output] in [[17, 5], [65, 1100]] {
            let case = Case::new([2, d_input, d_output], 70, device);
            let half = case.weight.clone().cast(FloatDType::BF16);
            let wide = half.clone().cast(FloatDType::F32);
            let sum = |weight| {
                ops::summed_weight(
                    weight,
                    case.mask.clone(),
                    case.a.clone(),
                    case.b.clone(),
                    term(3),
                )
            };
            let (got, want) = (sum(half.clone()), values(sum(wide)));
            assert_eq!(got.dtype(), half.dtype());
            let want: Vec<f32> = want
                .into_iter()
                .map(|value| bf16::from_f32(value).to_f32())
                .collect();
            // Elsewhere the product may differ in its last bit and then be rounded to the other
            // side.
            let tolerance = if device == &Device::flex() { 0.0 } else { 5e-3 };
            close("sum", &values(got.cast(FloatDType::F32)), &want, tolerance);
        }
    }
}

#[test]
fn a_quantized_sum_in_one_node_is_the_sum_and_the_product() {
    for device in devices() {
        for (shape, bits) in [([7, 17, 5], 4), (LARGE, 3)] {
            let case = Case::new(shape, 80, device);
            let [_, d_input, d_output] = shape;
            let groups = d_input.div_ceil(8);
            let scales = Random::new(81)
                .tensor::<2>([groups, d_output], 0.1, device)
                .abs()
                + 0.2;
            let zeros = Tensor::<2>::from_data(
                TensorData::new(vec![3.0_f32; groups * d_output], [groups, d_output]),
                device,
            );
            let term = || GridTerm {
                lora: term(4),
                bits,
                groups: InputGroups {
                    size: 8,
                    order: None,
                },
            };
            let tape = device.clone().autodiff();
            for (trained, half) in [(false, false), (true, false), (false, true), (true, true)] {
                if half && !device.supports_dtype(FloatDType::BF16) {
                    continue;
                }
                let cast = |tensor: Tensor<2>| {
                    if half {
                        tensor.cast(FloatDType::BF16)
                    } else {
                        tensor
                    }
                };
                let weight = cast(case.weight.clone());
                let run = |one: bool| {
                    let scales = Tensor::<2>::from_data(scales.to_data(), &tape);
                    let scales = if trained {
                        scales.require_grad()
                    } else {
                        scales.inner()
                    };
                    case.run(|x, a, b| {
                        let (weight, mask, zeros) =
                            (weight.clone(), case.mask.clone(), zeros.clone());
                        if one {
                            return ops::quantized_linear(
                                x,
                                weight,
                                mask,
                                [a, b],
                                [scales.clone(), zeros],
                                term(),
                                false,
                            );
                        }
                        ops::linear(
                            x,
                            ops::quantized_sum(weight, mask, a, b, scales.clone(), zeros, term()),
                        )
                    })
                };
                let (got, want) = (run(true), run(false));
                assert_eq!(got[0], want[0], "{shape:?}, trained {trained}, half {half}");
                for (got, want) in got[1..].iter().zip(&want[1..]) {
                    close(
                        &format!("{shape:?}, trained {trained}, half {half}"),
                        got,
                        want,
                        5e-6 * slack(device),
                    );
                }
            }
        }
    }
}
