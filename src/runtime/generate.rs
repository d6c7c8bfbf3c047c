//! Settings of a generation.

use super::sample::SampleConfig;

/// Settings of a generation.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateConfig {
    /// New tokens at most, for each prompt.
    pub max_new_tokens: usize,
    /// Tokens that end a sequence; they are not part of the output.
    pub stop_ids: Vec<u32>,
    /// How tokens are drawn.
    pub sample: SampleConfig,
    /// Prompts decoded together.
    pub batch_size: usize,
}

impl GenerateConfig {
    /// Greedy, in batches of 64.
    pub fn new(max_new_tokens: usize, stop_ids: Vec<u32>) -> Self {
        Self {
            max_new_tokens,
            stop_ids,
            sample: SampleConfig::default(),
            batch_size: 64,
        }
    }

    /// Sets how tokens are drawn.
    pub fn with_sample(mut self, sample: SampleConfig) -> Self {
        self.sample = sample;
        self
    }

    /// Sets how many prompts are decoded together.
    pub fn with_batch_size(mut self, batch_size: usize) -> Self {
        self.batch_size = batch_size;
        self
    }
}
