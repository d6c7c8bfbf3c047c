//! Tasks on the shipped model, and on a model that answers what a test wants.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::encode::{Encoder, Scored};
use super::prompt::{PromptOptions, Prompter, Question};
use super::*;
use crate::error::{Error, Result};
use crate::progress::{Progress, Silent};
use crate::runtime::{GenerateConfig, Model, ModelOptions, Session, SessionConfig};

fn shipped() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/arithmetic-llama")
}

fn model() -> Model {
    Model::open(shipped(), &ModelOptions::default().with_n_threads(2)).unwrap()
}

fn session(model: &Model) -> Session {
    Session::new(model, &SessionConfig::default()).unwrap()
}

/// Returns the log-likelihood of each scored token by a session of its own.
fn alone(session: &mut Session, sequence: &Scored) -> f64 {
    session.reset();
    let all = session.log_likelihoods(&sequence.tokens).unwrap();
    let scored = &all[all.len() - sequence.n_scored..];
    scored.iter().map(|value| f64::from(*value)).sum()
}

/// Sequences that are parts of each other, equal, and different from some point on.
#[test]
fn shared_beginnings_change_no_score() {
    let model = model();
    let mut session = session(&model);
    let vocab = model.config().vocab_size() as u32;
    let token = |seed: u32, i: u32| (seed * 7919 + i * 104_729 + i * i * 31) % vocab;
    let common: Vec<u32> = (0..40).map(|i| token(1, i)).collect();
    let mut sequences = Vec::new();
    for (kept, seed, own, n_scored) in [
        (40, 2, 5, 5),
        (40, 2, 5, 9),
        (40, 3, 1, 1),
        (40, 4, 1, 1),
        (40, 2, 30, 12),
        (20, 5, 3, 22),
        (2, 6, 9, 4),
        (0, 7, 2, 1),
        (40, 2, 5, 5),
        (30, 8, 0, 29),
    ] {
        let mut tokens = common[..kept].to_vec();
        tokens.extend((0..own).map(|i| token(seed, i)));
        sequences.push(Scored { tokens, n_scored });
    }
    let scores = prefix::score(&session.copy(), &sequences, &Silent).unwrap();
    for (sequence, score) in sequences.iter().zip(&scores) {
        let expected = alone(&mut session, sequence);
        let off = (score.sum - expected).abs();
        assert!(off < 1e-4 * expected.abs().max(1.0), "{score:?} {expected}");
        assert_eq!(score.n_tokens, sequence.n_scored);
    }
    assert!(prefix::score(&session, &[], &Silent).unwrap().is_empty());
}

/// The most likely continuation is greedy, and another is not.
#[test]
fn greedy_continuations_are_known() {
    let model = model();
    let mut session = session(&model);
    let tokenizer = model.tokenizer().unwrap();
    let prompt = tokenizer
        .encode_prompt("Question: Mia has 23 shells")
        .unwrap();
    let config = GenerateConfig::new(6, vec![]);
    let next = session.generate(&prompt, &config, |_| true).unwrap();
    let whole = Scored {
        tokens: [prompt.as_slice(), &next].concat(),
        n_scored: next.len(),
    };
    let mut other = whole.clone();
    *other.tokens.last_mut().unwrap() = if next[5] == 3 { 4 } else { 3 };
    session.reset();
    let scores = prefix::score(&session, &[whole, other], &Silent).unwrap();
    assert_eq!([scores[0].is_greedy, scores[1].is_greedy], [true, false]);
}

#[test]
fn prompts_are_continued_like_one_by_one() {
    let model = model();
    let tokenizer = model.tokenizer().unwrap();
    let texts: Vec<String> = (0..7)
        .map(|i| {
            let shells = 10 + 3 * i;
            format!("Question: Mia has {shells} shells and finds {i} more. How many?\nAnswer:")
        })
        .collect();
    let stops: Vec<String> = vec!["\n\n".into(), "####".into()];
    let n_new = 40;
    let prompts: Vec<Prompt> = texts
        .iter()
        .map(|text| Prompt {
            text: text.clone(),
            stops: stops.clone(),
            max_new_tokens: n_new,
        })
        .collect();
    let mut alone = session(&model);
    let expected: Vec<String> = texts
        .iter()
        .map(|text| {
            alone.reset();
            let ids = tokenizer.encode_prompt(text).unwrap();
            let config = GenerateConfig::new(n_new, model.stop_ids().to_vec());
            let out = alone.generate(&ids, &config, |_| true).unwrap();
            let text = tokenizer.decode(&out).unwrap();
            let cut = stops.iter().filter_map(|stop| text.find(stop)).min();
            text[..cut.unwrap_or(text.len())].to_string()
        })
        .collect();
    assert!(expected.iter().any(|text| !text.is_empty()));
    for sessions in [1, 3, 16] {
        let mut model = RuntimeModel::new(session(&model))
            .unwrap()
            .with_sessions(sessions);
        assert_eq!(
            model.generate(&prompts, &Silent).unwrap(),
            expected,
            "{sessions}"
        );
    }
}

/// Answers that a test gives.
struct Scripted {
    sums: Vec<f64>,
    texts: Vec<String>,
    asked: Vec<String>,
}

impl LanguageModel for Scripted {
    fn log_likelihoods(
        &mut self,
        requests: &[Continuation],
        _: &dyn Progress,
    ) -> Result<Vec<LogLikelihood>> {
        let asked = requests
            .iter()
            .map(|r| format!("{}[[{}]]", r.context, r.text));
        self.asked.extend(asked);
        let of = |sum: &f64| LogLikelihood {
            sum: *sum,
            is_greedy: false,
            n_tokens: 1,
        };
        Ok(self.sums.iter().map(of).collect())
    }

    fn generate(&mut self, requests: &[Prompt], _: &dyn Progress) -> Result<Vec<String>> {
        self.asked.extend(requests.iter().map(|r| r.text.clone()));
        Ok(self.texts.clone())
    }

    fn rolling_log_likelihoods(
        &mut self,
        texts: &[String],
        progress: &dyn Progress,
    ) -> Result<Vec<LogLikelihood>> {
        self.asked.extend(texts.iter().cloned());
        self.log_likelihoods(&[], progress)
    }
}

fn rows(values: Value) -> Vec<Row> {
    let Value::Array(values) = values else {
        panic!("no list");
    };
    let row = |value| match value {
        Value::Object(row) => row,
        other => panic!("{other}"),
    };
    values.into_iter().map(row).collect()
}

fn data(documents: Value) -> TaskData {
    TaskData {
        documents: rows(documents),
        ..Default::default()
    }
}

fn run(task: &str, documents: Value, sums: &[f64], texts: &[&str]) -> (Vec<String>, TaskReport) {
    let mut model = Scripted {
        sums: sums.to_vec(),
        texts: texts.iter().map(|text| (*text).to_string()).collect(),
        asked: Vec::new(),
    };
    let spec = TaskSpec::builtin(task).unwrap();
    let options = EvaluateOptions::default().with_num_fewshot(Some(0));
    let report = evaluate(&mut model, &spec, &data(documents), &options, &Silent).unwrap();
    (model.asked, report)
}

#[test]
fn choices_are_asked_and_scored_as_in_the_harness() {
    let (asked, report) = run(
        "arc_easy",
        json!([
            {"question": "Why?", "choices": {"text": ["no", "maybe so"], "label": ["A", "B"]},
             "answerKey": "B"},
            {"question": "When?", "choices": {"text": ["é", "now", "x"], "label": ["1", "2", "3"]},
             "answerKey": "2"},
        ]),
        &[-2.0, -3.0, -1.5, -1.5, -9.0],
        &[],
    );
    assert_eq!(asked[0], "Question: Why?\nAnswer:[[ no]]");
    assert_eq!(asked[4], "Question: When?\nAnswer:[[ x]]");
    // Of equal sums the first wins. -3 / 8 characters is more than -2 / 2, and -1.5 / 3 than
    // -1.5 / 1, where bytes would be 2.
    let values: Vec<f64> = report.scores.iter().map(|score| score.value).collect();
    assert_eq!(values, [0.0, 1.0]);
    assert_eq!(report.scores[1].stderr, Some(0.0));
    assert_eq!(report.main_score().unwrap().metric, "acc_norm");
    let mut log = Vec::new();
    report.write_samples(&mut log).unwrap();
    let lines: Vec<Value> = String::from_utf8(log)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[1]["prompts"], json!(["Question: When?\nAnswer:"]));
    assert_eq!(
        (&lines[1]["gold"], &lines[1]["acc"]),
        (&json!(1), &json!(0))
    );
    assert_eq!(lines[0]["log_likelihoods"], json!([-2.0, -3.0]));
}

#[test]
fn questions_of_the_other_tasks_have_their_form() {
    let boolq = json!([{"passage": "P", "question": "is it", "label": 1}]);
    assert_eq!(
        run("boolq", boolq, &[-1.0, -2.0], &[]).0,
        [
            "P\nQuestion: is it?\nAnswer:[[ no]]",
            "P\nQuestion: is it?\nAnswer:[[ yes]]"
        ]
    );
    let piqa = json!([{"goal": "Go", "sol1": "a", "sol2": "b", "label": 0}]);
    let (asked, report) = run("piqa", piqa, &[-1.0, -2.0], &[]);
    assert_eq!(asked[1], "Question: Go\nAnswer:[[ b]]");
    assert_eq!(report.scores[0].value, 1.0);
    assert_eq!(report.scores[0].stderr, None);
    let siqa = json!([{"context": "C.", "question": "Q?", "answerA": "a", "answerB": "b",
        "answerC": "c", "label": "3"}]);
    let (asked, report) = run("siqa", siqa, &[-3.0, -2.0, -1.0], &[]);
    assert_eq!(asked[2], "Q: C. Q?\nA:[[ c]]");
    assert_eq!(report.scores[0].value, 1.0);
    let hellaswag = json!([{"activity_label": "Cut", "ctx_a": "[header] How to [title] cut",
        "ctx_b": "THE man", "endings": [" a  b", "c [x]", "d", "e"], "label": "1"}]);
    let (asked, report) = run("hellaswag", hellaswag, &[-3.0, -1.0, -2.0, -4.0], &[]);
    // The brackets leave their spaces, of which one pass makes one of two.
    assert_eq!(asked[0], "Cut: How to. cut The man[[ a b]]");
    assert_eq!(asked[1], "Cut: How to. cut The man[[ c ]]");
    assert_eq!(report.scores[0].value, 1.0);
    let winogrande = json!([{"sentence": "Ann met Bo as _ was_ late. ", "option1": "Ann",
        "option2": "Bo", "answer": "2"}]);
    let (asked, report) = run("winogrande", winogrande, &[-1.0, -0.5], &[]);
    assert_eq!(asked[1], "Ann met Bo as Bo[[ was_ late.]]");
    assert_eq!(report.scores[0].value, 1.0);
    let obqa = json!([{"question_stem": "The sun", "answerKey": "D", "choices":
        {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]}}]);
    let (asked, _) = run("obqa", obqa, &[0.0, 0.0, 0.0, 0.0], &[]);
    assert_eq!(asked[3], "The sun[[ d]]");
}

#[test]
fn answers_of_gsm8k_are_extracted_as_in_the_harness() {
    let row = json!({"question": "How many?", "answer": "It is <<1+1=2>>.\n#### 1,200"});
    let outputs = [
        "so\n#### 1200.",
        "that makes $1,200.00",
        "#### 1,200 and then 7",
        "none",
        "-5 or 1200",
    ];
    let documents = Value::Array(vec![row; outputs.len()]);
    let (asked, report) = run("gsm8k", documents, &[], &outputs);
    assert_eq!(asked[0], "Question: How many?\nAnswer:");
    let verdicts = |filter: usize| -> Vec<Value> {
        let samples = report.samples.iter();
        samples
            .map(|s| s["filtered"][filter]["exact_match"].clone())
            .collect()
    };
    assert_eq!(verdicts(0), [1, 0, 1, 0, 0]);
    assert_eq!(verdicts(1), [1, 0, 0, 0, 1]);
    assert_eq!(report.samples[3]["filtered"][0]["answer"], "[invalid]");
    assert_eq!(report.samples[1]["filtered"][1]["answer"], "$1,200.00");
    let strict = &report.scores[0];
    assert_eq!(
        (strict.filter.as_str(), strict.value),
        ("strict-match", 0.4)
    );
    let stderr = (0.24_f64 * 5.0 / 4.0 / 5.0).sqrt();
    assert!((strict.stderr.unwrap() - stderr).abs() < 1e-12);
    assert_eq!(report.main_score().unwrap().filter, "flexible-extract");
}

#[test]
fn answers_in_the_form_of_llm_adapters_are_numbers_and_words() {
    let row = |answer: &str| json!({"instruction": "Add", "output": "", "answer": answer});
    let (asked, report) = run(
        "adapters_svamp",
        json!([row("8.0"), row("2.5"), row("3"), row("1200")]),
        &[],
        &["7 and 8", "2.5004", "none", "is 1,200."],
    );
    let indent = " ".repeat(16);
    assert_eq!(
        asked[0],
        format!(
            "Below is an instruction that describes a task. Write a response that appropriately \
             completes the request. \n\n{indent}### Instruction:\n{indent}Add\n\n{indent}### \
             Response:\n{indent}"
        )
    );
    assert_eq!(report.scores[0].value, 0.75);
    let (asked, report) = run(
        "alpaca_boolq",
        json!([row("true"), row("false")]),
        &[],
        &["the correct answer is true", "truely false"],
    );
    assert!(asked[0].ends_with("request.\n\n### Instruction:\nAdd\n\n### Response:\n"));
    assert_eq!(report.scores[0].value, 0.5);
    let (_, report) = run("adapters_aqua", json!([row("C")]), &[], &["so (C), not B"]);
    assert_eq!(report.scores[0].value, 1.0);
}

#[test]
fn texts_are_detokenized_and_counted_as_they_were() {
    let page = " = A = \n It 's 3 @.@ 5 ( a ) , \" b \" \n";
    let (asked, report) = run("wikitext", json!([{"page": page}]), &[-20.0], &[]);
    assert_eq!(asked, [" = A =\nIt's 3.5 (a), \"b\"\n"]);
    let words = 17.0; // the empty ones at both ends count
    let value = |index: usize| report.scores[index].value;
    assert!(
        (value(0) - (20.0_f64 / words).exp()).abs() < 1e-9,
        "{}",
        value(0)
    );
    assert!((value(1) - (20.0 / page.len() as f64).exp()).abs() < 1e-9);
    assert!((value(2) - value(1).log2()).abs() < 1e-9);
}

/// The prompts that lm-evaluation-harness 0.4.13 writes.
#[test]
fn examples_are_those_of_the_harness() {
    let spec = TaskSpec::builtin("gsm8k").unwrap();
    let row = |i: usize| json!({"question": format!("q{i}"), "answer": format!("a{i}")});
    let many = TaskData {
        documents: rows(json!([row(0), row(1)])),
        examples: rows(Value::Array((0..7473).map(row).collect())),
        same: false,
    };
    let options = |n| PromptOptions {
        n_examples: n,
        seed: 1234,
        ..Default::default()
    };
    let prompt = |question| match question {
        Question::Generate { prompt, .. } => prompt,
        other => panic!("{other:?}"),
    };
    let mut prompter = Prompter::new(&spec, &many, options(5)).unwrap();
    let of = |shown: [usize; 5], i: usize| {
        let examples = shown.map(|k| format!("Question: q{k}\nAnswer: a{k}\n\n"));
        format!("{}Question: q{i}\nAnswer:", examples.concat())
    };
    let first = prompt(prompter.question(0, &many.documents[0]).unwrap());
    assert_eq!(first, of([6374, 3610, 957, 61, 742], 0));
    let second = prompt(prompter.question(1, &many.documents[1]).unwrap());
    assert_eq!(second, of([7462, 6610, 4769, 286, 5501], 1));

    let spec = TaskSpec::builtin("gsm8k_cot").unwrap();
    let mut prompter = Prompter::new(&spec, &many, options(8)).unwrap();
    let text = prompt(prompter.question(0, &many.documents[0]).unwrap());
    assert!(
        text.starts_with("Q: There are 15 trees in the grove."),
        "{text}"
    );
    assert!(
        text.ends_with("23 - 15 is 8. The answer is 8.\n\nQ: q0\nA:"),
        "{text}"
    );

    // Where neither a test split nor one of examples is named, the harness draws one more.
    let spec = TaskSpec::builtin("piqa").unwrap();
    let row = |i: usize| json!({"goal": format!("g{i}"), "sol1": "a", "sol2": "b", "label": 0});
    let piqa = TaskData {
        documents: rows(json!([row(0), row(1)])),
        examples: rows(Value::Array((10..7483).map(row).collect())),
        same: false,
    };
    let mut prompter = Prompter::new(&spec, &piqa, options(3)).unwrap();
    for (index, shown) in [[6374, 3610, 957], [742, 7462, 6610]]
        .into_iter()
        .enumerate()
    {
        let Question::Choices { contexts, .. } =
            prompter.question(index, &piqa.documents[index]).unwrap()
        else {
            panic!("no choices");
        };
        let examples = shown.map(|k| format!("Question: g{}\nAnswer: a\n\n", k + 10));
        let expected = format!("{}Question: g{index}\nAnswer:", examples.concat());
        assert_eq!(contexts[0], expected);
    }

    let row = |i: usize| json!({"question": format!("q{i}"), "answer": format!("a{i}")});
    // Of its own split, a document is no example of itself.
    let few = TaskData {
        documents: rows(json!([row(0), row(1), row(2)])),
        examples: rows(json!([row(0), row(1), row(2)])),
        same: true,
    };
    let spec = TaskSpec::builtin("gsm8k").unwrap();
    let mut prompter = Prompter::new(&spec, &few, options(2)).unwrap();
    for (index, document) in few.documents.iter().enumerate() {
        let text = prompt(prompter.question(index, document).unwrap());
        assert_eq!(text.matches(&format!("q{index}\n")).count(), 1, "{text}");
        assert_eq!(text.matches("Question:").count(), 3);
    }
    let error = Prompter::new(&spec, &few, options(3)).err().unwrap();
    assert!(error.to_string().contains("3 of 3 rows"), "{error}");
}

#[test]
fn descriptions_of_ones_own_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("own.json");
    let read = |value: Value| {
        std::fs::write(&path, value.to_string()).unwrap();
        TaskSpec::from_file(&path)
    };
    let own = json!([
        {"include": "arc_easy", "task": "own", "folders": ["mine"], "num_fewshot": null},
        {"include": "own", "task": "shorter", "doc_to_text": "{{question}}", "tag": ["x"]},
    ]);
    let specs = read(own).unwrap();
    assert_eq!(specs[1].doc_to_text, json!("{{question}}"));
    assert_eq!(specs[1].folders, ["mine"]);
    assert!(specs[1].aliases.is_empty());
    for (value, reason) in [
        (
            json!({"include": "nothing", "task": "a"}),
            "`include` \"nothing\"",
        ),
        (json!({"output_type": "multiple_choice"}), "has no `task`"),
        (
            json!({"include": "piqa", "task": "a", "metrics": []}),
            "no field `metrics`",
        ),
        (
            json!({"include": "piqa", "task": "a", "metric_list": []}),
            "`metric_list` is empty",
        ),
        (
            json!({"include": "piqa", "task": "a", "metric_list": [{"metric": "f1"}]}),
            "`f1`",
        ),
        (
            json!({"include": "piqa", "task": "a", "doc_to_choice": null}),
            "`doc_to_choice`",
        ),
        (
            json!({"include": "gsm8k", "task": "a", "repeats": 3}),
            "`repeats` is 3",
        ),
        (
            json!({"include": "gsm8k", "task": "a", "generation_kwargs": {"do_sample": true}}),
            "greedy",
        ),
        (
            json!({"include": "gsm8k", "task": "a", "filter_list":
                [{"name": "x", "filter": [{"function": "vote"}]}]}),
            "vote",
        ),
        (json!([1]), "no object"),
    ] {
        let error = read(value).unwrap_err().to_string();
        assert!(error.contains(reason), "{reason}: {error}");
    }
    let error = TaskSpec::builtin("arc").unwrap_err().to_string();
    assert!(error.contains("arc_easy, arc_challenge"), "{error}");
    // Every task of the crate is valid, and has a name of its own.
    let names = TaskSpec::builtin_names().unwrap();
    let mut unique = names.clone();
    unique.sort();
    unique.dedup();
    assert_eq!((names.len(), unique.len()), (42, 42));
}

#[test]
fn rows_that_are_not_there_or_of_another_form_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let spec = TaskSpec::builtin("arc_easy").unwrap();
    let error = spec.load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("ARC-Easy/test.jsonl"), "{error}");
    let folder = dir.path().join("ARC-Easy");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("test-00000-of-00001.parquet"), "PAR1").unwrap();
    let error = spec.load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("read_parquet"), "{error}");
    std::fs::write(folder.join("test.jsonl"), "{\"instruction\": \"x\"}").unwrap();
    let data = spec.load(dir.path()).unwrap();
    let mut model = RuntimeModel::new(session(&model())).unwrap();
    let options = EvaluateOptions::default();
    let error = evaluate(&mut model, &spec, &data, &options, &Silent).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("task arc_easy: record 1") && error.contains("undefined"),
        "{error}"
    );
    let asked = evaluate(&mut model, &spec, &TaskData::default(), &options, &Silent);
    assert!(matches!(asked, Err(Error::InvalidArgument { .. })));
}

#[test]
fn tokens_of_pairs_and_windows_are_those_of_the_harness() {
    let model = model();
    let tokenizer = model.tokenizer().unwrap();
    let encoder = Encoder::new(tokenizer, 16);
    let context = "Question: Mia has 23 shells.\nAnswer:";
    let pair = encoder.pair(context, " 41 shells").unwrap();
    let whole = tokenizer
        .encode_prompt(&format!("{context} 41 shells"))
        .unwrap();
    let before = tokenizer.encode_prompt(context).unwrap().len();
    assert_eq!(pair.n_scored, whole.len() - before);
    assert_eq!(pair.tokens, whole[whole.len().saturating_sub(17)..]);
    // White space at the end of the context belongs to the continuation.
    let moved = encoder.pair(&format!("{context} "), "41 shells").unwrap();
    assert_eq!(moved, pair);
    let start = tokenizer.bos_id().or(tokenizer.eos_id()).unwrap();
    let empty = encoder.pair("", "41").unwrap();
    assert_eq!(empty.tokens[0], start);
    assert!(encoder.pair("a", "").is_err());
    assert!(encoder.pair("a", &"shells ".repeat(20)).is_err());

    let text = "Mia has 23 shells and finds 18 more. How many shells does Mia have now? She has";
    let ids = tokenizer.encode_prompt(text).unwrap();
    let windows = encoder.rolling(text).unwrap();
    assert!(windows.len() > 1);
    let scored: Vec<u32> = windows
        .iter()
        .flat_map(|w| w.tokens[w.tokens.len() - w.n_scored..].to_vec())
        .collect();
    assert_eq!(scored, ids);
    assert_eq!(windows[0].tokens[0], start);
    assert!(windows.iter().all(|w| w.tokens.len() <= 17));
    assert!(encoder.rolling("").unwrap().is_empty() || !tokenizer.prefix().is_empty());

    let ids = tokenizer.encode_prompt(context).unwrap();
    assert_eq!(encoder.prompt(context, 12).unwrap(), ids[ids.len() - 4..]);
    let error = encoder.prompt(context, 16).unwrap_err().to_string();
    assert!(error.contains("max_gen_toks = 16"), "{error}");
}

#[test]
fn perplexities_have_the_rules_of_their_names() {
    let model = model();
    let text = "Tom has 5 pens and buys 7 more. How many pens does Tom have? ".repeat(9);
    let ids = model.tokenizer().unwrap().encode_prompt(&text).unwrap();
    let mut alone = session(&model);
    let scored = RuntimeModel::new(session(&model)).unwrap();
    let context = 24;
    let mut expected = [(0.0, 0); 2];
    for window in ids.chunks_exact(context) {
        for (skipped, (sum, n)) in [0, context / 2].into_iter().zip(&mut expected) {
            let mut window = window.to_vec();
            if skipped > 0 {
                window[0] = model.tokenizer().unwrap().prefix()[0];
            }
            alone.reset();
            let all = alone.log_likelihoods(&window).unwrap();
            *sum -= all[skipped..]
                .iter()
                .map(|value| f64::from(*value))
                .sum::<f64>();
            *n += all.len() - skipped;
        }
    }
    for (rule, (sum, n)) in [WindowRule::Papers, WindowRule::LlamaCpp]
        .into_iter()
        .zip(expected)
    {
        let found = windowed_perplexity(&scored, &text, context, rule, &Silent).unwrap();
        assert_eq!(found.predicted_tokens, n);
        assert!((found.nll - sum / n as f64).abs() < 1e-5, "{found:?}");
        assert_eq!(found.n_windows, ids.len() / context);
    }
    for (context, text) in [(1, "a b"), (100_000, "a b"), (24, "a b")] {
        assert!(
            windowed_perplexity(&scored, text, context, WindowRule::Papers, &Silent).is_err(),
            "{context}"
        );
    }
}

/// A subnet, and weights in another format, are scored as they compute.
#[test]
fn subnets_and_formats_have_scores_of_their_own() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/arithmetic-supernet.elora");
    let model = Model::open(path, &ModelOptions::default().with_n_threads(1)).unwrap();
    let requests = [Continuation {
        context: "Question: 12 + 7?\nAnswer:".into(),
        text: " 19".into(),
    }];
    let mut sums = Vec::new();
    for subnet in model.subnets() {
        let mut session = session(&model);
        session.set_subnet_named(&subnet.name).unwrap();
        let mut scored = RuntimeModel::new(session).unwrap();
        let sum = scored.log_likelihoods(&requests, &Silent).unwrap()[0].sum;
        assert!(sum.is_finite() && sum < 0.0);
        sums.push(sum);
    }
    sums.sort_by(f64::total_cmp);
    sums.dedup();
    assert!(sums.len() > 1);
    let mut used = session(&model);
    used.decode(&[1], None).unwrap();
    assert!(RuntimeModel::new(used).is_err());
}
