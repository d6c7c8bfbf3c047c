//! Tokenizes long texts in overlapping pieces, since tokenizing takes some hundred times the memory
//! of the text.
//!
//! A tokenizer looks at some characters around a token only. Where two pieces overlap, their tokens
//! differ near their ends and agree between them, and there the one is continued by the other.
//! Where they do not agree, the text is refused.

use std::ops::Range;

/// A token of a text and the bytes that it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub id: u32,
    pub bytes: Range<usize>,
}

/// Fewest tokens in a row that two pieces must agree in.
const MIN_RUN: usize = 16;
/// Overlaps that are tried one after another, as parts of a piece.
const OVERLAPS: [usize; 3] = [16, 4, 2];

/// Calls `emit` with the tokens of a text in order, some at a time. `encode` gives the tokens of a
/// part of the text; it gets at most `piece` bytes.
pub(super) fn tokenize(
    text: &str,
    piece: usize,
    encode: impl Fn(&str) -> Result<Vec<Found>, String>,
    mut emit: impl FnMut(&[Found]),
) -> Result<(), String> {
    let part = |start: usize| {
        let end = text.floor_char_boundary(start.saturating_add(piece));
        let mut tokens = encode(&text[start..end])?;
        for token in &mut tokens {
            token.bytes.start += start;
            token.bytes.end += start;
        }
        Ok::<_, String>((tokens, end))
    };
    let (mut tokens, mut end) = part(0)?;
    while end < text.len() {
        let mut joined = None;
        for share in OVERLAPS {
            // A piece that begins where a token begins agrees with the one before soon.
            let at = end.saturating_sub(piece / share);
            let first = tokens.partition_point(|token| token.bytes.start < at);
            let Some(start) = tokens.get(first).map(|token| token.bytes.start) else {
                continue;
            };
            let start = text.floor_char_boundary(start);
            let (next, next_end) = part(start)?;
            if next_end > end
                && let Some((left, right)) = meet(&tokens[first..], &next)
            {
                joined = Some((first + left, next, right, next_end));
                break;
            }
        }
        let Some((left, mut next, right, next_end)) = joined else {
            return Err(format!(
                "the text is too long to be tokenized at once, and its parts before and after byte \
                 {end} do not agree in {MIN_RUN} tokens; cut it into documents"
            ));
        };
        emit(&tokens[..left]);
        next.drain(..right);
        (tokens, end) = (next, next_end);
    }
    emit(&tokens);
    Ok(())
}

/// Finds the longest run of tokens that two lists have in common, and returns the places of its
/// middle in both.
fn meet(left: &[Found], right: &[Found]) -> Option<(usize, usize)> {
    let (mut i, mut j, mut run) = (0, 0, 0);
    let mut best = (0, 0, 0);
    while let (Some(a), Some(b)) = (left.get(i), right.get(j)) {
        if a == b {
            (i, j, run) = (i + 1, j + 1, run + 1);
            if run > best.0 {
                best = (run, i, j);
            }
            continue;
        }
        run = 0;
        if a.bytes.start <= b.bytes.start {
            i += 1;
        } else {
            j += 1;
        }
    }
    let (run, i, j) = best;
    (run >= MIN_RUN).then(|| (i - run / 2, j - run / 2))
}
