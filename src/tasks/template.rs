//! The templates of a task: Jinja, as lm-evaluation-harness sets it up.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior, Value};
use regex::Regex;
use serde_json::Value as Json;

use super::load::Row;
use crate::data::{python_method, said_by_jinja};

/// Work that a rendering may do, and that for each byte of the row, in instructions.
const FUEL: (u64, u64) = (2_000_000, 64);

/// Renders the templates of a task.
pub(super) struct Templates {
    environment: Environment<'static>,
}

impl Templates {
    pub fn new() -> Self {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        let mut syntax = SyntaxConfig::builder();
        // Only delimiters can be wrong, and they are the usual ones.
        if let Ok(syntax) = syntax.keep_trailing_newline(true).build() {
            environment.set_syntax(syntax);
        }
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(method);
        let known: Mutex<HashMap<String, Regex>> = Mutex::default();
        let replace = move |text: &str, pattern: &str, with: &str, named: Kwargs| {
            let count: Option<usize> = named.get("count")?;
            named.assert_all_used()?;
            let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
            let pattern = match known.get(pattern) {
                Some(pattern) => pattern.clone(),
                None => {
                    let compiled = Regex::new(pattern).map_err(|e| invalid(e.to_string()))?;
                    known.entry(pattern.to_string()).or_insert(compiled).clone()
                }
            };
            let with = replacement(with);
            Ok::<_, Error>(
                pattern
                    .replacen(text, count.unwrap_or(0), &*with)
                    .into_owned(),
            )
        };
        environment.add_filter("regex_replace", replace);
        Self { environment }
    }

    /// Returns the value that a template has for a row: a column, if the template is its name; the
    /// value itself of a template that is one expression in `{{ }}`; or else a text.
    ///
    /// # Errors
    /// Returns the engine's message.
    pub fn value(&self, template: &str, row: &Row) -> Result<Json, String> {
        if let Some(value) = row.get(template) {
            return Ok(value.clone());
        }
        let bytes: usize = row.values().map(size).sum();
        let mut environment = self.environment.clone();
        let fuel = FUEL.1.saturating_mul(bytes as u64);
        environment.set_fuel(Some(FUEL.0.saturating_add(fuel)));
        let said = |error: Error| said_by_jinja(&error);
        let Some(expression) = expression(template) else {
            let text = environment.render_str(template, Serde(row)).map_err(said)?;
            return Ok(Json::String(text));
        };
        let compiled = environment.compile_expression(expression).map_err(said)?;
        let value = compiled.eval(Serde(row)).map_err(said)?;
        if value.is_undefined() {
            return Err(format!("`{template}` is undefined"));
        }
        serde_json::to_value(&value).map_err(|e| e.to_string())
    }

    /// Returns the text that a template has for a row. A number is written as Python writes it.
    ///
    /// # Errors
    /// Returns the engine's message, or says that the value is no text.
    pub fn text(&self, template: &str, row: &Row) -> Result<String, String> {
        text_of(self.value(template, row)?, template)
    }
}

/// Returns the text of a value.
pub(super) fn text_of(value: Json, what: &str) -> Result<String, String> {
    match value {
        Json::String(text) => Ok(text),
        Json::Number(_) | Json::Bool(_) => Ok(Value::from(Serde(&value)).to_string()),
        Json::Null => Err(format!("`{what}` is null, not a text")),
        Json::Array(_) | Json::Object(_) => Err(format!("`{what}` is no text: {value}")),
    }
}

/// Returns about how many bytes a value has.
fn size(value: &Json) -> usize {
    match value {
        Json::String(text) => text.len(),
        Json::Array(all) => all.iter().map(size).sum(),
        Json::Object(all) => all.values().map(size).sum(),
        _ => 8,
    }
}

/// Returns the expression of a template that is one `{{ expression }}`.
fn expression(template: &str) -> Option<&str> {
    let inner = template.strip_prefix("{{")?.strip_suffix("}}")?;
    (!inner.contains("}}") && !inner.contains("{{") && !inner.starts_with('-')).then_some(inner)
}

/// Converts Python's references to groups, such as `\1`, to those of the regex crate.
pub(super) fn replacement(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, chars.peek().copied()) {
            ('\\', Some(digit)) if digit.is_ascii_digit() => {
                out.push_str("${");
                while let Some(digit) = chars.next_if(char::is_ascii_digit) {
                    out.push(digit);
                }
                out.push('}');
            }
            ('$', _) => out.push_str("$$"),
            _ => out.push(c),
        }
    }
    out
}

fn invalid(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.into())
}

/// Python's methods, with those of lists that chat templates do not need.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if value.kind() == ValueKind::Seq && name == "index" {
        let (wanted,): (&Value,) = from_args(args)?;
        let found = value.try_iter()?.position(|item| item == *wanted);
        return match found {
            Some(index) => Ok(Value::from(index)),
            None => Err(invalid(format!("{wanted} is not in the list {value}"))),
        };
    }
    python_method(state, value, name, args)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row() -> Row {
        let row = json!({
            "question": "Why?\n", "label": 1, "text": "2", "none": null, "flag": true,
            "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "key": " B",
            "answer": "so\n#### 1,200 ", "sentence": "He saw _ and_or it", "ctx": "ÉA [title] b [x] c  d",
            "ends": [" One [a]", "two  three"], "half": 2.0
        });
        match row {
            Json::Object(row) => row,
            _ => Row::new(),
        }
    }

    #[test]
    fn templates_are_those_of_the_harness() {
        let templates = Templates::new();
        let row = row();
        for (template, expected) in [
            ("question", json!("Why?\n")),
            ("label", json!(1)),
            ("text", json!("2")),
            ("Q: {{question}}A:\n", json!("Q: Why?\nA:\n")),
            ("{{choices.label.index(key.lstrip())}}", json!(1)),
            ("{{choices.text}}", json!(["a", "b"])),
            ("{{[text, key]}}", json!(["2", " B"])),
            ("{{ (text|int) - 1 }}", json!(1)),
            ("{{ {\"1\": 0, \"2\": 1}[text] }}", json!(1)),
            (
                "{{answer.split('####')[-1].strip() if answer is defined else other}}",
                json!("1,200"),
            ),
            ("{{sentence.split('_', 1)[1].strip()}}", json!("and_or it")),
            ("{{ctx.capitalize()}}", json!("Éa [title] b [x] c  d")),
            (
                "{{ctx | replace(' [title]', '. ') | regex_replace('\\\\[.*?\\\\]', '') | replace('  ', ' ')}}",
                json!("ÉA. b c d"),
            ),
            (
                "{{ends | map('trim') | map('regex_replace', '\\\\[.*?\\\\]', '') | map('replace', '  ', ' ') | list}}",
                json!(["One ", "two three"]),
            ),
            (
                "{{text | regex_replace('(\\\\d)', '<\\\\1$>')}}",
                json!("<2$>"),
            ),
            ("{{flag}} {{half}}", json!("True 2.0")),
        ] {
            assert_eq!(templates.value(template, &row), Ok(expected), "{template}");
        }
        assert_eq!(templates.text("{{half}}", &row).unwrap(), "2.0");
        assert_eq!(templates.text("flag", &row).unwrap(), "True");
        for (template, reason) in [
            ("{{ other }}", "undefined"),
            ("a {{ other }}", "undefined"),
            ("{{ choices.other }}", "undefined"),
            ("{{ choices.label.index('C') }}", "is not in the list"),
            ("{{ text | regex_replace('(', '') }}", "regex"),
            ("{{", "syntax"),
            ("none", "null"),
            ("choices", "no text"),
        ] {
            let error = templates.text(template, &row).unwrap_err();
            assert!(error.contains(reason), "{template}: {error}");
        }
    }
}
