"""Requests with penalties, biases and bans keep their answers in batches, after preemption and after a resumption."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from cluster.adapter_files import load_adapter
from cluster.config import ServingConfig
from cluster.errors import InvalidRequestError
from serving.engine.engine import Engine
from serving.engine.request import AdapterRef, Request, SamplingParams, TokenEvent
from tests.worlds.serving import EOS, make_adapter, make_checkpoint

PROMPT = tuple(b"once upon a time, a card was lost")
REF = AdapterRef("hash", "tone", 1, "blob")
NUM_NEW = 24


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampling")
    make_checkpoint(folder / "base")
    make_adapter(folder / "tone", folder / "base", rank=4)
    return folder


def open_engine(files: Path, memory_kib: int = 4096, **settings: object) -> Engine:
    engine = Engine.open(files / "base", ServingConfig(memory_bytes=memory_kib * 1024, **settings))
    engine.add_adapter(REF, load_adapter(files / "tone"))
    return engine


@pytest.fixture(scope="module")
def engine(files: Path) -> Engine:
    return open_engine(files)


def request_of(name: str, *, adapter: bool = False, **sampling: object) -> Request:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": NUM_NEW, "ignore_eos": True, "seed": 3, **sampling})
    return Request(name, PROMPT, params, REF if adapter else None)


def run(engine: Engine, requests: Sequence[Request]) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
        engine.check_integrity()
    return events


def tokens_of(events: Sequence[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.tokens]


def alone(engine: Engine, request: Request) -> list[int]:
    return tokens_of(run(engine, [request])[request.id])


KINDS: dict[str, dict] = {
    "plain": {},
    "repetition": {"repetition_penalty": 1.4},
    "frequency": {"frequency_penalty": 1.5, "presence_penalty": 0.5},
    "bias": {"logit_bias": ((97, 4.0), (98, -6.0))},
    "bad_words": {"bad_words": ((5,), (7, 9))},
    "drawn": {"temperature": 0.9, "repetition_penalty": 1.2, "min_p": 0.05},
    "drawn-plain": {"temperature": 0.9, "top_p": 0.9},
    "early": {"min_tokens": 6, "stop_token_ids": tuple(range(0, 256, 2))},
    "few": {"allowed_token_ids": (97, 98, 99, EOS), "presence_penalty": 1.0},
}
ALL = [request_of(f"{kind}/{adapter}", adapter=adapter, **KINDS[kind]) for kind in KINDS for adapter in (False, True)]


@pytest.fixture(scope="module")
def expected(engine: Engine) -> dict[str, list[int]]:
    """What each request answers alone."""
    return {request.id: alone(engine, request) for request in ALL}


def test_every_kind_changes_the_answer(expected: dict[str, list[int]]):
    for kind in ("repetition", "frequency", "bias", "early", "few"):
        assert expected[f"{kind}/True"] != expected["plain/True"], kind
    assert expected["drawn/True"] != expected["drawn-plain/True"]
    assert len(set(expected["repetition/False"])) > len(set(expected["plain/False"])) - 1


def test_greedy_answers_are_those_of_transformers(files: Path, expected: dict[str, list[int]]):
    """The processors see prompt and output, or only the output where vLLM's meaning is that."""
    model = AutoModelForCausalLM.from_pretrained(files / "base", dtype=torch.float32).eval()
    bias = SequenceBiasLogitsProcessor({(token,): value for token, value in KINDS["bias"]["logit_bias"]})
    words = NoBadWordsLogitsProcessor([list(word) for word in KINDS["bad_words"]["bad_words"]], eos_token_id=0)
    for kind, processor in (
        ("repetition", RepetitionPenaltyLogitsProcessor(1.4)),
        ("bias", bias),
        ("bad_words", words),
    ):
        written = model.generate(
            torch.tensor([PROMPT]),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([processor]),
        )
        assert written[0, len(PROMPT) :].tolist() == expected[f"{kind}/False"], kind


def test_answers_are_the_same_in_one_batch(engine: Engine, expected: dict[str, list[int]]):
    assert {id: tokens_of(events) for id, events in run(engine, ALL).items()} == expected


def test_answers_are_the_same_after_preemption(files: Path, expected: dict[str, list[int]]):
    """The memory holds only some of the sequences, and small steps cut the prompts into chunks."""
    engine = open_engine(files, memory_kib=140, max_batch_tokens=20, prefix_cache="off")
    assert {id: tokens_of(events) for id, events in run(engine, ALL).items()} == expected
    assert engine.stats()["preemptions"] > 0


@pytest.mark.parametrize("num_before", [1, 5])
def test_answers_are_the_same_after_a_resumption(engine: Engine, expected: dict[str, list[int]], num_before: int):
    """Another replica continues with the tokens so far. They count as output, and draws go on at their position."""
    for request in ALL:
        before = expected[request.id][:num_before]
        if len(before) < len(expected[request.id]):
            rest = alone(engine, replace(request, resumed_tokens=tuple(before)))
            assert [*before, *rest] == expected[request.id], request.id


def test_a_request_without_an_allowed_token_fails_alone(engine: Engine, expected: dict[str, list[int]]):
    """`min_tokens` forbids the only allowed token, which ends the answer."""
    stuck = request_of("stuck", allowed_token_ids=(5,), stop_token_ids=(5,), min_tokens=2)
    events = run(engine, [ALL[0], stuck])
    (event,) = events["stuck"]
    assert isinstance(event.error, InvalidRequestError)
    assert "no token may come next" in str(event.error)
    assert tokens_of(events[ALL[0].id]) == expected[ALL[0].id]
