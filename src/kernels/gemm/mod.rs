//! Matrix products of floats on the host, for operands of any strides.
//!
//! [`product`] multiplies two matrices of `f32`; [`Weight`] is a right operand of 16 or 32 bits,
//! which is never widened as a whole. There are three ways: with few rows, the weight is read once,
//! as it lies in memory ([`few`]); on processors with AVX-512, operands are packed and tiles are
//! kept in registers ([`packed`]); all else is left to the `gemm` crate.
//!
//! How sums are split depends on sizes alone: results are the same bits with any number of threads.

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
