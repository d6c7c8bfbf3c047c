//! Sessions with a draft: the same tokens as without.

use serde_json::json;

use super::engine::lora;
use super::{model, tokens, windowed};
use crate::runtime::{Adapter, GenerateConfig, Model, SampleConfig, Session, SessionConfig};

fn session(model: &Model, n_ctx: usize) -> Session {
    Session::new(model, &SessionConfig::default().with_n_ctx(n_ctx)).unwrap()
}

/// A model with adapters, which a draft leaves out.
fn adapted() -> Model {
    let model = model(json!({"max_position_embeddings": 256}));
    let own = lora(&model, 6, 0.2, &["q_proj", "v_proj", "o_proj", "up_proj"]);
    let adapter = Adapter::from_lora(&model, &own, "made").unwrap();
    model.with_adapter(&adapter, 1.0).unwrap()
}

fn samples() -> Vec<SampleConfig> {
    let sample = |temperature, seed| SampleConfig {
        temperature,
        seed,
        ..SampleConfig::default()
    };
    let penalized = SampleConfig {
        repetition_penalty: 1.3,
        frequency_penalty: 0.1,
        top_k: 7,
        ..sample(0.9, 5)
    };
    vec![sample(0.0, 0), sample(0.7, 1), sample(1.5, 2), penalized]
}

/// Generates twice in one session, and returns the outputs and the tokens that it then holds.
fn run(session: &mut Session, config: &GenerateConfig, stop_after: usize) -> [Vec<u32>; 3] {
    let mut seen = 0;
    let first = session
        .generate(&tokens(9), config, |_| {
            seen += 1;
            seen < stop_after
        })
        .unwrap();
    session.truncate(session.position() - 4);
    let second = session.generate(&tokens(3), config, |_| true).unwrap();
    [first, second, session.tokens().to_vec()]
}

#[test]
fn a_draft_changes_no_token() {
    let full = adapted();
    let other = windowed(8, 64);
    let mut counts = [0; 2];
    for sample in samples() {
        for (number, n_tokens) in [(0, 1), (1, 3), (2, 7), (3, 4)] {
            for (n_ctx, stop_ids, stop_after) in [
                (200, vec![], usize::MAX),
                (40, vec![], usize::MAX),
                (200, vec![3, 11], usize::MAX),
                (200, vec![], 6),
            ] {
                let config = GenerateConfig::new(45, stop_ids).with_sample(sample.clone());
                let mut plain = session(&full, n_ctx);
                let mut with_draft = session(&full, n_ctx);
                let draft = match number {
                    // Another model, whose context is shorter.
                    0 => session(&other, 30),
                    // The model without adapters, and itself.
                    1 | 2 => {
                        let mut draft = session(&full, 200);
                        draft.set_ranks(&vec![0; full.layers().len()]).unwrap();
                        draft
                    }
                    _ => session(&full, 200),
                };
                with_draft.set_draft(Some(draft), n_tokens).unwrap();
                let expected = run(&mut plain, &config, stop_after);
                assert_eq!(run(&mut with_draft, &config, stop_after), expected);
                let found = with_draft.draft_counts();
                if number == 3 {
                    assert!(
                        found[1] + 4 >= found[0],
                        "its own draft is right: {found:?}"
                    );
                }
                counts = [counts[0] + found[0], counts[1] + found[1]];
                // A copy goes on with a draft of its own.
                if n_ctx > 40 {
                    let mut copy = with_draft.copy();
                    let [one, two] = [&mut copy, &mut plain]
                        .map(|session| session.generate(&[1], &config, |_| true).unwrap());
                    assert_eq!(one, two);
                }
            }
        }
    }
    let [proposed, drawn] = counts;
    assert!(drawn > 500 && proposed > drawn, "{counts:?}");
}

#[test]
fn drafts_that_cannot_serve_are_refused() {
    let full = adapted();
    let refused = |draft: Session, n_tokens: usize| {
        let found = session(&full, 64).set_draft(Some(draft), n_tokens);
        found.unwrap_err().to_string()
    };
    for n_tokens in [0, 8, usize::MAX] {
        let error = refused(session(&full, 64), n_tokens);
        assert!(error.contains("n_tokens"), "{error}");
    }
    let wide = model(json!({"vocab_size": 23}));
    let error = refused(session(&wide, 64), 4);
    assert!(error.contains("23") && error.contains("19"), "{error}");
    let mut nested = session(&full, 64);
    nested.set_draft(Some(session(&full, 64)), 2).unwrap();
    assert!(refused(nested, 2).contains("draft"));
    let mut plain = session(&full, 64);
    plain.set_draft(Some(session(&full, 64)), 2).unwrap();
    plain.set_draft(None, 0).unwrap();
    assert_eq!(plain.draft_counts(), [0, 0]);
}
