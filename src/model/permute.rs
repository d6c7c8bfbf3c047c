//! Another order of MLP channels and heads, which leaves what the model computes as it is.
//!
//! A channel of the MLP is a row of gate and up and a column of down; a key/value group is its rows of q, k and v and its
//! columns of o. Moved together, they change nothing but the order of the sums in down and o.

use burn::module::Module;
use burn::tensor::{Int, Tensor, TensorData};

use super::{Block, Decoder};
use crate::arch::LinearKind;
use crate::error::{Error, Result};
use crate::nn::BaseLinear;

impl Block {
    /// Channels of the MLP; 0 without one.
    pub fn n_mlp_channels(&self) -> usize {
        self.mlp
            .as_ref()
            .map_or(0, |mlp| mlp.down_proj.base.dims()[0])
    }

    /// Key/value heads, each with the query heads that share it; 0 without attention.
    pub fn n_kv_groups(&self) -> usize {
        self.self_attn.as_ref().map_or(0, |attention| {
            attention.k_proj.base.dims()[1] / attention.head_dim
        })
    }
}

impl Decoder {
    /// Puts the MLP channels of a block in another order: place `i` gets what is at `order[i]`. Logits stay equal but for the
    /// rounding of sums.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a block that the model lacks or an `order` that is no permutation of its channels;
    /// [`Error::HasAdapter`]; [`Error::Unsupported`] while a layer has less than all of its channels active. The model is then
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

    /// Puts the heads of a block in another order, in units of a key/value head with its `n_heads / n_kv_heads` query heads:
    /// place `i` gets what is at `order[i]`. Logits stay equal but for the rounding of sums.
    ///
    /// # Errors
    /// As [`permute_mlp`](Self::permute_mlp).
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

    /// Refuses a model in which a channel's place means something already.
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

    /// Moves the outputs of `writers` and the inputs of `reader`, each of which has `order.len()` units.
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
                // Of a part that is missing, no units are there to be moved.
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

/// A layer with its inputs (`dim` 0) or its outputs (`dim` 1) in another order, in the format in which it is stored.
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

/// Refuses what is no permutation of `0..n`.
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
