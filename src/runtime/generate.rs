//! Generation settings.

use super::batch::decode_batch;
use super::sample::{SampleConfig, Sampler};
use super::session::Session;
use crate::error::{Error, Result};
use crate::progress::{Progress, Task};

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

/// A sequence that is being generated.
struct Running {
    /// Index of its session and of its prompt.
    at: [usize; 2],
    sampler: Sampler,
    output: Vec<u32>,
}

/// Continues prompts like [`Session::generate`], as many at a time as there are sessions; the
/// weights are read once for all of them. The sessions are emptied first, and have to be on one
/// model with the same subnet. Returns the new tokens of each prompt. Sequence `i` draws with
/// stream `i` of the seed, whatever the number of sessions is.
///
/// # Errors
/// Returns [`Error::InvalidArgument`] if there are prompts and no sessions, and the errors of
/// [`Session::generate`], [`decode_batch`] and of an interruption.
pub fn generate_many(
    sessions: &mut [Session],
    prompts: &[Vec<u32>],
    config: &GenerateConfig,
    progress: &dyn Progress,
) -> Result<Vec<Vec<u32>>> {
    let mut outputs = vec![Vec::new(); prompts.len()];
    let Some(first) = sessions.first() else {
        return match prompts.is_empty() {
            true => Ok(outputs),
            false => Err(Error::argument("sessions", "none", "at least one")),
        };
    };
    let (vocab_size, n_ids) = (first.model().config().vocab_size(), first.model().n_ids());
    let mut task = Task::begin(progress, "generate", prompts.len(), "sequences")?;
    let mut logits = vec![0.0; vocab_size * sessions.len().min(prompts.len())];
    let mut free: Vec<usize> = (0..sessions.len()).rev().collect();
    let mut waiting = prompts.iter().enumerate();
    let mut running: Vec<Running> = Vec::new();
    // Draws a token. Returns whether the sequence goes on.
    let draw = |sequence: &mut Running, logits: &[f32], full: bool| -> bool {
        let drawn = config.drawable(logits);
        let next = sequence.sampler.next(&drawn[..n_ids.min(drawn.len())]);
        if config.stop_ids.contains(&next) {
            return false;
        }
        sequence.output.push(next);
        !full && sequence.output.len() < config.max_new_tokens
    };
    loop {
        while let Some(slot) = free.pop() {
            let Some((index, prompt)) = waiting.next() else {
                break;
            };
            let session = &mut sessions[slot];
            session.reset();
            let row = &mut logits[..vocab_size];
            session.decode(prompt, Some(&mut *row))?;
            let mut sequence = Running {
                at: [slot, index],
                sampler: Sampler::new(&config.sample, index as u64)?,
                output: Vec::new(),
            };
            let full = session.position() == session.n_ctx();
            if config.max_new_tokens > 0 && draw(&mut sequence, row, full) {
                running.push(sequence);
            } else {
                outputs[index] = sequence.output;
                free.push(slot);
                task.step("")?;
            }
            task.check()?;
        }
        if running.is_empty() {
            return Ok(outputs);
        }
        running.sort_by_key(|sequence| sequence.at[0]);
        let mut slots = running.iter().map(|sequence| sequence.at[0]).peekable();
        let mut active: Vec<&mut Session> = sessions
            .iter_mut()
            .enumerate()
            .filter(|(slot, _)| slots.next_if_eq(slot).is_some())
            .map(|(_, session)| session)
            .collect();
        let tokens: Vec<u32> = running
            .iter()
            .filter_map(|sequence| sequence.output.last().copied())
            .collect();
        decode_batch(
            &mut active,
            &tokens,
            &mut logits[..vocab_size * tokens.len()],
        )?;
        let mut left = Vec::with_capacity(running.len());
        for (mut sequence, row) in running.into_iter().zip(logits.chunks_exact(vocab_size)) {
            let [slot, index] = sequence.at;
            let full = sessions[slot].position() == sessions[slot].n_ctx();
            if draw(&mut sequence, row, full) {
                left.push(sequence);
            } else {
                outputs[index] = sequence.output;
                free.push(slot);
                task.step("")?;
            }
        }
        running = left;
        task.check()?;
    }
}
