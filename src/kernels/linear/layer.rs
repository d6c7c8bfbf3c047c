//! A layer and what it works on.

use crate::format::StoredMatrix;

/// Rows of numbers, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// The numbers.
    pub values: &'a [f32],
    /// Rows.
    pub rows: usize,
    /// Numbers from one row's first to the next one's.
    pub stride: usize,
}

/// Rows of numbers that are written, row-major.
#[derive(Debug)]
pub struct RowsMut<'a> {
    /// The numbers.
    pub values: &'a mut [f32],
    /// Rows.
    pub rows: usize,
    /// Numbers from one row's first to the next one's.
    pub stride: usize,
}

/// A layer, or the part of it that is active: `y = x W^T + s (x A^T) B^T + b` on the first outputs.
#[derive(Clone, Copy, Debug)]
pub struct Linear<'a> {
    /// `[out, in]`.
    pub weight: &'a StoredMatrix,
    /// Active outputs, the first ones.
    pub outputs: usize,
    /// A number for each output; may be longer.
    pub bias: Option<&'a [f32]>,
    /// What is added to the weight.
    pub adapter: Option<Adapter<'a>>,
}

/// A low-rank update of a weight, or the part of it that is active.
#[derive(Clone, Copy, Debug)]
pub struct Adapter<'a> {
    /// `[max_rank, in]`.
    pub a: &'a StoredMatrix,
    /// `B` transposed, `[max_rank, out]`; dense.
    pub bt: &'a StoredMatrix,
    /// Active rank, the first rows.
    pub rank: usize,
    /// Factor of the update.
    pub scale: f32,
}

/// How inputs are rounded where a weight is one of codes. Other weights multiply them as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Activations {
    /// To 16-bit integers, one scale for each 128: an error of at most 1.6e-5 of the largest of these.
    #[default]
    Int16,
    /// To 8-bit integers, one scale for each 128: an error of at most 0.4 % of the largest of these, for about half the work. An option
    /// where work, not memory, is the limit.
    Int8,
}

/// Memory of the caller for what lies between input and output.
#[derive(Debug)]
pub struct Scratch<'a> {
    pub(super) bytes: &'a mut [u8],
}

impl<'a> Scratch<'a> {
    /// Any bytes; what they hold does not matter.
    pub fn new(bytes: &'a mut [u8]) -> Self {
        Self { bytes }
    }
}
