//! Chat templates.
#![no_main]

use elastic_lora::data::{ChatTemplate, Message};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|source: &str| {
    if let Ok(template) = ChatTemplate::new(source, "fuzzed") {
        let messages = [Message::user("hi"), Message::assistant("a \u{e9} b")];
        let _ = template.render(&messages, &[], true);
        let _ = template.render_trained(&messages, &[], 0);
    }
});
