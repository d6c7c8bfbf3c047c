//! Training by the sandwich rule, with in-place distillation, and in stages: the gradient of a
//! step, and the guarantees of a run under every rule.

use std::collections::BTreeMap;

use crate::common::{is_factor, random_ids, tiny, weight_bits};
use burn::module::Module;
use burn::tensor::activation::{log_softmax, softmax};
use burn::tensor::{Device, Gradients, Int, Tensor};
use elastic_lora::adapter::LoraConfig;
use elastic_lora::data::{Batch, Batcher, Sequence, fixed_batches};
use elastic_lora::model::Decoder;
use elastic_lora::nn::host_values;
use elastic_lora::progress::Silent;
use elastic_lora::space::{Elastic, Group};
use elastic_lora::supernet::SuperNetConfig;
use elastic_lora::train::{
    Checkpointing, Distillation, Sampling, Schedule, Stage, StepLog, TrainConfig, TrainReport,
    Trainer, for_each_param, targets,
};
use elastic_lora::{Error, Result, SearchSpace, SuperNet};

/// Arithmetic progressions of tokens with various lengths. The first two tokens are given.
fn sequences(n: usize, seed: u64) -> Vec<Sequence> {
    let draws = random_ids(3 * n, 40, seed);
    draws
        .chunks(3)
        .map(|draw| {
            let (start, step, len) = (draw[0], 1 + draw[1] % 3, 5 + (draw[2] % 12) as usize);
            let ids: Vec<u32> = (0..len as u32).map(|t| (start + step * t) % 41).collect();
            let loss_mask = (0..len).map(|t| t >= 2).collect();
            Sequence { ids, loss_mask }
        })
        .collect()
}

fn batcher() -> Batcher {
    Batcher::new(sequences(37, 1), 4, 0, 5).unwrap()
}

fn net_of(choices: &[usize], dropout: f64, tied: bool) -> SuperNet {
    let model = tiny(tied, 4);
    let groups = [
        &["q_proj", "k_proj", "v_proj"][..],
        &["up_proj", "gate_proj"],
        &["down_proj"],
    ];
    let space = SearchSpace::grouped(&model.layer_shapes(), &groups, choices).unwrap();
    let lora = LoraConfig::new(5).with_alpha(12.0).with_dropout(dropout);
    let mut net = SuperNet::new(model, space, SuperNetConfig::new(lora).with_seed(6)).unwrap();
    net.activate(&net.heuristic()).unwrap();
    net
}

fn net() -> SuperNet {
    net_of(&[5, 3, 2], 0.2, false)
}

/// Ranks, widths, heads and a depth that can leave out the first block, and with it all trained
/// factors below the second block.
fn mixed_net(dropout: f64) -> SuperNet {
    let model = tiny(false, 4);
    let layers = model.layer_shapes();
    let qkv = ["q_proj", "k_proj", "v_proj"];
    let width = |names: &[&str], choices: &[usize]| {
        SearchSpace::groups_by_block(Elastic::Width, &layers, &[names], choices).unwrap()
    };
    let units = ["model.layers.1.mlp", "model.layers.0"]
        .map(String::from)
        .to_vec();
    let space = SearchSpace::grouped(
        &layers,
        &[&qkv[..], &["up_proj", "gate_proj"], &["down_proj"]],
        &[5, 3, 2],
    )
    .and_then(|space| space.with_groups(width(&["gate_proj", "up_proj"], &[37, 20])))
    .and_then(|space| space.with_groups(width(&qkv, &[24, 12])))
    .and_then(|space| {
        space.with_groups([Group::of_kind(
            Elastic::Depth,
            "depth",
            units,
            vec![2, 1, 0],
        )?])
    })
    .unwrap();
    let lora = LoraConfig::new(5).with_alpha(12.0).with_dropout(dropout);
    let mut net = SuperNet::new(model, space, SuperNetConfig::new(lora).with_seed(6)).unwrap();
    net.activate(&net.heuristic()).unwrap();
    net
}

/// Everything enabled: three stages, the first of which trains only the largest subnet, and
/// distillation.
fn config() -> TrainConfig {
    TrainConfig {
        accumulation: 2,
        lr: 1e-2,
        warmup: 3,
        weight_decay: 0.01,
        clip_norm: Some(0.5),
        eval_every: 4,
        seed: 9,
        sampling: Sampling::Sandwich { random: 2 },
        distillation: Some(Distillation { weight: 0.7 }),
        stages: vec![
            Stage::new(2, []),
            Stage::new(3, [Elastic::Rank]),
            Stage::new(7, [Elastic::Rank]),
        ],
        ..TrainConfig::new(12)
    }
}

fn run(config: TrainConfig, net: &mut SuperNet) -> Result<TrainReport> {
    let valid = fixed_batches(&sequences(9, 2), 4, 0).unwrap();
    Trainer::new(config)?.run(net, &mut batcher(), &valid, &Silent)
}

/// Moves the weights away from their start, where B is zero.
fn trained(mut net: SuperNet) -> SuperNet {
    run(
        TrainConfig {
            lr: 0.03,
            ..TrainConfig::new(6)
        },
        &mut net,
    )
    .unwrap();
    net
}

fn factors(net: &SuperNet) -> BTreeMap<String, Vec<f32>> {
    let bits = weight_bits(net.model())
        .into_iter()
        .filter(|(path, _)| is_factor(path));
    bits.map(|(path, bits)| (path, bits.into_iter().map(f32::from_bits).collect()))
        .collect()
}

/// Adds the gradients of a model to `into`, in double precision.
fn add_gradients(model: &Decoder, mut gradients: Gradients, into: &mut BTreeMap<String, Vec<f64>>) {
    for_each_param(model, |path, param| {
        if let Some(gradient) = param.take_gradient(&mut gradients) {
            let values = host_values(gradient);
            let sum = into
                .entry(path.to_string())
                .or_insert_with(|| vec![0.0; values.len()]);
            sum.iter_mut()
                .zip(values)
                .for_each(|(sum, value)| *sum += f64::from(value));
        }
    });
}

/// Returns, by plain operations, the logits that predict the targets of a batch, and these targets.
fn predictions(model: &Decoder, batch: &Batch) -> (Tensor<2>, Tensor<1, Int>) {
    let targets = targets(batch);
    let rows: Vec<i32> = targets.iter().map(|(row, _)| *row as i32).collect();
    let ids: Vec<i32> = targets.iter().map(|(_, id)| *id as i32).collect();
    let logits: Tensor<2> = model
        .forward(model.tokens(&batch.ids, batch.rows).unwrap())
        .flatten(0, 1);
    let device = Device::flex();
    (
        logits.select(0, Tensor::from_ints(rows.as_slice(), &device)),
        Tensor::from_ints(ids.as_slice(), &device),
    )
}

#[test]
fn a_step_is_the_mean_of_its_subnets_gradients() {
    // With such a large epsilon, the first step of AdamW is the gradient times the learning rate
    // over epsilon.
    const LARGE: f64 = 1e3;
    let cases = [
        (None, 2, false, false),
        (Some(1.0), 2, true, false),
        (Some(0.4), 1, false, false),
        (Some(0.0), 0, false, false),
        (Some(1.0), 0, false, false),
        (None, 3, false, true),
        (Some(0.6), 3, false, true),
    ];
    for (distillation, random, tied, mixed) in cases {
        for checkpointing in [Checkpointing::None, Checkpointing::Blocks] {
            let mut net = trained(if mixed {
                mixed_net(0.0)
            } else {
                net_of(&[5, 3, 2], 0.0, tied)
            });
            let config = TrainConfig {
                accumulation: 2,
                lr: LARGE,
                eps: LARGE,
                clip_norm: None,
                schedule: Schedule::Constant,
                sampling: Sampling::Sandwich { random },
                distillation: distillation.map(|weight| Distillation { weight }),
                checkpointing,
                seed: 3,
                ..TrainConfig::new(1)
            };
            let before = factors(&net);
            let mut by_hand = net.clone();
            let report = run(config.clone(), &mut net).unwrap();
            let moved = factors(&net);

            let mut data = batcher();
            let batches = [data.next_batch(), data.next_batch()];
            let n_targets: usize = batches.iter().map(|batch| targets(batch).len()).sum();
            let mut expected = BTreeMap::new();
            let mut losses = vec![0.0; random + 2];
            for (batch, subnets) in batches.iter().zip(config.subnets(net.space(), 0)) {
                assert_eq!(subnets.len(), random + 2);
                let mut taught = None;
                for (index, subnet) in subnets.iter().enumerate() {
                    by_hand.activate(subnet).unwrap();
                    let model = by_hand.model().clone().train();
                    let (logits, ids) = predictions(&model, batch);
                    let likelihoods = log_softmax(logits.clone(), 1);
                    let hard = likelihoods
                        .clone()
                        .gather(1, ids.unsqueeze_dim(1))
                        .sum()
                        .neg();
                    losses[index] +=
                        f64::from(host_values(hard.clone().inner())[0]) / n_targets as f64;
                    let loss = match (config.distillation, &taught) {
                        (Some(Distillation { weight }), Some(taught)) => {
                            let taught: Tensor<2> = Tensor::from_inner(Tensor::clone(taught));
                            (taught * likelihoods).sum().neg() * weight + hard * (1.0 - weight)
                        }
                        _ => hard,
                    };
                    if index == 0 {
                        taught = Some(softmax(logits.inner(), 1));
                    }
                    let loss = loss / (n_targets * subnets.len()) as f64;
                    add_gradients(&model, loss.backward(), &mut expected);
                }
            }
            let what =
                format!("{distillation:?}, {random} random, {checkpointing:?}, mixed {mixed}");
            assert_eq!(
                expected.keys().collect::<Vec<_>>(),
                before.keys().collect::<Vec<_>>(),
                "{what}"
            );
            let size = expected
                .values()
                .flatten()
                .fold(0.0_f64, |size, g| size.max(g.abs()));
            let mut off = 0.0_f64;
            for (path, gradient) in &expected {
                for ((g, before), after) in gradient.iter().zip(&before[path]).zip(&moved[path]) {
                    off =
                        off.max((f64::from(before - after) - g * LARGE / (g.abs() + LARGE)).abs());
                }
            }
            eprintln!("{what}: gradients within {off:.1e} of {size:.1e}");
            assert!(off < 1e-5 * size + 1e-7, "{what}: {off} of {size}");
            let log = &report.logs[0];
            let norm = expected
                .values()
                .flatten()
                .map(|g| g * g)
                .sum::<f64>()
                .sqrt();
            assert!(
                (log.grad_norm - norm).abs() < 1e-5 * norm,
                "{what}: {} and {norm}",
                log.grad_norm
            );
            assert!((log.loss - losses[0]).abs() < 1e-5 * losses[0]);
            assert!(
                (log.smallest_loss.unwrap() - losses[random + 1]).abs() < 1e-5 * losses[random + 1]
            );
            assert_eq!(log.random_losses.len(), random);
            for (got, want) in log.random_losses.iter().zip(&losses[1..]) {
                assert!((got - want).abs() < 1e-5 * want);
            }
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_bits_and_each_rule_its_own() {
    let trained = |config: TrainConfig| {
        let mut net = net();
        let home = net.active().clone();
        let report = run(config, &mut net).unwrap();
        assert_eq!(net.active(), &home);
        assert!(!net.model().device().is_autodiff());
        (weight_bits(net.model()), report.logs)
    };
    let first = trained(config());
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        assert_eq!(
            first,
            pool.install(|| trained(config())),
            "{threads} threads"
        );
    }
    let others = [
        TrainConfig {
            seed: 10,
            ..config()
        },
        TrainConfig {
            sampling: Sampling::Sandwich { random: 1 },
            ..config()
        },
        TrainConfig {
            distillation: None,
            ..config()
        },
        TrainConfig {
            distillation: Some(Distillation::default()),
            ..config()
        },
        TrainConfig {
            stages: Vec::new(),
            ..config()
        },
        TrainConfig {
            stages: Vec::new(),
            distillation: None,
            sampling: Sampling::PerStep,
            ..config()
        },
    ];
    let mut weights = vec![first.0];
    weights.extend(others.map(|other| trained(other).0));
    for (index, one) in weights.iter().enumerate() {
        assert!(weights[..index].iter().all(|other| other != one), "{index}");
    }
}

#[test]
fn an_interrupted_run_resumes_to_the_same_bits() {
    // The checkpoint of step 3 is within a stage.
    let kinds = [Elastic::Rank, Elastic::Width, Elastic::Depth];
    let stages = vec![
        Stage::new(2, []),
        Stage::new(3, &kinds[..2]),
        Stage::new(7, kinds),
    ];
    let settings = TrainConfig {
        checkpoint_every: 3,
        stages,
        ..config()
    };
    let net = || mixed_net(0.2);
    let mut whole = net();
    let expected = run(settings.clone(), &mut whole).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let trainer = |settings: TrainConfig| {
        Trainer::new(settings)
            .unwrap()
            .with_folder(dir.path())
            .with_resume(true)
    };
    // The run ends with an error at its first validation, as if the process had been killed.
    let broken = fixed_batches(&[Sequence::unmasked(vec![1, 41])], 1, 0).unwrap();
    let outcome = trainer(settings.clone()).run(&mut net(), &mut batcher(), &broken, &Silent);
    assert!(matches!(outcome, Err(Error::TokenOutOfRange { .. })));

    let valid = fixed_batches(&sequences(9, 2), 4, 0).unwrap();
    for other in [
        TrainConfig {
            sampling: Sampling::Sandwich { random: 3 },
            ..settings.clone()
        },
        TrainConfig {
            distillation: None,
            ..settings.clone()
        },
        TrainConfig {
            distillation: Some(Distillation { weight: 0.8 }),
            ..settings.clone()
        },
        TrainConfig {
            stages: vec![Stage::new(12, [Elastic::Rank])],
            ..settings.clone()
        },
    ] {
        let outcome = trainer(other).run(&mut net(), &mut batcher(), &valid, &Silent);
        assert!(
            matches!(&outcome, Err(Error::CheckpointMismatch { field, .. }) if field == "settings")
        );
    }
    let mut resumed = net();
    let report = trainer(settings)
        .run(&mut resumed, &mut batcher(), &valid, &Silent)
        .unwrap();
    assert_eq!((report.steps_done, &report.logs), (9, &expected.logs));
    assert_eq!(weight_bits(resumed.model()), weight_bits(whole.model()));
}

#[test]
fn checkpointing_changes_nothing_but_rounding() {
    let sandwich = Sampling::Sandwich { random: 2 };
    let half = Some(Distillation { weight: 0.7 });
    for (sampling, distillation, mixed) in [
        (sandwich, None, false),
        (sandwich, half, false),
        (sandwich, half, true),
        (Sampling::PerStep, None, true),
    ] {
        let trained = |checkpointing: Checkpointing| {
            let mut net = if mixed { mixed_net(0.2) } else { net() };
            let stages = Vec::new();
            let config = TrainConfig {
                checkpointing,
                sampling,
                distillation,
                stages,
                eps: 1e-3,
                ..config()
            };
            let report = run(config, &mut net).unwrap();
            (report.logs, factors(&net))
        };
        let (logs, weights) = trained(Checkpointing::None);
        let (by_block_logs, by_block) = trained(Checkpointing::Blocks);
        for (a, b) in logs.iter().zip(&by_block_logs) {
            let near = |a: f64, b: f64| (a - b).abs() <= 1e-5 * a.abs();
            assert!(
                near(a.loss, b.loss) && near(a.grad_norm, b.grad_norm),
                "{a:?} {b:?}"
            );
            assert_eq!(a.smallest_loss.is_some(), b.smallest_loss.is_some());
        }
        for (path, values) in &weights {
            assert!(
                crate::common::max_diff(values, &by_block[path]) < 1e-5,
                "{path}"
            );
        }
    }
}

#[test]
fn a_stage_leaves_what_it_does_not_name_at_its_largest() {
    let staged = |sampling: Sampling| {
        let mut net = net();
        let stages = vec![Stage::new(5, []), Stage::new(7, [Elastic::Rank])];
        let config = TrainConfig {
            sampling,
            stages,
            distillation: None,
            eval_every: 0,
            ..config()
        };
        run(config, &mut net).unwrap().logs
    };
    let mut largest = net();
    largest.activate(&largest.maximal()).unwrap();
    let alone = TrainConfig {
        sampling: Sampling::Fixed,
        stages: Vec::new(),
        distillation: None,
        eval_every: 0,
        ..config()
    };
    let alone = run(alone, &mut largest).unwrap().logs;
    for sampling in [
        Sampling::PerStep,
        Sampling::PerMicroBatch,
        Sampling::Sandwich { random: 1 },
    ] {
        let logs = staged(sampling);
        // First the largest subnet alone, bit for bit; then other subnets, too.
        assert_eq!(logs[..5], alone[..5], "{sampling:?}");
        assert!(
            logs[5..]
                .iter()
                .zip(&alone[5..])
                .all(|(a, b)| a.grad_norm != b.grad_norm),
            "{sampling:?}"
        );
        let sandwich = matches!(sampling, Sampling::Sandwich { .. });
        assert!(
            logs[5..]
                .iter()
                .all(|log: &StepLog| log.smallest_loss.is_some() == sandwich)
        );
    }
}

#[test]
fn a_step_moves_what_any_of_its_subnets_used_and_no_more() {
    // Of 5 ranks, the largest subnet has 4 and the smallest 1.
    let mut net = net_of(&[4, 1], 0.2, false);
    let before = factors(&net);
    let config = TrainConfig {
        sampling: Sampling::Sandwich { random: 0 },
        stages: Vec::new(),
        ..config()
    };
    run(config, &mut net).unwrap();
    for (path, after) in factors(&net) {
        let d_output = after.len() / 5;
        for rank in 0..5 {
            let of = |i: usize| {
                if path.ends_with("lora_a") {
                    i % 5
                } else {
                    i / d_output
                }
            };
            let moved = after
                .iter()
                .zip(&before[&path])
                .enumerate()
                .filter(|(i, (a, b))| of(*i) == rank && a != b);
            assert_eq!(moved.count() > 0, rank < 4, "{path}, rank {rank}");
        }
    }
}

#[test]
fn where_nothing_varies_the_one_subnet_is_trained_once() {
    for dense in [false, true] {
        let trained = |sampling: Sampling| {
            let mut net = if dense {
                SuperNet::dense(tiny(true, 4)).unwrap()
            } else {
                net_of(&[3], 0.2, true)
            };
            let config = TrainConfig {
                sampling,
                distillation: None,
                stages: Vec::new(),
                ..config()
            };
            let report = run(config, &mut net).unwrap();
            (weight_bits(net.model()), report.logs)
        };
        assert_eq!(
            trained(Sampling::Sandwich { random: 2 }),
            trained(Sampling::Fixed)
        );
    }
}

#[test]
fn settings_that_do_not_fit_are_refused() {
    let refused = |config: TrainConfig| match Trainer::new(config) {
        Err(Error::InvalidArgument { name, .. }) => name,
        other => panic!("{other:?}"),
    };
    let good = config();
    for weight in [-0.1, 1.1, f64::NAN] {
        let distillation = Some(Distillation { weight });
        assert_eq!(
            refused(TrainConfig {
                distillation,
                ..good.clone()
            }),
            "distillation.weight"
        );
    }
    for sampling in [Sampling::PerStep, Sampling::PerMicroBatch, Sampling::Fixed] {
        assert_eq!(
            refused(TrainConfig {
                sampling,
                ..good.clone()
            }),
            "distillation"
        );
    }
    let fixed = TrainConfig {
        sampling: Sampling::Fixed,
        distillation: None,
        ..good.clone()
    };
    assert_eq!(refused(fixed), "stages");
    let random = usize::MAX;
    assert_eq!(
        refused(TrainConfig {
            sampling: Sampling::Sandwich { random },
            ..good.clone()
        }),
        "random"
    );
    for stages in [
        vec![Stage::new(11, [Elastic::Rank])],
        vec![Stage::new(12, [Elastic::Rank]), Stage::new(1, [])],
        vec![Stage::new(12, [Elastic::Rank]), Stage::new(0, [])],
        vec![Stage::new(usize::MAX, []), Stage::new(13, [])],
    ] {
        assert_eq!(
            refused(TrainConfig {
                stages,
                ..good.clone()
            }),
            "stages"
        );
    }

    // A trained head would get no gradient from it, and a kind that no group has would never vary.
    let mut dense = SuperNet::dense(tiny(true, 4)).unwrap();
    let before = weight_bits(dense.model());
    let unstaged = TrainConfig {
        stages: Vec::new(),
        ..good.clone()
    };
    assert!(matches!(
        run(unstaged, &mut dense),
        Err(Error::Unsupported { .. })
    ));
    let staged = TrainConfig {
        distillation: None,
        ..good
    };
    assert!(matches!(
        run(staged, &mut dense),
        Err(Error::InvalidArgument { name: "stages", .. })
    ));
    assert_eq!(before, weight_bits(dense.model()));
}

#[test]
fn settings_without_the_new_fields_are_those_of_before() {
    let text = serde_json::to_string(&config()).unwrap();
    assert_eq!(
        serde_json::from_str::<TrainConfig>(&text).unwrap(),
        config()
    );
    let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        value["sampling"],
        serde_json::json!({"sandwich": {"random": 2}})
    );
    value["sampling"] = "per-step".into();
    let fields = value.as_object_mut().unwrap();
    fields.remove("distillation");
    fields.remove("stages");
    let old: TrainConfig = serde_json::from_value(value).unwrap();
    let plain = TrainConfig {
        sampling: Sampling::PerStep,
        distillation: None,
        stages: Vec::new(),
        ..config()
    };
    assert_eq!(old, plain);
}
