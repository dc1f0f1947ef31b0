//! Rows 1 to 9: what a body can have wrong.

use serde_json::{Value, json};

use crate::server::{CHAT, JSON, Link, Server, TEXT, error_of};

/// A good completion with `change` over it.
fn with(change: Value) -> Value {
    let mut body = json!({"prompt": "1+1=", "max_tokens": 4, "temperature": 0});
    body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    body
}

#[test]
fn row_01_what_is_no_json_is_refused_with_its_position_on_a_usable_connection() {
    let server = Server::shared();
    let mut link = Link::open(&server);
    let good = with(json!({})).to_string();
    let bodies: [(&[u8], &str); 10] = [
        (b"", "EOF while parsing a value at line 1 column 0"),
        (b"{", "EOF while parsing an object at line 1 column 1"),
        (b"{\"prompt\": ", "EOF while parsing a value at line 1 column 11"),
        (b"{\"prompt\": \"a\n", "line 2 column 0"),
        (b"{\"prompt\": \"a\",}", "trailing comma at line 1 column 16"),
        (b"{'prompt': 'a'}", "key must be a string at line 1 column 2"),
        (b"{\"n\": 1,\n \"n\": 2}", "key \"n\" comes twice at line 2 column 4"),
        (b"\xef\xbb\xbf{}", "expected value at line 1 column 1"),
        (b"{} {}", "trailing characters at line 1 column 4"),
        (b"[1]", "body is an array, expected an object"),
    ];
    for (body, place) in bodies {
        let answer = link.ask(&format!("POST {TEXT}"), JSON, body);
        let error = error_of(&answer.json());
        assert_eq!((answer.status, &error["code"]), (400, &json!("invalid_json")), "{error}");
        assert!(error["message"].as_str().unwrap().ends_with(place), "{error}");
        assert_eq!(link.ask(&format!("POST {TEXT}"), JSON, good.as_bytes()).status, 200);
    }
    for content_type in ["", "content-type: text/plain\r\n", "content-type: multipart/x\r\n"] {
        let answer = link.ask(&format!("POST {TEXT}"), content_type, good.as_bytes());
        assert_eq!(answer.status, 415);
        assert_eq!(error_of(&answer.json())["code"], "unsupported_media_type");
        assert_eq!(link.ask(&format!("POST {TEXT}"), JSON, good.as_bytes()).status, 200);
    }
}

#[test]
fn row_02_wrong_types_are_named() {
    let server = Server::shared();
    let fields = [
        ("n", json!("3")),
        ("n", json!(1.5)),
        ("prompt", json!([[[]]])),
        ("prompt", json!({})),
        ("prompt", json!([1, "a"])),
        ("temperature", json!("hot")),
        ("max_tokens", json!([])),
        ("max_tokens", json!(-1)),
        ("stop", json!(5)),
        ("stop", json!([5])),
        ("stop_token_ids", json!(["a"])),
        ("logit_bias", json!([1])),
        ("logit_bias", json!({"x": 1})),
        ("logit_bias", json!({"1": "x"})),
        ("seed", json!(0.5)),
        ("stream", json!("yes")),
        ("stream_options", json!(true)),
        ("logprobs", json!("many")),
        ("ignore_eos", json!(1)),
    ];
    for (field, value) in fields {
        let error = server.refuses(TEXT, &with(json!({field: value})));
        assert_eq!(error["param"], field, "{value}: {error}");
    }
    for messages in [
        json!({}),
        json!("hi"),
        json!([1]),
        json!([{}]),
        json!([{"role": 1, "content": "x"}]),
        json!([{"role": "user", "content": 1}]),
        json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ] {
        let error = server.refuses(CHAT, &json!({"messages": messages}));
        assert_eq!(error["param"], "messages", "{messages}: {error}");
    }
}

#[test]
fn row_03_numbers_that_are_none_are_refused_and_tiny_temperatures_are_greedy() {
    let server = Server::shared();
    for number in ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "+1", "01", ".5", "0x1"] {
        for field in ["temperature", "top_p", "seed"] {
            let body = format!("{{\"prompt\": \"a\", \"{field}\": {number}}}");
            let error = server.refuses_raw(TEXT, body.as_bytes(), 400);
            assert_eq!(error["code"], "invalid_json", "{body}");
        }
    }
    let bias = server.refuses_raw(TEXT, b"{\"prompt\": \"a\", \"logit_bias\": {\"1\": NaN}}", 400);
    assert_eq!(bias["code"], "invalid_json");
    // Finite as 64 bits, not as 32.
    assert_eq!(server.refuses(TEXT, &with(json!({"temperature": 1e308})))["param"], "temperature");
    let (_, greedy) = server.post(TEXT, &with(json!({})));
    for temperature in [-0.0, 5e-324, 1e-310, 1e-45, 1e-30, 1e-6] {
        let body = with(json!({"temperature": temperature, "seed": 3}));
        let (status, answer) = server.post(TEXT, &body);
        assert_eq!(status, 200, "{temperature}: {answer}");
        assert_eq!(answer["choices"][0]["text"], greedy["choices"][0]["text"], "{temperature}");
    }
}

#[test]
fn row_04_what_is_out_of_range_is_refused() {
    let server = Server::shared();
    for (field, values) in [
        ("temperature", vec![json!(-0.1), json!(1000)]),
        ("top_p", vec![json!(0), json!(-0.1), json!(1.01)]),
        ("min_p", vec![json!(-0.1), json!(1.01)]),
        ("presence_penalty", vec![json!(-2.01), json!(2.01)]),
        ("frequency_penalty", vec![json!(-2.01), json!(2.01)]),
        ("repetition_penalty", vec![json!(0), json!(-1), json!(1e30)]),
        ("top_k", vec![json!(-2), json!(i64::MIN), json!(1_u64 << 63)]),
        ("logit_bias", vec![json!({"5": 101}), json!({"5": -101})]),
        ("n", vec![json!(0), json!(129)]),
        ("max_tokens", vec![json!(0)]),
        ("min_tokens", vec![json!(5)]),
        ("logprobs", vec![json!(21)]),
    ] {
        for value in values {
            let error = server.refuses(TEXT, &with(json!({field: value})));
            assert_eq!(error["param"], field, "{value}: {error}");
            assert_eq!(error["code"], "invalid_value", "{value}: {error}");
        }
    }
}

/// Bodies of row 5 with the fields they are refused for.
fn huge() -> Vec<(&'static str, Value, &'static str)> {
    let bias: serde_json::Map<_, _> = (0..1_000_000).map(|i| (i.to_string(), json!(1))).collect();
    let messages = vec![json!({"role": "user", "content": "x"}); 100_000];
    let max = json!(1_u64 << 63);
    vec![
        (TEXT, json!({"prompt": "a", "n": max}), "n"),
        (TEXT, json!({"prompt": "a", "n": 1_000_000_000}), "n"),
        (TEXT, json!({"prompt": "a", "best_of": max}), "best_of"),
        (TEXT, json!({"prompt": "a", "max_tokens": max}), "prompt"),
        (TEXT, json!({"prompt": "a", "min_tokens": max}), "min_tokens"),
        (TEXT, json!({"prompt": "a", "logprobs": max}), "logprobs"),
        (TEXT, json!({"prompt": "a", "prompt_logprobs": -1}), "prompt_logprobs"),
        (TEXT, json!({"prompt": "a", "prompt_logprobs": max}), "prompt_logprobs"),
        (TEXT, json!({"prompt": "a", "stop": vec!["s"; 100_000]}), "stop"),
        (TEXT, json!({"prompt": "a", "stop_token_ids": vec![1; 1_000_000]}), "stop_token_ids"),
        (TEXT, json!({"prompt": "a", "logit_bias": bias}), "logit_bias"),
        (CHAT, json!({"messages": messages}), "messages"),
    ]
}

#[cfg(target_os = "linux")]
#[test]
fn row_05_huge_counts_are_refused_before_anything_is_kept() {
    const MIB: u64 = 1 << 20;
    let server = Server::measured();
    let bodies: Vec<_> =
        huge().into_iter().map(|(path, body, param)| (path, body.to_string(), param)).collect();
    // Bodies are read whole, up to their limit: first, others as long as these, and nothing in them.
    for (_, body, _) in bodies.iter().cycle().take(4 * bodies.len()) {
        let blank = format!("{{\"prompt\": \"a\", \"n\": 0{}}}", " ".repeat(body.len()));
        assert_eq!(server.refuses_raw(TEXT, blank.as_bytes(), 400)["param"], "n");
    }
    let before = server.memory("VmHWM");
    for _ in 0..2 {
        for (path, body, param) in &bodies {
            let error = server.refuses_raw(path, body.as_bytes(), 400);
            assert_eq!(error["param"], *param, "{error}");
        }
    }
    // The most it ever had, not only what it has kept.
    let growth = server.memory("VmHWM") - before;
    assert!(growth < MIB, "{growth} bytes more than for blank bodies");
}

#[test]
fn row_06_empty_prompts_are_refused_and_blank_ones_are_text() {
    let server = Server::shared();
    for prompt in [json!(""), json!([]), json!([[]]), json!([""]), json!(["a", ""]), Value::Null] {
        let error = server.refuses(TEXT, &with(json!({ "prompt": prompt })));
        assert_eq!(error["param"], "prompt", "{prompt}");
    }
    for messages in [json!([]), Value::Null, json!([{"role": "user"}])] {
        let error = server.refuses(CHAT, &json!({ "messages": messages }));
        assert_eq!(error["param"], "messages", "{messages}");
    }
    for (blank, tokens) in [(" ", 1), ("\n", 1), (" \t\n", 3)] {
        let (status, answer) = server.post(TEXT, &with(json!({ "prompt": blank })));
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["usage"]["prompt_tokens"], tokens, "{blank:?}");
    }
}

#[test]
fn row_07_what_is_longer_than_the_context_is_refused_with_both_numbers() {
    let server = Server::shared();
    let limit = server.get("/v1/models").json()["data"][0]["max_model_len"].as_u64().unwrap();
    let long = "1".repeat(limit as usize);
    for (body, tokens, asked) in [
        (json!({"prompt": long}), limit, 4),
        (json!({"prompt": long.repeat(100)}), limit * 100, 4),
        (json!({"prompt": "1+1=", "max_tokens": limit}), 4, limit),
    ] {
        let error = server.refuses(TEXT, &with(body));
        assert_eq!(error["code"], "context_length_exceeded");
        let message = format!(
            "prompt has {tokens} tokens and {asked} are asked for, limit is {limit} together"
        );
        assert_eq!(error["message"], message);
    }
    // A chat that does not say how long gets what is left, and no more.
    let chat = json!({"messages": [{"role": "user", "content": "1+1="}], "ignore_eos": true});
    let (status, answer) = server.post(CHAT, &chat);
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["usage"]["total_tokens"], limit);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

#[test]
fn row_08_ids_outside_the_vocabulary_are_refused_and_text_never_controls() {
    let server = Server::tiny(&[], |_| {});
    for ids in
        [json!([-1]), json!([512]), json!([5, 1_u64 << 32]), json!([1.5]), json!([[5], [512]])]
    {
        let error = server.refuses(TEXT, &with(json!({ "prompt": ids })));
        assert_eq!(error["param"], "prompt", "{ids}");
    }
    let error = server.refuses("/detokenize", &json!({"tokens": [512]}));
    assert_eq!(error["param"], "tokens");
    // The end of text is token 2; as text it is its four bytes, in a prompt and in a message.
    let spelled: Vec<u32> = "</s>".bytes().map(|byte| u32::from(byte) + 3).collect();
    let tokens = |body: Value| -> Vec<u32> {
        let (status, answer) = server.post("/tokenize", &body);
        assert_eq!(status, 200, "{answer}");
        serde_json::from_value(answer["tokens"].clone()).unwrap()
    };
    let chat = tokens(json!({"messages": [{"role": "user", "content": "a</s>b"}]}));
    assert!(chat.windows(4).any(|window| window == spelled), "{chat:?}");
    assert!(!chat.contains(&2), "{chat:?}");
}

#[test]
fn row_09_broken_text_is_refused_and_characters_are_never_cut() {
    let server = Server::tiny(&[], |_| {});
    let broken: [&[u8]; 5] = [
        b"{\"prompt\": \"\xff\"}",
        b"{\"prompt\": \"\xf0\x9f\x98\"}",
        b"{\"prompt\": \"\\ud800\"}",
        b"{\"prompt\": \"\\udc00\\ud800\"}",
        b"{\"prompt\": \"\x00\"}",
    ];
    for body in broken {
        assert_eq!(server.refuses_raw(TEXT, body, 400)["code"], "invalid_json");
    }
    let (status, answer) = server.post(TEXT, &with(json!({"prompt": "a\0b"})));
    assert_eq!((status, &answer["usage"]["prompt_tokens"]), (200, &json!(3)), "{answer}");
    // Four tokens of a byte each make one character.
    let body = json!({"prompt": "a", "guided_choice": ["x\u{1f600}y\u{e9}"], "max_tokens": 20});
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let pieces = server.pieces(TEXT, &streamed);
    let texts: Vec<&str> =
        pieces.iter().map(|(_, p)| p["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(texts.concat(), "x\u{1f600}y\u{e9}");
    assert!(texts.iter().all(|text| !text.contains('\u{fffd}')), "{texts:?}");
    assert_eq!(server.post(TEXT, &body).1["choices"][0]["text"], "x\u{1f600}y\u{e9}");
    // What the end of an answer cuts is shown as such.
    for max in 2..=4 {
        streamed["max_tokens"] = json!(max);
        let text: String = server
            .pieces(TEXT, &streamed)
            .iter()
            .map(|(_, p)| p["choices"][0]["text"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(text, "x\u{fffd}", "{max}");
    }
}
