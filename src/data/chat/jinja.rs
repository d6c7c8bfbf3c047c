//! The environment that templates are written for: Jinja with Python's methods and the checks of
//! [`bounds`], and what transformers adds for chats.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::{SyntaxConfig, SyntaxConfigBuilder};
use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;
use serde_json::Value as Json;

use super::bounds;

/// Variables that `{% generation %}` and `{% endgeneration %}` print.
pub(super) const MARKS: [&str; 2] = ["elora_generation_starts", "elora_generation_ends"];

/// Deepest nesting of blocks and macros. Templates of models nest less than 20 levels.
const RECURSION: usize = 150;

pub(super) fn invalid(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.into())
}

/// Returns an environment for templates of strangers: with the checks that [`rewrite`] puts into
/// them, Python's methods, and nothing that opens a file. It needs a bound on its fuel, which
/// [`fuel`] gives.
///
/// [`rewrite`]: super::source::rewrite
/// [`fuel`]: super::fuel
pub(crate) fn bounded(set: impl FnOnce(&mut SyntaxConfigBuilder)) -> Environment<'static> {
    let mut env = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    set(&mut syntax);
    // Only delimiters can be wrong, and they are the usual ones.
    if let Ok(syntax) = syntax.build() {
        env.set_syntax(syntax);
    }
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_recursion_limit(RECURSION);
    env.set_unknown_method_callback(method);
    bounds::add_to(&mut env);
    env.add_filter("tojson", |state: &State, args: Rest<ValueOrKwargs>| {
        tojson(state, args, false)
    });
    env
}

/// Puts `tojson` as Jinja itself has it into an environment: its text may stand in a page, and keys
/// are sorted.
pub(crate) fn add_escaped_json(env: &mut Environment<'static>) {
    env.add_filter("tojson", |state: &State, args: Rest<ValueOrKwargs>| {
        tojson(state, args, true)
    });
}

/// Returns an environment with the functions and filters that transformers defines. `time` is what
/// `strftime_now` formats, in seconds since 1970.
pub(super) fn environment(time: i64) -> Environment<'static> {
    let mut env = bounded(|syntax| {
        syntax.trim_blocks(true).lstrip_blocks(true);
    });
    env.add_test("sequence", |value: &Value| {
        let kinds = [
            ValueKind::String,
            ValueKind::Seq,
            ValueKind::Map,
            ValueKind::Undefined,
        ];
        kinds.contains(&value.kind())
    });
    env.add_test("iterable", |value: &Value| {
        !value.is_none() && value.try_iter().is_ok()
    });
    env.add_function("raise_exception", |state: &State, message: Value| {
        bounds::look(state, &message)?;
        Err::<Value, _>(invalid(message.to_string()))
    });
    env.add_function("strftime_now", move |format: &str| strftime(format, time));
    env
}

/// Returns the current time in seconds since 1970.
pub(super) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(0))
}

/// Python's methods of strings, lists and dicts. Those that `pycompat` lacks, or has in another
/// way, stand here.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    bounds::call(state, value, name, args)?;
    let result = match (value.as_str(), name) {
        (Some(text), "removeprefix" | "removesuffix") => {
            let (affix,): (&str,) = from_args(args)?;
            let rest = if name == "removeprefix" {
                text.strip_prefix(affix)
            } else {
                text.strip_suffix(affix)
            };
            Ok(Value::from(rest.unwrap_or(text)))
        }
        (Some(text), "title") => {
            let () = from_args(args)?;
            Ok(Value::from(title(text)))
        }
        (Some(text), "splitlines") if args.is_empty() => {
            Ok(split_lines(text).into_iter().map(Value::from).collect())
        }
        (None, "index") if value.kind() == ValueKind::Seq => {
            let (wanted,): (&Value,) = from_args(args)?;
            let found = value.try_iter()?.position(|item| item == *wanted);
            let short = |value: &Value| value.to_string().chars().take(80).collect::<String>();
            let missing = || format!("{} is not in the list {}", short(wanted), short(value));
            found.map(Value::from).ok_or_else(|| invalid(missing()))
        }
        _ => pycompat::unknown_method_callback(state, value, name, args),
    };
    bounds::made(state, result?)
}

/// A letter is a capital where no letter is before it.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase());
        } else {
            let mut upper = c.to_uppercase();
            out.extend(upper.next());
            // Two letters for one, as of `ß`: only the first is a capital.
            out.extend(upper.flat_map(char::to_lowercase));
        }
        inside = c.is_lowercase() || c.is_uppercase();
    }
    out
}

/// Python's lines also end at other separators than line breaks.
fn split_lines(text: &str) -> Vec<&str> {
    let ends = |c: char| matches!(c, '\n'..='\r' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some((at, end)) = rest.char_indices().find(|(_, c)| ends(*c)) {
        lines.push(&rest[..at]);
        rest = &rest[at + end.len_utf8()..];
        if end == '\r' {
            rest = rest.strip_prefix('\n').unwrap_or(rest);
        }
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

/// `json.dumps`, with transformers' `ensure_ascii=False` as the default; or, `escaped`, with sorted
/// keys and without characters that a page gives a meaning.
fn tojson(state: &State, args: Rest<ValueOrKwargs>, escaped: bool) -> Result<Value, Error> {
    let args = bounds::values(args);
    type Args<'a> = (
        &'a Value,
        Option<Value>,
        Option<Value>,
        Option<Value>,
        Kwargs,
    );
    let (value, ensure_ascii, indent, separators, named): Args<'_> = from_args(&args)?;
    let given = |position: Option<Value>, name: &str| {
        let value = match position {
            Some(value) => Some(value),
            None => named.get::<Option<Value>>(name)?,
        };
        Ok::<_, Error>(value.filter(|v| !v.is_none() && !v.is_undefined()))
    };
    let ensure_ascii = given(ensure_ascii, "ensure_ascii")?.map_or(escaped, |v| v.is_true());
    let (indent, separators) = (given(indent, "indent")?, given(separators, "separators")?);
    let sort_keys = given(None, "sort_keys")?.map_or(escaped, |v| v.is_true());
    named.assert_all_used()?;
    let indent = match indent {
        None => None,
        Some(value) => Some(match value.as_str() {
            Some(text) => text.to_string(),
            // More blanks than a line has are a mistake, or an attack.
            None => " ".repeat(usize::try_from(value)?.min(80)),
        }),
    };
    let separators = match separators {
        None => {
            let item = if indent.is_some() { "," } else { ", " };
            [item.to_string(), ": ".to_string()]
        }
        Some(value) => {
            let texts: Vec<String> = value.try_iter()?.map(|text| text.to_string()).collect();
            <[String; 2]>::try_from(texts).map_err(|_| invalid("two separators are needed"))?
        }
    };
    if value.is_undefined() {
        return Err(invalid("an undefined value has no JSON"));
    }
    let json = serde_json::to_value(value).map_err(|e| invalid(e.to_string()))?;
    let mut writer = JsonWriter {
        out: String::new(),
        limit: bounds::bytes(state),
        ensure_ascii,
        escaped,
        indent,
        separators,
        sort_keys,
    };
    writer.value(&json, 0);
    if writer.out.len() > writer.limit {
        return Err(bounds::too_large());
    }
    Ok(Value::from(writer.out))
}

struct JsonWriter {
    out: String,
    /// Length from which on nothing is written.
    limit: usize,
    ensure_ascii: bool,
    escaped: bool,
    indent: Option<String>,
    separators: [String; 2],
    sort_keys: bool,
}

impl JsonWriter {
    fn value(&mut self, value: &Json, depth: usize) {
        match value {
            Json::Array(items) => self.items(['[', ']'], items, depth, |writer, item| {
                writer.value(item, depth + 1);
            }),
            Json::Object(map) => {
                let mut entries: Vec<_> = map.iter().collect();
                if self.sort_keys {
                    entries.sort_by_key(|(key, _)| *key);
                }
                self.items(['{', '}'], &entries, depth, |writer, (key, value)| {
                    writer.text(key);
                    let separator = writer.separators[1].clone();
                    writer.out.push_str(&separator);
                    writer.value(value, depth + 1);
                });
            }
            Json::String(text) => self.text(text),
            Json::Number(number) => match number.as_f64().filter(|_| number.is_f64()) {
                Some(float) => self.out.push_str(&python_float(float)),
                None => self.out.push_str(&number.to_string()),
            },
            Json::Null | Json::Bool(_) => self.out.push_str(&value.to_string()),
        }
    }

    fn items<T>(
        &mut self,
        [open, close]: [char; 2],
        items: &[T],
        depth: usize,
        mut write: impl FnMut(&mut Self, &T),
    ) {
        self.out.push(open);
        for (i, item) in items.iter().enumerate() {
            if self.out.len() > self.limit {
                return;
            }
            if i > 0 {
                let separator = self.separators[0].clone();
                self.out.push_str(&separator);
            }
            self.line(depth + 1);
            write(self, item);
        }
        if !items.is_empty() {
            self.line(depth);
        }
        self.out.push(close);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            for _ in 0..depth {
                self.out.push_str(indent);
            }
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' '
                    || (self.ensure_ascii && !c.is_ascii())
                    || (self.escaped && matches!(c, '<' | '>' | '&' | '\'')) =>
                {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// Returns a float as Python prints it: the shortest digits that give it back, with an exponent
/// below 1e-4 and from 1e16.
fn python_float(x: f64) -> String {
    let scientific = format!("{x:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else {
        return scientific;
    };
    match exponent.parse::<i32>() {
        Ok(exponent) if !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ => format!("{x:?}"),
    }
}

/// Python's `strftime` in UTC.
fn strftime(format: &str, time: i64) -> Result<String, Error> {
    const DAYS: [&str; 7] = [
        "Monday",
        "Tuesday",
        "Wednesday",
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
    ];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let (days, second) = (time.div_euclid(86_400), time.rem_euclid(86_400));
    let (year, month, day, day_of_year) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    // 1970-01-01 was a Thursday.
    let weekday = DAYS[(days + 3).rem_euclid(7) as usize];
    let month_name = MONTHS[month - 1];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut code = chars.next();
        let padded = code != Some('-');
        if !padded {
            code = chars.next();
        }
        let mut number = |value: i64, width: usize| {
            let width = if padded { width } else { 0 };
            out.push_str(&format!("{value:0width$}"));
        };
        match code {
            Some('Y') => number(year, 0),
            Some('y') => number(year.rem_euclid(100), 2),
            Some('m') => number(month as i64, 2),
            Some('d') => number(day, 2),
            Some('j') => number(day_of_year, 3),
            Some('H') => number(hour, 2),
            Some('I') => number((hour + 11) % 12 + 1, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('%') => out.push('%'),
            other => {
                let code = other.map(String::from).unwrap_or_default();
                return Err(invalid(format!("strftime_now does not know `%{code}`")));
            }
        }
    }
    Ok(out)
}

/// Returns year, month, day of the month and day of the year of a day since 1970-01-01. Years are
/// counted from March, so that the leap day is the last one.
fn civil(days: i64) -> (i64, usize, i64, i64) {
    // Days since 0000-03-01, in eras of 400 years.
    let days = days.saturating_add(719_468);
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day_of_month = day - (153 * month + 2) / 5 + 1;
    let (month, year) = if month < 10 {
        (month + 3, era * 400 + year)
    } else {
        (month - 9, era * 400 + year + 1)
    };
    let leap = i64::from(year % 4 == 0 && (year % 100 != 0 || year % 400 == 0));
    // The year begins 59 or 60 days before March.
    let day_of_year = if month > 2 {
        day + 60 + leap
    } else {
        day - 305
    };
    (year, month as usize, day_of_month, day_of_year)
}
