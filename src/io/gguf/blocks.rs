//! The tensor types of ggml.
//!
//! A block is decoded into small integers `q` and, for each group of them, a scale and a minimum:
//! `x = scale * q + min`. Dequantization computes that sum. If the minimum is an integer multiple
//! of the scale, the integers are also the codes of a [`QuantizedMatrix`].

use half::f16;
use rayon::prelude::*;

use crate::error::Result;
use crate::format::{QuantizedMatrix, QuantizedParts};
use crate::io::tensors::DType;

/// Numbers in the largest block.
const LARGEST: usize = 256;
/// Groups in the largest block.
const GROUPS: usize = 16;
/// Numbers per parallel task.
const PARALLEL_CHUNK: usize = 1 << 16;

/// Scale and minimum of a group.
#[derive(Clone, Copy, Default)]
struct Group {
    scale: f32,
    min: f32,
}

/// A type that stores numbers in blocks.
pub(crate) struct BlockType {
    /// Name in ggml.
    pub name: &'static str,
    /// Numbers in a block.
    pub len: usize,
    /// Bytes in a block.
    pub bytes: usize,
    /// Numbers in a group.
    group: usize,
    /// Bits of a code.
    bits: u8,
    /// Whether groups have a minimum. Without one, the integers are signed.
    has_min: bool,
    decode: fn(&[u8], &mut [i8], &mut [Group]),
}

impl std::fmt::Debug for BlockType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// Encoding of a tensor's numbers.
#[derive(Clone, Copy, Debug)]
pub(in crate::io) enum Encoding {
    Plain(DType),
    Blocks(&'static BlockType),
}

/// Types that store each number by itself, with their ids in ggml.
const PLAIN: [(u32, DType); 4] = [
    (0, DType::F32),
    (1, DType::F16),
    (28, DType::F64),
    (30, DType::BF16),
];

impl Encoding {
    /// Finds the encoding of a ggml type. The error is the name of the type, if it has one.
    pub fn from_id(id: u32) -> Result<Self, String> {
        if let Some((_, dtype)) = PLAIN.iter().find(|row| row.0 == id) {
            return Ok(Self::Plain(*dtype));
        }
        if let Some((_, blocks)) = BLOCKS.iter().find(|row| row.0 == id) {
            return Ok(Self::Blocks(blocks));
        }
        Err(match UNREAD.iter().find(|row| row.0 == id) {
            Some((_, name)) => (*name).into(),
            None => format!("number {id}"),
        })
    }

    /// Id of the type in ggml.
    pub fn id(self) -> u32 {
        let id = match self {
            Self::Plain(dtype) => PLAIN.iter().find(|row| row.1 == dtype).map(|row| row.0),
            Self::Blocks(blocks) => {
                let same = |row: &&(u32, BlockType)| std::ptr::eq(&row.1, blocks);
                BLOCKS.iter().find(same).map(|row| row.0)
            }
        };
        // Every encoding comes from `from_id`, which takes the same types.
        id.unwrap_or(u32::MAX)
    }

    /// Numbers and bytes in a block.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::Plain(dtype) => (1, dtype.size()),
            Self::Blocks(blocks) => (blocks.len, blocks.bytes),
        }
    }

    /// Name of the dtype or of the block type.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain(dtype) => dtype.name(),
            Self::Blocks(blocks) => blocks.name,
        }
    }

    /// Dtype of the loaded numbers.
    pub fn dtype(self) -> DType {
        match self {
            Self::Plain(dtype) => dtype,
            Self::Blocks(_) => DType::F32,
        }
    }
}

macro_rules! blocks {
    ($(
        $id:literal $name:literal $len:literal $bytes:literal
        $group:literal $bits:literal $min:literal $decode:path;
    )*) => {
        /// Implemented types, with their ids in ggml.
        static BLOCKS: &[(u32, BlockType)] = &[$(($id, BlockType {
            name: $name,
            len: $len,
            bytes: $bytes,
            group: $group,
            bits: $bits,
            has_min: $min,
            decode: $decode,
        })),*];
    };
}

blocks! {
    2 "Q4_0" 32 18 32 4 false q4_0;
    3 "Q4_1" 32 20 32 4 true q4_1;
    6 "Q5_0" 32 22 32 8 false q5_0;
    7 "Q5_1" 32 24 32 8 true q5_1;
    8 "Q8_0" 32 34 32 8 false q8_0;
    10 "Q2_K" 256 84 16 2 true q2_k;
    11 "Q3_K" 256 110 16 4 false q3_k;
    12 "Q4_K" 256 144 32 4 true q4_k;
    13 "Q5_K" 256 176 32 8 true q5_k;
    14 "Q6_K" 256 210 16 8 false q6_k;
    20 "IQ4_NL" 32 18 32 8 false iq4_nl;
    23 "IQ4_XS" 256 136 32 8 false iq4_xs;
}

/// Names of the types that are not implemented.
const UNREAD: [(u32, &str); 21] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (41, "Q1_0"),
    (42, "Q2_0"),
    (4, "Q4_2"),
    (5, "Q4_3"),
];

impl BlockType {
    /// Dequantizes whole blocks.
    pub fn dequantize(&self, bytes: &[u8], out: &mut [f32]) {
        let blocks = bytes
            .chunks_exact(self.bytes)
            .zip(out.chunks_exact_mut(self.len));
        for (block, out) in blocks {
            let (mut q, mut groups) = ([0; LARGEST], [Group::default(); GROUPS]);
            (self.decode)(block, &mut q[..self.len], &mut groups);
            let parts = out
                .chunks_exact_mut(self.group)
                .zip(q.chunks_exact(self.group));
            for ((out, q), group) in parts.zip(groups) {
                for (out, q) in out.iter_mut().zip(q) {
                    *out = group.scale * f32::from(*q) + group.min;
                }
            }
        }
    }

    /// Converts the rows of a matrix to codes of exactly the same values. Returns `None` if the
    /// minimum of a group is not a multiple of its scale.
    ///
    /// # Errors
    /// Returns an error if a scale is not finite.
    pub fn quantized(&self, rows: &[&[u8]], cols: usize) -> Result<Option<QuantizedMatrix>> {
        let groups = cols / self.group;
        let mut codes = vec![0; rows.len() * cols];
        let mut scales = vec![0.0; rows.len() * groups];
        let mut zeros = vec![0; rows.len() * groups];
        let row_bytes = cols / self.len * self.bytes;
        let exact = codes
            .par_chunks_mut(cols.max(1))
            .zip(scales.par_chunks_mut(groups.max(1)))
            .zip(zeros.par_chunks_mut(groups.max(1)))
            .zip(rows)
            .with_min_len(PARALLEL_CHUNK.div_ceil(cols.max(1)))
            .all(|(((codes, scales), zeros), row)| {
                row.len() == row_bytes && self.codes_of_row(row, codes, scales, zeros)
            });
        if !exact {
            return Ok(None);
        }
        let middle = 1 << (self.bits - 1);
        QuantizedMatrix::new(QuantizedParts {
            rows: rows.len(),
            cols,
            bits: self.bits,
            group_size: self.group,
            symmetric: zeros.iter().all(|zero| *zero == middle),
            codes,
            scales,
            zeros,
            group_of: None,
        })
        .map(Some)
    }

    /// Writes codes, scales and zero points of a row. Returns whether they have its exact values.
    fn codes_of_row(
        &self,
        row: &[u8],
        codes: &mut [u8],
        scales: &mut [f32],
        zeros: &mut [u8],
    ) -> bool {
        let per_block = self.len / self.group;
        let blocks = row
            .chunks_exact(self.bytes)
            .zip(codes.chunks_exact_mut(self.len))
            .zip(
                scales
                    .chunks_exact_mut(per_block)
                    .zip(zeros.chunks_exact_mut(per_block)),
            );
        for ((block, codes), (scales, zeros)) in blocks {
            let (mut q, mut groups) = ([0; LARGEST], [Group::default(); GROUPS]);
            (self.decode)(block, &mut q[..self.len], &mut groups);
            let parts = codes
                .chunks_exact_mut(self.group)
                .zip(q.chunks_exact(self.group));
            let grid = scales.iter_mut().zip(zeros).zip(groups);
            for ((codes, q), ((scale, zero), group)) in parts.zip(grid) {
                let Some((of_group, of_zero)) = self.group_codes(q, group, codes) else {
                    return false;
                };
                (*scale, *zero) = (of_group, of_zero);
            }
        }
        true
    }

    /// Writes the codes of a group. Returns its scale, which is not negative, and its zero point.
    fn group_codes(&self, q: &[i8], group: Group, codes: &mut [u8]) -> Option<(f32, u8)> {
        let top = i16::from(u8::MAX >> (8 - self.bits));
        let middle = (top + 1) / 2;
        let Group { scale, min } = group;
        if !self.has_min {
            // If the scale is negative, scale and integers change their signs. The 4-bit integer -8
            // becomes 8, which only fits with a zero point that is lower by 1.
            let sign = if scale < 0.0 { -1 } else { 1 };
            let fits = |zero: i16| {
                let mut all = q.iter().map(|q| zero + sign * i16::from(*q));
                all.all(|code| (0..=top).contains(&code))
            };
            let zero = if fits(middle) { middle } else { middle - 1 };
            for (code, q) in codes.iter_mut().zip(q) {
                *code = u8::try_from(zero + sign * i16::from(*q)).ok()?;
            }
            return Some((scale.abs(), zero as u8));
        }
        for (code, q) in codes.iter_mut().zip(q) {
            *code = q.cast_unsigned();
        }
        if min == 0.0 && scale >= 0.0 {
            return Some((scale, 0));
        }
        let zero = -min / scale;
        let exact = scale > 0.0
            && (0.0..=f32::from(top)).contains(&zero)
            && zero.fract() == 0.0
            && scale * zero == -min;
        exact.then_some((scale, zero as u8))
    }
}

/// Dequantizes rows of `cols` numbers.
pub(super) fn dequantize_rows(encoding: &BlockType, rows: &[&[u8]], cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; rows.len() * cols];
    out.par_chunks_mut(cols.max(1))
        .zip(rows)
        .with_min_len(PARALLEL_CHUNK.div_ceil(cols.max(1)))
        .for_each(|(out, row)| encoding.dequantize(row, out));
    out
}

fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Unpacks the low four bits of all bytes, then the high ones.
fn nibbles(bytes: &[u8], q: &mut [i8]) {
    let (low, high) = q.split_at_mut(bytes.len());
    for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
        (*low, *high) = ((byte & 15) as i8, (byte >> 4) as i8);
    }
}

/// Sets the fifth bit of each of 32 integers.
fn fifth_bits(bytes: &[u8], q: &mut [i8]) {
    for (index, q) in q.iter_mut().enumerate() {
        *q |= ((bytes[index / 8] >> (index % 8) & 1) << 4) as i8;
    }
}

fn q4_0(block: &[u8], q: &mut [i8], groups: &mut [Group]) {
    nibbles(&block[2..18], q);
    q.iter_mut().for_each(|q| *q -= 8);
    groups[0].scale = half(block, 0);
}

fn q4_1(block: &[u8], q: &mut [i8], groups: &mut [Group]) {
    nibbles(&block[4..20], q);
    groups[0] = Group {
        scale: half(block, 0),
        min: half(block, 2),
    };
}

fn q5_0(block: &[u8], q: &mut [i8], groups: &mut [Group]) {
    nibbles(&block[6..22], q);
    fifth_bits(&block[2..6], q);
    q.iter_mut().for_each(|q| *q -= 16);
    groups[0].scale = half(block, 0);
}

fn q5_1(block: &[u8], q: &mut [i8], groups: &mut [Group]) {
    nibbles(&block[8..24], q);
    fifth_bits(&block[4..8], q);
    groups[0] = Group {
        scale: half(block, 0),
        min: half(block, 2),
    };
}

fn q8_0(block: &[u8], q: &mut [i8], groups: &mut [Group]) {
    for (q, byte) in q.iter_mut().zip(&block[2..34]) {
        *q = byte.cast_signed();
    }
    groups[0].scale = half(block, 0);
}

/// Two bits of number `index` of 256, packed in 64 bytes.
fn two_bits(bytes: &[u8], index: usize) -> u8 {
    bytes[index / 128 * 32 + index % 32] >> (index / 32 % 4 * 2) & 3
}

fn q2_k(block: &[u8], q: &mut [i8], groups: &mut [Group]) {
    for (index, q) in q.iter_mut().enumerate() {
        *q = two_bits(&block[16..80], index) as i8;
    }
    let (d, dmin) = (half(block, 80), half(block, 82));
    for (group, scales) in groups.iter_mut().zip(&block[..16]) {
        *group = Group {
            scale: d * f32::from(scales & 15),
            min: -(dmin * f32::from(scales >> 4)),
        };
    }
}

fn q3_k(block: &[u8], q: &mut [i8], groups: &mut [Group]) {
    for (index, q) in q.iter_mut().enumerate() {
        let high = block[index % 32] >> (index / 32) & 1;
        *q = two_bits(&block[32..96], index) as i8 - 4 * (1 - high.cast_signed());
    }
    let (scales, d) = (&block[96..108], half(block, 108));
    for (index, group) in groups.iter_mut().enumerate() {
        let low = scales[index % 8] >> (index / 8 * 4) & 15;
        let high = scales[8 + index % 4] >> (index / 4 * 2) & 3;
        group.scale = d * f32::from((low | high << 4) as i8 - 32);
    }
}

/// Reads the scales and minima of `Q4_K` and `Q5_K`, of 6 bits each.
fn scales_and_minima(block: &[u8], groups: &mut [Group]) {
    let (d, dmin, s) = (half(block, 0), half(block, 2), &block[4..16]);
    for (j, group) in groups.iter_mut().take(8).enumerate() {
        let (scale, min) = if j < 4 {
            (s[j] & 63, s[j + 4] & 63)
        } else {
            (
                s[j + 4] & 15 | (s[j - 4] >> 6) << 4,
                s[j + 4] >> 4 | (s[j] >> 6) << 4,
            )
        };
        *group = Group {
            scale: d * f32::from(scale),
            min: -(dmin * f32::from(min)),
        };
    }
}

fn q4_k(block: &[u8], q: &mut [i8], groups: &mut [Group]) {
    scales_and_minima(block, groups);
    for (bytes, q) in block[16..144].chunks_exact(32).zip(q.chunks_exact_mut(64)) {
        nibbles(bytes, q);
    }
}

fn q5_k(block: &[u8], q: &mut [i8], groups: &mut [Group]) {
    scales_and_minima(block, groups);
    for (bytes, q) in block[48..176].chunks_exact(32).zip(q.chunks_exact_mut(64)) {
        nibbles(bytes, q);
    }
    for (index, q) in q.iter_mut().enumerate() {
        *q |= ((block[16 + index % 32] >> (index / 32) & 1) << 4) as i8;
    }
}

fn q6_k(block: &[u8], q: &mut [i8], groups: &mut [Group]) {
    for (half, q) in q.chunks_exact_mut(128).enumerate() {
        nibbles(&block[64 * half..64 * half + 64], q);
        let high = &block[128 + 32 * half..160 + 32 * half];
        for (index, q) in q.iter_mut().enumerate() {
            let high = high[index % 32] >> (index / 32 * 2) & 3;
            *q = (*q | (high << 4) as i8) - 32;
        }
    }
    let d = half(block, 208);
    for (group, scale) in groups.iter_mut().zip(&block[192..208]) {
        group.scale = d * f32::from(scale.cast_signed());
    }
}

/// Levels of `IQ4_NL` and `IQ4_XS`.
const LEVELS: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

fn levels(bytes: &[u8], q: &mut [i8]) {
    nibbles(bytes, q);
    q.iter_mut().for_each(|q| *q = LEVELS[(*q & 15) as usize]);
}

fn iq4_nl(block: &[u8], q: &mut [i8], groups: &mut [Group]) {
    levels(&block[2..18], q);
    groups[0].scale = half(block, 0);
}

fn iq4_xs(block: &[u8], q: &mut [i8], groups: &mut [Group]) {
    let d = half(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    let parts = block[8..136].chunks_exact(16).zip(q.chunks_exact_mut(32));
    for ((index, (bytes, q)), group) in parts.enumerate().zip(groups) {
        levels(bytes, q);
        let low = block[4 + index / 2] >> (index % 2 * 4) & 15;
        let scale = low | ((high >> (2 * index) & 3) << 4) as u8;
        group.scale = d * f32::from(scale.cast_signed() - 32);
    }
}
