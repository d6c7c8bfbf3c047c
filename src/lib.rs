//! Prune, fine-tune, search, merge and run large language models with elastic low-rank adapters.
//!
//! The methods are those of *Low-Rank Adapters Meet Neural Architecture Search for LLM Compression* (arXiv 2501.16372): LoNAS'
//! elastic channels, which end in a smaller model; Shears' neural low-rank adapter search on a pruned model; and SQFT's
//! SparsePEFT, whose adapters merge into the sparse weights without losing a zero.
//!
//! From a model folder to a smaller one (`examples/quickstart.rs`, which takes a minute on two cores):
//!
//! ```no_run
#![doc = include_str!("../examples/quickstart.rs")]
//! ```
//!
//! # The way of a model
//!
//! ```text
//! io --> model --> supernet --> train --> trained supernet --> search <--> eval
//!  |                 ^                                            | SubnetConfig
//!  +-> calib --> sparsity, quant                                  v
//!                                               merge --> compressed model --> io, runtime
//! ```
//!
//! 1. [`model::Pretrained::open`] reads a Hugging Face folder into a [`model::Decoder`].
//! 2. [`calib::prune_model`] prunes it, layer by layer, by [`sparsity::Method`] and [`sparsity::Pattern`];
//!    [`calib::quantize_model`] rounds its weights to integers, with GPTQ if wanted, and keeps every zero.
//! 3. A [`SearchSpace`] says which layers share a rank and which ranks there are; [`SuperNet::new`] puts elastic adapters
//!    ([`ElasticLoraLinear`]) on the model.
//! 4. A [`train::Trainer`] trains all subnets at once, a random one at each step or, by the sandwich rule, the largest, a random
//!    one and the smallest.
//! 5. A [`Searcher`], driven by a [`search::Study`], finds the [`SubnetConfig`] that is worth its cost
//!    ([`eval::SubnetObjective`]).
//! 6. [`SuperNet::extract_adapter`] gives it as a plain LoRA for PEFT ([`io::peft`]); [`Merger`] merges it;
//!    [`model::Pretrained::write_variant`] writes the result.
//! 7. [`runtime::Model`] runs what came out, with weights as they are stored ([`mod@format`], [`kernels`]), from a bundle or a folder; from C and C++
//!    by `include/elastic_lora.h` (feature `capi`).
//!
//! A space may also have elastic widths and depth ([`space::Elastic`]): then [`calib::sort_channels`] comes before step 3, so that what
//! matters most is in every prefix, and [`Merger::extract`] gives a model with fewer channels, heads and blocks. What a subnet
//! costs is counted ([`supernet::SubnetCost`]) or foretold from measured parts ([`eval::LatencyTable`]).
//!
//! The adapters work in any Burn model: [`ElasticLoraLinear`] as a layer, [`adapter::ElasticLoraReparameterizer`] on modules
//! that exist already.
//!
//! # Conventions
//!
//! Files, [`linalg::Matrix`], masks and merging speak Hugging Face's `[out, in]`; Burn tensors `[in, out]`. A fraction is in
//! 0..=1. Losses are in nats. Long work takes a [`progress::Progress`] as its last argument, which may interrupt it; the library
//! prints nothing by itself. Everything random has a seed, and the same seed gives the same result on the same machine, at
//! any number of threads. Files, data and settings that are wrong come back as an [`Error`] that names them; functions of
//! tensors alone panic on shapes other than those that their docs state, as Burn's own do.
#![warn(missing_docs)]

#[macro_use]
mod settings;

pub mod adapter;
pub mod calib;
pub mod data;
pub mod error;
pub mod eval;
#[cfg(feature = "capi")]
mod ffi;
pub mod format;
pub mod io;
pub mod kernels;
pub mod linalg;
pub mod merge;
pub mod model;
pub mod nn;
pub mod progress;
pub mod quant;
pub mod runtime;
pub mod search;
#[cfg_attr(not(feature = "flex"), allow(dead_code))]
mod simd;
pub mod space;
pub mod sparsity;
pub mod supernet;
pub mod train;

/// The version of this crate.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

pub use adapter::{ElasticLoraLinear, ElasticLoraLinearConfig};
pub use error::{Error, Result};
pub use merge::Merger;
pub use search::Searcher;
pub use space::{SearchSpace, SubnetConfig};
pub use supernet::SuperNet;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
