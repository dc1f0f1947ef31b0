//! `POST /v1/responses`: the chat's answers in other words, whole and streamed.

use super::*;

const RESPONSES: &str = "/v1/responses";

fn asked(extra: Value) -> Value {
    let mut body = json!({"model": "tiny", "temperature": 0, "ignore_eos": true,
        "max_output_tokens": 8, "input": "hi"});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

/// The events of a stream; each names its type twice, and they are numbered.
async fn events(server: &Server, body: &Value) -> Vec<Value> {
    let response = server.send(post_request(RESPONSES, body.to_string())).await;
    assert_eq!(response.headers()[header::CONTENT_TYPE], "text/event-stream");
    let text = text_of(response).await;
    let events: Vec<Value> = text
        .split_terminator("\n\n")
        .map(|event| {
            let (kind, data) = event.split_once("\ndata: ").unwrap();
            let data: Value = serde_json::from_str(data).unwrap();
            assert_eq!(data["type"], kind.strip_prefix("event: ").unwrap());
            data
        })
        .collect();
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    events
}

/// Without what differs from request to request.
fn comparable(response: &Value) -> Value {
    let mut response = response.clone();
    for name in ["id", "created_at"] {
        response[name] = Value::Null;
    }
    for item in response["output"].as_array_mut().unwrap() {
        item["id"] = Value::Null;
        if item["type"] == "function_call" {
            item["call_id"] = Value::Null;
        }
    }
    // A prompt that has been seen is in the cache.
    response["usage"]["input_tokens_details"] = Value::Null;
    response
}

fn kinds(events: &[Value]) -> Vec<&str> {
    let mut kinds: Vec<&str> = events.iter().map(|e| e["type"].as_str().unwrap()).collect();
    kinds.dedup();
    kinds
}

#[tokio::test]
async fn a_response_is_the_chats_answer() {
    let server = Server::new();
    let (status, answer) = server
        .post(RESPONSES, &asked(json!({"instructions": "be brief", "metadata": {"a": "b"}})))
        .await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let messages =
        json!([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]);
    let (_, chat) = server.post(CHAT, &greedy(json!({"messages": messages}))).await;
    let id = answer["id"].as_str().unwrap();
    assert!(id.starts_with("resp_") && id.len() == 37, "{id}");
    for (key, value) in [
        ("object", json!("response")),
        ("status", json!("incomplete")),
        ("incomplete_details", json!({"reason": "max_output_tokens"})),
        ("model", json!("tiny")),
        ("instructions", json!("be brief")),
        ("max_output_tokens", json!(8)),
        ("temperature", json!(0)),
        ("top_p", json!(1.0)),
        ("tools", json!([])),
        ("tool_choice", json!("auto")),
        ("text", json!({"format": {"type": "text"}})),
        ("metadata", json!({"a": "b"})),
        ("store", json!(false)),
        ("error", Value::Null),
    ] {
        assert_eq!(answer[key], value, "{key}");
    }
    let content = json!([{"type": "output_text", "annotations": [], "logprobs": [],
        "text": chat["choices"][0]["message"]["content"]}]);
    let item = &answer["output"][0];
    assert_eq!((&item["type"], &item["role"]), (&json!("message"), &json!("assistant")));
    assert_eq!((&item["status"], &item["content"]), (&json!("incomplete"), &content));
    let usage = &answer["usage"];
    assert_eq!(usage["input_tokens"], chat["usage"]["prompt_tokens"]);
    assert_eq!(usage["output_tokens"], 8);
    assert_eq!(usage["output_tokens_details"], json!({"reasoning_tokens": 0}));
    assert_eq!(usage["input_tokens_details"], json!({"cached_tokens": 0}));
    assert_eq!(usage["total_tokens"], chat["usage"]["total_tokens"]);
}

#[tokio::test]
async fn a_stream_tells_the_same_in_the_order_of_the_api() {
    let server = Server::new();
    let mut body = asked(json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2}));
    let (status, whole) = server.post(RESPONSES, &body).await;
    assert_eq!(status, StatusCode::OK, "{whole}");
    let logprobs = whole["output"][0]["content"][0]["logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), 8);
    assert_eq!(logprobs[0]["top_logprobs"].as_array().unwrap().len(), 2);
    body["stream"] = json!(true);
    let events = events(&server, &body).await;
    let expected = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ];
    assert_eq!(kinds(&events), expected);
    assert_eq!(events[0]["response"]["status"], "in_progress");
    assert_eq!(events[0]["response"]["output"], json!([]));
    assert_eq!(events[0]["response"]["usage"], Value::Null);
    let last = &events.last().unwrap()["response"];
    assert_eq!(comparable(last), comparable(&whole));
    let of = |kind: &str| -> Vec<&Value> { events.iter().filter(|e| e["type"] == kind).collect() };
    let text: String = of("response.output_text.delta")
        .iter()
        .map(|event| event["delta"].as_str().unwrap())
        .collect();
    assert_eq!(whole["output"][0]["content"][0]["text"], text);
    assert_eq!(of("response.output_text.done")[0]["text"], text);
    let item = &last["output"][0];
    for event in &events[3..events.len() - 2] {
        assert_eq!((&event["item_id"], &event["output_index"]), (&item["id"], &json!(0)));
    }
}

fn tool() -> Value {
    json!({"type": "function", "name": "weather", "parameters": {"type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"],
        "additionalProperties": false}})
}

#[tokio::test]
async fn calls_are_items_whole_and_streamed() {
    let server = Server::new();
    for choice in [json!("required"), json!({"type": "function", "name": "weather"})] {
        let mut body = json!({"input": "hi", "seed": 7, "temperature": 1, "max_output_tokens": 600,
            "tools": [tool()], "tool_choice": choice, "parallel_tool_calls": false});
        let (status, whole) = server.post(RESPONSES, &body).await;
        assert_eq!(status, StatusCode::OK, "{whole}");
        assert_eq!((&whole["status"], &whole["tools"]), (&json!("completed"), &json!([tool()])));
        assert_eq!(whole["output"].as_array().unwrap().len(), 1, "{whole}");
        let call = &whole["output"][0];
        assert_eq!((&call["type"], &call["name"]), (&json!("function_call"), &json!("weather")));
        assert_eq!(call["status"], "completed");
        assert!(call["call_id"].as_str().unwrap().starts_with("call_"));
        assert!(call["id"].as_str().unwrap().starts_with("fc_"));
        let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
        assert!(["Rome", "Oslo"].contains(&arguments["city"].as_str().unwrap()));

        body["stream"] = json!(true);
        let events = events(&server, &body).await;
        let expected = [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.completed",
        ];
        assert_eq!(kinds(&events), expected);
        assert_eq!(comparable(&events.last().unwrap()["response"]), comparable(&whole));
        let deltas = events.iter().filter(|e| e["type"] == expected[3]);
        let told: String = deltas.map(|event| event["delta"].as_str().unwrap()).collect();
        assert_eq!(call["arguments"], told);

        // The call and what it gave go back in.
        let input = json!([{"role": "user", "content": "hi"}, call,
            {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}]);
        let (status, next) = server.post(RESPONSES, &asked(json!({"input": input}))).await;
        assert_eq!(status, StatusCode::OK, "{next}");
    }
}

#[tokio::test]
async fn formats_constrain_the_text() {
    let server = Server::new();
    let schema = json!({"type": "object", "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "name": "n", "schema": schema, "strict": true});
    let body = json!({"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        "seed": 7, "max_output_tokens": 400, "text": {"format": format, "verbosity": "medium"}});
    let (status, answer) = server.post(RESPONSES, &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(answer["text"]["format"], format);
    assert_eq!(
        (&answer["status"], &answer["incomplete_details"]),
        (&json!("completed"), &Value::Null)
    );
    let text = answer["output"][0]["content"][0]["text"].as_str().unwrap();
    let said: Value = serde_json::from_str(text).unwrap();
    assert!(["x", "y"].contains(&said["a"].as_str().unwrap()));
}

#[tokio::test]
async fn what_is_not_offered_is_refused_by_name() {
    let server = Server::new();
    let deep = json!({"type": "json_schema", "name": "n", "schema": {"type": "nothing"}});
    for (change, param) in [
        (json!({"store": true}), "store"),
        (json!({"background": true}), "background"),
        (json!({"previous_response_id": "resp_1"}), "previous_response_id"),
        (json!({"conversation": "conv_1"}), "conversation"),
        (json!({"prompt": {"id": "p"}}), "prompt"),
        (json!({"truncation": "auto"}), "truncation"),
        (json!({"reasoning": {"effort": "high"}}), "reasoning"),
        (json!({"n": 2}), "n"),
        (json!({"messages": []}), "messages"),
        (json!({"max_tokens": 3}), "max_tokens"),
        (json!({"include": ["file_search_call.results"]}), "include"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"tools": [{"type": "web_search"}]}), "tools"),
        (json!({"tools": [{"type": "function"}]}), "tools"),
        (json!({"tool_choice": {"type": "allowed_tools"}}), "tool_choice"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"text": {"format": {"type": "xml"}}}), "text"),
        (json!({"text": {"format": deep}}), "text"),
        (json!({"text": {"verbosity": "low"}}), "text.verbosity"),
        (json!({"input": 5}), "input"),
        (json!({"input": null}), "input"),
        (json!({"input": "x".repeat(4096)}), "input"),
        (json!({"max_output_tokens": 0}), "max_output_tokens"),
        (json!({"max_output_tokens": "many"}), "max_output_tokens"),
        (json!({"temperature": -1}), "temperature"),
        (json!({"instructions": 5}), "instructions"),
        (json!({"best_of": 2}), "best_of"),
    ] {
        let (status, answer) = server.post(RESPONSES, &asked(change.clone())).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{change}: {answer}");
        assert_eq!(answer["error"]["param"], param, "{change}: {answer}");
    }
    let off = json!({"store": false, "background": false, "previous_response_id": null,
        "truncation": "disabled", "reasoning": {}, "include": [], "service_tier": "auto",
        "user": "me", "top_k": 3});
    assert_eq!(server.post(RESPONSES, &asked(off)).await.0, StatusCode::OK);
    assert!(server.log.lock().unwrap().iter().all(|e| !matches!(e, LogEvent::UnknownField { .. })));
}

#[tokio::test]
async fn an_aborted_response_is_cancelled_and_a_late_one_is_an_error() {
    let server = super::text::slow(|config| {
        config.request_timeout = Some(Duration::from_millis(400));
    });
    let body = asked(json!({"max_output_tokens": 200, "stream": true, "request_id": "mine"}));
    let abort = async {
        let ask = json!({"request_ids": ["mine"]});
        while server.post("/inference/v1/abort_requests", &ask).await.1 == json!({"aborted": []}) {
            tokio::task::yield_now().await;
        }
    };
    let (told, ()) = tokio::join!(events(&server, &body), abort);
    let last = told.last().unwrap();
    assert_eq!(
        (&last["type"], &last["response"]["status"]),
        (&json!("response.incomplete"), &json!("cancelled"))
    );
    let late = events(&server, &body).await;
    let last = late.last().unwrap();
    assert_eq!(last["type"], "error");
    assert_eq!(
        (&last["code"], &last["error"]["type"]),
        (&json!("deadline_exceeded"), &json!("timeout_error"))
    );
}
