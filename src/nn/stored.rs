//! A frozen weight that stays as it is stored, and the grid that a weight is rounded to in training.

use std::sync::Arc;

use rayon::prelude::*;

use crate::format::StoredMatrix;

/// Weights that one task unpacks.
const TASK: usize = 64 * 1024;

/// A stored weight as the operations take it: in host memory, shared by all clones.
#[derive(Clone, Debug)]
pub struct StoredWeight(Arc<StoredMatrix>);

impl StoredWeight {
    /// Wraps a matrix.
    pub fn new(matrix: StoredMatrix) -> Self {
        Self(Arc::new(matrix))
    }

    /// The matrix, `[d_output, d_input]`.
    pub fn matrix(&self) -> &StoredMatrix {
        &self.0
    }

    /// `[d_input, d_output]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.matrix().cols(), self.matrix().rows()]
    }

    /// The weights as `f32`, row-major `[d_output, d_input]`; on all threads.
    pub(crate) fn values(&self) -> Vec<f32> {
        let [d_input, d_output] = self.dims();
        let mut values = vec![0.0; d_input * d_output];
        if values.is_empty() {
            return values;
        }
        let rows = (TASK / d_input).max(1);
        values.par_chunks_mut(rows * d_input).enumerate().for_each(|(index, out)| {
            let done = self.matrix().dequantize_rows(index * rows, out);
            debug_assert!(done.is_ok(), "whole rows of the matrix: {done:?}");
        });
        values
    }
}

/// Which group each row of a weight `[d_input, d_output]` is in: an input's scale and zero point are its group's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputGroups {
    /// Inputs of a group where they are in order; the last group may be shorter.
    pub size: usize,
    /// The group of each input where they are not.
    pub order: Option<Arc<[u32]>>,
}

impl InputGroups {
    /// The group of an input.
    pub fn of(&self, input: usize) -> usize {
        match &self.order {
            Some(order) => order[input] as usize,
            None => input / self.size,
        }
    }

    /// Groups that the first `d_input` inputs are in, where there are no more than `groups`.
    pub fn count(&self, d_input: usize, groups: usize) -> usize {
        if self.order.is_some() { groups } else { d_input.div_ceil(self.size).min(groups) }
    }
}
