//! Scores many sequences of tokens, and computes what they have in common once.
//!
//! The sequences are the leaves of a tree whose edges are runs of tokens. The tree is walked depth
//! first, several edges at a time: each edge continues a copy of the session that computed the edges
//! above it. So the choices of a question share the question, and questions after the same examples
//! share the examples. There is no padding, so sequences of any lengths go together.

use std::ops::Range;
use std::rc::Rc;

use rayon::prelude::*;

use super::encode::Scored;
use super::language_model::LogLikelihood;
use crate::error::{Error, Result};
use crate::kernels::Level;
use crate::kernels::rows::log_sum_exp;
use crate::progress::{Progress, Task};
use crate::runtime::{Session, Step, decode_steps};

/// Shortest run of tokens that is worth a copy of a session.
const SHORTEST_SHARED: usize = 4;

/// Number of tokens that are chosen to be computed next, at least, where there are as many.
const TOKENS_AT_ONCE: usize = 512;

/// Largest number of bytes of logits that are held at once.
const LOGITS_BYTES: usize = 128 << 20;

/// A part of the tree: sequences that are equal up to a point.
struct Branch {
    /// Session that holds the tokens before `from`; `None` if there are none.
    before: Option<Rc<Session>>,
    from: usize,
    /// The sequences, as indices into their sorted order.
    range: Range<usize>,
}

/// An edge that is being computed.
struct Run<'a> {
    session: Session,
    tokens: &'a [u32],
    done: usize,
    /// Index of the first token after which logits are needed.
    first_row: usize,
}

/// Logits of one row, reduced to what a log-likelihood needs.
struct Row {
    run: usize,
    at: usize,
    log_sum: f32,
    best: usize,
}

/// Returns the log-likelihood of the scored tokens of each sequence. `empty` is a session without
/// tokens, whose copies compute.
///
/// # Errors
/// Returns the errors of [`decode_steps`] and of an interruption.
pub(super) fn score(
    empty: &Session,
    sequences: &[Scored],
    progress: &dyn Progress,
) -> Result<Vec<LogLikelihood>> {
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    order.sort_by(|a, b| sequences[*a].input().cmp(sequences[*b].input()));
    let sorted: Vec<&Scored> = order.iter().map(|index| &sequences[*index]).collect();
    let mut scores = vec![LogLikelihood::default(); sequences.len()];
    for (score, sequence) in scores.iter_mut().zip(&sorted) {
        (score.is_greedy, score.n_tokens) = (true, sequence.n_scored);
    }
    let model = empty.model();
    let (vocab_size, n_threads) = (model.config().vocab_size(), model.n_threads());
    let mut task = Task::begin(progress, "score", sequences.len(), "requests")?;
    let mut branches = Vec::new();
    if !sorted.is_empty() {
        branches.push(Branch {
            before: None,
            from: 0,
            range: 0..sorted.len(),
        });
    }
    while !branches.is_empty() {
        let (chosen, mut runs) = choose(empty, &sorted, &mut branches);
        let mut on_row = |row: &Row, logits: &[f32]| {
            let (branch, at) = (&chosen[row.run], chosen[row.run].from + row.at);
            for index in branch.range.clone() {
                let sequence = sorted[index];
                if at < sequence.first_row() {
                    continue;
                }
                let token = sequence.tokens[at + 1];
                let Some(logit) = logits.get(token as usize) else {
                    return Err(Error::TokenOutOfRange {
                        found: token,
                        vocab_size,
                    });
                };
                let score = &mut scores[index];
                score.sum += f64::from(logit - row.log_sum);
                score.is_greedy &= row.best == token as usize;
            }
            Ok(())
        };
        while step(&mut runs, vocab_size, n_threads, &mut on_row)? {
            task.check()?;
        }
        for (branch, run) in chosen.into_iter().zip(runs) {
            let end = branch.from + run.tokens.len();
            let done = branch
                .range
                .clone()
                .take_while(|i| sorted[*i].input().len() == end);
            let done = done.count();
            task.advance(done, "");
            let rest = branch.range.start + done..branch.range.end;
            if !rest.is_empty() {
                let before = Some(Rc::new(run.session));
                split(&sorted, rest, end, before, end, &mut branches);
            }
        }
        task.check()?;
    }
    let mut out = vec![LogLikelihood::default(); sequences.len()];
    for (index, score) in order.into_iter().zip(scores) {
        out[index] = score;
    }
    Ok(out)
}

/// Puts sequences on the list that are equal up to `at`, in groups that agree in the token there.
/// Those that end there are a group too. The session before holds the first `from` tokens.
fn split(
    sorted: &[&Scored],
    range: Range<usize>,
    at: usize,
    before: Option<Rc<Session>>,
    from: usize,
    branches: &mut Vec<Branch>,
) {
    let mut start = range.start;
    let first = branches.len();
    while start < range.end {
        let token = sorted[start].input().get(at);
        let same = (start..range.end).take_while(|i| sorted[*i].input().get(at) == token);
        let end = start + same.count();
        branches.push(Branch {
            before: before.clone(),
            from,
            range: start..end,
        });
        start = end;
    }
    // The list is taken from its end.
    branches[first..].reverse();
}

/// Takes branches from the list until they have tokens enough, and splits those that have too few
/// tokens in common.
fn choose<'a>(
    empty: &Session,
    sorted: &[&'a Scored],
    branches: &mut Vec<Branch>,
) -> (Vec<Branch>, Vec<Run<'a>>) {
    let (mut chosen, mut runs) = (Vec::new(), Vec::<Run<'a>>::new());
    let mut n_tokens = 0;
    while n_tokens < TOKENS_AT_ONCE {
        let Some(mut branch) = branches.pop() else {
            break;
        };
        let (first, last) = (sorted[branch.range.start], sorted[branch.range.end - 1]);
        let common = first.input().iter().zip(last.input());
        let end = common.take_while(|(a, b)| a == b).count();
        let is_leaf = end == last.input().len();
        if !is_leaf && end - branch.from < SHORTEST_SHARED {
            let Branch {
                before,
                from,
                range,
            } = branch;
            split(sorted, range, end, before, from, branches);
            continue;
        }
        let session = match branch.before.take().map(Rc::try_unwrap) {
            None => empty.copy(),
            Some(Ok(session)) => session,
            Some(Err(shared)) => shared.copy(),
        };
        let rows = branch.range.clone().map(|index| sorted[index].first_row());
        let first_row = rows.min().unwrap_or(end).clamp(branch.from, end) - branch.from;
        let tokens = &first.input()[branch.from..end];
        n_tokens += tokens.len();
        runs.push(Run {
            session,
            tokens,
            done: 0,
            first_row,
        });
        chosen.push(branch);
    }
    (chosen, runs)
}

/// Computes some tokens of each run, and passes on each row of logits. Returns whether tokens are
/// left.
fn step(
    runs: &mut [Run<'_>],
    vocab_size: usize,
    n_threads: usize,
    on_row: &mut dyn FnMut(&Row, &[f32]) -> Result<()>,
) -> Result<bool> {
    let mut rows_left = (LOGITS_BYTES / size_of::<f32>() / vocab_size.max(1)).max(1);
    // The tokens of each run that are computed now, and how many of them have logits.
    let mut parts = Vec::with_capacity(runs.len());
    for run in runs.iter() {
        let left = run.tokens.len() - run.done;
        let unscored = run.first_row.saturating_sub(run.done).min(left);
        let n_rows = (left - unscored).min(rows_left);
        rows_left -= n_rows;
        parts.push((unscored + n_rows, n_rows));
    }
    let n_rows: usize = parts.iter().map(|(_, rows)| rows).sum();
    let mut logits = Vec::new();
    let bytes = n_rows * vocab_size * size_of::<f32>();
    let fail = |_| Error::OutOfMemory {
        what: "logits",
        bytes,
    };
    logits
        .try_reserve_exact(n_rows * vocab_size)
        .map_err(fail)?;
    logits.resize(n_rows * vocab_size, 0.0);
    let mut rest = &mut logits[..];
    let mut steps = Vec::with_capacity(runs.len());
    let mut rows = Vec::with_capacity(n_rows);
    for (index, (run, (n, n_rows))) in runs.iter_mut().zip(&parts).enumerate() {
        let (own, others) = std::mem::take(&mut rest).split_at_mut(n_rows * vocab_size);
        rest = others;
        let end = run.done + n;
        rows.extend((end - n_rows..end).map(|at| (index, at)));
        if *n > 0 {
            steps.push(Step {
                session: &mut run.session,
                tokens: &run.tokens[run.done..end],
                logits: own,
            });
        }
        run.done = end;
    }
    decode_steps(&mut steps)?;
    let level = Level::detect();
    let reduced = |((run, at), logits): (&(usize, usize), &[f32])| {
        let mut best = 0;
        for (index, logit) in logits.iter().enumerate() {
            if *logit > logits[best] {
                best = index;
            }
        }
        Row {
            run: *run,
            at: *at,
            log_sum: log_sum_exp(level, logits),
            best,
        }
    };
    let each = vocab_size.max(1);
    let reduced: Vec<Row> = if n_threads == 1 {
        rows.iter()
            .zip(logits.chunks_exact(each))
            .map(reduced)
            .collect()
    } else {
        let all = rows.par_iter().zip(logits.par_chunks_exact(each));
        all.map(reduced).collect()
    };
    for (row, logits) in reduced.iter().zip(logits.chunks_exact(each)) {
        on_row(row, logits)?;
    }
    Ok(runs.iter().any(|run| run.done < run.tokens.len()))
}
