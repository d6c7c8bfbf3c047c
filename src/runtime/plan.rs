//! Storage formats of a model's weights.

use crate::error::{Error, Result};
use crate::format::{StoredMatrix, WeightFormat};
use crate::linalg::Matrix;
use crate::quant::{GridConfig, ScaleDtype, round_to_nearest};

/// Storage formats of a model's weights, by role; `None` keeps each weight as it is stored. Norms
/// and biases are always 32-bit floats.
///
/// Weights that are stored as codes keep their codes and groups in every integer format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FormatPlan {
    /// Format of the linear layers inside the blocks.
    pub linears: Option<WeightFormat>,
    /// Format of the embedding, and of the head if they are tied. A token reads one row of it.
    pub embedding: Option<WeightFormat>,
    /// Format of the head, if it is not tied.
    pub head: Option<WeightFormat>,
    /// Format of the adapters' factors; one of the dense float formats.
    pub adapters: Option<WeightFormat>,
}

impl FormatPlan {
    /// Keeps every weight as it is stored. Weights that come from Burn are stored as 32-bit floats,
    /// or as their codes.
    pub fn kept() -> Self {
        Self::default()
    }

    /// Uses `linears` inside the blocks. The other weights are dense: 32-bit floats if `linears` is
    /// [`WeightFormat::F32`], otherwise 16-bit floats of the same kind.
    pub fn new(linears: WeightFormat) -> Self {
        let dense = match linears {
            WeightFormat::F32 => WeightFormat::F32,
            WeightFormat::Bf16 | WeightFormat::SparseBf16 | WeightFormat::NmBf16 { .. } => {
                WeightFormat::Bf16
            }
            _ => WeightFormat::F16,
        };
        Self {
            linears: Some(linears),
            embedding: Some(dense),
            head: Some(dense),
            adapters: Some(dense),
        }
    }

    /// Sets the format of the head.
    pub fn with_head(mut self, head: WeightFormat) -> Self {
        self.head = Some(head);
        self
    }

    /// Sets the format of the embedding.
    pub fn with_embedding(mut self, embedding: WeightFormat) -> Self {
        self.embedding = Some(embedding);
        self
    }

    /// Sets the format of the adapters' factors.
    pub fn with_adapters(mut self, adapters: WeightFormat) -> Self {
        self.adapters = Some(adapters);
        self
    }

    pub(crate) fn validate(&self) -> Result<()> {
        match self.adapters {
            None | Some(WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16) => Ok(()),
            Some(other) => Err(Error::argument(
                "adapters",
                format!("{other:?}"),
                "f32, f16 or bf16",
            )),
        }
    }
}

impl From<WeightFormat> for FormatPlan {
    fn from(linears: WeightFormat) -> Self {
        Self::new(linears)
    }
}

/// Adds the name of the tensor that could not be stored.
fn named(name: &str, error: Error) -> Error {
    match error {
        Error::InvalidArgument {
            found, expected, ..
        } => Error::Unsupported {
            what: format!("storing `{name}`: {found} (expected {expected})"),
        },
        other => other,
    }
}

/// Stores a matrix of floats. Integer formats round to nearest and keep zeros; a weight quantized
/// by a better method is stored from its own codes instead.
pub(crate) fn encode(name: &str, weight: &Matrix, format: WeightFormat) -> Result<StoredMatrix> {
    let (bits, group_size, symmetric, sparse) = match format {
        WeightFormat::Int {
            bits,
            group_size,
            symmetric,
        } => (bits, group_size, symmetric, false),
        WeightFormat::SparseInt4 {
            group_size,
            symmetric,
        } => (4, group_size, symmetric, true),
        _ => return StoredMatrix::from_matrix(weight, format).map_err(|error| named(name, error)),
    };
    let grid = GridConfig::new(bits)
        .with_group_size(group_size)
        .with_symmetric(symmetric)
        .with_scale_dtype(ScaleDtype::F16);
    let codes = round_to_nearest(weight, &grid, None)?;
    StoredMatrix::from_quantized(&codes, sparse).map_err(|error| named(name, error))
}

/// Stores a weight in another format. Codes are kept, with their groups, when they change between
/// dense and sparse storage: the group size and symmetry of `format` are those of weights that are
/// rounded here. Floats are rounded if the format requires it.
pub(super) fn convert(
    name: &str,
    stored: &StoredMatrix,
    format: WeightFormat,
) -> Result<StoredMatrix> {
    let (bits, sparse) = match format {
        _ if stored.format() == format => return Ok(stored.clone()),
        WeightFormat::Int { bits, .. } => (bits, false),
        WeightFormat::SparseInt4 { .. } => (4, true),
        _ => return encode(name, &stored.to_matrix(), format),
    };
    let Some(codes) = stored.to_quantized() else {
        return encode(name, &stored.to_matrix(), format);
    };
    if codes.parts().bits != bits {
        let found = codes.parts().bits;
        return Err(Error::Unsupported {
            what: format!("storing `{name}`, codes of {found} bits, in {bits} bits"),
        });
    }
    StoredMatrix::from_quantized(&codes, sparse).map_err(|error| named(name, error))
}
