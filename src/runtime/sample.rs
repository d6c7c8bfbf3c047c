//! Samples the next token from logits.

use std::collections::HashMap;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Sampling settings. The default is greedy decoding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleConfig {
    /// Temperature by which the logits are divided; 0 selects the most likely token.
    pub temperature: f64,
    /// Sample only from the `top_k` most likely tokens; 0 for no limit.
    pub top_k: usize,
    /// Sample only from the most likely tokens that together reach this probability, in 0..=1; 1
    /// for no limit.
    pub top_p: f64,
    /// Sample only from tokens whose probability is at least this fraction of the most likely
    /// token's, in 0..1; 0 for no limit (arXiv 2407.01082).
    #[serde(default)]
    pub min_p: f64,
    /// Seed of the random draws.
    pub seed: u64,
    /// Factor by which the logit of a token that occurred, in the prompt or after it, is divided if
    /// it is positive and multiplied if it is negative; over 0, 1 for none (CTRL, arXiv 1909.05858).
    #[serde(default = "one")]
    pub repetition_penalty: f64,
    /// Number that is subtracted from the logit of a token for each time that it was generated; 0
    /// for none.
    #[serde(default)]
    pub frequency_penalty: f64,
    /// Number that is subtracted from the logit of a token that was generated; 0 for none.
    #[serde(default)]
    pub presence_penalty: f64,
    /// Numbers that are added to the logits of tokens. Minus infinity forbids a token.
    #[serde(default)]
    pub logit_bias: Vec<(u32, f32)>,
}

fn one() -> f64 {
    1.0
}

impl Default for SampleConfig {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
        }
    }
}

impl SampleConfig {
    /// Checks the settings.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`], naming the setting that is out of range.
    pub fn validate(&self) -> Result<()> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(Error::argument(
                "temperature",
                self.temperature,
                "a finite number, at least 0",
            ));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::argument("top_p", self.top_p, "over 0 and at most 1"));
        }
        if !(0.0..1.0).contains(&self.min_p) {
            return Err(Error::argument(
                "min_p",
                self.min_p,
                "at least 0 and under 1",
            ));
        }
        let penalty = self.repetition_penalty;
        if !(penalty.is_finite() && penalty > 0.0) {
            let expected = "a finite number over 0";
            return Err(Error::argument("repetition_penalty", penalty, expected));
        }
        for (name, penalty) in [
            ("frequency_penalty", self.frequency_penalty),
            ("presence_penalty", self.presence_penalty),
        ] {
            if !penalty.is_finite() {
                return Err(Error::argument(name, penalty, "a finite number"));
            }
        }
        let wrong = |(_, bias): &&(u32, f32)| bias.is_nan() || *bias == f32::INFINITY;
        if let Some((id, bias)) = self.logit_bias.iter().find(wrong) {
            return Err(Error::argument(
                "logit_bias",
                format!("{bias} for token {id}"),
                "a finite number or minus infinity",
            ));
        }
        Ok(())
    }

    fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.frequency_penalty != 0.0
            || self.presence_penalty != 0.0
    }
}

/// Number of the most likely tokens that are sorted at first.
const SORTED: usize = 256;

/// The tokens that may be drawn, one bit for each: bit `i % 32` of word `i / 32` for token `i`, the
/// lowest bit first. Grammar engines make such masks. Tokens behind the last word may not be drawn.
#[derive(Clone, Copy, Debug)]
pub struct TokenMask<'a>(pub &'a [u32]);

impl TokenMask<'_> {
    /// Returns whether a token may be drawn.
    pub fn allows(&self, id: u32) -> bool {
        let word = self.0.get(id as usize / 32);
        word.is_some_and(|word| word >> (id % 32) & 1 == 1)
    }
}

/// Samples tokens for one sequence.
///
/// A loop of one's own calls [`sample`](Self::sample) with the logits, and then
/// [`accept`](Self::accept) with the token, which the penalties count.
#[derive(Clone, Debug)]
pub struct Sampler {
    config: SampleConfig,
    stream: u64,
    rng: ChaCha8Rng,
    /// How often each token was generated. Tokens of the prompt are there too.
    counts: HashMap<u32, u32>,
    /// Buffers reused between draws, so that sampling does not allocate.
    order: Vec<u32>,
    weights: Vec<f64>,
    adjusted: Vec<f32>,
}

impl Sampler {
    /// Creates a sampler. Samplers with the same seed and different values of `stream` draw
    /// independently, as for several sequences of one run.
    ///
    /// # Errors
    /// Returns the same errors as [`SampleConfig::validate`].
    pub fn new(config: &SampleConfig, stream: u64) -> Result<Self> {
        config.validate()?;
        let mut sampler = Self {
            config: config.clone(),
            stream,
            rng: ChaCha8Rng::seed_from_u64(config.seed),
            counts: HashMap::new(),
            order: Vec::new(),
            weights: Vec::new(),
            adjusted: Vec::new(),
        };
        sampler.reset();
        Ok(sampler)
    }

    /// The settings.
    pub fn config(&self) -> &SampleConfig {
        &self.config
    }

    /// Forgets all tokens and begins the random draws anew.
    pub fn reset(&mut self) {
        self.rng = ChaCha8Rng::seed_from_u64(self.config.seed);
        self.rng.set_stream(self.stream);
        self.counts.clear();
    }

    /// Takes the random numbers and the counts of another sampler with the same settings.
    pub(super) fn follow(&mut self, other: &Self) {
        self.rng.clone_from(&other.rng);
        self.counts.clone_from(&other.counts);
    }

    /// Counts tokens of the prompt, which the repetition penalty sees.
    pub fn observe(&mut self, tokens: &[u32]) {
        if self.config.has_penalties() {
            for token in tokens {
                self.counts.entry(*token).or_default();
            }
        }
    }

    /// Counts a token as generated, which all penalties see.
    pub fn accept(&mut self, token: u32) {
        if self.config.has_penalties() {
            let count = self.counts.entry(token).or_default();
            *count = count.saturating_add(1);
        }
    }

    /// Returns the id of the next token, with no token forbidden; 0 if no logit is a number.
    /// Otherwise the same as [`sample`](Self::sample).
    pub fn next(&mut self, logits: &[f32]) -> u32 {
        self.draw(logits, None).unwrap_or(0)
    }

    /// Returns the id of the next token, one that `allowed` allows. Among equal logits the lowest id
    /// wins. NaN is never chosen.
    ///
    /// Biases are added first, then the penalties apply: repetition, frequency, presence. Then the
    /// logits are divided by the temperature, and the limits apply in the order top-k, min-p, top-p,
    /// each to the tokens that the previous one left.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if no token is left.
    pub fn sample(&mut self, logits: &[f32], allowed: Option<TokenMask<'_>>) -> Result<u32> {
        let forbidden = || {
            let found = format!("{} logits without one that may be drawn", logits.len());
            Error::argument("logits", found, "a number for a token that is allowed")
        };
        self.draw(logits, allowed).ok_or_else(forbidden)
    }

    /// Returns the next token, or `None` if all are forbidden or no logit is a number.
    fn draw(&mut self, logits: &[f32], allowed: Option<TokenMask<'_>>) -> Option<u32> {
        let plain = self.config.logit_bias.is_empty() && self.counts.is_empty();
        let mut adjusted = std::mem::take(&mut self.adjusted);
        let logits = match allowed {
            None if plain => logits,
            allowed => {
                self.adjust(logits, allowed, &mut adjusted);
                &adjusted
            }
        };
        let drawn = self.choose(logits, allowed.is_some() || !plain);
        self.adjusted = adjusted;
        drawn
    }

    /// Applies biases, penalties and the mask.
    fn adjust(&self, logits: &[f32], allowed: Option<TokenMask<'_>>, out: &mut Vec<f32>) {
        let config = &self.config;
        out.clear();
        out.extend_from_slice(logits);
        for (id, bias) in &config.logit_bias {
            if let Some(logit) = out.get_mut(*id as usize) {
                *logit += bias;
            }
        }
        for (id, count) in &self.counts {
            let Some(logit) = out.get_mut(*id as usize) else {
                continue;
            };
            let mut value = f64::from(*logit);
            value = if value > 0.0 {
                value / config.repetition_penalty
            } else {
                value * config.repetition_penalty
            };
            value -= config.frequency_penalty * f64::from(*count);
            if *count > 0 {
                value -= config.presence_penalty;
            }
            *logit = value as f32;
        }
        if let Some(allowed) = allowed {
            for (id, logit) in (0..).zip(out) {
                if !allowed.allows(id) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// Chooses by the adjusted logits. If `forbids` is true, minus infinity forbids a token.
    fn choose(&mut self, logits: &[f32], forbids: bool) -> Option<u32> {
        let possible = |logit: f32| !(logit.is_nan() || forbids && logit == f32::NEG_INFINITY);
        if self.config.temperature == 0.0 {
            let mut best: Option<(u32, f32)> = None;
            for (id, value) in (0..).zip(logits) {
                if possible(*value) && best.is_none_or(|(_, most)| *value > most) {
                    best = Some((id, *value));
                }
            }
            return best.map(|(id, _)| id);
        }
        let Self {
            config,
            rng,
            order,
            weights,
            ..
        } = self;
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        // Logits below `least` fail the `min_p` limit. It is known before sorting.
        let least = f64::from(max) + config.temperature * config.min_p.ln();
        order.clear();
        order.extend((0..logits.len() as u32).filter(|id| {
            let logit = logits[*id as usize];
            possible(logit) && (config.min_p == 0.0 || f64::from(logit) >= least)
        }));
        let descending = |a: &u32, b: &u32| {
            logits[*b as usize]
                .total_cmp(&logits[*a as usize])
                .then(a.cmp(b))
        };
        if config.top_k > 0 && config.top_k < order.len() {
            order.select_nth_unstable_by(config.top_k - 1, descending);
            order.truncate(config.top_k);
        }
        let possible = order.iter().map(|id| logits[*id as usize]);
        let max = f64::from(possible.fold(f32::NEG_INFINITY, f32::max));
        let weight =
            |id: &u32| ((f64::from(logits[*id as usize]) - max) / config.temperature).exp();
        let total: f64 = order.iter().map(weight).sum();
        // Only as many of the most likely tokens are sorted as are looked at, since most of a large
        // vocabulary is not.
        weights.clear();
        let next = |order: &mut [u32], weights: &mut Vec<f64>, at: usize| {
            if at == weights.len() {
                let end = order.len().min((8 * at).max(SORTED));
                if end < order.len() {
                    order[at..].select_nth_unstable_by(end - 1 - at, descending);
                }
                order[at..end].sort_unstable_by(descending);
                weights.extend(order[at..end].iter().map(weight));
            }
            weights.get(at).copied()
        };
        let (mut kept, mut sum) = (order.len(), total);
        if config.top_p < 1.0 {
            let mut reached = 0.0;
            (kept, sum) = (0, 0.0);
            while let Some(weight) = next(order, weights, kept) {
                kept += 1;
                sum += weight;
                reached += weight / total;
                if reached >= config.top_p {
                    break;
                }
            }
        }
        let mut draw = rng.random::<f64>() * sum;
        for at in 0..kept {
            draw -= next(order, weights, at)?;
            if draw < 0.0 {
                return order.get(at).copied();
            }
        }
        order.get(kept.checked_sub(1)?).copied()
    }
}

#[cfg(test)]
mod tests;
