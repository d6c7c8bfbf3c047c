//! Which keys a query of causal attention may see.

use std::ops::Range;

/// Which keys a query may see, besides none after itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[doc(hidden)]
pub struct AttentionMask {
    /// Only the last `window` keys, the query's own among them (Mistral's sliding window).
    pub window: Option<usize>,
    /// Per row of the batch, the number of leading keys that are padding.
    pub left_pad: Option<Vec<usize>>,
}

impl AttentionMask {
    /// The keys that `query` of batch row `row` sees; empty if all of them are padding. The last query stands at the last
    /// key.
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
        let start = self
            .window
            .map_or(0, |window| end.saturating_sub(window))
            .max(pad);
        start.min(end)..end
    }

    /// True where a query must not look, `[rows, 1, seq_q, seq_k]` with `rows` one of `batch` and 1, and that `rows`; nothing
    /// where every key is visible.
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
        if seq_q == 1 && !padded && self.window.is_none_or(|window| window >= seq_k) {
            return None;
        }
        let rows = if padded { batch } else { 1 };
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
