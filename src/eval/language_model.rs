//! A decoder on Burn as a model that tasks are run on.

use burn::tensor::Tensor;

use crate::error::{Error, Result};
use crate::kernels::Level;
use crate::kernels::rows::log_sum_exp;
use crate::model::{Pretrained, generate_batch};
use crate::nn::host_values;
use crate::progress::{Progress, Task};
use crate::tasks::{Continuation, Encoder, LanguageModel, LogLikelihood, Prompt, Scored, cut};

/// Number of rows of logits that are held at once.
const ROWS: usize = 64;

impl Pretrained {
    fn encoder(&self) -> Encoder<'_> {
        Encoder::new(
            &self.tokenizer,
            self.model.config().max_position_embeddings(),
        )
    }

    fn score(&self, sequences: &[Scored], progress: &dyn Progress) -> Result<Vec<LogLikelihood>> {
        let mut task = Task::begin(progress, "score", sequences.len(), "requests")?;
        let level = Level::detect();
        let vocab_size = self.model.config().vocab_size();
        let mut score = |sequence: &Scored| {
            let input = self.model.tokens(sequence.input(), 1)?;
            let hidden: Tensor<2> = self.model.hidden_states(input, None).flatten(0, 1);
            let mut total = LogLikelihood {
                sum: 0.0,
                is_greedy: true,
                n_tokens: sequence.n_scored,
            };
            let mut at = sequence.first_row();
            while at < sequence.input().len() {
                let n = (sequence.input().len() - at).min(ROWS);
                let logits = host_values(self.model.logits(hidden.clone().narrow(0, at, n)));
                let next = &sequence.tokens[at + 1..=at + n];
                for (row, token) in logits.chunks_exact(vocab_size).zip(next) {
                    let Some(logit) = row.get(*token as usize) else {
                        return Err(Error::TokenOutOfRange {
                            found: *token,
                            vocab_size,
                        });
                    };
                    total.sum += f64::from(logit - log_sum_exp(level, row));
                    let first = row.iter().position(|other| other >= logit);
                    let larger = row.iter().any(|other| other > logit);
                    total.is_greedy &= !larger && first == Some(*token as usize);
                }
                at += n;
            }
            task.step("")?;
            Ok(total)
        };
        sequences.iter().map(&mut score).collect()
    }
}

/// Computes on Burn, one request after another. [`RuntimeModel`](crate::tasks::RuntimeModel) computes
/// what requests have in common once;
/// [`Model::from_supernet`](crate::runtime::Model::from_supernet) makes a model for it of one in
/// memory.
impl LanguageModel for Pretrained {
    fn log_likelihoods(
        &mut self,
        requests: &[Continuation],
        progress: &dyn Progress,
    ) -> Result<Vec<LogLikelihood>> {
        let encoder = self.encoder();
        let pair = |request: &Continuation| encoder.pair(&request.context, &request.text);
        let sequences: Vec<Scored> = requests.iter().map(pair).collect::<Result<_>>()?;
        self.score(&sequences, progress)
    }

    /// Generates up to the largest number of tokens of all requests, and cuts at the stop strings
    /// afterwards.
    fn generate(&mut self, requests: &[Prompt], progress: &dyn Progress) -> Result<Vec<String>> {
        let encoder = self.encoder();
        let prompt = |request: &Prompt| encoder.prompt(&request.text, request.max_new_tokens);
        let prompts: Vec<Vec<u32>> = requests.iter().map(prompt).collect::<Result<_>>()?;
        let most = requests.iter().map(|request| request.max_new_tokens).max();
        let config = self.generate_config(most.unwrap_or(0));
        let outputs = generate_batch(&self.model, &prompts, &config, progress)?;
        let text = |(request, ids): (&Prompt, &Vec<u32>)| {
            let own = &ids[..ids.len().min(request.max_new_tokens)];
            let text = self.tokenizer.decode(own)?;
            Ok(cut(&text, &encoder.stops(request)?).to_string())
        };
        requests.iter().zip(&outputs).map(text).collect()
    }

    fn rolling_log_likelihoods(
        &mut self,
        texts: &[String],
        progress: &dyn Progress,
    ) -> Result<Vec<LogLikelihood>> {
        let score = |windows: &[Scored]| self.score(windows, progress);
        self.encoder().rolling_scores(texts, score)
    }
}
