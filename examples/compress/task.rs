//! The model and the data sets of a run.

use burn::tensor::Device;
use elastic_lora::data::{
    Batch, Record, Sequence, Template, TokenizeOptions, calibration_samples, fixed_batches,
    join_documents, pack, tokenize_records,
};
use elastic_lora::eval::ProblemSet;
use elastic_lora::model::Pretrained;
use elastic_lora::{Error, Result};
use serde_json::{Map, Value};

use crate::common::arithmetic::{self, Kind, Problem, Split};
use crate::{Args, SearchMetric, common};

/// Problems with two steps: three kinds that are rare in the training data of the bundled model,
/// and three combinations that do not occur in it.
const KINDS: [(Kind, f64); 6] = [
    (Kind::MulAdd, 1.0),
    (Kind::MulSub, 1.0),
    (Kind::Times, 1.0),
    (Kind::ShareAdd, 1.0),
    (Kind::SubShare, 1.0),
    (Kind::AddMul, 1.0),
];

/// Number of calibration sequences, and their maximum length.
const CALIBRATION: (usize, usize) = (128, 2048);

pub struct Task {
    pub pretrained: Pretrained,
    pub train: Vec<Sequence>,
    pub valid: Vec<Batch>,
    pub test: Vec<Batch>,
    /// Test problems, if they have final answers.
    pub problems: Option<ProblemSet>,
    /// Validation problems, if they have final answers.
    pub valid_problems: Option<ProblemSet>,
    pub calibration: Vec<Vec<u32>>,
    pub max_new_tokens: usize,
}

impl Task {
    pub fn load(args: &Args, device: &Device) -> Result<Self> {
        let shipped = common::shipped_model();
        let folder = args.model.as_ref().unwrap_or(&shipped);
        let mut pretrained = Pretrained::open(folder, device)?;
        common::show_notices(&pretrained.notices());
        pretrained.model = pretrained.model.with_weight_dtype(args.weights.into())?;
        let (train, valid, test) = match (&args.train, &args.valid) {
            (Some(train), Some(valid)) => {
                let test = args.test.as_ref().unwrap_or(valid);
                let load = |path| common::load_records(path, args.plain_text);
                let sets = (load(train)?, load(valid)?, load(test)?);
                if args.test.is_none() {
                    eprintln!(
                        "no --test: the searched subnet is chosen and measured on the same file"
                    );
                }
                sets
            }
            _ => {
                let draw = |split, n| -> Result<Vec<Record>> {
                    let problems = arithmetic::mixture(&KINDS, split, n, args.seed)?;
                    Ok(problems.into_iter().map(Problem::into_record).collect())
                };
                (
                    draw(Split::Train, 12_000)?,
                    draw(Split::Valid, 384)?,
                    draw(Split::Test, 1200)?,
                )
            }
        };

        let context = pretrained.model.config().max_position_embeddings();
        let max_len = args.max_len.unwrap_or(context.min(512));
        if max_len > context {
            return Err(Error::SequenceTooLong {
                what: "--max-len".into(),
                found: max_len,
                max: context,
            });
        }
        let options = TokenizeOptions::new(max_len)
            .with_mask_prompt(!args.train_on_inputs)
            .with_truncate(true);
        let template = Template::for_model(&args.template, folder)?;
        common::show_examples(&train, &template, args.show)?;
        let tokenizer = &pretrained.tokenizer;
        let sequences = |records: &[Record]| -> Result<Vec<Sequence>> {
            if records
                .iter()
                .all(|record| matches!(record, Record::Text { .. }))
            {
                let texts: Vec<String> = records
                    .iter()
                    .map(|record| Ok(template.render(record)?.text))
                    .collect::<Result<_>>()?;
                return pack(&join_documents(&texts, tokenizer, true)?, max_len);
            }
            let set = tokenize_records(records, &template, tokenizer, &options)?;
            if set.truncated > 0 {
                eprintln!(
                    "{} of {} records were cut to {max_len} tokens",
                    set.truncated,
                    records.len()
                );
            }
            Ok(set.sequences)
        };
        let pad = pretrained.pad_id();
        let batches = |records: &[Record]| fixed_batches(&sequences(records)?, 32, pad);
        let documents: Vec<String> = train
            .iter()
            .map(|record| Ok(template.render(record)?.text))
            .collect::<Result<_>>()?;
        let problems = |what: &str, records: &[Record]| -> Result<Option<ProblemSet>> {
            let answered = records
                .iter()
                .filter(|record| record.final_answer().is_some())
                .count();
            // A few short answers among texts do not make problems of them.
            if 2 * answered < records.len() {
                if answered > 0 {
                    let n = records.len();
                    eprintln!(
                        "notice: {answered} of {n} {what} records have a final answer, too few \
                         for an accuracy"
                    );
                }
                return Ok(None);
            }
            let problems = ProblemSet::new(records, &template, tokenizer)?
                .with_max_prompt(context.saturating_sub(1))?;
            if let Some(notice) = problems.notice() {
                eprintln!("notice: {what} set: {notice}");
            }
            Ok(Some(problems))
        };
        let answers = test
            .iter()
            .filter(|record| record.final_answer().is_some())
            .map(|record| tokenizer.encode(&template.answer(record), false));
        let valid_problems = problems("validation", &valid)?;
        let problems = match (&args.train, &args.test) {
            (Some(_), None) => valid_problems.clone(),
            _ => problems("test", &test)?,
        };
        if args.metric == SearchMetric::Accuracy && valid_problems.is_none() {
            return Err(Self::no_answers());
        }
        let longest_answer = answers
            .collect::<Result<Vec<_>>>()?
            .iter()
            .map(Vec::len)
            .max()
            .unwrap_or(0);
        let train = sequences(&train)?;
        // If the data set has fewer tokens than the context, calibration uses one short sample.
        let tokens: usize = train.iter().map(Sequence::len).sum();
        let sample_len = context
            .min(CALIBRATION.1)
            .min(tokens.saturating_sub(documents.len()).max(1));
        Ok(Self {
            train,
            valid: batches(&valid)?,
            test: batches(&test)?,
            problems,
            valid_problems,
            calibration: calibration_samples(
                &documents,
                tokenizer,
                CALIBRATION.0,
                sample_len,
                args.seed,
            )?,
            // Allows answers that are half as long again as the longest expected one.
            max_new_tokens: (longest_answer * 3 / 2 + 8).min(context),
            pretrained,
        })
    }

    /// Returns the error for a search by accuracy without answers.
    pub fn no_answers() -> Error {
        Error::argument(
            "metric",
            "accuracy",
            "the validation set has too few records with a final answer; search by loss instead",
        )
    }

    /// Returns fingerprints of the inputs, which show whether a resumed run reads the same inputs
    /// as the original. The model is represented by its first and last layer.
    pub fn fingerprints(&self) -> Map<String, Value> {
        let layers: Vec<_> = self.pretrained.model.linears().collect();
        let ends = layers.first().into_iter().chain(layers.last());
        let weights = ends
            .flat_map(|(_, layer)| layer.base.to_matrix().into_vec())
            .map(f32::to_bits);
        let sequence = |s: &Sequence| s.ids.iter().copied().chain([u32::MAX]).collect::<Vec<_>>();
        let tokens = |batches: &[Batch]| {
            fingerprint(batches.iter().flat_map(|batch| batch.ids.iter().copied()))
        };
        let prints = [
            ("model", fingerprint(weights)),
            (
                "training data",
                fingerprint(self.train.iter().flat_map(sequence)),
            ),
            ("validation data", tokens(&self.valid)),
            ("test data", tokens(&self.test)),
        ];
        prints
            .into_iter()
            .map(|(name, print)| (name.to_string(), Value::String(print)))
            .collect()
    }
}

/// FNV-1a hash over words. It is not secure against manipulation, but detects files that were
/// swapped by mistake.
pub fn fingerprint(words: impl Iterator<Item = u32>) -> String {
    let hash = words.fold(0xcbf2_9ce4_8422_2325u64, |hash, word| {
        (hash ^ u64::from(word)).wrapping_mul(0x100_0000_01b3)
    });
    format!("{hash:016x}")
}
