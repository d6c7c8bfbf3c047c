//! Norms of heads, rotary embedding, key/value cache updates and attention of one layer, parallel over sequences,
//! heads and blocks of queries.

use std::ops::Range;

use crate::arch::Scores;
use crate::kernels::disjoint::Disjoint;
use crate::kernels::rows::attention::{QUERIES, Query, Running, TILE, attend_tile};
use crate::kernels::rows::{rms_norm_in_place, rotate_in_place};
use crate::kernels::{Level, Pool};

use super::cache::{Cache, Kept, LayerCache, Layers};

/// Number of queries per task, all for the same key/value head. It is large enough that each tile
/// read from memory is used many times.
const BLOCK: usize = 64;

/// Sizes and constants of a layer's attention.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heads<'a> {
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    pub window: Option<usize>,
    pub scores: Scores,
    /// Gains of the norms on each head of the queries and of the keys, `[head_dim]`.
    pub norms: [Option<&'a [f32]>; 2],
    pub norm_eps: f32,
}

/// Inputs and outputs of one attention call. Each sequence has `n` rows, and the sequences follow
/// one another.
pub(super) struct Call<'a, 'c> {
    pub heads: Heads<'a>,
    /// Index of the block in the model.
    pub block: usize,
    pub n_seqs: usize,
    /// Number of rows of each sequence.
    pub n: usize,
    /// First row of the first sequence.
    pub row: usize,
    pub caches: &'c (dyn Fn(usize) -> &'c Cache + Sync),
    /// Queries, `[rows, n_heads * head_dim]`.
    pub q: Disjoint<'a, f32>,
    /// Keys, `[rows, n_kv_heads * head_dim]`.
    pub k: Disjoint<'a, f32>,
    /// Values, `[rows, n_kv_heads * head_dim]`.
    pub v: &'a [f32],
    /// Cosines and sines of the rows' positions, `[rows, half]` each, and `half`, the number of
    /// pairs of a head's features that are rotated. 0 pairs for no rotation.
    pub rotation: (&'a [f32], &'a [f32], usize),
    /// Output, `[rows, n_heads * head_dim]`.
    pub out: Disjoint<'a, f32>,
    pub level: Level,
}

/// Normalizes and rotates queries and keys, appends keys and values to the caches, and computes attention for all
/// queries.
pub(super) fn attend(pool: &Pool, call: &Call<'_, '_>) {
    let queries = call.n * (call.heads.n_heads / call.heads.n_kv_heads.max(1));
    // With few heads, use smaller blocks so that every thread gets some.
    let few = call.n_seqs * call.heads.n_kv_heads < 2 * pool.threads();
    let block = if few && queries > QUERIES {
        queries
            .div_ceil(2 * pool.threads())
            .next_multiple_of(QUERIES)
            .clamp(QUERIES, BLOCK)
    } else {
        BLOCK
    };
    let (heads, blocks) = (call.n_seqs * call.heads.n_kv_heads, queries.div_ceil(block));
    if blocks == 1 {
        pool.for_each(heads, |_, head| {
            call.prepare(head);
            call.look(head, 0..queries);
        });
        return;
    }
    pool.for_each(heads, |_, head| call.prepare(head));
    // The last queries attend to the most tokens, so their tasks start first.
    pool.for_each(heads * blocks, |_, task| {
        let (head, at) = (task % heads, blocks - 1 - task / heads);
        call.look(head, at * block..((at + 1) * block).min(queries));
    });
}

impl Call<'_, '_> {
    /// Normalizes and rotates the queries and keys of one key/value head of one sequence, and appends the keys and
    /// values to the cache.
    fn prepare(&self, task: usize) {
        let (seq, head) = (task / self.heads.n_kv_heads, task % self.heads.n_kv_heads);
        let cache = (self.caches)(seq);
        match &cache.layers {
            Layers::F32(layers) => self.append(&layers[self.block], cache.n_tokens(), seq, head),
            Layers::F16(layers) => self.append(&layers[self.block], cache.n_tokens(), seq, head),
        }
    }

    fn append<S: Kept>(&self, layer: &LayerCache<S>, start: usize, seq: usize, head: usize) {
        let Heads {
            n_heads,
            n_kv_heads,
            head_dim,
            norms: [query_norm, key_norm],
            norm_eps,
            ..
        } = self.heads;
        let (group, (cos, sin, half)) = (n_heads / n_kv_heads, self.rotation);
        let first = self.row + seq * self.n;
        let rows = first..first + self.n;
        for row in rows.clone() {
            let (cos, sin) = (
                &cos[row * half..(row + 1) * half],
                &sin[row * half..(row + 1) * half],
            );
            let first = row * n_heads * head_dim + head * group * head_dim;
            // SAFETY: only this task accesses the queries and keys of this head and these rows.
            let (queries, key) = unsafe {
                let key = (row * n_kv_heads + head) * head_dim;
                (
                    self.q.part(first..first + group * head_dim),
                    self.k.part(key..key + head_dim),
                )
            };
            if let Some(gains) = query_norm {
                rms_norm_in_place(self.level, queries, gains, norm_eps);
            }
            if let Some(gains) = key_norm {
                rms_norm_in_place(self.level, key, gains, norm_eps);
            }
            if half > 0 {
                queries
                    .chunks_exact_mut(head_dim)
                    .for_each(|query| rotate_in_place(self.level, query, cos, sin));
                rotate_in_place(self.level, key, cos, sin);
            }
        }
        let mut done = 0;
        while done < self.n {
            let (tile, slot) = ((start + done) / TILE, (start + done) % TILE);
            let count = (TILE - slot).min(self.n - done);
            // SAFETY: until it finishes, only this task accesses this head's tiles.
            let (keys, values) = unsafe { layer.tile_mut(tile, head) };
            for (at, row) in (rows.start + done..).take(count).enumerate() {
                let first = (row * n_kv_heads + head) * head_dim;
                // SAFETY: only this task accesses this key, which it rotated above.
                let key = unsafe { self.k.part(first..first + head_dim) };
                for (line, value) in keys.as_chunks_mut::<TILE>().0.iter_mut().zip(key.iter()) {
                    line[slot + at] = S::keep(*value);
                }
                let kept = &mut values[(slot + at) * head_dim..][..head_dim];
                for (kept, value) in kept.iter_mut().zip(&self.v[first..first + head_dim]) {
                    *kept = S::keep(*value);
                }
            }
            done += count;
        }
    }

    /// Computes attention for a range of the queries of one key/value head of one sequence. Query
    /// `i` is row `i / group` and head `i % group` of the group.
    fn look(&self, task: usize, queries: Range<usize>) {
        let (seq, head) = (task / self.heads.n_kv_heads, task % self.heads.n_kv_heads);
        let cache = (self.caches)(seq);
        match &cache.layers {
            Layers::F32(layers) => {
                self.look_at(&layers[self.block], cache.n_tokens(), seq, head, queries)
            }
            Layers::F16(layers) => {
                self.look_at(&layers[self.block], cache.n_tokens(), seq, head, queries)
            }
        }
    }

    fn look_at<S: Kept>(
        &self,
        layer: &LayerCache<S>,
        start: usize,
        seq: usize,
        head: usize,
        queries: Range<usize>,
    ) {
        let mut running = [Running::NONE; BLOCK];
        for query in queries.clone() {
            // SAFETY: only this task accesses the outputs of these queries.
            unsafe { self.out.part(self.place(seq, head, query)) }.fill(0.0);
        }
        let (first, last) = (
            self.visible(start, queries.start),
            self.visible(start, queries.end - 1),
        );
        for tile in first.start / TILE..last.end.div_ceil(TILE) {
            // SAFETY: `prepare` appended these keys and values earlier, and no task writes them
            // now.
            let (keys, values) = unsafe { layer.tile(tile, head) };
            let mut from = queries.start;
            while from < queries.end {
                let n = QUERIES.min(queries.end - from);
                let at = (seq, head, start, tile, from);
                let running = &mut running[from - queries.start..][..n];
                match n {
                    1 => self.see::<1, S>(at, running, keys, values),
                    2 => self.see::<2, S>(at, running, keys, values),
                    3 => self.see::<3, S>(at, running, keys, values),
                    _ => self.see::<QUERIES, S>(at, running, keys, values),
                }
                from += n;
            }
        }
        for (query, running) in queries.zip(&running) {
            // SAFETY: only this task accesses the outputs of these queries.
            let out = unsafe { self.out.part(self.place(seq, head, query)) };
            let inverse = 1.0 / running.sum;
            out.iter_mut().for_each(|out| *out *= inverse);
        }
    }

    /// Updates `N` queries with one tile, unless none of them attends to a token in it.
    fn see<const N: usize, S: Kept>(
        &self,
        (seq, head, start, tile, first): (usize, usize, usize, usize, usize),
        running: &mut [Running],
        keys: &[S],
        values: &[S],
    ) {
        let Some(running) = running.first_chunk_mut::<N>() else {
            return;
        };
        let inside = |token: usize| token.saturating_sub(tile * TILE).min(TILE);
        let ranges: [Range<usize>; N] = std::array::from_fn(|i| {
            let seen = self.visible(start, first + i);
            inside(seen.start)..inside(seen.end)
        });
        if ranges.iter().all(|range| range.is_empty()) {
            return;
        }
        let mut seen = (first..).zip(&ranges);
        let mut queries = running.each_mut().map(|running| {
            let (query, range) = seen.next().unwrap_or((first, &ranges[0]));
            let place = self.place(seq, head, query);
            // SAFETY: all tasks only read queries at this point. Each output belongs to one query,
            // and each query belongs to one task.
            let (q, out) = unsafe { (&*self.q.part(place.clone()), self.out.part(place)) };
            Query {
                q,
                from: range.start,
                to: range.end,
                running,
                out,
            }
        });
        let Scores { scale, softcap } = self.heads.scores;
        let softcap = softcap.map(|cap| cap as f32);
        attend_tile(
            self.level,
            &mut queries,
            keys,
            values,
            scale as f32,
            softcap,
        );
    }

    /// Position of a query in `q`, which is also the position of its result in `out`.
    fn place(&self, seq: usize, head: usize, query: usize) -> Range<usize> {
        let Heads {
            n_heads,
            n_kv_heads,
            head_dim,
            ..
        } = self.heads;
        let group = n_heads / n_kv_heads;
        let start =
            ((self.row + seq * self.n + query / group) * n_heads + head * group + query % group)
                * head_dim;
        start..start + head_dim
    }

    /// Range of tokens that a query attends to.
    fn visible(&self, start: usize, query: usize) -> Range<usize> {
        let end = start + query / (self.heads.n_heads / self.heads.n_kv_heads) + 1;
        self.heads
            .window
            .map_or(0, |window| end.saturating_sub(window))..end
    }
}
