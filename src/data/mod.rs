//! From files to batches: records, prompt templates, tokenizing, label masks, batches by length, calibration windows.
//!
//! A [`Record`] is what a file holds. A [`PromptTemplate`] makes an [`Example`] of it (prompt, completion), [`tokenize`] a
//! [`Sequence`] (ids and which of them are learned), and a [`Batcher`] batches of those, in an order that follows from a
//! seed and can be taken up at any point.

pub mod answers;
mod batch;
mod record;
mod sequence;
mod template;
mod tokenizer;
mod window;

pub use batch::{Batch, BatchPlan, Batcher, Position, collate, fixed_batches};
pub use record::{MAX_FILE_BYTES, Record, load_records, load_text, parse_records};
pub use sequence::{Sequence, TokenizeOptions, TokenizedSet, tokenize, tokenize_records};
pub use template::{Example, PromptTemplate};
pub use tokenizer::TextTokenizer;
pub use window::{calibration_samples, join_documents, pack, windows};
