//! Kernels for NEON, which every 64-bit Arm processor with floating-point numbers has, and for the
//! dot products of bytes (`sdot`) of some processors.
//!
//! A few rows of the weight are multiplied by a few rows of inputs at a time. Sparse weights are
//! expanded by `tbl`, with a table of 256 entries that tells, for each byte of the mask, which
//! stored number belongs to which of eight columns.
//!
//! Functions without a target feature of their own are inlined into functions that have it, or need
//! only NEON, which `Level::detect` checks before it returns this level.

mod codes;
mod expand;
mod lanes;
mod packed;
mod panel;
mod sparse16;
mod sparse_int4;
mod units;

use crate::format::Body;
use crate::kernels::linear::input::Order;
use crate::kernels::linear::task::{Kernels, Task, Update};
use crate::kernels::linear::{dense, update};

/// Number of rows of inputs from which on a weight is unpacked once for all of them.
const MANY: usize = 9;

/// `dots` is set if the processor has `sdot`.
pub(super) struct Neon {
    pub dots: bool,
}

impl Kernels for Neon {
    fn packed_order(&self, _bits: u8, _rows: usize) -> Order {
        Order::EvenOdd
    }

    fn sparse_order(&self) -> Order {
        Order::InOrder
    }

    fn scratch_floats(&self, rows: usize, inputs: usize, units: usize) -> usize {
        if rows >= MANY {
            panel::floats(inputs, units)
        } else {
            units::floats(units)
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
                (Body::Dense(weight), _) if many => panel::dense(weight, task, scratch),
                (Body::Dense(weight), _) => dense::multiply::<lanes::Lanes>(weight, task),
                (Body::Sparse16(weight), _) if many => panel::sparse(weight, task, scratch),
                (Body::Sparse16(weight), _) => sparse16::multiply(weight, task),
                (Body::Int(weight), Some(unit)) => {
                    let of = codes::Call::new(self.dots, many, weight.whole_grid(), unit, task);
                    match weight.bits() {
                        2 => of.multiply(packed::Packed::<2>::new(weight, &of.task), scratch),
                        3 => of.multiply(packed::Packed::<3>::new(weight, &of.task), scratch),
                        4 => of.multiply(packed::Packed::<4>::new(weight, &of.task), scratch),
                        8 => of.multiply(packed::Packed::<8>::new(weight, &of.task), scratch),
                        _ => return false,
                    }
                }
                (Body::SparseInt4(weight), Some(unit)) => {
                    let of = codes::Call::new(self.dots, many, &weight.grid, unit, task);
                    of.multiply(sparse_int4::Sparse::new(weight, unit, &of.task), scratch);
                }
                _ => return false,
            }
        }
        true
    }

    unsafe fn add_update(&self, update: &Update<'_>, task: Task<'_>, _scratch: &mut [f32]) {
        // SAFETY: the caller upholds this function's contract.
        unsafe { update::add::<lanes::Lanes>(update, task) };
    }
}
