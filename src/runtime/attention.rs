//! Rotary positions, the key/value cache and attention of one layer, in parallel over sequences, heads and blocks of queries.

use std::ops::Range;

use crate::kernels::disjoint::Disjoint;
use crate::kernels::rows::attention::{QUERIES, Query, Running, TILE, attend_tile};
use crate::kernels::rows::rotate_in_place;
use crate::kernels::{Level, Pool};

use super::cache::{Cache, Kept, LayerCache, Layers};

/// Queries of one task, all of one key/value head: enough for a tile to be worth reading.
const BLOCK: usize = 64;

/// The sizes of a layer's attention.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heads {
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    pub window: Option<usize>,
}

/// Where the queries, keys and values of this call are: `n` rows of each of the sequences, one after the other.
pub(super) struct Call<'a, 'c> {
    pub heads: Heads,
    /// The layer.
    pub block: usize,
    pub n_seqs: usize,
    /// Rows of each sequence.
    pub n: usize,
    pub caches: &'c (dyn Fn(usize) -> &'c Cache + Sync),
    /// `[rows, n_heads * head_dim]`.
    pub q: Disjoint<'a, f32>,
    /// `[rows, n_kv_heads * head_dim]`.
    pub k: Disjoint<'a, f32>,
    /// `[rows, n_kv_heads * head_dim]`.
    pub v: &'a [f32],
    /// `[rows, head_dim / 2]`.
    pub cos: &'a [f32],
    /// `[rows, head_dim / 2]`.
    pub sin: &'a [f32],
    /// `[rows, n_heads * head_dim]`.
    pub out: Disjoint<'a, f32>,
    pub level: Level,
}

/// Appends keys and values to the caches, and lets all queries look.
pub(super) fn attend(pool: &Pool, call: &Call<'_, '_>) {
    let queries = call.n * (call.heads.n_heads / call.heads.n_kv_heads.max(1));
    // With few heads, smaller blocks, so that every thread has some.
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
    // The last queries see the most, and come first.
    pool.for_each(heads * blocks, |_, task| {
        let (head, at) = (task % heads, blocks - 1 - task / heads);
        call.look(head, at * block..((at + 1) * block).min(queries));
    });
}

impl Call<'_, '_> {
    /// Turns the queries and keys of a sequence's key/value head, and appends keys and values.
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
            ..
        } = self.heads;
        let (group, half) = (n_heads / n_kv_heads, head_dim / 2);
        let rows = seq * self.n..(seq + 1) * self.n;
        for row in rows.clone() {
            let (cos, sin) = (
                &self.cos[row * half..(row + 1) * half],
                &self.sin[row * half..(row + 1) * half],
            );
            let first = row * n_heads * head_dim + head * group * head_dim;
            // SAFETY: the queries and keys of this head and these rows are this task's alone.
            let (queries, key) = unsafe {
                let key = (row * n_kv_heads + head) * head_dim;
                (
                    self.q.part(first..first + group * head_dim),
                    self.k.part(key..key + head_dim),
                )
            };
            queries
                .chunks_exact_mut(head_dim)
                .for_each(|query| rotate_in_place(self.level, query, cos, sin));
            rotate_in_place(self.level, key, cos, sin);
        }
        let mut done = 0;
        while done < self.n {
            let (tile, slot) = ((start + done) / TILE, (start + done) % TILE);
            let count = (TILE - slot).min(self.n - done);
            // SAFETY: this head's tiles are this task's alone until it is done.
            let (keys, values) = unsafe { layer.tile_mut(tile, head) };
            for (at, row) in (rows.start + done..).take(count).enumerate() {
                let first = (row * n_kv_heads + head) * head_dim;
                // SAFETY: as above; the keys were rotated by this task.
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

    /// Lets some of the queries of a sequence's key/value head look. Query `i` is row `i / group` and head `i % group` of the group.
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
            // SAFETY: the results of these queries are this task's alone.
            unsafe { self.out.part(self.place(seq, head, query)) }.fill(0.0);
        }
        let (first, last) = (
            self.visible(start, queries.start),
            self.visible(start, queries.end - 1),
        );
        for tile in first.start / TILE..last.end.div_ceil(TILE) {
            // SAFETY: what is read was appended before.
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
            // SAFETY: as above.
            let out = unsafe { self.out.part(self.place(seq, head, query)) };
            let inverse = 1.0 / running.sum;
            out.iter_mut().for_each(|out| *out *= inverse);
        }
    }

    /// Lets `N` queries see a tile, where one of them sees any of it.
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
            // SAFETY: queries are only read now, and each result is this task's, and another one's than the others'.
            let (q, out) = unsafe { (&*self.q.part(place.clone()), self.out.part(place)) };
            Query {
                q,
                from: range.start,
                to: range.end,
                running,
                out,
            }
        });
        let scale = 1.0 / (self.heads.head_dim as f32).sqrt();
        attend_tile(self.level, &mut queries, keys, values, scale);
    }

    /// Where a query and its result are.
    fn place(&self, seq: usize, head: usize, query: usize) -> Range<usize> {
        let Heads {
            n_heads,
            n_kv_heads,
            head_dim,
            ..
        } = self.heads;
        let group = n_heads / n_kv_heads;
        let start =
            ((seq * self.n + query / group) * n_heads + head * group + query % group) * head_dim;
        start..start + head_dim
    }

    /// The tokens that a query sees.
    fn visible(&self, start: usize, query: usize) -> Range<usize> {
        let end = start + query / (self.heads.n_heads / self.heads.n_kv_heads) + 1;
        self.heads
            .window
            .map_or(0, |window| end.saturating_sub(window))..end
    }
}
