//! Kernels for AVX-512 with VNNI, VBMI and VBMI2, one file for each family of formats.
//!
//! A few rows of the weight are multiplied by a few rows of inputs at a time. All functions here
//! need the features that `Level::detect` checks before it returns this level.

mod codes;
mod lanes;
mod loads;
mod panel;
mod sparse16;
mod sparse_int4;
mod units;

use crate::format::Body;
use crate::kernels::linear::input::{Order, Sharing};
use crate::kernels::linear::task::{Kernels, Task, Update};
use crate::kernels::linear::{dense, update};

pub(super) use lanes::Avx512;

/// Number of rows of inputs from which on a weight is unpacked once for all of them.
const MANY: usize = 9;

impl Kernels for Avx512 {
    fn packed_order(&self, bits: u8, rows: usize) -> Order {
        if bits == 4 && rows < MANY {
            Order::EvenOdd
        } else {
            Order::InOrder
        }
    }

    fn sparse_order(&self) -> Order {
        Order::InOrder
    }

    fn sharing(&self, rows: usize) -> Sharing {
        if rows < MANY {
            Sharing::EveryFourth
        } else {
            Sharing::Quarter
        }
    }

    fn scratch_floats(&self, rows: usize, inputs: usize, units: usize) -> usize {
        if rows >= MANY {
            panel::floats(inputs, units)
        } else {
            units::floats(inputs, units)
        }
    }

    fn task_outputs(&self, rows: usize) -> Option<usize> {
        (rows >= MANY).then_some(panel::WIDTH)
    }

    unsafe fn multiply(
        &self,
        weight: &Body,
        unit: Option<usize>,
        task: Task<'_>,
        scratch: &mut [f32],
    ) -> bool {
        let many = task.input.rows >= MANY;
        // SAFETY: the caller upholds this function's contract.
        unsafe {
            match (weight, unit) {
                (Body::Dense(dense), _) if many => panel::dense(dense, task, scratch),
                (Body::Dense(dense), _) => dense::multiply::<Self>(dense, task),
                (Body::Sparse16(sparse), _) if many => panel::sparse(sparse, task, scratch),
                (Body::Sparse16(sparse), _) => sparse16::multiply(sparse, task),
                (Body::Int(packed), Some(unit)) if many => {
                    panel::packed(packed, unit, task, scratch)
                }
                (Body::Int(packed), Some(unit)) => codes::multiply(packed, unit, task, scratch),
                (Body::SparseInt4(sparse), Some(unit)) if many => {
                    panel::sparse_int4(sparse, unit, task, scratch)
                }
                (Body::SparseInt4(sparse), Some(unit)) => {
                    sparse_int4::multiply(sparse, unit, task, scratch)
                }
                _ => return false,
            }
        }
        true
    }

    unsafe fn add_update(&self, update: &Update<'_>, task: Task<'_>, scratch: &mut [f32]) {
        // SAFETY: the caller upholds this function's contract.
        unsafe {
            if task.input.rows >= MANY {
                panel::add_update(update, task, scratch);
            } else {
                update::add::<Self>(update, task);
            }
        }
    }
}
