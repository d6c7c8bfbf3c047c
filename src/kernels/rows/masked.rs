//! Rows of a weight with an update that is restricted by a mask.

use std::mem::MaybeUninit;

use half::bf16;

use crate::kernels::level::dispatch;

dispatch! {
    /// Adds an update, where the mask is not 0, to a row of weights. The sum replaces the update.
    pub(crate) fn add_masked<const FMA: bool>(update: &mut [f32], weight: &[f32], mask: &[u8]) {
        for ((update, weight), mask) in update.iter_mut().zip(weight).zip(mask) {
            *update = if *mask != 0 { *weight + *update } else { *weight };
        }
    }
}

dispatch! {
    /// Sets the elements to zero where the mask is 0.
    pub(crate) fn keep_masked<const FMA: bool>(row: &mut [f32], mask: &[u8]) {
        for (value, mask) in row.iter_mut().zip(mask) {
            *value = if *mask != 0 { *value } else { 0.0 };
        }
    }
}

dispatch! {
    /// Rounds to bf16, to nearest with ties to even. NaN stays NaN.
    pub(crate) fn round_to_bf16<const FMA: bool>(row: &[f32], out: &mut [MaybeUninit<bf16>]) {
        for (out, value) in out.iter_mut().zip(row) {
            let bits = value.to_bits();
            let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
            let number = bits & 0x7fff_ffff <= 0x7f80_0000;
            out.write(bf16::from_bits(if number { nearest } else { bits >> 16 | 0x40 } as u16));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::level::Level;

    #[test]
    fn rounding_to_bf16_is_to_nearest_with_every_instruction_set() {
        let mut values: Vec<f32> = (0..40_000_u32)
            .map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761)))
            .collect();
        // Ties of both kinds, values that overflow, and values without a nearest bf16 number.
        values.extend(
            [
                0x3f80_8000,
                0x3f81_8000,
                0x7f7f_ffff,
                0x7f80_0000,
                0x7f80_0001,
                0xff80_0000,
            ]
            .map(f32::from_bits),
        );
        for level in Level::available() {
            let mut out = vec![MaybeUninit::uninit(); values.len()];
            round_to_bf16(level, &values, &mut out);
            for (out, value) in out.into_iter().zip(&values) {
                // SAFETY: `round_to_bf16` wrote every element.
                let (got, want) = (unsafe { out.assume_init() }, bf16::from_f32(*value));
                assert!(
                    got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(),
                    "{value}: {got}, not {want}"
                );
            }
        }
    }

    #[test]
    fn a_mask_decides_with_every_instruction_set() {
        let weight: Vec<f32> = (0..77).map(|i| i as f32 * 0.5 - 11.0).collect();
        let mask: Vec<u8> = (0..77).map(|i| u8::from(i % 3 != 1)).collect();
        for level in Level::available() {
            let update: Vec<f32> = (0..77).map(|i| (i as f32).sin()).collect();
            let (mut sum, mut kept) = (update.clone(), update.clone());
            add_masked(level, &mut sum, &weight, &mask);
            keep_masked(level, &mut kept, &mask);
            for i in 0..77 {
                let part = if i % 3 == 1 { 0.0 } else { update[i] };
                assert_eq!(
                    (sum[i], kept[i]),
                    (weight[i] + part, part),
                    "{i}, {level:?}"
                );
            }
        }
    }
}
