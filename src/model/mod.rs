//! A decoder-only transformer that covers all supported model families: a family is a configuration
//! and a mapping of tensor names (Llama, arXiv 2302.13971; Mistral, arXiv 2310.06825).

mod adapted;
mod block;
mod decoder;
mod export;
mod generate;
mod permute;
mod precision;
mod pretrained;
mod session;

pub use block::{Attention, Block, Mlp, Tap};
pub use decoder::{Decoder, ParamCount};
pub use generate::generate_batch;
pub use pretrained::Pretrained;
pub use session::DeviceSession;
