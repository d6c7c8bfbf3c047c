//! Reads and writes Hugging Face model folders: `config.json` and the files next to it.

mod blocks;
mod config;
mod fitted;
mod folder;
mod parts;
mod per_layer;
mod quantized;
mod rope;

pub use blocks::DECI_MULTIPLE;
pub use config::{HfConfig, LlamaDims};
pub(crate) use folder::MAX_SHARD_BYTES;
pub use folder::{CARRIED_FILES, HfFolder};
pub use parts::{FolderParts, Part};

#[cfg(test)]
mod tests;
