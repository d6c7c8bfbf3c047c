//! The C ABI (feature `capi`): models, layers and sessions for C and C++.
//!
//! cbindgen generates `include/elastic_lora.h` from the `///` comments and signatures in this
//! folder; the file is committed. `include/elastic_lora.hpp` wraps it for C++. The rules are those
//! of mature C libraries:
//!
//! - Handles are opaque, and each is a reference of an [`Arc`](std::sync::Arc) that the caller
//!   owns. Immutable handles are passed as `const *` and may be used from any number of threads. A
//!   session is passed as `*` and may be used by one thread at a time; a call that breaks this rule
//!   is refused. A child keeps its parent alive, so handles may be freed in any order.
//! - Every function that can fail returns an [`elora_status`](status::elora_status) and stores an
//!   error text for the calling thread. Every function body runs inside [`guard::status`] or
//!   [`guard::value`]: a panic becomes a status and never unwinds into the caller.
//! - The caller's arguments are checked before use: `NULL`, alignment, sizes, overlap, enumerators,
//!   UTF-8. The header states what cannot be checked, such as whether the memory exists.
//!
//! The library does not change the process: it sets no allocator, hook, signal handler or logger,
//! and never exits.

// The names are those of the header.
#![allow(non_camel_case_types)]

mod adapter;
mod batch;
mod convert;
mod exclusive;
mod guard;
mod linear;
mod memory;
mod model;
mod options;
mod parts;
mod sampler;
mod session;
mod status;
#[cfg(elastic_lora_test_hooks)]
mod test_hooks;
mod text;
mod tokenizer;

#[cfg(panic = "abort")]
compile_error!(
    "feature `capi` needs `panic = \"unwind\"`, so that a bug in the library does not end the process that uses it"
);
