"""Tests responses with the `openai` client and its own types: text, reasoning, calls, streams and refusals."""

from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseOutputMessage, ResponseReasoningItem
from pydantic import BaseModel

from cluster.config.settings import ServingConfig
from tests.worlds.chats import QUESTION, RESULT, TEMPLATES, TOOLS, make_chat_bases
from tests.worlds.servers import Server, serve_bases, wait_until

TOOL = {"type": "function", **TOOLS[0]["function"]}
CITIES = ['{"city": "Rome"}', '{"city": "Oslo"}']
ASK = QUESTION[0]["content"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    files = make_chat_bases(tmp_path_factory.mktemp("chats"))
    config = ServingConfig(memory_bytes=8 * 2**20, max_model_tokens=500)
    with serve_bases(files, tmp_path_factory.mktemp("server"), config, tuple(TEMPLATES)) as server:
        yield server


def ask(server: Server, **more: Any) -> Response:
    """Ask for a response and check that it has the shape that OpenAI documents."""
    response = server.client.responses.create(**{"temperature": 0, **more})
    Response.model_validate(response.model_dump(), strict=True)
    return response


def streamed(server: Server, **more: Any) -> tuple[Response, list[Any]]:
    """Ask for a stream; return the response that the client puts together, and the events."""
    with server.client.responses.stream(**{"temperature": 0, **more}) as stream:
        events = list(stream)
        return stream.get_final_response(), events


def shape(response: Any) -> list[tuple]:
    """Return what the output says, without its random ids."""
    found: list[tuple] = []
    for item in response.output:
        match item.type:
            case "message":
                found.append(("message", item.content[0].text))
            case "reasoning":
                found.append(("reasoning", item.content[0].text))
            case "function_call":
                found.append((item.name, item.arguments))
    return found


def test_a_response_says_what_the_chat_says(server: Server):
    chat = server.client.chat.completions.create(model="plain", messages=QUESTION, temperature=0, max_tokens=20)
    response = ask(server, model="plain", input=ASK, max_output_tokens=20, metadata={"from": "a test"})
    assert response.output_text == chat.choices[0].message.content
    assert (response.usage.input_tokens, response.usage.output_tokens) == (
        chat.usage.prompt_tokens,
        chat.usage.completion_tokens,
    )
    assert response.usage.total_tokens == chat.usage.total_tokens
    assert (response.model, response.metadata, response.max_output_tokens) == ("plain", {"from": "a test"}, 20)
    assert response.id.startswith("resp_")


def test_a_token_limit_makes_a_response_incomplete(server: Server):
    response = ask(server, model="plain", input=ASK, max_output_tokens=3, extra_body={"ignore_eos": True})
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.output_tokens == 3
    final, events = streamed_raw(server, model="plain", input=ASK, max_output_tokens=3, extra_body={"ignore_eos": True})
    assert events[-1].type == "response.incomplete"
    assert (final.status, final.output_text) == ("incomplete", response.output_text)
    assert final.output[-1].status == "incomplete"


def streamed_raw(server: Server, **more: Any) -> tuple[Response, list[Any]]:
    events = list(server.client.responses.create(**{"temperature": 0, "stream": True, **more}))
    return events[-1].response, events


def test_instructions_come_first(server: Server):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    chat = server.client.chat.completions.create(model="plain", messages=turns, temperature=0, max_tokens=5)
    response = ask(server, model="plain", input="Hi", instructions="Be brief.", max_output_tokens=5)
    assert response.output_text == chat.choices[0].message.content
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.instructions == "Be brief."
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "H"}, {"type": "input_text", "text": "i"}]}]
    again = ask(server, model="plain", input=parts, instructions="Be brief.", max_output_tokens=5)
    assert again.output_text == response.output_text


def test_calls_are_items_of_their_own(server: Server):
    response = ask(server, model="hermes", input=ASK, tools=[TOOL])
    assert [type(item) for item in response.output] == [
        ResponseOutputMessage,
        ResponseFunctionToolCall,
        ResponseFunctionToolCall,
    ]
    calls = [item for item in response.output if item.type == "function_call"]
    assert [(call.name, call.arguments) for call in calls] == [("weather", city) for city in CITIES]
    assert len({call.call_id for call in calls} | {call.id for call in calls}) == 4
    assert response.status == "completed"
    one = ask(server, model="hermes", input=ASK, tools=[TOOL], parallel_tool_calls=False)
    assert [item.type for item in one.output].count("function_call") == 1


def test_the_output_and_the_results_of_calls_go_back_as_input(server: Server):
    first = ask(server, model="hermes", input=ASK, tools=[TOOL])
    calls = [item for item in first.output if item.type == "function_call"]
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "20"} for call in calls]
    # The model learned the turn after calls without a text before them.
    second = ask(server, model="hermes", input=[*QUESTION, *calls, *results], tools=[TOOL])
    assert second.output_text == RESULT
    with_text = ask(server, model="hermes", input=[*QUESTION, *first.output, *results], tools=[TOOL])
    assert with_text.usage.input_tokens > second.usage.input_tokens


def test_reasoning_is_an_item(server: Server):
    response = ask(server, model="hermes", input="Think!")
    assert [type(item) for item in response.output] == [ResponseReasoningItem, ResponseOutputMessage]
    assert shape(response) == [("reasoning", "Well."), ("message", "Yes.")]
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens
    no_thought = ask(server, model="hermes", input="Think!", reasoning={"effort": "none"})
    assert no_thought.output_text == "No."
    again = ask(server, model="hermes", input=[{"role": "user", "content": "Think!"}, *response.output, *QUESTION])
    assert again.usage.input_tokens > response.usage.input_tokens + 10


@pytest.mark.parametrize("model", [name for name in TEMPLATES if name != "opened"])
def test_a_stream_makes_the_same_response(server: Server, model: str):
    tools = [TOOL] if model != "plain" else []
    whole = ask(server, model=model, input=ASK, tools=tools, max_output_tokens=120)
    if whole.status == "completed":
        final, events = streamed(server, model=model, input=ASK, tools=tools, max_output_tokens=120)
    else:
        final, events = streamed_raw(server, model=model, input=ASK, tools=tools, max_output_tokens=120)
    assert shape(final) == shape(whole)
    assert final.usage == whole.usage
    assert [event.sequence_number for event in events if hasattr(event, "sequence_number")] == list(range(len(events)))


def test_a_stream_tells_of_each_item_from_its_start_to_its_end(server: Server):
    _, events = streamed_raw(server, model="hermes", input=ASK, tools=[TOOL])
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:2] == ["created", "in_progress"]
    assert kinds[-1] == "completed"
    without_deltas = [kind for kind in kinds if not kind.endswith("delta")]
    message = ["output_item.added", "content_part.added", "output_text.done", "content_part.done", "output_item.done"]
    call = ["output_item.added", "function_call_arguments.done", "output_item.done"]
    assert without_deltas[2:-1] == [*message, *call, *call]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    final = events[-1].response
    assert text == final.output_text
    for index, item in enumerate(final.output):
        about = [event for event in events if getattr(event, "output_index", None) == index]
        assert {getattr(event, "item_id", item.id) for event in about} == {item.id}
        (done,) = [e for e in events if e.type == "response.output_item.done" and e.output_index == index]
        assert done.item == item


def test_reasoning_streams_as_its_own_events(server: Server):
    final, events = streamed(server, model="hermes", input="Think!")
    text = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert (text, final.output_text) == (final.output[0].content[0].text, "Yes.")


class Answer(BaseModel):
    """What a client wants to read."""

    is_warm: bool
    degrees: Literal[10, 20]


@pytest.mark.parametrize("model", ["plain", "hermes"])
def test_a_schema_makes_the_text_parse(server: Server, model: str):
    response = server.client.responses.parse(model=model, input=ASK, text_format=Answer, max_output_tokens=200)
    assert isinstance(response.output_parsed, Answer)
    assert response.text.format.type == "json_schema"
    free = ask(server, model=model, input=ASK, text={"format": {"type": "json_object"}}, max_output_tokens=60)
    assert free.output_text.lstrip().startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_call_can_be_forced(server: Server, choice: Any):
    response = ask(server, model="hermes", input="Think!", tools=[TOOL], tool_choice=choice, max_output_tokens=200)
    calls = [item for item in response.output if item.type == "function_call"]
    assert calls[0].name == "weather"
    assert response.tool_choice == choice or response.tool_choice.model_dump() == choice


def test_an_adapter_of_nobody_is_not_found(server: Server):
    with pytest.raises(openai.NotFoundError, match="'nobody' does not exist"):
        ask(server, model="nobody", input="a")


def test_a_client_that_leaves_ends_the_answer(server: Server):
    stream = server.client.responses.create(
        model="plain", input=ASK, stream=True, extra_body={"ignore_eos": True}, max_output_tokens=400
    )
    next(iter(stream))
    stream.close()
    wait_until(lambda: server.num_running("plain") == 0)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"store": True}, "store: this server keeps no responses"),
        ({"background": True}, "background: this server does not support it"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type: Input should be 'function'"),
        ({"input": [{"type": "image_generation_call"}]}, "item 0: this server does not support items of type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "item 0: this server takes text parts only, not parts of type 'input_image'",
        ),
        ({"input": []}, "input: List should have at least 1 item"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input.0.role: Input should be"),
        ({"max_output_tokens": 0}, "max_output_tokens: Input should be greater than or equal to 1"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"messages": []}, "messages: this is a field of chat completions, not of responses"),
        ({"previous_response_id": "resp_1"}, "previous_response_id: this server does not support it"),
        ({"conversation": "c"}, "conversation: this server does not support it"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice: 'x' is not among the tools"),
        ({"top_p": 2}, "top_p: Input should be less than or equal to 1"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(server: Server, more: dict, said: str):
    answer = server.post("/v1/responses", **{"model": "plain", "input": "a", **more})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_values_that_ask_for_nothing_are_accepted(server: Server, tmp_path: Path):
    nothing = {"store": False, "background": False, "include": [], "truncation": "disabled", "user": "me", "tools": []}
    response = ask(server, model="plain", input="a", max_output_tokens=2, text={"format": {"type": "text"}}, **nothing)
    assert response.status in ("completed", "incomplete")
