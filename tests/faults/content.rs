//! Rows 10 to 15: what a request may ask the sampler, a grammar or a template to do.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::server::{CHAT, Server, TEXT};

/// A greedy completion of known length, with `change` over it.
fn greedy(change: Value) -> Value {
    let mut body = json!({"prompt": "12+34=", "max_tokens": 40, "temperature": 0,
        "ignore_eos": true});
    body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    body
}

/// Text, reason for the end and what stopped it, whole and streamed; they must agree.
fn both(server: &Server, body: &Value) -> (String, Value, Value) {
    let (status, answer) = server.post(TEXT, body);
    assert_eq!(status, 200, "{answer}");
    let whole = &answer["choices"][0];
    let mut body = body.clone();
    body["stream"] = json!(true);
    let pieces = server.pieces(TEXT, &body);
    let texts = pieces.iter().map(|(_, piece)| piece["choices"][0]["text"].as_str().unwrap());
    assert_eq!(whole["text"], texts.collect::<String>());
    let last = &pieces.last().unwrap().1["choices"][0];
    assert_eq!(last["finish_reason"], whole["finish_reason"]);
    let text = whole["text"].as_str().unwrap().to_owned();
    (text, whole["finish_reason"].clone(), whole["stop_reason"].clone())
}

#[test]
fn row_10_stop_strings_cut_exactly_wherever_they_begin() {
    // A tokenizer of bytes: every stop string of two bytes crosses a token's border.
    let server = Server::tiny(&[], |_| {});
    let letters = json!({"guided_regex": "[a-z]{60}"});
    let (text, reason, _) = both(&server, &greedy(letters.clone()));
    assert_eq!((text.len(), reason), (40, json!("length")));
    let with = |stop: Value| {
        let mut body = greedy(letters.clone());
        body["stop"] = stop;
        both(&server, &body)
    };
    for (from, to) in [(7, 10), (0, 1), (0, 3), (38, 40), (39, 40)] {
        let stop = &text[from..to];
        let cut = text.find(stop).unwrap();
        assert_eq!(with(json!(stop)), (text[..cut].to_owned(), json!("stop"), json!(stop)));
    }
    // Of several, the one that is complete first counts; one that never is holds nothing back.
    let (long, short) = (&text[4..9], &text[5..7]);
    let (cut, reason, stop) = with(json!([long, short, "0", format!("{}0", &text[36..])]));
    let first = text.find(short).unwrap();
    assert_eq!((cut.as_str(), reason, stop), (&text[..first], json!("stop"), json!(short)));
    assert_eq!(with(json!([format!("{}0", &text[30..])])).0, text);
    let mut kept = greedy(letters);
    kept["stop"] = json!(long);
    kept["include_stop_str_in_output"] = json!(true);
    let end = text.find(long).unwrap() + long.len();
    assert_eq!(both(&server, &kept).0, text[..end]);
    for stop in [json!(""), json!(["a", ""])] {
        assert_eq!(server.refuses(TEXT, &greedy(json!({ "stop": stop })))["param"], "stop");
    }
}

/// Bodies that a compiler of grammars would choke on.
fn hostile_grammars() -> Vec<Value> {
    let nested = |depth: usize| format!("{}1{}", "{\"items\":".repeat(depth), "}".repeat(depth));
    let chain: serde_json::Map<_, _> = (0..10_000)
        .map(|i| (format!("d{i}"), json!({"allOf": [{"$ref": format!("#/$defs/d{}", i + 1)}]})))
        .collect();
    let huge: Vec<String> = (0..1_000_000).map(|i| format!("v{i}")).collect();
    vec![
        json!({"guided_json": nested(10_000)}),
        json!({"guided_json": {"$ref": "#/$defs/d0", "$defs": chain}}),
        json!({"guided_json": {"$ref": "#"}}),
        json!({"guided_json": {"enum": huge}}),
        json!({"guided_json": {"$ref": "http://127.0.0.1:9/x.json"}}),
        json!({"guided_json": {"$ref": "file:///etc/passwd"}}),
        json!({"guided_json": {"type": "string", "pattern": "("}}),
        json!({"guided_json": {"type": "nothing"}}),
        json!({"guided_regex": "(a"}),
        json!({"guided_regex": "(".repeat(10_000)}),
        json!({"guided_regex": "a".repeat(300_000)}),
        json!({"guided_grammar": "start: other"}),
        json!({"guided_grammar": format!("start: {}\"a\"{}", "(".repeat(9000), ")".repeat(9000))}),
    ]
}

/// Catastrophic where regular expressions backtrack; here they are compiled as they are used.
const CATASTROPHIC: [&str; 3] = ["(a|a)*(a|aa)*b", "(x+x+)+y", "((a{1000}){1000}){1000}"];

#[test]
fn row_11_hostile_grammars_are_refused_while_tokens_of_others_keep_coming() {
    let server = Server::shared();
    // Long enough to last: streams follow each other until the hostile requests are answered.
    let stream = greedy(json!({"max_tokens": 900, "stream": true}));
    let (alone, begin) = (server.pieces(TEXT, &stream), Barrier::new(2));
    let done = std::sync::atomic::AtomicBool::new(false);
    let streams = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut streams = Vec::new();
            begin.wait();
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                streams.push(server.pieces(TEXT, &stream));
            }
            streams
        });
        begin.wait();
        for mut body in hostile_grammars() {
            let param = body.as_object().unwrap().keys().next().unwrap().clone();
            body["prompt"] = json!("a");
            let begun = Instant::now();
            assert_eq!(server.refuses(TEXT, &body)["param"], param);
            assert!(begun.elapsed() < Duration::from_secs(10), "{param}");
        }
        for regex in CATASTROPHIC {
            let body = json!({"prompt": "a", "guided_regex": regex, "max_tokens": 20});
            assert_eq!(server.post(TEXT, &body).0, 200, "{regex}");
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        reader.join().unwrap()
    });
    assert!(!streams.is_empty(), "no stream ended meanwhile");
    let text = |pieces: &[(Instant, Value)]| -> String {
        pieces.iter().map(|(_, p)| p["choices"][0]["text"].as_str().unwrap()).collect()
    };
    for pieces in &streams {
        assert_eq!(text(pieces), text(&alone));
        let longest = pieces.windows(2).map(|pair| pair[1].0 - pair[0].0).max().unwrap();
        // Refusing all of them takes seconds; a token of somebody else waits for none.
        assert!(longest < Duration::from_millis(500), "{longest:?} between two pieces");
    }
}

#[test]
fn row_12_a_grammar_without_a_way_out_ends_its_own_request() {
    let server = Server::tiny(&[], |_| {});
    // The end of text may not come before nine tokens, and the grammar has nothing for the third.
    let dead = json!({"prompt": "a", "guided_regex": "a|a\u{1}", "min_tokens": 9,
        "stop_token_ids": [4]});
    let error = server.refuses_raw(TEXT, dead.to_string().as_bytes(), 400);
    assert_eq!(error["type"], "invalid_request_error");
    let said = error["message"].as_str().unwrap();
    assert_eq!(said, "no token may be drawn here");
    // A bias is no ban: what the grammar wants comes, however unlikely.
    let biased = json!({"prompt": "a", "guided_regex": "ab", "logit_bias": {"101": -100}});
    let (status, answer) = server.post(TEXT, &biased);
    assert_eq!((status, &answer["choices"][0]["text"]), (200, &json!("ab")), "{answer}");
    server.wait_until_idle();
}

#[test]
fn row_13_templates_that_do_not_end_are_refused() {
    let nested = "{% for a in range(9999) %}".repeat(3) + &"{% endfor %}".repeat(3);
    let templates = [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "chat template"),
        (nested.as_str(), "chat template"),
        ("{% for a in range(10000000000) %}{% endfor %}", "chat template"),
        ("{{ messages[7].content.nothing }}", "chat template"),
        ("{{ raise_exception('only\nuser turns') }}", "only user turns"),
        ("{{ 'x' * 100000000000 }}", "chat template"),
        ("{% include '/etc/passwd' %}", "chat template"),
    ];
    for (template, said) in templates {
        let server = Server::tiny(&[], |model| {
            std::fs::write(model.join("chat_template.jinja"), template).unwrap();
        });
        let begun = Instant::now();
        let chat = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2});
        let error = server.refuses(CHAT, &chat);
        assert_eq!(error["param"], "messages", "{template}");
        assert!(error["message"].as_str().unwrap().contains(said), "{template}: {error}");
        assert!(begun.elapsed() < Duration::from_secs(10), "{template}");
    }
}

#[test]
fn row_14_a_bias_on_everything_changes_nothing_and_a_ban_of_everything_is_an_error() {
    let server = Server::shared();
    let plain = both(&server, &greedy(json!({})));
    let all: serde_json::Map<_, _> = (0..272).map(|id| (id.to_string(), json!(-100))).collect();
    let (text, reason, _) = both(&server, &greedy(json!({ "logit_bias": all })));
    assert_eq!((text, reason), (plain.0, plain.1));
    // The sampled values are numbers, too.
    let drawn = greedy(json!({"logit_bias": all, "temperature": 1, "seed": 5, "logprobs": 1}));
    let (_, answer) = server.post(TEXT, &drawn);
    let logprobs = answer["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), 40);
    assert!(logprobs.iter().all(|value| value.as_f64().unwrap() <= 0.0), "{answer}");
}

#[test]
fn row_15_of_equally_likely_tokens_the_lowest_id_is_taken() {
    // An output projection of zeros makes all 512 logits equal.
    let server = Server::tiny(&["--dtype", "float32"], |model| {
        let path = model.join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let text: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
        let (_, norm) = text
            .as_object()
            .unwrap()
            .iter()
            .find(|(name, _)| *name == "model.norm.weight")
            .unwrap();
        let place = |i: usize| norm["data_offsets"][i].as_u64().unwrap() as usize + 8 + header;
        bytes[place(0)..place(1)].fill(0);
        std::fs::write(path, bytes).unwrap();
    });
    let body = json!({"prompt": "ab", "max_tokens": 5, "temperature": 0, "ignore_eos": true,
        "return_token_ids": true, "logprobs": 3});
    let (status, answer) = server.post(TEXT, &body);
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["choices"][0]["token_ids"], json!([0, 0, 0, 0, 0]));
    let logprob = answer["choices"][0]["logprobs"]["token_logprobs"][0].as_f64().unwrap();
    assert!((logprob + 512_f64.ln()).abs() < 1e-5, "{logprob}");
    let (_, both) = server.post(
        TEXT,
        &json!({"prompt": ["ab", "cd"], "max_tokens": 2,
        "temperature": 0, "ignore_eos": true, "return_token_ids": true, "top_k": 1}),
    );
    for choice in both["choices"].as_array().unwrap() {
        assert_eq!(choice["token_ids"], json!([0, 0]));
    }
}
