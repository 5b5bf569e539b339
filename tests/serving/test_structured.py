"""Answers that must match a grammar: alone, in mixed batches, after preemption, when resumed, and in the loop."""

import asyncio
import json
import re
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.adapters.files import load_adapter
from cluster.config.settings import ServingConfig
from cluster.errors import InvalidRequestError
from serving.engine import grammar, matcher
from serving.engine.engine import Engine
from serving.engine.grammar import Grammar
from serving.engine.loop import EngineLoop
from serving.engine.masks import MaskBuilder
from serving.engine.matcher import GrammarCompiler
from serving.engine.request import AdapterRef, FinishReason, Request, SamplingParams, TokenEvent
from tests.worlds.dialects import CHATML, chat_tokenizer, chat_world
from tests.worlds.serving import EOS, make_adapter, make_checkpoint, run_engine, tokens_of

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "color": {"enum": ["red", "green", "blue"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "is_new": {"type": "boolean"},
    },
    "required": ["name", "color", "sizes", "is_new"],
    "additionalProperties": False,
}
JSON = grammar.json_schema(SCHEMA)
WORDS = grammar.regex("[a-z]{3,12}( [a-z]{3,12}){2,5}")
REF = AdapterRef("hash-of-tone", "tone", 1, "blob")
KIB = 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    make_adapter(folder / "tone", make_checkpoint(folder / "base"))
    return folder


def open_engine(folder: Path, memory_kib: int = 4096, **settings: object) -> Engine:
    engine = Engine.open(folder / "base", ServingConfig(memory_bytes=memory_kib * KIB, max_rank=16, **settings))
    engine.add_adapter(REF, load_adapter(folder / "tone"))
    return engine


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return open_engine(folder)


def ask(
    name: str, form: Grammar | None, num_prompt: int = 9, adapter: AdapterRef | None = None, **sampling: object
) -> Request:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 400, **sampling}, grammar=form)
    return Request(name, tuple((7 * i + num_prompt * i) % 256 for i in range(1, num_prompt + 1)), params, adapter)


def text_of(events: Iterable[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def answer(engine: Engine, request: Request) -> tuple[str, FinishReason | None]:
    events = run_engine(engine, [request])[request.id]
    return text_of(events), events[-1].finish_reason


# The answers.


def test_tokens_are_the_likeliest_allowed_ones_of_hugging_face(folder: Path, engine: Engine):
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    compiler = GrammarCompiler(AutoTokenizer.from_pretrained(folder / "base"))
    for form in (JSON, WORDS):
        state, request = compiler.matcher(form, frozenset((EOS,))), ask("a", form)
        masks, tokens = MaskBuilder(engine._model.ops, model.config.vocab_size, 1), list(request.prompt_tokens)
        while not state.is_complete and tokens[-1] != EOS:
            with torch.inference_mode():
                logits = model(torch.tensor([tokens])).logits[0, -1:].clone()
            masks.apply(logits, masks.build([0], [state]))
            tokens.append(int(logits.argmax()))
            if tokens[-1] != EOS:
                state.take(tokens[-1])
        assert tokens_of(run_engine(engine, [request])["a"]) == tokens[len(request.prompt_tokens) :]


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 1.3}, {"temperature": 1.0, "top_p": 0.8, "top_k": 40}, {"frequency_penalty": 1.0}],
    ids=["greedy", "drawn", "filtered", "penalised"],
)
@pytest.mark.parametrize("adapter", [None, REF], ids=["base", "adapter"])
def test_every_answer_matches_its_schema(engine: Engine, sampling: dict, adapter: AdapterRef | None):
    requests = [ask(str(seed), JSON, 3 + seed, adapter, seed=seed, **sampling) for seed in range(8)]
    for events in run_engine(engine, requests).values():
        assert events[-1].finish_reason is FinishReason.STOP, events[-1]
        jsonschema.validate(json.loads(text_of(events)), SCHEMA)


def test_an_answer_stops_only_where_its_grammar_may(engine: Engine):
    """A model that always wants to stop gets no end token before the grammar allows it, and one as soon as it does."""
    eager = {"logit_bias": ((EOS, 100.0),)}
    assert re.fullmatch("[a-z]{3,12} [a-z]{3,12} [a-z]{3}", answer(engine, ask("a", WORDS, **eager))[0])
    never = {"logit_bias": ((EOS, -100.0),)}
    text, reason = answer(engine, ask("b", WORDS, **never))
    assert reason is FinishReason.STOP, "nothing can follow the longest answer"
    assert re.fullmatch("[a-z]{3,12}( [a-z]{3,12}){4} [a-z]{12}", text)
    text, reason = answer(engine, ask("c", WORDS, ignore_eos=True))
    assert re.fullmatch("[a-z]{3,12}( [a-z]{3,12}){4} [a-z]{12}", text)
    assert reason is FinishReason.STOP


def test_a_stop_token_of_the_request_ends_it_where_the_grammar_may_stop(engine: Engine):
    events = run_engine(
        engine, [ask("a", grammar.regex("[ab]{2,4}"), stop_token_ids=(259,), logit_bias=((259, 100.0),))]
    )["a"]
    assert re.fullmatch("[ab]{2}", text_of(events))
    assert tokens_of(events)[-1] == 259


def test_max_tokens_and_stop_strings_end_an_answer_earlier(engine: Engine):
    whole, _ = answer(engine, ask("a", WORDS))
    assert answer(engine, ask("b", WORDS, max_tokens=4)) == (whole[:4], FinishReason.LENGTH)
    assert answer(engine, ask("c", WORDS, stop=(" ",))) == (whole.split(" ")[0], FinishReason.STOP)
    fixed = ask("d", grammar.choice(["abcd"]), max_tokens=4)
    assert answer(engine, fixed) == ("abcd", FinishReason.STOP), "a complete answer is not cut"


def test_text_held_for_a_stop_string_comes_when_the_grammar_is_complete(engine: Engine):
    assert answer(engine, ask("a", grammar.choice(["abc"]), stop=("cd",))) == ("abc", FinishReason.STOP)


def test_logprobs_are_those_of_the_model_without_the_grammar(engine: Engine):
    free = run_engine(engine, [ask("a", None, max_tokens=1, num_logprobs=5)])["a"][0].logprobs[0]
    bound = run_engine(engine, [ask("b", grammar.regex("[0-9]{1,3}"), max_tokens=1, num_logprobs=5)])["b"][0].logprobs[
        0
    ]
    assert bound.top == free.top
    assert bound.token != free.token
    assert bound.logprob <= free.top[0][1]


def test_a_request_whose_own_fields_exclude_every_allowed_token_fails_alone(engine: Engine):
    a = 64
    events = run_engine(engine, [ask("a", grammar.choice(["a"]), bad_words=((a,),)), ask("b", WORDS)])
    assert isinstance(events["a"][-1].error, InvalidRequestError)
    assert "structured output" in str(events["a"][-1].error)
    assert events["b"][-1].finish_reason is FinishReason.STOP


# Beside other requests.


def test_plain_rows_of_a_mixed_batch_have_the_tokens_of_an_engine_without_grammars(folder: Path, engine: Engine):
    plain = [ask(f"plain-{i}", None, 4 + 5 * i, REF if i % 2 else None, max_tokens=40) for i in range(4)]
    drawn = [ask(f"drawn-{i}", None, 6, temperature=1.0, seed=i, max_tokens=40) for i in range(3)]
    asking = [ask("asking", None, 8, num_logprobs=3, max_tokens=40)]
    expected = run_engine(open_engine(folder), [*plain, *drawn, *asking])
    bound = [ask(f"bound-{i}", (JSON, WORDS)[i % 2], 5 + i, REF if i % 3 else None, temperature=0.5) for i in range(6)]
    mixed = [request for pair in zip(bound, [*plain, *drawn], strict=False) for request in pair]
    found = run_engine(engine, [*mixed, *drawn[2:], *asking])
    for name, events in expected.items():
        assert tokens_of(found[name]) == tokens_of(events)
        assert [event.logprobs for event in found[name]] == [event.logprobs for event in events]


def test_plain_requests_never_touch_the_library(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a plain request built a mask")

    monkeypatch.setattr(MaskBuilder, "build", refuse)
    monkeypatch.setattr(GrammarCompiler, "start", refuse)
    engine = open_engine(folder)
    run_engine(engine, [ask("a", None, max_tokens=5), ask("b", None, max_tokens=5, temperature=1.0, num_logprobs=2)])


@pytest.mark.parametrize("swap_bytes", [0, 1 << 20], ids=["recomputed", "swapped"])
def test_answers_are_the_same_after_preemption(folder: Path, engine: Engine, swap_bytes: int):
    requests = [ask(str(i), (JSON, WORDS)[i % 2], 20 + i, temperature=1.0, seed=i, max_tokens=300) for i in range(8)]
    expected = {name: tokens_of(events) for name, events in run_engine(engine, requests).items()}
    small = open_engine(folder, 110, swap_bytes=swap_bytes, page_tokens=4, prefix_cache="off")
    assert {name: tokens_of(events) for name, events in run_engine(small, requests).items()} == expected
    assert small.stats()["preemptions"] > 0


def test_a_long_prompt_in_chunks_gives_the_same_answer(folder: Path, engine: Engine):
    requests = [ask(str(i), JSON, 90 + i) for i in range(3)]
    expected = {name: tokens_of(events) for name, events in run_engine(engine, requests).items()}
    chunked = open_engine(folder, max_batch_tokens=16)
    assert {name: tokens_of(events) for name, events in run_engine(chunked, requests).items()} == expected


# Resumption.


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "drawn"])
def test_another_replica_continues_an_answer_after_any_token(engine: Engine, sampling: dict):
    request = ask("a", JSON, **sampling)
    whole = run_engine(engine, [request])["a"]
    tokens = tokens_of(whole)
    for num_known in range(0, len(tokens), 3):
        resumed = run_engine(engine, [replace(request, id=f"r{num_known}", resumed_tokens=tuple(tokens[:num_known]))])
        events = resumed[f"r{num_known}"]
        assert tokens_of(events) == tokens[num_known:]
        assert text_of(events) == text_of(whole[num_known:])
        assert events[-1].finish_reason is FinishReason.STOP


def test_a_resumed_answer_that_is_complete_ends_at_once(engine: Engine):
    request = ask("a", JSON)
    tokens = tuple(tokens_of(run_engine(engine, [request])["a"]))
    events = run_engine(engine, [replace(request, resumed_tokens=tokens)])["a"]
    assert (tokens_of(events), events[-1].finish_reason) == ([], FinishReason.STOP)


def test_resumed_tokens_that_do_not_match_are_refused(engine: Engine):
    with pytest.raises(InvalidRequestError, match="choice: "):
        engine.submit(replace(ask("a", grammar.choice(["abc"])), resumed_tokens=(5, 6)))
    assert not engine.has_work


# The loop.


async def drain(loop: EngineLoop, request: Request) -> list[TokenEvent]:
    return [event async for event in loop.generate(request)]


async def test_grammars_compile_once_and_off_the_engines_thread(folder: Path, monkeypatch: pytest.MonkeyPatch):
    threads: list[str] = []
    original = matcher._compile

    def compile(*args: object) -> object:
        threads.append(threading.current_thread().name)
        return original(*args)

    monkeypatch.setattr(matcher, "_compile", compile)
    loop = EngineLoop(open_engine(folder))
    loop.start()
    try:
        texts = [text_of(await drain(loop, ask(f"a{i}", JSON))) for i in range(3)]
        together = await asyncio.gather(*(drain(loop, ask(f"b{i}", JSON, 5 + i)) for i in range(6)))
    finally:
        loop.stop()
    assert len(set(texts)) == 1
    for text in (*texts, *map(text_of, together)):
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(threads) == 1
    assert threads[0].startswith("grammar")


async def test_a_grammar_that_cannot_be_compiled_is_refused_before_any_step(folder: Path):
    loop = EngineLoop(open_engine(folder))
    loop.start()
    try:
        with pytest.raises(InvalidRequestError, match=r"(?s)my_field: .*unclosed"):
            await drain(loop, ask("a", grammar.regex("[a-", "my_field")))
        assert loop.stats()["steps"] == 0
        assert text_of(await drain(loop, ask("a", grammar.choice(["yes"])))) == "yes"
    finally:
        loop.stop()


def test_an_adapters_own_tokenizer_and_end_token_apply(tmp_path: Path):
    """The adapter brings a template and ends with <|im_end|>, which the base's own dialect does not."""
    base = chat_world(tmp_path / "base")
    tokenizer = chat_tokenizer(tmp_path / "own", template=CHATML, eos="<|im_end|>", extra=["<|call|>"])
    engine = Engine.open(base, ServingConfig(memory_bytes=4096 * KIB, max_rank=16))
    engine.dialects.load("own", lambda: tmp_path / "own")
    ref = AdapterRef("hash", "own", 1, "blob", dialect="own")
    engine.add_adapter(ref, load_adapter(make_adapter(tmp_path / "adapter", base)))
    end, call = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|call|>"])
    form = grammar.regex("[a-z]{2,9}")
    for adapter, last in ((ref, end), (None, tokenizer.convert_tokens_to_ids("<|endoftext|>"))):
        events = run_engine(engine, [ask("a", form, adapter=adapter, logit_bias=((last, 100.0), (call, 50.0)))])["a"]
        assert re.fullmatch("[a-z]{2}", text_of(events))
        assert tokens_of(events)[-1] == last
    marked = grammar.context_free('start: <|call|> "go"', "my_field")
    assert tokens_of(run_engine(engine, [ask("b", marked, adapter=ref)])["b"])[0] == call
    with pytest.raises(InvalidRequestError, match=r"(?s)my_field: .*unknown special token.*call"):
        engine.submit(ask("c", marked))
