//! Keys and values of the tokens that a session holds.
//!
//! A layer with a sliding window keeps only as many tiles as the window and one pass need. They form
//! a ring: a new tile takes the place of the oldest one.

use std::cell::UnsafeCell;
use std::ops::Range;
use std::sync::Arc;

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
pub(super) trait Kept: Stored + bytemuck::Pod {
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

/// Storage of [`STEP`] tiles of one layer. Caches that were copied share it until one of them writes
/// to it.
#[derive(Debug)]
struct Slab<S>(Box<[UnsafeCell<S>]>);

// SAFETY: callers of `tile` and `tile_mut` guarantee that nothing else accesses a part while it is
// being written through a shared reference.
unsafe impl<S: Send + Sync> Sync for Slab<S> {}

impl<S: Kept> Slab<S> {
    fn zeroed(len: usize) -> Result<Self> {
        let mut slab = Vec::new();
        slab.try_reserve_exact(len)
            .map_err(|_| Error::OutOfMemory {
                what: "key/value cache",
                bytes: len * size_of::<S>(),
            })?;
        slab.resize_with(len, || UnsafeCell::new(S::keep(0.0)));
        Ok(Self(slab.into_boxed_slice()))
    }

    /// Returns a copy of a slab that several caches share.
    fn copy(&self) -> Result<Self> {
        let mut copy = Self::zeroed(self.0.len())?;
        for (to, from) in copy.0.iter_mut().zip(&self.0) {
            // SAFETY: each cache writes only to slabs that it does not share, so nothing writes to
            // this one now.
            *to.get_mut() = unsafe { from.get().read() };
        }
        Ok(copy)
    }
}

/// Keys and values of one layer. For each tile and key/value head it stores keys
/// `[head_dim, TILE]`, then values `[TILE, head_dim]`.
#[derive(Clone, Debug)]
pub(super) struct LayerCache<S> {
    slabs: Vec<Arc<Slab<S>>>,
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

    /// Makes room for `n_tokens` tokens, and makes sure that nobody shares the memory of those
    /// behind the first `from`.
    fn reserve(&mut self, from: usize, n_tokens: usize) -> Result<()> {
        let len = STEP * self.n_heads * self.tile_len();
        let wanted = if len == 0 {
            0
        } else {
            n_tokens.div_ceil(TILE).min(self.ring).div_ceil(STEP)
        };
        while self.slabs.len() < wanted {
            let slab = Arc::new(Slab::zeroed(len)?);
            self.slabs.try_reserve(1).map_err(|_| Error::OutOfMemory {
                what: "key/value cache",
                bytes: size_of::<Arc<Slab<S>>>(),
            })?;
            self.slabs.push(slab);
        }
        for tile in from / TILE..n_tokens.div_ceil(TILE) {
            // A layer without heads has no slabs.
            if let Some(slab) = self.slabs.get_mut(tile % self.ring / STEP)
                && Arc::get_mut(slab).is_none()
            {
                *slab = Arc::new(slab.copy()?);
            }
        }
        Ok(())
    }

    /// Number of elements of a tile, of all heads together.
    fn whole_tile(&self) -> usize {
        self.n_heads * self.tile_len()
    }

    /// Returns the elements of a tile, of all heads. `None` if there is no memory for it.
    fn whole(&self, tile: usize) -> Option<&[S]> {
        let (slab, range) = self.range(tile, 0);
        let cells = self.slabs.get(slab)?.0.get(range.start..)?;
        let cells = cells.get(..self.whole_tile())?;
        // SAFETY: `UnsafeCell<S>` has the layout of `S`. This cache writes only through tasks that
        // borrow it, and the others do not write to what they share.
        Some(unsafe { std::slice::from_raw_parts(cells.as_ptr().cast::<S>(), cells.len()) })
    }

    /// Sets the elements of a tile from their bytes. Returns false if their number is wrong or
    /// there is no memory for the tile that nobody shares.
    fn set_whole(&mut self, tile: usize, bytes: &[u8]) -> bool {
        let (slab, range) = self.range(tile, 0);
        let len = self.whole_tile();
        let slab = self.slabs.get_mut(slab).and_then(Arc::get_mut);
        let cells = slab.and_then(|slab| slab.0.get_mut(range.start..range.start + len));
        let (Some(cells), true) = (cells, bytes.len() == len * size_of::<S>()) else {
            return false;
        };
        for (cell, bytes) in cells.iter_mut().zip(bytes.chunks_exact(size_of::<S>())) {
            *cell.get_mut() = bytemuck::pod_read_unaligned(bytes);
        }
        true
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
#[derive(Clone, Debug)]
pub(super) enum Layers {
    F32(Vec<LayerCache<f32>>),
    F16(Vec<LayerCache<f16>>),
}

/// The cache of one session. Memory is allocated a few tiles at a time, so no token is copied when
/// the cache grows. Copies share the memory of what they have in common.
#[derive(Clone, Debug)]
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

    /// Number of bytes of the keys and values of a token in all layers.
    pub fn bytes_of_token(&self) -> usize {
        fn sum<S: Kept>(layers: &[LayerCache<S>]) -> usize {
            let sizes = layers.iter().map(|layer| layer.whole_tile() / TILE);
            sizes.sum::<usize>() * size_of::<S>()
        }
        match &self.layers {
            Layers::F32(layers) => sum(layers),
            Layers::F16(layers) => sum(layers),
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
        let from = self.n_tokens;
        match &mut self.layers {
            Layers::F32(layers) => layers
                .iter_mut()
                .try_for_each(|layer| layer.reserve(from, n_tokens)),
            Layers::F16(layers) => layers
                .iter_mut()
                .try_for_each(|layer| layer.reserve(from, n_tokens)),
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

    /// Describes what the cache holds, for a copy in a file.
    pub fn extent(&self) -> Extent {
        Extent {
            n_tokens: self.n_tokens as u64,
            written: self.written as u64,
            len: self.len as u64,
        }
    }

    /// Passes the elements of each layer's tiles to `put`: for each layer the index of the first
    /// tile that is kept, the number of tiles, and the bytes of each.
    pub fn export(&self, put: &mut dyn FnMut(Piece<'_>) -> Result<()>) -> Result<()> {
        let tiles = self.written.div_ceil(TILE);
        match &self.layers {
            Layers::F32(layers) => export(layers, tiles, put),
            Layers::F16(layers) => export(layers, tiles, put),
        }
    }

    /// Number of bytes that [`export`](Self::export) passes on, and of pieces.
    pub fn exported(&self) -> (usize, usize) {
        fn sizes<S: Kept>(layers: &[LayerCache<S>], tiles: usize) -> (usize, usize) {
            let bytes = layers
                .iter()
                .map(|layer| layer.kept(tiles).len() * layer.whole_tile() * size_of::<S>());
            (bytes.sum(), layers.len())
        }
        let tiles = self.written.div_ceil(TILE);
        match &self.layers {
            Layers::F32(layers) => sizes(layers, tiles),
            Layers::F16(layers) => sizes(layers, tiles),
        }
    }

    /// Takes what [`export`](Self::export) gave. `take` returns the tiles of the next layer, given
    /// the range that is expected and the bytes of a tile. The cache must hold no token.
    ///
    /// # Errors
    /// Returns the errors of `take`, and [`Error::OutOfMemory`]. The cache then holds no token.
    pub fn import<'a>(
        &mut self,
        extent: &Extent,
        take: &mut dyn FnMut(Range<usize>, usize) -> Result<&'a [u8]>,
    ) -> Result<()> {
        let number = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
        let (n_tokens, written) = (number(extent.n_tokens), number(extent.written));
        self.truncate(0);
        let tiles = written.div_ceil(TILE);
        match &mut self.layers {
            Layers::F32(layers) => import(layers, tiles, take),
            Layers::F16(layers) => import(layers, tiles, take),
        }?;
        (self.n_tokens, self.written) = (n_tokens, written);
        self.len = number(extent.len);
        Ok(())
    }
}

/// What a cache holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// Number of tokens in the cache.
    pub n_tokens: u64,
    /// Number of tokens after which the newest tile was or may have been written.
    pub written: u64,
    /// Length of the sequence for which the newest keys were rotated.
    pub len: u64,
}

/// A part of a cache's copy.
pub(super) enum Piece<'a> {
    /// A layer begins with these tiles.
    Layer(Range<usize>),
    /// The elements of the next tile.
    Tile(&'a [u8]),
}

impl<S: Kept> LayerCache<S> {
    /// Returns the tiles that are kept of the first `tiles`.
    fn kept(&self, tiles: usize) -> Range<usize> {
        let first = match self.whole_tile() {
            0 => tiles,
            _ => tiles.saturating_sub(self.ring),
        };
        first..tiles
    }
}

fn export<S: Kept>(
    layers: &[LayerCache<S>],
    tiles: usize,
    put: &mut dyn FnMut(Piece<'_>) -> Result<()>,
) -> Result<()> {
    for layer in layers {
        let kept = layer.kept(tiles);
        put(Piece::Layer(kept.clone()))?;
        for tile in kept {
            if let Some(elements) = layer.whole(tile) {
                put(Piece::Tile(bytemuck::cast_slice(elements)))?;
            }
        }
    }
    Ok(())
}

fn import<'a, S: Kept>(
    layers: &mut [LayerCache<S>],
    tiles: usize,
    take: &mut dyn FnMut(Range<usize>, usize) -> Result<&'a [u8]>,
) -> Result<()> {
    for layer in layers {
        let (kept, size) = (layer.kept(tiles), layer.whole_tile() * size_of::<S>());
        // The sizes are checked before memory is taken.
        let bytes = take(kept.clone(), size)?;
        layer.reserve(kept.start.saturating_mul(TILE), tiles.saturating_mul(TILE))?;
        for (tile, bytes) in kept.zip(bytes.chunks_exact(size.max(1))) {
            if !layer.set_whole(tile, bytes) {
                let found = format!("{} bytes of tile {tile}", bytes.len());
                return Err(Error::argument("state", found, format!("{size} bytes")));
            }
        }
    }
    Ok(())
}
