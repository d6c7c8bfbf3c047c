//! The table of SentencePiece's normalizers: which texts are replaced by which.

use std::collections::{BTreeSet, VecDeque};

/// Returns how many times as long the texts of a table in base 64 are as what they replace, at
/// most, or `None` if the table is not whole: some place to which it leads does not exist.
///
/// A table is the size of a trie in bytes, the trie (a double array, as Darts stores it), and texts
/// that end with 0.
pub(super) fn growth(table: &str) -> Option<f64> {
    let bytes = decoded(table)?;
    let (size, rest) = bytes.split_first_chunk()?;
    let (trie, texts) = rest.split_at_checked(u32::from_le_bytes(*size) as usize)?;
    let texts = std::str::from_utf8(texts).ok()?;
    let (units, []) = trie.as_chunks() else {
        return None;
    };
    let unit = |at: usize| Some(u32::from_le_bytes(*units.get(at)?));
    let offset = |unit: u32| ((unit >> 10) << ((unit & 1 << 9) >> 6)) as usize;
    let mut growth: f64 = 1.0;
    // Breadth first, so that a place is met with the shortest text that leads to it.
    let (mut seen, mut open) = (BTreeSet::new(), VecDeque::from([(offset(unit(0)?), 1)]));
    while let Some((base, depth)) = open.pop_front() {
        if !seen.insert(base) {
            continue;
        }
        for byte in 1..=255 {
            let at = base ^ byte;
            let found = unit(at)?;
            if (found & (1 << 31 | 0xFF)) as usize != byte {
                continue;
            }
            let next = at ^ offset(found);
            if found >> 8 & 1 == 1 {
                let value = unit(next)? & ((1 << 31) - 1);
                let text = texts.get(value as usize..)?;
                let len = text.find('\0').unwrap_or(text.len());
                growth = growth.max(len as f64 / f64::from(depth));
            }
            open.push_back((next, depth + 1));
        }
    }
    Some(growth)
}

/// Decodes base 64.
fn decoded(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end_matches('=').as_bytes();
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3 + 2);
    for group in text.chunks(4) {
        let mut all: u32 = 0;
        for at in 0..4 {
            let digit = match group.get(at).copied().unwrap_or(b'A') {
                letter @ b'A'..=b'Z' => letter - b'A',
                letter @ b'a'..=b'z' => letter - b'a' + 26,
                digit @ b'0'..=b'9' => digit - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            all = all << 6 | u32::from(digit);
        }
        let n = group.len().checked_sub(1).filter(|n| *n > 0)?;
        bytes.extend_from_slice(&all.to_be_bytes()[1..=n]);
    }
    Some(bytes)
}
