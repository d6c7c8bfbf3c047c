//! Rotary position tables (Su et al., arXiv 2104.09864), with the frequency scalings that
//! checkpoints use.
//!
//! The numbers are those of transformers: frequencies and angles are rounded to f32 where it rounds
//! them, because an angle at a late position magnifies the rounding of its frequency.

use std::borrow::Cow;
use std::f64::consts::PI;

/// Scaling of the rotary frequencies, which extends the context.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// No scaling: frequency `j` is `theta^(-2j / dims)`.
    Default,
    /// Divides all frequencies by `factor`.
    Linear {
        /// The divisor, at least 1.
        factor: f64,
    },
    /// Raises the base once a sequence is longer than the context of the original training
    /// ("dynamic NTK"): at a length of `n` tokens the base is
    /// `theta * (factor * n / original - (factor - 1))^(dims / (dims - 2))`.
    Dynamic {
        /// How much a longer sequence stretches the frequencies, at least 1.
        factor: f64,
        /// Number of tokens up to which frequencies are not scaled: the context length of the
        /// model.
        original_max_position_embeddings: usize,
    },
    /// Llama 3.1's scaling: divides low frequencies, keeps high ones, and blends linearly in
    /// between.
    Llama3 {
        /// Divisor of the low frequencies, at least 1.
        factor: f64,
        /// Frequencies with a wavelength above `original_max_position_embeddings / low_freq_factor`
        /// are divided.
        low_freq_factor: f64,
        /// Frequencies with a wavelength below
        /// `original_max_position_embeddings / high_freq_factor` are kept. Larger than
        /// `low_freq_factor`.
        high_freq_factor: f64,
        /// Context length of the original training, in tokens.
        original_max_position_embeddings: usize,
    },
    /// YaRN (Peng et al., arXiv 2309.00071): divides the frequencies that turn less than
    /// `beta_slow` times within the original context, keeps those that turn more than `beta_fast`
    /// times, and blends linearly over the features in between.
    Yarn {
        /// Divisor of the low frequencies, at least 1.
        factor: f64,
        /// Context length of the original training, in tokens.
        original_max_position_embeddings: usize,
        /// Factor on cosines and sines.
        attention_factor: f64,
        /// Number of turns above which frequencies are kept.
        beta_fast: f64,
        /// Number of turns below which frequencies are divided.
        beta_slow: f64,
        /// Whether the bounds of the blend are rounded to whole features.
        truncate: bool,
    },
    /// LongRoPE (Ding et al., arXiv 2402.13753): divides each frequency by a factor of its own. A
    /// sequence uses the long factors, at all its positions, as soon as it is longer than the
    /// original context.
    LongRope {
        /// Divisors of the frequencies in sequences of up to `original_max_position_embeddings`
        /// tokens, one for each pair of rotated features.
        short_factor: Vec<f64>,
        /// Divisors of the frequencies in longer sequences.
        long_factor: Vec<f64>,
        /// Context length of the original training, in tokens.
        original_max_position_embeddings: usize,
        /// Factor on cosines and sines.
        attention_factor: f64,
    },
}

/// Settings of a rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Scaling of the frequencies.
    pub scaling: RopeScaling,
    /// Number of a head's features that are rotated, its first ones; even.
    pub dims: usize,
}

impl RopeConfig {
    /// The context length to which the scaling extends a model, if a config's
    /// `max_position_embeddings` may be that of the model before: with dynamic scaling and YaRN.
    pub(crate) fn extended(&self) -> Option<usize> {
        match self.scaling {
            RopeScaling::Dynamic {
                factor,
                original_max_position_embeddings,
            }
            | RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                ..
            } => Some((original_max_position_embeddings as f64 * factor) as usize),
            _ => None,
        }
    }

    /// Whether the frequencies depend on the length of the sequence.
    pub(crate) fn depends_on_length(&self) -> bool {
        matches!(
            self.scaling,
            RopeScaling::Dynamic { .. } | RopeScaling::LongRope { .. }
        )
    }

    /// Creates the settings of an embedding without scaling.
    pub fn new(theta: f64, dims: usize) -> Self {
        Self {
            theta,
            scaling: RopeScaling::Default,
            dims,
        }
    }

    /// Frequencies without scaling, in radians per token, for a base of `theta`.
    fn plain(&self, theta: f64) -> impl Iterator<Item = f32> {
        let (theta, dims) = (f64::from(theta as f32), self.dims as f32);
        (0..self.dims / 2).map(move |i| {
            let exponent = f64::from((2 * i) as f32 / dims);
            1.0 / theta.powf(exponent) as f32
        })
    }

    /// Frequencies without scaling, each divided by its own factor; by 1 where there is none.
    fn divided(&self, factors: &[f64]) -> Vec<f64> {
        let factors = factors.iter().copied().chain(std::iter::repeat(1.0));
        let divided = |(freq, factor): (f32, f64)| f64::from(freq / factor as f32);
        self.plain(self.theta).zip(factors).map(divided).collect()
    }

    /// Frequencies in radians per token in a sequence of `len` tokens.
    fn frequencies(&self, len: usize) -> Vec<f64> {
        let plain = || self.plain(self.theta).map(f64::from);
        match &self.scaling {
            RopeScaling::Default => plain().collect(),
            RopeScaling::Linear { factor } => self.divided(&vec![*factor; self.dims / 2]),
            RopeScaling::Dynamic {
                factor,
                original_max_position_embeddings: original,
            } => {
                let theta = if len > *original {
                    let stretch = factor * len as f64 / *original as f64 - (factor - 1.0);
                    let dims = self.dims as f64;
                    self.theta * stretch.powf(dims / (dims - 2.0))
                } else {
                    self.theta
                };
                self.plain(theta).map(f64::from).collect()
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let original = *original_max_position_embeddings as f64;
                let scaled = |freq: f64| {
                    let wavelength = 2.0 * PI / freq;
                    if wavelength < original / high_freq_factor {
                        freq
                    } else if wavelength > original / low_freq_factor {
                        freq / factor
                    } else {
                        let smooth = (original / wavelength - low_freq_factor)
                            / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * freq / factor + smooth * freq
                    }
                };
                plain().map(|freq| f64::from(scaled(freq) as f32)).collect()
            }
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                truncate,
                ..
            } => {
                // The (fractional) feature whose frequency turns `turns` times within the context.
                let feature = |turns: f64| {
                    let wavelengths = *original_max_position_embeddings as f64 / (turns * 2.0 * PI);
                    self.dims as f64 * wavelengths.ln() / (2.0 * self.theta.ln())
                };
                let (low, high) = (feature(*beta_fast), feature(*beta_slow));
                let (low, high) = match truncate {
                    true => (low.floor(), high.ceil()),
                    false => (low, high),
                };
                let (low, mut high) = (low.max(0.0), high.min(self.dims as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                let blend = |(i, freq): (usize, f64)| {
                    let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    let freq = freq / factor * divided + freq * (1.0 - divided);
                    f64::from(freq as f32)
                };
                plain().enumerate().map(blend).collect()
            }
            RopeScaling::LongRope {
                short_factor,
                long_factor,
                original_max_position_embeddings,
                ..
            } => self.divided(if len > *original_max_position_embeddings {
                long_factor
            } else {
                short_factor
            }),
        }
    }
}

/// The rotary frequencies, one for each pair of a head's rotated features.
#[derive(Clone, Debug, PartialEq)]
#[doc(hidden)]
pub struct Rope {
    config: RopeConfig,
    /// Frequencies of short sequences.
    short: Vec<f64>,
    /// Number of tokens above which a sequence has other frequencies.
    limit: Option<usize>,
    /// Frequencies of all longer sequences; empty if they depend on the length.
    long: Vec<f64>,
    /// Factor on cosines and sines.
    amplitude: f32,
}

impl Rope {
    /// Computes the frequencies `theta^(-2i / dims)` for `i` in `0..dims / 2`, and scales them.
    pub fn new(config: &RopeConfig) -> Self {
        let short = config.frequencies(0);
        let (limit, long, amplitude) = match &config.scaling {
            RopeScaling::Dynamic {
                original_max_position_embeddings: original,
                ..
            } => (Some(*original), Vec::new(), 1.0),
            RopeScaling::LongRope {
                original_max_position_embeddings: original,
                attention_factor,
                ..
            } => {
                let long = config.frequencies(original.saturating_add(1));
                (Some(*original), long, *attention_factor)
            }
            RopeScaling::Yarn {
                attention_factor, ..
            } => (None, Vec::new(), *attention_factor),
            RopeScaling::Default | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => {
                (None, Vec::new(), 1.0)
            }
        };
        Self {
            config: config.clone(),
            short,
            limit,
            long,
            amplitude: amplitude as f32,
        }
    }

    /// Half the number of a head's features that are rotated: feature `i` pairs with feature
    /// `i + half`.
    pub fn half(&self) -> usize {
        self.short.len()
    }

    /// The frequencies of short sequences, in radians per token.
    pub fn inv_freq(&self) -> &[f64] {
        &self.short
    }

    /// Number of tokens above which a sequence has other frequencies at all its positions, so that
    /// keys which were rotated before are no longer right. Keys are never rotated again if the
    /// frequencies grow with the length ([`RopeScaling::Dynamic`]).
    pub fn switches_at(&self) -> Option<usize> {
        self.limit.filter(|_| !self.long.is_empty())
    }

    /// Whether keys that were rotated in a sequence of `old` tokens are wrong in one of `new`
    /// tokens.
    pub fn switches_between(&self, old: usize, new: usize) -> bool {
        self.switches_at()
            .is_some_and(|limit| (old > limit) != (new > limit))
    }

    /// Whether sequences of all lengths from `shortest` to `longest` tokens have the same
    /// frequencies.
    pub fn is_same(&self, shortest: usize, longest: usize) -> bool {
        self.limit.is_none_or(|limit| {
            longest <= limit || shortest == longest || (shortest > limit && !self.long.is_empty())
        })
    }

    /// The frequencies in a sequence of `len` tokens, in radians per token.
    fn frequencies(&self, len: usize) -> Cow<'_, [f64]> {
        match self.limit {
            Some(limit) if len > limit && self.long.is_empty() => {
                self.config.frequencies(len).into()
            }
            Some(limit) if len > limit => (&self.long[..]).into(),
            _ => (&self.short[..]).into(),
        }
    }

    /// Computes the cosines and sines of one position in a sequence of `len` tokens in all.
    ///
    /// # Shapes
    /// - `cos`, `sin`: `[half]` each
    pub fn rotation_at(&self, position: usize, len: usize, cos: &mut [f32], sin: &mut [f32]) {
        let frequencies = self.frequencies(len);
        for (freq, (cos, sin)) in frequencies.iter().zip(cos.iter_mut().zip(sin)) {
            // As in the reference implementation, the angle is computed in f32.
            let angle = position as f32 * *freq as f32;
            (*cos, *sin) = (self.amplitude * angle.cos(), self.amplitude * angle.sin());
        }
    }
}

#[cfg(test)]
#[allow(clippy::excessive_precision)] // numbers as they were printed
mod tests {
    use super::*;

    fn config(theta: f64, dims: usize, scaling: RopeScaling) -> RopeConfig {
        RopeConfig {
            theta,
            scaling,
            dims,
        }
    }

    /// Expects frequencies as transformers 5.24 prints them to nine digits, within two roundings
    /// to f32.
    #[track_caller]
    fn expect(config: &RopeConfig, len: usize, expected: &[f64]) {
        let found = config.frequencies(len);
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!(
                (found / expected - 1.0).abs() < 2.4e-7,
                "{found} is not {expected}"
            );
        }
    }

    // The expected numbers are `inv_freq` and `attention_scaling` of LlamaRotaryEmbedding and
    // Phi3RotaryEmbedding of transformers 5.24 and torch 2.15, made with these settings in
    // LlamaConfig (head_dim 16) and Phi3Config (hidden_size 32, 2 heads,
    // partial_rotary_factor 0.75), after a call with that many positions.
    #[test]
    fn frequencies_are_those_of_transformers() {
        let default = config(1e6, 16, RopeScaling::Default);
        let plain = [
            1.0,
            0.177827939,
            0.0316227786,
            0.00562341325,
            0.00100000005,
            0.00017782794,
            3.16227743e-05,
            5.62341347e-06,
        ];
        expect(&default, 7, &plain);
        let linear = config(1e6, 16, RopeScaling::Linear { factor: 8.0 });
        expect(&linear, 1 << 20, &plain.map(|freq| freq / 8.0));
        let llama3 = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 128,
        };
        let expected = [
            1.0,
            0.191126496,
            0.00470075384,
            0.000911583134,
            0.000176776681,
            3.42810235e-05,
            6.64786967e-06,
            1.28917316e-06,
        ];
        expect(&config(5e5, 16, llama3), 7, &expected);
    }

    #[test]
    fn dynamic_frequencies_follow_the_length() {
        let dynamic = RopeScaling::Dynamic {
            factor: 4.0,
            original_max_position_embeddings: 32,
        };
        let dynamic = config(1e4, 16, dynamic);
        let plain = config(1e4, 16, RopeScaling::Default).frequencies(1);
        expect(&dynamic, 32, &plain);
        let one_more = [
            1.0,
            0.310951412,
            0.0966907665,
            0.030066127,
            0.00934910402,
            0.0029071169,
            0.000903972075,
            0.000281091343,
        ];
        expect(&dynamic, 33, &one_more);
        let more = [
            1.0,
            0.229258373,
            0.0525593981,
            0.0120496824,
            0.00276249065,
            0.000633324089,
            0.000145194848,
            3.32871314e-05,
        ];
        expect(&dynamic, 100, &more);
        let rope = Rope::new(&dynamic);
        assert_eq!((rope.half(), rope.switches_at()), (8, None));
        let (mut cos, mut sin) = ([0.0; 8], [0.0; 8]);
        rope.rotation_at(31, 100, &mut cos, &mut sin);
        approx::assert_relative_eq!(cos[1], (31.0f32 * 0.229258373).cos(), epsilon = 1e-6);
        rope.rotation_at(31, 32, &mut cos, &mut sin);
        approx::assert_relative_eq!(sin[1], (31.0f32 * 0.316227764).sin(), epsilon = 1e-6);
    }

    #[test]
    fn yarn_blends_as_transformers_does() {
        let yarn = |beta_fast, beta_slow, truncate| {
            let scaling = RopeScaling::Yarn {
                factor: 4.0,
                original_max_position_embeddings: 1024,
                attention_factor: 0.8,
                beta_fast,
                beta_slow,
                truncate,
            };
            config(1e6, 16, scaling)
        };
        let tail = [
            0.00140585331,
            0.000250000012,
            4.44569851e-05,
            7.90569356e-06,
            1.40585337e-06,
        ];
        let with_tail = |head: [f64; 3]| [&head[..], &tail].concat();
        let truncated = with_tail([1.0, 0.133370951, 0.0158113893]);
        expect(&yarn(32.0, 1.0, true), 7, &truncated);
        let exact = with_tail([1.0, 0.174015075, 0.0191267766]);
        expect(&yarn(32.0, 1.0, false), 7, &exact);
        let narrow = with_tail([1.0, 0.177827939, 0.0197642371]);
        expect(&yarn(8.0, 2.0, true), 7, &narrow);
        let rope = Rope::new(&yarn(32.0, 1.0, true));
        let (mut cos, mut sin) = ([0.0; 8], [0.0; 8]);
        rope.rotation_at(0, 1, &mut cos, &mut sin);
        assert_eq!((cos, sin), ([0.8; 8], [0.0; 8]));
    }

    #[test]
    fn longrope_switches_all_positions_at_its_limit() {
        let scaling = RopeScaling::LongRope {
            short_factor: vec![1.0, 1.1, 1.25, 1.5, 2.0, 3.0],
            long_factor: vec![1.0, 2.0, 4.0, 7.5, 12.0, 32.0],
            original_max_position_embeddings: 64,
            attention_factor: 1.1547005383792517,
        };
        let longrope = config(1e4, 12, scaling);
        let short = [
            1.0,
            0.195857689,
            0.0371327065,
            0.00666666683,
            0.00107721717,
            0.000154719659,
        ];
        expect(&longrope, 64, &short);
        let long = [
            1.0,
            0.107721724,
            0.011603971,
            0.00133333332,
            0.00017953619,
            1.45049671e-05,
        ];
        expect(&longrope, 65, &long);
        let rope = Rope::new(&longrope);
        assert_eq!((rope.half(), rope.switches_at()), (6, Some(64)));
        let (mut cos, mut sin) = ([0.0; 6], [0.0; 6]);
        // Position 63 in a sequence of 64 and in one of 65.
        for (len, expected) in [
            (64, [1.12499022, -0.80263662]),
            (65, [1.01152205, 0.85964411]),
        ] {
            rope.rotation_at(63, len, &mut cos, &mut sin);
            approx::assert_relative_eq!(cos[1..3], expected[..], epsilon = 1e-5);
        }
        approx::assert_relative_eq!(sin[5], 0.00105518, epsilon = 1e-7);
    }

    #[test]
    fn late_positions_have_the_angles_of_transformers() {
        let rope = Rope::new(&config(1e6, 128, RopeScaling::Default));
        let (mut cos, mut sin) = (vec![0.0; 64], vec![0.0; 64]);
        rope.rotation_at(30_001, 30_002, &mut cos, &mut sin);
        // `cos` and `sin` of LlamaRotaryEmbedding (head_dim 128, rope_theta 1e6) at that position.
        // One rounding of a frequency around 1 turns such an angle by 0.002.
        let expected = [
            (0, 0.353167415, -0.935560107),
            (1, -0.053973835, -0.998542368),
            (5, -0.879168034, -0.476511836),
            (20, -0.464676857, -0.885480344),
            (40, 0.583171427, -0.812349081),
            (63, 0.999307036, 0.037220776),
        ];
        for (i, c, s) in expected {
            approx::assert_abs_diff_eq!(cos[i], c, epsilon = 2e-6);
            approx::assert_abs_diff_eq!(sin[i], s, epsilon = 2e-6);
        }
    }
}
