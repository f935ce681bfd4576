//! Converts rows of data files to conversations.
//!
//! | keys of a row | format |
//! | --- | --- |
//! | `messages` | `[{"role", "content"}]`, roles system, developer, user, assistant, tool; other keys are passed on |
//! | `conversations` | ShareGPT: `[{"from", "value"}]`, or messages |
//! | `instruction`, `output` | Alpaca, optionally with `input`, `system`, `history` (`[[instruction, output]]`) |
//! | `prompt`, `completion` or `response` | two texts, or two lists of messages |
//!
//! A row has the first format of the table whose keys it has. `tools` may be given with any of them, and `system` with
//! all but `messages`. Alpaca's `input` follows the `instruction` on a new line; the preamble of Alpaca's own prompt is
//! left out, since the chat template marks the speakers.

use minijinja::Value;
use minijinja::value::Serde;
use serde_json::{Map, Value as Json, json};

use crate::data::did_you_mean;

/// A conversation in the format that chat templates expect.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// The messages: objects with `role` and, except for calls of tools, `content`.
    pub messages: Vec<Json>,
    /// The tools, a list of JSON schemas.
    pub tools: Option<Json>,
}

/// The roles of messages.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// Names of other formats, and the role that each stands for.
const ALIASES: [(&str, &str); 14] = [
    ("human", "user"),
    ("prompter", "user"),
    ("instruction", "user"),
    ("gpt", "assistant"),
    ("model", "assistant"),
    ("bot", "assistant"),
    ("ai", "assistant"),
    ("chatgpt", "assistant"),
    ("bing", "assistant"),
    ("bard", "assistant"),
    ("observation", "tool"),
    ("function_response", "tool"),
    ("function", "tool"),
    ("ipython", "tool"),
];

/// ShareGPT's speaker for a function call of the assistant.
const FUNCTION_CALL: &str = "function_call";

/// Keys of a message's reasoning. Most templates read the first, gpt-oss's reads the second.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Whether an assistant's message carries the loss: its `weight` is not 0.
pub fn carries_loss(message: &Json) -> bool {
    message["weight"].as_f64() != Some(0.0)
}

impl Conversation {
    /// The conversation of a row.
    ///
    /// # Errors
    ///
    /// The row has none of the formats, or a message is malformed, or no message carries the loss.
    pub fn of(row: &Map<String, Json>) -> Result<Self, String> {
        let filled = |key: &str| row.get(key).filter(|value| !value.is_null());
        let system = || match filled("system") {
            None => Ok(None),
            Some(Json::String(text)) if text.trim().is_empty() => Ok(None),
            Some(Json::String(text)) => Ok(Some(message_of("system", text))),
            Some(other) => Err(format!("`system` is {}, and should be a text", value_kind(other))),
        };
        let answer = ["completion", "response"].into_iter().find(|key| filled(key).is_some());
        let mut messages = if let Some(value) = filled("messages") {
            message_list(value, "messages")?
        } else if let Some((key, value)) = ["conversations", "conversation"].iter().find_map(|k| Some((k, filled(k)?)))
        {
            system()?.into_iter().chain(message_list(value, key)?).collect()
        } else if filled("instruction").is_some() && row.contains_key("output") {
            system()?.into_iter().chain(alpaca_messages(row)?).collect()
        } else if let (Some(prompt), Some(key)) = (filled("prompt"), answer) {
            let prompt = prompt_or_completion(prompt, "prompt", "user")?;
            system()?.into_iter().chain(prompt).chain(prompt_or_completion(&row[key], key, "assistant")?).collect()
        } else {
            return Err(unknown_format(row));
        };
        if messages.is_empty() {
            return Err("it has no messages".into());
        }
        for (number, message) in (1..).zip(&mut messages) {
            normalise(message).map_err(|why| format!("message {number}: {why}"))?;
        }
        let assistants = || messages.iter().filter(|message| message["role"] == "assistant");
        if assistants().next().is_none() {
            return Err("no message is the assistant's, so there is nothing to learn".into());
        }
        if !assistants().any(carries_loss) {
            return Err("every message of the assistant has `\"weight\": 0`, so there is nothing to learn".into());
        }
        let tools = match filled("tools") {
            None => None,
            Some(Json::Array(tools)) if tools.is_empty() => None,
            Some(tools @ Json::Array(_)) => Some(tools.clone()),
            // Tables such as parquet cannot hold lists of objects with differing keys, so tools are JSON text there.
            Some(Json::String(text)) if text.trim().is_empty() => None,
            Some(Json::String(text)) => match serde_json::from_str(text) {
                Ok(Json::Array(tools)) if tools.is_empty() => None,
                Ok(tools @ Json::Array(_)) => Some(tools),
                _ => return Err("`tools` is a text that is not a JSON list".into()),
            },
            Some(other) => {
                return Err(format!("`tools` is {}, and should be a list of JSON schemas", value_kind(other)));
            }
        };
        Ok(Conversation { messages, tools })
    }

    /// The names of the calls and of the tools, which a template that supports tools writes.
    pub(super) fn names(&self) -> Vec<(&'static str, &str)> {
        fn name<'a>(kind: &'static str, entry: &'a Json) -> Option<(&'static str, &'a str)> {
            let named = entry.get("function").filter(|function| function.is_object()).unwrap_or(entry);
            Some((kind, named["name"].as_str()?))
        }
        let calls = self.messages.iter().flat_map(|message| message["tool_calls"].as_array().into_iter().flatten());
        let tools = self.tools.as_ref().and_then(Json::as_array).into_iter().flatten();
        calls
            .filter_map(|call| name("the call of", call))
            .chain(tools.filter_map(|tool| name("the tool", tool)))
            .collect()
    }

    /// The messages as values for the template: without `weight` and keys that are null, and with reasoning under each
    /// of its keys.
    pub(super) fn values(&self) -> Vec<Value> {
        let one = |message: &Json| {
            let mut message = message.clone();
            if let Some(entries) = message.as_object_mut() {
                entries.retain(|key, value| !value.is_null() && key != "weight");
                if let Some(reasoning) = REASONING.iter().find_map(|key| entries.get(*key).cloned()) {
                    entries.insert(REASONING[0].into(), reasoning.clone());
                    entries.entry(REASONING[1]).or_insert(reasoning);
                }
            }
            Value::from(Serde(&message))
        };
        self.messages.iter().map(one).collect()
    }
}

/// A message of a role with a text.
fn message_of(role: &str, text: &str) -> Json {
    json!({"role": role, "content": text})
}

/// The kind of a value, or a short value itself, for an error.
fn value_kind(value: &Json) -> String {
    match value {
        Json::Null => "null".into(),
        Json::Bool(_) | Json::Number(_) => value.to_string(),
        Json::String(_) => "a text".into(),
        Json::Array(_) => "a list".into(),
        Json::Object(_) => "an object".into(),
    }
}

/// The error for a row that has none of the formats.
fn unknown_format(row: &Map<String, Json>) -> String {
    const KEYS: [&str; 7] = ["messages", "conversations", "instruction", "output", "prompt", "completion", "response"];
    let keys: Vec<String> = row.keys().take(8).map(|key| format!("`{key}`")).collect();
    let held = if keys.is_empty() { "no keys".into() } else { format!("the keys {}", keys.join(", ")) };
    let meant = row.keys().filter(|key| !KEYS.contains(&key.as_str())).map(|key| did_you_mean(key, KEYS));
    let meant = meant.into_iter().find(|hint| !hint.is_empty()).unwrap_or_default();
    format!(
        "it has {held}{meant}, and a conversation is `messages`, ShareGPT's `conversations`, `instruction` with \
         `output`, or \
         `prompt` with `completion` or `response`"
    )
}

/// The messages in a list, with turns of ShareGPT converted.
fn message_list(value: &Json, key: &str) -> Result<Vec<Json>, String> {
    let items = value
        .as_array()
        .ok_or_else(|| format!("`{key}` is {}, and should be a list of messages", value_kind(value)))?;
    let message = |(number, item): (usize, &Json)| {
        let Some(entries) = item.as_object() else {
            return Err(format!(
                "message {number} is {}, and should be an object with `role` and `content`",
                value_kind(item)
            ));
        };
        match entries.get("from") {
            Some(from) if !entries.contains_key("role") => sharegpt_message(entries, from),
            _ => Ok(item.clone()),
        }
        .map_err(|why| format!("message {number}: {why}"))
    };
    (1..).zip(items).map(message).collect()
}

/// Converts a turn of ShareGPT to a message. Keys other than `from` and `value` are kept.
fn sharegpt_message(entries: &Map<String, Json>, from: &Json) -> Result<Json, String> {
    let from = from.as_str().ok_or_else(|| format!("`from` is {}, and should be a text", value_kind(from)))?;
    let value = entries.get("value").cloned().unwrap_or_default();
    let mut message: Map<String, Json> = Map::new();
    if from == FUNCTION_CALL {
        message.insert("role".into(), "assistant".into());
        message.insert("tool_calls".into(), sharegpt_calls(&value)?);
    } else {
        let role = ROLES.iter().find(|role| **role == from);
        let role = role.or_else(|| ALIASES.iter().find(|(alias, _)| *alias == from).map(|(_, role)| role));
        let known = ROLES.into_iter().chain(ALIASES.map(|(alias, _)| alias)).chain([FUNCTION_CALL]);
        let role = role
            .ok_or_else(|| format!("`from` is `{from}`, which is not a known speaker{}", did_you_mean(from, known)))?;
        message.insert("role".into(), (*role).into());
        message.insert("content".into(), value);
    }
    let others = entries.iter().filter(|(key, _)| *key != "from" && *key != "value");
    message.extend(others.map(|(key, value)| (key.clone(), value.clone())));
    Ok(Json::Object(message))
}

/// The calls in a `function_call` turn of ShareGPT: JSON text of `{"name", "arguments"}`, or of a list of these.
fn sharegpt_calls(value: &Json) -> Result<Json, String> {
    let parsed = match value {
        Json::String(text) => serde_json::from_str(text).ok(),
        other => Some(other.clone()),
    };
    let calls = match parsed {
        Some(Json::Array(calls)) => calls,
        Some(call @ Json::Object(_)) => vec![call],
        _ => vec![],
    };
    if calls.is_empty() || calls.iter().any(|call| !call["name"].is_string()) {
        return Err(format!(
            "the `value` of `{FUNCTION_CALL}` should be JSON, an object with `name` and `arguments`, or a list of them"
        ));
    }
    Ok(calls.into_iter().map(|call| json!({"type": "function", "function": call})).collect())
}

/// The messages of an Alpaca row.
fn alpaca_messages(row: &Map<String, Json>) -> Result<Vec<Json>, String> {
    let text = |key: &str| match row.get(key) {
        None | Some(Json::Null) => Ok(""),
        Some(Json::String(text)) => Ok(text.as_str()),
        Some(other) => Err(format!("`{key}` is {}, and should be a text", value_kind(other))),
    };
    let mut messages = vec![];
    match row.get("history") {
        None | Some(Json::Null) => {}
        Some(history) => {
            let wrong = || "`history` should be a list of pairs, an instruction and its output".to_owned();
            for pair in history.as_array().ok_or_else(wrong)? {
                let [instruction, output] = &pair.as_array().ok_or_else(wrong)?[..] else { return Err(wrong()) };
                for (role, side) in [("user", instruction), ("assistant", output)] {
                    messages.push(message_of(role, side.as_str().ok_or_else(wrong)?));
                }
            }
        }
    }
    let (instruction, input, output) = (text("instruction")?, text("input")?, text("output")?);
    let asked: Vec<&str> = [instruction, input].into_iter().filter(|part| !part.trim().is_empty()).collect();
    if asked.is_empty() {
        return Err("`instruction` is empty".into());
    }
    if output.trim().is_empty() {
        return Err("`output` is empty, so there is nothing to learn".into());
    }
    messages.extend([message_of("user", &asked.join("\n")), message_of("assistant", output)]);
    Ok(messages)
}

/// The messages of a prompt or a completion, which is a text or a list of messages.
fn prompt_or_completion(value: &Json, key: &str, role: &str) -> Result<Vec<Json>, String> {
    match value {
        Json::String(text) if text.trim().is_empty() => Err(format!("`{key}` is empty")),
        Json::String(text) => Ok(vec![message_of(role, text)]),
        Json::Array(_) => message_list(value, key),
        other => Err(format!("`{key}` is {}, and should be a text or a list of messages", value_kind(other))),
    }
}

/// Checks a message and converts its content to a text. Parts of a content are concatenated. Arguments of calls that
/// are JSON text, as in OpenAI's API, become objects, which templates expect.
fn normalise(message: &mut Json) -> Result<(), String> {
    let role = match &message["role"] {
        Json::String(role) => role.clone(),
        Json::Null => return Err("it has no `role`; write `{\"role\": \"user\", \"content\": \"…\"}`".into()),
        other => return Err(format!("its `role` is {}, and should be a text", value_kind(other))),
    };
    if !ROLES.contains(&role.as_str()) {
        let meant = ALIASES.iter().find(|(alias, _)| alias.eq_ignore_ascii_case(&role));
        let hint = meant.map_or_else(|| did_you_mean(&role, ROLES), |(_, role)| format!(" (did you mean `{role}`?)"));
        return Err(format!("unknown role `{role}`{hint}; roles are {}", ROLES.join(", ")));
    }
    match &message["weight"] {
        Json::Null => {}
        Json::Number(weight) if [0.0, 1.0].contains(&weight.as_f64().unwrap_or(2.0)) => {}
        other => return Err(format!("its `weight` is {other}, and should be 0 or 1")),
    }
    if let Json::Array(parts) = &message["content"] {
        let text = parts.iter().map(|part| match (part.as_str(), part["type"].as_str(), part["text"].as_str()) {
            (Some(text), _, _) | (_, Some("text"), Some(text)) => Ok(text),
            (_, Some(other), _) if other != "text" => {
                Err(format!("a part of its content is of type `{other}`, and only text is read"))
            }
            _ => Err("a part of its content is not `{\"type\": \"text\", \"text\": \"…\"}`".to_owned()),
        });
        message["content"] = text.collect::<Result<String, _>>()?.into();
    }
    let calling = match &message["tool_calls"] {
        Json::Null => false,
        Json::Array(calls) if calls.iter().all(Json::is_object) => !calls.is_empty(),
        Json::Array(_) => return Err("its `tool_calls` are not objects".into()),
        other => return Err(format!("its `tool_calls` are {}, and should be a list", value_kind(other))),
    };
    match &message["content"] {
        Json::Null if calling && role == "assistant" => {}
        Json::Null => return Err(format!("the {role}'s message has no `content`")),
        // A system message may be empty, which replaces the template's default one, and so may the result of a tool.
        Json::String(text) if text.trim().is_empty() && !calling && ["user", "assistant"].contains(&role.as_str()) => {
            return Err(format!("the {role}'s `content` is empty"));
        }
        Json::String(_) => {}
        // The template converts a tool's result that is not a text.
        Json::Object(_) | Json::Number(_) | Json::Bool(_) if role == "tool" => {}
        other => {
            return Err(format!("its `content` is {}, and should be a text or a list of parts", value_kind(other)));
        }
    }
    for call in message.get_mut("tool_calls").and_then(Json::as_array_mut).into_iter().flatten() {
        let call = if call["function"].is_object() { &mut call["function"] } else { call };
        if let Some(Ok(arguments @ Json::Object(_))) = call["arguments"].as_str().map(serde_json::from_str) {
            call["arguments"] = arguments;
        }
    }
    Ok(())
}
