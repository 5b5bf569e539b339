"""Tests chats over real engines with the `openai` client: tools, reasoning, templates, and messages as clients send."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import openai
import pytest
from transformers import AutoTokenizer

from cluster.config.fleet_file import load_fleet
from cluster.config.settings import BaseSpec, ReasoningParser, ServingConfig, ToolParser
from serving.chat.formats.table import FORMATS
from serving.chat.settings import ChatSettings, FleetChatSettings
from serving.chat.thinking import THINKING
from serving.gateway.prompts import Prompter
from serving.http.bodies.chat import ChatBody
from tests.worlds.chats import ANSWERS, CALLS, QUESTION, RESULT, TEMPLATES, THOUGHT, TOOLS, after_calls, make_chat_bases
from tests.worlds.servers import Server, serve_bases

CONFIG = ServingConfig(memory_bytes=8 * 2**20, max_model_tokens=500)
MODELS = list(ANSWERS)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_bases(tmp_path_factory.mktemp("chats"))


@pytest.fixture(scope="module")
def server(files: Path, tmp_path_factory: pytest.TempPathFactory):
    with serve_bases(files, tmp_path_factory.mktemp("server"), CONFIG, tuple(TEMPLATES)) as server:
        yield server


def ask(server: Server, model: str, messages: list, **more):
    return server.client.chat.completions.create(model=model, messages=messages, temperature=0, **more)


def streamed(server: Server, model: str, messages: list, **more) -> SimpleNamespace:
    """Ask for a stream and put the deltas together as clients do."""
    found = SimpleNamespace(content="", reasoning="", calls=[], finish_reason=None, num_pieces=0)
    for chunk in ask(server, model, messages, stream=True, **more):
        (choice,) = chunk.choices
        found.content += choice.delta.content or ""
        found.reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        found.finish_reason = choice.finish_reason or found.finish_reason
        for call in choice.delta.tool_calls or []:
            if call.index == len(found.calls):
                assert call.id
                found.calls.append([call.function.name, ""])
            found.calls[call.index][1] += call.function.arguments
            found.num_pieces += 1
    return found


# Tools.


@pytest.mark.parametrize("model", MODELS)
def test_calls_in_the_models_own_format_become_tool_calls(server: Server, model: str):
    choice = ask(server, model, QUESTION, tools=TOOLS).choices[0]
    assert [(one.function.name, json.loads(one.function.arguments)) for one in choice.message.tool_calls] == CALLS
    assert len({one.id for one in choice.message.tool_calls}) == 2
    assert {one.type for one in choice.message.tool_calls} == {"function"}
    assert choice.message.content == ("I look." if "I look." in ANSWERS[model] else None)
    assert choice.finish_reason == "tool_calls"


@pytest.mark.parametrize("model", MODELS)
def test_streamed_calls_equal_whole_ones(server: Server, model: str):
    whole = ask(server, model, QUESTION, tools=TOOLS).choices[0].message
    stream = streamed(server, model, QUESTION, tools=TOOLS)
    assert stream.calls == [[one.function.name, one.function.arguments] for one in whole.tool_calls]
    assert stream.content == (whole.content or "")
    assert stream.finish_reason == "tool_calls"
    assert stream.num_pieces > 2 or model == "pythonic", "arguments come in pieces"


def test_a_conversation_with_tools_goes_on(server: Server):
    """The client sends back the message object that it received."""
    first = ask(server, "hermes", QUESTION, tools=TOOLS).choices[0].message
    first.content = None
    results = [{"role": "tool", "tool_call_id": call.id, "content": "20"} for call in first.tool_calls]
    answer = ask(server, "hermes", [*QUESTION, first, *results], tools=TOOLS).choices[0]
    assert answer.message.content == RESULT
    assert answer.message.tool_calls is None
    assert answer.finish_reason == "stop"


def test_parallel_tool_calls_false_leaves_one_call(server: Server):
    asked = {"tools": TOOLS, "parallel_tool_calls": False}
    (call,) = ask(server, "hermes", QUESTION, **asked).choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == CALLS[0][1]
    assert len(streamed(server, "hermes", QUESTION, **asked).calls) == 1


def test_an_answer_that_is_cut_off_inside_a_call_ends_with_length(server: Server):
    choice = ask(server, "hermes", QUESTION, tools=TOOLS, max_tokens=60).choices[0]
    assert choice.finish_reason == "length"
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather"
    assert '{"city": "Rome"}'.startswith(call.function.arguments)


def test_with_tool_choice_none_the_model_sees_no_tools_and_makes_no_calls(server: Server):
    without = ask(server, "hermes", QUESTION, max_tokens=4)
    none = ask(server, "hermes", QUESTION, max_tokens=4, tools=TOOLS, tool_choice="none")
    assert none.usage == without.usage
    assert none.choices[0].message == without.choices[0].message
    assert ask(server, "hermes", QUESTION, tools=TOOLS, max_tokens=4).usage.prompt_tokens > none.usage.prompt_tokens


TOOLED = {"tools": TOOLS}


def tokenized(server: Server, **body) -> str:
    """Return the prompt of a chat with the model "plain"."""
    tokens = server.post("/tokenize", model="plain", **body).json()["tokens"]
    return server.post("/detokenize", model="plain", tokens=tokens).json()["prompt"]


CHOICE = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 3}}, "required": ["n"]}
TWO_TOOLS = [
    {"type": "function", "function": {"name": "pick", "parameters": {**CHOICE, "additionalProperties": False}}},
    {"type": "function", "function": {"name": "stop"}},
]


BAD_SCHEMA = {"type": "object", "properties": {"x": {"type": "string", "pattern": "("}}, "required": ["x"]}
BAD_TOOL = {"type": "function", "function": {"name": "bad", "parameters": BAD_SCHEMA}}


def test_a_template_without_tools_gets_them_as_text(server: Server):
    """So the model can call them, and what it called and learned stays in the conversation."""
    none, some = ([ask(server, "plain", QUESTION, max_tokens=1, **more).usage.prompt_tokens] for more in ({}, TOOLED))
    assert some[0] > none[0] + 50
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    turns = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "20 degrees"},
    ]
    prompt = tokenized(server, messages=turns, **TOOLED)
    for part in ('"name": "weather"', '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}', "20 degrees"):
        assert part in prompt
    assert "tools>" not in tokenized(server, messages=turns), "the calls stay, the list does not"
    assert "20 degrees" in tokenized(server, messages=turns)


def test_a_model_whose_template_has_no_tools_can_be_forced_to_call_one(server: Server):
    more = {"tools": TWO_TOOLS[1:], "tool_choice": "required", "parallel_tool_calls": False}
    choice = ask(server, "plain", THOUGHT, **more).choices[0]
    assert [call.function.name for call in choice.message.tool_calls] == ["stop"]
    assert choice.finish_reason == "tool_calls"


@pytest.mark.parametrize("model", [*MODELS, "opened"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_named_tool_is_called_with_valid_arguments(server: Server, model: str, stream: bool):
    """That needs no tool_parser, and it leaves no room for reasoning."""
    more = {"tools": TWO_TOOLS, "tool_choice": {"type": "function", "function": {"name": "pick"}}}
    if stream:
        found = streamed(server, model, THOUGHT, **more)
        ((name, arguments),) = found.calls
        assert (found.content, found.reasoning, found.finish_reason) == ("", "", "tool_calls")
    else:
        choice = ask(server, model, THOUGHT, **more).choices[0]
        (call,) = choice.message.tool_calls
        name, arguments = call.function.name, call.function.arguments
        assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    assert name == "pick"
    assert json.loads(arguments)["n"] in (1, 2, 3)


@pytest.mark.parametrize("seed", range(4))
def test_a_required_call_is_a_valid_call_of_one_of_the_tools(server: Server, seed: int):
    more = {"tools": TWO_TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": seed}
    choice = server.client.chat.completions.create(model="hermes", messages=THOUGHT, temperature=2.0, **more).choices[0]
    (call,) = choice.message.tool_calls
    assert call.function.name in ("pick", "stop")
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "stop" or arguments["n"] in (1, 2, 3)
    assert choice.finish_reason == "tool_calls"


def test_several_calls_may_be_required(server: Server):
    """Which of them the model makes is its own choice. An answer that is cut off may end inside the last one."""
    more = {"tools": TWO_TOOLS, "tool_choice": "required", "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    calls = ask(server, "hermes", THOUGHT, **more).choices[0].message.tool_calls
    assert {call.function.name for call in calls} <= {"pick", "stop"}
    assert all(isinstance(json.loads(call.function.arguments), dict) for call in calls[:-1])


def test_mistral_gets_ids_that_its_template_knows(server: Server):
    more = {"tools": TWO_TOOLS, "tool_choice": {"type": "function", "function": {"name": "stop"}}}
    (call,) = ask(server, "mistral", THOUGHT, **more).choices[0].message.tool_calls
    assert len(call.id) == 9


def test_a_constraint_applies_to_the_answer_not_to_the_reasoning(server: Server):
    """The template of "opened" opens the reasoning. A constrained answer closes it."""
    more = {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": CHOICE}}}
    message = ask(server, "opened", THOUGHT, **more).choices[0].message
    assert not hasattr(message, "reasoning_content")
    assert json.loads(message.content)["n"] in (1, 2, 3)


@pytest.mark.parametrize(
    ("model", "more", "word"),
    [
        ("hermes", {"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        ("hermes", {"tools": [BAD_TOOL], "tool_choice": "required"}, "tool_choice"),
        ("opened", {"tools": TOOLS}, "tool_parser"),
        ("hermes", {"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
        ("hermes", {"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
        ("hermes", {"tool_choice": "required"}, "tool_choice: there are no tools"),
        ("hermes", {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "'x'"),
        ("hermes", {"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ("hermes", {"functions": [{"name": "x"}]}, "functions"),
    ],
)
def test_tools_that_cannot_work_are_refused(server: Server, model: str, more: dict, word: str):
    response = server.post("/v1/chat/completions", model=model, messages=QUESTION, **more)
    assert response.status_code == 400, response.text
    assert word in response.json()["error"]["message"]


# Reasoning.


@pytest.mark.parametrize("model", ["hermes", "opened"])
def test_reasoning_is_apart_from_the_answer(server: Server, model: str):
    """In "opened", the template itself opens the reasoning."""
    message = ask(server, model, THOUGHT).choices[0].message
    assert (message.reasoning_content, message.content) == ("Well.", "Yes.")
    stream = streamed(server, model, THOUGHT)
    assert (stream.reasoning, stream.content) == ("Well.", "Yes.")
    hidden = ask(server, model, THOUGHT, extra_body={"include_reasoning": False}).choices[0].message
    assert hidden.content == "Yes."
    assert not hasattr(hidden, "reasoning_content")


@pytest.mark.parametrize("off", [{"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}])
def test_thinking_can_be_turned_off(server: Server, off: dict):
    message = ask(server, "hermes", THOUGHT, extra_body=off).choices[0].message
    assert message.content == "No."
    assert not hasattr(message, "reasoning_content")


# Templates.

WITH_TOOLS = [QUESTION, [*QUESTION, *after_calls(), {"role": "assistant", "content": "W.", "reasoning_content": "H."}]]
WITHOUT_TOOLS = [
    (QUESTION, {}),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "é\n", "name": "Eve"}], {}),
    (THOUGHT, {"chat_template_kwargs": {"enable_thinking": False}}),
    (THOUGHT, {"add_generation_prompt": False}),
    ([*THOUGHT, {"role": "assistant", "content": "Yes, bec"}], {"continue_final_message": True}),
]
RENDERED = [(model, messages, {"tools": TOOLS}) for model in MODELS for messages in WITH_TOOLS]
RENDERED += [(model, *conversation) for model in TEMPLATES for conversation in WITHOUT_TOOLS]


@pytest.mark.parametrize(("model", "messages", "more"), RENDERED)
def test_the_prompt_is_what_transformers_renders(files: Path, model: str, messages: list, more: dict):
    parsed = json.loads(json.dumps(messages))
    for call in (call for message in parsed for call in message.get("tool_calls", [])):
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    settings = {"add_generation_prompt": "continue_final_message" not in more, **more}
    settings |= settings.pop("chat_template_kwargs", {})
    expected = AutoTokenizer.from_pretrained(files / model).apply_chat_template(parsed, return_dict=False, **settings)
    body = ChatBody.model_validate({"model": model, "messages": messages, **more})
    assert list(Prompter(files / model).encode(body.chat())) == expected


def test_a_continued_message_goes_on_where_it_ended(server: Server):
    messages = [*THOUGHT, {"role": "assistant", "content": "<think>\nWell.\n</think>\n\nYe"}]
    more = {"extra_body": {"continue_final_message": True, "add_generation_prompt": False}}
    assert ask(server, "hermes", messages, **more).choices[0].message.content == "s."


def test_the_role_developer_is_system_to_a_template_that_does_not_know_it(server: Server):
    def num_tokens(role: str) -> int:
        return ask(server, "plain", [{"role": role, "content": "x"}, *THOUGHT], max_tokens=1).usage.prompt_tokens

    assert num_tokens("developer") == num_tokens("system") == len("system: x\nuser: Think!\nassistant: ")


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"chat_template": "{{ messages }}"}, "serving.trust_request_chat_template"),
        ({"chat_template_kwargs": {"chat_template": "{{ messages }}"}}, "'chat_template'"),
        ({"chat_template_kwargs": {"tokenize": True}}, "'tokenize'"),
        ({"chat_template_kwargs": {"messages": []}}, "'messages'"),
        ({"documents": [{"text": "a"}]}, "documents"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
)
def test_what_the_template_cannot_do_is_refused_by_name(server: Server, more: dict, word: str):
    response = server.post("/v1/chat/completions", model="plain", messages=THOUGHT, **more)
    assert response.status_code == 400, response.text
    assert word in response.json()["error"]["message"]


# Messages.


@pytest.mark.parametrize(
    "more",
    [
        {"refusal": None, "tool_calls": None, "function_call": None, "audio": None, "name": None},
        {"annotations": [], "tool_calls": [], "reasoning_content": None},
        {"annotations": [{"type": "url_citation"}], "parsed": {"a": 1}},
        {"content": [{"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}]},
        {"content": None, "refusal": "b"},
        {"content": [{"type": "refusal", "refusal": "b"}]},
    ],
)
def test_assistant_messages_are_taken_as_clients_send_them_back(server: Server, more: dict):
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    expected = ask(server, "plain", plain, max_tokens=4)
    answer = ask(server, "plain", [plain[0], {**plain[1], **more}, plain[2]], max_tokens=4)
    assert answer.usage == expected.usage
    assert answer.choices[0].message == expected.choices[0].message


@pytest.mark.parametrize("stream", [False, True])
def test_the_clients_own_message_object_is_taken_back(server: Server, stream: bool):
    message = ask(server, "plain", THOUGHT, max_tokens=4).choices[0].message
    turns = [*THOUGHT, message, {"role": "user", "content": "And?"}]
    answer = ask(server, "plain", turns, max_tokens=2, stream=stream)
    if stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) is not None
    else:
        assert answer.usage.prompt_tokens == len(f"user: Think!\nassistant: {message.content}\nuser: And?\nassistant: ")


@pytest.mark.parametrize(
    ("message", "word"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "takes text parts only"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "'input_audio'"),
        ({"role": "user", "content": None}, "content"),
        ({"role": "user", "content": 3}, "messages.0.content"),
        ({"role": "assistant", "audio": {"id": "x"}}, "messages.0.audio"),
        ({"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}, "tool_calls"),
        ({"role": "function", "name": "f", "content": "x"}, "tool"),
        ({"role": "tool", "content": "x"}, "tool_call_id"),
        (
            {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": '{"a": '}}]},
            "messages.0.tool_calls.0.function.arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "[1]"}}]},
            "messages.0.tool_calls.0.function.arguments",
        ),
    ],
)
def test_bad_messages_are_refused_with_the_cause(server: Server, message: dict, word: str):
    response = server.post("/v1/chat/completions", model="plain", messages=[message])
    assert response.status_code == 400, response.text
    assert word in response.json()["error"]["message"]


def test_fields_that_ask_for_what_happens_anyway_are_accepted(server: Server):
    more = {"store": False, "service_tier": "auto", "modalities": ["text"], "parallel_tool_calls": True, "n": 1}
    more |= {"metadata": {"a": "b"}, "user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "tools": []}
    more |= {"tool_choice": "auto", "functions": [], "verbosity": "medium", "reasoning_effort": "none"}
    more |= {"max_completion_tokens": 2, "chat_template_kwargs": {}, "documents": []}
    response = server.post("/v1/chat/completions", model="plain", messages=THOUGHT, **more)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 2


def test_usage_comes_with_every_chunk_if_asked(server: Server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(ask(server, "plain", THOUGHT, max_tokens=5, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == 5


def test_a_request_may_bring_a_template_if_the_server_trusts_it(files: Path, tmp_path: Path):
    config = ServingConfig(memory_bytes=8 * 2**20, max_model_tokens=500, trust_request_chat_template=True)
    with serve_bases(files, tmp_path, config, ("plain",)) as server:
        more = {"extra_body": {"chat_template": "{{ messages[0].content }}!"}}
        assert ask(server, "plain", THOUGHT, max_tokens=1, **more).usage.prompt_tokens == len("Think!!")
        with pytest.raises(openai.BadRequestError, match="chat template"):
            ask(server, "plain", THOUGHT, extra_body={"chat_template": "{% for x"})


def test_the_fleet_file_may_name_the_parsers(files: Path, tmp_path: Path):
    """What an adapter leaves out is as in its base; what both leave out is found in the chat template."""
    folder = tmp_path / "fleet.toml"
    folder.write_text(
        'name = "f"\n[[bases]]\nname = "v1"\npath = "v1"\ntool_parser = "hermes"\nreasoning_parser = "think"\n'
        '[[adapters]]\nname = "a"\npath = "a"\nbase = "v1"\ndata = "d"\ntool_parser = "pythonic"\n'
    )
    chats = FleetChatSettings(load_fleet(folder).specs(), trusts_request_templates=False)
    assert chats.of(("a", "v1")) == ChatSettings("pythonic", "think")
    assert chats.of(("unknown", "v1")) == chats.of(("v1",)) == ChatSettings("hermes", "think")
    assert chats.of(("v2",)) == ChatSettings()
    assert set(get_args(ToolParser)) == {*FORMATS, "auto", "none"}
    assert set(get_args(ReasoningParser)) == {*THINKING, "auto", "none"}


def test_a_named_parser_replaces_the_one_that_the_template_shows(files: Path, tmp_path: Path):
    specs = {"hermes": BaseSpec("hermes", files / "hermes", tool_parser="none", reasoning_parser="none")}
    with serve_bases(files, tmp_path, CONFIG, ("hermes",), specs) as server:
        assert ask(server, "hermes", THOUGHT).choices[0].message.content == "<think>\nWell.\n</think>\n\nYes."
        with pytest.raises(openai.BadRequestError, match="tool_parser"):
            ask(server, "hermes", QUESTION, tools=TOOLS)


def test_a_tokenizer_may_declare_how_its_answers_are_read(files: Path, tmp_path: Path):
    """The declaration counts before what the chat template shows, and after what the fleet file says."""
    call = {"open": "<tool_call>", "close": "</tool_call>", "content": "json", "repeats": True}
    call["transform"] = {"type": "function", "function": {"name": "declared", "arguments": "{content.arguments}"}}
    tokenizer = AutoTokenizer.from_pretrained(files / "hermes")
    tokenizer.response_template = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {"content": {"content": "text"}, "tool_calls": call},
    }
    for name in ("own", "named"):
        shutil.copytree(files / "hermes", tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    specs = {"named": BaseSpec("named", tmp_path / "named", tool_parser="hermes")}
    with serve_bases(tmp_path, tmp_path, CONFIG, ("own", "named"), specs) as server:
        message = ask(server, "own", QUESTION, tools=TOOLS).choices[0].message
        assert message.content == "I look."
        calls = [(one.function.name, json.loads(one.function.arguments)) for one in message.tool_calls]
        assert calls == [("declared", arguments) for _, arguments in CALLS]
        stream = streamed(server, "own", QUESTION, tools=TOOLS)
        assert [(name, json.loads(arguments)) for name, arguments in stream.calls] == calls
        named = ask(server, "named", QUESTION, tools=TOOLS).choices[0].message
        assert [one.function.name for one in named.tool_calls] == ["weather", "weather"]
