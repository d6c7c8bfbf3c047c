//! The decoder-only transformer.

use burn::module::{Module, Param};
use burn::tensor::module::embedding;
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::block::{Attention, Block, Mlp, Pass, Tap};
use crate::adapter::ElasticLoraLinear;
use crate::arch::{Architecture, LinearKind, NormKind, Rope, SubBlock};
use crate::data::{Batch, Segments};
use crate::error::{Error, Result};
use crate::io::{Checkpoint, HfConfig};
use crate::nn::ops;
use crate::nn::{BaseLinear, KvCache, RmsNorm, host_values};
use crate::progress::Task;
use crate::space::LayerShape;
use crate::threads;

/// A decoder-only language model. Its weights start frozen; adapters are attached to its linear
/// layers.
///
/// All model families use this one type with different configurations; see [`HfConfig`].
#[derive(Module, Debug)]
pub struct Decoder {
    /// Token embedding, `[vocab_size, d_model]`; also the weight of the head if the two are tied.
    pub embed_tokens: Param<Tensor<2>>,
    /// Blocks, from first to last.
    pub layers: Vec<Block>,
    /// Final normalization.
    pub norm: RmsNorm,
    /// The head, `[d_model] -> [vocab_size]`; `None` if tied to the embedding.
    pub lm_head: Option<BaseLinear>,
    #[module(skip)]
    config: HfConfig,
    #[module(skip)]
    ropes: Vec<Rope>,
}

impl Decoder {
    /// Loads the weights that `config` describes from a checkpoint, as `f32`. Quantized layers are
    /// dequantized.
    ///
    /// # Errors
    /// Returns an error that names the tensor if one is missing, has another shape or dtype, or
    /// holds NaN or an infinity.
    pub fn load(config: &HfConfig, checkpoint: &Checkpoint, device: &Device) -> Result<Self> {
        threads::ready()?;
        let config = &config.fitted(checkpoint)?;
        Self::from_checkpoint(config, checkpoint, device, |source| {
            Self::assemble(config, source)
        })
    }

    /// A model without weights: each block is empty until [`load_block`](Self::load_block).
    pub(crate) fn without_weights(config: &HfConfig, device: &Device) -> Self {
        let arch = config.arch();
        Self {
            embed_tokens: Param::from_tensor(Tensor::zeros([1, 1], device)).set_require_grad(false),
            layers: arch.blocks.iter().map(|_| Block::empty()).collect(),
            norm: RmsNorm::from_tensor(Tensor::zeros([1], device), arch.norm_eps),
            lm_head: None,
            config: config.clone(),
            ropes: arch.ropes.iter().map(Rope::new).collect(),
        }
    }

    /// Loads the weights of one block as [`load`](Self::load) does. The config is one that was
    /// fitted to the checkpoint.
    ///
    /// # Errors
    /// Returns the errors of [`load`](Self::load).
    pub(crate) fn load_block(&mut self, checkpoint: &Checkpoint, block: usize) -> Result<()> {
        let (config, device) = (&self.config, self.device());
        self.layers[block] = Self::from_checkpoint(config, checkpoint, &device, |source| {
            Self::assemble_block(config.arch(), block, source)
        })?;
        Ok(())
    }

    /// Drops the weights of a block.
    pub(crate) fn drop_block(&mut self, block: usize) {
        self.layers[block] = Block::empty();
    }

    /// Calls `make` with the tensors of a checkpoint.
    fn from_checkpoint<T>(
        config: &HfConfig,
        checkpoint: &Checkpoint,
        device: &Device,
        make: impl FnOnce(&mut Source<'_>) -> Result<T>,
    ) -> Result<T> {
        make(&mut Source {
            linear: &mut |name: &str, d_input: usize, d_output: usize, bias: bool| {
                let weight = config.load_linear(checkpoint, name, [d_output, d_input])?;
                let bias = if bias {
                    Some(checkpoint.load_vector(&format!("{name}.bias"), d_output)?)
                } else {
                    None
                };
                BaseLinear::from_matrix(&weight, bias.as_deref(), device)
            },
            norm: &mut |name: &str, len: usize| {
                let weight = checkpoint.load_vector(name, len)?;
                Ok(Tensor::from_data(TensorData::new(weight, [len]), device))
            },
            embedding: &mut |vocab_size: usize, d_model: usize| {
                let name = config.embedding_name(checkpoint)?;
                let table = checkpoint.load_matrix(name, [vocab_size, d_model])?;
                Ok(Tensor::from_data(
                    TensorData::new(table.into_vec(), [vocab_size, d_model]),
                    device,
                ))
            },
        })
    }

    /// Creates a model with random weights: normal with standard deviation 0.02
    /// (`0.02 / sqrt(2 n_layers)` for the layers that write to the residual stream, as in GPT-2),
    /// norms 1, biases 0. The same seed gives the same weights on every backend.
    ///
    /// # Errors
    /// Returns [`Error::NoThreads`] if the operating system starts no thread.
    pub fn init(config: &HfConfig, seed: u64, device: &Device) -> Result<Self> {
        threads::ready()?;
        let rng = std::cell::RefCell::new(ChaCha8Rng::seed_from_u64(seed));
        let normal = |n: usize, std: f64| -> Vec<f32> {
            let mut rng = rng.borrow_mut();
            (0..n)
                .map(|_| {
                    // Box-Muller, to avoid another dependency for one distribution.
                    let u: f64 = 1.0 - rng.random::<f64>();
                    let v: f64 = rng.random();
                    ((-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos() * std) as f32
                })
                .collect()
        };
        let residual_std = 0.02 / (2.0 * config.num_hidden_layers() as f64).sqrt();
        let mut source = Source {
            linear: &mut |name: &str, d_input: usize, d_output: usize, bias: bool| {
                let kind = LinearKind::parse(name).map(|(_, kind)| kind);
                let writes_residual = kind.is_some_and(LinearKind::writes_residual);
                let std = if writes_residual { residual_std } else { 0.02 };
                let weight = TensorData::new(normal(d_input * d_output, std), [d_input, d_output]);
                let bias = bias.then(|| Tensor::zeros([d_output], device));
                BaseLinear::from_tensors(Tensor::from_data(weight, device), bias)
            },
            norm: &mut |_: &str, len: usize| Ok(Tensor::ones([len], device)),
            embedding: &mut |vocab_size: usize, d_model: usize| {
                let table =
                    TensorData::new(normal(vocab_size * d_model, 0.02), [vocab_size, d_model]);
                Ok(Tensor::from_data(table, device))
            },
        };
        Self::assemble(config, &mut source)
    }

    fn assemble(config: &HfConfig, source: &mut Source<'_>) -> Result<Self> {
        let arch = config.arch();
        let (d_model, eps, offset) = (arch.d_model, arch.norm_eps, arch.norm_offset().into());
        let embed_tokens = Param::from_tensor((source.embedding)(config.vocab_size(), d_model)?)
            .set_require_grad(false);
        let blocks = 0..arch.blocks.len();
        let layers = blocks.map(|block| Self::assemble_block(arch, block, source));
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = (source.norm)(Architecture::FINAL_NORM, d_model)?;
        let norm = RmsNorm::from_tensor(norm, eps).with_offset(offset);
        let lm_head = if config.tie_word_embeddings() {
            None
        } else {
            Some((source.linear)(
                Architecture::HEAD_LAYER,
                d_model,
                config.vocab_size(),
                false,
            )?)
        };
        let ropes = arch.ropes.iter().map(Rope::new).collect();
        Ok(Self {
            embed_tokens,
            layers,
            norm,
            lm_head,
            config: config.clone(),
            ropes,
        })
    }

    /// Makes one block.
    fn assemble_block(arch: &Architecture, block: usize, source: &mut Source<'_>) -> Result<Block> {
        let dims = &arch.blocks[block];
        let (d_model, eps, offset) = (arch.d_model, arch.norm_eps, arch.norm_offset().into());
        let mut linear = |kind: LinearKind| -> Result<ElasticLoraLinear> {
            let [d_input, d_output] = arch.linear_dims(dims, kind);
            let (name, bias) = (kind.name(block), arch.has_bias(kind));
            let base = (source.linear)(&name, d_input, d_output, bias)?;
            Ok(ElasticLoraLinear::plain(base))
        };
        let mut norm = |kind: NormKind| -> Result<RmsNorm> {
            let len = if kind.per_head() {
                arch.head_dim
            } else {
                d_model
            };
            let weight = (source.norm)(&arch.norm_tensor(block, kind), len)?;
            Ok(RmsNorm::from_tensor(weight, eps).with_offset(offset))
        };
        let norms: Vec<NormKind> = arch.norms_of(dims).map(|(kind, _)| kind).collect();
        let has = |kind: NormKind| norms.contains(&kind);
        let attention = if dims.has_attention() {
            Some(Attention {
                norm: norm(NormKind::Attention)?,
                q_norm: optional(has(NormKind::Q), || norm(NormKind::Q))?,
                k_norm: optional(has(NormKind::K), || norm(NormKind::K))?,
                out_norm: optional(has(NormKind::AttentionOut), || norm(NormKind::AttentionOut))?,
                q_proj: linear(LinearKind::Q)?,
                k_proj: linear(LinearKind::K)?,
                v_proj: linear(LinearKind::V)?,
                o_proj: linear(LinearKind::O)?,
                head_dim: arch.head_dim,
            })
        } else {
            None
        };
        let mlp = if dims.has_mlp() {
            Some(Mlp {
                norm: norm(NormKind::Mlp)?,
                out_norm: optional(has(NormKind::MlpOut), || norm(NormKind::MlpOut))?,
                gate_proj: linear(LinearKind::Gate)?,
                up_proj: linear(LinearKind::Up)?,
                down_proj: linear(LinearKind::Down)?,
            })
        } else {
            None
        };
        Ok(Block::new(attention, mlp))
    }

    /// Moves the model out and leaves an unusable placeholder without blocks.
    pub(crate) fn take(&mut self) -> Self {
        let device = self.device();
        let left = Self {
            embed_tokens: Param::from_tensor(Tensor::zeros([1, 1], &device)),
            layers: Vec::new(),
            norm: RmsNorm::from_tensor(Tensor::zeros([1], &device), self.norm.eps),
            lm_head: None,
            config: self.config.clone(),
            ropes: self.ropes.clone(),
        };
        std::mem::replace(self, left)
    }

    /// The configuration that the model was built from.
    pub fn config(&self) -> &HfConfig {
        &self.config
    }

    /// The device of the weights, with or without autodiff.
    pub fn device(&self) -> Device {
        self.embed_tokens.val().device()
    }

    /// Makes a tensor of token ids.
    ///
    /// # Shapes
    /// - `ids`: row-major `[rows, len]`; result: `[rows, len]`
    ///
    /// # Errors
    /// Returns [`Error::TokenOutOfRange`] for an id outside the vocabulary,
    /// [`Error::SequenceTooLong`] if `len` is above the context length, and
    /// [`Error::ShapeMismatch`] if `ids` is empty or not a whole number of rows.
    pub fn tokens(&self, ids: &[u32], rows: usize) -> Result<Tensor<2, Int>> {
        if rows == 0 || ids.is_empty() || !ids.len().is_multiple_of(rows) {
            return Err(Error::ShapeMismatch {
                what: "token ids in rows".into(),
                expected: vec![rows],
                found: vec![ids.len()],
            });
        }
        let len = ids.len() / rows;
        if len > self.config.max_position_embeddings() {
            return Err(Error::SequenceTooLong {
                what: "input".into(),
                found: len,
                max: self.config.max_position_embeddings(),
            });
        }
        let vocab_size = self.config.vocab_size();
        if let Some(found) = ids.iter().copied().find(|id| *id as usize >= vocab_size) {
            return Err(Error::TokenOutOfRange { found, vocab_size });
        }
        let ids: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
        Ok(Tensor::from_data(
            TensorData::new(ids, [rows, len]),
            &self.device().without_autodiff(),
        ))
    }

    /// Makes a tensor of the token ids of a batch.
    ///
    /// # Shapes
    /// - result: `[rows, len]`
    ///
    /// # Errors
    /// Returns the errors of [`tokens`](Self::tokens), and [`Error::ShapeMismatch`] if the batch has
    /// segments of other sizes than its rows.
    pub(crate) fn batch_tokens(&self, batch: &Batch) -> Result<Tensor<2, Int>> {
        let tokens = self.tokens(&batch.ids, batch.rows)?;
        let found = batch.segments.as_ref().map(Segments::dims);
        match found.filter(|dims| *dims != tokens.dims()) {
            Some(found) => Err(Error::ShapeMismatch {
                what: "the segments of a batch".into(),
                expected: tokens.dims().to_vec(),
                found: found.to_vec(),
            }),
            None => Ok(tokens),
        }
    }

    /// Embeds tokens: the input of the first block.
    ///
    /// # Shapes
    /// - `tokens`: `[batch, seq]`; result: `[batch, seq, d_model]`
    pub fn embed(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let rows = embedding(self.embed_tokens.val(), tokens);
        self.embedded(if rows.dtype() == DType::F32 {
            rows
        } else {
            rows.cast(FloatDType::F32)
        })
    }

    /// The input of the first block, from rows of the embedding in `f32`.
    pub(crate) fn embedded(&self, rows: Tensor<3>) -> Tensor<3> {
        match self.config.arch().embedding_scale() {
            1.0 => rows,
            scale => rows * scale,
        }
    }

    /// Applies one block, without a cache. `tap` sees the input of each linear layer just before
    /// the layer runs.
    ///
    /// # Shapes
    /// - `x` and result: `[batch, seq, d_model]`
    pub fn block<'a>(&self, block: usize, x: Tensor<3>, tap: Option<&'a mut Tap<'a>>) -> Tensor<3> {
        let mut pass = self.pass(0, x.dims()[1], None);
        pass.tap = tap;
        self.layers[block].forward(x, block, &mut pass)
    }

    /// The state of a pass over `n` tokens from position `start` on.
    pub(crate) fn pass<'a>(
        &self,
        start: usize,
        n: usize,
        cache: Option<&'a mut KvCache>,
    ) -> Pass<'_, 'a> {
        let device = self.device().without_autodiff();
        let len = cache.as_ref().map_or(0, |cache| cache.len()).max(start + n);
        let positions = || (start..start + n).map(|position| (position, len));
        let tables = self.ropes.iter();
        let rotations = tables.map(|rope| rotary_tables(rope, positions(), n, &device));
        let mask = cache.as_ref().map(|cache| cache.mask());
        Pass {
            arch: self.config.arch(),
            rotations: rotations.collect(),
            mask: mask.unwrap_or_default(),
            cache,
            tap: None,
        }
    }

    /// The state of a pass over rows of `n` tokens without a cache. With `segments`, each example
    /// of a row is computed as it is alone: by itself, from position 0 on, and with the rotary
    /// frequencies of its own length.
    pub(crate) fn pass_of(&self, n: usize, segments: Option<&Segments>) -> Pass<'_, '_> {
        let mut pass = self.pass(0, n, None);
        if let Some(segments) = segments {
            let [rows, len] = segments.dims();
            let device = self.device().without_autodiff();
            let tables = self.ropes.iter();
            let rotations =
                tables.map(|rope| rotary_tables(rope, segments.positions(), rows * len, &device));
            pass.rotations = rotations.collect();
            pass.mask.segments = Some(segments.clone());
        }
        pass
    }

    /// The rotary embeddings.
    pub(crate) fn ropes(&self) -> &[Rope] {
        &self.ropes
    }

    /// Final hidden states after the last norm: the input of the head.
    ///
    /// With a cache, `tokens` continue the cached tokens and are appended to them. Positions
    /// include padding in the cache, because rotary attention depends only on distances. If the
    /// model's rotary frequencies depend on the length, the caller prepares the cache by
    /// [`KvCache::begin`].
    ///
    /// # Shapes
    /// - `tokens`: `[batch, seq]`; result: `[batch, seq, d_model]`
    pub fn hidden_states(
        &self,
        tokens: Tensor<2, Int>,
        mut cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let [_, seq] = tokens.dims();
        let start = cache.as_ref().map_or(0, |cache| cache.n_tokens());
        let hidden = self.through(tokens, self.pass(start, seq, cache.as_deref_mut()));
        if let Some(cache) = cache {
            cache.advance(seq);
        }
        hidden
    }

    /// [`hidden_states`](Self::hidden_states) of the rows of a batch, which hold several examples
    /// each if there are `segments`.
    ///
    /// # Shapes
    /// - `tokens`: `[batch, seq]`, the sizes of the segments; result: `[batch, seq, d_model]`
    ///
    /// # Errors
    /// Returns [`Error::Interrupted`] if `task` is interrupted between two blocks.
    pub(crate) fn rows_hidden_states(
        &self,
        tokens: Tensor<2, Int>,
        segments: Option<&Segments>,
        task: &Task<'_>,
    ) -> Result<Tensor<3>> {
        let mut pass = self.pass_of(tokens.dims()[1], segments);
        let mut x = self.embed(tokens);
        for (index, block) in self.layers.iter().enumerate() {
            task.check()?;
            x = block.forward(x, index, &mut pass);
        }
        Ok(self.norm.forward(x))
    }

    /// Embeds tokens, applies the blocks and the last norm.
    fn through(&self, tokens: Tensor<2, Int>, mut pass: Pass<'_, '_>) -> Tensor<3> {
        let mut x = self.embed(tokens);
        for (index, block) in self.layers.iter().enumerate() {
            x = block.forward(x, index, &mut pass);
        }
        self.norm.forward(x)
    }

    /// Applies the head, which scores each token of the vocabulary.
    ///
    /// # Shapes
    /// - `hidden`: `[.., d_model]`; result: `[.., vocab_size]`
    pub fn logits<const D: usize>(&self, hidden: Tensor<D>) -> Tensor<D> {
        let logits = match &self.lm_head {
            Some(head) => head.forward(hidden),
            None => ops::linear(hidden, self.embed_tokens.val().transpose()),
        };
        match self.config.arch().logit_softcap {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        }
    }

    /// Logits of every position.
    ///
    /// # Shapes
    /// - `tokens`: `[batch, seq]`; result: `[batch, seq, vocab_size]`
    pub fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        self.logits(self.hidden_states(tokens, None))
    }

    /// Sum of the negative log-likelihoods of the given targets, in nats. The head is evaluated
    /// only at their positions.
    ///
    /// # Shapes
    /// - `tokens`: `[batch, seq]`; `positions`: row-major indices into it, each with the id of the
    ///   token that follows there
    /// - result: `[1]`
    ///
    /// # Errors
    /// Returns [`Error::TokenOutOfRange`] for a target outside the vocabulary, and
    /// [`Error::InvalidArgument`] if a position is outside `tokens` or if there are no positions.
    pub fn nll_sum(&self, tokens: Tensor<2, Int>, positions: &[(usize, u32)]) -> Result<Tensor<1>> {
        self.nll_at(self.hidden_states(tokens, None), positions)
    }

    /// [`nll_sum`](Self::nll_sum), starting from the final hidden states.
    ///
    /// # Shapes
    /// - `hidden`: `[batch, seq, d_model]`, after the last norm; result: `[1]`
    pub(crate) fn nll_at(
        &self,
        hidden: Tensor<3>,
        positions: &[(usize, u32)],
    ) -> Result<Tensor<1>> {
        let (hidden, targets) = self.at_positions(hidden, positions)?;
        Ok(self.nll_of_hidden(hidden, &targets))
    }

    /// Selects the final hidden states at `positions`, and returns them with their targets. The
    /// errors are those of [`nll_sum`](Self::nll_sum).
    ///
    /// # Shapes
    /// - `hidden`: `[batch, seq, d_model]`, after the last norm; result: `[n, d_model]` for `n`
    ///   positions
    pub(crate) fn at_positions(
        &self,
        hidden: Tensor<3>,
        positions: &[(usize, u32)],
    ) -> Result<(Tensor<2>, Vec<u32>)> {
        let [batch, seq, _] = hidden.dims();
        let (n_tokens, vocab_size) = (batch * seq, self.config.vocab_size());
        if positions.is_empty() {
            return Err(Error::argument("positions", "none", "at least one"));
        }
        if let Some((position, _)) = positions.iter().find(|(position, _)| *position >= n_tokens) {
            return Err(Error::argument(
                "positions",
                position,
                format!("under the number of tokens, {n_tokens}"),
            ));
        }
        if let Some((_, found)) = positions
            .iter()
            .find(|(_, target)| *target as usize >= vocab_size)
        {
            return Err(Error::TokenOutOfRange {
                found: *found,
                vocab_size,
            });
        }
        let device = hidden.device().without_autodiff();
        let hidden: Tensor<2> = hidden.flatten(0, 1);
        let rows: Vec<i32> = positions.iter().map(|(row, _)| *row as i32).collect();
        let targets: Vec<u32> = positions.iter().map(|(_, target)| *target).collect();
        Ok((
            hidden.select(0, Tensor::from_data(rows.as_slice(), &device)),
            targets,
        ))
    }

    /// Sum of the negative log-likelihoods of one target per row; see [`ops::head_loss`].
    ///
    /// # Shapes
    /// - `hidden`: `[n, d_model]`, `targets`: `n` ids of the vocabulary, at least one; result:
    ///   `[1]`
    pub(crate) fn nll_of_hidden(&self, hidden: Tensor<2>, targets: &[u32]) -> Tensor<1> {
        let ids = class_ids(targets, &hidden.device());
        ops::head_loss(
            hidden,
            self.head_weight(),
            ids,
            self.config.arch().logit_softcap,
        )
    }

    /// Distillation loss of a student against its teacher's final hidden states, and the student's
    /// negative log-likelihood; see [`ops::distilled_loss`].
    ///
    /// # Shapes
    /// - `hidden` and `teacher`: `[n, d_model]`, `targets`: `n` ids of the vocabulary, at least
    ///   one; results: `[1]`
    pub(crate) fn distilled_of_hidden(
        &self,
        hidden: Tensor<2>,
        teacher: Tensor<2>,
        targets: &[u32],
        mix: f64,
    ) -> (Tensor<1>, Tensor<1>) {
        let ids = class_ids(targets, &hidden.device());
        let softcap = self.config.arch().logit_softcap;
        ops::distilled_loss(hidden, self.head_weight(), teacher, ids, mix, softcap)
    }

    /// The weight of the head as stored, `[d_model, vocab_size]`.
    pub(crate) fn head_weight(&self) -> Tensor<2> {
        match &self.lm_head {
            Some(head) => head.stored(),
            None => self.embed_tokens.val().transpose(),
        }
    }

    /// Name and shape of each linear layer inside the blocks, in the order of computation.
    pub fn layer_shapes(&self) -> Vec<LayerShape> {
        self.linears()
            .map(|(name, layer)| {
                let [d_input, d_output] = layer.base.dims();
                LayerShape::new(name, d_input, d_output)
            })
            .collect()
    }

    /// The linear layers inside the blocks with their Hugging Face paths, in the order of
    /// computation.
    pub fn linears(&self) -> impl Iterator<Item = (String, &ElasticLoraLinear)> {
        self.layers.iter().enumerate().flat_map(|(index, block)| {
            LinearKind::ALL
                .into_iter()
                .filter_map(move |kind| Some((kind.name(index), block.linear(kind)?)))
        })
    }

    /// A linear layer, by its Hugging Face path.
    pub fn linear(&self, name: &str) -> Option<&ElasticLoraLinear> {
        let (block, kind) = LinearKind::parse(name)?;
        self.layers.get(block)?.linear(kind)
    }

    /// A linear layer, by its Hugging Face path.
    pub fn linear_mut(&mut self, name: &str) -> Option<&mut ElasticLoraLinear> {
        let (block, kind) = LinearKind::parse(name)?;
        self.layers.get_mut(block)?.linear_mut(kind)
    }

    /// Whether a linear layer, by its Hugging Face path, is present and its sub-block is enabled.
    pub fn runs(&self, name: &str) -> bool {
        let Some((block, kind)) = LinearKind::parse(name) else {
            return false;
        };
        self.layers
            .get(block)
            .is_some_and(|block| block.runs(kind.sub_block()))
    }

    /// Names of the sub-blocks that are present but disabled, such as `model.layers.3.mlp`.
    pub fn left_out(&self) -> Vec<String> {
        let parts = |(index, block): (usize, &Block)| {
            let parts = SubBlock::ALL.into_iter();
            let parts = parts.filter(|part| block.has(*part) && !block.runs(*part));
            parts.map(|part| part.name(index)).collect::<Vec<_>>()
        };
        self.layers.iter().enumerate().flat_map(parts).collect()
    }

    /// Replaces the configuration, which must describe the weights.
    pub(super) fn set_config(&mut self, config: HfConfig) {
        self.config = config;
    }

    /// Replaces the blocks and the configuration. `config` must describe `layers`.
    pub(crate) fn with_layers(self, layers: Vec<Block>, config: HfConfig) -> Self {
        Self {
            layers,
            config,
            ..self
        }
    }

    /// Runs `f` on each linear layer inside the blocks, in the order of computation.
    ///
    /// # Errors
    /// Returns the first error of `f`.
    pub fn try_for_each_linear(
        &mut self,
        mut f: impl FnMut(&str, &mut ElasticLoraLinear) -> Result<()>,
    ) -> Result<()> {
        for (index, block) in self.layers.iter_mut().enumerate() {
            for kind in LinearKind::ALL {
                if let Some(layer) = block.linear_mut(kind) {
                    f(&kind.name(index), layer)?;
                }
            }
        }
        Ok(())
    }

    /// Fails for a model with adapters, where they would be silently dropped.
    pub(crate) fn refuse_adapters(&self, reason: &'static str) -> Result<()> {
        match self.linears().find(|(_, layer)| layer.adapter.is_some()) {
            Some((layer, _)) => Err(Error::HasAdapter { layer, reason }),
            None => Ok(()),
        }
    }

    /// Counts the weights of the base without adapters: all of them, and the non-zero ones.
    pub fn count_base_params(&self) -> ParamCount {
        let mut count = ParamCount::default();
        let mut add = |values: Vec<f32>| {
            count.total += values.len();
            count.nonzero += values.iter().filter(|v| **v != 0.0).count();
        };
        add(host_values(self.embed_tokens.val()));
        add(host_values(self.norm.weight.val()));
        for block in &self.layers {
            for (_, norm) in block.norms() {
                add(host_values(norm.weight.val()));
            }
        }
        for base in self
            .linears()
            .map(|(_, layer)| &layer.base)
            .chain(&self.lm_head)
        {
            add(host_values(base.weight()));
            if let Some(bias) = &base.bias {
                add(host_values(bias.val()));
            }
        }
        count
    }
}

/// Cosines and sines of `n` positions, each with the length of the sequence that it lies in.
///
/// # Shapes
/// - results: `[n, pairs]` each
fn rotary_tables(
    rope: &Rope,
    positions: impl Iterator<Item = (usize, usize)>,
    n: usize,
    device: &Device,
) -> [Tensor<2>; 2] {
    let half = rope.half();
    let (mut cos, mut sin) = (vec![0.0; n * half], vec![0.0; n * half]);
    let rows = cos
        .chunks_exact_mut(half.max(1))
        .zip(sin.chunks_exact_mut(half.max(1)));
    positions
        .zip(rows)
        .for_each(|((position, len), (cos, sin))| rope.rotation_at(position, len, cos, sin));
    [cos, sin].map(|table| Tensor::from_data(TensorData::new(table, [n, half]), device))
}

/// Calls `make` if the part is present.
fn optional<T>(present: bool, make: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
    present.then(make).transpose()
}

/// Target ids as a tensor on the device of the hidden states.
fn class_ids(targets: &[u32], device: &Device) -> Tensor<1, Int> {
    let ids: Vec<i32> = targets.iter().map(|target| *target as i32).collect();
    Tensor::from_data(ids.as_slice(), &device.clone().without_autodiff())
}

/// Counts of weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[doc(hidden)]
pub struct ParamCount {
    /// All weights.
    pub total: usize,
    /// Weights that are not zero.
    pub nonzero: usize,
}

/// Where the tensors of a decoder come from.
struct Source<'a> {
    linear: &'a mut dyn FnMut(&str, usize, usize, bool) -> Result<BaseLinear>,
    norm: &'a mut dyn FnMut(&str, usize) -> Result<Tensor<1>>,
    embedding: &'a mut dyn FnMut(usize, usize) -> Result<Tensor<2>>,
}
