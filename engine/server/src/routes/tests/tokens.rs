//! Token ids streamed: the same data as in the whole answer.

use super::*;

const GENERATE: &str = "/inference/v1/generate";

#[tokio::test]
async fn streamed_tokens_are_those_of_the_whole_answer() {
    let server = Server::new();
    for logprobs in [0, 3] {
        let params = json!({"temperature": 1, "seed": 3, "max_tokens": 5, "ignore_eos": true,
            "n": 2, "logprobs": logprobs});
        let mut body = json!({"token_ids": [5, 6, 7], "sampling_params": params});
        let (status, whole) = server.post(GENERATE, &body).await;
        assert_eq!(status, StatusCode::OK, "{whole}");
        body["stream"] = json!(true);
        let events = server.events(GENERATE, &body).await;
        let (last, pieces) = events.split_last().unwrap();
        assert_eq!((&last["choices"], &last["model"]), (&json!([]), &json!("tiny")));
        for key in ["prompt_tokens", "completion_tokens", "total_tokens"] {
            assert_eq!(last["usage"][key], whole["usage"][key], "{key}");
        }
        assert_eq!(last["usage"]["completion_tokens"], 10);
        assert_eq!(pieces.len(), 2 * (5 + 1));
        for index in 0..2 {
            let mine: Vec<&Value> = pieces
                .iter()
                .map(|event| &event["choices"][0])
                .filter(|choice| choice["index"] == index)
                .collect();
            let joined = |key: &str| -> Vec<Value> {
                let lists = mine.iter().filter_map(|choice| choice[key].as_array());
                lists.flatten().cloned().collect()
            };
            let expected = &whole["choices"][index];
            for key in ["token_ids", "logprobs"] {
                assert_eq!(expected[key], Value::Array(joined(key)), "{key}");
            }
            match expected["top_logprobs"].as_array() {
                None => assert_eq!(joined("top_logprobs").len(), 0),
                Some(top) => assert_eq!(*top, joined("top_logprobs")),
            }
            let spans: Vec<Value> =
                (0..5).map(|i| json!({"version": 0, "start": i, "end": i + 1})).collect();
            assert_eq!(joined("weight_versions"), spans);
            let reasons: Vec<&Value> = mine.iter().map(|choice| &choice["finish_reason"]).collect();
            let (end, before) = reasons.split_last().unwrap();
            assert_eq!(**end, json!("length"));
            assert!(before.iter().all(|reason| reason.is_null()));
        }
        assert!(events.iter().all(|event| event["request_id"] == events[0]["request_id"]));
    }
}

#[tokio::test]
async fn tokens_and_their_alternatives_are_of_the_distribution_that_was_drawn_from() {
    let params = json!({"temperature": 0.5, "top_k": 2, "seed": 3, "max_tokens": 8,
        "ignore_eos": true, "logprobs": 20});
    let body = json!({"token_ids": [5, 6, 7], "sampling_params": params});
    for mode in [engine::LogprobsMode::Raw, engine::LogprobsMode::Processed] {
        let server = Server::with(|config| config.logprobs_mode = mode);
        let (status, answer) = server.post(GENERATE, &body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        let choice = &answer["choices"][0];
        for place in 0..8 {
            let drawn = json!([choice["token_ids"][place], choice["logprobs"][place]]);
            let top = choice["top_logprobs"][place].as_array().unwrap();
            assert_eq!((top.len(), top.contains(&drawn)), (2, true), "{mode:?}: {drawn} {top:?}");
        }
    }
}
