"""A schema fuzzer: one field of a good request at a time is given another type, an extreme, null or a huge array.

Fields come from GET /openapi.json where it is served, else from the lists below. Whatever is sent, the answer is 200 or an
error with OpenAI's body, never a 5xx, and the good request after it is answered.
"""
import http.client
import json
import os
import urllib.parse

NET = urllib.parse.urlparse(os.environ["BASE"]).netloc
HEAD = {"authorization": "Bearer " + os.environ["API_KEY"], "content-type": "application/json"}
COMMON = """model stream stream_options n temperature top_p top_k min_p seed stop stop_token_ids max_tokens min_tokens ignore_eos
presence_penalty frequency_penalty repetition_penalty logit_bias logprobs return_token_ids user echo best_of suffix""".split()
GOOD = {
    "/v1/completions": {"model": "arith", "prompt": "1+1=", "max_tokens": 2},
    "/v1/chat/completions": {"model": "arith", "messages": [{"role": "user", "content": "1+1="}], "max_tokens": 2},
}
FIELDS = {
    "/v1/completions": COMMON + ["prompt", "prompt_logprobs"],
    "/v1/chat/completions": COMMON + ["messages", "top_logprobs", "max_completion_tokens", "tools", "tool_choice", "response_format"],
}
HUGE = 2**63
VALUES = [None, True, False, 0, -1, 1, 3, 0.5, -0.0, 1e-320, 1e308, HUGE, -HUGE, 10**40, "", "3", "\0", "\U0001f600" * 50, "x" * 10_000,
    [], {}, [None], [[[]]], [-1], [HUGE], ["a"] * 20_000, [[1]] * 20_000, [{}], {"a": {"b": []}}, {"1": 1e9}, {str(i): 1 for i in range(20_000)}]
RAW = [b"", b"{", b"[]", b"null", b'{"prompt": NaN}', b'{"temperature": 1e400}', b'{"prompt": "\\ud800"}', b'{"prompt":"\xff"}',
    b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 50_000, b'{"n":1,"n":2}']


def send(method, path, body=None):
    link = http.client.HTTPConnection(NET, timeout=30)
    link.request(method, path, body, HEAD)
    answer = link.getresponse()
    status, data = answer.status, answer.read()
    link.close()
    return status, data


def check(path, body, what):
    status, data = send("POST", path, body)
    assert status == 200 or 400 <= status < 500, f"{path} {what}: {status} {data[:200]}"
    if status != 200:
        error = json.loads(data)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"], f"{path} {what}: {error}"
        status, data = send("POST", path, json.dumps(GOOD[path]))
        assert status == 200, f"{path}: a good request after {what}: {status} {data[:200]}"
    return 1


def fields(path):
    """The names in the served document, with the listed ones."""
    status, data = send("GET", "/openapi.json")
    if status != 200:
        return FIELDS[path]
    document = json.loads(data)
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    return sorted(set(FIELDS[path]) | set(schema.get("properties", {})))


count = 0
for path in GOOD:
    for field in fields(path):
        for number, value in enumerate(VALUES):
            count += check(path, json.dumps({**GOOD[path], field: value}), f"{field}, value {number}")
    for raw in RAW:
        count += check(path, raw, f"{raw[:20]!r}")
print(f"{count} requests")
