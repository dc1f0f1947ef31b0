//! Grammars and tools over the routes: a random model must spell what it is made to spell.

use super::*;

/// Sampled with a seed, long enough for what the schemas here allow.
fn drawn(extra: Value) -> Value {
    let mut body = json!({"model": "tiny", "temperature": 1, "seed": 7, "max_tokens": 600});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "kind": {"enum": ["red", "green", 3]},
            "count": {"type": "integer", "minimum": 10, "maximum": 999},
            "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3}
        },
        "required": ["name", "kind", "count", "tags"],
        "additionalProperties": false
    })
}

fn check(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_eq!(value.as_object().unwrap().len(), 4, "{text}");
    assert!(value["name"].as_str().unwrap().chars().count() <= 8, "{text}");
    assert!([json!("red"), json!("green"), json!(3)].contains(&value["kind"]), "{text}");
    assert!((10..=999).contains(&value["count"].as_i64().unwrap()), "{text}");
    let tags = value["tags"].as_array().unwrap();
    assert!((1..=3).contains(&tags.len()) && tags.iter().all(Value::is_boolean), "{text}");
}

#[tokio::test]
async fn a_random_model_spells_what_a_schema_says_alone_or_in_a_batch() {
    let server = Server::new();
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "strict": true,
        "schema": schema()}});
    let messages = json!([{"role": "user", "content": "hi"}]);
    let mut body = drawn(json!({"messages": messages, "response_format": format, "n": 4,
        "logprobs": true, "top_logprobs": 1, "return_token_ids": true}));
    let (status, many) = server.post(CHAT, &body).await;
    assert_eq!(status, 200, "{many}");
    for choice in many["choices"].as_array().unwrap() {
        check(choice["message"]["content"].as_str().unwrap());
        assert_eq!(choice["finish_reason"], "stop");
        for token in choice["logprobs"]["content"].as_array().unwrap() {
            assert!(token["logprob"].as_f64().unwrap() <= 0.0, "{token}");
        }
    }
    let other = greedy(json!({"prompt": "a", "max_tokens": 64}));
    body["n"] = json!(1);
    let (alone, free) = tokio::join!(server.post(CHAT, &body), server.post(TEXT, &other));
    assert_eq!(alone.1["choices"][0]["token_ids"], many["choices"][0]["token_ids"]);
    let unmixed = server.post(TEXT, &other).await.1;
    assert_eq!(free.1["choices"], unmixed["choices"], "others keep their bits");
    body["temperature"] = json!(0);
    check(server.post(CHAT, &body).await.1["choices"][0]["message"]["content"].as_str().unwrap());
    body["top_p"] = json!(0.5);
    body["temperature"] = json!(1);
    body["presence_penalty"] = json!(1);
    check(server.post(CHAT, &body).await.1["choices"][0]["message"]["content"].as_str().unwrap());
}

#[tokio::test]
async fn every_spelling_constrains_both_apis() {
    let server = Server::new();
    let lark = "start: \"<\" /[ab]{3}/ \">\"";
    let cases = [
        (json!({"guided_regex": "[0-9]{3}-[xy]"}), 5),
        (json!({"structured_outputs": {"regex": "[0-9]{3}-[xy]"}}), 5),
        (json!({"guided_choice": ["a/b\n", "ü"]}), 0),
        (json!({"structured_outputs": {"choice": ["a/b\n", "ü"]}}), 0),
        (json!({"guided_grammar": lark}), 5),
        (json!({"structured_outputs": {"grammar": lark}, "ignore_eos": true}), 5),
    ];
    for (extra, len) in cases {
        let mut body = drawn(extra.clone());
        body["prompt"] = json!("go");
        let (status, answer) = server.post(TEXT, &body).await;
        assert_eq!(status, 200, "{answer}");
        let text = answer["choices"][0]["text"].as_str().unwrap().to_owned();
        match len {
            0 => assert!(["a/b\n", "ü"].contains(&text.as_str()), "{text}"),
            len => assert_eq!(text.len(), len, "{extra}: {text}"),
        }
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        let mut body = drawn(extra);
        body["messages"] = json!([{"role": "user", "content": "go"}]);
        body["stream"] = json!(true);
        let events = server.events(CHAT, &body).await;
        let last = &events.last().unwrap()["choices"][0];
        assert_eq!(last["finish_reason"], "stop");
    }
    for extra in [
        json!({"guided_json": schema()}),
        json!({"structured_outputs": {"json": schema().to_string()}}),
    ] {
        let mut body = drawn(extra);
        body["prompt"] = json!("go");
        check(server.post(TEXT, &body).await.1["choices"][0]["text"].as_str().unwrap());
    }
}

/// A schema in which each definition refers to the next, `depth` times.
fn chain(depth: usize) -> Value {
    let mut definitions = serde_json::Map::new();
    for i in 0..depth {
        let next = format!("#/$defs/d{}", i + 1);
        definitions.insert(format!("d{i}"), json!({"allOf": [{"$ref": next}, {"type": "object"}]}));
    }
    definitions.insert(format!("d{depth}"), json!({"type": "object"}));
    json!({"$ref": "#/$defs/d0", "$defs": definitions})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_grammars_are_refused_while_a_stream_goes_on() {
    let server = Server::new();
    let good = greedy(json!({"prompt": "a", "max_tokens": 64, "stream": true}));
    let expected = streamed_text(&server, &good).await;
    // Streams of others, one after the other, until the hostile requests are answered.
    let (stop, mut stopped) = oneshot::channel::<()>();
    let neighbour = Server { app: Arc::clone(&server.app), log: Arc::clone(&server.log) };
    let neighbour = tokio::spawn(async move {
        let mut streams = 0;
        while stopped.try_recv().is_err() {
            assert_eq!(streamed_text(&neighbour, &good).await, expected);
            streams += 1;
        }
        streams
    });
    let json = |schema: Value| json!({"guided_json": schema});
    let deep = format!("{}{}", "{\"items\":".repeat(10_000), "1") + &"}".repeat(10_000);
    let huge: Vec<String> = (0..1_000_000).map(|i| format!("v{i}")).collect();
    let limit = json!({"type": "array", "minItems": 5, "maxItems": 3});
    let cases = [
        json!({"guided_json": deep}),
        json(chain(10_000)),
        json(json!({"$ref": "#"})),
        json(json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})),
        json(json!({"enum": huge})),
        json(json!({"$ref": "http://127.0.0.1:9/x.json"})),
        json(json!({"$ref": "file:///etc/passwd"})),
        json(json!({"type": "string", "pattern": "("})),
        json(json!({"type": "string", "pattern": "(?=x)y"})),
        json(json!({"type": "nothing"})),
        json(json!({"enum": []})),
        json(json!(5)),
        json(limit),
        json!({"guided_regex": "(a"}),
        json!({"guided_regex": "(".repeat(10_000)}),
        json!({"guided_regex": "a".repeat(300_000)}),
        json!({"guided_choice": []}),
        json!({"guided_grammar": "start: other"}),
        json!({"guided_grammar": format!("start: {}\"a\"{}", "(".repeat(9000), ")".repeat(9000))}),
        json!({"guided_grammar": ""}),
        json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "x"}}}}),
    ];
    for mut body in cases {
        let shown: String = body.to_string().chars().take(80).collect();
        let param = body.as_object().unwrap().keys().next().unwrap().clone();
        body["prompt"] = json!("a");
        let begun = std::time::Instant::now();
        let (status, answer) = server.post(TEXT, &body).await;
        assert_eq!(status.as_u16(), 400, "{shown}: {answer}");
        assert_eq!(answer["error"]["param"], param, "{shown}: {answer}");
        assert!(begun.elapsed() < Duration::from_secs(10), "{shown}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.len() < 400 && !message.contains('\n'), "{message}");
    }
    // These are large, but regular: they compile lazily, and the answer is cut by its tokens.
    for regex in ["((a{1000}){1000}){1000}", "(a|a)*(a|aa)*b", "(x+x+)+y", ".*a.{200}|.*b.{199}"] {
        let body = json!({"prompt": "a", "guided_regex": regex, "max_tokens": 20, "seed": 1});
        let (status, answer) = server.post(TEXT, &body).await;
        assert_eq!(status, 200, "{regex}: {answer}");
    }
    stop.send(()).unwrap();
    assert!(neighbour.await.unwrap() > 0, "no stream ended meanwhile");
}

/// The text of a streamed completion, which must have come to its end.
async fn streamed_text(server: &Server, body: &Value) -> String {
    let events = server.events(TEXT, body).await;
    let choices = events.iter().map(|event| &event["choices"][0]);
    assert_eq!(choices.clone().next_back().unwrap()["finish_reason"], "length");
    choices.map(|choice| choice["text"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn a_dead_end_fails_its_own_request() {
    let server = Server::new();
    // `</s>` may not come before 9 tokens, and nothing else may come after `a`.
    let dead = json!({"prompt": "a", "guided_regex": "a|ab", "min_tokens": 9, "logit_bias": {"101": -100}});
    let (status, answer) = server.post(TEXT, &dead).await;
    // Token 101 is `b`, which a bias makes unlikely but does not ban: the grammar still gets its way.
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["choices"][0]["text"], "ab");
    let dead = json!({"prompt": "a", "guided_regex": "a|a\u{1}", "min_tokens": 9,
        "stop_token_ids": [4]});
    let (status, answer) = server.post(TEXT, &dead).await;
    assert_eq!(status, 400, "{answer}");
    assert_eq!(answer["error"]["message"], "no token may be drawn here");
    let (ok, _) = server.post(TEXT, &greedy(json!({"prompt": "a", "max_tokens": 1}))).await;
    assert_eq!(ok, 200);
}

fn tools() -> Value {
    let city = json!({"type": "object", "properties": {"city": {"$ref": "#/$defs/c"}},
        "required": ["city"], "additionalProperties": false, "$defs": {"c": {"enum": ["Rome", "Oslo"]}}});
    json!([
        {"type": "function", "function": {"name": "weather", "description": "d", "parameters": city}},
        {"type": "function", "function": {"name": "now", "parameters": {"type": "object",
            "properties": {}, "additionalProperties": false}}}
    ])
}

#[tokio::test]
async fn forced_tools_are_called_whole_and_streamed() {
    let server = Server::new();
    let named = json!({"type": "function", "function": {"name": "weather"}});
    for choice in [json!("required"), named.clone()] {
        let mut body = drawn(json!({"messages": [{"role": "user", "content": "hi"}],
            "tools": tools(), "tool_choice": choice, "parallel_tool_calls": false}));
        let (status, answer) = server.post(CHAT, &body).await;
        assert_eq!(status, 200, "{answer}");
        let whole = &answer["choices"][0];
        assert_eq!(whole["finish_reason"], "tool_calls", "{answer}");
        assert_eq!(whole["message"]["content"], Value::Null);
        let calls = whole["message"]["tool_calls"].as_array().unwrap();
        for call in calls {
            let name = call["function"]["name"].as_str().unwrap();
            let arguments: Value =
                serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
            match name {
                "weather" => {
                    assert!(["Rome", "Oslo"].contains(&arguments["city"].as_str().unwrap()))
                }
                "now" => assert_eq!(arguments, json!({})),
                other => panic!("{other}"),
            }
            assert!(call["id"].as_str().unwrap().starts_with("call_"));
        }
        assert_eq!(calls.len(), 1);
        if choice == named {
            assert_eq!(calls[0]["function"]["name"], "weather");
        }
        body["stream"] = json!(true);
        let events = server.events(CHAT, &body).await;
        let mut streamed: Vec<(String, String)> = Vec::new();
        for event in &events {
            for delta in event["choices"][0]["delta"]["tool_calls"].as_array().into_iter().flatten()
            {
                let function = &delta["function"];
                if let Some(name) = function["name"].as_str() {
                    assert_eq!(delta["index"], streamed.len());
                    assert!(delta["id"].is_string() && delta["type"] == "function");
                    streamed.push((name.to_owned(), String::new()));
                }
                streamed.last_mut().unwrap().1.push_str(function["arguments"].as_str().unwrap());
            }
        }
        let whole: Vec<(String, String)> = calls
            .iter()
            .map(|call| &call["function"])
            .map(|f| (f["name"].as_str().unwrap().into(), f["arguments"].as_str().unwrap().into()))
            .collect();
        assert_eq!(streamed, whole);
        assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
    }
}

#[tokio::test]
async fn tools_are_optional_remembered_and_bounded() {
    let server = Server::new();
    let history = json!([
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "c1", "type": "function",
            "function": {"name": "now", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"}
    ]);
    let mut body = greedy(json!({"messages": history, "tools": tools()}));
    let (status, answer) = server.post(CHAT, &body).await;
    assert_eq!(status, 200, "{answer}");
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "length");
    assert!(
        choice["message"]["content"].is_string() && choice["message"].get("tool_calls").is_none()
    );
    body["tool_choice"] = json!("none");
    assert_eq!(server.post(CHAT, &body).await.0, 200);
    let many: Vec<Value> = (0..129).map(|_| tools()[0].clone()).collect();
    let cases = [
        (json!({"tools": many}), "tools"),
        (json!({"tools": [{"type": "function"}]}), "tools"),
        (json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}), "tools"),
        (json!({"tools": {}}), "tools"),
        (json!({"tools": [], "tool_choice": "required"}), "tool_choice"),
        (json!({"tool_choice": {"type": "function", "function": {"name": "x"}}}), "tool_choice"),
        (json!({"tool_choice": "often"}), "tool_choice"),
        (json!({"tool_choice": "required", "guided_regex": "a"}), "guided_regex"),
        (json!({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}), "messages"),
    ];
    for (change, param) in cases {
        let mut body = greedy(json!({"messages": history, "tools": tools()}));
        body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let (status, answer) = server.post(CHAT, &body).await;
        assert_eq!((status.as_u16(), &answer["error"]["param"]), (400, &json!(param)), "{answer}");
    }
}
