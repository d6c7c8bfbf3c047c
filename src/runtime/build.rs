//! Builds models from the caller's matrices and from Hugging Face folders, and converts the formats
//! of a model's weights.

use std::path::Path;
use std::sync::Arc;

use crate::arch::Architecture;
use crate::data::{ChatTemplate, TextTokenizer};
use crate::error::{Error, Result};
use crate::format::{MatrixHeader, StoredMatrix, WeightFormat};
use crate::io::tokenizer::TokenizerFiles;
use crate::io::{Checkpoint, DType, HfConfig};
use crate::progress::{Progress, Task};

use super::model::{Model, ModelOptions, ModelParts, SubnetParts, Tokenizer, Weights};
use super::plan::{FormatPlan, convert, encode};
use super::weights::{LayerWeights, Norms, Weight};

impl Model {
    /// Builds a model from weights that the caller provides.
    ///
    /// `matrix` is called with the tensor name and shape `[out, in]` of the embedding, of each
    /// linear layer and of the head, unless the head is tied. `vector` is called with the tensor
    /// name and length of each norm and bias.
    ///
    /// # Errors
    /// Returns any error of `matrix` and `vector`, [`Error::TensorShape`] if a shape differs from
    /// the requested one, and [`Error::NotFinite`] if a weight, norm or bias holds NaN or an
    /// infinity.
    pub fn from_matrices(
        config: &HfConfig,
        mut matrix: impl FnMut(&str, [usize; 2]) -> Result<StoredMatrix>,
        mut vector: impl FnMut(&str, usize) -> Result<Vec<f32>>,
    ) -> Result<Self> {
        let (d_model, vocab_size) = (config.hidden_size(), config.vocab_size());
        let mut made = |name: &str, shape| {
            let weight = Weight::made(name, matrix(name, shape)?);
            weight.check_contents()?;
            Ok::<_, Error>(weight)
        };
        let embedding = made(Architecture::EMBEDDING, [vocab_size, d_model])?;
        let mut layers = Vec::new();
        for layer in config.arch().linears() {
            let weight = made(
                &format!("{}.weight", layer.name),
                [layer.d_output, layer.d_input],
            )?;
            let bias = match layer.bias {
                true => Some(vector(&format!("{}.bias", layer.name), layer.d_output)?.into()),
                false => None,
            };
            layers.push(LayerWeights {
                name: layer.name,
                weight,
                bias,
                adapter: None,
                others: Vec::new(),
            });
        }
        if !config.tie_word_embeddings() {
            let weight = made(Architecture::HEAD, [vocab_size, d_model])?;
            layers.push(LayerWeights {
                name: Architecture::HEAD_LAYER.into(),
                weight,
                bias: None,
                adapter: None,
                others: Vec::new(),
            });
        }
        let parts = ModelParts {
            embedding,
            norms: block_norms(config.arch(), &mut vector)?,
            final_norm: vector(Architecture::FINAL_NORM, d_model)?.into(),
            layers,
            space: None,
            subnets: Vec::new(),
            tokenizer: None,
            stop_ids: config.eos_token_ids().to_vec(),
            config: config.clone(),
        };
        Ok(Self::from_weights(Weights::new(parts)?, 0))
    }

    /// Returns the same model with the tokenizer of a Hugging Face folder. The folder's stop tokens
    /// are added to the model's.
    pub fn with_tokenizer(&self, folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let mut weights = (*self.weights).clone();
        weights.tokenizer = read_tokenizer(folder, &weights.config)?;
        let config = HfConfig::open(folder)?;
        for id in stop_ids(&config, weights.tokenizer.as_ref()) {
            if !weights.stop_ids.contains(&id) {
                weights.stop_ids.push(id);
            }
        }
        Ok(self.with_weights(weights))
    }

    /// Returns the same model with these stop tokens in place of its own.
    pub fn with_stop_ids(&self, stop_ids: Vec<u32>) -> Self {
        let mut weights = (*self.weights).clone();
        weights.stop_ids = stop_ids;
        self.with_weights(weights)
    }
}

/// Reads the norms of all blocks through `vector`.
pub(super) fn block_norms(
    arch: &Architecture,
    vector: &mut dyn FnMut(&str, usize) -> Result<Vec<f32>>,
) -> Result<Vec<Norms>> {
    let mut of_block = |block| {
        let norms = arch.block_norms(block);
        norms
            .map(|norm| Ok((norm.kind, vector(&norm.tensor, norm.len)?.into())))
            .collect()
    };
    (0..arch.blocks.len()).map(&mut of_block).collect()
}

/// Suffixes of an adapter's factors, appended to the layer's name.
pub(crate) const A: &str = "lora_A";
pub(crate) const BT: &str = "lora_B_t";

/// Returns the tokens that end a generation: those of the config, or else the tokenizer's
/// end-of-sequence token.
fn stop_ids(config: &HfConfig, tokenizer: Option<&Tokenizer>) -> Vec<u32> {
    config.stop_ids(tokenizer.and_then(|tokenizer| tokenizer.inner.eos_id()))
}

/// Builds a tokenizer with the special tokens of a config.
pub(super) fn make_tokenizer(json: Arc<str>, path: &Path, config: &HfConfig) -> Result<Tokenizer> {
    let inner = TextTokenizer::from_json(&json, path)?;
    let (bos, eos) = (
        config.bos_token_id().or(inner.bos_id()),
        config.eos_token_ids().first().copied().or(inner.eos_id()),
    );
    Ok(Tokenizer {
        json,
        inner: inner.with_special_ids(bos, eos),
        chat: Ok(None),
    })
}

fn read_tokenizer(folder: &Path, config: &HfConfig) -> Result<Option<Tokenizer>> {
    let Some(files) = TokenizerFiles::open(folder)? else {
        return Ok(None);
    };
    let json: Arc<str> = files.json.as_str().into();
    let mut tokenizer = make_tokenizer(json, &files.path, config)?;
    // The other tokenizer files in the folder may name more special tokens.
    tokenizer.inner = tokenizer.inner.with_files(&files);
    // A template that cannot be used does not keep the model from being used.
    tokenizer.chat = ChatTemplate::of_files(folder, files).map_err(|error| error.to_string());
    Ok(Some(tokenizer))
}

/// Reads a Hugging Face folder or a GGUF file. A weight is used in place where its stored layout
/// suits the kernels.
pub(super) fn from_folder(
    folder: &Path,
    options: &ModelOptions,
    progress: &dyn Progress,
) -> Result<ModelParts> {
    let checkpoint = Checkpoint::open_with(folder, options.mmap)?;
    let config = HfConfig::open(folder)?.fitted(&checkpoint)?;
    let table = [config.vocab_size(), config.hidden_size()];
    let embedding = weight(
        &config,
        &checkpoint,
        config.embedding_name(&checkpoint)?,
        table,
    )?;
    let mut layers = Vec::new();
    let linears = config.arch().linears();
    let mut task = Task::begin(progress, "load", linears.len(), "layers")?;
    for layer in linears {
        task.step("")?;
        let (name, shape) = (layer.name, [layer.d_output, layer.d_input]);
        let bias = if layer.bias {
            Some(
                checkpoint
                    .load_vector(&format!("{name}.bias"), layer.d_output)?
                    .into(),
            )
        } else {
            None
        };
        let weight = weight(&config, &checkpoint, &format!("{name}.weight"), shape)?;
        layers.push(LayerWeights {
            name,
            weight,
            bias,
            adapter: None,
            others: Vec::new(),
        });
    }
    if !config.tie_word_embeddings() {
        let name = Architecture::HEAD_LAYER.to_string();
        let weight = weight(&config, &checkpoint, Architecture::HEAD, table)?;
        layers.push(LayerWeights {
            name,
            weight,
            bias: None,
            adapter: None,
            others: Vec::new(),
        });
    }
    let mut vector = |name: &str, len: usize| checkpoint.load_vector(name, len);
    let norms = block_norms(config.arch(), &mut vector)?;
    let final_norm = vector(Architecture::FINAL_NORM, config.hidden_size())?.into();
    let tokenizer = read_tokenizer(folder, &config)?;
    Ok(ModelParts {
        embedding,
        norms,
        final_norm,
        layers,
        space: None,
        subnets: Vec::new(),
        stop_ids: stop_ids(&config, tokenizer.as_ref()),
        tokenizer,
        config,
    })
}

/// Loads a weight as codes, dense or sparse, if the checkpoint holds codes, or as numbers.
fn weight(
    config: &HfConfig,
    checkpoint: &Checkpoint,
    name: &str,
    shape: [usize; 2],
) -> Result<Weight> {
    let layer = name.strip_suffix(".weight").unwrap_or(name);
    match config.load_quantized(checkpoint, layer, shape)? {
        Some(codes) => Ok(Weight::made(name, StoredMatrix::from_codes(&codes)?)),
        None => dense(checkpoint, name, shape),
    }
}

/// Loads a dense weight as stored in the file. Types other than f32, f16 and bf16 are converted to
/// f32.
fn dense(checkpoint: &Checkpoint, name: &str, [rows, cols]: [usize; 2]) -> Result<Weight> {
    checkpoint.check_shape(name, &[rows, cols])?;
    let (format, size) = match checkpoint.info(name)?.dtype {
        DType::F32 => (WeightFormat::F32, 4),
        DType::F16 => (WeightFormat::F16, 2),
        DType::BF16 => (WeightFormat::Bf16, 2),
        _ => {
            let matrix = checkpoint.load_matrix(name, [rows, cols])?;
            return Ok(Weight::made(
                name,
                encode(name, &matrix, WeightFormat::F32)?,
            ));
        }
    };
    let mut buffer = checkpoint.buffer(name)?;
    if !(buffer.as_ptr() as usize).is_multiple_of(size) {
        buffer = crate::format::Buffer::from_vec(buffer.to_vec());
    }
    let matrix = StoredMatrix::from_parts(&MatrixHeader::new(format, rows, cols), |_| {
        Some(buffer.clone())
    })?;
    Ok(Weight::mapped(name, matrix))
}

/// Stores every weight of a model in the formats of a plan.
pub(super) fn reformat(weights: &Weights, plan: &FormatPlan) -> Result<Weights> {
    plan.validate()?;
    let stored = |weight: &Weight, format: Option<WeightFormat>| {
        let Some(format) = format else {
            return Ok(weight.clone());
        };
        let matrix = convert(weight.name(), weight.get()?, format)?;
        Ok::<_, Error>(Weight::made(weight.name(), matrix))
    };
    let mut new = weights.clone();
    new.embedding = stored(&weights.embedding, plan.embedding)?;
    let tied = weights.config.tie_word_embeddings();
    for layer in &mut new.layers {
        let head = layer.name == Architecture::HEAD_LAYER;
        if head && tied {
            continue;
        }
        let format = if head { plan.head } else { plan.linears };
        layer.weight = stored(&layer.weight, format)?;
        for other in &mut layer.others {
            *other = stored(other, format)?;
        }
        if let Some(adapter) = &mut layer.adapter {
            adapter.a = stored(&adapter.a, plan.adapters)?;
            adapter.bt = stored(&adapter.bt, plan.adapters)?;
        }
    }
    new.renewed()
}

/// Returns the named subnets without the first one, which every model has.
pub(super) fn named(weights: &Weights) -> Vec<SubnetParts> {
    let others = weights.subnets.iter().zip(&weights.shapes).skip(1);
    others
        .map(|(subnet, shape)| SubnetParts {
            weights: shape.weights.clone(),
            ..SubnetParts::new(&subnet.name, subnet.config.clone())
        })
        .collect()
}
