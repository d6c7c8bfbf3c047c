//! AVX2 with FMA, F16C and BMI: one file for each family of formats.
//!
//! There is no instruction that expands what is packed: sparse weights go by tables, eight columns for each byte of their bits. All
//! functions here need the features that `Level::detect` asks for before it gives the level.

mod int4;
mod lanes;
mod sparse16;
mod sparse_int4;
mod units;
mod words;

use crate::format::Body;
use crate::kernels::linear::input::{BLOCK, Order};
use crate::kernels::linear::task::{Kernels, Task, Update};
use crate::kernels::linear::{dense, update};

pub(super) use lanes::Avx2;

impl Kernels for Avx2 {
    fn packed_order(&self, bits: u8, rows: usize) -> Order {
        // Those of 4 bits multiply as bytes, unpacked again for each row.
        if bits == 4 && rows < words::MANY {
            Order::EvenOdd
        } else {
            Order::Words
        }
    }

    fn sparse_order(&self) -> Order {
        Order::Words
    }

    fn scratch_floats(&self, rows: usize, inputs: usize, units: usize) -> usize {
        // A row of the weight, as numbers, or as words of half their size beside what is known of units.
        let row = if rows >= words::MANY {
            inputs.next_multiple_of(BLOCK)
        } else {
            0
        };
        row.max(row / 2 + units::floats(units))
    }

    fn task_outputs(&self, _rows: usize) -> Option<usize> {
        None
    }

    unsafe fn multiply(
        &self,
        weight: &Body,
        unit: Option<usize>,
        task: Task<'_>,
        scratch: &mut [f32],
    ) -> bool {
        // SAFETY: the caller's promise.
        unsafe {
            match (weight, unit) {
                (Body::Dense(weight), _) => dense::multiply::<Self>(weight, task),
                (Body::Sparse16(weight), _) => sparse16::multiply(weight, task, scratch),
                (Body::Int(weight), Some(unit)) => {
                    match self.packed_order(weight.bits(), task.input.rows) {
                        Order::EvenOdd => int4::multiply(weight, unit, task, scratch),
                        _ => words::multiply(weight, unit, task, scratch),
                    }
                }
                (Body::SparseInt4(weight), Some(unit)) => {
                    sparse_int4::multiply(weight, unit, task, scratch);
                }
                _ => return false,
            }
        }
        true
    }

    unsafe fn add_update(&self, update: &Update<'_>, task: Task<'_>, _scratch: &mut [f32]) {
        // SAFETY: the caller's promise.
        unsafe { update::add::<Self>(update, task) };
    }
}
