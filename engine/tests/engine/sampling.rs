//! What sampling parameters do to an answer: its end, its text, its draws, its log-probabilities.

use engine::{Dtype, Engine, EosRule, FinishReason, Request, SamplingParams, StopReason, StopText};

use crate::DTYPES;
use crate::support::{Answer, Model, answer, drain, greedy, load, load_with_text, prompt, sampled};

/// Token of a byte.
fn byte(byte: u8) -> u32 {
    u32::from(byte) + 3
}

/// The end-of-text token of the golden models.
const EOS: u32 = 2;

/// `max` draws from these bytes only, which come in a lively mixture.
fn only(bytes: &[u8], max: usize) -> SamplingParams {
    let logit_bias: Vec<_> = bytes.iter().map(|b| (byte(*b), 100.0)).collect();
    let top_k = Some(logit_bias.len());
    SamplingParams { logit_bias, top_k, temperature: 20.0, ..sampled(max) }
}

fn engine_of(dtype: Dtype) -> Engine {
    load(Model::Llama, |c| c.dtype = Some(dtype))
}

/// Runs `params` with this stop string and checks the answer against `whole`, the text without it.
fn check_stop(engine: &mut Engine, params: &SamplingParams, whole: &str, stop: &str) {
    for stop_text in [StopText::Exclude, StopText::Include] {
        let params = SamplingParams { stop: vec![stop.to_owned()], stop_text, ..params.clone() };
        let answer = answer(engine, &prompt(1, 5), &params);
        let start = whole.find(stop).unwrap();
        let end = match stop_text {
            StopText::Exclude => start,
            StopText::Include => start + stop.len(),
        };
        // What was shown cannot be taken back, so this also says that no part of it was shown.
        assert_eq!(answer.text(), whole[..end], "{stop:?} {stop_text:?}");
        let finished = &answer.finished;
        assert_eq!(finished.reason, FinishReason::Stop);
        assert_eq!(finished.stop_reason, Some(StopReason::Text(stop.to_owned())));
    }
}

#[test]
fn stop_strings_cut_exactly_and_are_never_shown_in_part() {
    for dtype in DTYPES {
        let mut engine = load_with_text(|c| c.dtype = Some(dtype));
        let params = only(b"abc", 40);
        let whole = answer(&mut engine, &prompt(1, 5), &params);
        let text = whole.text();
        assert_eq!((text.len(), whole.finished.reason), (40, FinishReason::Length));
        assert!(text.bytes().all(|b| b"abc".contains(&b)), "{text}");
        for (from, len) in [(0, 1), (0, 3), (7, 2), (11, 4), (20, 5), (33, 7), (39, 1)] {
            check_stop(&mut engine, &params, &text, &text[from..from + len]);
        }
        // The answer has as many tokens as it took to see the stop string.
        let stop = SamplingParams { stop: vec![text[11..16].to_owned()], ..params.clone() };
        let stopped = answer(&mut engine, &prompt(1, 5), &stop);
        let end = text.find(&text[11..16]).unwrap() + 5;
        assert_eq!(stopped.tokens(), whole.tokens()[..end]);

        // What looked like the beginning of a stop string to the last is part of the answer.
        let stop = vec![format!("{}z", &text[30..])];
        let held = answer(&mut engine, &prompt(1, 5), &SamplingParams { stop, ..params });
        assert_eq!((held.text(), held.finished.reason), (text.clone(), FinishReason::Length));
        assert_eq!(held.tokens[38].text, "", "held back while it may become one");
        assert!(held.tokens[39].text.ends_with(&text[30..]), "and then given out at once");
    }
}

#[test]
fn the_first_of_several_stop_strings_counts() {
    let mut engine = load_with_text(|_| {});
    let params = only(b"abc", 60);
    let text = answer(&mut engine, &prompt(1, 5), &params).text();
    let stops = [text[20..24].to_owned(), "zz".to_owned(), text[12..15].to_owned()];
    let end = |stop: &String| text.find(stop.as_str()).map_or(usize::MAX, |at| at + stop.len());
    let first = stops.iter().min_by_key(|stop| end(stop)).unwrap().clone();
    let stopped =
        answer(&mut engine, &prompt(1, 5), &SamplingParams { stop: stops.to_vec(), ..params });
    assert_eq!(stopped.text(), text[..text.find(&first).unwrap()]);
    assert_eq!(stopped.finished.stop_reason, Some(StopReason::Text(first)));
}

#[test]
fn stop_strings_of_several_bytes_a_character() {
    let mut engine = load_with_text(|_| {});
    // Halves of é and è in random order: much of it is no character at all.
    let params = only(&[0xc3, 0xa8, 0xa9], 80);
    let text = answer(&mut engine, &prompt(1, 5), &params).text();
    assert!(text.contains('\u{fffd}') && text.contains('é') && text.contains('è'), "{text}");
    for stop in ["é", "è", "\u{fffd}"] {
        check_stop(&mut engine, &params, &text, stop);
    }
}

#[test]
fn stop_tokens_end_of_text_and_fewest_tokens() {
    for dtype in DTYPES {
        let mut engine = load_with_text(|c| c.dtype = Some(dtype));
        let text = prompt(1, 5);
        let params = only(b"abc", 40);
        let whole = answer(&mut engine, &text, &params);
        let stop_token_ids = vec![byte(b'x'), byte(b'c')];
        let with_stop = SamplingParams { stop_token_ids, ..params };
        let stopped = answer(&mut engine, &text, &with_stop);
        let at = whole.text().find('c').unwrap();
        assert_eq!(stopped.tokens(), whole.tokens()[..=at]);
        assert_eq!(stopped.text(), whole.text()[..at], "the stop token is no text");
        assert_eq!(stopped.finished.stop_reason, Some(StopReason::Token(byte(b'c'))));

        // Not before 12 tokens are out; what comes before that is drawn from the rest.
        let late = SamplingParams { min_tokens: 12, top_k: Some(2), ..with_stop };
        let late = answer(&mut engine, &text, &SamplingParams { max_tokens: Some(200), ..late });
        let early = &late.tokens()[..12];
        assert!(early.iter().all(|token| [byte(b'a'), byte(b'b')].contains(token)), "{early:?}");
        assert_eq!(late.tokens().iter().filter(|t| **t == byte(b'c')).count(), 1);
        assert_eq!(late.finished.stop_reason, Some(StopReason::Token(byte(b'c'))));

        let ending = SamplingParams { logit_bias: vec![(EOS, 100.0)], ..sampled(6) };
        let ignored = answer(&mut engine, &text, &ending);
        assert_eq!(
            (ignored.tokens(), ignored.finished.reason),
            (vec![EOS; 6], FinishReason::Length)
        );
        let ending = SamplingParams { eos: EosRule::Stop, ..ending };
        let ended = answer(&mut engine, &text, &ending);
        assert_eq!((ended.tokens(), ended.finished.reason), (vec![EOS], FinishReason::Stop));
        assert_eq!((ended.finished.stop_reason.clone(), ended.text()), (None, String::new()));
        let late = answer(&mut engine, &text, &SamplingParams { min_tokens: 3, ..ending });
        assert_eq!((late.tokens.len(), late.tokens()[3]), (4, EOS));
        assert!(!late.tokens()[..3].contains(&EOS));
        assert!(late.tokens.iter().all(|token| token.logprob.is_finite()));
    }
}

#[test]
fn an_early_stop_string_is_text_until_the_fewest_tokens_are_out() {
    let mut engine = load_with_text(|_| {});
    let params = only(b"ab", 40);
    let text = answer(&mut engine, &prompt(1, 5), &params).text();
    let params = SamplingParams { stop: vec!["a".to_owned()], min_tokens: 10, ..params };
    let stopped = answer(&mut engine, &prompt(1, 5), &params);
    // The tenth token may be the one that stops it.
    let end = 9 + text[9..].find('a').unwrap();
    assert_eq!(stopped.text(), text[..end]);
    assert_eq!(stopped.finished.reason, FinishReason::Stop);
}

#[test]
fn most_tokens_and_the_end_of_the_context_give_length() {
    for dtype in DTYPES {
        let mut engine = load(Model::Llama, |c| {
            c.dtype = Some(dtype);
            c.max_model_len = Some(64);
        });
        for (prompt_len, max_tokens, expected) in [
            (10, Some(1), 1),
            (10, Some(17), 17),
            (60, None, 4),
            (60, Some(100), 4),
            (63, None, 1),
            (1, None, 63),
        ] {
            let params = SamplingParams { max_tokens, ..sampled(1) };
            let ended = answer(&mut engine, &prompt(2, prompt_len), &params);
            assert_eq!(ended.tokens.len(), expected, "{prompt_len} {max_tokens:?}");
            assert_eq!(ended.finished.reason, FinishReason::Length);
            assert_eq!((&ended.finished.stop_reason, &ended.finished.error), (&None, &None));
        }
        assert_eq!(engine.stats().used_blocks, 0);
    }
}

/// Tokens and the bits of their log-probabilities.
fn bits(answer: &Answer) -> Vec<(u32, u32, u32)> {
    let bits = |t: &engine::Token| (t.token, t.logprob.to_bits(), t.raw_logprob.to_bits());
    answer.tokens.iter().map(bits).collect()
}

#[test]
fn a_seed_reproduces_whatever_else_runs() {
    for dtype in DTYPES {
        let mut engine = load(Model::Qwen2, |c| {
            c.dtype = Some(dtype);
            c.max_num_batched_tokens = 48;
            c.max_num_seqs = 6;
        });
        let text = prompt(3, 35);
        let variants = [
            sampled(24),
            SamplingParams { temperature: 0.7, top_p: 0.9, top_k: Some(40), ..sampled(24) },
            SamplingParams { repetition_penalty: 1.3, frequency_penalty: 0.5, ..sampled(24) },
        ];
        let alone: Vec<_> =
            variants.iter().map(|params| bits(&answer(&mut engine, &text, params))).collect();
        assert_ne!(alone[0], alone[1]);
        let other_seed = SamplingParams { seed: Some(18), ..sampled(24) };
        assert_ne!(bits(&answer(&mut engine, &text, &other_seed)), alone[0]);

        let crowd: Vec<_> = (0..8)
            .map(|i| {
                let params = SamplingParams { seed: None, n: 2, ..sampled(10 + i * 7) };
                engine.add(Request::new(prompt(50 + i as u64, 5 + i * 9), params)).unwrap()
            })
            .collect();
        let mut events = engine.step().unwrap();
        let mine: Vec<_> = variants
            .iter()
            .map(|params| engine.add(Request::new(text.clone(), params.clone())).unwrap())
            .collect();
        for id in crowd.iter().step_by(2) {
            events.extend(engine.step().unwrap());
            engine.abort(*id);
        }
        while engine.has_work() {
            events.extend(engine.step().unwrap());
        }
        let answers = crate::support::collect(events);
        for (id, alone) in mine.iter().zip(&alone) {
            assert_eq!(&bits(&answers[&(*id, 0)]), alone);
        }
    }
}

#[test]
fn requests_without_a_seed_follow_the_engines() {
    let run = |seed: u64| {
        let mut engine = load(Model::Llama, |c| c.seed = seed);
        let params = SamplingParams { seed: None, n: 2, ..sampled(16) };
        for _ in 0..2 {
            engine.add(Request::new(prompt(4, 8), params.clone())).unwrap();
        }
        drain(&mut engine).values().map(Answer::tokens).collect::<Vec<_>>()
    };
    let first = run(7);
    assert_eq!(first, run(7));
    let different: std::collections::HashSet<_> = first.iter().chain(&run(8)).cloned().collect();
    assert_eq!(different.len(), 8, "each request, sample and engine seed has its own stream");
}

#[test]
fn temperature_0_takes_the_most_likely_token() {
    for dtype in DTYPES {
        let mut engine = engine_of(dtype);
        let text = prompt(5, 12);
        let params = SamplingParams { logprobs: Some(2), ..greedy(20) };
        let best = answer(&mut engine, &text, &params);
        for token in &best.tokens {
            assert_eq!(token.token, token.top[0].0);
            assert!((token.logprob - token.raw_logprob).abs() < 1e-6, "{token:?}");
        }
        for same in [
            SamplingParams { seed: Some(99), ..params.clone() },
            SamplingParams { top_k: Some(7), top_p: 0.3, ..params.clone() },
            SamplingParams { temperature: 1.0, top_k: Some(1), ..params.clone() },
            SamplingParams { temperature: 1.0, top_p: 1e-6, ..params.clone() },
            SamplingParams { temperature: 1.0, min_p: 1.0, ..params },
        ] {
            assert_eq!(answer(&mut engine, &text, &same).tokens(), best.tokens(), "{same:?}");
        }
    }
}

#[test]
fn alternatives_are_sorted_and_agree_with_the_token() {
    for dtype in DTYPES {
        let mut engine = engine_of(dtype);
        let text = prompt(6, 12);
        let mut outside = 0;
        for temperature in [0.6, 1.0, 2.0] {
            let params = SamplingParams { temperature, logprobs: Some(20), ..sampled(40) };
            let answer = answer(&mut engine, &text, &params);
            for token in &answer.tokens {
                assert_eq!(token.top.len(), 20);
                assert!(token.top.windows(2).all(|w| w[0].1 >= w[1].1), "{:?}", token.top);
                let ids: std::collections::HashSet<u32> = token.top.iter().map(|t| t.0).collect();
                assert_eq!(ids.len(), 20);
                let mass: f32 = token.top.iter().map(|t| t.1.exp()).sum();
                assert!(mass > 0.0 && mass <= 1.0 + 1e-5, "{mass}");
                match token.top.iter().find(|t| t.0 == token.token) {
                    Some((_, logprob)) => assert!((logprob - token.raw_logprob).abs() < 1e-5),
                    None => {
                        outside += 1;
                        assert!(token.raw_logprob <= token.top[19].1 + 1e-5, "{token:?}");
                    }
                }
                assert_eq!(token.logprob == token.raw_logprob, temperature == 1.0, "{token:?}");
            }
        }
        assert!(outside > 0, "some draws are not among the 20 most likely");
        let none = answer(&mut engine, &text, &SamplingParams { logprobs: Some(0), ..sampled(2) });
        assert!(none.tokens.iter().all(|token| token.top.is_empty()));
    }
}

#[test]
fn a_truncated_draw_reports_the_distribution_it_came_from() {
    for dtype in DTYPES {
        let mut engine = engine_of(dtype);
        let params = SamplingParams { top_k: Some(3), logprobs: Some(3), ..sampled(40) };
        let answer = answer(&mut engine, &prompt(7, 12), &params);
        let mut drawn = [0; 3];
        for token in &answer.tokens {
            let at = token.top.iter().position(|t| t.0 == token.token).expect("one of the three");
            drawn[at] += 1;
            let mass: f32 = token.top.iter().map(|t| t.1.exp()).sum();
            assert!((token.logprob - (token.raw_logprob - mass.ln())).abs() < 1e-5, "{token:?}");
        }
        assert!(drawn.iter().all(|count| *count > 0), "{drawn:?}");
    }
}
