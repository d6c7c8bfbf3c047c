//! The gradients of one optimizer step, from each micro-batch with each of its subnets.

use super::TrainConfig;
use super::backward::{Share, Teacher, backward};
use super::optimizer::{Grads, Prefixes, accumulate, active_prefixes, widen};
use super::targets;
use crate::adapter::ElasticLora;
use crate::data::Batch;
use crate::error::Result;
use crate::model::Decoder;
use crate::progress::Task;
use crate::supernet::SuperNet;

/// Result of a step's forward and backward passes.
#[derive(Default)]
pub(crate) struct StepGradients {
    pub grads: Grads,
    /// The parts of the parameters that any of the step's subnets used.
    pub used: Prefixes,
    /// Mean negative log-likelihood per target of the first subnet, which is the only one or the
    /// largest.
    pub loss: f64,
    /// The same for the last of several subnets, the smallest.
    pub smallest_loss: Option<f64>,
    /// The same for the subnets between them.
    pub random_losses: Vec<f64>,
}

/// Computes the gradients of a step (from 0) on its micro-batches. The last subnet stays active.
///
/// # Errors
/// Returns the model's errors for tokens outside the vocabulary or context, and
/// [`Error::Interrupted`](crate::Error::Interrupted).
pub(crate) fn gradients(
    net: &mut SuperNet,
    config: &TrainConfig,
    batches: &[Batch],
    step: usize,
    task: &Task<'_>,
) -> Result<StepGradients> {
    let targets: Vec<_> = batches.iter().map(targets).collect();
    let n_targets = targets.iter().map(Vec::len).sum();
    let lists = config.subnets(net.space(), step);
    let mut sum = StepGradients::default();
    for (index, ((batch, positions), subnets)) in
        batches.iter().zip(&targets).zip(&lists).enumerate()
    {
        // All subnets get the same dropout, so that they differ only in shape.
        seed_dropout(
            net.model_mut(),
            config.seed,
            (step * config.accumulation + index) as u64,
        )?;
        let tokens = net.model().batch_tokens(batch)?;
        if positions.is_empty() {
            continue;
        }
        let n_subnets = subnets.len().max(1);
        let mut teacher = None;
        for which in 0..n_subnets {
            task.check()?;
            if let Some(subnet) = subnets.get(which) {
                net.activate(subnet)?;
            }
            let share = Share {
                positions,
                segments: batch.segments.as_ref(),
                n_targets,
                n_subnets,
                teacher: teacher.as_ref(),
                task,
            };
            let found = backward(net.model(), tokens.clone(), &share, config.checkpointing)?;
            if which == 0 {
                sum.loss += found.loss;
                teacher = config.distillation.map(|with| Teacher {
                    hidden: found.hidden,
                    mix: with.weight,
                });
            } else if which + 1 == n_subnets {
                *sum.smallest_loss.get_or_insert(0.0) += found.loss;
            } else {
                sum.random_losses.resize(n_subnets - 2, 0.0);
                sum.random_losses[which - 1] += found.loss;
            }
            accumulate(&mut sum.grads, found.grads);
            widen(&mut sum.used, active_prefixes(net.model()));
        }
    }
    Ok(sum)
}

fn seed_dropout(model: &mut Decoder, seed: u64, draw: u64) -> Result<()> {
    let mut layer = 0;
    model.try_for_each_linear(|_, linear| {
        if let Some(adapter) = &mut linear.adapter {
            adapter.set_dropout_seed(ElasticLora::step_seed(seed, draw, layer));
            layer += 1;
        }
        Ok(())
    })
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use std::path::Path;

    use burn::tensor::Device;

    use super::*;
    use crate::adapter::LoraConfig;
    use crate::data::{Batcher, Sequence, collate};
    use crate::io::{Checkpoint, HfConfig};
    use crate::nn::host_values;
    use crate::progress::Silent;
    use crate::space::SearchSpace;
    use crate::supernet::SuperNetConfig;
    use crate::train::loss::mean_loss;
    use crate::train::{Checkpointing, Trainer};

    /// Examples of various lengths, with prompts that are no targets.
    fn examples() -> Vec<Sequence> {
        let example = |(i, len): (usize, &usize)| Sequence {
            ids: (0..*len)
                .map(|t| ((i * 17 + t * t * 5 + t * 3) % 43) as u32)
                .collect(),
            loss_mask: (0..*len).map(|t| t > i % 3).collect(),
        };
        let lengths = [7, 3, 14, 5, 9, 4, 14, 6, 3, 8, 5];
        lengths.iter().enumerate().map(example).collect()
    }

    /// A supernet on the model of a folder, whose adapters were trained for two steps, so that no
    /// gradient is zero.
    fn net(folder: &Path) -> SuperNet {
        let config = HfConfig::open(folder).unwrap();
        let checkpoint = Checkpoint::open(folder).unwrap();
        let model = Decoder::load(&config, &checkpoint, &Device::flex()).unwrap();
        let space = SearchSpace::fixed(&model.layer_shapes(), 3).unwrap();
        let config = SuperNetConfig::new(LoraConfig::new(3).with_alpha(5.0)).with_seed(3);
        let mut net = SuperNet::new(model, space, config).unwrap();
        let mut data = Batcher::new(examples(), 4, 0, 1).unwrap();
        let trainer = Trainer::new(TrainConfig::new(2).with_lr(0.02)).unwrap();
        trainer.run(&mut net, &mut data, &[], &Silent).unwrap();
        net.replace_model(|model| {
            use burn::module::Module;
            Ok(model.train())
        })
        .unwrap();
        net
    }

    fn found(
        net: &mut SuperNet,
        batches: &[Batch],
        checkpointing: Checkpointing,
    ) -> (f64, Vec<f32>) {
        let config = TrainConfig::new(1)
            .with_accumulation(batches.len())
            .with_checkpointing(checkpointing);
        let task = Task::begin(&Silent, "test", 1, "steps").unwrap();
        let found = gradients(net, &config, batches, 0, &task).unwrap();
        let grads = found.grads.into_values().flat_map(host_values).collect();
        (found.loss, grads)
    }

    fn distance(a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len());
        let all = a.iter().zip(b);
        all.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn packed_examples_have_the_gradients_of_each_alone() {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/families");
        let mut folders: Vec<_> = std::fs::read_dir(root)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.join("config.json").exists())
            .collect();
        folders.sort();
        assert!(folders.len() >= 25);
        let examples = examples();
        let alone: Vec<Batch> = examples.iter().map(|one| collate(&[one], 0)).collect();
        let mut data = Batcher::packed(examples.clone(), 20, 100, 0, 1).unwrap();
        let packed = data.next_batch();
        assert!(packed.rows < 6 && packed.n_tokens() == 78, "{packed:?}");
        // The same rows, taken for one long example each.
        let mixed = Batch {
            segments: None,
            ..packed.clone()
        };
        for folder in folders {
            let name = folder.file_name().unwrap().to_string_lossy().into_owned();
            let mut net = net(&folder);
            let (loss, wanted) = found(&mut net, &alone, Checkpointing::None);
            let size = wanted.iter().fold(0.0_f32, |max, g| max.max(g.abs()));
            for checkpointing in [Checkpointing::None, Checkpointing::Blocks] {
                let packed = std::slice::from_ref(&packed);
                let (of_packed, got) = found(&mut net, packed, checkpointing);
                let off = distance(&got, &wanted);
                assert!(off < 1e-5 * size.max(1.0), "{name}: {off} of {size}");
                assert!(
                    (of_packed - loss).abs() < 1e-5,
                    "{name}: {of_packed} {loss}"
                );
            }
            let (_, got) = found(&mut net, std::slice::from_ref(&mixed), Checkpointing::None);
            let off = distance(&got, &wanted);
            assert!(size > 1e-3 && off > 0.01 * size, "{name}: {off} of {size}");
            let model = net.eval_model();
            let losses = [&alone, std::slice::from_ref(&packed)]
                .map(|batches| mean_loss(&model, batches, &Silent).unwrap());
            assert!((losses[0] - losses[1]).abs() < 1e-5, "{name}: {losses:?}");
        }
    }

    #[test]
    fn segments_of_another_batch_are_refused() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families/qwen3");
        let mut data = Batcher::packed(examples(), 20, 100, 0, 1).unwrap();
        let packed = data.next_batch();
        let other = Batch {
            segments: packed.segments,
            ..collate(&[&examples()[0]], 0)
        };
        let model = net(&folder).eval_model();
        let error = mean_loss(&model, &[other], &Silent).unwrap_err();
        assert!(error.to_string().contains("segments"), "{error}");
    }
}
