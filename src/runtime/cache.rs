//! Keys and values of the tokens that a session holds.

use std::cell::UnsafeCell;
use std::ops::Range;

use half::f16;

use crate::arch::BlockDims;
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
}

impl<S: Kept> LayerCache<S> {
    fn new(n_heads: usize, head_dim: usize) -> Self {
        Self {
            slabs: Vec::new(),
            n_heads,
            head_dim,
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
            n_tokens.div_ceil(STEP * TILE)
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

    fn range(&self, tile: usize, head: usize) -> (usize, Range<usize>) {
        let start = ((tile % STEP) * self.n_heads + head) * self.tile_len();
        (tile / STEP, start..start + self.tile_len())
    }

    /// Returns the keys and values of a head in a tile.
    ///
    /// # Safety
    /// Nothing may write to this head's tile while the slices are in use.
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
    /// Nothing else may read or write this head's tile while the slices are in use.
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
    n_tokens: usize,
}

impl Cache {
    pub fn new(format: CacheFormat, blocks: &[BlockDims], head_dim: usize) -> Self {
        let layers = match format {
            CacheFormat::F32 => Layers::F32(
                blocks
                    .iter()
                    .map(|block| LayerCache::new(block.n_kv_heads, head_dim))
                    .collect(),
            ),
            CacheFormat::F16 => Layers::F16(
                blocks
                    .iter()
                    .map(|block| LayerCache::new(block.n_kv_heads, head_dim))
                    .collect(),
            ),
        };
        Self {
            layers,
            n_tokens: 0,
        }
    }

    /// Number of tokens in the cache.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
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
        }
    }

    /// Counts `n` more tokens as held, after all layers have stored them.
    pub fn advance(&mut self, n: usize) {
        self.n_tokens += n;
    }

    /// Drops all tokens but the first `n_tokens`. The memory is kept.
    pub fn truncate(&mut self, n_tokens: usize) {
        self.n_tokens = self.n_tokens.min(n_tokens);
    }
}
