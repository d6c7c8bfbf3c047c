//! What a subnet costs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::{Decoder, ParamCount};

/// Sizes and costs of one subnet, adapters counted apart from the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubnetCost {
    /// Weights of base and active adapters; tied embeddings count once.
    pub params: usize,
    /// Those of them that are not zero; every weight of an adapter counts.
    pub nonzero_params: usize,
    /// Multiply-accumulates a token of every linear layer, the head among them, as the papers count: zeros included, the
    /// products of attention scores and the embedding left out.
    pub macs_per_token: usize,
    /// Those of them that are in adapters.
    pub adapter_params: usize,
    /// Weight bytes at 16 bits a weight, zeros included: what a search compares. A file's bytes follow from its own types.
    pub weight_bytes: usize,
}

impl SubnetCost {
    /// Counts for a model whose base has `base` weights and whose adapters have the given ranks.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`] where the model lacks one of the layers.
    pub(crate) fn count(model: &Decoder, base: ParamCount, ranks: &BTreeMap<String, usize>) -> Result<Self> {
        let head = model.config().vocab_size() * model.config().hidden_size();
        let mut macs = head;
        for layer in model.layer_shapes() {
            macs += layer.d_input * layer.d_output;
        }
        let mut adapters = 0;
        for (name, rank) in ranks {
            let layer = model
                .linear(name)
                .ok_or_else(|| Error::UnknownLayer { context: "cost of a subnet".into(), layer: name.clone() })?;
            let [d_input, d_output] = layer.base.dims();
            adapters += rank * (d_input + d_output);
        }
        let params = base.total + adapters;
        Ok(Self {
            params,
            nonzero_params: base.nonzero + adapters,
            adapter_params: adapters,
            macs_per_token: macs + adapters,
            weight_bytes: 2 * params,
        })
    }
}
