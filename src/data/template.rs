//! Renders records as prompts and completions.

use std::borrow::Cow;
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{ChatTemplate, Message, Record, Rendered, TextTokenizer};
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

/// Template that renders a [`Record`]. Every template renders plain text, and a prompt with its
/// completion, unchanged.
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
            Record::Completion { prompt, completion } => {
                return Example {
                    prompt: prompt.clone(),
                    completion: completion.clone(),
                };
            }
            Record::Conversation { messages, .. } => return Self::spoken(messages),
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

impl PromptTemplate {
    /// Renders a conversation without a chat template, for a look at it: speakers and what they
    /// say. [`Template`] refuses to train on that.
    fn spoken(messages: &[Message]) -> Example {
        let (before, last) = match Record::split_last(messages) {
            Some((before, last)) => (before, last.content.as_str()),
            None => (messages, ""),
        };
        let turns = before
            .iter()
            .map(|m| format!("{}: {}\n", m.role, m.content));
        Example {
            prompt: turns.collect::<String>() + "assistant:",
            completion: format!(" {last}"),
        }
    }
}

/// How records become texts: by a fixed template, or by the chat template of a model. The model
/// does not see the tools of a conversation (see [`notices`](super::notices)).
#[derive(Clone, Debug, Default)]
pub struct Template {
    prompt: PromptTemplate,
    chat: Option<Arc<ChatTemplate>>,
    /// Whether the chat template also renders records that are no conversations.
    always: bool,
}

impl From<PromptTemplate> for Template {
    fn from(prompt: PromptTemplate) -> Self {
        Self {
            prompt,
            ..Self::default()
        }
    }
}

impl From<&Template> for Template {
    fn from(template: &Template) -> Self {
        template.clone()
    }
}

impl Template {
    /// Creates a template that renders conversations by a model's chat template, if it has one, and
    /// other records as [`PromptTemplate::Auto`] does.
    pub fn auto(chat: Option<ChatTemplate>) -> Self {
        Self {
            chat: chat.map(Arc::new),
            ..Self::default()
        }
    }

    /// Creates a template that renders every record but plain text as a conversation.
    pub fn chat(chat: ChatTemplate) -> Self {
        Self {
            chat: Some(Arc::new(chat)),
            always: true,
            ..Self::default()
        }
    }

    /// Returns the template that a name stands for: `auto` (see [`auto`](Self::auto)), `chat` (the
    /// chat template of `model`, for every record), a name of a [`PromptTemplate`], or the path of a
    /// chat template.
    ///
    /// # Errors
    /// Returns the errors of [`ChatTemplate::open`], and [`Error::InvalidArgument`] if the model has
    /// no chat template or there is no such file.
    pub fn for_model(name: &str, model: &Path) -> Result<Self> {
        let file = Path::new(name);
        match name {
            "auto" => Ok(Self::auto(ChatTemplate::open(model)?)),
            "chat" => {
                let expected = "another template: the model has no chat template";
                let template = ChatTemplate::open(model)?;
                let template =
                    template.ok_or_else(|| Error::argument("template", name, expected))?;
                Ok(Self::chat(template))
            }
            _ if !file.is_file() => Ok(name
                .parse::<PromptTemplate>()
                .map_err(|_| {
                    let expected =
                        "auto, chat, alpaca, question_answer, raw, or the path of a chat template";
                    Error::argument("template", format!("{name:?}"), expected)
                })?
                .into()),
            _ => Ok(Self::chat(ChatTemplate::from_file(file, model)?)),
        }
    }

    /// Returns the chat template that renders this record, and the conversation. Returns `None` if
    /// a fixed template does.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] for a conversation without a chat template.
    pub(super) fn conversation<'a>(&self, record: &'a Record) -> Result<Option<Turns<'_, 'a>>> {
        let is_conversation = matches!(record, Record::Conversation { .. });
        let Some(chat) = &self.chat else {
            if is_conversation {
                let expected = "the chat template of the model, which has none, or the path of one";
                let found = format!("`{}` for a conversation", self.prompt);
                return Err(Error::argument("template", found, expected));
            }
            return Ok(None);
        };
        if !(self.always || is_conversation) {
            return Ok(None);
        }
        let first = match record {
            Record::Conversation {
                prompt_messages, ..
            } => *prompt_messages,
            _ => 0,
        };
        Ok(record.to_messages().map(|messages| Turns {
            chat,
            messages,
            first,
        }))
    }

    /// Renders a record as one text, with the parts that a model learns.
    ///
    /// # Errors
    /// Returns the errors of [`ChatTemplate::render_trained`], and [`Error::InvalidArgument`] for a
    /// conversation without a chat template.
    pub fn render(&self, record: &Record) -> Result<Rendered> {
        if let Some(turns) = self.conversation(record)? {
            return turns.trained();
        }
        let Example { prompt, completion } = self.prompt.render(record);
        let start = prompt.len();
        let text = prompt + &completion;
        let end = text.len();
        let trained = std::iter::once(start..end).collect();
        Ok(Rendered { text, trained })
    }

    /// Returns the text that a model sees before its answer to a record: all before the last turn
    /// of the assistant, and the prompt for the answer. The text of a chat template holds the
    /// special tokens.
    ///
    /// # Errors
    /// Returns the errors of [`render`](Self::render).
    pub fn prompt_text(&self, record: &Record) -> Result<String> {
        match self.conversation(record)? {
            Some(turns) => turns.before_answer(),
            None => Ok(self.prompt.render(record).prompt),
        }
    }

    /// Returns the token ids of [`prompt_text`](Self::prompt_text).
    ///
    /// # Errors
    /// Returns the errors of [`render`](Self::render), and [`Error::Tokenizer`].
    pub fn prompt_ids(&self, record: &Record, tokenizer: &TextTokenizer) -> Result<Vec<u32>> {
        match self.conversation(record)? {
            // The template writes the special tokens itself.
            Some(turns) => tokenizer.encode(&turns.before_answer()?, false),
            None => tokenizer.encode_prompt(&self.prompt.render(record).prompt),
        }
    }

    /// Returns the answer to a record, as the model should write it.
    pub fn answer(&self, record: &Record) -> String {
        match record {
            Record::Conversation { messages, .. } => Record::split_last(messages)
                .map(|(_, last)| last.content.clone())
                .unwrap_or_default(),
            record => self.prompt.render(record).completion,
        }
    }

    pub(super) fn prompt(&self) -> PromptTemplate {
        self.prompt
    }
}

/// A record as a conversation that a chat template renders.
pub(super) struct Turns<'t, 'r> {
    chat: &'t ChatTemplate,
    messages: Cow<'r, [Message]>,
    first: usize,
}

impl Turns<'_, '_> {
    pub fn trained(&self) -> Result<Rendered> {
        self.chat.render_trained(&self.messages, &[], self.first)
    }

    /// The text before the last turn of the assistant, with the prompt for that turn.
    fn before_answer(&self) -> Result<String> {
        let before = Record::split_last(&self.messages).map_or(&*self.messages, |(b, _)| b);
        self.chat.render(before, &[], true)
    }

    /// Whether the conversation ends with a turn that is learned.
    pub fn ends_trained(&self) -> bool {
        self.messages.len() > self.first && self.messages.last().is_some_and(Message::is_trained)
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
