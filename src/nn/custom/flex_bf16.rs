//! Products with a bf16 weight by AVX-512 BF16: pairs of bf16 numbers multiplied and added to `f32` sums, twice as many a
//! second as by `f32`. Inputs are rounded to bf16.
//!
//! A tile of [`ROWS`] x [`COLUMNS`] sums stays in registers while pairs along the inner dimension stream by. Operands are
//! packed so that they stream: inputs once for all, the weight block by block.

use half::bf16;
use rayon::prelude::*;

use super::flex_matmul::{Matrix, Shared};

/// Rows of a tile: with [`COLUMNS`], 24 of the 32 registers are sums.
const ROWS: usize = 12;
/// Columns of a tile: two registers.
const COLUMNS: usize = 32;
/// Pairs along the inner dimension that a block of the weight has: a packed panel of it stays in the first-level cache.
const BLOCK_PAIRS: usize = 128;
/// Most columns of such a block, so that it stays in the second-level cache.
const BLOCK_COLUMNS: usize = 1024;

/// How tiles are computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Tile {
    /// By the processor's instruction.
    Avx512,
    /// Number by number: what the instruction is compared with, and what tests run on machines without it.
    #[cfg(test)]
    Portable,
}

impl Tile {
    /// The fast one, where this machine has the instruction.
    pub fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
        found.then_some(Tile::Avx512)
    }
}

/// `[inner, columns]`, in any order.
#[derive(Clone, Copy)]
pub(super) struct Weight<'a> {
    pub values: &'a [bf16],
    pub start: usize,
    pub dims: [usize; 2],
    pub strides: [usize; 2],
}

impl Weight<'_> {
    fn bits(&self, inner: usize, column: usize) -> u32 {
        u32::from(self.values[self.start + inner * self.strides[0] + column * self.strides[1]].to_bits())
    }

    /// Pairs `first..first + pairs` of the inner dimension of some columns, in panels of [`COLUMNS`], each
    /// `[pairs, COLUMNS]`, zero where there is no element.
    fn pack(&self, first: usize, pairs: usize, columns: std::ops::Range<usize>, out: &mut Vec<u32>) {
        let panel_len = pairs * COLUMNS;
        out.clear();
        out.resize(columns.len().div_ceil(COLUMNS) * panel_len, 0);
        for (index, panel) in out.chunks_exact_mut(panel_len).enumerate() {
            let start = columns.start + index * COLUMNS;
            let width = COLUMNS.min(columns.end - start);
            for (pair, line) in panel.chunks_exact_mut(COLUMNS).enumerate() {
                let inner = 2 * (first + pair);
                let second = inner + 1 < self.dims[0];
                if self.strides[1] == 1 {
                    let row = |inner: usize| {
                        let at = self.start + inner * self.strides[0] + start;
                        &self.values[at..at + width]
                    };
                    line.iter_mut().zip(row(inner)).for_each(|(out, low)| *out = u32::from(low.to_bits()));
                    if second {
                        let high = row(inner + 1);
                        line.iter_mut().zip(high).for_each(|(out, high)| *out |= u32::from(high.to_bits()) << 16);
                    }
                } else {
                    for (offset, out) in line[..width].iter_mut().enumerate() {
                        let high = if second { self.bits(inner + 1, start + offset) } else { 0 };
                        *out = self.bits(inner, start + offset) | high << 16;
                    }
                }
            }
        }
    }
}

/// The upper half of a number, rounded to nearest, ties to even.
fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    if x.is_nan() { (bits >> 16) | 0x40 } else { (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 }
}

/// Inputs `[m, inner]` as pairs, in panels of [`ROWS`], each `[pairs, ROWS]`, zero where there is no element.
///
/// # Safety
/// The matrix lies in memory that is alive.
unsafe fn pack_inputs(m: usize, inner: usize, a: Matrix) -> Vec<u32> {
    let pairs = inner.div_ceil(2);
    let mut packed = vec![0_u32; m.div_ceil(ROWS) * pairs * ROWS];
    packed.par_chunks_exact_mut(pairs * ROWS).enumerate().for_each(|(panel, out)| {
        for row in 0..ROWS.min(m - panel * ROWS) {
            // SAFETY: an element of the matrix; so below.
            let at = |column: usize| unsafe { *a.at(panel * ROWS + row, column) };
            for (pair, out) in out[row..].iter_mut().step_by(ROWS).enumerate() {
                let high = if 2 * pair + 1 < inner { round(at(2 * pair + 1)) } else { 0 };
                *out = round(at(2 * pair)) | high << 16;
            }
        }
    });
    packed
}

/// Defines a function that adds up a tile: `out[row][column] = sum over pairs of a[pair][row] . b[pair][column]`.
macro_rules! tile {
    ($(#[$attribute:meta])* $name:ident, $zero:expr, $load:expr, $splat:expr, $dot:expr, $store:expr) => {
        $(#[$attribute])*
        fn $name(a: &[u32], b: &[u32], out: &mut [[f32; COLUMNS]; ROWS]) {
            let mut sums = [[$zero; COLUMNS / 16]; ROWS];
            for (a, b) in a.chunks_exact(ROWS).zip(b.chunks_exact(COLUMNS)) {
                let b = [$load(&b[..16]), $load(&b[16..])];
                for (sums, a) in sums.iter_mut().zip(a) {
                    let a = $splat(*a);
                    sums[0] = $dot(sums[0], a, b[0]);
                    sums[1] = $dot(sums[1], a, b[1]);
                }
            }
            for (out, sums) in out.iter_mut().zip(sums) {
                $store(&mut out[..16], sums[0]);
                $store(&mut out[16..], sums[1]);
            }
        }
    };
}

mod avx512 {
    use std::arch::x86_64::{
        __m512, __m512bh, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps, _mm512_storeu_ps,
    };

    use super::{COLUMNS, ROWS};

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn load(pairs: &[u32]) -> __m512bh {
        assert!(pairs.len() >= 16);
        // SAFETY: 16 numbers of 32 bits are there; both types are 512 bits without meaning beyond them.
        unsafe { std::mem::transmute(_mm512_loadu_si512(pairs.as_ptr().cast())) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn splat(pair: u32) -> __m512bh {
        // SAFETY: as above.
        unsafe { std::mem::transmute(_mm512_set1_epi32(pair.cast_signed())) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn dot(sum: __m512, a: __m512bh, b: __m512bh) -> __m512 {
        _mm512_dpbf16_ps(sum, a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn store(out: &mut [f32], sums: __m512) {
        assert!(out.len() >= 16);
        // SAFETY: there is room for 16 numbers.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sums) };
    }

    tile! {
        #[target_feature(enable = "avx512f,avx512bf16")]
        run, _mm512_setzero_ps(), load, splat, dot, store
    }

    /// # Safety
    /// The processor has AVX-512 BF16.
    pub(super) unsafe fn tile(a: &[u32], b: &[u32], out: &mut [[f32; COLUMNS]; ROWS]) {
        // SAFETY: the caller's promise.
        unsafe { run(a, b, out) };
    }
}

#[cfg(test)]
mod portable {
    use super::{COLUMNS, ROWS};

    type Sixteen<T> = [T; 16];

    fn wide(pair: u32) -> [f32; 2] {
        [f32::from_bits(pair << 16), f32::from_bits(pair & 0xFFFF_0000)]
    }

    fn load(pairs: &[u32]) -> Sixteen<u32> {
        pairs.try_into().unwrap()
    }

    fn dot(sums: Sixteen<f32>, a: Sixteen<u32>, b: Sixteen<u32>) -> Sixteen<f32> {
        std::array::from_fn(|lane| {
            let ([a, high_a], [b, high_b]) = (wide(a[lane]), wide(b[lane]));
            sums[lane] + a * b + high_a * high_b
        })
    }

    fn store(out: &mut [f32], sums: Sixteen<f32>) {
        out.copy_from_slice(&sums);
    }

    tile!(run, [0.0_f32; 16], load, |pair: u32| [pair; 16], dot, store);

    pub(super) fn tile(a: &[u32], b: &[u32], out: &mut [[f32; COLUMNS]; ROWS]) {
        run(a, b, out);
    }
}

impl Tile {
    fn run(self, a: &[u32], b: &[u32], out: &mut [[f32; COLUMNS]; ROWS]) {
        match self {
            // SAFETY: `detect` alone makes this variant outside tests, and tests ask it first.
            Tile::Avx512 => unsafe { avx512::tile(a, b, out) },
            #[cfg(test)]
            Tile::Portable => portable::tile(a, b, out),
        }
    }
}

/// `out = a weight`, or `out += a weight`, for `a` `[m, inner]`, with `width` elements from row to row of `out`.
///
/// # Safety
/// `a` lies in memory that is alive, and `out`, with room for the product, is written by nobody else.
pub(super) unsafe fn multiply(
    tile: Tile,
    m: usize,
    a: Matrix,
    weight: Weight<'_>,
    out: Shared,
    width: usize,
    add: bool,
) {
    let [inner, n] = weight.dims;
    let pairs = inner.div_ceil(2);
    // SAFETY: the caller's promise.
    let inputs = unsafe { pack_inputs(m, inner, a) };
    let threads = rayon::current_num_threads();
    let columns = n.div_ceil(threads).next_multiple_of(COLUMNS).min(BLOCK_COLUMNS);
    let block = |packed: &mut Vec<u32>, index: usize| {
        let range = index * columns..((index + 1) * columns).min(n);
        for first in (0..pairs).step_by(BLOCK_PAIRS) {
            let count = BLOCK_PAIRS.min(pairs - first);
            weight.pack(first, count, range.clone(), packed);
            for (panel, inputs) in inputs.chunks_exact(pairs * ROWS).enumerate() {
                let inputs = &inputs[first * ROWS..(first + count) * ROWS];
                let rows = ROWS.min(m - panel * ROWS);
                for (number, packed) in packed.chunks_exact(count * COLUMNS).enumerate() {
                    let mut sums = [[0.0; COLUMNS]; ROWS];
                    tile.run(inputs, packed, &mut sums);
                    let start = range.start + number * COLUMNS;
                    let len = COLUMNS.min(range.end - start);
                    for (row, sums) in sums[..rows].iter().enumerate() {
                        let out = out.at((panel * ROWS + row) * width + start);
                        for (column, sum) in sums[..len].iter().enumerate() {
                            // SAFETY: an element of the product, in columns that are this task's alone.
                            unsafe {
                                let out = out.add(column);
                                out.write(if add || first > 0 { out.read() + sum } else { *sum });
                            }
                        }
                    }
                }
            }
        }
    };
    (0..n.div_ceil(columns)).into_par_iter().for_each_init(Vec::new, block);
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn rounds_as_the_half_crate_does() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let special =
            [0.0, -0.0, 1.0, f32::MAX, f32::MIN_POSITIVE / 8.0, f32::INFINITY, f32::NEG_INFINITY, 1.003_906_3];
        let random = (0..10_000).map(|_| f32::from_bits(rng.random()));
        for x in special.into_iter().chain(random.collect::<Vec<_>>()) {
            assert_eq!(round(x), u32::from(bf16::from_f32(x).to_bits()), "{x}");
        }
    }

    #[test]
    fn products_of_odd_sizes_and_both_orders() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let tiles = [Some(Tile::Portable), Tile::detect()];
        let sizes = [[1, 1, 1], [2, 3, 5], [12, 32, 2], [13, 33, 257], [25, 70, 515], [3, 1100, 17]];
        for ([m, n, inner], turned) in sizes.into_iter().flat_map(|size| [(size, false), (size, true)]) {
            let mut numbers = |n: usize| (0..n).map(|_| rng.random_range(-1.0_f32..1.0)).collect::<Vec<_>>();
            // Neither operand starts at the beginning of its memory, and both have gaps between rows.
            let (inputs, weights) = (numbers(2 + m * (inner + 3)), numbers(5 + (n + 2) * (inner + 2)));
            let weights: Vec<bf16> = weights.into_iter().map(bf16::from_f32).collect();
            let strides = if turned { [1, inner + 2] } else { [n + 2, 1] };
            let weight = Weight { values: &weights, start: 5, dims: [inner, n], strides };
            let a = Matrix::rows(&inputs[2..], inner + 3);
            for tile in tiles.into_iter().flatten() {
                for add in [false, true] {
                    let mut out = vec![0.5; m * (n + 1)];
                    // SAFETY: the operands are alive and of these sizes.
                    unsafe { multiply(tile, m, a, weight, Shared(out.as_mut_ptr()), n + 1, add) };
                    for (row, out) in out.chunks_exact(n + 1).enumerate() {
                        for (column, got) in out[..n].iter().enumerate() {
                            let at = |k: usize| f64::from(bf16::from_f32(inputs[2 + row * (inner + 3) + k]));
                            let of = |k: usize| f64::from(weights[5 + k * strides[0] + column * strides[1]]);
                            let want: f64 =
                                (0..inner).map(|k| at(k) * of(k)).sum::<f64>() + if add { 0.5 } else { 0.0 };
                            let error = (f64::from(*got) - want).abs();
                            assert!(error < 2e-5, "{tile:?} {m} {n} {inner} {turned} {add}: {got}, not {want}");
                        }
                        assert_eq!(out[n], 0.5, "beyond the product");
                    }
                }
            }
        }
    }
}
