//! What puts stored numbers at their columns: for each byte of a mask, which of the stored ones belongs to each of its eight columns.

use std::arch::aarch64::*;

/// An index that `tbl` answers with 0, and `tbx` with what was there.
const NONE: u8 = 0xFF;

/// For each byte of a mask the index of each column's number among the stored ones, from `first` on.
const fn indices(first: u8) -> [[u8; 8]; 256] {
    let mut table = [[NONE; 8]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut column, mut stored) = (0, first);
        while column < 8 {
            if mask >> column & 1 == 1 {
                table[mask][column] = stored;
                stored += 1;
            }
            column += 1;
        }
        mask += 1;
    }
    table
}

/// The same of numbers of two bytes.
const fn pairs() -> [[u8; 16]; 256] {
    let of_bytes = indices(0);
    let mut table = [[NONE; 16]; 256];
    let mut mask = 0;
    while mask < 256 {
        let mut column = 0;
        while column < 8 {
            let stored = of_bytes[mask][column];
            if stored != NONE {
                table[mask][2 * column] = 2 * stored;
                table[mask][2 * column + 1] = 2 * stored + 1;
            }
            column += 1;
        }
        mask += 1;
    }
    table
}

/// Indices of bytes, for the first half of a vector.
static FIRST: [[u8; 8]; 256] = indices(0);
/// Indices of bytes, for the second half, whose stored ones begin at byte 8.
static SECOND: [[u8; 8]; 256] = indices(8);
/// Indices of pairs of bytes.
static PAIRS: [[u8; 16]; 256] = pairs();

/// A mask of 64 columns, and how many are stored before each eight of them.
#[derive(Clone, Copy)]
pub(super) struct Word {
    bits: u64,
    /// A byte for each eight columns.
    before: u64,
    /// Stored numbers of all columns.
    pub stored: usize,
}

impl Word {
    #[inline(always)]
    pub fn new(bits: u64) -> Self {
        // SAFETY: every caller has NEON.
        let counts = unsafe { vget_lane_u64::<0>(vreinterpret_u64_u8(vcnt_u8(vcreate_u8(bits)))) };
        // Each byte becomes the sum of those up to it, at most 64.
        let sums = counts.wrapping_mul(0x0101_0101_0101_0101);
        Self {
            bits,
            before: sums << 8,
            stored: (sums >> 56) as usize,
        }
    }

    /// The mask of eight columns, and what is stored before them: at most 8 for each of the eights before.
    #[inline(always)]
    fn part(self, eight: usize) -> (usize, usize) {
        (
            usize::from((self.bits >> (8 * eight)) as u8),
            usize::from((self.before >> (8 * eight)) as u8),
        )
    }

    /// Numbers of two bytes at their columns, eight of them, zeros where none is stored.
    ///
    /// # Safety
    /// From `values` on 128 bytes are there, and `eight < 8`.
    #[inline(always)]
    pub unsafe fn pairs(self, values: *const u8, eight: usize) -> uint16x8_t {
        let (mask, before) = self.part(eight);
        // SAFETY: at most 8 numbers for each of the eights before, so that 16 bytes are in the 128.
        unsafe {
            let stored = vld1q_u8(values.add(2 * before));
            vreinterpretq_u16_u8(vqtbl1q_u8(stored, vld1q_u8(PAIRS[mask].as_ptr())))
        }
    }

    /// Halves of bytes, the high ones or the low ones, at their columns, with what is in `others` where none is stored.
    ///
    /// # Safety
    /// From `codes` on 64 bytes are there.
    #[inline(always)]
    pub unsafe fn halves<const HIGH: bool>(
        self,
        codes: *const u8,
        others: [uint8x16_t; 4],
    ) -> [int8x16_t; 4] {
        let [a, b, c, d] = others;
        // SAFETY: the caller's promise.
        unsafe {
            [
                self.sixteen::<HIGH, 0>(codes, a),
                self.sixteen::<HIGH, 1>(codes, b),
                self.sixteen::<HIGH, 2>(codes, c),
                self.sixteen::<HIGH, 3>(codes, d),
            ]
        }
    }

    /// # Safety
    /// As above, and `SIXTEEN < 4`.
    #[inline(always)]
    unsafe fn sixteen<const HIGH: bool, const SIXTEEN: usize>(
        self,
        codes: *const u8,
        others: uint8x16_t,
    ) -> int8x16_t {
        let (first, second) = (self.part(2 * SIXTEEN), self.part(2 * SIXTEEN + 1));
        // SAFETY: at most 8 bytes for each of the eights before, so that 8 bytes are in the 64.
        unsafe {
            let stored = vcombine_u8(vld1_u8(codes.add(first.1)), vld1_u8(codes.add(second.1)));
            let indices = vcombine_u8(
                vld1_u8(FIRST[first.0].as_ptr()),
                vld1_u8(SECOND[second.0].as_ptr()),
            );
            let stored = if HIGH {
                vshrq_n_u8::<4>(stored)
            } else {
                vandq_u8(stored, vdupq_n_u8(0x0F))
            };
            vreinterpretq_s8_u8(vqtbx1q_u8(others, stored, indices))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_of_a_mask_finds_its_columns() {
        let stored: [u8; 128] = std::array::from_fn(|index| index as u8 ^ 0x5A);
        // Each byte beside three others, at each place.
        for byte in 0..=255_u8 {
            let neighbours = [0, 0x6B, 0xFF, 0x10][usize::from(byte % 4)];
            let bytes: [u8; 8] =
                std::array::from_fn(|k| if k % 3 == 1 { byte } else { neighbours });
            let word = Word::new(u64::from_le_bytes(bytes));
            let mut next = 0;
            for column in 0..64 {
                let set = bytes[column / 8] >> (column % 8) & 1 == 1;
                let mut halves = [[0_i8; 64]; 2];
                let mut pairs = [0; 8];
                // SAFETY: 128 bytes are there; arrays of 64 and 16 bytes are written.
                unsafe {
                    let others = [vdupq_n_u8(0x77); 4];
                    let [low, high] = [
                        word.halves::<false>(stored.as_ptr(), others),
                        word.halves::<true>(stored.as_ptr(), others),
                    ];
                    for sixteen in 0..4 {
                        vst1q_s8(halves[0].as_mut_ptr().add(16 * sixteen), low[sixteen]);
                        vst1q_s8(halves[1].as_mut_ptr().add(16 * sixteen), high[sixteen]);
                    }
                    vst1q_u16(pairs.as_mut_ptr(), word.pairs(stored.as_ptr(), column / 8));
                }
                let (low, high) = if set {
                    (stored[next] & 15, stored[next] >> 4)
                } else {
                    (0x77, 0x77)
                };
                assert_eq!(
                    [halves[0][column] as u8, halves[1][column] as u8],
                    [low, high]
                );
                let pair = [stored[(2 * next).min(127)], stored[(2 * next + 1).min(127)]];
                assert_eq!(
                    pairs[column % 8],
                    if set { u16::from_le_bytes(pair) } else { 0 }
                );
                next += usize::from(set);
            }
            assert_eq!(word.stored, next);
        }
    }
}
