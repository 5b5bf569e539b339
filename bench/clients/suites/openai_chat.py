"""The `openai` package: chats, tools and structured output."""

import json

import openai
import pydantic

from bench.clients.checklist import Checklist, Target, refusal
from bench.clients.suites.openai_sdk import connect

check = Checklist("openai", "openai")
QUESTION = [{"role": "user", "content": "Name one colour."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Return the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Colour(pydantic.BaseModel):
    """A colour, as structured output."""

    model_config = pydantic.ConfigDict(extra="forbid")  # a small model would add keys without end
    name: str = pydantic.Field(max_length=12)
    is_warm: bool


def ask(target: Target, **more):
    """Return a chat completion of at most 16 tokens."""
    settings = {"model": target.base, "messages": QUESTION, "max_tokens": 16, "temperature": 0, **more}
    return connect(target).chat.completions.create(**settings)


@check
def chat(target: Target) -> None:
    """A chat answer has a role, text and usage."""
    reply = ask(target)
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content
    assert reply.usage.total_tokens > reply.usage.prompt_tokens


@check
def chat_streams(target: Target) -> None:
    """The deltas are the whole text, and the first one has the role."""
    deltas = [chunk.choices[0].delta for chunk in ask(target, stream=True)]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == ask(target).choices[0].message.content


@check
def a_message_can_be_sent_back(target: Target) -> None:
    """The second turn has the first answer as the client dumps it, with all its nulls."""
    first = ask(target).choices[0].message
    ask(target, messages=[*QUESTION, first.model_dump(), {"role": "user", "content": "And another?"}])
    ask(target, messages=[*QUESTION, first, {"role": "user", "content": "And another?"}])


@check
def system_developer_and_text_parts(target: Target) -> None:
    """All roles of plain text."""
    parts = [{"type": "text", "text": "Name one "}, {"type": "text", "text": "colour."}]
    ask(target, messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}])
    ask(target, messages=[{"role": "developer", "content": "Be brief."}, *QUESTION])


@check
def an_image_is_refused_by_name(target: Target) -> None:
    """The error says that the server takes text."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "user", "content": [image]}]
    assert "text" in refusal(openai.BadRequestError, lambda: ask(target, messages=messages))


@check
def chat_logprobs(target: Target) -> None:
    """Bytes of all tokens join to the text."""
    choice = ask(target, logprobs=True, top_logprobs=4).choices[0]
    joined = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert joined.decode(errors="replace").startswith(choice.message.content[:4])
    assert all(len(token.top_logprobs) == 4 for token in choice.logprobs.content)


@check
def fields_that_ask_for_what_happens_anyway(target: Target) -> None:
    """Neutral values are accepted."""
    neutral = {"store": False, "service_tier": "auto", "parallel_tool_calls": True, "user": "someone", "n": 1}
    ask(target, **neutral, modalities=["text"], metadata={}, response_format={"type": "text"}, logit_bias={})
    ask(target, max_tokens=None, max_completion_tokens=4)


@check
def tools_are_accepted(target: Target) -> None:
    """`tool_choice` auto gives a text or a call."""
    message = ask(target, tools=[WEATHER], max_tokens=32).choices[0].message
    assert message.content is not None or message.tool_calls


@check
def a_required_tool_is_called(target: Target) -> None:
    """`tool_choice` required gives a call whose arguments fit the schema."""
    choice = ask(target, tools=[WEATHER], tool_choice="required", max_tokens=200).choices[0]
    assert choice.finish_reason == "tool_calls", choice
    assert set(json.loads(choice.message.tool_calls[0].function.arguments)) == {"city"}


@check
def a_named_tool_is_called_in_a_stream(target: Target) -> None:
    """The streamed pieces of the arguments are JSON."""
    named = {"type": "function", "function": {"name": "get_weather"}}
    chunks = list(ask(target, tools=[WEATHER], tool_choice=named, max_tokens=200, stream=True))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert calls[0].function.name == "get_weather"
    assert set(json.loads("".join(call.function.arguments or "" for call in calls))) == {"city"}


@check
def a_tool_result_is_read(target: Target) -> None:
    """The turn after a call, as the client sends it."""
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bern"}'}}
    turns = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    assert ask(target, messages=turns, tools=[WEATHER]).choices[0].message.role == "assistant"


@check
def json_object(target: Target) -> None:
    """`response_format` json_object gives an object, unless `max_tokens` cuts it."""
    choice = ask(target, response_format={"type": "json_object"}, max_tokens=200).choices[0]
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


@check
def json_schema_of_a_pydantic_model(target: Target) -> None:
    """`parse` returns the model."""
    settings = {"model": target.base, "messages": QUESTION, "max_tokens": 100, "temperature": 0}
    reply = connect(target).chat.completions.parse(response_format=Colour, **settings)
    assert isinstance(reply.choices[0].message.parsed, Colour)


@check
def json_schema_with_an_adapter_in_a_stream(target: Target) -> None:
    """Structured output composes with adapters and streaming."""
    schema = {"type": "json_schema", "json_schema": {"name": "colour", "schema": Colour.model_json_schema()}}
    chunks = ask(target, model=target.adapter, response_format=schema, max_tokens=100, stream=True)
    Colour.model_validate_json("".join(chunk.choices[0].delta.content or "" for chunk in chunks))


@check
def guided_choice(target: Target) -> None:
    """vLLM's `structured_outputs`."""
    reply = ask(target, extra_body={"structured_outputs": {"choice": ["red", "blue"]}})
    assert reply.choices[0].message.content in ("red", "blue")


@check
def a_bad_schema_is_a_400(target: Target) -> None:
    """The error names the schema."""
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    assert "schema" in refusal(openai.BadRequestError, lambda: ask(target, response_format=bad))


@check
def template_settings(target: Target) -> None:
    """`chat_template_kwargs`, `add_generation_prompt` and `continue_final_message`."""
    ask(target, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    started = [*QUESTION, {"role": "assistant", "content": "One colour is"}]
    ask(target, messages=started, extra_body={"add_generation_prompt": False, "continue_final_message": True})


if __name__ == "__main__":
    check.main()
