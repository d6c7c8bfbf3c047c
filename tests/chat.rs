//! Chat templates against transformers.
//!
//! If there is a Python with transformers (`ELASTIC_LORA_PYTHON`, else `python3`), a script renders
//! random conversations with templates of its own, and with those that `ELASTIC_LORA_TEMPLATES`
//! names (a folder of `.jinja` files), and gives the tokens of their assistants where a template
//! marks them. Otherwise the test prints that it was skipped.

use std::path::{Path, PathBuf};
use std::process::Command;

use elastic_lora::data::{
    ChatTemplate, Message, Record, Template, TextTokenizer, TokenizeOptions, tokenize_records,
};
use serde::Deserialize;
use serde_json::{Map, Value};

#[derive(Deserialize)]
struct Reference {
    tokenizer: String,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    source: String,
    variables: Map<String, Value>,
    rows: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    messages: Vec<Message>,
    text: Option<String>,
    prompt: Option<String>,
    marks: Option<Vec<[usize; 2]>>,
    error: Option<String>,
    #[serde(default)]
    ids: Vec<u32>,
    #[serde(default)]
    mask: Vec<u8>,
}

/// Runs the script, and returns what it wrote, or `None` if there is no transformers.
fn reference() -> Option<Reference> {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("cases.json");
    let python =
        std::env::var_os("ELASTIC_LORA_PYTHON").map_or_else(|| "python3".into(), PathBuf::from);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/interop/check_chat.py");
    let mut files = Vec::new();
    if let Some(folder) = std::env::var_os("ELASTIC_LORA_TEMPLATES") {
        let all = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        files.extend(all.filter(|path| path.extension().is_some_and(|e| e == "jinja")));
        files.sort();
    }
    let output = Command::new(&python)
        .arg(script)
        .arg(&out)
        .args(files)
        .output();
    let skipped = |reason: &str| eprintln!("skipped: no Python with transformers: {reason}");
    match output {
        Ok(output) if output.status.code() == Some(77) => {
            skipped(&String::from_utf8_lossy(&output.stderr));
            None
        }
        Ok(output) => {
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{error}");
            let text = std::fs::read_to_string(out).unwrap();
            Some(serde_json::from_str(&text).unwrap())
        }
        Err(error) => {
            skipped(&error.to_string());
            None
        }
    }
}

/// Returns characters as bytes.
fn bytes(text: &str, at: usize) -> usize {
    text.char_indices().nth(at).map_or(text.len(), |(at, _)| at)
}

/// Returns the tokens that are learned of a marked conversation, from those of transformers. Besides
/// them, the token that ends a turn is learned where it stands behind the marked part: a special
/// token, if the part does not end with one itself.
fn learned(row: &Row, tokenizer: &TextTokenizer) -> Vec<bool> {
    let text = |t: usize| tokenizer.id_to_token(row.ids[t]).unwrap();
    let special = |t: usize| {
        let text = text(t);
        text.starts_with("<|") && text.ends_with("|>")
            || [
                "<start_of_turn>",
                "<end_of_turn>",
                "<s>",
                "</s>",
                "[INST]",
                "[/INST]",
            ]
            .contains(&text.as_str())
    };
    let blank = |t: usize| tokenizer.decode(&row.ids[t..=t]).unwrap().trim().is_empty();
    let mut mask: Vec<bool> = row.mask.iter().map(|m| *m == 1).collect();
    for (t, learned) in mask.iter_mut().enumerate().skip(1) {
        let last = (0..t).rev().find(|t| special(*t) || !blank(*t));
        let open = row.mask[t - 1] == 1 && last.is_some_and(|last| !special(last));
        *learned |= open && special(t) && text(t) != "<s>";
    }
    if let Some(first) = mask.first_mut() {
        *first = false;
    }
    mask
}

#[test]
fn conversations_are_rendered_as_by_transformers() {
    let Some(Reference { tokenizer, cases }) = reference() else {
        return;
    };
    let tokenizer = TextTokenizer::from_json(&tokenizer, "tokenizer.json").unwrap();
    let special = |token| tokenizer.token_to_id(token);
    let tokenizer = tokenizer
        .clone()
        .with_special_ids(special("<s>"), special("</s>"));
    let options = TokenizeOptions::new(1 << 20).with_add_eos(false);
    let mut wrong = Vec::new();
    for case in cases {
        let template = ChatTemplate::new(&case.source, format!("{}.jinja", case.name));
        let mut template = match template {
            Ok(template) => template,
            Err(error) => {
                wrong.push(error.to_string());
                continue;
            }
        };
        for (name, value) in case.variables {
            template = template.with_variable(name, value);
        }
        let (mut compared, mut marked, mut refused, mut bad) = (0, 0, 0, 0);
        let mut masked = 0;
        let mut say = |what: String| {
            bad += 1;
            if bad == 1 {
                wrong.push(format!("{}: {what}", case.name));
            }
        };
        for row in &case.rows {
            let text = template.render(&row.messages, &[], false);
            match (&text, &row.text) {
                (Ok(found), Some(expected)) if found == expected => compared += 1,
                (Err(_), None) => refused += 1,
                (found, expected) => {
                    let error = row.error.as_deref().unwrap_or("");
                    say(format!(
                        "{:?}\n{found:?}\n{expected:?} {error}",
                        row.messages
                    ));
                    continue;
                }
            }
            let prompt = template.render(&row.messages, &[], true).ok();
            if prompt != row.prompt {
                say(format!("{:?}\n{prompt:?}\n{:?}", row.messages, row.prompt));
            }
            let (Some(marks), Some(text)) = (&row.marks, &row.text) else {
                continue;
            };
            if marks.is_empty() && !row.messages.iter().any(Message::is_assistant) {
                continue;
            }
            let expected: Vec<_> = marks
                .iter()
                .map(|[start, end]| bytes(text, *start)..bytes(text, *end))
                .collect();
            let found = template.render_trained(&row.messages, &[], 0).unwrap();
            if found.trained != expected {
                say(format!(
                    "{:?}\n{:?}\n{expected:?}\n{text}",
                    row.messages, found.trained
                ));
            }
            marked += 1;
            let record = Record::Conversation {
                messages: row.messages.clone(),
                tools: Vec::new(),
                prompt_messages: 0,
            };
            let chat = Template::chat(template.clone());
            // A conversation in which the assistant says nothing is left out.
            let Ok(found) = tokenize_records(&[record], &chat, &tokenizer, &options) else {
                continue;
            };
            let found = &found.sequences[0];
            if found.ids != row.ids || found.loss_mask != learned(row, &tokenizer) {
                say(format!(
                    "{:?}\n{:?}\n{:?}\n{:?}\n{text}",
                    row.messages, found, row.ids, row.mask
                ));
            }
            masked += 1;
        }
        eprintln!(
            "{}: {compared} equal, {refused} refused by both, {marked} with marks, {masked} with masks of \
             tokens, {bad} not equal",
            case.name
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}
