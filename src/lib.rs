//! Prune, fine-tune, search, merge and run large language models with elastic low-rank adapters.
#![warn(missing_docs)]

pub mod error;
pub mod io;
pub mod linalg;

pub use error::{Error, Result};
