//! Turns of a conversation.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Role of the turns that a model learns.
const ASSISTANT: &str = "assistant";

/// A turn of a conversation, as OpenAI's files and chat templates have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool`, or another role that the model's template
    /// knows.
    pub role: String,
    /// What is said.
    #[serde(default)]
    pub content: String,
    /// The other fields, which some templates read: `reasoning_content`, `tool_calls`, `name`.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

impl Message {
    /// Creates a turn.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
            more: Map::new(),
        }
    }

    /// Creates a turn of the system, which tells the model how to behave.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// Creates a turn of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// Creates a turn of the model.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new(ASSISTANT, content)
    }

    /// Returns whether the model speaks.
    pub fn is_assistant(&self) -> bool {
        self.role == ASSISTANT
    }

    /// Returns whether the turn is learned: the model speaks, and the field `weight` of OpenAI's
    /// files is not 0.
    pub fn is_trained(&self) -> bool {
        let weight = self.more.get("weight").and_then(Value::as_f64);
        self.is_assistant() && weight != Some(0.0)
    }

    /// Returns the fields that a template sees. Fields that are null are left out, and the text of
    /// a model's reasoning is found under each name that templates use, as in transformers.
    pub(super) fn fields(&self) -> Map<String, Value> {
        const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
        let mut fields = Map::new();
        fields.insert("role".into(), self.role.as_str().into());
        // A turn that only calls tools has no content, and templates ask whether there is any.
        if !(self.content.is_empty() && self.more.contains_key("tool_calls")) {
            fields.insert("content".into(), self.content.as_str().into());
        }
        let known = self.more.iter().filter(|(_, value)| !value.is_null());
        fields.extend(known.map(|(key, value)| (key.clone(), value.clone())));
        let reasoning = REASONING.iter().find_map(|key| fields.get(*key)).cloned();
        if let Some(reasoning) = reasoning {
            let mut all = Map::new();
            all.insert("thinking".into(), reasoning.clone());
            all.extend(fields);
            all.insert(REASONING[0].into(), reasoning);
            return all;
        }
        fields
    }
}
