//! The modules of the library that name no tensor library: see `Cargo.toml`.

#![allow(dead_code)] // what the rest of the library uses

#[path = "../../../src/error.rs"]
pub mod error;
#[path = "../../../src/format/mod.rs"]
pub mod format;
#[path = "../../../src/kernels/mod.rs"]
pub mod kernels;
#[path = "../../../src/linalg/mod.rs"]
pub mod linalg;

pub use error::{Error, Result};
