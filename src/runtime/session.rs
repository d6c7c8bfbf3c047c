//! One sequence on a [`Model`], and several of them in one go.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::kernels::Activations;
use crate::space::SubnetConfig;

use super::cache::{Cache, CacheFormat};
use super::forward::Pass;
use super::generate::GenerateConfig;
use super::model::Model;
use super::sample::Sampler;
use super::shape::Shape;
use super::workspace::{Workspace, grow};

/// Settings of a [`Session`].
#[derive(Clone, Debug, PartialEq)]
pub struct SessionConfig {
    /// Tokens that it holds at most; none for as many as the model's context.
    pub n_ctx: Option<usize>,
    /// How keys and values are kept.
    pub cache: CacheFormat,
    /// Tokens of a prompt that are processed together: more are faster, and take more memory.
    pub prefill_rows: usize,
    /// How exactly the inputs of layers with integer weights are kept.
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
    /// Sets how many tokens it holds at most.
    pub fn with_n_ctx(mut self, n_ctx: usize) -> Self {
        self.n_ctx = Some(n_ctx);
        self
    }

    /// Sets how keys and values are kept.
    pub fn with_cache(mut self, cache: CacheFormat) -> Self {
        self.cache = cache;
        self
    }

    /// Sets how many tokens of a prompt are processed together.
    pub fn with_prefill_rows(mut self, prefill_rows: usize) -> Self {
        self.prefill_rows = prefill_rows;
        self
    }

    /// Sets how exactly the inputs of layers with integer weights are kept.
    pub fn with_activations(mut self, activations: Activations) -> Self {
        self.activations = activations;
        self
    }
}

/// One sequence on a model, with its key/value cache. Many sessions share a model, from any number of threads; a session is one
/// thread's at a time.
///
/// Memory is taken when the first tokens come, and for every few hundred tokens of context; decoding a token allocates nothing.
#[derive(Debug)]
pub struct Session {
    model: Model,
    shape: Arc<Shape>,
    cache: Cache,
    work: Workspace,
    /// Of the last token, while generating.
    logits: Vec<f32>,
    n_ctx: usize,
    prefill_rows: usize,
    activations: Activations,
    cache_format: CacheFormat,
}

impl Session {
    /// An empty session on the whole model.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a context of 0 or more than the model's, or a prefill of 0 rows.
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
        let cache = Cache::new(config.cache, &shape.blocks, model.config().head_dim());
        Ok(Self {
            model: model.clone(),
            shape,
            cache,
            work: Workspace::default(),
            logits: Vec::new(),
            n_ctx,
            prefill_rows: config.prefill_rows,
            activations: config.activations,
            cache_format: config.cache,
        })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Tokens in the cache.
    pub fn position(&self) -> usize {
        self.cache.n_tokens()
    }

    /// Tokens that fit into the cache.
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// The active rank of each linear layer, in the model's order; 0 where no adapter acts.
    pub fn ranks(&self) -> &[usize] {
        &self.shape.ranks
    }

    /// Empties the cache. Its memory stays for the next tokens.
    pub fn reset(&mut self) {
        self.cache.truncate(0);
    }

    /// Forgets all tokens but the first `n_tokens`; nothing where it holds no more than that.
    pub fn truncate(&mut self, n_tokens: usize) {
        self.cache.truncate(n_tokens);
    }

    /// Makes a subnet of [`Model::subnets`] the active one. No weight moves.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a subnet that there is not; [`Error::InvalidState`] while tokens are in the cache.
    pub fn set_subnet(&mut self, subnet: usize) -> Result<()> {
        let shape = self.model.shape(subnet)?.clone();
        self.set_shape(shape)
    }

    /// Makes a subnet of [`Model::subnets`] the active one, by name.
    ///
    /// # Errors
    /// [`Error::UnknownSubnet`]; [`Error::InvalidState`] while tokens are in the cache.
    pub fn set_subnet_named(&mut self, name: &str) -> Result<()> {
        self.set_subnet(self.model.subnet_index(name)?)
    }

    /// Makes any subnet of the model's space the active one.
    ///
    /// # Errors
    /// As [`SearchSpace::validate`](crate::SearchSpace::validate); [`Error::InvalidState`] for a model without a space, or while
    /// tokens are in the cache.
    pub fn set_config(&mut self, subnet: &SubnetConfig) -> Result<()> {
        let Some(space) = self.model.space() else {
            let reason = "the model is no super-network".to_string();
            return Err(Error::InvalidState {
                what: "choosing a subnet",
                reason,
            });
        };
        let shape = Arc::new(Shape::of_subnet(&self.model.weights, space, subnet)?);
        self.set_shape(shape)
    }

    /// Sets the active rank of every linear layer, in the order of [`Model::layers`]; 0 turns an adapter off. Widths and depth stay.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] for another number of ranks, [`Error::InvalidRank`] for one over its layer's largest;
    /// [`Error::InvalidState`] while tokens are in the cache.
    pub fn set_ranks(&mut self, ranks: &[u32]) -> Result<()> {
        let shape = Arc::new(self.shape.with_ranks(&self.model.weights, ranks)?);
        self.set_shape(shape)
    }

    fn set_shape(&mut self, shape: Arc<Shape>) -> Result<()> {
        if shape == self.shape {
            return Ok(());
        }
        if self.position() > 0 {
            let n = self.position();
            let reason = format!(
                "the cache holds {n} tokens of the subnet that is active; reset the session first"
            );
            return Err(Error::InvalidState {
                what: "choosing a subnet",
                reason,
            });
        }
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
                &shape.blocks,
                self.model.config().head_dim(),
            );
        }
        self.shape = shape;
        Ok(())
    }

    fn check(&self, tokens: &[u32]) -> Result<()> {
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

    /// Appends tokens, one or many, and writes the logits after the last, where they are asked for.
    ///
    /// # Shapes
    /// - `logits`: `[vocab_size]`
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no tokens, [`Error::TokenOutOfRange`], [`Error::SequenceTooLong`], [`Error::ShapeMismatch`] for
    /// logits of another length, [`Error::OutOfMemory`]; [`Error::InvalidFile`] where a weight is not what was written. The cache is
    /// then as before.
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
        let mut logits = logits;
        let (start, rows) = (self.position(), self.prefill_rows);
        let last = (tokens.len() - 1) / rows;
        for (index, piece) in tokens.chunks(rows).enumerate() {
            let wanted = logits
                .as_mut()
                .filter(|_| index == last)
                .map(|logits| (piece.len() - 1, &mut **logits));
            if let Err(error) = self.append(piece, wanted) {
                self.truncate(start);
                return Err(error);
            }
        }
        Ok(())
    }

    /// [`decode`](Self::decode) with the logits after every token.
    ///
    /// # Shapes
    /// - `logits`: `[tokens, vocab_size]`
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
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
        // No more rows than tokens: any number may be asked for, and the product must not overflow.
        let (start, rows) = (self.position(), self.prefill_rows.min(tokens.len()));
        for (piece, logits) in tokens
            .chunks(rows)
            .zip(logits.chunks_mut(rows * vocab_size))
        {
            if let Err(error) = self.append(piece, Some((0, logits))) {
                self.truncate(start);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Appends tokens that were checked; logits are those from a row on.
    fn append(&mut self, tokens: &[u32], wanted: Option<(usize, &mut [f32])>) -> Result<()> {
        let n = tokens.len();
        self.cache.reserve(self.position() + n)?;
        let cache = &self.cache;
        let pass = Pass {
            weights: &self.model.weights,
            shape: &self.shape,
            pool: &self.model.pool,
            activations: self.activations,
            caches: &|_| cache,
            n_seqs: 1,
            n,
        };
        pass.blocks(tokens, &mut self.work)?;
        if let Some((first, logits)) = wanted {
            pass.logits(first..n, &mut self.work, logits)?;
        }
        self.cache.advance(n);
        Ok(())
    }

    /// Continues `prompt`, which is appended to what the session holds. Each new token is shown to `on_token` at once; `false` from it
    /// ends the generation. A stop token ends it too and is not part of the output, and so does the end of the context.
    ///
    /// # Errors
    /// As [`decode`](Self::decode), and [`SampleConfig::validate`](super::SampleConfig::validate).
    pub fn generate(
        &mut self,
        prompt: &[u32],
        config: &GenerateConfig,
        mut on_token: impl FnMut(u32) -> bool,
    ) -> Result<Vec<u32>> {
        let mut sampler = Sampler::new(&config.sample, 0)?;
        let mut output = Vec::new();
        grow(&mut self.logits, self.model.config().vocab_size(), 0.0)?;
        let mut logits = std::mem::take(&mut self.logits);
        let mut step = || -> Result<()> {
            self.decode(prompt, Some(&mut logits))?;
            while output.len() < config.max_new_tokens {
                let next = sampler.next(&logits);
                if config.stop_ids.contains(&next) {
                    break;
                }
                output.push(next);
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

/// Appends one token to each of several sessions on one model, all with the same subnet: the weights are read once for all of them.
///
/// # Shapes
/// - `tokens`: one for each session; `logits`: `[sessions, vocab_size]`, after each session's token
///
/// # Errors
/// [`Error::ShapeMismatch`] for other numbers of tokens or logits; [`Error::InvalidState`] where the sessions' models, subnets or
/// precisions differ; otherwise as [`Session::decode`]. No session's cache has changed then.
pub fn decode_batch(
    sessions: &mut [&mut Session],
    tokens: &[u32],
    logits: &mut [f32],
) -> Result<()> {
    let n = sessions.len();
    let Some((first, others)) = sessions.split_first() else {
        return Ok(());
    };
    let vocab_size = first.model.config().vocab_size();
    if tokens.len() != n || logits.len() != n * vocab_size {
        return Err(Error::ShapeMismatch {
            what: "tokens and logits of a batch".into(),
            expected: vec![n, n * vocab_size],
            found: vec![tokens.len(), logits.len()],
        });
    }
    let same = |other: &Session| {
        Arc::ptr_eq(&first.model.weights, &other.model.weights)
            && first.shape == other.shape
            && first.activations == other.activations
    };
    if let Some(index) = others.iter().position(|other| !same(other)) {
        let reason = format!(
            "session {} is on another model or subnet than session 0",
            index + 1
        );
        return Err(Error::InvalidState {
            what: "decoding a batch",
            reason,
        });
    }
    for (session, token) in sessions.iter().zip(tokens) {
        session.check(std::slice::from_ref(token))?;
    }
    for session in sessions.iter_mut() {
        let room = session.position() + 1;
        session.cache.reserve(room)?;
    }
    let mut work = std::mem::take(&mut sessions[0].work);
    let result = run_batch(sessions, tokens, &mut work, logits);
    sessions[0].work = work;
    result?;
    sessions
        .iter_mut()
        .for_each(|session| session.cache.advance(1));
    Ok(())
}

fn run_batch(
    sessions: &[&mut Session],
    tokens: &[u32],
    work: &mut Workspace,
    logits: &mut [f32],
) -> Result<()> {
    let first = &sessions[0];
    let pass = Pass {
        weights: &first.model.weights,
        shape: &first.shape,
        pool: &first.model.pool,
        activations: first.activations,
        caches: &|index| &sessions[index].cache,
        n_seqs: sessions.len(),
        n: 1,
    };
    pass.blocks(tokens, work)?;
    pass.logits(0..sessions.len(), work, logits)
}
