//! Renders records as prompts and completions.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Record;
use crate::error::{Error, Result};

/// A prompt and its expected continuation.
#[derive(Clone, Debug, PartialEq, Eq)]
#[doc(hidden)]
pub struct Example {
    /// The prompt; empty for plain text.
    pub prompt: String,
    /// The continuation to be learned.
    pub completion: String,
}

/// Template that renders a [`Record`]. Every template renders plain text unchanged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptTemplate {
    /// Depends on the record: [`Alpaca`](Self::Alpaca) for instructions,
    /// [`QuestionAnswer`](Self::QuestionAnswer) for questions.
    #[default]
    Auto,
    /// Stanford Alpaca's two prompts, with and without input.
    Alpaca,
    /// `Question: ...`, newline, `Answer:`, then a space and the answer, as in
    /// lm-evaluation-harness for GSM8K.
    QuestionAnswer,
    /// Only the question or instruction, followed by the input, each on its own line.
    Raw,
}

impl PromptTemplate {
    /// Renders a record as prompt and completion.
    pub fn render(self, record: &Record) -> Example {
        let (question, input, answer) = match record {
            Record::Instruction {
                instruction,
                input,
                output,
                ..
            } => (instruction, input.as_str(), output),
            Record::Question { question, answer } => (question, "", answer),
            Record::Text { text } => {
                return Example {
                    prompt: String::new(),
                    completion: text.clone(),
                };
            }
        };
        let joined = if input.is_empty() {
            question.clone()
        } else {
            format!("{question}\n{input}")
        };
        let template = match (self, record) {
            (PromptTemplate::Auto, Record::Instruction { .. }) => PromptTemplate::Alpaca,
            (PromptTemplate::Auto, _) => PromptTemplate::QuestionAnswer,
            (other, _) => other,
        };
        match template {
            PromptTemplate::Alpaca if input.is_empty() => Example {
                prompt: format!(
                    "Below is an instruction that describes a task. Write a response that appropriately completes the \
                     request.\n\n### Instruction:\n{question}\n\n### Response:\n"
                ),
                completion: answer.clone(),
            },
            PromptTemplate::Alpaca => Example {
                prompt: format!(
                    "Below is an instruction that describes a task, paired with an input that provides further context. \
                     Write a response that appropriately completes the request.\n\n### Instruction:\n{question}\n\n### \
                     Input:\n{input}\n\n### Response:\n"
                ),
                completion: answer.clone(),
            },
            PromptTemplate::Raw => Example {
                prompt: format!("{joined}\n"),
                completion: answer.clone(),
            },
            PromptTemplate::QuestionAnswer | PromptTemplate::Auto => Example {
                prompt: format!("Question: {joined}\nAnswer:"),
                completion: format!(" {answer}"),
            },
        }
    }
}

impl fmt::Display for PromptTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PromptTemplate::Auto => "auto",
            PromptTemplate::Alpaca => "alpaca",
            PromptTemplate::QuestionAnswer => "question_answer",
            PromptTemplate::Raw => "raw",
        })
    }
}

impl FromStr for PromptTemplate {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s.trim() {
            "auto" => Ok(PromptTemplate::Auto),
            "alpaca" => Ok(PromptTemplate::Alpaca),
            "question_answer" => Ok(PromptTemplate::QuestionAnswer),
            "raw" => Ok(PromptTemplate::Raw),
            _ => Err(Error::argument(
                "template",
                format!("{s:?}"),
                "one of auto, alpaca, question_answer, raw",
            )),
        }
    }
}
