//! Neural low-rank adapter search (Shears, arXiv 2404.10934): train all subnets of a supernet at once, by a random one
//! at each step; or by the sandwich rule, with distillation in place, and in stages ([`Sampling`], [`Distillation`],
//! [`Stage`]).
//!
//! Departures from the authors' code: a subnet is drawn once per optimizer step, by the trainer (theirs: once per micro-batch,
//! inside layers); warm-up happens where it is asked for (theirs is ignored); the loss is the mean over the step's targets,
//! whatever micro-batch they are in; ranks that a step's subnets left out are not moved by momentum or decay (theirs are).
//! Plain LoRA is the same run on a space with one choice per group; training every weight is the same run on
//! [`SuperNet::dense`](crate::SuperNet::dense).

mod backward;
mod checkpoint;
mod config;
mod log;
pub(crate) mod loss;
mod observe;
mod optimizer;
mod schedule;
mod step;
mod subnets;

pub use backward::Checkpointing;
pub use config::{Distillation, Sampling, Stage, TrainConfig};
pub use log::StepLog;
pub use loss::targets;
pub use schedule::Schedule;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::module::Module;
use burn::tensor::DType;

use crate::data::{Batch, Batcher};
use crate::error::{Error, Result};
use crate::io::atomic;
use crate::progress::{Progress, Task};
use crate::supernet::SuperNet;
use loss::mean_loss;
use optimizer::{NamedAdamW, clip_factor, trainable};
#[doc(hidden)]
pub use optimizer::{Parameter, for_each_param};
use step::{StepGradients, gradients};

/// What a run did.
#[derive(Clone, Debug)]
pub struct TrainReport {
    /// Every step, those before a resumption too.
    pub logs: Vec<StepLog>,
    /// Steps that this process did.
    pub steps_done: usize,
    /// Seconds that they took, validation left out.
    pub seconds: f64,
    /// Tokens a second in them, padding left out.
    pub tokens_per_second: f64,
}

impl TrainReport {
    /// The last validation loss, in nats a target.
    pub fn valid_loss(&self) -> Option<f64> {
        self.logs.iter().rev().find_map(|log| log.valid_loss)
    }
}

/// Trains a supernet.
#[derive(Clone, Debug)]
pub struct Trainer {
    config: TrainConfig,
    folder: Option<PathBuf>,
    resume: bool,
    label: String,
}

impl Trainer {
    /// A trainer without a folder.
    ///
    /// # Errors
    /// As [`TrainConfig::validate`].
    pub fn new(config: TrainConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            config,
            folder: None,
            resume: false,
            label: "train".into(),
        })
    }

    /// Keeps `losses.csv` and the checkpoint in a folder.
    pub fn with_folder(mut self, folder: impl AsRef<Path>) -> Self {
        self.folder = Some(folder.as_ref().to_path_buf());
        self
    }

    /// Goes on from the folder's checkpoint where there is one.
    pub fn with_resume(mut self, resume: bool) -> Self {
        self.resume = resume;
        self
    }

    /// Names the run in its progress; `train` if not set.
    pub fn with_label(mut self, label: impl Into<String>) -> Self {
        self.label = label.into();
        self
    }

    /// Runs. The same seed, data and machine give the same weights, bit for bit, whether or not the run was interrupted. A
    /// checkpoint is refused where settings, space or data are others; that the base weights are the same is the caller's
    /// promise, of which only their number and that of their zeros is checked.
    ///
    /// Trained are the adapters, or all weights of [`SuperNet::dense`](crate::SuperNet::dense). On return the weights are off
    /// the tape and the subnet that was active before is active again. Validation uses that subnet too.
    ///
    /// # Errors
    /// [`Error::Diverged`] for a loss or gradient that is no finite number; [`Error::Interrupted`], after a checkpoint where the run has
    /// a folder;
    /// [`Error::CheckpointMismatch`], and those of reading a checkpoint; those of the model for tokens outside the vocabulary
    /// or context; [`Error::InvalidArgument`] where there is nothing to train or a stage names a kind that no group has;
    /// [`Error::Unsupported`] where weights to be trained are stored in 16 bits, or distillation meets a head that is trained.
    /// The supernet keeps the weights of the last good step.
    pub fn run(
        &self,
        net: &mut SuperNet,
        train: &mut Batcher,
        valid: &[Batch],
        progress: &dyn Progress,
    ) -> Result<TrainReport> {
        if let Some(folder) = &self.folder {
            // Now rather than after hours of training.
            std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        }
        let home = net.active().clone();
        let config = &self.config;
        let plain = net.model().device().without_autodiff();
        let mut optimizer = NamedAdamW::new(config.betas, config.eps, config.weight_decay, &plain);
        let about = self.about(net, train);
        net.replace_model(|model| Ok(model.train()))?;
        let mut logs = Vec::new();
        let restored = match &self.folder {
            Some(folder) if self.resume => net.replace_model(|model| {
                let (model, state) =
                    checkpoint::load(folder, config, &about, model, &mut optimizer, &plain)?;
                if let Some(state) = state {
                    train.seek(state.position)?;
                    logs = state.logs;
                }
                Ok(model)
            }),
            _ => Ok(()),
        };
        let first = logs.len();
        let outcome = restored.and_then(|()| {
            self.steps(
                net,
                train,
                valid,
                &mut optimizer,
                &mut logs,
                &about,
                progress,
            )
        });
        net.activate(&home)?;
        net.replace_model(|model| Ok(model.valid()))?;
        let seconds = outcome?;
        self.write_losses(&logs)?;
        let n_tokens: usize = logs[first..].iter().map(|log| log.n_tokens).sum();
        Ok(TrainReport {
            steps_done: logs.len() - first,
            seconds,
            tokens_per_second: if seconds > 0.0 {
                n_tokens as f64 / seconds
            } else {
                0.0
            },
            logs,
        })
    }

    #[allow(clippy::too_many_arguments)]
    fn steps(
        &self,
        net: &mut SuperNet,
        train: &mut Batcher,
        valid: &[Batch],
        optimizer: &mut NamedAdamW,
        logs: &mut Vec<StepLog>,
        about: &BTreeMap<String, String>,
        progress: &dyn Progress,
    ) -> Result<f64> {
        let config = &self.config;
        let trained = trainable(net.model());
        if trained.is_empty() {
            return Err(Error::argument(
                "net",
                "no adapter",
                "at least one weight to train",
            ));
        }
        if let Some((path, weight)) = trained
            .iter()
            .find(|(_, weight)| weight.dtype() != DType::F32)
        {
            return Err(Error::Unsupported {
                what: format!("training `{path}` as {:?}", weight.dtype()),
            });
        }
        drop(trained);
        if config.distillation.is_some() && net.model().head_weight().is_tracked() {
            return Err(Error::Unsupported {
                what: "distillation of a model whose head is trained".into(),
            });
        }
        let has = |kind| {
            net.space()
                .groups()
                .iter()
                .any(|group| group.kind() == kind)
        };
        if let Some(kind) = config
            .stages
            .iter()
            .flat_map(|stage| &stage.kinds)
            .find(|kind| !has(**kind))
        {
            return Err(Error::argument(
                "stages",
                format!("{kind:?}"),
                "kinds of groups that the search space has",
            ));
        }
        let home = net.active().clone();
        let save =
            |net: &SuperNet, optimizer: &NamedAdamW, train: &Batcher, logs: &[StepLog]| match &self
                .folder
            {
                Some(folder) => {
                    let state = checkpoint::State::new(
                        config,
                        about.clone(),
                        train.position(),
                        logs.to_vec(),
                        optimizer,
                    );
                    checkpoint::save(folder, &state, net.model(), optimizer)?;
                    self.write_losses(logs)
                }
                None => Ok(()),
            };
        let validates = |step: usize| {
            let due = step == config.steps
                || (config.eval_every > 0 && step.is_multiple_of(config.eval_every));
            due && !valid.is_empty()
        };
        // A run that was interrupted in a validation goes on with it.
        if let Some(last) = logs.last_mut()
            && last.valid_loss.is_none()
            && validates(last.step)
        {
            let loss = mean_loss(&net.eval_model(), valid, progress)?;
            if !loss.is_finite() {
                let (step, grad_norm) = (last.step, last.grad_norm);
                return Err(Error::Diverged {
                    step,
                    loss,
                    grad_norm,
                });
            }
            last.valid_loss = Some(loss);
        }
        let mut task = Task::resume(progress, &self.label, logs.len(), config.steps, "steps")?;
        let (mut seconds, mut tokens, mut shown_loss) = (0.0, 0, None);
        while logs.len() < config.steps {
            let started = Instant::now();
            let (step, position) = (logs.len(), train.position());
            let batches: Vec<Batch> = (0..config.accumulation)
                .map(|_| train.next_batch())
                .collect();
            let found = match gradients(net, config, &batches, step, &task) {
                Err(error @ Error::Interrupted { .. }) => {
                    // As if the step had not begun.
                    train.seek(position)?;
                    save(net, optimizer, train, logs)?;
                    return Err(error);
                }
                found => found?,
            };
            let StepGradients {
                mut grads,
                used,
                loss,
                smallest_loss,
                random_losses,
            } = found;
            let grad_norm = optimizer.norm(&mut grads);
            let diverged = |loss: f64| Error::Diverged {
                step: step + 1,
                loss,
                grad_norm,
            };
            let loudest = smallest_loss
                .filter(|smallest| !smallest.is_finite())
                .unwrap_or(loss);
            if !(loudest.is_finite() && grad_norm.is_finite()) {
                return Err(diverged(loudest));
            }
            let last = step + 1 == config.steps;
            let due = validates(step + 1);
            // Held only where validation may call for it: weights that are held twice are copied.
            let before = due.then(|| net.model().clone());
            let clip = config
                .clip_norm
                .map_or(1.0, |max_norm| clip_factor(grad_norm, max_norm));
            let lr = config.lr * config.schedule.factor(step, config.warmup, config.steps);
            net.update_model(|model| optimizer.step(model, grads, &used, clip, lr));
            seconds += started.elapsed().as_secs_f64();

            let validation = match before {
                Some(before) => {
                    net.activate(&home)?;
                    let loss = mean_loss(&net.eval_model(), valid, progress);
                    if let Ok(loss) = loss
                        && !loss.is_finite()
                    {
                        net.replace_model(|_| Ok(before))?;
                        return Err(diverged(loss));
                    }
                    loss.map(Some)
                }
                None => Ok(None),
            };
            let (valid_loss, interrupted) = match validation {
                Err(error @ Error::Interrupted { .. }) => (None, Some(error)),
                validation => (validation?, None),
            };
            let n_tokens = batches.iter().map(Batch::n_tokens).sum();
            logs.push(StepLog {
                step: step + 1,
                loss,
                smallest_loss,
                random_losses,
                valid_loss,
                lr,
                grad_norm,
                n_tokens,
            });
            if let Some(error) = interrupted {
                save(net, optimizer, train, logs)?;
                return Err(error);
            }
            tokens += n_tokens;
            // Smoothed over about 20 steps: single batches jump.
            let smooth = shown_loss.map_or(loss, |before: f64| before + (loss - before) / 20.0);
            shown_loss = Some(smooth);
            let rate = tokens as f64 / seconds.max(1e-9);
            task.advance(1, &format!("loss {smooth:.4}, {rate:.0} tokens/s"));
            if config.checkpoint_every > 0
                && (last || (step + 1).is_multiple_of(config.checkpoint_every))
            {
                save(net, optimizer, train, logs)?;
            }
        }
        Ok(seconds)
    }

    /// What must be the same for a checkpoint to fit.
    fn about(&self, net: &SuperNet, train: &Batcher) -> BTreeMap<String, String> {
        let base = net.base_params();
        let text =
            |value: std::result::Result<String, serde_json::Error>| value.unwrap_or_default();
        BTreeMap::from([
            (
                "search space".into(),
                text(serde_json::to_string(net.space())),
            ),
            ("adapters".into(), text(serde_json::to_string(net.config()))),
            (
                "batches per epoch".into(),
                train.plan().batches_per_epoch().to_string(),
            ),
            (
                "fingerprint of the training data".into(),
                format!("{:016x}", checkpoint::fingerprint(train)),
            ),
            ("number of base weights".into(), base.total.to_string()),
            (
                "number of base weights that are not zero".into(),
                base.nonzero.to_string(),
            ),
        ])
    }

    fn write_losses(&self, logs: &[StepLog]) -> Result<()> {
        let Some(folder) = &self.folder else {
            return Ok(());
        };
        let cell = |value: Option<f64>| value.map_or(String::new(), |v| v.to_string());
        let mut text = String::from("step,loss,valid_loss,lr,grad_norm,tokens,smallest_loss\n");
        for log in logs {
            text.push_str(&format!(
                "{},{},{},{},{},{},{}\n",
                log.step,
                log.loss,
                cell(log.valid_loss),
                log.lr,
                log.grad_norm,
                log.n_tokens,
                cell(log.smallest_loss)
            ));
        }
        atomic::write_file(folder.join("losses.csv"), |sink| sink.put(text.as_bytes()))
    }
}
