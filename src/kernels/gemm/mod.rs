//! Matrix products of floats on the CPU, for operands of any strides.
//!
//! [`product`] multiplies two matrices of `f32`. [`Weight`] is a right operand of 16 or 32 bits
//! that is never widened as a whole. There are three implementations. With few rows, the weight is
//! read once, in memory order ([`few`]). On processors with AVX-512, operands are packed and tiles
//! are kept in registers ([`packed`]). The `gemm` crate computes all other products.
//!
//! The order of the sums depends only on the sizes, so results are bit-identical for any number of
//! threads.

mod few;
mod operand;
mod pack;
mod packed;
mod product;
mod strips;
#[cfg(test)]
mod tests;
mod tile;

pub(crate) use operand::{Matrix, Output};
pub(crate) use packed::{Engine, Left};
pub(crate) use product::{SERIAL, Values, Weight, product};
pub(crate) use tile::Kind;
