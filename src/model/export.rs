//! Exports a decoder's weights as named tensors.

use super::Decoder;
use crate::arch::{Architecture, LinearKind};
use crate::error::Result;
use crate::io::{DType, HostTensor};
use crate::nn::{BaseLinear, host_values};

impl Decoder {
    /// The weights of the base, with Hugging Face's names and orientation; adapters are left out.
    /// Each tensor is created only when it is written.
    ///
    /// # Errors
    /// Currently infallible for models built by this crate.
    pub fn tensors(&self, dtype: DType) -> Result<Vec<HostTensor<'_>>> {
        let config = self.config();
        let (vocab_size, d_model) = (config.vocab_size(), config.hidden_size());
        let embedding = self.embed_tokens.clone();
        let mut tensors = vec![HostTensor::lazy_f32(
            Architecture::EMBEDDING,
            dtype,
            [vocab_size, d_model],
            move || Ok(host_values(embedding.val())),
        )];
        for block in 0..self.layers.len() {
            tensors.extend(self.block_norm_tensors(block, dtype));
        }
        for (name, layer) in self.linears() {
            push_linear(&mut tensors, &name, &layer.base, dtype);
        }
        let norm = self.norm.weight.clone();
        tensors.push(HostTensor::lazy_f32(
            Architecture::FINAL_NORM,
            dtype,
            [d_model],
            move || Ok(host_values(norm.val())),
        ));
        if let Some(head) = &self.lm_head {
            push_linear(&mut tensors, Architecture::HEAD_LAYER, head, dtype);
        }
        Ok(tensors)
    }

    /// The weights of one block.
    pub(crate) fn block_tensors(&self, block: usize, dtype: DType) -> Vec<HostTensor<'_>> {
        let mut tensors: Vec<_> = self.block_norm_tensors(block, dtype).collect();
        for kind in LinearKind::ALL {
            if let Some(layer) = self.layers[block].linear(kind) {
                push_linear(&mut tensors, &kind.name(block), &layer.base, dtype);
            }
        }
        tensors
    }

    fn block_norm_tensors(
        &self,
        block: usize,
        dtype: DType,
    ) -> impl Iterator<Item = HostTensor<'_>> {
        self.layers[block].norms().map(move |(kind, norm)| {
            let name = self.config().arch().norm_tensor(block, kind);
            let weight = norm.weight.clone();
            let len = weight.val().dims()[0];
            HostTensor::lazy_f32(name, dtype, [len], move || Ok(host_values(weight.val())))
        })
    }
}

fn push_linear(tensors: &mut Vec<HostTensor<'_>>, name: &str, base: &BaseLinear, dtype: DType) {
    let [d_input, d_output] = base.dims();
    let weight = base.clone();
    tensors.push(HostTensor::lazy_f32(
        format!("{name}.weight"),
        dtype,
        [d_output, d_input],
        move || Ok(weight.to_matrix().into_vec()),
    ));
    if let Some(bias) = &base.bias {
        let bias = bias.clone();
        tensors.push(HostTensor::lazy_f32(
            format!("{name}.bias"),
            dtype,
            [d_output],
            move || Ok(host_values(bias.val())),
        ));
    }
}
