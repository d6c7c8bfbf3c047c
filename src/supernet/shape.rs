//! The sizes of a decoder's blocks, and the activation of a prefix of them.

use crate::adapter::ElasticLoraLinear;
use crate::arch::{BlockDims, LinearKind, SubBlock};
use crate::error::Result;
use crate::model::{Block, Decoder};

/// The full sizes of a model's blocks, regardless of the active subnet.
pub(super) fn full_dims(model: &Decoder) -> Vec<BlockDims> {
    let head_dim = model.config().head_dim();
    let outputs = |layer: Option<&ElasticLoraLinear>| layer.map_or(0, |layer| layer.base.dims()[1]);
    let of_block = |block: &Block| BlockDims {
        n_heads: outputs(block.linear(LinearKind::Q)) / head_dim,
        n_kv_heads: outputs(block.linear(LinearKind::K)) / head_dim,
        d_mlp: outputs(block.linear(LinearKind::Up)),
    };
    model.layers.iter().map(of_block).collect()
}

/// Activates the first channels of each block up to these sizes, and disables sub-blocks of size 0.
pub(super) fn activate(model: &mut Decoder, blocks: &[BlockDims]) -> Result<()> {
    let (d_model, head_dim) = (model.config().hidden_size(), model.config().head_dim());
    for (block, dims) in model.layers.iter_mut().zip(blocks) {
        for part in SubBlock::ALL {
            block.set_runs(part, dims.has(part));
        }
        for kind in LinearKind::ALL {
            let active = dims.linear(kind, d_model, head_dim);
            if let Some(layer) = block.linear_mut(kind).filter(|_| !active.contains(&0)) {
                layer.set_active_dims(active)?;
            }
        }
    }
    Ok(())
}
