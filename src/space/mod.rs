//! Search spaces and subnets: which layers are elastic, which of them share a choice, and the
//! choices themselves.
//!
//! A [`SearchSpace`] is a list of [`Group`]s. The layers of a group share one value; for example,
//! the queries, keys and values of a block have the same rank. A [`SubnetConfig`] sets the value of
//! each group. The meaning of a value depends on the group's [`Elastic`] kind:
//!
//! - active rank (mode A; Shears, arXiv 2404.10934, and SQFT, arXiv 2410.03750);
//! - number of output channels (mode B; LoNAS, LREC-COLING 2024);
//! - number of parts kept in depth, which is not in the papers.
//!
//! A smaller choice uses a prefix of the ranks, channels or parts of a larger one. Choices are kept
//! in descending order, as in the papers' code, so the genome `[0, 0, ...]` is the largest subnet.
//! This module does not use tensors.
//!
//! Layers are named by their Hugging Face module path, such as `model.layers.0.self_attn.q_proj`.

mod config;
mod import;
mod lora;
#[cfg(test)]
mod tests;
pub(crate) mod widths;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::Path;

use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

pub use config::SubnetConfig;
pub use lora::{LoraConfig, MAX_RANK, ScaleRule};

/// Name and size of one linear layer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LayerShape {
    /// Hugging Face module path, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Number of input features.
    pub d_input: usize,
    /// Number of output features.
    pub d_output: usize,
}

impl LayerShape {
    /// Creates the shape of the layer `name` with `d_input` input and `d_output` output features.
    pub fn new(name: impl Into<String>, d_input: usize, d_output: usize) -> Self {
        Self {
            name: name.into(),
            d_input,
            d_output,
        }
    }
}

/// The meaning of a group's value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Elastic {
    /// Active rank of the group's adapters (mode A).
    #[default]
    Rank,
    /// Number of output channels of the group's layers (mode B).
    ///
    /// In an MLP, the width is that of the gate and up projections, and the down projection takes
    /// the same number of inputs. In attention, the width is that of the queries and a whole number
    /// of heads; keys and values shrink in proportion, and the output projection takes as many
    /// inputs as there are query channels.
    Width,
    /// Number of parts that stay, counted from the start of the group's list. A part is a whole
    /// block (`model.layers.3`), its attention (`model.layers.3.self_attn`) or its MLP
    /// (`model.layers.3.mlp`).
    Depth,
    /// Bits per weight in which the group's layers are stored: 2, 3, 4, 8 or 16. No part of a
    /// supernet; see [`MixedStorage`](crate::runtime::MixedStorage).
    Bits,
    /// Percentage of the weights of the group's layers that stay, 1 to 100; the others become 0. No
    /// part of a supernet; see [`MixedStorage`](crate::runtime::MixedStorage).
    Density,
}

impl Elastic {
    fn is_rank(&self) -> bool {
        *self == Elastic::Rank
    }
}

/// Layers that share one elastic value, and the choices for that value.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "GroupParts")]
pub struct Group {
    id: String,
    #[serde(skip_serializing_if = "Elastic::is_rank")]
    kind: Elastic,
    layers: Vec<String>,
    choices: Vec<usize>,
}

/// A [`Group`] as stored in a file, not yet validated.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupParts {
    id: String,
    #[serde(default)]
    kind: Elastic,
    layers: Vec<String>,
    choices: Vec<usize>,
}

impl TryFrom<GroupParts> for Group {
    type Error = Error;

    fn try_from(parts: GroupParts) -> Result<Self> {
        let GroupParts {
            id,
            kind,
            layers,
            choices,
        } = parts;
        Group::of_kind(kind, id, layers, choices)
    }
}

impl Group {
    /// Creates a group of elastic rank. The choices are sorted in descending order and
    /// deduplicated.
    ///
    /// # Errors
    /// Returns the errors of [`of_kind`](Self::of_kind).
    pub fn new(id: impl Into<String>, layers: Vec<String>, choices: Vec<usize>) -> Result<Self> {
        Self::of_kind(Elastic::Rank, id, layers, choices)
    }

    /// Creates a group of any kind. The choices are sorted in descending order and deduplicated.
    ///
    /// For [`Elastic::Depth`], `layers` are parts of the model in order of importance: the last
    /// ones are left out first. The choice 0 is valid for a depth.
    ///
    /// # Errors
    /// Returns [`Error::InvalidSpace`] if the id is empty, there are no layers, a layer is listed
    /// twice, there are no choices, a rank or width is 0, or a depth is larger than the number of
    /// parts.
    pub fn of_kind(
        kind: Elastic,
        id: impl Into<String>,
        layers: Vec<String>,
        mut choices: Vec<usize>,
    ) -> Result<Self> {
        let id = id.into();
        let broken = |reason: String| Error::InvalidSpace {
            group: id.clone(),
            reason,
        };
        if id.is_empty() {
            return Err(broken("the id is empty".into()));
        }
        if layers.is_empty() {
            return Err(broken("it has no layers".into()));
        }
        let mut seen = HashSet::new();
        if let Some(twice) = layers.iter().find(|layer| !seen.insert(layer.as_str())) {
            return Err(broken(format!("layer `{twice}` is named twice")));
        }
        if choices.is_empty() {
            return Err(broken("it has no choices".into()));
        }
        if kind != Elastic::Depth && choices.contains(&0) {
            return Err(broken(format!(
                "its choices {choices:?} must all be over 0"
            )));
        }
        if let (Elastic::Depth, Some(depth)) =
            (kind, choices.iter().find(|depth| **depth > layers.len()))
        {
            return Err(broken(format!(
                "it cannot keep {depth} of {} parts",
                layers.len()
            )));
        }
        let is_valid = |choice: &usize| match kind {
            Elastic::Bits => [2, 3, 4, 8, 16].contains(choice),
            Elastic::Density => *choice <= 100,
            _ => true,
        };
        if let Some(choice) = choices.iter().find(|choice| !is_valid(choice)) {
            let expected = match kind {
                Elastic::Bits => "2, 3, 4, 8 or 16 bits",
                _ => "a percentage",
            };
            return Err(broken(format!("its choice {choice} is not {expected}")));
        }
        choices.sort_unstable_by(|a, b| b.cmp(a));
        choices.dedup();
        Ok(Self {
            id,
            kind,
            layers,
            choices,
        })
    }

    /// The id by which a [`SubnetConfig`] refers to this group.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The meaning of the value.
    pub fn kind(&self) -> Elastic {
        self.kind
    }

    /// Module paths of the layers that share the value, or of the parts that a depth counts; at
    /// least one.
    pub fn layers(&self) -> &[String] {
        &self.layers
    }

    /// The choices in strictly descending order; at least one, and 0 only for a depth.
    pub fn choices(&self) -> &[usize] {
        &self.choices
    }

    /// The papers' heuristic choice: `choices[(len - 1) / 2]` of the descending list, so
    /// `[32, 24, 16]` gives 24 and `[32, 28]` gives 32.
    pub fn heuristic(&self) -> usize {
        self.choices[(self.choices.len() - 1) / 2]
    }

    /// Position of `value` in [`choices`](Self::choices).
    ///
    /// # Errors
    /// Returns [`Error::InvalidChoice`] if the group does not offer `value`.
    pub fn index_of(&self, value: usize) -> Result<usize> {
        self.choices
            .iter()
            .position(|&choice| choice == value)
            .ok_or_else(|| Error::InvalidChoice {
                group: self.id.clone(),
                found: value,
                choices: self.choices.clone(),
            })
    }
}

/// All subnets of a supernet: the product of the choices of its groups.
///
/// The JSON form is `{"groups": [{"id": "layers.0.q_proj+k_proj", "layers":
/// ["model.layers.0.self_attn.q_proj", ...], "choices": [32, 24, 16]}, ...]}`. Unknown fields are
/// rejected.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "SpaceParts")]
pub struct SearchSpace {
    groups: Vec<Group>,
    #[serde(skip)]
    by_id: HashMap<String, usize>,
    #[serde(skip)]
    by_layer: HashMap<Elastic, HashMap<String, usize>>,
}

/// A [`SearchSpace`] as stored in a file, not yet validated.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SpaceParts {
    groups: Vec<Group>,
}

impl TryFrom<SpaceParts> for SearchSpace {
    type Error = Error;

    fn try_from(parts: SpaceParts) -> Result<Self> {
        SearchSpace::new(parts.groups)
    }
}

impl PartialEq for SearchSpace {
    fn eq(&self, other: &Self) -> bool {
        self.groups == other.groups
    }
}

impl Eq for SearchSpace {}

impl SearchSpace {
    /// Creates a space of these groups. Their order is that of genomes and of
    /// [`from_values`](Self::from_values).
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if there are no groups, and [`Error::InvalidSpace`] if an
    /// id is used twice, two groups of the same kind share a layer, or a part is inside a part of
    /// another group.
    pub fn new(groups: Vec<Group>) -> Result<Self> {
        if groups.is_empty() {
            return Err(Error::argument(
                "groups",
                "[]",
                "a search space needs at least one group",
            ));
        }
        let (mut by_id, mut by_layer) = (
            HashMap::new(),
            HashMap::<Elastic, HashMap<String, usize>>::new(),
        );
        for (index, group) in groups.iter().enumerate() {
            if by_id.insert(group.id.clone(), index).is_some() {
                return Err(Error::InvalidSpace {
                    group: group.id.clone(),
                    reason: "the id is used twice".into(),
                });
            }
            let of_kind = by_layer.entry(group.kind).or_default();
            for layer in &group.layers {
                if let Some(other) = of_kind.insert(layer.clone(), index) {
                    return Err(Error::InvalidSpace {
                        group: group.id.clone(),
                        reason: format!(
                            "layer `{layer}` is in group `{}` as well",
                            groups[other].id
                        ),
                    });
                }
            }
        }
        let parts = by_layer.get(&Elastic::Depth).into_iter().flatten();
        for (part, index) in parts.clone() {
            let around = parts
                .clone()
                .find(|(outer, other)| *other != index && is_inside(part, outer));
            if let Some((outer, other)) = around {
                return Err(Error::InvalidSpace {
                    group: groups[*index].id.clone(),
                    reason: format!(
                        "`{part}` is part of `{outer}`, which group `{}` has",
                        groups[*other].id
                    ),
                });
            }
        }
        Ok(Self {
            groups,
            by_id,
            by_layer,
        })
    }

    /// Appends groups to the space.
    ///
    /// # Errors
    /// Returns the errors of [`new`](Self::new).
    pub fn with_groups(mut self, groups: impl IntoIterator<Item = Group>) -> Result<Self> {
        self.groups.extend(groups);
        Self::new(self.groups)
    }

    /// Creates the space without groups. Its only subnet is the unchanged model.
    pub fn single() -> Self {
        Self {
            groups: Vec::new(),
            by_id: HashMap::new(),
            by_layer: HashMap::new(),
        }
    }

    /// Creates one group of elastic rank per block and list of suffixes.
    ///
    /// For example, `[["q_proj", "k_proj", "v_proj"], ["up_proj", "gate_proj"], ["down_proj"]]`
    /// gives the space of Shears. Every group has the same `choices`. See
    /// [`groups_by_block`](Self::groups_by_block).
    ///
    /// # Errors
    /// Returns [`Error::UnknownLayer`] if a suffix matches no layer, and the errors of
    /// [`Group::new`] and [`SearchSpace::new`].
    pub fn grouped<G, S>(
        layers: &[LayerShape],
        suffix_groups: &[G],
        choices: &[usize],
    ) -> Result<Self>
    where
        G: AsRef<[S]>,
        S: AsRef<str>,
    {
        Self::new(Self::groups_by_block(
            Elastic::Rank,
            layers,
            suffix_groups,
            choices,
        )?)
    }

    /// Creates one group of a kind per block and list of suffixes, for a new space or for
    /// [`with_groups`](Self::with_groups).
    ///
    /// For example, `groups_by_block(Elastic::Width, &layers, &[["gate_proj", "up_proj"]], &[384,
    /// 288, 192])` makes the width of each MLP elastic. The id of a group is built from its layers;
    /// the ids of widths also end in `.width`.
    ///
    /// A block is identified by the part of a module path up to and including its first number
    /// (`model.layers.0`). A suffix matches a layer if the path ends with it and a dot precedes it.
    /// If a block has no layer for a suffix, its group is made without that layer; layers that
    /// match no suffix are not elastic. For [`Elastic::Depth`], use [`Group::of_kind`].
    ///
    /// # Errors
    /// Returns [`Error::UnknownLayer`] if a suffix matches no layer, and the errors of
    /// [`Group::of_kind`].
    pub fn groups_by_block<G, S>(
        kind: Elastic,
        layers: &[LayerShape],
        suffix_groups: &[G],
        choices: &[usize],
    ) -> Result<Vec<Group>>
    where
        G: AsRef<[S]>,
        S: AsRef<str>,
    {
        let mut blocks: Vec<(&str, Vec<&str>)> = Vec::new();
        let mut position: HashMap<&str, usize> = HashMap::new();
        for layer in layers {
            let block = split_block(&layer.name).0;
            let at = *position.entry(block).or_insert_with(|| {
                blocks.push((block, Vec::new()));
                blocks.len() - 1
            });
            blocks[at].1.push(&layer.name);
        }
        for suffix in suffix_groups
            .iter()
            .flat_map(|suffixes| suffixes.as_ref())
            .map(AsRef::as_ref)
        {
            if !layers.iter().any(|layer| has_suffix(&layer.name, suffix)) {
                return Err(Error::UnknownLayer {
                    context: "groups".into(),
                    layer: suffix.to_string(),
                });
            }
        }
        let mut groups = Vec::new();
        for (_, names) in &blocks {
            for suffixes in suffix_groups {
                let fitting: Vec<String> = suffixes
                    .as_ref()
                    .iter()
                    .flat_map(|suffix| {
                        names
                            .iter()
                            .filter(|name| has_suffix(name, suffix.as_ref()))
                    })
                    .map(|name| name.to_string())
                    .collect();
                if !fitting.is_empty() {
                    let id = default_id(kind, &fitting);
                    groups.push(Group::of_kind(kind, id, fitting, choices.to_vec())?);
                }
            }
        }
        Ok(groups)
    }

    /// Creates one group of elastic rank per layer, named by the layer's path, with the same
    /// `choices` for all.
    ///
    /// # Errors
    /// Returns the errors of [`Group::new`] and [`SearchSpace::new`].
    pub fn per_layer(layers: &[LayerShape], choices: &[usize]) -> Result<Self> {
        let group = |layer: &LayerShape| {
            Group::new(
                strip_model(&layer.name),
                vec![layer.name.clone()],
                choices.to_vec(),
            )
        };
        Self::new(layers.iter().map(group).collect::<Result<_>>()?)
    }

    /// Creates a space with a single choice, which is plain LoRA of that rank.
    ///
    /// # Errors
    /// Returns the errors of [`per_layer`](Self::per_layer).
    pub fn fixed(layers: &[LayerShape], rank: usize) -> Result<Self> {
        Self::per_layer(layers, &[rank])
    }

    /// The groups, in the order of genomes.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Number of groups; 0 only for [`single`](Self::single).
    pub fn len(&self) -> usize {
        self.groups.len()
    }

    /// Whether the space has no groups; see [`single`](Self::single).
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// The group with this id.
    pub fn group(&self, id: &str) -> Option<&Group> {
        self.by_id.get(id).map(|&index| &self.groups[index])
    }

    /// The group that sets the rank of `layer`.
    pub fn group_of_layer(&self, layer: &str) -> Option<&Group> {
        self.group_of(Elastic::Rank, layer)
    }

    /// The group of kind `kind` that contains `layer`, a layer or, for a depth, a part.
    pub fn group_of(&self, kind: Elastic, layer: &str) -> Option<&Group> {
        self.by_layer
            .get(&kind)?
            .get(layer)
            .map(|&index| &self.groups[index])
    }

    /// The groups of kind `kind`, in the order of genomes.
    pub fn groups_of_kind(&self, kind: Elastic) -> impl Iterator<Item = &Group> {
        self.groups.iter().filter(move |group| group.kind == kind)
    }

    /// Number of subnets. Above about 1e308 it is infinite; use
    /// [`log10_n_subnets`](Self::log10_n_subnets) there.
    pub fn n_subnets(&self) -> f64 {
        self.groups
            .iter()
            .map(|group| group.choices.len() as f64)
            .product()
    }

    /// Decimal logarithm of the number of subnets.
    pub fn log10_n_subnets(&self) -> f64 {
        self.groups
            .iter()
            .map(|group| (group.choices.len() as f64).log10())
            .sum()
    }

    /// Number of subnets, or `None` if it does not fit into 128 bits.
    pub fn n_subnets_exact(&self) -> Option<u128> {
        self.groups.iter().try_fold(1u128, |product, group| {
            product.checked_mul(group.choices.len() as u128)
        })
    }

    /// The subnet with the largest choice of every group.
    pub fn maximal(&self) -> SubnetConfig {
        self.pick(|group| group.choices[0])
    }

    /// The subnet with the smallest choice of every group.
    pub fn minimal(&self) -> SubnetConfig {
        self.pick(|group| group.choices[group.choices.len() - 1])
    }

    /// The papers' heuristic subnet, with the middle choice of every group; see
    /// [`Group::heuristic`].
    pub fn heuristic(&self) -> SubnetConfig {
        self.pick(Group::heuristic)
    }

    /// Draws a uniform, independent choice for every group. It makes one draw from `rng` per group,
    /// in order, so a seeded generator gives the same subnets on every machine.
    pub fn sample<R: Rng + ?Sized>(&self, rng: &mut R) -> SubnetConfig {
        self.pick(|group| group.choices[rng.random_range(0..group.choices.len())])
    }

    fn pick(&self, mut choose: impl FnMut(&Group) -> usize) -> SubnetConfig {
        self.groups
            .iter()
            .map(|group| (group.id.clone(), choose(group)))
            .collect()
    }

    /// Returns the subnet of a genome, which holds an index into the choices of each group.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if the genome has another length than the space, and
    /// [`Error::InvalidSpace`] if an index is out of range.
    pub fn decode(&self, genome: &[usize]) -> Result<SubnetConfig> {
        self.check_len("genome", genome.len())?;
        let gene = |(group, &index): (&Group, &usize)| match group.choices.get(index) {
            Some(&choice) => Ok((group.id.clone(), choice)),
            None => Err(Error::InvalidSpace {
                group: group.id.clone(),
                reason: format!(
                    "index {index} of the genome is past its {} choices",
                    group.choices.len()
                ),
            }),
        };
        self.groups.iter().zip(genome).map(gene).collect()
    }

    /// Returns the genome of a subnet; the inverse of [`decode`](Self::decode).
    ///
    /// # Errors
    /// Returns the errors of [`validate`](Self::validate).
    pub fn encode(&self, config: &SubnetConfig) -> Result<Vec<usize>> {
        if let Some((extra, _)) = config.iter().find(|(id, _)| !self.by_id.contains_key(*id)) {
            return Err(Error::UnknownGroup {
                context: "search space: there is no".into(),
                group: extra.to_string(),
            });
        }
        self.groups
            .iter()
            .map(|group| group.index_of(self.value_of(config, group)?))
            .collect()
    }

    /// Checks that `config` gives every group one of its choices, and has no other groups.
    ///
    /// # Errors
    /// Returns [`Error::UnknownGroup`] if a group is missing or unknown, and
    /// [`Error::InvalidChoice`] if a group does not offer its value.
    pub fn validate(&self, config: &SubnetConfig) -> Result<()> {
        self.encode(config).map(drop)
    }

    /// Creates a subnet from one value per group, in the order of the groups, such as SQFT's
    /// `--custom_config 32 24 ...`.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if the number of values differs from the number of groups,
    /// and [`Error::InvalidChoice`] if a group does not offer its value.
    pub fn from_values(&self, values: &[usize]) -> Result<SubnetConfig> {
        self.check_len("values of a subnet", values.len())?;
        let value = |(group, &value): (&Group, &usize)| {
            group.index_of(value).map(|_| (group.id.clone(), value))
        };
        self.groups.iter().zip(values).map(value).collect()
    }

    /// The values of a subnet in the order of the groups; the inverse of
    /// [`from_values`](Self::from_values).
    ///
    /// # Errors
    /// Returns the errors of [`validate`](Self::validate).
    pub fn values(&self, config: &SubnetConfig) -> Result<Vec<usize>> {
        self.validate(config)?;
        self.groups
            .iter()
            .map(|group| self.value_of(config, group))
            .collect()
    }

    /// The active rank of every layer of elastic rank, by module path.
    ///
    /// # Errors
    /// Returns the errors of [`validate`](Self::validate).
    pub fn ranks(&self, config: &SubnetConfig) -> Result<BTreeMap<String, usize>> {
        self.by_name(config, Elastic::Rank)
    }

    /// The value of its group for every layer of elastic width, by module path.
    ///
    /// # Errors
    /// Returns the errors of [`validate`](Self::validate).
    pub fn widths(&self, config: &SubnetConfig) -> Result<BTreeMap<String, usize>> {
        self.by_name(config, Elastic::Width)
    }

    /// The bits per weight of every layer with a choice of them, by module path.
    ///
    /// # Errors
    /// Returns the errors of [`validate`](Self::validate).
    pub fn bits(&self, config: &SubnetConfig) -> Result<BTreeMap<String, usize>> {
        self.by_name(config, Elastic::Bits)
    }

    /// The percentage of weights that stay of every layer with a choice of it, by module path.
    ///
    /// # Errors
    /// Returns the errors of [`validate`](Self::validate).
    pub fn densities(&self, config: &SubnetConfig) -> Result<BTreeMap<String, usize>> {
        self.by_name(config, Elastic::Density)
    }

    /// The parts that a subnet leaves out.
    ///
    /// # Errors
    /// Returns the errors of [`validate`](Self::validate).
    pub fn left_out(&self, config: &SubnetConfig) -> Result<BTreeSet<String>> {
        let values = self.values(config)?;
        let depths = self
            .groups
            .iter()
            .zip(values)
            .filter(|(group, _)| group.kind == Elastic::Depth);
        Ok(depths
            .flat_map(|(group, depth)| group.layers[depth..].iter().cloned())
            .collect())
    }

    fn by_name(&self, config: &SubnetConfig, kind: Elastic) -> Result<BTreeMap<String, usize>> {
        let values = self.values(config)?;
        let values = self
            .groups
            .iter()
            .zip(values)
            .filter(|(group, _)| group.kind == kind);
        Ok(values
            .flat_map(|(group, value)| group.layers.iter().map(move |layer| (layer.clone(), value)))
            .collect())
    }

    /// The largest rank of any group; 0 if no group has an elastic rank.
    pub fn max_rank(&self) -> usize {
        self.groups_of_kind(Elastic::Rank)
            .map(|group| group.choices[0])
            .max()
            .unwrap_or(0)
    }

    /// Checks the space against a model.
    ///
    /// Every layer and part must exist, and no rank may exceed `max_rank`. The layers of a width
    /// must have the same number of inputs, and the largest width must not exceed their largest
    /// number of outputs. Whether the widths and depths give a valid model is checked by
    /// [`SuperNet::new`](crate::SuperNet::new).
    ///
    /// # Errors
    /// Returns [`Error::UnknownLayer`] with the group and the layer, [`Error::InvalidRank`] with
    /// the layer and the rank, or [`Error::InvalidSpace`] for a width.
    pub fn validate_layers(&self, layers: &[LayerShape], max_rank: usize) -> Result<()> {
        let known: HashMap<&str, &LayerShape> = layers
            .iter()
            .map(|layer| (layer.name.as_str(), layer))
            .collect();
        for group in &self.groups {
            let exists = |name: &str| match group.kind {
                Elastic::Depth => layers.iter().any(|layer| is_inside(&layer.name, name)),
                _ => known.contains_key(name),
            };
            if let Some(unknown) = group.layers.iter().find(|layer| !exists(layer)) {
                return Err(Error::UnknownLayer {
                    context: format!("search space, group `{}`", group.id),
                    layer: unknown.clone(),
                });
            }
            let largest = group.choices[0];
            if group.kind == Elastic::Rank && largest > max_rank {
                return Err(Error::InvalidRank {
                    layer: group.layers[0].clone(),
                    found: largest,
                    max: max_rank,
                });
            }
            if group.kind == Elastic::Width {
                let shapes = group
                    .layers
                    .iter()
                    .filter_map(|layer| known.get(layer.as_str()));
                let broken = |reason: String| {
                    Err(Error::InvalidSpace {
                        group: group.id.clone(),
                        reason,
                    })
                };
                let inputs: BTreeSet<usize> = shapes.clone().map(|shape| shape.d_input).collect();
                if inputs.len() > 1 {
                    return broken(format!(
                        "its layers differ in shape: they take {inputs:?} inputs"
                    ));
                }
                let widest = shapes.map(|shape| shape.d_output).max().unwrap_or(0);
                if largest > widest {
                    return broken(format!(
                        "a width of {largest} is more than its layers' {widest} output channels"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Reads the format of [`to_json`](Self::to_json). For the papers' files, use
    /// [`from_file`](Self::from_file).
    ///
    /// # Errors
    /// Returns [`Error::Json`] with line and column if the text is malformed, a field is unknown,
    /// or the space breaks a rule.
    pub fn from_json(text: &str) -> Result<Self> {
        serde_json::from_str(text).map_err(|source| Error::json("search space", source))
    }

    /// Returns the space as indented JSON.
    ///
    /// # Errors
    /// Returns [`Error::Json`] if serialization fails, which does not happen for a valid space.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string_pretty(self).map_err(|source| Error::json("search space", source))
    }

    /// Reads a search space from a JSON file. The format is detected from the content:
    ///
    /// 1. this crate's own, `{"groups": [...]}`;
    /// 2. SQFT's `elastic_adapter_config.json`, `[{"target":
    ///    ["base_model.model.model.layers.0.self_attn.q_proj.lora_A", ...], "search_space": [32,
    ///    24, 16]}, ...]`;
    /// 3. an NNCF configuration (LoNAS, Shears, SQFT) that contains `overwrite_groups` and
    ///    `overwrite_groups_widths` at any depth. A group whose names begin with `{re}` is expanded
    ///    to one group per block. A group over `lora_A` is a rank; one over base weights and
    ///    `lora_B` is a width.
    ///
    /// Every name is checked against `layers`, the model's linear layers.
    ///
    /// # Errors
    /// Returns [`Error::Io`], [`Error::Json`] or [`Error::InvalidFile`] with the file and the
    /// field, or [`Error::UnknownLayer`] if a layer is not among `layers`.
    pub fn from_file(path: impl AsRef<Path>, layers: &[LayerShape]) -> Result<Self> {
        import::space_from_file(path.as_ref(), layers)
    }

    /// Reads one subnet of this space from a JSON file. The format is detected from the content:
    ///
    /// 1. this crate's own, `{"group id": 24, ...}`;
    /// 2. SQFT's custom configuration, `[{"target": [...], "active_rank_value": 24}, ...]`;
    /// 3. a plain list of values in the order of the groups, `[24, 16, ...]`.
    ///
    /// # Errors
    /// Returns [`Error::Io`], [`Error::Json`] or [`Error::InvalidFile`] with the file and the
    /// field, or [`Error::UnknownLayer`] if the space has no group for a layer.
    pub fn config_from_file(&self, path: impl AsRef<Path>) -> Result<SubnetConfig> {
        import::config_from_file(self, path.as_ref())
    }

    fn value_of(&self, config: &SubnetConfig, group: &Group) -> Result<usize> {
        config.get(&group.id).ok_or_else(|| Error::UnknownGroup {
            context: "subnet: there is no value for".into(),
            group: group.id.clone(),
        })
    }

    fn check_len(&self, what: &str, found: usize) -> Result<()> {
        if found == self.groups.len() {
            return Ok(());
        }
        Err(Error::ShapeMismatch {
            what: what.into(),
            expected: vec![self.groups.len()],
            found: vec![found],
        })
    }
}

/// Whether a module path is `outer` or is inside it.
fn is_inside(path: &str, outer: &str) -> bool {
    path.strip_prefix(outer)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// Removes the prefix `model.`, which nearly all paths have.
fn strip_model(name: &str) -> &str {
    name.strip_prefix("model.").unwrap_or(name)
}

/// Splits a module path after its first number: `model.layers.0` and `self_attn.q_proj`. The first
/// part is empty if the path has no number.
fn split_block(name: &str) -> (&str, &str) {
    let mut end = 0;
    for part in name.split('.') {
        let start = end;
        end += part.len();
        if start > 0 && !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()) {
            return (&name[..end], name.get(end + 1..).unwrap_or(""));
        }
        end += 1;
    }
    ("", name)
}

fn has_suffix(name: &str, suffix: &str) -> bool {
    match name.strip_suffix(suffix) {
        Some(rest) => !suffix.is_empty() && (rest.is_empty() || rest.ends_with('.')),
        None => false,
    }
}

/// Builds a readable group id: `layers.0.q_proj+k_proj+v_proj` for layers of one block, and
/// otherwise all paths joined. Ids of widths and depths end in `.width` and `.depth`.
fn default_id<S: AsRef<str>>(kind: Elastic, layers: &[S]) -> String {
    let names: Vec<&str> = layers.iter().map(AsRef::as_ref).collect();
    let block = names.first().map_or("", |first| split_block(first).0);
    let name = if block.is_empty() || names.iter().any(|name| split_block(name).0 != block) {
        names
            .iter()
            .map(|name| strip_model(name))
            .collect::<Vec<_>>()
            .join("+")
    } else {
        let last: Vec<&str> = names
            .iter()
            .map(|name| name.rsplit('.').next().unwrap_or(name))
            .collect();
        format!("{}.{}", strip_model(block), last.join("+"))
    };
    match kind {
        Elastic::Rank => name,
        Elastic::Width => name + ".width",
        Elastic::Depth => name + ".depth",
        Elastic::Bits => name + ".bits",
        Elastic::Density => name + ".density",
    }
}
