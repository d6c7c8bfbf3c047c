//! From numbers or codes to blocks.
//!
//! Numbers are rounded as ggml's reference quantizers round them (without an importance matrix), so
//! that the blocks are those of `llama-quantize`. Sums are not fused; a build of ggml that fuses
//! multiplication and addition may differ in the last bit of a scale.
//!
//! Codes on a grid are never rounded: [`exact`] makes blocks of exactly the same values, or none.

use half::f16;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::format::QuantizedMatrix;

/// Numbers in a block of `Q4_0`, `Q4_1` and `Q8_0`.
const SMALL: usize = 32;
/// Numbers in a block of `Q6_K`, and those that share a scale in it.
const LARGE: usize = 256;
const GROUP: usize = 16;
/// Scales below this count as zero in `Q6_K`.
const SMALLEST_SCALE: f32 = 1e-15;

/// A block type that can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Q4_0,
    Q4_1,
    Q8_0,
    Q6K,
}

impl Kind {
    /// Numbers and bytes in a block.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::Q4_0 => (SMALL, 18),
            Self::Q4_1 => (SMALL, 20),
            Self::Q8_0 => (SMALL, 34),
            Self::Q6K => (LARGE, 210),
        }
    }

    /// Rounds the numbers of one block.
    fn round(self, x: &[f32], out: &mut [u8]) {
        match self {
            Self::Q4_0 => q4_0(x, out),
            Self::Q4_1 => q4_1(x, out),
            Self::Q8_0 => q8_0(x, out),
            Self::Q6K => q6_k(x, out),
        }
    }
}

/// Rounds a matrix of finite numbers, row-major, whose rows are whole blocks.
///
/// # Errors
/// Returns [`Error::TensorOverflow`], naming `tensor`, if a scale is beyond the range of `f16`.
pub(super) fn round(tensor: &str, kind: Kind, values: &[f32]) -> Result<Vec<u8>> {
    let (len, bytes) = kind.block();
    let mut out = vec![0; values.len() / len * bytes];
    out.par_chunks_mut(bytes)
        .zip(values.par_chunks_exact(len))
        .with_min_len(64)
        .for_each(|(out, x)| kind.round(x, out));
    let infinite = |block: &[u8]| {
        let at = |at: usize| !f16::from_le_bytes([block[at], block[at + 1]]).is_finite();
        match kind {
            Kind::Q4_0 | Kind::Q8_0 => at(0),
            Kind::Q4_1 => at(0) || at(2),
            Kind::Q6K => at(208),
        }
    };
    if let Some(block) = out.chunks_exact(bytes).position(infinite) {
        return Err(Error::TensorOverflow {
            tensor: tensor.into(),
            index: block * len,
            value: largest(&values[block * len..(block + 1) * len]),
            dtype: "F16 (the scale of a block)",
        });
    }
    Ok(out)
}

fn put_half(value: f32, out: &mut [u8]) {
    out[..2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

/// Packs 32 codes of 4 bits: number `j` with number `j + 16`.
fn put_nibbles(code: impl Fn(usize) -> u8, out: &mut [u8]) {
    for (j, byte) in out.iter_mut().enumerate() {
        *byte = code(j) | code(j + SMALL / 2) << 4;
    }
}

/// The first number of the largest magnitude.
fn largest(x: &[f32]) -> f32 {
    x.iter().fold(
        0.0,
        |max: f32, x| if x.abs() > max.abs() { *x } else { max },
    )
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

fn q4_0(x: &[f32], out: &mut [u8]) {
    let d = largest(x) / -8.0;
    let inverse = inverse(d);
    put_half(d, out);
    // The sum is positive, and `as` truncates.
    put_nibbles(|j| ((x[j] * inverse + 8.5) as u8).min(15), &mut out[2..]);
}

fn q4_1(x: &[f32], out: &mut [u8]) {
    let (min, max) = x.iter().fold((f32::MAX, -f32::MAX), |(min, max), x| {
        (min.min(*x), max.max(*x))
    });
    let d = (max - min) / 15.0;
    let inverse = inverse(d);
    put_half(d, out);
    put_half(min, &mut out[2..]);
    put_nibbles(
        |j| (((x[j] - min) * inverse + 0.5) as u8).min(15),
        &mut out[4..],
    );
}

fn q8_0(x: &[f32], out: &mut [u8]) {
    let d = largest(x).abs() / 127.0;
    let inverse = inverse(d);
    put_half(d, out);
    for (byte, x) in out[2..].iter_mut().zip(x) {
        *byte = ((x * inverse).round() as i8).cast_unsigned();
    }
}

/// Rounds to the nearest integer, ties to even, within `low..=high`.
fn nearest(x: f32, low: i32, high: i32) -> i32 {
    (x.round_ties_even() as i32).clamp(low, high)
}

/// Finds the scale and the codes (0 to 63, with 32 for 0) of a group of `Q6_K`: 19 scales around
/// that of the largest number are tried, and the one with the least squared error, weighted by the
/// squares of the numbers, is taken.
fn scale_of_group(x: &[f32], codes: &mut [u8]) -> f32 {
    let max = largest(x);
    if max.abs() < SMALLEST_SCALE {
        codes.fill(0);
        return 0.0;
    }
    let sums = |inverse: f32| {
        let (mut with_x, mut squares) = (0.0_f32, 0.0_f32);
        for x in x {
            let q = nearest(inverse * x, -32, 31) as f32;
            let weight = x * x;
            with_x += weight * x * q;
            squares += weight * q * q;
        }
        (with_x, squares)
    };
    let set = |inverse: f32, codes: &mut [u8]| {
        for (code, x) in codes.iter_mut().zip(x) {
            *code = (nearest(inverse * x, -32, 31) + 32) as u8;
        }
    };
    let first = -32.0 / max;
    let (with_x, squares) = sums(first);
    set(first, codes);
    let mut scale = if squares == 0.0 {
        0.0
    } else {
        with_x / squares
    };
    let mut best = scale * with_x;
    for step in (-9..=9).filter(|step| *step != 0) {
        let inverse = -(32.0 + 0.1 * step as f32) / max;
        let (with_x, squares) = sums(inverse);
        if squares > 0.0 && with_x * with_x > best * squares {
            set(inverse, codes);
            scale = with_x / squares;
            best = scale * with_x;
        }
    }
    scale
}

fn q6_k(x: &[f32], out: &mut [u8]) {
    let mut codes = [0_u8; LARGE];
    let mut scales = [0.0_f32; LARGE / GROUP];
    let groups = x.chunks_exact(GROUP).zip(codes.chunks_exact_mut(GROUP));
    for (scale, (x, codes)) in scales.iter_mut().zip(groups) {
        *scale = scale_of_group(x, codes);
    }
    let max = largest(&scales);
    out.fill(0);
    if max.abs() < SMALLEST_SCALE {
        return;
    }
    let (low, rest) = out.split_at_mut(LARGE / 2);
    let (high, rest) = rest.split_at_mut(LARGE / 4);
    let (stored, d) = rest.split_at_mut(LARGE / GROUP);
    let inverse = -128.0 / max;
    put_half(1.0 / inverse, d);
    let d = f16::from_f32(1.0 / inverse).to_f32();
    let groups = x.chunks_exact(GROUP).zip(codes.chunks_exact_mut(GROUP));
    for ((stored, scale), (x, codes)) in stored.iter_mut().zip(scales).zip(groups) {
        let integer = nearest(inverse * scale, -128, 127);
        *stored = (integer as i8).cast_unsigned();
        let d = d * integer as f32;
        if d == 0.0 {
            continue;
        }
        for (code, x) in codes.iter_mut().zip(x) {
            *code = (nearest(x / d, -32, 31) + 32) as u8;
        }
    }
    for (half, codes) in codes.chunks_exact(LARGE / 2).enumerate() {
        for l in 0..32 {
            let [a, b, c, d] = [0, 32, 64, 96].map(|at| codes[at + l]);
            low[64 * half + l] = a & 15 | (c & 15) << 4;
            low[64 * half + 32 + l] = b & 15 | (d & 15) << 4;
            high[32 * half + l] = a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (d >> 4) << 6;
        }
    }
}

/// Makes blocks of exactly the values of a matrix whose rows are filled up with zeros to `cols`
/// numbers, or returns `None` if there are none: if the numbers of a block have different scales, a
/// scale or minimum is no `f16`, or the levels do not fit.
pub(super) fn exact(matrix: &QuantizedMatrix, kind: Kind, cols: usize) -> Option<Vec<u8>> {
    let (len, bytes) = kind.block();
    if kind == Kind::Q6K || matrix.cols() > cols || !cols.is_multiple_of(len) {
        return None;
    }
    let row_bytes = cols / len * bytes;
    let mut out = vec![0; matrix.rows() * row_bytes];
    out.par_chunks_mut(row_bytes.max(1))
        .enumerate()
        .all(|(row, out)| {
            out.chunks_exact_mut(bytes)
                .enumerate()
                .all(|(block, out)| exact_block(matrix, kind, row, block * len, out).is_some())
        })
        .then_some(out)
}

/// Makes the block of a row that begins at column `start`.
fn exact_block(
    matrix: &QuantizedMatrix,
    kind: Kind,
    row: usize,
    start: usize,
    out: &mut [u8],
) -> Option<()> {
    let parts = matrix.parts();
    let end = matrix.cols().min(start + SMALL);
    let mut levels = [0_i16; SMALL];
    // The grid of the first number; that of the first one that is not zero has priority, because a
    // zero has any scale.
    let mut grid: Option<(f32, u8)> = None;
    let mut all_zero = true;
    for (level, column) in levels.iter_mut().zip(start..end) {
        let (scale, zero) = matrix.grid(row, matrix.group_of(column));
        let code = parts.codes[row * parts.cols + column];
        *level = i16::from(code) - i16::from(zero);
        if grid.is_none() || all_zero && *level != 0 {
            grid = Some((scale, zero));
        }
        all_zero &= *level == 0;
        if *level != 0 && grid.is_some_and(|(other, _)| other != scale) {
            return None;
        }
    }
    let (scale, zero) = grid.unwrap_or((0.0, 0));
    let half = |value: f32| {
        let rounded = f16::from_f32(value);
        (rounded.to_f32() == value).then_some(rounded)
    };
    let d = half(scale)?;
    let within = |levels: &[i16], low: i16, high: i16| {
        levels.iter().all(|level| (low..=high).contains(level))
    };
    match kind {
        Kind::Q4_0 => {
            // A negative scale turns the levels -7 to 8, with the zero point 7, into those of Q4_0.
            let (sign, d) = match within(&levels, -8, 7) {
                true => (1, d),
                false => (-1, -d),
            };
            let codes = levels.map(|level| sign * level + 8);
            if !within(&codes, 0, 15) {
                return None;
            }
            out[..2].copy_from_slice(&d.to_le_bytes());
            put_nibbles(|j| codes[j] as u8, &mut out[2..]);
        }
        Kind::Q8_0 => {
            if !within(&levels, -128, 127) {
                return None;
            }
            out[..2].copy_from_slice(&d.to_le_bytes());
            for (byte, level) in out[2..].iter_mut().zip(levels) {
                *byte = (level as i8).cast_unsigned();
            }
        }
        Kind::Q4_1 => {
            let codes = levels.map(|level| level + i16::from(zero));
            let min = half(-(scale * f32::from(zero)))?;
            if !within(&codes, 0, 15) {
                return None;
            }
            out[..2].copy_from_slice(&d.to_le_bytes());
            out[2..4].copy_from_slice(&min.to_le_bytes());
            put_nibbles(|j| codes[j] as u8, &mut out[4..]);
        }
        Kind::Q6K => return None,
    }
    Some(())
}
