//! Settings of a low-rank adapter.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How the update's scale `s` follows from alpha and the ranks.
///
/// A file that is read elsewhere is scaled by its reader's rule, so exports state the rank and alpha that give the same `s`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScaleRule {
    /// `alpha / r_max` at every active rank, as in LoNAS, Shears and SQFT: the larger subnet's update is the smaller one's
    /// plus more columns.
    #[default]
    AlphaOverMaxRank,
    /// `alpha / r` of the active rank (LoRA, arXiv 2106.09685, applied to each subnet).
    AlphaOverRank,
    /// `alpha / sqrt(r)` of the active rank (rsLoRA, arXiv 2312.03732).
    AlphaOverSqrtRank,
}

/// The largest rank there may be; over the width of any model, so that no typing error asks for all the memory.
pub const MAX_RANK: usize = 1 << 16;

/// Shape-independent settings of an elastic adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// The largest rank; smaller ones are its prefixes.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Probability with which an element of the adapter's input is dropped in training, in 0..1.
    pub dropout: f64,
    /// How the scale follows from alpha and rank.
    pub scale_rule: ScaleRule,
    /// Whether a masked update's gradients may be made of products of bf16 numbers with `f32` sums, where the processor has them
    /// (AVX-512 BF16): twice as fast, and off by some 0.3 % of the gradient's norm. With base weights in bf16 they always are.
    #[serde(default)]
    pub bf16_gradient: bool,
}

impl LoraConfig {
    /// `alpha = 2 * rank`, no dropout, the papers' scale rule.
    pub fn new(rank: usize) -> Self {
        Self {
            rank,
            alpha: 2.0 * rank as f64,
            dropout: 0.0,
            scale_rule: ScaleRule::default(),
            bf16_gradient: false,
        }
    }

    /// Sets alpha.
    pub fn with_alpha(mut self, alpha: f64) -> Self {
        self.alpha = alpha;
        self
    }

    /// Sets the dropout probability.
    pub fn with_dropout(mut self, dropout: f64) -> Self {
        self.dropout = dropout;
        self
    }

    /// Sets the scale rule.
    pub fn with_scale_rule(mut self, scale_rule: ScaleRule) -> Self {
        self.scale_rule = scale_rule;
        self
    }

    /// Sets whether a masked update's gradients may be made of products of bf16 numbers.
    pub fn with_bf16_gradient(mut self, bf16_gradient: bool) -> Self {
        self.bf16_gradient = bf16_gradient;
        self
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a rank of 0 or over [`MAX_RANK`], an alpha that is not finite and over 0, or a dropout outside 0..1.
    pub fn validate(&self) -> Result<()> {
        if !(1..=MAX_RANK).contains(&self.rank) {
            return Err(Error::argument(
                "rank",
                self.rank,
                format!("in 1..={MAX_RANK}"),
            ));
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            return Err(Error::argument(
                "alpha",
                self.alpha,
                "a finite number over 0",
            ));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::argument(
                "dropout",
                self.dropout,
                "at least 0 and under 1",
            ));
        }
        Ok(())
    }

    /// The scale `s` at an active rank.
    pub fn scale(&self, active_rank: usize) -> f64 {
        match self.scale_rule {
            ScaleRule::AlphaOverMaxRank => self.alpha / self.rank as f64,
            ScaleRule::AlphaOverRank => self.alpha / active_rank as f64,
            ScaleRule::AlphaOverSqrtRank => self.alpha / (active_rank as f64).sqrt(),
        }
    }
}
