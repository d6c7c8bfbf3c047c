//! Prune, fine-tune, search, merge and run large language models with elastic low-rank adapters.
#![warn(missing_docs)]

pub mod adapter;
pub mod error;
pub mod io;
pub mod linalg;
pub mod nn;
pub mod sparsity;
pub mod space;

pub use adapter::{ElasticLoraLinear, ElasticLoraLinearConfig};
pub use error::{Error, Result};
pub use space::{SearchSpace, SubnetConfig};
