//! Splits long text into windows for training, perplexity and calibration.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::{Sequence, TextTokenizer};
use crate::error::{Error, Result};
use crate::threads;

/// Tokenizes documents and joins them into one stream. Each document begins with the tokenizer's
/// prefix and, if `add_eos` is true, ends with EOS (if one is known).
///
/// # Errors
/// Returns [`Error::Tokenizer`] if the tokenizer fails.
#[doc(hidden)]
pub fn join_documents<S: AsRef<str> + Sync>(
    documents: &[S],
    tokenizer: &TextTokenizer,
    add_eos: bool,
) -> Result<Vec<u32>> {
    threads::ready()?;
    let encoded: Vec<Result<Vec<u32>>> = documents
        .par_iter()
        .map(|d| tokenizer.encode_prompt(d.as_ref()))
        .collect();
    let mut ids = Vec::new();
    for document in encoded {
        ids.extend(document?);
        ids.extend(tokenizer.eos_id().filter(|_| add_eos));
    }
    Ok(ids)
}

/// Splits ids into consecutive windows of `context` tokens without overlap. The last window may be
/// shorter.
///
/// # Errors
/// Returns [`Error::InvalidArgument`] if `context` is 0.
#[doc(hidden)]
pub fn windows(ids: &[u32], context: usize) -> Result<impl ExactSizeIterator<Item = &[u32]>> {
    if context == 0 {
        return Err(Error::argument("context", 0, "at least 1"));
    }
    Ok(ids.chunks(context))
}

/// Splits a stream into training sequences of `len` tokens. Every token of a sequence except the
/// first is a target. A remainder of fewer than two tokens is dropped.
///
/// # Errors
/// Returns [`Error::InvalidArgument`] if `len` is less than 2, or if `ids` has fewer than 2 tokens.
#[doc(hidden)]
pub fn pack(ids: &[u32], len: usize) -> Result<Vec<Sequence>> {
    if len < 2 {
        return Err(Error::argument("len", len, "at least 2"));
    }
    let packed: Vec<Sequence> = windows(ids, len)?
        .filter(|w| w.len() >= 2)
        .map(|w| Sequence::unmasked(w.to_vec()))
        .collect();
    if packed.is_empty() {
        return Err(Error::argument(
            "ids",
            format!("{} tokens", ids.len()),
            "at least 2",
        ));
    }
    Ok(packed)
}

/// Draws `n` windows of `seq_len` tokens at random positions of the joined documents, as the
/// loaders of Wanda and GPTQ do. Windows may overlap. The same arguments give the same windows.
///
/// # Shapes
/// - result: `n` rows of `seq_len` ids
///
/// # Errors
/// Returns [`Error::InvalidArgument`] if `seq_len` is 0 or larger than the number of tokens in all
/// documents, and [`Error::Tokenizer`] if the tokenizer fails.
pub fn calibration_samples<S: AsRef<str> + Sync>(
    documents: &[S],
    tokenizer: &TextTokenizer,
    n: usize,
    seq_len: usize,
    seed: u64,
) -> Result<Vec<Vec<u32>>> {
    if seq_len == 0 {
        return Err(Error::argument("seq_len", 0, "at least 1"));
    }
    let ids = join_documents(documents, tokenizer, false)?;
    calibration_windows(&ids, n, seq_len, seed)
}

/// Draws windows of a token stream as [`calibration_samples`] does.
///
/// # Errors
/// Returns [`Error::InvalidArgument`] if `seq_len` is 0 or larger than the number of tokens.
pub fn calibration_windows(
    ids: &[u32],
    n: usize,
    seq_len: usize,
    seed: u64,
) -> Result<Vec<Vec<u32>>> {
    if seq_len == 0 {
        return Err(Error::argument("seq_len", 0, "at least 1"));
    }
    if ids.len() < seq_len {
        return Err(Error::argument(
            "seq_len",
            seq_len,
            format!("the calibration text has only {} tokens", ids.len()),
        ));
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Ok((0..n)
        .map(|_| {
            // Draw from a fixed width, so that 32-bit machines get the same windows.
            let start = rng.random_range(0..=(ids.len() - seq_len) as u64) as usize;
            ids[start..start + seq_len].to_vec()
        })
        .collect())
}

/// Number of calibration samples, and their length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CalibrationSize {
    /// Number of samples.
    pub samples: usize,
    /// Length of each sample in tokens.
    pub seq_len: usize,
}

impl CalibrationSize {
    /// The papers' size, 128 samples of 2048 tokens, which larger models get less of.
    pub const PAPERS: Self = Self {
        samples: 128,
        seq_len: 2048,
    };

    /// Product of weights and tokens that two cores of a desktop process in some minutes.
    const WORK: u64 = 10_000_000_000_000;

    /// Returns a size for a model with this number of weights in its linear layers and this context
    /// length. It is [`PAPERS`](Self::PAPERS), within the context, for models of up to 40 million
    /// weights. Larger models get samples of fewer tokens, at least 256, and then fewer samples, at
    /// least 32, so that calibration takes minutes on two cores.
    pub fn for_model(n_weights: usize, context: usize) -> Self {
        let tokens = Self::WORK / (n_weights.max(1) as u64);
        let tokens = usize::try_from(tokens).unwrap_or(usize::MAX);
        let papers = Self::PAPERS;
        let seq_len = (tokens / papers.samples).clamp(256, papers.seq_len);
        let seq_len = seq_len.min(context).max(1);
        Self {
            samples: (tokens / seq_len).clamp(32, papers.samples),
            seq_len,
        }
    }

    /// Returns this size, or a smaller one if the samples would be longer, or hold more tokens, than
    /// a text of `n_tokens` tokens does.
    pub fn within(self, n_tokens: usize) -> Self {
        let seq_len = self.seq_len.min(n_tokens).max(1);
        Self {
            samples: self.samples.min(n_tokens.div_ceil(seq_len)),
            seq_len,
        }
    }

    /// Returns the number of tokens of all samples.
    pub fn n_tokens(self) -> usize {
        self.samples.saturating_mul(self.seq_len)
    }
}
