//! Neural low-rank adapter search (Shears, arXiv 2404.10934): trains all subnets of a supernet at
//! once, with a random subnet per step or by the sandwich rule, optionally with in-place
//! distillation and in stages ([`Sampling`], [`Distillation`], [`Stage`]).
//!
//! Departures from the authors' code: the trainer draws a subnet once per optimizer step (theirs:
//! once per micro-batch, inside the layers); warm-up is applied if set (theirs ignores the
//! setting); the loss is the mean over the step's targets, regardless of micro-batch; ranks that no
//! subnet of a step used are not moved by momentum or weight decay (theirs are). Plain LoRA is the
//! same run on a space with one choice per group. Training all weights is the same run on
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
use std::io::Write;
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

/// Report of a training run.
#[derive(Clone, Debug)]
pub struct TrainReport {
    /// Log entries of all steps, including those before a resumption.
    pub logs: Vec<StepLog>,
    /// Number of steps taken by this call.
    pub steps_done: usize,
    /// Duration of those steps in seconds, without validation.
    pub seconds: f64,
    /// Tokens per second in those steps, without padding.
    pub tokens_per_second: f64,
}

impl TrainReport {
    /// The last validation loss, in nats per target.
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
    /// Creates a trainer without a folder.
    ///
    /// # Errors
    /// Returns the errors of [`TrainConfig::validate`].
    pub fn new(config: TrainConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            config,
            folder: None,
            resume: false,
            label: "train".into(),
        })
    }

    /// Sets a folder, where the run keeps `losses.csv` and its checkpoint.
    pub fn with_folder(mut self, folder: impl AsRef<Path>) -> Self {
        self.folder = Some(folder.as_ref().to_path_buf());
        self
    }

    /// Sets whether the run continues from the folder's checkpoint, if there is one.
    pub fn with_resume(mut self, resume: bool) -> Self {
        self.resume = resume;
        self
    }

    /// Sets the name under which the run reports progress; the default is `train`.
    pub fn with_label(mut self, label: impl Into<String>) -> Self {
        self.label = label.into();
        self
    }

    /// Runs the training. The same seed, data and machine give bit-identical weights, whether or
    /// not the run was interrupted. A checkpoint is rejected if settings, space or data have
    /// changed. The caller must ensure that the base weights are the same; only their number and
    /// the number of their zeros are checked.
    ///
    /// Trains the adapters, or all weights of [`SuperNet::dense`](crate::SuperNet::dense). On
    /// return, the weights no longer track gradients, and the previously active subnet is active
    /// again. Validation uses that subnet too.
    ///
    /// # Errors
    /// Returns
    /// - [`Error::Diverged`] if a loss or gradient is not finite,
    /// - [`Error::Interrupted`] after an interruption, having written a checkpoint if there is a
    ///   folder,
    /// - [`Error::CheckpointMismatch`] and the errors of reading a checkpoint,
    /// - [`Error::Io`] if another run is using the folder,
    /// - the model's errors for tokens outside the vocabulary or context,
    /// - [`Error::InvalidArgument`] if there is nothing to train or a stage names a kind that no
    ///   group has,
    /// - [`Error::Unsupported`] if weights to train are stored in 16 bits, or if the head is
    ///   trained under distillation.
    ///
    /// The supernet keeps the weights of the last good step.
    pub fn run(
        &self,
        net: &mut SuperNet,
        train: &mut Batcher,
        valid: &[Batch],
        progress: &dyn Progress,
    ) -> Result<TrainReport> {
        let _lock = match &self.folder {
            Some(folder) => {
                // Fails now rather than after hours of training.
                std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
                Some(atomic::Lock::acquire(folder.join("run.lock"), folder)?)
            }
            None => None,
        };
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
        self.write_losses(&logs)?;
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
                    checkpoint::save(folder, state, net.model(), optimizer)?;
                    self.write_losses(logs)
                }
                None => Ok(()),
            };
        let validates = |step: usize| {
            let due = step == config.steps
                || (config.eval_every > 0 && step.is_multiple_of(config.eval_every));
            due && !valid.is_empty()
        };
        // A run that was interrupted during validation repeats the validation.
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
                    // Rewinds to the state before the step.
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
            // The old weights are kept only if this step validates: shared weights are copied by
            // the update.
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
            if let Some(log) = logs.last() {
                self.append_losses(log)?;
            }
            if let Some(error) = interrupted {
                save(net, optimizer, train, logs)?;
                return Err(error);
            }
            tokens += n_tokens;
            // Smoothed over about 20 steps, because the losses of single batches vary a lot.
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

    /// The properties that must match for a checkpoint to be accepted.
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
        let mut text = String::from("step,loss,valid_loss,lr,grad_norm,tokens,smallest_loss\n");
        text.extend(logs.iter().map(csv_line));
        atomic::write_file(folder.join(LOSSES), |sink| sink.put(text.as_bytes()))
    }

    /// Adds the line of one step, so that the file can be watched while the run goes on.
    fn append_losses(&self, log: &StepLog) -> Result<()> {
        let Some(folder) = &self.folder else {
            return Ok(());
        };
        let path = folder.join(LOSSES);
        let file = std::fs::OpenOptions::new().append(true).open(&path);
        file.and_then(|mut file| file.write_all(csv_line(log).as_bytes()))
            .map_err(|e| Error::io(&path, e))
    }
}

/// Name of the file with the losses of all steps.
const LOSSES: &str = "losses.csv";

fn csv_line(log: &StepLog) -> String {
    let cell = |value: Option<f64>| value.map_or(String::new(), |v| v.to_string());
    format!(
        "{},{},{},{},{},{},{}\n",
        log.step,
        log.loss,
        cell(log.valid_loss),
        log.lr,
        log.grad_norm,
        log.n_tokens,
        cell(log.smallest_loss)
    )
}
