//! Numbers as people write them, read without rounding.

/// Signs of currencies.
const CURRENCIES: [char; 6] = ['$', '€', '£', '¥', '₹', '₽'];

/// Largest power of ten that a number is multiplied by when it is read.
const MAX_EXPONENT: i64 = 400;

/// A number, a fraction, or numbers in a row such as a time.
#[derive(Clone, Debug, Eq)]
pub(super) struct Quantity {
    /// Normalized numbers, the first with its sign.
    numbers: Vec<String>,
    /// What separates them: `:` or `/`.
    separator: Option<char>,
    /// Sign of a currency, or `%`.
    sign: Option<char>,
}

impl PartialEq for Quantity {
    /// Compares values. A sign of a currency and `%` count if both have one.
    fn eq(&self, other: &Self) -> bool {
        let signs = self.sign.is_none() || other.sign.is_none() || self.sign == other.sign;
        self.numbers == other.numbers && self.separator == other.separator && signs
    }
}

impl Quantity {
    /// Reads a quantity at the start of a text. Returns it with the text behind it.
    pub fn read(text: &str) -> Option<(Self, &str)> {
        let (mut negative, mut sign, mut rest) = (false, None, text.trim_start());
        loop {
            let mut chars = rest.chars();
            match chars.next()? {
                '-' | '−' | '–' | '－' if !negative => negative = true,
                '+' => {}
                '\\' if chars.as_str().starts_with('$') => {}
                c if CURRENCIES.contains(&c) && sign.is_none() => {
                    sign = Some(c);
                    chars = chars.as_str().trim_start().chars();
                }
                _ => break,
            }
            rest = chars.as_str();
        }
        let (first, mut rest) = number(rest)?;
        let mut numbers = vec![signed(first, negative)];
        let mut separator = None;
        while let Some((found, number, after)) = next_part(rest) {
            if separator.is_some_and(|separator| separator != found) {
                break;
            }
            separator = Some(found);
            numbers.push(number);
            rest = after;
        }
        let behind = rest.trim_start_matches([' ', '\\']);
        if let Some(c) = behind
            .chars()
            .next()
            .filter(|c| *c == '%' || CURRENCIES.contains(c))
            && sign.is_none()
        {
            (sign, rest) = (Some(c), &behind[c.len_utf8()..]);
        }
        let quantity = Self {
            numbers,
            separator,
            sign,
        };
        Some((quantity, rest))
    }

    /// Returns whether there is neither a sign of a currency nor `%`.
    pub fn is_bare(&self) -> bool {
        self.sign.is_none()
    }

    /// Returns the number, if it is one number. Signs of currencies and `%` do not matter.
    pub fn plain(&self) -> Option<&str> {
        match self.numbers.as_slice() {
            [number] if self.separator.is_none() => Some(number),
            _ => None,
        }
    }
}

/// Returns whether a number that ends before `rest` is a part of something larger: a sum, a range,
/// a mixed fraction, a date, a row of numbers.
pub(super) fn continues(rest: &str) -> bool {
    let behind = rest.trim_start_matches(' ');
    let mut chars = behind.chars();
    let Some(first) = chars.next() else {
        return false;
    };
    let digit_follows = || chars.as_str().trim_start().starts_with(is_digit);
    match first {
        '/' | '*' | '×' | '÷' | '^' | '·' | '⁄' => true,
        '+' | '-' | '−' | '–' | ':' | '\'' => digit_follows(),
        '.' | ',' => chars.as_str().starts_with(is_digit),
        first => {
            let words = ["and ", "or ", "to "];
            let second = words.iter().find_map(|word| behind.strip_prefix(word));
            is_digit(first) || second.is_some_and(|second| second.starts_with(is_digit))
        }
    }
}

fn is_digit(c: char) -> bool {
    c.is_ascii_digit()
}

fn signed(number: String, negative: bool) -> String {
    if negative && number != "0" {
        format!("-{number}")
    } else {
        number
    }
}

/// Reads a separator and the number after it.
fn next_part(text: &str) -> Option<(char, String, &str)> {
    let behind = text.trim_start_matches(' ');
    let (separator, after) = if let Some(after) = behind.strip_prefix(['/', '⁄']) {
        ('/', after.trim_start_matches(' '))
    } else {
        (':', text.strip_prefix(':')?)
    };
    if !after.starts_with(is_digit) {
        return None;
    }
    let (number, rest) = number(after)?;
    Some((separator, number, rest))
}

/// Reads a number without a sign. Returns it normalized, with the text behind it.
fn number(text: &str) -> Option<(String, &str)> {
    let run = text
        .find(|c: char| !is_digit(c) && c != '.' && c != ',')
        .unwrap_or(text.len());
    // A point or comma at the end belongs to the sentence.
    let run = text[..run].trim_end_matches(['.', ',']).len();
    let (mut whole, mut fraction) = separated(&text[..run])?;
    let mut rest = &text[run..];
    if fraction.is_empty() && run <= 3 {
        while let Some((group, after)) = spaced_group(rest) {
            whole.push_str(group);
            rest = after;
        }
        if whole.len() > run
            && let Some(after) = rest.strip_prefix(['.', ','])
        {
            let digits = after.find(|c| !is_digit(c)).unwrap_or(after.len());
            fraction.push_str(&after[..digits]);
            if digits > 0 {
                rest = &after[digits..];
            }
        }
    }
    if let Some((exponent, after)) = power_of_ten(rest) {
        (whole, fraction) = shifted(&whole, &fraction, exponent)?;
        rest = after;
    }
    let (whole, fraction) = (
        whole.trim_start_matches('0'),
        fraction.trim_end_matches('0'),
    );
    let mut out = String::from(if whole.is_empty() { "0" } else { whole });
    if !fraction.is_empty() {
        out.push('.');
        out.push_str(fraction);
    }
    Some((out, rest))
}

/// Splits digits with points and commas into the digits before and after the decimal separator.
fn separated(run: &str) -> Option<(String, String)> {
    let (points, commas) = (run.matches('.').count(), run.matches(',').count());
    let decimal = match (points, commas) {
        (0, 0) => None,
        (1, 0) => Some('.'),
        (0, 1) if grouped(run, ',') => None,
        (0, 1) => Some(','),
        (_, 0) | (0, _) => None,
        _ => run.chars().rev().find(|c| *c == '.' || *c == ','),
    };
    let (whole, fraction) = match decimal {
        Some(decimal) => run.rsplit_once(decimal)?,
        None => (run, ""),
    };
    let group = if whole.contains(',') { ',' } else { '.' };
    let known = match whole.contains(['.', ',']) {
        true => grouped(whole, group),
        false => true,
    };
    let digits = whole.replace(group, "");
    let is_number = !(digits.is_empty() && fraction.is_empty())
        && digits.chars().chain(fraction.chars()).all(is_digit);
    (known && is_number).then(|| (digits, fraction.to_string()))
}

/// Returns whether the digits are in groups: the last of three, those between of two or three (as
/// in India), and the first of one to three, without a zero at the start.
fn grouped(run: &str, separator: char) -> bool {
    let groups: Vec<&str> = run.split(separator).collect();
    let (Some(first), Some(last)) = (groups.first(), groups.last()) else {
        return false;
    };
    let between = groups.get(1..groups.len() - 1).unwrap_or(&[]);
    groups.len() > 1
        && (1..=3).contains(&first.len())
        && !first.starts_with('0')
        && last.len() == 3
        && between.iter().all(|group| (2..=3).contains(&group.len()))
}

/// Reads a space or apostrophe and the three digits behind it, which are a group of thousands.
fn spaced_group(text: &str) -> Option<(&str, &str)> {
    let after = text.strip_prefix([' ', '\u{a0}', '\u{202f}', '\u{2009}', '\'', '’'])?;
    let digits = after.find(|c| !is_digit(c)).unwrap_or(after.len());
    (digits == 3).then(|| after.split_at(3))
}

/// Reads `e5`, or a multiplication by `10^5`.
fn power_of_ten(text: &str) -> Option<(i64, &str)> {
    let after = match text.strip_prefix(['e', 'E']) {
        Some(after) => after,
        None => text
            .trim_start_matches(' ')
            .strip_prefix(['x', '×', '*', '·'])?
            .trim_start_matches(' ')
            .strip_prefix("10^")?,
    };
    let (braced, after) = match after.strip_prefix('{') {
        Some(after) => (true, after),
        None => (false, after),
    };
    let (negative, digits) = match after.strip_prefix(['-', '−']) {
        Some(digits) => (true, digits),
        None => (false, after.strip_prefix('+').unwrap_or(after)),
    };
    let end = digits.find(|c| !is_digit(c)).unwrap_or(digits.len());
    let exponent: i64 = digits[..end].parse().ok()?;
    let mut rest = &digits[end..];
    if braced {
        rest = rest.strip_prefix('}')?;
    }
    if rest.starts_with(char::is_alphanumeric) {
        return None;
    }
    Some((if negative { -exponent } else { exponent }, rest))
}

/// Multiplies a number by a power of ten.
fn shifted(whole: &str, fraction: &str, exponent: i64) -> Option<(String, String)> {
    if exponent.abs() > MAX_EXPONENT {
        return None;
    }
    let n = usize::try_from(exponent.abs()).ok()?;
    let zeros = "0".repeat(n);
    Some(if exponent >= 0 {
        let fraction = format!("{fraction}{zeros}");
        let (moved, left) = fraction.split_at(n);
        (format!("{whole}{moved}"), left.to_string())
    } else {
        let whole = format!("{zeros}{whole}");
        let (left, moved) = whole.split_at(whole.len() - n);
        (left.to_string(), format!("{moved}{fraction}"))
    })
}
