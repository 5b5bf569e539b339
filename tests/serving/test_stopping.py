"""Where an answer ends, and which of its last tokens show: end tokens, stop strings, special tokens."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cluster.config.settings import ServingConfig
from cluster.errors import InvalidRequestError
from serving.engine.detokenizer import Detokenizer, Vocabulary
from serving.engine.engine import Engine
from serving.engine.request import FinishReason, Request, SamplingParams, TokenEvent
from tests.serving.test_detokenizer import (
    STOPS,
    TOKENIZERS,
    cut,
    each_tokenizer,
    spell,
    token_lists,
    tokens_to_stop,
    whole,
)
from tests.worlds.serving import EOS, make_checkpoint

PROMPT = tuple(b"Where is my card?")
CONFIG = ServingConfig(memory_bytes=4 * 2**20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("stopping") / "base")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.open(folder, CONFIG)


def ask(engine: Engine, resumed: tuple[int, ...] = (), **sampling: object) -> tuple[list[int], str, FinishReason]:
    """Return the tokens, the text and the finish reason of a greedy answer."""
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **sampling})
    engine.submit(Request("one", PROMPT, params, resumed_tokens=resumed))
    events: list[TokenEvent] = []
    while engine.has_work:
        events += engine.step()
    engine.check_integrity()
    last = events[-1].finish_reason
    assert last is not None
    return [token for event in events for token in event.tokens], "".join(event.text for event in events), last


def first_of(tokens: list[int], at_least: int) -> int:
    """Return the first index from `at_least` on whose token does not occur before it."""
    return next(i for i in range(at_least, len(tokens)) if tokens[i] not in tokens[:i])


def test_a_stop_token_ends_the_answer_and_is_not_shown(engine: Engine):
    tokens, text, reason = ask(engine)
    assert reason is FinishReason.LENGTH
    index = first_of(tokens, 2)
    cut_tokens, cut_text, cut_reason = ask(engine, stop_token_ids=(tokens[index], 3))
    assert cut_tokens == tokens[: index + 1]
    assert cut_reason is FinishReason.STOP
    assert text.startswith(cut_text)
    assert cut_text == ask(engine, max_tokens=index)[1]


def test_a_stop_token_is_shown_when_asked(engine: Engine):
    tokens, *_ = ask(engine)
    index = first_of(tokens, 2)
    _, shown, reason = ask(engine, stop_token_ids=(tokens[index],), include_stop_str_in_output=True)
    assert reason is FinishReason.STOP
    assert shown == ask(engine, max_tokens=index + 1)[1]


def test_a_resumed_answer_stops_at_its_stop_token(engine: Engine):
    tokens, *_ = ask(engine)
    index = first_of(tokens, 3)
    before, stop_token_ids = tuple(tokens[:2]), (tokens[index],)
    rest, shown, reason = ask(engine, before, stop_token_ids=stop_token_ids)
    assert rest == tokens[2 : index + 1]
    assert reason is FinishReason.STOP
    assert ask(engine, max_tokens=2)[1] + shown == ask(engine, max_tokens=index)[1]
    assert ask(engine, tuple(tokens[: index + 1]), stop_token_ids=stop_token_ids) == ([], "", FinishReason.STOP)


def with_end_token(folder: Path, copy: Path, token: int) -> Engine:
    """Return an engine of the same base whose generation config names another end token."""
    shutil.copytree(folder, copy)
    settings = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": token}))
    return Engine.open(copy, CONFIG)


def test_the_models_end_token_and_stop_tokens_are_both_kept(folder: Path, engine: Engine, tmp_path: Path):
    """A stop token does not replace the model's own, and `ignore_eos` ignores only the model's."""
    own, *_ = ask(engine)
    engine = with_end_token(folder, tmp_path / "copy", own[4])
    other = own[first_of(own, 1)]
    for sampling, end in [
        ({"ignore_eos": False, "stop_token_ids": (EOS,)}, own.index(own[4])),
        ({"ignore_eos": False, "stop_token_ids": (other,)}, min(own.index(own[4]), own.index(other))),
        ({"ignore_eos": True, "stop_token_ids": (other,)}, own.index(other)),
    ]:
        tokens, _, reason = ask(engine, **sampling)
        assert (tokens, reason) == (own[: end + 1], FinishReason.STOP)


@pytest.mark.parametrize("token", [-1, 10_000])
def test_a_stop_token_outside_the_vocabulary_is_refused(engine: Engine, token: int):
    with pytest.raises(InvalidRequestError, match=f"stop_token_ids has {token}"):
        ask(engine, stop_token_ids=(5, token))


def test_special_tokens_show_when_asked(folder: Path, engine: Engine):
    """Resumed tokens are read like generated ones, so they can hold a special token that no tiny model would choose."""
    written = tuple(AutoTokenizer.from_pretrained(folder)("hi</s>!", add_special_tokens=False)["input_ids"])
    assert written[2] == EOS
    ends = {"stop": ("hi</s>!",), "max_tokens": 6}
    assert ask(engine, written, skip_special_tokens=False, **ends) == ([], "", FinishReason.STOP)
    assert ask(engine, written, **ends)[2] is FinishReason.LENGTH
    _, text, reason = ask(engine, written[:3], ignore_eos=False, skip_special_tokens=False)
    assert (text, reason) == ("", FinishReason.STOP), "the end token itself is not shown"


def test_stop_strings_and_end_tokens_wait_for_min_tokens(engine: Engine):
    """vLLM's rule: an end may be the first token after `min_tokens`, and a stop string must end there or later."""
    tokens, text, _ = ask(engine)
    end = first_of(tokens, 2)
    assert len(ask(engine, stop_token_ids=(tokens[end],))[0]) == end + 1
    assert len(ask(engine, stop_token_ids=(tokens[end],), min_tokens=end)[0]) == end + 1
    kept, *_ = ask(engine, stop_token_ids=(tokens[end],), min_tokens=end + 1)
    assert kept[:end] == tokens[:end]
    assert kept[end] != tokens[end], "the end token is not allowed yet"
    assert ask(engine, stop=(text[0],), min_tokens=12)[1] == text


def test_min_tokens_counts_the_tokens_before_a_resumption(engine: Engine):
    tokens, *_ = ask(engine)
    ends = tuple(set(tokens))  # every token of the answer is an end
    whole, *_ = ask(engine, stop_token_ids=ends, min_tokens=5)
    assert len(whole) >= 6 or whole[-1] in ends
    assert not set(whole[:5]) & set(ends)
    rest, *_ = ask(engine, tuple(whole[:3]), stop_token_ids=ends, min_tokens=5)
    assert [*whole[:3], *rest] == whole


# Text.


@pytest.mark.parametrize(
    ("text", "stop", "min_tokens", "shown"),
    [
        ("abcab", ("ab",), 0, ""),
        ("abcab", ("ab",), 1, ""),
        ("abcab", ("ab",), 2, "abc"),
        ("abcab", ("bc",), 2, "a"),
        ("abcab", ("bc",), 3, "abcab"),
        ("xabyz", ("ab", "xabyz"), 3, ""),
        ("xabyz", ("ab", "xabyq"), 3, "xabyz"),
        ("aaaa", ("aa",), 2, "a"),
    ],
)
def test_stop_strings_count_after_min_tokens(text: str, stop: tuple[str, ...], min_tokens: int, shown: str):
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = Detokenizer(Vocabulary(tokenizer), stop, min_tokens=min_tokens)
    pieces = [detokenizer.push(token) for token in spell(tokenizer, text)]
    assert "".join(pieces) + detokenizer.finish() == shown


@each_tokenizer
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_with_special_tokens_the_pieces_add_up_to_the_decoded_text(name: str, data: st.DataObject):
    tokenizer, tokens = TOKENIZERS[name], data.draw(token_lists(name))
    detokenizer = Detokenizer(Vocabulary(tokenizer).with_special)
    shown = "".join(detokenizer.push(token) for token in tokens) + detokenizer.finish()
    assert shown == tokenizer.decode(tokens, skip_special_tokens=False)


@each_tokenizer
@settings(max_examples=100, deadline=None)
@given(data=st.data(), stop=st.lists(st.sampled_from(STOPS), min_size=1, max_size=3))
def test_an_included_stop_string_is_the_last_text(name: str, data: st.DataObject, stop: list[str]):
    tokenizer, tokens = TOKENIZERS[name], data.draw(token_lists(name))
    text = whole(tokenizer, tokens_to_stop(tokenizer, tokens, stop))
    detokenizer = Detokenizer(Vocabulary(tokenizer), stop, includes_stop=True)
    shown = "".join(detokenizer.push(token) for token in tokens) + detokenizer.finish()
    before = cut(text, stop)
    assert shown in ({before + one for one in stop} if detokenizer.stopped_by is not None else {text})
    assert text.startswith(shown)
