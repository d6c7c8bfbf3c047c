//! Samples the next token from logits.

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
}

impl Default for SampleConfig {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
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
        Ok(())
    }
}

/// Samples tokens for one sequence.
#[derive(Clone, Debug)]
pub struct Sampler {
    config: SampleConfig,
    rng: ChaCha8Rng,
    /// Buffers reused between draws, so that sampling does not allocate.
    order: Vec<u32>,
    weights: Vec<f64>,
}

impl Sampler {
    /// Creates a sampler. Samplers with the same seed and different values of `stream` draw
    /// independently, as for several sequences of one run.
    ///
    /// # Errors
    /// Returns the same errors as [`SampleConfig::validate`].
    pub fn new(config: &SampleConfig, stream: u64) -> Result<Self> {
        config.validate()?;
        let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
        rng.set_stream(stream);
        Ok(Self {
            config: config.clone(),
            rng,
            order: Vec::new(),
            weights: Vec::new(),
        })
    }

    /// Returns the id of the next token. Among equal logits the lowest id wins. NaN is never chosen
    /// if there is another logit.
    ///
    /// The limits apply in the order top-k, min-p, top-p, each to the tokens that the previous one
    /// left.
    pub fn next(&mut self, logits: &[f32]) -> u32 {
        if self.config.temperature == 0.0 {
            let mut best = 0;
            for (id, value) in logits.iter().enumerate() {
                if *value > logits[best] || logits[best].is_nan() {
                    best = id;
                }
            }
            return best as u32;
        }
        let Self {
            config,
            rng,
            order,
            weights,
        } = self;
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        // Logits below `least` fail the `min_p` limit. It is known before sorting.
        let least = f64::from(max) + config.temperature * config.min_p.ln();
        order.clear();
        order.extend((0..logits.len() as u32).filter(|id| {
            let logit = logits[*id as usize];
            !logit.is_nan() && (config.min_p == 0.0 || f64::from(logit) >= least)
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
        order.sort_unstable_by(descending);
        let Some(first) = order.first() else {
            return 0;
        };
        let max = f64::from(logits[*first as usize]);
        weights.clear();
        let weight =
            |id: &u32| ((f64::from(logits[*id as usize]) - max) / config.temperature).exp();
        weights.extend(order.iter().map(weight));
        let total: f64 = weights.iter().sum();
        let mut reached = 0.0;
        let kept = weights.iter().position(|weight| {
            reached += weight / total;
            reached >= config.top_p
        });
        weights.truncate(kept.map_or(order.len(), |last| last + 1));
        let mut draw = rng.random::<f64>() * weights.iter().sum::<f64>();
        for (weight, id) in weights.iter().zip(order.iter()) {
            draw -= weight;
            if draw < 0.0 {
                return *id;
            }
        }
        order[weights.len() - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_first_of_equals_and_ignores_nan() {
        let mut sampler = Sampler::new(&SampleConfig::default(), 0).unwrap();
        assert_eq!(sampler.next(&[f32::NAN, 1.0, 3.0, 3.0, f32::NAN]), 2);
    }

    #[test]
    fn draws_follow_the_probabilities_and_the_cuts() {
        let logits = [0.0, (3.0f32).ln(), f32::NEG_INFINITY, -20.0];
        let draw = |config: &SampleConfig| {
            let mut sampler = Sampler::new(config, 3).unwrap();
            let mut counts = [0usize; 4];
            (0..4000).for_each(|_| counts[sampler.next(&logits) as usize] += 1);
            counts
        };
        let plain = SampleConfig {
            temperature: 1.0,
            seed: 5,
            ..SampleConfig::default()
        };
        let counts = draw(&plain);
        assert!(
            (counts[1] as f64 / 4000.0 - 0.75).abs() < 0.03,
            "{counts:?}"
        );
        assert_eq!(counts, draw(&plain));
        assert_eq!(
            draw(&SampleConfig {
                top_k: 1,
                ..plain.clone()
            })[1],
            4000
        );
        assert_eq!(
            draw(&SampleConfig {
                top_p: 0.7,
                ..plain.clone()
            })[1],
            4000
        );
        // A token with a third of the largest probability passes a limit of 0.3 and fails one of
        // 0.4.
        let third = draw(&SampleConfig {
            min_p: 0.3,
            ..plain.clone()
        });
        assert!(third[0] > 800 && third[3] == 0);
        assert_eq!(
            draw(&SampleConfig {
                min_p: 0.4,
                ..plain.clone()
            })[1],
            4000
        );
        let warm = draw(&SampleConfig {
            temperature: 2.0,
            ..plain
        });
        assert!(warm[0] > counts[0]);
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        for (temperature, top_p) in [(-1.0, 1.0), (f64::NAN, 1.0), (1.0, 0.0), (1.0, 1.5)] {
            let config = SampleConfig {
                temperature,
                top_p,
                ..SampleConfig::default()
            };
            assert!(Sampler::new(&config, 0).is_err());
        }
        for min_p in [-0.1, 1.0, f64::NAN] {
            assert!(
                Sampler::new(
                    &SampleConfig {
                        min_p,
                        ..SampleConfig::default()
                    },
                    0
                )
                .is_err()
            );
        }
    }
}
