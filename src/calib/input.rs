//! What a method has to know of a layer's input.

use burn::tensor::Tensor;

use super::column_squares;
use crate::error::{Error, Result};
use crate::linalg::{Factor, FactorConfig, Hessian};
use crate::nn::host_values;
use crate::sparsity::{InputNorms, Method};

/// A statistic of one input, which all layers of that input share.
pub(super) enum InputStatistic {
    Nothing,
    Norms(InputNorms),
    Hessian(Hessian),
    /// A Hessian that the first layer has made use of.
    Factor(Factor),
}

impl InputStatistic {
    /// What pruning by `method` needs, nothing observed yet.
    pub fn of_method(method: Method, d_input: usize) -> Self {
        match method {
            Method::Magnitude => Self::Nothing,
            Method::Wanda | Method::Ria => Self::Norms(InputNorms::new(d_input)),
            Method::SparseGpt => Self::Hessian(Hessian::new(d_input)),
        }
    }

    /// Adds what some sequences feed the layer, `[sequences, seq, d_input]`.
    pub fn observe(&mut self, x: &Tensor<3>) -> Result<()> {
        match self {
            Self::Nothing | Self::Factor(_) => Ok(()),
            Self::Norms(norms) => norms.update_sums(&column_squares(x), x.dims()[0]),
            Self::Hessian(hessian) => hessian.update(&host_values(x.clone())),
        }
    }

    /// The norms, where they are what was gathered.
    pub fn norms(&self) -> Option<&InputNorms> {
        match self {
            Self::Norms(norms) => Some(norms),
            _ => None,
        }
    }

    /// The factor of the Hessian, which takes the Hessian's place.
    pub fn factor(&mut self, name: &str, config: &FactorConfig) -> Result<&Factor> {
        if let Self::Hessian(hessian) = self {
            // All columns would count as dead, and all weights as 0.
            if hessian.rows() == 0 {
                return Err(Error::argument(
                    "layer",
                    name,
                    "one that samples reach, not one that is left out",
                ));
            }
            *self = Self::Factor(Factor::new(hessian, config)?);
        }
        match self {
            Self::Factor(factor) => Ok(factor),
            _ => Err(Error::argument(
                "statistic",
                "none",
                "a Hessian of the layer's input is needed",
            )),
        }
    }
}

/// Says of which layer an error is that knows of matrices only.
pub(super) fn in_layer(name: &str, error: Error) -> Error {
    let of = |what: String| format!("{name}: {what}");
    match error {
        Error::NotFinite {
            tensor,
            index,
            value,
        } => Error::NotFinite {
            tensor: of(tensor),
            index,
            value,
        },
        Error::NotPositiveDefinite { what, index, pivot } => Error::NotPositiveDefinite {
            what: of(what),
            index,
            pivot,
        },
        Error::TensorOverflow {
            tensor,
            index,
            value,
            dtype,
        } => Error::TensorOverflow {
            tensor: of(tensor),
            index,
            value,
            dtype,
        },
        other => other,
    }
}
