//! Conversion of decoders and trained supernets to models that run without Burn.

use std::sync::Arc;

use burn::module::Module;

use super::SuperNet;
use crate::adapter::{ElasticLora, ElasticLoraLinear};
use crate::arch::Architecture;
use crate::error::{Error, Result};
use crate::format::{StoredMatrix, WeightFormat};
use crate::linalg::Matrix;
use crate::model::{Block, Decoder};
use crate::nn::{BaseLinear, host_values};
use crate::runtime::parts::{
    A, AdapterWeights, BT, LayerWeights, ModelParts, Norms, SubnetParts, Weight, Weights, encode,
};
use crate::runtime::{FormatPlan, Model};
use crate::space::{SearchSpace, SubnetConfig};

impl Model {
    /// Converts a decoder: dense weights are stored in the formats of the plan, and quantized
    /// weights keep their codes. Adapters stay separate from the base.
    ///
    /// Use this to write a compressed model, such as [`Merger`](crate::Merger) returns, as a
    /// bundle. Add the tokenizer with [`with_tokenizer`](Self::with_tokenizer).
    ///
    /// # Errors
    /// Returns [`Error::HasAdapter`] for an adapter that no pair of factors expresses (SparsePEFT,
    /// QA-SparsePEFT), which must be merged first. Returns [`Error::Unsupported`] if channels or
    /// sub-blocks are inactive ([`Merger::extract`](crate::Merger::extract) removes them), or if a
    /// format cannot hold a weight.
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

    /// Converts a whole supernet: base, adapters, search space, and named subnets. All subnets
    /// share the weights.
    ///
    /// # Errors
    /// Returns the errors of [`from_decoder`](Self::from_decoder) for adapters and formats, and
    /// those of [`SearchSpace::validate`] for a subnet.
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
        let named = subnets.iter();
        parts.subnets = named
            .map(|(name, config)| SubnetParts::new(name, config.clone()))
            .collect();
        Ok(Self::from_weights(Weights::new(parts)?, 0))
    }
}

/// Size in bytes of a decoder's weights as [`Model::from_decoder`] stores them, without adapters,
/// norms and biases. One weight at a time is stored for it.
///
/// # Errors
/// Returns [`Error::Unsupported`] if a format cannot hold a weight.
pub fn stored_bytes(model: &Decoder, plan: impl Into<FormatPlan>) -> Result<usize> {
    let plan = plan.into();
    let config = model.config();
    let mut bytes = embedding(model, &plan)?.unchecked().bytes();
    for (name, layer) in model.linears() {
        bytes += base(&name, &layer.base, plan.linears)?
            .0
            .unchecked()
            .bytes();
    }
    if let Some(head) = model
        .lm_head
        .as_ref()
        .filter(|_| !config.tie_word_embeddings())
    {
        bytes += base(Architecture::HEAD_LAYER, head, plan.head)?
            .0
            .unchecked()
            .bytes();
    }
    Ok(bytes)
}

fn embedding(model: &Decoder, plan: &FormatPlan) -> Result<Weight> {
    let config = model.config();
    let table = Matrix::new(
        config.vocab_size(),
        config.hidden_size(),
        host_values(model.embed_tokens.val()),
    )?;
    let name = Architecture::EMBEDDING;
    Ok(Weight::made(
        name,
        encode(name, &table, floats(plan.embedding))?,
    ))
}

fn decoder_parts(model: &Decoder, plan: &FormatPlan) -> Result<ModelParts> {
    plan.validate()?;
    let model = model.valid();
    let config = model.config().clone();
    let embedding = embedding(&model, plan)?;
    let mut layers = Vec::new();
    for (name, layer) in model.linears() {
        let adapter = match &layer.adapter {
            Some(adapter) => Some(factors(&name, adapter, floats(plan.adapters))?),
            None => None,
        };
        let (weight, bias) = base(&name, &layer.base, plan.linears)?;
        layers.push(LayerWeights {
            name,
            weight,
            bias,
            adapter,
            others: Vec::new(),
        });
    }
    if let Some(head) = &model.lm_head {
        let (weight, bias) = base(Architecture::HEAD_LAYER, head, plan.head)?;
        layers.push(LayerWeights {
            name: Architecture::HEAD_LAYER.into(),
            weight,
            bias,
            adapter: None,
            others: Vec::new(),
        });
    }
    let norms = |block: &Block| -> Norms {
        let gains = block.norms();
        gains
            .map(|(kind, norm)| (kind, host_values(norm.weight.val()).into()))
            .collect()
    };
    Ok(ModelParts {
        embedding,
        norms: model.layers.iter().map(norms).collect(),
        final_norm: host_values(model.norm.weight.val()).into(),
        layers,
        space: None,
        subnets: Vec::new(),
        tokenizer: None,
        stop_ids: config.eos_token_ids().to_vec(),
        config,
    })
}

/// The format of weights that Burn holds as floats.
fn floats(planned: Option<WeightFormat>) -> WeightFormat {
    planned.unwrap_or(WeightFormat::F32)
}

/// The full weight and bias of a base layer, including inactive channels.
fn base(
    name: &str,
    base: &BaseLinear,
    format: Option<WeightFormat>,
) -> Result<(Weight, Option<Arc<[f32]>>)> {
    let tensor = format!("{name}.weight");
    let stored = match base.quantized() {
        // The codes are kept. The plan only decides whether zeros are stored.
        Some(packed) => match format {
            Some(WeightFormat::SparseInt4 { .. }) => {
                StoredMatrix::from_quantized(&packed.unpack(), true)?
            }
            Some(WeightFormat::Int { .. }) => StoredMatrix::from(packed.clone()),
            _ => StoredMatrix::from_codes(&packed.unpack())?,
        },
        None => encode(&tensor, &base.to_matrix(), floats(format))?,
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
