"""Requests with penalties, biases and bans keep their answers in batches, after preemption and after a resumption."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from cluster.adapters.files import load_adapter
from cluster.config.settings import ServingConfig
from cluster.errors import InvalidRequestError
from serving.engine.engine import Engine
from serving.engine.request import AdapterRef, FinishReason, Request, SamplingParams, TokenLogprob
from tests.worlds.serving import EOS, make_adapter, make_checkpoint, run_engine, tokens_of
from tests.worlds.serving import KINDS as MODULES

PROMPT = tuple(b"once upon a time, a card was lost")
REF = AdapterRef("hash", "tone", 1, "blob")
NUM_NEW = 24


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampling")
    make_checkpoint(folder / "base")
    make_adapter(folder / "tone", folder / "base", rank=4, modules=(*MODULES, "lm_head"))
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


def alone(engine: Engine, request: Request) -> list[int]:
    return tokens_of(run_engine(engine, [request])[request.id])


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
    assert {id: tokens_of(events) for id, events in run_engine(engine, ALL).items()} == expected


def test_answers_are_the_same_after_preemption(files: Path, expected: dict[str, list[int]]):
    """The memory holds only some of the sequences, and small steps cut the prompts into chunks."""
    engine = open_engine(files, memory_kib=140, max_batch_tokens=20, prefix_cache="off")
    assert {id: tokens_of(events) for id, events in run_engine(engine, ALL).items()} == expected
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
    events = run_engine(engine, [ALL[0], stuck])
    (event,) = events["stuck"]
    assert isinstance(event.error, InvalidRequestError)
    assert "no token may come next" in str(event.error)
    assert tokens_of(events[ALL[0].id]) == expected[ALL[0].id]


# Log-probabilities of the prompt.


def long_request(name: str, num_prompt: int = 90, **more: object) -> Request:
    prompt = tuple((7 * i + i * i) % 256 for i in range(num_prompt))
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, num_prompt_logprobs=2)
    return replace(Request(name, prompt, params, REF), sampling=replace(params, **more))


@pytest.fixture(scope="module")
def reference(files: Path) -> torch.Tensor:
    """The log-probabilities that PEFT's model gives to each position of the long prompt: [90, V]."""
    base = AutoModelForCausalLM.from_pretrained(files / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(files / "tone")).eval()
    with torch.no_grad():
        logits = model(torch.tensor([long_request("").prompt_tokens])).logits[0]
    return logits.log_softmax(-1)


def assert_scores(scores: Sequence[TokenLogprob], request: Request, reference: torch.Tensor) -> None:
    assert [one.token for one in scores] == list(request.prompt_tokens[1:])
    for position, one in enumerate(scores):
        expected_V = reference[position]
        assert one.logprob == pytest.approx(float(expected_V[one.token]), abs=1e-4)
        values, ids = expected_V.topk(2)
        assert [token for token, _ in one.top] == ids.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert one.rank == int((expected_V > expected_V[one.token]).sum()) + 1


@pytest.mark.parametrize("settings", [{}, {"max_batch_tokens": 17}, {"prefix_cache": "off"}])
def test_prompt_logprobs_are_those_of_peft(files: Path, reference: torch.Tensor, settings: dict):
    """In one step or in chunks, and after another request has left the prompt in the prefix cache."""
    engine, plain = open_engine(files, **settings), long_request("plain", num_prompt_logprobs=None)
    tokens = alone(engine, plain)
    others = [request_of(f"{n}", adapter=n % 2 == 0) for n in range(3)]
    request = long_request("scored")
    events = run_engine(engine, [others[0], request, *others[1:]])["scored"]
    assert_scores(events[0].prompt_logprobs, request, reference)
    assert all(not event.prompt_logprobs for event in events[1:])
    assert tokens_of(events) == tokens
    assert alone(engine, replace(plain, id="after")) == tokens, "the cache is still sound"


def test_many_scored_prompts_share_a_step(files: Path, reference: torch.Tensor):
    """Together they have more tokens than may get log-probabilities in one step."""
    engine = open_engine(files)
    requests = [long_request(f"{n}") for n in range(6)]
    for request, events in zip(requests, run_engine(engine, requests).values(), strict=True):
        assert_scores(events[0].prompt_logprobs, request, reference)


def test_prompt_logprobs_survive_preemption(files: Path, reference: torch.Tensor):
    engine = open_engine(files, memory_kib=140, max_batch_tokens=24, prefix_cache="off")
    requests = [long_request(f"{n}", max_tokens=40) for n in range(5)]
    for request, events in zip(requests, run_engine(engine, requests).values(), strict=True):
        assert_scores(events[0].prompt_logprobs, request, reference)
    assert engine.stats()["preemptions"] > 0


def test_a_resumed_request_does_not_score_its_prompt_again(engine: Engine):
    request = long_request("resumed")
    tokens = alone(engine, request)
    events = run_engine(engine, [replace(request, resumed_tokens=tuple(tokens[:1]))])["resumed"]
    assert tokens_of(events) == tokens[1:]
    assert not any(event.prompt_logprobs for event in events)


@pytest.mark.parametrize("num_prompt", [1, 90])
def test_without_tokens_to_generate_only_the_prompt_is_scored(engine: Engine, reference: torch.Tensor, num_prompt: int):
    request = long_request("none", num_prompt, max_tokens=0)
    (event,) = run_engine(engine, [request])["none"]
    assert (event.tokens, event.text, event.finish_reason) == ((), "", FinishReason.LENGTH)
    assert_scores(event.prompt_logprobs, request, reference)


def test_an_answer_says_what_stopped_it(engine: Engine):
    plain = request_of("plain")
    tokens, text = alone(engine, plain), "".join(event.text for event in run_engine(engine, [plain])["plain"])
    (*_, by_token) = run_engine(engine, [request_of("token", stop_token_ids=(tokens[3], 4))])["token"]
    (*_, by_text) = run_engine(engine, [request_of("text", stop=(text[2:4],))])["text"]
    (*_, by_length) = run_engine(engine, [request_of("length")])["length"]
    assert (by_token.stop_reason, by_token.has_end_token) == (tokens[3], True)
    assert (by_text.stop_reason, by_text.has_end_token) == (text[2:4], False)
    assert (by_length.stop_reason, by_length.has_end_token) == (None, False)
