"""The engine generates the tokens of Hugging Face and PEFT: alone, in any batch, after eviction and preemption."""

import json
import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from cluster.adapters.dialect import base_dialect
from cluster.adapters.files import Adapter, LoraFactors, load_adapter
from cluster.config.settings import ServingConfig
from cluster.errors import ConfigError, InvalidAdapterError, InvalidRequestError, NotFoundError, OverloadedError
from serving.engine.engine import Engine
from serving.engine.request import AdapterRef, FinishReason, Request, SamplingParams, TokenEvent
from tests.worlds.serving import EOS, KINDS, make_adapter, make_checkpoint, make_tokenizer

ARCHITECTURES = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 13},
    "Qwen2ForCausalLM": {
        "use_sliding_window": True,
        "sliding_window": 11,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "Qwen3ForCausalLM": {},
}
ADAPTERS = {
    "r4": {"rank": 4},
    "r8": {"rank": 8},
    "r16": {"rank": 16, "scale": 0.1},
    "rslora": {"rank": 8, "rslora": True, "scale": 0.1},
    "qv": {"rank": 8, "modules": ("q_proj", "v_proj"), "scale": 0.3},
    "pattern": {"rank": 4, "rank_pattern": {"down_proj": 7, "q_proj": 2}, "alpha_pattern": {"v_proj": 5.0}},
    "dora": {"rank": 8, "dora": True},
    "dora-qv": {
        "rank": 3,
        "dora": True,
        "rslora": True,
        "modules": ("q_proj", "v_proj"),
        "rank_pattern": {"v_proj": 5},
    },
    "embedding": {"rank": 4, "modules": ("embed_tokens", "k_proj")},
    "head": {"rank": 4, "modules": ("lm_head", "o_proj"), "scale": 0.1},
    "dora-everywhere": {"rank": 5, "dora": True, "modules": (*KINDS, "embed_tokens", "lm_head")},
}
NAMES = ("base", *ADAPTERS)
NUM_NEW = 20
PROMPTS = {n: tuple((7 * i + n * i * i) % 256 for i in range(1, n + 1)) for n in (1, 6, 35)}
KIB = 1024


@dataclass(frozen=True)
class BaseWithReference:
    """A checkpoint, its adapters, and what the reference generates: by adapter name and prompt length."""

    folder: Path
    adapters: Mapping[str, Adapter]
    reference: Mapping[tuple[str, int], list[int]]

    def engine(self, *, adapters: bool = True, memory_kib: int = 4096, **settings: object) -> Engine:
        config = ServingConfig(memory_bytes=memory_kib * KIB, **settings)
        engine = Engine.open(self.folder, config)
        for name, adapter in self.adapters.items() if adapters else ():
            engine.add_adapter(ref_of(name), adapter)
        return engine


def ref_of(name: str) -> AdapterRef | None:
    return None if name == "base" else AdapterRef(f"hash-of-{name}", name, 1, f"blob-of-{name}")


def request_of(name: str, num_prompt: int, **sampling: object) -> Request:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": NUM_NEW, **sampling})
    return Request(f"{name}/{num_prompt}", PROMPTS[num_prompt], params, ref_of(name))


ALL = [request_of(name, num_prompt) for num_prompt in PROMPTS for name in NAMES]


def run(engine: Engine, requests: list[Request], submit_every: int = 0, max_steps: int = 3000) -> dict[str, list]:
    """Run requests to their end and return their events. Submits all at once, or one every `submit_every` steps."""
    waiting = list(requests)
    events: dict[str, list[TokenEvent]] = defaultdict(list)
    for step in range(max_steps):
        while waiting and (not submit_every or step % submit_every == 0):
            engine.submit(waiting.pop(0))
            if submit_every:
                break
        for event in engine.step():
            events[event.request_id].append(event)
        engine.check_integrity()
        if not waiting and not engine.has_work:
            return events
    raise AssertionError("the engine did not finish")


def tokens_of(events: dict[str, list[TokenEvent]]) -> dict[str, list[int]]:
    return {id: [token for event in news for token in event.tokens] for id, news in events.items()}


def text_of(news: list[TokenEvent]) -> str:
    return "".join(event.text for event in news)


def only(engine: Engine, request: Request) -> list[TokenEvent]:
    return run(engine, [request])[request.id]


def assert_parity(base: BaseWithReference, events: dict[str, list[TokenEvent]], requests: list[Request]) -> None:
    got = tokens_of(events)
    for request in requests:
        name, _, num_prompt = request.id.partition("/")
        assert got[request.id] == base.reference[name, int(num_prompt)], request.id


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseWithReference:
    checkpoint, folders = make_files(tmp_path_factory.mktemp(request.param), request.param)
    adapters = {name: load_adapter(folder) for name, folder in folders.items()}
    return BaseWithReference(checkpoint, adapters, dict(generate_reference(checkpoint, folders)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> BaseWithReference:
    """A base without a reference, for tests that do not depend on the architecture."""
    checkpoint, folders = make_files(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM")
    return BaseWithReference(checkpoint, {name: load_adapter(folder) for name, folder in folders.items()}, {})


def make_files(folder: Path, architecture: str) -> tuple[Path, dict[str, Path]]:
    checkpoint = make_checkpoint(folder / "base", architecture, **ARCHITECTURES[architecture])
    settings = enumerate(ADAPTERS.items())
    return checkpoint, {name: make_adapter(folder / name, checkpoint, seed=i, **kind) for i, (name, kind) in settings}


def generate_reference(checkpoint: Path, folders: dict[str, Path]) -> Iterator[tuple[tuple[str, int], list[int]]]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for num_prompt in PROMPTS:
        yield ("base", num_prompt), greedy(model, num_prompt)
    first, *others = folders
    with warnings.catch_warnings():  # about adapters on one of two tied embeddings, which is what we want
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        model = PeftModel.from_pretrained(model, folders[first], adapter_name=first)
        for name in others:
            model.load_adapter(folders[name], adapter_name=name)
    for name in folders:
        model.set_adapter(name)
        for num_prompt in PROMPTS:
            yield (name, num_prompt), greedy(model, num_prompt)


def greedy(model: torch.nn.Module, num_prompt: int) -> list[int]:
    prompt = torch.tensor([PROMPTS[num_prompt]])
    output = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NUM_NEW, do_sample=False
    )
    return output[0, num_prompt:].tolist()


# Parity with Hugging Face and PEFT.


def test_reference_tells_the_adapters_apart(base: BaseWithReference) -> None:
    assert len({tuple(base.reference[name, 35]) for name in NAMES}) == len(NAMES)


def test_parity_of_each_request_alone(base: BaseWithReference) -> None:
    engine = base.engine()
    for request in ALL:
        assert_parity(base, run(engine, [request]), [request])


def test_parity_of_all_requests_in_one_batch(base: BaseWithReference) -> None:
    engine = base.engine()
    assert_parity(base, run(engine, ALL), ALL)
    assert engine.stats()["steps"] == NUM_NEW


def test_parity_with_vocabulary_rows_longer_than_a_page(base: BaseWithReference) -> None:
    """Pages have 160 elements, the vocabulary has 261 tokens."""
    assert_parity(base, run(base.engine(page_tokens=2), ALL), ALL)


def test_parity_of_requests_that_arrive_one_by_one(base: BaseWithReference) -> None:
    assert_parity(base, run(base.engine(), ALL, submit_every=2), ALL)


@pytest.mark.parametrize("max_batch_tokens", [8, 31])
def test_parity_with_chunked_prefill(base: BaseWithReference, max_batch_tokens: int) -> None:
    engine = base.engine(max_batch_tokens=max_batch_tokens)
    assert_parity(base, run(engine, ALL, submit_every=3), ALL)


@pytest.mark.parametrize("swap_bytes", [0, 8 * KIB, 1024 * KIB])
def test_parity_after_preemption_and_eviction(base: BaseWithReference, swap_bytes: int) -> None:
    engine = base.engine(memory_kib=190, page_tokens=4, swap_bytes=swap_bytes)
    assert_parity(base, run(engine, ALL), ALL)
    stats = engine.stats()
    assert stats["preemptions"] > 0
    assert stats["evictions"] > 0
    assert (stats["swap_pages_in"] > 0, stats["swap_pages_used"]) == (swap_bytes > 0, 0)


def test_parity_after_eviction_and_reload(base: BaseWithReference) -> None:
    engine = base.engine(memory_kib=190, page_tokens=4)
    for _ in range(2):
        for request in ALL:
            assert_parity(base, run(engine, [request]), [request])
    assert engine.stats()["evictions"] > len(ADAPTERS)
    assert engine.stats()["preemptions"] == 0


def test_kinds_of_adapters_that_no_request_uses_cost_nothing(
    llama: BaseWithReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llama.engine()
    for name in ("dora_scale", "lora_lookup"):
        monkeypatch.setattr(engine._model.ops, name, None)
    plain = [request_of(name, 6) for name in ("base", "r4", "rslora", "pattern")]
    assert len(run(engine, plain)) == len(plain)
    with pytest.raises(TypeError):
        run(engine, [request_of("dora", 6)])


# Seeded sampling: the same request always gets the same answer.


@pytest.fixture(scope="module")
def sampled(llama: BaseWithReference) -> tuple[list[Request], dict[str, list[TokenEvent]]]:
    requests = [
        request_of("r8", 6, temperature=1.0, seed=1, top_p=0.9),
        request_of("base", 6, temperature=1.3, seed=2),
        request_of("qv", 35, temperature=0.8, seed=3, top_k=20, num_logprobs=2),
    ]
    return requests, {request.id: only(llama.engine(), request) for request in requests}


def test_seeded_tokens_are_the_same_in_any_batch(llama: BaseWithReference, sampled: tuple) -> None:
    requests, alone = sampled
    others = [request for request in ALL if request.id not in alone]
    events = run(llama.engine(), [*others[:5], *requests, *others[5:]], submit_every=1)
    assert {id: tokens_of(events)[id] for id in alone} == tokens_of(alone)
    assert {id: text_of(events[id]) for id in alone} == {id: text_of(alone[id]) for id in alone}


def test_seeded_tokens_are_the_same_after_preemption(llama: BaseWithReference, sampled: tuple) -> None:
    requests, alone = sampled
    engine = llama.engine(memory_kib=130, page_tokens=4)
    events = run(engine, [replace(request_of(name, 35), id=f"filler-{name}") for name in ("base", "r4")] + requests)
    assert engine.stats()["preemptions"] > 0
    assert {id: tokens_of(events)[id] for id in alone} == tokens_of(alone)


@pytest.mark.parametrize("num_resumed", [1, 9, NUM_NEW - 1])
def test_a_resumed_request_generates_the_same_tokens(
    llama: BaseWithReference, sampled: tuple, num_resumed: int
) -> None:
    requests, alone = sampled
    for request in requests:
        tokens = tokens_of(alone)[request.id]
        news = only(llama.engine(), replace(request, resumed_tokens=tuple(tokens[:num_resumed])))
        assert [token for event in news for token in event.tokens] == tokens[num_resumed:]
        assert text_of(news) == text_of(alone[request.id][num_resumed:])
        assert news[-1].finish_reason is alone[request.id][-1].finish_reason


def test_another_seed_or_no_seed_gives_other_tokens(llama: BaseWithReference) -> None:
    request = request_of("base", 6, temperature=1.5, seed=1)
    unseeded = replace(request, sampling=replace(request.sampling, seed=None))
    others = [replace(request, sampling=replace(request.sampling, seed=2)), unseeded, unseeded]
    answers = {tuple(tokens_of(run(llama.engine(), [r]))[r.id]) for r in [request, *others]}
    assert len(answers) == 4


# How a sequence ends.


def test_a_request_that_is_resumed_at_its_end_ends_at_once(llama: BaseWithReference) -> None:
    resumed = tuple(range(NUM_NEW))
    assert only(llama.engine(), replace(ALL[0], resumed_tokens=resumed)) == [
        TokenEvent(ALL[0].id, finish_reason=FinishReason.LENGTH)
    ]
    (event,) = only(llama.engine(), replace(ALL[0], resumed_tokens=(5, EOS)))
    assert event.finish_reason is FinishReason.STOP


def test_the_eos_token_ends_a_sequence_and_has_no_text(llama: BaseWithReference) -> None:
    tokens = [event.tokens[0] for event in only(llama.engine(), request_of("r8", 6))]
    end = tokens.index(tokens[4])
    model_end = {"eos_token_id": [EOS, tokens[4]]}
    engine = Engine.open(with_generation_config(llama.folder, model_end), ServingConfig(memory_bytes=KIB**2))
    engine.add_adapter(ref_of("r8"), llama.adapters["r8"])
    news = only(engine, request_of("r8", 6))
    assert [event.tokens[0] for event in news] == tokens[: end + 1]
    assert news[-1].finish_reason is FinishReason.STOP
    ignoring = only(engine, request_of("r8", 6, ignore_eos=True))
    assert [event.tokens[0] for event in ignoring] == tokens
    assert ignoring[-1].finish_reason is FinishReason.LENGTH
    assert text_of(ignoring).startswith(text_of(news).rstrip("\ufffd"))


def with_generation_config(folder: Path, settings: dict) -> Path:
    """Copy a checkpoint and give the copy another generation config."""
    copy = folder.parent / "copy"
    copy.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "generation_config.json").write_text(json.dumps(settings))
    return copy


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        ({"eos_token_id": 3}, {}, {3}),
        ({"eos_token_id": [1, 2]}, {"eos_token_id": 9}, {1, 2}),
        ({}, {"eos_token_id": 9}, {9}),
        (None, {"eos_token_id": 9}, {9}),
        (None, {}, {EOS}),
    ],
)
def test_eos_ids_come_from_either_file_or_the_tokenizer(
    tmp_path: Path, generation: dict | None, config: dict, ids: set[int]
) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert base_dialect(tmp_path).end_ids == ids


def test_a_stop_string_ends_a_sequence_and_is_not_shown(llama: BaseWithReference) -> None:
    whole = only(llama.engine(), request_of("r8", 6, temperature=1.0, seed=5, max_tokens=60))
    text = text_of(whole)
    stop = next(
        text[i : i + 2] for i in range(8, len(text)) if text[i : i + 2].isascii() and text[i : i + 2].isprintable()
    )
    news = only(llama.engine(), request_of("r8", 6, temperature=1.0, seed=5, max_tokens=60, stop=(stop,)))
    assert text_of(news) == text[: text.index(stop)]
    assert news[-1].finish_reason is FinishReason.STOP


def test_the_context_length_limits_max_tokens(llama: BaseWithReference) -> None:
    news = only(llama.engine(max_model_tokens=40), request_of("base", 35, max_tokens=1000, ignore_eos=True))
    assert sum(len(event.tokens) for event in news) == 5
    assert news[-1].finish_reason is FinishReason.LENGTH


def test_logprobs_are_those_of_the_model(llama: BaseWithReference) -> None:
    from transformers import AutoModelForCausalLM

    news = only(llama.engine(), request_of("base", 6, num_logprobs=3))
    model = AutoModelForCausalLM.from_pretrained(llama.folder, dtype=torch.float32)
    tokens = [*PROMPTS[6], *(event.tokens[0] for event in news)]
    with torch.inference_mode():
        expected_TV = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    for position, event in enumerate(news, start=5):
        (logprob,) = event.logprobs
        assert logprob.token == event.tokens[0] == logprob.top[0][0]
        assert logprob.logprob == pytest.approx(float(expected_TV[position, logprob.token]), abs=1e-4)
        assert [v for _, v in logprob.top] == pytest.approx(expected_TV[position].topk(3).values.tolist(), abs=1e-4)


# Bad input: a clear error, and no harm to other requests.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_tokens": (1,) * 64}, "64 tokens, the model takes at most 63"),
        ({"prompt_tokens": ()}, "empty"),
        ({"prompt_tokens": (1, 9999)}, "vocabulary"),
        ({"prompt_tokens": (1, -1)}, "vocabulary"),
        ({"sampling": SamplingParams(max_tokens=-1)}, "max_tokens is -1"),
    ],
)
def test_an_invalid_request_is_refused(llama: BaseWithReference, change: dict, message: str) -> None:
    engine = llama.engine(max_model_tokens=64)
    with pytest.raises(InvalidRequestError, match=message):
        engine.submit(replace(ALL[0], **change))
    assert not engine.has_work
    engine.check_integrity()


def test_the_longest_allowed_prompt_is_served(llama: BaseWithReference) -> None:
    news = only(llama.engine(max_model_tokens=64), replace(ALL[0], prompt_tokens=(1,) * 63))
    assert len(news) == 1


def test_an_id_in_use_is_refused(llama: BaseWithReference) -> None:
    engine = llama.engine()
    engine.submit(ALL[0])
    with pytest.raises(InvalidRequestError, match="already"):
        engine.submit(ALL[0])


def test_unknown_adapter_is_not_found(llama: BaseWithReference) -> None:
    with pytest.raises(NotFoundError):
        llama.engine(adapters=False).submit(request_of("r8", 6))


def test_a_full_queue_refuses_requests(llama: BaseWithReference) -> None:
    engine = llama.engine(max_queue=1)
    engine.submit(ALL[0])
    with pytest.raises(OverloadedError):
        engine.submit(ALL[1])
    engine.check_integrity()


def test_request_larger_than_memory_is_refused(llama: BaseWithReference) -> None:
    with pytest.raises(InvalidRequestError, match=r"serving\.memory_bytes"):
        llama.engine(memory_kib=130, page_tokens=4).submit(request_of("r16", 35, max_tokens=200))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"page_tokens": 1}, "serving.page_tokens.* raise it to 2"), ({"memory_kib": 4}, "serving.memory_bytes")],
)
def test_too_little_memory_is_a_config_error(llama: BaseWithReference, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        llama.engine(adapters=False, **settings)


def test_smallest_pages_work(llama: BaseWithReference) -> None:
    expected = run(llama.engine(), ALL[:7])
    assert tokens_of(run(llama.engine(page_tokens=2), ALL[:7])) == tokens_of(expected)


def bad_shape(adapter: Adapter) -> Adapter:
    name, factors = next(iter(adapter.factors.items()))
    wrong = LoraFactors(factors.a_RD[:, :-1].clone(), factors.b_FR, factors.scaling)
    return Adapter({**adapter.factors, name: wrong})


def bad_module(adapter: Adapter) -> Adapter:
    factors = next(iter(adapter.factors.values()))
    return Adapter({**adapter.factors, "model.layers.7.self_attn.q_proj": factors})


@pytest.mark.parametrize("spoil", [bad_shape, bad_module])
def test_adapter_that_does_not_fit_is_refused(llama: BaseWithReference, spoil: Callable[[Adapter], Adapter]) -> None:
    engine = llama.engine(adapters=False)
    with pytest.raises(InvalidAdapterError, match=r"q_proj|down_proj"):
        engine.add_adapter(ref_of("r8"), spoil(llama.adapters["r8"]))
    assert not engine.has_adapter(ref_of("r8").key)


def test_an_embedding_retrained_beside_its_lora_is_refused(llama: BaseWithReference) -> None:
    engine, adapter = llama.engine(adapters=False), llama.adapters["embedding"]
    table = engine._model.embedding_VD.clone()
    engine.add_adapter(ref_of("embedding"), replace(adapter, base_copies={"model.embed_tokens.weight": table}))
    table[7, 3] += 0.01
    with pytest.raises(InvalidAdapterError, match=r"'model\.embed_tokens\.weight' was retrained"):
        engine.add_adapter(ref_of("other"), replace(adapter, base_copies={"model.embed_tokens.weight": table}))


def test_rank_above_the_limit_is_refused(llama: BaseWithReference) -> None:
    with pytest.raises(InvalidAdapterError, match="rank 16 is above the limit of 8"):
        llama.engine(adapters=False, max_rank=8).add_adapter(ref_of("r16"), llama.adapters["r16"])


@pytest.mark.parametrize("max_batch_tokens", [512, 5])
def test_an_adapter_with_nan_logits_fails_alone(llama: BaseWithReference, max_batch_tokens: int) -> None:
    engine = llama.engine(max_batch_tokens=max_batch_tokens, memory_kib=400)
    expected = run(engine, ALL)
    poison = AdapterRef("hash-of-poison", "poison", 3, "")
    huge = {name: LoraFactors(f.a_RD * 1e18, f.b_FR * 1e18, 1.0) for name, f in llama.adapters["r4"].factors.items()}
    engine.add_adapter(poison, Adapter(huge))
    victims = [Request(f"poisoned-{n}", PROMPTS[n], SamplingParams(), poison) for n in PROMPTS]
    events = run(engine, [victims[0], *ALL[:7], *victims[1:], *ALL[7:]], submit_every=1)
    for victim in victims:
        (event,) = events.pop(victim.id)
        assert event.finish_reason is FinishReason.ABORT
        assert isinstance(event.error, InvalidAdapterError)
        assert "poison@3" in str(event.error)
    assert tokens_of(events) == tokens_of(expected)
    engine.submit(victims[2])
    engine.step()
    engine.abort(victims[2].id)
    assert tokens_of(run(engine, ALL)) == tokens_of(expected)


# Adapters come and go.


def test_a_removed_adapter_finishes_its_requests_and_frees_its_memory(llama: BaseWithReference) -> None:
    engine = llama.engine(adapters=False)
    free = engine.stats()["pages_free"]
    engine.add_adapter(ref_of("r8"), llama.adapters["r8"])
    expected = run(engine, [request_of("r8", 6)])
    for num_prompt in (6, 35):
        engine.submit(request_of("r8", num_prompt))
    engine.step()
    engine.remove_adapter(ref_of("r8").key)
    with pytest.raises(NotFoundError):
        engine.submit(request_of("r8", 1))
    events = run(engine, [])
    assert [news[-1].finish_reason for news in events.values()] == [FinishReason.LENGTH] * 2
    stats = engine.stats()
    assert (stats["pages_free"], stats["adapters_on_host"], stats["host_bytes"]) == (free, 0, 0)
    assert stats["tokens_generated"] == NUM_NEW * 2 + len(tokens_of(expected)["r8/6"])
    engine.add_adapter(ref_of("r8"), llama.adapters["r8"])
    assert tokens_of(run(engine, [request_of("r8", 6)])) == tokens_of(expected)


def test_an_evicted_adapter_works_at_its_new_place(llama: BaseWithReference) -> None:
    engine = llama.engine(adapters=False, memory_kib=80, page_tokens=4)
    engine.add_adapter(ref_of("r8"), llama.adapters["r8"])
    expected = only(engine, request_of("r8", 6))
    base = request_of("base", 35, max_tokens=40, ignore_eos=True)
    only(engine, base)
    assert engine.stats()["evictions"] == 1
    assert only(engine, request_of("r8", 6)) == expected


def test_adding_an_adapter_twice_changes_nothing(llama: BaseWithReference) -> None:
    engine = llama.engine()
    before = engine.stats()
    engine.add_adapter(ref_of("r8"), llama.adapters["r8"])
    assert engine.stats() == before


def test_abort_drops_the_request(llama: BaseWithReference) -> None:
    engine = llama.engine()
    free = engine.stats()["pages_free"]
    engine.submit(ALL[0])
    engine.step()
    engine.abort(ALL[0].id)
    engine.abort("never seen")
    assert not engine.has_work
    assert engine.step() == []
    assert engine.stats()["pages_free"] == free


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_lose_no_memory_and_no_tokens(llama: BaseWithReference, seed: int) -> None:
    draw = random.Random(seed)
    engine = llama.engine(
        adapters=False, memory_kib=190, page_tokens=4, max_batch_tokens=draw.choice([6, 40]), host_cache_bytes=130 * KIB
    )
    expected = tokens_of(run(llama.engine(), ALL))
    live: dict[str, Request] = {}
    tokens: dict[str, list[int]] = defaultdict(list)
    for number in range(200):
        operation = draw.choice(["submit"] * 4 + ["abort"] + ["remove"] + ["none"] * 5)
        if operation == "submit" and try_to_submit(llama, engine, request := draw.choice(ALL), id=str(number)):
            live[str(number)] = request
        elif operation == "abort" and live:
            engine.abort(id := draw.choice(list(live)))
            del live[id]
        elif operation == "remove":
            engine.remove_adapter(ref_of(draw.choice(list(ADAPTERS))).key)
        for event in engine.step():
            tokens[event.request_id] += event.tokens
        engine.check_integrity()
    for id, news in run(engine, []).items():
        tokens[id] += [token for event in news for token in event.tokens]
    assert len(live) > 10
    assert {id: tokens[id] for id in live} == {id: expected[request.id] for id, request in live.items()}
    for name in ADAPTERS:
        engine.remove_adapter(ref_of(name).key)
    stats = engine.stats()
    assert (stats["pages_free"], stats["host_bytes"]) == (stats["pages"], 0)


def try_to_submit(base: BaseWithReference, engine: Engine, request: Request, id: str) -> bool:
    """Submit a copy of a request, with its adapter. False if the host is full of adapters in use."""
    try:
        if request.adapter is not None:
            engine.add_adapter(request.adapter, base.adapters[request.adapter.name])
    except OverloadedError:
        return False
    engine.submit(replace(request, id=id))
    return True
