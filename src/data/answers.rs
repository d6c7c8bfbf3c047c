//! The final answer of a worked solution, and whether two agree.

/// The number after the first `####`, as GSM8K's own scorer takes it (its pattern is `#### (\-?[0-9\.\,]+)`, its search
/// stops at the first hit); `$` before it and blanks around it are let pass as well. `None` where there is none.
///
/// The number comes back normalized: no commas, no `+`, no leading zeros, no trailing zeros after the point (`1,012.50` is
/// `1012.5`, `12.0` is `12`, `-0` is `0`).
#[doc(hidden)]
pub fn extract_answer(text: &str) -> Option<String> {
    text.split("####").skip(1).find_map(leading_number)
}

/// Whether the final answer of `generated` is that of `reference`, which may be a worked solution with `####`, the number
/// alone, or a word (`true`, `answer2`, `C`). `false` where either has none.
///
/// The final answer of `generated` stands after `####`, or else after the first `answer is`, as LLM-Adapters' files end
/// (`The answer is 4.`, `the correct answer is true`); words are compared without regard to case.
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
            // A reference of several words is no answer that could be told from what follows it.
            let expected = reference.trim().to_lowercase();
            !expected.is_empty() && stated(generated).is_some_and(|text| word(text) == expected)
        }
    }
}

/// What follows the first `answer is`.
fn stated(text: &str) -> Option<&str> {
    const MARK: &str = "answer is";
    let at = text
        .as_bytes()
        .windows(MARK.len())
        .position(|window| window.eq_ignore_ascii_case(MARK.as_bytes()))?;
    // The mark is ASCII, so what follows it begins a character.
    text.get(at + MARK.len()..)
        .map(|rest| rest.trim_start_matches([':', ' ', '\t', '\n', '*']))
}

/// A text that is a number and nothing else, normalized as [`extract_answer`] does.
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

/// Length of the sign, currency sign, digits, commas and points at the start.
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
    // A point that ends the sentence is not part of the number.
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
