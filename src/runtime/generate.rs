//! Generation settings.

use super::sample::SampleConfig;

/// Settings of text generation.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateConfig {
    /// Maximum number of new tokens for each prompt.
    pub max_new_tokens: usize,
    /// Tokens that end a sequence. They are not part of the output.
    pub stop_ids: Vec<u32>,
    /// Number of tokens that may be drawn, the first ones; `None` for all. Vocabularies are often
    /// padded with rows that stand for no token ([`TextTokenizer::n_ids`]). A
    /// [`Session`](super::Session) leaves those of its model's tokenizer out by itself.
    ///
    /// [`TextTokenizer::n_ids`]: crate::data::TextTokenizer::n_ids
    pub n_ids: Option<usize>,
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
            n_ids: None,
            sample: SampleConfig::default(),
            batch_size: 64,
        }
    }

    /// The logits of the tokens that may be drawn.
    pub(crate) fn drawable<'a>(&self, logits: &'a [f32]) -> &'a [f32] {
        let n = self
            .n_ids
            .unwrap_or(logits.len())
            .clamp(1, logits.len().max(1));
        logits.get(..n).unwrap_or(logits)
    }

    setters! {
        with_n_ids(n_ids: Option<usize>);
        with_sample(sample: SampleConfig);
        with_batch_size(batch_size: usize);
    }
}
