//! Data, from files to batches, and the sample problems and the tokenizer of the bundled model.

#[path = "../examples/common/arithmetic.rs"]
mod arithmetic;
#[path = "../examples/common/bpe.rs"]
mod bpe;
#[path = "data/answers.rs"]
mod final_answers;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use arithmetic::{Kind, Problem, Split, available, mixture, problems};
use bpe::{BPE_BOS, BPE_EOS, BPE_PAD, bpe_tokenizer_config, train_bpe};
use elastic_lora::Error;
use elastic_lora::data::answers::extract_answer;
use elastic_lora::data::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn shared() -> Option<PathBuf> {
    let path = std::env::var_os("ELASTIC_LORA_SHARED").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared")),
        PathBuf::from,
    );
    if path.is_dir() {
        return Some(path);
    }
    eprintln!("skipped: no shared folder");
    None
}

/// Number of rounds of a loop that mutates files; `ELASTIC_LORA_MUTATIONS` sets another.
fn rounds(usual: usize) -> usize {
    std::env::var("ELASTIC_LORA_MUTATIONS").map_or(usual, |n| n.parse().unwrap())
}

fn corpus(n: usize) -> Vec<String> {
    let all = mixture(&Kind::ALL.map(|k| (k, 1.0)), Split::Train, n, 5).unwrap();
    all.into_iter()
        .map(|p| {
            let e = PromptTemplate::Auto.render(&p.into_record());
            e.prompt + &e.completion
        })
        .collect()
}

fn small_tokenizer() -> TextTokenizer {
    let json = train_bpe(&corpus(600), 512).unwrap();
    TextTokenizer::from_json(&json, "tokenizer.json")
        .unwrap()
        .with_special_ids(None, Some(2))
}

fn parse(text: &str) -> Result<Vec<Record>, Error> {
    parse_records(text, Path::new("some.file"))
}

// --- records ---

#[test]
fn records_are_told_apart_by_content() {
    let array = r#"  [{"instruction": "Add", "input": "1 2", "output": "3", "answer": 3.0},
        {"instruction": "Say hi", "output": "hi"}, {"question": "q", "answer": "a\n#### 7"}]"#;
    let records = parse(array).unwrap();
    let [
        Record::Instruction { input, answer, .. },
        Record::Instruction { input: none, .. },
        Record::Question { .. },
    ] = &records[..]
    else {
        panic!("{records:?}");
    };
    assert_eq!(
        (input.as_str(), answer.as_deref(), none.as_str()),
        ("1 2", Some("3.0"), "")
    );
    let finals: Vec<_> = records.iter().map(Record::final_answer).collect();
    assert_eq!(
        finals,
        [Some("3".into()), Some("hi".into()), Some("7".into())]
    );
    // Written as JSON Lines and read again they are the same.
    assert_eq!(parse(&json_lines(&records)).unwrap(), records);
    assert_eq!(
        parse("{\"text\": \"a\"}\n\n{\"text\":\n \"b\"}")
            .unwrap()
            .len(),
        2
    );
    assert_eq!(
        parse("{\"text\": \"a\"}\n{\"text\": \" \"}").unwrap().len(),
        1
    );

    let text = |s: &str| Record::Text { text: s.into() };
    let plain = |text: &str| parse_records(text, Path::new("some.txt")).unwrap();
    assert_eq!(
        plain("One.\nTwo.\n \n\n\nThree."),
        [text("One.\nTwo."), text("Three.")]
    );
    let stories = "One.\n\nStill one.\n<|endoftext|>\nTwo.\n<|endoftext|>\n";
    assert_eq!(plain(stories), [text("One.\n\nStill one."), text("Two.")]);
    let bracket = parse_records("[Chapter]\n\nx", Path::new("a.TXT")).unwrap();
    assert_eq!(bracket, [text("[Chapter]"), text("x")]);
}

#[test]
fn bad_records_are_named() {
    for (text, record, part) in [
        (
            "{\"question\": \"q\", \"answer\": \"a\"}\n{\"question\": \"q\"}",
            2,
            "`answer` is missing",
        ),
        (
            "{\"question\": {}, \"answer\": \"a\"}",
            1,
            "`question` must be a string",
        ),
        ("[{\"text\": \"x\"}, 5]", 2, "found a number"),
        ("[{\"foo\": \"x\"}]", 1, "foo"),
        ("{\"instruction\": \"q\", \"output\": null}", 1, "`output`"),
        (
            "{\"instruction\": \"q\", \"input\": [], \"output\": \"\"}",
            1,
            "`input`",
        ),
        ("{\"text\": \"x\"}\n{\"text\": ", 2, "not JSON"),
    ] {
        match parse(text) {
            Err(Error::InvalidRecord {
                record: r, reason, ..
            }) => {
                assert_eq!(r, record, "{text}");
                assert!(reason.contains(part), "{reason}");
            }
            other => panic!("{text}: {other:?}"),
        }
    }
    for empty in ["", "  \n\n ", "[]", "{\"text\": \"\"}"] {
        assert!(
            matches!(parse(empty), Err(Error::EmptyDataset { .. })),
            "{empty:?}"
        );
    }
    assert!(matches!(parse("[{]"), Err(Error::Json { .. })));
    assert!(parse(&"[".repeat(100_000)).is_err());

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.json");
    assert!(matches!(load_records(&path), Err(Error::Io { .. })));
    std::fs::write(&path, b"\xff\xfe{").unwrap();
    assert!(matches!(
        load_records(&path),
        Err(Error::InvalidFile { .. })
    ));
    std::fs::write(&path, "\u{feff}{\"text\": \"x\"}").unwrap();
    assert_eq!(load_records(&path).unwrap().len(), 1);
}

/// Turns as (speaker, content).
fn turns(record: &Record) -> Vec<(String, String)> {
    let messages = record.to_messages().unwrap();
    let turns = messages.iter().map(|m| (m.role.clone(), m.content.clone()));
    turns.collect()
}

#[test]
fn conversations_are_read_in_all_their_forms() {
    let pair = |question: &str, answer: &str| {
        vec![
            ("user".to_string(), question.to_string()),
            ("assistant".to_string(), answer.to_string()),
        ]
    };
    for text in [
        r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}"#,
        r#"{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "id": "7"}"#,
        r#"{"conversations": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "model", "content": "a"}]}"#,
        r#"{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}"#,
        r#"{"prompt": "q", "completion": [{"role": "assistant", "content": "a"}]}"#,
        r#"{"prompt": "q", "completion": "a"}"#,
        r#"{"instruction": "q", "output": "a"}"#,
    ] {
        let records = parse(text).unwrap();
        assert_eq!(turns(&records[0]), pair("q", "a"), "{text}");
        assert_eq!(
            parse(&json_lines(&records)).unwrap()[0].to_messages(),
            records[0].to_messages()
        );
    }
    let with_system = r#"{"system": "s", "conversations": [{"from": "gpt", "value": "x #### 3"}],
        "tools": "[{\"name\": \"f\"}]"}"#;
    let record = &parse(with_system).unwrap()[0];
    assert_eq!(turns(record)[0], ("system".to_string(), "s".to_string()));
    assert_eq!(record.final_answer().as_deref(), Some("3"));
    assert!(matches!(record, Record::Conversation { tools, .. } if tools.len() == 1));
    // Tools are kept in the record, and not shown to the model.
    let source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ tools }}";
    let template = Template::chat(ChatTemplate::new(source, "t").unwrap());
    let text = template.render(record).unwrap().text;
    assert_eq!(text, "system: s\nassistant: x #### 3\nNone");
    let all = [record.clone(), parse(r#"{"text": "t"}"#).unwrap().remove(0)];
    let said = notices(&all);
    assert!(
        said.len() == 1 && said[0].contains("1 of 2 records declare tools, 1 in all"),
        "{said:?}"
    );
    assert!(notices(&all[1..]).is_empty());
    for (text, part) in [
        (r#"{"messages": []}"#, "no messages"),
        (
            r#"{"messages": [{"role": "user"}]}"#,
            "message 1 of `messages`: `content`",
        ),
        (r#"{"messages": [{"content": "x"}]}"#, "`role` is missing"),
        (r#"{"messages": 3}"#, "list of messages"),
        (
            r#"{"conversations": [{"from": "dog", "value": "x"}]}"#,
            "dog",
        ),
        (
            r#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#,
            "image_url",
        ),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn files_of_other_forms_are_read_or_named() {
    let answers = |text: &str, name: &str| {
        let records = parse_records(text, Path::new(name))?;
        Ok::<_, Error>(
            records
                .iter()
                .map(|r| turns(r)[1].1.clone())
                .collect::<Vec<_>>(),
        )
    };
    let table = "instruction,input,output\r\n\"Add, \"\"now\"\"\",\"1\n2\",3\r\n\r\nhi,,\"ho\"\n";
    assert_eq!(answers(table, "a.CSV").unwrap(), ["3", "ho"]);
    let record = &parse_records(table, Path::new("a.csv")).unwrap()[0];
    assert_eq!(turns(record)[0].1, "Add, \"now\"\n1\n2");
    assert_eq!(
        answers("question\tanswer\nq\t\"a\tb\"", "a.tsv").unwrap(),
        ["a\tb"]
    );
    for (text, name, expected) in [
        (
            r#"{"data": [{"question": "q", "answer": 5}], "version": "1"}"#,
            "a.json",
            "5",
        ),
        (
            r#"{"question": ["q"], "answer": [-2.5], "id": [1]}"#,
            "a.json",
            "-2.5",
        ),
        (r#"{"question": "q", "answer": true}"#, "a.json", "true"),
        // Numbers are the text that stands in the file, whatever a float would make of it.
        (
            r#"{"question": "3, -1e5 \"1e5", "answer": -12345678901234567890123}"#,
            "a",
            "-12345678901234567890123",
        ),
        (r#"{"question": "q", "answer": 0.50}"#, "a", "0.50"),
        (r#"{"question": ["q"], "answer": [1e5]}"#, "a", "1e5"),
        (
            r#"[{"question": 3.10, "answer": 1.23456789012345678}]"#,
            "a",
            "1.23456789012345678",
        ),
        (r#"{"question": 0.0, "answer": 0.0}"#, "a", "0.0"),
        (
            r#"{"rows": [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "z"}]}]}"#,
            "a.json",
            "z",
        ),
        (r#"{"prompt": ["q"], "completion": ["w"]}"#, "a", "w"),
    ] {
        assert_eq!(answers(text, name).unwrap(), [expected], "{text}");
    }
    for (text, name, part) in [
        ("<!DOCTYPE html>\n<html>", "a.json", "HTML"),
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "a.jsonl",
            "Git LFS",
        ),
        ("Once upon a time", "a.json", "plain text"),
        ("a,b\n\"x", "a.csv", "line 2"),
        ("question,answer\nx", "a.csv", "1 fields"),
        (
            r#"{"train": [{"text": "a"}], "test": [{"text": "b"}]}"#,
            "a",
            "several lists",
        ),
        (
            r#"{"question": ["q", "r"], "answer": ["a"]}"#,
            "a",
            "columns of 2 and 1",
        ),
    ] {
        let error = answers(text, name).unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.json");
    std::fs::write(&path, "One.\n\nTwo.").unwrap();
    assert_eq!(load_documents(&path).unwrap().len(), 2);
    std::fs::write(&path, "PAR1....").unwrap();
    assert!(
        load_records(&path)
            .unwrap_err()
            .to_string()
            .contains("Parquet")
    );
}

#[test]
fn only_the_turns_of_the_assistant_are_learned() {
    let t = small_tokenizer();
    let eos = t.id_to_token(2).unwrap();
    let source = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}{% if \
         add_generation_prompt %}assistant:{% endif %}";
    let chat = |source: &str| {
        let template = ChatTemplate::new(source, "t").unwrap();
        Template::chat(template.with_variable("eos_token", eos.as_str()))
    };
    let messages = vec![
        Message::system("Be brief."),
        Message::user("What is 3 + 4?"),
        Message::assistant("It is 7."),
        Message::user("And 1 more?"),
        Message::assistant("8"),
    ];
    let conversation = |messages: &[Message], prompt_messages| Record::Conversation {
        messages: messages.to_vec(),
        tools: vec![],
        prompt_messages,
    };
    let options = TokenizeOptions::new(500);
    let learned = |record: Record, template: &Template, options: &TokenizeOptions| {
        let set = tokenize_records(&[record], template, &t, options).unwrap();
        let sequence = set.sequences[0].clone();
        let targets = sequence.ids.iter().zip(&sequence.loss_mask);
        let ids: Vec<u32> = targets.filter(|(_, m)| **m).map(|(id, _)| *id).collect();
        let ends = ids.iter().filter(|id| **id == 2).count();
        (t.decode(&ids).unwrap(), ends, sequence)
    };
    let (text, ends, sequence) = learned(conversation(&messages, 0), &chat(source), &options);
    assert_eq!((text.as_str(), ends), (" It is 7. 8", 2));
    let whole = chat(source)
        .render(&conversation(&messages, 0))
        .unwrap()
        .text;
    assert_eq!(sequence.ids, t.encode(&whole, false).unwrap());
    let (text, ends, _) = learned(conversation(&messages, 3), &chat(source), &options);
    assert_eq!((text.as_str(), ends), (" 8", 1));
    // A block without the token that ends the turn.
    let marked = "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %} {{ m.content \
         }}{% endgeneration %}{% else %} {{ m.content }}{% endif %}{{ eos_token }}\n{% endfor %}";
    let (text, ends, _) = learned(conversation(&messages, 0), &chat(marked), &options);
    assert_eq!((text.as_str(), ends), (" It is 7. 8", 2));
    // White space behind the token that ends a turn, inside the block: what begins the next turn is
    // not learned.
    let pad = t.id_to_token(0).unwrap();
    let line = "{{ pad_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}\n";
    let blocks = format!(
        "{{% for m in messages %}}{{% if m.role == 'assistant' %}}{{% generation %}}{line}{{% endgeneration %}}{{% else \
         %}}{line}{{% endif %}}{{% endfor %}}"
    );
    let template = ChatTemplate::new(&blocks, "t").unwrap();
    let template = template.with_variable("pad_token", pad.as_str());
    let template = Template::chat(template.with_variable("eos_token", eos.as_str()));
    let (_, ends, sequence) = learned(conversation(&messages, 0), &template, &options);
    let begins = sequence.ids.iter().zip(&sequence.loss_mask);
    let begins = begins.filter(|(id, target)| **id == 0 && **target).count();
    assert_eq!((begins, ends), (2, 2));
    // No token ends the turns: EOS comes after the last one.
    let bare = source.replace("{{ eos_token }}", "");
    let (text, ends, sequence) = learned(conversation(&messages, 0), &chat(&bare), &options);
    assert_eq!((text.as_str(), ends), (" It is 7. 8\n", 1));
    assert_eq!(sequence.ids.last(), Some(&2));
    let all = options.with_mask_prompt(false);
    let (_, _, sequence) = learned(conversation(&messages, 0), &chat(source), &all);
    assert_eq!(sequence.n_targets(), sequence.len() - 1);
    // Other records by the chat template, and conversations without one.
    let question = parse(r#"{"question": "q", "answer": "a"}"#)
        .unwrap()
        .remove(0);
    let (text, ends, _) = learned(question.clone(), &chat(source), &options);
    assert_eq!((text.as_str(), ends), (" a", 1));
    let prompt = chat(source).prompt_ids(&question, &t).unwrap();
    let expected = format!("user: q{eos}\nassistant:");
    assert_eq!(prompt, t.encode(&expected, false).unwrap());
    let none = tokenize_records(
        &[conversation(&messages, 0)],
        PromptTemplate::Auto,
        &t,
        &options,
    );
    assert!(none.unwrap_err().to_string().contains("chat template"));
}

#[test]
fn mutated_files_never_panic() {
    let seed = r#"[{"instruction": "Add é", "input": "1 2", "output": "3"}, {"question": "q", "answer": "\u00e9 #### 7"}]"#;
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    for _ in 0..rounds(2000) {
        let mut bytes = seed.as_bytes().to_vec();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..bytes.len());
            match rng.random_range(0..3) {
                0 => bytes[at] = rng.random(),
                1 => bytes.truncate(at.max(1)),
                _ => bytes.insert(at, b"[]{}\",:"[rng.random_range(0..7)]),
            }
        }
        if let Ok(text) = String::from_utf8(bytes) {
            let _ = parse(&text);
            let _ = parse_records(&text, Path::new("x.txt"));
        }
    }
    let table = "question,answer,\"more, é\"\n\"a \"\"b\"\"\nc\",7,\n,,x\r\nq,a,b\n";
    for _ in 0..rounds(2000) {
        let mut bytes = table.as_bytes().to_vec();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..bytes.len());
            match rng.random_range(0..3) {
                0 => bytes[at] = rng.random(),
                1 => bytes.truncate(at.max(1)),
                _ => bytes.insert(at, b",\t\"\n\r"[rng.random_range(0..5)]),
            }
        }
        if let Ok(text) = String::from_utf8(bytes) {
            let _ = parse_records(&text, Path::new("x.csv"));
            let _ = parse_records(&text, Path::new("x.tsv"));
        }
    }
}

#[test]
fn real_files_are_read() {
    let Some(shared) = shared() else { return };
    let data = shared.join("data");
    let gsm = load_records(data.join("gsm8k/test.jsonl")).unwrap();
    assert_eq!(gsm.len(), 1319);
    assert!(gsm.iter().all(|r| {
        r.final_answer()
            .is_some_and(|a| a.bytes().all(|b| b.is_ascii_digit() || b == b'-'))
    }));
    let math = load_records(data.join("llm-adapters/ft-training_set/math_data.json")).unwrap();
    assert_eq!(
        (math.len(), math[0].final_answer().as_deref()),
        (3260, Some("4"))
    );
    assert!(load_records(data.join("llm-adapters/SVAMP/test.json")).is_ok());
    assert!(
        load_records(data.join("tinystories/sample.txt"))
            .unwrap()
            .len()
            > 10
    );
    assert!(
        load_records(data.join("wikitext-2/wiki.valid.tokens"))
            .unwrap()
            .len()
            > 10
    );
}

// --- templates ---

#[test]
fn templates_word_records() {
    let record = |input: &str| Record::Instruction {
        instruction: "Add.".into(),
        input: input.into(),
        output: "3".into(),
        answer: None,
    };
    let with = PromptTemplate::Auto.render(&record("1 2"));
    assert!(with.prompt.starts_with(
        "Below is an instruction that describes a task, paired with an input that provides"
    ));
    assert!(with.prompt.ends_with(
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    ));
    let without = PromptTemplate::Auto.render(&record(""));
    assert!(without.prompt.ends_with(
        "task. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
    ));
    assert_eq!(without.completion, "3");
    let question = Record::Question {
        question: "q?".into(),
        answer: "a".into(),
    };
    let example = |prompt: &str, completion: &str| Example {
        prompt: prompt.into(),
        completion: completion.into(),
    };
    assert_eq!(
        PromptTemplate::Auto.render(&question),
        example("Question: q?\nAnswer:", " a")
    );
    assert_eq!(
        PromptTemplate::Raw.render(&record("1 2")),
        example("Add.\n1 2\n", "3")
    );
    assert!(
        PromptTemplate::Alpaca
            .render(&question)
            .prompt
            .contains("### Instruction:\nq?\n")
    );
    let text = Record::Text { text: "t".into() };
    for name in ["auto", "alpaca", "question_answer", "raw"] {
        let template: PromptTemplate = name.parse().unwrap();
        assert_eq!(template.to_string(), name);
        assert_eq!(template.render(&text), example("", "t"));
    }
    assert!("vicuna".parse::<PromptTemplate>().is_err());
}

// --- arithmetic ---

/// Computes the steps independently of the generator.
fn check(problem: &Problem) {
    let mut lines: Vec<&str> = problem.answer.lines().collect();
    let last: i64 = lines
        .pop()
        .unwrap()
        .strip_prefix("#### ")
        .unwrap()
        .parse()
        .unwrap();
    assert!(
        (1..=99).contains(&last) || problem.kind == Kind::Times,
        "{problem:?}"
    );
    let mut value = 0;
    for line in lines {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |s: &str| s.parse::<i64>().unwrap();
        let (a, b) = (number(words[0]), number(words[2]));
        value = match words[1] {
            "+" => a + b,
            "-" => a - b,
            "*" => a * b,
            "/" => {
                assert_eq!(a % b, 0);
                a / b
            }
            other => panic!("{other}"),
        };
        assert_eq!((words[3], number(words[4])), ("=", value), "{problem:?}");
    }
    assert_eq!(value, last);
    assert!(!problem.question.contains(['{', '}']), "{problem:?}");
    assert!(extract_answer(&problem.answer).is_some());
}

#[test]
fn problems_are_right_distinct_and_split() {
    for kind in Kind::ALL {
        assert!(
            available(kind, Split::Train) >= 20_000,
            "{kind}: {}",
            available(kind, Split::Train)
        );
        let [train, valid, test] = [
            (Split::Train, 20_000),
            (Split::Valid, 2000),
            (Split::Test, 2000),
        ]
        .map(|(s, n)| {
            assert!(
                available(kind, s) >= 2000,
                "{kind} {s:?}: {}",
                available(kind, s)
            );
            let all = problems(kind, s, n, 7).unwrap();
            all.iter().for_each(check);
            let questions: HashSet<String> = all.into_iter().map(|p| p.question).collect();
            assert_eq!(questions.len(), n, "{kind}: the same question twice");
            questions
        });
        assert!(
            train.is_disjoint(&valid) && train.is_disjoint(&test) && valid.is_disjoint(&test),
            "{kind}"
        );
    }
    let all = available(Kind::Product, Split::Test);
    assert_eq!(
        problems(Kind::Product, Split::Test, all, 1).unwrap().len(),
        all
    );
    assert!(matches!(
        problems(Kind::Product, Split::Test, all + 1, 1),
        Err(Error::InvalidArgument { .. })
    ));
}

#[test]
fn cells_do_not_cross_splits_under_other_names() {
    // Returns the wording and the numbers of a question, without its names and things.
    let cell = |p: &Problem| {
        let words = p
            .question
            .split(' ')
            .filter(|w| w.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()));
        format!(
            "{:?} {} {}",
            p.kind,
            words.collect::<Vec<_>>().join(" "),
            p.answer
        )
    };
    let things = [
        "apples", "pens", "books", "coins", "cards", "shells", "stamps", "eggs",
    ];
    let bare = |p: &Problem| things.iter().fold(cell(p), |s, t| s.replace(t, "o"));
    let of = |split| {
        let all = mixture(&Kind::ALL.map(|k| (k, 1.0)), split, 9000, 3).unwrap();
        all.iter()
            .filter(|p| things.iter().any(|t| p.question.contains(t)))
            .map(bare)
            .collect::<HashSet<_>>()
    };
    assert!(of(Split::Train).is_disjoint(&of(Split::Test)));
}

#[test]
fn mixtures_follow_weights_and_seed() {
    let kinds = [(Kind::Sum, 3.0), (Kind::Share, 1.0), (Kind::MulAdd, 0.0)];
    let a = mixture(&kinds, Split::Valid, 1001, 4).unwrap();
    let count = |k| a.iter().filter(|p| p.kind == k).count();
    assert_eq!((a.len(), count(Kind::MulAdd)), (1001, 0));
    assert!((count(Kind::Sum) as f64 - 750.75).abs() < 1.0);
    assert_eq!(a, mixture(&kinds, Split::Valid, 1001, 4).unwrap());
    assert_ne!(a, mixture(&kinds, Split::Valid, 1001, 5).unwrap());
    assert!(a.windows(2).any(|w| w[0].kind != w[1].kind));
    for bad in [
        vec![],
        vec![(Kind::Sum, -1.0)],
        vec![(Kind::Sum, f64::NAN)],
        vec![(Kind::Sum, 0.0)],
    ] {
        assert!(mixture(&bad, Split::Train, 5, 1).is_err());
    }
    assert!(mixture(&[(Kind::Sum, 1.0), (Kind::Sum, 1.0)], Split::Train, 5, 1).is_err());
    assert!(mixture(&[(Kind::Sum, 1.0)], Split::Train, usize::MAX, 1).is_err());
    // Fixed here, so that the data of the bundled model cannot change unnoticed.
    let first = problems(Kind::AddSub, Split::Test, 1, 0).unwrap().remove(0);
    assert_eq!(
        first.question,
        "Rob has 41 pens and Ben has 28. They lose 19. How many pens are left?"
    );
    assert_eq!(first.answer, "41 + 28 = 69\n69 - 19 = 50\n#### 50");
    assert_eq!("mul_sub".parse::<Kind>().unwrap(), Kind::MulSub);
    assert!("root".parse::<Kind>().is_err());
}

fn json_lines(records: &[Record]) -> String {
    let line = |record| serde_json::to_string(record).unwrap() + "\n";
    records.iter().map(line).collect()
}

#[test]
fn the_shipped_problems_are_the_generators() {
    let kinds = [
        Kind::MulAdd,
        Kind::MulSub,
        Kind::Times,
        Kind::ShareAdd,
        Kind::SubShare,
        Kind::AddMul,
    ];
    let draw = |split, n| mixture(&kinds.map(|kind| (kind, 1.0)), split, n, 0).unwrap();
    let all = draw(Split::Train, 900)
        .into_iter()
        .chain(draw(Split::Valid, 100));
    let records: Vec<Record> = all.map(Problem::into_record).collect();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/arithmetic-problems.jsonl");
    let shipped = std::fs::read_to_string(path).unwrap();
    assert!(shipped == json_lines(&records));
}

// --- tokenizing ---

#[test]
fn trained_tokenizer_is_deterministic_and_lossless() {
    let texts = corpus(800);
    let json = train_bpe(&texts, 480).unwrap();
    assert_eq!(json, train_bpe(&texts, 480).unwrap());
    let t = TextTokenizer::from_json(&json, "tokenizer.json").unwrap();
    assert_eq!(t.vocab_size(), 480);
    assert_eq!(
        (
            t.bos_id(),
            t.eos_id(),
            t.token_to_id(BPE_EOS),
            t.token_to_id(BPE_PAD)
        ),
        (Some(1), None, Some(2), Some(0))
    );
    assert_eq!(t.prefix(), [1]);
    assert_eq!(t.encode("a", true).unwrap(), t.encode_prompt("a").unwrap());
    assert_eq!(t.id_to_token(1).as_deref(), Some(BPE_BOS));
    let mut longest = Vec::new();
    for text in texts
        .iter()
        .map(String::as_str)
        .chain(["", " ", "\n\n x", "é 🦙 12345", "a  b\t"])
    {
        let ids = t.encode(text, true).unwrap();
        assert_eq!(ids[0], 1);
        assert_eq!(t.decode(&ids).unwrap(), text);
        longest.push(ids.len());
    }
    assert_eq!(t.encode("407", false).unwrap().len(), 3);
    for id in 0..480 {
        let token = t.id_to_token(id).unwrap();
        assert!(
            token.len() == 1 || !token.bytes().any(|b| b.is_ascii_digit()),
            "{token}"
        );
    }
    longest.sort_unstable();
    let [median, most] = [longest[longest.len() / 2], longest[longest.len() * 9 / 10]];
    eprintln!(
        "tokens per problem: median {median}, nine in ten {most}, longest {:?}",
        longest.last()
    );
    assert!(most <= 64, "{most}");
    // An id of no token has no text.
    assert_eq!(t.decode(&[480]).unwrap(), "");
    // With few words, the texts run out of pairs before the vocabulary is full.
    let full = TextTokenizer::from_json(&train_bpe(&texts, 1000).unwrap(), "x").unwrap();
    assert!(
        (480..600).contains(&full.vocab_size()),
        "{}",
        full.vocab_size()
    );
    assert!(train_bpe(&texts, 258).is_err());
    assert_eq!(
        TextTokenizer::from_json(&train_bpe::<&str>(&[], 300).unwrap(), "x")
            .unwrap()
            .vocab_size(),
        259
    );
}

#[test]
fn tokenizer_files_beside_each_other() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        TextTokenizer::from_dir(dir.path()),
        Err(Error::Io { .. })
    ));
    let file = dir.path().join("tokenizer.json");
    let json = train_bpe(&corpus(50), 300).unwrap();
    let half: String = json.chars().take(json.chars().count() / 2).collect();
    for bad in ["", "{}", "[1]", &half] {
        std::fs::write(&file, bad).unwrap();
        assert!(
            matches!(
                TextTokenizer::from_file(&file),
                Err(Error::Tokenizer { .. })
            ),
            "{bad:.20}"
        );
    }
    std::fs::write(&file, &json).unwrap();
    assert_eq!(TextTokenizer::from_dir(dir.path()).unwrap().eos_id(), None);
    std::fs::write(
        dir.path().join("tokenizer_config.json"),
        bpe_tokenizer_config(128),
    )
    .unwrap();
    assert_eq!(
        TextTokenizer::from_dir(dir.path()).unwrap().eos_id(),
        Some(2)
    );
    std::fs::write(
        dir.path().join("tokenizer_config.json"),
        "{\"eos_token\": {\"content\": \"<pad>\"}}",
    )
    .unwrap();
    assert_eq!(
        TextTokenizer::from_dir(dir.path()).unwrap().eos_id(),
        Some(0)
    );
    std::fs::write(dir.path().join("tokenizer_config.json"), "{").unwrap();
    assert!(matches!(
        TextTokenizer::from_dir(dir.path()),
        Err(Error::Json { .. })
    ));
}

#[test]
fn mutated_tokenizers_never_panic() {
    let json = train_bpe(&corpus(30), 280).unwrap();
    // The vocabulary is the largest part of the file and the least interesting one.
    let (vocab, merges) = (
        json.find("\"vocab\"").unwrap(),
        json.find("\"merges\"").unwrap(),
    );
    let mut rng = ChaCha8Rng::seed_from_u64(19);
    let mut loaded = 0;
    for _ in 0..rounds(2000) {
        let mut bytes = json.clone().into_bytes();
        let at = if rng.random() {
            rng.random_range(0..vocab)
        } else {
            rng.random_range(merges..json.len())
        };
        match rng.random_range(0..3) {
            0 => bytes[at] = b"0123456789\"{}[]abcdefg<>/$ "[rng.random_range(0..27)],
            1 => drop(bytes.drain(at..(at + rng.random_range(1..40)).min(json.len()))),
            _ => bytes.insert(at, b"0123456789\"{},"[rng.random_range(0..14)]),
        }
        let Ok(text) = String::from_utf8(bytes) else {
            continue;
        };
        if let Ok(t) = TextTokenizer::from_json(&text, "mutated") {
            loaded += 1;
            if let Ok(ids) = t.encode("Tom has 12 apples.", true) {
                let _ = t.decode(&ids);
            }
        }
    }
    assert!(loaded > 0);
}

#[test]
fn gpt2_ids_equal_llama_cpps_list() {
    let Some(shared) = shared() else { return };
    let dir = shared.join("models/tokenizers");
    let t = TextTokenizer::from_file(dir.join("gpt2/tokenizer.json")).unwrap();
    assert!(t.prefix().is_empty());
    let inputs = load_text(dir.join("ggml-vocab-gpt-2.gguf.inp")).unwrap();
    let outputs = load_text(dir.join("ggml-vocab-gpt-2.gguf.out")).unwrap();
    let inputs: Vec<&str> = inputs.split("\n__ggml_vocab_test__\n").collect();
    let outputs: Vec<&str> = outputs.lines().collect();
    assert!(inputs.len() > 40);
    for (text, expected) in inputs.iter().zip(&outputs) {
        let expected: Vec<u32> = expected
            .split_whitespace()
            .map(|id| id.parse().unwrap())
            .collect();
        assert_eq!(t.encode(text, true).unwrap(), expected, "{text:?}");
        assert_eq!(t.decode(&expected).unwrap(), *text);
    }
    let story = TextTokenizer::from_dir(shared.join("models/story-llama-0.6M")).unwrap();
    assert_eq!(story.prefix(), [1]);
    assert_eq!((story.bos_id(), story.eos_id()), (Some(1), Some(2)));
}

#[test]
fn prompts_are_prefixes_and_masked() {
    let t = small_tokenizer();
    let problem = problems(Kind::MulAdd, Split::Valid, 1, 2)
        .unwrap()
        .remove(0);
    let example = PromptTemplate::Auto.render(&problem.into_record());
    let prompt = t.encode_prompt(&example.prompt).unwrap();
    let options = TokenizeOptions::new(200);
    let s = tokenize(&example, &t, &options, "it").unwrap();
    assert!(s.ids.starts_with(&prompt));
    assert_eq!(*s.ids.last().unwrap(), 2);
    assert_eq!(
        t.decode(&s.ids).unwrap(),
        format!("{}{}", example.prompt, example.completion)
    );
    assert!(
        s.loss_mask
            .iter()
            .enumerate()
            .all(|(i, m)| *m == (i >= prompt.len()))
    );
    let open = tokenize(
        &example,
        &t,
        &options.with_mask_prompt(false).with_add_eos(false),
        "it",
    )
    .unwrap();
    assert_eq!(open.ids, s.ids[..s.len() - 1]);
    assert_eq!(open.n_targets(), open.len() - 1);

    // A token would span the boundary; the prompt's own tokens must stay unchanged.
    let torn = Example {
        prompt: "How many app".into(),
        completion: "les".into(),
    };
    assert!(
        !t.encode_prompt("How many apples")
            .unwrap()
            .starts_with(&t.encode_prompt("How many app").unwrap())
    );
    let s = tokenize(&torn, &t, &options, "it").unwrap();
    assert!(s.ids.starts_with(&t.encode_prompt("How many app").unwrap()));
    assert_eq!(t.decode(&s.ids).unwrap(), "How many apples");

    let error = tokenize(&example, &t, &TokenizeOptions::new(10), "record 3")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("record 3") && error.contains("10"),
        "{error}"
    );
    let cut = tokenize(
        &example,
        &t,
        &TokenizeOptions::new(10).with_truncate(true),
        "it",
    )
    .unwrap();
    assert_eq!((cut.len(), cut.n_targets()), (10, 0));
}

#[test]
fn sets_name_the_record_and_count() {
    let t = small_tokenizer();
    let records: Vec<Record> = [
        "a b c",
        "d",
        "a much longer text than all the others, which has to be cut or refused",
    ]
    .map(|s| Record::Text { text: s.into() })
    .into();
    let options = TokenizeOptions::new(12);
    match tokenize_records(&records, PromptTemplate::Auto, &t, &options) {
        Err(Error::SequenceTooLong { what, .. }) => assert_eq!(what, "record 3"),
        other => panic!("{other:?}"),
    }
    let set = tokenize_records(
        &records,
        PromptTemplate::Auto,
        &t,
        &options.with_truncate(true),
    )
    .unwrap();
    let said = |misfits: &[Misfit]| misfits.iter().map(Misfit::to_string).collect::<Vec<_>>();
    assert_eq!((set.sequences.len(), set.left_out.len()), (3, 0));
    let found = tokenize(
        &PromptTemplate::Auto.render(&records[2]),
        &t,
        &TokenizeOptions::new(500),
        "it",
    );
    let found = found.unwrap().len();
    let reason = format!("record 3: {found} tokens, and at most 12 fit");
    assert_eq!(said(&set.truncated), [reason.as_str()]);
    assert_eq!(
        set.n_tokens(),
        set.sequences[0].len() + set.sequences[1].len() + 12
    );
    let question = Record::Question {
        question: "a long question that fills it all".into(),
        answer: "x".into(),
    };
    let mixed = [question.clone(), records[1].clone()];
    let set = tokenize_records(
        &mixed,
        PromptTemplate::Auto,
        &t,
        &options.with_truncate(true),
    )
    .unwrap();
    assert_eq!((set.sequences.len(), set.truncated.len()), (1, 0));
    assert!(
        set.left_out[0].reason.contains("end before its answer"),
        "{set:?}"
    );
    let all = tokenize_records(
        &[question],
        PromptTemplate::Auto,
        &t,
        &options.with_truncate(true),
    );
    let error = all.unwrap_err().to_string();
    assert!(
        error.contains("1 of them") && error.contains("record 1: "),
        "{error}"
    );
    assert!(tokenize_records(&[], PromptTemplate::Auto, &t, &options).is_err());

    // Left out, where the caller wants that, instead of cut or refused.
    let left_out = options.with_leave_out(true);
    let set = tokenize_records(&records, PromptTemplate::Auto, &t, &left_out).unwrap();
    assert_eq!((set.sequences.len(), set.truncated.len()), (2, 0));
    assert_eq!(said(&set.left_out), [reason.as_str()]);
}

#[test]
fn records_that_do_not_fit_are_named_and_the_rest_goes_on() {
    let t = small_tokenizer();
    let records = parse(
        r#"[{"question": "2 + 2?", "answer": "4"}, {"question": "2 + 3?", "answer": " \n"},
            {"question": "", "answer": "5"}, {"instruction": "", "input": "3 + 3?", "output": "6"},
            {"instruction": "Add.", "input": "1 + 1", "output": ""}, {"prompt": "", "completion": "free"},
            {"prompt": "a", "completion": ""}, {"messages": [{"role": "user", "content": "hi"}]},
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]},
            {"messages": [{"role": "assistant", "content": "no"}, {"role": "assistant", "content": "no"}]},
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x", "weight": 0}]},
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}]"#,
    )
    .unwrap();
    let source = "{% for m in messages %}{% if m.role == 'assistant' and loop.first %}{{ \
         raise_exception('users speak first') }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if \
         add_generation_prompt %}assistant:{% endif %}";
    let chat = ChatTemplate::new(source, "chat.jinja").unwrap();
    let template = Template::auto(Some(chat));
    let options = TokenizeOptions::new(300).with_add_eos(false);
    // A refusal by the template is an error, unless the caller wants to go on.
    let error = tokenize_records(&records, &template, &t, &options).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("record 10") && error.contains("users speak first"),
        "{error}"
    );
    let options = options.with_leave_out(true);
    let set = tokenize_records(&records, &template, &t, &options).unwrap();
    assert_eq!((set.sequences.len(), set.truncated.len()), (4, 0));
    let reasons = [
        (2, "no answer"),
        (3, "no question"),
        (5, "no answer"),
        (7, "no answer"),
        (8, "no answer"),
        (9, "no answer"),
        (10, "users speak first"),
        (11, "no part of it is learned"),
    ];
    assert_eq!(set.left_out.len(), reasons.len(), "{:?}", set.left_out);
    for (misfit, (record, reason)) in set.left_out.iter().zip(reasons) {
        assert_eq!(misfit.record, record);
        assert!(misfit.reason.contains(reason), "{misfit}");
    }
    let none = tokenize_records(&records[6..10], &template, &t, &options).unwrap_err();
    let none = none.to_string();
    assert!(
        none.contains("4 of them") && none.contains("record 1: it has no answer"),
        "{none}"
    );
}

// --- batches and windows ---

fn random_sequences(n: usize, seed: u64) -> Vec<Sequence> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n)
        .map(|_| {
            let len = rng.random_range(2..60);
            Sequence::unmasked((0..len).map(|_| rng.random_range(3..500)).collect())
        })
        .collect()
}

#[test]
fn collating_pads_at_the_right() {
    let sequences = random_sequences(5, 1);
    let batch = collate(&sequences.iter().collect::<Vec<_>>(), 0);
    assert_eq!(
        (batch.rows, batch.len),
        (5, sequences.iter().map(Sequence::len).max().unwrap())
    );
    assert_eq!(
        (batch.ids.len(), batch.loss_mask.len()),
        (5 * batch.len, 5 * batch.len)
    );
    for (r, s) in sequences.iter().enumerate() {
        let row = r * batch.len..(r + 1) * batch.len;
        let (ids, mask) = (&batch.ids[row.clone()], &batch.loss_mask[row]);
        assert_eq!(
            (&ids[..s.len()], &mask[..s.len()]),
            (&s.ids[..], &s.loss_mask[..])
        );
        assert!(
            ids[s.len()..].iter().all(|i| *i == 0)
                && mask[s.len()..].iter().all(|m| !m)
                && !mask[0]
        );
        assert_eq!(batch.lengths[r], s.len());
    }
    assert_eq!(batch.n_targets(), batch.n_tokens() - 5);
    assert_eq!(collate(&[], 0).ids.len(), 0);
}

#[test]
fn packed_rows_hold_every_sequence_once() {
    let mut sequences = random_sequences(203, 4);
    // What a file marks as a target at the start of an example has nothing before it.
    sequences[5] = Sequence {
        ids: vec![9, 8],
        loss_mask: vec![true, true],
    };
    let lengths: Vec<usize> = sequences.iter().map(Sequence::len).collect();
    let mut data = Batcher::packed(sequences.clone(), 64, 4, 0, 7).unwrap();
    let groups = data.groups().unwrap().to_vec();
    let mut all = groups.concat();
    all.sort_unstable();
    assert!(all.into_iter().eq(0..203));
    let filled: Vec<usize> = groups
        .iter()
        .map(|group| group.iter().map(|i| lengths[*i]).sum())
        .collect();
    assert!(filled.iter().all(|n| *n <= 64));
    let tokens: usize = lengths.iter().sum();
    assert!(
        groups.len() <= tokens.div_ceil(64) + 2,
        "{} rows",
        groups.len()
    );
    let per_epoch = data.plan().batches_per_epoch();
    assert_eq!(per_epoch, groups.len().div_ceil(4));
    let (mut seen, mut targets) = (Vec::new(), 0);
    for _ in 0..per_epoch {
        let batch = data.next_batch();
        let rows = match &batch.segments {
            Some(segments) => {
                assert_eq!(segments.dims(), [batch.rows, batch.len]);
                segments.lengths().to_vec()
            }
            None => batch.lengths.iter().map(|len| vec![*len]).collect(),
        };
        assert!(batch.len <= 64);
        targets += batch.n_targets();
        for (row, lengths) in rows.iter().enumerate() {
            assert_eq!(batch.lengths[row], lengths.iter().sum::<usize>());
            let mut at = row * batch.len;
            for len in lengths {
                assert!(!batch.loss_mask[at]);
                seen.push(batch.ids[at..at + len].to_vec());
                at += len;
            }
            assert!(batch.ids[at..(row + 1) * batch.len].iter().all(|i| *i == 0));
        }
    }
    assert_eq!(targets, tokens - 203);
    let mut ids: Vec<Vec<u32>> = sequences.iter().map(|s| s.ids.clone()).collect();
    ids.sort();
    seen.sort();
    assert_eq!(seen, ids);
    // The next epoch has the same rows in another order, and a resumed batcher goes on.
    let position = data.position();
    let next = data.next_batch();
    let mut resumed = Batcher::packed(sequences.clone(), 64, 4, 0, 7).unwrap();
    resumed.seek(position).unwrap();
    assert_eq!(resumed.next_batch(), next);
    let error = Batcher::packed(sequences, 50, 4, 0, 7).unwrap_err();
    assert!(
        matches!(error, Error::SequenceTooLong { max: 50, .. }),
        "{error}"
    );
    assert!(Batcher::packed(vec![], 50, 4, 0, 7).is_err());
    // A batch whose rows are single sequences is not a packed one.
    let single = Batcher::packed(random_sequences(3, 1), 60, 1, 0, 7);
    assert!(single.unwrap().next_batch().lengths.len() == 1);
}

#[test]
fn epochs_hold_everything_once_with_little_padding() {
    let sequences = random_sequences(1003, 2);
    let plan = BatchPlan::new(sequences.iter().map(Sequence::len).collect(), 8, 5).unwrap();
    assert_eq!(plan.batches_per_epoch(), 126);
    for epoch in [0, 1, 77, u64::MAX] {
        let batches = plan.epoch(epoch);
        assert_eq!(batches.len(), 126);
        let mut all: Vec<usize> = batches.concat();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..1003));
        let padded: usize = batches
            .iter()
            .map(|batch| batch.len() * batch.iter().map(|i| sequences[*i].len()).max().unwrap())
            .sum();
        let tokens: usize = sequences.iter().map(Sequence::len).sum();
        let share = (padded - tokens) as f64 / padded as f64;
        assert!(share > 0.0 && share < 0.06, "{share}");
    }
    assert_ne!(plan.epoch(0), plan.epoch(1));
    assert_ne!(
        plan.epoch(0),
        BatchPlan::new(plan_lengths(&sequences), 8, 6)
            .unwrap()
            .epoch(0)
    );
    assert!(BatchPlan::new(vec![], 8, 5).is_err() && BatchPlan::new(vec![1], 0, 5).is_err());
    let fixed = fixed_batches(&sequences, 10, 0).unwrap();
    assert_eq!(fixed.iter().map(|b| b.rows).sum::<usize>(), 1003);
    assert!(fixed.windows(2).all(|b| b[0].len <= b[1].len));
    assert!(fixed_batches(&sequences, 0, 0).is_err());
}

fn plan_lengths(sequences: &[Sequence]) -> Vec<usize> {
    sequences.iter().map(Sequence::len).collect()
}

#[test]
fn a_resumed_batcher_goes_on_where_it_was() {
    let sequences = random_sequences(37, 3);
    let mut straight = Batcher::new(sequences.clone(), 4, 0, 11).unwrap();
    let mut batches = Vec::new();
    let mut positions = Vec::new();
    for _ in 0..35 {
        positions.push(straight.position());
        batches.push(straight.next_batch());
    }
    assert_eq!(straight.position(), Position { epoch: 3, index: 5 });
    for at in [0, 1, 9, 10, 11, 29, 34] {
        let json = serde_json::to_string(&positions[at]).unwrap();
        let mut resumed = Batcher::new(sequences.clone(), 4, 0, 11).unwrap();
        resumed.seek(serde_json::from_str(&json).unwrap()).unwrap();
        for expected in &batches[at..] {
            assert_eq!(&resumed.next_batch(), expected);
        }
    }
    let before = straight.position();
    assert!(
        straight
            .seek(Position {
                epoch: 0,
                index: 10
            })
            .is_err()
    );
    assert_eq!(straight.position(), before);
    assert_eq!(
        (
            straight.plan().batches_per_epoch(),
            straight.sequences().len()
        ),
        (10, 37)
    );
}

#[test]
fn windows_and_calibration() {
    let t = small_tokenizer();
    let documents = corpus(40);
    let ids = join_documents(&documents, &t, true).unwrap();
    assert_eq!(ids.iter().filter(|i| **i == 1).count(), 40);
    assert_eq!(ids.iter().filter(|i| **i == 2).count(), 40);
    let cut: Vec<&[u32]> = windows(&ids, 50).unwrap().collect();
    assert_eq!(cut.concat(), ids);
    assert!(cut[..cut.len() - 1].iter().all(|w| w.len() == 50));
    let packed = pack(&ids, 50).unwrap();
    assert!(packed.iter().all(|s| s.n_targets() == s.len() - 1));
    assert_eq!(pack(&ids[..51], 50).unwrap().len(), 1);
    assert!(windows(&ids, 0).is_err() && pack(&ids, 1).is_err() && pack(&ids[..1], 50).is_err());

    let draw = |n, len, seed| calibration_samples(&documents, &t, n, len, seed);
    let samples = draw(16, 64, 3).unwrap();
    assert!(samples.len() == 16 && samples.iter().all(|s| s.len() == 64));
    let stream = join_documents(&documents, &t, false).unwrap();
    assert!(samples.iter().all(|s| stream.windows(64).any(|w| w == s)));
    assert_eq!(samples, draw(16, 64, 3).unwrap());
    assert_ne!(samples, draw(16, 64, 4).unwrap());
    assert_eq!(draw(2, stream.len(), 1).unwrap()[1], stream);
    assert!(draw(2, stream.len() + 1, 1).is_err() && draw(2, 0, 1).is_err());
}

// --- memory ---

/// Reads the file that `ELASTIC_LORA_READS` names and prints the peak of the memory. It runs in a
/// process of its own; see the next test.
#[cfg(target_os = "linux")]
#[test]
#[ignore = "run by `memory_is_in_proportion_to_the_files`"]
fn reads_a_file() {
    use elastic_lora::io::{Checkpoint, HfConfig};
    use elastic_lora::{SearchSpace, SubnetConfig};
    let Ok(path) = std::env::var("ELASTIC_LORA_READS") else {
        return;
    };
    let path = Path::new(&path);
    let name = path.file_name().unwrap().to_str().unwrap();
    let outcome = match name {
        "model.safetensors" => {
            Checkpoint::open(path).map(|file| format!("{} tensors", file.names().len()))
        }
        "model.safetensors.index.json" => {
            Checkpoint::open(path.parent().unwrap()).map(|_| "an index".into())
        }
        "config.json" => HfConfig::open(path.parent().unwrap()).map(|_| "a config".into()),
        "space.json" => SearchSpace::from_file(path, &[]).map(|_| "a space".into()),
        "subnet.json" => {
            let text = load_text(path).unwrap();
            SubnetConfig::from_json(&text).map(|_| "a subnet".into())
        }
        "tokenizer.json" => {
            TextTokenizer::from_file(path).map(|t| format!("{} tokens", t.vocab_size()))
        }
        "long.txt" => {
            let tokenizer = TextTokenizer::from_file(path.with_file_name("small.json")).unwrap();
            load_text(path)
                .and_then(|text| Ok(format!("{} ids", tokenizer.encode(&text, true)?.len())))
        }
        _ => load_records(path).map(|records| format!("{} records", records.len())),
    };
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").trim().parse().unwrap();
    let outcome = outcome.unwrap_or_else(|error| format!("refused: {error}"));
    let outcome: String = outcome.chars().take(150).collect();
    println!("peak {} {outcome}", peak * 1024);
}

#[cfg(target_os = "linux")]
#[test]
fn memory_is_in_proportion_to_the_files() {
    let root = tempfile::tempdir().unwrap();
    let ones = |n: usize| "1,".repeat(n) + "1";
    let with_header = |header: &str| {
        let length = (header.len() as u64).to_le_bytes();
        [&length[..], header.as_bytes(), b"x"].concat()
    };
    let n = 5_000_000;
    let header =
        |sizes: &str| format!(r#"{{"a":{{"dtype":"U8","shape":[{sizes}],"data_offsets":[0,1]}}}}"#);
    let small = train_bpe(&corpus(300), 400).unwrap();
    std::fs::write(root.path().join("small.json"), &small).unwrap();
    let tokenizer = |json: serde_json::Value, key: &str| {
        let mut whole: serde_json::Value = serde_json::from_str(&small).unwrap();
        whole[key] = json;
        whole.to_string()
    };
    let list = serde_json::Value::from(vec![1; n]);
    let tensors: String = (0..100_000)
        .map(|i| {
            format!(
                r#""t{i}":{{"dtype":"U8","shape":[],"data_offsets":[{i},{}]}},"#,
                i + 1
            )
        })
        .collect();
    let words: String = corpus(400).join("\n");
    let text = words.repeat(12_000_000 / words.len());
    // Each is a name, the content, a part of the outcome, and how many times its size may be taken.
    let files: [(&str, Vec<u8>, &str, u64); 12] = [
        (
            "model.safetensors",
            with_header(&header(&ones(n))),
            "refused",
            8,
        ),
        (
            "model.safetensors",
            with_header(&header(&ones(n / 2))),
            "refused",
            8,
        ),
        (
            "model.safetensors",
            with_header(&format!(r#"{{"x":{{"a":[{}]}}}}"#, ones(n / 2))),
            "refused",
            8,
        ),
        (
            "model.safetensors",
            [
                with_header(&format!("{{{}}}", tensors.trim_end_matches(','))),
                vec![0; 99_999],
            ]
            .concat(),
            "100000 tensors",
            8,
        ),
        (
            "config.json",
            format!(r#"{{"x":[{}]}}"#, ones(n)).into(),
            "refused",
            8,
        ),
        (
            "model.safetensors.index.json",
            format!(r#"{{"weight_map":[{}]}}"#, ones(n)).into(),
            "refused",
            8,
        ),
        (
            "space.json",
            format!(r#"{{"x":[{}]}}"#, ones(n)).into(),
            "refused",
            8,
        ),
        (
            "tokenizer.json",
            tokenizer(list.clone(), "decoder").into(),
            "refused",
            8,
        ),
        (
            "tokenizer.json",
            tokenizer(list, "model").into(),
            "refused",
            64,
        ),
        (
            "a.json",
            format!(r#"[{{"text":"a","x":[{}]}}]"#, ones(n)).into(),
            "refused",
            8,
        ),
        (
            "a.jsonl",
            "{\"text\":\"a\",\"x\":[1,1,1,1,1,1,1,1,1,1]}\n"
                .repeat(200_000)
                .into(),
            "200000 records",
            8,
        ),
        ("long.txt", text.into(), "ids", 8),
    ];
    for (name, bytes, part, factor) in files {
        let path = root.path().join(name);
        let size = bytes.len() as u64;
        std::fs::write(&path, bytes).unwrap();
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "reads_a_file", "--ignored", "--nocapture"])
            .env("ELASTIC_LORA_READS", &path)
            .output()
            .unwrap();
        std::fs::remove_file(&path).unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text
            .lines()
            .find_map(|line| line.split_once("peak "))
            .map(|(_, rest)| rest);
        let (peak, outcome) = line
            .and_then(|line| line.split_once(' '))
            .unwrap_or_else(|| panic!("{name}: {text}{}", String::from_utf8_lossy(&output.stderr)));
        eprintln!("{name} of {size} bytes: peak {peak}: {outcome}");
        assert!(outcome.contains(part), "{name}: {outcome}");
        assert!(
            peak.parse::<u64>().unwrap() < (64 << 20) + factor * size,
            "{name}: {peak} for {size}"
        );
    }
}

#[cfg(unix)]
#[test]
fn pipes_devices_and_folders_are_refused_by_kind() {
    use elastic_lora::SearchSpace;
    use elastic_lora::io::HfConfig;
    let root = tempfile::tempdir().unwrap();
    let pipe = root.path().join("config.json");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    if !made.is_ok_and(|status| status.success()) {
        eprintln!("skipped: no mkfifo");
        return;
    }
    let device = Path::new("/dev/zero");
    for (path, kind) in [
        (pipe.as_path(), "a pipe"),
        (device, "a device"),
        (root.path(), "a folder"),
    ] {
        for error in [
            load_text(path).map(drop).unwrap_err(),
            load_records(path).map(drop).unwrap_err(),
            TextTokenizer::from_file(path).map(drop).unwrap_err(),
            SearchSpace::from_file(path, &[]).map(drop).unwrap_err(),
            ChatTemplate::from_file(path, root.path())
                .map(drop)
                .unwrap_err(),
        ] {
            let text = error.to_string();
            assert!(
                text.contains(kind) && text.contains(path.to_str().unwrap()),
                "{text}"
            );
        }
    }
    let error = HfConfig::open(root.path()).unwrap_err().to_string();
    assert!(error.contains("a pipe"), "{error}");
}

#[test]
fn calibration_has_the_size_that_model_and_text_allow() {
    let size = |samples, seq_len| CalibrationSize { samples, seq_len };
    let of = CalibrationSize::for_model;
    assert_eq!(of(600_000, 128), size(128, 128));
    assert_eq!(of(30_000_000, 4096), CalibrationSize::PAPERS);
    assert_eq!(of(0, 0), size(128, 1));
    // Larger models get shorter samples first.
    let half_a_billion = of(358_000_000, 32_768);
    assert_eq!(half_a_billion.seq_len, 256);
    assert!((64..128).contains(&half_a_billion.samples));
    assert_eq!(of(70_000_000_000, 8192), size(32, 256));
    let mut last = usize::MAX;
    for n in [
        1_000_000,
        50_000_000,
        100_000_000,
        1_000_000_000,
        usize::MAX,
    ] {
        let found = of(n, 4096);
        assert!(found.n_tokens() <= last && found.n_tokens() >= 32 * 256);
        last = found.n_tokens();
    }
    // A small text gives fewer samples, and one shorter than a sample gives one.
    assert_eq!(size(128, 64).within(1_000_000), size(128, 64));
    assert_eq!(size(128, 64).within(640), size(10, 64));
    assert_eq!(size(128, 64).within(641), size(11, 64));
    assert_eq!(size(128, 64).within(50), size(1, 50));
    assert_eq!(size(128, 64).within(0), size(0, 1));
    assert!(calibration_windows(&[1, 2, 3], 2, 4, 0).is_err());
    assert_eq!(
        calibration_windows(&[1, 2, 3], 1, 3, 0).unwrap(),
        [[1, 2, 3]]
    );
}
