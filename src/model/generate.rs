//! Batched text generation.

use super::Decoder;
use crate::error::{Error, Result};
use crate::nn::{KvCache, host_values};
use crate::progress::{Progress, Task};
use crate::runtime::{GenerateConfig, Sampler};

/// Continues every prompt. The outputs are in the order of the prompts and do not include them. A
/// sequence ends at a stop token, after `max_new_tokens`, or at the end of the context.
///
/// Prompts of similar length share a batch, padded on the left; padding is never attended to.
///
/// # Errors
/// Returns [`Error::InvalidArgument`] for an empty prompt or settings out of range,
/// [`Error::SequenceTooLong`] for a prompt longer than the context, and [`Error::TokenOutOfRange`]
/// for a token outside the vocabulary.
pub fn generate_batch(
    model: &Decoder,
    prompts: &[Vec<u32>],
    config: &GenerateConfig,
    progress: &dyn Progress,
) -> Result<Vec<Vec<u32>>> {
    config.sample.validate()?;
    if config.batch_size == 0 {
        return Err(Error::argument("batch_size", 0, "at least 1"));
    }
    let context = model.config().max_position_embeddings();
    for (index, prompt) in prompts.iter().enumerate() {
        if prompt.is_empty() {
            return Err(Error::argument(
                "prompts",
                format!("prompt {} is empty", index + 1),
                "at least one token each",
            ));
        }
        if prompt.len() > context {
            let what = format!("prompt {}", index + 1);
            return Err(Error::SequenceTooLong {
                what,
                found: prompt.len(),
                max: context,
            });
        }
    }
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    order.sort_by_key(|index| prompts[*index].len());
    let mut outputs = vec![Vec::new(); prompts.len()];
    let mut task = Task::begin(progress, "generate", prompts.len(), "sequences")?;
    let mut rest = &order[..];
    while !rest.is_empty() {
        let chunk;
        (chunk, rest) = rest.split_at(first_batch(model, prompts, rest, config));
        let chunk_outputs = generate_chunk(model, prompts, chunk, config, &mut task)?;
        for (index, output) in chunk.iter().zip(chunk_outputs) {
            outputs[*index] = output;
        }
    }
    Ok(outputs)
}

/// Number of prompts that form the first batch. `order` sorts them by length.
///
/// All sequences of a batch have the same rotary frequencies. If these depend on the length and may
/// change during the generation, only prompts of equal length share a batch.
fn first_batch(
    model: &Decoder,
    prompts: &[Vec<u32>],
    order: &[usize],
    config: &GenerateConfig,
) -> usize {
    let mut lengths = order.iter().map(|index| prompts[*index].len());
    let shortest = lengths.clone().next().unwrap_or(0);
    let alike = |len: usize| {
        let longest = len.saturating_add(config.max_new_tokens);
        let mut ropes = model.ropes().iter();
        len == shortest || ropes.all(|rope| rope.is_same(shortest, longest))
    };
    let n = lengths.position(|len| !alike(len)).unwrap_or(order.len());
    n.min(config.batch_size)
}

fn generate_chunk(
    model: &Decoder,
    prompts: &[Vec<u32>],
    chunk: &[usize],
    config: &GenerateConfig,
    task: &mut Task<'_>,
) -> Result<Vec<Vec<u32>>> {
    let context = model.config().max_position_embeddings();
    let vocab = model.config().vocab_size();
    let longest = chunk
        .iter()
        .map(|index| prompts[*index].len())
        .max()
        .unwrap_or(0);
    let left_pad: Vec<usize> = chunk
        .iter()
        .map(|index| longest - prompts[*index].len())
        .collect();
    let mut ids = Vec::with_capacity(chunk.len() * longest);
    for (index, pad) in chunk.iter().zip(&left_pad) {
        ids.extend(std::iter::repeat_n(0, *pad));
        ids.extend_from_slice(&prompts[*index]);
    }
    let mut cache = KvCache::with_left_pad(model.config().num_hidden_layers(), left_pad);
    let mut samplers = chunk
        .iter()
        .map(|index| {
            let mut sampler = Sampler::new(&config.sample, *index as u64)?;
            sampler.observe(&prompts[*index]);
            Ok(sampler)
        })
        .collect::<Result<Vec<_>>>()?;
    let mut outputs = vec![Vec::new(); chunk.len()];
    // Indices in the chunk of the sequences still running; row `i` of the cache belongs to
    // `rows[i]`.
    let mut rows: Vec<usize> = (0..chunk.len()).collect();
    // New tokens allowed for each prompt, the same as if it ran alone: padding does not count.
    // Positions may therefore pass the end of the context, which is harmless because rotary
    // attention depends only on distances.
    let rooms: Vec<usize> = chunk
        .iter()
        .map(|index| {
            config
                .max_new_tokens
                .min(context - prompts[*index].len() + 1)
        })
        .collect();
    rows.retain(|row| rooms[*row] > 0);
    task.advance(chunk.len() - rows.len(), "");
    while !rows.is_empty() {
        task.check()?;
        let mut seq = ids.len() / rows.len();
        let len = cache.n_tokens() + seq;
        cache.begin(len, model.ropes());
        if cache.n_tokens() + seq < len {
            // The frequencies have changed, which only happens to prompts of equal length.
            ids.clear();
            for row in &rows {
                ids.extend_from_slice(&prompts[chunk[*row]]);
                ids.extend_from_slice(&outputs[*row]);
            }
            seq = len;
        }
        let hidden = model.hidden_states(model.tokens(&ids, rows.len())?, Some(&mut cache));
        let logits = host_values(model.logits(hidden.narrow(1, seq - 1, 1)));
        let mut going = Vec::with_capacity(rows.len());
        ids.clear();
        for (place, row) in rows.iter().enumerate() {
            let next =
                samplers[*row].next(config.drawable(&logits[place * vocab..(place + 1) * vocab]));
            if config.stop_ids.contains(&next) {
                continue;
            }
            outputs[*row].push(next);
            samplers[*row].accept(next);
            if outputs[*row].len() < rooms[*row] {
                going.push(place);
                ids.push(next);
            }
        }
        task.advance(rows.len() - going.len(), "");
        if going.is_empty() {
            break;
        }
        if going.len() < rows.len() {
            cache.select_rows(&going);
            rows = going.iter().map(|place| rows[*place]).collect();
        }
    }
    Ok(outputs)
}
