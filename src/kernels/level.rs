//! Which instructions the kernels use.

use super::input::Order;

/// A set of instructions that this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(Kind);

/// The sets that there are kernels for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// With dot products of bytes.
    #[cfg(target_arch = "aarch64")]
    NeonDot,
}

impl Level {
    /// What every machine has: plain loops, which the compiler turns into vector code where it can.
    pub const PORTABLE: Self = Self(Kind::Portable);

    /// The widest that this machine has. The standard library remembers what the processor said.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
                && is_x86_feature_detected!("bmi1")
                && is_x86_feature_detected!("bmi2")
                && is_x86_feature_detected!("lzcnt")
                && is_x86_feature_detected!("popcnt");
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
                && is_x86_feature_detected!("avx512vbmi")
                && is_x86_feature_detected!("avx512vbmi2")
            {
                return Self(Kind::Avx512);
            }
            if avx2 {
                return Self(Kind::Avx2);
            }
        }
        // Weights are little-endian, and the kernels read them as they are.
        #[cfg(target_arch = "aarch64")]
        if cfg!(target_endian = "little") && std::arch::is_aarch64_feature_detected!("neon") {
            return Self(if std::arch::is_aarch64_feature_detected!("dotprod") {
                Kind::NeonDot
            } else {
                Kind::Neon
            });
        }
        Self(Kind::Portable)
    }

    /// Every set up to the widest.
    pub fn available() -> Vec<Self> {
        Self::up_to_widest().collect()
    }

    pub(super) fn up_to_widest() -> impl Iterator<Item = Self> {
        const ALL: &[Kind] = &[
            Kind::Portable,
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2,
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512,
            #[cfg(target_arch = "aarch64")]
            Kind::Neon,
            #[cfg(target_arch = "aarch64")]
            Kind::NeonDot,
        ];
        let best = Self::detect();
        let before = ALL
            .iter()
            .take_while(move |kind| **kind != best.0)
            .map(|kind| Self(*kind));
        before.chain(std::iter::once(best))
    }

    /// A name for reports.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "AVX-512",
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => "NEON",
            #[cfg(target_arch = "aarch64")]
            Kind::NeonDot => "NEON with dot products",
        }
    }

    /// The order in which packed codes of some bits want so many rows of inputs; none where there is no kernel for them.
    #[allow(unused_variables)] // but on other machines
    pub(super) fn packed_order(self, bits: u8, rows: usize) -> Option<Order> {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => Some(super::avx512::packed_order(bits, rows)),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => Some(super::avx2::packed_order(bits, rows)),
            #[cfg(target_arch = "aarch64")]
            Kind::Neon | Kind::NeonDot => Some(Order::EvenOdd),
            Kind::Portable => None,
        }
    }

    /// The same of sparse codes of 4 bits.
    pub(super) fn sparse_order(self) -> Option<Order> {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => Some(Order::InOrder),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => Some(Order::Words),
            #[cfg(target_arch = "aarch64")]
            Kind::Neon | Kind::NeonDot => Some(Order::InOrder),
            Kind::Portable => None,
        }
    }

    /// Numbers of scratch memory that a thread needs for so many rows of inputs, of so many units.
    pub(super) fn scratch_floats(self, rows: usize, inputs: usize, units: usize) -> usize {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => super::avx512::scratch_floats(rows, inputs, units),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => super::avx2::scratch_floats(rows, inputs, units),
            #[cfg(target_arch = "aarch64")]
            Kind::Neon | Kind::NeonDot => super::neon::scratch_floats(rows, inputs, units),
            Kind::Portable => 0,
        }
    }

    /// Outputs of a task are a multiple of it, but for the last one's; and the most of them where there are many rows.
    pub(super) fn task_outputs(self, rows: usize) -> Option<usize> {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 if rows >= super::avx512::MANY => Some(super::avx512::panel::WIDTH),
            #[cfg(target_arch = "aarch64")]
            Kind::Neon | Kind::NeonDot if rows >= super::neon::MANY => Some(super::neon::WIDTH),
            _ => None,
        }
    }

    pub(super) fn kind(self) -> Kind {
        self.0
    }
}

/// Compiles a function for each [`Level`]; `FMA` says whether a fused multiply-add is one instruction.
macro_rules! leveled {
    ($(#[$doc:meta])* fn $name:ident<const $fma:ident: bool>($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        pub(super) fn $name(level: $crate::kernels::Level, $($arg: $type),*) $(-> $ret)? {
            #[inline(always)]
            fn body<const $fma: bool>($($arg: $type),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $type),*) $(-> $ret)? {
                body::<true>($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
            fn avx512($($arg: $type),*) $(-> $ret)? {
                body::<true>($($arg),*)
            }
            match level.kind() {
                $crate::kernels::level::Kind::Portable => body::<{ cfg!(target_arch = "aarch64") }>($($arg),*),
                // SAFETY: a level beyond the portable one comes from `Level::detect` alone, which asked the processor.
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::level::Kind::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::level::Kind::Avx512 => unsafe { avx512($($arg),*) },
                // What every target of this architecture has anyway.
                #[cfg(target_arch = "aarch64")]
                $crate::kernels::level::Kind::Neon | $crate::kernels::level::Kind::NeonDot => body::<true>($($arg),*),
            }
        }
    };
}
pub(super) use leveled;
