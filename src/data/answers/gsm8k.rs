//! GSM8K's exact match as lm-evaluation-harness computes it (task `gsm8k`, version 3): two ways to
//! take the answer from an output, and what is removed before texts are compared.

/// Mark before the final answer of GSM8K's solutions.
pub(crate) const HASHES: &str = "####";

/// Texts that end an output.
const UNTIL: [&str; 3] = ["Question:", "</s>", "<|im_end|>"];

/// Returns whether a solution has GSM8K's form: its last `#### ` is followed by a number.
pub(crate) fn is_reference(solution: &str) -> bool {
    let answer = ignored(solution);
    let digits = answer.strip_prefix('-').unwrap_or(&answer);
    solution.contains("#### ")
        && digits.starts_with(|c: char| c.is_ascii_digit())
        && digits.chars().all(|c| c.is_ascii_digit() || c == '.')
}

/// Returns whether an output's first match of `#### (\-?[0-9\.\,]+)` equals the answer of
/// `solution`, GSM8K's worked answer.
pub fn strict(output: &str, solution: &str) -> bool {
    let output = until(output);
    let found = output.split("#### ").skip(1).find_map(|rest| {
        let digits = rest.strip_prefix('-').unwrap_or(rest);
        let end = run(digits, |c| c.is_ascii_digit() || matches!(c, '.' | ','));
        (end > 0).then(|| &rest[..rest.len() - digits.len() + end])
    });
    found.is_some_and(|found| ignored(found) == ignored(solution))
}

/// Returns whether an output's last match of `(-?[$0-9.,]{2,})|(-?[0-9]+)` equals the answer of
/// `solution`, GSM8K's worked answer.
pub fn flexible(output: &str, solution: &str) -> bool {
    let mut rest = until(output);
    let mut last = None;
    while let Some(at) = rest.find(|c: char| c == '-' || in_class(c)) {
        rest = &rest[at..];
        let digits = rest.strip_prefix('-').unwrap_or(rest);
        let minus = rest.len() - digits.len();
        let (wide, narrow) = (run(digits, in_class), run(digits, |c| c.is_ascii_digit()));
        let end = match (wide, narrow) {
            (2.., _) => wide,
            (_, 1..) => narrow,
            _ => 0,
        };
        if end > 0 {
            last = Some(&rest[..minus + end]);
        }
        // All of these characters are one byte long.
        rest = &rest[(minus + end).max(1)..];
    }
    last.is_some_and(|last| ignored(last) == ignored(solution))
}

fn in_class(c: char) -> bool {
    c.is_ascii_digit() || matches!(c, '$' | '.' | ',')
}

/// Returns the length of the characters at the start that are of a kind.
fn run(text: &str, of_kind: impl Fn(char) -> bool) -> usize {
    text.find(|c| !of_kind(c)).unwrap_or(text.len())
}

/// Cuts an output at the first of the texts that end it.
fn until(output: &str) -> &str {
    UNTIL.iter().fold(output, |output, stop| {
        output.split(stop).next().unwrap_or(output)
    })
}

/// Removes what does not count: `,`, `$`, all up to the last `#### `, and a point at the end. The
/// rest is in lower case.
fn ignored(text: &str) -> String {
    let text = text.replace([',', '$'], "");
    let text = text.rsplit("#### ").next().unwrap_or(&text);
    text.strip_suffix('.').unwrap_or(text).to_lowercase()
}
