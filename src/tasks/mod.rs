//! Benchmarks with the prompts, metrics and numbers of lm-evaluation-harness 0.4.13 and of
//! LLM-Adapters, for any model that gives log-likelihoods and text.
//!
//! A [`TaskSpec`] describes a task as data: how a row of a file becomes a prompt, what the choices
//! are, and what counts as right. [`TaskSpec::builtin`] has those of the papers; a JSON file has the
//! user's own. [`TaskData`] holds the rows. [`evaluate`] asks a [`LanguageModel`], which
//! [`RuntimeModel`] is for every [`Model`](crate::runtime::Model) of the runtime: folders, bundles
//! and GGUF files, in any format, with a subnet or adapters.
//!
//! ```no_run
//! use elastic_lora::progress::Silent;
//! use elastic_lora::runtime::{Model, ModelOptions, Session, SessionConfig};
//! use elastic_lora::tasks::{EvaluateOptions, RuntimeModel, TaskSpec, evaluate};
//!
//! # fn main() -> elastic_lora::Result<()> {
//! let model = Model::open("qwen.gguf", &ModelOptions::default())?;
//! let mut model = RuntimeModel::new(Session::new(&model, &SessionConfig::default())?)?;
//! let task = TaskSpec::builtin("arc_easy")?;
//! let data = task.load("data")?;
//! let options = EvaluateOptions::default().with_limit(Some(200));
//! let report = evaluate(&mut model, &task, &data, &options, &Silent)?;
//! for score in &report.scores {
//!     println!("{} {:.4}", score.metric, score.value);
//! }
//! # Ok(())
//! # }
//! ```

mod builtin;
mod decode;
mod encode;
mod evaluate;
mod filter;
mod language_model;
mod load;
mod pattern;
mod perplexity;
mod prefix;
mod prompt;
mod random;
mod runtime_model;
mod spec;
mod template;
#[cfg(test)]
mod tests;

pub(crate) use decode::cut;
pub(crate) use encode::{Encoder, Scored};
pub use evaluate::{EvaluateOptions, SampleLog, Score, TaskReport, evaluate};
pub use language_model::{Continuation, LanguageModel, LogLikelihood, Prompt};
pub use load::{Row, TaskData};
pub use perplexity::{WindowRule, WindowedPerplexity, windowed_perplexity};
pub use runtime_model::RuntimeModel;
pub use spec::{
    FewshotConfig, FilterSpec, FilterStep, GenerationSettings, MetricSpec, OutputType, Sampler,
    TaskSpec,
};
