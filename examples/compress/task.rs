//! The model and the data sets of a run.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use elastic_lora::data::{
    Batch, Batcher, CalibrationSize, Record, Sequence, Template, TextTokenizer, TokenizeOptions,
    calibration_windows, fixed_batches, join_documents, pack, tokenize_records,
};
use elastic_lora::eval::ProblemSet;
use elastic_lora::model::{Decoder, Pretrained};
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

/// Records with the file that they are from.
struct Source {
    name: String,
    records: Vec<Record>,
}

impl Source {
    fn open(path: &Path, plain_text: bool) -> Result<Self> {
        Ok(Self {
            name: path.display().to_string(),
            records: common::load_records(path, plain_text)?,
        })
    }

    fn generated(split: Split, n: usize, seed: u64) -> Result<Self> {
        let problems = arithmetic::mixture(&KINDS, split, n, seed)?;
        Ok(Self {
            name: "generated problems".into(),
            records: problems.into_iter().map(Problem::into_record).collect(),
        })
    }

    /// Tokenizes the records. Plain text is joined and cut into sequences.
    fn sequences(
        &self,
        template: &Template,
        tokenizer: &TextTokenizer,
        options: &TokenizeOptions,
    ) -> Result<Vec<Sequence>> {
        let records = &self.records;
        let is_text = |record: &Record| matches!(record, Record::Text { .. });
        if records.iter().all(is_text) {
            let texts = self.texts(template)?;
            return pack(&join_documents(&texts, tokenizer, true)?, options.max_len);
        }
        let set = tokenize_records(records, template, tokenizer, options)
            .map_err(|error| self.named(error))?;
        let cut = format!("are cut to {} tokens", options.max_len);
        common::show_misfits(&self.name, &cut, &set.truncated, records.len());
        common::show_misfits(&self.name, "are left out", &set.left_out, records.len());
        Ok(set.sequences)
    }

    /// The records as texts, without those that the template refuses.
    fn texts(&self, template: &Template) -> Result<Vec<String>> {
        let (mut texts, mut refused) = (Vec::new(), None);
        for record in &self.records {
            match template.render(record) {
                Ok(rendered) => texts.push(rendered.text),
                Err(error @ Error::Template { .. }) => refused = Some(error),
                Err(error) => return Err(self.named(error)),
            }
        }
        match refused {
            Some(error) if texts.is_empty() => Err(self.named(error)),
            _ => Ok(texts),
        }
    }

    /// The problems: records with a final answer, whose prompts are shorter than `context`. Returns
    /// `None` if fewer than half of the records have a final answer: a few short answers among texts
    /// do not make problems of them.
    fn problems(
        &self,
        template: &Template,
        tokenizer: &TextTokenizer,
        context: usize,
    ) -> Result<Option<ProblemSet>> {
        let (name, total) = (&self.name, self.records.len());
        let has_answer = |record: &&Record| record.final_answer().is_some();
        let answered = self.records.iter().filter(has_answer).count();
        if 2 * answered < total {
            if answered > 0 {
                eprintln!(
                    "notice: {name}: {answered} of {total} records have a final answer, too few \
                     for an accuracy"
                );
            }
            return Ok(None);
        }
        let problems = ProblemSet::new(&self.records, template, tokenizer)
            .and_then(|problems| problems.with_max_prompt(context.saturating_sub(1)))
            .map_err(|error| self.named(error))?;
        let fate = "are not counted in the accuracy";
        common::show_misfits(name, fate, problems.left_out(), total);
        Ok(Some(problems))
    }

    /// Adds the file's name to an error about its records.
    fn named(&self, error: Error) -> Error {
        match error {
            Error::InvalidArgument {
                name: "records",
                found,
                expected,
            } => Error::InvalidArgument {
                name: "records",
                found: format!("{found}, in {}", self.name),
                expected,
            },
            other => other,
        }
    }
}

/// Draws the calibration samples. Returns them with a line that says how many of which length.
fn calibration(
    args: &Args,
    source: &Source,
    template: &Template,
    model: &Decoder,
    tokenizer: &TextTokenizer,
) -> Result<(Vec<Vec<u32>>, String)> {
    let context = model.config().max_position_embeddings();
    let shapes = model.layer_shapes();
    let n_weights = shapes.iter().map(|l| l.d_input * l.d_output).sum();
    let mut size = CalibrationSize::for_model(n_weights, context);
    size.samples = args.calibration_samples.unwrap_or(size.samples);
    size.seq_len = args.calibration_length.unwrap_or(size.seq_len);
    let ids = join_documents(&source.texts(template)?, tokenizer, false)?;
    let fitted = size.within(ids.len());
    let CalibrationSize { samples, seq_len } = fitted;
    let less = if fitted == size {
        String::new()
    } else {
        format!(
            ", not {} of {}: it has only {} tokens",
            size.samples,
            size.seq_len,
            ids.len()
        )
    };
    let name = &source.name;
    let noun = if samples == 1 { "sample" } else { "samples" };
    let said = format!("calibration: {samples} {noun} of {seq_len} tokens from {name}{less}");
    Ok((
        calibration_windows(&ids, samples, seq_len, args.seed)?,
        said,
    ))
}

pub struct Task {
    pub pretrained: Pretrained,
    /// The training data, at its start.
    pub train: Batcher,
    pub valid: Vec<Batch>,
    pub test: Vec<Batch>,
    /// Test problems, if they have final answers.
    pub problems: Option<ProblemSet>,
    /// Validation problems, if they have final answers.
    pub valid_problems: Option<ProblemSet>,
    pub calibration: Vec<Vec<u32>>,
    /// What the calibration samples are.
    pub calibration_said: String,
    pub max_new_tokens: usize,
}

impl Task {
    pub fn load(args: &Args, device: &Device) -> Result<Self> {
        let shipped = common::shipped_model();
        let folder = args.model.as_ref().unwrap_or(&shipped);
        let mut pretrained = Pretrained::open(folder, device)?;
        common::show_notices(&pretrained.notices());
        pretrained.model = pretrained.model.with_weight_dtype(args.weights.into())?;
        let generated = |split, n| Source::generated(split, n, args.seed);
        let (train, valid, test) = match (&args.train, &args.valid) {
            (Some(train), Some(valid)) => {
                let open = |path: &PathBuf| Source::open(path, args.plain_text);
                let test = args.test.as_ref().map(open).transpose()?;
                let data = (open(train)?, open(valid)?, test);
                if args.test.is_none() {
                    eprintln!(
                        "no --test: the searched subnet is chosen and measured on the same file"
                    );
                }
                data
            }
            _ => (
                generated(Split::Train, 12_000)?,
                generated(Split::Valid, 384)?,
                Some(generated(Split::Test, 1200)?),
            ),
        };

        let context = pretrained.model.config().max_position_embeddings();
        let max_len = args.max_len.unwrap_or(context.min(512));
        for (what, found) in [
            ("--max-len", max_len),
            ("--calibration-length", args.calibration_length.unwrap_or(1)),
        ] {
            if found > context {
                return Err(Error::SequenceTooLong {
                    what: what.into(),
                    found,
                    max: context,
                });
            }
        }
        let calibration_file = args.calibration.as_ref();
        let calibration_file = calibration_file.map(|path| Source::open(path, args.plain_text));
        let calibration_file = calibration_file.transpose()?;
        let options = TokenizeOptions::new(max_len)
            .with_mask_prompt(!args.train_on_inputs)
            .with_truncate(true)
            .with_leave_out(true);
        let template = Template::for_model(&args.template, folder)?;
        common::show_examples(&train.records, &template, args.show)?;
        let (tokenizer, pad) = (&pretrained.tokenizer, pretrained.pad_id());
        let measured = |source: &Source| -> Result<(Vec<Batch>, Option<ProblemSet>)> {
            let sequences = source.sequences(&template, tokenizer, &options)?;
            let problems = source.problems(&template, tokenizer, context)?;
            Ok((fixed_batches(&sequences, 32, pad)?, problems))
        };
        let sequences = train.sequences(&template, tokenizer, &options)?;
        let (valid_batches, valid_problems) = measured(&valid)?;
        if args.metric == SearchMetric::Accuracy && valid_problems.is_none() {
            return Err(Self::no_answers());
        }
        let (test_batches, problems) = match &test {
            Some(test) => measured(test)?,
            None => (valid_batches.clone(), valid_problems.clone()),
        };
        let answers = test.as_ref().unwrap_or(&valid).records.iter();
        let answers = answers.map(|record| tokenizer.encode(&template.answer(record), false));
        let longest_answer = answers
            .collect::<Result<Vec<_>>>()?
            .iter()
            .map(Vec::len)
            .max()
            .unwrap_or(0);
        let n = sequences.len();
        let train_batches = if args.pack {
            let packed = Batcher::packed(sequences, max_len, args.batch, pad, args.seed)?;
            let rows = packed.groups().map_or(0, <[_]>::len);
            eprintln!("{n} examples are packed into {rows} sequences");
            packed
        } else {
            Batcher::new(sequences, args.batch, pad, args.seed)?
        };
        let (calibration, calibration_said) = calibration(
            args,
            calibration_file.as_ref().unwrap_or(&train),
            &template,
            &pretrained.model,
            tokenizer,
        )?;
        Ok(Self {
            train: train_batches,
            valid: valid_batches,
            test: test_batches,
            problems,
            valid_problems,
            calibration,
            calibration_said,
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
                fingerprint(self.train.sequences().iter().flat_map(sequence)),
            ),
            (
                "calibration data",
                fingerprint(self.calibration.iter().flatten().copied()),
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
