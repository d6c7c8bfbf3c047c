//! Dropout with a mask derived from a seed, so that a resumed run, a recomputed layer and a
//! backward pass all use the same mask.

/// Mixes a seed with the number of a random stream (splitmix64, Steele et al. 2014). The streams
/// are independent of each other.
pub(crate) fn mix_seed(seed: u64, stream: u64) -> u64 {
    let mut z = seed
        .wrapping_add(stream.wrapping_mul(0x9E37_79B9_7F4A_7C15))
        .wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Sets each element to zero with a probability, and scales the others by `1 / (1 - probability)`.
///
/// The mask depends only on the seed and the element's row-major index.
#[derive(Clone, Copy, Debug, PartialEq)]
#[doc(hidden)]
pub struct Dropout {
    /// Probability of dropping an element, in 0..1; 0 disables dropout.
    pub probability: f64,
    /// Seed of the mask.
    pub seed: u64,
}

impl Dropout {
    /// No dropout.
    pub const NONE: Self = Self {
        probability: 0.0,
        seed: 0,
    };

    /// Whether any elements may be dropped.
    pub fn is_active(&self) -> bool {
        self.probability > 0.0
    }

    /// Calls `f` with each element and its factor. `start`, the index of the first element, must be
    /// even.
    pub(crate) fn for_each<T>(&self, start: usize, values: &mut [T], f: impl Fn(&mut T, f32)) {
        let keep = (1.0 / (1.0 - self.probability)) as f32;
        // Each draw gives 32 random bits to two elements.
        let threshold = (self.probability * 4_294_967_296.0) as u64;
        let factor = |bits: u64| if bits < threshold { 0.0 } else { keep };
        for (pair, values) in values.chunks_mut(2).enumerate() {
            let bits = mix_seed(self.seed, (start / 2 + pair) as u64);
            f(&mut values[0], factor(bits & 0xFFFF_FFFF));
            if let [_, second] = values {
                f(second, factor(bits >> 32));
            }
        }
    }

    /// The factors of the first `n` elements.
    pub fn factors(&self, n: usize) -> Vec<f32> {
        let mut factors = vec![0.0; n];
        self.for_each(0, &mut factors, |value, factor| *value = factor);
        factors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn share_scale_and_seed() {
        let dropout = Dropout {
            probability: 0.25,
            seed: 7,
        };
        let first = dropout.factors(101 * 97);
        let zeros = first.iter().filter(|v| **v == 0.0).count() as f64 / first.len() as f64;
        assert!((zeros - 0.25).abs() < 0.02, "{zeros}");
        assert!(
            first
                .iter()
                .all(|v| *v == 0.0 || (*v - 4.0 / 3.0).abs() < 1e-6)
        );
        assert_ne!(first, Dropout { seed: 8, ..dropout }.factors(101 * 97));
        let mut rest = first[34..].to_vec();
        dropout.for_each(34, &mut rest, |value, factor| *value -= factor);
        assert!(rest.iter().all(|v| *v == 0.0));
    }
}
