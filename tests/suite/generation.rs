//! Generation: one prompt or many, up to the end of the context, with a sliding window, and
//! compared with another implementation.

use burn::tensor::Device;

use crate::common::{load, load_i32, max_diff, random_ids, shared, tiny, tiny_mistral};
use elastic_lora::Error;
use elastic_lora::io::Checkpoint;
use elastic_lora::model::Decoder;
use elastic_lora::model::{DeviceSession, Pretrained, generate_batch};
use elastic_lora::nn::{KvCache, host_values};
use elastic_lora::progress::Silent;
use elastic_lora::runtime::{
    GenerateConfig, Model, ModelOptions, SampleConfig, Session, SessionConfig,
};
use elastic_lora::tasks::{Continuation, LanguageModel, Prompt, RuntimeModel};

const CONTEXT: usize = 40;

fn greedy(max_new_tokens: usize, stop_ids: &[u32]) -> GenerateConfig {
    GenerateConfig::new(max_new_tokens, stop_ids.to_vec())
}

/// Prompts of lengths 1 to 12 in mixed order.
fn prompts() -> Vec<Vec<u32>> {
    [5, 1, 12, 3, 7, 7, 2, 9]
        .into_iter()
        .enumerate()
        .map(|(i, len)| random_ids(len, 41, 20 + i as u64))
        .collect()
}

fn one_by_one(model: &Decoder, prompts: &[Vec<u32>], config: &GenerateConfig) -> Vec<Vec<u32>> {
    prompts
        .iter()
        .map(|prompt| {
            DeviceSession::new(model)
                .generate(prompt, config, |_| true)
                .unwrap()
        })
        .collect()
}

/// Generates by definition: the whole sequence is run through the model for each token.
fn without_cache(model: &Decoder, prompt: &[u32], config: &GenerateConfig) -> Vec<u32> {
    let mut ids = prompt.to_vec();
    while ids.len() - prompt.len() < config.max_new_tokens && ids.len() <= CONTEXT {
        let logits = host_values(model.forward(model.tokens(&ids, 1).unwrap()));
        let last = &logits[(ids.len() - 1) * 41..];
        let next = (0..41)
            .rev()
            .max_by(|a, b| last[*a].total_cmp(&last[*b]))
            .unwrap() as u32;
        if config.stop_ids.contains(&next) {
            break;
        }
        ids.push(next);
    }
    ids.split_off(prompt.len())
}

#[test]
fn a_padded_batch_generates_what_each_prompt_does_alone() {
    for model in [
        tiny(true, 1),
        tiny(false, 2),
        tiny_mistral(Some(5), 3),
        tiny_mistral(None, 4),
    ] {
        let prompts = prompts();
        let free = one_by_one(&model, &prompts, &greedy(14, &[]));
        assert!(free.iter().all(|output| output.len() == 14));
        // The stop tokens occur at different times, so that rows leave the batch one by one.
        let stop: Vec<u32> = vec![free[0][3], free[2][6], free[4][0]];
        for stop in [&[][..], &stop] {
            let mut config = greedy(14, stop);
            let expected = one_by_one(&model, &prompts, &config);
            for (prompt, expected) in prompts.iter().zip(&expected) {
                assert_eq!(&without_cache(&model, prompt, &config), expected);
            }
            for batch_size in [1, 3, 64] {
                config.batch_size = batch_size;
                assert_eq!(
                    generate_batch(&model, &prompts, &config, &Silent).unwrap(),
                    expected,
                    "batches of {batch_size}"
                );
            }
            if !stop.is_empty() {
                let lengths: std::collections::BTreeSet<usize> =
                    expected.iter().map(Vec::len).collect();
                assert!(lengths.len() >= 3, "{lengths:?}");
            }
        }
    }
}

#[test]
fn generation_ends_with_the_context_and_padding_takes_none_of_it() {
    let model = tiny(true, 1);
    let mut prompts = prompts();
    prompts.push(random_ids(CONTEXT, 41, 3));
    prompts.push(random_ids(CONTEXT - 1, 41, 4));
    let config = greedy(1000, &[]);
    let expected = one_by_one(&model, &prompts, &config);
    for (prompt, output) in prompts.iter().zip(&expected) {
        // The last token is sampled from a full context.
        assert_eq!(prompt.len() + output.len(), CONTEXT + 1);
        assert_eq!(&without_cache(&model, prompt, &config), output);
    }
    assert_eq!(
        generate_batch(&model, &prompts, &config, &Silent).unwrap(),
        expected
    );
    let none = vec![Vec::<u32>::new(); prompts.len()];
    assert_eq!(
        generate_batch(&model, &prompts, &greedy(0, &[]), &Silent).unwrap(),
        none
    );
    assert_eq!(one_by_one(&model, &prompts, &greedy(0, &[])), none);
    assert!(
        generate_batch(&model, &[], &config, &Silent)
            .unwrap()
            .is_empty()
    );
}

#[test]
fn bad_prompts_and_settings_are_refused() {
    let model = tiny(true, 1);
    let good = vec![1, 2, 3];
    let batch = |prompt: Vec<u32>| {
        generate_batch(&model, &[good.clone(), prompt], &greedy(4, &[]), &Silent).unwrap_err()
    };
    assert!(matches!(batch(vec![]), Error::InvalidArgument { .. }));
    assert!(matches!(
        batch(vec![1; CONTEXT + 1]),
        Error::SequenceTooLong {
            found: 41,
            max: CONTEXT,
            ..
        }
    ));
    assert!(matches!(
        batch(vec![1, 41]),
        Error::TokenOutOfRange {
            found: 41,
            vocab_size: 41
        }
    ));
    assert!(matches!(
        batch(vec![u32::MAX]),
        Error::TokenOutOfRange { .. }
    ));

    let mut session = DeviceSession::new(&model);
    let first = session.decode(&good).unwrap();
    assert!(session.decode(&[]).is_err());
    assert!(matches!(
        session.decode(&[1, 41]),
        Err(Error::TokenOutOfRange { .. })
    ));
    let long = vec![1; CONTEXT - 2];
    assert!(matches!(
        session.decode(&long),
        Err(Error::SequenceTooLong {
            found: 41,
            max: CONTEXT,
            ..
        })
    ));
    assert!(session.generate(&[], &greedy(4, &[]), |_| true).is_err());
    assert_eq!(session.position(), 3);
    session.decode(&long[1..]).unwrap();
    assert_eq!(session.position(), CONTEXT);
    assert!(matches!(
        session.decode(&[1]),
        Err(Error::SequenceTooLong { .. })
    ));
    session.reset();
    assert_eq!(
        (session.position(), session.decode(&good).unwrap()),
        (0, first)
    );

    let bad = |change: &dyn Fn(&mut GenerateConfig)| {
        let mut config = greedy(4, &[]);
        change(&mut config);
        assert!(matches!(
            generate_batch(&model, std::slice::from_ref(&good), &config, &Silent),
            Err(Error::InvalidArgument { .. })
        ));
    };
    bad(&|config| config.batch_size = 0);
    bad(&|config| config.sample.temperature = f64::NAN);
    bad(&|config| config.sample.temperature = -0.5);
    bad(&|config| config.sample.top_p = 0.0);
    bad(&|config| config.sample.top_p = f64::NAN);
}

#[test]
fn a_session_goes_on_from_what_it_holds_and_its_caller_may_end_it() {
    let model = tiny(false, 2);
    let prompt = random_ids(9, 41, 8);
    let whole = DeviceSession::new(&model).decode(&prompt).unwrap();
    for split in 1..9 {
        let mut session = DeviceSession::new(&model);
        session.decode(&prompt[..split]).unwrap();
        assert!(max_diff(&session.decode(&prompt[split..]).unwrap(), &whole) < 1e-4);
    }
    let expected = DeviceSession::new(&model)
        .generate(&prompt, &greedy(8, &[]), |_| true)
        .unwrap();
    let mut session = DeviceSession::new(&model);
    session.decode(&prompt[..4]).unwrap();
    let mut shown = Vec::new();
    let output = session
        .generate(&prompt[4..], &greedy(8, &[]), |token| {
            shown.push(token);
            shown.len() < 3
        })
        .unwrap();
    assert_eq!(
        (output.as_slice(), shown.as_slice()),
        (&expected[..3], &expected[..3])
    );
}

#[test]
fn draws_follow_the_seed_and_not_the_batch() {
    let model = tiny(true, 1);
    let prompts = prompts();
    let drawn = |seed: u64, batch_size: usize| {
        let sample = SampleConfig {
            temperature: 1.5,
            top_k: 20,
            top_p: 0.95,
            min_p: 0.0,
            seed,
            ..SampleConfig::default()
        };
        generate_batch(
            &model,
            &prompts,
            &GenerateConfig {
                sample,
                batch_size,
                ..greedy(12, &[])
            },
            &Silent,
        )
        .unwrap()
    };
    assert_eq!(drawn(1, 64), drawn(1, 64));
    assert_eq!(drawn(1, 64), drawn(1, 3));
    assert_ne!(drawn(1, 64), drawn(2, 64));
    // If a prompt occurs twice in a batch, each occurrence is sampled separately.
    let sample = SampleConfig {
        temperature: 2.0,
        ..SampleConfig::default()
    };
    let twice = vec![prompts[0].clone(), prompts[0].clone()];
    let outputs = generate_batch(
        &model,
        &twice,
        &GenerateConfig {
            sample,
            ..greedy(12, &[])
        },
        &Silent,
    )
    .unwrap();
    assert_ne!(outputs[0], outputs[1]);
    // Sampling from a single choice is greedy.
    let sample = SampleConfig {
        temperature: 1.0,
        top_k: 1,
        ..SampleConfig::default()
    };
    let one = generate_batch(
        &model,
        &prompts,
        &GenerateConfig {
            sample,
            ..greedy(6, &[])
        },
        &Silent,
    )
    .unwrap();
    assert_eq!(
        one,
        generate_batch(&model, &prompts, &greedy(6, &[]), &Silent).unwrap()
    );
}

#[test]
fn a_sliding_window_limits_what_is_seen_with_a_cache_as_without() {
    let ids = random_ids(2 * 17, 41, 6);
    let logits = |window: Option<usize>| {
        let model = tiny_mistral(window, 3);
        host_values(model.forward(model.tokens(&ids, 2).unwrap()))
    };
    let (open, wide, narrow) = (logits(None), logits(Some(17)), logits(Some(5)));
    assert!(max_diff(&open, &wide) < 1e-5);
    assert!(max_diff(&open, &narrow) > 0.05);
    // The first five queries of a row attend to the same keys with and without the window.
    for row in 0..2 {
        let at = row * 17 * 41;
        assert!(max_diff(&open[at..at + 5 * 41], &narrow[at..at + 5 * 41]) < 1e-5);
        assert!(
            max_diff(
                &open[at + 5 * 41..at + 6 * 41],
                &narrow[at + 5 * 41..at + 6 * 41]
            ) > 1e-3
        );
    }
    let model = tiny_mistral(Some(5), 3);
    for pieces in [vec![1; 17], vec![7, 1, 1, 8], vec![3, 14], vec![16, 1]] {
        let mut cache = KvCache::new(2);
        let mut start = 0;
        for n in pieces {
            let piece: Vec<u32> = (0..2)
                .flat_map(|row| ids[row * 17 + start..][..n].to_vec())
                .collect();
            let hidden = model.hidden_states(model.tokens(&piece, 2).unwrap(), Some(&mut cache));
            let cached = host_values(model.logits(hidden));
            for row in 0..2 {
                let expected = &narrow[(row * 17 + start) * 41..][..n * 41];
                assert!(max_diff(&cached[row * n * 41..][..n * 41], expected) < 1e-4);
            }
            start += n;
        }
        assert_eq!(cache.n_tokens(), 17);
    }
}

#[test]
fn greedy_continuations_are_those_of_transformers() {
    for name in ["stories260K", "story-llama-0.6M"] {
        let (Some(dir), Some(vectors)) = (
            shared(&format!("models/{name}")),
            shared(&format!("vectors/logits/{name}.safetensors")),
        ) else {
            return;
        };
        let model = load(&dir);
        let vectors = Checkpoint::open(vectors).unwrap();
        let expected = load_i32(&vectors, "greedy_from_first4");
        let prompt = load_i32(&vectors, "input_ids")[..4].to_vec();
        // The continuation in the file begins with the prompt.
        assert_eq!(&expected[..4], &prompt);
        let config = greedy(expected.len() - 4, &[]);
        assert_eq!(
            DeviceSession::new(&model)
                .generate(&prompt, &config, |_| true)
                .unwrap(),
            &expected[4..],
            "{name}"
        );
        // In a batch with another prompt, and therefore padded.
        let batch = vec![random_ids(11, 512, 1), prompt];
        assert_eq!(
            generate_batch(&model, &batch, &config, &Silent).unwrap()[1],
            &expected[4..],
            "{name}"
        );
    }
}

/// Tasks see the same model on Burn and in the runtime.
#[test]
fn tasks_have_the_same_scores_on_burn_and_in_the_runtime() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/arithmetic-llama");
    let mut burn = Pretrained::open(&folder, &Device::flex()).unwrap();
    let model = Model::open(&folder, &ModelOptions::default()).unwrap();
    let session = Session::new(&model, &SessionConfig::default()).unwrap();
    let mut runtime = RuntimeModel::new(session).unwrap();
    let question = |i: usize| {
        let shells = 10 + 3 * i;
        format!("Question: Mia has {shells} shells and finds {i} more. How many?\nAnswer:")
    };
    let choices: Vec<Continuation> = (0..6)
        .map(|i| Continuation {
            context: question(i / 2),
            text: format!(" {} + {i} = 1{i}", 10 + 3 * i),
        })
        .collect();
    let [one, two] = [&mut burn as &mut dyn LanguageModel, &mut runtime]
        .map(|model| model.log_likelihoods(&choices, &Silent).unwrap());
    for (one, two) in one.iter().zip(&two) {
        assert!((one.sum - two.sum).abs() < 1e-3, "{one:?} {two:?}");
        assert_eq!((one.is_greedy, one.n_tokens), (two.is_greedy, two.n_tokens));
    }
    let prompts: Vec<Prompt> = (0..3)
        .map(|i| Prompt {
            text: question(i),
            stops: vec!["####".into()],
            max_new_tokens: 20 + i,
        })
        .collect();
    let texts: Vec<String> = (0..2).map(question).collect();
    let [one, two] = [&mut burn as &mut dyn LanguageModel, &mut runtime].map(|model| {
        let text = model.generate(&prompts, &Silent).unwrap();
        let rolling = model.rolling_log_likelihoods(&texts, &Silent).unwrap();
        (text, rolling)
    });
    assert_eq!(one.0, two.0);
    assert!(one.0.iter().any(|text| !text.is_empty()));
    for (one, two) in one.1.iter().zip(&two.1) {
        assert!(
            (one.sum - two.sum).abs() < 1e-3 * two.sum.abs(),
            "{one:?} {two:?}"
        );
    }
}
