//! Generation settings.

use super::sample::SampleConfig;

/// Settings of text generation.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateConfig {
    /// Maximum number of new tokens for each prompt.
    pub max_new_tokens: usize,
    /// Tokens that end a sequence. They are not part of the output.
    pub stop_ids: Vec<u32>,
    /// Sampling settings.
    pub sample: SampleConfig,
    /// Number of prompts decoded together.
    pub batch_size: usize,
}

impl GenerateConfig {
    /// Creates settings for greedy decoding in batches of 64 prompts.
    pub fn new(max_new_tokens: usize, stop_ids: Vec<u32>) -> Self {
        Self {
            max_new_tokens,
            stop_ids,
            sample: SampleConfig::default(),
            batch_size: 64,
        }
    }

    /// Sets the sampling settings.
    pub fn with_sample(mut self, sample: SampleConfig) -> Self {
        self.sample = sample;
        self
    }

    /// Sets the number of prompts decoded together.
    pub fn with_batch_size(mut self, batch_size: usize) -> Self {
        self.batch_size = batch_size;
        self
    }
}
