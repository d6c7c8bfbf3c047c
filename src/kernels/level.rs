//! Instruction sets that the kernels use: [`Level`], and [`dispatch!`], which compiles a function
//! for each level.
//!
//! This module does not depend on any kernel. Code that has a kernel for an instruction set matches
//! on [`Level::set`] at the call site.

use std::sync::OnceLock;

/// An instruction set that this machine supports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    set: Set,
    bf16: bool,
}

/// The instruction sets that kernels exist for. Each includes all sets before it of the same
/// architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Set {
    Portable,
    /// AVX2 with FMA, F16C, BMI, LZCNT and POPCNT.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ and VL, which every server with AVX-512 supports.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX-512 with VNNI, VBMI and VBMI2: dot products and permutations of bytes.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// NEON with dot products of bytes.
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

    /// Returns whether this machine supports the instructions that the set adds to the set before
    /// it.
    fn found(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
                    && is_x86_feature_detected!("bmi1")
                    && is_x86_feature_detected!("bmi2")
                    && is_x86_feature_detected!("lzcnt")
                    && is_x86_feature_detected!("popcnt")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => {
                is_x86_feature_detected!("avx512vnni")
                    && is_x86_feature_detected!("avx512vbmi")
                    && is_x86_feature_detected!("avx512vbmi2")
            }
            // Weights are stored little-endian, and the kernels read them without conversion.
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
    /// The level that every machine supports: plain loops, which the compiler vectorizes where it
    /// can.
    pub const PORTABLE: Self = Self {
        set: Set::Portable,
        bf16: false,
    };

    /// Returns the widest level that this machine supports.
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

    /// Returns every level up to the widest, for tests and benchmarks that compare them.
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

    /// Returns the name of the level for reports.
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

    /// Returns whether the processor has dot products of pairs of bf16 numbers (AVX-512 BF16).
    #[allow(dead_code)] // where nothing trains
    pub(crate) fn bf16(self) -> bool {
        self.bf16
    }
}

/// Compiles a function, which may have one type parameter, for each [`Level`]. The level becomes
/// its first parameter. `FMA` is true if a fused multiply-add is one instruction; otherwise
/// `f32::mul_add` would be a library call.
macro_rules! dispatch {
    ($(#[$doc:meta])* $vis:vis fn $name:ident<const $fma:ident: bool $(, $t:ident: $bound:ident)?>($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        $vis fn $name$(<$t: $bound>)?(level: $crate::kernels::Level, $($arg: $type),*) $(-> $ret)? {
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
                // SAFETY: `Level::detect` returns this level only if the processor supports these
                // features; the same holds for the next arm.
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::level::Set::Avx2 => unsafe { avx2$(::<$t>)?($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::level::Set::Avx512 | $crate::kernels::level::Set::Avx512Vnni => unsafe {
                    avx512$(::<$t>)?($($arg),*)
                },
                // Every 64-bit Arm target has a fused multiply-add.
                _ => body::<{ cfg!(target_arch = "aarch64") } $(, $t)?>($($arg),*),
            }
        }
    };
}
pub(crate) use dispatch;

/// Returns `a * b + c`, fused if that is one instruction.
#[inline(always)]
pub(crate) fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}
