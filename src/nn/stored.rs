//! Frozen weights that keep their stored format, and the input groups of a quantization grid.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use crate::format::StoredMatrix;

/// Number of weights that one task unpacks.
const TASK: usize = 64 * 1024;

/// A stored weight as the operations take it: in host memory, shared by all clones, along with its
/// copies on devices.
#[derive(Clone, Debug)]
#[doc(hidden)]
pub struct StoredWeight(Arc<Held>);

struct Held {
    matrix: StoredMatrix,
    /// Copies made by backends, each of the backend's own type.
    copies: Mutex<Vec<Arc<dyn Any + Send + Sync>>>,
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.matrix.fmt(f)
    }
}

impl StoredWeight {
    /// Wraps a matrix.
    pub fn new(matrix: StoredMatrix) -> Self {
        Self(Arc::new(Held {
            matrix,
            copies: Mutex::default(),
        }))
    }

    /// The matrix, `[d_output, d_input]`.
    pub fn matrix(&self) -> &StoredMatrix {
        &self.0.matrix
    }

    /// A backend's copy of the weight. Returns the existing copy that satisfies the predicate, or
    /// creates one. Copies live as long as the weight.
    #[allow(dead_code)] // not every build has a backend that keeps one
    pub(super) fn copy<T: Any + Send + Sync>(
        &self,
        wanted: impl Fn(&T) -> bool,
        make: impl FnOnce() -> T,
    ) -> Arc<T> {
        let mut copies = self.0.copies.lock().unwrap_or_else(PoisonError::into_inner);
        let found = copies
            .iter()
            .find_map(|copy| copy.clone().downcast().ok().filter(|copy| wanted(copy)));
        found.unwrap_or_else(|| {
            let made = Arc::new(make());
            copies.push(made.clone());
            made
        })
    }

    /// Number of copies.
    #[cfg(all(test, any(feature = "wgpu", feature = "vulkan", feature = "metal")))]
    pub(super) fn copies(&self) -> usize {
        self.0.copies.lock().unwrap().len()
    }

    /// The sizes `[d_input, d_output]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.matrix().cols(), self.matrix().rows()]
    }

    /// The weights as `f32`, row-major `[d_output, d_input]`, decoded on all threads.
    pub(crate) fn values(&self) -> Vec<f32> {
        let [d_input, d_output] = self.dims();
        let mut values = vec![0.0; d_input * d_output];
        if values.is_empty() {
            return values;
        }
        let rows = (TASK / d_input).max(1);
        values
            .par_chunks_mut(rows * d_input)
            .enumerate()
            .for_each(|(index, out)| {
                let done = self.matrix().dequantize_rows(index * rows, out);
                debug_assert!(done.is_ok(), "whole rows of the matrix: {done:?}");
            });
        values
    }
}

/// The groups of rows of a weight `[d_input, d_output]`: inputs of a group share a scale and a zero
/// point.
#[derive(Clone, Debug, PartialEq, Eq)]
#[doc(hidden)]
pub struct InputGroups {
    /// Number of inputs in a group, if groups are in order; the last group may be shorter.
    pub size: usize,
    /// The group of each input, if groups are not in order.
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

    /// Number of groups that the first `d_input` inputs belong to, at most `groups`.
    pub fn count(&self, d_input: usize, groups: usize) -> usize {
        if self.order.is_some() {
            groups
        } else {
            d_input.div_ceil(self.size).min(groups)
        }
    }
}
