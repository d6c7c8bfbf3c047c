//! Prune, fine-tune, search, merge and run large language models with elastic low-rank adapters.
//!
//! This program turns a model folder into a smaller one and generates text with it. It is
//! `examples/quickstart.rs`, and runs for about a minute on two cores:
//!
#![cfg_attr(feature = "flex", doc = "```no_run")]
#![cfg_attr(feature = "flex", doc = include_str!("../examples/quickstart.rs"))]
#![cfg_attr(feature = "flex", doc = "```")]
//!
//! # Step by step
//!
//! ```text
//! io --> model --> supernet --> train --> trained supernet --> search <--> eval
//!  |                 ^                                            | SubnetConfig
//!  +-> calib --> sparsity, quant                                  v
//!                                               merge --> compressed model --> io, runtime
//! ```
//!
//! 1. **Open a model.** [`model::Pretrained::open`] reads a Hugging Face folder: weights,
//!    configuration and tokenizer. Its [`model::Decoder`] is the model.
//! 2. **Compress it.** [`calib::prune_model`] sets weights to zero, layer by layer; choose the
//!    [`sparsity::Method`] and the [`sparsity::Pattern`]. [`calib::quantize_model`] rounds weights
//!    to integers, optionally with GPTQ, and keeps every zero.
//! 3. **Add elastic adapters.** A [`SearchSpace`] says which layers share a rank and which ranks
//!    each may have. [`SuperNet::new`] adds the adapters ([`ElasticLoraLinear`]) to the model.
//! 4. **Train.** A [`train::Trainer`] trains all subnets at once. Each step trains one random
//!    subnet or, by the sandwich rule, the largest, a random and the smallest one.
//! 5. **Search.** A [`Searcher`], driven by a [`search::Study`], finds the [`SubnetConfig`] with
//!    the best quality for its cost. [`eval::SubnetObjective`] measures both.
//! 6. **Export or merge.** [`SuperNet::extract_adapter`] returns a plain LoRA, and [`io::peft`]
//!    writes it for PEFT. [`Merger`] merges the adapters into the weights, and
//!    [`model::Pretrained::write_variant`] writes the result as a folder.
//! 7. **Run.** [`runtime::Model`] opens a folder or a bundle, and computes directly on the stored
//!    weights ([`mod@format`], [`kernels`]). From C and C++, use `include/elastic_lora.h` (feature
//!    `capi`).
//!
//! A space can also have elastic widths and depth ([`space::Elastic`]). Then call
//! [`calib::sort_channels`] before step 3, so that every prefix holds the most important channels;
//! [`Merger::extract`] returns a model with fewer channels, heads and blocks. The cost of a subnet
//! is counted ([`supernet::SubnetCost`]) or predicted from timings of its parts
//! ([`eval::LatencyTable`]).
//!
//! The adapters work in any Burn model: use [`ElasticLoraLinear`] as a layer, or
//! [`adapter::ElasticLoraReparameterizer`] on existing modules. `examples/own_module.rs` is a
//! training loop and a searcher of one's own, for a module of one's own.
//!
//! # Methods
//!
//! The crate implements the methods of *Low-Rank Adapters Meet Neural Architecture Search for LLM
//! Compression* (arXiv 2501.16372):
//!
//! - LoNAS: elastic channels, which result in a smaller model.
//! - Shears: neural low-rank adapter search on a pruned model.
//! - SQFT: with SparsePEFT, adapters that merge into the sparse weights without losing a zero.
//!
//! # Conventions
//!
//! - Files, [`linalg::Matrix`], masks and merging use Hugging Face's orientation `[out, in]`; Burn
//!   tensors use `[in, out]`.
//! - A fraction is in 0..=1. A loss is in nats.
//! - Long work takes a [`progress::Progress`] as its last argument, which can interrupt it. The
//!   library itself prints nothing.
//! - All randomness is seeded. The same seed gives the same result on the same machine, with any
//!   number of threads.
//! - Invalid files, data and settings return an [`Error`] that names them. Functions that take only
//!   tensors panic on shapes other than the documented ones, as Burn's own functions do.
#![warn(missing_docs)]
// Items that only the training half calls are unused in a build without it.
#![cfg_attr(not(feature = "burn"), allow(dead_code, unused_imports))]

#[macro_use]
mod settings;

pub mod arch;
pub mod data;
pub mod error;
#[cfg(feature = "capi")]
mod ffi;
pub mod format;
mod input;
pub mod io;
#[doc(hidden)] // used by the benches
pub mod kernels;
pub mod linalg;
pub mod progress;
pub mod quant;
pub mod runtime;
pub mod search;
pub mod space;
pub mod sparsity;
pub mod tasks;
mod threads;

// The training half, built on Burn. No module above uses it.
#[cfg(feature = "burn")]
pub mod adapter;
#[cfg(feature = "burn")]
pub mod calib;
#[cfg(feature = "burn")]
pub mod eval;
#[cfg(feature = "burn")]
pub mod merge;
#[cfg(feature = "burn")]
pub mod model;
#[cfg(feature = "burn")]
pub mod nn;
#[cfg(feature = "burn")]
pub mod supernet;
#[cfg(feature = "burn")]
pub mod train;

/// The version of this crate.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

#[cfg(feature = "burn")]
pub use adapter::{ElasticLoraLinear, ElasticLoraLinearConfig};
pub use error::{Error, Result};
#[cfg(feature = "burn")]
pub use merge::Merger;
pub use search::Searcher;
pub use space::{SearchSpace, SubnetConfig};
#[cfg(feature = "burn")]
pub use supernet::SuperNet;

#[cfg(all(doctest, feature = "flex"))]
#[doc = include_str!("../README.md")]
struct Readme;
