//! Keys and values of the tokens that a session holds.
//!
//! A layer with a sliding window keeps only as many tiles as the window and one pass need. They form
//! a ring: a new tile takes the place of the oldest one.

use std::cell::UnsafeCell;
use std::ops::Range;

use half::f16;

use crate::arch::{Architecture, BlockDims, Rope};
use crate::error::{Error, Result};
use crate::kernels::number::Stored;
use crate::kernels::rows::attention::TILE;

/// Number of tiles allocated at a time.
const STEP: usize = 4;

/// Storage format of keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheFormat {
    /// 32-bit floats. Keys and values are stored exactly as computed.
    #[default]
    F32,
    /// IEEE 754 half precision, rounded to nearest. It takes half the memory, and attention over a
    /// long context takes half the time.
    F16,
}

/// An element of the cache.
pub(super) trait Kept: Stored {
    /// Converts a value, rounding to nearest. Values out of range become the largest finite value
    /// of the same sign.
    fn keep(value: f32) -> Self;
}

impl Kept for f32 {
    #[inline(always)]
    fn keep(value: f32) -> Self {
        value
    }
}

impl Kept for f16 {
    #[inline(always)]
    fn keep(value: f32) -> Self {
        let largest = f16::MAX.to_f32();
        f16::from_f32(value.clamp(-largest, largest))
    }
}

/// Storage of [`STEP`] tiles of one layer.
#[derive(Debug)]
struct Slab<S>(Box<[UnsafeCell<S>]>);

// SAFETY: callers of `tile` and `tile_mut` guarantee that nothing else accesses a part while it is
// being written through a shared reference.
unsafe impl<S: Send + Sync> Sync for Slab<S> {}

/// Keys and values of one layer. For each tile and key/value head it stores keys
/// `[head_dim, TILE]`, then values `[TILE, head_dim]`.
#[derive(Debug)]
pub(super) struct LayerCache<S> {
    slabs: Vec<Slab<S>>,
    n_heads: usize,
    head_dim: usize,
    /// Number of tiles that are kept, the newest ones.
    ring: usize,
}

impl<S: Kept> LayerCache<S> {
    fn new(n_heads: usize, head_dim: usize, ring: usize) -> Self {
        Self {
            slabs: Vec::new(),
            n_heads,
            head_dim,
            ring,
        }
    }

    /// Number of elements that one head has in one tile, keys and values together.
    fn tile_len(&self) -> usize {
        2 * TILE * self.head_dim
    }

    fn reserve(&mut self, n_tokens: usize) -> Result<()> {
        let len = STEP * self.n_heads * self.tile_len();
        let wanted = if len == 0 {
            0
        } else {
            n_tokens.div_ceil(TILE).min(self.ring).div_ceil(STEP)
        };
        while self.slabs.len() < wanted {
            let fail = || Error::OutOfMemory {
                what: "key/value cache",
                bytes: len * size_of::<S>(),
            };
            let mut slab = Vec::new();
            slab.try_reserve_exact(len).map_err(|_| fail())?;
            slab.resize_with(len, || UnsafeCell::new(S::keep(0.0)));
            self.slabs.try_reserve(1).map_err(|_| fail())?;
            self.slabs.push(Slab(slab.into_boxed_slice()));
        }
        Ok(())
    }

    fn bytes(&self) -> usize {
        let slabs = self.slabs.iter();
        slabs.map(|slab| size_of_val::<[_]>(&slab.0)).sum()
    }

    fn range(&self, tile: usize, head: usize) -> (usize, Range<usize>) {
        let place = tile % self.ring;
        let start = ((place % STEP) * self.n_heads + head) * self.tile_len();
        (place / STEP, start..start + self.tile_len())
    }

    /// Returns the keys and values of a head in a tile.
    ///
    /// # Safety
    /// Nothing may write to this head's tile, or to another one at its place in the ring, while the
    /// slices are in use.
    pub unsafe fn tile(&self, tile: usize, head: usize) -> (&[S], &[S]) {
        let (slab, range) = self.range(tile, head);
        let cells = &self.slabs[slab].0[range];
        // SAFETY: `UnsafeCell<S>` has the layout of `S`, and the caller guarantees that nothing
        // writes to these cells.
        let all = unsafe { std::slice::from_raw_parts(cells.as_ptr().cast::<S>(), cells.len()) };
        all.split_at(all.len() / 2)
    }

    /// Returns the keys and values of a head in a tile for writing.
    ///
    /// # Safety
    /// Nothing else may read or write this head's tile, or another one at its place in the ring,
    /// while the slices are in use.
    #[allow(clippy::mut_from_ref)] // `UnsafeCell` makes it sound
    pub unsafe fn tile_mut(&self, tile: usize, head: usize) -> (&mut [S], &mut [S]) {
        let (slab, range) = self.range(tile, head);
        let cells = &self.slabs[slab].0[range];
        let start = UnsafeCell::raw_get(cells.as_ptr());
        // SAFETY: `UnsafeCell<S>` has the layout of `S`, and the caller guarantees that nothing
        // else accesses these cells.
        let all = unsafe { std::slice::from_raw_parts_mut(start, cells.len()) };
        let half = all.len() / 2;
        all.split_at_mut(half)
    }
}

/// Caches of all layers, in the chosen format.
#[derive(Debug)]
pub(super) enum Layers {
    F32(Vec<LayerCache<f32>>),
    F16(Vec<LayerCache<f16>>),
}

/// The cache of one session. Memory is allocated a few tiles at a time, so no token is copied when
/// the cache grows.
#[derive(Debug)]
pub(super) struct Cache {
    pub layers: Layers,
    /// Of each layer that does not keep all tiles, the number of positions that a token sees and
    /// the number of tiles that are kept.
    rings: Vec<[usize; 2]>,
    n_tokens: usize,
    /// Number of tokens after which the newest tile was or may have been written.
    written: usize,
    /// Length of the sequence for which the newest keys were or will be rotated.
    len: usize,
}

/// Number of tiles that a layer with a window must keep so that the first of `rows` new tokens still
/// sees its window, in whole slabs. `None` if a context of `n_ctx` tokens needs no more.
fn ring(window: usize, rows: usize, n_ctx: usize) -> Option<usize> {
    // So many tokens in a row lie in at most one tile more than they would fill.
    let seen = window.saturating_add(rows.min(n_ctx));
    let tiles = seen.div_ceil(TILE).saturating_add(1);
    (tiles < n_ctx.div_ceil(TILE)).then(|| tiles.next_multiple_of(STEP))
}

impl Cache {
    /// Creates an empty cache for a context of `n_ctx` tokens, to which at most `rows` tokens are
    /// added at a time.
    pub fn new(
        format: CacheFormat,
        arch: &Architecture,
        blocks: &[BlockDims],
        rows: usize,
        n_ctx: usize,
    ) -> Self {
        fn layers<S: Kept>(
            head_dim: usize,
            blocks: impl Iterator<Item = (usize, usize)>,
        ) -> Vec<LayerCache<S>> {
            let layer = |(n_heads, ring)| LayerCache::new(n_heads, head_dim, ring);
            blocks.map(layer).collect()
        }
        let mut rings = Vec::new();
        let sizes = blocks.iter().enumerate().map(|(index, block)| {
            let window = arch
                .positions(index)
                .window
                .filter(|_| block.n_kv_heads > 0);
            let ring = window.and_then(|window| Some([window, ring(window, rows, n_ctx)?]));
            rings.extend(ring);
            (block.n_kv_heads, ring.map_or(usize::MAX, |[_, ring]| ring))
        });
        let layers = match format {
            CacheFormat::F32 => Layers::F32(layers(arch.head_dim, sizes)),
            CacheFormat::F16 => Layers::F16(layers(arch.head_dim, sizes)),
        };
        Self {
            layers,
            rings,
            n_tokens: 0,
            written: 0,
            len: 0,
        }
    }

    /// Number of tokens in the cache.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Length of the sequence for which new keys are rotated.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Number of bytes allocated for keys and values.
    pub fn bytes(&self) -> usize {
        match &self.layers {
            Layers::F32(layers) => layers.iter().map(LayerCache::bytes).sum(),
            Layers::F16(layers) => layers.iter().map(LayerCache::bytes).sum(),
        }
    }

    /// Prepares for new tokens in a sequence that will have `len` tokens with them. If the keys in
    /// the cache were rotated otherwise than in such a sequence, drops all tokens, so that they must
    /// be added again.
    pub fn begin(&mut self, len: usize, ropes: &[Rope]) {
        if ropes
            .iter()
            .any(|rope| rope.switches_between(self.len, len))
        {
            self.truncate(0);
        }
        self.len = len;
    }

    /// Makes room for `n_tokens` tokens in total.
    ///
    /// # Errors
    /// Returns [`Error::OutOfMemory`] if memory runs out. The tokens in the cache are then
    /// unchanged.
    pub fn reserve(&mut self, n_tokens: usize) -> Result<()> {
        match &mut self.layers {
            Layers::F32(layers) => layers
                .iter_mut()
                .try_for_each(|layer| layer.reserve(n_tokens)),
            Layers::F16(layers) => layers
                .iter_mut()
                .try_for_each(|layer| layer.reserve(n_tokens)),
        }?;
        self.written = self.written.max(n_tokens);
        Ok(())
    }

    /// Counts `n` more tokens as held, after all layers have stored them.
    pub fn advance(&mut self, n: usize) {
        self.n_tokens += n;
    }

    /// Drops all tokens but the first `n_tokens`, or all tokens if a layer no longer keeps what the
    /// next token would see. The memory is kept.
    pub fn truncate(&mut self, n_tokens: usize) {
        self.n_tokens = self.n_tokens.min(n_tokens);
        let tiles = self.written.div_ceil(TILE);
        let kept = |[window, ring]: &[usize; 2]| {
            let seen = (self.n_tokens + 1).saturating_sub(*window);
            seen / TILE >= tiles.saturating_sub(*ring)
        };
        if !self.rings.iter().all(kept) {
            self.n_tokens = 0;
        }
        if self.n_tokens == 0 {
            self.written = 0;
        }
    }
}
