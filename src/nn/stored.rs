//! A frozen weight that stays as it is stored, and the grid that a weight is rounded to in training.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use crate::format::StoredMatrix;

/// Weights that one task unpacks.
const TASK: usize = 64 * 1024;

/// A stored weight as the operations take it: in host memory, shared by all clones, with the copies that devices hold of it.
#[derive(Clone, Debug)]
#[doc(hidden)]
pub struct StoredWeight(Arc<Held>);

struct Held {
    matrix: StoredMatrix,
    /// What backends made of the matrix, each of its own type.
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

    /// A backend's copy: the one that is wanted or, where there is none, a new one. It lives as long as the weight.
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

    /// Copies that are there.
    #[cfg(all(test, any(feature = "wgpu", feature = "vulkan", feature = "metal")))]
    pub(super) fn copies(&self) -> usize {
        self.0.copies.lock().unwrap().len()
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

/// Which group each row of a weight `[d_input, d_output]` is in: an input's scale and zero point are its group's.
#[derive(Clone, Debug, PartialEq, Eq)]
#[doc(hidden)]
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
        if self.order.is_some() {
            groups
        } else {
            d_input.div_ceil(self.size).min(groups)
        }
    }
}
