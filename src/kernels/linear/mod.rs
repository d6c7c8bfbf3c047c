//! Products of layers with rows of inputs.
//!
//! This module holds the parts that all instruction sets share: the description of a layer,
//! prepared inputs, tasks, and code that is generic over vector registers and storage formats. The
//! parts of each instruction set are in `isa`.

mod forward;
pub(super) mod input;
mod layer;
mod plain;
pub(super) mod task;

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) mod codes;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) mod dense;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) mod lanes;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) mod tiles;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) mod update;

pub use forward::{add_updates, forward, forward_on, scratch_bytes};
#[cfg(test)]
pub(super) use forward::{sharing, units_of};
#[cfg(test)]
pub(super) use input::Sharing;
pub use layer::{Activations, Adapter, Linear, Rows, RowsMut, Scratch};
