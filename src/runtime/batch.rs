//! Passes over the new tokens of several sessions.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::progress::Progress;

use super::forward::{Pass, Setting};
use super::session::Session;
use super::workspace::Workspace;

/// What one session does in a batch.
#[derive(Debug)]
pub struct Step<'a> {
    /// The session.
    pub session: &'a mut Session,
    /// Its new tokens, at least one: a token that was drawn, or a prompt or a part of it.
    pub tokens: &'a [u32],
    /// Receives the logits after each of the last tokens, `[rows, vocab_size]`: none, those of the
    /// last token, or those of up to all tokens.
    pub logits: &'a mut [f32],
}

/// Appends tokens to several sessions, any number to each. Sessions on one model with the same
/// widths and precision of activations go through the model together, so that its weights are read
/// once for all of them; their ranks and adapters may differ. Other widths, and subnets with weights
/// of their own, take a pass each. Sessions may come and go between calls.
///
/// # Errors
/// Returns [`Error::ShapeMismatch`] if logits are no whole rows or more than the tokens, and
/// otherwise the errors of [`Session::decode`]. All sessions then hold the same tokens as before.
pub fn decode_steps(steps: &mut [Step<'_>]) -> Result<()> {
    for step in steps.iter() {
        step.session.check(step.tokens)?;
        let vocab_size = step.session.model().config().vocab_size();
        let rows = step.logits.len() / vocab_size.max(1);
        if step.logits.len() != rows * vocab_size || rows > step.tokens.len() {
            return Err(Error::ShapeMismatch {
                what: "logits of a step".into(),
                expected: vec![step.tokens.len(), vocab_size],
                found: vec![step.logits.len()],
            });
        }
    }
    let starts: Vec<usize> = steps.iter().map(|step| step.session.position()).collect();
    let result = run(steps);
    if result.is_err() {
        for (step, start) in steps.iter_mut().zip(starts) {
            step.session.truncate(start);
        }
    }
    result
}

fn run(steps: &mut [Step<'_>]) -> Result<()> {
    for step in steps.iter_mut() {
        step.session.catch_up(step.tokens.len())?;
        step.session.note(step.tokens);
    }
    let mut groups: Vec<Vec<&mut Step<'_>>> = Vec::new();
    for step in steps {
        let same = |group: &&mut Vec<&mut Step<'_>>| {
            let first = group.first();
            first.is_some_and(|first| first.session.goes_with(step.session))
        };
        match groups.iter_mut().find(same) {
            // Sessions with the same ranks and adapters stand together.
            Some(group) => {
                let like = |other: &&mut Step<'_>| other.session.is_set_like(step.session);
                let at = group.iter().rposition(like);
                group.insert(at.map_or(group.len(), |at| at + 1), step);
            }
            None => groups.push(vec![step]),
        }
    }
    groups.iter_mut().try_for_each(|group| run_group(group))
}

/// Runs sessions that go together, some tokens of each at a time.
fn run_group(group: &mut [&mut Step<'_>]) -> Result<()> {
    let Some(first) = group.first_mut() else {
        return Ok(());
    };
    let mut work = std::mem::take(first.session.workspace());
    let mut done = vec![0; group.len()];
    let result = loop {
        let parts = parts(group, &done);
        if parts.is_empty() {
            break Ok(());
        }
        if let Err(error) = run_parts(group, &parts, &mut work) {
            break Err(error);
        }
        for (index, part) in parts {
            group[index].session.cache.advance(part.len());
            done[index] = part.end;
        }
    };
    *group[0].session.workspace() = work;
    result
}

/// Chooses the tokens of the next pass: as many of each session as it takes at a time, and as many
/// together as the session that takes most, or one of each.
fn parts(group: &[&mut Step<'_>], done: &[usize]) -> Vec<(usize, Range<usize>)> {
    let rows = group.iter().map(|step| step.session.prefill_rows());
    let mut budget = rows.max().unwrap_or(1).max(group.len());
    let mut left = group.len();
    let mut parts = Vec::with_capacity(group.len());
    for (index, (step, done)) in group.iter().zip(done).enumerate() {
        left -= 1;
        // Each of the sessions behind this one has room for a token.
        let room = step.session.prefill_rows().min(budget - left.min(budget));
        let n = (step.tokens.len() - done).min(room);
        if n > 0 {
            parts.push((index, *done..done + n));
            budget -= n;
        }
    }
    parts
}

fn run_parts(
    group: &mut [&mut Step<'_>],
    parts: &[(usize, Range<usize>)],
    work: &mut Workspace,
) -> Result<()> {
    let (mut lens, mut tokens) = (Vec::new(), Vec::new());
    for (index, part) in parts {
        let step = &mut group[*index];
        let cache = &mut step.session.cache;
        cache.reserve(cache.n_tokens() + part.len())?;
        lens.push(part.len());
        tokens.extend_from_slice(&step.tokens[part.clone()]);
    }
    // The rows whose logits are wanted, and where they go.
    let vocab_size = group[0].session.model().config().vocab_size();
    let (mut wanted, mut row) = (Vec::new(), 0);
    for (index, part) in parts {
        let step = &group[*index];
        let first = step.tokens.len() - step.logits.len() / vocab_size.max(1);
        for at in part.clone() {
            if at >= first {
                wanted.push((row + at - part.start, *index, at - first));
            }
        }
        row += part.len();
    }
    let sessions: Vec<&Session> = parts
        .iter()
        .map(|(index, _)| &*group[*index].session)
        .collect();
    let watch = Watches(sessions.iter().map(|s| s.progress()).collect());
    let first = sessions[0];
    let mut settings: Vec<Setting<'_>> = Vec::new();
    for (at, (session, n)) in sessions.iter().zip(&lens).enumerate() {
        match settings.last_mut() {
            Some(last) if sessions[at - 1].is_set_like(session) => last.rows += n,
            _ => settings.push(session.setting(*n)),
        }
    }
    let pass = Pass {
        weights: &first.model().weights,
        settings: &settings,
        pool: &first.model().pool,
        activations: first.activations(),
        caches: &|seq| &sessions[seq].cache,
        lens: &lens,
        progress: &watch,
    };
    pass.blocks(&tokens, work)?;
    if wanted.is_empty() {
        return Ok(());
    }
    let mut logits = Vec::new();
    super::workspace::grow(&mut logits, wanted.len() * vocab_size, 0.0)?;
    pass.logits(wanted.iter().map(|(row, ..)| *row), work, &mut logits)?;
    for ((_, index, at), row) in wanted.into_iter().zip(logits.chunks_exact(vocab_size)) {
        group[index].logits[at * vocab_size..(at + 1) * vocab_size].copy_from_slice(row);
    }
    Ok(())
}

/// Interrupts a pass if one of its sessions is interrupted.
struct Watches<'a>(Vec<&'a dyn Progress>);

impl Progress for Watches<'_> {
    fn is_interrupted(&self) -> bool {
        self.0.iter().any(|watch| watch.is_interrupted())
    }
}

/// Appends one token to each of several sessions on one model with the same subnet. The weights are
/// read once for all sessions.
///
/// # Shapes
/// - `tokens`: `[sessions]`
/// - `logits`: `[sessions, vocab_size]`; row `i` is written after the token of session `i`
///
/// # Errors
/// Returns [`Error::ShapeMismatch`] if the number of tokens or logits is wrong,
/// [`Error::InvalidState`] if the sessions differ in model, subnet, adapters or activation
/// precision, and otherwise the errors of [`Session::decode`]. All sessions then hold the same
/// tokens as before.
pub fn decode_batch(
    sessions: &mut [&mut Session],
    tokens: &[u32],
    logits: &mut [f32],
) -> Result<()> {
    let n = sessions.len();
    let Some((first, others)) = sessions.split_first() else {
        return Ok(());
    };
    let vocab_size = first.model().config().vocab_size();
    if tokens.len() != n || logits.len() != n * vocab_size {
        return Err(Error::ShapeMismatch {
            what: "tokens and logits of a batch".into(),
            expected: vec![n, n * vocab_size],
            found: vec![tokens.len(), logits.len()],
        });
    }
    let alike = |other: &&mut Session| first.goes_with(other) && first.is_set_like(other);
    if let Some(index) = others.iter().position(|other| !alike(other)) {
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
        session.catch_up(1)?;
        session.cache.reserve(session.position() + 1)?;
    }
    // Unlike a batch of any steps, one of single tokens takes no memory.
    let mut work = std::mem::take(sessions[0].workspace());
    let result = run_tokens(sessions, tokens, &mut work, logits);
    *sessions[0].workspace() = work;
    result?;
    for (session, token) in sessions.iter_mut().zip(tokens) {
        session.cache.advance(1);
        session.note(std::slice::from_ref(token));
    }
    Ok(())
}

fn run_tokens(
    sessions: &[&mut Session],
    tokens: &[u32],
    work: &mut Workspace,
    logits: &mut [f32],
) -> Result<()> {
    let mut lens = std::mem::take(&mut work.lens);
    lens.clear();
    lens.resize(sessions.len(), 1);
    let first = &sessions[0];
    let pass = Pass {
        weights: &first.model().weights,
        settings: &[first.setting(sessions.len())],
        pool: &first.model().pool,
        activations: first.activations(),
        caches: &|index| &sessions[index].cache,
        lens: &lens,
        progress: &WatchesOf(sessions),
    };
    let result = pass
        .blocks(tokens, work)
        .and_then(|()| pass.logits(0..sessions.len(), work, logits));
    work.lens = lens;
    result
}

/// Interrupts a pass if one of these sessions is interrupted.
struct WatchesOf<'a>(&'a [&'a mut Session]);

impl Progress for WatchesOf<'_> {
    fn is_interrupted(&self) -> bool {
        self.0.iter().any(|s| s.progress().is_interrupted())
    }
}

/// Something that sessions ask whether to go on.
#[derive(Clone)]
pub(super) struct Watch(pub Arc<dyn Progress + Send + Sync>);

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watch")
    }
}
