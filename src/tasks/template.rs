//! The templates of a task: Jinja, as lm-evaluation-harness sets it up.

use std::cell::Cell;
use std::sync::Arc;

use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior, Value};
use serde_json::Value as Json;

use super::load::Row;
use super::pattern::{Patterns, Replacement};
use crate::data::{
    add_escaped_json, bounded_jinja, jinja_expression, jinja_fuel, pay_in_jinja, rewrite_jinja,
    said_by_jinja,
};

/// Bytes that the templates of a task may make in all, those for each row, and those for each byte
/// of a row.
const MADE: (u64, u64, u64) = (64 << 20, 64 << 10, 64);

/// Renders the templates of a task, within bounds of work and memory.
pub(super) struct Templates {
    environment: Environment<'static>,
    /// Bytes that may still be made.
    left: Cell<u64>,
}

impl Templates {
    pub fn new() -> Self {
        let mut environment = bounded_jinja(|syntax| {
            syntax.keep_trailing_newline(true);
        });
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        add_escaped_json(&mut environment);
        let known = Arc::new(Patterns::default());
        let replace = move |state: &State, text: &str, pattern: &str, with: &str, named: Kwargs| {
            let count: Option<usize> = named.get("count")?;
            named.assert_all_used()?;
            let pattern = known.get(pattern).map_err(invalid)?;
            state.consume_fuel(pattern.cost(text.len()))?;
            let with = Replacement::new(with);
            pattern.replace(text, &with, count.unwrap_or(0), |bytes| {
                pay_in_jinja(state, bytes)
            })
        };
        environment.add_filter("regex_replace", replace);
        Self {
            environment,
            left: Cell::new(MADE.0),
        }
    }

    /// Allows what the templates may make of one more row of so many bytes.
    pub fn allow(&self, bytes: usize) {
        let bytes = (bytes as u64).saturating_mul(MADE.2);
        let more = bytes.saturating_add(MADE.1);
        self.left.set(self.left.get().saturating_add(more));
    }

    /// Counts what was made.
    ///
    /// # Errors
    /// Returns a sentence if it is more than the rows allow.
    pub fn pay(&self, bytes: usize) -> Result<(), String> {
        let left = self.left.get().checked_sub(bytes as u64);
        self.left.set(left.unwrap_or(0));
        left.map(|_| ())
            .ok_or_else(|| "the task makes too much text of its rows".into())
    }

    /// Returns the value that a template has for a row: a column, if the template is its name; the
    /// value itself of a template that is one expression in `{{ }}`; or else a text.
    ///
    /// # Errors
    /// Returns the engine's message, or says that the value is too large.
    pub fn value(&self, template: &str, row: &Row) -> Result<Json, String> {
        let value = match row.get(template) {
            Some(value) => value.clone(),
            None => self.made(template, row)?,
        };
        self.pay(size(&value))?;
        Ok(value)
    }

    fn made(&self, template: &str, row: &Row) -> Result<Json, String> {
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(jinja_fuel(row_size(row) as u64)));
        let said = |error: Error| said_by_jinja(&error);
        let Some(expression) = jinja_expression(template)? else {
            let source = rewrite_jinja(template)?.text;
            let text = environment.render_str(&source, Serde(row)).map_err(said)?;
            return Ok(Json::String(text));
        };
        let compiled = environment.compile_expression(&expression).map_err(said)?;
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
    8 + match value {
        Json::String(text) => text.len(),
        Json::Array(all) => all.iter().map(size).sum(),
        Json::Object(all) => row_size(all),
        _ => 0,
    }
}

/// Returns about how many bytes a row has.
pub(super) fn row_size(row: &Row) -> usize {
    row.iter().map(|(key, value)| key.len() + size(value)).sum()
}

fn invalid(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.into())
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
            ("{{", "a tag has no end"),
            ("none", "null"),
            ("choices", "no text"),
        ] {
            let error = templates.text(template, &row).unwrap_err();
            assert!(error.contains(reason), "{template}: {error}");
        }
    }

    #[test]
    fn a_single_expression_is_a_value() {
        let templates = Templates::new();
        let row = row();
        for (template, expected) in [
            ("{{ {'a': {'b': [1, 2]}}['a'] }}", json!({"b": [1, 2]})),
            ("{{- '}}' -}}", json!("}}")),
            ("{{ half + 1 }}", json!(3.0)),
            ("{{ [1] + choices.text }}", json!([1, "a", "b"])),
            ("{{ (1, 2) }}", json!([1, 2])),
            ("{{1}}{{2}}", json!("12")),
            ("{{ 'a' }}\n", json!("a\n")),
            (
                "{% for c in choices.text %}\n{{ c }}{% endfor %}\n",
                json!("\na\nb\n"),
            ),
            // As Jinja itself has it, with sorted keys and for use in a page.
            (
                "{{ {'b': '<é>', 'a': none}|tojson }}",
                json!("{\"a\": null, \"b\": \"\\u003c\\u00e9\\u003e\"}"),
            ),
        ] {
            assert_eq!(templates.value(template, &row), Ok(expected), "{template}");
        }
    }

    /// Templates of the same kind as those of chats, in the place of which a task has an expression,
    /// and regular expressions that grow, or take long.
    fn hostile() -> Vec<(String, bool)> {
        let mut all = crate::data::hostile_templates::templates();
        let mut refused = |source: String| all.push((source, true));
        let sum = ["[s, s, s, s]"; 2].join(" + ");
        let nested = (0..14).fold("[1]".to_string(), |inner, _| format!("[{inner}] * 9"));
        for source in [
            "{{ 'x' * 10**12 }}".into(),
            "{{ [1] * 10**12 }}".into(),
            "{{ range(10**9)|list }}".into(),
            format!("{{{{ {nested} }}}}"),
            format!("{{{{ {} }}}}", "[".repeat(99_999)),
            "{{ ('x' * 99999)|regex_replace('', 'x' * 99999) }}".into(),
            "{{ ('x' * 999999)|regex_replace('.*', '\\\\0' * 9999) }}".into(),
            "{{ (['x'] * 9999)|map('regex_replace', '', 'x' * 99999)|list }}".into(),
            "{% set n = namespace(a='xx') %}{% for i in range(99) %}{% set n.a = \
             n.a|regex_replace('(.)', '\\\\1\\\\1') %}{% endfor %}{{ n.a|length }}"
                .into(),
            "{% for i in range(99999) %}{{ 'a'|regex_replace('b' ~ i, '') }}{% endfor %}".into(),
            "{{ 'a'|regex_replace('a' * 99999, '') }}".into(),
            "{{ 'a'|regex_replace('(\\\\w{99}){99}', '') }}".into(),
            "{% set s = 'a' * 999999 %}{% for i in range(99999) %}{{ \
             s|regex_replace('(a|aa)*\\\\w{20}b', '') }}{% endfor %}"
                .into(),
            format!("{{% set s = [1] * 9999 %}}{{{{ ({sum}).index(2) }}}}"),
        ] {
            refused(source);
        }
        all.push((format!("{{{{ 1{} }}}}", " + 1".repeat(200_000)), false));
        all.push((format!("{{{{ 1{} }}}}", "|int".repeat(240)), false));
        all
    }

    #[test]
    fn no_template_of_a_task_takes_all_memory_time_or_stack() {
        let name = "tasks::template::tests::no_template_of_a_task_takes_all_memory_time_or_stack";
        crate::data::hostile_templates::are_bounded(name, hostile, |source| {
            let value = Templates::new().value(source, &row())?;
            Ok(size(&value))
        });
    }

    #[test]
    fn rows_allow_so_much_text() {
        let templates = Templates::new();
        let row = row();
        let bytes = || templates.text("{{ 'x' * 1000000 }}", &row).map(|t| t.len());
        let made = (0..1000).take_while(|_| bytes().is_ok()).count();
        assert!((60..70).contains(&made), "{made}");
        assert!(bytes().unwrap_err().contains("too much text"));
        templates.allow(1 << 20);
        assert_eq!(bytes(), Ok(1_000_000));
    }
}
