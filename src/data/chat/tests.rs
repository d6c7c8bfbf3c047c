use serde_json::json;

use super::jinja::environment;
use super::*;

const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\
     {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Writes the model's last turn in another way than those before, as Qwen3's template does.
const LAST_THINKS: &str = "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == \
     'assistant' %}(hm){% endif %}{{ m.content | trim }}</{{ m.role }}>\n{% endfor %}{% if \
     add_generation_prompt %}<assistant>{% endif %}";

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, "t.jinja").unwrap()
}

fn conversation() -> Vec<Message> {
    vec![
        Message::system("Be brief."),
        Message::user("2 + 2?"),
        Message::assistant("4"),
        Message::user("4 + 4?"),
        Message::assistant(" 8\n"),
    ]
}

fn parts(source: &str, messages: &[Message], first: usize) -> Vec<String> {
    let rendered = template(source)
        .render_trained(messages, &[], first)
        .unwrap();
    let ranges = rendered.trained.into_iter();
    ranges.map(|range| rendered.text[range].into()).collect()
}

#[test]
fn turns_of_the_assistant_are_found_by_prefixes() {
    let all = parts(CHATML, &conversation(), 0);
    assert_eq!(all, ["4<|im_end|>", " 8\n<|im_end|>"]);
    assert_eq!(parts(CHATML, &conversation(), 3), [" 8\n<|im_end|>"]);
    assert_eq!(parts(CHATML, &conversation()[..4], 0), ["4<|im_end|>"]);
    let mut untrained = conversation();
    untrained[2].more.insert("weight".into(), 0.into());
    assert_eq!(parts(CHATML, &untrained, 0), [" 8\n<|im_end|>"]);
    assert!(parts(CHATML, &conversation()[..2], 0).is_empty());
}

#[test]
fn turns_are_found_where_they_change_with_what_follows() {
    let all = parts(LAST_THINKS, &conversation(), 0);
    assert_eq!(all, ["4</assistant>", "(hm)8</assistant>"]);
    // The content of the first turn also occurs elsewhere.
    let mut same = conversation();
    same[1].content = "assistant".into();
    same[2].content = "assistant".into();
    let all = parts(LAST_THINKS, &same, 0);
    assert_eq!(all, ["assistant</assistant>", "(hm)8</assistant>"]);
    // What is not in the text cannot be learned.
    let silent = template("{% for m in messages %}{{ m.role }}{% endfor %}{{ messages | length }}");
    let error = silent.render_trained(&conversation(), &[], 0);
    let message = error.unwrap_err().to_string();
    assert!(
        message.contains("t.jinja") && message.contains("message 3"),
        "{message}"
    );
}

#[test]
fn generation_blocks_are_the_parts_that_are_learned() {
    let source = "{% for m in messages %}\n{{ m.role }}: \n{%- if m.role == 'assistant' %}\n  \
         {%- generation -%}\n  {{ m.content }}!{% endgeneration %}\n{% else %}{{ m.content }}{% endif \
         %};{% endfor %}{# {% generation %} #}{{ '{% generation %}' }}";
    assert!(template(source).has_generation_blocks());
    assert_eq!(parts(source, &conversation(), 0), ["4!", " 8\n!"]);
    assert_eq!(parts(source, &conversation(), 3), [" 8\n!"]);
    let text = template(source).render(&conversation()[..3], &[], false);
    assert_eq!(
        text.unwrap(),
        "system:Be brief.;user:2 + 2?;assistant:4!;{% generation %}"
    );
    let raw = "{% raw %}{% generation %}{% endraw %}{{ '{%' }}";
    let kept = rewrite(raw).unwrap();
    assert_eq!((kept.text.as_str(), kept.generation), (raw, false));
    // A template that looks at its own blocks would see the marks.
    let looks = "{% for m in messages %}{% set t %}{% generation %}{{ m.content }}{% endgeneration %}{% endset \
         %}{{ t | length }}{{ t }}.{% endfor %}{% if add_generation_prompt %}{% endif %}";
    let text = template(looks).render(&[Message::user("ab")], &[], false);
    assert_eq!(text.unwrap(), "2ab.");
}

#[test]
fn templates_see_what_transformers_gives_them() {
    let source = "{{ bos_token }}{{ tools is none }}{{ documents is none }}{{ tools | tojson }}|{{ \
         missing }}{{ messages[0].x is defined }}{{ strftime_now('%d %b %Y, %A %j %I%p %-d') }}";
    let template = template(source)
        .with_variable("bos_token", "<s>")
        .with_time(1_709_164_799)
        .unwrap();
    let message = Message {
        more: [("x".into(), Value::Null)].into_iter().collect(),
        ..Message::user("")
    };
    let text = template.render(std::slice::from_ref(&message), &[], false);
    assert_eq!(
        text.unwrap(),
        "<s>TrueTruenull|False28 Feb 2024, Wednesday 059 11PM 28"
    );
    let tools = [json!({"b": 1.5e-7, "a": ["<é>", 1e16, null, true]})];
    let text = template.render(&[message], &tools, false).unwrap();
    assert!(
        text.contains(r#"[{"b": 1.5e-07, "a": ["<é>", 1e+16, null, true]}]"#),
        "{text}"
    );
    let date = |time, expected: &str| {
        let env = environment(time);
        let text = env.render_str("{{ strftime_now('%Y-%m-%d %H:%M:%S %j') }}", ());
        assert_eq!(text.unwrap(), expected);
    };
    date(0, "1970-01-01 00:00:00 001");
    date(-1, "1969-12-31 23:59:59 365");
    date(951_782_400, "2000-02-29 00:00:00 060");
    date(1_735_603_200, "2024-12-31 00:00:00 366");
}

#[test]
fn hostile_templates_are_refused() {
    for (source, reason) in [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
            "too much work",
        ),
        ("{{ 'x' * 9999999999 }}", "too much work"),
        (
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "recursion",
        ),
        ("{{ raise_exception('no tools here') }}", "no tools here"),
        (
            "{{ messages | tojson(indent=999999999999) }}{{ nothing.more }}",
            "undefined",
        ),
        ("{{ strftime_now('%Q') }}", "%Q"),
        // A text that doubles, and one that is written many times.
        (
            "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "too much work",
        ),
        (
            "{% set x = 'a' * 1000000 %}{% for i in range(1000) %}{{ x }}{% endfor %}",
            "too much work",
        ),
        // There are no files.
        ("{% include '/etc/passwd' %}", "unknown statement"),
        ("{% import '/etc/passwd' as x %}", "unknown statement"),
        ("{% extends '/etc/passwd' %}", "unknown statement"),
    ] {
        let error = ChatTemplate::new(source, "t.jinja")
            .and_then(|template| template.render(&conversation(), &[], false));
        let message = error.unwrap_err().to_string();
        assert!(message.contains(reason), "{source}: {message}");
    }
    for source in [
        "{% if %}",
        "{% generation %}",
        "{{ 'a",
        "{% endgeneration %}",
        "{",
        "{%",
        "{#",
    ] {
        // Each is an error or text, and no panic.
        if let Ok(template) = ChatTemplate::new(source, "t.jinja") {
            let _ = template.render(&conversation(), &[], true);
        }
    }
    assert!(ChatTemplate::new(&"x".repeat(MAX_BYTES + 1), "t.jinja").is_err());
    let deep = format!(
        "{}1{}",
        "{{ (".to_string() + &"(".repeat(5000),
        ")".repeat(5001) + " }}"
    );
    assert!(ChatTemplate::new(&deep, "t.jinja").is_err());
}

#[test]
fn templates_are_found_in_folders() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    assert!(ChatTemplate::open(path).unwrap().is_none());
    std::fs::write(path.join("tokenizer.json"), "{}").unwrap();
    assert!(ChatTemplate::open(path).unwrap().is_none());
    let text = |path: &Path| {
        let template = ChatTemplate::open(path)?.unwrap();
        template.render(&[Message::user("hi")], &[], true)
    };
    let config = |template: Value| {
        let config = json!({
            "chat_template": template, "bos_token": "<b>", "eos_token": {"content": "<e>", "lstrip": false},
            "add_bos_token": true,
        });
        std::fs::write(path.join("tokenizer_config.json"), config.to_string()).unwrap();
    };
    config("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}".into());
    assert_eq!(text(path).unwrap(), "<b>hi<e>");
    config(
        json!([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d{{ eos_token }}"}]),
    );
    assert_eq!(text(path).unwrap(), "d<e>");
    for bad in [
        json!([{"name": "tool_use", "template": "t"}]),
        json!([{"name": "default"}]),
        json!(3),
    ] {
        config(bad);
        assert!(matches!(text(path), Err(Error::Template { .. })));
    }
    std::fs::write(path.join("chat_template.json"), r#"{"chat_template": "j"}"#).unwrap();
    assert_eq!(text(path).unwrap(), "j");
    std::fs::write(path.join("chat_template.jinja"), "o{{ bos_token }}").unwrap();
    assert_eq!(text(path).unwrap(), "o<b>");
    let own = path.join("own.jinja");
    std::fs::write(&own, "own{{ eos_token }}\n").unwrap();
    let own = ChatTemplate::from_file(&own, path).unwrap();
    assert_eq!(own.render(&[], &[], false).unwrap(), "own<e>");
}

#[test]
fn mutated_templates_never_panic() {
    use rand::{RngExt, SeedableRng};
    let good = "{% for m in messages %}{% if loop.index0 > 3 and not m.tools %}{{ raise_exception('x') }}{% endif %}\
        {{- '<|im_start|>' + m['role'] | trim ~ '\\n' }}{% generation %}{{ m.content[:90] | replace('a', 'b') }}\
        {% endgeneration %}{{ m | tojson(indent=2) }}{% set x = m.content.split(' ')[-1] %}{% endfor %}\
        {% macro f(a, b=2) %}{{ a * b }}{% endmacro %}{{ f('z') }}{{ strftime_now('%d %b') }}";
    let parts = [
        "{%",
        "%}",
        "{{",
        "}}",
        "'",
        "for",
        "if",
        "endif",
        "endfor",
        "|",
        "(",
        ")",
        "[",
        "]",
        "*",
        "9999",
        "~",
        "-",
        "loop",
        "messages",
        "set ",
        "=",
        "{#",
        "raw",
        ".items()",
        "é",
        "range(9)",
        "in",
        "recursive",
        "namespace()",
    ];
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(23);
    let (mut parsed, mut rendered) = (0, 0);
    for _ in 0..crate::io::testing::rounds(2000) {
        let mut text = good.to_string();
        for _ in 0..rng.random_range(1..4) {
            let at = text.floor_char_boundary(rng.random_range(0..=text.len()));
            let end = text.floor_char_boundary(at + rng.random_range(0..8));
            let part = parts[rng.random_range(0..parts.len())];
            text.replace_range(at..end.max(at), part);
        }
        let Ok(template) = ChatTemplate::new(&text, "mutated.jinja") else {
            continue;
        };
        parsed += 1;
        if let Ok(text) = template.render(&conversation(), &[], true) {
            rendered += 1;
            assert!(text.len() < 4 << 20);
        }
        let _ = template.render_trained(&conversation(), &[], 0);
    }
    assert!(parsed > 0 && rendered > 0, "{parsed}, {rendered}");
}
