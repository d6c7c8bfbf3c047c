//! Templates and regular expressions of tasks.
#![no_main]

use elastic_lora::Result;
use elastic_lora::progress::{Progress, Silent};
use elastic_lora::tasks::{
    Continuation, EvaluateOptions, LanguageModel, LogLikelihood, Prompt, TaskData, TaskSpec, evaluate,
};
use libfuzzer_sys::fuzz_target;
use serde_json::json;

/// Answers with what it was asked.
struct Echo;

impl LanguageModel for Echo {
    fn log_likelihoods(&mut self, all: &[Continuation], _: &dyn Progress) -> Result<Vec<LogLikelihood>> {
        Ok(vec![LogLikelihood::default(); all.len()])
    }

    fn generate(&mut self, all: &[Prompt], _: &dyn Progress) -> Result<Vec<String>> {
        Ok(all.iter().map(|prompt| prompt.text.clone()).collect())
    }

    fn rolling_log_likelihoods(&mut self, all: &[String], _: &dyn Progress) -> Result<Vec<LogLikelihood>> {
        Ok(vec![LogLikelihood::default(); all.len()])
    }
}

fuzz_target!(|text: &str| {
    let (template, pattern) = text.split_once('\n').unwrap_or((text, "a"));
    let spec = json!({
        "task": "fuzzed",
        "output_type": "generate_until",
        "doc_to_text": template,
        "doc_to_target": "{{ question }}",
        "filter_list": [{"name": "all", "filter": [
            {"function": "regex_replace", "regex_pattern": pattern, "replacement": "<\\1>"},
            {"function": "regex", "regex_pattern": pattern},
        ]}],
        "metric_list": [{"metric": "exact_match"}],
    });
    let Ok(spec) = serde_json::from_value::<TaskSpec>(spec) else {
        return;
    };
    let row = json!({"question": "Why? 1 + 2", "choices": ["a", "b"], "label": 1});
    let mut data = TaskData::default();
    data.documents.extend(row.as_object().cloned());
    let _ = evaluate(&mut Echo, &spec, &data, &EvaluateOptions::default(), &Silent);
});
