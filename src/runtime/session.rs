//! A [`Session`], which is one sequence on a [`Model`].

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::kernels::Activations;
use crate::progress::{Progress, Silent};
use crate::space::SubnetConfig;

use super::adapter::{Active, Adapter};
use super::batch::Watch;
use super::cache::{Cache, CacheFormat};
use super::draft::Draft;
use super::forward::{Pass, Setting};
use super::generate::GenerateConfig;
use super::model::Model;
use super::sample::Sampler;
use super::shape::Shape;
use super::workspace::{Workspace, grow};

/// Number of tokens for which a session makes room to note them at a time, at least.
const NOTED: usize = 256;

/// Settings of a [`Session`].
#[derive(Clone, Debug, PartialEq)]
pub struct SessionConfig {
    /// Maximum number of tokens in the session; `None` uses the model's context size.
    pub n_ctx: Option<usize>,
    /// Storage format of keys and values.
    pub cache: CacheFormat,
    /// Number of prompt tokens processed together. More are faster and take more memory.
    pub prefill_rows: usize,
    /// Precision to which inputs are quantized before multiplication with integer weights.
    pub activations: Activations,
}

impl Default for SessionConfig {
    fn default() -> Self {
        Self {
            n_ctx: None,
            cache: CacheFormat::default(),
            prefill_rows: 256,
            activations: Activations::default(),
        }
    }
}

impl SessionConfig {
    /// Sets the maximum number of tokens in the session.
    pub fn with_n_ctx(mut self, n_ctx: usize) -> Self {
        self.n_ctx = Some(n_ctx);
        self
    }

    /// Sets the storage format of keys and values.
    pub fn with_cache(mut self, cache: CacheFormat) -> Self {
        self.cache = cache;
        self
    }

    /// Sets the number of prompt tokens processed together.
    pub fn with_prefill_rows(mut self, prefill_rows: usize) -> Self {
        self.prefill_rows = prefill_rows;
        self
    }

    /// Sets the precision to which inputs are quantized before multiplication with integer weights.
    pub fn with_activations(mut self, activations: Activations) -> Self {
        self.activations = activations;
        self
    }
}

/// Number of tokens whose logits are held at once where only log-likelihoods are wanted.
const SCORED_ROWS: usize = 64;

/// Returns the logarithm of the softmax of `logits` at `token`.
fn log_likelihood(logits: &[f32], token: usize) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // Partial sums in f32, so that the exponentials can be computed several at a time.
    let sum: f64 = logits
        .chunks(256)
        .map(|part| f64::from(part.iter().map(|logit| (logit - max).exp()).sum::<f32>()))
        .sum();
    logits[token] - max - sum.ln() as f32
}

/// One sequence on a model, with its key/value cache. Many sessions can share a model, from any
/// number of threads; each session is used by one thread at a time.
///
/// Memory is allocated for the first tokens, and then once per few hundred tokens of context. Apart
/// from that, decoding a token does not allocate. Layers with a sliding window keep little more than
/// their window, so their memory does not grow with the context.
///
/// A session also keeps its tokens, because keys and values must sometimes be computed again: when
/// the sequence passes the length at which a model with LongRoPE changes its frequencies, and when
/// [`truncate`](Self::truncate) goes back behind what a layer with a window still keeps. The next
/// call that appends tokens then takes as long as if it were given all tokens.
#[derive(Debug)]
pub struct Session {
    model: Model,
    shape: Arc<Shape>,
    /// Adapters that were loaded at run time, with their scales.
    adapters: Vec<(Adapter, f32)>,
    /// Their updates, if there are any.
    active: Option<Arc<Active>>,
    watch: Option<Watch>,
    /// The tokens of the sequence. The cache may hold fewer of them, but never others.
    tokens: Vec<u32>,
    pub(super) cache: Cache,
    work: Workspace,
    /// Logits of the last token, during generation.
    logits: Vec<f32>,
    n_ctx: usize,
    prefill_rows: usize,
    activations: Activations,
    pub(super) cache_format: CacheFormat,
    pub(super) draft: Option<Box<Draft>>,
}

impl Session {
    /// Creates an empty session on the whole model.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if the context size is 0 or larger than the model's, or
    /// if `prefill_rows` is 0.
    pub fn new(model: &Model, config: &SessionConfig) -> Result<Self> {
        let max = model.config().max_position_embeddings();
        let n_ctx = config.n_ctx.unwrap_or(max);
        if n_ctx == 0 || n_ctx > max {
            return Err(Error::argument(
                "n_ctx",
                n_ctx,
                format!("in 1..={max}, the model's context"),
            ));
        }
        if config.prefill_rows == 0 {
            return Err(Error::argument("prefill_rows", 0, "at least 1"));
        }
        let shape = model.shape(0)?.clone();
        let rows = config.prefill_rows;
        let arch = model.config().arch();
        let cache = Cache::new(config.cache, arch, &shape.blocks, rows, n_ctx);
        Ok(Self {
            model: model.clone(),
            shape,
            adapters: Vec::new(),
            active: None,
            watch: None,
            tokens: Vec::new(),
            cache,
            work: Workspace::default(),
            logits: Vec::new(),
            n_ctx,
            prefill_rows: config.prefill_rows,
            activations: config.activations,
            cache_format: config.cache,
            draft: None,
        })
    }

    /// The model that the session runs on.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Number of tokens in the session.
    pub fn position(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens in the session.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Maximum number of tokens in the session.
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// Number of bytes allocated for keys and values.
    pub fn cache_bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Active rank of each linear layer, in the model's order; 0 if no adapter is active.
    pub fn ranks(&self) -> &[usize] {
        &self.shape.ranks
    }

    /// The adapters that the session uses beside those of the model, with their scales.
    pub fn adapters(&self) -> &[(Adapter, f32)] {
        &self.adapters
    }

    /// Uses these adapters, each with a factor of its update, in place of those that were set
    /// before; none for the model alone. Adapters that belong to the model stay as the subnet has
    /// them. With one adapter on a layer no number is copied; several are put together for the
    /// session.
    ///
    /// # Errors
    /// Returns [`Error::UnknownLayer`] or [`Error::TensorShape`] if an adapter is for another model,
    /// [`Error::InvalidArgument`] if a scale is not finite, and [`Error::InvalidState`] if the
    /// adapters would change while the session holds tokens, whose keys and values belong to the
    /// adapters of before.
    pub fn set_adapters(&mut self, adapters: &[(Adapter, f32)]) -> Result<()> {
        let pairs = || adapters.iter().zip(&self.adapters);
        let same = |((one, scale), (other, before)): (&(Adapter, f32), &(Adapter, f32))| {
            one.same(other) && scale.to_bits() == before.to_bits()
        };
        if adapters.len() == self.adapters.len() && pairs().all(same) {
            return Ok(());
        }
        let active = self.active_for(&self.shape, adapters)?;
        self.check_empty("choosing adapters")?;
        self.active = active;
        self.adapters = adapters.to_vec();
        Ok(())
    }

    fn active_for(
        &self,
        shape: &Shape,
        adapters: &[(Adapter, f32)],
    ) -> Result<Option<Arc<Active>>> {
        if adapters.is_empty() {
            return Ok(None);
        }
        let active = Active::new(&self.model.weights, shape, adapters)?;
        Ok(Some(Arc::new(active)))
    }

    /// Refuses a change of what computed the tokens that the session holds.
    fn check_empty(&self, what: &'static str) -> Result<()> {
        let n = self.position();
        if n == 0 {
            return Ok(());
        }
        let of = match what {
            "choosing adapters" => "adapters that are active",
            _ => "subnet that is active",
        };
        let reason = format!("the session holds {n} tokens of the {of}; reset it first");
        Err(Error::InvalidState { what, reason })
    }

    /// Sets what is asked, between the blocks of the model, whether to go on; `None` for nothing.
    /// A call that is interrupted returns [`Error::Interrupted`], and the session holds the same
    /// tokens as before.
    pub fn set_progress(&mut self, progress: Option<Arc<dyn Progress + Send + Sync>>) {
        self.watch = progress.map(Watch);
    }

    /// Lets another session propose up to `n_tokens` tokens at a time in [`generate`](Self::generate),
    /// which checks them in one pass; `None` for no draft. The session draws every token by itself, so
    /// the output is the same as without, up to the rounding of sums: a pass over several rows may add
    /// in another order (AVX2), which decides between logits that are all but equal. It comes sooner if
    /// the draft is much faster and often right, such as a small subnet of the same supernet. The draft
    /// follows the session's tokens by itself.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if `n_tokens` is 0 or over 7, if the draft's vocabulary has
    /// another size, or if the draft has a draft.
    pub fn set_draft(&mut self, draft: Option<Session>, n_tokens: usize) -> Result<()> {
        let vocab_size = self.model.config().vocab_size();
        self.draft = draft
            .map(|draft| Draft::new(draft, n_tokens, vocab_size).map(Box::new))
            .transpose()?;
        Ok(())
    }

    /// Number of tokens that the draft has proposed, and of those that the session drew too.
    pub fn draft_counts(&self) -> [u64; 2] {
        self.draft.as_ref().map_or([0; 2], |draft| draft.counts)
    }

    pub(super) fn progress(&self) -> &dyn Progress {
        match &self.watch {
            Some(watch) => &*watch.0,
            None => &Silent,
        }
    }

    pub(super) fn shape(&self) -> &Shape {
        &self.shape
    }

    pub(super) fn activations(&self) -> Activations {
        self.activations
    }

    pub(super) fn prefill_rows(&self) -> usize {
        self.prefill_rows
    }

    pub(super) fn workspace(&mut self) -> &mut Workspace {
        &mut self.work
    }

    /// Returns whether both sessions can go through the model in one pass: whether they multiply by
    /// the same weights. Their ranks and adapters may differ.
    pub(super) fn goes_with(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.model.weights, &other.model.weights)
            && self.shape.shares_weights(&other.shape)
            && self.activations == other.activations
    }

    /// Returns whether both sessions, which go together, have the same ranks and adapters.
    pub(super) fn is_set_like(&self, other: &Self) -> bool {
        let pairs = self.adapters.iter().zip(&other.adapters);
        let same = |((one, scale), (other, other_scale)): (&(Adapter, f32), &(Adapter, f32))| {
            one.same(other) && scale.to_bits() == other_scale.to_bits()
        };
        self.shape.ranks == other.shape.ranks
            && self.adapters.len() == other.adapters.len()
            && pairs.into_iter().all(same)
    }

    /// Notes tokens that are being computed. There is room for them.
    pub(super) fn note(&mut self, tokens: &[u32]) {
        self.tokens.extend_from_slice(tokens);
    }

    /// Takes tokens whose keys and values are in the cache.
    pub(super) fn set_tokens(&mut self, tokens: Vec<u32>) {
        self.tokens = tokens;
    }

    /// Returns a session like this one with another cache, which holds the same tokens.
    pub(super) fn with_cache(&self, cache: Cache) -> Self {
        Self {
            model: self.model.clone(),
            shape: self.shape.clone(),
            adapters: self.adapters.clone(),
            active: self.active.clone(),
            watch: None,
            tokens: self.tokens.clone(),
            cache,
            work: Workspace::default(),
            logits: Vec::new(),
            n_ctx: self.n_ctx,
            prefill_rows: self.prefill_rows,
            activations: self.activations,
            cache_format: self.cache_format,
            draft: self.draft.as_ref().map(|draft| Box::new(draft.copy())),
        }
    }

    /// The setting of rows of this session in a pass.
    pub(super) fn setting(&self, rows: usize) -> Setting<'_> {
        Setting {
            rows,
            shape: &self.shape,
            active: self.active.as_deref(),
        }
    }

    /// Drops all tokens. Their memory is kept for the next ones.
    pub fn reset(&mut self) {
        self.truncate(0);
    }

    /// Drops all tokens but the first `n_tokens`. Does nothing if the session holds no more than
    /// that.
    ///
    /// Takes no time, but if a layer with a sliding window no longer keeps the positions that the
    /// next token would see, the next call that appends tokens computes all of them again. The last
    /// `prefill_rows` tokens or so can be dropped without that.
    pub fn truncate(&mut self, n_tokens: usize) {
        self.tokens.truncate(n_tokens);
        self.cache.truncate(n_tokens);
    }

    /// Activates a subnet by its index in [`Model::subnets`]. No weights are copied.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if there is no such subnet, and [`Error::InvalidState`]
    /// if the subnet would change while it holds tokens.
    pub fn set_subnet(&mut self, subnet: usize) -> Result<()> {
        let shape = self.model.shape(subnet)?.clone();
        self.set_shape(shape)
    }

    /// Activates a subnet of [`Model::subnets`] by name.
    ///
    /// # Errors
    /// Returns [`Error::UnknownSubnet`] if there is no subnet of that name, and
    /// [`Error::InvalidState`] if the subnet would change while it holds tokens.
    pub fn set_subnet_named(&mut self, name: &str) -> Result<()> {
        self.set_subnet(self.model.subnet_index(name)?)
    }

    /// Activates any subnet of the model's search space.
    ///
    /// # Errors
    /// Returns the errors of [`SearchSpace::validate`](crate::SearchSpace::validate), and
    /// [`Error::InvalidState`] if the model has no search space, or if the subnet would change
    /// while it holds tokens.
    pub fn set_config(&mut self, subnet: &SubnetConfig) -> Result<()> {
        let Some(space) = self.model.space() else {
            let reason = "the model is no supernet".to_string();
            return Err(Error::InvalidState {
                what: "choosing a subnet",
                reason,
            });
        };
        let shape = Arc::new(Shape::of_subnet(&self.model.weights, space, subnet)?);
        self.set_shape(shape)
    }

    /// Sets the active rank of every linear layer, in the order of [`Model::layers`]; rank 0
    /// disables an adapter. Widths and depth do not change.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if the number of ranks differs from the number of layers,
    /// [`Error::InvalidRank`] if a rank is larger than the layer's largest, and
    /// [`Error::InvalidState`] if a rank would change while it holds tokens.
    pub fn set_ranks(&mut self, ranks: &[u32]) -> Result<()> {
        let shape = Arc::new(self.shape.with_ranks(&self.model.weights, ranks)?);
        self.set_shape(shape)
    }

    fn set_shape(&mut self, shape: Arc<Shape>) -> Result<()> {
        if shape == self.shape {
            return Ok(());
        }
        self.check_empty("choosing a subnet")?;
        self.active = self.active_for(&shape, &self.adapters)?;
        let heads = |shape: &Shape| {
            shape
                .blocks
                .iter()
                .map(|block| block.n_kv_heads)
                .collect::<Vec<_>>()
        };
        if heads(&shape) != heads(&self.shape) {
            self.cache = Cache::new(
                self.cache_format,
                self.model.config().arch(),
                &shape.blocks,
                self.prefill_rows,
                self.n_ctx,
            );
        }
        self.shape = shape;
        Ok(())
    }

    pub(super) fn check(&self, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::argument("tokens", "none", "at least one"));
        }
        let found = self.position().saturating_add(tokens.len());
        if found > self.n_ctx {
            return Err(Error::SequenceTooLong {
                what: "session".into(),
                found,
                max: self.n_ctx,
            });
        }
        let vocab_size = self.model.config().vocab_size();
        match tokens.iter().find(|id| **id as usize >= vocab_size) {
            Some(found) => Err(Error::TokenOutOfRange {
                found: *found,
                vocab_size,
            }),
            None => Ok(()),
        }
    }

    /// Appends one or more tokens, and writes the logits after the last one if `logits` is given.
    ///
    /// # Shapes
    /// - `logits`: `[vocab_size]`
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if there are no tokens, [`Error::TokenOutOfRange`] if a
    /// token is not in the vocabulary, [`Error::SequenceTooLong`] if the session has no room for
    /// all tokens, [`Error::ShapeMismatch`] if `logits` has another length, [`Error::OutOfMemory`]
    /// if memory runs out, and [`Error::InvalidFile`] if the contents of a weight are damaged. The
    /// session then holds the same tokens as before.
    pub fn decode(&mut self, tokens: &[u32], logits: Option<&mut [f32]>) -> Result<()> {
        self.check(tokens)?;
        let vocab_size = self.model.config().vocab_size();
        if let Some(logits) = logits.as_ref().filter(|logits| logits.len() != vocab_size) {
            return Err(Error::ShapeMismatch {
                what: "logits".into(),
                expected: vec![vocab_size],
                found: vec![logits.len()],
            });
        }
        let first = tokens.len() - usize::from(logits.is_some());
        self.extend(tokens, first, logits.unwrap_or_default())
    }

    /// Appends tokens like [`decode`](Self::decode), and writes the logits after every token.
    ///
    /// # Shapes
    /// - `logits`: `[tokens, vocab_size]`
    ///
    /// # Errors
    /// Returns the same errors as [`decode`](Self::decode).
    pub fn decode_all(&mut self, tokens: &[u32], logits: &mut [f32]) -> Result<()> {
        self.check(tokens)?;
        let vocab_size = self.model.config().vocab_size();
        if logits.len() != tokens.len() * vocab_size {
            return Err(Error::ShapeMismatch {
                what: "logits".into(),
                expected: vec![tokens.len(), vocab_size],
                found: vec![logits.len()],
            });
        }
        self.extend(tokens, 0, logits)
    }

    /// Appends tokens like [`decode`](Self::decode), and returns the log-likelihood of each of
    /// `tokens[1..]`, given all tokens before it: the natural logarithm of its probability.
    ///
    /// Memory is needed for the logits of a few tokens only.
    ///
    /// # Errors
    /// Returns the same errors as [`decode`](Self::decode).
    pub fn log_likelihoods(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        self.check(tokens)?;
        let start = self.position();
        self.catch_up(tokens.len())?;
        self.tokens.extend_from_slice(tokens);
        let mut logits = std::mem::take(&mut self.logits);
        let result = self.score(tokens, &mut logits);
        self.logits = logits;
        if result.is_err() {
            self.truncate(start);
        }
        result
    }

    /// Adds tokens to the cache and returns the log-likelihoods of `tokens[1..]`, with memory for
    /// logits in `logits`.
    fn score(&mut self, tokens: &[u32], logits: &mut Vec<f32>) -> Result<Vec<f32>> {
        let vocab_size = self.model.config().vocab_size();
        let rows = self.prefill_rows.min(SCORED_ROWS).min(tokens.len());
        grow(logits, rows * vocab_size, 0.0)?;
        let mut following = tokens.iter().skip(1);
        let mut out = Vec::with_capacity(tokens.len() - 1);
        for piece in tokens.chunks(rows) {
            let logits = &mut logits[..piece.len() * vocab_size];
            self.append(piece, 0, logits)?;
            for (row, next) in logits.chunks_exact(vocab_size).zip(&mut following) {
                out.push(log_likelihood(row, *next as usize));
            }
        }
        Ok(out)
    }

    /// Appends tokens that were checked, and writes the logits after each of `tokens[first..]`.
    fn extend(&mut self, tokens: &[u32], first: usize, logits: &mut [f32]) -> Result<()> {
        let start = self.position();
        self.catch_up(tokens.len())?;
        self.tokens.extend_from_slice(tokens);
        let result = self.append(tokens, first, logits);
        if result.is_err() {
            self.truncate(start);
        }
        result
    }

    /// Computes the keys and values of those tokens of the session that the cache does not hold, or
    /// holds for a sequence of another length than with `n` more tokens, and makes room to note
    /// `n` more tokens.
    pub(super) fn catch_up(&mut self, n: usize) -> Result<()> {
        let room = self.tokens.capacity() - self.tokens.len();
        if room < n {
            let fail = |_| Error::OutOfMemory {
                what: "the tokens of a session",
                bytes: n * size_of::<u32>(),
            };
            self.tokens.try_reserve(n.max(NOTED)).map_err(fail)?;
        }
        let ropes = &self.model.weights.ropes;
        self.cache.begin(self.tokens.len() + n, ropes);
        if self.cache.n_tokens() == self.tokens.len() {
            return Ok(());
        }
        // Taken out for the call, which borrows the session.
        let tokens = std::mem::take(&mut self.tokens);
        let missing = &tokens[self.cache.n_tokens()..];
        let result = self.append(missing, missing.len(), &mut []);
        self.tokens = tokens;
        result
    }

    /// Adds tokens to the cache, `prefill_rows` at a time, and writes the logits after each of
    /// `tokens[first..]`.
    fn append(&mut self, tokens: &[u32], first: usize, logits: &mut [f32]) -> Result<()> {
        let vocab_size = self.model.config().vocab_size();
        let (mut start, mut logits) = (0, logits);
        for piece in tokens.chunks(self.prefill_rows) {
            let n = piece.len();
            self.cache.reserve(self.cache.n_tokens() + n)?;
            let cache = &self.cache;
            let pass = Pass {
                weights: &self.model.weights,
                settings: &[Setting {
                    rows: n,
                    shape: &self.shape,
                    active: self.active.as_deref(),
                }],
                pool: &self.model.pool,
                activations: self.activations,
                caches: &|_| cache,
                lens: &[n],
                progress: match &self.watch {
                    Some(watch) => &*watch.0,
                    None => &Silent,
                },
            };
            pass.blocks(piece, &mut self.work)?;
            let wanted = first.saturating_sub(start).min(n)..n;
            if !wanted.is_empty() {
                let (these, others) = logits.split_at_mut(wanted.len() * vocab_size);
                pass.logits(wanted, &mut self.work, these)?;
                logits = others;
            }
            self.cache.advance(n);
            start += n;
        }
        Ok(())
    }

    /// Appends `prompt` and generates tokens from there.
    ///
    /// Each new token is passed to `on_token` immediately; the generation ends if it returns
    /// `false`. It also ends at a stop token, which is not part of the output, at `max_new_tokens`,
    /// and when the context is full. Unless a stop token ended the generation, the last token of
    /// the output is not yet in the session.
    ///
    /// # Errors
    /// Returns the errors of [`decode`](Self::decode) and of
    /// [`SampleConfig::validate`](super::SampleConfig::validate).
    pub fn generate(
        &mut self,
        prompt: &[u32],
        config: &GenerateConfig,
        mut on_token: impl FnMut(u32) -> bool,
    ) -> Result<Vec<u32>> {
        if let Some(mut draft) = self.draft.take() {
            let output = self.generate_with(&mut draft, prompt, config, on_token);
            self.draft = Some(draft);
            return output;
        }
        let mut sampler = Sampler::new(&config.sample, 0)?;
        let n_ids = self.model.n_ids();
        let mut output = Vec::new();
        grow(&mut self.logits, self.model.config().vocab_size(), 0.0)?;
        let mut logits = std::mem::take(&mut self.logits);
        let mut step = || -> Result<()> {
            self.decode(prompt, Some(&mut logits))?;
            sampler.observe(self.tokens());
            while output.len() < config.max_new_tokens {
                let drawn = config.drawable(&logits);
                let next = sampler.next(&drawn[..n_ids.min(drawn.len())]);
                if config.stop_ids.contains(&next) {
                    break;
                }
                output.push(next);
                sampler.accept(next);
                let full = self.position() == self.n_ctx;
                if !on_token(next) || full || output.len() == config.max_new_tokens {
                    break;
                }
                self.decode(&[next], Some(&mut logits))?;
            }
            Ok(())
        };
        let result = step();
        self.logits = logits;
        result.map(|()| output)
    }
}
