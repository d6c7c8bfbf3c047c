use super::*;

#[test]
fn greedy_takes_the_first_of_equals_and_ignores_nan() {
    let mut sampler = Sampler::new(&SampleConfig::default(), 0).unwrap();
    assert_eq!(sampler.next(&[f32::NAN, 1.0, 3.0, 3.0, f32::NAN]), 2);
}

#[test]
fn draws_follow_the_probabilities_and_the_cuts() {
    let logits = [0.0, (3.0f32).ln(), f32::NEG_INFINITY, -20.0];
    let draw = |config: &SampleConfig| {
        let mut sampler = Sampler::new(config, 3).unwrap();
        let mut counts = [0usize; 4];
        (0..4000).for_each(|_| counts[sampler.next(&logits) as usize] += 1);
        counts
    };
    let plain = SampleConfig {
        temperature: 1.0,
        seed: 5,
        ..SampleConfig::default()
    };
    let counts = draw(&plain);
    assert!(
        (counts[1] as f64 / 4000.0 - 0.75).abs() < 0.03,
        "{counts:?}"
    );
    assert_eq!(counts, draw(&plain));
    assert_eq!(
        draw(&SampleConfig {
            top_k: 1,
            ..plain.clone()
        })[1],
        4000
    );
    assert_eq!(
        draw(&SampleConfig {
            top_p: 0.7,
            ..plain.clone()
        })[1],
        4000
    );
    // A token with a third of the largest probability passes a limit of 0.3 and fails one of
    // 0.4.
    let third = draw(&SampleConfig {
        min_p: 0.3,
        ..plain.clone()
    });
    assert!(third[0] > 800 && third[3] == 0);
    assert_eq!(
        draw(&SampleConfig {
            min_p: 0.4,
            ..plain.clone()
        })[1],
        4000
    );
    let warm = draw(&SampleConfig {
        temperature: 2.0,
        ..plain
    });
    assert!(warm[0] > counts[0]);
}

fn greedy(config: SampleConfig) -> Sampler {
    Sampler::new(&config, 0).unwrap()
}

#[test]
fn penalties_count_the_prompt_and_what_was_generated() {
    let config = SampleConfig {
        repetition_penalty: 2.0,
        frequency_penalty: 0.5,
        presence_penalty: 0.25,
        logit_bias: vec![(4, 1.0), (9, 1.0)],
        ..SampleConfig::default()
    };
    let mut sampler = greedy(config);
    sampler.observe(&[0, 1]);
    sampler.accept(1);
    sampler.accept(1);
    sampler.accept(2);
    let mut found = Vec::new();
    sampler.adjust(&[4.0, 4.0, -1.0, 4.0, 3.0], None, &mut found);
    // Divided, divided and 2 * 0.5 + 0.25 less, doubled and 0.75 less, as it was, one more.
    assert_eq!(found, [2.0, 0.75, -2.75, 4.0, 4.0]);
    assert_eq!(sampler.next(&[4.0, 4.0, -1.0, 4.0, 3.0]), 3);
    sampler.reset();
    assert_eq!(sampler.next(&[4.0, 4.0, -1.0, 3.0, 2.0]), 0);
}

#[test]
fn a_mask_and_biases_forbid_tokens() {
    let logits: Vec<f32> = (0..70).map(|i| i as f32).collect();
    for temperature in [0.0, 0.7] {
        let config = SampleConfig {
            temperature,
            logit_bias: vec![(69, f32::NEG_INFINITY), (33, f32::NEG_INFINITY)],
            seed: 3,
            ..SampleConfig::default()
        };
        let mut sampler = greedy(config);
        // Token 64 is behind the mask.
        let words = [0b101, 0b11];
        for _ in 0..50 {
            assert_eq!(
                sampler.sample(&logits, Some(TokenMask(&words))).unwrap(),
                32
            );
            assert_ne!(sampler.sample(&logits, None).unwrap(), 69);
        }
        assert!(sampler.sample(&logits, Some(TokenMask(&[0, 2]))).is_err());
        assert!(sampler.sample(&logits, Some(TokenMask(&[]))).is_err());
        assert!(sampler.sample(&[f32::NAN; 3], None).is_err());
        assert!(sampler.sample(&[], None).is_err());
    }
}

#[test]
fn biases_and_masks_that_change_nothing_change_no_draw() {
    let logits: Vec<f32> = (0..40).map(|i| (i as f32 * 0.7).sin()).collect();
    let config = SampleConfig {
        temperature: 1.3,
        top_k: 12,
        top_p: 0.9,
        seed: 8,
        ..SampleConfig::default()
    };
    let biased = SampleConfig {
        logit_bias: vec![(1, 0.0)],
        ..config.clone()
    };
    let (mut plain, mut biased) = (greedy(config), greedy(biased));
    for _ in 0..100 {
        let all = [u32::MAX; 2];
        let found = biased.sample(&logits, Some(TokenMask(&all))).unwrap();
        assert_eq!(plain.next(&logits), found);
    }
}

#[test]
fn settings_out_of_range_are_refused() {
    let change: [fn(&mut SampleConfig); 6] = [
        |config| config.repetition_penalty = 0.0,
        |config| config.repetition_penalty = f64::NAN,
        |config| config.frequency_penalty = f64::INFINITY,
        |config| config.presence_penalty = f64::NAN,
        |config| config.logit_bias = vec![(1, f32::NAN)],
        |config| config.logit_bias = vec![(1, f32::INFINITY)],
    ];
    for change in change {
        let mut config = SampleConfig::default();
        change(&mut config);
        assert!(Sampler::new(&config, 0).is_err());
    }
    for (temperature, top_p) in [(-1.0, 1.0), (f64::NAN, 1.0), (1.0, 0.0), (1.0, 1.5)] {
        let config = SampleConfig {
            temperature,
            top_p,
            ..SampleConfig::default()
        };
        assert!(Sampler::new(&config, 0).is_err());
    }
    for min_p in [-0.1, 1.0, f64::NAN] {
        assert!(
            Sampler::new(
                &SampleConfig {
                    min_p,
                    ..SampleConfig::default()
                },
                0
            )
            .is_err()
        );
    }
}

/// Draws with all tokens sorted.
fn sorted_draw(logits: &[f32], config: &SampleConfig, rng: &mut ChaCha8Rng) -> u32 {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |id: &u32| {
        let logit = f64::from(logits[*id as usize]) - f64::from(max);
        (logit / config.temperature).exp()
    };
    let total: f64 = order.iter().map(weight).sum();
    order.sort_by(|a, b| {
        let (x, y) = (logits[*a as usize], logits[*b as usize]);
        y.total_cmp(&x).then(a.cmp(b))
    });
    let (mut kept, mut sum, mut reached) = (Vec::new(), 0.0, 0.0);
    for id in order {
        kept.push(id);
        sum += weight(&id);
        reached += weight(&id) / total;
        if reached >= config.top_p && config.top_p < 1.0 {
            break;
        }
    }
    let mut draw = rng.random::<f64>() * if config.top_p < 1.0 { sum } else { total };
    for id in &kept {
        draw -= weight(id);
        if draw < 0.0 {
            return *id;
        }
    }
    kept[kept.len() - 1]
}

#[test]
fn few_sorted_tokens_give_the_draws_of_all() {
    let logits: Vec<f32> = (0..5000)
        .map(|i| ((i * i) as f32 * 0.11).sin() * 4.0)
        .collect();
    for (temperature, top_p) in [(0.3, 1.0), (0.7, 0.9), (5.0, 0.99), (50.0, 1.0)] {
        let config = SampleConfig {
            temperature,
            top_p,
            seed: 11,
            ..SampleConfig::default()
        };
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        let mut sampler = greedy(config.clone());
        for _ in 0..40 {
            let expected = sorted_draw(&logits, &config, &mut rng);
            assert_eq!(sampler.next(&logits), expected);
        }
    }
}
