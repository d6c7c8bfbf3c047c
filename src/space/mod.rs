//! Which layers are elastic, which of them share a choice, and one choice for each: the search space and its subnets.
//!
//! A [`SearchSpace`] is a list of [`Group`]s. The layers of a group share one value (q, k and v of a block have one rank), and
//! a [`SubnetConfig`] fixes that value for every group. What the value counts is the group's [`Elastic`] kind: active ranks
//! (mode A; Shears, arXiv 2404.10934, and SQFT, arXiv 2410.03750), output channels (mode B; LoNAS, LREC-COLING 2024) or parts in
//! depth, which the papers do not have. Every choice nests in the larger ones: it is a prefix of ranks,
//! channels or parts. Choices are kept in descending order, as the papers' code does, so the genome `[0, 0, ...]` is the
//! largest subnet. Nothing here knows a tensor.
//!
//! Layers go by their Hugging Face module path, such as `model.layers.0.self_attn.q_proj`.

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

/// The name and the size of one linear layer.
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
    /// A layer `name` of `d_input` input and `d_output` output features.
    pub fn new(name: impl Into<String>, d_input: usize, d_output: usize) -> Self {
        Self {
            name: name.into(),
            d_input,
            d_output,
        }
    }
}

/// What a group's value counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Elastic {
    /// The active rank of the group's adapters (mode A).
    #[default]
    Rank,
    /// Output channels of the group's layers (mode B): those of an MLP's gate and up projections, whose down projection takes as
    /// many inputs, or those of an attention's queries, a whole number of heads, with keys and values in step and as many
    /// inputs of the output projection.
    Width,
    /// Parts of the model in the group's list that stay, the first ones. A part is a whole block (`model.layers.3`), its attention
    /// (`model.layers.3.self_attn`) or its MLP (`model.layers.3.mlp`).
    Depth,
}

impl Elastic {
    fn is_rank(&self) -> bool {
        *self == Elastic::Rank
    }
}

/// Layers that share one elastic value, and the values it may take.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "GroupParts")]
pub struct Group {
    id: String,
    #[serde(skip_serializing_if = "Elastic::is_rank")]
    kind: Elastic,
    layers: Vec<String>,
    choices: Vec<usize>,
}

/// [`Group`] as it stands in a file, before its rules are checked.
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
    /// A group of elastic rank. The choices are sorted in descending order, and repeated ones dropped.
    ///
    /// # Errors
    /// As [`of_kind`](Self::of_kind).
    pub fn new(id: impl Into<String>, layers: Vec<String>, choices: Vec<usize>) -> Result<Self> {
        Self::of_kind(Elastic::Rank, id, layers, choices)
    }

    /// A group of any kind. The choices are sorted in descending order, and repeated ones dropped. For [`Elastic::Depth`],
    /// `layers` are parts of the model, those that stay longest first, and 0 is a choice like any other.
    ///
    /// # Errors
    /// [`Error::InvalidSpace`] for an empty id, no layers, a layer named twice, no choices, a rank or width of 0, or a depth of
    /// more parts than there are.
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
        choices.sort_unstable_by(|a, b| b.cmp(a));
        choices.dedup();
        Ok(Self {
            id,
            kind,
            layers,
            choices,
        })
    }

    /// The name by which a [`SubnetConfig`] refers to this group.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What the value counts.
    pub fn kind(&self) -> Elastic {
        self.kind
    }

    /// Module paths of the layers that share the value, or of the parts that a depth counts; at least one.
    pub fn layers(&self) -> &[String] {
        &self.layers
    }

    /// The values on offer, strictly descending; at least one, and 0 only for a depth.
    pub fn choices(&self) -> &[usize] {
        &self.choices
    }

    /// The papers' heuristic: `choices[(len - 1) / 2]` of the descending list, so `[32, 24, 16]` gives 24 and `[32, 28]` 32.
    pub fn heuristic(&self) -> usize {
        self.choices[(self.choices.len() - 1) / 2]
    }

    /// Position of `value` in [`choices`](Self::choices).
    ///
    /// # Errors
    /// [`Error::InvalidChoice`] where the group does not offer it.
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

/// Every subnet that one supernet holds: the product of its groups' choices.
///
/// As JSON: `{"groups": [{"id": "layers.0.q_proj+k_proj", "layers": ["model.layers.0.self_attn.q_proj", ...], "choices":
/// [32, 24, 16]}, ...]}`. Fields that this form does not have are refused.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "SpaceParts")]
pub struct SearchSpace {
    groups: Vec<Group>,
    #[serde(skip)]
    by_id: HashMap<String, usize>,
    #[serde(skip)]
    by_layer: HashMap<Elastic, HashMap<String, usize>>,
}

/// [`SearchSpace`] as it stands in a file, before its rules are checked.
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
    /// A space of these groups, in this order, which is the order of genomes and of [`from_values`](Self::from_values).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no groups at all; [`Error::InvalidSpace`] for an id used twice, a layer in two groups of one
    /// kind, or a part that lies inside another group's.
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

    /// This space and further groups, behind its own.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_groups(mut self, groups: impl IntoIterator<Item = Group>) -> Result<Self> {
        self.groups.extend(groups);
        Self::new(self.groups)
    }

    /// The space without groups: its one subnet is the model as it is.
    pub fn single() -> Self {
        Self {
            groups: Vec::new(),
            by_id: HashMap::new(),
            by_layer: HashMap::new(),
        }
    }

    /// One group of elastic rank per block and list of suffixes: `[["q_proj", "k_proj", "v_proj"], ["up_proj", "gate_proj"],
    /// ["down_proj"]]` is the space of Shears. Every group offers the same `choices`. See
    /// [`groups_by_block`](Self::groups_by_block).
    ///
    /// # Errors
    /// [`Error::UnknownLayer`] where a suffix fits no layer of any block; otherwise as [`Group::new`] and [`SearchSpace::new`].
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

    /// One group of a kind per block and list of suffixes, to make a space of or add to one:
    /// `groups_by_block(Elastic::Width, &layers, &[["gate_proj", "up_proj"]], &[384, 288, 192])` makes the width of each MLP
    /// elastic. Ids of ranks are named by the layers alone, others end in the kind.
    ///
    /// A block is what stands before and with the first number of a module path (`model.layers.0`). A suffix fits a layer
    /// whose path ends in it at a dot. Blocks that lack a suffix go without that layer; layers that fit no suffix are not
    /// elastic. For [`Elastic::Depth`], use [`Group::of_kind`].
    ///
    /// # Errors
    /// [`Error::UnknownLayer`] where a suffix fits no layer of any block; otherwise as [`Group::of_kind`].
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

    /// One group for each layer, named by its path, each with the same `choices`.
    ///
    /// # Errors
    /// As [`Group::new`] and [`SearchSpace::new`].
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

    /// A space of one choice, which is plain LoRA of that rank.
    ///
    /// # Errors
    /// As [`per_layer`](Self::per_layer).
    pub fn fixed(layers: &[LayerShape], rank: usize) -> Result<Self> {
        Self::per_layer(layers, &[rank])
    }

    /// The groups, in the order of genomes.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Number of groups; 0 for [`single`](Self::single) alone.
    pub fn len(&self) -> usize {
        self.groups.len()
    }

    /// Whether there is no group, and so nothing to choose; see [`single`](Self::single).
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// The group of this id.
    pub fn group(&self, id: &str) -> Option<&Group> {
        self.by_id.get(id).map(|&index| &self.groups[index])
    }

    /// The group that sets the rank of this layer.
    pub fn group_of_layer(&self, layer: &str) -> Option<&Group> {
        self.group_of(Elastic::Rank, layer)
    }

    /// The group that sets what `kind` counts of this layer or part.
    pub fn group_of(&self, kind: Elastic, layer: &str) -> Option<&Group> {
        self.by_layer
            .get(&kind)?
            .get(layer)
            .map(|&index| &self.groups[index])
    }

    /// The groups of a kind, in the order of genomes.
    pub fn groups_of_kind(&self, kind: Elastic) -> impl Iterator<Item = &Group> {
        self.groups.iter().filter(move |group| group.kind == kind)
    }

    /// Number of subnets; infinite over about 1e308, where [`log10_n_subnets`](Self::log10_n_subnets) still serves.
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

    /// Number of subnets, where it fits into 128 bits.
    pub(crate) fn n_subnets_exact(&self) -> Option<u128> {
        self.groups.iter().try_fold(1u128, |product, group| {
            product.checked_mul(group.choices.len() as u128)
        })
    }

    /// The largest choice of every group.
    pub fn maximal(&self) -> SubnetConfig {
        self.pick(|group| group.choices[0])
    }

    /// The smallest choice of every group.
    pub fn minimal(&self) -> SubnetConfig {
        self.pick(|group| group.choices[group.choices.len() - 1])
    }

    /// The papers' heuristic, the middle choice of every group; see [`Group::heuristic`].
    pub fn heuristic(&self) -> SubnetConfig {
        self.pick(Group::heuristic)
    }

    /// A uniformly drawn choice for every group, independently. One draw from `rng` per group, in order, so a seeded
    /// generator gives the same subnets on every machine.
    pub fn sample<R: Rng + ?Sized>(&self, rng: &mut R) -> SubnetConfig {
        self.pick(|group| group.choices[rng.random_range(0..group.choices.len())])
    }

    fn pick(&self, mut choose: impl FnMut(&Group) -> usize) -> SubnetConfig {
        self.groups
            .iter()
            .map(|group| (group.id.clone(), choose(group)))
            .collect()
    }

    /// The subnet of a genome: for each group, an index into its choices.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for another length; [`Error::InvalidSpace`] for an index past the choices.
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

    /// The genome of a subnet; the inverse of [`decode`](Self::decode).
    ///
    /// # Errors
    /// As [`validate`](Self::validate).
    pub fn encode(&self, config: &SubnetConfig) -> Result<Vec<usize>> {
        let genome = self
            .groups
            .iter()
            .map(|group| group.index_of(self.value_of(config, group)?))
            .collect::<Result<Vec<usize>>>()?;
        match config.iter().find(|(id, _)| !self.by_id.contains_key(*id)) {
            Some((extra, _)) => Err(Error::UnknownGroup {
                context: "search space".into(),
                group: extra.to_string(),
            }),
            None => Ok(genome),
        }
    }

    /// Checks that `config` gives every group one of its choices, and names no other group.
    ///
    /// # Errors
    /// [`Error::UnknownGroup`] for a group left out or unknown, [`Error::InvalidChoice`] for a value not on offer.
    pub fn validate(&self, config: &SubnetConfig) -> Result<()> {
        self.encode(config).map(drop)
    }

    /// A subnet from one value per group, in the groups' order, such as SQFT's `--custom_config 32 24 ...`.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for another number of values; [`Error::InvalidChoice`] for a value not on offer.
    pub fn from_values(&self, values: &[usize]) -> Result<SubnetConfig> {
        self.check_len("values of a subnet", values.len())?;
        let value = |(group, &value): (&Group, &usize)| {
            group.index_of(value).map(|_| (group.id.clone(), value))
        };
        self.groups.iter().zip(values).map(value).collect()
    }

    /// The values of a subnet in the groups' order; the inverse of [`from_values`](Self::from_values).
    ///
    /// # Errors
    /// As [`validate`](Self::validate).
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
    /// As [`validate`](Self::validate).
    pub fn ranks(&self, config: &SubnetConfig) -> Result<BTreeMap<String, usize>> {
        self.by_name(config, Elastic::Rank)
    }

    /// The output channels of every layer of elastic width, by module path, as its group counts them.
    ///
    /// # Errors
    /// As [`validate`](Self::validate).
    pub fn widths(&self, config: &SubnetConfig) -> Result<BTreeMap<String, usize>> {
        self.by_name(config, Elastic::Width)
    }

    /// The parts that a subnet leaves out.
    ///
    /// # Errors
    /// As [`validate`](Self::validate).
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

    /// The largest rank that any group offers.
    pub fn max_rank(&self) -> usize {
        self.groups_of_kind(Elastic::Rank)
            .map(|group| group.choices[0])
            .max()
            .unwrap_or(0)
    }

    /// Checks the space against a model: every layer and part exists, no rank is over `max_rank`, the layers of a width have one
    /// number of inputs and as many outputs as its largest choice, or more. What a width means to a model
    /// ([`SuperNet::new`](crate::SuperNet::new)) is not checked.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`] naming group and layer, [`Error::InvalidRank`] naming layer and rank, [`Error::InvalidSpace`].
    pub fn validate_layers(&self, layers: &[LayerShape], max_rank: usize) -> Result<()> {
        let known: HashMap<&str, &LayerShape> = layers
            .iter()
            .map(|layer| (layer.name.as_str(), layer))
            .collect();
        for group in &self.groups {
            let exists = |name: &str| match group.kind {
                Elastic::Depth => layers.iter().any(|layer| is_inside(&layer.name, name)),
                Elastic::Rank | Elastic::Width => known.contains_key(name),
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

    /// Reads the form that [`to_json`](Self::to_json) writes. For the authors' files see [`from_file`](Self::from_file).
    ///
    /// # Errors
    /// [`Error::Json`] with line and column for a malformed text, an unknown field, or a broken rule of the space.
    pub fn from_json(text: &str) -> Result<Self> {
        serde_json::from_str(text).map_err(|source| Error::json("search space", source))
    }

    /// The space as indented JSON.
    ///
    /// # Errors
    /// [`Error::Json`] where it cannot be written as JSON, which no valid space brings about.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string_pretty(self).map_err(|source| Error::json("search space", source))
    }

    /// Reads a search space from a JSON file of any of three forms, told apart by their content:
    ///
    /// 1. this crate's own, `{"groups": [...]}`;
    /// 2. SQFT's `elastic_adapter_config.json`, `[{"target": ["base_model.model.model.layers.0.self_attn.q_proj.lora_A",
    ///    ...], "search_space": [32, 24, 16]}, ...]`;
    /// 3. an NNCF configuration that holds `overwrite_groups` and `overwrite_groups_widths` at any depth (LoNAS, Shears, SQFT);
    ///    a group whose names begin with `{re}` stands for one group in each block, and one over base weights and `lora_B` is a width.
    ///
    /// Every name is checked against `layers`, the model's linear layers.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Json`] and [`Error::InvalidFile`] name the file and the field; [`Error::UnknownLayer`] a layer
    /// that is not among `layers`.
    pub fn from_file(path: impl AsRef<Path>, layers: &[LayerShape]) -> Result<Self> {
        import::space_from_file(path.as_ref(), layers)
    }

    /// Reads one subnet of this space from a JSON file of any of three forms: this crate's own, `{"group id": 24, ...}`;
    /// SQFT's custom configuration, `[{"target": [...], "active_rank_value": 24}, ...]`; a plain list of values in the groups'
    /// order, `[24, 16, ...]`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Json`] and [`Error::InvalidFile`] name the file and the field;
    /// otherwise as [`validate`](Self::validate).
    pub fn config_from_file(&self, path: impl AsRef<Path>) -> Result<SubnetConfig> {
        import::config_from_file(self, path.as_ref())
    }

    fn value_of(&self, config: &SubnetConfig, group: &Group) -> Result<usize> {
        config.get(&group.id).ok_or_else(|| Error::UnknownGroup {
            context: "subnet configuration".into(),
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

/// Whether a module path is `outer` or lies in it.
fn is_inside(path: &str, outer: &str) -> bool {
    path.strip_prefix(outer)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// A path without the `model.` that nearly all of them begin with.
fn strip_model(name: &str) -> &str {
    name.strip_prefix("model.").unwrap_or(name)
}

/// Splits a module path after its first number: (`model.layers.0`, `self_attn.q_proj`). A path without one has an empty block.
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

/// A readable name for a group: `layers.0.q_proj+k_proj+v_proj` within a block, all paths joined across blocks; what is no rank
/// says so at the end.
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
    }
}
