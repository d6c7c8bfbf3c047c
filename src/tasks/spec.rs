//! Descriptions of tasks.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::builtin;
use super::load::Row;
use crate::error::{Error, Result};
use crate::input::{BYTE_ORDER_MARK, MAX_CONFIG_BYTES, json, read_capped};

/// What is asked of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputType {
    /// The log-likelihood of each choice.
    MultipleChoice,
    /// A continuation.
    GenerateUntil,
    /// The log-likelihood of a whole text.
    LoglikelihoodRolling,
}

/// How examples are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sampler {
    /// At random, other ones for each document, as Python's `Random(1234).sample` draws them.
    #[default]
    Default,
    /// The first ones.
    FirstN,
}

/// Examples that stand in the description, and how examples are chosen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FewshotConfig {
    /// How examples are chosen.
    pub sampler: Sampler,
    /// Rows from which examples are taken, in the place of a file's.
    pub samples: Vec<Row>,
}

/// How a continuation is generated: greedily, up to one of some strings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GenerationSettings {
    /// Strings that end it.
    pub until: Vec<String>,
    /// Maximum number of new tokens.
    pub max_gen_toks: usize,
    /// Whether tokens are drawn at random, which is not supported.
    pub do_sample: bool,
    /// Temperature, which must be 0.
    pub temperature: f64,
}

impl Default for GenerationSettings {
    fn default() -> Self {
        Self {
            until: vec!["\n\n".into()],
            max_gen_toks: 256,
            do_sample: false,
            temperature: 0.0,
        }
    }
}

/// A step from an output to what is compared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "function", rename_all = "snake_case", deny_unknown_fields)]
pub enum FilterStep {
    /// Finds all matches of a regular expression and takes one. Of a match with groups, the first
    /// group that is not empty.
    Regex {
        /// The regular expression.
        regex_pattern: String,
        /// Index of the match; from the end if negative.
        #[serde(default)]
        group_select: i64,
        /// What stands for an output without a match.
        #[serde(default = "invalid")]
        fallback: String,
    },
    /// Replaces all matches of a regular expression.
    RegexReplace {
        /// The regular expression.
        regex_pattern: String,
        /// What takes their place, with Python's references to groups.
        #[serde(default)]
        replacement: String,
    },
    /// Takes the first of several outputs. Each prompt has one.
    TakeFirst,
    /// Removes white space at both ends.
    Strip,
    /// Makes all letters small.
    Lowercase,
}

fn invalid() -> String {
    "[invalid]".into()
}

/// Steps with a name, under which the scores of their results are reported.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilterSpec {
    /// The name, such as `strict-match`.
    pub name: String,
    /// The steps.
    pub filter: Vec<FilterStep>,
}

/// A metric with its settings.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetricSpec {
    /// `acc`, `acc_norm` (log-likelihood by characters) and `acc_bytes` for choices; `exact_match`
    /// and `number_match` for continuations; `word_perplexity`, `byte_perplexity` and
    /// `bits_per_byte` for texts.
    pub metric: String,
    /// Regular expressions whose matches are removed from output and reference, in this order.
    pub regexes_to_ignore: Vec<String>,
    /// Whether large and small letters are equal.
    pub ignore_case: bool,
    /// Whether ASCII punctuation is removed.
    pub ignore_punctuation: bool,
    /// Largest difference of numbers that are equal, for `number_match`.
    pub tolerance: f64,
    /// How scores are put together: `mean`, or the one that the metric has.
    pub aggregation: Option<String>,
    /// Whether a larger score is a better one. Only for readers of the description.
    pub higher_is_better: Option<bool>,
}

/// A task as data: how rows of a file become prompts, and what counts as right.
///
/// The fields have the names and the meaning of lm-evaluation-harness' YAML files, so that one of
/// them becomes a description by writing it as JSON. Where it calls Python functions, `columns` has
/// expressions. A template is the name of a column, or Jinja; one that is a single expression in
/// `{{ }}` may be a list or a number. Templates have bounds of work and memory for each row, and for
/// all rows in proportion to them. Regular expressions have the syntax of the regex crate, which has
/// neither look-around nor references, and up to 2000 bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskSpec {
    /// Name of the task.
    pub task: String,
    /// Other names of the task.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// What the description is for, beside `metadata.version` of the harness.
    #[serde(default)]
    pub metadata: Map<String, Value>,
    /// What is asked of the model.
    pub output_type: OutputType,
    /// Folders in which the files of the splits may lie; the task's name if there are none.
    #[serde(default)]
    pub folders: Vec<String>,
    /// Split from which examples are taken.
    #[serde(default)]
    pub training_split: Option<String>,
    /// Split that is evaluated if there is no test split.
    #[serde(default)]
    pub validation_split: Option<String>,
    /// Split that is evaluated.
    #[serde(default)]
    pub test_split: Option<String>,
    /// Split from which examples are taken, before the training split.
    #[serde(default)]
    pub fewshot_split: Option<String>,
    /// Columns that are computed for each row, in this order, by templates.
    #[serde(default)]
    pub columns: Map<String, Value>,
    /// Text before the examples.
    #[serde(default)]
    pub description: String,
    /// Template of the question. For choices that are contexts, that of the index of the right one.
    pub doc_to_text: Value,
    /// Template of the answer: for choices the index of the right one, or its text. For choices that
    /// are contexts, the text after them.
    pub doc_to_target: Value,
    /// Template of the list of choices, or a list of texts.
    #[serde(default)]
    pub doc_to_choice: Value,
    /// Whether the choices are contexts with one continuation, as in WinoGrande.
    #[serde(default)]
    pub multiple_input: bool,
    /// Template of the text whose words and bytes are counted, for texts; `doc_to_target` if it is
    /// empty.
    #[serde(default)]
    pub doc_to_counted: String,
    /// Text between question and answer.
    #[serde(default = "space")]
    pub target_delimiter: String,
    /// Text after each example.
    #[serde(default = "blank_line")]
    pub fewshot_delimiter: String,
    /// Number of examples; `None` for none, which the caller may change.
    #[serde(default)]
    pub num_fewshot: Option<usize>,
    /// Where examples come from.
    #[serde(default)]
    pub fewshot_config: FewshotConfig,
    /// How continuations are generated.
    #[serde(default)]
    pub generation_kwargs: GenerationSettings,
    /// What is made of an output. Without filters, its text is compared.
    #[serde(default)]
    pub filter_list: Vec<FilterSpec>,
    /// The metrics.
    pub metric_list: Vec<MetricSpec>,
    /// Number of outputs for each prompt, which must be 1.
    #[serde(default = "one")]
    pub repeats: usize,
}

fn space() -> String {
    " ".into()
}

fn blank_line() -> String {
    "\n\n".into()
}

fn one() -> usize {
    1
}

impl TaskSpec {
    /// Returns a task that the crate knows, by its name or one of its aliases.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if there is no such task; it lists those that there are.
    pub fn builtin(name: &str) -> Result<Self> {
        let all = builtin::all()?;
        let known = || {
            all.iter()
                .map(|task| task.task.as_str())
                .collect::<Vec<_>>()
        };
        let named = |task: &&Self| task.task == name || task.aliases.iter().any(|a| a == name);
        let found = all.iter().find(named).cloned();
        found.ok_or_else(|| {
            let expected = format!("one of {}", known().join(", "));
            Error::argument("task", name, expected)
        })
    }

    /// Names of the tasks that the crate knows.
    ///
    /// # Errors
    /// Returns no error, unless the crate's own descriptions are damaged.
    pub fn builtin_names() -> Result<Vec<String>> {
        Ok(builtin::all()?.into_iter().map(|task| task.task).collect())
    }

    /// Reads the descriptions of a JSON file: one, or a list of them. `include` names another
    /// description, of the list or of [`builtin`](Self::builtin), whose fields stand where the
    /// description has none.
    ///
    /// # Errors
    /// Returns [`Error::Io`], [`Error::Json`], and [`Error::InvalidFile`] if a description breaks a
    /// rule; it names the task and the field.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Vec<Self>> {
        let path = path.as_ref();
        let bytes = read_capped(path, MAX_CONFIG_BYTES)?;
        let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes);
        parse(bytes, path, &builtin::values_by_name()?)
    }

    /// The split that is evaluated.
    pub fn evaluated_split(&self) -> &str {
        let split = self
            .test_split
            .as_deref()
            .or(self.validation_split.as_deref());
        split.unwrap_or("test")
    }

    /// The split from which examples are taken.
    pub fn fewshot_split(&self) -> Option<&str> {
        let shown = self
            .fewshot_split
            .as_deref()
            .or(self.training_split.as_deref());
        shown.or(self.validation_split.as_deref())
    }

    /// The examples that stand in the description, if they are used.
    pub(super) fn own_examples(&self) -> Option<&Vec<Row>> {
        let own = &self.fewshot_config.samples;
        (!own.is_empty() && self.fewshot_split.is_none()).then_some(own)
    }

    /// Version of the task in the harness.
    pub fn version(&self) -> Option<String> {
        self.metadata.get("version").map(|version| match version {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        })
    }

    /// Checks what the types of the fields leave open.
    fn check(&self) -> Result<(), String> {
        let choices = self.output_type == OutputType::MultipleChoice;
        let metrics: &[&str] = match self.output_type {
            OutputType::MultipleChoice => &["acc", "acc_norm", "acc_bytes"],
            OutputType::GenerateUntil => &["exact_match", "number_match"],
            OutputType::LoglikelihoodRolling => {
                &["word_perplexity", "byte_perplexity", "bits_per_byte"]
            }
        };
        if self.metric_list.is_empty() {
            return Err("`metric_list` is empty".into());
        }
        for spec in &self.metric_list {
            let name = &spec.metric;
            if !metrics.contains(&name.as_str()) {
                return Err(format!("metric `{name}`; there are {}", metrics.join(", ")));
            }
            let own = ["mean", "weighted_perplexity", "bits_per_byte"];
            if let Some(other) = spec.aggregation.as_deref().filter(|a| !own.contains(a)) {
                return Err(format!("`aggregation` {other} of {name}; there is mean"));
            }
        }
        if choices && self.doc_to_choice.is_null() {
            return Err("`doc_to_choice` is missing".into());
        }
        if self.multiple_input && !choices {
            return Err("`multiple_input` is for multiple_choice".into());
        }
        let settings = &self.generation_kwargs;
        if settings.do_sample || settings.temperature != 0.0 {
            return Err("`generation_kwargs`: continuations are greedy".into());
        }
        if settings.until.iter().any(String::is_empty) {
            return Err("`until` has an empty string".into());
        }
        if settings.max_gen_toks == 0 {
            return Err("`max_gen_toks` is 0".into());
        }
        if self.repeats != 1 {
            return Err(format!("`repeats` is {}; 1 is supported", self.repeats));
        }
        for (name, template) in &self.columns {
            if !template.is_string() {
                return Err(format!("`columns.{name}` is no template"));
            }
        }
        Ok(())
    }
}

/// The descriptions of a file as they stand, by their names.
pub(super) type Values = BTreeMap<String, Map<String, Value>>;

/// Reads the objects of a file, with the fields that they include.
pub(super) fn values(bytes: &[u8], path: &Path, known: &Values) -> Result<Vec<Map<String, Value>>> {
    let bad = |reason: String| Error::invalid_file(path, reason);
    let all = match json::value(bytes).map_err(|e| Error::json(path, e))? {
        Value::Array(all) => all,
        one => vec![one],
    };
    let mut known = known.clone();
    let mut out = Vec::with_capacity(all.len());
    for (index, value) in all.into_iter().enumerate() {
        let Value::Object(mut map) = value else {
            return Err(bad(format!("description {} is no object", index + 1)));
        };
        if let Some(include) = map.remove("include") {
            let base = include.as_str().and_then(|name| known.get(name));
            let Some(base) = base else {
                let names: Vec<&str> = known.keys().map(String::as_str).collect();
                let names = names.join(", ");
                return Err(bad(format!("`include` {include}; there are {names}")));
            };
            let mut whole = base.clone();
            whole.remove("aliases");
            whole.extend(map);
            map = whole;
        }
        let Some(name) = map.get("task").and_then(Value::as_str) else {
            return Err(bad(format!("description {} has no `task`", index + 1)));
        };
        known.insert(name.to_string(), map.clone());
        out.push(map);
    }
    Ok(out)
}

/// Names of a description's fields. The last five say where the harness has its data from, or how
/// its tasks are grouped; they have no meaning here.
const FIELDS: [&str; 29] = [
    "task",
    "aliases",
    "metadata",
    "output_type",
    "folders",
    "training_split",
    "validation_split",
    "test_split",
    "fewshot_split",
    "columns",
    "description",
    "doc_to_text",
    "doc_to_target",
    "doc_to_choice",
    "multiple_input",
    "doc_to_counted",
    "target_delimiter",
    "fewshot_delimiter",
    "num_fewshot",
    "fewshot_config",
    "generation_kwargs",
    "filter_list",
    "metric_list",
    "repeats",
    "tag",
    "dataset_path",
    "dataset_name",
    "should_decontaminate",
    "doc_to_decontamination_query",
];

/// Reads descriptions.
pub(super) fn parse(bytes: &[u8], path: &Path, known: &Values) -> Result<Vec<TaskSpec>> {
    let spec = |map: Map<String, Value>| {
        let name = map
            .get("task")
            .and_then(Value::as_str)
            .unwrap_or("")
            .to_string();
        let bad = |reason: String| Error::invalid_file(path, format!("task {name}: {reason}"));
        if let Some(field) = map.keys().find(|field| !FIELDS.contains(&field.as_str())) {
            return Err(bad(format!("there is no field `{field}`")));
        }
        // Null stands for a field that is not there, as in YAML.
        let map = map
            .into_iter()
            .filter(|(_, value)| !value.is_null())
            .collect();
        let spec: TaskSpec =
            serde_json::from_value(Value::Object(map)).map_err(|e| bad(e.to_string()))?;
        spec.check().map_err(bad)?;
        Ok(spec)
    };
    values(bytes, path, known)?.into_iter().map(spec).collect()
}
