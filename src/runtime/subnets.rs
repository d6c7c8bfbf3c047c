//! Subnets that have weights of their own, such as the merged subnets of a supernet whose adapters
//! no pair of factors expresses.

use crate::error::{Error, Result};
use crate::format::StoredMatrix;

use super::build::named;
use super::model::{Model, SubnetParts};

impl Model {
    /// Returns the model with another one as a subnet: a session that activates it computes what
    /// the other model computes. Weights that are equal in both, or in subnets that were added
    /// before, are held once, in memory and in a bundle.
    ///
    /// Use this for the merged subnets of a SparsePEFT or QA-SparsePEFT supernet, whose masks and
    /// grids keep them from being switched by rank.
    ///
    /// # Errors
    /// Returns [`Error::Unsupported`] if the models differ in anything but the weights of linear
    /// layers, or if one of them is a supernet or has adapters. Returns [`Error::InvalidArgument`]
    /// if a subnet has this name already, and [`Error::InvalidFile`] if the contents of a weight
    /// are damaged.
    pub fn with_subnet(&self, name: impl Into<String>, other: &Self) -> Result<Self> {
        let name = name.into();
        let differs = |what: String| Error::Unsupported {
            what: format!("subnet `{name}` with {what}"),
        };
        for model in [self, other] {
            if model.space().is_some() {
                return Err(differs("or beside a search space".into()));
            }
            if let Some(layer) = model.weights.layers.iter().find(|l| l.adapter.is_some()) {
                return Err(differs(format!(
                    "an adapter of `{}`, not merged,",
                    layer.name
                )));
            }
        }
        let (mine, theirs) = (&*self.weights, &*other.weights);
        if mine.config.arch() != theirs.config.arch() {
            return Err(differs("another architecture".into()));
        }
        if !equal(mine.embedding.get()?, theirs.embedding.get()?) {
            return Err(differs("another embedding".into()));
        }
        if mine.norms != theirs.norms || mine.final_norm != theirs.final_norm {
            return Err(differs("other norms".into()));
        }
        let mut weights = mine.clone();
        let mut indices = Vec::with_capacity(weights.layers.len());
        for (layer, new) in weights.layers.iter_mut().zip(&theirs.layers) {
            if layer.bias != new.bias {
                return Err(differs(format!("another bias of `{}`", layer.name)));
            }
            let wanted = new.weight.get()?;
            let mut found = None;
            for at in 0..=layer.others.len() {
                if equal(layer.weight_at(at).get()?, wanted) {
                    found = Some(at);
                    break;
                }
            }
            indices.push(found.unwrap_or_else(|| {
                layer.others.push(new.weight.clone());
                layer.others.len()
            }));
        }
        let mut subnets = named(mine);
        subnets.push(SubnetParts {
            weights: indices,
            ..SubnetParts::new(name, Default::default())
        });
        Ok(self.with_weights(weights.renewed_with(subnets)?))
    }
}

/// Whether two weights are stored in the same bytes.
fn equal(one: &StoredMatrix, other: &StoredMatrix) -> bool {
    if one.header() != other.header() {
        return false;
    }
    let (one, other) = (one.parts(), other.parts());
    let mut pairs = one.iter().zip(&other);
    one.len() == other.len()
        && pairs.all(|(one, other)| one.name == other.name && one.bytes == other.bytes)
}
