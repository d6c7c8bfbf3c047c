//! Keys and values of the tokens that a session holds.

use std::cell::UnsafeCell;
use std::ops::Range;

use half::f16;

use crate::arch::BlockDims;
use crate::error::{Error, Result};
use crate::kernels::number::Stored;
use crate::kernels::rows::attention::TILE;

/// Tiles that are allocated at a time.
const STEP: usize = 4;

/// How keys and values are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheFormat {
    /// 32 bits: the results of a model are those without a cache.
    #[default]
    F32,
    /// 16 bits, rounded to nearest: half the memory, and half the time of attention in long contexts.
    F16,
}

/// A number as the cache keeps it.
pub(super) trait Kept: Stored {
    /// Rounded to nearest; what is too large becomes the largest there is.
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

/// [`STEP`] tiles of one layer.
#[derive(Debug)]
struct Slab<S>(Box<[UnsafeCell<S>]>);

// SAFETY: whoever writes through a shared reference has promised that nobody else has the part; see `tile`.
unsafe impl<S: Send + Sync> Sync for Slab<S> {}

/// Keys and values of one layer: for each tile and key/value head keys `[head_dim, TILE]`, then values `[TILE, head_dim]`.
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

    /// Elements of keys and values of a head in one tile.
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

    /// Keys and values of a head in a tile.
    ///
    /// # Safety
    /// Nobody writes to this head's tile meanwhile.
    pub unsafe fn tile(&self, tile: usize, head: usize) -> (&[S], &[S]) {
        let (slab, range) = self.range(tile, head);
        let cells = &self.slabs[slab].0[range];
        // SAFETY: a cell has the layout of what is in it; the caller has seen to it that nobody writes.
        let all = unsafe { std::slice::from_raw_parts(cells.as_ptr().cast::<S>(), cells.len()) };
        all.split_at(all.len() / 2)
    }

    /// As [`tile`](Self::tile), to be written.
    ///
    /// # Safety
    /// Nobody reads this head's tile or writes to it meanwhile.
    #[allow(clippy::mut_from_ref)] // the cells are there for it
    pub unsafe fn tile_mut(&self, tile: usize, head: usize) -> (&mut [S], &mut [S]) {
        let (slab, range) = self.range(tile, head);
        let cells = &self.slabs[slab].0[range];
        let start = UnsafeCell::raw_get(cells.as_ptr());
        // SAFETY: a cell has the layout of what is in it; the caller has seen to it that nobody else looks at these.
        let all = unsafe { std::slice::from_raw_parts_mut(start, cells.len()) };
        let half = all.len() / 2;
        all.split_at_mut(half)
    }
}

/// All layers, in the format that was chosen.
#[derive(Debug)]
pub(super) enum Layers {
    F32(Vec<LayerCache<f32>>),
    F16(Vec<LayerCache<f16>>),
}

/// The cache of one session. Memory is taken in steps of a few tiles, so that no token is copied when more come.
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

    /// Tokens held.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Makes room for so many tokens in all.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; what was there is as before.
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

    /// Counts `n` tokens as held, after every layer has got them.
    pub fn advance(&mut self, n: usize) {
        self.n_tokens += n;
    }

    /// Forgets all tokens but the first; memory stays.
    pub fn truncate(&mut self, n_tokens: usize) {
        self.n_tokens = self.n_tokens.min(n_tokens);
    }
}
