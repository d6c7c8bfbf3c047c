//! Hugging Face model folders: `config.json` and what lies beside it.

mod blocks;
mod config;
mod folder;
mod quantized;
mod rope;

pub use blocks::BlockDims;
pub use config::{Family, HfConfig, LinearLayer, LlamaDims};
pub use folder::{CARRIED_FILES, HfFolder};
pub use rope::RopeScaling;

#[cfg(test)]
mod tests;
