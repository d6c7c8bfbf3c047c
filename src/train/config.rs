//! Settings of a run.

use serde::{Deserialize, Serialize};

use super::backward::Checkpointing;
use super::schedule::Schedule;
use crate::error::{Error, Result};
use crate::space::Elastic;

/// Most subnets that a step may draw beside the largest and the smallest.
const MAX_RANDOM: usize = 1024;

/// Which subnets are trained, and when new ones are drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sampling {
    /// One, drawn once per optimizer step.
    #[default]
    PerStep,
    /// One, drawn once per micro-batch, as the authors do: with accumulation, a step averages several subnets.
    PerMicroBatch,
    /// The active subnet, always.
    Fixed,
    /// The sandwich rule (Yu and Huang, arXiv 1903.05134; BigNAS, arXiv 2003.11142): each step trains the largest subnet,
    /// some that are drawn once per step, and the smallest, all on the same batches and with the same dropout. The gradient is the
    /// mean of theirs (each counts `1 / (random + 2)`; the papers add them up), so that rate and clipping mean what they mean
    /// for one subnet. A step costs as much as `random + 2` of the others.
    ///
    /// Where nothing varies, in a space or stage of one subnet, that one is trained alone and counts in full.
    Sandwich {
        /// Subnets drawn, beside the largest and the smallest. May be 0.
        random: usize,
    },
}

/// Distillation in place (arXiv 1903.05134, 2003.11142): under the sandwich rule the largest subnet learns from the data, and
/// every other one from the largest's predictions in the same step, at the same positions and with the same dropout, to which no
/// gradient flows back. Temperature 1.
///
/// At a [`weight`](Self::weight) of 1 only the largest's share of a step pulls the shared weights towards the data, and all
/// others hold them to what it predicts so far: fit for a base that has the task in it, slow where there is much to learn.
///
/// The head's weight is a constant for it: training the head as well is [`Unsupported`](crate::Error::Unsupported).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Distillation {
    /// Share of the loss against the largest's predictions; the rest is that against the data. In 0..=1.
    pub weight: f64,
}

impl Default for Distillation {
    /// Half and half. The largest's predictions alone, as in BigNAS, leave most of a step's loss to a teacher that has not learned
    /// the task yet where training starts from a model that is new to it.
    fn default() -> Self {
        Self { weight: 0.5 }
    }
}

/// A part of a run in which only some kinds of groups vary (progressive shrinking, arXiv 1908.09791); all others stay at their
/// largest choice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// Optimizer steps.
    pub steps: usize,
    /// The kinds that vary; with none, the largest subnet alone is trained.
    pub kinds: Vec<Elastic>,
}

impl Stage {
    /// A stage of `steps` steps in which these kinds vary.
    pub fn new(steps: usize, kinds: impl Into<Vec<Elastic>>) -> Self {
        Self {
            steps,
            kinds: kinds.into(),
        }
    }
}

/// Settings of a run. Defaults are the papers': AdamW, peak rate 3e-4, cosine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainConfig {
    /// Optimizer steps.
    pub steps: usize,
    /// Micro-batches per step.
    pub accumulation: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Steps over which the rate rises.
    pub warmup: usize,
    /// How it goes down.
    pub schedule: Schedule,
    /// AdamW's decoupled weight decay.
    pub weight_decay: f64,
    /// AdamW's decay rates.
    pub betas: (f64, f64),
    /// AdamW's epsilon.
    pub eps: f64,
    /// Largest joint norm of the gradients; none leaves them.
    pub clip_norm: Option<f64>,
    /// Which subnets are trained.
    pub sampling: Sampling,
    /// What the subnets of the sandwich rule learn from each other; none has all learn from the data.
    #[serde(default)]
    pub distillation: Option<Distillation>,
    /// Parts of the run in which only some kinds of groups vary; their steps add up to [`steps`](Self::steps). With none, all
    /// vary from the first step on, as the authors have it. The rate's schedule goes over the run as a whole.
    #[serde(default)]
    pub stages: Vec<Stage>,
    /// Seed of subnets and dropout. The data's order has its own, in the [`Batcher`](crate::data::Batcher).
    pub seed: u64,
    /// Steps between validations; the last step always validates. 0: only the last.
    pub eval_every: usize,
    /// Steps between checkpoints, where the run has a folder; the last step is always kept. 0: none but on interruption.
    pub checkpoint_every: usize,
    /// What a step keeps of its forward pass: memory against time. A run may be resumed with another choice; its bits are
    /// then its own.
    #[serde(default)]
    pub checkpointing: Checkpointing,
}

impl TrainConfig {
    /// The papers' settings for `steps` steps.
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
    /// [`Error::InvalidArgument`] that names the one out of range.
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
