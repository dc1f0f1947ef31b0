//! Request parameters beyond sampling: what is said of prompts, unknown fields, usage in streams.

use engine::LogprobsMode;

use super::*;
use crate::UnknownFields;

/// Bits of the log-probabilities that the engine's own scoring gives to `tokens` but the first.
fn score_bits(tokens: &[u32]) -> Vec<u32> {
    let score = engine().score(&[tokens.to_vec()], 1.0).unwrap().remove(0);
    score.logprobs.iter().map(|x| x.to_bits()).collect()
}

fn bits(value: &Value) -> u32 {
    (value.as_f64().unwrap() as f32).to_bits()
}

/// The ids that this body's prompt has.
async fn prompt_ids(server: &Server, body: Value) -> Vec<u32> {
    let (status, answer) = server.post("/tokenize", &body).await;
    assert_eq!(status, 200, "{answer}");
    serde_json::from_value(answer["tokens"].clone()).unwrap()
}

/// Posts `body`, which is refused; the error's parameter, code and message.
async fn refused(server: &Server, path: &str, body: &Value) -> (String, String, String) {
    let (status, answer) = server.post(path, body).await;
    assert_eq!(status, 400, "{body}: {answer}");
    let text = |key: &str| answer["error"][key].as_str().unwrap_or_default().to_owned();
    (text("param"), text("code"), text("message"))
}

/// Checks vLLM's shape of `shown` against the prompt's ids, with `top` alternatives.
fn check_prompt_logprobs(shown: &Value, ids: &[u32], top: usize) {
    let shown = shown.as_array().unwrap();
    assert_eq!((shown.len(), &shown[0]), (ids.len(), &Value::Null));
    for ((entries, id), expected) in shown[1..].iter().zip(&ids[1..]).zip(score_bits(ids)) {
        let entries = entries.as_object().unwrap();
        let own = &entries[&id.to_string()];
        assert_eq!(bits(&own["logprob"]), expected);
        let spelled = String::from_utf8_lossy(&[(*id - 3) as u8]).into_owned();
        assert_eq!(own["decoded_token"], spelled);
        let rank = own["rank"].as_u64().unwrap() as usize;
        assert_eq!(entries.len(), if rank <= top { top } else { top + 1 });
        let mut ranks: Vec<u64> = entries.values().map(|e| e["rank"].as_u64().unwrap()).collect();
        ranks.sort_unstable();
        let mut expected: Vec<u64> = (1..=top as u64).collect();
        expected.extend((rank > top).then_some(rank as u64));
        assert_eq!(ranks, expected);
    }
}

#[tokio::test]
async fn prompt_logprobs_are_those_of_scoring_in_both_apis() {
    let server = Server::new();
    // Longer than a batch, so it comes in chunks; the second time the prefix cache knows it.
    let text = "the quick brown fox ".repeat(15);
    let ids = prompt_ids(&server, json!({"prompt": text})).await;
    assert_eq!(ids.len(), 300);
    for top in [0, 3] {
        let body = greedy(json!({"prompt": text, "prompt_logprobs": top, "n": 2}));
        let (status, answer) = server.post(TEXT, &body).await;
        assert_eq!(status, 200, "{answer}");
        for choice in answer["choices"].as_array().unwrap() {
            check_prompt_logprobs(&choice["prompt_logprobs"], &ids, top);
            assert_eq!(choice["logprobs"], Value::Null);
        }
        assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
        assert_eq!(answer["usage"]["completion_tokens"], 16);
    }
    let messages = json!([{"role": "user", "content": "hi"}]);
    let ids = prompt_ids(&server, json!({"messages": messages})).await;
    let (status, answer) = server.post(CHAT, &chat(json!({"prompt_logprobs": 2}))).await;
    assert_eq!(status, 200, "{answer}");
    check_prompt_logprobs(&answer["prompt_logprobs"], &ids, 2);
    let params = json!({"temperature": 0, "max_tokens": 1, "prompt_logprobs": 1});
    let body = json!({"token_ids": ids, "sampling_params": params});
    let (status, answer) = server.post("/inference/v1/generate", &body).await;
    assert_eq!(status, 200, "{answer}");
    check_prompt_logprobs(&answer["prompt_logprobs"], &ids, 1);
    // Who does not ask is told nothing.
    let (_, answer) = server.post(CHAT, &chat(json!({}))).await;
    assert!(answer.get("prompt_logprobs").is_none());
}

#[tokio::test]
async fn prompt_logprobs_are_bounded() {
    let server = Server::new();
    let ask = |change: Value| {
        let mut body = greedy(json!({"prompt": "ab"}));
        body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        body
    };
    for (k, message) in [
        (-1, "prompt_logprobs is -1, limit is 0 to 20: the whole vocabulary is not offered"),
        (21, "prompt_logprobs is 21, limit is 0 to 20"),
    ] {
        for (path, body) in [
            (TEXT, ask(json!({"prompt_logprobs": k}))),
            (CHAT, chat(json!({"prompt_logprobs": k}))),
        ] {
            let found = refused(&server, path, &body).await;
            assert_eq!(found, ("prompt_logprobs".into(), "invalid_value".into(), message.into()));
        }
    }
    let found = refused(&server, TEXT, &ask(json!({"prompt_logprobs": 1, "stream": true}))).await;
    assert_eq!(found.2, "prompt_logprobs needs stream to be false");
    let many = json!({"prompt": vec!["a".repeat(1000); 8], "n": 128, "prompt_logprobs": 1});
    let found = refused(&server, TEXT, &ask(many)).await;
    let message = "prompt_logprobs asks for 2048000 log-probabilities of prompts, limit is 1048576";
    assert_eq!(found.2, message);
}

#[tokio::test]
async fn echo_puts_the_prompt_before_the_answer() {
    let server = Server::new();
    // Two bytes of one character are two tokens.
    let text = "héy";
    let ids = prompt_ids(&server, json!({"prompt": text})).await;
    let (_, plain) = server.post(TEXT, &greedy(json!({"prompt": text, "logprobs": 2}))).await;
    let body = greedy(json!({"prompt": text, "logprobs": 2, "echo": true, "n": 2}));
    let (status, echoed) = server.post(TEXT, &body).await;
    assert_eq!(status, 200, "{echoed}");
    let answer = plain["choices"][0]["text"].as_str().unwrap();
    for choice in echoed["choices"].as_array().unwrap() {
        assert_eq!(choice["text"], format!("{text}{answer}"));
        let logprobs = &choice["logprobs"];
        let list = |key: &str| logprobs[key].as_array().unwrap().clone();
        assert_eq!(list("tokens").len(), 12);
        assert_eq!(list("token_logprobs")[0], Value::Null);
        assert_eq!(list("top_logprobs")[0], Value::Null);
        let scored: Vec<u32> = list("token_logprobs")[1..4].iter().map(bits).collect();
        assert_eq!(scored, score_bits(&ids));
        assert!(list("top_logprobs")[1].as_object().unwrap().len() >= 2);
        // What follows is the answer's own, moved by the prompt's three characters.
        let own = &plain["choices"][0]["logprobs"];
        assert_eq!(list("token_logprobs")[4..], *own["token_logprobs"].as_array().unwrap());
        let offsets = own["text_offset"].as_array().unwrap().iter();
        let moved = offsets.map(|offset| offset.as_u64().unwrap() + 3);
        let expected: Vec<u64> = [0, 1, 1, 2].into_iter().chain(moved).collect();
        assert_eq!(logprobs["text_offset"], json!(expected));
    }
    // Without log-probabilities, and in chats not at all.
    let body = greedy(json!({"prompt": ids, "echo": true}));
    let (_, answer_only) = server.post(TEXT, &body).await;
    assert_eq!(answer_only["choices"][0]["text"], format!("{text}{answer}"));
    assert_eq!(answer_only["choices"][0]["logprobs"], Value::Null);
    let found = refused(&server, CHAT, &chat(json!({"echo": true}))).await;
    assert_eq!((found.0.as_str(), found.1.as_str()), ("echo", "unsupported_parameter"));
    assert_eq!(server.post(CHAT, &chat(json!({"echo": false}))).await.0, 200);
    let body = json!({"token_ids": [5], "echo": true});
    assert_eq!(refused(&server, "/inference/v1/generate", &body).await.0, "echo");
}

#[tokio::test]
async fn an_echo_streams_and_can_be_all_there_is() {
    let server = Server::new();
    for max_tokens in [0, 4] {
        let body = greedy(json!({"prompt": ["héy", "zz"], "logprobs": 1, "echo": true, "n": 2,
            "max_tokens": max_tokens}));
        let (status, whole) = server.post(TEXT, &body).await;
        assert_eq!(status, 200, "{whole}");
        assert_eq!(whole["usage"]["completion_tokens"], 4 * max_tokens);
        assert_eq!(whole["usage"]["prompt_tokens"], 6);
        let mut streamed = body;
        streamed["stream"] = json!(true);
        let events = server.events(TEXT, &streamed).await;
        for index in 0..4 {
            let choice = &whole["choices"][index];
            assert_eq!(choice["finish_reason"], "length");
            let mine = || events.iter().map(|e| &e["choices"][0]).filter(|c| c["index"] == index);
            let text: String = mine().map(|c| c["text"].as_str().unwrap()).collect();
            assert_eq!(choice["text"], text);
            assert!(text.starts_with(if index < 2 { "héy" } else { "zz" }));
            for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
                let pieces = mine().filter_map(|c| c["logprobs"][key].as_array());
                let joined: Vec<Value> = pieces.flatten().cloned().collect();
                assert_eq!(choice["logprobs"][key], Value::Array(joined), "{key}");
            }
        }
    }
    // A whole context can be scored, and without an echo there would be nothing to answer.
    let full = "a".repeat(server.app.service.max_model_len());
    let body = greedy(json!({"prompt": full, "logprobs": 0, "echo": true, "max_tokens": 0}));
    let (status, answer) = server.post(TEXT, &body).await;
    assert_eq!(status, 200, "{answer}");
    let scored = answer["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap();
    assert_eq!(scored.len(), full.len());
    let body = greedy(json!({"prompt": "a", "max_tokens": 0}));
    assert_eq!(refused(&server, TEXT, &body).await.0, "max_tokens");
    let body = greedy(json!({"prompt": "a", "max_tokens": 0, "echo": true, "min_tokens": 1}));
    assert_eq!(refused(&server, TEXT, &body).await.0, "min_tokens");
}

#[tokio::test]
async fn unknown_fields_are_refused_when_asked_to() {
    let server = Server::with(|config| config.unknown_fields = UnknownFields::Refuse);
    let tokens = json!({"token_ids": [5], "zebra": 1});
    let inner = json!({"token_ids": [5], "sampling_params": {"zebra": 1}});
    for (path, body, name) in [
        (TEXT, greedy(json!({"prompt": "a", "zebra": 1})), "zebra"),
        (CHAT, chat(json!({"zebra": [1]})), "zebra"),
        ("/tokenize", json!({"prompt": "a", "zebra": 1}), "zebra"),
        ("/detokenize", json!({"tokens": [5], "zebra": 1}), "zebra"),
        ("/inference/v1/generate", tokens, "zebra"),
        ("/inference/v1/generate", inner, "zebra"),
        (
            TEXT,
            greedy(json!({"prompt": "a", "stream": true, "stream_options": {"zebra": 1}})),
            "stream_options.zebra",
        ),
    ] {
        let message = format!("{name:?} is no field of this request");
        let found = refused(&server, path, &body).await;
        assert_eq!(found, (name.to_owned(), "unsupported_parameter".to_owned(), message), "{path}");
    }
    // A stranger is refused with any value; what has no effect but is known is none.
    let body = greedy(json!({"prompt": "a", "user": "me", "store": false, "zebra": null}));
    assert_eq!(server.post(TEXT, &body).await.0, 400);
    let body = greedy(json!({"prompt": "a", "user": "me", "store": false, "best_of": 1}));
    assert_eq!(server.post(TEXT, &body).await.0, 200);
    assert!(server.log.lock().unwrap().iter().all(|e| !matches!(e, LogEvent::UnknownField { .. })));
}

#[tokio::test]
async fn salts_keep_prompts_apart() {
    let server = Server::new();
    let prompt = "x".repeat(70);
    let cached = async |salt: Option<&str>| {
        let body = greedy(json!({"prompt": prompt, "cache_salt": salt, "max_tokens": 2}));
        let (status, answer) = server.post(TEXT, &body).await;
        assert_eq!(status, 200, "{answer}");
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!(cached(None).await, 0);
    assert_eq!(cached(None).await, 64);
    assert_eq!(cached(Some("ann")).await, 0);
    assert_eq!(cached(Some("bob")).await, 0);
    assert_eq!(cached(Some("ann")).await, 64);
    assert_eq!(cached(None).await, 64);
    let body = greedy(json!({"prompt": "a", "cache_salt": ""}));
    assert_eq!(refused(&server, TEXT, &body).await.2, "cache_salt is empty");
    assert_eq!(refused(&server, CHAT, &chat(json!({"cache_salt": 5}))).await.0, "cache_salt");
}

#[tokio::test]
async fn prompts_are_cut_to_their_last_tokens() {
    let server = Server::new();
    let limit = server.app.service.max_model_len();
    let ask = |k: i64, prompt: &str, max_tokens: usize| {
        greedy(json!({"prompt": prompt, "truncate_prompt_tokens": k, "max_tokens": max_tokens,
            "return_token_ids": true}))
    };
    let (_, answer) = server.post(TEXT, &ask(2, "abcd", 3)).await;
    assert_eq!(answer["choices"][0]["prompt_token_ids"], json!([102, 103]));
    assert_eq!(answer["usage"]["prompt_tokens"], 2);
    let (_, answer) = server.post(TEXT, &ask(9, "abcd", 3)).await;
    assert_eq!(answer["usage"]["prompt_tokens"], 4);
    let (status, answer) = server.post(TEXT, &ask(-1, &"a".repeat(limit + 5), 3)).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["usage"]["prompt_tokens"], limit - 3);
    let found = refused(&server, TEXT, &ask(-1, "ab", limit)).await;
    assert_eq!(found.1, "context_length_exceeded");
    for k in [0, -2, limit as i64 + 1] {
        let message = format!("truncate_prompt_tokens is {k}, limit is -1 or 1 to {limit}");
        assert_eq!(refused(&server, TEXT, &ask(k, "ab", 3)).await.2, message);
    }
    let (_, answer) = server.post(CHAT, &chat(json!({"truncate_prompt_tokens": 5}))).await;
    assert_eq!(answer["usage"]["prompt_tokens"], 5);
}

#[tokio::test]
async fn chat_templates_are_given_variables_of_plain_types() {
    let dir = tiny_model();
    let template = "{{ bos_token }}{{ mood }}{{ level + 1 }}{{ quiet }}{{ none is none }}";
    std::fs::write(dir.0.join("chat_template.jinja"), template).unwrap();
    let config = EngineConfig { threads: Some(1), max_model_len: Some(256), ..Default::default() };
    let engine = Engine::load(&ModelSource::open(&dir.0).unwrap(), &config).unwrap();
    let service = Arc::new(Service::start(engine).unwrap());
    let app = App::new(service, ServerConfig::new("tiny")).unwrap();
    let server = Server { app, log: Arc::default() };
    let given = json!({"mood": "calm", "level": 4, "quiet": true, "none": null});
    let body = chat(json!({"chat_template_kwargs": given, "echo": false}));
    let (status, answer) = server.post(CHAT, &body).await;
    assert_eq!(status, 200, "{answer}");
    let tokens =
        prompt_ids(&server, json!({"messages": body["messages"], "chat_template_kwargs": given}));
    let (_, text) = server.post("/detokenize", &json!({"tokens": tokens.await})).await;
    let text = text["prompt"].as_str().unwrap();
    assert_eq!(text, "<s>calm5TrueTrue");
    // One token for `<s>`, and one a byte.
    assert_eq!(answer["usage"]["prompt_tokens"], 14);
    let long = "x".repeat(4097);
    let many: Vec<(String, Value)> = (0..65).map(|i| (format!("v{i}"), json!(i))).collect();
    for (given, message) in [
        (json!([1]), "is an array, expected an object"),
        (json!({"messages": "x"}), "has \"messages\", which the template is given in any case"),
        (json!({"tools": true}), "has \"tools\", which the template is given in any case"),
        (json!({"documents": 1}), "has \"documents\", which the template is given in any case"),
        (
            json!({"a": [1]}),
            "has \"a\" that is an array, expected a boolean, a number, a string or null",
        ),
        (json!({"a": long}), "has \"a\" of 4097 bytes, limit is 4096"),
        (json!({"": 1}), "has a name of 0 bytes, limit is 1 to 64"),
        (Value::Object(many.into_iter().collect()), "has 65 entries, limit is 64"),
    ] {
        let found = refused(&server, CHAT, &chat(json!({"chat_template_kwargs": given}))).await;
        let message = format!("chat_template_kwargs {message}");
        assert_eq!(found, ("chat_template_kwargs".into(), "invalid_value".into(), message));
    }
    let found = refused(&server, CHAT, &chat(json!({"chat_template": "{{ 1 }}"}))).await;
    assert_eq!((found.0.as_str(), found.1.as_str()), ("chat_template", "unsupported_parameter"));
}

#[tokio::test]
async fn usage_can_come_with_each_piece() {
    let server = Server::new();
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    for (path, body) in [
        (TEXT, greedy(json!({"prompt": "abc", "logprobs": 0, "stream": true}))),
        (CHAT, chat(json!({"logprobs": true, "stream": true}))),
    ] {
        let mut body = body;
        body["stream_options"] = options.clone();
        let events = server.events(path, &body).await;
        let (last, pieces) = events.split_last().unwrap();
        let total = last["usage"]["prompt_tokens"].as_u64().unwrap();
        let mut counted = Vec::new();
        for piece in pieces {
            let usage = &piece["usage"];
            assert_eq!(usage["prompt_tokens"], total);
            let completion = usage["completion_tokens"].as_u64().unwrap();
            assert_eq!(usage["total_tokens"], total + completion);
            assert!(usage.get("prompt_tokens_details").is_none());
            counted.push(completion);
        }
        let opening = u64::from(path == TEXT);
        let expected: Vec<u64> = (opening..=8).chain([8]).collect();
        assert_eq!(counted, expected);
        assert_eq!(
            (&last["choices"], &last["usage"]["completion_tokens"]),
            (&json!([]), &json!(8))
        );
        assert_eq!(last["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
        body["stream_options"] = json!({"continuous_usage_stats": true});
        let found = refused(&server, path, &body).await;
        assert_eq!(found.0, "stream_options");
        assert_eq!(found.2, "continuous_usage_stats needs include_usage to be true");
    }
}

#[tokio::test]
async fn log_probabilities_are_of_the_distribution_the_server_is_set_to() {
    let raw = Server::new();
    let processed = Server::with(|config| config.logprobs_mode = LogprobsMode::Processed);
    // Only "a", "b" and "c" are likely enough, tokens that each have a spelling of their own.
    let asked = json!({"prompt": "ab", "seed": 3, "temperature": 0.5, "top_k": 2, "logprobs": 4,
        "logit_bias": {"100": 50, "101": 50, "102": 50},
        "max_tokens": 6, "ignore_eos": true, "prompt_logprobs": 0});
    let (_, raw) = raw.post(TEXT, &asked).await;
    let (_, processed) = processed.post(TEXT, &asked).await;
    let [raw, processed] = [raw, processed].map(|answer| answer["choices"][0].clone());
    assert_eq!(raw["text"], processed["text"]);
    // A prompt is not sampled: of it, both say the same.
    assert_eq!(raw["prompt_logprobs"], processed["prompt_logprobs"]);
    for place in 0..6 {
        let at = |choice: &Value, key: &str| choice["logprobs"][key][place].clone();
        let list = |choice: &Value| -> Vec<f64> {
            let top = at(choice, "top_logprobs");
            top.as_object().unwrap().values().map(|x| x.as_f64().unwrap()).collect()
        };
        let total: f64 = list(&processed).iter().map(|x| x.exp()).sum();
        assert_eq!(list(&processed).len(), 2);
        assert!((total - 1.0).abs() < 1e-5, "{total}");
        assert!(list(&raw).iter().map(|x| x.exp()).sum::<f64>() < 0.999);
        let own = |choice| at(choice, "token_logprobs").as_f64().unwrap();
        assert!(own(&raw) < own(&processed));
    }
}

#[tokio::test]
async fn what_is_not_offered_is_named_and_its_off_value_is_taken() {
    let server = Server::new();
    let ask = |change: &Value| {
        let mut body = greedy(json!({"prompt": "ab", "max_tokens": 1}));
        body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        body
    };
    for (change, name) in [
        (json!({"priority": 1}), "priority"),
        (json!({"priority": -1}), "priority"),
        (json!({"best_of": 2}), "best_of"),
        (json!({"suffix": "x"}), "suffix"),
        (json!({"use_beam_search": true}), "use_beam_search"),
        (json!({"length_penalty": 0.5}), "length_penalty"),
        (json!({"allowed_token_ids": [5]}), "allowed_token_ids"),
        (json!({"bad_words": ["x"]}), "bad_words"),
        (json!({"logits_processors": ["x"]}), "logits_processors"),
        (json!({"prompt_embeds": "x"}), "prompt_embeds"),
        (json!({"chat_template_kwargs": {"a": 1}}), "chat_template_kwargs"),
    ] {
        let found = refused(&server, TEXT, &ask(&change)).await;
        assert_eq!(
            (found.0.as_str(), found.1.as_str()),
            (name, "unsupported_parameter"),
            "{change}"
        );
    }
    for change in [
        json!({"priority": 0}),
        json!({"best_of": 2, "n": 2}),
        json!({"suffix": "", "use_beam_search": false, "length_penalty": 1.0}),
        json!({"chat_template_kwargs": {}}),
    ] {
        assert_eq!(server.post(TEXT, &ask(&change)).await.0, 200, "{change}");
    }
}

#[tokio::test]
async fn the_newer_name_of_the_limit_wins() {
    let server = Server::new();
    for (limits, expected) in [
        (json!({"max_tokens": 3}), 3),
        (json!({"max_tokens": null, "max_completion_tokens": 4}), 4),
        (json!({"max_tokens": 3, "max_completion_tokens": 5}), 5),
        (json!({"max_tokens": 5, "max_completion_tokens": 2}), 2),
    ] {
        let (status, answer) = server.post(CHAT, &chat(limits.clone())).await;
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["usage"]["completion_tokens"], expected, "{limits}");
    }
    let body = chat(json!({"max_completion_tokens": 0}));
    assert_eq!(refused(&server, CHAT, &body).await.0, "max_tokens");
}

#[tokio::test]
async fn what_a_model_recommends_bounds_a_chat_that_does_not_say() {
    let most = |max| {
        Server::with(|config| {
            let params = engine::SamplingParams { max_tokens: Some(max), ..Default::default() };
            config.default_params = Some(params);
        })
    };
    let server = most(3);
    let limit = server.app.service.max_model_len();
    let body = |text: &str| {
        json!({"ignore_eos": true, "temperature": 0, "prompt": text,
            "messages": [{"role": "user", "content": text}]})
    };
    let tokens = async |server: &Server, path: &str, extra: Value| {
        let mut body = body("hi");
        let other = if path == CHAT { "prompt" } else { "messages" };
        let fields = body.as_object_mut().unwrap();
        fields.remove(other);
        fields.extend(extra.as_object().unwrap().clone());
        let (status, answer) = server.post(path, &body).await;
        assert_eq!(status, 200, "{answer}");
        (answer["usage"]["prompt_tokens"].as_u64(), answer["usage"]["completion_tokens"].as_u64())
    };
    assert_eq!(tokens(&server, CHAT, json!({})).await.1, Some(3));
    assert_eq!(tokens(&server, CHAT, json!({"max_tokens": 5})).await.1, Some(5));
    assert_eq!(tokens(&server, CHAT, json!({"max_completion_tokens": 2})).await.1, Some(2));
    assert_eq!(tokens(&server, CHAT, json!({"min_tokens": 6})).await.1, Some(6));
    assert_eq!(tokens(&server, TEXT, json!({})).await.1, Some(16), "as in OpenAI's API");
    // A prompt that leaves fewer is not refused for what nobody asked for.
    let server = most(limit);
    let long = json!([{"role": "user", "content": "a".repeat(limit - 60)}]);
    let (prompt, answer) = tokens(&server, CHAT, json!({"messages": long})).await;
    assert_eq!(prompt.unwrap() + answer.unwrap(), limit as u64);
}
