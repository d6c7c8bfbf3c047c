//! The kernels of each instruction set.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

use super::level::{Level, Set};
use super::linear::task::Kernels;

/// The kernels that go with a level; none with the portable one.
pub(super) fn kernels(level: Level) -> Option<&'static dyn Kernels> {
    match level.set() {
        Set::Portable => None,
        // There are none for AVX-512 without its products of bytes.
        #[cfg(target_arch = "x86_64")]
        Set::Avx2 | Set::Avx512 => Some(&avx2::Avx2),
        #[cfg(target_arch = "x86_64")]
        Set::Avx512Vnni => Some(&avx512::Avx512),
        #[cfg(target_arch = "aarch64")]
        Set::Neon => Some(&neon::Neon { dots: false }),
        #[cfg(target_arch = "aarch64")]
        Set::NeonDot => Some(&neon::Neon { dots: true }),
    }
}
