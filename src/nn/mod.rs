//! Building blocks of a decoder: operations, linear layers and their storage, normalization, rotary tables, key/value cache.

pub mod custom;
mod mask;
pub mod ops;
#[cfg(all(test, feature = "flex"))]
mod plain;
