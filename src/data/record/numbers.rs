//! Numbers of JSON as they are written.

use std::borrow::Cow;

use serde_json::Number;

/// Puts each number into quotes that would lose digits in a float, or be written in another way
/// again: `100000000000000000007`, `1e5`, `0.50`. A zero stays a number.
pub(super) fn as_written(json: &str) -> Cow<'_, str> {
    let bytes = json.as_bytes();
    let mut out = String::new();
    let (mut copied, mut at) = (0, 0);
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => at = string_end(bytes, at),
            b'-' | b'0'..=b'9' => {
                let end = bytes[at..]
                    .iter()
                    .position(|b| !matches!(b, b'-' | b'+' | b'.' | b'e' | b'E' | b'0'..=b'9'))
                    .map_or(bytes.len(), |n| at + n);
                if is_changed(&json[at..end]) {
                    out.push_str(&json[copied..at]);
                    out.push('"');
                    out.push_str(&json[at..end]);
                    out.push('"');
                    copied = end;
                }
                at = end;
            }
            _ => at += 1,
        }
    }
    if copied == 0 {
        return Cow::Borrowed(json);
    }
    out.push_str(&json[copied..]);
    Cow::Owned(out)
}

/// Returns the index behind a string that begins at `start`.
fn string_end(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// Returns whether a number is written in another way after it was read.
fn is_changed(token: &str) -> bool {
    // Short integers are the most, and never change.
    if token.len() < 18 && !token.contains(['.', 'e', 'E']) {
        return false;
    }
    let is_zero = !token.contains(|c: char| ('1'..='9').contains(&c));
    !is_zero
        && serde_json::from_str::<Number>(token).is_ok_and(|number| number.to_string() != token)
}
