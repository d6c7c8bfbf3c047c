//! Decoding of one sequence on a Burn device.

use super::Decoder;
use crate::error::{Error, Result};
use crate::nn::{KvCache, host_values};
use crate::runtime::{GenerateConfig, Sampler};

/// One sequence decoded by a [`Decoder`] with a key/value cache, on any Burn device. Many sessions
/// can share a model. On the CPU, [`Session`](crate::runtime::Session) does the same faster and
/// with compressed weights.
#[derive(Clone, Debug)]
pub struct DeviceSession {
    model: Decoder,
    /// The tokens of the sequence, which must be computed again when the length passes the limit
    /// of a LongRoPE. The cache may hold fewer of them.
    tokens: Vec<u32>,
    cache: KvCache,
}

impl DeviceSession {
    /// Creates an empty session on the model with its currently active subnet. The weights are
    /// shared, not copied.
    pub fn new(model: &Decoder) -> Self {
        Self {
            model: model.clone(),
            tokens: Vec::new(),
            cache: KvCache::new(model.config().num_hidden_layers()),
        }
    }

    /// Number of tokens in the session.
    pub fn position(&self) -> usize {
        self.tokens.len()
    }

    /// Drops all tokens.
    pub fn reset(&mut self) {
        self.tokens.clear();
        self.cache = KvCache::new(self.model.config().num_hidden_layers());
    }

    /// Appends one or more tokens and returns the logits after the last, `[vocab_size]`.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if there are no tokens, [`Error::TokenOutOfRange`] if one
    /// is outside the vocabulary, and [`Error::SequenceTooLong`] if the context would be exceeded.
    /// The session then holds the same tokens as before.
    pub fn decode(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let max = self.model.config().max_position_embeddings();
        let found = self.position() + tokens.len();
        if found > max {
            return Err(Error::SequenceTooLong {
                what: "session".into(),
                found,
                max,
            });
        }
        // Checks the tokens.
        let mut ids = self.model.tokens(tokens, 1)?;
        self.tokens.extend_from_slice(tokens);
        self.cache.begin(found, self.model.ropes());
        let held = self.cache.n_tokens();
        if held + tokens.len() < found {
            ids = self.model.tokens(&self.tokens[held..], 1)?;
        }
        let hidden = self.model.hidden_states(ids, Some(&mut self.cache));
        let last = hidden.narrow(1, found - held - 1, 1);
        Ok(host_values(self.model.logits(last)))
    }

    /// Appends `prompt` to the session's sequence and continues it. `on_token` receives each new
    /// token immediately and ends the generation by returning `false`. A stop token also ends it
    /// and is not part of the output.
    ///
    /// # Errors
    /// Returns the errors of [`decode`](Self::decode) and
    /// [`SampleConfig::validate`](crate::runtime::SampleConfig::validate).
    pub fn generate(
        &mut self,
        prompt: &[u32],
        config: &GenerateConfig,
        mut on_token: impl FnMut(u32) -> bool,
    ) -> Result<Vec<u32>> {
        let mut sampler = Sampler::new(&config.sample, 0)?;
        let mut output = Vec::new();
        let mut logits = self.decode(prompt)?;
        sampler.observe(prompt);
        while output.len() < config.max_new_tokens {
            let next = sampler.next(config.drawable(&logits));
            if config.stop_ids.contains(&next) {
                break;
            }
            output.push(next);
            sampler.accept(next);
            let full = self.position() == self.model.config().max_position_embeddings();
            if !on_token(next) || full || output.len() == config.max_new_tokens {
                break;
            }
            logits = self.decode(&[next])?;
        }
        Ok(output)
    }
}
