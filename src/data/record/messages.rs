//! Messages of conversations, in the forms that files have them.

use serde_json::{Map, Value};

use super::{Message, type_name};

/// Names of roles in ShareGPT's files, and those of chat templates.
const ROLES: [(&str, &str); 12] = [
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("assistant", "assistant"),
    ("bot", "assistant"),
    ("chatgpt", "assistant"),
    ("model", "assistant"),
    ("system", "system"),
    ("tool", "tool"),
    ("observation", "tool"),
    ("function_response", "tool"),
    ("developer", "developer"),
];

/// Returns the messages of the field `key`, after those of a field `system`, if there is one.
pub(super) fn conversation(
    map: &mut Map<String, Value>,
    key: &str,
) -> Result<Vec<Message>, String> {
    let mut messages = list(map, key, "user")?;
    if let Some(Value::String(system)) = map.get("system")
        && !system.trim().is_empty()
        && messages.first().is_none_or(|first| first.role != "system")
    {
        messages.insert(0, Message::system(system.as_str()));
    }
    Ok(messages)
}

/// Returns the messages of a field, which may also be the text of one message of this role.
pub(super) fn list(
    map: &mut Map<String, Value>,
    key: &str,
    role: &str,
) -> Result<Vec<Message>, String> {
    let values = match map.remove(key) {
        Some(Value::Array(values)) => values,
        Some(Value::String(text)) if key == "prompt" || key == "completion" => {
            return Ok(vec![Message::new(role, text)]);
        }
        // Tables hold lists as JSON.
        Some(Value::String(text)) => {
            serde_json::from_str(&text).map_err(|e| format!("`{key}` is not a list: {e}"))?
        }
        other => {
            let found = other.as_ref().map_or("nothing", type_name);
            return Err(format!("`{key}` must be a list of messages, found {found}"));
        }
    };
    if values.is_empty() {
        return Err(format!("`{key}` has no messages"));
    }
    let numbered = values.into_iter().enumerate();
    let messages = numbered
        .map(|(i, value)| message(value).map_err(|e| format!("message {} of `{key}`: {e}", i + 1)));
    messages.collect()
}

fn message(value: Value) -> Result<Message, String> {
    let Value::Object(mut map) = value else {
        return Err(format!("an object is needed, found {}", type_name(&value)));
    };
    let share = map.contains_key("from") && !map.contains_key("role");
    let (speaker, said) = if share {
        ("from", "value")
    } else {
        ("role", "content")
    };
    let role = match map.remove(speaker) {
        Some(Value::String(role)) => role,
        Some(other) => {
            return Err(format!(
                "`{speaker}` must be a string, found {}",
                type_name(&other)
            ));
        }
        None => return Err(format!("`{speaker}` is missing")),
    };
    let role = if share {
        let known = ROLES.iter().find(|(name, _)| *name == role);
        known
            .map(|(_, role)| (*role).to_string())
            .ok_or_else(|| format!("`from` is {role:?}, which is no known speaker"))?
    } else if role == "model" {
        "assistant".into()
    } else {
        role
    };
    let content = match map.remove(said) {
        Some(Value::String(text)) => text,
        Some(Value::Number(number)) => number.to_string(),
        Some(Value::Array(parts)) => joined(parts)?,
        None | Some(Value::Null) if map.get("tool_calls").is_some_and(|c| !c.is_null()) => {
            String::new()
        }
        None | Some(Value::Null) => return Err(format!("`{said}` is missing")),
        Some(other) => {
            return Err(format!(
                "`{said}` must be a string, found {}",
                type_name(&other)
            ));
        }
    };
    map.retain(|_, value| !value.is_null());
    Ok(Message {
        role,
        content,
        more: map,
    })
}

/// Joins the parts of a content. Only text has a place in a language model.
fn joined(parts: Vec<Value>) -> Result<String, String> {
    let mut text = String::new();
    for part in parts {
        match (&part, part.get("type").and_then(Value::as_str)) {
            (Value::String(part), _) => text.push_str(part),
            (_, Some("text")) => match part.get("text").and_then(Value::as_str) {
                Some(part) => text.push_str(part),
                None => return Err("a part of type `text` has no `text`".into()),
            },
            (_, kind) => {
                let kind = kind.unwrap_or("none");
                return Err(format!(
                    "a part of its content is of type `{kind}`, not text"
                ));
            }
        }
    }
    Ok(text)
}

/// Returns the tools of a record, which files hold as a list or as the JSON of one.
pub(super) fn tools(map: &mut Map<String, Value>) -> Result<Vec<Value>, String> {
    match map.remove("tools") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(tools)) => Ok(tools),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(Vec::new()),
        Some(Value::String(text)) => {
            serde_json::from_str(&text).map_err(|e| format!("`tools` is not a list: {e}"))
        }
        Some(other) => Err(format!(
            "`tools` must be a list, found {}",
            type_name(&other)
        )),
    }
}
