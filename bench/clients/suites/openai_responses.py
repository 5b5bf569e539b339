"""The `openai` package: the Responses API."""

import json

from bench.clients.checklist import Checklist, Target
from bench.clients.suites.openai_chat import WEATHER
from bench.clients.suites.openai_sdk import connect

check = Checklist("openai", "openai")


@check
def responses(target: Target) -> None:
    """The Responses API gives text and usage."""
    reply = connect(target).responses.create(model=target.base, input="Name one colour.", max_output_tokens=16)
    assert reply.output_text
    assert reply.usage.output_tokens > 0


@check
def responses_stream(target: Target) -> None:
    """Text deltas join to the final text."""
    with connect(target).responses.stream(model=target.base, input="Name one colour.", max_output_tokens=16) as stream:
        events = list(stream)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text
    assert events[-1].type in ("response.completed", "response.incomplete")


@check
def responses_call_a_tool(target: Target) -> None:
    """A required function call."""
    tool = {"type": "function", "strict": True, **WEATHER["function"]}
    reply = connect(target).responses.create(
        model=target.base, input="Weather?", tools=[tool], tool_choice="required", max_output_tokens=200
    )
    assert reply.output[-1].type == "function_call"
    assert set(json.loads(reply.output[-1].arguments)) == {"city"}


@check
def responses_are_stored(target: Target) -> None:
    """A second response continues the first."""
    client = connect(target)
    first = client.responses.create(model=target.base, input="Name one colour.", max_output_tokens=8, store=True)
    assert client.responses.retrieve(first.id).id == first.id
    client.responses.create(model=target.base, input="Another.", max_output_tokens=8, previous_response_id=first.id)
    client.responses.delete(first.id)


if __name__ == "__main__":
    check.main()
