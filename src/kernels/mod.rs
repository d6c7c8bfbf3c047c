//! Computes `y = x W^T + s (x A^T) B^T + b` on slices, directly on the stored format of the
//! weights, for a few rows of inputs (decoding) or many (a prompt).
//!
//! Decoding is bound by memory bandwidth: a kernel reads each byte of the weight once and unpacks
//! it in registers. Dense and sparse floating-point weights are multiplied by `f32` inputs. Integer
//! codes are multiplied by integers: each block of 128 inputs is rounded to 16-bit integers that
//! share one scale, so that the largest input keeps 16 bits, or to 8-bit integers in smaller groups
//! ([`Activations`]).
//!
//! Each result is one sum whose order depends only on the sizes and the instruction set, so results
//! are bit-identical for any number of threads. Kernels never trust the contents of a weight: a
//! weight that [`StoredMatrix::check`](crate::format::StoredMatrix::check) would reject gives wrong
//! results, but no out-of-bounds access.

pub(crate) mod disjoint;
#[cfg(any(feature = "flex", test))]
#[cfg_attr(not(feature = "flex"), allow(dead_code))] // Burn's operations on Flex use it
pub(crate) mod gemm;
mod isa;
pub(crate) mod level;
mod linear;
mod memory;
pub(crate) mod number;
mod pool;
#[cfg(test)]
pub(crate) mod reference;
// Half of the row operations serve training on Flex only.
#[cfg_attr(not(feature = "flex"), allow(dead_code, unused_imports))]
pub(crate) mod rows;
#[cfg(test)]
mod tests;

pub use level::Level;
pub use linear::{
    Activations, Adapter, Linear, Rows, RowsMut, Scratch, add_updates, forward, forward_on,
    scratch_bytes,
};
pub use pool::Pool;
