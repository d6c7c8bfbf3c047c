//! Working memory of a forward pass.

use crate::arch::Rope;
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
    /// Cosines and sines of the rows' positions for each rotary embedding, `[rows, half]` each.
    pub rotations: Vec<(Vec<f32>, Vec<f32>)>,
    /// Numbers of new tokens of the sequences of a batch, while none is running.
    pub lens: Vec<usize>,
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
    pub fn reserve(&mut self, config: &HfConfig, ropes: &[Rope], rows: usize) -> Result<()> {
        if rows <= self.rows {
            return Ok(());
        }
        let (mut queries, mut keys, mut mlp) = (0, 0, 0);
        for block in config.blocks() {
            queries = queries.max(block.n_heads * config.head_dim());
            keys = keys.max(block.n_kv_heads * config.head_dim());
            mlp = mlp.max(block.d_mlp);
        }
        let d_model = config.hidden_size();
        self.rotations.resize_with(ropes.len(), Default::default);
        for (rope, (cos, sin)) in ropes.iter().zip(&mut self.rotations) {
            grow(cos, rows * rope.half(), 0.0)?;
            grow(sin, rows * rope.half(), 0.0)?;
        }
        let sizes = [
            (&mut self.x, d_model),
            (&mut self.normed, d_model),
            (&mut self.added, d_model),
            (&mut self.a, queries.max(mlp)),
            (&mut self.b, keys.max(mlp)),
            (&mut self.c, keys),
            (&mut self.context, queries),
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
