//! A model with an adapter added to its weights, read one weight at a time.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::changes::BaseInit;
use super::tables::{EMBEDDING_MODULE, Tables, added};
use super::{LoraAdapter, LoraWeights, is_table};
use crate::arch::{Architecture, Fused, LinearSpec};
use crate::error::{Error, Result};
use crate::format::QuantizedMatrix;
use crate::io::gguf::{BlockRows, Gguf};
use crate::io::source::{Held, ModelSource, TokenizerTexts};
use crate::io::{DType, HfConfig};
use crate::linalg::Matrix;

/// The sum of a model and an adapter as the source of a conversion.
///
/// Only the weight that is asked for is in memory, and embedding and head if the adapter changes
/// them. With an adapter that was trained under the mask of its base (SparsePEFT, arXiv 2501.16372),
/// zeros of the weight stay zeros.
pub(crate) struct MergedSource<'a> {
    base: &'a dyn ModelSource,
    adapter: &'a LoraAdapter,
    config: HfConfig,
    linears: BTreeMap<String, LinearSpec>,
    fused: Vec<Fused>,
    /// Embedding and head, if the adapter changes them.
    tables: Option<Tables>,
    /// Type of the numbers of a sum whose base is not held as numbers.
    dtype: DType,
    /// The last sum, which holds several layers where the checkpoint stores them as one matrix.
    last: Mutex<Option<(String, Arc<Matrix>)>>,
}

impl<'a> MergedSource<'a> {
    /// Takes a model and an adapter that [`LoraAdapter::check_merge`] has found to fit it.
    ///
    /// # Errors
    /// Returns the errors of reading embedding and head.
    pub fn new(base: &'a dyn ModelSource, adapter: &'a LoraAdapter) -> Result<Self> {
        let config = base.config().clone();
        let dtype = match base.held(Architecture::EMBEDDING)? {
            Held::Numbers(dtype) => dtype,
            Held::Codes | Held::Blocks(_) => DType::BF16,
        };
        let (vocabulary, d_model) = (config.vocab_size(), config.hidden_size());
        let table = |name: &str| {
            let values = base.numbers(name, &[vocabulary, d_model])?;
            Matrix::new(vocabulary, d_model, values)
        };
        let (tables, config) = if adapter.changes_tables() {
            let tied = config.tie_word_embeddings();
            let head = (!tied).then(|| table(Architecture::HEAD));
            let before = Tables {
                embedding: table(Architecture::EMBEDDING)?,
                head: head.transpose()?,
            };
            let tables = adapter.changed_tables(before)?;
            let config = config.with_vocabulary(tables.embedding.rows(), tables.head.is_none());
            (Some(tables), config)
        } else {
            (None, config)
        };
        let arch = config.arch();
        let linears = arch.linears().into_iter();
        Ok(Self {
            base,
            adapter,
            linears: linears.map(|layer| (layer.name.clone(), layer)).collect(),
            fused: arch.fused(),
            config,
            tables,
            dtype,
            last: Mutex::default(),
        })
    }

    /// Returns what the reader of the sum should know, in sentences.
    pub fn notices(&self) -> Result<Vec<String>> {
        let mut notices = self.adapter.notices().to_vec();
        let mut rounded = 0;
        for layer in self.linears.keys() {
            let on_grid = |held| !matches!(held, Held::Numbers(_));
            if self.module_of(layer).is_some()
                && on_grid(self.base.held(&format!("{layer}.weight"))?)
            {
                rounded += 1;
            }
        }
        if rounded > 0 {
            notices.push(format!(
                "{rounded} weights that were on a grid are plain numbers ({}) with the adapter \
                 added; training through the grid (QA-SparsePEFT) keeps them on it",
                self.dtype
            ));
        }
        Ok(notices)
    }

    /// The module of the adapter that changes a linear layer: the layer, or the matrix of the
    /// checkpoint that holds it.
    fn module_of<'b>(&'b self, layer: &'b str) -> Option<(&'b str, &'b LoraWeights)> {
        let pairs = &self.adapter.layers;
        if let Some(pair) = pairs.get(layer) {
            return Some((layer, pair));
        }
        let holds = |fused: &&Fused| fused.rows_of(layer).is_some();
        let fused = self.fused.iter().find(holds)?;
        Some((&fused.name, pairs.get(&fused.name)?))
    }

    /// A tensor that the adapter stores whole.
    fn stored(&self, tensor: &str) -> Option<&[f32]> {
        // The last one replaces the others.
        let all = self.adapter.changes.whole();
        let named = all.filter(|(name, _)| *name == tensor);
        named.last().map(|(_, stored)| &*stored.values)
    }

    /// The weight of a linear layer without the adapter's pair, `[d_output, d_input]`.
    fn weight(&self, layer: &str) -> Result<Matrix> {
        let unknown = || Error::UnknownLayer {
            context: "LoRA adapter".into(),
            layer: layer.into(),
        };
        let spec = self.linears.get(layer).ok_or_else(unknown)?;
        let shape = [spec.d_output, spec.d_input];
        let name = format!("{layer}.weight");
        let values = match self.stored(&name) {
            Some(values) => values.to_vec(),
            None => self.stored_rows(layer).map_or_else(
                || self.base.numbers(&name, &shape),
                |values| Ok(values.to_vec()),
            )?,
        };
        Matrix::new(shape[0], shape[1], values)
    }

    /// The rows of a linear layer in a matrix that the adapter stores whole.
    fn stored_rows(&self, layer: &str) -> Option<&[f32]> {
        let (fused, rows) = self
            .fused
            .iter()
            .find_map(|fused| Some((fused, fused.rows_of(layer)?)))?;
        let values = self.stored(&format!("{}.weight", fused.name))?;
        values.get(rows.start * fused.d_input..rows.end * fused.d_input)
    }

    /// The sum for a module of several layers, which is kept for the next of them.
    fn sum(&self, module: &str, pair: &LoraWeights) -> Result<Arc<Matrix>> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((name, sum)) = &*last
            && name == module
        {
            return Ok(sum.clone());
        }
        // The sum before is not needed any more.
        *last = None;
        let sum = Arc::new(self.made(module, pair)?);
        *last = Some((module.into(), sum.clone()));
        Ok(sum)
    }

    /// The sum for a module of the adapter.
    fn made(&self, module: &str, pair: &LoraWeights) -> Result<Matrix> {
        let of_fused = self.fused.iter().find(|fused| fused.name == module);
        let weight = match of_fused {
            None => self.weight(module)?,
            Some(fused) => {
                let mut values = Vec::new();
                for (layer, _) in &fused.parts {
                    values.extend(self.weight(layer)?.into_vec());
                }
                Matrix::new(fused.d_output(), fused.d_input, values)?
            }
        };
        let zeros: Option<Vec<bool>> =
            (self.adapter.sparse).then(|| weight.as_slice().iter().map(|w| *w == 0.0).collect());
        let (weight, pair) = self.adapter.changes.applied(module, weight, pair)?;
        let mut sum = added(weight, &pair);
        if let Some(zeros) = zeros {
            let values = sum.as_mut_slice().iter_mut().zip(zeros);
            values.for_each(|(value, zero)| {
                if zero {
                    *value = 0.0;
                }
            });
        }
        Ok(sum)
    }

    fn table(&self, tensor: &str) -> Option<&Matrix> {
        let tables = self.tables.as_ref()?;
        match tensor.strip_suffix(".weight") {
            Some(EMBEDDING_MODULE) => Some(&tables.embedding),
            Some(Architecture::HEAD_LAYER) => tables.head.as_ref(),
            _ => None,
        }
    }

    /// Whether the numbers of a tensor are others than those of the base.
    fn changes(&self, tensor: &str) -> bool {
        let of_layer = |layer| self.module_of(layer).is_some() || self.stored_rows(layer).is_some();
        self.table(tensor).is_some()
            || self.stored(tensor).is_some()
            || tensor.strip_suffix(".weight").is_some_and(of_layer)
    }
}

impl ModelSource for MergedSource<'_> {
    fn path(&self) -> &Path {
        self.base.path()
    }

    fn config(&self) -> &HfConfig {
        &self.config
    }

    fn held(&self, tensor: &str) -> Result<Held> {
        if !self.changes(tensor) {
            return self.base.held(tensor);
        }
        // A head of its own may be new.
        let name = match self.table(tensor) {
            Some(_) => Architecture::EMBEDDING,
            None => tensor,
        };
        Ok(match self.base.held(name)? {
            Held::Numbers(dtype) => Held::Numbers(dtype),
            Held::Codes | Held::Blocks(_) => Held::Numbers(self.dtype),
        })
    }

    fn codes(&self, tensor: &str, shape: [usize; 2]) -> Result<Option<QuantizedMatrix>> {
        match self.changes(tensor) {
            true => Ok(None),
            false => self.base.codes(tensor, shape),
        }
    }

    fn numbers(&self, tensor: &str, shape: &[usize]) -> Result<Vec<f32>> {
        if let Some(table) = self.table(tensor) {
            return Ok(table.as_slice().to_vec());
        }
        let layer = tensor.strip_suffix(".weight");
        if let Some((module, pair)) = layer.and_then(|layer| self.module_of(layer)) {
            if Some(module) == layer {
                return Ok(self.made(module, pair)?.into_vec());
            }
            let sum = self.sum(module, pair)?;
            let rows = layer.and_then(|layer| {
                let fused = self.fused.iter().find(|fused| fused.name == module)?;
                fused.rows_of(layer)
            });
            let rows = rows.unwrap_or(0..sum.rows());
            return Ok(sum.as_slice()[rows.start * sum.cols()..rows.end * sum.cols()].to_vec());
        }
        if let Some(layer) = layer.filter(|layer| self.stored_rows(layer).is_some()) {
            return Ok(self.weight(layer)?.into_vec());
        }
        let mut values = match self.stored(tensor) {
            Some(values) => values.to_vec(),
            None => self.base.numbers(tensor, shape)?,
        };
        let module = tensor.strip_suffix(".bias");
        if let Some(added) = module.and_then(|module| self.adapter.changes.biases.get(module)) {
            values.iter_mut().zip(added).for_each(|(v, a)| *v += a);
        }
        Ok(values)
    }

    fn bytes(&self, tensor: &str, dtype: DType, shape: &[usize]) -> Result<Option<&[u8]>> {
        let biases = &self.adapter.changes.biases;
        let module = tensor.strip_suffix(".bias");
        if self.changes(tensor) || module.is_some_and(|module| biases.contains_key(module)) {
            return Ok(None);
        }
        self.base.bytes(tensor, dtype, shape)
    }

    fn blocks(&self, tensor: &str) -> Result<Option<BlockRows<'_>>> {
        match self.changes(tensor) {
            true => Ok(None),
            false => self.base.blocks(tensor),
        }
    }

    fn release(&self, tensor: &str) {
        self.base.release(tensor);
    }

    fn tokenizer(&self) -> Result<Option<TokenizerTexts>> {
        self.base.tokenizer()
    }

    fn gguf(&self) -> Option<&Gguf> {
        self.base.gguf()
    }
}

impl LoraAdapter {
    /// Checks that the adapter can be added to a model from its files.
    ///
    /// # Errors
    /// Returns the errors of [`check`](Self::check); [`Error::InvalidArgument`] for an adapter without
    /// anything to merge; and [`Error::Unsupported`] for one that was trained through the grid of its
    /// base (QA-SparsePEFT), which the files do not hold, and for an initialization of a model with
    /// quantized weights.
    pub(crate) fn check_merge(&self, config: &HfConfig) -> Result<()> {
        let pairs = self.layers.keys().any(|name| !is_table(name));
        let changes = &self.changes;
        if !pairs && !self.changes_tables() && changes.is_empty() {
            return Err(Error::argument("adapter", "no pairs", "at least one"));
        }
        self.check(config)?;
        if self.quantization_aware {
            return Err(Error::Unsupported {
                what: "merging an adapter that was trained through the grid of its base \
                       (`quantization_aware`) from its files; `Merger` does it where the adapter \
                       was trained,"
                    .into(),
            });
        }
        if changes.init != BaseInit::Unchanged && config.quantization().is_some() {
            let what = changes.what().unwrap_or_default();
            return Err(Error::Unsupported {
                what: format!("an adapter with {what} on a model with quantized weights"),
            });
        }
        Ok(())
    }
}
