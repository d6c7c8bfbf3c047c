//! NEON, as every 64-bit Arm processor with floating-point numbers has it; and, where there are some, the dot products of bytes
//! (`sdot`).
//!
//! A few rows of the weight go at a time with a few of the inputs. What is sparse is put at its columns by `tbl`, which a table of 256
//! tells for each byte of the mask which stored number belongs to which of eight columns.
//!
//! Functions without a target feature of their own are inlined into ones that have it, or need none but NEON, which
//! `Level::detect` saw before it gave the level.

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

/// Rows of inputs from which on a weight is unpacked for all of them.
const MANY: usize = 9;

/// `dots` says whether the processor has `sdot`.
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
        // SAFETY: the caller's promise.
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
        // SAFETY: the caller's promise.
        unsafe { update::add::<lanes::Lanes>(update, task) };
    }
}
