//! Dropout whose mask is a function of a seed, so that a resumed run and a recomputed layer draw the same one.

use burn::tensor::{Tensor, TensorData};

/// Mixes a seed with a stream's number (splitmix64, Steele et al. 2014): streams are independent of each other.
pub fn mix_seed(seed: u64, stream: u64) -> u64 {
    let mut z = seed.wrapping_add(stream.wrapping_mul(0x9E37_79B9_7F4A_7C15)).wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Zeroes each element of `x` with the given probability and scales the others by `1 / (1 - probability)`.
///
/// The mask depends on `seed` and the element's row-major index alone.
pub fn seeded_dropout<const D: usize>(x: Tensor<D>, probability: f64, seed: u64) -> Tensor<D> {
    if probability <= 0.0 {
        return x;
    }
    let shape = x.shape();
    let keep = (1.0 / (1.0 - probability)) as f32;
    // 32 bits of randomness an element: two elements a draw.
    let threshold = (probability * 4_294_967_296.0) as u64;
    let n = shape.num_elements();
    let mut mask = Vec::with_capacity(n + 1);
    for pair in 0..n.div_ceil(2) as u64 {
        let bits = mix_seed(seed, pair);
        for half in [bits & 0xFFFF_FFFF, bits >> 32] {
            mask.push(if half < threshold { 0.0 } else { keep });
        }
    }
    mask.truncate(n);
    let mask = Tensor::<D>::from_data(TensorData::new(mask, shape), &x.device().without_autodiff());
    x * mask
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::host_values;
    use burn::tensor::Device;

    #[test]
    fn share_scale_and_seed() {
        let x = Tensor::<2>::ones([101, 97], &Device::flex());
        let first = host_values(seeded_dropout(x.clone(), 0.25, 7));
        let zeros = first.iter().filter(|v| **v == 0.0).count() as f64 / first.len() as f64;
        assert!((zeros - 0.25).abs() < 0.02, "{zeros}");
        assert!(first.iter().all(|v| *v == 0.0 || (*v - 4.0 / 3.0).abs() < 1e-6));
        assert_eq!(first, host_values(seeded_dropout(x.clone(), 0.25, 7)));
        assert_ne!(first, host_values(seeded_dropout(x, 0.25, 8)));
    }
}
