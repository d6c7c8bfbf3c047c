//! The C ABI (feature `capi`): models, layers and sessions for C and C++.
//!
//! `include/elastic_lora.h` is made of the `///` comments and signatures in this folder, by cbindgen, and committed;
//! `include/elastic_lora.hpp` wraps it for C++. The rules are those of mature C libraries:
//!
//! - Handles are opaque, and each is an [`Arc`](std::sync::Arc) whose count the caller holds one of. An immutable one is
//!   passed as `const *`, from any number of threads; a session is passed as `*`, one thread at a time, and what breaks
//!   that rule is told so. A child holds its parent, so the order of freeing does not matter.
//! - Every function that can fail gives an [`elora_status`](status::elora_status) and leaves a text with the thread. Every
//!   function runs inside [`guard::status`] or [`guard::value`]: a panic becomes a status, and nothing unwinds into the
//!   caller.
//! - What comes from the caller is looked at before it is used: `NULL`, alignment, sizes, overlap, enumerators, UTF-8. What
//!   cannot be looked at, whether memory is there at all, is in the header.
//!
//! Nothing here changes the process: no allocator, no hook, no signal, no logger, no exit.

// The names are those of the header.
#![allow(non_camel_case_types)]

mod guard;
mod linear;
mod memory;
mod model;
mod options;
mod parts;
mod session;
mod status;
#[cfg(elastic_lora_test_hooks)]
mod test_hooks;
mod tokenizer;

#[cfg(panic = "abort")]
compile_error!(
    "feature `capi` needs `panic = \"unwind\"`, so that a bug in the library does not end the process that uses it"
);
