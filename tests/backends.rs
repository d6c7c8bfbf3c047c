//! Compares one model on Flex and on every other device for which the build has a backend and the
//! machine has the hardware. Outputs, gradients and training must be the same, within the `f32`
//! differences between devices.
#![cfg(feature = "flex")]
#![cfg(any(
    feature = "ndarray",
    feature = "wgpu",
    feature = "vulkan",
    feature = "metal"
))]

mod common;

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::Device;
use common::{is_factor, random_ids, tiny_dims, tiny_on, weight_bits};
use elastic_lora::adapter::LoraConfig;
use elastic_lora::data::{Batch, Batcher, Sequence, fixed_batches};
use elastic_lora::format::{StoredMatrix, WeightFormat};
use elastic_lora::model::Decoder;
use elastic_lora::model::{DeviceSession, generate_batch};
use elastic_lora::nn::{BaseLinear, host_values};
use elastic_lora::progress::Silent;
use elastic_lora::quant::{GridConfig, round_to_nearest};
use elastic_lora::runtime::GenerateConfig;
use elastic_lora::supernet::SuperNetConfig;
use elastic_lora::train::{StepLog, TrainConfig, Trainer, for_each_param, targets};
use elastic_lora::{Merger, SearchSpace, SuperNet};

/// Allowed difference relative to the largest value. The differences of single operations add up
/// over the depth of a model.
const TOLERANCE: f32 = 1e-4;

fn others() -> Vec<Device> {
    let mut others = Vec::new();
    #[cfg(feature = "ndarray")]
    #[allow(deprecated)]
    others.push(Device::ndarray());
    #[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
    others.extend(
        Device::enumerate(burn::tensor::DeviceType::Wgpu)
            .iter()
            .cloned(),
    );
    if others.is_empty() {
        eprintln!("skipped: no device but Flex");
    }
    others
}

fn close(name: &str, got: &[f32], want: &[f32]) {
    let size = want.iter().fold(0.0_f32, |size, x| size.max(x.abs()));
    let off = common::max_diff(got, want) / size;
    eprintln!("{name}: off by {off:.1e} of {size}");
    assert!(off <= TOLERANCE, "{name}: off by {off:.1e} of {size}");
}

/// Concatenates the values of all paths.
fn flat(values: &BTreeMap<String, Vec<f32>>) -> Vec<f32> {
    values.values().flatten().copied().collect()
}

fn sequences() -> Vec<Sequence> {
    let sequence = |i: usize| Sequence {
        ids: random_ids(5 + 3 * i, 41, 30 + i as u64),
        loss_mask: (0..5 + 3 * i).map(|t| t >= 2).collect(),
    };
    (0..6).map(sequence).collect()
}

/// Half of the weights of each layer are pruned. The adapters are masked or not, and use dropout.
fn net(masked: bool, device: &Device) -> SuperNet {
    let mut model = tiny_on(&tiny_dims(!masked), 4, device);
    model
        .try_for_each_linear(|_, layer| {
            let mut weight = layer.base.to_matrix();
            weight
                .as_mut_slice()
                .iter_mut()
                .step_by(2)
                .for_each(|v| *v = 0.0);
            layer.base.set_matrix(&weight)
        })
        .unwrap();
    let groups = [
        &["q_proj", "k_proj", "v_proj"][..],
        &["up_proj", "gate_proj"],
        &["down_proj"],
    ];
    let space = SearchSpace::grouped(&model.layer_shapes(), &groups, &[5, 3, 2]).unwrap();
    let lora = LoraConfig::new(5).with_alpha(12.0).with_dropout(0.2);
    SuperNet::new(
        model,
        space,
        SuperNetConfig::new(lora)
            .with_sparse_peft(masked)
            .with_seed(6),
    )
    .unwrap()
}

/// Returns the loss of a batch, and its gradient for every factor.
fn gradients(net: SuperNet, batch: &Batch) -> (f32, BTreeMap<String, Vec<f32>>) {
    let model = net.into_model().train();
    let loss = model
        .nll_sum(
            model.tokens(&batch.ids, batch.rows).unwrap(),
            &targets(batch),
        )
        .unwrap();
    let mut tape = loss.clone().backward();
    let mut gradients = BTreeMap::new();
    for_each_param(&model, |path, param| {
        if let Some(gradient) = param.take_gradient(&mut tape) {
            gradients.insert(path.to_string(), host_values(gradient));
        }
    });
    (host_values(loss.inner())[0], gradients)
}

/// Trains a few steps on random subnets. Returns the log, how far each factor moved, and the
/// supernet.
fn trained(masked: bool, device: &Device) -> (Vec<StepLog>, BTreeMap<String, Vec<f32>>, SuperNet) {
    let mut net = net(masked, device);
    let factors = |model: &Decoder| -> BTreeMap<String, Vec<f32>> {
        let bits = weight_bits(model)
            .into_iter()
            .filter(|(path, _)| is_factor(path));
        bits.map(|(path, bits)| (path, bits.into_iter().map(f32::from_bits).collect()))
            .collect()
    };
    let mut moved = factors(net.model());
    // The epsilon is large enough that no gradient is mere noise, which AdamW would scale up to a
    // whole step.
    let config = TrainConfig {
        accumulation: 2,
        lr: 1e-2,
        eps: 1e-2,
        clip_norm: Some(0.5),
        seed: 9,
        ..TrainConfig::new(3)
    };
    let mut batcher = Batcher::new(sequences(), 3, 0, 5).unwrap();
    let valid = fixed_batches(&sequences(), 4, 0).unwrap();
    let report = Trainer::new(config)
        .unwrap()
        .run(&mut net, &mut batcher, &valid, &Silent)
        .unwrap();
    for (path, after) in factors(net.model()) {
        let before = moved.get_mut(&path).unwrap();
        before
            .iter_mut()
            .zip(after)
            .for_each(|(before, after)| *before = after - *before);
    }
    (report.logs, moved, net)
}

#[test]
fn training_and_merging_are_the_same_on_every_device() {
    for device in others() {
        for masked in [false, true] {
            let name = format!("{device:?}, masked {masked}");
            let (logs, moved, net) = trained(masked, &device);
            let (want_logs, want_moved, want_net) = trained(masked, &Device::flex());
            let numbers = |logs: &[StepLog], of: fn(&StepLog) -> f64| -> Vec<f32> {
                logs.iter().map(|log| of(log) as f32).collect()
            };
            for (what, of) in [
                ("losses", (|log| log.loss) as fn(&StepLog) -> f64),
                ("norms", |log| log.grad_norm),
                ("validation", |log| log.valid_loss.unwrap_or_default()),
            ] {
                close(
                    &format!("{name}, {what}"),
                    &numbers(&logs, of),
                    &numbers(&want_logs, of),
                );
            }
            assert_eq!(
                moved.keys().collect::<Vec<_>>(),
                want_moved.keys().collect::<Vec<_>>()
            );
            assert!(
                want_moved
                    .values()
                    .all(|moved| moved.iter().any(|by| *by != 0.0))
            );
            close(&format!("{name}, moved"), &flat(&moved), &flat(&want_moved));

            if masked {
                let calibration = [random_ids(13, 41, 8)];
                let merged = |net: &SuperNet| {
                    let merged = Merger::new().merge(net, &calibration, &Silent).unwrap();
                    assert_eq!(merged.report.zeros_lost, 0);
                    let weights = weight_bits(&merged.model)
                        .into_values()
                        .flatten()
                        .map(f32::from_bits);
                    weights.collect::<Vec<f32>>()
                };
                close(
                    &format!("{name}, merged"),
                    &merged(&net),
                    &merged(&want_net),
                );
            }

            // The factors are trained, so that no gradient is zero.
            let batch = &fixed_batches(&sequences(), 6, 0).unwrap()[0];
            let ((loss, got), (want_loss, want)) =
                (gradients(net, batch), gradients(want_net, batch));
            close(&format!("{name}, loss"), &[loss], &[want_loss]);
            assert_eq!(
                got.keys().collect::<Vec<_>>(),
                want.keys().collect::<Vec<_>>()
            );
            assert!(want.keys().all(|path| is_factor(path)) && want.len() == moved.len());
            for (path, want) in &want {
                close(&format!("{name}, gradient of {path}"), &got[path], want);
            }
        }
    }
}

#[test]
fn outputs_are_the_same_on_every_device() {
    let model = tiny_on(&tiny_dims(true), 1, &Device::flex());
    let ids = random_ids(3 * 13, 41, 5);
    let prompts: Vec<Vec<u32>> = [5, 1, 12]
        .iter()
        .map(|len| random_ids(*len, 41, 20 + *len as u64))
        .collect();
    let greedy = GenerateConfig::new(7, Vec::new());
    for device in others() {
        let other = tiny_on(&tiny_dims(true), 1, &device);
        assert_eq!(weight_bits(&model), weight_bits(&other));
        let logits = |model: &Decoder| host_values(model.forward(model.tokens(&ids, 3).unwrap()));
        close(
            &format!("{device:?}, logits"),
            &logits(&other),
            &logits(&model),
        );
        // With left padding, and a cache.
        let generated = generate_batch(&other, &prompts, &greedy, &Silent).unwrap();
        assert_eq!(
            generated,
            generate_batch(&model, &prompts, &greedy, &Silent).unwrap()
        );
    }
}

/// The model with the linear layers of its blocks in each storage format in turn, starting from
/// format `first`. If `dense`, the layers have the same weights but are dense.
fn compressed(first: usize, dense: bool, device: &Device) -> Decoder {
    let mut model = tiny_on(&tiny_dims(true), 3, device);
    let mut which = first;
    model
        .try_for_each_linear(|_, layer| {
            let mut weight = layer.base.to_matrix();
            // The pattern 2:4, which all of the sparse formats can hold.
            let cols = weight.cols();
            let pruned = weight
                .as_mut_slice()
                .chunks_mut(cols)
                .flat_map(|row| row.chunks_mut(4));
            pruned.for_each(|group| {
                group
                    .iter_mut()
                    .skip(which % 2)
                    .step_by(2)
                    .for_each(|weight| *weight = 0.0)
            });
            let codes = |bits, symmetric, sparse| {
                let grid = GridConfig::new(bits)
                    .with_group_size(Some(8))
                    .with_symmetric(symmetric);
                StoredMatrix::from_quantized(
                    &round_to_nearest(&weight, &grid, None).unwrap(),
                    sparse,
                )
            };
            let numbers = |format| StoredMatrix::from_matrix(&weight, format);
            let stored = match which % 9 {
                0 => numbers(WeightFormat::SparseF16),
                1 => codes(4, true, true),
                2 => codes(4, false, false),
                3 => numbers(WeightFormat::NmBf16 { n: 2, m: 4 }),
                4 => numbers(WeightFormat::F16),
                5 => codes(3, false, false),
                6 => numbers(WeightFormat::Bf16),
                7 => codes(4, false, true),
                _ => numbers(WeightFormat::F32),
            }
            .unwrap();
            which += 1;
            let bias = layer.base.bias.as_ref().map(|bias| host_values(bias.val()));
            layer.base = match dense {
                true => BaseLinear::from_matrix(&stored.to_matrix(), bias.as_deref(), device)?,
                false => BaseLinear::from_stored(stored, bias.as_deref(), device)?,
            };
            Ok(())
        })
        .unwrap();
    model
}

#[test]
fn stored_weights_decode_as_the_dense_ones_on_the_host() {
    let prompt = random_ids(11, 41, 2);
    for device in others() {
        for first in 0..4 {
            let mut got = DeviceSession::new(&compressed(first, false, &device));
            let mut want = DeviceSession::new(&compressed(first, true, &Device::flex()));
            // Many rows, then one at a time, then a few.
            for tokens in [&prompt[..], &[7], &[40], &[3, 0, 9], &[1]] {
                let name = format!("{device:?}, from {first}, at {}", got.position());
                close(
                    &name,
                    &got.decode(tokens).unwrap(),
                    &want.decode(tokens).unwrap(),
                );
            }
        }
    }
}
