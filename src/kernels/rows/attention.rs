//! Causal attention over keys and values that are stored in tiles of [`TILE`] tokens.
//!
//! A tile holds its keys transposed, `[head_dim, TILE]`, so that the scores of its tokens are lanes
//! of vector registers, and its values as they are, `[TILE, head_dim]`. The softmax is computed
//! tile by tile with a running maximum (arXiv 1805.02867), so that scores are needed only while
//! their tile is in the first-level cache.

use super::math::{exp, tanh};
use crate::kernels::level::{dispatch, mul_add};
use crate::kernels::number::Stored;

/// Number of tokens of a tile.
pub(crate) const TILE: usize = 64;
/// Maximum number of queries that are processed together, so that keys and values are read once for
/// them.
pub(crate) const QUERIES: usize = 4;
/// Number of lanes whose sums are in registers at a time.
const WIDE: usize = 32;

/// State of the softmax of one query.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Running {
    /// Largest score so far.
    pub max: f32,
    /// Sum of `exp(score - max)` so far.
    pub sum: f32,
}

impl Running {
    /// The state before the first tile.
    pub const NONE: Self = Self {
        max: f32::NEG_INFINITY,
        sum: 0.0,
    };
}

/// One query and its partial result.
#[derive(Debug)]
pub(crate) struct Query<'a> {
    /// The query, `[head_dim]`.
    pub q: &'a [f32],
    /// First token of the tile that the query attends to.
    pub from: usize,
    /// End (exclusive) of the tokens of the tile that the query attends to.
    pub to: usize,
    /// State of the softmax.
    pub running: &'a mut Running,
    /// Sum of the values so far, weighted by the exponentials, `[head_dim]`.
    pub out: &'a mut [f32],
}

/// Returns the unscaled scores of `N` queries with the keys of a tile.
#[inline(always)]
fn scores<const FMA: bool, const N: usize, S: Stored>(
    queries: &[Query<'_>],
    keys: &[S],
) -> [[f32; TILE]; N] {
    let head_dim = keys.len() / TILE;
    let q: [&[f32]; N] = std::array::from_fn(|n| &queries[n].q[..head_dim]);
    let mut scores = [[0.0_f32; TILE]; N];
    for part in 0..TILE / WIDE {
        let mut sums = [[0.0_f32; WIDE]; N];
        for (d, line) in keys.as_chunks::<TILE>().0.iter().enumerate() {
            let mut key = [0.0_f32; WIDE];
            for (lane, key) in key.iter_mut().enumerate() {
                *key = line[part * WIDE + lane].widen();
            }
            for n in 0..N {
                let x = q[n][d];
                for lane in 0..WIDE {
                    sums[n][lane] = mul_add::<FMA>(x, key[lane], sums[n][lane]);
                }
            }
        }
        for n in 0..N {
            scores[n][part * WIDE..(part + 1) * WIDE].copy_from_slice(&sums[n]);
        }
    }
    scores
}

/// Replaces the scores of a query by weights, and returns the factor by which its partial result
/// must be multiplied.
#[inline(always)]
fn weigh<const FMA: bool>(
    scores: &mut [f32; TILE],
    query: &mut Query<'_>,
    scale: f32,
    softcap: Option<f32>,
) -> f32 {
    if let Some(cap) = softcap {
        let scale = scale / cap;
        scores
            .iter_mut()
            .for_each(|score| *score = cap * tanh::<FMA>(*score * scale));
    }
    let scale = softcap.map_or(scale, |_| 1.0);
    let mut max = [f32::NEG_INFINITY; 16];
    for (index, score) in scores.iter_mut().enumerate() {
        *score = if index >= query.from && index < query.to {
            *score * scale
        } else {
            f32::NEG_INFINITY
        };
    }
    for chunk in scores.as_chunks::<16>().0 {
        for lane in 0..16 {
            max[lane] = if chunk[lane] > max[lane] {
                chunk[lane]
            } else {
                max[lane]
            };
        }
    }
    let max = max
        .iter()
        .fold(query.running.max, |a, b| if *b > a { *b } else { a });
    if max == f32::NEG_INFINITY {
        // The query attends to no token so far. The difference of two infinities would be NaN.
        *scores = [0.0; TILE];
        return 1.0;
    }
    let mut sums = [0.0_f32; 16];
    for chunk in scores.as_chunks_mut::<16>().0 {
        for lane in 0..16 {
            chunk[lane] = exp::<FMA>(chunk[lane] - max);
            sums[lane] += chunk[lane];
        }
    }
    let factor = exp::<FMA>(query.running.max - max);
    let sum: f32 = sums.iter().sum();
    *query.running = Running {
        max,
        sum: query.running.sum * factor + sum,
    };
    factor
}

#[inline(always)]
fn attend<const FMA: bool, const N: usize, S: Stored>(
    queries: &mut [Query<'_>],
    keys: &[S],
    values: &[S],
    scale: f32,
    softcap: Option<f32>,
) {
    let mut weights = scores::<FMA, N, S>(queries, keys);
    let mut factors = [0.0_f32; N];
    let (mut from, mut to) = (TILE, 0);
    for n in 0..N {
        factors[n] = weigh::<FMA>(&mut weights[n], &mut queries[n], scale, softcap);
        (from, to) = (from.min(queries[n].from), to.max(queries[n].to));
    }
    let head_dim = values.len() / TILE;
    let whole = head_dim / WIDE * WIDE;
    for start in (0..whole).step_by(WIDE) {
        let mut sums = [[0.0_f32; WIDE]; N];
        for n in 0..N {
            for (sum, out) in sums[n].iter_mut().zip(&queries[n].out[start..start + WIDE]) {
                *sum = out * factors[n];
            }
        }
        for token in from..to {
            let line = &values[token * head_dim + start..][..WIDE];
            let mut value = [0.0_f32; WIDE];
            for (value, stored) in value.iter_mut().zip(line) {
                *value = stored.widen();
            }
            for n in 0..N {
                let weight = weights[n][token];
                for lane in 0..WIDE {
                    sums[n][lane] = mul_add::<FMA>(weight, value[lane], sums[n][lane]);
                }
            }
        }
        for n in 0..N {
            queries[n].out[start..start + WIDE].copy_from_slice(&sums[n]);
        }
    }
    for n in 0..N {
        let out = &mut queries[n].out[whole..head_dim];
        out.iter_mut().for_each(|out| *out *= factors[n]);
        for token in from..to {
            let weight = weights[n][token];
            for (out, stored) in out.iter_mut().zip(&values[token * head_dim + whole..]) {
                *out = mul_add::<FMA>(weight, stored.widen(), *out);
            }
        }
    }
}

dispatch! {
    /// Computes attention of up to [`QUERIES`] queries over one tile of keys, `[head_dim, TILE]`,
    /// and values, `[TILE, head_dim]`. Scores are multiplied by `scale` and limited
    /// to `softcap * tanh(score / softcap)`.
    pub(crate) fn attend_tile<const FMA: bool, S: Stored>(queries: &mut [Query<'_>], keys: &[S], values: &[S], scale: f32, softcap: Option<f32>) {
        match queries.len() {
            1 => attend::<FMA, 1, S>(queries, keys, values, scale, softcap),
            2 => attend::<FMA, 2, S>(queries, keys, values, scale, softcap),
            3 => attend::<FMA, 3, S>(queries, keys, values, scale, softcap),
            _ => attend::<FMA, 4, S>(queries, keys, values, scale, softcap),
        }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::kernels::level::Level;

    fn wave(n: usize, step: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * step).sin() * 1.5).collect()
    }

    /// Computes attention by its definition, in `f64`.
    fn expected(
        q: &[f32],
        keys: &[f32],
        values: &[f32],
        seen: std::ops::Range<usize>,
        scale: f32,
        softcap: Option<f32>,
    ) -> Vec<f64> {
        let head_dim = q.len();
        let score = |token: usize| -> f64 {
            let at = (token / TILE * head_dim * TILE) + token % TILE;
            let dot: f64 = (0..head_dim)
                .map(|d| f64::from(q[d]) * f64::from(keys[at + d * TILE]))
                .sum();
            let score = dot * f64::from(scale);
            softcap.map_or(score, |cap| {
                f64::from(cap) * (score / f64::from(cap)).tanh()
            })
        };
        let scores: Vec<f64> = seen.clone().map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|score| (score - max).exp()).sum();
        (0..head_dim)
            .map(|d| {
                let weighted = seen.clone().zip(&scores);
                weighted
                    .map(|(token, score)| {
                        (score - max).exp() * f64::from(values[token * head_dim + d])
                    })
                    .sum::<f64>()
                    / total
            })
            .collect()
    }

    fn check<S: Stored>(
        store: impl Fn(f32) -> S,
        head_dim: usize,
        n: usize,
        level: Level,
        softcap: Option<f32>,
    ) {
        let tiles = 3;
        let size = head_dim * TILE;
        let (keys, values): (Vec<S>, Vec<S>) = (
            wave(tiles * size, 0.37).into_iter().map(&store).collect(),
            wave(tiles * size, 0.73).into_iter().map(&store).collect(),
        );
        let widened = |values: &[S]| {
            values
                .iter()
                .map(|value| value.widen())
                .collect::<Vec<f32>>()
        };
        let queries: Vec<Vec<f32>> = (0..n).map(|i| wave(head_dim, 0.11 + i as f32)).collect();
        // One query attends to no token of the first tile, and one to no token of the last.
        let seen = [3..130, 70..191, 0..60, 64..129];
        let (mut running, mut out) = ([Running::NONE; 4], vec![vec![0.0_f32; head_dim]; 4]);
        for tile in 0..tiles {
            let inside = |token: usize| token.saturating_sub(tile * TILE).min(TILE);
            let mut now: Vec<Query<'_>> = queries
                .iter()
                .zip(running.iter_mut().zip(&mut out))
                .zip(&seen)
                .map(|((q, (running, out)), seen)| Query {
                    q,
                    from: inside(seen.start),
                    to: inside(seen.end),
                    running,
                    out,
                })
                .collect();
            let range = tile * size..(tile + 1) * size;
            attend_tile(
                level,
                &mut now,
                &keys[range.clone()],
                &values[range],
                0.4,
                softcap,
            );
        }
        for i in 0..n {
            let want = expected(
                &queries[i],
                &widened(&keys),
                &widened(&values),
                seen[i].clone(),
                0.4,
                softcap,
            );
            for (got, want) in out[i].iter().zip(want) {
                let got = f64::from(got / running[i].sum);
                assert!(
                    (got - want).abs() < 1e-5,
                    "{level:?}, {head_dim}, query {i} of {n}: {got} and {want}"
                );
            }
        }
    }

    #[test]
    fn tiles_add_up_to_the_softmax_over_all_of_them() {
        for level in Level::available() {
            for head_dim in [2, 6, 32, 40, 64] {
                for n in 1..=QUERIES {
                    check(|value| value, head_dim, n, level, None);
                    check(f16::from_f32, head_dim, n, level, None);
                    check(|value| value, head_dim, n, level, Some(3.0));
                }
            }
        }
    }
}
