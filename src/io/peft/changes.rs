//! What an adapter changes in its base besides adding products of its pairs: the base that an
//! initialization leaves (PiSSA, arXiv 2404.02948; OLoRA, arXiv 2406.01775), magnitudes (DoRA,
//! arXiv 2402.09353), and parameters that are stored whole.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{LoraAdapter, LoraWeights, is_table};
use crate::error::{Error, Result};
use crate::io::fields::bad_field;
use crate::io::hf::HfConfig;
use crate::linalg::{Matrix, without_columns, without_principal};

/// How an initialization changes the weight of a linear layer, before the pair is added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum BaseInit {
    /// The weight stays as it is.
    #[default]
    Unchanged,
    /// PiSSA: without its part in the largest singular values, as many as the rank.
    Pissa,
    /// OLoRA: without `scale` times its projection on its first columns, as many as the rank.
    Olora,
}

impl BaseInit {
    /// Parses `init_lora_weights`.
    ///
    /// # Errors
    /// Returns [`Error::Unsupported`] for an initialization whose base only the training program
    /// knows, and [`Error::InvalidConfig`] for a value of another type.
    pub fn parse(value: Option<&Value>) -> Result<Self> {
        const FIELD: &str = "init_lora_weights";
        let name = match value {
            None | Some(Value::Null | Value::Bool(_)) => return Ok(Self::Unchanged),
            Some(Value::String(name)) => name,
            Some(other) => {
                let shown: String = other.to_string().chars().take(60).collect();
                return Err(bad_field(
                    FIELD,
                    format!("{shown}, expected true, false or a name"),
                ));
            }
        };
        match name.to_lowercase().as_str() {
            "gaussian" | "eva" | "orthogonal" | "mica" | "true" | "false" => Ok(Self::Unchanged),
            "pissa" => Ok(Self::Pissa),
            "olora" => Ok(Self::Olora),
            other => {
                let reason = match other.split(['_', '-']).next() {
                    Some("pissa" | "corda" | "loftq" | "lora") => {
                        "it changed the base in a way that the adapter does not record; save the \
                         adapter by PEFT's `save_pretrained(..., \
                         path_initial_model_for_weight_conversion=...)`, which makes it a plain \
                         LoRA, or merge it where it was trained; this"
                    }
                    _ => "an initialization unknown here, which may have changed the base; this",
                };
                Err(Error::Unsupported {
                    what: format!("an adapter with `{FIELD}` = `{name}`: {reason}"),
                })
            }
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Unchanged => "true",
            Self::Pissa => "pissa",
            Self::Olora => "olora",
        }
    }
}

/// A parameter that is stored whole.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// New rows of an embedding or head.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TokenRows {
    pub tokens: Vec<u32>,
    pub rows: Matrix,
}

/// What an adapter changes in its base besides adding products of its pairs; empty for a plain
/// LoRA.
#[derive(Clone, Debug, Default, PartialEq)]
#[doc(hidden)]
pub struct BaseChanges {
    pub(crate) init: BaseInit,
    /// DoRA's magnitudes by module.
    pub(crate) magnitudes: BTreeMap<String, Vec<f32>>,
    /// Biases of LoRA's B by module, times the scale.
    pub(crate) biases: BTreeMap<String, Vec<f32>>,
    /// Parameters by the names of the base's tensors, which they replace, also where two modules
    /// share one.
    pub(crate) tensors: BTreeMap<String, Stored>,
    /// Parameters by the names of tensors, which they replace for the module of that name alone
    /// (`modules_to_save`), after those of the base.
    pub(crate) copies: BTreeMap<String, Stored>,
    /// Rows by module.
    pub(crate) tokens: BTreeMap<String, TokenRows>,
    /// Whether embedding and head stay tied where one of them is trained.
    pub(crate) tied: bool,
    pub(crate) notices: Vec<String>,
}

impl BaseChanges {
    /// Returns whether the base stays as it is.
    pub fn is_empty(&self) -> bool {
        self.what().is_none()
    }

    /// Returns a word for the first change, if there is one.
    pub(crate) fn what(&self) -> Option<String> {
        let first =
            |names: Option<&String>, what: &str| names.map(|name| format!("{what} of `{name}`"));
        if self.init != BaseInit::Unchanged {
            return Some(format!("`init_lora_weights` = `{}`", self.init.name()));
        }
        first(self.magnitudes.keys().next(), "DoRA's magnitudes")
            .or_else(|| first(self.biases.keys().next(), "the bias"))
            .or_else(|| self.whole().next().map(|(name, _)| format!("`{name}`")))
            .or_else(|| first(self.tokens.keys().next(), "token rows"))
    }

    /// Returns the parameters that are stored whole, in the order in which they replace others.
    pub(crate) fn whole(&self) -> impl Iterator<Item = (&String, &Stored)> {
        self.tensors.iter().chain(&self.copies)
    }

    /// Returns the weight that the pair of a linear layer is added to, and the pair to add.
    ///
    /// The initialization takes its part from the weight, unless the adapter stores the weight
    /// that was left. With magnitudes `m`, the sum is `D (W + s B A)` for a diagonal `D` that makes
    /// the norm of row `i` `m[i]`: `D` goes into the weight and into B.
    ///
    /// # Errors
    /// Returns [`Error::InvalidConfig`] if the weight does not determine the part, and
    /// [`Error::TensorShape`] or [`Error::NotFinite`] for wrong magnitudes.
    pub(crate) fn applied(
        &self,
        module: &str,
        weight: Matrix,
        pair: &LoraWeights,
    ) -> Result<(Matrix, LoraWeights)> {
        let given = format!("{module}.weight");
        let weight = match self.tensors.contains_key(&given) {
            true => weight,
            false => self.left_by_init(module, weight, pair)?,
        };
        match self.magnitudes.get(module) {
            Some(magnitudes) => with_magnitudes(module, weight, pair, magnitudes),
            None => Ok((weight, pair.clone())),
        }
    }

    /// Returns what the initialization leaves of a weight.
    pub(crate) fn left_by_init(
        &self,
        module: &str,
        weight: Matrix,
        pair: &LoraWeights,
    ) -> Result<Matrix> {
        let (left, reason) = match self.init {
            BaseInit::Unchanged => return Ok(weight),
            BaseInit::Pissa => (
                without_principal(&weight, pair.rank()),
                "two of its singular values are equal",
            ),
            BaseInit::Olora => (
                without_columns(&weight, pair.rank(), pair.scale()),
                "its first columns depend on each other",
            ),
        };
        left.ok_or_else(|| {
            bad_field(
                "init_lora_weights",
                format!(
                    "`{}`, but the weight of `{module}` does not determine its base: {reason}",
                    self.init.name()
                ),
            )
        })
    }
}

/// Scales the rows of `weight + s B A` to the norms `magnitudes`.
fn with_magnitudes(
    module: &str,
    mut weight: Matrix,
    pair: &LoraWeights,
    magnitudes: &[f32],
) -> Result<(Matrix, LoraWeights)> {
    let name = || format!("{module}.lora_magnitude_vector");
    if magnitudes.len() != weight.rows() {
        return Err(Error::TensorShape {
            tensor: name(),
            expected: vec![weight.rows()],
            found: vec![magnitudes.len()],
        });
    }
    let delta = pair.delta();
    let mut b = pair.b.clone();
    for (i, magnitude) in magnitudes.iter().enumerate() {
        let sum = weight.row(i).iter().zip(delta.row(i));
        let norm = sum
            .map(|(w, d)| f64::from(w + d).powi(2))
            .sum::<f64>()
            .sqrt();
        let factor = (f64::from(*magnitude) / norm) as f32;
        if !factor.is_finite() {
            return Err(Error::NotFinite {
                tensor: name(),
                index: i,
                value: factor,
            });
        }
        weight.row_mut(i).iter_mut().for_each(|w| *w *= factor);
        b.row_mut(i).iter_mut().for_each(|b| *b *= factor);
    }
    Ok((weight, LoraWeights::new(pair.a.clone(), b, pair.scale)?))
}

impl LoraAdapter {
    /// Sentences about what is stored in the adapter's files and not used.
    pub fn notices(&self) -> &[String] {
        &self.changes.notices
    }

    /// Checks that the model has what is replaced.
    ///
    /// # Errors
    /// Returns [`Error::UnknownLayer`] or [`Error::TensorShape`], and [`Error::Unsupported`] for
    /// the bias of a layer that has none.
    pub(super) fn check_tensors(&self, config: &HfConfig) -> Result<()> {
        let arch = config.arch();
        let mut shapes: BTreeMap<String, Vec<usize>> = arch.tensors().into_iter().collect();
        for matrix in arch.fused() {
            let shape = vec![matrix.d_output(), matrix.d_input];
            shapes.insert(format!("{}.weight", matrix.name), shape);
        }
        let unknown = |layer: &str| Error::UnknownLayer {
            context: "whole modules of a LoRA adapter".into(),
            layer: layer.into(),
        };
        let changes = &self.changes;
        for (name, stored) in changes.whole() {
            if name.strip_suffix(".weight").is_some_and(is_table) {
                continue;
            }
            match shapes.get(name) {
                None if name.ends_with(".bias") => {
                    return Err(Error::Unsupported {
                        what: format!("`{name}` of a LoRA adapter, for a layer without a bias,"),
                    });
                }
                None => return Err(unknown(name)),
                Some(expected) if *expected != stored.shape => {
                    return Err(Error::TensorShape {
                        tensor: name.clone(),
                        expected: expected.clone(),
                        found: stored.shape.clone(),
                    });
                }
                Some(_) => {}
            }
        }
        for (module, bias) in &changes.biases {
            match shapes.get(&format!("{module}.bias")) {
                Some(shape) if *shape == [bias.len()] => {}
                _ => {
                    return Err(Error::Unsupported {
                        what: format!(
                            "`{module}.lora_B.bias` of a LoRA adapter, for a layer without such a \
                             bias,"
                        ),
                    });
                }
            }
        }
        match changes.tokens.keys().find(|module| !is_table(module)) {
            Some(module) => Err(unknown(module)),
            None => Ok(()),
        }
    }

    /// Fails for an adapter that changes its base, where only its pairs would be kept.
    pub(crate) fn refuse_changes(&self, target: &str) -> Result<()> {
        match self.changes.what() {
            None => Ok(()),
            Some(what) => Err(Error::Unsupported {
                what: format!(
                    "an adapter that changes its base ({what}), as {target} (merge it instead)"
                ),
            }),
        }
    }
}
