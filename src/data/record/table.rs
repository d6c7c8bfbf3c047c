//! Tables: fields between separators, as RFC 4180 describes CSV.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Record, bad_record, record_of};
use crate::error::{Error, Result};

/// Reads the records of a table whose first row names the fields.
pub(super) fn records(text: &str, separator: char, path: &Path) -> Result<Vec<Record>> {
    let mut rows = rows(text, separator)
        .map_err(|line| Error::invalid_file(path, format!("line {line}: a quote is not closed")))?
        .into_iter();
    let Some(names) = rows.next() else {
        return Ok(Vec::new());
    };
    let mut records = Vec::new();
    for (i, row) in rows.enumerate() {
        if row.len() != names.len() {
            let reason = format!(
                "{} fields, but the first row names {}",
                row.len(),
                names.len()
            );
            return Err(bad_record(path, i, reason));
        }
        let fields = names.iter().map(|name| name.trim().to_string()).zip(row);
        let map: Map<String, Value> = fields.map(|(name, text)| (name, text.into())).collect();
        records.push(record_of(Value::Object(map)).map_err(|r| bad_record(path, i, r))?);
    }
    Ok(records)
}

/// Splits a text into rows of fields. A field in quotes may hold separators, line breaks, and quotes
/// that are doubled. Empty lines are no rows. Returns the line of a quote that is not closed.
fn rows(text: &str, separator: char) -> Result<Vec<Vec<String>>, usize> {
    let mut rows = Vec::new();
    let (mut row, mut field) = (Vec::new(), String::new());
    let (mut line, mut quoted, mut opened) = (1, None, false);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        line += usize::from(c == '\n');
        if quoted.is_some() {
            match c {
                '"' if chars.peek() == Some(&'"') => {
                    chars.next();
                    field.push('"');
                }
                '"' => quoted = None,
                c => field.push(c),
            }
            continue;
        }
        match c {
            '"' if field.is_empty() && !opened => {
                quoted = Some(line);
                opened = true;
            }
            '\r' if chars.peek() == Some(&'\n') => {}
            '\n' => {
                if !row.is_empty() || !field.is_empty() || opened {
                    row.push(std::mem::take(&mut field));
                    rows.push(std::mem::take(&mut row));
                }
                opened = false;
            }
            c if c == separator => {
                row.push(std::mem::take(&mut field));
                opened = false;
            }
            c => field.push(c),
        }
    }
    if let Some(line) = quoted {
        return Err(line);
    }
    if !row.is_empty() || !field.is_empty() || opened {
        row.push(field);
        rows.push(row);
    }
    Ok(rows)
}
