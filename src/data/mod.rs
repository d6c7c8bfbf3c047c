//! Turns files into batches: records, prompt templates, tokenization, loss masks, batches by length
//! and calibration windows.
//!
//! A [`Record`] is an entry of a data file. A [`PromptTemplate`] renders it to an [`Example`]
//! (prompt and completion), [`tokenize`] converts that to a [`Sequence`] (token ids and a loss
//! mask), and a [`Batcher`] groups sequences into batches, several short ones in a row if it is
//! packed. The order of batches depends only on a seed and can be resumed at any point.

pub mod answers;
mod batch;
mod chat;
mod message;
mod packing;
mod record;
mod sequence;
mod template;
mod tokenizer;
mod window;

pub use batch::{Batch, BatchPlan, Batcher, Position, collate, fixed_batches};
#[cfg(test)]
pub(crate) use chat::hostile as hostile_templates;
pub use chat::{ChatTemplate, Rendered};
pub(crate) use chat::{
    add_escaped_json, bounded as bounded_jinja, expression as jinja_expression, fuel as jinja_fuel,
    pay as pay_in_jinja, rewrite as rewrite_jinja, said as said_by_jinja,
};
pub use message::Message;
pub use packing::Segments;
pub use record::{
    MAX_FILE_BYTES, Record, is_text_file, load_documents, load_records, load_text, notices,
    parse_records,
};
pub use sequence::{Misfit, Sequence, TokenizeOptions, TokenizedSet, tokenize, tokenize_records};
pub use template::{Example, PromptTemplate, Template};
pub use tokenizer::{Detokenizer, StopStrings, TextTokenizer};
pub use window::{
    CalibrationSize, calibration_samples, calibration_windows, join_documents, pack, windows,
};
