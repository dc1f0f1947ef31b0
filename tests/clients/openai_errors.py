"""The error classes of the openai package, each from a server that is set up to give it."""
import contextlib
import os
import re
import subprocess
import time

import openai

ENGINE = os.environ.get("ENGINE_BIN", "target/release/engine")
CHAT = dict(model="arith", messages=[{"role": "user", "content": "1+1="}])
LONG = dict(model="arith", prompt="1+1=", n=64, max_tokens=1000, extra_body={"ignore_eos": True})


@contextlib.contextmanager
def serving(*flags):
    """A client of a server of its own."""
    command = [ENGINE, "serve", "builtin:arith", "--port", "0", "--served-model-name", "arith", *flags]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        base = next(m[0] for m in (re.search(r"http://\S+", line) for line in server.stderr) if m)
        yield openai.OpenAI(base_url=base, api_key="right", max_retries=0, timeout=30)
    finally:
        server.kill()
        server.wait()


def raises(kind, call, status=None, code=None):
    try:
        call()
    except openai.APIError as error:
        assert type(error) is kind, f"{type(error).__name__}, expected {kind.__name__}: {error}"
        if status:
            assert error.status_code == status and error.code == code, (error.status_code, error.body)
            assert set(error.body) == {"message", "type", "param", "code"}, error.body
            assert error.response.headers["x-request-id"], "every answer has an id"
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


with serving("--max-queued-requests", "0", "--max-num-seqs", "1") as client:
    assert client.chat.completions.create(**CHAT).choices[0].message.content, "nothing has to wait"
    stream = client.completions.create(**{**LONG, "n": 1}, stream=True)
    next(stream)
    error = raises(openai.RateLimitError, lambda: client.chat.completions.create(**CHAT), 429, "queue_full")
    assert int(error.response.headers["retry-after"]) >= 1
    assert client.models.list().data[0].id == "arith", "what needs no room is answered"
    stream.close()

with serving("--api-key", "right") as client:
    for key in ("wrong", "righ", "right2"):
        other = client.with_options(api_key=key)
        raises(openai.AuthenticationError, lambda: other.chat.completions.create(**CHAT), 401, "invalid_api_key")
    raises(openai.NotFoundError, lambda: client.chat.completions.create(**{**CHAT, "model": "gpt-4"}), 404, "model_not_found")
    raises(openai.NotFoundError, lambda: client.models.retrieve("gpt-4"), 404, "model_not_found")
    raises(openai.NotFoundError, lambda: client.embeddings.create(model="arith", input="x"), 404, "not_found")
    raises(openai.BadRequestError, lambda: client.chat.completions.create(**CHAT, temperature=-1), 400, "invalid_value")
    raises(openai.BadRequestError, lambda: client.completions.create(model="arith", prompt="1" * 5000), 400, "context_length_exceeded")
    raises(openai.BadRequestError, lambda: client.completions.create(model="arith", prompt="1", best_of=3), 400, "unsupported_parameter")
    # The client's own patience: it leaves, and its request with it.
    raises(openai.APITimeoutError, lambda: client.with_options(timeout=0.2).completions.create(**LONG))
    assert client.chat.completions.create(**CHAT).choices[0].message.content

with serving("--request-timeout", "0.2", "--max-num-seqs", "2") as client:
    error = raises(openai.InternalServerError, lambda: client.completions.create(**LONG), 504, "deadline_exceeded")
    assert error.body["type"] == "timeout_error"
    # Once streaming, the error is an event, which the package raises.
    stream = client.completions.create(**LONG, stream=True)
    error = raises(openai.APIError, lambda: list(stream))
    assert error.body["code"] == "deadline_exceeded", error.body
    assert client.chat.completions.create(**CHAT).choices[0].message.content

with serving() as client:
    assert client.chat.completions.create(**CHAT).choices[0].message.content
begun = time.monotonic()
raises(openai.APIConnectionError, client.models.list)
assert time.monotonic() - begun < 5, "a server that has gone is noticed at once"
