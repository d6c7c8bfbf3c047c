//! The examples as users see them: what they refuse, with which message, and which files they
//! leave. `cargo test` builds the examples. If they do not exist because this test was built alone,
//! nothing is checked.
#![cfg(feature = "flex")]

#[allow(dead_code)]
#[path = "../examples/compress/report.rs"]
mod report;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn shipped_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/arithmetic-llama")
}

/// Returns a command for the example next to this test's own binary, to be run in `folder`.
fn example(name: &str, folder: &Path) -> Option<Command> {
    let test = std::env::current_exe().ok()?;
    let path = test
        .parent()?
        .parent()?
        .join("examples")
        .join(name)
        .with_extension(std::env::consts::EXE_EXTENSION);
    if !path.is_file() || !shipped_model().join("model.safetensors").is_file() {
        eprintln!("skipped: no example {name}, or no shipped model");
        return None;
    }
    let mut command = Command::new(path);
    command.current_dir(folder);
    Some(command)
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Writes `n` problems in GSM8K's form.
fn problems(path: &Path, n: usize) {
    let line = |i: usize| {
        let (a, b) = (11 + i, 3 + 2 * i);
        format!(
            "{{\"question\": \"Tom has {a} pens and finds {b} more. How many pens does Tom have now?\", \
             \"answer\": \"{a} + {b} = {0}\\n#### {0}\"}}\n",
            a + b
        )
    };
    std::fs::write(path, (0..n).map(line).collect::<String>()).unwrap();
}

fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn bad_arguments_are_named_at_once_and_leave_nothing() {
    let root = tempfile::tempdir().unwrap();
    std::fs::write(root.path().join("empty.txt"), "").unwrap();
    problems(&root.path().join("p.jsonl"), 4);
    let before = entries(root.path());
    let cases: [(&str, &[&str], &str); 57] = [
        (
            "stream",
            &["--model", "nowhere", "--out", "o", "--method", "wanda"],
            "nowhere",
        ),
        (
            "stream",
            &[
                "--model",
                "m",
                "--out",
                "o",
                "--method",
                "ria",
                "--pattern",
                "4:2",
            ],
            "4:2",
        ),
        (
            "stream",
            &["--model", "m", "--out", "o", "--method", "gptq", "--owl"],
            "owl",
        ),
        (
            "stream",
            &[
                "--model", "m", "--out", "o", "--method", "gptq", "--device", "foo",
            ],
            "device",
        ),
        ("compress", &["--sparsity", "1.5"], "sparsity"),
        ("compress", &["--sparsity", "NaN"], "sparsity"),
        ("compress", &["--pattern", "4:2"], "4:2"),
        ("compress", &["--ranks", "0"], "ranks"),
        ("compress", &["--ranks", "65,8"], "k_proj"),
        ("compress", &["--ranks", "99999999999"], "99999999999"),
        ("compress", &["--groups", "q_proj,foo"], "`foo`"),
        ("compress", &["--search", "foo"], "--search"),
        ("compress", &["--cost", "foo"], "--cost"),
        ("compress", &["--target", "12"], "--target"),
        ("compress", &["--target", "12ms"], "target"),
        ("compress", &["--scoring-share", "0.5"], "scoring-share"),
        ("compress", &["--steps", "0"], "steps"),
        ("compress", &["--batch", "0"], "batch"),
        ("compress", &["--evals", "0"], "evals"),
        ("compress", &["--device", "foo"], "device"),
        ("compress", &["--max-len", "129"], "max-len"),
        (
            "compress",
            &["--calibration-samples", "0"],
            "calibration-samples",
        ),
        (
            "compress",
            &["--calibration-length", "129"],
            "calibration-length",
        ),
        ("compress", &["--calibration", "nowhere"], "nowhere"),
        (
            "compress",
            &["--train", "empty.txt", "--valid", "p.jsonl"],
            "empty.txt",
        ),
        (
            "compress",
            &[
                "--model", "nowhere", "--train", "p.jsonl", "--valid", "p.jsonl",
            ],
            "nowhere",
        ),
        ("compress", &["--bits", "5"], "bits"),
        ("compress", &["--group-size", "0"], "group-size"),
        (
            "compress",
            &["--method", "sqft", "--group-size", "256"],
            "group-size",
        ),
        (
            "compress",
            &[
                "--method",
                "sqft",
                "--bits",
                "3",
                "--file-format",
                "compressed-tensors",
            ],
            "3",
        ),
        (
            "compress",
            &[
                "--method",
                "table2",
                "--quantize",
                "joint",
                "--qa-start",
                "sparse",
            ],
            "qa-start",
        ),
        ("compress", &["--quantize", "foo"], "--quantize"),
        // What the run would not use.
        ("compress", &["--depth", "1"], "depth"),
        (
            "compress",
            &["--method", "lonas", "--prune", "ria"],
            "prune",
        ),
        (
            "compress",
            &["--method", "sqft-sparse-peft", "--bits", "8"],
            "bits = 8: this run does not use it",
        ),
        (
            "compress",
            &["--method", "sqft", "--train-scales"],
            "train-scales",
        ),
        ("compress", &["--method", "lora", "--evals", "9"], "evals"),
        (
            "compress",
            &["--pattern", "2:4", "--sparsity", "0.4"],
            "sparsity",
        ),
        ("compress", &["--plain-text"], "plain-text"),
        (
            "evaluate",
            &["--text", "empty.txt", "--limit", "3"],
            "--limit",
        ),
        ("evaluate", &["--plain-text"], "--text"),
        ("evaluate", &["--limit", "0"], "limit"),
        ("evaluate", &["--log", "x"], "--tasks"),
        ("evaluate", &["--tasks", "foo"], "task = foo"),
        ("evaluate", &["--tasks", "piqa", "--data", "."], "piqa"),
        ("evaluate", &["--text", "p.jsonl"], "--plain-text"),
        ("evaluate", &["--subnet", "small"], "small"),
        ("evaluate", &["--text", "empty.txt"], "empty.txt"),
        (
            "evaluate",
            &["--text", "p.jsonl", "--plain-text", "--context", "129"],
            "129",
        ),
        ("evaluate", &["--adapter", "nowhere"], "nowhere"),
        ("generate", &["--temperature", "-1"], "temperature"),
        ("generate", &["--min-p", "1"], "min_p"),
        ("generate", &["--format", "int5"], "int5"),
        ("generate", &["--subnet", "small"], "small"),
        ("generate", &["--threads", "4097"], "n_threads"),
        ("generate", &["--model", "empty.txt"], "empty.txt"),
        ("pretrain", &["--out", "."], "not empty"),
    ];
    for (name, arguments, named) in cases {
        let Some(mut command) = example(name, root.path()) else {
            return;
        };
        if name == "compress" {
            command.args(["--out", "out"]);
        }
        // A negative number would be parsed as an option.
        let arguments: Vec<String> = match arguments {
            [option, value] => vec![format!("{option}={value}")],
            more => more.iter().map(ToString::to_string).collect(),
        };
        let output = command.args(&arguments).output().unwrap();
        let text = stderr(&output);
        assert_eq!(
            output.status.code(),
            Some(1),
            "{name} {arguments:?}: {text}"
        );
        assert!(
            text.starts_with("error: ") && text.contains(named),
            "{name} {arguments:?}: {text}"
        );
        assert!(!text.contains("panicked"), "{name} {arguments:?}: {text}");
        assert_eq!(entries(root.path()), before, "{name} {arguments:?}");
    }
}

#[test]
fn a_run_goes_on_only_as_it_began_and_removes_only_its_own() {
    let root = tempfile::tempdir().unwrap();
    problems(&root.path().join("train.jsonl"), 24);
    problems(&root.path().join("valid.jsonl"), 6);
    let out = root.path().join("out");
    let run = |more: &[&str]| -> Option<Output> {
        Some(training(root.path(), "3")?.args(more).output().unwrap())
    };
    let rows = || {
        let text = std::fs::read(out.join("report.json")).unwrap();
        serde_json::from_slice::<serde_json::Value>(&text).unwrap()["rows"].clone()
    };
    let Some(first) = run(&[]) else { return };
    assert!(first.status.success(), "{}", stderr(&first));
    let expected = rows();
    std::fs::remove_file(out.join("report.json")).unwrap();
    assert!(run(&["--resume"]).unwrap().status.success());
    assert_eq!(rows(), expected);
    for (argument, named) in [
        ("--sparsity=0.6", "--sparsity"),
        ("--seed=1", "--seed"),
        ("--ranks=8", "--ranks"),
    ] {
        let refused = run(&["--resume", argument]).unwrap();
        let text = stderr(&refused);
        assert!(
            refused.status.code() == Some(1) && text.contains(named),
            "{text}"
        );
    }
    problems(&root.path().join("train.jsonl"), 23);
    let text = stderr(&run(&["--resume"]).unwrap());
    assert!(text.contains("training data"), "{text}");

    assert!(stderr(&run(&[]).unwrap()).contains("--overwrite"));
    std::fs::write(out.join("notes.txt"), "mine").unwrap();
    assert!(run(&["--overwrite"]).unwrap().status.success());
    assert_eq!(
        entries(&out),
        [
            "lora",
            "lora-adapter",
            "notes.txt",
            "pruned",
            "report.json",
            "run.json"
        ]
    );
    // A folder that no run made is not changed at all.
    std::fs::remove_file(out.join("run.json")).unwrap();
    let before = entries(&out);
    assert!(stderr(&run(&["--overwrite"]).unwrap()).contains("run.json"));
    assert_eq!(entries(&out), before);
}

#[test]
fn a_module_and_a_searcher_of_ones_own_work() {
    let root = tempfile::tempdir().unwrap();
    let Some(mut command) = example("own_module", root.path()) else {
        return;
    };
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let losses: Vec<f64> = text
        .lines()
        .filter_map(|line| line.split_once("rank 8: loss ")?.1.parse().ok())
        .collect();
    assert!(losses.len() == 4 && 2.0 * losses[3] < losses[0], "{text}");
    assert!(text.contains("front: ranks ["), "{text}");
}

#[test]
fn the_subnets_of_the_shipped_bundle_answer() {
    let root = tempfile::tempdir().unwrap();
    let bundle = shipped_model().with_file_name("arithmetic-supernet.elora");
    for subnet in ["largest", "heuristic", "smallest"] {
        let Some(mut command) = example("generate", root.path()) else {
            return;
        };
        command.args(["--subnet", subnet, "--model"]).arg(&bundle);
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            text.contains("#### 41"),
            "{subnet}: {text}{}",
            stderr(&output)
        );
    }
}

#[test]
fn a_bundle_answers_as_its_folder_does() {
    let root = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| -> Option<Output> {
        Some(
            example("generate", root.path())?
                .args(arguments)
                .output()
                .unwrap(),
        )
    };
    let Some(folder) = run(&[]) else { return };
    let saved = run(&["--save", "model.elora", "--format", "f32"]).unwrap();
    assert!(
        saved.status.success() && saved.stdout.is_empty(),
        "{}",
        stderr(&saved)
    );
    for more in [
        &[][..],
        &["--half-cache", "--threads", "1"],
        &["--format", "f16"],
    ] {
        let bundle = run(&[&["--model", "model.elora"], more].concat()).unwrap();
        assert!(bundle.status.success(), "{}", stderr(&bundle));
        assert_eq!(bundle.stdout, folder.stdout);
    }
    assert!(String::from_utf8_lossy(&folder.stdout).contains("#### 41"));
    assert_eq!(run(&["--device", "flex"]).unwrap().stdout, folder.stdout);
    // Codes take less space. Existing files are only replaced on request.
    let bytes = || {
        std::fs::metadata(root.path().join("model.elora"))
            .unwrap()
            .len()
    };
    let before = bytes();
    let text = stderr(&run(&["--save", "model.elora", "--format", "int4"]).unwrap());
    assert!(
        text.starts_with("error: ") && text.contains("model.elora"),
        "{text}"
    );
    assert!(
        run(&["--save", "model.elora", "--format", "int4", "--overwrite"])
            .unwrap()
            .status
            .success()
    );
    assert!(3 * bytes() < before);
    assert!(run(&["--model", "model.elora"]).unwrap().status.success());
}

#[test]
fn table_2_measures_sparse_integers_as_written() {
    let root = tempfile::tempdir().unwrap();
    problems(&root.path().join("train.jsonl"), 12);
    problems(&root.path().join("valid.jsonl"), 3);
    let out = root.path().join("out");
    let run = |more: &[&str]| -> Option<Output> {
        let mut command = example("compress", root.path())?;
        command.args([
            "--train",
            "train.jsonl",
            "--valid",
            "valid.jsonl",
            "--method",
            "table2",
            "--steps",
            "2",
        ]);
        Some(
            command
                .args(["--batch", "4", "--bits", "4", "--out", "out"])
                .args(more)
                .output()
                .unwrap(),
        )
    };
    let report = || -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(out.join("report.json")).unwrap()).unwrap()
    };
    let Some(first) = run(&[]) else { return };
    assert!(first.status.success(), "{}", stderr(&first));
    let expected = report()["rows"].clone();
    let row = |name: &str| {
        expected
            .as_array()
            .unwrap()
            .iter()
            .find(|row| row["name"] == name)
            .unwrap()
            .clone()
    };
    let precisions = [
        ("base", "F16"),
        ("pruned, rounded to nearest", "INT4"),
        ("LoRA", "F16 + F16"),
        ("Shears", "F16 + F16"),
        ("SparsePEFT, merged", "F16, merged"),
        ("SparsePEFT, merged, then GPTQ", "INT4"),
        ("SQFT", "INT4 + F16"),
        ("SQFT + QA-SparsePEFT", "INT4, merged"),
    ];
    for (name, precision) in precisions {
        assert_eq!(row(name)["precision"], precision, "{name}");
    }
    assert_eq!(row("LoRA")["relative"], 1.0);
    // No zero is lost on the way, and rounding adds some.
    let sparsity = |name: &str| row(name)["sparsity"].as_f64().unwrap();
    let merged = sparsity("SQFT + QA-SparsePEFT");
    assert!(
        (0.49..0.51).contains(&sparsity("SparsePEFT, merged")) && (0.49..0.75).contains(&merged),
        "{merged}"
    );
    let bytes = |name: &str| row(name)["bytes"].as_u64().unwrap();
    let file = std::fs::metadata(shipped_model().join("model.safetensors"));
    let file = file.unwrap().len();
    assert!((file * 99 / 100..file).contains(&bytes("base")));
    assert!(bytes("SQFT + QA-SparsePEFT") < bytes("SQFT") && bytes("SQFT") < bytes("LoRA"));
    assert!(3 * bytes("SQFT + QA-SparsePEFT") < bytes("base"));

    assert_eq!(row("SQFT + QA-SparsePEFT")["folder"], "merged-quantized");
    // The bundles answer by the names of their subnets; a folder of sparse codes is opened sparse.
    let generate = |arguments: &[&str]| {
        let mut command = example("generate", &out).unwrap();
        let output = command
            .args(["--max-new-tokens", "4", "--model"])
            .args(arguments)
            .output();
        let output = output.unwrap();
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            stderr(&output)
        );
        output.stdout
    };
    let merged = generate(&["merged-quantized", "--prompt", "4 + 5 ="]);
    let same = generate(&[
        "merged-quantized",
        "--format",
        "sparse-int4",
        "--prompt",
        "4 + 5 =",
    ]);
    assert_eq!(merged, same);
    for arguments in [
        ["supernet.elora", "--subnet", "largest"],
        ["supernet.elora", "--subnet", "chosen"],
        ["sqft-supernet.elora", "--subnet", "smallest"],
        ["sqft-supernet.elora", "--subnet", "chosen"],
    ] {
        generate(&arguments);
    }
    for file in ["merged.elora", "merged-quantized.elora"] {
        for subnet in ["largest", "heuristic", "smallest"] {
            generate(&[file, "--subnet", subnet, "--embedding", "int8"]);
        }
    }
    // Finished blocks are kept while a run is not over.
    assert!(!out.join("blocks").exists());

    let resumed = run(&["--resume"]).unwrap();
    assert!(resumed.status.success(), "{}", stderr(&resumed));
    assert_eq!(report()["rows"], expected);
    // All files and folders that a run makes are listed, so the next run removes all of them.
    let overwrite = ["--overwrite", "--method", "sqft-sparse-peft"];
    let mut command = example("compress", root.path()).unwrap();
    command.args([
        "--train",
        "train.jsonl",
        "--valid",
        "valid.jsonl",
        "--steps",
        "2",
        "--batch",
        "4",
        "--out",
        "out",
    ]);
    assert!(command.args(overwrite).output().unwrap().status.success());
    let listed = [
        "merge_report.json",
        "merged",
        "merged.elora",
        "merged_ranks.json",
        "merged_space.json",
        "merged_subnet.json",
        "pruned",
    ];
    assert_eq!(
        entries(&out),
        [&listed[..], &["report.json", "run.json", "sparse-peft"]].concat()
    );
}

/// Returns the standard output of a run that succeeds.
fn stdout(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn evaluate_names_what_it_leaves_out_and_shows_what_it_measured() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("p.jsonl");
    problems(&file, 6);
    let mut text = std::fs::read_to_string(&file).unwrap();
    let long = "Tom has 3 pens. ".repeat(60);
    for (question, answer) in [("Why?", "Nobody knows that.\nAt all."), (&long, "#### 5")] {
        text += &serde_json::json!({ "question": question, "answer": answer }).to_string();
        text += "\n";
    }
    std::fs::write(&file, text).unwrap();
    let Some(mut command) = example("evaluate", root.path()) else {
        return;
    };
    let output = command
        .args(["--exact-match", "p.jsonl", "--show", "1"])
        .output()
        .unwrap();
    let (said, shown) = (stderr(&output), String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{said}");
    for part in [
        "2 of 8 records are not counted in the accuracy",
        "record 7: it has no final answer",
        "record 8: its prompt has",
    ] {
        assert!(said.contains(part), "{said}");
    }
    let first = "--- record 1\nQuestion: Tom has 11 pens and finds 3 more. How many pens does Tom have \
         now?\nAnswer:[[ 11 + 3 = 14\n#### 14]]\nreference: 14\nverdict: correct\n";
    assert!(shown.starts_with(first), "{shown}");
    assert!(
        shown.contains("p.jsonl: 100.0 % (6 of 6); GSM8K's strict match 100.0 %"),
        "{shown}"
    );

    // The same in the runtime, from a folder and from a bundle.
    let mut save = example("generate", root.path()).unwrap();
    save.args(["--save", "m.elora", "--format", "f32"]);
    assert!(save.output().unwrap().status.success());
    let measure = |more: &[&str]| {
        let mut command = example("evaluate", root.path()).unwrap();
        stdout(
            command
                .args(["--exact-match", "p.jsonl", "--limit", "3", "--json"])
                .args(more),
        )
    };
    let expected = measure(&["--show", "2"]);
    assert_eq!(expected.lines().count(), 3);
    let last: serde_json::Value = serde_json::from_str(expected.lines().last().unwrap()).unwrap();
    assert_eq!(
        (&last["correct"], &last["total"], &last["left_out"]),
        (&3.into(), &3.into(), &0.into())
    );
    assert_eq!(measure(&["--show", "2", "--runtime"]), expected);
    assert_eq!(measure(&["--show", "2", "--model", "m.elora"]), expected);
    let mut refused = example("evaluate", root.path()).unwrap();
    let output = refused
        .args(["--model", "m.elora", "--adapter", "p.jsonl"])
        .output();
    let text = stderr(&output.unwrap());
    assert!(text.starts_with("error: adapter"), "{text}");

    // Perplexity of a file that no name calls a text, and of a bundle.
    let perplexity = |more: &[&str]| -> f64 {
        let mut command = example("evaluate", root.path()).unwrap();
        let text = stdout(
            command
                .args(["--text", "p.jsonl", "--plain-text", "--json"])
                .args(more),
        );
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["nll"]
            .as_f64()
            .unwrap()
    };
    let expected = perplexity(&[]);
    assert!((perplexity(&["--model", "m.elora"]) - expected).abs() < 1e-4);
}

/// A task of one's own, from its description to the table, the JSON and the log.
#[test]
fn evaluate_runs_tasks_on_rows_of_files() {
    let root = tempfile::tempdir().unwrap();
    problems(&root.path().join("test.jsonl"), 3);
    std::fs::write(
        root.path().join("own.json"),
        serde_json::json!([
            {"include": "gsm8k", "task": "sums", "num_fewshot": 0},
            {"task": "pick", "output_type": "multiple_choice", "test_split": "test",
             "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": ["{{1}}", "x"],
             "doc_to_target": "{{0}}", "metric_list": [{"metric": "acc"}]},
        ])
        .to_string(),
    )
    .unwrap();
    let run = |more: &[&str]| {
        let mut command = example("evaluate", root.path())?;
        Some(
            command
                .args(["--task", "own.json", "--max-new-tokens", "40"])
                .args(more)
                .output()
                .unwrap(),
        )
    };
    let Some(output) = run(&["--log", "log.jsonl"]) else {
        return;
    };
    let (said, shown) = (stderr(&output), String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{said}");
    assert!(shown.contains("exact strict-match"), "{shown}");
    assert!(
        shown.lines().all(|line| line.chars().count() <= 80),
        "{shown}"
    );
    assert!(said.contains("6 documents in"), "{said}");
    let log = std::fs::read_to_string(root.path().join("log.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 6);
    assert!(
        lines[0]["output"].as_str().unwrap().contains("#### 14"),
        "{log}"
    );
    assert_eq!(lines[0]["filtered"][0]["exact_match"], 1);
    let output = run(&["--limit", "2", "--format", "int8", "--json", "report.json"]).unwrap();
    assert!(
        output.status.success() && output.stdout.is_empty(),
        "{}",
        stderr(&output)
    );
    let report = std::fs::read_to_string(root.path().join("report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["tasks"][0]["n_documents"], 2);
    assert_eq!(report["format"], "int8");
    for (more, expected) in [
        (&["--data", "nowhere"][..], "nowhere"),
        (&["--tasks", "arc"], "arc_easy"),
        (&["--chat"], "chat template"),
        (&["--num-fewshot", "4"], "num_fewshot"),
    ] {
        let output = run(more).unwrap();
        assert!(stderr(&output).contains(expected), "{}", stderr(&output));
    }
}

#[test]
fn compress_shows_records_and_leaves_some_out() {
    let root = tempfile::tempdir().unwrap();
    problems(&root.path().join("train.jsonl"), 8);
    let valid = root.path().join("valid.jsonl");
    problems(&valid, 3);
    let mut text = std::fs::read_to_string(&valid).unwrap();
    text += "{\"question\": \"Why?\", \"answer\": \"Nobody knows that.\\nAt all.\"}\n";
    std::fs::write(&valid, text).unwrap();
    std::fs::write(
        root.path().join("chat.jinja"),
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{% if \
         add_generation_prompt %}<assistant>{% endif %}",
    )
    .unwrap();
    let run = |more: &[&str]| {
        let mut command = training(root.path(), "1")?;
        Some(command.arg("--overwrite").args(more).output().unwrap())
    };
    let Some(output) = run(&["--template", "chat.jinja", "--show", "1"]) else {
        return;
    };
    let (said, shown) = (stderr(&output), String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{said}");
    let first = "<user>Tom has 11 pens and finds 3 more. How many pens does Tom have now?</s>\
         <assistant>[[11 + 3 = 14\n#### 14</s>]]";
    assert!(shown.contains(first), "{shown}");
    assert!(
        said.contains("1 of 4 records are not counted in the accuracy")
            && shown.contains("accuracy"),
        "{said}{shown}"
    );
    // The same files as plain text have no answers.
    let output = run(&["--plain-text"]).unwrap();
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success() && !shown.contains("accuracy"),
        "{shown}"
    );
}

#[test]
fn a_conversation_is_had_through_a_pipe() {
    use std::io::Write;
    use std::process::Stdio;
    let root = tempfile::tempdir().unwrap();
    // Each turn shows what came before it, so that the answers depend on the whole conversation.
    std::fs::write(
        root.path().join("chat.jinja"),
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n{% elif m.role == 'user' \
         %}Question: {{ m.content }}\nAnswer:{% else %} {{ m.content }}\n{% endif %}{% endfor %}",
    )
    .unwrap();
    let talk = |more: &[&str]| -> Option<Output> {
        let mut child = example("generate", root.path())?
            .args(["--chat", "--template", "chat.jinja"])
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let turns = b"Mia has 23 shells and finds 18 more. How many shells does Mia have now?\n\n\
            Tom has 11 pens and finds 3 more. How many pens does Tom have now?\n";
        child.stdin.take().unwrap().write_all(turns).unwrap();
        Some(child.wait_with_output().unwrap())
    };
    let Some(output) = talk(&[]) else { return };
    let (said, shown) = (stderr(&output), String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{said}");
    // The empty line is no turn.
    assert_eq!(said.matches("generated").count(), 2, "{said}");
    assert!(shown.starts_with(" 23 + 18 = 41\n#### 41\n"), "{shown}");
    let with_system = talk(&["--system", "Question: 1 + 1?\nAnswer: 2 #### 2"]).unwrap();
    assert!(with_system.status.success(), "{}", stderr(&with_system));
    let prompt = |output: &Output| -> usize {
        let said = stderr(output);
        let at = said.split("prompt: ").nth(1).unwrap();
        at.split(' ').next().unwrap().parse().unwrap()
    };
    assert!(prompt(&with_system) > prompt(&output) + 5);
    // The bundled model has no template of its own.
    let refused = example("generate", root.path())
        .unwrap()
        .arg("--chat")
        .output();
    assert!(stderr(&refused.unwrap()).contains("error: chat = "));
}

/// Number of rounds of a test that takes long; `ELASTIC_LORA_ROUNDS` sets another.
fn rounds(usual: usize) -> usize {
    std::env::var("ELASTIC_LORA_ROUNDS").map_or(usual, |n| n.parse().unwrap())
}

/// A command that trains for some steps in the folder `out`.
fn training(root: &Path, steps: &str) -> Option<Command> {
    let mut command = example("compress", root)?;
    command.args(["--train", "train.jsonl", "--valid", "valid.jsonl"]);
    command.args(["--method", "lora", "--steps", steps, "--batch", "2"]);
    command.args(["--out", "out"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    Some(command)
}

#[test]
fn of_several_runs_in_one_folder_one_goes_on() {
    let root = tempfile::tempdir().unwrap();
    problems(&root.path().join("train.jsonl"), 6);
    problems(&root.path().join("valid.jsonl"), 2);
    let out = root.path().join("out");
    for round in 0..rounds(1) {
        for n in [2, 8] {
            let mut running = Vec::new();
            for _ in 0..n {
                let Some(mut command) = training(root.path(), "3") else {
                    return;
                };
                running.push(command.spawn().unwrap());
            }
            let ended = running
                .into_iter()
                .map(|one| one.wait_with_output().unwrap());
            let (good, refused): (Vec<_>, Vec<_>) = ended.partition(|o| o.status.success());
            assert_eq!(good.len(), 1, "{n} in round {round}");
            for output in refused {
                let text = stderr(&output);
                assert_eq!(output.status.code(), Some(1), "{text}");
                // Whoever comes after the first one has ended finds its results.
                let named = text.contains("process ") && text.contains("is writing here");
                assert!(named || text.contains("--overwrite"), "{text}");
            }
            assert_eq!(
                entries(&out),
                ["lora", "lora-adapter", "pruned", "report.json", "run.json"]
            );
            std::fs::remove_dir_all(&out).unwrap();
        }
    }
}

#[test]
fn a_run_that_was_killed_at_its_start_is_no_obstacle() {
    let root = tempfile::tempdir().unwrap();
    problems(&root.path().join("train.jsonl"), 6);
    problems(&root.path().join("valid.jsonl"), 2);
    let out = root.path().join("out");
    for option in ["", "--resume", "--overwrite"] {
        std::fs::create_dir(&out).unwrap();
        // What is there before `run.json` has its name.
        for name in ["run.lock", ".run.json-a1B2c3.tmp", ".run.json.lock"] {
            std::fs::write(out.join(name), "1").unwrap();
        }
        let Some(mut command) = training(root.path(), "3") else {
            return;
        };
        let output = command
            .args([option].iter().filter(|o| !o.is_empty()))
            .output()
            .unwrap();
        assert!(output.status.success(), "{option}: {}", stderr(&output));
        assert_eq!(
            entries(&out),
            ["lora", "lora-adapter", "pruned", "report.json", "run.json"]
        );
        std::fs::remove_dir_all(&out).unwrap();
    }
}

/// Everything below a folder but for times, as names and contents.
#[cfg(unix)]
fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(at) = open.pop() {
        for entry in std::fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
                continue;
            }
            let mut bytes = std::fs::read(&path).unwrap();
            let name = path.strip_prefix(folder).unwrap().to_path_buf();
            if name == Path::new("report.json") {
                let report: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
                bytes = report["rows"].to_string().into_bytes();
            }
            // They hold the seconds of each evaluation; `search.jsonl` holds the same without a plot.
            if name.to_string_lossy().starts_with("search_progression") {
                bytes.clear();
            }
            if name.ends_with("search.jsonl") {
                let text = String::from_utf8(bytes).unwrap();
                let without = |line: &str| {
                    let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
                    line["seconds"] = 0.into();
                    line.to_string()
                };
                bytes = text
                    .lines()
                    .map(without)
                    .collect::<Vec<_>>()
                    .join("\n")
                    .into_bytes();
            }
            all.push((name, bytes));
        }
    }
    all.sort();
    all
}

/// `ELASTIC_LORA_ROUNDS=100 cargo test --release --test cli -- --ignored` kills at least a hundred
/// runs in training, and as many while they search.
#[cfg(unix)]
#[test]
#[ignore = "takes some seconds for each killed run"]
fn killed_runs_are_resumed_with_the_same_results() {
    use rand::{RngExt, SeedableRng};
    let root = tempfile::tempdir().unwrap();
    problems(&root.path().join("train.jsonl"), 12);
    problems(&root.path().join("valid.jsonl"), 3);
    let out = root.path().join("out");
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(22);
    for (phase, steps, evals) in [("train", "40", "4"), ("search", "2", "80")] {
        let command = |more: &[&str]| {
            let mut command = example("compress", root.path())?;
            command.args(["--train", "train.jsonl", "--valid", "valid.jsonl"]);
            command.args(["--method", "shears", "--batch", "2"]);
            command.args(["--steps", steps, "--evals", evals]);
            command.args(["--out", "out"]).args(more);
            command.stdout(Stdio::null()).stderr(Stdio::piped());
            Some(command)
        };
        let Some(mut first) = command(&[]) else {
            return;
        };
        let started = std::time::Instant::now();
        let output = first.output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let whole = started.elapsed();
        let expected = contents(&out);
        std::fs::remove_dir_all(&out).unwrap();
        let (mut n_killed, mut n_in_phase, mut round) = (0, 0, 0);
        while n_in_phase < rounds(10) {
            let mut running = command(&[]).unwrap().spawn().unwrap();
            // Killed up to three times, then left to end.
            for _ in 0..rng.random_range(1..4) {
                std::thread::sleep(whole.mul_f64(rng.random_range(0.0..1.1)));
                let runs = running.try_wait().unwrap().is_none();
                running.kill().unwrap();
                running.wait().unwrap();
                let begun = |name: &str| {
                    let file = std::fs::metadata(out.join("shears").join(name));
                    file.is_ok_and(|file| file.len() > 0)
                };
                let ended = out.join("supernet.elora").exists();
                let is_in_phase = match (begun("losses.csv"), begun("search.jsonl")) {
                    (true, false) => phase == "train",
                    (_, true) => phase == "search" && !ended,
                    _ => false,
                };
                n_killed += usize::from(runs);
                n_in_phase += usize::from(runs && is_in_phase);
                running = command(&["--resume"]).unwrap().spawn().unwrap();
            }
            let output = running.wait_with_output().unwrap();
            let text = stderr(&output);
            assert!(output.status.success(), "round {round}: {text}");
            let found = contents(&out);
            let names = |all: &[(PathBuf, Vec<u8>)]| -> Vec<PathBuf> {
                all.iter().map(|(name, _)| name.clone()).collect()
            };
            assert_eq!(names(&found), names(&expected), "round {round}");
            for ((name, found), (_, expected)) in found.iter().zip(&expected) {
                assert!(found == expected, "round {round}: {}", name.display());
            }
            std::fs::remove_dir_all(&out).unwrap();
            round += 1;
            assert!(round < 20 * rounds(10), "{n_in_phase} in the phase {phase}");
        }
        eprintln!("{n_killed} runs were killed, {n_in_phase} in the phase {phase}");
    }
}

/// The limit of threads is one of the user, and does not hold for root. So the run is another user's
/// where the tests are root's.
#[cfg(target_os = "linux")]
#[test]
fn runs_go_on_with_few_threads() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65534;
    let root = tempfile::tempdir().unwrap();
    let open = |path: &Path| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    };
    open(root.path());
    problems(&root.path().join("train.jsonl"), 6);
    problems(&root.path().join("valid.jsonl"), 2);
    let Some(built) = example("compress", root.path()) else {
        return;
    };
    let program = root.path().join("compress");
    std::fs::copy(built.get_program(), &program).unwrap();
    open(&program);
    let model = root.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for entry in std::fs::read_dir(shipped_model()).unwrap() {
        let from = entry.unwrap().path();
        std::fs::copy(&from, model.join(from.file_name().unwrap())).unwrap();
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let uid = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    let is_root = uid.unwrap().split_whitespace().nth(1) == Some("0");
    let (mut n_good, mut n_refused) = (0, 0);
    for limit in (1..8).chain([64]) {
        let mut command = Command::new("sh");
        // Shells differ in the option's name.
        let set = format!(
            "if (ulimit -u {limit}) 2>/dev/null; then ulimit -u {limit}; else ulimit -p {limit}; fi"
        );
        let run = "exec ./compress --model model --train train.jsonl --valid valid.jsonl \
                   --method shears --steps 2 --batch 2 --evals 2";
        let out = format!("out-{limit}");
        command
            .args(["-c", &format!("{set} && {run} --out {out}")])
            .env("RAYON_NUM_THREADS", "32")
            .current_dir(root.path());
        if is_root {
            command.uid(NOBODY).gid(NOBODY);
        }
        let output = command.output().unwrap();
        let text = stderr(&output);
        assert!(!text.contains("panicked"), "{limit}: {text}");
        if output.status.success() {
            n_good += 1;
        } else if text.contains("error: no thread can be started") {
            n_refused += 1;
        } else {
            // A user with more processes than that cannot start the program at all.
            assert!(!is_root, "{limit}: {text}");
        }
    }
    assert!(
        !is_root || (n_good > 1 && n_refused > 0),
        "{n_good}, {n_refused}"
    );
}

/// Kills runs of `stream`, and starts them again.
#[cfg(unix)]
#[test]
#[ignore = "takes some seconds for each killed run"]
fn killed_streams_go_on_to_the_same_bytes() {
    use rand::{RngExt, SeedableRng};
    let root = tempfile::tempdir().unwrap();
    let model = shipped_model();
    let stream = |method: &str, out: &str| {
        let mut command = example("stream", root.path())?;
        command.args(["--model", model.to_str().unwrap(), "--method", method]);
        command.args([
            "--calibration",
            "random",
            "--calibration-samples",
            "8",
            "--group-size",
            "32",
            "--out",
            out,
        ]);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        Some(command)
    };
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(27);
    let mut n_killed = 0;
    for method in ["wanda", "sparsegpt", "gptq", "joint"] {
        let Some(mut first) = stream(method, "whole") else {
            return;
        };
        let started = std::time::Instant::now();
        let output = first.output().unwrap();
        assert!(output.status.success(), "{method}: {}", stderr(&output));
        let (time, whole, out) = (
            started.elapsed(),
            root.path().join("whole"),
            root.path().join("out"),
        );
        let expected = contents(&whole);
        for _ in 0..rounds(10) {
            // Killed a few times, then left to end.
            for _ in 0..rng.random_range(1..5) {
                let mut running = stream(method, "out").unwrap().spawn().unwrap();
                std::thread::sleep(time.mul_f64(rng.random_range(0.0..1.0)));
                n_killed += usize::from(running.try_wait().unwrap().is_none());
                running.kill().unwrap();
                running.wait().unwrap();
                if out.exists() {
                    break;
                }
            }
            if !out.exists() {
                let output = stream(method, "out").unwrap().output().unwrap();
                assert!(output.status.success(), "{method}: {}", stderr(&output));
                assert!(!root.path().join("out.unfinished").exists(), "{method}");
            }
            assert!(contents(&out) == expected, "{method}");
            std::fs::remove_dir_all(&out).unwrap();
            let left = root.path().join("out.unfinished");
            if left.exists() {
                // Killed between the two last steps.
                std::fs::remove_dir_all(left).unwrap();
            }
        }
        std::fs::remove_dir_all(&whole).unwrap();
    }
    eprintln!("{n_killed} runs were killed");
}

/// Kills conversions and `generate --save`, as the test above does with runs.
#[cfg(unix)]
#[test]
#[ignore = "takes some seconds for each killed run"]
fn killed_conversions_leave_the_whole_or_nothing() {
    use rand::{RngExt, SeedableRng};
    let root = tempfile::tempdir().unwrap();
    let model = shipped_model();
    let model = model.to_str().unwrap();
    let convert = |to: &'static str, out: &'static str| {
        let args = vec!["--model", model, "--to", to, "--out", out];
        ("convert", args, out)
    };
    let save = vec!["--model", model, "--save", "s.elora", "--format", "int4"];
    let prompt = vec!["--prompt", "1 + 1", "--max-new-tokens", "1"];
    let ways = [
        convert("gguf", "m.gguf"),
        convert("hf", "folder"),
        convert("bundle", "m.elora"),
        ("generate", [save, prompt].concat(), "s.elora"),
    ];
    let read = |path: &Path| match path.is_dir() {
        true => contents(path),
        false => vec![(PathBuf::new(), std::fs::read(path).unwrap())],
    };
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(23);
    let (mut n_killed, mut n_whole) = (0, 0);
    for (program, args, name) in ways {
        let command = |overwrite: bool| {
            let mut command = example(program, root.path())?;
            command.args(&args).args(overwrite.then_some("--overwrite"));
            command.stdout(Stdio::null()).stderr(Stdio::piped());
            Some(command)
        };
        let Some(mut first) = command(false) else {
            return;
        };
        let started = std::time::Instant::now();
        let output = first.output().unwrap();
        assert!(output.status.success(), "{name}: {}", stderr(&output));
        let (time, path) = (started.elapsed(), root.path().join(name));
        let expected = read(&path);
        for round in 0..rounds(10) {
            let overwrite = round % 2 == 1;
            if !overwrite {
                match path.is_dir() {
                    true => std::fs::remove_dir_all(&path).unwrap(),
                    false => std::fs::remove_file(&path).unwrap(),
                }
            }
            let mut running = command(overwrite).unwrap().spawn().unwrap();
            std::thread::sleep(time.mul_f64(rng.random_range(0.0..1.1)));
            n_killed += usize::from(running.try_wait().unwrap().is_none());
            running.kill().unwrap();
            running.wait().unwrap();
            if path.exists() {
                n_whole += 1;
                assert!(read(&path) == expected, "{name} in round {round}");
            } else {
                // A folder cannot take another's place in one step.
                assert!(!overwrite || expected.len() > 1, "{name} in round {round}");
            }
            let output = command(path.exists()).unwrap().output().unwrap();
            assert!(output.status.success(), "{name}: {}", stderr(&output));
            assert!(read(&path) == expected, "{name} after round {round}");
        }
        let left: Vec<String> = entries(root.path());
        assert!(left.iter().all(|name| !name.contains(".tmp")), "{left:?}");
    }
    eprintln!("{n_killed} were killed, {n_whole} left a whole result");
}

#[test]
fn records_that_do_not_fit_are_named_and_the_rest_goes_on() {
    let root = tempfile::tempdir().unwrap();
    let write = |name: &str, lines: &[String]| {
        std::fs::write(root.path().join(name), lines.join("\n")).unwrap();
    };
    let record = |question: &str, answer: &str| {
        serde_json::json!({"question": question, "answer": answer}).to_string()
    };
    let sum = |i: usize| record(&format!("What is {i} + 1?"), &format!("#### {}", i + 1));
    let long = "Say hello to everybody in the house. ".repeat(40);
    let train = [
        sum(1),
        record(&long, "#### 1"),
        sum(2),
        record("Say nothing.", ""),
        r#"{"question": "What is 2 + 3?", "answer": 5}"#.into(),
    ];
    write("train.jsonl", &train);
    let valid = [
        sum(4),
        record("Explain.", "I cannot say.\nAsk somebody else."),
        sum(5),
    ];
    write("valid.jsonl", &valid);
    write("test.jsonl", &[sum(6), record(&long, "#### 1")]);
    write("text.txt", &["Tom has 3 pens and finds 4 more.".into()]);
    write("long.jsonl", &[record(&long, "#### 1")]);
    let run = |more: &[&str]| -> Option<Output> {
        let mut command = example("compress", root.path())?;
        command.args(["--method", "lora", "--steps", "2", "--batch", "2"]);
        command.args(["--out", "out", "--overwrite"]);
        Some(command.args(more).output().unwrap())
    };
    let files = ["--train", "train.jsonl", "--valid", "valid.jsonl"];
    let Some(output) = run(&[&files[..], &["--test", "test.jsonl"]].concat()) else {
        return;
    };
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    for said in [
        "train.jsonl: 2 of 5 records are left out: record 2: ",
        "they end before its answer; record 4: it has no answer",
        "valid.jsonl: 1 of 3 records are not counted in the accuracy: record 2: it has no final answer",
        "test.jsonl: 1 of 2 records are left out: record 2: ",
        "test.jsonl: 1 of 2 records are not counted in the accuracy: record 2: its prompt has ",
        "calibration: ",
    ] {
        assert!(text.contains(said), "no {said}: {text}");
    }
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(shown.contains("accuracy"), "{shown}");

    // Packed, with a calibration text that is shorter than a sample.
    let more = ["--pack", "--calibration", "text.txt", "--max-len", "60"];
    let output = run(&[&files[..], &more].concat()).unwrap();
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    for said in [
        "3 examples are packed into 2 sequences",
        "calibration: 1 sample of ",
        " tokens from text.txt, not 128 of 128: it has only ",
    ] {
        assert!(text.contains(said), "no {said}: {text}");
    }
    let more = ["--calibration-samples=2", "--calibration-length=16"];
    let text = stderr(&run(&[&files[..], &more].concat()).unwrap());
    let said = "calibration: 2 samples of 16 tokens from train.jsonl\n";
    assert!(text.contains(said), "{text}");

    // Nothing fits.
    let output = run(&["--train", "long.jsonl", "--valid", "valid.jsonl"]).unwrap();
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("long.jsonl") && text.contains("record 1: "),
        "{text}"
    );
}
