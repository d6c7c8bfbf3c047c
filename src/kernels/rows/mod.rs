//! Kernels on rows of numbers, compiled once for each instruction set and chosen at run time.
//! Training and the runtime share them.
//!
//! The loops are plain Rust that the compiler vectorizes.

pub(crate) mod attention;
mod gated;
pub(crate) mod lines;
pub(crate) mod masked;
mod math;
mod norm;
pub(crate) mod quantize;
mod rotary;
mod softmax;
#[cfg(test)]
mod tests;

pub(crate) use gated::*;
pub(crate) use norm::*;
pub(crate) use rotary::*;
pub(crate) use softmax::*;

use std::mem::MaybeUninit;

/// Converts initialized memory to the type that kernels take for memory that they overwrite
/// completely.
pub(crate) fn as_uninit(out: &mut [f32]) -> &mut [MaybeUninit<f32>] {
    // SAFETY: both types have the same layout, and kernels write only initialized numbers.
    unsafe { &mut *(std::ptr::from_mut(out) as *mut [MaybeUninit<f32>]) }
}
