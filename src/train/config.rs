//! Settings of a training run.

use serde::{Deserialize, Serialize};

use super::backward::Checkpointing;
use super::schedule::Schedule;
use crate::error::{Error, Result};
use crate::space::Elastic;

/// Maximum number of subnets that a step may draw in addition to the largest and the smallest.
const MAX_RANDOM: usize = 1024;

/// Which subnets are trained, and when new ones are drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sampling {
    /// One subnet, drawn once per optimizer step.
    #[default]
    PerStep,
    /// One subnet, drawn once per micro-batch as in the authors' code. With gradient accumulation,
    /// a step averages over several subnets.
    PerMicroBatch,
    /// Always the active subnet.
    Fixed,
    /// The sandwich rule (Yu and Huang, arXiv 1903.05134; BigNAS, arXiv 2003.11142). Each step
    /// trains the largest subnet, `random` subnets drawn once per step, and the smallest, all on
    /// the same batches and with the same dropout. Gradients are averaged with weight
    /// `1 / (random + 2)` each (the papers add them up), so that learning rate and clipping mean
    /// the same as for one subnet. A step costs as much as `random + 2` steps of the other
    /// samplings.
    ///
    /// In a space or stage with only one subnet, that subnet alone is trained, with full weight.
    Sandwich {
        /// Number of random subnets, in addition to the largest and the smallest. May be 0.
        random: usize,
    },
}

/// In-place distillation (arXiv 1903.05134, 2003.11142). Under the sandwich rule, the largest
/// subnet learns from the data, and every other subnet learns from the largest subnet's predictions
/// in the same step, at the same positions and with the same dropout. No gradient flows to those
/// predictions. The temperature is 1.
///
/// At a [`weight`](Self::weight) of 1, only the largest subnet's share of a step pulls the shared
/// weights towards the data; all other subnets hold them at its current predictions. This suits a
/// base model that already knows the task, and is slow if there is much to learn.
///
/// The weight of the head is treated as a constant. Training the head as well is
/// [`Unsupported`](crate::Error::Unsupported).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Distillation {
    /// Weight of the loss against the largest subnet's predictions, in 0..=1. The loss against the
    /// data has the remaining weight.
    pub weight: f64,
}

impl Default for Distillation {
    /// Equal weights, 0.5. BigNAS uses the largest subnet's predictions alone. If training starts
    /// from a model that is new to the task, this would leave most of a step's loss to a teacher
    /// that has not learned the task yet.
    fn default() -> Self {
        Self { weight: 0.5 }
    }
}

/// A part of a run in which only some kinds of groups vary (progressive shrinking, arXiv
/// 1908.09791). All other groups stay at their largest choice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// Number of optimizer steps.
    pub steps: usize,
    /// The kinds of groups that vary. If empty, only the largest subnet is trained.
    pub kinds: Vec<Elastic>,
}

impl Stage {
    /// Creates a stage of `steps` steps in which groups of these kinds vary.
    pub fn new(steps: usize, kinds: impl Into<Vec<Elastic>>) -> Self {
        Self {
            steps,
            kinds: kinds.into(),
        }
    }
}

/// Settings of a training run. Defaults follow the papers: AdamW, peak learning rate 3e-4, cosine
/// schedule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainConfig {
    /// Number of optimizer steps.
    pub steps: usize,
    /// Number of micro-batches per step.
    pub accumulation: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Number of warm-up steps, in which the learning rate rises.
    pub warmup: usize,
    /// How the learning rate falls after warm-up.
    pub schedule: Schedule,
    /// AdamW's decoupled weight decay.
    pub weight_decay: f64,
    /// AdamW's betas, the decay rates of both moments.
    pub betas: (f64, f64),
    /// AdamW's epsilon.
    pub eps: f64,
    /// Maximum joint norm of the gradients; `None` disables clipping.
    pub clip_norm: Option<f64>,
    /// Which subnets are trained.
    pub sampling: Sampling,
    /// Distillation between the subnets of the sandwich rule; `None` lets all of them learn from
    /// the data.
    #[serde(default)]
    pub distillation: Option<Distillation>,
    /// Stages in which only some kinds of groups vary. Their steps must add up to
    /// [`steps`](Self::steps). Without stages, all groups vary from the first step on, as in the
    /// authors' code. The learning rate schedule covers the whole run.
    #[serde(default)]
    pub stages: Vec<Stage>,
    /// Seed of subnets and dropout. The order of the data has its own seed in the
    /// [`Batcher`](crate::data::Batcher).
    pub seed: u64,
    /// Number of steps between validations. The last step always validates; 0 validates only then.
    pub eval_every: usize,
    /// Number of steps between checkpoints, if the run has a folder. The last step is always saved
    /// too. With 0, a checkpoint is only written on interruption.
    pub checkpoint_every: usize,
    /// Activations that a step keeps for its backward pass, a trade of memory for time. A run may
    /// be resumed with another choice, but its results are then no longer bit-identical.
    #[serde(default)]
    pub checkpointing: Checkpointing,
}

impl TrainConfig {
    /// Creates the papers' settings for `steps` steps.
    pub fn new(steps: usize) -> Self {
        Self {
            steps,
            accumulation: 1,
            lr: 3e-4,
            warmup: 0,
            schedule: Schedule::Cosine,
            weight_decay: 0.0,
            betas: (0.9, 0.999),
            eps: 1e-8,
            clip_norm: Some(1.0),
            sampling: Sampling::PerStep,
            distillation: None,
            stages: Vec::new(),
            seed: 0,
            eval_every: 0,
            checkpoint_every: 0,
            checkpointing: Checkpointing::None,
        }
    }

    setters! {
        with_accumulation(accumulation: usize);
        with_lr(lr: f64);
        with_warmup(warmup: usize);
        with_schedule(schedule: Schedule);
        with_weight_decay(weight_decay: f64);
        with_betas(betas: (f64, f64));
        with_eps(eps: f64);
        with_clip_norm(clip_norm: Option<f64>);
        with_sampling(sampling: Sampling);
        with_distillation(distillation: Option<Distillation>);
        with_stages(stages: Vec<Stage>);
        with_seed(seed: u64);
        with_eval_every(eval_every: usize);
        with_checkpoint_every(checkpoint_every: usize);
        with_checkpointing(checkpointing: Checkpointing);
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] with the name of the setting that is out of range.
    pub fn validate(&self) -> Result<()> {
        let positive = |name: &'static str, value: f64| {
            if value.is_finite() && value > 0.0 {
                Ok(())
            } else {
                Err(Error::argument(name, value, "a finite number over 0"))
            }
        };
        if self.steps == 0 {
            return Err(Error::argument("steps", 0, "at least 1"));
        }
        if self.accumulation == 0 {
            return Err(Error::argument("accumulation", 0, "at least 1"));
        }
        positive("lr", self.lr)?;
        positive("eps", self.eps)?;
        if let Some(norm) = self.clip_norm {
            positive("clip_norm", norm)?;
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            return Err(Error::argument(
                "weight_decay",
                self.weight_decay,
                "a finite number, at least 0",
            ));
        }
        for beta in [self.betas.0, self.betas.1] {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::argument("betas", beta, "at least 0 and under 1"));
            }
        }
        self.validate_sampling()
    }

    fn validate_sampling(&self) -> Result<()> {
        let sandwich = match self.sampling {
            Sampling::Sandwich { random } if random > MAX_RANDOM => {
                return Err(Error::argument(
                    "random",
                    random,
                    format!("at most {MAX_RANDOM} subnets a step"),
                ));
            }
            Sampling::Sandwich { .. } => true,
            _ => false,
        };
        if let Some(Distillation { weight }) = self.distillation {
            if !(0.0..=1.0).contains(&weight) {
                return Err(Error::argument("distillation.weight", weight, "in 0..=1"));
            }
            if !sandwich {
                let found = format!("with sampling {:?}", self.sampling);
                return Err(Error::argument(
                    "distillation",
                    found,
                    "the sandwich rule, whose largest subnet teaches",
                ));
            }
        }
        if self.stages.is_empty() {
            return Ok(());
        }
        if self.sampling == Sampling::Fixed {
            return Err(Error::argument(
                "stages",
                "with sampling Fixed",
                "a sampling that varies the subnet",
            ));
        }
        if let Some(index) = self.stages.iter().position(|stage| stage.steps == 0) {
            return Err(Error::argument(
                "stages",
                format!("0 steps in stage {index}"),
                "at least 1 step each",
            ));
        }
        let total = self
            .stages
            .iter()
            .fold(0_usize, |sum, stage| sum.saturating_add(stage.steps));
        if total != self.steps {
            return Err(Error::argument(
                "stages",
                format!("{total} steps"),
                format!("the run's {} steps", self.steps),
            ));
        }
        Ok(())
    }
}
