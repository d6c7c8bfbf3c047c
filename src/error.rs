//! The crate's error type: one variant per broken rule, with fields that name the cause.

use std::fmt;
use std::path::{Path, PathBuf};

/// Shorthand for `std::result::Result<T, elastic_lora::Error>`.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong because of user input.
///
/// Panics are reserved for programming errors: bugs inside the crate, and arguments that break a
/// documented requirement, such as tensors of the wrong shape. `Debug` prints the same text as
/// `Display`, so a `main` that returns a [`Result`] shows a readable message.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // --- files -----------------------------------------------------------------------------------
    /// Reading or writing a file failed.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// A file is not well-formed JSON, or lacks the expected structure.
    #[error("{path}: not the JSON expected: {source}", path = path.display())]
    Json {
        /// The file, or a description of where the text came from.
        path: PathBuf,
        /// The parser's error, with line and column.
        source: serde_json::Error,
    },
    /// A file breaks a rule of its format.
    #[error("{path}: {reason}", path = path.display())]
    InvalidFile {
        /// The file.
        path: PathBuf,
        /// The broken rule, with the values found.
        reason: String,
    },
    // --- tensors ---------------------------------------------------------------------------------
    /// A tensor that the configuration requires is missing from the checkpoint.
    #[error("{path}: tensor `{tensor}` is missing", path = path.display())]
    MissingTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
    },
    /// A tensor's shape differs from the shape that the configuration implies.
    #[error("tensor `{tensor}`: shape {found:?}, expected {expected:?}")]
    TensorShape {
        /// The tensor's name.
        tensor: String,
        /// The shape that the configuration implies.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor has a dtype that cannot be used here.
    #[error("tensor `{tensor}`: dtype {found} cannot be read here (expected {expected})")]
    TensorDtype {
        /// The tensor's name.
        tensor: String,
        /// The dtypes that can be used.
        expected: &'static str,
        /// The dtype found.
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
    /// A symmetric matrix is not positive definite, so it has no Cholesky factor.
    #[error(
        "{what}: not positive definite, pivot {index} is {pivot} (more damping, or more calibration data)"
    )]
    NotPositiveDefinite {
        /// The matrix.
        what: String,
        /// Row of the first pivot that is not positive, in the matrix's original order.
        index: usize,
        /// The value of that pivot.
        pivot: f64,
    },
    /// A weight is not a value of the quantization grid that it should be on.
    #[error(
        "weight [{row}, {column}] is {value}, which is not on its grid of scale {scale} and zero point {zero}"
    )]
    OffGrid {
        /// Index of the output feature.
        row: usize,
        /// Index of the input feature.
        column: usize,
        /// The weight.
        value: f32,
        /// The scale of its group.
        scale: f32,
        /// The zero point of its group.
        zero: u8,
    },
    /// A value is too large for the dtype that it should be written in.
    #[error("tensor `{tensor}`: element {index} is {value}, too large for {dtype}")]
    TensorOverflow {
        /// The tensor's name.
        tensor: String,
        /// Row-major index of the first such element.
        index: usize,
        /// Its value.
        value: f32,
        /// The dtype.
        dtype: &'static str,
    },
    // --- model configuration ---------------------------------------------------------------------
    /// A field of `config.json` is missing or has a value that describes no valid model.
    #[error("config field `{field}`: {reason}")]
    InvalidConfig {
        /// The field.
        field: String,
        /// The broken rule, with the value found.
        reason: String,
    },
    /// This crate does not implement the architecture.
    #[error("architecture `{found}` is not supported (supported: {supported})")]
    UnsupportedArchitecture {
        /// `model_type` as found.
        found: String,
        /// The supported families.
        supported: String,
    },
    /// This crate does not implement a feature of a file, model or adapter.
    #[error("{what} is not supported")]
    Unsupported {
        /// The feature, with the value found.
        what: String,
    },
    // --- search space ----------------------------------------------------------------------------
    /// The model has no layer of this name.
    #[error("{context}: there is no layer `{layer}`")]
    UnknownLayer {
        /// Where the name appears (a group, an adapter file, ...).
        context: String,
        /// The name.
        layer: String,
    },
    /// The space has no such group, or a configuration leaves the group out.
    #[error("{context} group `{group}`")]
    UnknownGroup {
        /// What is wrong: `search space: there is no`, or `subnet: there is no value for`.
        context: String,
        /// The name.
        group: String,
    },
    /// The group does not offer this choice.
    #[error("group `{group}`: {found} is not one of its choices {choices:?}")]
    InvalidChoice {
        /// The group.
        group: String,
        /// The requested value.
        found: usize,
        /// The group's choices.
        choices: Vec<usize>,
    },
    /// A search space breaks a rule (no choices, a layer in two groups, ...).
    #[error("search space, group `{group}`: {reason}")]
    InvalidSpace {
        /// The group.
        group: String,
        /// The broken rule.
        reason: String,
    },
    /// A rank is 0 or larger than the adapter's maximum.
    #[error("layer `{layer}`: rank {found} is not in 1..={max}")]
    InvalidRank {
        /// The layer.
        layer: String,
        /// The requested rank.
        found: usize,
        /// The largest rank.
        max: usize,
    },
    // --- arguments -------------------------------------------------------------------------------
    /// An argument is outside its range.
    #[error("{name} = {found}: {expected}")]
    InvalidArgument {
        /// The argument.
        name: &'static str,
        /// Its value.
        found: String,
        /// The broken rule.
        expected: String,
    },
    /// Two sizes that must agree differ.
    #[error("{what}: {found:?}, expected {expected:?}")]
    ShapeMismatch {
        /// What was compared.
        what: String,
        /// The required size.
        expected: Vec<usize>,
        /// The given size.
        found: Vec<usize>,
    },
    // --- data ------------------------------------------------------------------------------------
    /// A data set has no usable record.
    #[error("{path}: no usable record{detail}", path = path.display())]
    EmptyDataset {
        /// The file.
        path: PathBuf,
        /// Why its records could not be used; empty if it has none.
        detail: String,
    },
    /// A record breaks the rules of its format.
    #[error("{path}: record {record}: {reason}", path = path.display())]
    InvalidRecord {
        /// The file.
        path: PathBuf,
        /// Number of the record, from 1.
        record: usize,
        /// The broken rule.
        reason: String,
    },
    /// A sequence is longer than the model's context.
    #[error("{what}: {found} tokens, but the model's context is {max}")]
    SequenceTooLong {
        /// Which sequence it is.
        what: String,
        /// Its length.
        found: usize,
        /// The model's context length.
        max: usize,
    },
    /// A token id is outside the vocabulary.
    #[error("token id {found} is outside the vocabulary of {vocab_size}")]
    TokenOutOfRange {
        /// The id.
        found: u32,
        /// The vocabulary's size.
        vocab_size: usize,
    },
    /// The tokenizer rejected a file or a text.
    #[error("{path}: tokenizer: {reason}", path = path.display())]
    Tokenizer {
        /// Path of `tokenizer.json`.
        path: PathBuf,
        /// The tokenizer's message.
        reason: String,
    },
    /// A chat template is not valid, or it fails on a conversation.
    #[error("{path}: chat template: {reason}", path = path.display())]
    Template {
        /// The file that holds the template.
        path: PathBuf,
        /// The template's message, or what is wrong with it.
        reason: String,
    },
    /// A merge would fill zeros of the base weight.
    #[error(
        "layer `{layer}`: merging would fill {lost} zeros of the weight (train its adapter with SparsePEFT, or merge densely)"
    )]
    ZerosLost {
        /// The layer.
        layer: String,
        /// Number of zeros that the merged weight would lose.
        lost: usize,
    },
    /// A model has adapters where one without them is required.
    #[error("layer `{layer}` has an adapter: {reason}")]
    HasAdapter {
        /// The layer.
        layer: String,
        /// What to do about it.
        reason: &'static str,
    },
    // --- inference -------------------------------------------------------------------------------
    /// The state of a session or model does not allow the requested operation.
    #[error("{what}: {reason}")]
    InvalidState {
        /// The requested operation.
        what: &'static str,
        /// Why it is not possible, and what to do first.
        reason: String,
    },
    /// The model has no subnet of this name.
    #[error("there is no subnet `{name}` (there are: {known})")]
    UnknownSubnet {
        /// The name.
        name: String,
        /// The names of the model's subnets.
        known: String,
    },
    /// An allocation failed.
    #[error("{what}: no memory for {bytes} bytes")]
    OutOfMemory {
        /// Purpose of the memory.
        what: &'static str,
        /// Number of bytes requested.
        bytes: usize,
    },
    /// Not one thread could be started.
    #[error(
        "no thread can be started: {source} (threads count as processes of the user: `ulimit -u`)"
    )]
    NoThreads {
        /// The error of the operating system.
        source: std::io::Error,
    },
    // --- runs ------------------------------------------------------------------------------------
    /// The loss or the gradient became NaN or infinite during training.
    #[error("step {step}: training diverged (loss {loss}, gradient norm {grad_norm})")]
    Diverged {
        /// The optimizer step, from 1.
        step: usize,
        /// The loss of the step's batch, or of the validation after it, in nats per target token.
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
    /// The caller asked to stop; see
    /// [`Progress::is_interrupted`](crate::progress::Progress::is_interrupted).
    #[error("{task}: interrupted")]
    Interrupted {
        /// The interrupted task, such as `prune`.
        task: String,
    },
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Error {
    /// Creates an [`Error::Io`] for `path`.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Error::Io {
            path: path.as_ref().to_path_buf(),
            source,
        }
    }

    /// Creates an [`Error::Json`] for `path`.
    pub fn json(path: impl AsRef<Path>, source: serde_json::Error) -> Self {
        Error::Json {
            path: path.as_ref().to_path_buf(),
            source,
        }
    }

    /// Creates an [`Error::InvalidFile`].
    pub fn invalid_file(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Error::InvalidFile {
            path: path.as_ref().to_path_buf(),
            reason: reason.into(),
        }
    }

    /// Creates an [`Error::InvalidArgument`].
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
