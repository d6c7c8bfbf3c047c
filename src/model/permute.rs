//! Reorders MLP channels and attention heads without changing what the model computes.
//!
//! An MLP channel is a row of gate and up and a column of down. A key/value group is its rows of q,
//! k and v and its columns of o. Moving all of these together changes only the order of the sums in
//! down and o.

use burn::module::Module;
use burn::tensor::{Int, Tensor, TensorData};

use super::{Block, Decoder};
use crate::arch::LinearKind;
use crate::error::{Error, Result};
use crate::nn::BaseLinear;

impl Block {
    /// Number of MLP channels; 0 without an MLP.
    pub fn n_mlp_channels(&self) -> usize {
        self.mlp
            .as_ref()
            .map_or(0, |mlp| mlp.down_proj.base.dims()[0])
    }

    /// Number of key/value heads, each grouped with the query heads that share it; 0 without
    /// attention.
    pub fn n_kv_groups(&self) -> usize {
        self.self_attn.as_ref().map_or(0, |attention| {
            attention.k_proj.base.dims()[1] / attention.head_dim
        })
    }
}

impl Decoder {
    /// Reorders the MLP channels of a block: position `i` receives channel `order[i]`. Logits are
    /// unchanged except for the rounding of sums.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if the model has no such block or `order` is not a
    /// permutation of its channels, [`Error::HasAdapter`] for a model with adapters, and
    /// [`Error::Unsupported`] if a layer has only part of its channels active. The model is then
    /// unchanged.
    pub fn permute_mlp(&mut self, block: usize, order: &[usize]) -> Result<()> {
        let n = self.block_to_permute(block)?.n_mlp_channels();
        check_permutation("order of MLP channels", order, n)?;
        self.move_units(
            block,
            &[LinearKind::Gate, LinearKind::Up],
            LinearKind::Down,
            order,
        )
    }

    /// Reorders the heads of a block in key/value groups, each a key/value head with its
    /// `n_heads / n_kv_heads` query heads: position `i` receives group `order[i]`. Logits are
    /// unchanged except for the rounding of sums.
    ///
    /// # Errors
    /// Returns the errors of [`permute_mlp`](Self::permute_mlp).
    pub fn permute_heads(&mut self, block: usize, order: &[usize]) -> Result<()> {
        let n = self.block_to_permute(block)?.n_kv_groups();
        check_permutation("order of key/value groups", order, n)?;
        self.move_units(
            block,
            &[LinearKind::Q, LinearKind::K, LinearKind::V],
            LinearKind::O,
            order,
        )
    }

    fn block_to_permute(&self, block: usize) -> Result<&Block> {
        self.check_reorderable()?;
        let n_blocks = self.layers.len();
        self.layers
            .get(block)
            .ok_or_else(|| Error::argument("block", block, format!("under {n_blocks}")))
    }

    /// Fails if something already depends on the order of the channels: an adapter, or a partly
    /// active layer.
    pub(crate) fn check_reorderable(&self) -> Result<()> {
        self.refuse_adapters(
            "put channels in order before adapters are put on, or merge them first",
        )?;
        match self
            .linears()
            .find(|(_, layer)| layer.base.active_dims() != layer.base.dims())
        {
            Some((name, _)) => Err(Error::Unsupported {
                what: format!(
                    "another order of channels while only a part of those of `{name}` is active"
                ),
            }),
            None => Ok(()),
        }
    }

    /// Reorders the outputs of `writers` and the inputs of `reader`. Each of these layers has
    /// `order.len()` channels or groups of equal width.
    fn move_units(
        &mut self,
        block: usize,
        writers: &[LinearKind],
        reader: LinearKind,
        order: &[usize],
    ) -> Result<()> {
        let block = &mut self.layers[block];
        for (kinds, dim) in [(writers, 1), (&[reader][..], 0)] {
            for kind in kinds {
                // A missing sub-block has nothing to reorder.
                let Some(layer) = block.linear_mut(*kind).filter(|_| !order.is_empty()) else {
                    continue;
                };
                let width = layer.base.dims()[dim] / order.len();
                let moved = order
                    .iter()
                    .flat_map(|unit| unit * width..(unit + 1) * width);
                layer.base = select(&layer.base, dim, moved.map(|index| index as i32).collect())?;
            }
        }
        Ok(())
    }
}

/// Reorders the inputs (`dim` 0) or outputs (`dim` 1) of a layer, keeping its stored format.
fn select(layer: &BaseLinear, dim: usize, indices: Vec<i32>) -> Result<BaseLinear> {
    let weight = layer.stored();
    let (trained, autodiff, n) = (
        weight.is_require_grad(),
        weight.is_autodiff(),
        indices.len(),
    );
    let indices: Tensor<1, Int> = Tensor::from_data(
        TensorData::new(indices, [n]),
        &weight.device().without_autodiff(),
    );
    let weight = weight.without_autodiff().select(dim, indices.clone());
    let bias = layer
        .bias
        .as_ref()
        .map(|bias| bias.val().without_autodiff());
    let bias = if dim == 1 {
        bias.map(|bias| bias.select(0, indices))
    } else {
        bias
    };
    let moved = if autodiff {
        BaseLinear::from_tensors(weight.autodiff(), bias.map(Tensor::autodiff))?
    } else {
        BaseLinear::from_tensors(weight, bias)?
    };
    Ok(if trained {
        moved.set_require_grad(true)
    } else {
        moved
    })
}

/// Fails if `order` is not a permutation of `0..n`.
fn check_permutation(name: &'static str, order: &[usize], n: usize) -> Result<()> {
    if order.len() != n {
        return Err(Error::argument(
            name,
            format!("{} places", order.len()),
            format!("{n} are there to be ordered"),
        ));
    }
    let mut seen = vec![false; n];
    for unit in order {
        match seen.get_mut(*unit) {
            Some(seen) if !*seen => *seen = true,
            Some(_) => return Err(Error::argument(name, unit, "each only once")),
            None => return Err(Error::argument(name, unit, format!("under {n}"))),
        }
    }
    Ok(())
}
