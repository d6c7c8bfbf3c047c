//! Every family, written for transformers and PEFT and read from PEFT.
//!
//! If there is a Python with torch, transformers and peft (`ELASTIC_LORA_PYTHON`, else `python3`),
//! the scripts of this test load the written folders and compare logits. Otherwise these tests
//! print that they were skipped.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::common::families::{Fixture, mixed_ranks, trained, uniform_subnets};
use crate::common::python::{python, run, write_vectors};
use crate::common::runtime::{full, in_pieces, session};
use crate::common::{load, load_i32, max_diff};
use elastic_lora::arch::Family;
use elastic_lora::io::hf::HfFolder;
use elastic_lora::io::peft::{LoraAdapter, PeftOptions};
use elastic_lora::io::{Checkpoint, DType};
use elastic_lora::merge::MergeMode;
use elastic_lora::model::Decoder;
use elastic_lora::progress::Silent;
use elastic_lora::runtime::Model;
use elastic_lora::{Merger, SuperNet};

/// Writes a model and what transformers must compute with it.
fn write_checked(model: &Decoder, path: &Path, ids: &[u32]) -> [PathBuf; 2] {
    let out = HfFolder::create(path, false).unwrap();
    let tensors = model.tensors(DType::F32).unwrap();
    out.write_model(model.config(), DType::F32, tensors)
        .unwrap();
    out.commit().unwrap();
    let vectors = path.with_extension("safetensors");
    write_vectors(&vectors, &load(path), ids, Vec::new(), &BTreeMap::new());
    [path.to_path_buf(), vectors]
}

#[test]
fn transformers_reads_merged_and_extracted_models_of_every_family() {
    let Some(python) = python() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let mut arguments = Vec::new();
    for fixture in Fixture::all() {
        let mut net = trained(fixture.decoder());
        let ids = &fixture.ids[0];
        let mut subnets = vec![("merged", net.maximal())];
        subnets.extend(uniform_subnets(&net));
        for (what, subnet) in subnets {
            net.activate(&subnet).unwrap();
            let expected = full(&net.eval_model(), ids);
            let merger = Merger::new().with_mode(MergeMode::Dense);
            let model = merger.extract(&net, &[], &Silent).unwrap().model;
            let off = max_diff(&full(&model, ids), &expected);
            assert!(off < 1e-4, "{}, {what}: off by {off}", fixture.name);
            if model.config().raw()["model_type"] == Family::ElasticLlama.model_type() {
                // transformers takes the number of these factors from the number of heads.
                assert!(
                    fixture.name.starts_with("phi3-longrope"),
                    "{}, {what}",
                    fixture.name
                );
                continue;
            }
            let path = scratch.path().join(format!("{}-{what}", fixture.name));
            arguments.extend(write_checked(&model, &path, ids));
        }
    }
    run(python, "check_transformers.py", &arguments);
}

#[test]
fn peft_computes_the_logits_of_our_adapters_for_every_family() {
    let Some(python) = python() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let mut arguments: Vec<PathBuf> = Vec::new();
    for fixture in Fixture::all() {
        let mut net = trained(fixture.decoder());
        net.activate(&mixed_ranks(&net)).unwrap();
        let vectors = scratch.path().join(format!("{}.safetensors", fixture.name));
        let ids = &fixture.ids[1];
        write_vectors(
            &vectors,
            &net.eval_model(),
            ids,
            Vec::new(),
            &BTreeMap::new(),
        );
        let adapter = net.extract_adapter().unwrap();
        let folder = scratch.path().join(&fixture.name);
        let options = PeftOptions::for_model(net.model().config());
        adapter.write(&folder, &options).unwrap();
        if !arguments.is_empty() {
            arguments.push("+".into());
        }
        // Of a model for several kinds of input, the adapter is one of the text model.
        let mut base = fixture.path.clone();
        if fixture.name.starts_with("gemma3") && !fixture.name.contains("text") {
            base = scratch.path().join(format!("base-{}", fixture.name));
            write_checked(&fixture.decoder(), &base, ids);
        }
        arguments.extend([base, folder, vectors]);
    }
    run(python, "check_peft.py", &arguments);
}

#[test]
fn adapters_of_peft_give_pefts_logits_for_every_family() {
    let Some(python) = python() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let fixtures = Fixture::all();
    let mut arguments = vec![scratch.path().to_path_buf()];
    arguments.extend(fixtures.iter().map(|fixture| fixture.path.clone()));
    if !run(python, "make_peft.py", &arguments) {
        return;
    }
    for fixture in fixtures {
        let folder = scratch.path().join(&fixture.name);
        let vectors = Checkpoint::open(folder.with_extension("safetensors")).unwrap();
        let ids = load_i32(&vectors, "input_ids");
        let expected = vectors.load_f32("logits").unwrap();
        let adapter = LoraAdapter::open(&folder).unwrap();
        let net = SuperNet::from_adapter(fixture.decoder(), &adapter).unwrap();
        let merger = Merger::new().with_mode(MergeMode::Dense);
        let merged = merger.merge(&net, &[], &Silent).unwrap().model;
        let deployed = Model::from_decoder(net.model(), elastic_lora::format::WeightFormat::F32);
        let deployed = in_pieces(&mut session(&deployed.unwrap()), &ids, &[ids.len()]);
        let found = [
            ("unmerged", full(net.model(), &ids)),
            ("merged", full(&merged, &ids)),
            ("in the runtime", deployed),
        ];
        for (what, logits) in found {
            let off = max_diff(&logits, &expected);
            eprintln!("{}, {what}: max abs diff {off:.2e}", fixture.name);
            assert!(off < 1e-4, "{}, {what}: off by {off}", fixture.name);
        }
    }
}

/// Kinds of adapters beside plain ones; `make_peft_kinds.py` names them.
#[test]
fn adapters_of_many_kinds_give_pefts_logits() {
    let Some(python) = python() else { return };
    let scratch = tempfile::tempdir().unwrap();
    // Untied; tied with biases; one matrix for several layers; tied with a scaled embedding.
    let chosen = ["mistral", "qwen2", "phi3", "gemma2"];
    let mut fixtures = Fixture::all();
    fixtures.retain(|fixture| chosen.contains(&fixture.name.as_str()));
    assert_eq!(fixtures.len(), chosen.len());
    let mut arguments = vec![scratch.path().to_path_buf()];
    arguments.extend(fixtures.iter().map(|fixture| fixture.path.clone()));
    if !run(python, "make_peft_kinds.py", &arguments) {
        return;
    }
    let mut wrong = Vec::new();
    for fixture in fixtures {
        let folders = std::fs::read_dir(scratch.path().join(&fixture.name)).unwrap();
        let mut folders: Vec<PathBuf> = folders.map(|entry| entry.unwrap().path()).collect();
        folders.retain(|path| path.is_dir());
        folders.sort();
        assert!(folders.len() > 25, "{}", fixture.name);
        for folder in folders {
            let kind = folder.file_name().unwrap().to_string_lossy().into_owned();
            let vectors = Checkpoint::open(
                scratch
                    .path()
                    .join(format!("{}/{kind}.safetensors", fixture.name)),
            )
            .unwrap();
            let ids = load_i32(&vectors, "input_ids");
            let expected = vectors.load_f32("logits").unwrap();
            let opened = LoraAdapter::open(&folder);
            let net =
                opened.and_then(|adapter| SuperNet::from_adapter(fixture.decoder(), &adapter));
            let net = match net {
                Ok(net) => net,
                Err(error) => {
                    wrong.push(format!("{} {kind}: {error}", fixture.name));
                    continue;
                }
            };
            let merger = Merger::new().with_mode(MergeMode::Dense);
            let merged = merger.merge(&net, &[], &Silent).unwrap().model;
            let path = folder.join("merged");
            write_checked(&merged, &path, &ids);
            let format = elastic_lora::format::WeightFormat::F32;
            let deployed = Model::from_supernet(&net, &[], format).unwrap();
            let found = [
                ("unmerged", full(net.model(), &ids)),
                ("merged", full(&merged, &ids)),
                ("written", full(&load(&path), &ids)),
                (
                    "in the runtime",
                    in_pieces(&mut session(&deployed), &ids, &[5, 1, 11]),
                ),
            ];
            let mut most = 0.0_f32;
            for (what, logits) in found {
                assert_eq!(
                    logits.len(),
                    expected.len(),
                    "{} {kind}, {what}",
                    fixture.name
                );
                let off = max_diff(&logits, &expected);
                if off.is_nan() || off >= 1e-4 {
                    wrong.push(format!("{} {kind}, {what}: off by {off}", fixture.name));
                }
                most = most.max(off);
            }
            eprintln!("{} {kind}: max abs diff {most:.2e}", fixture.name);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
