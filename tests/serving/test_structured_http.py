"""Structured output over HTTP: the `openai` client, vLLM's fields, errors, and an engine that dies in the middle."""

import json
import re
from dataclasses import replace
from typing import Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, ConfigDict
from transformers import AutoTokenizer

from cluster.config.settings import ServingConfig
from serving.engine.request import Request, TokenStream
from serving.errors import BackendDiedError
from serving.gateway.local_backend import LocalBackend
from tests.worlds.servers import Server, serve_bases
from tests.worlds.serving import make_adapter, make_checkpoint, set_chat_template

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
CONFIG = ServingConfig(memory_bytes=8 * 2**20, max_model_tokens=500, max_rank=16)
MESSAGES = [{"role": "user", "content": "Describe a shirt."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "green"]},
        "size": {"type": "integer", "minimum": 1, "maximum": 60},
        "label": {"type": "string", "maxLength": 8},
    },
    "required": ["color", "size", "label"],
    "additionalProperties": False,
}


def schema_format(schema: dict, **more: object) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "shirt", "schema": schema, **more}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    files = tmp_path_factory.mktemp("files")
    make_checkpoint(files / "v1")
    set_chat_template(files / "v1", TEMPLATE)
    make_adapter(files / "tone", files / "v1", rank=4)
    with serve_bases(files, tmp_path_factory.mktemp("server"), CONFIG, ("v1",)) as server:
        assert server.post("/v1/load_lora_adapter", lora_name="tone", lora_path=str(files / "tone")).status_code == 200
        yield server


def chat(server: Server, model: str = "v1", **more: object) -> str:
    """Return a chat's answer, which has to be complete."""
    answer = server.client.chat.completions.create(model=model, messages=MESSAGES, **{"temperature": 0, **more})
    assert answer.choices[0].finish_reason == "stop"
    return answer.choices[0].message.content


@pytest.mark.parametrize("model", ["v1", "tone"])
@pytest.mark.parametrize("strict", [True, False, None])
def test_response_format_with_a_schema(server: Server, model: str, strict: bool | None):
    text = chat(server, model, response_format=schema_format(SCHEMA, strict=strict, description="a shirt"))
    jsonschema.validate(json.loads(text), SCHEMA)


def test_a_stream_has_the_text_of_the_whole_answer(server: Server):
    asked = {"model": "tone", "messages": MESSAGES, "temperature": 0, "response_format": schema_format(SCHEMA)}
    chunks = list(server.client.chat.completions.create(**asked, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == chat(server, "tone", response_format=schema_format(SCHEMA))
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    material: Literal["wool", "silk"]
    is_new: bool


class Shirt(BaseModel):
    model_config = ConfigDict(extra="forbid")
    color: Literal["red", "green", "blue"]
    first: Part
    second: Part | None


def test_the_client_parses_an_answer_into_a_pydantic_model(server: Server):
    answer = server.client.chat.completions.parse(
        model="v1", messages=MESSAGES, response_format=Shirt, temperature=1.0, seed=4, n=3
    )
    assert len(answer.choices) == 3
    for choice in answer.choices:
        assert isinstance(choice.message.parsed, Shirt)
        assert choice.finish_reason == "stop"


def test_any_json_object(server: Server):
    """Nothing bounds such an object, so the bias lets the random model close it."""
    close = {str(token): 100 for token in server_tokens(server, "}")}
    assert json.loads(chat(server, response_format={"type": "json_object"}, logit_bias=close)) == {}
    assert json.loads(chat(server, extra_body={"structured_outputs": {"json_object": True}}, logit_bias=close)) == {}


def server_tokens(server: Server, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(server.files / "v1")(text)["input_ids"]


FIELDS = {
    "structured_outputs.json": ({"structured_outputs": {"json": SCHEMA}}, None),
    "structured_outputs.json as text": ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, None),
    "structured_outputs without spaces": (
        {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
        r'\{"color":"(red|green)","size":\d+,"label":".*"\}',
    ),
    "structured_outputs with own spaces": (
        {"structured_outputs": {"json": {"const": [1]}, "whitespace_pattern": "~"}},
        "~?".join(("", r"\[", "1", r"\]")).removeprefix("~?"),
    ),
    "structured_outputs.regex": ({"structured_outputs": {"regex": "[a-c]{2}[0-9]{3}"}}, "[a-c]{2}[0-9]{3}"),
    "structured_outputs.choice": ({"structured_outputs": {"choice": ["yes please", "no"]}}, "yes please|no"),
    "structured_outputs.grammar": (
        {"structured_outputs": {"grammar": 'root ::= "select " column\ncolumn ::= "a" | "b"'}},
        "select [ab]",
    ),
    "lark": ({"structured_outputs": {"grammar": 'start: "x" NUM\nNUM: /[0-9]{2}/'}}, "x[0-9]{2}"),
    "guided_json": ({"guided_json": SCHEMA}, None),
    "guided_regex": ({"guided_regex": "(ab){2}c", "guided_decoding_backend": "xgrammar"}, "ababc"),
    "guided_choice": ({"guided_choice": ["one", "two"]}, "one|two"),
    "guided_grammar": ({"guided_grammar": 'root ::= "up" | "down"'}, "up|down"),
    "text and a choice": ({"response_format": {"type": "text"}, "guided_choice": ["one", "two"]}, "one|two"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_of_vllm(server: Server, name: str):
    body, pattern = FIELDS[name]
    text = chat(server, extra_body=body)
    if pattern is None:
        jsonschema.validate(json.loads(text), SCHEMA)
    else:
        assert re.fullmatch(pattern, text)
    asked = {"model": "v1", "prompt": "x", "max_tokens": 200, "temperature": 0}
    completion = server.client.completions.create(**asked, extra_body=body).choices[0]
    assert completion.finish_reason == "stop"
    if pattern is not None:
        assert re.fullmatch(pattern, completion.text)


def test_text_is_no_constraint(server: Server):
    free = server.post("/v1/chat/completions", model="v1", messages=MESSAGES, temperature=0, max_tokens=9).json()
    text = {"response_format": {"type": "text"}}
    bound = server.post("/v1/chat/completions", model="v1", messages=MESSAGES, temperature=0, max_tokens=9, **text)
    assert bound.json()["choices"][0]["message"] == free["choices"][0]["message"]


def test_an_answer_that_is_cut_says_so(server: Server):
    answer = server.client.chat.completions.create(
        model="v1", messages=MESSAGES, max_tokens=3, response_format=schema_format(SCHEMA)
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3


REFUSED = {
    "schema": (
        {"response_format": schema_format({"type": "objekt"})},
        "response_format.json_schema.schema: .*objekt",
    ),
    "strict schema": (
        {"response_format": schema_format({"type": "array", "uniqueItems": True}, strict=True)},
        "response_format.json_schema.schema: .*uniqueItems",
    ),
    "no schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.json_schema.schema: Field required",
    ),
    "unknown format": ({"response_format": {"type": "xml"}}, "response_format: .*'xml'.*json_schema"),
    "structural tag": ({"response_format": {"type": "structural_tag"}}, "response_format: .*structural_tag"),
    "regex": ({"structured_outputs": {"regex": "(["}}, "structured_outputs.regex: .*unclosed"),
    "grammar": ({"guided_grammar": "root ::= missing"}, "guided_grammar: .*missing"),
    "json text": ({"guided_json": "{"}, "guided_json: .*JSON"),
    "empty choice": ({"structured_outputs": {"choice": []}}, "structured_outputs.choice: .*at least 1"),
    "nothing": ({"structured_outputs": {}}, "structured_outputs: must have exactly one of json, regex"),
    "two": ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs: must have exactly one of"),
    "two fields": (
        {"guided_regex": "a", "response_format": {"type": "json_object"}},
        "response_format and guided_regex",
    ),
    "unknown field": ({"structured_outputs": {"regex": "a", "x": 1}}, "structured_outputs.x: .*not support"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_a_400_that_names_it(server: Server, name: str, stream: bool):
    body, message = REFUSED[name]
    steps = server.loops["v1"].stats()["steps"]
    with pytest.raises(openai.BadRequestError) as refused:
        server.client.chat.completions.create(model="v1", messages=MESSAGES, extra_body=body, stream=stream)
    assert re.search(f"(?s){message}", refused.value.body["message"])
    assert server.loops["v1"].stats()["steps"] == steps, "the engine has worked for it"


def test_a_schema_that_is_not_strict_may_have_keywords_that_are_ignored(server: Server):
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 1, "maxItems": 2, "uniqueItems": True}
    found = json.loads(chat(server, response_format=schema_format(schema, strict=False)))
    assert set(found) <= {1, 2}


def test_another_engine_continues_an_answer_when_the_first_one_dies(server: Server, monkeypatch: pytest.MonkeyPatch):
    asked = {"temperature": 1.0, "seed": 5, "response_format": schema_format(SCHEMA)}
    expected = chat(server, **asked)
    known: list[int] = []
    original = LocalBackend.generate

    async def generate(self: LocalBackend, request: Request) -> TokenStream:
        known.append(len(request.resumed_tokens))
        cut = replace(request, sampling=replace(request.sampling, max_tokens=len(request.resumed_tokens) + 4))
        async for event in original(self, cut if len(known) < 4 else request):
            if len(known) < 4 and event.finish_reason is not None:
                yield event._replace(finish_reason=None)
                raise BackendDiedError("the test killed the engine")
            yield event

    monkeypatch.setattr(LocalBackend, "generate", generate)
    assert chat(server, **asked) == expected
    assert known == [0, 4, 8, 12]
