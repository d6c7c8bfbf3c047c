//! Chat templates: how a model writes a conversation as one text.

mod bounds;
#[cfg(test)]
pub(crate) mod hostile;
mod jinja;
mod source;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value};

use super::{Message, TextTokenizer, load_text};
use crate::error::{Error, Result};
use crate::io::source::{tokenizer_texts, with_template};
use crate::io::tokenizer::TokenizerFiles;
use crate::io::{cache, gguf};
pub(crate) use bounds::pay;
use jinja::{MARKS, environment, now};
pub(crate) use jinja::{add_escaped_json, bounded};
pub(crate) use source::{expression, rewrite};

/// Largest template, in bytes. Those of models have less than 100 kB.
const MAX_BYTES: usize = 1 << 20;

/// Work that a rendering may do, and that for each byte of the conversation, in instructions of the
/// template engine. Of 84 public templates, all do with 20,000 and 2. It bounds the memory as well:
/// one instruction pays for 64 bytes of text, or 16 of what a list holds.
const FUEL: (u64, u64) = (200_000, 8);

/// Returns the work that a rendering may do which sees so many bytes.
pub(crate) fn fuel(bytes: u64) -> u64 {
    FUEL.0.saturating_add(bytes.saturating_mul(FUEL.1))
}

/// Name of the template in its environment.
const NAME: &str = "chat";

/// The chat template of a model: a Jinja program that writes a conversation as one text, with the
/// tokens that begin and end a turn.
///
/// It sees what transformers' `apply_chat_template` gives it: `messages`, `tools`, `documents`
/// (none), `add_generation_prompt`, the special tokens of the tokenizer (`bos_token`, ...), and the
/// functions `raise_exception` and `strftime_now` (in UTC). Work and memory of a rendering are
/// limited, because templates come from strangers.
///
/// The text holds the special tokens. Encode it without adding any
/// ([`TextTokenizer::encode`](super::TextTokenizer::encode) with `special = false`).
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: Arc<str>,
    path: PathBuf,
    variables: Map<String, Value>,
    generation_blocks: bool,
    time: i64,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "ChatTemplate({}, {} bytes)",
            self.path.display(),
            self.source.len()
        )
    }
}

/// A conversation as one text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Parts that the model learns to write, as byte ranges in ascending order.
    pub trained: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// Parses a template. `path` names it in errors.
    ///
    /// # Errors
    /// Returns [`Error::Template`] if it is not valid.
    pub fn new(source: &str, path: impl AsRef<Path>) -> Result<Self> {
        let mut template = Self {
            environment: Environment::empty(),
            source: source.into(),
            path: path.as_ref().into(),
            variables: Map::new(),
            generation_blocks: false,
            time: now(),
        };
        if source.len() > MAX_BYTES {
            let size = source.len();
            return Err(template.fail(format!("{size} bytes, more than {MAX_BYTES}")));
        }
        template.parse()?;
        Ok(template)
    }

    fn parse(&mut self) -> Result<()> {
        let source = rewrite(&self.source).map_err(|reason| self.fail(reason))?;
        let mut environment = environment(self.time);
        environment
            .add_template_owned(NAME, source.text)
            .map_err(|e| self.fail(said(&e)))?;
        self.generation_blocks = source.generation;
        self.environment = environment;
        Ok(())
    }

    /// Reads the template of a model folder (`chat_template.jinja`, `chat_template.json` or
    /// `tokenizer_config.json`) or of a GGUF file, with the special tokens of its tokenizer.
    /// Returns `None` if the model has none. Of several templates, the one named `default` is read.
    ///
    /// # Errors
    /// Returns the errors of reading the files, and [`Error::Template`] if the template is not
    /// valid.
    pub fn open(model: impl AsRef<Path>) -> Result<Option<Self>> {
        let path = &*cache::resolve(model.as_ref())?;
        match TokenizerFiles::open(path)? {
            Some(files) => Self::of_files(path, files),
            None => Ok(None),
        }
    }

    /// Reads the template of a model folder or a GGUF file whose tokenizer was read.
    ///
    /// # Errors
    /// Returns the errors of [`open`](Self::open).
    pub(crate) fn of_files(path: &Path, files: TokenizerFiles) -> Result<Option<Self>> {
        let (config, own, file) = if gguf::is_gguf(path) {
            (files.config, None, path.to_path_buf())
        } else {
            let texts = with_template(path, files)?;
            let file = match &texts.template {
                Some(_) => "chat_template.jinja",
                None => "tokenizer_config.json",
            };
            (texts.config, texts.template, path.join(file))
        };
        let bad = |reason: &str| Error::Template {
            path: file.clone(),
            reason: reason.into(),
        };
        let source = match (&own, config.get("chat_template")) {
            (Some(text), _) => text,
            (None, None | Some(Value::Null)) => return Ok(None),
            (None, Some(Value::String(text))) => text,
            (None, Some(Value::Array(list))) => {
                let field = |entry: &'_ Value, key: &str| {
                    entry.get(key).and_then(Value::as_str).map(String::from)
                };
                let named = list
                    .iter()
                    .find(|entry| field(entry, "name").as_deref() == Some("default"));
                let entry = named.ok_or_else(|| bad("none of the list is named `default`"))?;
                &field(entry, "template").ok_or_else(|| bad("`default` has no template"))?
            }
            (None, Some(_)) => return Err(bad("neither a text nor a list")),
        };
        Ok(Some(Self::new(source, &file)?.with_tokens(&config)))
    }

    /// Reads a template from a file of its own, with the special tokens of a model's tokenizer.
    ///
    /// # Errors
    /// Returns the errors of [`open`](Self::open).
    pub fn from_file(path: impl AsRef<Path>, model: impl AsRef<Path>) -> Result<Self> {
        let template = Self::new(&load_text(path.as_ref())?, path)?;
        let model = &*cache::resolve(model.as_ref())?;
        let config = if gguf::is_gguf(model) {
            TokenizerFiles::open(model)?.map(|files| files.config)
        } else {
            tokenizer_texts(model)?.map(|texts| texts.config)
        };
        Ok(template.with_tokens(&config.unwrap_or_default()))
    }

    /// Takes `bos_token` and the like, as texts or as objects that hold the text.
    fn with_tokens(mut self, config: &Map<String, Value>) -> Self {
        for (key, value) in config {
            let text = value
                .as_str()
                .or_else(|| value.get("content")?.as_str())
                .filter(|_| key.ends_with("_token"));
            if let Some(text) = text {
                self.variables.insert(key.clone(), text.into());
            }
        }
        self
    }

    /// Sets a variable that the template reads, such as `enable_thinking`.
    pub fn with_variable(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.variables.insert(name.into(), value.into());
        self
    }

    /// The variables that the template sees beside the conversation.
    pub(crate) fn variables(&self) -> &Map<String, Value> {
        &self.variables
    }

    /// Returns the token that ends a turn of the model: the first special token that the template
    /// writes after what the model says. `None` if it writes none, or refuses a conversation of one
    /// question and one answer.
    pub fn end_of_turn(&self, tokenizer: &TextTokenizer) -> Option<u32> {
        let mut messages = [Message::user("question"), Message::assistant("")];
        let word = Conversation::new(&messages, &[]).unused("answer", &self.source);
        messages[1].content.clone_from(&word);
        let text = self.render(&messages, &[], false).ok()?;
        let (_, after) = text.rsplit_once(&word)?;
        let ids = tokenizer.encode(after, false).ok()?;
        ids.into_iter().find(|id| tokenizer.is_special(*id))
    }

    /// Sets the time that `strftime_now` formats, in seconds since 1970 in UTC. It is the time at
    /// which the template was opened, unless it is set.
    ///
    /// # Errors
    /// Returns [`Error::Template`], which [`new`](Self::new) would have returned as well.
    pub fn with_time(mut self, seconds: i64) -> Result<Self> {
        self.time = seconds;
        self.parse()?;
        Ok(self)
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The file that the template is from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns whether the template marks the model's turns by `{% generation %}`.
    pub fn has_generation_blocks(&self) -> bool {
        self.generation_blocks
    }

    /// Writes a conversation as one text. `tools` are JSON schemas. With `add_generation_prompt`
    /// the text ends where the model's answer begins.
    ///
    /// # Errors
    /// Returns [`Error::Template`] if the template refuses the conversation (many want roles to
    /// alternate) or takes too much work.
    pub fn render(
        &self,
        messages: &[Message],
        tools: &[Value],
        add_generation_prompt: bool,
    ) -> Result<String> {
        let conversation = Conversation::new(messages, tools);
        self.text(&conversation, add_generation_prompt, ["", ""])
    }

    /// Writes a conversation as one text, and finds the parts that the model learns: the turns of
    /// the assistant from message `first` on, each with the token that ends it.
    ///
    /// If the template marks the turns by `{% generation %}`, these marks count. Else a turn begins
    /// where the text of the messages before it ends, with the prompt for an answer, and ends where
    /// the text of the messages up to it ends. White space behind the token that ends a turn is not
    /// a part of it.
    ///
    /// # Errors
    /// Returns the errors of [`render`](Self::render), and [`Error::Template`] if the parts cannot
    /// be found in the text.
    pub fn render_trained(
        &self,
        messages: &[Message],
        tools: &[Value],
        first: usize,
    ) -> Result<Rendered> {
        let text = self.render(messages, tools, false)?;
        let turns: Vec<usize> = (first..messages.len())
            .filter(|i| messages[*i].is_trained())
            .collect();
        if turns.is_empty() {
            let trained = Vec::new();
            return Ok(Rendered { text, trained });
        }
        let marked = if self.generation_blocks {
            self.marked(messages, tools, &text, &turns)?
        } else {
            None
        };
        let trained = match marked {
            Some(trained) => trained,
            None => turns
                .into_iter()
                .map(|turn| self.turn(messages, tools, &text, turn))
                .collect::<Result<_>>()?,
        };
        Ok(Rendered { text, trained })
    }

    /// Returns the parts in `{% generation %}`, or `None` if they cannot be assigned to turns.
    fn marked(
        &self,
        messages: &[Message],
        tools: &[Value],
        text: &str,
        turns: &[usize],
    ) -> Result<Option<Vec<Range<usize>>>> {
        let conversation = Conversation::new(messages, tools);
        let marks = conversation.unused("generation", &self.source);
        let [start, end] = [format!("<{marks}>"), format!("</{marks}>")];
        let with_marks = self.text(&conversation, false, [&start, &end])?;
        let mut plain = String::with_capacity(text.len());
        let (mut ranges, mut rest) = (Vec::new(), with_marks.as_str());
        while let Some((before, after)) = rest.split_once(&start) {
            let Some((inner, after)) = after.split_once(&end) else {
                return Ok(None);
            };
            plain.push_str(before);
            let at = plain.len();
            plain.push_str(inner);
            ranges.push(at..plain.len());
            rest = after;
        }
        plain.push_str(rest);
        // Marks that the template itself looks at could change the text.
        if plain != text {
            return Ok(None);
        }
        let spoken: Vec<usize> = (0..messages.len())
            .filter(|i| messages[*i].is_assistant())
            .collect();
        if spoken == turns {
            return Ok(Some(ranges));
        }
        if spoken.len() != ranges.len() {
            return Ok(None);
        }
        let pairs = spoken.iter().zip(ranges);
        let trained = pairs.filter(|(turn, _)| turns.contains(turn));
        Ok(Some(trained.map(|(_, range)| range).collect()))
    }

    /// Returns the part of `text` that message `turn` is.
    fn turn(
        &self,
        messages: &[Message],
        tools: &[Value],
        text: &str,
        turn: usize,
    ) -> Result<Range<usize>> {
        // A template may refuse a conversation that ends there.
        let before = self.render(&messages[..turn], tools, true).ok();
        let upto = self.render(&messages[..=turn], tools, false)?;
        let start = before
            .as_deref()
            .filter(|before| text.starts_with(before))
            .map(str::len);
        if let Some(start) = start
            && text.starts_with(&upto)
            && upto.starts_with(&text[..start])
        {
            return Ok(start..upto.trim_end().len().max(start));
        }
        // The template writes the turn in another way when more follows. Put a word that occurs
        // nowhere in the place of its content, and see what the content is and what ends it.
        let word = Conversation::new(messages, tools).unused("content", &self.source);
        let mut changed = messages.to_vec();
        changed[turn].content.clone_from(&word);
        let parts = |messages: &[Message]| {
            let text = self.render(messages, tools, false)?;
            let parts = text.split_once(&word).filter(|(_, b)| !b.contains(&word));
            let parts = parts.map(|(before, after)| (before.to_string(), after.to_string()));
            parts.ok_or_else(|| self.fail(format!("message {} is not once in its text", turn + 1)))
        };
        let (head, tail) = parts(&changed)?;
        let (_, end) = parts(&changed[..=turn])?;
        if !text.ends_with(&tail) || head.len() + tail.len() > text.len() {
            let reason = format!("message {} is not found in its text", turn + 1);
            return Err(self.fail(reason));
        }
        let content_end = text.len() - tail.len();
        let start = match start {
            Some(start) => start,
            None if text.starts_with(&head) => head.len(),
            None => {
                let reason = format!("message {} is not found in its text", turn + 1);
                return Err(self.fail(reason));
            }
        };
        let common: usize = end
            .chars()
            .zip(tail.chars())
            .take_while(|(a, b)| a == b)
            .map(|(a, _)| a.len_utf8())
            .sum();
        let end = content_end + end[..common].trim_end().len();
        Ok(start.min(content_end)..end)
    }

    fn text(
        &self,
        conversation: &Conversation,
        add_generation_prompt: bool,
        marks: [&str; 2],
    ) -> Result<String> {
        let mut variables = self.variables.clone();
        let fields = [
            ("messages", conversation.messages.clone()),
            ("tools", conversation.tools.clone()),
            ("documents", Value::Null),
            ("add_generation_prompt", add_generation_prompt.into()),
        ];
        variables.extend(fields.map(|(name, value)| (name.into(), value)));
        for (name, mark) in MARKS.into_iter().zip(marks) {
            variables.insert(name.into(), mark.into());
        }
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel(conversation.json.len() as u64)));
        let rendered = environment
            .get_template(NAME)
            .and_then(|template| template.render(Serde(variables)));
        rendered.map_err(|e| self.fail(said(&e)))
    }

    fn fail(&self, reason: String) -> Error {
        Error::Template {
            path: self.path.clone(),
            reason,
        }
    }
}

/// Returns the message of an error and of those that caused it.
pub(crate) fn said(error: &minijinja::Error) -> String {
    if error.kind() == ErrorKind::OutOfFuel {
        return "it takes too much work".into();
    }
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

/// A conversation as templates see it.
struct Conversation {
    messages: Value,
    tools: Value,
    json: String,
}

impl Conversation {
    fn new(messages: &[Message], tools: &[Value]) -> Self {
        let messages = messages.iter().map(|message| message.fields().into());
        let messages = Value::Array(messages.collect());
        let tools = match tools {
            [] => Value::Null,
            tools => tools.into(),
        };
        let json = format!("{messages}{tools}");
        Self {
            messages,
            tools,
            json,
        }
    }

    /// Returns a word that occurs neither in the conversation nor in the template.
    fn unused(&self, stem: &str, source: &str) -> String {
        let mut word = format!("X{stem}X");
        while self.json.contains(&word) || source.contains(&word) {
            word.push('X');
        }
        word
    }
}
