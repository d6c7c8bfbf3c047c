//! Working memory of a forward pass.

use crate::error::{Error, Result};
use crate::io::HfConfig;

/// Buffers for a number of rows. They grow when more rows come and never shrink.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    rows: usize,
    /// The residual stream, `[rows, d_model]`.
    pub x: Vec<f32>,
    /// The normalized residual stream, `[rows, d_model]`.
    pub normed: Vec<f32>,
    /// Output of a sub-block, to be added to the residual stream, `[rows, d_model]`.
    pub added: Vec<f32>,
    /// Queries, `[rows, n_heads * head_dim]`, or the gate projection, `[rows, d_mlp]`.
    pub a: Vec<f32>,
    /// Keys, `[rows, n_kv_heads * head_dim]`, or the up projection, `[rows, d_mlp]`.
    pub b: Vec<f32>,
    /// Values, `[rows, n_kv_heads * head_dim]`.
    pub c: Vec<f32>,
    /// Output of attention, `[rows, n_heads * head_dim]`.
    pub context: Vec<f32>,
    /// Cosines of the rows' positions, `[rows, head_dim / 2]`.
    pub cos: Vec<f32>,
    /// Sines of the rows' positions, `[rows, head_dim / 2]`.
    pub sin: Vec<f32>,
    /// Scratch memory of the kernels.
    pub scratch: Vec<Line>,
}

/// A cache line of 64 bytes.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(super) struct Line(#[allow(dead_code)] [u8; 64]);

impl Line {
    pub const ZERO: Self = Self([0; 64]);
}

/// Extends a vector to at least `len` elements.
pub(super) fn grow<T: Clone>(vector: &mut Vec<T>, len: usize, zero: T) -> Result<()> {
    if vector.len() < len {
        let fail = |_| Error::OutOfMemory {
            what: "a forward pass",
            bytes: len * size_of::<T>(),
        };
        vector.try_reserve_exact(len - vector.len()).map_err(fail)?;
        vector.resize(len, zero);
    }
    Ok(())
}

impl Workspace {
    /// Makes room for `rows` rows.
    ///
    /// # Errors
    /// Returns [`Error::OutOfMemory`] if memory runs out.
    pub fn reserve(&mut self, config: &HfConfig, rows: usize) -> Result<()> {
        if rows <= self.rows {
            return Ok(());
        }
        let (mut queries, mut keys, mut mlp) = (0, 0, 0);
        for block in config.blocks() {
            queries = queries.max(block.n_heads * config.head_dim());
            keys = keys.max(block.n_kv_heads * config.head_dim());
            mlp = mlp.max(block.d_mlp);
        }
        let (d_model, half) = (config.hidden_size(), config.head_dim() / 2);
        let sizes = [
            (&mut self.x, d_model),
            (&mut self.normed, d_model),
            (&mut self.added, d_model),
            (&mut self.a, queries.max(mlp)),
            (&mut self.b, keys.max(mlp)),
            (&mut self.c, keys),
            (&mut self.context, queries),
            (&mut self.cos, half),
            (&mut self.sin, half),
        ];
        for (buffer, width) in sizes {
            grow(buffer, rows * width, 0.0)?;
        }
        self.rows = rows;
        Ok(())
    }
}

/// Returns the bytes of the lines.
pub(super) fn bytes_of(lines: &mut [Line]) -> &mut [u8] {
    // SAFETY: a `Line` is 64 initialized bytes without padding, and `lines` is borrowed mutably.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast::<u8>(), size_of_val(lines)) }
}
