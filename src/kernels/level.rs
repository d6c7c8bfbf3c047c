//! Which instructions the kernels use: [`Level`], and [`dispatch!`], which compiles a function for each.
//!
//! This module names no kernel: who has one for an instruction set matches on [`Level::set`] where it is called.

use std::sync::OnceLock;

/// A set of instructions that this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    set: Set,
    bf16: bool,
}

/// The sets that there are kernels for, each with all of the one before it on the same architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Set {
    Portable,
    /// With FMA, F16C, BMI, LZCNT and POPCNT.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// F, BW, DQ and VL: what every server with AVX-512 has.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// With VNNI, VBMI and VBMI2: dot products and permutations of bytes.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// With dot products of bytes.
    #[cfg(target_arch = "aarch64")]
    NeonDot,
}

impl Set {
    const ALL: &[Self] = &[
        Self::Portable,
        #[cfg(target_arch = "x86_64")]
        Self::Avx2,
        #[cfg(target_arch = "x86_64")]
        Self::Avx512,
        #[cfg(target_arch = "x86_64")]
        Self::Avx512Vnni,
        #[cfg(target_arch = "aarch64")]
        Self::Neon,
        #[cfg(target_arch = "aarch64")]
        Self::NeonDot,
    ];

    /// Whether this machine has what the set adds to the one before it.
    fn found(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        macro_rules! has {
            ($($feature:tt),*) => { $(is_x86_feature_detected!($feature))&&* };
        }
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => has!("avx2", "fma", "f16c", "bmi1", "bmi2", "lzcnt", "popcnt"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => has!("avx512f", "avx512bw", "avx512dq", "avx512vl"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => has!("avx512vnni", "avx512vbmi", "avx512vbmi2"),
            // Weights are little-endian, and the kernels read them as they are.
            #[cfg(target_arch = "aarch64")]
            Self::Neon => {
                cfg!(target_endian = "little") && std::arch::is_aarch64_feature_detected!("neon")
            }
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => std::arch::is_aarch64_feature_detected!("dotprod"),
        }
    }
}

impl Level {
    /// What every machine has: plain loops, which the compiler turns into vector code where it can.
    pub const PORTABLE: Self = Self {
        set: Set::Portable,
        bf16: false,
    };

    /// The widest that this machine has.
    pub fn detect() -> Self {
        static DETECTED: OnceLock<Level> = OnceLock::new();
        *DETECTED.get_or_init(|| {
            let mut level = Self::PORTABLE;
            for set in Set::ALL.iter().take_while(|set| set.found()) {
                level.set = *set;
            }
            #[cfg(target_arch = "x86_64")]
            {
                level.bf16 = level.set >= Set::Avx512 && is_x86_feature_detected!("avx512bf16");
            }
            level
        })
    }

    /// Every level up to the widest, for tests and benches that compare them.
    pub fn available() -> Vec<Self> {
        Self::up_to_widest().collect()
    }

    pub(crate) fn up_to_widest() -> impl Iterator<Item = Self> {
        let best = Self::detect();
        let lower = Set::ALL.iter().take_while(move |set| **set != best.set);
        lower
            .map(|set| Self {
                set: *set,
                bf16: false,
            })
            .chain(std::iter::once(best))
    }

    /// A name for reports.
    pub fn name(self) -> &'static str {
        match self.set {
            Set::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "AVX-512",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Vnni => "AVX-512 VNNI",
            #[cfg(target_arch = "aarch64")]
            Set::Neon => "NEON",
            #[cfg(target_arch = "aarch64")]
            Set::NeonDot => "NEON with dot products",
        }
    }

    pub(crate) fn set(self) -> Set {
        self.set
    }

    /// Whether there are dot products of pairs of bf16 numbers (AVX-512 BF16).
    #[allow(dead_code)] // where nothing trains
    pub(crate) fn bf16(self) -> bool {
        self.bf16
    }
}

/// Compiles a function, which may have a parameter of type, for each [`Level`], which becomes its first parameter. `FMA` says
/// whether a fused multiply-add is one instruction: where it is not, the standard library's is a call.
macro_rules! dispatch {
    ($(#[$doc:meta])* $vis:vis fn $name:ident<const $fma:ident: bool $(, $t:ident: $bound:ident)?>($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        $vis fn $name$(<$t: $bound>)?(level: $crate::kernels::level::Level, $($arg: $type),*) $(-> $ret)? {
            #[inline(always)]
            fn body<const $fma: bool $(, $t: $bound)?>($($arg: $type),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2$(<$t: $bound>)?($($arg: $type),*) $(-> $ret)? {
                body::<true $(, $t)?>($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
            fn avx512$(<$t: $bound>)?($($arg: $type),*) $(-> $ret)? {
                body::<true $(, $t)?>($($arg),*)
            }
            match level.set() {
                // SAFETY: `Level::detect` asked the processor for these features before it gave the level; so below.
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::level::Set::Avx2 => unsafe { avx2$(::<$t>)?($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::level::Set::Avx512 | $crate::kernels::level::Set::Avx512Vnni => unsafe {
                    avx512$(::<$t>)?($($arg),*)
                },
                // Every 64-bit Arm target has the fused multiply-add.
                _ => body::<{ cfg!(target_arch = "aarch64") } $(, $t)?>($($arg),*),
            }
        }
    };
}
pub(crate) use dispatch;

/// `a * b + c`, fused where that is one instruction.
#[inline(always)]
pub(crate) fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}
