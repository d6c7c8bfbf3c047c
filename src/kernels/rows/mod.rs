//! Kernels on rows of numbers, compiled once for each instruction set and chosen at run time. Training and the runtime share
//! them.
//!
//! The loops are plain Rust that the compiler turns into vector code.

#![allow(dead_code, unused_imports)] // builds without training call only some of them

pub(crate) mod attention;
pub(crate) mod lines;
pub(crate) mod masked;
mod math;
mod norm;
pub(crate) mod quantize;
mod rotary;
mod softmax;
mod swiglu;
#[cfg(test)]
mod tests;

pub(crate) use norm::*;
pub(crate) use rotary::*;
pub(crate) use softmax::*;
pub(crate) use swiglu::*;

use std::mem::MaybeUninit;

/// Memory to be written, all of it, as kernels take it.
pub(crate) fn as_uninit(out: &mut [f32]) -> &mut [MaybeUninit<f32>] {
    // SAFETY: same layout. No kernel writes anything but numbers, so that what comes back is initialized.
    unsafe { &mut *(std::ptr::from_mut(out) as *mut [MaybeUninit<f32>]) }
}
