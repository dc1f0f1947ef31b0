"""A schema fuzzer: one field of a good request at a time is given another type, an extreme, null or a huge array.

The routes, their good requests and their fields are those of GET /openapi.json, with the fields that it lists as refused or ignored.
Whatever is sent, the answer is 200 or an error with OpenAI's body, never a 5xx, and the good request after every bad one is answered.
Numbers beyond the documented range are refused.
"""
import http.client
import json
import os
import time
import urllib.parse

NET = urllib.parse.urlparse(os.environ["BASE"]).netloc
HEAD = {"authorization": "Bearer " + os.environ["API_KEY"], "content-type": "application/json"}
HUGE = 2**63
VALUES = [None, True, False, 0, -1, 1, 3, 0.5, -0.0, 1e-320, 1e308, HUGE, -HUGE, 10**40, "", "3", "\0", "\U0001f600" * 50, "x" * 10_000,
    [], {}, [None], [[[]]], [-1], [HUGE], ["a"] * 20_000, [[1]] * 20_000, [{}], {"a": {"b": []}}, {"1": 1e9}, {str(i): 1 for i in range(20_000)}]
FEW = [None, True, 3, "x", [{}], {"a": 1}]
RAW = [b"", b"{", b"[]", b"null", b'{"prompt": NaN}', b'{"temperature": 1e400}', b'{"prompt": "\\ud800"}', b'{"prompt":"\xff"}',
    b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 50_000, b'{"n":1,"n":2}']
link = http.client.HTTPConnection(NET, timeout=30)


def send(method, path, body=None):
    try:
        link.request(method, path, body, HEAD)
        answer = link.getresponse()
        return answer.status, answer.read()
    except (http.client.HTTPException, OSError):
        link.close()
        raise


def check(path, body, good, what):
    """Sends a request, and the good one after it if it was refused; returns its status."""
    status, data = send("POST", path, body)
    assert status == 200 or 400 <= status < 500, f"{path} {what}: {status} {data[:200]}"
    if status != 200:
        error = json.loads(data)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"], f"{path} {what}: {error}"
        status_of_good, data = send("POST", path, json.dumps(good))
        assert status_of_good == 200, f"{path}: the good request after {what}: {status_of_good} {data[:200]}"
    return status


def resolved(schema):
    """The properties of a schema with those it is made of, and its lists of further names."""
    properties, further = {}, []
    if "$ref" in schema:
        properties, further = resolved(document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]])
    for part in schema.get("allOf", []):
        more, names = resolved(part)
        properties, further = {**properties, **more}, further + names
    return {**properties, **schema.get("properties", {})}, further + schema.get("x-refused", []) + schema.get("x-ignored", [])


def outside(schema):
    """Numbers beyond the documented range."""
    step = 1 if schema.get("type") == "integer" else 0.0625
    return [schema[key] + way * step for key, way in (("minimum", -1), ("maximum", 1), ("exclusiveMinimum", 0)) if key in schema]


def fuzz(path, good, inside, schema):
    """Every field of the object at `inside` of the good request; returns how many requests that took."""
    properties, further = resolved(schema)
    count = 0

    def with_field(field, value):
        body = json.loads(json.dumps(good))
        target = body
        for key in inside:
            target = target.setdefault(key, {})
        target[field] = value
        return json.dumps(body)

    for field, part in properties.items():
        for number, value in enumerate(VALUES):
            check(path, with_field(field, value), good, f"{field}, value {number}")
        for value in outside(part):
            status = check(path, with_field(field, value), good, f"{field} {value}")
            assert status == 400, f"{path}: {field} {value} is beyond its range, but the answer is {status}"
        count += len(VALUES) + len(outside(part))
        if resolved(part)[0]:
            count += fuzz(path, good, [*inside, field], part)
    for field in further:
        for value in FEW:
            check(path, with_field(field, value), good, f"{field} {value}")
        count += len(FEW)
    return count


begun = time.monotonic()
status, data = send("GET", "/openapi.json")
assert status == 200, status
document = json.loads(data)
for path, methods in document["paths"].items():
    if "post" not in methods:
        continue
    body = methods["post"]["requestBody"]["content"]["application/json"]
    good = body["example"]
    status, data = send("POST", path, json.dumps(good))
    assert status == 200, f"{path}: the documented example: {status} {data[:200]}"
    count = fuzz(path, good, [], body["schema"])
    for raw in RAW:
        check(path, raw, good, f"{raw[:20]!r}")
    print(f"{path}: {count + len(RAW)} requests, {time.monotonic() - begun:.0f} s")
