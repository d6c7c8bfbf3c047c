//! Writes a model as a bundle and reads it back.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::arch::Architecture;
use crate::data::ChatTemplate;
use crate::error::{Error, Result};
use crate::io::HfConfig;
use crate::io::bundle::{Bundle, BundleWriter};
use crate::progress::{Progress, Task};
use crate::space::{LoraConfig, SearchSpace, SubnetConfig};

use super::build::{A, BT, block_norms, make_tokenizer, named};
use super::model::{Model, ModelOptions, ModelParts, SubnetParts, Verify};
use super::weights::{AdapterWeights, LayerWeights, Weight};

/// Name of the tensor that holds `tokenizer.json`.
const TOKENIZER: &str = "tokenizer.json";
/// Name of the tensor that holds the chat template.
const CHAT: &str = "chat_template.jinja";

/// Description of the model, stored in the bundle next to the weights.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    /// Contents of `config.json`.
    config: Map<String, Value>,
    /// Settings of the adapters, by layer name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    adapters: BTreeMap<String, LoraConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    space: Option<SearchSpace>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    subnets: Vec<Subnet>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    stop_ids: Vec<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bos_id: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    eos_id: Option<u32>,
    /// Variables of the chat template, such as `bos_token`.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    chat_variables: Map<String, Value>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Subnet {
    name: String,
    config: SubnetConfig,
    /// By layer name, the number of the weight that the subnet has in place of the layer's own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    weights: BTreeMap<String, usize>,
}

impl Subnet {
    fn of(layers: &[LayerWeights], subnet: SubnetParts) -> Self {
        let weights = layers.iter().zip(subnet.weights);
        let weights = weights.filter(|(_, index)| *index > 0);
        Self {
            name: subnet.name,
            config: subnet.config,
            weights: weights
                .map(|(layer, index)| (layer.name.clone(), index))
                .collect(),
        }
    }

    fn into_parts(mut self, layers: &[LayerWeights], path: &Path) -> Result<SubnetParts> {
        let weights = layers.iter();
        let weights = weights.map(|layer| self.weights.remove(&layer.name).unwrap_or(0));
        let parts = SubnetParts {
            weights: weights.collect(),
            ..SubnetParts::new(self.name, self.config)
        };
        match self.weights.into_keys().next() {
            None => Ok(parts),
            Some(layer) => Err(Error::UnknownLayer {
                context: format!("{}, subnet `{}`", path.display(), parts.name),
                layer,
            }),
        }
    }
}

/// Name of a weight that some subnets have in place of a layer's own.
fn other(layer: &str, index: usize) -> String {
    format!("{layer}.{}@{index}", SUFFIXES[0])
}

impl Model {
    /// Writes the model as a bundle: weights in their current formats, adapters, search space and
    /// subnets, tokenizer. The file is written completely or not at all.
    ///
    /// # Errors
    /// Returns the errors of [`BundleWriter::write`], and [`Error::InvalidFile`] if the contents of
    /// a weight that is mapped from a file are damaged.
    pub fn save(&self, path: impl AsRef<Path>, overwrite: bool) -> Result<()> {
        let path = path.as_ref();
        let weights = &*self.weights;
        let adapters = weights.layers.iter().filter_map(|layer| {
            let lora = layer.adapter.as_ref()?.lora.clone();
            Some((
                layer.name.clone(),
                LoraConfig {
                    dropout: 0.0,
                    ..lora
                },
            ))
        });
        let tokenizer = weights.tokenizer.as_ref();
        let chat = self.chat_template();
        let document = Document {
            config: weights.config.raw().clone(),
            adapters: adapters.collect(),
            space: weights.space.clone(),
            subnets: named(weights)
                .into_iter()
                .map(|subnet| Subnet::of(&weights.layers, subnet))
                .collect(),
            stop_ids: weights.stop_ids.clone(),
            bos_id: tokenizer.and_then(|tokenizer| tokenizer.inner.bos_id()),
            eos_id: tokenizer.and_then(|tokenizer| tokenizer.inner.eos_id()),
            chat_variables: chat.map_or_else(Map::new, |chat| chat.variables().clone()),
        };
        let document = serde_json::to_value(document).map_err(|e| Error::json(path, e))?;
        let mut writer = BundleWriter::new(document);
        // Tensors are written in order of use, so that a mapped file is read from front to back.
        writer.matrix(weights.embedding.name(), weights.embedding.get()?);
        let arch = weights.config.arch();
        for (block, norms) in weights.norms.iter().enumerate() {
            for (kind, gains) in norms {
                writer.vector(&arch.norm_tensor(block, *kind), gains);
            }
        }
        writer.vector(Architecture::FINAL_NORM, &weights.final_norm);
        for layer in &weights.layers {
            if layer.name == Architecture::HEAD_LAYER && arch.tied {
                continue;
            }
            for (suffix, weight) in SUFFIXES.iter().zip(layer.weights()) {
                writer.matrix(&format!("{}.{suffix}", layer.name), weight.get()?);
            }
            for (index, weight) in layer.others.iter().enumerate() {
                writer.matrix(&other(&layer.name, index + 1), weight.get()?);
            }
            if let Some(bias) = &layer.bias {
                writer.vector(&format!("{}.bias", layer.name), bias);
            }
        }
        if let Some(tokenizer) = tokenizer {
            writer.text(TOKENIZER, &tokenizer.json);
        }
        if let Some(chat) = chat {
            writer.text(CHAT, chat.source());
        }
        writer.write(path, overwrite)
    }
}

/// Suffixes of a layer's matrices, in the order of [`LayerWeights::weights`].
const SUFFIXES: [&str; 3] = ["weight", A, BT];

/// Reads a bundle. The weights stay in the file.
pub(super) fn read(
    bundle: Bundle,
    options: &ModelOptions,
    progress: &dyn Progress,
) -> Result<ModelParts> {
    let bundle = Arc::new(bundle);
    let path = bundle.path();
    let document = Document::deserialize(bundle.document())
        .map_err(|error| Error::invalid_file(path, format!("description of the model: {error}")))?;
    let config = HfConfig::from_json(document.config)?;
    let matrix = |name: String| {
        let matrix = bundle.matrix(&name)?;
        Ok::<_, Error>(Weight::from_file(
            name,
            matrix,
            bundle.clone(),
            options.verify != Verify::Never,
        ))
    };
    let embedding = matrix(Architecture::EMBEDDING.to_string())?;
    let arch = config.arch();
    let mut vector = |name: &str, len: usize| bundle.vector(name, len);
    let norms = block_norms(arch, &mut vector)?;
    let final_norm = vector(Architecture::FINAL_NORM, arch.d_model)?.into();
    let mut adapters = document.adapters;
    let mut layers = Vec::new();
    let linear = arch
        .linears()
        .into_iter()
        .map(|layer| (layer.name, layer.bias.then_some(layer.d_output)));
    let head = (!arch.tied).then(|| (Architecture::HEAD_LAYER.to_string(), None));
    let mut task = Task::begin(progress, "load", arch.linears().len(), "layers")?;
    for (name, bias) in linear.chain(head) {
        task.step("")?;
        let weight = matrix(format!("{name}.{}", SUFFIXES[0]))?;
        let bias = match bias {
            Some(len) => Some(bundle.vector(&format!("{name}.bias"), len)?.into()),
            None => None,
        };
        let adapter = match adapters.remove(&name) {
            Some(lora) => Some(AdapterWeights {
                a: matrix(format!("{name}.{A}"))?,
                bt: matrix(format!("{name}.{BT}"))?,
                lora,
            }),
            None => None,
        };
        // As many as the subnets name; a number that is too large ends at the first that is missing.
        let named = document.subnets.iter();
        let named = named.filter_map(|subnet| subnet.weights.get(&name));
        let others = 1..=named.copied().max().unwrap_or(0);
        let others = others.map(|index| matrix(other(&name, index)));
        let others = others.collect::<Result<_>>()?;
        layers.push(LayerWeights {
            name,
            weight,
            bias,
            adapter,
            others,
        });
    }
    if let Some(layer) = adapters.into_keys().next() {
        return Err(Error::UnknownLayer {
            context: format!("{}, adapters", path.display()),
            layer,
        });
    }
    let tokenizer = if bundle.contains(TOKENIZER) {
        let mut tokenizer = make_tokenizer(bundle.text(TOKENIZER)?.into(), path, &config)?;
        tokenizer.inner = tokenizer
            .inner
            .with_special_ids(document.bos_id, document.eos_id);
        if bundle.contains(CHAT) {
            let source = bundle.text(CHAT)?;
            let template = ChatTemplate::new(&source, path).map(|template| {
                let variables = document.chat_variables.into_iter();
                variables.fold(template, |template, (name, value)| {
                    template.with_variable(name, value)
                })
            });
            tokenizer.chat = template.map(Some).map_err(|error| error.to_string());
        }
        Some(tokenizer)
    } else {
        None
    };
    let subnets = document.subnets.into_iter();
    let subnets = subnets.map(|subnet| subnet.into_parts(&layers, path));
    let subnets = subnets.collect::<Result<_>>()?;
    Ok(ModelParts {
        config,
        embedding,
        norms,
        final_norm,
        layers,
        space: document.space,
        subnets,
        tokenizer,
        stop_ids: document.stop_ids,
    })
}
