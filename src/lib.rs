//! Prune, fine-tune, search, merge and run large language models with elastic low-rank adapters.
#![warn(missing_docs)]

pub mod data;
pub mod error;
pub mod linalg;
pub mod sparsity;

pub use error::{Error, Result};
