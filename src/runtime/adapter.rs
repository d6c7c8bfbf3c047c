//! LoRA adapters that are loaded onto a model at run time, and chosen for each session.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::format::{StoredMatrix, WeightFormat};
use crate::io::LoraAdapter;
use crate::io::gguf::is_gguf;
use crate::io::peft::is_table;
use crate::kernels;
use crate::linalg::Matrix;
use crate::space::LoraConfig;

use super::build::{A, BT};
use super::model::{Model, Weights};
use super::plan::encode;
use super::shape::{self, Shape};
use super::weights::{AdapterWeights, Weight};

/// A LoRA adapter for a model. Clones share it. It holds its own matrices, so it can be used with
/// every model that has layers of these names and sizes, such as the same model in another format.
#[derive(Clone, Debug)]
pub struct Adapter(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    layers: BTreeMap<String, Arc<Factors>>,
}

/// The factors of a layer's update `scale * B A`.
#[derive(Debug)]
pub(super) struct Factors {
    /// `[rank, d_input]`.
    a: StoredMatrix,
    /// B transposed, `[rank, d_output]`.
    bt: StoredMatrix,
    scale: f32,
}

impl Factors {
    fn new(name: &str, a: &Matrix, bt: &Matrix, scale: f32) -> Result<Self> {
        let stored = |suffix: &str, matrix: &Matrix| {
            encode(&format!("{name}.{suffix}"), matrix, WeightFormat::F32)
        };
        Ok(Self {
            a: stored(A, a)?,
            bt: stored(BT, bt)?,
            scale,
        })
    }
}

impl Adapter {
    /// Reads a PEFT adapter from its folder, or a LoRA in a GGUF file.
    ///
    /// # Errors
    /// Returns the errors of [`LoraAdapter::open`] or [`LoraAdapter::open_gguf`], and those of
    /// [`from_lora`](Self::from_lora).
    pub fn open(model: &Model, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let adapter = match is_gguf(path) {
            true => LoraAdapter::open_gguf(path, model.config())?,
            false => LoraAdapter::open(path)?,
        };
        Self::from_lora(model, &adapter, path)
    }

    /// Takes an adapter that was read. `path` names it in errors.
    ///
    /// # Errors
    /// Returns [`Error::UnknownLayer`] or [`Error::TensorShape`] if the adapter is for another
    /// model. Returns [`Error::Unsupported`] for an adapter that was trained under a mask or through
    /// a grid (SparsePEFT, QA-SparsePEFT): its sum with the weight is not what was trained, until
    /// [`Merger`](crate::Merger) has merged it.
    pub fn from_lora(model: &Model, adapter: &LoraAdapter, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let unfit = |what: String| Error::Unsupported {
            what: format!("{}: running {what} without merging it", path.display()),
        };
        if adapter.sparse || adapter.quantization_aware {
            let trained = match adapter.sparse {
                true => "under the mask of its base (`sparse_adapter`)",
                false => "through the grid of its base (`quantization_aware`)",
            };
            return Err(unfit(format!("an adapter that was trained {trained}")));
        }
        if let Some(what) = adapter.changes.what() {
            return Err(unfit(format!("an adapter that changes its base ({what})")));
        }
        if let Some(table) = adapter.layers.keys().find(|name| is_table(name)) {
            return Err(unfit(format!("a pair of `{table}`")));
        }
        let mut layers = BTreeMap::new();
        for (name, pair) in adapter.by_layer(model.config())? {
            let bt = Matrix::from_fn(pair.rank(), pair.d_output(), |k, i| pair.b().row(i)[k]);
            let factors = Factors::new(&name, pair.a(), &bt, pair.scale())?;
            layers.insert(name, Arc::new(factors));
        }
        let path = path.into();
        Ok(Self(Arc::new(Inner { path, layers })))
    }

    /// The folder that the adapter is from.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Names of the layers that the adapter changes.
    pub fn layers(&self) -> impl ExactSizeIterator<Item = &str> {
        self.0.layers.keys().map(String::as_str)
    }

    /// Largest rank of a layer.
    pub fn max_rank(&self) -> usize {
        let ranks = self.0.layers.values().map(|layer| layer.a.rows());
        ranks.max().unwrap_or(0)
    }

    /// Size of the factors in bytes.
    pub fn bytes(&self) -> usize {
        let layers = self.0.layers.values();
        layers.map(|layer| layer.a.bytes() + layer.bt.bytes()).sum()
    }

    /// Returns whether both are the same adapter, loaded once.
    pub(super) fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Feeds what identifies the adapter to a checksum.
    pub(super) fn identify(&self, put: &mut dyn FnMut(&[u8])) {
        for (name, layer) in &self.0.layers {
            put(name.as_bytes());
            put(&layer.scale.to_bits().to_le_bytes());
            for part in layer.a.parts().iter().chain(&layer.bt.parts()) {
                put(part.bytes);
            }
        }
    }

    /// Returns the index of each layer in a model, after comparing the sizes.
    fn fit<'a>(
        &'a self,
        weights: &'a Weights,
    ) -> impl Iterator<Item = Result<(usize, &'a Arc<Factors>)>> {
        self.0.layers.iter().map(|(name, factors)| {
            let mut infos = weights.infos.iter();
            let index = infos.position(|info| info.name == *name);
            let Some((index, info)) = index.and_then(|at| Some((at, weights.infos.get(at)?)))
            else {
                return Err(Error::UnknownLayer {
                    context: format!("adapter {}", self.0.path.display()),
                    layer: name.clone(),
                });
            };
            let found = vec![factors.bt.cols(), factors.a.cols()];
            let expected = vec![info.d_output, info.d_input];
            if found != expected {
                return Err(Error::TensorShape {
                    tensor: format!("{name}.lora"),
                    expected,
                    found,
                });
            }
            Ok((index, factors))
        })
    }
}

/// The updates of a session's adapters, with those of the model itself.
#[derive(Debug)]
pub(super) struct Active {
    /// For each linear layer of the model, the update that takes the place of its own adapter.
    layers: Vec<Option<(Arc<Factors>, f32)>>,
}

impl Active {
    /// Puts adapters with their scales together. Where a layer has several updates, their factors
    /// are copied into one.
    ///
    /// # Errors
    /// Returns [`Error::UnknownLayer`] or [`Error::TensorShape`] if an adapter does not fit the
    /// model, and [`Error::InvalidArgument`] if a scale is not finite.
    pub fn new(weights: &Weights, shape: &Shape, chosen: &[(Adapter, f32)]) -> Result<Self> {
        let mut all: Vec<Vec<(Arc<Factors>, f32)>> = vec![Vec::new(); weights.layers.len()];
        for (adapter, scale) in chosen {
            if !scale.is_finite() {
                return Err(Error::argument("scale", scale, "a finite number"));
            }
            for found in adapter.fit(weights) {
                let (index, factors) = found?;
                all[index].push((factors.clone(), scale * factors.scale));
            }
        }
        let mut layers = Vec::with_capacity(all.len());
        for ((index, mut parts), rank) in all.into_iter().enumerate().zip(&shape.ranks) {
            let layer = &weights.layers[index];
            if let (Some(own), true, false) = (&layer.adapter, *rank > 0, parts.is_empty()) {
                let first = |weight: &Weight| Ok::<_, Error>(rows(weight.get()?, *rank));
                let scale = shape::scale(&own.lora, *rank);
                let own = Factors::new(&layer.name, &first(&own.a)?, &first(&own.bt)?, scale)?;
                parts.insert(0, (Arc::new(own), scale));
            }
            layers.push(match parts.len() {
                0 | 1 => parts.pop(),
                _ => Some((Arc::new(stack(&layer.name, &parts)?), 1.0)),
            });
        }
        Ok(Self { layers })
    }

    /// Returns the update of a layer, or `None` if it is that of the model.
    pub fn of_layer(&self, layer: usize) -> Option<kernels::Adapter<'_>> {
        let (factors, scale) = self.layers.get(layer)?.as_ref()?;
        Some(kernels::Adapter {
            a: &factors.a,
            bt: &factors.bt,
            rank: factors.a.rows(),
            scale: *scale,
        })
    }
}

/// Returns the first rows of a matrix.
fn rows(stored: &StoredMatrix, n: usize) -> Matrix {
    let whole = stored.to_matrix();
    Matrix::from_fn(n, whole.cols(), |row, col| whole.row(row)[col])
}

/// Puts the factors of several updates below one another, with the scales in B.
fn stack(name: &str, parts: &[(Arc<Factors>, f32)]) -> Result<Factors> {
    let under = |scaled: bool| {
        let (mut values, mut n, mut width) = (Vec::new(), 0, 0);
        for (factors, scale) in parts {
            let stored = if scaled { &factors.bt } else { &factors.a };
            let factor = if scaled { *scale } else { 1.0 };
            (n, width) = (n + stored.rows(), stored.cols());
            values.extend(stored.to_matrix().into_vec().iter().map(|v| v * factor));
        }
        Matrix::new(n, width, values)
    };
    Factors::new(name, &under(false)?, &under(true)?, 1.0)
}

impl Model {
    /// Returns the model with an adapter as a part of it, which [`save`](Self::save) writes and
    /// [`merged`](Self::merged) adds to dense weights. The weights are shared. Where a layer has an
    /// adapter already, both are put together.
    ///
    /// # Errors
    /// Returns [`Error::UnknownLayer`] or [`Error::TensorShape`] if the adapter does not fit the
    /// model, [`Error::InvalidArgument`] if the scale is not finite, and [`Error::Unsupported`] if
    /// the rank of an adapter of the model is a choice of its search space
    /// ([`extract`](Self::extract) a subnet first).
    pub fn with_adapter(&self, adapter: &Adapter, scale: f32) -> Result<Self> {
        let shape = self.shape(0)?;
        let active = Active::new(&self.weights, shape, &[(adapter.clone(), scale)])?;
        let mut weights = (*self.weights).clone();
        for (layer, added) in weights.layers.iter_mut().zip(active.layers) {
            let Some(added) = added else {
                continue;
            };
            if layer.adapter.is_some() && weights.space.is_some() {
                let what = format!(
                    "an adapter on `{}`, which has one whose rank is a choice (extract a subnet \
                     first),",
                    layer.name
                );
                return Err(Error::Unsupported { what });
            }
            let factors = stack(&layer.name, &[added])?;
            let rank = factors.a.rows();
            let name = |suffix: &str| format!("{}.{suffix}", layer.name);
            layer.adapter = Some(AdapterWeights {
                a: Weight::made(name(A), factors.a),
                bt: Weight::made(name(BT), factors.bt),
                lora: LoraConfig::new(rank).with_alpha(rank as f64),
            });
        }
        Ok(self.with_weights(weights.renewed()?))
    }
}
