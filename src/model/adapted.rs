//! The base that an adapter is added to, where it is not the model as it is.

use std::collections::BTreeMap;

use burn::module::Param;
use burn::tensor::{Tensor, TensorData};

use super::Decoder;
use crate::arch::{Architecture, NormKind};
use crate::error::{Error, Result};
use crate::io::peft::{BaseInit, Tables, is_table};
use crate::io::{LoraAdapter, LoraWeights};
use crate::linalg::Matrix;
use crate::nn::{BaseLinear, host_values};

impl Decoder {
    /// Changes the model as `adapter` says, and returns it with the pairs that are to be added to
    /// the layers of its blocks. Pairs of embedding and head are added here. The model may have
    /// another vocabulary after, and a head of its own.
    ///
    /// # Errors
    /// Returns the errors of [`LoraAdapter::check`], [`Error::Unsupported`] for an initialization
    /// of a model with quantized weights, and the errors of
    /// [`BaseChanges::applied`](crate::io::peft::BaseChanges::applied).
    pub(crate) fn with_base_of(
        mut self,
        adapter: &LoraAdapter,
    ) -> Result<(Self, BTreeMap<String, LoraWeights>)> {
        adapter.check(self.config())?;
        let changes = &adapter.changes;
        if changes.init != BaseInit::Unchanged && self.config().quantization().is_some() {
            let what = changes.what().unwrap_or_default();
            return Err(Error::Unsupported {
                what: format!("an adapter with {what} on a model with quantized weights"),
            });
        }
        for (name, stored) in changes.whole() {
            let (module, field) = name.rsplit_once('.').unwrap_or((name, ""));
            match field {
                "weight" if is_table(module) => {}
                "bias" => self.set_bias(module, stored.values.clone()),
                _ if self.set_norm(name, &stored.values) => {}
                _ => {
                    let [rows, cols] = stored.shape[..] else {
                        continue;
                    };
                    let weight = Matrix::new(rows, cols, stored.values.clone())?;
                    self.set_module_weight(module, &weight)?;
                }
            }
        }
        for (module, added) in &changes.biases {
            let layer = self
                .linear(module)
                .and_then(|layer| layer.base.bias.as_ref());
            let Some(bias) = layer else { continue };
            let bias = host_values(bias.val());
            let sum = bias.iter().zip(added).map(|(b, a)| b + a).collect();
            self.set_bias(module, sum);
        }
        let mut of_blocks = LoraAdapter::default();
        for (module, pair) in &adapter.layers {
            if is_table(module) {
                continue;
            }
            let pair = if changes.init != BaseInit::Unchanged
                || changes.magnitudes.contains_key(module)
            {
                let (weight, pair) = changes.applied(module, self.module_weight(module)?, pair)?;
                self.set_module_weight(module, &weight)?;
                pair
            } else {
                pair.clone()
            };
            of_blocks.layers.insert(module.clone(), pair);
        }
        if adapter.changes_tables() {
            self = self.with_tables_of(adapter)?;
        }
        let pairs = of_blocks.by_layer(self.config())?;
        Ok((self, pairs))
    }

    fn with_tables_of(mut self, adapter: &LoraAdapter) -> Result<Self> {
        let (config, device) = (self.config().clone(), self.device());
        let before = Tables {
            embedding: Matrix::new(
                config.vocab_size(),
                config.hidden_size(),
                host_values(self.embed_tokens.val()),
            )?,
            head: self.lm_head.as_ref().map(BaseLinear::to_matrix),
        };
        let tables = adapter.changed_tables(before)?;
        let size = [tables.embedding.rows(), tables.embedding.cols()];
        let dtype = self.embed_tokens.val().dtype();
        self.lm_head = match &tables.head {
            Some(head) => Some(BaseLinear::from_matrix(head, None, &device)?),
            None => None,
        };
        let values = TensorData::new(tables.embedding.into_vec(), size);
        let embedding = Tensor::<2>::from_data(values, &device).cast(dtype);
        self.embed_tokens = Param::from_tensor(embedding).set_require_grad(false);
        let tied = self.lm_head.is_none();
        self.set_config(config.with_vocabulary(size[0], tied));
        Ok(self)
    }

    /// The layers that a module of the checkpoint holds, with their numbers of rows.
    fn parts_of(&self, module: &str) -> Option<Vec<(String, usize)>> {
        let fused = self.config().arch().fused();
        let matrix = fused.into_iter().find(|matrix| matrix.name == *module);
        matrix.map(|matrix| matrix.parts)
    }

    fn unknown(module: &str) -> Error {
        Error::UnknownLayer {
            context: "LoRA adapter".into(),
            layer: module.into(),
        }
    }

    /// The weight of a linear layer, or of a matrix that holds several, `[d_output, d_input]`.
    fn module_weight(&self, module: &str) -> Result<Matrix> {
        let Some(parts) = self.parts_of(module) else {
            let layer = self.linear(module).ok_or_else(|| Self::unknown(module))?;
            return Ok(layer.base.to_matrix());
        };
        let (mut rows, mut values, mut cols) = (0, Vec::new(), 0);
        for (name, _) in &parts {
            let layer = self.linear(name).ok_or_else(|| Self::unknown(name))?;
            let weight = layer.base.to_matrix();
            rows += weight.rows();
            cols = weight.cols();
            values.extend(weight.into_vec());
        }
        Matrix::new(rows, cols, values)
    }

    fn set_module_weight(&mut self, module: &str, weight: &Matrix) -> Result<()> {
        let parts = self.parts_of(module);
        let parts = parts.unwrap_or_else(|| vec![(module.into(), weight.rows())]);
        let mut start = 0;
        for (name, rows) in parts {
            let layer = self.linear_mut(&name).ok_or_else(|| Self::unknown(&name))?;
            let part = Matrix::from_fn(rows, weight.cols(), |i, j| weight.row(start + i)[j]);
            layer.base.set_matrix(&part)?;
            start += rows;
        }
        Ok(())
    }

    fn set_bias(&mut self, module: &str, values: Vec<f32>) {
        let (device, n) = (self.device(), values.len());
        if let Some(layer) = self.linear_mut(module) {
            let bias = Tensor::from_data(TensorData::new(values, [n]), &device);
            layer.base.bias = Some(Param::from_tensor(bias).set_require_grad(false));
        }
    }

    /// Sets the gains of a norm, by the name of the tensor. Returns whether there is such a norm.
    fn set_norm(&mut self, name: &str, values: &[f32]) -> bool {
        let arch = self.config().arch().clone();
        let data = TensorData::new(values.to_vec(), [values.len()]);
        let gains = Tensor::from_data(data, &self.device());
        let gains = Param::from_tensor(gains).set_require_grad(false);
        if name == Architecture::FINAL_NORM {
            self.norm.weight = gains;
            return true;
        }
        for (index, block) in self.layers.iter_mut().enumerate() {
            for kind in NormKind::ALL {
                if arch.norm_tensor(index, kind) == name
                    && let Some(norm) = block.norm_mut(kind)
                {
                    norm.weight = gains;
                    return true;
                }
            }
        }
        false
    }
}
