//! Text of a generation while it goes on.

use super::model::Model;
use crate::data::{Detokenizer, StopStrings};
use crate::error::{Error, Result};

/// Makes text of tokens that are drawn one after another, and ends it at stop strings.
///
/// Text is whole characters. Text that may be the beginning of a stop string is held back. The cost
/// of a token does not depend on the number of tokens before it.
#[derive(Clone, Debug)]
pub struct TextStream {
    model: Model,
    detokenizer: Detokenizer,
    stops: StopStrings,
    text: String,
}

impl TextStream {
    /// Creates a stream for tokens of `model`, which leaves special tokens out.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if the model has no tokenizer, or if a stop string is
    /// empty.
    pub fn new(model: &Model, stops: impl IntoIterator<Item = impl Into<String>>) -> Result<Self> {
        if model.tokenizer().is_none() {
            return Err(Error::argument("model", "without one", "a tokenizer"));
        }
        Ok(Self {
            model: model.clone(),
            detokenizer: Detokenizer::new(),
            stops: StopStrings::new(stops)?,
            text: String::new(),
        })
    }

    /// Sets whether special tokens are written by their names, not left out.
    pub fn with_special(mut self, special: bool) -> Self {
        self.detokenizer = Detokenizer::new().with_special(special);
        self
    }

    /// The model whose tokens the stream gets.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Adds a token, and returns the text that can be shown. There is none after a stop string.
    ///
    /// # Errors
    /// Returns [`Error::Tokenizer`] if the tokenizer fails. The token then adds no text.
    pub fn push(&mut self, id: u32) -> Result<&str> {
        match self.model.tokenizer() {
            Some(tokenizer) => Ok(self.stops.push(self.detokenizer.push(tokenizer, id)?)),
            None => Ok(""),
        }
    }

    /// Returns whether a stop string was found.
    pub fn stopped(&self) -> bool {
        self.stops.stopped()
    }

    /// Ends the text: returns what was held back. The next token begins another text.
    pub fn finish(&mut self) -> &str {
        self.text.clear();
        self.text
            .push_str(self.stops.push(self.detokenizer.finish()));
        self.text.push_str(self.stops.finish());
        &self.text
    }
}
