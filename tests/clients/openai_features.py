"""Tools and structured output through the openai package; run where a probe shows that the server has them."""
import json
import os

import openai

client = openai.OpenAI(base_url=os.environ["BASE"] + "/v1", api_key=os.environ["API_KEY"], max_retries=0, timeout=60)
ASK = dict(model="arith", messages=[{"role": "user", "content": "1+1="}], temperature=0, max_tokens=400)
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "pick", "parameters": SCHEMA, "strict": True}}


def attempt(name, **fields):
    """The answer's choice, or None where the server says that it lacks the feature."""
    try:
        return client.chat.completions.create(**ASK, **fields).choices[0]
    except openai.BadRequestError as error:
        if error.code != "unsupported_parameter":
            raise
        print(f"left out: {name}, the server answers {error.body['message']!r}")
        return None


form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
if choice := attempt("response_format", response_format=form):
    assert json.loads(choice.message.content)["a"] in ("x", "y"), choice
if choice := attempt("tools", tools=[TOOL], tool_choice="required", parallel_tool_calls=False):
    call = choice.message.tool_calls[0].function
    assert call.name == "pick" and json.loads(call.arguments)["a"] in ("x", "y"), choice
    # The package's own accumulation of a stream comes to the same call.
    stream = getattr(client.chat.completions, "stream", None) or client.beta.chat.completions.stream
    with stream(**ASK, tools=[TOOL], tool_choice="required", parallel_tool_calls=False) as events:
        [told] = events.get_final_completion().choices[0].message.tool_calls
    assert (told.function.name, told.function.arguments) == ("pick", call.arguments), told
