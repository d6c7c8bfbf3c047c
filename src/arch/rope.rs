//! Rotary position tables (Su et al., arXiv 2104.09864), with the frequency scalings that
//! checkpoints use.

/// Scaling of the rotary frequencies, which extends the context.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// No scaling: frequency `j` is `theta^(-2j / head_dim)`.
    Default,
    /// Divides all frequencies by `factor`.
    Linear {
        /// The divisor, at least 1.
        factor: f64,
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
}

/// The rotary frequencies, one for each pair of a head's features.
#[derive(Clone, Debug, PartialEq)]
#[doc(hidden)]
pub struct Rope {
    inv_freq: Vec<f64>,
}

impl Rope {
    /// Computes the frequencies `theta^(-2 i / head_dim)` for `i` in `0..head_dim / 2`, and applies
    /// `scaling`.
    pub fn new(head_dim: usize, theta: f64, scaling: RopeScaling) -> Self {
        let inv_freq = (0..head_dim / 2)
            .map(|i| {
                let freq = theta.powf(-2.0 * i as f64 / head_dim as f64);
                match scaling {
                    RopeScaling::Default => freq,
                    RopeScaling::Linear { factor } => freq / factor,
                    RopeScaling::Llama3 {
                        factor,
                        low_freq_factor,
                        high_freq_factor,
                        original_max_position_embeddings,
                    } => {
                        let original = original_max_position_embeddings as f64;
                        let wavelength = 2.0 * std::f64::consts::PI / freq;
                        if wavelength < original / high_freq_factor {
                            freq
                        } else if wavelength > original / low_freq_factor {
                            freq / factor
                        } else {
                            let smooth = (original / wavelength - low_freq_factor)
                                / (high_freq_factor - low_freq_factor);
                            (1.0 - smooth) * freq / factor + smooth * freq
                        }
                    }
                }
            })
            .collect();
        Self { inv_freq }
    }

    /// The frequencies, in radians per token.
    pub fn inv_freq(&self) -> &[f64] {
        &self.inv_freq
    }

    /// Computes the cosines and sines of one position.
    ///
    /// # Shapes
    /// - `cos`, `sin`: `[head_dim / 2]` each
    pub fn rotation_at(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        for (freq, (cos, sin)) in self.inv_freq.iter().zip(cos.iter_mut().zip(sin)) {
            // As in the reference implementation, the angle is computed in f32.
            let angle = position as f32 * *freq as f32;
            (*cos, *sin) = (angle.cos(), angle.sin());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_keeps_short_wavelengths_and_divides_long_ones() {
        let plain = Rope::new(64, 500_000.0, RopeScaling::Default);
        let scaled = Rope::new(
            64,
            500_000.0,
            RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 8192,
            },
        );
        assert_eq!(plain.inv_freq()[0], scaled.inv_freq()[0]);
        approx::assert_relative_eq!(
            plain.inv_freq()[31] / 8.0,
            scaled.inv_freq()[31],
            epsilon = 1e-12
        );
        // Wavelengths (2 pi / freq) from 2048 to 8192 are interpolated, so these frequencies are
        // strictly between the kept and the divided ones.
        let between = plain
            .inv_freq()
            .iter()
            .zip(scaled.inv_freq())
            .filter(|(p, s)| *s < *p && **s > **p / 8.0)
            .count();
        assert!(between > 0);
        for (p, s) in plain.inv_freq().iter().zip(scaled.inv_freq()) {
            assert!(s <= p && *s >= p / 8.0 - 1e-12);
        }
    }

    #[test]
    fn linear_divides_every_frequency() {
        let scaled = Rope::new(8, 10_000.0, RopeScaling::Linear { factor: 4.0 });
        let plain = Rope::new(8, 10_000.0, RopeScaling::Default);
        for (p, s) in plain.inv_freq().iter().zip(scaled.inv_freq()) {
            approx::assert_relative_eq!(p / 4.0, *s);
        }
    }
}
