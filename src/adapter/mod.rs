//! Elastic low-rank adapters (LoRA, arXiv 2106.09685; elastic ranks, arXiv 2501.16372; SparsePEFT
//! and QA-SparsePEFT, arXiv 2410.03750).
//!
//! [`ElasticLoraLinear`] is a layer for any Burn model; [`ElasticLoraReparameterizer`] attaches the
//! same adapters to an existing module.

mod error_init;
mod grid;
mod linear;
mod lora;
mod principal_init;
mod reparam;

pub use crate::space::{LoraConfig, MAX_RANK, ScaleRule};
pub use grid::WeightGrid;
pub use linear::{ElasticLoraLinear, ElasticLoraLinearConfig};
pub use lora::{ElasticLora, seeded_dropout};
pub use reparam::{ElasticLoraReparam, ElasticLoraReparameterizer, RankSwitches};
