//! From rows to prompts.

use serde_json::Value;

use super::load::{Row, TaskData};
use super::random::PythonRandom;
use super::spec::{OutputType, Sampler, TaskSpec};
use super::template::{Templates, row_size, text_of};
use crate::data::{ChatTemplate, Message};
use crate::error::{Error, Result};

/// What is asked about a document.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Question {
    /// The contexts and the continuations, one of each for each choice; the lengths of the choices
    /// in characters and bytes are those of `choices`. The index of the right one, if it is one of
    /// them.
    Choices {
        contexts: Vec<String>,
        continuations: Vec<String>,
        choices: Vec<String>,
        gold: Option<usize>,
    },
    /// A prompt, and the references, of which one has to be met.
    Generate { prompt: String, gold: Vec<String> },
    /// A text, and the text whose words and bytes are counted.
    Rolling { text: String, counted: String },
}

/// How prompts are written.
#[derive(Clone, Debug, Default)]
pub(super) struct PromptOptions<'a> {
    /// Number of examples.
    pub n_examples: usize,
    /// Seed of the choice of examples.
    pub seed: u64,
    pub chat: Option<&'a ChatTemplate>,
    /// Whether each example is a turn of the user and one of the assistant.
    pub turns: bool,
    pub system: Option<&'a str>,
}

/// A part of a prompt.
struct Part {
    is_answer: bool,
    text: String,
    delimiter: String,
}

/// Writes the prompts of the documents of a task.
pub(super) struct Prompter<'a> {
    spec: &'a TaskSpec,
    templates: Templates,
    options: PromptOptions<'a>,
    examples: Vec<Row>,
    /// Bytes of each example, before the task added columns.
    sizes: Vec<usize>,
    same: bool,
    random: PythonRandom,
}

type Described<T> = std::result::Result<T, String>;

impl<'a> Prompter<'a> {
    /// Makes the examples of a task ready.
    pub fn new(spec: &'a TaskSpec, data: &TaskData, options: PromptOptions<'a>) -> Result<Self> {
        let mut prompter = Self {
            spec,
            templates: Templates::new(),
            random: PythonRandom::new(options.seed),
            options,
            examples: Vec::new(),
            sizes: Vec::new(),
            same: data.same,
        };
        if prompter.options.n_examples == 0 {
            return Ok(prompter);
        }
        let examples = match spec.own_examples() {
            Some(own) => own,
            None => &data.examples,
        };
        // The harness draws one more, to leave the document out, where these two fields are equal,
        // which they also are where both are missing.
        let same = data.same || spec.fewshot_split == spec.test_split;
        prompter.same = same;
        let n = prompter.options.n_examples;
        if examples.len() < n.saturating_add(usize::from(same)) {
            let found = format!("{n} of {} rows", examples.len());
            let expected = format!("no more than the task {} has rows of examples", spec.task);
            return Err(Error::argument("num_fewshot", found, expected));
        }
        prompter.sizes = examples.iter().map(row_size).collect();
        let ready = |(index, row): (usize, &Row)| {
            prompter.templates.allow(prompter.sizes[index]);
            prompter
                .ready(row)
                .map_err(|reason| bad(spec, "example", index, reason))
        };
        prompter.examples = examples
            .iter()
            .enumerate()
            .map(ready)
            .collect::<Result<_>>()?;
        Ok(prompter)
    }

    /// Adds the columns that the task computes.
    fn ready(&self, row: &Row) -> Described<Row> {
        let mut row = row.clone();
        for (name, template) in &self.spec.columns {
            let template = template.as_str().unwrap_or("");
            let value = self.templates.value(template, &row)?;
            row.insert(name.clone(), value);
        }
        Ok(row)
    }

    /// Writes what is asked about a document. Documents must come in their order, because the
    /// examples are drawn one after another.
    pub fn question(&mut self, index: usize, document: &Row) -> Result<Question> {
        self.templates.allow(row_size(document));
        let shown = self.draw(document);
        let question = self.ready(document).and_then(|row| self.ask(&row, &shown));
        question.map_err(|reason| bad(self.spec, "document", index, reason))
    }

    /// Chooses the examples for a document.
    fn draw(&mut self, document: &Row) -> Vec<usize> {
        let (n, all) = (self.options.n_examples, self.examples.len());
        if n == 0 {
            return Vec::new();
        }
        let ready = match self.same {
            true => self.ready(document).ok(),
            false => None,
        };
        let others = |index: &usize| ready.as_ref() != Some(&self.examples[*index]);
        if self.spec.fewshot_config.sampler == Sampler::FirstN {
            return (0..all).filter(others).take(n).collect();
        }
        let drawn = self.random.sample(all, n + usize::from(self.same));
        let others = |index: &usize| ready.as_ref() != Some(&self.examples[*index]);
        let kept: Vec<usize> = drawn.into_iter().filter(others).take(n).collect();
        if kept.len() == n {
            return kept;
        }
        // The document is there several times.
        let pool: Vec<usize> = (0..all).filter(others).collect();
        let n = n.min(pool.len());
        let drawn = self.random.sample(pool.len(), n);
        drawn.into_iter().map(|at| pool[at]).collect()
    }

    fn ask(&self, row: &Row, shown: &[usize]) -> Described<Question> {
        let spec = self.spec;
        if spec.output_type == OutputType::LoglikelihoodRolling {
            let text = text_of(self.field(&spec.doc_to_target, row)?, "doc_to_target")?;
            let counted = match spec.doc_to_counted.as_str() {
                "" => text.clone(),
                template => self.templates.text(template, row)?,
            };
            return Ok(Question::Rolling { text, counted });
        }
        let mut parts = Vec::new();
        for index in shown {
            self.templates.allow(self.sizes[*index]);
            self.example(&self.examples[*index], &mut parts)?;
        }
        match spec.output_type {
            OutputType::MultipleChoice => {
                let choices = self.choices(row)?;
                let delimiter = match self.options.chat {
                    None => spec.target_delimiter.as_str(),
                    Some(_) => "",
                };
                let (contexts, continuations, gold) = if spec.multiple_input {
                    let target = text_of(self.field(&spec.doc_to_target, row)?, "doc_to_target")?;
                    let write = |choice: &String| self.write(&parts, choice.clone());
                    let contexts = choices.iter().map(write).collect::<Described<_>>()?;
                    let continuation = format!("{delimiter}{target}");
                    let gold = self.index(&spec.doc_to_text, row, &choices)?;
                    (contexts, vec![continuation; choices.len()], gold)
                } else {
                    let text = text_of(self.field(&spec.doc_to_text, row)?, "doc_to_text")?;
                    let context = self.write(&parts, text)?;
                    // Each choice has the context for itself.
                    let copies = choices.len().saturating_sub(1);
                    self.templates.pay(context.len().saturating_mul(copies))?;
                    let continuations = choices
                        .iter()
                        .map(|choice| format!("{delimiter}{choice}"))
                        .collect();
                    let gold = self.index(&spec.doc_to_target, row, &choices)?;
                    (vec![context; choices.len()], continuations, gold)
                };
                Ok(Question::Choices {
                    contexts,
                    continuations,
                    choices,
                    gold,
                })
            }
            _ => {
                let text = text_of(self.field(&spec.doc_to_text, row)?, "doc_to_text")?;
                let gold = match self.field(&spec.doc_to_target, row)? {
                    Value::Array(all) => {
                        let texts = all.into_iter().map(|one| text_of(one, "doc_to_target"));
                        texts.collect::<Described<_>>()?
                    }
                    one => vec![text_of(one, "doc_to_target")?],
                };
                let prompt = self.write(&parts, text)?;
                Ok(Question::Generate { prompt, gold })
            }
        }
    }

    /// Adds an example with its answer.
    fn example(&self, row: &Row, parts: &mut Vec<Part>) -> Described<()> {
        let spec = self.spec;
        let has_choices = !spec.doc_to_choice.is_null();
        let choices = if has_choices {
            self.choices(row)?
        } else {
            Vec::new()
        };
        let (question, answer) = if spec.multiple_input {
            let right = self.index(&spec.doc_to_text, row, &choices)?;
            let question = right.and_then(|index| choices.get(index)).cloned();
            let question = question.ok_or("an example has no right choice")?;
            (question, self.field(&spec.doc_to_target, row)?)
        } else {
            let question = text_of(self.field(&spec.doc_to_text, row)?, "doc_to_text")?;
            let answer = match self.index(&spec.doc_to_target, row, &choices)? {
                Some(index) if has_choices => choices.get(index).cloned().map(Value::String),
                _ => None,
            };
            (
                question,
                answer.map_or_else(|| self.field(&spec.doc_to_target, row), Ok)?,
            )
        };
        let answer = match answer {
            Value::Array(all) => all.into_iter().next().unwrap_or_default(),
            one => one,
        };
        let answer = text_of(answer, "doc_to_target")?;
        let part = |is_answer, text: String, delimiter: &str| Part {
            is_answer,
            text,
            delimiter: delimiter.into(),
        };
        if answer.is_empty() {
            parts.push(part(false, question, ""));
        } else {
            parts.push(part(false, question, &spec.target_delimiter));
            parts.push(part(true, answer, &spec.fewshot_delimiter));
        }
        Ok(())
    }

    /// Writes a prompt of examples and a question.
    fn write(&self, parts: &[Part], question: String) -> Described<String> {
        let prompt = self.prompt(parts, question)?;
        self.templates.pay(prompt.len())?;
        Ok(prompt)
    }

    fn prompt(&self, parts: &[Part], question: String) -> Described<String> {
        let system = self.options.system.unwrap_or("");
        let description = self.spec.description.as_str();
        let blank = |text: &str, first: bool| {
            let c = if first {
                text.chars().next()
            } else {
                text.chars().next_back()
            };
            c.is_some_and(super::encode::is_space)
        };
        let apart = !system.is_empty()
            && !description.is_empty()
            && !blank(system, false)
            && !blank(description, true);
        let between = if apart {
            self.spec.fewshot_delimiter.as_str()
        } else {
            ""
        };
        let system = [system, between, description].concat();
        let plain = || {
            let parts = parts
                .iter()
                .flat_map(|part| [part.text.as_str(), &part.delimiter]);
            parts.collect::<String>()
        };
        let Some(chat) = self.options.chat else {
            return Ok([system, plain(), question].concat());
        };
        let mut messages = Vec::new();
        if !system.is_empty() {
            messages.push(Message::system(&system));
        }
        if self.options.turns {
            messages.extend(parts.iter().map(|part| match part.is_answer {
                true => Message::assistant(&part.text),
                false => Message::user(&part.text),
            }));
            messages.push(Message::user(question));
        } else {
            messages.push(Message::user([plain(), question].concat()));
        }
        chat.render(&messages, &[], true).map_err(|e| e.to_string())
    }

    /// Returns the value of a field, which is a template or the value itself.
    fn field(&self, field: &Value, row: &Row) -> Described<Value> {
        match field {
            Value::String(template) => self.templates.value(template, row),
            other => Ok(other.clone()),
        }
    }

    fn choices(&self, row: &Row) -> Described<Vec<String>> {
        let list = match self.field(&self.spec.doc_to_choice, row)? {
            Value::Array(list) => list,
            Value::Object(map) => map.into_iter().map(|(_, value)| value).collect(),
            other => return Err(format!("`doc_to_choice` is no list: {other}")),
        };
        if list.is_empty() {
            return Err("there is no choice".into());
        }
        list.into_iter()
            .map(|choice| text_of(choice, "doc_to_choice"))
            .collect()
    }

    /// Returns the index of the right choice, or `None` if the target is none of them. The target is
    /// an index or the choice itself; digits that a template wrote are an index.
    fn index(&self, field: &Value, row: &Row, choices: &[String]) -> Described<Option<usize>> {
        if choices.is_empty() {
            return Ok(None);
        }
        let is_column = field.as_str().is_some_and(|name| row.contains_key(name));
        let value = match self.field(field, row)? {
            Value::Number(number) => number.as_u64(),
            Value::Bool(flag) => Some(u64::from(flag)),
            Value::String(text) => {
                let is_index = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
                if !is_column && is_index {
                    text.parse().ok()
                } else {
                    return Ok(choices.iter().position(|choice| *choice == text));
                }
            }
            _ => None,
        };
        let index = value.and_then(|value| usize::try_from(value).ok());
        Ok(index.filter(|index| *index < choices.len()))
    }
}

fn bad(spec: &TaskSpec, what: &str, index: usize, reason: String) -> Error {
    Error::InvalidRecord {
        path: format!("task {}", spec.task).into(),
        record: index + 1,
        reason: format!("as {what}: {reason}"),
    }
}
