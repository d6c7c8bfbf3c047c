//! One decoder-only transformer for every family: a family is a configuration and a map of names (Llama, arXiv 2302.13971;
//! Mistral, arXiv 2310.06825).

mod block;
mod decoder;
mod export;
mod permute;
mod precision;
mod pretrained;

pub use block::{Attention, Block, LinearKind, Mlp, Tap, Unit};
pub use decoder::{Decoder, ParamCount};
pub use pretrained::Pretrained;
