//! Linear layers, adapters and the head, on every device that the build has.

use burn::tensor::activation::{log_softmax, softmax};
use burn::tensor::{Bool, Device, FloatDType, Int, Tensor, TensorData};
use rand::RngExt;

use super::plain;
use super::{Random, close, compare_all, devices, hosts, slack, values};
use crate::kernels::gemm::{Engine, Kind};
use crate::nn::ops::{self, Dropout, LoraTerm};

fn three<const D: usize>(inputs: Vec<Tensor<D>>) -> [Tensor<D>; 3] {
    inputs.try_into().unwrap()
}

fn two<const D: usize>(inputs: Vec<Tensor<D>>) -> [Tensor<D>; 2] {
    inputs.try_into().unwrap()
}

fn active(a: Tensor<2>, b: Tensor<2>, rank: usize) -> (Tensor<2>, Tensor<2>) {
    (a.narrow(1, 0, rank), b.narrow(0, 0, rank))
}

fn mask(random: &mut Random, shape: [usize; 2], device: &Device) -> Tensor<2, Bool> {
    random.tensor::<2>(shape, 1.0, device).greater_elem(0.0)
}

#[test]
fn linear_is_the_matrix_product() {
    for device in devices() {
        let mut random = Random::new(21);
        for [rows, d_input, d_output] in [[1, 1, 1], [5, 17, 3], [33, 40, 70]] {
            let inputs = vec![
                random.tensor([rows, d_input], 1.0, device),
                random.tensor([d_input, d_output], 1.0, device),
            ];
            let fused = |inputs| {
                let [x, weight] = two::<2>(inputs);
                ops::linear(x, weight)
            };
            compare_all("linear", inputs.clone(), fused, |inputs| {
                let [x, weight] = two(inputs);
                x.matmul(weight)
            });
            // A transposed view, like the weight of a tied head.
            let turned = random.tensor::<2>([d_output, d_input], 1.0, device);
            let x = vec![inputs[0].clone()];
            let fused = |x: Vec<Tensor<2>>| ops::linear(x[0].clone(), turned.clone().transpose());
            compare_all("turned", x, fused, |x| {
                x[0].clone().matmul(turned.clone().transpose())
            });
        }
    }
}

#[test]
fn lora_linear_is_the_plain_composition_at_every_rank() {
    for device in devices() {
        let mut random = Random::new(22);
        for ([rows, d_input, d_output], max_rank) in
            [([1, 1, 1], 1), ([7, 17, 5], 4), ([66, 65, 41], 9)]
        {
            let weight = random.tensor::<2>([d_input, d_output], 1.0, device);
            for rank in 1..=max_rank {
                for probability in [0.0, 0.3] {
                    let dropout = Dropout {
                        probability,
                        seed: rank as u64,
                    };
                    let term = LoraTerm {
                        rank,
                        scale: 0.7,
                        dropout,
                    };
                    let inputs = vec![
                        random.tensor([rows, d_input], 1.0, device),
                        random.tensor([d_input, max_rank], 1.0, device),
                        random.tensor([max_rank, d_output], 1.0, device),
                    ];
                    let factors = TensorData::new(dropout.factors(rows * d_input), [rows, d_input]);
                    let factors = Tensor::<2>::from_data(factors, device);
                    compare_all(
                        &format!("rank {rank} of {max_rank}, dropout {probability}"),
                        inputs,
                        |inputs| {
                            let [x, a, b] = three::<2>(inputs);
                            ops::lora_linear(x, weight.clone(), a, b, term)
                        },
                        |inputs| {
                            let [x, a, b] = three(inputs);
                            let (a, b) = active(a, b, rank);
                            x.clone().matmul(weight.clone())
                                + (x * factors.clone()).matmul(a).matmul(b) * 0.7
                        },
                    );
                }
            }
        }
    }
}

#[test]
fn inactive_ranks_have_no_gradient_and_no_influence() {
    for device in devices() {
        let tape = device.clone().autodiff();
        let mut random = Random::new(23);
        let term = LoraTerm {
            rank: 3,
            scale: 1.5,
            dropout: Dropout::NONE,
        };
        let (x, weight) = (
            random.tensor::<3>([2, 4, 11], 1.0, &tape),
            random.tensor::<2>([11, 6], 1.0, device),
        );
        let a = random.tensor::<2>([11, 8], 1.0, &tape);
        // Inactive ranks are never read.
        let poison = Tensor::<2>::full([11, 5], f32::NAN, &tape);
        let a = Tensor::cat(vec![a.narrow(1, 0, 3), poison], 1).require_grad();
        let b = random.tensor::<2>([8, 6], 1.0, &tape).require_grad();
        let mask = mask(&mut random, [11, 6], device);
        let x_alone = x.clone();
        let thin = ops::lora_linear(x_alone, weight.clone(), a.clone(), b.clone(), term).sum();
        let sum = ops::linear(
            x,
            ops::summed_weight(weight, mask, a.clone(), b.clone(), term),
        )
        .square()
        .sum();
        let gradients = (thin + sum).backward();
        let (da, db) = (
            values(a.grad(&gradients).unwrap()),
            values(b.grad(&gradients).unwrap()),
        );
        for (index, value) in da.iter().enumerate() {
            assert_eq!(
                *value == 0.0,
                index % 8 >= 3,
                "A[{}, {}] {value}",
                index / 8,
                index % 8
            );
        }
        for (index, value) in db.iter().enumerate() {
            assert_eq!(
                *value == 0.0,
                index / 6 >= 3,
                "B[{}, {}] {value}",
                index / 6,
                index % 6
            );
        }
    }
}

#[test]
fn summed_weight_is_the_plain_composition() {
    for device in devices() {
        let mut random = Random::new(24);
        for ([d_input, d_output], max_rank) in [([1, 1], 1), ([17, 5], 4), ([65, 1100], 6)] {
            let weight = random.tensor::<2>([d_input, d_output], 1.0, device);
            let mask = mask(&mut random, [d_input, d_output], device);
            for rank in [1, usize::div_ceil(max_rank, 2), max_rank] {
                let term = LoraTerm {
                    rank,
                    scale: 0.6,
                    dropout: Dropout::NONE,
                };
                let inputs = vec![
                    random.tensor([d_input, max_rank], 1.0, device),
                    random.tensor([max_rank, d_output], 1.0, device),
                ];
                for weight in [
                    weight.clone(),
                    weight
                        .clone()
                        .transpose()
                        .reshape([d_output, d_input])
                        .transpose(),
                ] {
                    compare_all(
                        &format!("masked rank {rank} of {max_rank}"),
                        inputs.clone(),
                        |inputs| {
                            let [a, b] = two::<2>(inputs);
                            ops::summed_weight(weight.clone(), mask.clone(), a, b, term)
                        },
                        |inputs| {
                            let [a, b] = two(inputs);
                            let (a, b) = active(a, b, rank);
                            weight.clone() + a.matmul(b) * 0.6 * mask.clone().float()
                        },
                    );
                }
            }
        }
    }
}

#[test]
fn head_loss_is_the_plain_composition() {
    for device in devices() {
        let tape = device.clone().autodiff();
        let mut random = Random::new(25);
        for ([n, d_model, classes], softcap) in [
            ([1, 1, 2], None),
            ([3, 5, 17], Some(1.5)),
            ([67, 9, 515], None),
            ([67, 9, 515], Some(3.0)),
            ([1100, 3, 5], None),
        ] {
            let targets: Vec<i32> = (0..n)
                .map(|_| random.0.random_range(0..classes as i32))
                .collect();
            let targets = |device: &Device| {
                Tensor::<1, Int>::from_data(TensorData::new(targets.clone(), [n]), device)
            };
            let hidden = random.tensor::<2>([n, d_model], 1.0, device);
            let weight = random.tensor::<2>([d_model, classes], 1.0, device);
            let plain = |hidden: Tensor<2>, weight: Tensor<2>| {
                let logits = plain::softcapped(hidden.matmul(weight), softcap);
                let targets = targets(&logits.device().without_autodiff());
                plain::cross_entropy_sum(logits, targets)
            };
            compare_all(
                "head",
                vec![hidden.clone(), weight.clone()],
                |inputs| {
                    let [hidden, weight] = two(inputs);
                    ops::head_loss(hidden, weight, targets(device), softcap)
                },
                |inputs| {
                    let [hidden, weight] = two::<2>(inputs);
                    plain(hidden, weight)
                },
            );
            // A frozen head tied to an embedding, and a trained head on frozen states.
            let table = weight.clone().transpose().reshape([classes, d_model]);
            compare_all(
                "tied head",
                vec![hidden.clone()],
                |inputs| {
                    ops::head_loss(
                        inputs[0].clone(),
                        table.clone().transpose(),
                        targets(device),
                        softcap,
                    )
                },
                |inputs| plain(inputs[0].clone(), table.clone().transpose()),
            );
            compare_all(
                "head on constants",
                vec![weight],
                |inputs| {
                    ops::head_loss(hidden.clone(), inputs[0].clone(), targets(device), softcap)
                },
                |inputs| plain(hidden.clone(), inputs[0].clone()),
            );
        }
        let logits =
            Tensor::<2>::from_floats([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], &tape).require_grad();
        let loss = ops::head_loss(
            logits.clone(),
            Tensor::eye(3, device),
            Tensor::from_ints([1, 2], device),
            None,
        ) * 2.0;
        let gradients = values(logits.grad(&loss.backward()).unwrap());
        close(
            "loss",
            &values(loss.inner()),
            &[4e4 + 2.0 * 3_f32.ln()],
            1e-6 * slack(device),
        );
        let third = 2.0 / 3.0;
        close(
            "gradient",
            &gradients,
            &[2.0, -2.0, 0.0, third, third, third - 2.0],
            1e-4 * slack(device),
        );
    }
}

/// Whether products with a bf16 weight round the other operand on this machine's processor.
fn rounds() -> bool {
    Engine::new(Kind::Bf16, true).is_some()
}

#[test]
fn distilled_loss_is_the_plain_composition() {
    for device in devices() {
        let mut random = Random::new(28);
        for [n, d_model, classes] in [[1, 1, 2], [3, 5, 17], [67, 9, 515], [1100, 3, 5]] {
            let ids: Vec<i32> = (0..n)
                .map(|_| random.0.random_range(0..classes as i32))
                .collect();
            let ids = |device: &Device| {
                Tensor::<1, Int>::from_data(TensorData::new(ids.clone(), [n]), device)
            };
            let hidden = random.tensor::<2>([n, d_model], 1.0, device);
            let teacher = random.tensor::<2>([n, d_model], 2.0, device);
            let weight = random.tensor::<2>([d_model, classes], 1.0, device);
            for (mix, softcap) in [(0.0, None), (0.3, None), (0.3, Some(2.5)), (1.0, None)] {
                // As a matrix, and as the view that a tied head has of the embedding table.
                for weight in [
                    weight.clone(),
                    weight
                        .clone()
                        .transpose()
                        .reshape([classes, d_model])
                        .transpose(),
                ] {
                    let taught = softmax(
                        plain::softcapped(teacher.clone().matmul(weight.clone()), softcap),
                        1,
                    );
                    compare_all(
                        &format!("mix {mix}"),
                        vec![hidden.clone()],
                        |inputs| {
                            let ids = ids(device);
                            ops::distilled_loss(
                                inputs[0].clone(),
                                weight.clone(),
                                teacher.clone(),
                                ids,
                                mix,
                                softcap,
                            )
                            .0
                        },
                        |inputs| {
                            let logits = inputs[0].clone().matmul(weight.clone());
                            let logits = plain::softcapped(logits, softcap);
                            let hard = plain::cross_entropy_sum(logits.clone(), ids(device));
                            let soft = (taught.clone() * log_softmax(logits, 1)).sum().neg();
                            soft * mix + hard * (1.0 - mix)
                        },
                    );
                }
                // The loss against the targets alone, with and without autodiff.
                let want = values(ops::head_loss(
                    hidden.clone(),
                    weight.clone(),
                    ids(device),
                    softcap,
                ));
                for hidden in [
                    hidden.clone(),
                    Tensor::from_inner(hidden.clone()).require_grad(),
                ] {
                    let (_, nll) = ops::distilled_loss(
                        hidden,
                        weight.clone(),
                        teacher.clone(),
                        ids(device),
                        mix,
                        softcap,
                    );
                    close(
                        "likelihood",
                        &values(nll.without_autodiff()),
                        &want,
                        2e-6 * slack(device),
                    );
                }
            }
            // A student that agrees with its teacher gets no gradient.
            let student = Tensor::from_inner(hidden.clone()).require_grad();
            let (loss, _) = ops::distilled_loss(
                student.clone(),
                weight.clone(),
                hidden,
                ids(device),
                1.0,
                None,
            );
            let gradient = values(student.grad(&loss.backward()).unwrap());
            assert!(
                gradient
                    .iter()
                    .all(|slope| slope.abs() < 2e-7 * d_model as f32 * slack(device))
            );
        }
        // Logits for which `exp` overflows.
        let [student, teacher] =
            [[[1e4_f32, -1e4, 0.0]], [[-1e4, 1e4, 1e4]]].map(|x| Tensor::from_floats(x, device));
        let student = Tensor::<2>::from_inner(student).require_grad();
        let targets = Tensor::from_ints([2], device);
        let (loss, nll) = ops::distilled_loss(
            student.clone(),
            Tensor::eye(3, device),
            teacher,
            targets,
            0.5,
            None,
        );
        let gradients = values(student.grad(&loss.backward()).unwrap());
        close(
            "loss",
            &values(loss.inner()),
            &[0.5 * 1.5e4 + 0.5 * 1e4],
            1e-6 * slack(device),
        );
        close(
            "likelihood",
            &values(nll.without_autodiff()),
            &[1e4],
            1e-6 * slack(device),
        );
        close(
            "gradient",
            &gradients,
            &[1.0, -0.25, -0.75],
            1e-6 * slack(device),
        );
    }
}

#[test]
fn a_distilled_loss_in_double_precision_takes_the_portable_way() {
    for device in &hosts() {
        let run = |dtype: FloatDType| {
            let mut random = Random::new(29);
            let mut leaf = |shape: [usize; 2]| random.tensor::<2>(shape, 1.5, device).cast(dtype);
            let (hidden, teacher, weight) = (leaf([1030, 7]), leaf([1030, 7]), leaf([7, 19]));
            let targets: Vec<i32> = (0..1030).map(|row| row * 5 % 19).collect();
            let student = Tensor::from_inner(hidden).require_grad();
            let targets = Tensor::<1, Int>::from_data(targets.as_slice(), device);
            let (loss, nll) =
                ops::distilled_loss(student.clone(), weight, teacher, targets, 0.4, None);
            let gradients = student.grad(&loss.backward()).unwrap();
            let mut all = values(gradients.cast(FloatDType::F32));
            all.extend(
                [loss.inner(), nll.without_autodiff()]
                    .map(|x| values(x.cast(FloatDType::F32))[0] / 1030.0),
            );
            all
        };
        close("double", &run(FloatDType::F32), &run(FloatDType::F64), 2e-6);
    }
}

#[test]
fn weights_of_16_bits_multiply_as_their_values() {
    for dtype in [FloatDType::BF16, FloatDType::F16] {
        for device in devices()
            .iter()
            .filter(|device| device.supports_dtype(dtype))
        {
            let tape = device.clone().autodiff();
            let mut random = Random::new(26);
            for [rows, d_input, d_output] in [[3, 17, 5], [2, 700, 30], [130, 530, 2100]] {
                let half = random
                    .tensor::<2>([d_input, d_output], 1.0, device)
                    .cast(dtype);
                let wide = half.clone().cast(FloatDType::F32);
                let term = LoraTerm {
                    rank: 2,
                    scale: 0.5,
                    dropout: Dropout::NONE,
                };
                let (x, a) = (
                    random.tensor::<2>([rows, d_input], 1.0, &tape),
                    random.tensor([d_input, 4], 1.0, &tape),
                );
                let (x, a) = (x.require_grad(), a.require_grad());
                let b = random.tensor::<2>([4, d_output], 1.0, &tape).require_grad();
                let targets: Vec<i32> = (0..rows)
                    .map(|_| random.0.random_range(0..d_output as i32))
                    .collect();
                let run = |weight: Tensor<2>| {
                    let y = ops::linear(x.clone(), weight.clone())
                        + ops::lora_linear(x.clone(), weight.clone(), a.clone(), b.clone(), term);
                    let mask = weight.clone().cast(FloatDType::F32).greater_elem(0.0);
                    let sum = ops::summed_weight(weight.clone(), mask, a.clone(), b.clone(), term);
                    let targets = Tensor::<1, Int>::from_data(targets.as_slice(), device);
                    let (soft, _) = ops::distilled_loss(
                        x.clone(),
                        weight.clone(),
                        -x.clone().inner(),
                        targets.clone(),
                        0.6,
                        None,
                    );
                    let head = ops::head_loss(x.clone(), weight, targets, None) + soft;
                    let loss = y.clone().square().mean()
                        + ops::linear(x.clone(), sum).square().mean()
                        + head;
                    let gradients = loss.clone().backward();
                    let mut all = vec![values(y.inner()), values(loss.inner())];
                    all.extend([&x, &a, &b].map(|leaf| values(leaf.grad(&gradients).unwrap())));
                    all
                };
                // Sums of up to 2100 terms in another order; and with bf16, summed weights and
                // often inputs are rounded to 8 bits.
                let rounded = dtype == FloatDType::BF16;
                let tolerance = if rounded { 2e-2 } else { 2e-5 };
                for (index, (got, want)) in run(half).iter().zip(run(wide)).enumerate() {
                    close(
                        &format!("{dtype:?} {index} on {device:?}"),
                        got,
                        &want,
                        tolerance * slack(device),
                    );
                }
            }
        }
    }
}

#[test]
fn a_view_of_a_16_bit_table_is_a_head() {
    let device = Device::flex();
    let mut random = Random::new(27);
    let table = random
        .tensor::<2>([2100, 70], 1.0, &device)
        .cast(FloatDType::BF16);
    let x = random.tensor::<2>([140, 70], 1.0, &device);
    let got = ops::linear(x.clone(), table.clone().transpose().narrow(1, 3, 2001));
    let want = x.matmul(table.cast(FloatDType::F32).transpose().narrow(1, 3, 2001));
    close(
        "view",
        &values(got),
        &values(want),
        if rounds() { 2e-2 } else { 2e-6 },
    );
}
