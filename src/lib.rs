//! Prune, fine-tune, search, merge and run large language models with elastic low-rank adapters.
#![warn(missing_docs)]

pub mod adapter;
pub mod calib;
pub mod data;
pub mod error;
pub mod eval;
pub mod infer;
pub mod io;
pub mod linalg;
pub mod merge;
pub mod model;
pub mod nn;
pub mod search;
pub mod space;
pub mod sparsity;
pub mod supernet;
pub mod train;

pub use adapter::{ElasticLoraLinear, ElasticLoraLinearConfig};
pub use error::{Error, Result};
pub use merge::Merger;
pub use search::Searcher;
pub use space::{SearchSpace, SubnetConfig};
pub use supernet::SuperNet;
