//! Packing: copies operands of any order and format into panels of units, in the order in which a
//! tile reads them.

use std::ops::Range;

use half::bf16;

use super::operand::{Numbers, Operand};
use super::tile::Kind;
use crate::kernels::Level;

/// Destination of packed panels.
#[derive(Clone, Copy)]
pub(super) struct Panels {
    pub first: *mut u32,
    /// Distance between panels, in units.
    pub stride: usize,
}

impl Operand {
    /// Returns the number of units along the inner dimension.
    pub(super) fn units(&self, kind: Kind) -> usize {
        self.inner.div_ceil(kind.numbers())
    }

    /// Packs `units` of some lines as panels `[units, W]`. If the last unit is only half filled,
    /// its other number is zero. Lines of a panel beyond the last line of the operand are
    /// unspecified.
    ///
    /// # Safety
    /// The operand must have these lines and units, at least one of each, in live memory, and there
    /// must be room for the panels.
    pub(super) unsafe fn pack<const W: usize>(
        self,
        #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))] level: Level,
        kind: Kind,
        lines: Range<usize>,
        units: Range<usize>,
        panels: Panels,
    ) {
        let step = units.start * kind.numbers();
        let part = Self {
            inner: (self.inner - step).min(units.len() * kind.numbers()),
            ..self.from(lines.start, step)
        };
        let lines = lines.len();
        #[cfg(target_arch = "x86_64")]
        if kind.is_fast(level) && (part.step == 1 || part.line == 1) {
            // SAFETY: the caller upholds this function's contract. One of the strides is 1, and the
            // processor has the instructions, as checked above.
            unsafe {
                match (kind, part.first) {
                    (Kind::F32, Numbers::F32(at)) => {
                        return avx512::f32_of_f32::<W>(part, at, lines, panels);
                    }
                    (Kind::F32, Numbers::Bf16(at)) => {
                        return avx512::f32_of_bf16::<W>(part, at.cast(), lines, panels);
                    }
                    (Kind::F32, Numbers::F16(at)) => {
                        return avx512::f32_of_f16::<W>(part, at.cast(), lines, panels);
                    }
                    (Kind::Bf16, Numbers::F32(at)) => {
                        return avx512::bf16_of_f32::<W>(part, at, lines, panels);
                    }
                    (Kind::Bf16, Numbers::Bf16(at)) => {
                        return avx512::bf16_of_bf16::<W>(part, at.cast(), lines, panels);
                    }
                    (Kind::Bf16, Numbers::F16(_)) => {}
                }
            }
        }
        // SAFETY: the caller upholds this function's contract.
        unsafe { part.pack_any::<W>(kind, lines, panels) }
    }

    /// Packs number by number.
    ///
    /// # Safety
    /// As for [`Operand::pack`].
    unsafe fn pack_any<const W: usize>(self, kind: Kind, lines: usize, panels: Panels) {
        for (unit, line) in
            (0..self.units(kind)).flat_map(|unit| (0..lines).map(move |line| (unit, line)))
        {
            // SAFETY: the caller upholds this function's contract.
            unsafe {
                let bits = match kind {
                    Kind::F32 => self.value(line, unit).to_bits(),
                    Kind::Bf16 => {
                        let bits = |step: usize| {
                            u32::from(bf16::from_f32(self.value(line, step)).to_bits())
                        };
                        bits(2 * unit)
                            | if 2 * unit + 1 < self.inner {
                                bits(2 * unit + 1) << 16
                            } else {
                                0
                            }
                    }
                };
                panels
                    .first
                    .add(line / W * panels.stride + unit * W + line % W)
                    .write(bits);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m256i, __m512i, __mmask16, __mmask32, _MM_HINT_T0, _mm_prefetch,
        _mm256_maskz_loadu_epi16, _mm512_castps_si512, _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh,
        _mm512_cvtneps_pbh, _mm512_cvtph_ps, _mm512_mask_storeu_epi32, _mm512_maskz_loadu_epi16,
        _mm512_maskz_loadu_ps, _mm512_or_si512, _mm512_setzero_si512, _mm512_shuffle_i32x4,
        _mm512_slli_epi32, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32,
        _mm512_unpacklo_epi64,
    };

    use super::{Operand, Panels};

    /// Prefetch distance, in steps along the inner dimension, used if each step is on its own cache
    /// line.
    const AHEAD: isize = 16;

    /// Returns the mask of the first `n` of sixteen lanes.
    fn first(n: usize) -> __mmask16 {
        ((1_u32 << n.min(16)) - 1) as __mmask16
    }

    /// Transposes sixteen lines of sixteen units.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn transpose(lines: &mut [__m512i; 16]) {
        let mut pairs = [_mm512_setzero_si512(); 16];
        for i in 0..8 {
            pairs[2 * i] = _mm512_unpacklo_epi32(lines[2 * i], lines[2 * i + 1]);
            pairs[2 * i + 1] = _mm512_unpackhi_epi32(lines[2 * i], lines[2 * i + 1]);
        }
        // Quarter `q` of `fours[4 * g + j]` is step `4 * q + j` of lines `4 * g..4 * g + 4`.
        let mut fours = [_mm512_setzero_si512(); 16];
        for g in 0..4 {
            for j in 0..2 {
                fours[4 * g + 2 * j] =
                    _mm512_unpacklo_epi64(pairs[4 * g + j], pairs[4 * g + 2 + j]);
                fours[4 * g + 2 * j + 1] =
                    _mm512_unpackhi_epi64(pairs[4 * g + j], pairs[4 * g + 2 + j]);
            }
        }
        for j in 0..4 {
            let even = _mm512_shuffle_i32x4::<0x88>(fours[j], fours[4 + j]);
            let odd = _mm512_shuffle_i32x4::<0xDD>(fours[j], fours[4 + j]);
            let even_high = _mm512_shuffle_i32x4::<0x88>(fours[8 + j], fours[12 + j]);
            let odd_high = _mm512_shuffle_i32x4::<0xDD>(fours[8 + j], fours[12 + j]);
            lines[j] = _mm512_shuffle_i32x4::<0x88>(even, even_high);
            lines[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd, odd_high);
            lines[8 + j] = _mm512_shuffle_i32x4::<0xDD>(even, even_high);
            lines[12 + j] = _mm512_shuffle_i32x4::<0xDD>(odd, odd_high);
        }
    }

    /// Defines a function that packs one number format as one kind of unit. `$along` loads at most
    /// 16 units from numbers that are contiguous along the inner dimension. `$across` loads one
    /// unit of at most 16 lines that are contiguous.
    macro_rules! pack {
        ($features:literal, $name:ident, $number:ty, $per_unit:literal, $along:ident, $across:ident) => {
            /// # Safety
            /// As for `Operand::pack`, and one of the strides must be 1.
            #[target_feature(enable = $features)]
            #[allow(clippy::needless_range_loop)] // as in the tiles
            pub(super) unsafe fn $name<const W: usize>(
                from: Operand,
                at: *const $number,
                lines: usize,
                panels: Panels,
            ) {
                let units = from.inner.div_ceil($per_unit);
                // Groups of up to sixteen lines within a panel: the first line and the number of
                // lines.
                let groups = (0..lines).step_by(W).flat_map(|line| {
                    (0..W.min(lines - line))
                        .step_by(16)
                        .map(move |group| (line, group, (W.min(lines - line) - group).min(16)))
                });
                let place = |line: usize, group: usize| {
                    panels.first.wrapping_add(line / W * panels.stride + group)
                };
                if from.step == 1 {
                    for (line, group, n) in groups {
                        let at = at.wrapping_offset((line + group) as isize * from.line);
                        for unit in (0..units).step_by(16) {
                            let at = at.wrapping_add(unit * $per_unit);
                            let numbers = (from.inner - unit * $per_unit).min(16 * $per_unit);
                            let mut block = [_mm512_setzero_si512(); 16];
                            for i in 0..16 {
                                // A missing line is read as the last existing line, so that no
                                // branch is needed.
                                if i < if W < 16 { W } else { 16 } {
                                    let line = i.min(n - 1) as isize * from.line;
                                    // SAFETY: this line has `numbers` numbers from here on.
                                    block[i] = unsafe { $along(at.wrapping_offset(line), numbers) };
                                }
                            }
                            transpose(&mut block);
                            let count = (units - unit).min(16);
                            for (i, block) in block.into_iter().enumerate() {
                                if i < count {
                                    // SAFETY: the caller guarantees room for the panel, which has
                                    // `W - group` lines from here on.
                                    unsafe {
                                        let out = place(line, group).add((unit + i) * W);
                                        _mm512_mask_storeu_epi32(
                                            out.cast(),
                                            first(W - group),
                                            block,
                                        );
                                    }
                                }
                            }
                        }
                    }
                } else {
                    // Go through all panels unit by unit, which is the order in which memory is
                    // contiguous.
                    for unit in 0..units {
                        let at = at.wrapping_offset((unit * $per_unit) as isize * from.step);
                        let some = unit * $per_unit + 1 < from.inner;
                        for (line, group, n) in groups.clone() {
                            let at = at.wrapping_add(line + group);
                            let next = some.then(|| at.wrapping_offset(from.step));
                            // SAFETY: this many lines exist, and there is room as above. A
                            // prefetched address need not exist.
                            unsafe {
                                _mm_prefetch::<_MM_HINT_T0>(
                                    at.wrapping_offset(AHEAD * from.step).cast(),
                                );
                                let out = place(line, group).add(unit * W);
                                _mm512_mask_storeu_epi32(
                                    out.cast(),
                                    first(W - group),
                                    $across(at, next, n),
                                );
                            }
                        }
                    }
                }
            }
        };
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn f32s(at: *const f32, n: usize) -> __m512i {
        // SAFETY: the caller guarantees that `n` numbers are readable; masked lanes are not read.
        _mm512_castps_si512(unsafe { _mm512_maskz_loadu_ps(first(n), at) })
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn f32s_across(at: *const f32, _: Option<*const f32>, n: usize) -> __m512i {
        // SAFETY: the caller guarantees that `n` numbers are readable.
        unsafe { f32s(at, n) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn halves(at: *const i16, n: usize) -> __m256i {
        // SAFETY: the caller guarantees that `n` numbers are readable; masked lanes are not read.
        unsafe { _mm256_maskz_loadu_epi16(first(n), at) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn bf16s(at: *const i16, n: usize) -> __m512i {
        // SAFETY: the caller guarantees that `n` numbers are readable.
        _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(unsafe { halves(at, n) }))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn bf16s_across(at: *const i16, _: Option<*const i16>, n: usize) -> __m512i {
        // SAFETY: the caller guarantees that `n` numbers are readable.
        unsafe { bf16s(at, n) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn f16s(at: *const i16, n: usize) -> __m512i {
        // SAFETY: the caller guarantees that `n` numbers are readable.
        _mm512_castps_si512(_mm512_cvtph_ps(unsafe { halves(at, n) }))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn f16s_across(at: *const i16, _: Option<*const i16>, n: usize) -> __m512i {
        // SAFETY: the caller guarantees that `n` numbers are readable.
        unsafe { f16s(at, n) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn bf16_pairs(at: *const i16, n: usize) -> __m512i {
        // SAFETY: the caller guarantees that `n` numbers are readable; masked lanes are not read.
        unsafe { _mm512_maskz_loadu_epi16(((1_u64 << n.min(32)) - 1) as __mmask32, at) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn bf16_pairs_across(at: *const i16, next: Option<*const i16>, n: usize) -> __m512i {
        // SAFETY: the caller guarantees that `n` numbers are readable.
        unsafe {
            let low = _mm512_cvtepu16_epi32(halves(at, n));
            next.map_or(low, |next| _mm512_or_si512(low, bf16s(next, n)))
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn rounded_pairs(at: *const f32, n: usize) -> __m512i {
        // SAFETY: the caller guarantees that `n` numbers are readable; both types are plain 512-bit
        // values.
        unsafe {
            let low = _mm512_maskz_loadu_ps(first(n), at);
            let high = _mm512_maskz_loadu_ps(first(n.saturating_sub(16)), at.wrapping_add(16));
            std::mem::transmute(_mm512_cvtne2ps_pbh(high, low))
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn rounded_pairs_across(at: *const f32, next: Option<*const f32>, n: usize) -> __m512i {
        // SAFETY: the caller guarantees that `n` numbers are readable; both types are plain 256-bit
        // values.
        unsafe {
            let rounded = |at| {
                let bits: __m256i =
                    std::mem::transmute(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first(n), at)));
                _mm512_cvtepu16_epi32(bits)
            };
            let low = rounded(at);
            next.map_or(low, |next| {
                _mm512_or_si512(low, _mm512_slli_epi32::<16>(rounded(next)))
            })
        }
    }

    pack!(
        "avx512f,avx512bw,avx512vl",
        f32_of_f32,
        f32,
        1,
        f32s,
        f32s_across
    );
    pack!(
        "avx512f,avx512bw,avx512vl",
        f32_of_bf16,
        i16,
        1,
        bf16s,
        bf16s_across
    );
    pack!(
        "avx512f,avx512bw,avx512vl",
        f32_of_f16,
        i16,
        1,
        f16s,
        f16s_across
    );
    pack!(
        "avx512f,avx512bw,avx512vl,avx512bf16",
        bf16_of_f32,
        f32,
        2,
        rounded_pairs,
        rounded_pairs_across
    );
    pack!(
        "avx512f,avx512bw,avx512vl,avx512bf16",
        bf16_of_bf16,
        i16,
        2,
        bf16_pairs,
        bf16_pairs_across
    );
}
