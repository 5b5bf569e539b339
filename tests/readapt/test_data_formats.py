"""Rows as people have them: JSON Lines of any origin, chats, and rows that do not fit."""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cluster.config.fleet_file import load_fleet
from cluster.config.settings import Fleet
from cluster.errors import InvalidDataError
from cluster.fleet import open_blobs
from cluster.registry.registry import Registry, Status
from cluster.storage.jsonl import read_lines
from readapt.campaign.assess import Assessor
from readapt.campaign.campaign import Campaign
from readapt.extraction.verify import read_rows
from readapt.ladder.relabel import PROMPTS, check_rows, load_prompts
from readapt.training.chats import Chat
from readapt.training.data import Encoder, Row, encoder_for, load_rows
from readapt.training.selection import usable_rows
from relora import main
from tests.worlds.executors import LocalExecutor
from tests.worlds.fleets import make_fleet
from tests.worlds.serving import EOS, make_checkpoint

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPACED = (  # a space before each answer, as Mistral's
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }}</s>"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
USER, ANSWER = {"role": "user", "content": "1?"}, {"role": "assistant", "content": "me"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("formats") / "v1")


def encoder_with(base: Path, template: str | None, max_tokens: int = 200) -> Encoder:
    encoder = encoder_for(base, max_tokens)
    encoder.tokenizer = deepcopy(encoder.tokenizer)  # encoders of a base share theirs
    encoder.tokenizer.chat_template = template
    return encoder


def lines_of(rows: list[Any], **options: Any) -> str:
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


# Bytes of a file whose rows are always the same.
WRITTEN: dict[str, Callable[[list[str]], bytes]] = {
    "plain": lambda lines: "\n".join(lines).encode(),
    "byte order mark": lambda lines: b"\xef\xbb\xbf" + "\n".join(lines).encode(),
    "CR LF": lambda lines: "\r\n".join([*lines, ""]).encode(),
    "blank lines": lambda lines: "\n\n  \n\t\r\n".join(["", *lines, "", ""]).encode(),
    "no newline at the end": lambda lines: "\n".join(lines).encode(),
    "spaces around": lambda lines: "\n".join(f"  {line}\t " for line in lines).encode(),
}


@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN)
def test_every_reader_reads_json_lines_as_they_come(tmp_path: Path, write: Callable[[list[str]], bytes]):
    prompts = ["a\u2028b", "c\u2029d", "e\x85f\x0bg", "h\x1ci", "\ufeffj"]
    rows = [json.dumps({"prompt": p, "completion": "x\u2028"}, ensure_ascii=False) for p in prompts]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(write(rows))
    assert [row.prompt for row in load_rows(file)] == prompts
    assert {row.completion for row in load_rows(file)} == {"x\u2028"}
    assert load_prompts(file) == prompts
    assert [row["prompt"] for row in read_rows(file)] == prompts


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('{"prompt": "a", "completion": "b"},\n{"prompt": "c"}', r":1: is not valid JSON.*without commas between"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "c",}', r":2: is not valid JSON"),
        ('[\n{"prompt": "a"}\n]', r":1: is not valid JSON.*one object per line"),
        ('\n\n[{"prompt": "a"}]', r":3: must be a JSON object, not list. Write one object per line"),
        ('{"prompt": "a"}\n{"prompt": "b"} {"prompt": "c"}', r":2: is not valid JSON"),
    ],
)
def test_what_is_not_json_lines_is_refused_with_the_line(tmp_path: Path, text: str, cause: str):
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(InvalidDataError, match=cause):
        read_lines(file)


def test_rows_may_be_chats(tmp_path: Path):
    system = {"role": "system", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]}
    rows = [
        {"messages": [system, USER, ANSWER]},
        {"prompt": [USER], "completion": [ANSWER]},
        {"messages": [USER, ANSWER, USER, ANSWER], "tools": [{"type": "function"}], "model": "x"},
        {"prompt": "1?", "completion": ""},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text(lines_of(rows))
    first, second, third, last = load_rows(file)
    assert {row.completion for row in (first, second, third)} == {"me"}
    assert second.prompt == Chat.of([USER], {})
    assert isinstance(first.prompt, Chat)
    assert json.loads(first.prompt.request)["messages"] == [{"role": "system", "content": "be brief"}, USER]
    assert isinstance(third.prompt, Chat)
    assert json.loads(third.prompt.request) == {"messages": [USER, ANSWER, USER], "tools": [{"type": "function"}]}
    assert last == Row("1?", ""), "a model may have to answer nothing"


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"messages": [USER]}, "the last of the messages must be the assistant's"),
        ({"messages": [ANSWER]}, "no message before the answer"),
        ({"messages": []}, "'messages' must be a list of messages"),
        ({"messages": "hello"}, "'messages' must be a list of messages"),
        ({"messages": [{"content": "x"}, ANSWER]}, "object with `role` and `content`"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "images and other parts"),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "tool calls as answers"),
        ({"prompt": [USER], "completion": "me"}, "'completion' must be a list of messages"),
        ({"prompt": [USER], "completion": [ANSWER, ANSWER]}, "one message, not 2"),
        ({"instruction": "1?", "output": "me"}, "'prompt' is missing; the row has: instruction, output"),
    ],
    ids=str,
)
def test_rows_that_are_no_rows_are_refused_by_name(tmp_path: Path, row: dict[str, Any], cause: str):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n" + lines_of([row]))
    with pytest.raises(InvalidDataError, match=cause) as error:
        load_rows(file)
    assert f"{file}:2: " in str(error.value)


def test_logged_chat_requests_are_prompts(tmp_path: Path):
    logged = [{"model": "bot", "messages": [USER], "temperature": 0.5}, {"messages": [USER, ANSWER]}, {"prompt": "a"}]
    logged += [{"prompt": "b"}, {"messages": [{**USER, "content": "2?"}], "chat_template_kwargs": {"thinks": False}}]
    file = tmp_path / PROMPTS
    file.write_text(lines_of(logged))
    settings = {"chat_template_kwargs": {"thinks": False}}
    expected = [Chat.of([USER], {}), "a", "b", Chat.of([{**USER, "content": "2?"}], settings)]
    assert load_prompts(file) == expected, "the logged answer does not count, and equal chats are one"


@pytest.mark.parametrize(("template", "end"), [(CHATML, "</s>\n"), (SPACED, "</s>")], ids=["ChatML", "with a space"])
def test_a_chat_has_the_tokens_of_its_template(base: Path, template: str, end: str):
    encoder = encoder_with(base, template)
    encoded = encoder.encode(Row(Chat.of([USER], {}), "me"))
    start = encoder.tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    whole = encoder.tokenizer.apply_chat_template([USER, ANSWER], tokenize=False)
    prompt = encoder.tokenizer(start, add_special_tokens=False)["input_ids"]
    assert list(encoded.input_ids[: encoded.num_prompt_tokens]) == prompt
    assert encoded.input_ids[-1] == EOS
    assert encoder.tokenizer.decode(encoded.input_ids) == whole.removesuffix(end) + "</s>"


def test_an_answer_that_the_template_writes_otherwise_is_taken_as_it_is(base: Path):
    """For instance if the template writes no end token, or changes the prompt once there is an answer."""
    encoder = encoder_with(base, "{% for m in messages %}{{ m.content }}|{% endfor %}")
    assert encoder.encode(Row(Chat.of([USER], {}), "me")) == encoder.encode(Row("1?|", "me"))


def test_settings_of_the_request_reach_the_template(base: Path):
    encoder = encoder_with(base, "{{ messages[0].content }}{{ tools | length if tools else 0 }}{{ style or '' }}")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    chat = Chat.of([USER], {"tools": tools, "chat_template_kwargs": {"style": "short"}})
    assert encoder.decode(encoder.encode_prompt(chat)) == "1?1short"
    assert encoder.decode(encoder.encode_prompt(Chat.of([USER], {}))) == "1?0"


def test_rows_that_do_not_fit_are_left_out_counted_and_logged(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "é" * 40}]
    rows += [{"prompt": "a", "completion": "x" * 49}, {"prompt": "y" * 900, "completion": "x"}]
    rows += [{"messages": [{"role": "tool", "content": "x"}, ANSWER]}, {"prompt": "a\ud800", "completion": "b"}]
    rows += [{"messages": [{"role": "user", "content": "\udfff"}, ANSWER]}]
    file = tmp_path / "train.jsonl"
    file.write_text(lines_of(rows))
    picky = "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{{ messages[0].content }}"
    left_out: Counter[str] = Counter()
    with caplog.at_level(logging.WARNING):
        kept = usable_rows(file, [encoder_with(base, picky, 1000), encoder_with(base, picky, 50)], left_out)
    assert [len(row.completion) for row in kept] == [1, 1]
    assert left_out == {
        "train.jsonl: a completion leaves no room for its prompt within readapt.train.max_tokens = 50": 2,
        "train.jsonl: the chat template rejects the messages: no tools": 1,
        "train.jsonl: the text is not valid Unicode: surrogates not allowed": 2,
    }
    assert "5 of 7 rows are left out" in caplog.text
    assert "2 x train.jsonl: a completion leaves no room" in caplog.text
    assert all(encoder_with(base, picky, 50).encode(row) for row in kept)


def test_no_row_left_is_an_error_with_the_reasons(base: Path, tmp_path: Path):
    file = tmp_path / "train.jsonl"
    file.write_text(lines_of([{"messages": [USER, ANSWER]}, {"prompt": "a", "completion": "x" * 99}]))
    with pytest.raises(InvalidDataError, match=r"none of its 2 rows can be used.*no chat template.*no room"):
        usable_rows(file, [encoder_with(base, None, 50)])


def test_the_quick_check_agrees_with_the_encoder(base: Path):
    encoder = encoder_with(base, None, 12)
    for text in ("", "a", "x" * 10, "x" * 11, "é" * 5, "é" * 6, "</s>" * 10, "</s>" * 11):
        row = Row("p", text)
        if encoder.fault(row) is None:
            assert len(encoder.encode(row).input_ids) <= 12
        else:
            with pytest.raises(InvalidDataError, match="no room"):
                encoder.encode(row)


# Whole upgrades


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fleet(tmp_path_factory.mktemp("world"), ("usual",)).folder


def upgrade(fleet: Fleet, registry: Registry) -> tuple[Any, list[str]]:
    lines: list[str] = []
    executor = LocalExecutor(fleet, lambda objective: pytest.fail("there is no search in this ladder"))
    [version] = Campaign(fleet, registry, open_blobs(fleet), "v2", executor, say=lines.append).run()
    return version, lines


def test_one_odd_row_does_not_end_an_upgrade(fleet: Fleet, registry: Registry):
    data = fleet.adapters[0].data
    for split in ("train", "valid"):
        with (data / f"{split}.jsonl").open("a") as file:
            file.write("\n" + lines_of([{"prompt": "explain a:", "completion": "word " * 70}]))
    version, lines = upgrade(fleet, registry)
    reason = "a completion leaves no room for its prompt within readapt.train.max_tokens = 32"
    assert version.status is Status.CANDIDATE
    assert version.details["left_out_rows"] == {f"train.jsonl: {reason}": 1, f"valid.jsonl: {reason}": 1}
    [event] = registry.events(kind="rows_left_out", version_id=version.id)
    assert event.details["left_out"] == version.details["left_out_rows"]
    assert any("rows left out: 1 x train.jsonl" in line for line in lines)
    [assessed] = Assessor(fleet, registry, open_blobs(fleet), "v2", print).assess_all()
    assert assessed.error is None


def as_chats(data: Path) -> None:
    """Write the rows as messages that the template below turns into the same tokens."""
    for split in ("train", "valid", "test"):
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        chats = [
            {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
            for r in rows
        ]
        (data / f"{split}.jsonl").write_text(lines_of(chats))


@pytest.mark.parametrize("are_lost", [False, True], ids=["rows", "prompts"])
def test_an_upgrade_works_on_chats(fleet: Fleet, registry: Registry, are_lost: bool):
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    for base in ("v1", "v2"):
        (fleet.base(base).path / "chat_template.jinja").write_text(template)
    data = fleet.adapters[0].data
    prompt = json.loads((data / "valid.jsonl").read_text().splitlines()[0])["prompt"]
    as_chats(data)
    if are_lost:
        requests = [*read_lines(data / "train.jsonl"), *read_lines(data / "valid.jsonl")]
        (data / PROMPTS).write_text(lines_of([fields for _, fields in requests]))
        for split in ("train", "valid"):
            (data / f"{split}.jsonl").unlink()
    check_rows(data)
    version, _ = upgrade(fleet, registry)
    assert version.status is Status.CANDIDATE
    golden = [one["prompt"] for one in version.details["golden"]]
    tokenizer = AutoTokenizer.from_pretrained(fleet.base("v2").path)
    assert are_lost or golden[0] == tokenizer(prompt)["input_ids"]
    assert all(isinstance(token, int) for tokens in golden for token in tokens)


@pytest.mark.parametrize("rows", ["messages", "prompts"])
def test_register_accepts_chats(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rows: str
):
    fleet = load_fleet(shutil.copytree(world, tmp_path / "fleet") / "fleet.toml")
    data = fleet.adapters[0].data
    as_chats(data)
    if rows == "prompts":
        (data / PROMPTS).write_text(lines_of([{"messages": [{**USER, "content": f"{i}?"}]} for i in range(8)]))
        (data / "train.jsonl").unlink()
    monkeypatch.setattr("sys.argv", ["relora", "register", str(fleet.folder / "fleet.toml")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, capsys.readouterr()
