//! Tasks, the pieces of work of a thread, and the trait of the kernels that run them.

use std::ops::Range;

use super::input::{Input, Order, Sharing};
use crate::format::{Body, Dense};
use crate::kernels::disjoint::DisjointRows;

/// The products of all rows of inputs with some rows of a weight.
#[derive(Clone)]
pub(in crate::kernels) struct Task<'a> {
    /// Rows of the weight, which are columns of the output.
    pub rows: Range<usize>,
    pub input: &'a Input<'a>,
    pub output: DisjointRows<'a>,
}

/// The update of an adapter: `scale * h bt`.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Update<'a> {
    pub bt: &'a Dense,
    pub scale: f32,
    /// `x A^T`, `[rows, rank]`.
    pub h: &'a [f32],
    pub rank: usize,
}

impl Update<'_> {
    /// Returns the distance between rows of `bt`, in bytes.
    ///
    /// # Panics
    /// Panics if `h` or `bt` has too few rows or columns.
    pub fn stride(&self, rows: usize, columns: &Range<usize>) -> usize {
        let stride = self.bt.cols * self.bt.number.bytes();
        assert!(
            self.h.len() >= rows * self.rank
                && columns.end <= self.bt.cols
                && self.rank * stride <= self.bt.values.len()
        );
        stride
    }
}

/// The kernels of an instruction set.
pub(in crate::kernels) trait Kernels: Sync {
    /// Returns the order of inputs for packed codes of `bits` bits with `rows` rows of inputs.
    fn packed_order(&self, bits: u8, rows: usize) -> Order;

    /// Returns the order of inputs for sparse 4-bit codes.
    fn sparse_order(&self) -> Order;

    /// Returns which inputs of a block share a scale if `rows` rows of them are rounded to 8 bits.
    fn sharing(&self, _rows: usize) -> Sharing {
        Sharing::Block
    }

    /// Returns the count of numbers of scratch memory that a thread needs for `rows` rows of inputs
    /// with `units` units each.
    fn scratch_floats(&self, rows: usize, inputs: usize, units: usize) -> usize;

    /// Returns how many outputs each task of a layer, except the last, must have, or `None` if any
    /// multiple of 16 is allowed.
    fn task_outputs(&self, rows: usize) -> Option<usize>;

    /// Computes a task. `unit` is the size of the units of the weight's codes. Returns false if
    /// there is no kernel for the weight.
    ///
    /// # Safety
    /// The processor must have the instructions. The outputs must belong to this task and lie
    /// within the output's memory. `scratch` must be as long as
    /// [`scratch_floats`](Self::scratch_floats) requires.
    unsafe fn multiply(
        &self,
        weight: &Body,
        unit: Option<usize>,
        task: Task<'_>,
        scratch: &mut [f32],
    ) -> bool;

    /// Adds an update to the outputs of a task, which must have been computed.
    ///
    /// # Safety
    /// As for [`multiply`](Self::multiply), and `h` must have as many rows as the inputs.
    unsafe fn add_update(&self, update: &Update<'_>, task: Task<'_>, scratch: &mut [f32]);
}
