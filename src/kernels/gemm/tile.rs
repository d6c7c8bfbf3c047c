//! The innermost kernel: a tile of [`ROWS`] x [`COLUMNS`] sums in registers, computed from packed
//! operands.
//!
//! Operands consist of units of 32 bits: one `f32`, or two bf16 numbers that are adjacent along the
//! inner dimension. A left panel is `[units, ROWS]`, a right one `[units, COLUMNS]`. A tile of 12 x
//! 32 sums takes 24 of the 32 registers, and a step along the inner dimension takes 14 loads for 24
//! multiplications.

use crate::kernels::Level;
#[cfg(target_arch = "x86_64")]
use crate::kernels::level::Set;

/// Number of rows of a tile, and of a panel of the left operand.
pub(super) const ROWS: usize = 12;
/// Number of columns of a tile, and of a panel of the right operand: two registers.
pub(super) const COLUMNS: usize = 32;

/// Contents of a 32-bit unit of a packed operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One number.
    F32,
    /// Two 16-bit numbers, the first in the lower half.
    Bf16,
}

impl Kind {
    /// Returns the number of numbers along the inner dimension in a unit.
    pub(super) fn numbers(self) -> usize {
        match self {
            Kind::F32 => 1,
            Kind::Bf16 => 2,
        }
    }

    /// Returns whether units of this kind are packed and multiplied by 512-bit instructions.
    /// Otherwise they are processed number by number, which tests use for comparison.
    pub(super) fn is_fast(self, level: Level) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Kind::F32 => level.set() >= Set::Avx512,
            #[cfg(not(target_arch = "x86_64"))]
            Kind::F32 => false,
            Kind::Bf16 => level.bf16(),
        }
    }
}

/// Destination of the sums of a tile: `out = factor * sums`, or `out += factor * sums`.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub out: *mut f32,
    /// Distance between rows of `out`, in elements.
    pub width: usize,
    /// Number of rows, from 1 to [`ROWS`].
    pub rows: usize,
    /// Number of columns, from 1 to [`COLUMNS`].
    pub columns: usize,
    pub factor: f32,
    pub add: bool,
}

impl Place {
    /// Returns the part that begins at column `first`.
    #[cfg(target_arch = "x86_64")]
    fn columns_from(self, first: usize, columns: usize) -> Self {
        Self {
            out: self.out.wrapping_add(first),
            columns,
            ..self
        }
    }
}

/// Defines a function that computes a tile of `R` rows and `V` registers of columns. It reads `R`
/// rows of the panel and writes at most the rows of the place.
#[cfg(target_arch = "x86_64")]
macro_rules! tile {
    ($features:literal, $name:ident, $lanes:literal, $vector:ty, $mask:ty, $ops:ident) => {
        /// # Safety
        /// The processor must have the features, `a` and `b` must be panels of `units`, and the
        /// place must be writable.
        #[target_feature(enable = $features)]
        #[allow(clippy::needless_range_loop)] // constant loops, which are unrolled
        unsafe fn $name<const R: usize, const V: usize>(
            a: *const u32,
            b: *const u32,
            units: usize,
            place: Place,
        ) {
            let mut sums = [[$ops::zero(); V]; R];
            let (mut a, mut b) = (a, b);
            // SAFETY: the caller guarantees that the panels have this many units.
            unsafe {
                for row in 0..R.min(place.rows) {
                    _mm_prefetch::<_MM_HINT_T0>(place.out.wrapping_add(row * place.width).cast());
                    _mm_prefetch::<_MM_HINT_T0>(
                        place.out.wrapping_add(row * place.width + 16).cast(),
                    );
                }
                for _ in 0..units {
                    let mut columns = [$ops::none(); V];
                    for v in 0..V {
                        columns[v] = $ops::load(b.add(v * $lanes));
                    }
                    for row in 0..R {
                        let left = $ops::splat(a.add(row));
                        for v in 0..V {
                            sums[row][v] = $ops::dot(sums[row][v], left, columns[v]);
                        }
                    }
                    a = a.add(ROWS);
                    b = b.add(COLUMNS);
                }
            }
            for v in 0..V {
                let columns = place.columns.saturating_sub(v * $lanes).min($lanes);
                let mask = ((1_u32 << columns) - 1) as $mask;
                for row in 0..R {
                    if row < place.rows {
                        let out = place.out.wrapping_add(row * place.width + v * $lanes);
                        // SAFETY: the mask covers only columns of the place.
                        unsafe { $ops::store(out, mask, sums[row][v], place.factor, place.add) };
                    }
                }
            }
        }
    };
}

/// Defines a function that chooses the smallest tile that covers the place: 12, 8 or 4 rows, and
/// 32, 16 + 8, 16 or 8 columns.
#[cfg(target_arch = "x86_64")]
macro_rules! choose {
    ($features:literal, $name:ident, $wide:ident, $narrow:ident) => {
        /// # Safety
        /// As for the tiles.
        #[target_feature(enable = $features)]
        unsafe fn $name<const R: usize>(a: *const u32, b: *const u32, units: usize, place: Place) {
            // SAFETY: the caller upholds this function's contract; the narrower tiles read the
            // first columns of the panel, or those from 16 on.
            unsafe {
                match place.columns {
                    0..=8 => $narrow::<R, 1>(a, b, units, place),
                    9..=16 => $wide::<R, 1>(a, b, units, place),
                    17..=24 => {
                        $wide::<R, 1>(a, b, units, place.columns_from(0, 16));
                        $narrow::<R, 1>(
                            a,
                            b.add(16),
                            units,
                            place.columns_from(16, place.columns - 16),
                        );
                    }
                    _ => $wide::<R, 2>(a, b, units, place),
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

    use super::{COLUMNS, Place, ROWS};

    /// Defines the vector operations of the tiles, for sixteen and for eight numbers.
    macro_rules! registers {
        ($name:ident, $vector:ident, $mask:ident, $zero:ident, $load:ident, $splat:ident, $fma:ident, $add:ident,
         $scale:ident, $load_some:ident, $store_some:ident) => {
            mod $name {
                use std::arch::x86_64::{
                    $add, $fma, $load, $load_some, $mask, $scale, $splat, $store_some, $vector,
                    $zero,
                };

                #[inline]
                #[target_feature(enable = "avx512f,avx512vl")]
                pub fn zero() -> $vector {
                    $zero()
                }

                #[inline]
                #[target_feature(enable = "avx512f,avx512vl")]
                pub fn none() -> $vector {
                    $zero()
                }

                #[inline]
                #[target_feature(enable = "avx512f,avx512vl")]
                pub unsafe fn load(at: *const u32) -> $vector {
                    // SAFETY: the caller guarantees that a vector is readable.
                    unsafe { $load(at.cast()) }
                }

                #[inline]
                #[target_feature(enable = "avx512f,avx512vl")]
                pub unsafe fn splat(at: *const u32) -> $vector {
                    // SAFETY: the caller guarantees that a unit is readable.
                    $splat(unsafe { at.cast::<f32>().read() })
                }

                #[inline]
                #[target_feature(enable = "avx512f,avx512vl,fma")]
                pub fn dot(sum: $vector, a: $vector, b: $vector) -> $vector {
                    $fma(a, b, sum)
                }

                #[inline]
                #[target_feature(enable = "avx512f,avx512vl")]
                pub unsafe fn store(
                    out: *mut f32,
                    mask: $mask,
                    sums: $vector,
                    factor: f32,
                    add: bool,
                ) {
                    let sums = $scale(sums, $splat(factor));
                    // SAFETY: the caller guarantees that the columns in the mask are writable.
                    unsafe {
                        let sums = if add {
                            $add(sums, $load_some(mask, out))
                        } else {
                            sums
                        };
                        $store_some(out, mask, sums);
                    }
                }
            }
        };
    }

    registers!(
        sixteen,
        __m512,
        __mmask16,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_set1_ps,
        _mm512_fmadd_ps,
        _mm512_add_ps,
        _mm512_mul_ps,
        _mm512_maskz_loadu_ps,
        _mm512_mask_storeu_ps
    );
    registers!(
        eight,
        __m256,
        __mmask8,
        _mm256_setzero_ps,
        _mm256_loadu_ps,
        _mm256_set1_ps,
        _mm256_fmadd_ps,
        _mm256_add_ps,
        _mm256_mul_ps,
        _mm256_maskz_loadu_ps,
        _mm256_mask_storeu_ps
    );

    /// Defines the same operations for pairs of bf16 numbers.
    macro_rules! pairs {
        ($name:ident, $of:ident, $vector:ident, $bits:ident, $pairs:ident, $load:ident, $splat:ident, $dot:ident, $none:ident) => {
            mod $name {
                pub use super::$of::{store, zero};
                use std::arch::x86_64::{$bits, $dot, $load, $none, $pairs, $splat, $vector};

                #[inline]
                #[target_feature(enable = "avx512f,avx512vl,avx512bf16")]
                fn pairs(bits: $bits) -> $pairs {
                    // SAFETY: both types are plain values of the same number of bits.
                    unsafe { std::mem::transmute::<$bits, $pairs>(bits) }
                }

                #[inline]
                #[target_feature(enable = "avx512f,avx512vl,avx512bf16")]
                pub fn none() -> $pairs {
                    pairs($none())
                }

                #[inline]
                #[target_feature(enable = "avx512f,avx512vl,avx512bf16")]
                pub unsafe fn load(at: *const u32) -> $pairs {
                    // SAFETY: the caller guarantees that a vector is readable.
                    pairs(unsafe { $load(at.cast()) })
                }

                #[inline]
                #[target_feature(enable = "avx512f,avx512vl,avx512bf16")]
                pub unsafe fn splat(at: *const u32) -> $pairs {
                    // SAFETY: the caller guarantees that a unit is readable.
                    pairs($splat(unsafe { at.cast::<i32>().read() }))
                }

                #[inline]
                #[target_feature(enable = "avx512f,avx512vl,avx512bf16")]
                pub fn dot(sum: $vector, a: $pairs, b: $pairs) -> $vector {
                    $dot(sum, a, b)
                }
            }
        };
    }

    pairs!(
        sixteen_pairs,
        sixteen,
        __m512,
        __m512i,
        __m512bh,
        _mm512_loadu_si512,
        _mm512_set1_epi32,
        _mm512_dpbf16_ps,
        _mm512_setzero_si512
    );
    pairs!(
        eight_pairs,
        eight,
        __m256,
        __m256i,
        __m256bh,
        _mm256_loadu_si256,
        _mm256_set1_epi32,
        _mm256_dpbf16_ps,
        _mm256_setzero_si256
    );

    tile!(
        "avx512f,avx512vl,avx512bw,avx512dq,fma",
        f32_wide,
        16,
        __m512,
        u16,
        sixteen
    );
    tile!(
        "avx512f,avx512vl,avx512bw,avx512dq,fma",
        f32_narrow,
        8,
        __m256,
        u8,
        eight
    );
    tile!(
        "avx512f,avx512vl,avx512bw,avx512dq,fma,avx512bf16",
        bf16_wide,
        16,
        __m512,
        u16,
        sixteen_pairs
    );
    tile!(
        "avx512f,avx512vl,avx512bw,avx512dq,fma,avx512bf16",
        bf16_narrow,
        8,
        __m256,
        u8,
        eight_pairs
    );
    choose!(
        "avx512f,avx512vl,avx512bw,avx512dq,fma",
        f32_rows,
        f32_wide,
        f32_narrow
    );
    choose!(
        "avx512f,avx512vl,avx512bw,avx512dq,fma,avx512bf16",
        bf16_rows,
        bf16_wide,
        bf16_narrow
    );

    /// # Safety
    /// The processor must have AVX-512, the panels must have `units`, and the place must be
    /// writable.
    pub(super) unsafe fn f32_tile(a: *const u32, b: *const u32, units: usize, place: Place) {
        // SAFETY: the caller upholds this function's contract.
        unsafe {
            match place.rows {
                0..=4 => f32_rows::<4>(a, b, units, place),
                5..=8 => f32_rows::<8>(a, b, units, place),
                _ => f32_rows::<ROWS>(a, b, units, place),
            }
        }
    }

    /// # Safety
    /// As for `f32_tile`, and the processor must have AVX-512 BF16.
    pub(super) unsafe fn bf16_tile(a: *const u32, b: *const u32, units: usize, place: Place) {
        // SAFETY: the caller upholds this function's contract.
        unsafe {
            match place.rows {
                0..=4 => bf16_rows::<4>(a, b, units, place),
                5..=8 => bf16_rows::<8>(a, b, units, place),
                _ => bf16_rows::<ROWS>(a, b, units, place),
            }
        }
    }
}

mod portable {
    use super::{COLUMNS, Kind, Place, ROWS};

    fn halves(unit: u32) -> [f32; 2] {
        [
            f32::from_bits(unit << 16),
            f32::from_bits(unit & 0xFFFF_0000),
        ]
    }

    /// # Safety
    /// The panels must have `units`, and the place must be writable.
    pub(super) unsafe fn tile(
        kind: Kind,
        a: *const u32,
        b: *const u32,
        units: usize,
        place: Place,
    ) {
        for (row, column) in
            (0..place.rows).flat_map(|row| (0..place.columns).map(move |column| (row, column)))
        {
            let mut sum = 0.0_f32;
            for unit in 0..units {
                // SAFETY: the caller upholds this function's contract, here and below.
                let (a, b) =
                    unsafe { (*a.add(unit * ROWS + row), *b.add(unit * COLUMNS + column)) };
                match kind {
                    Kind::F32 => sum = f32::from_bits(a).mul_add(f32::from_bits(b), sum),
                    Kind::Bf16 => halves(a)
                        .into_iter()
                        .zip(halves(b))
                        .for_each(|(a, b)| sum += a * b),
                }
            }
            unsafe {
                let out = place.out.add(row * place.width + column);
                *out = place.factor * sum + if place.add { *out } else { 0.0 };
            }
        }
    }
}

/// Computes a tile.
///
/// # Safety
/// The panels must have `units` of this kind, and the place must be writable.
pub(super) unsafe fn tile(
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))] level: Level,
    kind: Kind,
    a: *const u32,
    b: *const u32,
    units: usize,
    place: Place,
) {
    #[cfg(target_arch = "x86_64")]
    if kind.is_fast(level) {
        // SAFETY: the caller upholds this function's contract, and `is_fast` checked that the
        // processor has the instructions.
        return unsafe {
            match kind {
                Kind::F32 => avx512::f32_tile(a, b, units, place),
                Kind::Bf16 => avx512::bf16_tile(a, b, units, place),
            }
        };
    }
    // SAFETY: the caller upholds this function's contract.
    unsafe { portable::tile(kind, a, b, units, place) }
}
