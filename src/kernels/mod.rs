//! `y = x W^T + s (x A^T) B^T + b` for weights as they are stored, on slices: a few rows (decoding) or many (a prompt).
//!
//! Decoding is bound by memory: a kernel reads each byte of the weight once and unpacks it in registers. Dense and sparse weights of
//! numbers multiply `f32` inputs. Weights of codes multiply integers: each 128 inputs become 16-bit integers of one scale, so
//! that they keep 16 bits of their largest ([`Activations`]).
//!
//! Each result is one sum in an order that depends on sizes and the instruction set alone: the same bits at any number of threads.
//! What the parts of a weight hold is trusted nowhere: a weight that [`StoredMatrix::check`](crate::format::StoredMatrix::check) would refuse gives wrong numbers, no
//! access outside of its memory.

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
#[cfg_attr(not(feature = "flex"), allow(dead_code))] // half of them serve training on Flex
pub(crate) mod rows;
#[cfg(test)]
mod tests;

pub use level::Level;
pub use linear::{
    Activations, Adapter, Linear, Rows, RowsMut, Scratch, forward, forward_on, scratch_bytes,
};
pub use pool::Pool;
