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
    cache: KvCache,
}

impl DeviceSession {
    /// Creates an empty session on the model with its currently active subnet. The weights are
    /// shared, not copied.
    pub fn new(model: &Decoder) -> Self {
        Self {
            model: model.clone(),
            cache: KvCache::new(model.config().num_hidden_layers()),
        }
    }

    /// Number of tokens in the cache.
    pub fn position(&self) -> usize {
        self.cache.n_tokens()
    }

    /// Empties the cache.
    pub fn reset(&mut self) {
        self.cache = KvCache::new(self.model.config().num_hidden_layers());
    }

    /// Appends one or more tokens and returns the logits after the last, `[vocab_size]`.
    ///
    /// # Errors
    /// Returns [`Error::ShapeMismatch`] if there are no tokens, [`Error::TokenOutOfRange`] if one
    /// is outside the vocabulary, and [`Error::SequenceTooLong`] if the context would be exceeded.
    /// The cache is then unchanged.
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
        let ids = self.model.tokens(tokens, 1)?;
        let hidden = self.model.hidden_states(ids, Some(&mut self.cache));
        Ok(host_values(self.model.logits(hidden.narrow(
            1,
            tokens.len() - 1,
            1,
        ))))
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
        while output.len() < config.max_new_tokens {
            let next = sampler.next(&logits);
            if config.stop_ids.contains(&next) {
                break;
            }
            output.push(next);
            let full = self.position() == self.model.config().max_position_embeddings();
            if !on_token(next) || full || output.len() == config.max_new_tokens {
                break;
            }
            logits = self.decode(&[next])?;
        }
        Ok(output)
    }
}
