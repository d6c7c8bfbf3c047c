//! Prune, fine-tune, search, merge and run large language models with elastic low-rank adapters.
#![warn(missing_docs)]

pub mod error;
pub mod linalg;
pub mod search;
pub mod space;

pub use error::{Error, Result};
