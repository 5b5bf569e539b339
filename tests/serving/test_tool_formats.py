"""Tests how answers are read: tool calls in five formats, reasoning, and the same result for any pieces of the text."""

import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.utils.chat_parsing import parse_response

from serving.chat.answer import AnswerFormat, AnswerReader
from serving.chat.declared import DeclaredFormat
from serving.chat.formats.table import FORMATS, find_format
from serving.chat.thinking import THINKING, find_thinking

SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "flag": {"type": ["boolean", "null"]},
        "items": {"type": "array"},
        "place": {"$ref": "#/$defs/Place"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "$defs": {"Place": {"type": "object"}},
}
TOOLS = {"find": SCHEMA, "now": {}}


def read(text: str, tool_format: str | None, cuts: list[int] = (), **settings):
    """Read a text in pieces; return content, reasoning and the calls as (name, arguments) pairs."""
    reader = AnswerReader(AnswerFormat(FORMATS.get(tool_format), tools=TOOLS, **settings))
    borders = [0, *sorted(cuts), len(text)]
    deltas = [reader.push(text[start:end]) for start, end in pairwise(borders)]
    deltas.append(reader.push("", is_last=True))
    calls: list[list[str]] = []
    for piece in (piece for delta in deltas for piece in delta.calls):
        if piece.index == len(calls):
            assert piece.id
            assert piece.name
            calls.append([piece.name, ""])
        calls[piece.index][1] += piece.arguments
    assert reader.num_calls == len(calls)
    content = "".join(delta.content for delta in deltas)
    reasoning = "".join(delta.reasoning for delta in deltas)
    return content, reasoning, [(name, arguments) for name, arguments in calls]


CALLS = [
    # One call, several calls, and text before and after them.
    ("hermes", '<tool_call>\n{"name": "find", "arguments": {"a": 1}}\n</tool_call>', "", [("find", '{"a": 1}')]),
    (
        "hermes",
        'I look.\n<tool_call>{"name": "find", "arguments": {"a": "}\\"<"}}</tool_call>\n'
        '<tool_call>{"arguments": {"b": [1, {"c": 2}]}, "name": "other"}</tool_call>\nDone.',
        "I look.Done.",
        [("find", '{"a": "}\\"<"}'), ("other", '{"b": [1, {"c": 2}]}')],
    ),
    ("hermes", '<tool_call>{"name": "a"}\n{"name": "b"}</tool_call>', "", [("a", "{}"), ("b", "{}")]),
    ("hermes", '<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("a", '{"x": 1}')]),
    ("hermes", '<tool_call>{"name": "a", "arguments": null}</tool_call>', "", [("a", "{}")]),
    (
        "llama3_json",
        '{"name": "find", "parameters": {"a": 1}}; {"name": "now", "parameters": {}}',
        "",
        [("find", '{"a": 1}'), ("now", "{}")],
    ),
    ("llama3_json", '<|python_tag|>{"name": "now", "parameters": {}}', "", [("now", "{}")]),
    ("llama3_json", '{"type": "function", "name": "now", "parameters": {}}', "", [("now", "{}")]),
    (
        "mistral",
        'Well[TOOL_CALLS] [{"name": "find", "arguments": {"a": 1}, "id": "abcdefghi"}, {"name": "now"}]',
        "Well",
        [("find", '{"a": 1}'), ("now", "{}")],
    ),
    (
        "mistral",
        '[TOOL_CALLS]find[ARGS]{"a": 1}[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}',
        "",
        [("find", '{"a": 1}'), ("now", "{}")],
    ),
    ("mistral", '[TOOL_CALLS]find{"a": {"b": 1}}', "", [("find", '{"a": {"b": 1}}')]),
    (
        "qwen3_coder",
        'I look.\n\n<tool_call>\n<function=find>\n<parameter=text>\n"a"\n  b </para\n\n</parameter>\n'
        "<parameter=count>\n5\n</parameter>\n</function>\n</tool_call>",
        "I look.",
        [("find", '{"text": "\\"a\\"\\n  b </para\\n", "count": 5}')],
    ),
    ("qwen3_coder", "<function=now>\n</function>", "", [("now", "{}")]),
    (
        "qwen3_coder",
        "<tool_call><function=find><parameter=flag>True</parameter><parameter=items>[1]</parameter>"
        '<parameter=place>{"x": 1}</parameter><parameter=maybe>None</parameter><parameter=else>7</parameter>'
        "</function></tool_call>",
        "",
        [("find", '{"flag": true, "items": [1], "place": {"x": 1}, "maybe": null, "else": "7"}')],
    ),
    (
        "qwen3_coder",
        "<tool_call><function=find><parameter=count>many</parameter></function></tool_call>",
        "",
        [("find", '{"count": "many"}')],
    ),
    (
        "pythonic",
        "[find(text=\"x)\", items=[1, {'k': true}]), now(a='it\\'s', b=None)]",
        "",
        [("find", '{"text": "x)", "items": [1, {"k": true}]}'), ("now", '{"a": "it\'s", "b": null}')],
    ),
    ("pythonic", "<|python_start|>[now()]<|python_end|>", "", [("now", "{}")]),
    ("pythonic", "ok <|tool_call_start|>[now()]<|tool_call_end|>", "ok", [("now", "{}")]),
    # An answer that is cut off.
    ("hermes", '<tool_call>{"name": "find", "arguments": {"a": "b', "", [("find", '{"a": "b')]),
    ("mistral", '[TOOL_CALLS]find[ARGS]{"a"', "", [("find", '{"a"')]),
    ("qwen3_coder", "<tool_call><function=find><parameter=text>\nab", "", [("find", '{"text": "ab')]),
]

NO_CALLS = [
    (None, '<tool_call>{"name": "find"}</tool_call>'),
    ("hermes", "a <tool_c and b < c \n"),
    ("hermes", "<tool_call>nothing</tool_call> to see"),
    ("hermes", '<tool_call> {"age" : 3 }</tool_call>'),
    ("hermes", '<tool_call>{"name": "fi'),
    ("llama3_json", ' {"name": "Bob",  "age": 3} is JSON'),
    ("llama3_json", '{"name": "find" , "colour": "red"}'),
    ("llama3_json", 'It is {"name": "find", "parameters": {}}'),
    ("llama3_json", "{not JSON}"),
    ("mistral", "[TOOL_CALLS] none at all"),
    ("mistral", "[TOOL_CALLS][1, 2]"),
    ("qwen3_coder", "<tool_call>find</tool_call>"),
    ("qwen3_coder", "<function=find"),
    ("pythonic", " [1, 2, 3]\n"),
    ("pythonic", "[find(1)] and more"),
    ("pythonic", "[find(**a)]"),
    ("pythonic", "[find(a={1, 2})]"),
    ("pythonic", "[unknown(a=1)]"),
    ("pythonic", "[find(a=("),
]


@pytest.mark.parametrize(("tool_format", "text", "content", "calls"), CALLS)
def test_calls_are_found(tool_format: str, text: str, content: str, calls: list[tuple[str, str]]):
    assert read(text, tool_format) == (content, "", calls)


@pytest.mark.parametrize(("tool_format", "text"), NO_CALLS)
def test_text_that_is_no_call_is_content_to_the_letter(tool_format: str | None, text: str):
    assert read(text, tool_format) == (text, "", [])


TEXTS = [(name, text) for name, text, *_ in [*CALLS, *NO_CALLS]]


@pytest.mark.parametrize(("tool_format", "text"), TEXTS)
def test_single_characters_give_what_the_whole_text_gives(tool_format: str | None, text: str):
    for prefix in ("", "<think>\nWell.\n</think>\n\n"):
        whole = read(prefix + text, tool_format, thinking=THINKING["think"])
        cuts = list(range(len(prefix + text)))
        assert read(prefix + text, tool_format, cuts, thinking=THINKING["think"]) == whole
        assert whole[1] == prefix[8:13]


WORDS = """
    <tool_call> </tool_call> [TOOL_CALLS] [ARGS] [CALL_ID] <|python_tag|> <|python_start|> <function=find> </function>
    <parameter=text> <parameter=count> </parameter> <think> </think> {"name":"find","arguments":{"a":"\\"}"}} "name"
    "find" find( a="b" [ ] { } ( ) , : ; " ' \\ 5 x é < null <eos>
"""
PIECES = st.sampled_from([*WORDS.split(), " ", "\n"])


@given(st.sampled_from([None, *FORMATS]), st.lists(PIECES, max_size=24), st.data(), st.booleans())
@example("hermes", ['<tool_call>{"name": "find", "arguments": {', "\\"], None, False)
def test_any_pieces_give_what_the_whole_text_gives(tool_format, parts, data, is_open):
    text = "".join(parts)
    settings = {"thinking": THINKING["think"], "is_thinking_open": is_open, "hidden": ("<eos>", "</end>")}
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=30)) if data else list(range(len(text)))
    assert read(text, tool_format, cuts, **settings) == read(text, tool_format, **settings)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_json_arguments_arrive_as_they_were_written(value):
    arguments = json.dumps({"value": value})
    text = '<tool_call>{"name": "find", "arguments": %s}</tool_call>'
    assert read(text % arguments, "hermes", list(range(500)))[2] == [("find", arguments)]
    assert read(text % json.dumps(arguments), "hermes", list(range(500)))[2] == [("find", arguments)]


@given(st.text(), st.lists(st.integers(0, 60)))
def test_strings_between_tags_become_json(value, cuts):
    text = f"<tool_call><function=find><parameter=text>\n{value}\n</parameter></function></tool_call>"
    if "</parameter>" not in value:
        [(_, arguments)] = read(text, "qwen3_coder", [min(cut, len(text)) for cut in cuts])[2]
        assert json.loads(arguments) == {"text": value}


def test_arguments_come_in_pieces_and_text_before_a_call_at_once():
    reader = AnswerReader(AnswerFormat(FORMATS["hermes"], tools=TOOLS))
    assert reader.push("I look up").content == "I look up"
    assert reader.push(" it. <tool_").content == " it."
    assert not reader.push('call>{"name": "find", "argu').calls
    (start,) = reader.push('ments": {"text": "a').calls
    assert (start.index, start.name, start.arguments) == (0, "find", '{"text": "a')
    (more,) = reader.push(' long text"').calls
    assert (more.index, more.id, more.name, more.arguments) == (0, None, None, ' long text"')


def test_calls_beyond_the_limit_are_left_out():
    text = '<tool_call>{"name": "find"}</tool_call><tool_call>{"name": "now"}</tool_call>'
    assert read(text, "hermes", max_calls=1)[2] == [("find", "{}")]


def test_mistrals_own_ids_are_kept_and_made_ids_have_nine_characters():
    reader = AnswerReader(AnswerFormat(FORMATS["mistral"]))
    first, second = reader.push("[TOOL_CALLS]a[CALL_ID]XYZ123abc[ARGS]{}[TOOL_CALLS]b[ARGS]{}").calls
    assert first.id == "XYZ123abc"
    assert second.id
    assert len(second.id) == 9
    assert second.id.isalnum()


@pytest.mark.parametrize(
    ("text", "is_open", "reasoning", "content"),
    [
        ("<think>\nWell, <b>.\n</think>\n\nHi", False, "Well, <b>.", "Hi"),
        ("Well.</think>Hi", True, "Well.", "Hi"),
        ("<think>\nWell.</think>Hi", True, "Well.", "Hi"),
        ("<think>never ends </thin", False, "never ends </thin", ""),
        ("<think></think>\n\nHi", False, "", "Hi"),
        ("Hi </think> there\n", False, "", "Hi </think> there\n"),
        ("  Hi", False, "", "  Hi"),
    ],
)
def test_reasoning_is_apart_from_content(text: str, is_open: bool, reasoning: str, content: str):
    settings = {"thinking": THINKING["think"], "is_thinking_open": is_open}
    assert read(text, None, **settings) == (content, reasoning, [])
    assert read(text, None, list(range(len(text))), **settings) == (content, reasoning, [])


def test_special_tokens_that_nobody_should_see_are_left_out():
    text = "a<|eot|>b <|e [TOOL_CALLS]now{}<|eot|>"
    assert read(text, "mistral", hidden=("<|eot|>", "<|im_end|>")) == ("ab <|e", "", [("now", "{}")])


DECLARED = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "content": {"content": "text"},
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open": "<call>",
            "close": "</call>",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": "{content}"},
        },
    },
}


@pytest.mark.parametrize("prompt", ["<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"])
@pytest.mark.parametrize(
    ("text", "content"),
    [
        (
            'Hi there. <call>\n{"name": "find", "arguments": {"a": "é"}}</call>\n<call>{"name": "now"}</call>',
            "Hi there.",
        ),
        ("Hi <c and\nmore ", "Hi <c and\nmore"),
        ('Hi.<call>{"name": "fi', 'Hi.{"name": "fi'),
        ("Hi.<call>{no}</call> <call>", "Hi.{no} <call>"),
    ],
)
def test_a_format_that_the_tokenizer_declares_is_read_as_transformers_reads_it(prompt: str, text: str, content: str):
    thought = "Well.</think>\n" if prompt.endswith("<think>\n") else "<think>Well.</think>"
    declared = DeclaredFormat(DECLARED, prompt)
    whole = read(thought + text, None, declared=declared)
    assert whole == read(thought + text, None, list(range(len(thought + text))), declared=declared)
    assert whole[:2] == (content, "Well.")
    if text.endswith("</call>"):
        message = parse_response(thought + text, DECLARED, prefix=prompt)
        found = [(name, json.loads(arguments)) for name, arguments in whole[2]]
        calls = [call["function"] for call in message["tool_calls"]]
        assert found == [(call["name"], call.get("arguments", {})) for call in calls]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("return a json object within <tool_call></tool_call> XML tags", "hermes"),
        ("<tool_call>\n<function=example_function>\n<parameter=example>", "qwen3_coder"),
        ("{{ '[TOOL_CALLS] [' }}", "mistral"),
        ("{{ '<|python_tag|>' }}", "llama3_json"),
        ("[func_name1(params_name1=params_value1)]", "pythonic"),
    ],
)
def test_the_format_is_found_in_the_template(template: str, name: str):
    assert find_format(template) is FORMATS[name]


def test_a_template_without_marks_has_neither_format_nor_thinking():
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    assert find_format(template) is None
    assert find_thinking(template) is None
    assert find_thinking("{{ m.content.split('</think>')[-1] }}") is THINKING["think"]
