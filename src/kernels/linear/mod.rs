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

#[cfg(test)]
pub(super) use forward::units_of;
pub use forward::{add_updates, forward, forward_on, scratch_bytes};
pub use layer::{Activations, Adapter, Linear, Rows, RowsMut, Scratch};
