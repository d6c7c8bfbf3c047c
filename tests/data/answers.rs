//! Final answers: how they are found and compared.

use elastic_lora::data::answers::{exact_match, extract_answer, flexible, strict};
use elastic_lora::data::{Record, parse_records};
use rand::{RngExt, SeedableRng};
use std::path::Path;

#[test]
fn numbers_after_hashes_are_extracted() {
    for (text, answer) in [
        ("5 + 7 = 12\n#### 12", Some("12")),
        ("#### 12.0\n", Some("12")),
        ("####1,234.50.", Some("1234.5")),
        ("#### $-0.0", Some("0")),
        ("#### -7 apples #### 9", Some("-7")),
        ("#### none #### 9", Some("9")),
        ("#### 007", Some("7")),
        ("#### .50", Some("0.5")),
        ("#### 1.2.3", None),
        ("#### 1/2", None),
        ("#### ", None),
        ("the answer is 5", None),
        ("", None),
        ("####é", None),
    ] {
        assert_eq!(extract_answer(text).as_deref(), answer, "{text:?}");
    }
}

/// Answers that are equal, each in all its writings.
const EQUAL: [&[&str]; 22] = [
    &[
        "8",
        "8.0",
        "+8",
        "08",
        "8.",
        "**8**",
        "$8$",
        "\\boxed{8}",
        "0.8e1",
        "(8)",
    ],
    &[
        "1200",
        "1,200",
        "1 200",
        "1\u{a0}200",
        "1'200",
        "$1,200.00",
        "1.2e3",
        "1.2 x 10^3",
        "1,200 USD",
    ],
    &["-5", "−5", "-5.0", "-5 degrees"],
    &["3,5", "3.5", "3.50"],
    &["1.200,50", "1,200.5"],
    &["100000", "1e5", "1E+5", "100,000", "1 × 10^{5}"],
    &["25%", "25 %", "25", "25\\%"],
    &["12345678901234567890123", "12,345,678,901,234,567,890,123"],
    &["3/4", "3 / 4", "3⁄4", "\"3/4\""],
    &["5:30", "05:30", "5:30 pm", "5:30 p.m."],
    &["6 apples", "6 Apples.", "6", "6apples"],
    &["€40", "40 €", "40"],
    &["(B)", "B", "b", "(b).", "[B]", "B)", "\"B\""],
    &["New York", "new york.", "New  York", "**New York**"],
    &["no.", "No", "no!"],
    &["\"cat\"", "cat", "‘cat’", "“Cat”."],
    &["café", "Café."],
    &["北京", "北京。"],
    &["true", "True", "TRUE."],
    &["x = 5", "x = 5."],
    &["(3, 4]", "(3, 4]."],
    &["1 1/2", "1 1/2."],
];

/// Answers that differ from each other.
const DIFFERENT: [&[&str]; 14] = [
    &["3/4", "3/5", "3", "4", "0", "3/40", "13/4", "-3/4"],
    &[
        "5", "5:30", "5:31", "5/6", "5e1", "5.5", "55", "-5", "5-6", "5 6/7", "5 * 6",
    ],
    &[
        "12345678901234567890123",
        "12345678901234567890124",
        "1234567890123456789012",
    ],
    &["100000000000000000007", "100000000000000000000"],
    &["3,5", "35", "3,500", "0.35"],
    &["1,000", "1", "1,001"],
    &["6 apples", "6 pears", "7 apples", "apples"],
    &["€40", "$40", "41"],
    &["25%", "$25", "0.25"],
    &["New York", "New York City", "New", "York", "New Yorkers"],
    &["A", "B", "A/B", "A dog", "An"],
    &["no", "none", "no one", "north"],
    &["answer1", "answer12", "answer2", "answer"],
    &["(3, 4]", "[3, 4)", "(3, 4)", "(3, 5]"],
];

#[test]
fn equal_answers_match_and_others_do_not() {
    let marked = |answer: &str| {
        [
            format!("So it is.\n#### {answer}"),
            format!("####{answer}\nQuestion: 9?"),
            format!("The answer is {answer}"),
            format!("é The Answer is: {answer}\n\nAnd 7."),
        ]
    };
    for writings in EQUAL {
        for reference in writings.iter().filter(|w| !w.is_empty()) {
            for answer in writings.iter().filter(|w| !w.is_empty()) {
                for output in marked(answer) {
                    assert!(exact_match(&output, reference), "{output:?} {reference:?}");
                }
                assert!(exact_match(answer, reference), "{answer:?} {reference:?}");
                let solution = format!("Think.\n#### {reference}");
                let output = format!("#### {answer}");
                assert!(exact_match(&output, &solution), "{answer:?} {solution:?}");
            }
        }
    }
    for answers in DIFFERENT {
        for (i, reference) in answers.iter().enumerate() {
            for (j, answer) in answers.iter().enumerate() {
                for output in marked(answer).iter().chain([&answer.to_string()]) {
                    let equal = exact_match(output, reference);
                    assert_eq!(equal, i == j, "{output:?} {reference:?}");
                }
            }
        }
    }
}

#[test]
fn the_answer_is_taken_from_where_it_stands() {
    for (output, reference) in [
        ("so #### 1,000.", "x\n#### 1000"),
        ("\nA: 569 - 236 = 333. The answer is 333.", "333.0"),
        ("the answer is 4 ... #### 5", "5"),
        ("#### none, but the answer is 5", "5"),
        ("The answer is 2 + 3 = 5.", "5"),
        ("The answer is x = 5", "5"),
        ("The answer is 5, since x = 7.", "5"),
        ("The answer is 5 apples", "5"),
        ("The answer is (B) Paris", "B"),
        ("The answer is B: Paris", "(B)"),
        ("the correct answer is true, as said", "true"),
        ("The answer is\n5", "5"),
        ("The answer is Paris (France)", "Paris"),
        (" 12\n", "12"),
        ("So \\boxed{4}, no:\nit is \\(\\boxed{3}\\).", "3"),
        ("$\\boxed{\\frac{3}{4}}$", "\\frac{3}{4}"),
        ("\\boxed{\\text{New York}}", "New York"),
    ] {
        assert!(exact_match(output, reference), "{output:?} {reference:?}");
    }
    for (output, reference) in [
        ("The answer is", ""),
        ("", ""),
        ("5", " "),
        ("#### ", "####"),
        ("The answer is four", "4"),
        ("The answer is 2 + 3 = 5", "2"),
        ("I have 12", "12"),
        ("12\n- 5\n= 7", "12"),
        ("12 of them are red", "12"),
        ("#### 8", "#### 9"),
        ("The answer is 12/25/2024", "12/25"),
        ("The answer is 2024-12-25", "2024"),
        ("#### 4\n#### 5", "5"),
        ("The answer is 3 or 4", "3"),
        ("\\boxed{\\frac{3}{4}}", "3"),
        ("The answer is 4, \\boxed{3}", "3"),
    ] {
        assert!(!exact_match(output, reference), "{output:?} {reference:?}");
    }
}

#[test]
fn any_texts_are_compared_without_a_panic() {
    let parts = [
        "####",
        " ",
        "answer is",
        "(",
        ")",
        "−",
        "1",
        "000",
        ",",
        ".",
        "e",
        "10^",
        "{",
        "é",
        "€",
        "%",
        "/",
        ":",
        "\n",
        "\"",
        "x",
        "\\",
        "=",
        "北",
        "-",
        "9999999999",
    ];
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
    let mut text = |n: usize| -> String {
        (0..n)
            .map(|_| parts[rng.random_range(0..parts.len())])
            .collect()
    };
    for i in 0..20_000 {
        let (output, reference) = (text(i % 12), text(i % 7));
        exact_match(&output, &reference);
        strict(&output, &reference);
        flexible(&output, &reference);
        let marked = format!("#### {reference}");
        let alone = parse_records(
            &serde_json::json!([{"question": "q", "answer": marked}]).to_string(),
            Path::new("a"),
        );
        if let Some(answer) = alone.unwrap()[0].final_answer()
            && !reference.contains("####")
            && !marked.contains("answer is")
        {
            assert!(exact_match(&marked, &answer), "{marked:?} {answer:?}");
        }
    }
}

#[test]
fn references_are_found_or_missed_by_record() {
    let answer = |json: &str| {
        let records = parse_records(json, Path::new("a")).unwrap();
        records[0].final_answer()
    };
    for (json, expected) in [
        (
            r#"{"instruction": "i", "output": "x", "answer": "$1,200"}"#,
            Some("$1,200"),
        ),
        (
            r#"{"instruction": "i", "output": "x", "answer": 3.0}"#,
            Some("3"),
        ),
        (
            r#"{"instruction": "i", "output": "x", "answer": "(B)"}"#,
            Some("(B)"),
        ),
        (
            r#"{"instruction": "i", "output": "x", "answer": 100000000000000000007}"#,
            Some("100000000000000000007"),
        ),
        (
            r#####"{"instruction": "i", "output": "#### 12", "answer": ""}"#####,
            None,
        ),
        (
            r#####"{"instruction": "i", "output": "#### 12"}"#####,
            Some("12"),
        ),
        (
            r#"{"instruction": "i", "output": "so the answer is New York."}"#,
            Some("New York."),
        ),
        (r#"{"instruction": "i", "output": 5}"#, Some("5")),
        (r#"{"instruction": "i", "output": "I cannot say."}"#, None),
        (
            r#"{"instruction": "i", "output": "The answer is one that nobody so far could ever have found"}"#,
            None,
        ),
        (
            r#"{"question": "q", "answer": "So it is 1/2.\n#### 1/2"}"#,
            Some("1/2"),
        ),
        (
            r#"{"question": "q", "answer": "6 apples"}"#,
            Some("6 apples"),
        ),
        (
            r#"{"question": "q", "answer": "New York"}"#,
            Some("New York"),
        ),
        (r#"{"question": "q", "answer": "One.\nTwo."}"#, None),
        (
            r#"{"question": "q", "answer": "First we look at all of the numbers there."}"#,
            None,
        ),
        (r#####"{"question": "q", "answer": "#### "}"#####, None),
        (r#"{"prompt": "p", "completion": "yes"}"#, Some("yes")),
        (
            r#"{"instruction": "i", "output": "So\n\\[ \\boxed{3} \\]"}"#,
            Some("3"),
        ),
        (r#"{"text": "5"}"#, None),
    ] {
        assert_eq!(answer(json).as_deref(), expected, "{json}");
    }
}

/// The expected values are what Python's `re` gives for the expressions of the harness.
#[test]
fn gsm8k_is_scored_as_the_harness_does() {
    let reference = "2 + 3 = <<2+3=5>>5\n#### 1,200";
    for (output, by_strict, by_flexible) in [
        ("#### 1200", true, true),
        ("#### 1,200.", true, true),
        ("#### $1200", false, true),
        ("#### 1200 or #### 7", true, false),
        ("so 1200", false, true),
        ("It is $1,200.", false, true),
        ("#### 1200 dollars. 5", true, false),
        ("#### -1200", false, false),
        ("####1200", false, true),
        ("#### 1200\n\nQuestion: how many 7?", true, true),
        ("#### 1200<|im_end|>8", true, true),
        ("1200 , .", false, true),
        ("1200 ...", false, false),
        ("#### 1200..", false, false),
        ("", false, false),
        ("é1200é", false, true),
    ] {
        assert_eq!(strict(output, reference), by_strict, "{output:?}");
        assert_eq!(flexible(output, reference), by_flexible, "{output:?}");
    }
    assert!(
        flexible("--5", "#### -5") && flexible("3-5", "#### -5") && flexible("x-5 $", "#### -5")
    );
    assert!(!strict("#### x\n#### 5", "#### 6") && strict("#### x\n#### 5", "#### 5"));
    assert!(matches!(
        &parse_records(r#"{"question": "q", "answer": "a"}"#, Path::new("a")).unwrap()[0],
        Record::Question { .. }
    ));
}
