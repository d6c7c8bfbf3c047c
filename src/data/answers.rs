//! Extracts and compares the final answers of worked solutions.

/// Returns the number after the first `####` that is followed by a number, or `None` if there is
/// none. This follows GSM8K's scorer, which searches for the first match of `#### (\-?[0-9\.\,]+)`,
/// but also accepts other blanks and a `$` before the number.
///
/// The number is normalized: without commas, `+`, leading zeros, and trailing zeros after the point
/// (`1,012.50` becomes `1012.5`, `12.0` becomes `12`, `-0` becomes `0`).
#[doc(hidden)]
pub fn extract_answer(text: &str) -> Option<String> {
    text.split("####").skip(1).find_map(leading_number)
}

/// Returns whether the final answers of `generated` and `reference` are equal. `reference` is a
/// worked solution with `####`, a number, or a word (`true`, `answer2`, `C`). The result is `false`
/// if either has no answer.
///
/// The final answer of `generated` is taken after `####`, or else after the first `answer is`,
/// which ends the solutions in LLM-Adapters' files (`The answer is 4.`,
/// `the correct answer is true`). Words are compared case-insensitively.
pub fn exact_match(generated: &str, reference: &str) -> bool {
    match extract_answer(reference).or_else(|| normalize_number(reference)) {
        Some(number) => {
            extract_answer(generated).or_else(|| leading_number(stated(generated)?)) == Some(number)
        }
        None => {
            let word = |text: &str| {
                text.split(|c: char| !c.is_alphanumeric())
                    .next()
                    .unwrap_or("")
                    .to_lowercase()
            };
            // Only the first word after `answer is` is compared, so a reference of several words
            // never matches.
            let expected = reference.trim().to_lowercase();
            !expected.is_empty() && stated(generated).is_some_and(|text| word(text) == expected)
        }
    }
}

/// Returns the text after the first `answer is`.
fn stated(text: &str) -> Option<&str> {
    const MARK: &str = "answer is";
    let at = text
        .as_bytes()
        .windows(MARK.len())
        .position(|window| window.eq_ignore_ascii_case(MARK.as_bytes()))?;
    // The mark is ASCII, so the text after it begins at a character boundary.
    text.get(at + MARK.len()..)
        .map(|rest| rest.trim_start_matches([':', ' ', '\t', '\n', '*']))
}

/// Returns a text that is only a number, normalized as in [`extract_answer`], or `None`.
#[doc(hidden)]
pub fn normalize_number(text: &str) -> Option<String> {
    let text = text.trim();
    let end = number_end(text);
    if !text[end..].trim_start_matches(['.', '%']).trim().is_empty() {
        return None;
    }
    leading_number(text)
}

fn leading_number(text: &str) -> Option<String> {
    let text = text.trim_start_matches([' ', '\t']);
    normalize(&text[..number_end(text)])
}

/// Returns the length of the signs, currency signs, digits, commas and points at the start.
fn number_end(text: &str) -> usize {
    let head = text
        .bytes()
        .take_while(|b| matches!(b, b'-' | b'+' | b'$'))
        .count();
    head + text[head..]
        .bytes()
        .take_while(|b| b.is_ascii_digit() || matches!(b, b',' | b'.'))
        .count()
}

fn normalize(raw: &str) -> Option<String> {
    let negative = raw.contains('-');
    let digits: String = raw
        .chars()
        .filter(|c| c.is_ascii_digit() || *c == '.')
        .collect();
    // A trailing point ends the sentence and is not part of the number.
    let digits = digits.trim_end_matches('.');
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if fraction.contains('.') || (whole.is_empty() && fraction.is_empty()) {
        return None;
    }
    let (whole, fraction) = (
        whole.trim_start_matches('0'),
        fraction.trim_end_matches('0'),
    );
    let mut out = String::new();
    if negative && !(whole.is_empty() && fraction.is_empty()) {
        out.push('-');
    }
    out.push_str(if whole.is_empty() { "0" } else { whole });
    if !fraction.is_empty() {
        out.push('.');
        out.push_str(fraction);
    }
    Some(out)
}
