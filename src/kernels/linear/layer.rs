//! Descriptions of a layer, its inputs and its outputs.

use crate::format::StoredMatrix;

/// Rows of numbers to read, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// The numbers.
    pub values: &'a [f32],
    /// Number of rows.
    pub rows: usize,
    /// Distance from the start of one row to the start of the next, in numbers.
    pub stride: usize,
}

/// Rows of numbers to write, row-major.
#[derive(Debug)]
pub struct RowsMut<'a> {
    /// The numbers.
    pub values: &'a mut [f32],
    /// Number of rows.
    pub rows: usize,
    /// Distance from the start of one row to the start of the next, in numbers.
    pub stride: usize,
}

/// A linear layer, or its active part: `y = x W^T + s (x A^T) B^T + b` for the first `outputs`
/// outputs.
#[derive(Clone, Copy, Debug)]
pub struct Linear<'a> {
    /// Weight, `[out, in]`.
    pub weight: &'a StoredMatrix,
    /// Number of active outputs, which are the first ones.
    pub outputs: usize,
    /// Bias, one number for each output. It may be longer.
    pub bias: Option<&'a [f32]>,
    /// Low-rank update that is added to the weight.
    pub adapter: Option<Adapter<'a>>,
}

/// A low-rank update of a weight, or its active part.
#[derive(Clone, Copy, Debug)]
pub struct Adapter<'a> {
    /// `A`, `[max_rank, in]`.
    pub a: &'a StoredMatrix,
    /// `B` transposed, `[max_rank, out]`, in a dense format.
    pub bt: &'a StoredMatrix,
    /// Active rank: the number of rows of `a` and `bt` that are used, which are the first ones.
    pub rank: usize,
    /// Factor of the update, `s`.
    pub scale: f32,
}

/// Precision to which inputs are rounded for weights that consist of integer codes. Other weights
/// are multiplied by the unrounded inputs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Activations {
    /// 16-bit integers with one scale for each 128 inputs. The error is at most 1.6e-5 of the
    /// largest of these inputs.
    #[default]
    Int16,
    /// 8-bit integers with one scale for each 32 inputs with AVX-512, and for each 128 with other
    /// instruction sets. The error is at most 0.4 % of the largest of these inputs, for about half
    /// the work. Useful if compute, not memory bandwidth, is the limit: for prompts, and for sparse
    /// INT4.
    Int8,
}

/// Memory of the caller for intermediate results.
#[derive(Debug)]
pub struct Scratch<'a> {
    pub(super) bytes: &'a mut [u8],
}

impl<'a> Scratch<'a> {
    /// Wraps any bytes. Their contents do not matter.
    pub fn new(bytes: &'a mut [u8]) -> Self {
        Self { bytes }
    }
}
