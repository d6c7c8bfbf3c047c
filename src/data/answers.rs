//! Extracts and compares the final answers of worked solutions.
//!
//! A final answer is a number (with or without a currency sign, a percent sign or a unit), a
//! fraction, a time or another row of numbers, or a text. Numbers are compared digit by digit, so
//! they may have any length, and in the writing of any country: `1,200.50`, `1.200,50`, `1 200.5`
//! and `1.2005e3` are equal. A comma or point that groups three digits once is read as in English:
//! `3,500` is 3500, and `3.500` is 3.5.

mod gsm8k;
mod text;
mod value;

use text::{Writing, first_line, readings, writing};
use value::{Quantity, continues};

pub(crate) use gsm8k::{HASHES, is_reference as is_gsm8k_reference};
pub use gsm8k::{flexible, strict};

/// Number of words that a text may have to be a final answer without a mark before it.
const SHORT: usize = 8;

/// A final answer as it is compared.
enum Answer {
    /// A quantity, and the text behind it that has to follow, such as a unit.
    Quantity(Quantity, String),
    Text(Writing),
}

impl Answer {
    /// Reads an answer that stands alone. Returns `None` if it is empty.
    fn alone(text: &str) -> Option<Self> {
        let plain = writing(text)?;
        let shown = text::stripped(text);
        if let Some((quantity, rest)) = Quantity::read(shown) {
            let rest = rest.trim().trim_end_matches(text::ENDS).trim_end();
            let is_unit = !rest.contains(|c: char| c.is_numeric())
                && rest
                    .starts_with(|c: char| c.is_alphabetic() || matches!(c, '°' | '²' | '³' | 'µ'));
            if rest.is_empty() || is_unit {
                return Some(Answer::Quantity(quantity, text::unit(rest)));
            }
        }
        Some(Answer::Text(plain))
    }

    /// Returns whether a line begins with this answer. If `only`, nothing may follow it.
    fn begins(&self, line: &str, only: bool) -> bool {
        readings(line).any(|line| match self {
            Answer::Text(writing) => writing.begins(line, only),
            Answer::Quantity(expected, unit) => {
                let Some((found, rest)) = Quantity::read(line) else {
                    return false;
                };
                if found != *expected {
                    return false;
                }
                if rest.trim_matches(text::is_end).is_empty() {
                    return true;
                }
                match (unit.as_str(), only) {
                    ("", false) => !continues(rest),
                    ("", true) => text::unit(rest)
                        .trim_matches(text::is_end)
                        .chars()
                        .all(char::is_alphabetic),
                    (unit, _) => text::begins(&text::unit(rest), unit, only),
                }
            }
        })
    }
}

/// Returns the number after the first `####` that is followed by a number, or `None` if there is
/// none. Fractions, times and numbers with a sign of a currency are not plain numbers.
///
/// The number is normalized: without separators of thousands, `+`, leading zeros, and trailing
/// zeros after the point (`1,012.50` becomes `1012.5`, `12.0` becomes `12`, `-0` becomes `0`).
#[doc(hidden)]
pub fn extract_answer(text: &str) -> Option<String> {
    let mut marked = text.split(HASHES).skip(1);
    marked.find_map(|part| Some(Quantity::read(first_line(part))?.0.plain()?.to_string()))
}

/// Returns whether the final answers of `generated` and `reference` are equal. `reference` is a
/// worked solution with `####`, or an answer alone: a number, a fraction, words (`true`, `answer2`,
/// `(C)`, `New York`). The result is `false` if either has no answer.
///
/// The final answer of `generated` is taken after `####`, or else after the first `answer is`,
/// which ends the solutions in LLM-Adapters' files (`The answer is 4.`, `the correct answer is
/// true`), or else in the last `\boxed{}`. A text with none of them is an answer if it is one line
/// that holds nothing else.
///
/// The unit of a reference (`6 apples`), the sign of a currency, and `%` count where both answers
/// have one. Upper and lower case, quotes around an answer, brackets around a word, and a point
/// after it do not count.
pub fn exact_match(generated: &str, reference: &str) -> bool {
    let reference = if reference.contains(HASHES) {
        let Some(answer) = marked_answer(reference) else {
            return false;
        };
        answer
    } else {
        reference.to_string()
    };
    let Some(answer) = Answer::alone(&reference) else {
        return false;
    };
    let several = reference.trim().contains('\n');
    let stated = stated(generated);
    let mut finals = generated
        .split(HASHES)
        .skip(1)
        .chain(stated)
        .chain(boxed(generated))
        .map(|part| if several { part } else { first_line(part) })
        .filter(|line| !line.is_empty())
        .peekable();
    if finals.peek().is_none() {
        let whole = generated.trim();
        return (several || !whole.contains('\n')) && answer.begins(whole, true);
    }
    // The right side of an equation is its result.
    let result = |line: &'_ str| line.rsplit_once('=').map(|(_, right)| right.to_string());
    match &answer {
        Answer::Text(_) => finals.next().is_some_and(|line| {
            answer.begins(line, false)
                || (!reference.contains('=')
                    && result(line).is_some_and(|right| answer.begins(&right, false)))
        }),
        Answer::Quantity(..) => {
            let is_number = |line: &str| readings(line).any(|line| Quantity::read(line).is_some());
            finals
                .map(|line| (line, result(line).filter(|right| is_number(right))))
                .find(|(line, right)| right.is_some() || is_number(line))
                .is_some_and(|(line, right)| {
                    answer.begins(line, false)
                        || right.is_some_and(|right| answer.begins(&right, false))
                })
        }
    }
}

/// Returns an answer that stands alone as it is compared: a plain number is normalized as in
/// [`extract_answer`]. Returns `None` if it is empty.
pub(crate) fn alone(text: &str) -> Option<String> {
    Some(match Answer::alone(text)? {
        Answer::Quantity(quantity, unit) if unit.is_empty() && quantity.is_bare() => {
            quantity.plain().unwrap_or(text.trim()).to_string()
        }
        _ => text.trim().to_string(),
    })
}

/// Returns the answer after `####`: a number if one follows, or else the text.
fn marked_answer(text: &str) -> Option<String> {
    let mut marked = text.split(HASHES).skip(1).map(first_line);
    let is_quantity = |line: &&str| matches!(Answer::alone(line), Some(Answer::Quantity(..)));
    let number = marked.clone().find(is_quantity);
    alone(number.or_else(|| marked.find(|line| !line.is_empty()))?)
}

/// Returns the final answer of a solution: what stands after `####` or `answer is` or in
/// `\boxed{}`, or the text itself if it is one line of a few words: one word, or a number with its
/// unit, or if `is_answer`, up to 8 words.
pub(crate) fn final_answer(solution: &str, is_answer: bool) -> Option<String> {
    if solution.contains(HASHES) {
        return marked_answer(solution);
    }
    if let Some(line) = stated(solution).map(first_line) {
        let few = line.split_whitespace().count() <= SHORT;
        return few.then(|| alone(line)).flatten();
    }
    if let Some(inside) = boxed(solution) {
        return alone(inside);
    }
    let text = solution.trim();
    if text.contains('\n') {
        return None;
    }
    let words = text.split_whitespace().count();
    let is_quantity = || matches!(Answer::alone(text), Some(Answer::Quantity(..)));
    let short = words == 1 || (is_answer && words <= SHORT) || (words <= 4 && is_quantity());
    short.then(|| alone(text)).flatten()
}

/// Returns what is in the last `\boxed{...}`, where solutions in LaTeX have their answer.
fn boxed(text: &str) -> Option<&str> {
    let (_, rest) = text.rsplit_once("\\boxed{")?;
    let mut open = 1usize;
    let end = rest.find(|c: char| {
        match c {
            '{' => open += 1,
            '}' => open -= 1,
            _ => {}
        }
        open == 0
    });
    rest.get(..end?)
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
