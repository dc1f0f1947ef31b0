"""The openai package of Python: models, chat, completions, responses, streams, log-probabilities, error classes."""
import json
import os

import openai

BASE, KEY = os.environ["BASE"] + "/v1", os.environ["API_KEY"]
client = openai.OpenAI(base_url=BASE, api_key=KEY, max_retries=0, timeout=30)
ASK = dict(model="arith", messages=[{"role": "user", "content": "47+25="}], temperature=0)

assert [m.id for m in client.models.list()] == ["arith"]
whole = client.chat.completions.create(**ASK, logprobs=True, top_logprobs=3)
choice = whole.choices[0]
assert choice.message.content.strip() and choice.finish_reason == "stop", whole
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
for token in choice.logprobs.content:
    assert token.logprob <= 0 and len(token.top_logprobs) == 3
    assert abs(token.top_logprobs[0].logprob - token.logprob) < 1e-5, "greedy takes the likeliest"

text, usage = "", None
for chunk in client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}):
    if chunk.choices:
        text += chunk.choices[0].delta.content or ""
    usage = chunk.usage or usage
assert text == choice.message.content and usage.total_tokens == whole.usage.total_tokens

PROMPT = dict(model="arith", prompt="1+1=", max_tokens=4, seed=7)
one, two = (client.completions.create(**PROMPT, logprobs=2).choices[0] for _ in range(2))
assert one.text == two.text, "a seed reproduces"
assert len(one.logprobs.tokens) == len(one.logprobs.token_logprobs)
pieces = client.completions.create(**PROMPT, stream=True)
assert "".join(p.choices[0].text for p in pieces) == one.text
assert len(client.completions.create(**PROMPT, n=3).choices) == 3

SAY = dict(model="arith", input="47+25=", temperature=0)
response = client.responses.create(**SAY)
assert response.output_text == choice.message.content and response.status == "completed", response
assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
kinds, text, final = [], "", None
for event in client.responses.create(**SAY, stream=True):
    kinds += [event.type] if kinds[-1:] != [event.type] else []
    text += event.delta if event.type == "response.output_text.delta" else ""
    final = getattr(event, "response", final)
assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed", kinds
assert text == response.output_text == final.output_text and final.usage.total_tokens == response.usage.total_tokens
with client.responses.stream(**SAY, max_output_tokens=1) as stream:
    for event in stream:
        last = event
assert last.type == "response.incomplete" and last.response.incomplete_details.reason == "max_output_tokens", last
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
form = {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True}}
assert json.loads(client.responses.create(**SAY, max_output_tokens=400, text=form).output_text)["a"] in ("x", "y")
TOOL = {"type": "function", "name": "pick", "parameters": SCHEMA, "strict": True}
ONE = dict(tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_output_tokens=400)
call = client.responses.create(**SAY, **ONE).output[0]
assert (call.type, call.name) == ("function_call", "pick") and json.loads(call.arguments)["a"] in ("x", "y"), call
result = {"type": "function_call_output", "call_id": call.call_id, "output": "72"}
again = client.responses.create(**{**SAY, "input": [{"role": "user", "content": "47+25="}, call, result]}, max_output_tokens=4)
assert again.output[0].type == "message", again


def raises(kind, status, call):
    try:
        call()
    except kind as error:
        assert error.status_code == status and error.body["message"], error
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


bad = raises(openai.BadRequestError, 400, lambda: client.chat.completions.create(**{**ASK, "temperature": -1}))
assert bad.param == "temperature" and bad.code == "invalid_value", bad.body
raises(openai.NotFoundError, 404, lambda: client.chat.completions.create(**{**ASK, "model": "other"}))
stored = raises(openai.BadRequestError, 400, lambda: client.responses.create(**SAY, store=True))
assert stored.param == "store" and stored.code == "unsupported_parameter", stored.body
raises(openai.AuthenticationError, 401, client.with_options(api_key="wrong").models.list)
