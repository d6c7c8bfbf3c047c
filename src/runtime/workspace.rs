//! The memory that a forward pass works in.

use crate::error::{Error, Result};
use crate::io::HfConfig;

/// Buffers for so many rows; they grow when more come, and otherwise stay.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    rows: usize,
    /// The residual stream, `[rows, d_model]`.
    pub x: Vec<f32>,
    /// Its normalized copy, `[rows, d_model]`.
    pub normed: Vec<f32>,
    /// What is added to it, `[rows, d_model]`.
    pub added: Vec<f32>,
    /// Queries, `[rows, n_heads * head_dim]`, or the gate, `[rows, d_mlp]`.
    pub a: Vec<f32>,
    /// Keys, or the up projection.
    pub b: Vec<f32>,
    /// Values.
    pub c: Vec<f32>,
    /// Attention's result, `[rows, n_heads * head_dim]`.
    pub context: Vec<f32>,
    /// `[rows, head_dim / 2]`.
    pub cos: Vec<f32>,
    /// `[rows, head_dim / 2]`.
    pub sin: Vec<f32>,
    /// What the kernels ask for.
    pub scratch: Vec<Line>,
}

/// A line of the cache.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(super) struct Line(#[allow(dead_code)] [u8; 64]);

impl Line {
    pub const ZERO: Self = Self([0; 64]);
}

/// Makes a vector at least so long.
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
    /// Makes room for so many rows.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
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

/// Lines as bytes.
pub(super) fn bytes_of(lines: &mut [Line]) -> &mut [u8] {
    // SAFETY: a line is 64 bytes without padding.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast::<u8>(), size_of_val(lines)) }
}
