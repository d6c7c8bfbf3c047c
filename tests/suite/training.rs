//! Training: what changes and what stays, bit-identical results after an interruption, and clear
//! errors.

use std::collections::BTreeSet;
use std::path::Path;

use crate::common::{Heard, is_factor, random_ids, tiny, tiny_dims, tiny_on, weight_bits};
use burn::tensor::Device;
use elastic_lora::adapter::LoraConfig;
use elastic_lora::data::{Batch, Batcher, Sequence, collate, fixed_batches};
use elastic_lora::eval::mean_loss;
use elastic_lora::io::atomic::Lock;
use elastic_lora::linalg::Matrix;
use elastic_lora::nn::BaseLinear;
use elastic_lora::progress::{Progress, Silent};
use elastic_lora::supernet::SuperNetConfig;
use elastic_lora::train::{
    Checkpointing, Sampling, Schedule, StepLog, TrainConfig, TrainReport, Trainer, targets,
};
use elastic_lora::{Error, Result, SearchSpace, SuperNet};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

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

fn valid() -> Vec<Batch> {
    fixed_batches(&sequences(9, 2), 4, 0).unwrap()
}

fn lora() -> LoraConfig {
    LoraConfig::new(5).with_alpha(12.0).with_dropout(0.2)
}

fn net() -> SuperNet {
    let model = tiny(false, 4);
    let groups = [
        &["q_proj", "k_proj", "v_proj"][..],
        &["up_proj", "gate_proj"],
        &["down_proj"],
    ];
    let space = SearchSpace::grouped(&model.layer_shapes(), &groups, &[5, 3, 2]).unwrap();
    let mut net = SuperNet::new(model, space, SuperNetConfig::new(lora()).with_seed(6)).unwrap();
    net.activate(&net.heuristic()).unwrap();
    net
}

/// Everything enabled: accumulation, clipping that takes effect, warm-up, decay, validation, and a
/// random subnet at each step.
fn config(steps: usize) -> TrainConfig {
    let mut config = TrainConfig::new(steps);
    config.accumulation = 2;
    config.lr = 1e-2;
    config.warmup = 3;
    config.weight_decay = 0.01;
    config.clip_norm = Some(0.5);
    config.eval_every = 4;
    config.seed = 9;
    config
}

/// Returns the layer's weight with every third element set to zero.
fn every_third_zero(base: &BaseLinear) -> Matrix {
    let mut weight = base.to_matrix();
    weight
        .as_mut_slice()
        .iter_mut()
        .step_by(3)
        .for_each(|v| *v = 0.0);
    weight
}

fn run(trainer: &Trainer, net: &mut SuperNet) -> Result<TrainReport> {
    run_until(trainer, net, &Silent)
}

fn run_until(
    trainer: &Trainer,
    net: &mut SuperNet,
    progress: &dyn Progress,
) -> Result<TrainReport> {
    trainer.run(net, &mut batcher(), &valid(), progress)
}

/// Runs until the first validation, which fails because of a token outside the vocabulary. The
/// remaining checkpoint is the one before it, as if the process had been killed.
fn end_at_validation(trainer: &Trainer, net: &mut SuperNet) {
    let broken = fixed_batches(&[Sequence::unmasked(vec![1, 41])], 1, 0).unwrap();
    let outcome = trainer.run(net, &mut batcher(), &broken, &Silent);
    assert!(matches!(outcome, Err(Error::TokenOutOfRange { .. })));
}

#[test]
fn only_adapters_change_and_the_loss_falls() {
    let mut net = net();
    let home = net.active().clone();
    let before = weight_bits(net.model());
    let untrained = mean_loss(&net.eval_model(), &valid(), &Silent).unwrap();
    let mut config = config(60);
    config.clip_norm = None;
    let report = run(&Trainer::new(config).unwrap(), &mut net).unwrap();
    let after = weight_bits(net.model());
    assert_eq!(
        before.keys().collect::<Vec<_>>(),
        after.keys().collect::<Vec<_>>()
    );
    for (path, bits) in &before {
        assert_eq!(is_factor(path), bits != &after[path], "{path}");
    }
    assert_eq!(
        after.keys().filter(|path| is_factor(path)).count(),
        2 * 2 * 6
    );
    assert!(
        report.valid_loss().unwrap() < 0.8 * untrained,
        "{untrained} {:?}",
        report.valid_loss()
    );
    assert_eq!(
        report.valid_loss().unwrap(),
        mean_loss(&net.eval_model(), &valid(), &Silent).unwrap()
    );
    assert_eq!(net.active(), &home);
    assert!(!net.model().device().is_autodiff());
    assert_eq!((report.steps_done, report.logs.len()), (60, 60));

    // A second run continues from there, and still leaves the base unchanged.
    let trained_loss = report.valid_loss().unwrap();
    let report = run(
        &Trainer::new(TrainConfig {
            seed: 10,
            ..self::config(20)
        })
        .unwrap(),
        &mut net,
    )
    .unwrap();
    assert!(report.valid_loss().unwrap() < 1.1 * trained_loss);
    let again = weight_bits(net.model());
    assert!(
        before
            .iter()
            .all(|(path, bits)| is_factor(path) || bits == &again[path])
    );
    assert!(
        after
            .iter()
            .any(|(path, bits)| is_factor(path) && bits != &again[path])
    );
}

#[test]
fn the_same_seed_gives_the_same_bits() {
    let trained = |config: TrainConfig| {
        let mut net = net();
        let report = run(&Trainer::new(config).unwrap(), &mut net).unwrap();
        (weight_bits(net.model()), report.logs)
    };
    let first = trained(config(8));
    assert_eq!(first, trained(config(8)));
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        assert_eq!(
            first,
            pool.install(|| trained(config(8))),
            "{threads} threads"
        );
    }
    assert_ne!(
        first.0,
        trained(TrainConfig {
            seed: 10,
            ..config(8)
        })
        .0
    );
    let fixed = trained(TrainConfig {
        sampling: Sampling::Fixed,
        ..config(8)
    });
    let per_batch = trained(TrainConfig {
        sampling: Sampling::PerMicroBatch,
        ..config(8)
    });
    assert!(first.0 != fixed.0 && first.0 != per_batch.0 && fixed.0 != per_batch.0);
}

#[test]
fn an_interrupted_run_resumes_to_the_same_bits() {
    for dense in [false, true] {
        let make = || {
            if dense {
                SuperNet::dense(tiny(false, 4)).unwrap()
            } else {
                net()
            }
        };
        let (dir, whole_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut whole = make();
        let trainer = Trainer::new(TrainConfig {
            checkpoint_every: 3,
            ..config(12)
        })
        .unwrap();
        let expected = run(&trainer.clone().with_folder(whole_dir.path()), &mut whole).unwrap();
        // Ended after step 4, and therefore resumed from the checkpoint of step 3.
        let ended_dir = tempfile::tempdir().unwrap();
        let ended = trainer
            .clone()
            .with_folder(ended_dir.path())
            .with_resume(true);
        end_at_validation(&ended, &mut make());
        let mut net = make();
        let late = run(&ended, &mut net).unwrap();
        assert_eq!((late.steps_done, &late.logs), (9, &expected.logs));
        assert_eq!(weight_bits(net.model()), weight_bits(whole.model()));

        // Interrupted before its first step, and again and again, each time a little later: between
        // steps, and within steps and validations.
        let trainer = trainer.with_folder(dir.path()).with_resume(true);
        let (mut interruptions, mut tasks) = (0, BTreeSet::new());
        let (report, weights) = loop {
            let stop = Heard::stopping_at(interruptions);
            let mut net = make();
            match run_until(&trainer, &mut net, &stop) {
                Ok(report) => break (report, weight_bits(net.model())),
                Err(Error::Interrupted { task }) => {
                    // The run stops at the first check that requests it.
                    assert_eq!(stop.asked(), interruptions + 1);
                    tasks.insert(task);
                    interruptions += 1;
                }
                Err(other) => panic!("{other}"),
            }
        };
        assert_eq!(tasks, ["evaluate", "train"].map(String::from).into());
        assert!(interruptions > 6, "{interruptions}");
        assert_eq!(weights, weight_bits(whole.model()));
        assert_eq!(report.logs, expected.logs);
        let csv = |dir: &Path| std::fs::read_to_string(dir.join("losses.csv")).unwrap();
        assert_eq!(csv(dir.path()), csv(whole_dir.path()));
        // Once more from the last checkpoint: the same result again.
        let mut net = make();
        assert_eq!(run(&trainer, &mut net).unwrap().logs, expected.logs);
        assert_eq!(weight_bits(net.model()), weights);
    }
}

#[test]
fn a_checkpoint_of_another_run_or_a_broken_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let settings = TrainConfig {
        checkpoint_every: 3,
        ..config(6)
    };
    end_at_validation(
        &Trainer::new(settings.clone())
            .unwrap()
            .with_folder(dir.path()),
        &mut net(),
    );
    let resume = |config: TrainConfig| {
        Trainer::new(config)
            .unwrap()
            .with_folder(dir.path())
            .with_resume(true)
    };

    // Other settings, space, adapters, data, or order.
    let mismatch = |outcome: Result<TrainReport>| match outcome {
        Err(Error::CheckpointMismatch { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    let other = TrainConfig {
        lr: 2e-2,
        ..settings.clone()
    };
    assert_eq!(mismatch(run(&resume(other), &mut net())), "settings");
    let model = tiny(false, 4);
    let space = SearchSpace::fixed(&model.layer_shapes(), 5).unwrap();
    let mut other = SuperNet::new(model, space, net().config().clone()).unwrap();
    assert_eq!(
        mismatch(run(&resume(settings.clone()), &mut other)),
        "search space"
    );
    let mut other = SuperNet::new(
        tiny(false, 4),
        net().space().clone(),
        SuperNetConfig::new(lora()),
    )
    .unwrap();
    assert_eq!(
        mismatch(run(&resume(settings.clone()), &mut other)),
        "adapters"
    );
    for mut data in [
        Batcher::new(sequences(37, 2), 4, 0, 5).unwrap(),
        Batcher::new(sequences(37, 1), 4, 0, 6).unwrap(),
        Batcher::new(sequences(36, 1), 4, 0, 5).unwrap(),
    ] {
        mismatch(resume(settings.clone()).run(&mut net(), &mut data, &[], &Silent));
    }
    let model = tiny_on(&tiny_dims(true), 4, &Device::flex());
    let mut other = SuperNet::new(model, net().space().clone(), net().config().clone()).unwrap();
    assert_eq!(
        mismatch(run(&resume(settings.clone()), &mut other)),
        "number of base weights"
    );

    // Damaged files. The supernet stays unchanged and off the autodiff tape.
    let checkpoint = dir.path().join("checkpoint");
    let (json, tensors) = (
        checkpoint.join("trainer.json"),
        checkpoint.join("trainer.safetensors"),
    );
    let (good_json, good_tensors) = (
        std::fs::read_to_string(&json).unwrap(),
        std::fs::read(&tensors).unwrap(),
    );
    let refused = |what: &str| {
        let mut net = net();
        let before = weight_bits(net.model());
        let error = run(&resume(settings.clone()), &mut net).expect_err(what);
        assert!(!error.to_string().is_empty());
        assert_eq!(before, weight_bits(net.model()), "{what}");
        assert!(!net.model().device().is_autodiff(), "{what}");
        let home = net.active().clone();
        net.activate(&home).unwrap();
        error
    };
    // Writes other values, with the checksum that belongs to them.
    let edit = |f: &dyn Fn(&mut serde_json::Value)| {
        let mut value: serde_json::Value = serde_json::from_str(&good_json).unwrap();
        f(&mut value);
        value["checksum"] = 0.into();
        value["checksum"] = crc32fast::hash(value.to_string().as_bytes()).into();
        std::fs::write(&json, value.to_string()).unwrap();
    };
    for text in [
        "",
        "{",
        "null",
        "[]",
        "{\"version\": 3}",
        &good_json[..good_json.len() / 2],
    ] {
        std::fs::write(&json, text).unwrap();
        assert!(matches!(refused(text), Error::Json { .. }));
    }
    edit(&|v| v["version"] = 1.into());
    assert!(matches!(
        refused("version"),
        Error::CheckpointMismatch { .. }
    ));
    edit(&|v| v["step"] = 5.into());
    assert!(matches!(refused("step"), Error::InvalidFile { .. }));
    edit(&|v| v["step"] = (-1).into());
    assert!(matches!(refused("negative step"), Error::Json { .. }));
    edit(&|v| v["position"]["index"] = 10_000.into());
    assert!(matches!(refused("position"), Error::InvalidArgument { .. }));
    edit(&|v| v["times"]["layers.0.mlp.up_proj.adapter.lora_a"] = vec![1].into());
    assert!(matches!(
        refused("too few counts"),
        Error::InvalidFile { .. }
    ));
    edit(&|v| v["times"]["nothing.lora_a"] = vec![1].into());
    assert!(matches!(refused("times"), Error::MissingTensor { .. }));
    std::fs::write(&json, &good_json).unwrap();
    for len in [0, 4, 8, 100, good_tensors.len() / 2, good_tensors.len() - 1] {
        std::fs::write(&tensors, &good_tensors[..len]).unwrap();
        refused("cut tensors");
    }
    let mut nan = good_tensors.clone();
    let n = nan.len();
    nan[n - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    edit(&|v| v["tensors"] = crc32fast::hash(&nan).into());
    std::fs::write(&tensors, nan).unwrap();
    assert!(matches!(refused("NaN"), Error::NotFinite { .. }));
    std::fs::write(&json, &good_json).unwrap();
    std::fs::remove_file(&tensors).unwrap();
    refused("no tensors");

    // A single changed bit anywhere.
    let mut rng = ChaCha8Rng::seed_from_u64(12);
    std::fs::write(&tensors, &good_tensors).unwrap();
    for (file, good) in [(&json, good_json.as_bytes()), (&tensors, &good_tensors[..])] {
        for _ in 0..40 {
            let (at, bit) = (rng.random_range(0..good.len()), rng.random_range(0..8));
            let mut bytes = good.to_vec();
            bytes[at] ^= 1 << bit;
            std::fs::write(file, bytes).unwrap();
            refused(&format!("bit {bit} of byte {at} of {}", file.display()));
        }
        std::fs::write(file, good).unwrap();
    }

    // Another run is using the folder.
    let lock = Lock::acquire(dir.path().join("run.lock"), dir.path()).unwrap();
    let busy = refused("busy").to_string();
    assert!(busy.contains("is writing here"), "{busy}");
    drop(lock);

    // A run that was killed between the renames that replace a checkpoint.
    let aside = dir.path().join(".checkpoint-a1B2c3.tmp");
    std::fs::create_dir(&aside).unwrap();
    std::fs::rename(&checkpoint, aside.join("old")).unwrap();

    // The undamaged files still work.
    let mut resumed = net();
    let report = run(&resume(settings.clone()), &mut resumed).unwrap();
    assert_eq!(report.steps_done, 3);
    let mut whole = net();
    let expected = run(&Trainer::new(settings).unwrap(), &mut whole).unwrap();
    assert_eq!(report.logs, expected.logs);
    assert_eq!(weight_bits(resumed.model()), weight_bits(whole.model()));
}

#[test]
fn plain_lora_is_the_space_of_one_choice() {
    let trained = |sampling: Sampling| {
        let model = tiny(true, 4);
        let shapes: Vec<_> = model
            .layer_shapes()
            .into_iter()
            .filter(|l| l.name.ends_with("q_proj"))
            .collect();
        let space = SearchSpace::fixed(&shapes, 3).unwrap();
        let mut net = SuperNet::new(model, space, SuperNetConfig::new(LoraConfig::new(3))).unwrap();
        let report = run(
            &Trainer::new(TrainConfig {
                sampling,
                ..config(10)
            })
            .unwrap(),
            &mut net,
        )
        .unwrap();
        assert_eq!(net.extract_adapter().unwrap().layers.len(), 2);
        (weight_bits(net.model()), report.logs)
    };
    assert_eq!(trained(Sampling::PerStep), trained(Sampling::Fixed));
}

#[test]
fn divergence_is_an_error_and_the_weights_stay_finite() {
    let finite = |net: &SuperNet| {
        weight_bits(net.model())
            .values()
            .flatten()
            .all(|bits| f32::from_bits(*bits).is_finite())
    };
    for clip_norm in [None, Some(1.0)] {
        // A learning rate so large that the next loss is NaN.
        let mut net = net();
        let wild = TrainConfig {
            lr: 1e30,
            warmup: 0,
            clip_norm,
            eval_every: 0,
            ..config(9)
        };
        let error = Trainer::new(wild.clone())
            .unwrap()
            .run(&mut net, &mut batcher(), &[], &Silent)
            .unwrap_err();
        assert!(
            matches!(error, Error::Diverged { step: 2.., .. }),
            "{error}"
        );
        assert!(finite(&net));
        assert!(!net.model().device().is_autodiff());
        // The run has only one step, so the result of its validation counts.
        let mut net = self::net();
        let before = weight_bits(net.model());
        let error = run(
            &Trainer::new(TrainConfig { steps: 1, ..wild }).unwrap(),
            &mut net,
        )
        .unwrap_err();
        assert!(matches!(error, Error::Diverged { step: 1, .. }), "{error}");
        assert_eq!(before, weight_bits(net.model()));
    }
}

#[test]
fn accumulated_micro_batches_are_one_batch() {
    let all = sequences(8, 3);
    let trained = |batch: usize, accumulation: usize| {
        let model = tiny(false, 4);
        let space = SearchSpace::fixed(&model.layer_shapes(), 3).unwrap();
        let mut net = SuperNet::new(model, space, SuperNetConfig::new(LoraConfig::new(3))).unwrap();
        // 8 sequences are one epoch and one step, so their order does not matter.
        let mut data = Batcher::new(all.clone(), batch, 0, 1).unwrap();
        let config = TrainConfig {
            accumulation,
            eps: 1e-3,
            ..config(3)
        };
        let report = Trainer::new(config)
            .unwrap()
            .run(&mut net, &mut data, &[], &Silent)
            .unwrap();
        (weight_bits(net.model()), report.logs)
    };
    let (whole, whole_logs) = trained(8, 1);
    for (batch, accumulation) in [(4, 2), (2, 4), (3, 3)] {
        let (parts, logs) = trained(batch, accumulation);
        for (a, b) in whole_logs.iter().zip(&logs) {
            assert!(
                (a.loss - b.loss).abs() < 1e-5 * a.loss
                    && (a.grad_norm - b.grad_norm).abs() < 1e-4 * a.grad_norm
            );
            assert_eq!(a.n_tokens, b.n_tokens);
        }
        for (path, bits) in &whole {
            for (a, b) in bits.iter().zip(&parts[path]) {
                assert!(
                    (f32::from_bits(*a) - f32::from_bits(*b)).abs() < 1e-5,
                    "{path}"
                );
            }
        }
    }
}

#[test]
fn the_log_has_every_step_with_its_rate_and_validation() {
    let dir = tempfile::tempdir().unwrap();
    let report = run(
        &Trainer::new(config(10))
            .unwrap()
            .with_folder(dir.path().join("new/run")),
        &mut net(),
    )
    .unwrap();
    let text = std::fs::read_to_string(dir.path().join("new/run/losses.csv")).unwrap();
    let mut lines = text.lines();
    assert_eq!(
        lines.next(),
        Some("step,loss,valid_loss,lr,grad_norm,tokens,smallest_loss")
    );
    let rows: Vec<Vec<&str>> = lines.map(|line| line.split(',').collect()).collect();
    assert_eq!(rows.len(), 10);
    for (index, (row, log)) in rows.iter().zip(&report.logs).enumerate() {
        assert_eq!(row[0], (index + 1).to_string());
        assert_eq!(row[1].parse::<f64>().unwrap(), log.loss);
        assert_eq!(row[2].is_empty(), ![4, 8, 10].contains(&(index + 1)));
        let lr = 1e-2 * Schedule::Cosine.factor(index, 3, 10);
        assert_eq!(row[3].parse::<f64>().unwrap(), lr);
        assert_eq!(row[4].parse::<f64>().unwrap(), log.grad_norm);
        assert_eq!(row[5].parse::<usize>().unwrap(), log.n_tokens);
    }
    assert!(report.logs[0].lr < report.logs[2].lr && report.logs[9].lr < report.logs[5].lr);
    let total: usize = report.logs.iter().map(|log| log.n_tokens).sum();
    assert!((report.tokens_per_second * report.seconds - total as f64).abs() < 1.0);
    // The tokens of a step are those of its two batches.
    let mut data = batcher();
    assert_eq!(
        report.logs[0].n_tokens,
        data.next_batch().n_tokens() + data.next_batch().n_tokens()
    );
}

#[test]
fn a_folder_that_cannot_be_is_an_error_before_the_first_step() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let mut net = net();
    let before = weight_bits(net.model());
    let result = run(
        &Trainer::new(config(3))
            .unwrap()
            .with_folder(file.join("run")),
        &mut net,
    );
    assert!(matches!(result, Err(Error::Io { .. })));
    assert_eq!(before, weight_bits(net.model()));
}

#[test]
fn a_dense_run_trains_every_weight_and_may_be_adapted_after() {
    let mut net = SuperNet::dense(tiny(false, 4)).unwrap();
    assert_eq!(net.n_subnets(), 1.0);
    let before = weight_bits(net.model());
    let untrained = mean_loss(net.model(), &valid(), &Silent).unwrap();
    let report = run(
        &Trainer::new(TrainConfig {
            lr: 3e-3,
            ..config(40)
        })
        .unwrap(),
        &mut net,
    )
    .unwrap();
    assert!(report.valid_loss().unwrap() < 0.7 * untrained);
    let after = weight_bits(net.model());
    for (path, bits) in &before {
        assert_ne!(bits, &after[path], "{path}");
    }
    assert_eq!(
        net.cost(&net.maximal()).unwrap().params,
        net.model().count_base_params().total
    );

    // Adapters on the model that was just trained; its own weights are frozen then.
    let model = net.into_model();
    let space = SearchSpace::fixed(&model.layer_shapes(), 2).unwrap();
    let mut net = SuperNet::new(model, space, SuperNetConfig::new(LoraConfig::new(2))).unwrap();
    run(&Trainer::new(config(3)).unwrap(), &mut net).unwrap();
    let adapted = weight_bits(net.model());
    for (path, bits) in &after {
        let path = if adapted.contains_key(path) {
            path.clone()
        } else {
            panic!("{path} is gone")
        };
        assert_eq!(bits, &adapted[&path], "{path}");
    }
}

#[test]
fn a_tied_dense_model_trains_too() {
    let mut net = SuperNet::dense(tiny(true, 4)).unwrap();
    let untrained = mean_loss(net.model(), &valid(), &Silent).unwrap();
    let report = run(
        &Trainer::new(TrainConfig {
            lr: 3e-3,
            ..config(40)
        })
        .unwrap(),
        &mut net,
    )
    .unwrap();
    assert!(report.valid_loss().unwrap() < 0.8 * untrained);
}

#[test]
fn a_masked_run_keeps_the_zeros_of_the_merge() {
    let mut model = tiny(true, 4);
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
    let space = SearchSpace::fixed(&model.layer_shapes(), 3).unwrap();
    let config_ = SuperNetConfig::new(lora()).with_sparse_peft(true);
    let mut net = SuperNet::new(model, space, config_).unwrap();
    run(&Trainer::new(config(6)).unwrap(), &mut net).unwrap();
    for (name, layer) in net.model().linears() {
        let merged = elastic_lora::nn::host_values(layer.merged_weight());
        let weight = elastic_lora::nn::host_values(layer.base.weight());
        assert!(
            weight
                .iter()
                .zip(&merged)
                .all(|(w, m)| *w != 0.0 || *m == 0.0),
            "{name}"
        );
        assert!(weight != merged, "{name}");
    }
}

#[test]
fn odd_data_gives_errors_or_nothing_but_no_panic() {
    let run_on = |sequences: Vec<Sequence>, net: &mut SuperNet| {
        let mut data = Batcher::new(sequences, 2, 0, 1)?;
        Trainer::new(config(3))?.run(net, &mut data, &[], &Silent)
    };
    // A token outside the vocabulary, a sequence longer than the context, and an empty sequence.
    let mut net = net();
    let before = weight_bits(net.model());
    let error = run_on(vec![Sequence::unmasked(vec![1, 41, 2])], &mut net).unwrap_err();
    assert!(
        matches!(
            error,
            Error::TokenOutOfRange {
                found: 41,
                vocab_size: 41
            }
        ),
        "{error}"
    );
    let error = run_on(vec![Sequence::unmasked(vec![1; 41])], &mut net).unwrap_err();
    assert!(
        matches!(
            error,
            Error::SequenceTooLong {
                found: 41,
                max: 40,
                ..
            }
        ),
        "{error}"
    );
    assert!(run_on(vec![Sequence::unmasked(Vec::new())], &mut net).is_err());
    assert!(run_on(Vec::new(), &mut net).is_err());
    assert_eq!(before, weight_bits(net.model()));
    assert!(!net.model().device().is_autodiff());
    // Nothing to predict, so nothing is learned.
    let nothing = Sequence {
        ids: vec![1, 2, 3],
        loss_mask: vec![false; 3],
    };
    let report = run_on(vec![nothing.clone(), nothing.clone()], &mut net).unwrap();
    assert!(
        report
            .logs
            .iter()
            .all(|log| log.loss == 0.0 && log.grad_norm == 0.0)
    );
    assert_eq!(before, weight_bits(net.model()));
    // Some of the batches have nothing to predict.
    let some = vec![nothing.clone(), nothing, sequences(1, 1).remove(0)];
    assert!(
        run_on(some, &mut net)
            .unwrap()
            .logs
            .iter()
            .all(|log| log.loss.is_finite())
    );

    // Nothing to train.
    let mut bare = SuperNet::new(
        tiny(true, 4),
        SearchSpace::single(),
        SuperNetConfig::new(lora()),
    )
    .unwrap();
    assert!(matches!(
        run(&Trainer::new(config(3)).unwrap(), &mut bare),
        Err(Error::InvalidArgument { .. })
    ));

    // A first token cannot be predicted for any mask.
    let first = Sequence {
        ids: vec![7, 8],
        loss_mask: vec![true, true],
    };
    assert_eq!(targets(&collate(&[&first, &first], 0)), [(0, 8), (2, 8)]);
    assert!(matches!(
        mean_loss(&net.eval_model(), &[], &Silent),
        Err(Error::InvalidArgument {
            name: "batches",
            ..
        })
    ));

    for bad in [
        TrainConfig {
            steps: 0,
            ..config(3)
        },
        TrainConfig {
            accumulation: 0,
            ..config(3)
        },
        TrainConfig {
            lr: f64::NAN,
            ..config(3)
        },
        TrainConfig {
            lr: 0.0,
            ..config(3)
        },
        TrainConfig {
            eps: -1.0,
            ..config(3)
        },
        TrainConfig {
            weight_decay: f64::INFINITY,
            ..config(3)
        },
        TrainConfig {
            betas: (1.0, 0.9),
            ..config(3)
        },
        TrainConfig {
            clip_norm: Some(0.0),
            ..config(3)
        },
    ] {
        assert!(matches!(
            Trainer::new(bad),
            Err(Error::InvalidArgument { .. })
        ));
    }
}

#[test]
fn a_model_on_the_autodiff_device_trains_to_the_same_bits() {
    let trained = |device: &Device| {
        let model = tiny_on(&tiny_dims(true), 4, device);
        let space = SearchSpace::fixed(&model.layer_shapes(), 3).unwrap();
        let config_ = SuperNetConfig::new(lora()).with_sparse_peft(true);
        let mut net = SuperNet::new(model, space, config_).unwrap();
        run(&Trainer::new(config(4)).unwrap(), &mut net).unwrap();
        weight_bits(net.model())
    };
    assert_eq!(
        trained(&Device::flex()),
        trained(&Device::flex().autodiff())
    );
}

#[test]
fn ranks_that_no_subnet_used_stay_as_they_were() {
    let mut net = net();
    // First build up momentum for all ranks.
    let maximal = net.maximal();
    net.activate(&maximal).unwrap();
    let fixed = TrainConfig {
        sampling: Sampling::Fixed,
        weight_decay: 0.1,
        ..config(4)
    };
    run(&Trainer::new(fixed.clone()).unwrap(), &mut net).unwrap();
    let minimal = net.minimal();
    net.activate(&minimal).unwrap();
    let before = weight_bits(net.model());
    run(&Trainer::new(fixed).unwrap(), &mut net).unwrap();
    let after = weight_bits(net.model());
    for (path, bits) in before.iter().filter(|(path, _)| is_factor(path)) {
        // 2 of 5 ranks are active: columns of A and rows of B.
        let d_output = bits.len() / 5;
        let active = |i: usize| {
            if path.ends_with("lora_a") {
                i % 5 < 2
            } else {
                i / d_output < 2
            }
        };
        for (i, (before, after)) in bits.iter().zip(&after[path]).enumerate() {
            assert!(active(i) || before == after, "{path}: {i}");
        }
        assert!(
            bits.iter()
                .zip(&after[path])
                .enumerate()
                .filter(|(i, _)| active(*i))
                .any(|(_, (b, a))| b != a)
        );
    }
}

#[test]
fn checkpointing_changes_nothing_but_rounding() {
    let fixed = |sparse: bool, dropout: f64| {
        let mut model = tiny(sparse, 4);
        if sparse {
            model
                .try_for_each_linear(|_, layer| {
                    layer.base.set_matrix(&every_third_zero(&layer.base))
                })
                .unwrap();
        }
        let space = SearchSpace::fixed(&model.layer_shapes(), 3).unwrap();
        let lora = LoraConfig::new(3).with_dropout(dropout);
        SuperNet::new(
            model,
            space,
            SuperNetConfig::new(lora).with_sparse_peft(sparse),
        )
        .unwrap()
    };
    // The adapters are above the first block only, so the backward pass does not recompute anything
    // below.
    let upper = || {
        let model = tiny(false, 4);
        let shapes: Vec<_> = model
            .layer_shapes()
            .into_iter()
            .filter(|l| l.name.contains("layers.1."))
            .collect();
        let space = SearchSpace::fixed(&shapes, 3).unwrap();
        SuperNet::new(model, space, SuperNetConfig::new(lora())).unwrap()
    };
    let cases: [(&str, &dyn Fn() -> SuperNet, Sampling); 8] = [
        ("plain LoRA", &|| fixed(false, 0.0), Sampling::Fixed),
        ("subnets and dropout", &net, Sampling::PerStep),
        (
            "subnets by micro-batch and dropout",
            &net,
            Sampling::PerMicroBatch,
        ),
        ("SparsePEFT", &|| fixed(true, 0.0), Sampling::PerStep),
        (
            "SparsePEFT and dropout",
            &|| fixed(true, 0.1),
            Sampling::PerStep,
        ),
        ("the upper block", &upper, Sampling::PerStep),
        (
            "dense",
            &|| SuperNet::dense(tiny(false, 4)).unwrap(),
            Sampling::PerStep,
        ),
        (
            "dense, tied",
            &|| SuperNet::dense(tiny(true, 4)).unwrap(),
            Sampling::PerStep,
        ),
    ];
    for (what, make, sampling) in cases {
        let trained = |checkpointing: Checkpointing| {
            let mut net = make();
            // A larger epsilon, because AdamW divides rounding errors by the root of a number that
            // may contain little else.
            let config = TrainConfig {
                sampling,
                checkpointing,
                accumulation: 3,
                eps: 1e-3,
                ..config(5)
            };
            let report = run(&Trainer::new(config).unwrap(), &mut net).unwrap();
            (report.logs, weight_bits(net.model()))
        };
        let (logs, weights) = trained(Checkpointing::None);
        let (by_block_logs, by_block) = trained(Checkpointing::Blocks);
        assert_eq!(
            trained(Checkpointing::Blocks),
            (by_block_logs.clone(), by_block.clone()),
            "{what}"
        );
        same_logs(&logs, &by_block_logs, what);
        let mut largest = 0.0f32;
        for (path, bits) in &weights {
            for (a, b) in bits.iter().zip(&by_block[path]) {
                let (a, b) = (f32::from_bits(*a), f32::from_bits(*b));
                largest = largest.max((a - b).abs());
                assert!(
                    (a - b).abs() <= 1e-6 * a.abs().max(1.0),
                    "{what}: {path}: {a} {b}"
                );
            }
        }
        eprintln!("{what}: weights within {largest:e}");
    }
}

fn same_logs(a: &[StepLog], b: &[StepLog], what: &str) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert!(
            (a.loss - b.loss).abs() <= 1e-6 * a.loss,
            "{what}: {a:?} {b:?}"
        );
        assert!(
            (a.grad_norm - b.grad_norm).abs() <= 1e-6 * a.grad_norm,
            "{what}: {a:?} {b:?}"
        );
    }
}

#[test]
fn a_run_resumes_with_another_checkpointing() {
    let dir = tempfile::tempdir().unwrap();
    let settings = TrainConfig {
        checkpoint_every: 3,
        ..config(6)
    };
    let mut whole = net();
    let expected = run(&Trainer::new(settings.clone()).unwrap(), &mut whole).unwrap();
    end_at_validation(
        &Trainer::new(settings.clone())
            .unwrap()
            .with_folder(dir.path()),
        &mut net(),
    );
    let settings = TrainConfig {
        checkpointing: Checkpointing::Blocks,
        ..settings
    };
    let mut resumed = net();
    let trainer = Trainer::new(settings)
        .unwrap()
        .with_folder(dir.path())
        .with_resume(true);
    let report = run(&trainer, &mut resumed).unwrap();
    assert_eq!(report.steps_done, 3);
    assert_eq!(report.logs[..3], expected.logs[..3]);
    same_logs(&report.logs, &expected.logs, "resumed");
}
