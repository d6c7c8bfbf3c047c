//! From decoders and trained supernets to models that run without Burn.

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
    A, AdapterWeights, BT, LayerWeights, ModelParts, Norms, Weight, Weights, encode,
};
use crate::runtime::{FormatPlan, Model};
use crate::space::{SearchSpace, SubnetConfig};

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
        Architecture::EMBEDDING,
        encode(Architecture::EMBEDDING, &table, plan.embedding)?,
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
        let (weight, bias) = base(Architecture::HEAD_LAYER, head, plan.head)?;
        layers.push(LayerWeights {
            name: Architecture::HEAD_LAYER.into(),
            weight,
            bias,
            adapter: None,
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
