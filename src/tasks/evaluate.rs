//! Runs a task on a model.

use std::io::Write;
use std::time::Instant;

use serde::Serialize;
use serde_json::{Value, json};

use super::encode::is_space;
use super::filter::{Filter, Match};
use super::language_model::{Continuation, LanguageModel, LogLikelihood, Prompt};
use super::load::TaskData;
use super::prompt::{PromptOptions, Prompter, Question};
use super::spec::{OutputType, TaskSpec};
use crate::data::ChatTemplate;
use crate::error::{Error, Result};
use crate::progress::Progress;

/// Seed with which lm-evaluation-harness draws examples.
const SEED: u64 = 1234;

/// How a task is run.
#[derive(Clone, Debug)]
pub struct EvaluateOptions {
    /// Number of documents, the first ones; `None` for all.
    pub limit: Option<usize>,
    /// Number of examples in each prompt; `None` for the task's own. A task whose description says 0
    /// keeps 0, as in the harness.
    pub num_fewshot: Option<usize>,
    /// Seed with which examples are drawn.
    pub seed: u64,
    /// Chat template in which prompts are written; `None` for plain text.
    pub chat: Option<ChatTemplate>,
    /// Whether each example is a turn of the user and one of the assistant; else all of the prompt is
    /// one turn.
    pub fewshot_as_multiturn: bool,
    /// Text of the system, before the task's description.
    pub system: Option<String>,
    /// Largest number of new tokens of a continuation, in the place of the task's.
    pub max_gen_toks: Option<usize>,
}

impl Default for EvaluateOptions {
    fn default() -> Self {
        Self {
            limit: None,
            num_fewshot: None,
            seed: SEED,
            chat: None,
            fewshot_as_multiturn: false,
            system: None,
            max_gen_toks: None,
        }
    }
}

impl EvaluateOptions {
    setters! {
        with_limit(limit: Option<usize>);
        with_num_fewshot(num_fewshot: Option<usize>);
        with_seed(seed: u64);
        with_chat(chat: Option<ChatTemplate>);
        with_fewshot_as_multiturn(fewshot_as_multiturn: bool);
        with_system(system: Option<String>);
        with_max_gen_toks(max_gen_toks: Option<usize>);
    }
}

/// A score of a task.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Score {
    /// The metric.
    pub metric: String,
    /// The filter of the outputs; `none` without one.
    pub filter: String,
    /// The score. A fraction of right answers is in 0..=1.
    pub value: f64,
    /// Standard error of a mean: the sample's standard deviation over the root of the number of
    /// documents. `None` for one document, and for perplexities.
    pub stderr: Option<f64>,
}

/// What was asked about a document, what the model said, and what was right, in JSON.
pub type SampleLog = Value;

/// The result of a task.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskReport {
    /// Name of the task.
    pub task: String,
    /// Version of the task in the harness, if it has one.
    pub version: Option<String>,
    /// Number of examples in each prompt.
    pub num_fewshot: usize,
    /// Number of documents.
    pub n_documents: usize,
    /// The scores.
    pub scores: Vec<Score>,
    /// Wall-clock time that the model took, in seconds.
    pub seconds: f64,
    /// One entry for each document.
    #[serde(skip)]
    pub samples: Vec<SampleLog>,
}

impl TaskReport {
    /// The score that stands for the task in a mean of several: `acc_norm` if there is one, else the
    /// last one of a continuation's filters, else the first.
    pub fn main_score(&self) -> Option<&Score> {
        let named = |name: &str| self.scores.iter().find(|score| score.metric == name);
        let matched = |score: &&Score| score.metric.ends_with("_match");
        named("acc_norm")
            .or_else(|| self.scores.iter().rfind(matched))
            .or_else(|| self.scores.first())
    }

    /// Writes the samples as JSON Lines.
    ///
    /// # Errors
    /// Returns the error of the writer.
    pub fn write_samples(&self, writer: &mut dyn Write) -> std::io::Result<()> {
        self.samples
            .iter()
            .try_for_each(|sample| writeln!(writer, "{sample}"))
    }
}

/// Evaluates a model on a task.
///
/// # Errors
/// Returns [`Error::InvalidArgument`] if there are no documents, or fewer rows of examples than
/// asked for, [`Error::InvalidRecord`] with the number of a row that does not have the task's form,
/// the errors of the model, and [`Error::Interrupted`].
pub fn evaluate(
    model: &mut dyn LanguageModel,
    spec: &TaskSpec,
    data: &TaskData,
    options: &EvaluateOptions,
    progress: &dyn Progress,
) -> Result<TaskReport> {
    let n_examples = match (spec.output_type, spec.num_fewshot, options.num_fewshot) {
        (OutputType::LoglikelihoodRolling, ..) | (_, Some(0), _) => 0,
        (_, own, wanted) => wanted.or(own).unwrap_or(0),
    };
    let n = options
        .limit
        .unwrap_or(usize::MAX)
        .min(data.documents.len());
    if n == 0 {
        let expected = format!("at least one, of the task {}", spec.task);
        return Err(Error::argument("documents", 0, expected));
    }
    let prompts = PromptOptions {
        n_examples,
        seed: options.seed,
        chat: options.chat.as_ref(),
        turns: options.fewshot_as_multiturn,
        system: options.system.as_deref(),
    };
    let mut prompter = Prompter::new(spec, data, prompts)?;
    let documents = data.documents[..n].iter().enumerate();
    let questions: Vec<Question> = documents
        .map(|(index, document)| prompter.question(index, document))
        .collect::<Result<_>>()?;
    let filters = filters(spec)?;
    let started = Instant::now();
    let asked = match spec.output_type {
        OutputType::MultipleChoice => choices(model, spec, &questions, progress)?,
        OutputType::GenerateUntil => {
            let limit = options
                .max_gen_toks
                .unwrap_or(spec.generation_kwargs.max_gen_toks);
            generated(model, spec, &filters, &questions, limit, progress)?
        }
        OutputType::LoglikelihoodRolling => rolling(model, spec, &questions, progress)?,
    };
    let seconds = started.elapsed().as_secs_f64();
    let with_place = |(index, mut sample): (usize, SampleLog)| {
        sample["task"] = spec.task.clone().into();
        sample["doc_id"] = index.into();
        sample["doc"] = data.documents[index].clone().into();
        sample
    };
    Ok(TaskReport {
        task: spec.task.clone(),
        version: spec.version(),
        num_fewshot: n_examples,
        n_documents: n,
        scores: asked.scores,
        seconds,
        samples: asked
            .samples
            .into_iter()
            .enumerate()
            .map(with_place)
            .collect(),
    })
}

/// Scores and samples of a task.
struct Asked {
    scores: Vec<Score>,
    samples: Vec<SampleLog>,
}

/// Returns the filters of a task with their names.
fn filters(spec: &TaskSpec) -> Result<Vec<(String, Filter)>> {
    let named = spec.filter_list.iter();
    let mut all: Vec<(String, Filter)> = named
        .map(|filter| Ok((filter.name.clone(), Filter::new(&filter.filter)?)))
        .collect::<Result<_>>()?;
    if all.is_empty() {
        all.push(("none".into(), Filter::new(&[])?));
    }
    Ok(all)
}

/// Returns the mean of some numbers with its standard error.
fn mean(metric: &str, filter: &str, values: &[f64]) -> Score {
    let n = values.len() as f64;
    let value = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|x| (x - value).powi(2)).sum();
    Score {
        metric: metric.into(),
        filter: filter.into(),
        value,
        stderr: (values.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt()),
    }
}

fn count_checked(found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::ShapeMismatch {
        what: "results of a model".into(),
        expected: vec![expected],
        found: vec![found],
    })
}

fn choices(
    model: &mut dyn LanguageModel,
    spec: &TaskSpec,
    questions: &[Question],
    progress: &dyn Progress,
) -> Result<Asked> {
    let mut requests = Vec::new();
    for question in questions {
        if let Question::Choices {
            contexts,
            continuations,
            ..
        } = question
        {
            let pairs = contexts.iter().zip(continuations);
            requests.extend(pairs.map(|(context, text)| Continuation {
                context: context.clone(),
                text: text.clone(),
            }));
        }
    }
    let scores = model.log_likelihoods(&requests, progress)?;
    count_checked(scores.len(), requests.len())?;
    let mut scores = scores.into_iter();
    let (mut samples, mut right) = (Vec::new(), vec![Vec::new(); spec.metric_list.len()]);
    for question in questions {
        let Question::Choices {
            contexts,
            continuations,
            choices,
            gold,
        } = question
        else {
            continue;
        };
        let found: Vec<LogLikelihood> = scores.by_ref().take(choices.len()).collect();
        let best = |metric: &str| {
            let of = |(score, choice): (&LogLikelihood, &String)| match metric {
                "acc_norm" => score.sum / choice.chars().count() as f64,
                "acc_bytes" => score.sum / choice.len() as f64,
                _ => score.sum,
            };
            let scores: Vec<f64> = found.iter().zip(choices).map(of).collect();
            first_largest(&scores)
        };
        let mut sample = json!({
            "prompts": if spec.multiple_input { contexts.as_slice() } else { &contexts[..1] },
            "continuations": continuations,
            "log_likelihoods": found.iter().map(|s| s.sum).collect::<Vec<_>>(),
            "n_tokens": found.iter().map(|s| s.n_tokens).collect::<Vec<_>>(),
            "is_greedy": found.iter().map(|s| s.is_greedy).collect::<Vec<_>>(),
            "gold": gold,
        });
        for (metric, right) in spec.metric_list.iter().zip(&mut right) {
            let is_right = Some(best(&metric.metric)) == *gold;
            sample[&metric.metric] = u8::from(is_right).into();
            right.push(f64::from(u8::from(is_right)));
        }
        samples.push(sample);
    }
    let metrics = spec.metric_list.iter().zip(&right);
    let scores = metrics.map(|(metric, right)| mean(&metric.metric, "none", right));
    Ok(Asked {
        scores: scores.collect(),
        samples,
    })
}

/// Returns the index of the largest number, the first one of several. Like NumPy's `argmax`, the
/// first that is not a number is the largest.
fn first_largest(values: &[f64]) -> usize {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if value.is_nan() {
            return index;
        }
        if *value > values[best] {
            best = index;
        }
    }
    best
}

fn generated(
    model: &mut dyn LanguageModel,
    spec: &TaskSpec,
    filters: &[(String, Filter)],
    questions: &[Question],
    max_new_tokens: usize,
    progress: &dyn Progress,
) -> Result<Asked> {
    let prompt = |question: &Question| match question {
        Question::Generate { prompt, .. } => Some(Prompt {
            text: prompt.clone(),
            stops: spec.generation_kwargs.until.clone(),
            max_new_tokens,
        }),
        _ => None,
    };
    let requests: Vec<Prompt> = questions.iter().filter_map(prompt).collect();
    let outputs = model.generate(&requests, progress)?;
    count_checked(outputs.len(), requests.len())?;
    let metrics: Vec<Match> = spec
        .metric_list
        .iter()
        .map(Match::new)
        .collect::<Result<_>>()?;
    let mut right = vec![vec![Vec::new(); metrics.len()]; filters.len()];
    let mut samples = Vec::new();
    for ((question, output), request) in questions.iter().zip(&outputs).zip(&requests) {
        let Question::Generate { gold, .. } = question else {
            continue;
        };
        let mut results = Vec::new();
        for ((name, filter), right) in filters.iter().zip(&mut right) {
            let answer = filter.apply(output)?;
            let mut result = json!({ "filter": name, "answer": answer });
            for ((metric, spec), right) in metrics.iter().zip(&spec.metric_list).zip(right) {
                let is_right = gold.iter().any(|gold| metric.is_match(&answer, gold));
                result[&spec.metric] = u8::from(is_right).into();
                right.push(f64::from(u8::from(is_right)));
            }
            results.push(result);
        }
        samples.push(json!({
            "prompt": request.text, "output": output, "gold": gold, "filtered": results,
        }));
    }
    let mut scores = Vec::new();
    for ((name, _), right) in filters.iter().zip(&right) {
        let of_metrics = spec.metric_list.iter().zip(right);
        scores.extend(of_metrics.map(|(metric, right)| mean(&metric.metric, name, right)));
    }
    Ok(Asked { scores, samples })
}

fn rolling(
    model: &mut dyn LanguageModel,
    spec: &TaskSpec,
    questions: &[Question],
    progress: &dyn Progress,
) -> Result<Asked> {
    let (mut texts, mut counts) = (Vec::new(), Vec::new());
    for question in questions {
        if let Question::Rolling { text, counted } = question {
            texts.push(text.clone());
            counts.push((n_words(counted), counted.len()));
        }
    }
    let found = model.rolling_log_likelihoods(&texts, progress)?;
    count_checked(found.len(), texts.len())?;
    let sum: f64 = found.iter().map(|score| score.sum).sum();
    let words = counts.iter().map(|(words, _)| words).sum::<usize>() as f64;
    let bytes = counts.iter().map(|(_, bytes)| bytes).sum::<usize>() as f64;
    let score = |metric: &String| Score {
        metric: metric.clone(),
        filter: "none".into(),
        value: match metric.as_str() {
            "word_perplexity" => (-sum / words).exp(),
            "byte_perplexity" => (-sum / bytes).exp(),
            _ => -sum / bytes / std::f64::consts::LN_2,
        },
        stderr: None,
    };
    let sample = |((text, score), (words, bytes)): ((&String, &LogLikelihood), &(usize, usize))| {
        json!({
            "text": text, "log_likelihood": score.sum, "n_tokens": score.n_tokens,
            "words": words, "bytes": bytes,
        })
    };
    Ok(Asked {
        scores: spec
            .metric_list
            .iter()
            .map(|spec| score(&spec.metric))
            .collect(),
        samples: texts.iter().zip(&found).zip(&counts).map(sample).collect(),
    })
}

/// Returns the number of parts into which white space cuts a text, empty ones included.
fn n_words(text: &str) -> usize {
    let mut words = 1;
    let mut inside = false;
    for c in text.chars() {
        let space = is_space(c);
        words += usize::from(space && !inside);
        inside = space;
    }
    words
}
