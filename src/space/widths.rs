//! The effect of elastic widths and depths on a decoder: which layers share a width, and the sizes
//! of each block in a subnet.

use std::collections::{BTreeMap, BTreeSet};

use super::{Elastic, Group, SearchSpace, SubnetConfig};
use crate::arch::{BlockDims, LinearKind, SubBlock};
use crate::error::{Error, Result};

fn invalid(group: &Group, reason: String) -> Error {
    Error::InvalidSpace {
        group: group.id().to_string(),
        reason,
    }
}

/// Returns the sub-block and the blocks that a group of elastic width covers.
fn blocks_of(group: &Group) -> Result<(SubBlock, Vec<usize>)> {
    let mut found: BTreeMap<usize, BTreeSet<LinearKind>> = BTreeMap::new();
    for name in group.layers() {
        let layer = LinearKind::parse(name);
        let (block, kind) =
            layer.ok_or_else(|| invalid(group, format!("`{name}` has no elastic width")))?;
        if kind.writes_residual() {
            let reason = format!(
                "`{name}` puts out the residual stream, whose width is fixed; its inputs follow by themselves"
            );
            return Err(invalid(group, reason));
        }
        found.entry(block).or_default().insert(kind);
    }
    let parts: BTreeSet<SubBlock> = found
        .values()
        .flatten()
        .map(|kind| kind.sub_block())
        .collect();
    let part = match parts.iter().collect::<Vec<_>>()[..] {
        [part] => *part,
        _ => {
            return Err(invalid(
                group,
                "its layers differ in shape: attention and MLP".into(),
            ));
        }
    };
    for (block, kinds) in &found {
        if let Some(missing) = part
            .tied_outputs()
            .iter()
            .find(|kind| !kinds.contains(kind))
        {
            return Err(invalid(
                group,
                format!(
                    "`{}` must have the same width, and is not in it",
                    missing.name(*block)
                ),
            ));
        }
    }
    Ok((part, found.into_keys().collect()))
}

/// Checks that every width and depth of a space gives a valid model of the blocks `full`. The
/// caller has already checked names and shapes.
pub(crate) fn check(full: &[BlockDims], head_dim: usize, space: &SearchSpace) -> Result<()> {
    for kind in [Elastic::Bits, Elastic::Density] {
        if let Some(group) = space.groups_of_kind(kind).next() {
            let reason =
                "bits and densities are chosen where weights are stored, not in a supernet";
            return Err(invalid(group, reason.into()));
        }
    }
    for group in space.groups_of_kind(Elastic::Width) {
        let (part, blocks) = blocks_of(group)?;
        let size = |block: usize| match part {
            SubBlock::Attention => (full[block].n_heads, full[block].n_kv_heads),
            SubBlock::Mlp => (full[block].d_mlp, 0),
        };
        let first = size(blocks[0]);
        if let Some(other) = blocks.iter().find(|block| size(**block) != first) {
            let reason = format!(
                "its layers differ in shape: blocks {} and {other}",
                blocks[0]
            );
            return Err(invalid(group, reason));
        }
        if part == SubBlock::Mlp {
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
            return Err(invalid(group, reason));
        }
    }
    for group in space.groups_of_kind(Elastic::Depth) {
        for name in group.layers() {
            let known = SubBlock::parse(name).filter(|(block, parts)| {
                let dims = full.get(*block);
                dims.is_some_and(|dims| parts.iter().any(|part| dims.has(*part)))
            });
            if known.is_none() {
                let reason = format!("`{name}` is neither a block nor the attention or MLP of one");
                return Err(invalid(group, reason));
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
            return Err(invalid(group, reason));
        }
    }
    Ok(())
}

/// Returns the sizes of the blocks `full` in a subnet. A block may have neither sub-block left.
///
/// # Errors
/// Returns the errors of [`SearchSpace::validate`].
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
        if let Some((block, parts)) = SubBlock::parse(&name) {
            parts.iter().for_each(|part| blocks[block].remove(*part));
        }
    }
    Ok(blocks)
}
