//! Tests of everything that trains, and of what the runtime makes of it. They are one program,
//! because linking Burn takes longer than most of them run.
#![cfg(feature = "flex")]

#[path = "../../examples/common/arithmetic.rs"]
mod arithmetic;
#[path = "../../examples/common/bpe.rs"]
mod bpe;
#[path = "../common/mod.rs"]
mod common;

mod adapters;
mod bundle;
mod channels;
mod compression;
mod families;
mod generation;
mod interop;
mod interop_families;
mod joint;
mod latency;
mod layers;
mod lengths;
mod order;
mod precision;
mod progress;
mod quantization;
mod quantization_aware;
mod quantized_folders;
mod reference_logits;
mod runtime;
mod runtime_subnets;
mod sandwich;
mod streaming;
mod supernet;
mod training;
