//! Exact match: problems with a final answer, and how many of them a model solves.

use serde::{Deserialize, Serialize};

use crate::data::{Misfit, Record, Template, TextTokenizer, answers};
use crate::error::{Error, Result};
use crate::model::{Decoder, generate_batch};
use crate::progress::Progress;
use crate::runtime::{GenerateConfig, Session, generate_many};

/// Result of exact match on problems with a final answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExactMatch {
    /// Number of problems whose generated final answer equals the reference's.
    pub correct: usize,
    /// Number of problems.
    pub total: usize,
    /// Scores of lm-evaluation-harness, if all problems have GSM8K's form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gsm8k: Option<Gsm8k>,
}

/// Numbers of problems that lm-evaluation-harness counts as correct in its task `gsm8k`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gsm8k {
    /// By the first number after `#### ` (`strict-match`).
    pub strict: usize,
    /// By the last number of the output (`flexible-extract`).
    pub flexible: usize,
}

impl ExactMatch {
    /// Counts the correct answers.
    pub fn new(answers: &[Answer]) -> Self {
        let mut gsm8k = (!answers.is_empty()).then(Gsm8k::default);
        for answer in answers {
            gsm8k = match (gsm8k, answer.gsm8k) {
                (Some(counts), Some((strict, flexible))) => Some(Gsm8k {
                    strict: counts.strict + usize::from(strict),
                    flexible: counts.flexible + usize::from(flexible),
                }),
                _ => None,
            };
        }
        Self {
            correct: answers.iter().filter(|answer| answer.correct).count(),
            total: answers.len(),
            gsm8k,
        }
    }

    /// Fraction of correct answers, in 0..=1.
    pub fn accuracy(&self) -> f64 {
        if self.total == 0 {
            0.0
        } else {
            self.correct as f64 / self.total as f64
        }
    }
}

/// What a model wrote to a problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Number of the record, from 1.
    pub record: usize,
    /// The generated text.
    pub output: String,
    /// The final answer of the record.
    pub reference: String,
    /// Whether the final answer of the output equals the reference.
    pub correct: bool,
    /// Whether lm-evaluation-harness counts the output as correct by `strict-match` and by
    /// `flexible-extract`, if the record has GSM8K's form.
    pub gsm8k: Option<(bool, bool)>,
}

#[derive(Clone, Debug)]
struct Problem {
    record: usize,
    prompt: Vec<u32>,
    reference: String,
    /// GSM8K's worked answer.
    gsm8k: Option<String>,
}

/// A set of problems, formatted as prompts and tokenized.
#[derive(Clone, Debug)]
pub struct ProblemSet {
    problems: Vec<Problem>,
    left_out: Vec<Misfit>,
}

impl ProblemSet {
    /// Formats records with a final answer ([`Record::final_answer`]) as prompts. Those without one,
    /// and those that the chat template refuses, are left out; see [`left_out`](Self::left_out).
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if there are records, and none has a final answer, and
    /// the errors of [`Template::prompt_ids`].
    pub fn new(
        records: &[Record],
        template: impl Into<Template>,
        tokenizer: &TextTokenizer,
    ) -> Result<Self> {
        let template = template.into();
        let mut set = Self {
            problems: Vec::with_capacity(records.len()),
            left_out: Vec::new(),
        };
        for (index, record) in records.iter().enumerate() {
            let number = index + 1;
            let Some(reference) = record.final_answer() else {
                set.left_out.push(Misfit {
                    record: number,
                    reason: record.without_answer().into(),
                });
                continue;
            };
            let prompt = match template.prompt_ids(record, tokenizer) {
                Ok(prompt) => prompt,
                Err(Error::Template { reason, .. }) => {
                    set.left_out.push(Misfit {
                        record: number,
                        reason,
                    });
                    continue;
                }
                Err(error) => return Err(error),
            };
            set.problems.push(Problem {
                record: number,
                prompt,
                reference,
                gsm8k: record.gsm8k_solution().map(str::to_string),
            });
        }
        set.checked()
    }

    /// Leaves out the problems whose prompt has more than `max_tokens` tokens.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if none is left.
    pub fn with_max_prompt(mut self, max_tokens: usize) -> Result<Self> {
        let (kept, longer): (Vec<_>, Vec<_>) = self
            .problems
            .into_iter()
            .partition(|problem| problem.prompt.len() <= max_tokens);
        self.problems = kept;
        self.left_out.extend(longer.iter().map(|problem| Misfit {
            record: problem.record,
            reason: format!(
                "its prompt has {} tokens, more than {max_tokens}",
                problem.prompt.len()
            ),
        }));
        self.left_out.sort_by_key(|left| left.record);
        self.checked()
    }

    fn checked(self) -> Result<Self> {
        match (self.problems.first(), self.left_out.first()) {
            (None, Some(first)) => {
                let found = format!("{} of them", self.left_out.len());
                let expected = format!("one at least that can be answered and compared; {first}");
                Err(Error::argument("records", found, expected))
            }
            _ => Ok(self),
        }
    }

    /// The records that are left out, in their order.
    pub fn left_out(&self) -> &[Misfit] {
        &self.left_out
    }

    /// Number of problems.
    pub fn len(&self) -> usize {
        self.problems.len()
    }

    /// Whether there are no problems.
    pub fn is_empty(&self) -> bool {
        self.problems.is_empty()
    }

    /// Number of tokens in the longest prompt.
    pub fn longest_prompt(&self) -> usize {
        let lengths = self.problems.iter().map(|problem| problem.prompt.len());
        lengths.max().unwrap_or(0)
    }

    /// The prompts, in the order of [`answers`](Self::answers).
    pub fn prompts(&self) -> impl Iterator<Item = &[u32]> {
        self.problems
            .iter()
            .map(|problem| problem.prompt.as_slice())
    }

    /// Generates an answer to each problem and counts the correct ones.
    ///
    /// # Errors
    /// Returns the errors of [`answers`](Self::answers).
    pub fn exact_match(
        &self,
        model: &Decoder,
        tokenizer: &TextTokenizer,
        config: &GenerateConfig,
        progress: &dyn Progress,
    ) -> Result<ExactMatch> {
        let answers = self.answers(model, tokenizer, config, progress)?;
        Ok(ExactMatch::new(&answers))
    }

    /// Generates an answer to each problem.
    ///
    /// # Errors
    /// Returns the errors of [`generate_batch`], and [`Error::Tokenizer`].
    pub fn answers(
        &self,
        model: &Decoder,
        tokenizer: &TextTokenizer,
        config: &GenerateConfig,
        progress: &dyn Progress,
    ) -> Result<Vec<Answer>> {
        let outputs = generate_batch(model, &self.owned_prompts(), config, progress)?;
        self.judged(&outputs, tokenizer)
    }

    /// Like [`answers`](Self::answers), on sessions of the runtime; see [`generate_many`]. The
    /// subnet of the sessions and the formats of their model apply.
    ///
    /// # Errors
    /// Returns the errors of [`generate_many`], and [`Error::Tokenizer`].
    pub fn session_answers(
        &self,
        sessions: &mut [Session],
        tokenizer: &TextTokenizer,
        config: &GenerateConfig,
        progress: &dyn Progress,
    ) -> Result<Vec<Answer>> {
        let outputs = generate_many(sessions, &self.owned_prompts(), config, progress)?;
        self.judged(&outputs, tokenizer)
    }

    fn owned_prompts(&self) -> Vec<Vec<u32>> {
        self.prompts().map(<[u32]>::to_vec).collect()
    }

    fn judged(&self, outputs: &[Vec<u32>], tokenizer: &TextTokenizer) -> Result<Vec<Answer>> {
        let judge = |(problem, output): (&Problem, &Vec<u32>)| {
            let output = tokenizer.decode(output)?;
            let gsm8k = problem.gsm8k.as_deref();
            Ok(Answer {
                record: problem.record,
                correct: answers::exact_match(&output, &problem.reference),
                gsm8k: gsm8k.map(|solution| {
                    let strict = answers::strict(&output, solution);
                    (strict, answers::flexible(&output, solution))
                }),
                output,
                reference: problem.reference.clone(),
            })
        };
        self.problems.iter().zip(outputs).map(judge).collect()
    }
}
