//! The mask of causal attention.

use std::ops::Range;

use crate::data::Segments;

/// Restricts the keys that a query sees, in addition to causality.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[doc(hidden)]
pub struct AttentionMask {
    /// Number of most recent keys that are visible, including the query's own (Mistral's sliding
    /// window).
    pub window: Option<usize>,
    /// Number of leading padding keys for each row of the batch.
    pub left_pad: Option<Vec<usize>>,
    /// The examples of packed rows: a query sees the keys of its own only. Without a cache, so that
    /// queries and keys are the same tokens.
    pub segments: Option<Segments>,
}

impl AttentionMask {
    /// The range of keys that `query` of batch row `row` sees; empty if all of them are padding.
    /// The last query is at the position of the last key.
    pub(crate) fn visible(
        &self,
        row: usize,
        query: usize,
        seq_q: usize,
        seq_k: usize,
    ) -> Range<usize> {
        let end = (seq_k + query + 1).saturating_sub(seq_q).min(seq_k);
        let pad = self
            .left_pad
            .as_ref()
            .and_then(|pads| pads.get(row))
            .copied()
            .unwrap_or(0);
        let segments = self.segments.as_ref().filter(|_| end > 0);
        let start = self
            .window
            .map_or(0, |window| end.saturating_sub(window))
            .max(pad)
            .max(segments.map_or(0, |segments| segments.start(row, end - 1)));
        start.min(end)..end
    }

    /// Returns a mask `[rows, 1, seq_q, seq_k]` that is true where a key is hidden from a query,
    /// and `rows`, which is `batch` or 1. Returns `None` if every key is visible.
    pub(crate) fn hidden(
        &self,
        batch: usize,
        seq_q: usize,
        seq_k: usize,
    ) -> Option<(Vec<bool>, usize)> {
        let padded = self
            .left_pad
            .as_ref()
            .is_some_and(|pads| pads.iter().any(|pad| *pad > 0));
        let by_row = padded || self.segments.is_some();
        if seq_q == 1 && !by_row && self.window.is_none_or(|window| window >= seq_k) {
            return None;
        }
        let rows = if by_row { batch } else { 1 };
        let mut hidden = Vec::with_capacity(rows * seq_q * seq_k);
        for row in 0..rows {
            for query in 0..seq_q {
                let visible = self.visible(row, query, seq_q, seq_k);
                hidden.extend((0..seq_k).map(|key| !visible.contains(&key)));
            }
        }
        Some((hidden, rows))
    }
}
