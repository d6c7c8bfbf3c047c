//! Models whose linear layers are stored in different numbers of bits and densities.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};

use super::model::Model;
use super::plan::encode;
use super::weights::{LayerWeights, Weight};
use crate::arch::Architecture;
use crate::error::{Error, Result};
use crate::format::WeightFormat;
use crate::linalg::Matrix;
use crate::space::{Elastic, LayerShape, SearchSpace, SubnetConfig};

/// Stores the linear layers of a model by the bits ([`Elastic::Bits`]) and densities
/// ([`Elastic::Density`]) that a subnet of a space gives them.
///
/// Integers are rounded to nearest, asymmetric, with a scale for each group of columns; 16 bits are
/// half precision. Of a layer with a density, the weights of smallest magnitude in each row become
/// 0, and it is stored sparse where that is smaller. Layers without a choice stay as they are. Each
/// way of storing a layer is made once, when it is first needed.
pub struct MixedStorage {
    model: Model,
    space: SearchSpace,
    group_size: Option<usize>,
    made: Mutex<HashMap<(usize, Choice), Weight>>,
}

/// Bits and density of a layer.
type Choice = (Option<usize>, Option<usize>);

impl MixedStorage {
    /// Creates the storage for `model`, with this number of columns for each scale (`None` for the
    /// whole row).
    ///
    /// # Errors
    /// Returns [`Error::UnknownLayer`] if the space names a layer that the model does not have, and
    /// [`Error::InvalidSpace`] if it has groups of other kinds or a layer is stored as codes.
    pub fn new(model: &Model, space: &SearchSpace, group_size: Option<usize>) -> Result<Self> {
        let shape = |layer: &super::LayerInfo| {
            LayerShape::new(layer.name.clone(), layer.d_input, layer.d_output)
        };
        let shapes: Vec<LayerShape> = model.layers().iter().map(shape).collect();
        space.validate_layers(&shapes, usize::MAX)?;
        for group in space.groups() {
            let broken = |reason: String| Error::InvalidSpace {
                group: group.id().into(),
                reason,
            };
            if !matches!(group.kind(), Elastic::Bits | Elastic::Density) {
                return Err(broken("it is neither of bits nor of densities".into()));
            }
            for name in group.layers() {
                let index = model.layer_index(name);
                let info = index.and_then(|index| model.layers().get(index));
                if info.is_some_and(|info| {
                    matches!(
                        info.format,
                        WeightFormat::Int { .. } | WeightFormat::SparseInt4 { .. }
                    )
                }) {
                    return Err(broken(format!("`{name}` is stored as codes already")));
                }
                let tied = model.config().tie_word_embeddings();
                if name == Architecture::HEAD_LAYER && tied {
                    return Err(broken(format!("`{name}` is tied to the embedding")));
                }
            }
        }
        Ok(Self {
            model: model.clone(),
            space: space.clone(),
            group_size,
            made: Mutex::new(HashMap::new()),
        })
    }

    /// Returns the model stored by a subnet of the space.
    ///
    /// # Errors
    /// Returns the errors of [`SearchSpace::validate`], and an error if a weight cannot be read or
    /// stored.
    pub fn model(&self, subnet: &SubnetConfig) -> Result<Model> {
        let (bits, densities) = (self.space.bits(subnet)?, self.space.densities(subnet)?);
        let of = |map: &BTreeMap<String, usize>, name: &str| map.get(name).copied();
        let mut weights = (*self.model.weights).clone();
        let tied = weights.config.tie_word_embeddings();
        for (index, layer) in weights.layers.iter_mut().enumerate() {
            let choice = (of(&bits, &layer.name), of(&densities, &layer.name));
            let of_embedding = tied && layer.name == Architecture::HEAD_LAYER;
            if choice != (None, None) && !of_embedding {
                layer.weight = self.stored(index, layer, choice)?;
            }
        }
        Ok(self.model.with_weights(weights.renewed()?))
    }

    fn stored(&self, index: usize, layer: &LayerWeights, choice: Choice) -> Result<Weight> {
        let key = (index, choice);
        let made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(weight) = made.get(&key) {
            return Ok(weight.clone());
        }
        drop(made);
        let mut matrix = layer.weight.get()?.to_matrix();
        let (bits, density) = (choice.0.unwrap_or(16), choice.1.unwrap_or(100));
        prune_rows(&mut matrix, density);
        let format = self.format(&matrix, bits);
        let name = layer.weight.name();
        let weight = Weight::made(name, encode(name, &matrix, format)?);
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(made.entry(key).or_insert(weight).clone())
    }

    /// Returns the smaller of the dense and the sparse format with these bits.
    fn format(&self, matrix: &Matrix, bits: usize) -> WeightFormat {
        let (group_size, symmetric) = (self.group_size, false);
        let (dense, sparse) = match bits {
            16 => (WeightFormat::F16, Some(WeightFormat::SparseF16)),
            bits => {
                let dense = WeightFormat::Int {
                    bits: bits as u8,
                    group_size,
                    symmetric,
                };
                let sparse = WeightFormat::SparseInt4 {
                    group_size,
                    symmetric,
                };
                (dense, (bits == 4).then_some(sparse))
            }
        };
        let nonzero = matrix.as_slice().len() - matrix.count_zeros();
        let bytes = |format: WeightFormat| format.bytes(matrix.rows(), matrix.cols(), nonzero);
        match sparse {
            Some(sparse) if bytes(sparse) < bytes(dense) => sparse,
            _ => dense,
        }
    }
}

/// Makes the weights of smallest magnitude in each row 0, such that this percentage stays. The first
/// of equal weights stay.
fn prune_rows(matrix: &mut Matrix, density: usize) {
    let keep = (matrix.cols() * density).div_ceil(100);
    if keep >= matrix.cols() {
        return;
    }
    for row in 0..matrix.rows() {
        let weights = matrix.row_mut(row);
        let mut order: Vec<usize> = (0..weights.len()).collect();
        order.sort_by(|a, b| weights[*b].abs().total_cmp(&weights[*a].abs()));
        for at in &order[keep..] {
            weights[*at] = 0.0;
        }
    }
}
