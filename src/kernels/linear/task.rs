//! What a thread does at a time, and who does it.

use std::ops::Range;

use super::input::{Input, Order};
use crate::format::{Body, Dense};
use crate::kernels::disjoint::DisjointRows;

/// Products of all rows of inputs with some rows of a weight.
#[derive(Clone)]
pub(in crate::kernels) struct Task<'a> {
    /// Rows of the weight, which are columns of the output.
    pub rows: Range<usize>,
    pub input: &'a Input<'a>,
    pub output: DisjointRows<'a>,
}

/// What an adapter adds: `scale * h bt`.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Update<'a> {
    pub bt: &'a Dense,
    pub scale: f32,
    /// `[rows, rank]`.
    pub h: &'a [f32],
    pub rank: usize,
}

impl Update<'_> {
    /// Bytes from one rank of `bt` to the next.
    ///
    /// # Panics
    /// Where `h` or `bt` has less than so many rows and columns.
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
    /// The order in which packed codes of some bits want so many rows of inputs.
    fn packed_order(&self, bits: u8, rows: usize) -> Order;

    /// The order in which sparse codes of 4 bits want inputs.
    fn sparse_order(&self) -> Order;

    /// Numbers of scratch memory that a thread needs for so many rows of inputs, of so many units.
    fn scratch_floats(&self, rows: usize, inputs: usize, units: usize) -> usize;

    /// How many outputs each task but the last of a layer must have; none where any multiple of 16 will do.
    fn task_outputs(&self, rows: usize) -> Option<usize>;

    /// Computes a task; `unit` is that of the weight's codes. False where there is no kernel for the weight.
    ///
    /// # Safety
    /// The processor has the instructions; the outputs are this task's and in the output's memory; `scratch` is as long as
    /// [`scratch_floats`](Self::scratch_floats) says.
    unsafe fn multiply(
        &self,
        weight: &Body,
        unit: Option<usize>,
        task: Task<'_>,
        scratch: &mut [f32],
    ) -> bool;

    /// Adds an update to the outputs of a task, which are computed.
    ///
    /// # Safety
    /// As for [`multiply`](Self::multiply), and `h` has the rows of inputs.
    unsafe fn add_update(&self, update: &Update<'_>, task: Task<'_>, scratch: &mut [f32]);
}
