//! Models out of decoders, super-networks and Hugging Face folders.

use std::path::Path;
use std::sync::Arc;

use burn::module::Module;

use crate::adapter::{ElasticLora, ElasticLoraLinear};
use crate::data::TextTokenizer;
use crate::error::{Error, Result};
use crate::format::{MatrixHeader, StoredMatrix, WeightFormat};
use crate::io::{Checkpoint, DType, HfConfig};
use crate::linalg::Matrix;
use crate::model::{Decoder, Unit};
use crate::nn::{BaseLinear, host_values};
use crate::space::{SearchSpace, SubnetConfig};
use crate::supernet::SuperNet;

use super::model::{Model, ModelOptions, ModelParts, Tokenizer, Weights};
use super::plan::{FormatPlan, convert, encode};
use super::weights::{AdapterWeights, LayerWeights, Weight};

/// The largest `tokenizer.json` that is read.
const MAX_TOKENIZER_BYTES: u64 = 1 << 28;

impl Model {
    /// A decoder's weights, dense ones in the formats of the plan, quantized ones with the codes that they have. Adapters stay apart.
    ///
    /// What [`Merger`](crate::Merger) made is such a decoder: this is how a compressed model becomes a bundle. The tokenizer comes by
    /// [`with_tokenizer`](Self::with_tokenizer).
    ///
    /// # Errors
    /// [`Error::HasAdapter`] for an adapter that no pair of factors expresses (SparsePEFT, QA-SparsePEFT): merge it first.
    /// [`Error::Unsupported`] for channels or blocks that are left out ([`Merger::extract`](crate::Merger::extract) makes them go), or a
    /// weight that its format cannot hold.
    pub fn from_decoder(model: &Decoder, plan: impl Into<FormatPlan>) -> Result<Self> {
        if let Some(unit) = model.left_out().first() {
            return Err(Error::Unsupported {
                what: format!("running with `{unit}` left out, not extracted,"),
            });
        }
        let narrowed =
            |(_, layer): &(String, &ElasticLoraLinear)| layer.active_dims() != layer.base.dims();
        if let Some((name, _)) = model.linears().find(narrowed) {
            return Err(Error::Unsupported {
                what: format!("running with channels of `{name}` left out, not extracted,"),
            });
        }
        let parts = decoder_parts(model, &plan.into())?;
        Ok(Self::from_weights(Weights::new(parts)?, 0))
    }

    /// A whole super-network: base, adapters, space, and subnets by name. All of them share the weights.
    ///
    /// # Errors
    /// As [`from_decoder`](Self::from_decoder) for adapters and formats; [`SearchSpace::validate`] for a subnet.
    pub fn from_supernet(
        net: &SuperNet,
        subnets: &[(String, SubnetConfig)],
        plan: impl Into<FormatPlan>,
    ) -> Result<Self> {
        let mut parts = decoder_parts(&net.eval_model(), &plan.into())?;
        let adapted: Vec<&String> = net
            .space()
            .groups()
            .iter()
            .flat_map(|group| group.layers())
            .collect();
        if !adapted.is_empty() {
            parts.space = Some(SearchSpace::new(net.space().groups().to_vec())?);
        }
        parts.subnets = subnets.to_vec();
        Ok(Self::from_weights(Weights::new(parts)?, 0))
    }

    /// A model whose weights the caller has: `matrix` is asked for the embedding, the linear layers and an untied head, by the names of
    /// their tensors and their shapes `[out, in]`, `vector` for norms and biases, by theirs.
    ///
    /// # Errors
    /// What the two give; [`Error::TensorShape`] for another shape than asked for, [`Error::NotFinite`].
    pub fn from_matrices(
        config: &HfConfig,
        mut matrix: impl FnMut(&str, [usize; 2]) -> Result<StoredMatrix>,
        mut vector: impl FnMut(&str, usize) -> Result<Vec<f32>>,
    ) -> Result<Self> {
        let (d_model, vocab_size) = (config.hidden_size(), config.vocab_size());
        let mut made = |name: &str, shape| Ok::<_, Error>(Weight::made(name, matrix(name, shape)?));
        let embedding = made(HfConfig::EMBEDDING, [vocab_size, d_model])?;
        let mut layers = Vec::new();
        for layer in config.linear_layers() {
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
            });
        }
        if !config.tie_word_embeddings() {
            let weight = made(HfConfig::HEAD, [vocab_size, d_model])?;
            layers.push(LayerWeights {
                name: "lm_head".into(),
                weight,
                bias: None,
                adapter: None,
            });
        }
        let parts = ModelParts {
            embedding,
            norms: block_norms(config, &mut vector)?,
            final_norm: vector(HfConfig::FINAL_NORM, d_model)?,
            layers,
            space: None,
            subnets: Vec::new(),
            tokenizer: None,
            stop_ids: config.eos_token_ids().to_vec(),
            config: config.clone(),
        };
        Ok(Self::from_weights(Weights::new(parts)?, 0))
    }

    /// The same model with a tokenizer and the tokens that end a generation.
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

    /// The same model with these tokens to end a generation.
    pub fn with_stop_ids(&self, stop_ids: Vec<u32>) -> Self {
        let mut weights = (*self.weights).clone();
        weights.stop_ids = stop_ids;
        self.with_weights(weights)
    }
}

/// The norms of the blocks' parts that are there.
fn block_norms(
    config: &HfConfig,
    vector: &mut dyn FnMut(&str, usize) -> Result<Vec<f32>>,
) -> Result<Vec<[Option<Vec<f32>>; 2]>> {
    let mut norms = Vec::new();
    for (block, dims) in config.blocks().iter().enumerate() {
        let mut norm = |there: bool, name: String| match there {
            true => vector(&name, config.hidden_size()).map(Some),
            false => Ok(None),
        };
        let attention = norm(dims.has_attention(), HfConfig::input_norm(block))?;
        norms.push([
            attention,
            norm(dims.has_mlp(), HfConfig::post_attention_norm(block))?,
        ]);
    }
    Ok(norms)
}

fn decoder_parts(model: &Decoder, plan: &FormatPlan) -> Result<ModelParts> {
    plan.validate()?;
    let model = model.valid();
    let config = model.config().clone();
    let d_model = config.hidden_size();
    let table = Matrix::new(
        config.vocab_size(),
        d_model,
        host_values(model.embed_tokens.val()),
    )?;
    let embedding = Weight::made(
        HfConfig::EMBEDDING,
        encode(HfConfig::EMBEDDING, &table, plan.embedding)?,
    );
    drop(table);
    let mut layers = Vec::new();
    for (name, layer) in model.linears() {
        let adapter = match &layer.adapter {
            Some(adapter) => Some(factors(&name, adapter, plan.adapters)?),
            None => None,
        };
        let (weight, bias) = base(&name, &layer.base, plan.linears)?;
        layers.push(LayerWeights {
            name,
            weight,
            bias,
            adapter,
        });
    }
    if let Some(head) = &model.lm_head {
        let (weight, bias) = base("lm_head", head, plan.head)?;
        layers.push(LayerWeights {
            name: "lm_head".into(),
            weight,
            bias,
            adapter: None,
        });
    }
    let norm = |block: &crate::model::Block, unit| {
        block.norm(unit).map(|norm| host_values(norm.weight.val()))
    };
    Ok(ModelParts {
        embedding,
        norms: model
            .layers
            .iter()
            .map(|block| Unit::ALL.map(|unit| norm(block, unit)))
            .collect(),
        final_norm: host_values(model.norm.weight.val()),
        layers,
        space: None,
        subnets: Vec::new(),
        tokenizer: None,
        stop_ids: config.eos_token_ids().to_vec(),
        config,
    })
}

/// A base layer's weight and bias, all of them whatever is active.
fn base(
    name: &str,
    base: &BaseLinear,
    format: WeightFormat,
) -> Result<(Weight, Option<Arc<[f32]>>)> {
    let tensor = format!("{name}.weight");
    let stored = match base.quantized() {
        // Its codes stay what they are; only whether zeros are stored is the plan's to say.
        Some(packed) => match format {
            WeightFormat::SparseInt4 { .. } => {
                StoredMatrix::from_quantized(&packed.unpack(), true)?
            }
            _ => StoredMatrix::from(packed.clone()),
        },
        None => encode(&tensor, &base.to_matrix(), format)?,
    };
    let bias = base
        .bias
        .as_ref()
        .map(|bias| host_values(bias.val()).into());
    Ok((Weight::made(tensor, stored), bias))
}

fn factors(name: &str, adapter: &ElasticLora, format: WeightFormat) -> Result<AdapterWeights> {
    let merge = |reason| {
        Err(Error::HasAdapter {
            layer: name.to_string(),
            reason,
        })
    };
    if adapter.grid.is_some() {
        return merge(
            "it goes through a grid (QA-SparsePEFT), which no pair of factors expresses: merge it first",
        );
    }
    if adapter.is_masked() {
        return merge(
            "it is masked (SparsePEFT), which no pair of factors expresses: merge it first",
        );
    }
    let lora = adapter.config().clone();
    let (d_input, d_output) = (adapter.d_input(), adapter.d_output());
    let a = Matrix::new(d_input, lora.rank, host_values(adapter.lora_a.val()))?.transposed();
    let bt = Matrix::new(lora.rank, d_output, host_values(adapter.lora_b.val()))?;
    let stored = |suffix: &str, matrix: &Matrix| {
        let tensor = format!("{name}.{suffix}");
        Ok::<_, Error>(Weight::made(&*tensor, encode(&tensor, matrix, format)?))
    };
    Ok(AdapterWeights {
        a: stored(A, &a)?,
        bt: stored(BT, &bt)?,
        lora,
    })
}

/// The names of an adapter's factors behind its layer's.
pub(super) const A: &str = "lora_A";
pub(super) const BT: &str = "lora_B_t";

/// The tokens that end a generation: those of the config, or else the one that the tokenizer knows.
fn stop_ids(config: &HfConfig, tokenizer: Option<&Tokenizer>) -> Vec<u32> {
    let ids = config.eos_token_ids();
    if ids.is_empty() {
        tokenizer
            .and_then(|t| t.inner.eos_id())
            .into_iter()
            .collect()
    } else {
        ids.to_vec()
    }
}

/// A tokenizer with the special tokens that a config names.
pub(super) fn make_tokenizer(json: Arc<str>, path: &Path, config: &HfConfig) -> Result<Tokenizer> {
    let inner = TextTokenizer::from_json(&json, path)?;
    let (bos, eos) = (
        config.bos_token_id().or(inner.bos_id()),
        config.eos_token_ids().first().copied().or(inner.eos_id()),
    );
    Ok(Tokenizer {
        json,
        inner: inner.with_special_ids(bos, eos),
    })
}

fn read_tokenizer(folder: &Path, config: &HfConfig) -> Result<Option<Tokenizer>> {
    let path = folder.join("tokenizer.json");
    if !path.exists() {
        return Ok(None);
    }
    let bytes = crate::io::read_capped(&path, MAX_TOKENIZER_BYTES)?;
    let json = String::from_utf8(bytes).map_err(|_| Error::invalid_file(&path, "not UTF-8"))?;
    let mut tokenizer = make_tokenizer(json.into(), &path, config)?;
    // What lies beside it says more about its special tokens.
    let beside = TextTokenizer::from_dir(folder)?;
    tokenizer.inner = tokenizer
        .inner
        .with_special_ids(beside.bos_id(), beside.eos_id());
    Ok(Some(tokenizer))
}

/// A Hugging Face folder: weights in place, where they lie as the kernels take them.
pub(super) fn from_folder(folder: &Path, options: &ModelOptions) -> Result<ModelParts> {
    let config = HfConfig::open(folder)?;
    let checkpoint = Checkpoint::open_with(folder, options.mmap)?;
    config.check(&checkpoint)?;
    let embedding = dense(
        &checkpoint,
        config.embedding_name(&checkpoint)?,
        [config.vocab_size(), config.hidden_size()],
    )?;
    let mut layers = Vec::new();
    for layer in config.linear_layers() {
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
        let tensor = format!("{name}.weight");
        let weight = match config.load_quantized(&checkpoint, &name, shape)? {
            Some(codes) => Weight::made(tensor, StoredMatrix::from_quantized(&codes, false)?),
            None => dense(&checkpoint, &tensor, shape)?,
        };
        layers.push(LayerWeights {
            name,
            weight,
            bias,
            adapter: None,
        });
    }
    if !config.tie_word_embeddings() {
        let (name, shape) = (
            "lm_head".to_string(),
            [config.vocab_size(), config.hidden_size()],
        );
        let weight = match config.load_quantized(&checkpoint, &name, shape)? {
            Some(codes) => {
                Weight::made(HfConfig::HEAD, StoredMatrix::from_quantized(&codes, false)?)
            }
            None => dense(&checkpoint, HfConfig::HEAD, shape)?,
        };
        layers.push(LayerWeights {
            name,
            weight,
            bias: None,
            adapter: None,
        });
    }
    let mut vector = |name: &str, len: usize| checkpoint.load_vector(name, len);
    let norms = block_norms(&config, &mut vector)?;
    let final_norm = vector(HfConfig::FINAL_NORM, config.hidden_size())?;
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

/// A dense weight as it lies in the file; of 64 bits, rounded to 32.
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

/// Stores every weight of a model anew.
pub(super) fn reformat(weights: &Weights, plan: &FormatPlan) -> Result<Weights> {
    plan.validate()?;
    let stored = |weight: &Weight, format| {
        let matrix = convert(weight.name(), weight.get()?, format)?;
        Ok::<_, Error>(Weight::made(weight.name(), matrix))
    };
    let embedding = stored(&weights.embedding, plan.embedding)?;
    let tied = weights.config.tie_word_embeddings();
    let mut layers = Vec::new();
    for layer in &weights.layers {
        let head = layer.name == "lm_head";
        if head && tied {
            continue;
        }
        let weight = stored(&layer.weight, if head { plan.head } else { plan.linears })?;
        let adapter = match &layer.adapter {
            Some(adapter) => Some(AdapterWeights {
                a: stored(&adapter.a, plan.adapters)?,
                bt: stored(&adapter.bt, plan.adapters)?,
                lora: adapter.lora.clone(),
            }),
            None => None,
        };
        layers.push(LayerWeights {
            name: layer.name.clone(),
            weight,
            bias: layer.bias.clone(),
            adapter,
        });
    }
    Weights::new(ModelParts {
        config: weights.config.clone(),
        embedding,
        norms: weights
            .norms
            .iter()
            .map(|norms| norms.each_ref().map(|n| n.as_deref().map(<[f32]>::to_vec)))
            .collect(),
        final_norm: weights.final_norm.to_vec(),
        layers,
        space: weights.space.clone(),
        subnets: named(weights),
        tokenizer: weights.tokenizer.clone(),
        stop_ids: weights.stop_ids.clone(),
    })
}

/// The subnets but the first, which every model has.
pub(super) fn named(weights: &Weights) -> Vec<(String, SubnetConfig)> {
    let others = weights.subnets.iter().skip(1);
    others
        .map(|subnet| (subnet.name.clone(), subnet.config.clone()))
        .collect()
}
