//! Speculative decoding: a faster session proposes tokens, and the session checks all of them in one
//! pass, which reads its weights once (arXiv 2211.17192).
//!
//! A supernet is its own draft: a small subnet on the same weights proposes, and the chosen one
//! checks. The session draws every token by itself, from its own logits and with its own random
//! numbers, and goes on as long as the proposals are what it draws. So a proposal can only save
//! time. The draft draws with the same random numbers, so that it proposes the same token wherever
//! the two distributions agree.

use super::generate::GenerateConfig;
use super::sample::Sampler;
use super::session::Session;
use crate::error::{Error, Result};

/// The largest number of tokens that a draft may propose at a time. With the token before them, a
/// pass has 8 rows then, which AVX-512 and NEON compute by the kernels of a single one. AVX2 adds in
/// another order from 3 rows on.
pub(super) const MOST: usize = 7;

/// The draft of a session.
#[derive(Debug)]
pub(super) struct Draft {
    pub session: Session,
    /// The most tokens that it proposes at a time.
    pub n_tokens: usize,
    /// The number of tokens that it proposes next.
    next: usize,
    /// Number of tokens that it proposed, and that the session drew.
    pub counts: [u64; 2],
    /// Logits of the draft.
    logits: Vec<f32>,
}

impl Draft {
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if the draft has another vocabulary, has a draft itself, or
    /// would propose no token or more than [`MOST`].
    pub fn new(session: Session, n_tokens: usize, vocab_size: usize) -> Result<Self> {
        if !(1..=MOST).contains(&n_tokens) {
            return Err(Error::argument(
                "n_tokens",
                n_tokens,
                format!("in 1..={MOST}"),
            ));
        }
        let found = session.model().config().vocab_size();
        if found != vocab_size {
            let found = format!("a draft with {found} tokens in its vocabulary");
            return Err(Error::argument(
                "draft",
                found,
                format!("the model's {vocab_size}"),
            ));
        }
        if session.draft.is_some() {
            let expected = "a session without a draft of its own";
            return Err(Error::argument("draft", "a session with one", expected));
        }
        Ok(Self {
            session,
            n_tokens,
            next: n_tokens,
            counts: [0; 2],
            logits: vec![0.0; vocab_size],
        })
    }

    /// Returns a copy for a copy of the session.
    pub fn copy(&self) -> Self {
        Self {
            session: self.session.copy(),
            n_tokens: self.n_tokens,
            next: self.next,
            counts: self.counts,
            logits: self.logits.clone(),
        }
    }

    /// Proposes at most `most` tokens that follow `tokens` and `last`, and writes them to `out`.
    /// `sampler` has drawn `last`.
    fn propose(
        &mut self,
        (tokens, last): (&[u32], u32),
        most: usize,
        sampler: &mut Sampler,
        config: &GenerateConfig,
        n_ids: usize,
        out: &mut Vec<u32>,
    ) -> Result<()> {
        let session = &mut self.session;
        // The draft keeps what it has of the sequence.
        let pairs = tokens.iter().zip(session.tokens());
        let same = pairs.take_while(|(one, other)| one == other).count();
        session.truncate(same);
        let room = session.n_ctx().saturating_sub(tokens.len());
        let mut new = tokens[same..].to_vec();
        new.push(last);
        for _ in 0..most.min(self.next).min(room) {
            session.decode(&new, Some(&mut self.logits))?;
            let drawn = config.drawable(&self.logits);
            let token = sampler.next(&drawn[..n_ids.min(drawn.len())]);
            out.push(token);
            if config.stop_ids.contains(&token) {
                break;
            }
            sampler.accept(token);
            new.clear();
            new.push(token);
        }
        Ok(())
    }

    /// Notes how many of the proposed tokens were drawn.
    fn learn(&mut self, proposed: usize, accepted: usize) {
        self.counts[0] += proposed as u64;
        self.counts[1] += accepted as u64;
        self.next = if accepted == proposed {
            (self.next + 1).min(self.n_tokens)
        } else {
            // One more than were right, so that it grows again.
            (accepted + 1).min(self.n_tokens)
        };
    }
}

impl Session {
    /// Generates as [`Session::generate`] does, with proposals of the draft.
    pub(super) fn generate_with(
        &mut self,
        draft: &mut Draft,
        prompt: &[u32],
        config: &GenerateConfig,
        mut on_token: impl FnMut(u32) -> bool,
    ) -> Result<Vec<u32>> {
        let mut sampler = Sampler::new(&config.sample, 0)?;
        let mut draft_sampler = sampler.clone();
        let (n_ids, vocab_size) = (self.model().n_ids(), self.model().config().vocab_size());
        let mut logits = vec![0.0; (1 + draft.n_tokens) * vocab_size];
        let (mut output, mut proposed) = (Vec::new(), Vec::new());
        self.decode(prompt, Some(&mut logits[..vocab_size]))?;
        sampler.observe(self.tokens());
        let start = self.position();
        // Leaves the session with as many of the drawn tokens as it has computed.
        let finish = |session: &mut Self, output: Vec<u32>, computed: usize| {
            session.truncate(start + computed);
            Ok(output)
        };
        if config.max_new_tokens == 0 {
            return Ok(output);
        }
        // The rows of logits of which the next tokens are drawn. Each but the last is followed by the
        // token that was proposed there.
        let mut rows = 1;
        loop {
            let mut accepted = 0;
            let mut last = None;
            for row in 0..rows {
                let of_row = &logits[row * vocab_size..(row + 1) * vocab_size];
                let drawn = config.drawable(of_row);
                let next = sampler.next(&drawn[..n_ids.min(drawn.len())]);
                if config.stop_ids.contains(&next) {
                    let n = output.len();
                    return finish(self, output, n);
                }
                output.push(next);
                sampler.accept(next);
                let full = start + output.len() - 1 == self.n_ctx();
                if !on_token(next) || full || output.len() == config.max_new_tokens {
                    let n = output.len() - 1;
                    return finish(self, output, n);
                }
                last = Some(next);
                if proposed.get(row) != Some(&next) {
                    break;
                }
                accepted += 1;
            }
            let Some(last) = last else { break };
            if !proposed.is_empty() {
                draft.learn(proposed.len(), accepted);
            }
            // All tokens but the last were computed.
            self.truncate(start + output.len() - 1);
            let room = self.n_ctx() - self.position() - 1;
            let most = room.min(config.max_new_tokens - output.len());
            proposed.clear();
            draft_sampler.follow(&sampler);
            draft.propose(
                (self.tokens(), last),
                most,
                &mut draft_sampler,
                config,
                n_ids,
                &mut proposed,
            )?;
            rows = 1 + proposed.len();
            let mut tokens = vec![last];
            tokens.extend_from_slice(&proposed);
            self.decode_all(&tokens, &mut logits[..rows * vocab_size])?;
        }
        Ok(output)
    }
}
