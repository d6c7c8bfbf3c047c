//! The rows of a task's files.

use std::cell::Cell;
use std::path::{Path, PathBuf};

use serde::de::DeserializeSeed;
use serde_json::{Map, Value};

use super::spec::TaskSpec;
use crate::data::load_text;
use crate::error::{Error, Result};
use crate::input::json;

/// A row of a data set: the values of its columns.
pub type Row = Map<String, Value>;

/// Other names that files of a split have.
const SPLITS: [(&str, &[&str]); 3] = [
    ("validation", &["valid", "dev"]),
    ("train", &["trainset"]),
    ("test", &[]),
];

/// The rows of a task.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TaskData {
    /// The documents on which the model is evaluated.
    pub documents: Vec<Row>,
    /// The rows from which examples are taken. Empty if there is no file of them.
    pub examples: Vec<Row>,
    /// Whether the examples are from the documents, so that a document may not be its own example.
    pub same: bool,
}

impl TaskData {
    /// Reads the documents from a file, and the examples from another.
    ///
    /// # Errors
    /// Returns the errors of [`TaskSpec::load`].
    pub fn from_files(documents: &Path, examples: Option<&Path>) -> Result<Self> {
        Ok(Self {
            documents: rows(documents)?,
            examples: examples.map(rows).transpose()?.unwrap_or_default(),
            same: examples == Some(documents),
        })
    }
}

impl TaskSpec {
    /// Reads the rows of a task from a folder: `<dir>/<folder>/<split>.jsonl` or `.json`, or
    /// `<dir>/<split>.jsonl`, for the folders that the task names.
    ///
    /// A file is a JSON array of objects, one object after another (JSON Lines), an object with the
    /// rows under its only key, or an object of columns. The rows of Hugging Face's data set viewer
    /// (`{"rows": [{"row": {...}}]}`) are read, too.
    ///
    /// # Errors
    /// Returns [`Error::InvalidFile`] if there is no such file, or if it is of another form, and
    /// [`Error::Io`], [`Error::Json`] and [`Error::InvalidRecord`] if a file cannot be read.
    pub fn load(&self, dir: impl AsRef<Path>) -> Result<TaskData> {
        let dir = dir.as_ref();
        let documents = self.find(dir, self.evaluated_split())?;
        let path = documents.ok_or_else(|| self.missing(dir, self.evaluated_split()))?;
        let shown = self.fewshot_split();
        let examples = match (self.own_examples(), shown) {
            (None, Some(split)) => self.find(dir, split)?,
            _ => None,
        };
        Ok(TaskData {
            documents: rows(&path)?,
            examples: examples
                .as_deref()
                .map(rows)
                .transpose()?
                .unwrap_or_default(),
            same: examples.as_ref() == Some(&path),
        })
    }

    fn find(&self, dir: &Path, split: &str) -> Result<Option<PathBuf>> {
        let others = SPLITS.iter().find(|(name, _)| *name == split);
        let names = std::iter::once(&split).chain(others.map_or(&[][..], |(_, others)| others));
        let names: Vec<&str> = names.copied().collect();
        for folder in self.places(dir) {
            for name in &names {
                for extension in ["jsonl", "json"] {
                    let path = folder.join(format!("{name}.{extension}"));
                    if path.is_file() {
                        return Ok(Some(path));
                    }
                }
            }
            if let Some(parquet) = parquet(&folder, &names) {
                let command = "python -c \"import pandas, sys; pandas.read_parquet(sys.argv[1])\
                               .to_json(sys.argv[2], orient='records', lines=True)\" IN OUT.jsonl";
                let reason = format!("a Parquet file; write it as JSON Lines: {command}");
                return Err(Error::invalid_file(parquet, reason));
            }
        }
        Ok(None)
    }

    fn places(&self, dir: &Path) -> Vec<PathBuf> {
        let own = std::iter::once(&self.task);
        let names = self
            .folders
            .iter()
            .chain(own.filter(|_| self.folders.is_empty()));
        names
            .map(|name| dir.join(name))
            .chain([dir.to_path_buf()])
            .collect()
    }

    fn missing(&self, dir: &Path, split: &str) -> Error {
        let places: Vec<String> = self
            .places(dir)
            .iter()
            .map(|place| place.join(format!("{split}.jsonl")).display().to_string())
            .collect();
        let reason = format!(
            "no rows of the task {}: none of {} is there, nor such a .json",
            self.task,
            places.join(", ")
        );
        Error::invalid_file(dir, reason)
    }
}

/// Finds a Parquet file of a split, such as `validation-00000-of-00001.parquet`.
fn parquet(folder: &Path, splits: &[&str]) -> Option<PathBuf> {
    let mut entries = std::fs::read_dir(folder)
        .ok()?
        .flatten()
        .map(|entry| entry.path());
    entries.find(|path| {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or("");
        name.ends_with(".parquet") && splits.iter().any(|split| name.starts_with(split))
    })
}

/// Reads the rows of a file.
fn rows(path: &Path) -> Result<Vec<Row>> {
    let text = load_text(path)?;
    let bad = |index: usize, reason: String| Error::InvalidRecord {
        path: path.into(),
        record: index + 1,
        reason,
    };
    let mut values = Vec::new();
    let budget = Cell::new(json::budget_of_records(text.len()));
    let mut parser = serde_json::Deserializer::from_str(&text);
    while parser.end().is_err() {
        let value = json::Limited(&budget)
            .deserialize(&mut parser)
            .map_err(|e| bad(values.len(), format!("not JSON: {e}")))?;
        values.push(value);
    }
    if values.len() == 1
        && let Some(value) = values.pop()
    {
        values = unwrapped(value).map_err(|reason| Error::invalid_file(path, reason))?;
    }
    if values.is_empty() {
        return Err(Error::EmptyDataset {
            path: path.into(),
            detail: String::new(),
        });
    }
    let row = |(index, value)| match value {
        Value::Object(row) => Ok(row),
        other => Err(bad(
            index,
            format!("no object of columns: {}", short(&other)),
        )),
    };
    values.into_iter().enumerate().map(row).collect()
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    text.chars().take(60).collect()
}

/// Returns the rows of a file that is one value.
fn unwrapped(value: Value) -> Result<Vec<Value>, String> {
    let map = match value {
        Value::Array(rows) => return Ok(rows),
        Value::Object(map) => map,
        other => return Err(format!("no list of objects: {}", short(&other))),
    };
    let lists = || map.values().filter_map(Value::as_array);
    let n_lists = lists().count();
    if n_lists > 0 && n_lists == map.len() && !lists().flatten().any(Value::is_object) {
        let n = lists().next().map_or(0, Vec::len);
        if let Some((name, list)) = map
            .iter()
            .find(|(_, list)| list.as_array().is_some_and(|list| list.len() != n))
        {
            let found = list.as_array().map_or(0, Vec::len);
            return Err(format!(
                "columns of {n} and {found} values; the latter is `{name}`"
            ));
        }
        let mut rows = vec![Row::new(); n];
        for (name, values) in map {
            if let Value::Array(values) = values {
                for (row, value) in rows.iter_mut().zip(values) {
                    row.insert(name.clone(), value);
                }
            }
        }
        return Ok(rows.into_iter().map(Value::Object).collect());
    }
    let are_rows = |value: &Value| {
        let list = value.as_array().filter(|list| !list.is_empty());
        list.is_some_and(|list| list.iter().all(Value::is_object))
    };
    let names: Vec<&String> = map
        .iter()
        .filter(|(_, v)| are_rows(v))
        .map(|(k, _)| k)
        .collect();
    let named = match names.as_slice() {
        // Beside its rows, the viewer describes its columns.
        names if names.iter().any(|name| *name == "rows") => Some("rows".to_string()),
        [name] if map.len() == 1 || *name == "data" => Some((*name).clone()),
        _ => None,
    };
    let Some(Value::Array(rows)) = named.as_deref().and_then(|name| map.get(name)).cloned() else {
        return Ok(vec![Value::Object(map)]);
    };
    let inner = |row: Value| match row {
        Value::Object(mut map) if map.get("row").is_some_and(Value::is_object) => {
            map.remove("row").unwrap_or(Value::Null)
        }
        other => other,
    };
    Ok(rows.into_iter().map(inner).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_any_usual_form() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("test.json");
        let expected = r#"[{"a":1,"b":"x"},{"a":2,"b":"y"}]"#;
        for text in [
            expected,
            "{\"a\":1,\"b\":\"x\"}\n{\"a\":2,\"b\":\"y\"}\n",
            "{\"a\":[1,2],\"b\":[\"x\",\"y\"]}",
            "{\"data\":[{\"a\":1,\"b\":\"x\"},{\"a\":2,\"b\":\"y\"}]}",
            "{\"features\":[{\"name\":\"a\"}],\"rows\":[{\"row_idx\":0,\"row\":{\"a\":1,\"b\":\"x\"}},\
             {\"row_idx\":1,\"row\":{\"a\":2,\"b\":\"y\"}}],\"num_rows_total\":2}",
        ] {
            std::fs::write(&path, text).unwrap();
            let found = serde_json::to_string(&rows(&path).unwrap()).unwrap();
            assert_eq!(found, expected, "{text}");
        }
        std::fs::write(&path, "{\"a\":{\"b\":[1]}}").unwrap();
        assert_eq!(rows(&path).unwrap().len(), 1);
        for (text, reason) in [
            ("", "no usable record"),
            ("[1]", "record 1: no object"),
            ("{\"a\":1}\n{\"a\":", "record 2: not JSON"),
            ("3", "no list of objects: 3"),
            ("{\"a\":[1],\"b\":[1,2]}", "`b`"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = rows(&path).unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
