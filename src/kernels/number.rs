//! Number types in which weights and caches are stored.

use half::{bf16, f16};

use crate::format::Number;

/// A stored number type, for code that is compiled once for each type.
pub(crate) trait Stored: Copy + Send + Sync + 'static {
    const NUMBER: Number;

    /// Converts to `f32`, which is exact. The implementations vectorize well.
    fn widen(self) -> f32;
}

impl Stored for f32 {
    const NUMBER: Number = Number::F32;

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Stored for bf16 {
    const NUMBER: Number = Number::Bf16;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Stored for f16 {
    const NUMBER: Number = Number::F16;

    #[inline(always)]
    fn widen(self) -> f32 {
        // The exponent bias is 15 in `f16` and 127 in `f32`.
        const REBIASED: f32 = f32::from_bits((127 + 112) << 23);
        let bits = u32::from(self.to_bits());
        let size = f32::from_bits((bits & 0x7fff) << 13) * REBIASED;
        let infinite = if bits & 0x7c00 == 0x7c00 {
            0x7f80_0000
        } else {
            0
        };
        f32::from_bits(size.to_bits() | infinite | (bits & 0x8000) << 16)
    }
}

/// Evaluates an expression with a type alias for the type that a [`Number`] names at run time.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! with_type_of {
    ($number:expr, $t:ident => $body:expr) => {
        match $number {
            $crate::format::Number::F32 => {
                type $t = f32;
                $body
            }
            $crate::format::Number::F16 => {
                type $t = half::f16;
                $body
            }
            $crate::format::Number::Bf16 => {
                type $t = half::bf16;
                $body
            }
        }
    };
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) use with_type_of;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen_bits_widen_exactly() {
        for bits in 0..=u16::MAX {
            let (a, b) = (f16::from_bits(bits), bf16::from_bits(bits));
            for (got, want) in [(a.widen(), a.to_f32()), (b.widen(), b.to_f32())] {
                assert!(
                    got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(),
                    "{bits:04x}: {got} {want}"
                );
            }
        }
    }
}
