"""LiteLLM with an OpenAI-compatible endpoint."""

import json

import litellm

from bench.clients.checklist import Checklist, Target

check = Checklist("litellm", "litellm")
QUESTION = [{"role": "user", "content": "Name one colour."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
        },
    },
}


def ask(target: Target, **more):
    """Return a chat completion through LiteLLM."""
    settings = {"messages": QUESTION, "max_tokens": 100, "temperature": 0, "num_retries": 0, **more}
    return litellm.completion(model=f"openai/{target.base}", api_base=target.api, api_key="none", **settings)


@check
def completion(target: Target) -> None:
    """A chat answer."""
    assert ask(target, max_tokens=8).choices[0].message.content


@check
def stream(target: Target) -> None:
    """A streamed chat answer."""
    assert "".join(part.choices[0].delta.content or "" for part in ask(target, max_tokens=8, stream=True))


@check
def second_turn(target: Target) -> None:
    """The answer goes back as LiteLLM dumps it."""
    first = ask(target, max_tokens=8).choices[0].message
    ask(target, messages=[*QUESTION, first.model_dump(), {"role": "user", "content": "Another?"}], max_tokens=8)


@check
def tools(target: Target) -> None:
    """A required call."""
    call = ask(target, tools=[TOOL], tool_choice="required").choices[0].message.tool_calls[0]
    assert "city" in json.loads(call.function.arguments)


@check
def json_schema(target: Target) -> None:
    """A response format."""
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    assert "n" in json.loads(ask(target, response_format=form).choices[0].message.content)


@check
def text_completion(target: Target) -> None:
    """A completion of an adapter."""
    settings = {"api_base": target.api, "api_key": "none", "max_tokens": 4}
    reply = litellm.text_completion(model=f"text-completion-openai/{target.adapter}", prompt="Once", **settings)
    assert reply.choices[0].text


@check
def embedding(target: Target) -> None:
    """A vector."""
    reply = litellm.embedding(model=f"openai/{target.base}", input=["a cat"], api_base=target.api, api_key="none")
    assert reply.data[0]["embedding"]


if __name__ == "__main__":
    check.main()
