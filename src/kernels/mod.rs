//! `y = x W^T + s (x A^T) B^T + b` for weights as they are stored, on slices: a few rows (decoding) or many (a prompt).
//!
//! Decoding is bound by memory: a kernel reads each byte of the weight once and unpacks it in registers. Dense and sparse weights of
//! numbers multiply `f32` inputs. Weights of codes multiply integers: each 128 inputs become 16-bit integers of one scale, so
//! that they keep 16 bits of their largest ([`Activations`]).
//!
//! Each result is one sum in an order that depends on sizes and the instruction set alone: the same bits at any number of threads.
//! What the parts of a weight hold is trusted nowhere: a weight that [`StoredMatrix::check`] would refuse gives wrong numbers, no
//! access outside of its memory.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod common;
pub(crate) mod disjoint;
mod forward;
#[cfg(any(feature = "flex", test))]
#[cfg_attr(not(feature = "flex"), allow(dead_code))] // Burn's operations on Flex use it
pub(crate) mod gemm;
mod input;
pub(crate) mod level;
#[cfg(target_arch = "aarch64")]
mod neon;
mod plain;
mod pool;
pub mod reference;
#[cfg_attr(not(feature = "flex"), allow(dead_code))] // half of them serve training on Flex
pub(crate) mod rows;
#[cfg(test)]
mod tests;

pub use forward::{forward, forward_on, scratch_bytes};
pub use level::Level;
pub use pool::Pool;

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
    bytes: &'a mut [u8],
}

impl<'a> Scratch<'a> {
    /// Any bytes; what they hold does not matter.
    pub fn new(bytes: &'a mut [u8]) -> Self {
        Self { bytes }
    }
}
