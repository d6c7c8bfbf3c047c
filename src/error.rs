//! The one error type of the crate: a variant per broken rule, with fields that name what broke it.

use std::fmt;
use std::path::{Path, PathBuf};

/// Shorthand for `std::result::Result<T, elastic_lora::Error>`.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong on user input. Programming errors inside the crate are panics; nothing a caller passes is.
///
/// `Debug` gives the same text as `Display`, so that a `main` that returns a [`Result`] prints it.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // --- files -------------------------------------------------------------------------------------------------
    /// Reading or writing a file failed.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file is not well-formed JSON, or not the JSON that was expected.
    #[error("{path}: not the JSON expected: {source}", path = path.display())]
    Json {
        /// The file, or a description of the text's origin.
        path: PathBuf,
        /// Where and why parsing stopped.
        source: serde_json::Error,
    },
    /// A file breaks a rule of its format.
    #[error("{path}: {reason}", path = path.display())]
    InvalidFile {
        /// The file.
        path: PathBuf,
        /// The rule, with the values found.
        reason: String,
    },
    // --- tensors -----------------------------------------------------------------------------------------------
    /// A tensor that the configuration requires is not in the checkpoint.
    #[error("{path}: tensor `{tensor}` is missing", path = path.display())]
    MissingTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
    },
    /// A tensor's shape is not what the configuration implies.
    #[error("tensor `{tensor}`: shape {found:?}, expected {expected:?}")]
    TensorShape {
        /// The tensor's name.
        tensor: String,
        /// What the configuration implies.
        expected: Vec<usize>,
        /// What the file holds.
        found: Vec<usize>,
    },
    /// A tensor has an element type that cannot be used here.
    #[error("tensor `{tensor}`: dtype {found} cannot be read here (expected {expected})")]
    TensorDtype {
        /// The tensor's name.
        tensor: String,
        /// The types that can.
        expected: &'static str,
        /// The type found.
        found: String,
    },
    /// A tensor holds NaN or an infinity.
    #[error("tensor `{tensor}`: element {index} is {value}")]
    NotFinite {
        /// The tensor's name.
        tensor: String,
        /// Row-major index of the first such element.
        index: usize,
        /// Its value.
        value: f32,
    },
    /// A symmetric matrix that should have a Cholesky factor has none.
    #[error(
        "{what}: not positive definite, pivot {index} is {pivot} (more damping, or more calibration data)"
    )]
    NotPositiveDefinite {
        /// The matrix.
        what: String,
        /// Row of the first pivot that fails, in the matrix's own order.
        index: usize,
        /// Its value.
        pivot: f64,
    },
    /// A weight that is no value of the grid that it was rounded to.
    #[error(
        "weight [{row}, {column}] is {value}, which is not on its grid of scale {scale} and zero point {zero}"
    )]
    OffGrid {
        /// Output feature.
        row: usize,
        /// Input feature.
        column: usize,
        /// The weight.
        value: f32,
        /// The scale of its group.
        scale: f32,
        /// The zero point of its group.
        zero: u8,
    },
    /// A value too large for the element type it was to be written in.
    #[error("tensor `{tensor}`: element {index} is {value}, too large for {dtype}")]
    TensorOverflow {
        /// The tensor's name.
        tensor: String,
        /// Row-major index of the first such element.
        index: usize,
        /// Its value.
        value: f32,
        /// The element type.
        dtype: &'static str,
    },
    // --- model configuration -----------------------------------------------------------------------------------
    /// A field of `config.json` is missing or has a value that makes no model.
    #[error("config field `{field}`: {reason}")]
    InvalidConfig {
        /// The field.
        field: String,
        /// The rule, with the value found.
        reason: String,
    },
    /// The architecture is none that this crate implements.
    #[error("architecture `{found}` is not supported (supported: {supported})")]
    UnsupportedArchitecture {
        /// `model_type` as found.
        found: String,
        /// The families that are.
        supported: String,
    },
    /// A feature of a file, model or adapter that this crate does not implement.
    #[error("{what} is not supported")]
    Unsupported {
        /// The feature, with the value found.
        what: String,
    },
    // --- search space ------------------------------------------------------------------------------------------
    /// A layer name that the model does not have.
    #[error("{context}: there is no layer `{layer}`")]
    UnknownLayer {
        /// Where the name stood (a group, an adapter file, ...).
        context: String,
        /// The name.
        layer: String,
    },
    /// A group that the space does not have, or that a configuration leaves out.
    #[error("{context}: there is no group `{group}`")]
    UnknownGroup {
        /// Where the name stood.
        context: String,
        /// The name.
        group: String,
    },
    /// A choice that the group does not offer.
    #[error("group `{group}`: {found} is not one of its choices {choices:?}")]
    InvalidChoice {
        /// The group.
        group: String,
        /// The value asked for.
        found: usize,
        /// What the group offers.
        choices: Vec<usize>,
    },
    /// A search space that breaks a rule (no choices, a layer in two groups, ...).
    #[error("search space, group `{group}`: {reason}")]
    InvalidSpace {
        /// The group.
        group: String,
        /// The rule.
        reason: String,
    },
    /// A rank over the adapter's maximum, or zero.
    #[error("layer `{layer}`: rank {found} is not in 1..={max}")]
    InvalidRank {
        /// The layer.
        layer: String,
        /// The rank asked for.
        found: usize,
        /// The largest rank.
        max: usize,
    },
    // --- arguments ---------------------------------------------------------------------------------------------
    /// An argument outside its range.
    #[error("{name} = {found}: {expected}")]
    InvalidArgument {
        /// The argument.
        name: &'static str,
        /// Its value.
        found: String,
        /// The rule.
        expected: String,
    },
    /// Two things that must agree in size do not.
    #[error("{what}: {found:?}, expected {expected:?}")]
    ShapeMismatch {
        /// What was compared.
        what: String,
        /// The size that was needed.
        expected: Vec<usize>,
        /// The size that was given.
        found: Vec<usize>,
    },
    // --- data --------------------------------------------------------------------------------------------------
    /// A data set without a usable record.
    #[error("{path}: no usable record{detail}", path = path.display())]
    EmptyDataset {
        /// The file.
        path: PathBuf,
        /// Why those that were there could not be used; empty when there was none.
        detail: String,
    },
    /// A record that breaks its form.
    #[error("{path}: record {record}: {reason}", path = path.display())]
    InvalidRecord {
        /// The file.
        path: PathBuf,
        /// Number of the record, from 1.
        record: usize,
        /// The rule.
        reason: String,
    },
    /// A sequence longer than the model can take.
    #[error("{what}: {found} tokens, but the model's context is {max}")]
    SequenceTooLong {
        /// Which sequence.
        what: String,
        /// Its length.
        found: usize,
        /// The model's context length.
        max: usize,
    },
    /// A token id outside the vocabulary.
    #[error("token id {found} is outside the vocabulary of {vocab_size}")]
    TokenOutOfRange {
        /// The id.
        found: u32,
        /// The vocabulary's size.
        vocab_size: usize,
    },
    /// The tokenizer refused a file or a text.
    #[error("{path}: tokenizer: {reason}", path = path.display())]
    Tokenizer {
        /// `tokenizer.json`.
        path: PathBuf,
        /// What it said.
        reason: String,
    },
    /// A merge that would fill zeros of the base.
    #[error(
        "layer `{layer}`: merging would fill {lost} zeros of the weight (train its adapter with SparsePEFT, or merge densely)"
    )]
    ZerosLost {
        /// The layer.
        layer: String,
        /// Zeros that the merged weight would lose.
        lost: usize,
    },
    /// A model with adapters where a plain one is needed.
    #[error("layer `{layer}` has an adapter: {reason}")]
    HasAdapter {
        /// The layer.
        layer: String,
        /// What to do about it.
        reason: &'static str,
    },
    // --- inference ---------------------------------------------------------------------------------------------
    /// A session or model is in a state in which what was asked cannot be done.
    #[error("{what}: {reason}")]
    InvalidState {
        /// What was asked for.
        what: &'static str,
        /// Why it cannot be done, and what to do first.
        reason: String,
    },
    /// A subnet name that the model does not have.
    #[error("there is no subnet `{name}` (there are: {known})")]
    UnknownSubnet {
        /// The name.
        name: String,
        /// Those that there are.
        known: String,
    },
    /// The system gave no memory.
    #[error("{what}: no memory for {bytes} bytes")]
    OutOfMemory {
        /// What it was for.
        what: &'static str,
        /// How much was asked for.
        bytes: usize,
    },
    // --- runs --------------------------------------------------------------------------------------------------
    /// Training met a loss or a gradient that is no finite number.
    #[error("step {step}: training diverged (loss {loss}, gradient norm {grad_norm})")]
    Diverged {
        /// The optimizer step, from 1.
        step: usize,
        /// The loss, of the step's batch or of the validation after it, in nats a target.
        loss: f64,
        /// Norm of the step's gradient.
        grad_norm: f64,
    },
    /// A checkpoint belongs to a run with other settings.
    #[error("{path}: this checkpoint's {field} is {found}, the run's is {expected}", path = path.display())]
    CheckpointMismatch {
        /// The checkpoint.
        path: PathBuf,
        /// The setting.
        field: String,
        /// The run's value.
        expected: String,
        /// The checkpoint's value.
        found: String,
    },
    /// The caller asked to stop; see [`Progress::is_interrupted`](crate::progress::Progress::is_interrupted).
    #[error("{task}: interrupted")]
    Interrupted {
        /// What was going on, such as `prune`.
        task: String,
    },
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Error {
    /// Names `path` in an I/O error.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Error::Io {
            path: path.as_ref().to_path_buf(),
            source,
        }
    }

    /// Names `path` in a JSON error.
    pub fn json(path: impl AsRef<Path>, source: serde_json::Error) -> Self {
        Error::Json {
            path: path.as_ref().to_path_buf(),
            source,
        }
    }

    /// A file that breaks a rule of its format.
    pub fn invalid_file(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Error::InvalidFile {
            path: path.as_ref().to_path_buf(),
            reason: reason.into(),
        }
    }

    /// An argument outside its range.
    pub fn argument(
        name: &'static str,
        found: impl fmt::Display,
        expected: impl Into<String>,
    ) -> Self {
        Error::InvalidArgument {
            name,
            found: found.to_string(),
            expected: expected.into(),
        }
    }
}
