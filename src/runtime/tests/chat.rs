//! Chat templates and text of models, in folders and bundles.

use std::path::Path;

use serde_json::json;

use super::model;
use crate::data::Message;
use crate::runtime::{Model, ModelOptions, TextStream};

/// A model with the tokenizer of the bundled one, and this `tokenizer_config.json`.
fn chatting(config: &serde_json::Value) -> (tempfile::TempDir, Model) {
    let folder = tempfile::tempdir().unwrap();
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/arithmetic-llama");
    for name in ["tokenizer.json", "config.json", "model.safetensors"] {
        std::fs::copy(assets.join(name), folder.path().join(name)).unwrap();
    }
    let path = folder.path().join("tokenizer_config.json");
    std::fs::write(path, config.to_string()).unwrap();
    let model = Model::open(folder.path(), &ModelOptions::default()).unwrap();
    (folder, model)
}

const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\
     {{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";

#[test]
fn bundles_carry_the_chat_template() {
    let config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"},
        "chat_template": TEMPLATE});
    let (folder, model) = chatting(&config);
    let path = folder.path().join("model.elora");
    model.save(&path, false).unwrap();
    let bundle = Model::open(&path, &ModelOptions::default()).unwrap();
    let messages = [Message::user("How many?"), Message::assistant("3")];
    for model in [&model, &bundle] {
        let chat = model.chat_template().unwrap();
        assert_eq!(
            chat.render(&messages, &[], true).unwrap(),
            "<s>[user]How many?</s>[assistant]3</s>[assistant]"
        );
        assert_eq!(chat.end_of_turn(model.tokenizer().unwrap()), Some(2));
        assert!(model.notices().is_empty(), "{:?}", model.notices());
    }
}

#[test]
fn a_template_that_cannot_be_used_is_a_notice() {
    let config = json!({"chat_template": "{% for %}"});
    let (_folder, model) = chatting(&config);
    assert!(model.chat_template().is_none());
    let notices = model.notices();
    assert!(
        notices
            .iter()
            .any(|n| n.contains("the chat template cannot be used")),
        "{notices:?}"
    );
}

#[test]
fn a_stream_is_text_up_to_a_stop_string() {
    let (_folder, talks) = chatting(&json!({}));
    let tokenizer = talks.tokenizer().unwrap();
    let text = "Answer: 12 pens.\n\nQuestion: and now?";
    let ids = tokenizer.encode(text, false).unwrap();
    let mut stream = TextStream::new(&talks, ["\n\nQ", "nothing"]).unwrap();
    let mut shown = String::new();
    for id in &ids {
        shown += stream.push(*id).unwrap();
        if stream.stopped() {
            break;
        }
    }
    assert!(stream.stopped());
    shown += stream.finish();
    assert_eq!(shown, "Answer: 12 pens.");
    let mut again = String::new();
    for id in &ids[..3] {
        again += stream.push(*id).unwrap();
    }
    again += stream.finish();
    assert_eq!(again, tokenizer.decode(&ids[..3]).unwrap());
    assert!(TextStream::new(&talks, [""]).is_err());
    assert!(TextStream::new(&model(json!({})), [""; 0]).is_err());
}
