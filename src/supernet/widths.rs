//! What elastic widths and depths mean to a decoder: which layers a width ties together, and the sizes of each block under a
//! subnet.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{Error, Result};
use crate::io::hf::BlockDims;
use crate::model::{Decoder, LinearKind, Unit};
use crate::space::{Elastic, Group, SearchSpace, SubnetConfig};

/// The layers whose outputs one width sets, which are tied to each other.
const MLP: [LinearKind; 2] = [LinearKind::Gate, LinearKind::Up];
const ATTENTION: [LinearKind; 3] = [LinearKind::Q, LinearKind::K, LinearKind::V];

fn broken(group: &Group, reason: String) -> Error {
    Error::InvalidSpace {
        group: group.id().to_string(),
        reason,
    }
}

/// The blocks that a group of elastic width is about, and which part of them.
fn blocks_of(group: &Group) -> Result<(Unit, Vec<usize>)> {
    let mut found: BTreeMap<usize, BTreeSet<LinearKind>> = BTreeMap::new();
    for name in group.layers() {
        let layer = LinearKind::parse(name);
        let (block, kind) =
            layer.ok_or_else(|| broken(group, format!("`{name}` has no elastic width")))?;
        if matches!(kind, LinearKind::O | LinearKind::Down) {
            let reason = format!(
                "`{name}` puts out the residual stream, whose width is fixed; its inputs follow by themselves"
            );
            return Err(broken(group, reason));
        }
        found.entry(block).or_default().insert(kind);
    }
    let units: BTreeSet<Unit> = found.values().flatten().map(|kind| kind.unit()).collect();
    let unit = match units.iter().collect::<Vec<_>>()[..] {
        [unit] => *unit,
        _ => {
            return Err(broken(
                group,
                "its layers differ in shape: attention and MLP".into(),
            ));
        }
    };
    let tied: &[LinearKind] = if unit == Unit::Mlp { &MLP } else { &ATTENTION };
    for (block, kinds) in &found {
        if let Some(missing) = tied.iter().find(|kind| !kinds.contains(kind)) {
            return Err(broken(
                group,
                format!(
                    "`{}` must have the same width, and is not in it",
                    missing.name(*block)
                ),
            ));
        }
    }
    Ok((unit, found.into_keys().collect()))
}

/// The sizes of a model's blocks as they stand, whatever is active.
pub(super) fn full_dims(model: &Decoder) -> Vec<BlockDims> {
    let head_dim = model.config().head_dim();
    let outputs =
        |layer: Option<&crate::ElasticLoraLinear>| layer.map_or(0, |layer| layer.base.dims()[1]);
    let of_block = |block: &crate::model::Block| BlockDims {
        n_heads: outputs(block.linear(LinearKind::Q)) / head_dim,
        n_kv_heads: outputs(block.linear(LinearKind::K)) / head_dim,
        d_mlp: outputs(block.linear(LinearKind::Up)),
    };
    model.layers.iter().map(of_block).collect()
}

/// Checks that every width and depth of a space makes a model of blocks `full`; names and shapes were checked before.
pub(crate) fn check(full: &[BlockDims], head_dim: usize, space: &SearchSpace) -> Result<()> {
    for group in space.groups_of_kind(Elastic::Width) {
        let (unit, blocks) = blocks_of(group)?;
        let size = |block: usize| match unit {
            Unit::Attention => (full[block].n_heads, full[block].n_kv_heads),
            Unit::Mlp => (full[block].d_mlp, 0),
        };
        let first = size(blocks[0]);
        if let Some(other) = blocks.iter().find(|block| size(**block) != first) {
            let reason = format!(
                "its layers differ in shape: blocks {} and {other}",
                blocks[0]
            );
            return Err(broken(group, reason));
        }
        if unit == Unit::Mlp {
            continue;
        }
        let (heads, kv_heads) = first;
        let in_group = heads / kv_heads.max(1);
        let step = in_group * head_dim;
        if let Some(width) = group
            .choices()
            .iter()
            .find(|width| !width.is_multiple_of(step) || **width > heads * head_dim)
        {
            let reason = match in_group {
                1 => format!(
                    "a width of {width} is no whole number of heads, of {head_dim} channels each"
                ),
                _ => format!(
                    "a width of {width} is no whole number of heads that share a key/value head, {in_group} of {head_dim} \
                     channels each"
                ),
            };
            return Err(broken(group, reason));
        }
    }
    for group in space.groups_of_kind(Elastic::Depth) {
        for name in group.layers() {
            let known = Unit::parse(name).filter(|(block, units)| {
                let has = |dims: &BlockDims, unit: &Unit| match unit {
                    Unit::Attention => dims.has_attention(),
                    Unit::Mlp => dims.has_mlp(),
                };
                full.get(*block)
                    .is_some_and(|dims| units.iter().any(|unit| has(dims, unit)))
            });
            if known.is_none() {
                let reason = format!("`{name}` is neither a block nor the attention or MLP of one");
                return Err(broken(group, reason));
            }
        }
    }
    if let Some(group) = space.groups_of_kind(Elastic::Depth).last() {
        let smallest = block_dims(full, head_dim, space, &space.minimal())?;
        if smallest
            .iter()
            .all(|block| !block.has_attention() && !block.has_mlp())
        {
            let reason = "with the smallest choices, nothing is left of the model".to_string();
            return Err(broken(group, reason));
        }
    }
    Ok(())
}

/// The sizes of blocks `full` under a subnet; a block may be left without either part.
///
/// # Errors
/// As [`SearchSpace::validate`].
pub(crate) fn block_dims(
    full: &[BlockDims],
    head_dim: usize,
    space: &SearchSpace,
    subnet: &SubnetConfig,
) -> Result<Vec<BlockDims>> {
    let mut blocks = full.to_vec();
    for (name, width) in space.widths(subnet)? {
        match LinearKind::parse(&name) {
            Some((block, LinearKind::Q)) => {
                let (dims, of) = (&mut blocks[block], full[block]);
                dims.n_heads = width / head_dim;
                dims.n_kv_heads = dims.n_heads * of.n_kv_heads / of.n_heads.max(1);
            }
            Some((block, LinearKind::Up)) => blocks[block].d_mlp = width,
            _ => {}
        }
    }
    for name in space.left_out(subnet)? {
        for (block, unit) in Unit::parse(&name)
            .into_iter()
            .flat_map(|(block, units)| units.iter().map(move |u| (block, *u)))
        {
            match unit {
                Unit::Attention => (blocks[block].n_heads, blocks[block].n_kv_heads) = (0, 0),
                Unit::Mlp => blocks[block].d_mlp = 0,
            }
        }
    }
    Ok(blocks)
}

/// Makes blocks of these sizes the active ones, leaving out what has no size.
pub(super) fn activate(model: &mut Decoder, blocks: &[BlockDims]) -> Result<()> {
    let (d_model, head_dim) = (model.config().hidden_size(), model.config().head_dim());
    for (block, dims) in model.layers.iter_mut().zip(blocks) {
        block.set_runs(Unit::Attention, dims.has_attention());
        block.set_runs(Unit::Mlp, dims.has_mlp());
        let (queries, keys) = (dims.n_heads * head_dim, dims.n_kv_heads * head_dim);
        let sizes = [
            (LinearKind::Q, [d_model, queries]),
            (LinearKind::K, [d_model, keys]),
            (LinearKind::V, [d_model, keys]),
            (LinearKind::O, [queries, d_model]),
            (LinearKind::Gate, [d_model, dims.d_mlp]),
            (LinearKind::Up, [d_model, dims.d_mlp]),
            (LinearKind::Down, [dims.d_mlp, d_model]),
        ];
        for (kind, active) in sizes.into_iter().filter(|(_, active)| !active.contains(&0)) {
            if let Some(layer) = block.linear_mut(kind) {
                layer.set_active_dims(active)?;
            }
        }
    }
    Ok(())
}
