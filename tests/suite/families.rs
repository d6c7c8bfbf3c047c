//! Every family, against what transformers computed with the tiny models of `fixtures/families`: the
//! decoder, the runtime, training, merging, exports, bundles, and elastic widths, heads and depth.

use std::collections::BTreeSet;
use std::path::Path;

use crate::common::families::{Fixture, fresh, mixed_ranks, train, trained};
use crate::common::runtime::{full, in_pieces, session};
use crate::common::{is_factor, load, max_diff, weight_bits};
use elastic_lora::format::WeightFormat;
use elastic_lora::io::hf::{HfConfig, HfFolder};
use elastic_lora::io::peft::{LoraAdapter, PeftOptions};
use elastic_lora::io::{Checkpoint, Conversion, DType, FolderOptions};
use elastic_lora::merge::MergeMode;
use elastic_lora::model::{Decoder, DeviceSession};
use elastic_lora::nn::{KvCache, host_values};
use elastic_lora::progress::Silent;
use elastic_lora::runtime::{GenerateConfig, Model, ModelOptions, Session, SessionConfig};
use elastic_lora::{Merger, SuperNet};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

const TOLERANCE: f32 = 1e-4;
/// Sizes of the pieces in which tokens are passed, of 20 in all; the windows are 5 tokens long.
const PIECES: [usize; 3] = [7, 1, 9];

/// Collects differences, so that one run reports every folder.
#[derive(Default)]
struct Report {
    failed: Vec<String>,
}

impl Report {
    /// Records a difference, which is wrong if it is above the tolerance, or NaN.
    fn difference(&mut self, fixture: &Fixture, what: &str, found: f32) {
        if found.is_nan() || found > TOLERANCE {
            self.failed
                .push(format!("{}: {what}: off by {found:.2e}", fixture.name));
        }
    }

    fn equal<T: PartialEq + std::fmt::Debug>(
        &mut self,
        fixture: &Fixture,
        what: &str,
        found: T,
        expected: T,
    ) {
        if found != expected {
            self.failed.push(format!(
                "{}: {what}: {found:?}, expected {expected:?}",
                fixture.name
            ));
        }
    }

    fn finish(self) {
        assert!(self.failed.is_empty(), "\n{}", self.failed.join("\n"));
    }
}

/// Returns the largest difference, or NaN if there is one.
fn off(found: &[f32], expected: &[f32]) -> f32 {
    if found.iter().any(|value| value.is_nan()) {
        return f32::NAN;
    }
    max_diff(found, expected)
}

/// Returns the log-likelihood of each token but the first.
fn log_likelihoods(logits: &[f32], ids: &[u32]) -> Vec<f32> {
    let rows = logits.chunks_exact(logits.len() / ids.len());
    rows.zip(&ids[1..])
        .map(|(row, next)| {
            let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
            (f64::from(row[*next as usize]) - sum.ln()) as f32
        })
        .collect()
}

/// Returns the logits after the last token of each piece, and then of each token, and where they
/// belong.
fn last_logits(
    ids: &[u32],
    pieces: &[usize],
    mut decode: impl FnMut(&[u32]) -> Vec<f32>,
) -> Vec<(usize, Vec<f32>)> {
    let (mut out, mut start) = (Vec::new(), 0);
    for n in pieces.iter().copied().chain(std::iter::repeat(1)) {
        let end = ids.len().min(start + n);
        if start == end {
            break;
        }
        out.push((end - 1, decode(&ids[start..end])));
        start = end;
    }
    out
}

/// Returns the largest difference of logits after some of the tokens.
fn off_at(found: &[(usize, Vec<f32>)], expected: &[f32]) -> f32 {
    let vocab = found[0].1.len();
    found.iter().fold(0.0, |most, (at, logits)| {
        let here = off(logits, &expected[at * vocab..(at + 1) * vocab]);
        if here.is_nan() { here } else { here.max(most) }
    })
}

#[test]
fn the_decoder_gives_the_logits_of_transformers() {
    let mut report = Report::default();
    for fixture in Fixture::all() {
        let decoder = fixture.decoder();
        let tokens = decoder.tokens(&fixture.ids.concat(), 2).unwrap();
        let whole = off(
            &host_values(decoder.forward(tokens)),
            &fixture.logits.concat(),
        );
        report.difference(&fixture, "both sequences at once", whole);
        let mut cached = 0.0f32;
        for (row, ids) in fixture.ids.iter().enumerate() {
            let mut session = DeviceSession::new(&decoder);
            let steps = last_logits(ids, &[], |ids| session.decode(ids).unwrap());
            let mut offs = vec![("one by one", off_at(&steps, &fixture.stepped[row]))];
            if !fixture.by_length {
                session.reset();
                let steps = last_logits(ids, &PIECES, |ids| session.decode(ids).unwrap());
                offs.push(("in pieces", off_at(&steps, &fixture.logits[row])));
                // With a cache, the logits after all tokens of each piece.
                let mut cache = KvCache::new(decoder.config().num_hidden_layers());
                let mut all = Vec::new();
                for piece in ids.chunks(6) {
                    let tokens = decoder.tokens(piece, 1).unwrap();
                    let hidden = decoder.hidden_states(tokens, Some(&mut cache));
                    all.extend(host_values(decoder.logits(hidden)));
                }
                offs.push(("in pieces of 6", off(&all, &fixture.logits[row])));
            }
            for (what, found) in offs {
                report.difference(&fixture, what, found);
                cached = cached.max(found);
            }
            session.reset();
            let config = GenerateConfig::new(fixture.greedy[row].len(), Vec::new());
            let greedy = session.generate(ids, &config, |_| true).unwrap();
            report.equal(&fixture, "continuation", &greedy, &fixture.greedy[row]);
        }
        eprintln!("{}: whole {whole:.1e}, cached {cached:.1e}", fixture.name);
    }
    report.finish();
}

#[test]
fn the_runtime_gives_the_logits_of_transformers() {
    let mut report = Report::default();
    for fixture in Fixture::all() {
        let model = fixture.runtime();
        let vocab = model.config().vocab_size();
        let (mut whole, mut cached) = (0.0f32, 0.0f32);
        for (row, ids) in fixture.ids.iter().enumerate() {
            let mut offs = Vec::new();
            // All at once, also where the session runs fewer rows at once.
            for rows in [512, 3] {
                let config = SessionConfig::default().with_prefill_rows(rows);
                let mut session = Session::new(&model, &config).unwrap();
                let all = in_pieces(&mut session, ids, &[ids.len()]);
                let found = off(&all, &fixture.logits[row]);
                report.difference(&fixture, &format!("at once, {rows} rows"), found);
                whole = whole.max(found);
                let greedy = GenerateConfig::new(fixture.greedy[row].len(), Vec::new());
                session.reset();
                let greedy = session.generate(ids, &greedy, |_| true).unwrap();
                report.equal(&fixture, "continuation", &greedy, &fixture.greedy[row]);
            }
            let mut session = session(&model);
            let decode = |session: &mut Session, ids: &[u32]| {
                let mut logits = vec![f32::NAN; vocab];
                session.decode(ids, Some(&mut logits)).unwrap();
                logits
            };
            let steps = last_logits(ids, &[], |ids| decode(&mut session, ids));
            offs.push(("one by one", off_at(&steps, &fixture.stepped[row])));
            // Log-likelihoods, with rows computed few at a time.
            let config = SessionConfig::default().with_prefill_rows(3);
            let found = Session::new(&model, &config)
                .unwrap()
                .log_likelihoods(ids)
                .unwrap();
            let expected = log_likelihoods(&fixture.logits[row], ids);
            offs.push(("log-likelihoods", off(&found, &expected)));
            if !fixture.by_length {
                session.reset();
                let all = in_pieces(&mut session, ids, &PIECES);
                offs.push(("in pieces", off(&all, &fixture.logits[row])));
            }
            for (what, found) in offs {
                report.difference(&fixture, what, found);
                cached = cached.max(found);
            }
        }
        eprintln!("{}: whole {whole:.1e}, cached {cached:.1e}", fixture.name);
    }
    report.finish();
}

fn write(model: &Decoder, folder: &Path) {
    let out = HfFolder::create(folder, false).unwrap();
    let tensors = model.tensors(DType::F32).unwrap();
    out.write_model(model.config(), DType::F32, tensors)
        .unwrap();
    out.commit().unwrap();
}

fn dense() -> Merger {
    Merger::new().with_mode(MergeMode::Dense)
}

#[test]
fn training_changes_only_adapters() {
    for fixture in Fixture::all() {
        let mut net = fresh(fixture.decoder());
        net.activate(&net.heuristic()).unwrap();
        let before = weight_bits(net.model());
        train(&mut net, 1);
        let after = weight_bits(net.model());
        assert_eq!(
            before.keys().collect::<Vec<_>>(),
            after.keys().collect::<Vec<_>>()
        );
        let mut changed = 0;
        for (path, bits) in &before {
            let same = bits == &after[path];
            assert!(is_factor(path) || same, "{}: {path} changed", fixture.name);
            changed += usize::from(!same);
        }
        assert!(changed > 0, "{}: nothing was trained", fixture.name);
    }
}

/// Returns the fields of the decoder's config, of which a multimodal config has a part.
fn own_fields(path: &Path) -> serde_json::Map<String, serde_json::Value> {
    let text = std::fs::read_to_string(path.join("config.json")).unwrap();
    let all: serde_json::Map<_, _> = serde_json::from_str(&text).unwrap();
    all.get("text_config")
        .and_then(|text| text.as_object())
        .unwrap_or(&all)
        .clone()
}

#[test]
fn merged_models_are_written_in_their_own_form() {
    let mut report = Report::default();
    let scratch = tempfile::tempdir().unwrap();
    for fixture in Fixture::all() {
        let net = trained(fixture.decoder());
        let ids = &fixture.ids[0];
        let expected = full(&net.eval_model(), ids);
        let moved = max_diff(&expected, &fixture.logits[0]);
        assert!(moved > 1e-2, "{}: the adapters do nothing", fixture.name);
        let merged = dense().merge(&net, &[], &Silent).unwrap().model;
        let path = scratch.path().join(&fixture.name);
        write(&merged, &path);
        report.difference(
            &fixture,
            "reopened",
            off(&full(&load(&path), ids), &expected),
        );
        let model = Model::open(&path, &ModelOptions::default()).unwrap();
        let all = in_pieces(&mut session(&model), ids, &[ids.len()]);
        report.difference(&fixture, "reopened in the runtime", off(&all, &expected));

        // Every tensor under its name in the original, and no other, and every field as it was.
        let names = |path: &Path| -> Vec<String> {
            let checkpoint = Checkpoint::open(path.join("model.safetensors")).unwrap();
            let mut names: Vec<String> = checkpoint
                .names()
                .filter(|name| !name.contains("vision") && !name.contains("multi_modal"))
                .map(|name| match name.split_once("language_model.") {
                    Some((_, rest)) => format!("model.{}", rest.trim_start_matches("model.")),
                    None => name.to_string(),
                })
                .collect();
            names.sort();
            names
        };
        report.equal(&fixture, "tensors", names(&path), names(&fixture.path));
        let (before, after) = (own_fields(&fixture.path), own_fields(&path));
        for (field, value) in &before {
            if !["dtype", "torch_dtype", "transformers_version"].contains(&field.as_str()) {
                report.equal(&fixture, field, after.get(field), Some(value));
            }
        }
    }
    report.finish();
}

#[test]
fn adapters_are_written_under_the_names_of_the_family() {
    let scratch = tempfile::tempdir().unwrap();
    for fixture in Fixture::all() {
        let mut net = trained(fixture.decoder());
        net.activate(&mixed_ranks(&net)).unwrap();
        let folder = scratch.path().join(&fixture.name);
        let options = PeftOptions::for_model(net.model().config());
        net.extract_adapter()
            .unwrap()
            .write(&folder, &options)
            .unwrap();
        let adapter = LoraAdapter::open(&folder).unwrap();
        let kinds: BTreeSet<&str> = adapter
            .layers
            .keys()
            .filter_map(|name| name.rsplit('.').next())
            .collect();
        let expected = if fixture.name.starts_with("phi3") {
            vec!["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
        } else {
            vec![
                "down_proj",
                "gate_proj",
                "k_proj",
                "o_proj",
                "q_proj",
                "up_proj",
                "v_proj",
            ]
        };
        assert_eq!(kinds, BTreeSet::from_iter(expected), "{}", fixture.name);
        let again = SuperNet::from_adapter(fixture.decoder(), &adapter).unwrap();
        // Merged weight by weight, from file to file.
        let merged = scratch.path().join(format!("{}-merged", fixture.name));
        let conversion = Conversion::open(&fixture.path).unwrap();
        conversion
            .with_adapter(&adapter)
            .unwrap()
            .write_folder(
                &merged,
                &FolderOptions::default().with_dtype(DType::F32),
                &Silent,
            )
            .unwrap();
        let merged = load(&merged);
        for ids in &fixture.ids {
            let expected = full(&net.eval_model(), ids);
            for model in [again.model(), &merged] {
                let off = off(&full(model, ids), &expected);
                assert!(off <= TOLERANCE, "{}: off by {off}", fixture.name);
            }
        }
    }
}

#[test]
fn bundles_are_the_models_that_they_were_made_of() {
    let scratch = tempfile::tempdir().unwrap();
    for fixture in Fixture::all() {
        let path = scratch.path().join(&fixture.name);
        let logits = |model: &Model| in_pieces(&mut session(model), &fixture.ids[1], &[20]);
        let model = fixture.runtime();
        model.save(&path, false).unwrap();
        let opened = Model::open(&path, &ModelOptions::default()).unwrap();
        // Not what was noticed in the folder: the bundle holds only what is used.
        let (found, expected) = (opened.config(), model.config());
        assert_eq!(found.raw(), expected.raw(), "{}", fixture.name);
        assert_eq!(found.arch(), expected.arch(), "{}", fixture.name);
        assert_eq!(logits(&opened), logits(&model), "{}", fixture.name);

        // Adapters stay apart from the base, and subnets are chosen when the model runs.
        let mut net = trained(fixture.decoder());
        let subnets = [("least", net.minimal()), ("middle", net.heuristic())]
            .map(|(name, config)| (name.to_string(), config));
        let model = Model::from_supernet(&net, &subnets, WeightFormat::F32).unwrap();
        model.save(&path, true).unwrap();
        let opened = Model::open(&path, &ModelOptions::default()).unwrap();
        for (name, subnet) in &subnets {
            net.activate(subnet).unwrap();
            let expected = full(&net.eval_model(), &fixture.ids[1]);
            let mut session = session(&opened);
            session.set_subnet_named(name).unwrap();
            let found = in_pieces(&mut session, &fixture.ids[1], &[20]);
            let off = off(&found, &expected);
            assert!(off <= TOLERANCE, "{}, {name}: off by {off}", fixture.name);
        }
    }
}

#[test]
fn extracted_subnets_give_the_logits_of_the_supernet() {
    let mut report = Report::default();
    let scratch = tempfile::tempdir().unwrap();
    for fixture in Fixture::all() {
        let mut net = trained(fixture.decoder());
        let ids = &fixture.ids[0];
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut subnets = vec![net.heuristic(), net.minimal()];
        subnets.extend((0..4).map(|_| net.sample(&mut rng)));
        let deployed = Model::from_supernet(&net, &[], WeightFormat::F32).unwrap();
        let mut worst = 0.0f32;
        for (index, subnet) in subnets.iter().enumerate() {
            net.activate(subnet).unwrap();
            let expected = full(&net.eval_model(), ids);
            let extracted = dense().extract(&net, &[], &Silent).unwrap().model;
            let path = scratch.path().join(format!("{}-{index}", fixture.name));
            write(&extracted, &path);
            let opened = Model::open(&path, &ModelOptions::default()).unwrap();
            let mut chosen = session(&deployed);
            chosen.set_config(subnet).unwrap();
            let reread = HfConfig::open(&path).unwrap();
            report.equal(
                &fixture,
                "sizes read back",
                reread.blocks(),
                extracted.config().blocks(),
            );
            let at_once = [ids.len()];
            let found = [
                ("extracted", full(&extracted, ids)),
                ("written and read back", full(&load(&path), ids)),
                (
                    "in the runtime",
                    in_pieces(&mut session(&opened), ids, &at_once),
                ),
                (
                    "chosen in the runtime",
                    in_pieces(&mut chosen, ids, &at_once),
                ),
            ];
            for (what, logits) in found {
                let found = off(&logits, &expected);
                report.difference(&fixture, &format!("{what}, {subnet}"), found);
                worst = worst.max(found);
            }
        }
        eprintln!("{}: {worst:.1e}", fixture.name);
    }
    report.finish();
}
