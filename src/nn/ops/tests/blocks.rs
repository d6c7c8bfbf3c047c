use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};

use super::plain;
use super::{Random, close, compare, devices, hosts, slack, values};
use crate::arch::{Activation, Scores};
use crate::data::Segments;
use crate::nn::ops::extension::DecoderOps;
use crate::nn::ops::{self, AttentionMask};

/// The loss of given logits, obtained with the identity as the head's weight.
fn loss_of(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let identity = Tensor::<2>::eye(logits.dims()[1], &logits.device().without_autodiff())
        .cast(logits.dtype());
    ops::head_loss(logits, identity, targets, None)
}

#[test]
fn gated_activations_are_the_plain_composition() {
    for device in devices() {
        let tape = device.clone().autodiff();
        let mut random = Random::new(1);
        for shape in [[1, 1, 1], [2, 3, 17], [3, 41, 211]] {
            for activation in [Activation::Silu, Activation::GeluTanh] {
                let inputs = [
                    random.tensor(shape, 3.0, device),
                    random.tensor(shape, 2.0, device),
                ];
                compare(
                    &format!("{activation:?}"),
                    inputs,
                    |[gate, up]: [Tensor<3>; 2]| ops::gated(gate, up, activation),
                    |[gate, up]| plain::gated(gate, up, activation),
                );
            }
        }
        let gate = Tensor::<1>::from_floats([-200.0, -90.0, -30.0, -0.0, 30.0, 90.0, 200.0], &tape)
            .require_grad();
        let up =
            Tensor::<1>::from_floats([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], &tape).require_grad();
        let y = ops::gated(gate.clone(), up.clone(), Activation::Silu);
        let gradients = y.clone().sum().backward();
        close(
            "saturated",
            &values(y.inner()),
            &[0.0, 0.0, 0.0, 0.0, 150.0, 540.0, 1400.0],
            1e-6 * slack(device),
        );
        close(
            "slope",
            &values(gate.grad(&gradients).unwrap()),
            &[0.0, 0.0, 0.0, 2.0, 5.0, 6.0, 7.0],
            1e-6 * slack(device),
        );
        close(
            "up",
            &values(up.grad(&gradients).unwrap()),
            &[0.0, 0.0, 0.0, 0.0, 30.0, 90.0, 200.0],
            1e-6 * slack(device),
        );
    }
}

#[test]
fn rms_norm_is_the_plain_composition() {
    for device in devices() {
        let mut random = Random::new(2);
        for shape in [[1, 1, 1], [2, 5, 17], [3, 1, 64], [3, 97, 129]] {
            let weight = random.tensor([shape[2]], 2.0, device);
            let inputs = [random.tensor(shape, 3.0, device)];
            // The weight is a constant on the plain device, while the input is tracked.
            let fused = |[x]: [Tensor<3>; 1]| ops::rms_norm(x, weight.clone(), 1e-2);
            compare("rms_norm", inputs, fused, |[x]| {
                plain::rms_norm(x, weight.clone(), 1e-2)
            });
            let x = random.tensor(shape, 3.0, device);
            let fused = |[weight]: [Tensor<1>; 1]| ops::rms_norm(x.clone(), weight, 1e-2);
            compare("rms_norm's weight", [weight.clone()], fused, |[weight]| {
                plain::rms_norm(x.clone(), weight, 1e-2)
            });
        }
        let both = [
            random.tensor([19], 1.0, device),
            random.tensor([19], 1.0, device),
        ];
        compare(
            "rms_norm's both",
            both,
            |[x, weight]: [Tensor<1>; 2]| ops::rms_norm(x, weight, 1e-5),
            |[x, weight]| plain::rms_norm(x, weight, 1e-5),
        );
    }
}

#[test]
fn rotary_is_the_plain_composition() {
    for device in devices() {
        let mut random = Random::new(4);
        for ([batch, seq, n_heads, half], rest) in [
            ([1, 1, 1, 1], 0),
            ([2, 5, 3, 4], 0),
            ([2, 5, 3, 4], 6),
            ([3, 31, 8, 33], 0),
        ] {
            // Positions of all rows together, and of each row by itself.
            for rows in [1, batch] {
                let angles = random.tensor([rows * seq, half], 3.0, device);
                let (cos, sin) = (angles.clone().cos(), angles.sin());
                let width = n_heads * (2 * half + rest);
                let inputs = [random.tensor([batch, seq, width], 2.0, device)];
                compare(
                    "rotary",
                    inputs,
                    |[x]: [Tensor<3>; 1]| ops::rotary(x, n_heads, cos.clone(), sin.clone()),
                    |[x]| plain::rotary(x, n_heads, cos.clone(), sin.clone()),
                );
            }
        }
    }
}

#[test]
fn attention_is_the_plain_composition() {
    for device in devices() {
        let mut random = Random::new(5);
        // batch, heads, key/value heads, queries, keys, head size, window, left padding
        type Case<'a> = ([usize; 6], Option<usize>, Option<&'a [usize]>);
        let cases: [Case; 10] = [
            ([1, 1, 1, 1, 1, 1], None, None),
            ([2, 4, 2, 7, 7, 5], None, None),
            ([3, 4, 1, 3, 11, 8], Some(4), None),
            ([2, 2, 2, 1, 9, 6], None, None),
            ([2, 2, 1, 1, 9, 6], Some(3), None),
            ([2, 4, 4, 9, 9, 4], None, Some(&[0, 3])),
            ([3, 8, 2, 6, 13, 7], Some(5), Some(&[2, 0, 4])),
            ([1, 2, 1, 1, 3, 4], None, Some(&[2])),
            ([2, 4, 2, 150, 163, 16], None, Some(&[0, 9])),
            ([1, 2, 2, 200, 200, 8], Some(33), None),
        ];
        for ([batch, n_heads, n_kv_heads, seq_q, seq_k, head_dim], window, pads) in cases {
            let mask = AttentionMask {
                window,
                left_pad: pads.map(<[usize]>::to_vec),
                segments: None,
            };
            // The plain composition spreads a query without visible keys over all keys, so no query
            // of these cases may be without one.
            let first = seq_k - seq_q;
            let seen = pads.is_none_or(|pads| pads.iter().all(|pad| *pad <= first));
            let name =
                format!("{batch} {n_heads} {n_kv_heads} {seq_q} {seq_k} {head_dim} {mask:?}");
            let q = random.tensor([batch, n_heads, seq_q, head_dim], 2.0, device);
            let keys = [batch, n_kv_heads, seq_k, head_dim];
            let (k, v) = (
                random.tensor(keys, 2.0, device),
                random.tensor(keys, 2.0, device),
            );
            // Results of padded queries are unspecified, so they are multiplied by zero.
            let keep: Vec<f32> = (0..batch * seq_q)
                .flat_map(|index| {
                    let empty = mask
                        .visible(index / seq_q, index % seq_q, seq_q, seq_k)
                        .is_empty();
                    vec![if empty { 0.0 } else { 1.0 }; n_heads * head_dim]
                })
                .collect();
            assert!(seen || keep.contains(&0.0));
            let keep = Tensor::<3>::from_data(
                TensorData::new(keep, [batch, seq_q, n_heads * head_dim]),
                device,
            );
            for softcap in [None, Some(1.5)] {
                let scores = Scores {
                    scale: 0.3,
                    softcap,
                };
                compare(
                    &format!("{name} {softcap:?}"),
                    [q.clone(), k.clone(), v.clone()],
                    |[q, k, v]: [Tensor<4>; 3]| {
                        ops::causal_attention(q, k, v, scores, &mask) * keep.clone()
                    },
                    |[q, k, v]| plain::causal_attention(q, k, v, scores, &mask) * keep.clone(),
                );
            }
        }
    }
}

#[test]
fn packed_attention_is_that_of_each_example() {
    for device in devices() {
        let mut random = Random::new(16);
        // lengths of the examples of each row, length of a row, window
        type Case<'a> = (&'a [&'a [usize]], usize, Option<usize>);
        let cases: [Case; 5] = [
            (&[&[1, 1, 1]], 3, None),
            (&[&[4, 2, 5], &[9], &[3, 3]], 11, None),
            (&[&[4, 2, 5], &[9], &[3, 3]], 11, Some(3)),
            (&[&[100, 1, 64, 35]], 200, Some(33)),
            (&[&[70, 80], &[150]], 151, None),
        ];
        for (rows, seq, window) in cases {
            let rows: Vec<Vec<usize>> = rows.iter().map(|row| row.to_vec()).collect();
            let (batch, n_heads, head_dim) = (rows.len(), 4, 8);
            let mask = AttentionMask {
                window,
                segments: Some(Segments::new(rows.clone(), seq)),
                ..AttentionMask::default()
            };
            let alone = AttentionMask {
                window,
                ..AttentionMask::default()
            };
            let q = random.tensor([batch, n_heads, seq, head_dim], 2.0, device);
            let [k, v] = [(); 2].map(|()| random.tensor([batch, 2, seq, head_dim], 2.0, device));
            let scores = Scores {
                scale: 0.3,
                softcap: Some(2.5),
            };
            // Each example by itself; padding counts as zeros on both sides.
            let by_example = |[q, k, v]: [Tensor<4>; 3]| {
                let rows = rows.iter().enumerate().map(|(row, lengths)| {
                    let (mut parts, mut at) = (Vec::new(), 0);
                    for len in lengths {
                        let part = |x: &Tensor<4>| x.clone().narrow(0, row, 1).narrow(2, at, *len);
                        let (q, k, v) = (part(&q), part(&k), part(&v));
                        parts.push(plain::causal_attention(q, k, v, scores, &alone));
                        at += len;
                    }
                    if at < seq {
                        let size = [1, seq - at, n_heads * head_dim];
                        parts.push(Tensor::zeros(size, &q.device()));
                    }
                    Tensor::cat(parts, 1)
                });
                Tensor::cat(rows.collect(), 0)
            };
            let keep: Vec<f32> = rows
                .iter()
                .flat_map(|lengths| (0..seq).map(|t| f32::from(t < lengths.iter().sum::<usize>())))
                .collect();
            let keep = Tensor::<3>::from_data(TensorData::new(keep, [batch, seq, 1]), device);
            compare(
                &format!("{rows:?} {window:?}"),
                [q, k, v],
                |[q, k, v]: [Tensor<4>; 3]| {
                    ops::causal_attention(q, k, v, scores, &mask) * keep.clone()
                },
                by_example,
            );
        }
    }
}

#[test]
fn large_scores_stay_finite() {
    for device in devices() {
        let tape = device.clone().autodiff();
        let mut random = Random::new(6);
        let [q, k, v] =
            [(); 3].map(|()| random.tensor::<4>([1, 2, 5, 4], 1.0, &tape).require_grad());
        let y = ops::causal_attention(
            q.clone() * 1e4,
            k.clone() * 10.0,
            v.clone(),
            1.0,
            &AttentionMask::default(),
        );
        let gradients = y.clone().sum().backward();
        for values in [
            values(y.inner()),
            values(q.grad(&gradients).unwrap()),
            values(v.grad(&gradients).unwrap()),
        ] {
            assert!(values.iter().all(|x| x.is_finite()));
        }
    }
}

#[test]
fn any_strides_will_do() {
    for device in devices() {
        let tape = device.clone().autodiff();
        let mut random = Random::new(8);
        let run = |views: bool| {
            let mut random = Random::new(9);
            // `[batch, seq, heads, size]` viewed as `[batch, heads, seq, size]`, and keys narrowed
            // from a longer cache.
            let q = random.tensor::<4>([2, 3, 4, 6], 1.0, &tape).require_grad();
            let k = random.tensor::<4>([2, 2, 9, 6], 1.0, &tape).require_grad();
            let v = random.tensor::<4>([2, 2, 6, 9], 1.0, &tape).require_grad();
            let solid = |x: Tensor<4>| {
                if views {
                    x
                } else {
                    Tensor::cat(vec![x.clone().narrow(0, 0, 1), x.narrow(0, 1, 1)], 0)
                }
            };
            let (qs, ks) = (
                solid(q.clone().swap_dims(1, 2)),
                solid(k.clone().narrow(2, 1, 7)),
            );
            let vs = solid(v.clone().swap_dims(2, 3).narrow(2, 2, 7));
            let y = ops::causal_attention(qs, ks, vs, 0.5, &AttentionMask::default());
            let weight = random.tensor::<1>([48], 1.0, &tape).narrow(0, 12, 24);
            let turned = if views {
                y.clone().transpose().swap_dims(1, 2)
            } else {
                y.clone()
            };
            let normed = ops::rms_norm(turned, weight, 1e-5);
            let (gate, up) = (
                normed.clone().narrow(2, 0, 12),
                normed.clone().narrow(2, 12, 12),
            );
            let h = ops::gated(gate, up, Activation::Silu);
            let angles = random.tensor::<2>([2, 3], 1.0, &tape).transpose();
            let turned = ops::rotary(h, 3, angles.clone().cos(), angles.sin());
            let logits = turned
                .swap_dims(0, 3)
                .narrow(1, 1, 2)
                .reshape([4, 12])
                .transpose();
            let targets = Tensor::<1, Int>::from_ints([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3], &tape);
            let loss = loss_of(logits, targets);
            let gradients = loss.backward();
            let mut all = values(loss.inner());
            for input in [q, k, v] {
                all.extend(values(input.grad(&gradients).unwrap()));
            }
            all
        };
        close("views", &run(true), &run(false), 1e-6 * slack(device));
        // An expanded tensor has a stride of zero.
        let row = random.tensor::<2>([1, 9], 1.0, device);
        let up = random.tensor::<2>([5, 9], 1.0, device);
        let fused = ops::gated(row.clone().expand([5, 9]), up.clone(), Activation::Silu);
        close(
            "expanded",
            &values(fused),
            &values(plain::gated(row.expand([5, 9]), up, Activation::Silu)),
            1e-6 * slack(device),
        );
    }
}

#[test]
fn constants_stay_off_the_tape() {
    for device in devices() {
        let tape = device.clone().autodiff();
        let mut random = Random::new(10);
        let x = random.tensor::<2>([3, 8], 1.0, device);
        let w = random.tensor::<1>([8], 1.0, device);
        assert!(
            !ops::rms_norm(x.clone(), w.clone(), 1e-5)
                .device()
                .is_autodiff()
        );
        let on_tape = Tensor::<2>::from_data(x.to_data(), &tape);
        assert!(!ops::rms_norm(on_tape.clone(), w.clone(), 1e-5).is_tracked());
        assert!(!ops::gated(on_tape.clone(), x.clone(), Activation::Silu).is_tracked());
        let tracked = on_tape.clone().require_grad();
        assert!(ops::rms_norm(tracked.clone(), w.clone(), 1e-5).is_tracked());
        assert!(ops::gated(x.clone(), tracked.clone(), Activation::Silu).is_tracked());
        // The first operand plain and the second tracked, and the other way round.
        for swapped in [false, true] {
            let y = if swapped {
                ops::gated(tracked.clone(), x.clone(), Activation::Silu)
            } else {
                ops::gated(x.clone(), tracked.clone(), Activation::Silu)
            };
            let gradients = y.sum().backward();
            assert!(
                values(tracked.grad(&gradients).unwrap())
                    .iter()
                    .any(|x| *x != 0.0)
            );
        }
        // Keys and values from a plain cache.
        let q = random.tensor::<4>([1, 2, 3, 4], 1.0, &tape).require_grad();
        let cache = random.tensor::<4>([1, 1, 5, 4], 1.0, device);
        let y = ops::causal_attention(
            q.clone(),
            cache.clone(),
            cache,
            1.0,
            &AttentionMask::default(),
        );
        assert!(
            values(q.grad(&y.sum().backward()).unwrap())
                .iter()
                .any(|x| *x != 0.0)
        );
    }
}

#[test]
fn inputs_survive_their_gradients() {
    for device in devices() {
        let tape = device.clone().autodiff();
        // The backward kernels write in place if a tensor is not shared; here it is shared.
        let mut random = Random::new(11);
        let shape = [130, 129];
        let [gate, up] = [(); 2].map(|()| random.tensor::<2>(shape, 1.0, &tape).require_grad());
        let before = [values(gate.clone().inner()), values(up.clone().inner())];
        let targets = Tensor::<1, Int>::zeros([130], &tape);
        let y = ops::gated(gate.clone(), up.clone(), Activation::Silu).sum()
            + loss_of(gate.clone(), targets);
        let weight = random.tensor::<1>([129], 1.0, &tape);
        let _ = (y + ops::rms_norm(up.clone(), weight, 1e-5).sum()).backward();
        assert_eq!(before, [values(gate.inner()), values(up.inner())]);
    }
}

#[test]
fn portable_definitions_agree_with_the_kernels() {
    use crate::nn::ops::portable;
    use burn::backend::Flex;
    let mut random = Random::new(12);
    let mut make = |shape: [usize; 4]| random.tensor::<4>(shape, 1.5, &Device::flex());
    let (q, k, v, grad) = (
        make([2, 4, 5, 6]),
        make([2, 2, 8, 6]),
        make([2, 2, 8, 6]),
        make([2, 5, 24, 1]),
    );
    let grad = grad.reshape([2, 5, 24]);
    let raw = |x: &Tensor<4>| x.clone().try_into_primitive::<Flex>().unwrap();
    let mask = AttentionMask {
        window: Some(4),
        left_pad: Some(vec![0, 2]),
        segments: None,
    };
    let same =
        |name: &str, a: burn::backend::flex::FlexTensor, b: burn::backend::flex::FlexTensor| {
            close(
                name,
                a.to_contiguous().as_slice().unwrap(),
                b.to_contiguous().as_slice().unwrap(),
                5e-6,
            );
        };
    let (y, sums) = Flex::causal_attention(raw(&q), raw(&k), raw(&v), 0.4.into(), mask.clone());
    let (py, psums) =
        portable::causal_attention::<Flex>(raw(&q), raw(&k), raw(&v), 0.4.into(), mask.clone());
    same("context", y, py);
    same("sums", sums.clone(), psums.clone());
    let grad = grad.try_into_primitive::<Flex>().unwrap();
    let fused = Flex::causal_attention_backward(
        raw(&q),
        raw(&k),
        raw(&v),
        sums,
        grad.clone(),
        0.4.into(),
        mask.clone(),
    );
    let plain = portable::causal_attention_backward::<Flex>(
        raw(&q),
        raw(&k),
        raw(&v),
        psums,
        grad,
        0.4.into(),
        mask,
    );
    same("q", fused.0, plain.0);
    same("k", fused.1, plain.1);
    same("v", fused.2, plain.2);

    let (x, g) = (raw(&make([2, 3, 4, 17])), raw(&make([2, 3, 4, 17])));
    let weight =
        || Tensor::<1>::from_data(TensorData::new(vec![0.5_f32; 17], [17]), &Device::flex());
    let weight = || weight().try_into_primitive::<Flex>().unwrap();
    same(
        "norm",
        Flex::rms_norm(x.clone(), weight(), 0.1),
        portable::rms_norm::<Flex>(x.clone(), weight(), 0.1),
    );
    let fused = Flex::rms_norm_backward(x.clone(), weight(), g.clone(), 0.1);
    same(
        "norm x",
        fused,
        portable::rms_norm_backward::<Flex>(x.clone(), weight(), g.clone(), 0.1),
    );
    let fused = Flex::rms_norm_backward_weight(x.clone(), g.clone(), 0.1);
    same(
        "norm w",
        fused,
        portable::rms_norm_backward_weight::<Flex>(x.clone(), g.clone(), 0.1),
    );
    same(
        "gated",
        Flex::gated(x.clone(), g.clone(), Activation::Silu),
        portable::gated::<Flex>(x.clone(), g.clone(), Activation::Silu),
    );
    let fused = Flex::gated_backward(x.clone(), g.clone(), x.clone(), Activation::Silu);
    let plain = portable::gated_backward::<Flex>(x.clone(), g.clone(), x.clone(), Activation::Silu);
    same("gate", fused.0, plain.0);
    same("up", fused.1, plain.1);

    let heads = raw(&make([2, 4, 5, 6]));
    for positions in [5, 10] {
        let table = || make_table(positions, 3);
        let fused = Flex::rotary_backward(table(), table(), heads.clone());
        let portable = portable::rotary_backward::<Flex>(table(), table(), heads.clone());
        same("rotary", fused, portable);
    }
}

fn make_table(seq: usize, half: usize) -> burn::backend::flex::FlexTensor {
    let table = Random::new(13).tensor::<2>([seq, half], 1.0, &Device::flex());
    table.try_into_primitive::<burn::backend::Flex>().unwrap()
}

#[test]
fn half_precision_takes_the_portable_way() {
    for device in devices()
        .iter()
        .filter(|device| device.supports_dtype(FloatDType::BF16))
    {
        let x = Random::new(15).tensor::<2>([3, 8], 1.0, device);
        let half = x.clone().cast(FloatDType::BF16);
        let y = ops::gated(half.clone(), half, Activation::Silu).cast(FloatDType::F32);
        close(
            "bf16",
            &values(y),
            &values(plain::gated(x.clone(), x, Activation::Silu)),
            0.03,
        );
    }
}

#[test]
fn double_precision_takes_the_portable_way_on_the_tape() {
    // On a GPU, `f64` has sums and products but may lack `exp` and `cos`: Vulkan defines them only
    // up to `f32`.
    for device in &hosts() {
        let tape = device.clone().autodiff();
        let run = |dtype: FloatDType| {
            let mut random = Random::new(14);
            let mut all = Vec::new();
            let mut leaf = |shape: [usize; 4]| {
                random
                    .tensor::<4>(shape, 1.5, &tape)
                    .cast(dtype)
                    .require_grad()
            };
            let (q, k, v, w) = (
                leaf([2, 4, 5, 6]),
                leaf([2, 2, 7, 6]),
                leaf([2, 2, 7, 6]),
                leaf([1, 1, 1, 24]),
            );
            let angles = random.tensor::<2>([5, 3], 1.0, &tape).cast(dtype);
            let mask = AttentionMask {
                window: Some(3),
                left_pad: Some(vec![1, 2]),
                segments: None,
            };
            let context = ops::causal_attention(q.clone(), k.clone(), v.clone(), 0.7, &mask);
            let turned = ops::rotary(context, 4, angles.clone().cos(), angles.sin());
            let normed = ops::rms_norm(turned.reshape([10, 24]), w.clone().reshape([24]), 1e-3);
            let logits = ops::gated(normed.clone(), normed + 1.0, Activation::Silu);
            let targets = Tensor::<1, Int>::from_ints([0, 5, 23, 7, 7, 1, 2, 3, 4, 11], &tape);
            let loss = loss_of(logits, targets);
            let gradients = loss.backward();
            all.extend(values(loss.inner().cast(FloatDType::F32)));
            for leaf in [q, k, v, w] {
                all.extend(values(leaf.grad(&gradients).unwrap().cast(FloatDType::F32)));
            }
            all
        };
        close("double", &run(FloatDType::F32), &run(FloatDType::F64), 2e-6);
    }
}
