//! Several short examples in one sequence, so that a batch has little padding.

use std::collections::BTreeSet;
use std::sync::Arc;

/// Where the examples of packed rows begin and end. A token sees the tokens of its own example
/// only, and the positions of an example begin at 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segments {
    /// Lengths of the examples of each row, in their order.
    lengths: Arc<[Vec<usize>]>,
    /// Where in its row the example of each token begins, `[rows, len]`; `len` for padding.
    starts: Arc<[usize]>,
    len: usize,
}

impl Segments {
    /// Creates the segments of rows of `len` tokens, from the lengths of their examples. What an
    /// example has beyond `len` is dropped; what a row has behind its examples is padding.
    pub(crate) fn new(rows: Vec<Vec<usize>>, len: usize) -> Self {
        let mut starts = Vec::with_capacity(rows.len() * len);
        for (row, lengths) in rows.iter().enumerate() {
            let (first, end) = (row * len, (row + 1) * len);
            for length in lengths {
                let start = starts.len() - first;
                starts.resize((starts.len() + length).min(end), start);
            }
            starts.resize(end, len);
        }
        Self {
            lengths: rows.into(),
            starts: starts.into(),
            len,
        }
    }

    /// Returns the number of rows and the number of tokens in each, with padding.
    pub fn dims(&self) -> [usize; 2] {
        [self.lengths.len(), self.len]
    }

    /// Returns the lengths of the examples of each row, in tokens.
    pub fn lengths(&self) -> &[Vec<usize>] {
        &self.lengths
    }

    /// Returns where in its row the example of a token begins: the first key that the token sees.
    /// For padding it lies behind the token.
    pub(crate) fn start(&self, row: usize, token: usize) -> usize {
        let index = row * self.len + token;
        self.starts.get(index).copied().unwrap_or(self.len)
    }

    /// Returns the position of each token in its example and the length of the example, row by row;
    /// 0 and 1 for padding.
    pub(crate) fn positions(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.lengths.iter().flat_map(|lengths| {
            let tokens = lengths.iter().flat_map(|n| (0..*n).map(|t| (t, *n)));
            tokens.chain(std::iter::repeat((0, 1))).take(self.len)
        })
    }
}

/// Groups examples so that each group has at most `max_len` tokens, by best fit from the longest
/// example down. Examples of the same length keep their order. The lengths must not be above
/// `max_len`. The cost is O(n log n).
pub(super) fn groups(lengths: &[usize], max_len: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(lengths[*i]));
    let mut groups: Vec<Vec<usize>> = Vec::new();
    // Free tokens of each group, with its number.
    let mut rooms: BTreeSet<(usize, usize)> = BTreeSet::new();
    for example in order {
        let length = lengths[example];
        let found = rooms.range((length, 0)..).next().copied();
        let (room, group) = match found {
            Some(entry) => {
                rooms.remove(&entry);
                entry
            }
            None => {
                groups.push(Vec::new());
                (max_len, groups.len() - 1)
            }
        };
        groups[group].push(example);
        rooms.insert((room.saturating_sub(length), group));
    }
    groups
}
